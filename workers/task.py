"""One task, from its record to its row: dense, prune, measure, retrain, measure, row."""

from __future__ import annotations

import math
import socket
import sys
import time
from collections.abc import Mapping, Sequence
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
from workers.checkpoints import State
from workers.datasets import DATASETS
from workers.dense import on_device
from workers.execution import arithmetic, library_versions
from workers.networks import network_file
from workers.streams import seeded
from workers.training import Epoch, measure, train
from workers.weights import portable

if TYPE_CHECKING:
    from storage.records import Task
    from workers.worker import DenseModel, Worker


class NotEquivalent(Exception):
    """The pruned network does not compute what the masked dense one does."""


@dataclass(frozen=True)
class Pruned:
    """A pruned network, which units it lost, and what was measured so far."""

    network: nn.Module
    removed: dict[str, tuple[int, ...]]
    measured: dict[str, Any] = field(default_factory=dict)


def run_task(task: Task, worker: Worker, *, keep: str = "none", attempt: int = 1) -> Row:
    """Run `task` and return its row, status `done`; its network is in the store. Whatever goes wrong is raised."""
    row, network = run_and_return(task, worker, keep=keep, attempt=attempt)
    return row if network is None else replace(row, kept_network=worker.store.commit_network(task.task_id, network))


def run_and_return(task: Task, worker: Worker, *, keep: str = "none", attempt: int = 1) -> tuple[Row, bytes | None]:
    """Run `task`; its row, and the content of its network's file if one is kept. Nothing is written."""
    started = utc_now()
    dense = worker.dense(task.cell.dense)
    execution = worker.execution(task.cell)
    with arithmetic(execution):
        before, seconds_prune = timed(lambda: prune_and_measure(task, dense, worker))
        (after, network), seconds_retrain = timed(lambda: retrain_and_measure(task, before, worker, keep))
    where = provenance(attempt) | {
        "execution": execution.json,
        "device": str(worker.accelerator.device),
        "peak_memory_bytes": peak_memory(worker.accelerator.device),
    }
    times = {
        "seconds_prune": seconds_prune,
        "seconds_retrain": seconds_retrain,
        "started_at": started,
        "finished_at": utc_now(),
    }
    return row_for(task, "done", {**before.measured, **after, **where, **times}), network


def timed(work: Any) -> tuple[Any, float]:
    """What `work` returns, and the seconds it took."""
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def prune_and_measure(task: Task, dense: DenseModel, worker: Worker) -> Pruned:
    """Prune the dense model as the task says, check it, and measure it before retraining."""
    pruned = prune_task(task, dense, worker)
    data = worker.data(task.cell.dense)
    loss_set = worker.loss_set(task.cell)
    network = on_device(pruned.network, worker.accelerator, worker.execution(task.cell).memory_format)
    on_train = measure(network, loss_set, worker.accelerator)
    on_test = measure(network, data.test, worker.accelerator)
    subset = task.cell.loss_subset is not None
    measured = {
        "pruned_train_loss": on_train.loss,
        "pruned_train_loss_se": on_train.loss_se if subset else None,
        "pruned_train_loss_n": on_train.n,
        "pruned_test_loss": on_test.loss,
        "pruned_test_accuracy": on_test.accuracy,
    }
    baseline = worker.baseline(task.cell)
    return Pruned(network, pruned.removed, {**pruned.measured, **baseline, **measured})


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
    probe = worker.data(cell.dense).train.images[:PROBE_SAMPLES].cpu()
    with seeded(cell.dense.dataset, 0, "surgery"):
        network = prune(dense.model, removed, probe[:1], propagation=cell.propagation, l1_removed=l1_removed)
        checked = equivalence(dense.model, network, removed, probe)
    if cell.propagation == "exact" and checked.error is not None and not checked.error <= LIMIT:
        raise NotEquivalent(f"relative difference {checked.error:.3g} to the masked network, limit {LIMIT}")
    units = layer_units(cell.dense.model)
    pruned_shape = (cell.dense.dense_id, *((layer, len(chosen)) for layer, chosen in removed.items()))
    params, macs = worker.size(network, probe[:1], pruned_shape)
    dense_params, dense_macs = worker.size(dense.model, probe[:1], (cell.dense.dense_id,))
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


def retrain_and_measure(task: Task, before: Pruned, worker: Worker, keep: str) -> tuple[dict[str, Any], bytes | None]:
    """Retrain the pruned network; the columns of the row that this fills, and the kept network's file."""
    cell, network = task.cell, before.network
    kept = Keeper(network, keep)
    start = {"execution": worker.execution(cell).json, "dense_sha256": before.measured["dense_sha256"], "keep": keep}
    epochs = train(
        network,
        worker.data(cell.dense),
        cell.retrain,
        worker.accelerator,
        dataset=cell.dense.dataset,
        seed=task.seed,
        stream="retrain",
        watcher=kept,
        checkpoint=worker.checkpoint(task.task_id, start),
    )
    columns = curves(epochs, cell.retrain.epochs) | outcome(epochs, cell.retrain.epochs)
    if not columns["diverged"]:
        last = measure(network, worker.loss_set(cell), worker.accelerator)
        columns["last_train_loss"] = last.loss
    if kept.weights is None:
        return columns, None
    return columns, network_file(kept.weights, task, before.removed, DATASETS[cell.dense.dataset].classes)


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
