"""One task, from its record to its row: dense, prune, measure, retrain, measure, row."""

from __future__ import annotations

import copy
import math
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from models import layer_units
from pruners.criteria import CRITERIA, score
from pruners.equivalence import LIMIT, PROBE_SAMPLES, equivalence
from pruners.pruners import choose
from pruners.surgery import prune
from storage.identity import canonical_json
from storage.records import Removed, Row, row_for, utc_now
from workers.backends import open_backend
from workers.checkpoints import State
from workers.datasets import find_dataset, probe
from workers.execution import arithmetic, library_versions
from workers.measures import Epoch
from workers.networks import network_file
from workers.rates import planned_epochs
from workers.streams import seeded
from workers.training import train
from workers.weights import portable

if TYPE_CHECKING:
    from storage.records import Cell, Task
    from workers.training import Backend
    from workers.worker import DenseModel, Worker


class NotEquivalent(Exception):
    """The pruned network does not compute what the masked dense one does."""


@dataclass(frozen=True)
class Pruned:
    """A pruned network, which units it lost, and what is known of it without data."""

    network: nn.Module
    removed: dict[str, tuple[int, ...]]
    measured: dict[str, Any] = field(default_factory=dict)


def run_tasks(tasks: Sequence[Task], worker: Worker, *, keep: str, attempts: Sequence[int]) -> list[Row]:
    """Run the tasks of one fleet; their rows, status `done`, their networks in the store. Errors are raised."""
    made = run_and_return(tasks, worker, keep=keep, attempts=attempts)
    return [_keeping(row, network, worker) for row, network in made]


def _keeping(row: Row, network: bytes | None, worker: Worker) -> Row:
    return row if network is None else replace(row, kept_network=worker.store.commit_network(row.task_id, network))


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
    with arithmetic(execution):
        pruned, seconds_prune = timed(lambda: [prune_task(task, dense, worker) for task in tasks])
        slots = [task.candidate % execution.fleet for task in tasks]
        networks = in_slots([p.network for p in pruned], slots, execution.fleet)
        shape = find_dataset(cell.dense.dataset, worker.data_root).shape
        with closing(open_backend(execution, networks, cell.retrain, worker.accelerator, shape)) as backend:
            before, seconds_measure = timed(lambda: measure_before(backend, cell, worker))
            after, seconds_retrain = timed(lambda: retrain_and_measure(tasks, slots, pruned, backend, worker, keep))
    rows = []
    for task, slot, attempt, one, (columns, network) in zip(tasks, slots, attempts, pruned, after, strict=True):
        where = provenance(attempt) | {
            "execution": execution.json,
            "device": str(worker.accelerator.device),
            "peak_memory_bytes": peak_memory(worker.accelerator.device),
        }
        times = {
            "seconds_prune": (seconds_prune + seconds_measure) / len(tasks),
            "seconds_retrain": seconds_retrain / len(tasks),
            "started_at": started,
            "finished_at": utc_now(),
        }
        measured = {**one.measured, **before[slot], **columns, **where, **times}
        rows.append((row_for(task, "done", measured), network))
    return rows


def timed(work: Any) -> tuple[Any, float]:
    """What `work` returns, and the seconds it took."""
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def in_slots(networks: Sequence[nn.Module], slots: Sequence[int], size: int) -> list[nn.Module]:
    """A fleet of `size`: each network in its slot, copies of the first in the others."""
    there = dict(zip(slots, networks, strict=True))
    return [there.get(slot) or copy.deepcopy(networks[0]) for slot in range(size)]


def measure_before(backend: Backend, cell: Cell, worker: Worker) -> list[dict[str, Any]]:
    """The pruned_* and dense_* columns of each member, before retraining."""
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


def prune_task(task: Task, dense: DenseModel, worker: Worker) -> Pruned:
    """The compact network of a task, checked against the masked dense one.

    Raises NotEquivalent where the two differ with exact propagation.
    """
    cell = task.cell
    ratios = dict(cell.layers)
    weights = {name: dense.weight(name) for name in ratios}
    removed = choose(
        cell.pruner,
        weights,
        ratios,
        candidate=task.candidate,
        sampling_seed=cell.sampling_seed,
        pruner_seed=cell.pruner_seed,
    )
    l1_removed = choose("l1", weights, ratios) if cell.propagation == "released" else None
    samples = probe(worker.data(cell.dense).train, PROBE_SAMPLES)
    with seeded(cell.dense.dataset, 0, "surgery"):
        network = prune(dense.model, removed, samples[:1], propagation=cell.propagation, l1_removed=l1_removed)
        checked = equivalence(dense.model, network, removed, samples)
    if cell.propagation == "exact" and checked.error is not None and not checked.error <= LIMIT:
        raise NotEquivalent(f"relative difference {checked.error:.3g} to the masked network, limit {LIMIT}")
    units = layer_units(cell.dense.model)
    pruned_shape = (cell.dense.dense_id, *((layer, len(chosen)) for layer, chosen in removed.items()))
    params, macs = worker.size(network, samples[:1], pruned_shape)
    dense_params, dense_macs = worker.size(dense.model, samples[:1], (cell.dense.dense_id,))
    measured = {
        "params": params,
        "macs": macs,
        "dense_params": dense_params,
        "dense_macs": dense_macs,
        "dense_sha256": dense.sha256,
        "removed": tuple(Removed(layer, chosen) for layer, chosen in removed.items()),
        "achieved_ratio": sum(map(len, removed.values())) / sum(units[layer] for layer in removed),
        "equivalence_error": checked.error,
        "equivalence_reason": checked.reason,
        **scores(weights, removed),
    }
    return Pruned(network, removed, measured)


