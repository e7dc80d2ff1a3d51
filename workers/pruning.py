"""The pruned network of a task: what it lost, checked, and what is known of it without data."""

from __future__ import annotations

import base64
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from models.weights import load_state
from pruners.coupling import Graph, traced
from pruners.equivalence import LIMIT, PROBE_SAMPLES, Equivalence, equivalence
from pruners.masks import Masks, choose_masks, mask_sha256, masked, n_weights, packed_masks, unpacked_masks, zeroed
from pruners.pruners import by_importance, choose, drawn, find_pruner, steps_of
from pruners.surgery import check_fell, prune, units_of
from storage.records import Removed
from workers.datasets import probe
from workers.importances import by_user, of_dense, of_network, scores
from workers.streams import seeded

if TYPE_CHECKING:
    from storage.records import Cell, Task
    from workers.worker import DenseModel, Worker

Units = Mapping[str, tuple[int, ...]]
"""Layer -> the units it has lost, in the dense network's numbers. A unit is one channel, or a set of channels."""


class NotEquivalent(Exception):
    """The pruned network does not compute what the masked dense one does."""


@dataclass(frozen=True)
class Start:
    """What a step of pruning starts from: the dense model, or what earlier steps of pruning and retraining have
    made of it, and what it has lost."""

    dense: DenseModel
    network: nn.Module
    step: int = 1
    removed: Units = field(default_factory=dict)
    masks: Masks = field(default_factory=dict)


@dataclass(frozen=True)
class Pruned:
    """A pruned network, the units or the weights it has lost since it was dense, and what is known of it
    without data."""

    network: nn.Module
    removed: Units
    masks: Masks
    measured: dict[str, Any]


def prune_task(task: Task, start: Start, worker: Worker) -> Pruned:
    """The pruned network of a step of a task, checked against the network before it with the same silenced.

    Raises NotEquivalent where the two differ with exact propagation.
    """
    if task.cell.granularity == "weight":
        return _mask(task, start, worker)
    return _cut(task, start, worker)


# -- filters: units cut out --------------------------------------------------------------------------


def _cut(task: Task, start: Start, worker: Worker) -> Pruned:
    cell = task.cell
    removed = _units_of(task, start, worker)
    gone = channels_of(cell, start.removed)
    now = {name: _positions(gone.get(name, ()), channels) for name, channels in channels_of(cell, removed).items()}
    now = {name: channels for name, channels in now.items() if channels}
    train = worker.data(cell.dense).train
    with seeded(cell.dense.dataset, 0, "surgery"):
        graph = worker.graph(cell)
        if graph is not None and start.step > 1:
            graph = traced(start.network, probe(train, 1))
        network = _without(start.network, now, probe(train, 1), graph, cell, worker)
        partners = graph.partners(now) if graph is not None else None
        found = equivalence(start.network, network, now, probe(train, PROBE_SAMPLES), partners) if now else _NOTHING
    if cell.propagation == "exact" and found.error is not None and not found.error <= LIMIT:
        said = found.reason or f"relative difference {found.error:.3g} to the masked network, limit {LIMIT}"
        raise NotEquivalent(said)
    return _with_units(task, network, removed, found, start.dense, worker)


_NOTHING = Equivalence(0.0)
"""Of a step that removes nothing."""


def channels_of(cell: Cell, units: Units) -> Units:
    """Return layer -> the output channels of its units."""
    return {name: cell.channels(name, of) for name, of in units.items()}


def _without(
    network: nn.Module, removed: Units, example: Any, graph: Graph | None, cell: Cell, worker: Worker
) -> nn.Module:
    """A copy of a network without these channels, in its own numbers."""
    if not removed:
        return copy.deepcopy(network)
    if cell.propagation == "exact":
        return prune(network, removed, example, graph=graph)
    by_l1 = {name: one.needed(name, "l1") for name, one in of_dense(cell, worker)["l1"].items()}
    l1_removed = channels_of(cell, choose("l1", worker.units(cell), dict(cell.layers), importances=by_l1))
    return prune(network, removed, example, propagation=cell.propagation, l1_removed=l1_removed, graph=graph)


