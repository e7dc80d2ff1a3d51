"""One contract for both runners: in this process, and on Ray."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from orchestrator.documents import Document
from orchestrator.run import Options, Outcome, run_spec, run_sweep
from storage.records import Row, Task
from storage.schema import PROVENANCE, SCHEMA, table_to_rows
from storage.store import Store
from tests.conftest import TINY, Cluster

Run = Callable[..., Outcome]


@dataclass(frozen=True)
class Runner:
    """How to run, by either runner."""

    options: Options

    def spec(self, store: Store, *overrides: str, text: str = TINY) -> Outcome:
        document = Document("tiny.yaml", text)
        for assignment in overrides:
            document.override(assignment)
        return run_spec(store, document, self.options)


@pytest.fixture(params=["inline", "ray"])
def runner(request: pytest.FixtureRequest) -> Runner:
    """Both runners; the one on Ray uses the session's cluster."""
    if request.param == "inline":
        return Runner(Options(inline=True))
    cluster: Cluster = request.getfixturevalue("cluster")
    return Runner(Options(address=cluster.address))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Row]:
    """The rows of the tiny sweep, run undisturbed in this process."""
    store = Store(str(tmp_path_factory.mktemp("reference")))
    assert Runner(Options(inline=True)).spec(store).complete
    return rows(store)


def rows(store: Store) -> dict[str, Row]:
    return {row.task_id: row for row in table_to_rows(store.row_files()[0])}


def same(one: Row, other: Row) -> bool:
    """Equal in every column but provenance, bit for bit; and by the same execution."""
    columns = [name for name in SCHEMA.names if name not in PROVENANCE]
    return all(getattr(one, c) == getattr(other, c) for c in columns) and one.execution == other.execution


def test_every_task_leaves_one_row_and_the_rows_are_the_same(
    runner: Runner, reference: dict[str, Row], tmp_path: Path
) -> None:
    """The contract: 8 tasks, 8 rows, bit for bit those of the other runner; a second run runs nothing."""
    store = Store(str(tmp_path / "store"))
    outcome = runner.spec(store, "resources.workers=2")
    assert outcome == Outcome("tiny", done=8, failed=0, pending=0)
    table, problems = store.row_files()
    assert (len(table), problems) == (8, [])
    found = rows(store)
    assert found.keys() == reference.keys()
    assert all(same(found[task_id], reference[task_id]) for task_id in found)
    files = sorted(Path(store.root, "rows").iterdir())
    assert runner.spec(store).complete  # other resources are the same sweep
    assert sorted(Path(store.root, "rows").iterdir()) == files
    assert not [p for p in Path(store.root).rglob("*") if ".tmp" in p.name]
    assert not list(Path(store.root, "scratch", "drivers").glob("*"))


def test_resume_runs_exactly_the_rest(runner: Runner, reference: dict[str, Row], tmp_path: Path) -> None:
    """Some rows lost: only their tasks run again, and the rows are those of the undisturbed run."""
    store = Store(str(tmp_path / "store"))
    assert runner.spec(store).complete
    files = sorted(Path(store.root, "rows").iterdir())
    for path in files[::3]:
        path.unlink()
    manifest = store.manifest("tiny")
    assert manifest is not None
    assert run_sweep(store, manifest, runner.options).complete
    left = sorted(Path(store.root, "rows").iterdir())
    assert len(left) == 8 and set(files) - set(files[::3]) < set(left)
    assert all(same(row, reference[row.task_id]) for row in rows(store).values())


def test_failed_tasks_have_rows_and_the_others_are_done(
    runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dense model that cannot be trained leaves its tasks pending; the other cell's are done."""
    store = Store(str(tmp_path / "store"))
    outcome = runner.spec(
        store,
        "dense=[{epochs: 1, batch_size: 128, lr: 1.0e30}, {epochs: 1, batch_size: 128, lr: 0.05}]",
        "candidates.count=1",
    )
    assert (outcome.done, outcome.failed, outcome.pending) == (2, 0, 2)
    assert len(outcome.problems) == 1 and "diverged in epoch 1" in outcome.problems[0]


def test_a_task_that_fails_does_not_take_its_neighbours_along(runner: Runner, tmp_path: Path) -> None:
    """Damaged dense weights: every task fails with a row of its own that says so."""
    store = Store(str(tmp_path / "store"))
    assert runner.spec(store, "candidates.count=1").complete
    (dense,) = Path(store.root, "dense").iterdir()
    dense.write_bytes(dense.read_bytes()[:-1] + b"x")
    outcome = runner.spec(store)
    assert (outcome.done, outcome.failed, outcome.pending) == (2, 6, 0)
    failed = store.sql("select error_class, sum(tasks) from failures group by 1").fetchall()
    assert failed == [("StoreError", 6)]


def test_two_precisions_in_one_sweep(runner: Runner, tmp_path: Path) -> None:
    """A process holds one precision; a sweep over two of them runs all the same."""
    store = Store(str(tmp_path / "store"))
    outcome = runner.spec(store, "grid.precision=[fp32, bf16]", "candidates.count=1", "grid.seed=0")
    assert outcome.complete
    losses = dict(store.sql("select precision, pruned_train_loss from rows").fetchall())
    assert losses["fp32"] != losses["bf16"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)


def test_a_task_that_kills_its_process_is_buried_alone(
    cluster: Cluster, reference: dict[str, Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both tasks of the deadly candidate get a failed row by the driver; all others are done, as ever."""

    def plant_killer() -> None:
        """What a segmentation fault in a kernel looks like, for candidate 2."""
        import prunesweep

        prunesweep.claim_rooms()
        import workers.task

        measure = workers.task.prune_and_measure

        def deadly(task: Task, dense: object, worker: object) -> object:
            return os._exit(139) if task.candidate == 2 else measure(task, dense, worker)  # pyright: ignore[reportArgumentType]

        workers.task.prune_and_measure = deadly  # pyright: ignore[reportAttributeAccessIssue]

    monkeypatch.setattr("orchestrator.cluster.SETUP_HOOK", plant_killer)
    store = Store(str(tmp_path / "store"))
    outcome = Runner(Options(address=cluster.address)).spec(store)
    assert (outcome.done, outcome.failed, outcome.pending) == (6, 2, 0)
    failed = store.sql("select error_class, candidate from rows where status = 'failed'").fetchall()
    assert failed == [("ProcessDied", 2)] * 2
    done = {task_id: row for task_id, row in rows(store).items() if row.status == "done"}
    assert all(same(row, reference[task_id]) for task_id, row in done.items())


def test_pretended_gpus_are_shared_as_asked(tmp_path: Path) -> None:
    """Half a GPU each: four workers run at once on two pretended GPUs, two on each, one device visible."""
    import subprocess

    script = Path(__file__).with_name("pretended_gpus.py")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    run = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=200, cwd=tmp_path, env=environment
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.split() == ["0", "0", "1", "1"]


def test_more_than_any_node_has_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    """Resources nobody has would wait for ever: one clear message instead."""
    from orchestrator.errors import UserError

    with pytest.raises(UserError, match="asks for 64 CPU"):
        Runner(Options(address=cluster.address)).spec(Store(str(tmp_path / "s")), "resources.cpus=64")
