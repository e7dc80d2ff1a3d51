"""One task, from its record to its row: dense, prune, measure, retrain, measure, row."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pruners.masks import held_ratio, permanent
from pruners.pruners import steps_of
from storage.records import Row, row_for, utc_now
from workers.backends import open_backend
from workers.checkpoints import State
from workers.columns import curves, outcome, peak_memory, provenance
from workers.execution import arithmetic
from workers.measures import Epoch
from workers.networks import network_content
from workers.pruning import Pruned, Start, after_step, channels_of, prune_task, story, told
from workers.rates import planned_epochs
from workers.training import train
from workers.weights import portable

if TYPE_CHECKING:
    from storage.records import Cell, Task
    from workers.checkpoints import Checkpoint
    from workers.training import Backend
    from workers.worker import DenseModel, Worker


@dataclass
class Run:
    """Tasks of one cell and seed that stand in one fleet, on their way: in which slots, from which dense model,
    what is kept of their networks, the seconds spent so far."""

    tasks: Sequence[Task]
    slots: Sequence[int]
    dense: DenseModel
    worker: Worker
    keep: str
    checkpoint: Checkpoint | None
    seconds: dict[str, float] = field(default_factory=lambda: {"prune": 0.0, "retrain": 0.0})

    @property
    def cell(self) -> Cell:
        """The cell of them all."""
        return self.tasks[0].cell

    @property
    def steps(self) -> int:
        """How often they are pruned and retrained."""
        return steps_of(self.cell.schedule)

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Count the seconds that this lasts."""
        start = time.perf_counter()
        yield
        self.seconds[what] += time.perf_counter() - start


@dataclass(frozen=True)
class Step:
    """One step of pruning and retraining: the pruned network of each task, and, where a checkpoint has it already,
    what was measured of each slot before retraining."""

    number: int
    pruned: Sequence[Pruned]
    before: Sequence[dict[str, Any]] | None = None


def run_tasks(tasks: Sequence[Task], worker: Worker, *, keep: str, attempts: Sequence[int]) -> list[Row]:
    """Run the tasks of one fleet; their rows, status `done`, their networks in the store. Errors are raised."""
    made = run_and_return(tasks, worker, keep=keep, attempts=attempts)
    return [_keeping(row, network, worker) for row, network in made]


def _keeping(row: Row, network: bytes | None, worker: Worker) -> Row:
    if network is None or not worker.leads:
        return row
    return replace(row, kept_network=worker.store.commit_network(row.task_id, network))


def run_and_return(
    tasks: Sequence[Task], worker: Worker, *, keep: str, attempts: Sequence[int]
) -> list[tuple[Row, bytes | None]]:
    """Run tasks of one cell and seed that stand in one fleet: each one's row, and the content of its
    network's file if one is kept. Nothing is written.

    Each stands where its candidate number says; elsewhere in the fleet is padding. Times are the
    fleet's, shared out evenly.
    """
    started, cell = utc_now(), tasks[0].cell
    dense = worker.dense(cell.dense)
    execution = worker.execution(cell)
    slots = [task.candidate % execution.fleet for task in tasks]
    run = Run(tasks, slots, dense, worker, keep, _checkpoint(tasks, dense, worker, keep))
    with arithmetic(execution) as kernels:
        made = run_steps(run)
    execution = replace(execution, deterministic=kernels.deterministic)
    rows = []
    for task, attempt, (columns, network) in zip(tasks, attempts, made, strict=True):
        where = provenance(attempt) | {
            "execution": execution.json,
            "device": str(worker.accelerator.device),
            "peak_memory_bytes": peak_memory(worker.accelerator.device),
        }
        times = {
            "seconds_prune": run.seconds["prune"] / len(tasks),
            "seconds_retrain": run.seconds["retrain"] / len(tasks),
            "started_at": started,
            "finished_at": utc_now(),
        }
        rows.append((row_for(task, "done", {**columns, **where, **times}), network))
    return rows


def run_steps(run: Run) -> list[tuple[dict[str, Any], bytes | None]]:
    """Prune, measure, retrain, measure, as often as the schedule says: each task's columns, those of the last step,
    and its kept network's file. Where a retraining before the last diverges, that is the task's end."""
    step = _resumed(run) or _pruned(run, 1, [Start(run.dense, run.dense.model)] * len(run.tasks))
    while True:
        made, states = do_step(run, step)
        if step.number == run.steps:
            return made
        if any(columns["diverged"] for columns, _ in made):
            return [({**p.measured, **_without_end(run)}, None) for p in step.pruned]
        starts = [
            after_step(p, state, Start(run.dense, run.dense.model, step.number), run.cell, run.worker)
            for p, state in zip(step.pruned, states, strict=True)
        ]
        step = _pruned(run, step.number + 1, starts)


def _pruned(run: Run, number: int, starts: Sequence[Start]) -> Step:
    run.worker.phase("pruning")
    with run.timed("prune"):
        return Step(number, [prune_task(t, start, run.worker) for t, start in zip(run.tasks, starts, strict=True)])


def _resumed(run: Run) -> Step | None:
    """The step of an iterative schedule that a checkpoint was written in, if it was not the first."""
    found = run.checkpoint.found() if run.checkpoint and run.steps > 1 else None
    if found is None or found["step"] == 1:
        return None
    pruned = [told(t, one, run.dense, run.worker) for t, one in zip(run.tasks, found["pruned"], strict=True)]
    return Step(found["step"], pruned, found["before"])