def _units_of(task: Task, start: Start, worker: Worker) -> dict[str, tuple[int, ...]]:
    """The units that are gone after this step."""
    cell, kind = task.cell, find_pruner(task.cell.pruner)
    ratios, steps = dict(cell.layers), steps_of(cell.schedule)
    units = worker.units(cell)
    if steps == 1:
        importances = _needed(of_dense(cell, worker)[kind.criterion], kind.criterion) if kind.criterion else None
        return choose(
            cell.pruner,
            units,
            ratios,
            importances=importances,
            scope=cell.scope,
            candidate=task.candidate,
            sampling_seed=cell.sampling_seed,
            pruner_seed=cell.pruner_seed,
        )
    if kind.criterion:
        ranked = _needed(_scored_now(kind.criterion, start, cell, worker), kind.criterion)
        ranked = {name: _spread(found, start.removed.get(name, ()), units[name]) for name, found in ranked.items()}
    else:
        ranked = drawn(units, ratios, cell.pruner_seed)
        for name, gone in start.removed.items():
            ranked[name][list(gone)] = -torch.inf
    return by_importance(ranked, ratios, cell.scope, start.step / steps)


def _scored_now(criterion: str, start: Start, cell: Cell, worker: Worker) -> Mapping[str, Any]:
    if start.step == 1:
        return of_dense(cell, worker)[criterion]
    if ":" in criterion:
        return by_user(start.network, cell, worker)
    return of_network(start.network, cell, worker, only=criterion)[criterion]


def _needed(importances: Mapping[str, Any], criterion: str) -> dict[str, torch.Tensor]:
    return {name: one.needed(name, criterion) for name, one in importances.items()}


def _spread(importance: torch.Tensor, gone: Sequence[int], units: int) -> torch.Tensor:
    """The importances of the units that are left, among all of the dense network's: those gone go first."""
    left = torch.ones(units, dtype=torch.bool)
    left[list(gone)] = False
    spread = torch.full((units,), -torch.inf, dtype=torch.float64)
    spread[left] = importance
    return spread


def _positions(gone: Sequence[int], removed: Sequence[int]) -> tuple[int, ...]:
    """Where the units that go now stand among those that are left."""
    return tuple(unit - sum(one < unit for one in gone) for unit in removed if unit not in gone)


def _with_units(
    task: Task, network: nn.Module, removed: Units, found: Equivalence, dense: DenseModel, worker: Worker
) -> Pruned:
    cell = task.cell
    example = probe(worker.data(cell.dense).train, 1)
    params, macs = worker.size(network, example, cell.dense)
    channels = channels_of(cell, removed)
    every = sum(units_of(dense.model.get_submodule(layer)) for layer in removed)
    common = _in_common(cell, found, dense, worker)
    if any(removed.values()):
        check_fell((common["dense_params"], common["dense_macs"]), (params, macs))
    measured = {
        "params": params,
        "macs": macs,
        "removed": tuple(Removed(layer, chosen) for layer, chosen in channels.items()),
        "achieved_ratio": sum(map(len, channels.values())) / every,
        **scores(of_dense(cell, worker), removed),
    }
    return Pruned(network, removed, {}, measured | common)


# -- weights: masked ---------------------------------------------------------------------------------


def _mask(task: Task, start: Start, worker: Worker) -> Pruned:
    cell = task.cell
    ratios = dict(cell.layers)
    masks = choose_masks(
        cell.pruner,
        {name: _weight(start.network, name) for name in ratios},
        ratios,
        scope=cell.scope,
        share=start.step / steps_of(cell.schedule),
        gone=start.masks,
        candidate=task.candidate,
        sampling_seed=cell.sampling_seed,
        pruner_seed=cell.pruner_seed,
    )
    network = masked(start.network, masks)
    found = _difference(network, zeroed(start.network, masks), probe(worker.data(cell.dense).train, PROBE_SAMPLES))
    if not found <= LIMIT:
        raise NotEquivalent(f"relative difference {found:.3g} to the network with zeros, limit {LIMIT}")
    return _with_masks(task, network, masks, Equivalence(found), start.dense, worker)


