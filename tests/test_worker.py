"""The worker: one task, one row, the same row every time."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from storage.records import Cell, Dense, Recipe, Row, Shard, Task
from storage.schema import PROVENANCE, SCHEMA
from storage.store import Store
from workers import load_network
from workers.compiled import Compiled
from workers.datasets import DATASETS, DataMissing, Samples, Split, prepare
from workers.dense import load_dense
from workers.serial import Serial
from workers.streams import generator, seeded, stream_seed
from workers.training import minibatches
from workers.worker import PAUSE_AFTER, DenseMissing, MemoryShort, Repeated, Worker

DENSE = Dense("lenet5_mini", "synthetic", Recipe(2, 128, ((0, 0.05),), momentum=0.9, seed=0))
RETRAIN = Recipe(2, 128, ((0, 0.01), (1, 0.001)), momentum=0.9)
CELL = Cell(DENSE, (("conv1", 0.2),), "oracle", RETRAIN)
TASK = Task(CELL, 3, 0)


@pytest.fixture(scope="module")
def dense_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store with the dense model of DENSE in it."""
    store = Store(str(tmp_path_factory.mktemp("store")))
    assert list(Worker(store, "none").run_shard(Shard("dense", dense=DENSE))) == []
    return store


@pytest.fixture
def worker(dense_store: Store) -> Worker:
    """A fresh worker, as in a fresh process."""
    return Worker(dense_store, "none")


def attempt(worker: Worker, task: Task) -> Row:
    """The row of one task, which is not committed."""
    (row,) = worker.attempt([task])
    return row


def whole(samples: Samples) -> Split:
    """All samples as one minibatch."""
    (split,) = samples.in_order(len(samples))
    return split


def measured(row: Row) -> dict[str, Any]:
    """Every column but provenance: what equal execution must repeat bit for bit."""
    return {name: getattr(row, name) for name in SCHEMA.names if name not in PROVENANCE}


def test_a_row_holds_what_was_measured(worker: Worker) -> None:
    """A done row has every measurement, consistent with itself."""
    row = attempt(worker, TASK)
    assert (row.status, row.error) == ("done", None)
    assert row.task() == TASK
    assert row.removed is not None and row.removed[0].units == (0, 4)  # the fourth pair of ten
    assert (row.dense_params, row.params) == (5500, 5500 - 2 * 26 - 2 * 250)
    assert (row.dense_macs, row.macs) == (448_700, 359_500)
    assert row.achieved_ratio == 0.2
    assert row.equivalence_error is not None and row.equivalence_error <= 1e-9
    assert row.pruned_train_loss_n == DATASETS["synthetic"].train_size and row.pruned_train_loss_se is None
    assert row.epoch_test_accuracy is not None and row.best_epoch is not None
    assert row.best_test_accuracy == pytest.approx(max(a for a in row.epoch_test_accuracy if a is not None))
    assert row.last_test_accuracy == pytest.approx(row.epoch_test_accuracy[-1])
    assert row.last5_test_accuracy_mean == pytest.approx(np.mean([a for a in row.epoch_test_accuracy if a is not None]))
    assert row.diverged is False and row.last_train_loss is not None
    weight = load_dense(DENSE, _dense_content(worker)).get_parameter("conv1.weight").detach().double()
    assert row.score_l1 == pytest.approx(weight[[0, 4]].abs().sum().item())
    assert row.score_l2 == pytest.approx(sum(weight[i].norm().item() for i in (0, 4)))


def _dense_content(worker: Worker) -> bytes:
    file = worker.store.dense(DENSE.dense_id)
    assert file is not None
    return file.content


def test_same_task_same_row_whatever_ran_before(dense_store: Store) -> None:
    """Other tasks, drawn numbers and thread counts before it change no bit of a row."""
    first = attempt(Worker(dense_store, "none"), TASK)
    busy = Worker(dense_store, "none")
    attempt(busy, Task(replace(CELL, layers=(("conv2", 0.5),)), 7, 5))
    torch.manual_seed(1)
    torch.randn(1000)
    random.random()
    np.random.rand(10)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.set_float32_matmul_precision("medium")
    torch.set_default_dtype(torch.float64)
    try:
        second = attempt(busy, TASK)
        assert (torch.get_num_threads(), torch.get_default_dtype()) == (2, torch.float64)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision("highest")
        torch.set_default_dtype(torch.float32)
    assert measured(first) == measured(second)


