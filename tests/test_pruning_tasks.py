"""Tasks by every pruner, scope, granularity and schedule: from their record to their row."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import workers.pruning
import workers.training
from orchestrator.run import Options, run_spec
from pruners.masks import zeroed
from storage.records import Cell, Dense, Recipe, Row, Shard, Task
from storage.schema import PROVENANCE, SCHEMA, rows_to_table, table_to_rows
from storage.store import Store
from tests.specs import document
from tests.sweeps import rows
from workers import load_network
from workers.importances import calibration_of, of_dense
from workers.pulse import Limits, Pulse, Stopped
from workers.worker import Worker

DENSE = Dense("lenet5_mini", "synthetic", Recipe(2, 64, ((0, 0.05),), momentum=0.9, seed=0))
RETRAIN = Recipe(2, 128, ((0, 0.02),), momentum=0.9, weight_decay=1e-2)
CELL = Cell(DENSE, (("conv1", 0.4), ("conv2", 0.4)), "l1", RETRAIN, calibration=8)
STEPS = 2 * 4
"""Minibatches of one retraining: 512 samples in batches of 128."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store with the dense weights."""
    store = Store(str(tmp_path_factory.mktemp("trained")))
    list(Worker(store, "none").run_shard(Shard("dense", dense=DENSE)))
    return store


@pytest.fixture(scope="module")
def worker(trained: Store) -> Worker:
    return Worker(trained, "none")


def row_of(worker: Worker, keep: str = "none", **changes: object) -> Row:
    """The row of a task of CELL with `changes`, as a reader of the store has it."""
    (row,) = worker.attempt([Task(replace(CELL, **changes), 0, 0)], keep=keep)  # pyright: ignore[reportArgumentType]
    return table_to_rows(rows_to_table([row]))[0]  # curves are rounded to float32 on their way


def measured(row: Row) -> dict[str, object]:
    return {name: getattr(row, name) for name in SCHEMA.names if name not in PROVENANCE}


# -- whole sweeps ------------------------------------------------------------------------------------

CRITERIA = ["l1", "l2", "taylor", "hessian", "fpgm", "lamp", "activation"]


def sweep(tmp_path: Path, grid: dict[str, Any], **keys: Any) -> list[Row]:
    """The rows of a sweep, run inline to its end."""
    grid = {"layers": [["conv1", "conv2"]], "ratio": 0.4} | grid
    assert run_spec(Store(str(tmp_path)), document(grid, calibration=8, **keys), Options(inline=True)).complete
    return list(rows(Store(str(tmp_path))).values())


def test_a_sweep_of_every_criterion_scope_and_schedule(tmp_path: Path) -> None:
    """Each combination has its row, with the count removed that its ratio says, and every score."""
    found = sweep(tmp_path / "a", {"pruner": [*CRITERIA, "random"], "scope": ["local", "global"]})
    found += sweep(tmp_path / "b", {"pruner": ["taylor", "l2", "random"], "schedule": "iterative-2"})
    assert len({(r.pruner, r.scope, r.schedule) for r in found}) == len(found) == 16 + 3
    for row in found:
        assert row.removed is not None and row.achieved_ratio == 0.4 and row.mask_sha256 is None
        lost = [len(one.units) for one in row.removed]
        assert sum(lost) == 8 and (row.scope == "global" or lost == [4, 4])
        assert row.equivalence_error is not None and row.equivalence_error <= 1e-9
        assert row.params is not None and row.dense_params is not None and row.params < row.dense_params
        scored = {name: getattr(row, f"score_{name}") for name in CRITERIA}
        assert all(math.isfinite(value) for value in scored.values()) and row.score_bn_scale is None
    for name in ("l1", "l2", "lamp", "fpgm"):  # of what needs no data, the criterion's own choice scores lowest
        own = {r.scope: getattr(r, f"score_{name}") for r in found if (r.pruner, r.schedule) == (name, "one-shot")}
        assert all(own["global"] <= getattr(r, f"score_{name}") + 1e-9 for r in found)
        assert all(own["local"] <= getattr(r, f"score_{name}") + 1e-9 for r in found if r.scope == "local")