def scores(weights: Mapping[str, torch.Tensor], removed: Mapping[str, tuple[int, ...]]) -> dict[str, float]:
    """Each criterion's score of the removed set: the sum of its importances on the dense network."""
    return {
        f"score_{name}": sum(score(importance(weights[layer]), units) for layer, units in removed.items())
        for name, importance in CRITERIA.items()
    }


def retrain_and_measure(
    tasks: Sequence[Task], slots: Sequence[int], pruned: Sequence[Pruned], backend: Backend, worker: Worker, keep: str
) -> list[tuple[dict[str, Any], bytes | None]]:
    """Retrain the networks of a back-end: for each task the columns that this fills, and its kept network's file."""
    cell, wanted = tasks[0].cell, dict.fromkeys(slots, keep)
    keepers = [Keeper(network, wanted.get(slot, "none")) for slot, network in enumerate(backend.networks)]
    about = {
        "execution": worker.execution(cell).json,
        "dense_sha256": pruned[0].measured["dense_sha256"],
        "keep": keep,
        "tasks": [task.task_id for task in tasks],
    }
    members = train(
        backend,
        worker.data(cell.dense),
        cell.retrain,
        dataset=cell.dense.dataset,
        seed=tasks[0].seed,
        stream="retrain",
        watchers=keepers,
        checkpoint=worker.checkpoint(tasks[0].task_id, about),
    )
    ends, planned = (
        backend.measure(worker.loss_set(cell)),
        planned_epochs(cell.retrain, len(worker.data(cell.dense).train)),
    )
    made = []
    for task, slot, before in zip(tasks, slots, pruned, strict=True):
        columns = curves(members[slot], planned) | outcome(members[slot], planned)
        if not columns["diverged"]:
            columns["last_train_loss"] = ends[slot].loss
        weights, dataset = keepers[slot].weights, find_dataset(cell.dense.dataset, worker.data_root)
        file = weights and network_file(weights, task, before.removed, dataset.classes, dataset.shape)
        made.append((columns, file))
    return made


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


def curves(epochs: Sequence[Epoch], planned: int) -> dict[str, Any]:
    """The epoch_* columns: `planned` long, null from where training diverged."""
    rest = [None] * (planned - len(epochs))
    finite = lambda x: x if math.isfinite(x) else None  # noqa: E731
    has_validation = any(e.validation for e in epochs)
    return {
        "epoch_train_loss": (*(finite(e.train_loss) for e in epochs), *rest),
        "epoch_test_loss": (*(finite(e.test.loss) for e in epochs), *rest),
        "epoch_test_accuracy": (
            *(e.test.accuracy if math.isfinite(e.test.loss) else None for e in epochs),
            *rest,
        ),
        "epoch_val_accuracy": (
            *(e.validation.accuracy if e.validation and math.isfinite(e.test.loss) else None for e in epochs),
            *rest,
        )
        if has_validation
        else None,
    }


def outcome(epochs: Sequence[Epoch], planned: int) -> dict[str, Any]:
    """best_*, val_best_*, last_* and last5_* of a training; best over the finite epochs."""
    finite = [e for e in epochs if math.isfinite(e.test.loss)]
    diverged = len(finite) < planned or not math.isfinite(epochs[-1].train_loss)
    columns: dict[str, Any] = {"diverged": diverged}
    if finite:
        best = max(finite, key=lambda e: (e.test.accuracy, -e.number))
        columns |= {
            "best_epoch": best.number,
            "best_test_accuracy": best.test.accuracy,
            "best_test_loss": best.test.loss,
        }
    validated = [(e.validation, e) for e in finite if e.validation]
    if validated:
        on_validation, chosen = max(validated, key=lambda pair: (pair[0].accuracy, -pair[1].number))
        columns |= {
            "val_best_epoch": chosen.number,
            "val_best_val_accuracy": on_validation.accuracy,
            "val_best_test_accuracy": chosen.test.accuracy,
            "val_best_test_loss": chosen.test.loss,
        }
    if not diverged:
        tail = epochs[-5:]
        losses, accuracies = [e.test.loss for e in tail], [e.test.accuracy for e in tail]
        columns |= {
            "last_test_loss": losses[-1],
            "last_test_accuracy": accuracies[-1],
            "last5_test_loss_mean": float(np.mean(losses)),
            "last5_test_loss_std": float(np.std(losses)),
            "last5_test_accuracy_mean": float(np.mean(accuracies)),
            "last5_test_accuracy_std": float(np.std(accuracies)),
        }
    return columns


def provenance(attempt: int) -> dict[str, Any]:
    """Where and by what a row was made, as far as it is known whatever happens."""
    return {
        "attempt": attempt,
        "host": socket.gethostname(),
        "versions": canonical_json(dict(library_versions())),
    }


def peak_memory(device: torch.device) -> int:
    """Peak bytes: allocated on a GPU, resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
