"""Checkpoints: a training that was stopped anywhere goes on to the very bits of one that never was."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import workers.training
from storage.records import Cell, Dense, Execution, Recipe, Row, Shard, Task
from storage.schema import PROVENANCE, SCHEMA, rows_to_table, table_to_rows
from storage.store import Store
from workers.checkpoints import (
    State,
    generators,
    optimizer_state,
    restore_generators,
    restore_optimizer,
)
from workers.datasets import Split, find_dataset
from workers.pulse import Limits, Pulse, Stopped
from workers.worker import Worker

DENSE = Dense("lenet5_mini", "synthetic", Recipe(2, 64, ((0, 0.05),), momentum=0.9, seed=0), validation=0.1)
RETRAIN = Recipe(3, 32, ((0, 0.02), (2, 0.002)), momentum=0.9, nesterov=True, weight_decay=1e-4)
CELL = Cell(DENSE, (("conv1", 0.4), ("conv2", 0.4)), "oracle", RETRAIN)
TASK = Task(CELL, 7, 1)
SHARD = Shard("s0", (TASK,), keep="best")
STEPS = 3 * 15
"""Minibatches of one retraining: 461 samples in batches of 32."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store with the dense weights."""
    store = Store(str(tmp_path_factory.mktemp("trained")))
    list(Worker(store, "none").run_shard(Shard("dense", dense=DENSE)))
    return store


@pytest.fixture(scope="module")
def undisturbed(trained: Store) -> Row:
    """The row of the task, run without a stop."""
    (row,) = Worker(copy_of(trained), "none").run_shard(SHARD)
    return row


def copy_of(store: Store) -> Store:
    """Another store with the same dense weights and nothing else."""
    import tempfile

    copy = Store(tempfile.mkdtemp(prefix="prunesweep-test-", dir=Path(store.root).parent))
    copy.commit_dense(DENSE.dense_id, _dense(store))
    return copy


def _dense(store: Store) -> bytes:
    file = store.dense(DENSE.dense_id)
    assert file is not None
    return file.content


def measured(row: Row) -> dict[str, object]:
    """What a row says but provenance, as a file would hold it, and its execution."""
    (stored,) = table_to_rows(rows_to_table([row]))
    names = [name for name in SCHEMA.names if name not in PROVENANCE] + ["execution", "kept_network", "diverged"]
    return {name: getattr(stored, name) for name in names}


def stopping(monkeypatch: pytest.MonkeyPatch, pulse: Pulse, after: int) -> None:
    """Ask the worker to stop once it has made so many steps."""
    step, made = workers.training._step, 0

    def counted(*arguments: object) -> torch.Tensor:
        nonlocal made
        made += 1
        if made == after:
            pulse.stop.set()
        return step(*arguments)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(workers.training, "_step", counted)


def run_until_stopped(
    store: Store, shard: Shard, after: int, fixed: Execution | None = None, data_root: str = "none"
) -> list[Row]:
    """Run a shard in a fresh worker that is asked to stop after so many steps."""
    with pytest.MonkeyPatch.context() as patch, Pulse(store, "driver", Limits()) as pulse:
        stopping(patch, pulse, after)
        rows: list[Row] = []
        try:
            rows.extend(Worker(store, data_root, pulse=pulse, fixed=fixed).run_shard(shard))
        except Stopped:
            assert pulse.stop.is_set()
        return rows


@pytest.mark.parametrize("stops", [(1,), (14, 1, 1), (15,), (16, 20), (STEPS - 1,), (7, 9, 11, 3, 5)])
def test_a_retraining_that_was_stopped_gives_the_same_row(
    stops: tuple[int, ...], trained: Store, undisturbed: Row
) -> None:
    """Stopped anywhere, however often, and gone on with in a fresh worker: bit for bit the same row and kept
    network, which is named by its content; and the checkpoint goes with the row."""
    store = copy_of(trained)
    for after in stops:
        assert run_until_stopped(store, SHARD, after) == []
        assert store.scratch.checkpoints() == [TASK.task_id]
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    (row,) = run_until_stopped(store, SHARD, 10**6)
    assert measured(row) == measured(undisturbed)
    assert store.scratch.checkpoints() == []