def do_step(run: Run, step: Step) -> tuple[list[tuple[dict[str, Any], bytes | None]], list[dict[str, torch.Tensor]]]:
    """Measure, retrain and measure: each task's columns and kept network's file, and the state its network is in."""
    execution, worker = run.worker.execution(run.cell), run.worker
    networks = in_slots([p.network for p in step.pruned], run.slots, execution.fleet)
    shape = worker.dataset(run.cell.dense).shape
    with closing(open_backend(execution, networks, run.cell.retrain, worker.accelerator, shape)) as backend:
        with run.timed("prune"):
            before = step.before or measure_before(backend, run.cell, worker)
        if run.checkpoint and run.steps > 1:
            run.checkpoint.go_on(
                {"step": step.number, "pruned": [story(p) for p in step.pruned], "before": before},
                anew=step.number > 1 and step.before is None,
            )
        with run.timed("retrain"):
            after = retrain_and_measure(run, step, backend)
        states = [permanent(portable(backend.networks[slot])) for slot in run.slots if step.number < run.steps]
    made = [
        ({**p.measured, **before[slot], **columns}, network)
        for p, slot, (columns, network) in zip(step.pruned, run.slots, after, strict=True)
    ]
    return made, states


def _checkpoint(tasks: Sequence[Task], dense: DenseModel, worker: Worker, keep: str) -> Checkpoint | None:
    about = {
        "execution": worker.execution(tasks[0].cell).json,
        "dense_sha256": dense.sha256,
        "keep": keep,
        "tasks": [task.task_id for task in tasks],
    }
    return worker.checkpoint(tasks[0].task_id, about)


def in_slots(networks: Sequence[nn.Module], slots: Sequence[int], size: int) -> list[nn.Module]:
    """A fleet of `size`: each network in its slot, copies of the first in the others."""
    there = dict(zip(slots, networks, strict=True))
    return [there.get(slot) or copy.deepcopy(networks[0]) for slot in range(size)]


def measure_before(backend: Backend, cell: Cell, worker: Worker) -> list[dict[str, Any]]:
    """The pruned_* and dense_* columns of each member, before retraining."""
    worker.phase("measuring before retraining")
    subset, baseline = cell.loss_subset is not None, worker.baseline(cell)
    on_train = backend.measure(worker.loss_set(cell))
    on_test = backend.measure(worker.data(cell.dense).test)
    return [
        {
            **baseline,
            "pruned_train_loss": train.loss,
            "pruned_train_loss_se": train.loss_se if subset else None,
            "pruned_train_loss_n": train.n,
            "pruned_test_loss": test.loss,
            "pruned_test_accuracy": test.accuracy,
        }
        for train, test in zip(on_train, on_test, strict=True)
    ]


def retrain_and_measure(run: Run, step: Step, backend: Backend) -> list[tuple[dict[str, Any], bytes | None]]:
    """Retrain the networks of a back-end: for each task the columns that this fills, and its kept network's file.

    The last step's minibatches are those of a one-shot retraining; every other step has its own. Raises
    MaskBroken where a weight that was removed has come back.
    """
    cell, worker, last = run.cell, run.worker, step.number == run.steps
    wanted = dict.fromkeys(run.slots, run.keep if last else "none")
    keepers = [Keeper(network, wanted.get(slot, "none")) for slot, network in enumerate(backend.networks)]
    members = train(
        backend,
        worker.data(cell.dense),
        cell.retrain,
        dataset=cell.dense.dataset,
        seed=run.tasks[0].seed,
        stream="retrain" if last else f"retrain/step{step.number}",
        watchers=keepers,
        checkpoint=run.checkpoint,
        phase="retraining",
        report=worker.phase,
    )
    worker.phase("measuring after retraining")
    ends = backend.measure(worker.loss_set(cell))
    made = []
    for task, slot, pruned in zip(run.tasks, run.slots, step.pruned, strict=True):
        columns = _outcome(members[slot], run)
        if not columns["diverged"]:
            columns["last_train_loss"] = ends[slot].loss
        if pruned.masks:
            columns["achieved_ratio"] = held_ratio(backend.networks[slot], pruned.masks)
        made.append((columns, _kept_file(keepers[slot], task, pruned, worker)))
    return made


def _outcome(epochs: Sequence[Epoch], run: Run) -> dict[str, Any]:
    planned = planned_epochs(run.cell.retrain, len(run.worker.data(run.cell.dense).train))
    return curves(epochs, planned) | outcome(epochs, planned)


def _without_end(run: Run) -> dict[str, Any]:
    """The columns of a task that diverged before its last step: there is no curve of that, and nothing measured
    but the dense model."""
    return run.worker.baseline(run.cell) | _outcome([], run)


def _kept_file(keeper: Keeper, task: Task, pruned: Pruned, worker: Worker) -> bytes | None:
    if keeper.weights is None:
        return None
    dataset = worker.dataset(task.cell.dense)
    removed = channels_of(task.cell, pruned.removed)
    model = task.cell.dense.model
    return network_content(permanent(keeper.weights), task.task_id, model, removed, dataset.classes, dataset.shape)


class Keeper:
    """Holds the weights that are to be kept: of the best epoch so far (the first of equals), or the last."""

    def __init__(self, network: nn.Module, keep: str) -> None:
        self.network, self.keep = network, keep
        self.best = -1.0
        self.weights: dict[str, torch.Tensor] | None = None

    def see(self, epoch: Epoch) -> None:
        finite = math.isfinite(epoch.test.loss)
        if not finite or self.keep == "none" or (self.keep == "best" and epoch.test.accuracy <= self.best):
            return
        self.best = epoch.test.accuracy
        self.weights = portable(self.network)

    def state(self) -> State:
        """What it holds, for a checkpoint."""
        return State(self.weights or {}, {"best": self.best})

    def restore(self, state: State) -> None:
        """Hold what was held then."""
        self.weights, self.best = dict(state.tensors) or None, state.values["best"]