def test_seeds_are_crossed_with_candidates() -> None:
    """The minibatches depend on data set, seed and epoch, on nothing else."""
    one = [batch.tolist() for batch in minibatches(300, 128, "synthetic", 3, "retrain/0")]
    assert [len(batch) for batch in one] == [128, 128, 44]
    assert sorted(i for batch in one for i in batch) == list(range(300))
    assert one == [batch.tolist() for batch in minibatches(300, 128, "synthetic", 3, "retrain/0")]
    others = [("synthetic", 3, "retrain/1"), ("synthetic", 4, "retrain/0"), ("digits", 3, "retrain/0")]
    for other in [*others, ("synthetic", 3, "dense/0")]:
        assert one != [batch.tolist() for batch in minibatches(300, 128, *other)]


def test_streams_are_pinned() -> None:
    """A stream's seed is the same on every machine, for ever."""
    assert stream_seed("mnist", 0, "order/0") == STREAM_GOLDEN
    assert torch.equal(torch.rand(3, generator=generator("a", 0, "b")), torch.rand(3, generator=generator("a", 0, "b")))


STREAM_GOLDEN = 9012009160643495859


def seed_all() -> None:
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)


def test_seeded_restores_every_global_generator() -> None:
    """Library code that draws globally leaves the caller's generators as they were."""
    seed_all()
    expected = (random.random(), np.random.rand(), torch.rand(1).item())
    seed_all()
    with seeded("mnist", 0, "init"):
        drawn = (random.random(), np.random.rand(), torch.rand(1).item())
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected
    assert drawn != expected


def test_retraining_seeds_differ_and_pruning_does_not(worker: Worker) -> None:
    """Another seed retrains differently from the same pruned network."""
    rows = [attempt(worker, Task(CELL, 3, seed)) for seed in (0, 1)]
    assert rows[0].pruned_train_loss == rows[1].pruned_train_loss
    assert rows[0].epoch_train_loss != rows[1].epoch_train_loss


def test_divergence_is_a_result(worker: Worker) -> None:
    """A loss that leaves the finite numbers: a done row, diverged, null from there on."""
    wild = replace(RETRAIN, epochs=4, lr=((0, 0.01), (2, 1e30)))
    row = attempt(worker, Task(replace(CELL, retrain=wild), 0, 0))
    assert (row.status, row.diverged, row.error) == ("done", True, None)
    assert row.epoch_test_loss is not None and len(row.epoch_test_loss) == 4
    assert [v is None for v in row.epoch_test_loss] == [False, False, True, True]
    assert row.best_epoch in (1, 2) and row.best_test_accuracy is not None
    assert row.last_test_accuracy is None and row.last5_test_loss_mean is None and row.last_train_loss is None