def test_a_sweep_of_masks(tmp_path: Path) -> None:
    """Dense shapes, exact counts of zeros, by the serial back-end; the mask's hash tells candidates apart."""
    grid = {"granularity": "weight", "layers": [["conv1", "fc2"]]}
    found = sweep(tmp_path / "a", grid | {"pruner": ["l1", "random"], "scope": ["local", "global"]})
    found += sweep(tmp_path / "b", grid | {"pruner": "oracle"}, candidates={"mode": "sample", "count": 3})
    found += sweep(tmp_path / "c", grid | {"pruner": ["l1", "random"], "schedule": "iterative-2"})
    assert len(found) == 4 + 3 + 2
    removed = int(250 * 0.4) + int(100 * 0.4)
    for row in found:
        assert row.removed is None and row.achieved_ratio == removed / 350
        assert (row.params, row.macs) == (5500 - removed, row.dense_macs)
        assert row.equivalence_error == 0 and row.score_l1 is None
        assert '"backend":"serial"' in str(row.execution)
    hashes = {(r.pruner, r.scope, r.schedule, r.candidate): r.mask_sha256 for r in found}
    # Random ranks once, so its steps end where one shot does.
    assert hashes["random", "local", "iterative-2", 0] == hashes["random", "local", "one-shot", 0]
    assert len(set(hashes.values())) == 8


# -- scores ------------------------------------------------------------------------------------------


def test_scores_are_sums_over_the_removed_units(worker: Worker) -> None:
    """On the dense network, whatever the schedule; computed once per process, on fixed samples."""
    for schedule in ("one-shot", "iterative-2"):
        row, importances = row_of(worker, pruner="taylor", schedule=schedule), of_dense(CELL, worker)
        assert row.removed is not None and of_dense(replace(CELL, pruner="random"), worker) is importances
        for name, of in importances.items():
            if name != "bn_scale":
                units = [of[one.layer].needed(one.layer, name)[list(one.units)].sum() for one in row.removed]
                assert getattr(row, f"score_{name}") == pytest.approx(float(sum(units)))


def test_the_calibration_set_is_fixed(worker: Worker) -> None:
    """The first of one permutation: fewer samples are the beginning of more, and never more than there are."""
    some, more = (calibration_of(replace(CELL, calibration=n), worker) for n in (10, 2000))
    assert (len(some), len(more)) == (10, 512)
    (first,), (whole,) = some.in_order(600), more.in_order(600)
    assert torch.equal(first.images, whole.images[:10])
    (train,) = worker.data(DENSE).train.in_order(600)
    assert whole.labels.bincount().tolist() == train.labels.bincount().tolist()


def test_a_criterion_that_cannot_score_a_layer_fails_the_task(worker: Worker) -> None:
    """The error names the layer."""
    row = row_of(worker, pruner="bn_scale")
    assert (row.status, row.error_class) == ("failed", "NotScored")
    assert "conv1: bn_scale has no importance for it" in str(row.error)


