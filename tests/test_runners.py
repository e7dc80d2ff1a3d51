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
from storage.records import Row
from storage.store import Store
from tests.conftest import TINY, Cluster
from tests.sweeps import assert_invariants, assert_same, committed, left_over, lose, rows

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


def test_the_contract(
    runner: Runner, reference: dict[str, Row], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every task leaves one row, bit for bit that of the other runner; a second run runs nothing; resume
    runs exactly what is missing, after making damaged dense weights again; and nothing is left over."""
    store = Store(str(tmp_path / "store"))
    assert runner.spec(store, "resources.workers=2") == Outcome("tiny", done=8, failed=0, pending=0)
    table, problems = store.row_files()
    assert (len(table), problems) == (8, [])
    assert_same(rows(store), reference)
    assert left_over(store) == []
    assert len(store.row_file_names()) == 1
    before = committed(store)
    assert runner.spec(store).complete  # other resources: the same sweep, all done
    assert committed(store) == before

    lost = lose(store, slice(None, None, 3))
    before = committed(store)
    (dense,) = Path(store.root, "dense").iterdir()
    dense.write_bytes(dense.read_bytes()[:-1] + b"x")
    assert run_sweep(store, store.newest("tiny"), runner.options).complete
    assert "set aside" in capsys.readouterr().err
    assert {task_id for task_id, _ in committed(store) - before} == lost
    assert_invariants(store, "tiny", before, reference)


def test_a_dense_model_that_fails_and_two_precisions(runner: Runner, tmp_path: Path) -> None:
    """A dense model that cannot be trained leaves its tasks pending and says so; the others are done, in
    both precisions, though a process holds only one."""
    store = Store(str(tmp_path / "store"))
    outcome = runner.spec(
        store,
        "dense=[{epochs: 1, batch_size: 128, lr: 1.0e30}, {epochs: 1, batch_size: 128, lr: 0.05}]",
        "grid.precision=[fp32, bf16]",
        "candidates.count=1",
        "grid.seed=0",
    )
    assert (outcome.done, outcome.failed, outcome.pending) == (2, 0, 2)
    assert len(outcome.problems) == 1 and "diverged in epoch 1" in outcome.problems[0]
    losses = dict(store.sql("select precision, pruned_train_loss from rows").fetchall())
    assert losses["fp32"] != losses["bf16"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)


def test_pretended_gpus_are_shared_as_asked(tmp_path: Path) -> None:
    """Packed by memory: four workers run at once on two pretended GPUs, two on each, one device visible."""
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