def test_a_failure_leaves_a_row(dense_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is raised in a task becomes its class and traceback; the next task runs."""
    import workers.task

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("the disk sang")

    store = Store(dense_store.root + "-failures")
    store.commit_dense(DENSE.dense_id, _dense_content(Worker(dense_store, "none")))
    shard = Shard("s", (Task(CELL, 0, 0), Task(CELL, 1, 0)))
    with monkeypatch.context() as patch:
        patch.setattr(workers.task, "retrain_and_measure", broken)
        rows = list(Worker(store, "none").run_shard(shard))
    assert [row.status for row in rows] == ["failed", "failed"]
    assert rows[0].error_class == "RuntimeError" and "the disk sang" in str(rows[0].error)
    assert rows[0].pruned_train_loss is None and rows[0].attempt == 1
    again = list(Worker(store, "none").run_shard(shard))
    assert [(row.status, row.attempt) for row in again] == [("done", 2), ("done", 2)]
    assert list(Worker(store, "none").run_shard(shard)) == []


def test_wrong_surgery_fails_the_task(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """With exact propagation a network that is not the masked one never gets a done row."""
    import workers.pruning
    from pruners.surgery import prune

    def crooked(*args: Any, **kwargs: Any) -> torch.nn.Module:
        network = prune(*args, **kwargs)
        with torch.no_grad():
            network.get_parameter("conv2.weight")[0, 0, 0, 0] += 1e-3
        return network

    monkeypatch.setattr(workers.pruning, "prune", crooked)
    row = attempt(worker, TASK)
    assert (row.status, row.error_class) == ("failed", "NotEquivalent")
    assert row.pruned_train_loss is None


def test_released_records_the_difference(worker: Worker) -> None:
    """`released` runs, and the row says by how much it is not the network named."""
    row = attempt(worker, Task(replace(CELL, propagation="released"), 3, 0))
    assert row.status == "done" and row.equivalence_error is not None and row.equivalence_error > 1e-6
    exact = attempt(worker, TASK)
    assert (row.removed, row.params, row.macs) == (exact.removed, exact.params, exact.macs)
    assert row.pruned_train_loss != exact.pruned_train_loss


def test_loss_subset_has_a_standard_error(worker: Worker) -> None:
    """Pruned train loss on a fixed subset: its size, and the standard error of its mean."""
    row = attempt(worker, Task(replace(CELL, loss_subset=100), 3, 0))
    assert row.pruned_train_loss_n == 100
    assert row.pruned_train_loss_se is not None and 0 < row.pruned_train_loss_se < 1
    full = attempt(worker, TASK)
    assert full.pruned_train_loss is not None and row.pruned_train_loss is not None
    assert abs(row.pruned_train_loss - full.pruned_train_loss) < 5 * row.pruned_train_loss_se


def test_measure_against_one_sample_at_a_time(worker: Worker) -> None:
    """Loss, standard error and accuracy equal those computed sample by sample."""
    model = worker.dense(DENSE).model
    test = whole(worker.data(DENSE).test)
    (found,) = Serial(model, RETRAIN, worker.accelerator, "channels_last").measure(test)
    with torch.no_grad():
        logits = torch.cat([model(image[None]) for image in test.images])
    losses = -torch.log_softmax(logits.double(), 1)[torch.arange(len(test)), test.labels]
    assert found.loss == pytest.approx(losses.mean().item(), rel=1e-5)
    assert found.loss_se == pytest.approx(losses.std().item() / math.sqrt(len(test)), rel=1e-4)
    assert found.accuracy == (logits.argmax(1) == test.labels).double().mean().item()


def test_validation_is_held_out(tmp_path: Path) -> None:
    """A validation part is in neither the train set nor the test set, and picks its own best epoch."""
    full = prepare("synthetic", "none", 0.0, torch.device("cpu"))
    data = prepare("synthetic", "none", 0.25, torch.device("cpu"))
    assert (len(full.train), len(full.validation)) == (512, 0)
    assert (len(data.train), len(data.validation)) == (384, 128)
    assert torch.equal(whole(data.test).images, whole(full.test).images)
    together = torch.cat([whole(data.train).images, whole(data.validation).images]).flatten(1).sum(1).sort().values
    assert torch.equal(together, whole(full.train).images.flatten(1).sum(1).sort().values)
    held = replace(DENSE, validation=0.25)
    worker = Worker(Store(str(tmp_path)), "none")
    list(worker.run_shard(Shard("dense", dense=held)))
    row = attempt(worker, Task(replace(CELL, dense=held), 0, 0))
    assert row.epoch_val_accuracy is not None and row.val_best_epoch is not None
    assert row.val_best_val_accuracy == pytest.approx(max(a for a in row.epoch_val_accuracy if a is not None))
    assert row.epoch_test_accuracy is not None
    assert row.val_best_test_accuracy == pytest.approx(row.epoch_test_accuracy[row.val_best_epoch - 1])


@pytest.mark.parametrize("keep", ["last", "best"])
def test_kept_networks_load_and_achieve_what_the_row_says(dense_store: Store, worker: Worker, keep: str) -> None:
    """`retrain.keep`: the file loads by one function and repeats the row's test accuracy."""
    (row,) = worker.run_shard(Shard(f"keep-{keep}", (Task(CELL, 5, 0),), keep=keep))
    assert row.kept_network is not None
    network = load_network(Path(dense_store.root, row.kept_network))
    (found,) = Compiled(network, RETRAIN, (1, 32, 32)).measure(worker.data(DENSE).test)
    assert found.accuracy == (row.last_test_accuracy if keep == "last" else row.best_test_accuracy)
    assert sum(p.numel() for p in network.parameters()) == row.params


def test_fp16_without_a_gpu_is_refused(tmp_path: Path, dense_store: Store) -> None:
    """Accelerate would run fp32 under another name; the task fails and says so."""
    code = (
        "import sys; from storage.store import Store; from workers.worker import Worker;"
        f"from tests.test_worker import TASK; store = Store({dense_store.root!r});"
        "(row,) = Worker(store, 'none', 'fp16').attempt([TASK]);"
        "print(row.status, row.error_class)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent, check=True
    )
    assert found.stdout == "failed PrecisionMissing\n"


def test_load_network_refuses_another_file(dense_store: Store, worker: Worker) -> None:
    """Dense weights are no kept network."""
    file = worker.store.dense(DENSE.dense_id)
    assert file is not None
    with pytest.raises(ValueError, match="no kept network"):
        load_network(Path(dense_store.root, file.name))


def test_dense_training_repeats_itself(dense_store: Store, tmp_path: Path) -> None:
    """The same recipe gives the same file, byte for byte: two drivers that race make one."""
    other = Store(str(tmp_path))
    list(Worker(other, "none").run_shard(Shard("dense", dense=DENSE)))
    one, two = dense_store.dense(DENSE.dense_id), other.dense(DENSE.dense_id)
    assert one is not None and two is not None and one == two


def test_missing_dense_weights_are_no_failure_of_the_task(tmp_path: Path) -> None:
    """A shard without its dense model ends by that name, before any task: it can be trained again."""
    store = Store(str(tmp_path))
    with pytest.raises(DenseMissing):
        list(Worker(store, "none").run_shard(Shard("s0", (TASK,))))
    assert store.row_file_names() == []


def test_damaged_dense_weights_are_set_aside_and_said(tmp_path: Path, dense_store: Store) -> None:
    """A dense file that is not what its name says is found by its checksum, and is out of the way at once."""
    store = Store(str(tmp_path))
    file = dense_store.dense(DENSE.dense_id)
    assert file is not None
    store.commit(file.name, file.content[:-1] + b"x")
    with pytest.raises(DenseMissing, match=rf"{file.name}: .*does not match.*set aside"):
        list(Worker(store, "none").run_shard(Shard("s0", (TASK,))))
    assert (store.names("dense"), len(store.names("aside"))) == ([], 1)


def test_memory_that_runs_out_beside_others_is_no_failure_yet(
    dense_store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whatever a library calls it: beside others the task is to be run alone, alone it has failed."""
    store = Store(str(tmp_path))
    store.commit_dense(DENSE.dense_id, _dense_content(Worker(dense_store, "none")))
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")):

        def eats(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr("workers.task.prune_task", eats)
        with pytest.raises(MemoryShort) as raised:
            list(Worker(store, "none").run_shard(Shard("s0", (TASK, Task(CELL, 4, 0)))))
        assert raised.value.args[0] == TASK.task_id
        (row,) = Worker(store, "none").run_shard(Shard(f"s0.{TASK.task_id}", (TASK,)))
        assert (row.status, row.error_class) == ("failed", "OutOfMemory")


def test_tasks_that_fail_at_one_place_end_their_shard(
    dense_store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The same traceback so many times: each has its failed row, and the others are not tried."""
    store = Store(str(tmp_path))
    store.commit_dense(DENSE.dense_id, _dense_content(Worker(dense_store, "none")))

    def broken(task: Task, *_: object) -> None:
        raise ValueError(f"no such sample: {task.candidate}")

    monkeypatch.setattr("workers.task.prune_task", broken)
    with pytest.raises(Repeated, match=r"5 tasks failed at the same place: ValueError: no such sample: 4"):
        list(Worker(store, "none").run_shard(Shard("s0", tuple(Task(CELL, c, 0) for c in range(9)))))
    assert store.statuses() == {Task(CELL, c, 0).task_id: "failed" for c in range(PAUSE_AFTER)}


def test_missing_data_is_never_downloaded(tmp_path: Path) -> None:
    """A worker without its data says how to get it, and writes nothing."""
    with pytest.raises(DataMissing, match="prunesweep prefetch mnist"):
        prepare("mnist", tmp_path, 0.0, torch.device("cpu"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["digits", "synthetic"])
def test_data_sets_are_what_the_plan_believes(name: str) -> None:
    """Sizes, shape and classes that a plan uses are those of the prepared tensors."""
    dataset, data = DATASETS[name], prepare(name, "none", 0.0, torch.device("cpu"))
    assert (len(data.train), len(data.test)) == (dataset.train_size, dataset.test_size)
    train = whole(data.train)
    assert tuple(train.images.shape[1:]) == dataset.shape
    assert set(train.labels.tolist()) == set(range(dataset.classes))
    assert train.images.dtype == torch.float32 and train.labels.dtype == torch.int64


def test_a_kernel_that_does_not_repeat_is_recorded(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operation that a device has without a fixed order only: the task runs, and its execution says so."""
    forward = torch.nn.Conv2d.forward

    def unordered(self: torch.nn.Conv2d, images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            torch.zeros(2).put_(torch.tensor([0]), torch.ones(1))
        return forward(self, images)

    fixed = replace(worker.execution(CELL), backend="serial", memory_format="channels_last")
    first = Worker(worker.store, "none", fixed=fixed)
    assert '"deterministic"' not in str(attempt(first, TASK).execution)
    monkeypatch.setattr(torch.nn.Conv2d, "forward", unordered)
    row = attempt(Worker(worker.store, "none", fixed=fixed), TASK)
    assert row.status == "done" and '"deterministic":false' in str(row.execution)