def _weight(network: nn.Module, layer: str) -> torch.Tensor:
    weight = getattr(network.get_submodule(layer), "weight", None)
    if not isinstance(weight, torch.Tensor):
        raise ValueError(f"{layer} has no weights of its own: with granularity weight name the layers in it")
    return weight.detach()


@torch.no_grad()
def _difference(network: nn.Module, reference: nn.Module, samples: Any) -> float:
    """max |one - other| / max |other| on samples, in float64 and eval mode."""
    double = _double(samples)
    got = copy.deepcopy(network).double().eval()(double)
    expected = reference.double().eval()(double)
    scale = float(expected.abs().max())
    return float((got - expected).abs().max()) / (scale or 1.0)


def _double(samples: Any) -> Any:
    if isinstance(samples, Mapping):
        return {name: _double(tensor) for name, tensor in samples.items()}
    return samples.double() if samples.is_floating_point() else samples


def _with_masks(
    task: Task, network: nn.Module, masks: Masks, found: Equivalence, dense: DenseModel, worker: Worker
) -> Pruned:
    cell = task.cell
    common = _in_common(cell, found, dense, worker)
    measured = {
        "params": common["dense_params"] - n_weights(masks),
        "macs": common["dense_macs"],
        "mask_sha256": mask_sha256(masks),
    }
    return Pruned(network, {}, masks, measured | common)


def _in_common(cell: Cell, found: Equivalence, dense: DenseModel, worker: Worker) -> dict[str, Any]:
    example = probe(worker.data(cell.dense).train, 1)
    params, macs = worker.size(dense.model, example, cell.dense)
    return {
        "dense_params": params,
        "dense_macs": macs,
        "dense_sha256": dense.sha256,
        "equivalence_error": found.error,
        "equivalence_reason": found.reason,
        "skipped_samples": worker.data(cell.dense).skipped,
    }


# -- between the steps of an iterative schedule ------------------------------------------------------


def after_step(pruned: Pruned, trained: Mapping[str, torch.Tensor], start: Start, cell: Cell, worker: Worker) -> Start:
    """What the next step starts from: the state of a pruned network when it was retrained, its masks applied."""
    network = _shaped(pruned.removed, start.dense, cell, worker)
    load_state(network, trained)
    return Start(start.dense, network.eval(), start.step + 1, pruned.removed, pruned.masks)


def _shaped(removed: Units, dense: DenseModel, cell: Cell, worker: Worker) -> nn.Module:
    """A network of the dense one's shape without these units."""
    gone = {name: channels for name, channels in channels_of(cell, removed).items() if channels}
    with seeded(cell.dense.dataset, 0, "surgery"):
        if not gone:
            return copy.deepcopy(dense.model)
        return prune(dense.model, gone, probe(worker.data(cell.dense).train, 1), graph=worker.graph(cell))


def story(pruned: Pruned) -> dict[str, Any]:
    """What a checkpoint must hold of a step, as plain JSON, for `told`."""
    return {
        "removed": {name: list(units) for name, units in pruned.removed.items()},
        "masks": {name: base64.b85encode(bits).decode() for name, bits in packed_masks(pruned.masks).items()},
        "equivalence": [pruned.measured["equivalence_error"], pruned.measured["equivalence_reason"]],
    }


def told(task: Task, story: Mapping[str, Any], dense: DenseModel, worker: Worker) -> Pruned:
    """The pruned network of a story; its weights are the dense model's, until a checkpoint's are put in."""
    found = Equivalence(*story["equivalence"])
    if task.cell.granularity == "weight":
        bits = {name: base64.b85decode(text) for name, text in story["masks"].items()}
        masks = unpacked_masks(bits, {name: _weight(dense.model, name).shape for name in bits})
        return _with_masks(task, masked(dense.model, masks), masks, found, dense, worker)
    removed = {name: tuple(units) for name, units in story["removed"].items()}
    return _with_units(task, _shaped(removed, dense, task.cell, worker), removed, found, dense, worker)