def test_what_was_done_before_the_stop_is_not_done_again(trained: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Going on makes only the steps that are left."""
    store, made = copy_of(trained), 0
    run_until_stopped(store, SHARD, 30)
    step = workers.training._step

    def counted(*arguments: object) -> torch.Tensor:
        nonlocal made
        made += 1
        return step(*arguments)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(workers.training, "_step", counted)
    with Pulse(store, "driver", Limits()) as pulse:
        list(Worker(store, "none", pulse=pulse).run_shard(SHARD))
    assert made == STEPS - 30


def test_a_long_training_is_checkpointed_as_it_runs(
    trained: Store, undisturbed: Row, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every so often, one file per task at a time, none when the row is there, and the row is the same."""
    store, seen = copy_of(trained), list[list[str]]()
    save = type(store.scratch).save_checkpoint

    def watched(self: object, key: str, content: bytes) -> None:
        save(store.scratch, key, content)
        seen.append(store.scratch.checkpoints())

    monkeypatch.setattr(type(store.scratch), "save_checkpoint", watched)
    with Pulse(store, "driver", Limits(checkpoint_seconds=0.0)) as pulse:
        (row,) = Worker(store, "none", pulse=pulse).run_shard(SHARD)
    assert seen == [[TASK.task_id]] * STEPS
    assert store.scratch.checkpoints() == []
    assert measured(row) == measured(undisturbed)


def test_dense_training_goes_on_to_the_same_file(trained: Store, tmp_path: Path) -> None:
    """A dense model stopped twice has the very weights of one that was not, and leaves no checkpoint."""
    store, shard = Store(str(tmp_path)), Shard("dense", dense=DENSE)
    for after in (3, 6):
        run_until_stopped(store, shard, after)
        assert (store.dense(DENSE.dense_id), store.scratch.checkpoints()) == (None, [DENSE.dense_id])
    run_until_stopped(store, shard, 10**6)
    assert _dense(store) == _dense(trained)
    assert store.scratch.checkpoints() == []


def _flip(store: Store) -> None:
    path = Path(store.root, "scratch", "checkpoints", f"{TASK.task_id}.checkpoint")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _truncate(store: Store) -> None:
    path = Path(store.root, "scratch", "checkpoints", f"{TASK.task_id}.checkpoint")
    path.write_bytes(path.read_bytes()[:1000])


def _foreign(store: Store) -> None:
    store.scratch.save_checkpoint(TASK.task_id, b"anything")


@pytest.mark.parametrize("damage", [_flip, _truncate, _foreign])
def test_a_damaged_checkpoint_is_found_and_said(
    damage: Callable[[Store], None], trained: Store, undisturbed: Row
) -> None:
    """By its checksum: the task is trained from its start, the row is the same, and the person is told."""
    store = copy_of(trained)
    run_until_stopped(store, SHARD, 20)
    damage(store)
    with Pulse(store, "driver", Limits()) as pulse:
        worker = Worker(store, "none", pulse=pulse)
        (row,) = worker.run_shard(SHARD)
    (message,) = worker.take_messages()
    assert TASK.task_id in message and "from its start" in message
    assert measured(row) == measured(undisturbed)
    assert store.scratch.checkpoints() == []


def test_a_checkpoint_of_another_execution_is_not_gone_on_from(
    trained: Store, undisturbed: Row, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What another device has begun is begun again, so that a row is of one execution."""
    store = copy_of(trained)
    with monkeypatch.context() as patch:
        patch.setattr("workers.execution._processor", lambda: "another one")
        run_until_stopped(store, SHARD, 20)
    with Pulse(store, "driver", Limits()) as pulse:
        worker = Worker(store, "none", pulse=pulse)
        (row,) = worker.run_shard(SHARD)
    assert "another execution" in worker.take_messages()[0]
    assert measured(row) == measured(undisturbed)


def test_a_checkpoint_that_cannot_be_written_costs_no_training(
    trained: Store, undisturbed: Row, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that refuses scratch for a while is told of; the row comes all the same."""
    from storage.errors import StoreError

    def refused(*_: object) -> None:
        raise StoreError("no room")

    store = copy_of(trained)
    monkeypatch.setattr(type(store.scratch), "save_checkpoint", refused)
    with Pulse(store, "driver", Limits(checkpoint_seconds=0.0)) as pulse:
        worker = Worker(store, "none", pulse=pulse)
        (row,) = worker.run_shard(SHARD)
    assert all("no room" in message for message in worker.take_messages())
    assert measured(row) == measured(undisturbed)


@pytest.fixture
def kept_generators() -> Iterator[None]:
    """The global generators, as they were."""
    state = generators()
    yield
    restore_generators(state)


@pytest.mark.usefixtures("kept_generators")
def test_every_global_generator_goes_on(tmp_path: Path) -> None:
    """Python's, numpy's and torch's draws after a restore are those after the save, the spare normal too."""
    random.gauss(0, 1)
    np.random.standard_normal()
    state = generators()
    drawn = (random.gauss(0, 1), random.random(), np.random.standard_normal(3).tolist(), torch.rand(3).tolist())
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    restore_generators(state)
    assert drawn == (random.gauss(0, 1), random.random(), np.random.standard_normal(3).tolist(), torch.rand(3).tolist())


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_goes_on(make: type[torch.optim.Optimizer]) -> None:
    """Its tensors come back bit for bit and in their parameters' memory layout, its numbers too."""

    def network() -> nn.Conv2d:
        torch.manual_seed(0)
        return nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def steps(net: nn.Conv2d, optimizer: torch.optim.Optimizer, n: int) -> None:
        for i in range(n):
            optimizer.zero_grad()
            net(torch.full((2, 3, 8, 8), 0.1 * i)).square().mean().backward()
            optimizer.step()

    arguments: dict[str, Any] = {"lr": 0.1} | ({"momentum": 0.9} if make is torch.optim.SGD else {})
    one = network()
    optimizer = make(one.parameters(), **arguments)
    steps(one, optimizer, 3)
    state = optimizer_state(optimizer)
    saved = State({n: t.clone().contiguous() for n, t in state.tensors.items()}, state.values)
    other = network()
    other.load_state_dict(one.state_dict())
    again = make(other.parameters(), **arguments)
    restore_optimizer(again, saved)
    for slot, kept in zip(again.state.values(), optimizer.state.values(), strict=True):
        for name, value in kept.items():
            assert not isinstance(value, torch.Tensor) or slot[name].stride() == value.stride()
    steps(one, optimizer, 3)
    steps(other, again, 3)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_the_row_of_a_kept_last_network_is_the_same(trained: Store) -> None:
    """`keep: last` goes through a stop too."""
    shard = replace(SHARD, keep="last")
    whole, stopped = copy_of(trained), copy_of(trained)
    (row,) = Worker(whole, "none").run_shard(shard)
    run_until_stopped(stopped, shard, 31)
    (again,) = run_until_stopped(stopped, shard, 10**6)
    assert whole.read(str(row.kept_network)) == stopped.read(str(again.kept_network))


def padded(_: Path) -> tuple[Split, Split]:
    """A user's data set that is cropped and flipped."""
    train, test = find_dataset("synthetic").load(Path())
    assert isinstance(train, Split) and isinstance(test, Split)
    return replace(train, pad=(-0.5,)), test


@pytest.mark.parametrize("more", [{}, {"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1}], ids=["crops", "mixed"])
def test_augmentation_goes_on_in_the_middle_of_an_epoch(tmp_path: Path, more: dict[str, float]) -> None:
    """What is drawn for a minibatch does not depend on where the training was taken up; without augmentation the
    row is another."""
    recipe = Recipe(2, 32, ((0, 0.02),), momentum=0.9, **more)  # pyright: ignore[reportArgumentType]
    cell = replace(CELL, dense=replace(DENSE, dataset="tests.test_checkpoints:padded"), retrain=recipe)
    task = Task(cell, 7, 1)
    shard, dense = Shard("s0", (task,), keep="last"), Shard("dense", dense=cell.dense)
    stopped, whole = Store(str(tmp_path / "stopped")), Store(str(tmp_path / "whole"))
    list(Worker(whole, "none").run_shard(dense))
    for after in (3, 6):
        run_until_stopped(stopped, dense, after)
    assert run_until_stopped(stopped, dense, 10**6) == []
    for after in (5, 14):
        assert run_until_stopped(stopped, shard, after) == []
    (row,), (again,) = Worker(whole, "none").run_shard(shard), run_until_stopped(stopped, shard, 10**6)
    assert row.error is None and measured(row) == measured(again)
    plain = replace(task, cell=replace(cell, retrain=replace(recipe, augment=False)))
    (other,) = Worker(whole, "none").run_shard(Shard("s1", (plain,)))
    assert other.pruned_train_loss == row.pruned_train_loss and other.last_test_loss != row.last_test_loss