def test_a_criterion_of_a_users_own(worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is given the network, the layer, images and labels; its scores are in score_extra."""
    code = """
        import torch

        def importance(model, layer, images, labels):
            assert not model.training and images.shape == (8, 1, 32, 32) and labels.shape == (8,)
            return torch.arange(len(model.get_submodule(layer).weight), 0, -1)

        def short(model, layer, images, labels):
            return torch.zeros(2)
    """
    (tmp_path / "rules_of_mine.py").write_text("\n".join(line[8:] for line in code.splitlines()))
    monkeypatch.syspath_prepend(str(tmp_path))
    name = "rules_of_mine:importance"
    for schedule in ("one-shot", "iterative-2"):
        row = row_of(worker, pruner=name, calibration=8, schedule=schedule)
        assert row.removed is not None and [one.units for one in row.removed] == [(6, 7, 8, 9)] * 2, row.error
        assert dict(row.score_extra or ()) == {name: 20.0}
    row = row_of(worker, pruner="rules_of_mine:short", calibration=8)
    assert "its shape is (2,), not (10,)" in str(row.error)


# -- masks and steps ---------------------------------------------------------------------------------


def test_a_mask_that_does_not_hold_fails_the_task(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are set to zero, and not masked, come back in retraining: no done row says otherwise."""
    monkeypatch.setattr(workers.pruning, "masked", zeroed)
    row = row_of(worker, granularity="weight")
    assert (row.status, row.error_class) == ("failed", "MaskBroken")


@pytest.mark.parametrize("schedule", ["one-shot", "iterative-2"])
def test_a_kept_network_has_its_zeros(worker: Worker, schedule: str) -> None:
    """Of dense shapes, the masks made permanent: what it computes is what the row says."""
    row = row_of(worker, keep="last", granularity="weight", schedule=schedule)
    network = load_network(f"{worker.store.root}/{row.kept_network}")
    weights = [network.get_parameter(f"{name}.weight") for name in ("conv1", "conv2")]
    assert [int((w == 0).sum()) for w in weights] == [100, 1000]
    test = worker.data(DENSE).test
    (whole,) = test.in_order(len(test))
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(network(whole.images), whole.labels)
    assert float(loss) == pytest.approx(row.last_test_loss, rel=1e-5)


def test_a_kept_network_after_steps_lost_what_the_row_says(worker: Worker) -> None:
    """`removed` is in the dense network's numbers: the loader builds the shape from it."""
    row = row_of(worker, keep="last", schedule="iterative-3", scope="global")
    assert row.removed is not None
    network = load_network(f"{worker.store.root}/{row.kept_network}")
    shapes = [len(network.get_parameter(f"{one.layer}.weight")) + len(one.units) for one in row.removed]
    assert shapes == [10, 10] and sum(p.numel() for p in network.parameters()) == row.params


def test_the_last_step_has_the_minibatches_of_one_shot(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other step has its own: no step sees another's order."""
    seen: list[str] = []
    minibatches = workers.training.minibatches

    def noted(n: int, size: int, dataset: str, seed: int, stream: str) -> object:
        seen.append(stream)
        return minibatches(n, size, dataset, seed, stream)

    monkeypatch.setattr(workers.training, "minibatches", noted)
    assert row_of(worker, schedule="iterative-3").status == "done"
    assert seen == [f"retrain{step}/{epoch}" for step in ("/step1", "/step2", "") for epoch in (0, 1)]


def test_a_step_that_diverges_is_a_result(worker: Worker) -> None:
    """Before the last: the row says so, with no curve and nothing measured after pruning."""
    row = row_of(worker, schedule="iterative-2", retrain=replace(RETRAIN, lr=((0, 1e8),)))
    assert (row.status, row.diverged, row.best_epoch, row.pruned_train_loss) == ("done", True, None, None)
    assert row.epoch_test_loss == (None, None) and row.dense_test_loss is not None


@pytest.mark.parametrize(
    ("stops", "granularity"),
    [((3,), "filter"), ((2 * STEPS, STEPS - 1), "filter"), ((STEPS + 1, 5, 4, 2), "weight")],
)
def test_a_task_of_steps_that_was_stopped_gives_the_same_row(
    stops: tuple[int, ...], granularity: str, trained: Store, tmp_path: Path
) -> None:
    """Stopped in any step, and gone on with in a fresh worker: bit for bit the same row; one checkpoint at a time."""
    cell = replace(CELL, schedule="iterative-3", granularity=granularity, pruner="l1", scope="global")
    shard, task = Shard("s0", (Task(cell, 0, 0),), keep="best"), Task(cell, 0, 0)
    (undisturbed,) = run(store_with(trained, tmp_path / "whole"), shard)
    store = store_with(trained, tmp_path / "stopped")
    for after in stops:
        assert run(store, shard, after) == []
        assert store.scratch.checkpoints() == [task.task_id]
    torch.manual_seed(1)
    (row,) = run(store, shard, STEPS * 3)
    assert measured(row) == measured(undisturbed) and row.kept_network == undisturbed.kept_network
    assert store.scratch.checkpoints() == []


def store_with(trained: Store, path: Path) -> Store:
    """A store with the dense weights and nothing else."""
    file, store = trained.dense(DENSE.dense_id), Store(str(path))
    assert file is not None
    store.commit_dense(DENSE.dense_id, file.content)
    return store


def run(store: Store, shard: Shard, after: int = 10**6) -> list[Row]:
    """Run a shard in a fresh worker that is asked to stop after so many minibatches."""
    made, step = 0, workers.training._step
    with pytest.MonkeyPatch.context() as patch, Pulse(store, "driver", Limits()) as pulse:

        def counted(*arguments: object) -> object:
            nonlocal made
            made += 1
            if made == after:
                pulse.stop.set()
            return step(*arguments)  # pyright: ignore[reportArgumentType]

        patch.setattr(workers.training, "_step", counted)
        try:
            return list(Worker(store, "none", pulse=pulse).run_shard(shard))
        except Stopped:
            return []
