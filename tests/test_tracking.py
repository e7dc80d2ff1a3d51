"""--track: what a tracker is told of a sweep, and that a sweep does not depend on it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator import tracking
from orchestrator.errors import UserError
from orchestrator.tracking import check_tracker, measured
from storage.records import Shard
from tests import rows, specs
from tests.faults.quick import spec
from tests.faults.runs import quick
from tests.sweeps import rows as rows_of

STANDINS = Path(__file__).with_name("standins")
TASKS = specs.tasks(specs.document(candidates={"mode": "sample", "count": 3}))


class Heard:
    """A logger callback of Ray's, as far as ours is concerned: it keeps what it is told."""

    def __init__(self, *, deaf: bool = False) -> None:
        self.deaf, self.said, self.ids = deaf, list[tuple[Any, ...]](), list[str]()

    def setup(self) -> None:
        if self.deaf:
            raise ConnectionError("no tracker there\nand more lines")

    def log_trial_start(self, trial: Any) -> None:
        self.ids.append(trial.trial_id)
        self.said.append(("start", str(trial), trial.config))

    def log_trial_result(self, iteration: int, trial: Any, result: dict[str, Any]) -> None:
        self.said.append(("result", iteration, result))

    def log_trial_end(self, trial: Any, failed: bool) -> None:
        self.said.append(("end", failed))

    def on_experiment_end(self, trials: list[Any]) -> None:
        self.said.append(("over",))


def told(monkeypatch: pytest.MonkeyPatch, heard: Heard) -> Any:
    """Our callback, which tells `heard`."""
    from orchestrator import trackers

    monkeypatch.setitem(trackers._OF, "mlflow", lambda sweep: heard)
    return trackers.Trackers("mlflow", "mine")


def trial() -> Any:
    """Tune's trial of a shard."""
    config = {"shard": Shard("s0", tuple(TASKS)).to_dict(), "store": "secret"}
    return SimpleNamespace(trial_id="t0", local_path="/nowhere", config=config)


def test_a_shard_is_a_run_and_a_task_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run begins with the first task that is done, named by sweep and shard, its cell as configuration."""
    heard, of = Heard(), trial()
    callback = told(monkeypatch, heard)
    callback.setup()
    callback.on_trial_result(1, [], of, {"measures": [], "ending": None})
    assert heard.said == []
    callback.on_trial_result(2, [], of, {"measures": [{"seed": 0.0}, {"seed": 1.0}], "ending": None})
    callback.on_trial_result(3, [], of, {"measures": [{"seed": 2.0}], "ending": ["finished", "", None]})
    callback.on_trial_complete(3, [], of)
    callback.on_experiment_end([])
    (begin, *results), (end, over) = heard.said[:-2], heard.said[-2:]
    assert begin[:2] == ("start", "mine s0") and begin[2]["model"] == TASKS[0].cell.dense.model
    assert "secret" not in str(begin)
    assert [(i, result["seed"], result["training_iteration"]) for _, i, result in results] == [
        (1, 0.0, 1),
        (2, 1.0, 2),
        (3, 2.0, 3),
    ]
    assert (end, over) == (("end", False), ("over",))


def test_a_worker_s_next_shard_is_a_run_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial that goes on with another shard, or the same again, begins a run with another id, and step 1."""
    heard, of = Heard(), trial()
    callback = told(monkeypatch, heard)
    for ending in (["finished", "", None], None):
        callback.on_trial_result(1, [], of, {"measures": [{"seed": 0.0}], "ending": ending})
    callback.on_trial_error(1, [], of)
    assert [said[0] for said in heard.said] == ["start", "result", "end"] * 2
    assert [said[1] for said in heard.said if said[0] == "result"] == [1, 1]
    assert [said[1] for said in heard.said if said[0] == "end"] == [False, True]
    assert len(set(heard.ids)) == 2


def test_a_tracker_that_fails_is_told_nothing_more(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is said once, and nothing is raised."""
    heard, of = Heard(deaf=True), trial()
    callback = told(monkeypatch, heard)
    callback.setup()
    callback.on_trial_result(1, [], of, {"measures": [{"seed": 0.0}], "ending": None})
    callback.on_trial_error(1, [], of)
    callback.on_experiment_end([])
    assert heard.said == []
    assert capsys.readouterr().err.count("the tracker is told nothing more, the sweep goes on: no tracker there\n") == 1


def test_what_is_told_of_a_task() -> None:
    """Numbers only, those there are; a failed task is told as failed."""
    done = measured(rows.done(TASKS[0], pruned_train_loss=0.5, best_test_accuracy=0.25))
    assert done == {"candidate": TASKS[0].candidate, "seed": TASKS[0].seed, "failed": 0.0} | {
        "pruned_train_loss": 0.5,
        "best_test_accuracy": 0.25,
    } | {name: done[name] for name in tracking.MEASURES if name in done}
    assert all(isinstance(value, int | float) for value in done.values())
    failed = measured(rows.failed(TASKS[0]))
    assert failed["failed"] == 1.0 and "pruned_train_loss" not in failed


def test_a_tracker_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the extra; --inline goes without Ray's callbacks."""
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"wandb is not installed; pip install 'prunesweep\[track\]'"):
        check_tracker("wandb", inline=False)
    with pytest.raises(UserError, match="leave out --inline"):
        check_tracker("mlflow", inline=True)
    check_tracker(None, inline=True)


def test_ray_s_own_callback(tmp_path: Path) -> None:
    """A quick sweep on Ray with --track mlflow, which a stand-in takes down: every task once, every run ended."""
    root = Path(__file__).parents[1]
    file = tmp_path / "told.jsonl"
    env = {"PYTHONPATH": f"{root}:{STANDINS}", "MLFLOW_TRACKING_URI": f"file:{file}"}
    sweep = quick(tmp_path, spec(count=4, seeds=2), None, 0.0, **env)
    code, said = sweep.run("run", "quick.yaml", "--track", "mlflow")
    assert code == 0 and "the tracker is told nothing more" not in said, said
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    count = Counter(line["what"] for line in lines)
    assert (count["experiment"], count["run"], count["end"]) == (1, 2, 2)
    assert {line["status"] for line in lines if line["what"] == "end"} == {"FINISHED"}
    losses = [line["value"] for line in lines if line["what"] == "metric" and line["key"] == "pruned_train_loss"]
    assert sorted(losses) == sorted(float(row.pruned_train_loss or 0) for row in rows_of(sweep.store).values())
    assert {line["value"] for line in lines if line.get("key") == "sweep"} == {"quick"}


@pytest.mark.parametrize(
    ("environment", "runs", "problem"),
    [
        ({"WANDB_MODE": "offline"}, 2, None),
        ({"WANDB_API_KEY": "short"}, 0, "the tracker is told nothing more, the sweep goes on: "),
    ],
    ids=["offline", "a wrong key"],
)
def test_wandb(environment: dict[str, str], runs: int, problem: str | None, tmp_path: Path) -> None:
    """wandb itself: offline it keeps a run of each shard in the folder of the sweep; what keeps it from any is told."""
    root = Path(__file__).parents[1]
    sweep = quick(tmp_path, spec(count=4), None, 0.0, PYTHONPATH=str(root), **environment)
    code, said = sweep.run("run", "quick.yaml", "--track", "wandb")
    assert code == 0 and len(rows_of(sweep.store)) == 4, said
    assert len(list(tmp_path.glob("wandb/offline-run-*/*.wandb"))) == runs
    assert said.count("the tracker") == (problem is not None) and (problem is None or problem in said), said
