"""The importances of a dense model's units by each criterion: computed once per process, not per candidate."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pruners.coupling import traced
from pruners.criteria import (
    CRITERIA,
    Gradients,
    Importance,
    activations_of,
    checked,
    gradients_of,
    library_importances,
    own_norms,
    score,
)
from pruners.surgery import units_of
from workers.datasets import check_content
from workers.streams import generator, seeded

if TYPE_CHECKING:
    from pruners.coupling import Graph
    from storage.records import Cell
    from workers.datasets import Samples
    from workers.worker import Worker

BATCH = 32
"""Samples of one pass for activations."""

Importances = Mapping[str, Mapping[str, Importance]]
"""Criterion -> layer -> the importance of its units."""


def of_dense(cell: Cell, worker: Worker) -> Importances:
    """By every criterion, and by the cell's own pruner where that is a user's: of the dense model of a cell, for
    its layers."""
    layers = tuple(name for name, _ in cell.layers)
    light = _is_large(cell) and not _needs_data(cell.pruner)
    key = ("importances", cell.dense.dense_id, layers, cell.calibration, light)

    def make() -> Importances:
        dense = worker.dense(cell.dense).model
        if light:
            return of_network(dense, cell, worker, of_weights=True)
        gradients = worker._once(
            ("gradients", cell.dense.dense_id, cell.calibration), lambda: _gradients(dense, cell, worker)
        )
        return of_network(dense, cell, worker, gradients=gradients)

    found = worker._once(key, make)
    if cell.pruner in CRITERIA or ":" not in cell.pruner:
        return found
    own = worker._once((*key, cell.pruner), lambda: by_user(worker.dense(cell.dense).model, cell, worker))
    return {**found, cell.pruner: own}


def of_network(
    network: nn.Module,
    cell: Cell,
    worker: Worker,
    *,
    gradients: Gradients | None = None,
    only: str | None = None,
    of_weights: bool = False,
) -> Importances:
    """By every criterion, by `only` one, or by those that look at weights alone: of a network of the cell's model,
    pruned maybe, for the cell's layers."""
    graph = _graph_of(network, cell, worker)
    sets = {name: graph.sets(name) for name, _ in cell.sets} if graph is not None else {}
    units = {name: units_of(network.get_submodule(name)) for name, _ in cell.layers}
    units |= {name: len(of) for name, of in sets.items()}
    wanted = "weights" if of_weights else None if only is None else CRITERIA[only].needs
    own = {name: own_norms(network, name, n, sets.get(name)) for name, n in units.items()}
    found: dict[str, dict[str, Importance]] = {c: {name: of[c] for name, of in own.items()} for c in ("l1", "l2")}
    if only in found:
        return found
    calibration, dataset = calibration_of(cell, worker), cell.dense.dataset
    if gradients is None and wanted in (None, "gradients"):
        gradients = _gradients(network, cell, worker)
    with seeded(dataset, 0, "importances"):
        activations = None
        if wanted in (None, "activations"):
            here = copy.deepcopy(network).to(worker.accelerator.device)
            activations = activations_of(here, _batches(calibration, BATCH))
        (example, _) = next(_batches(calibration, 1))
        copied = copy.deepcopy(network).cpu()
        found |= library_importances(
            copied, units, _on_cpu(example), gradients=gradients, activations=activations, only=only, graph=graph
        )
    return found


def _graph_of(network: nn.Module, cell: Cell, worker: Worker) -> Graph | None:
    """The couplings of the dense model; of another network only where units are sets of channels, None elsewhere."""
    if network is worker.dense(cell.dense).model:
        return worker.graph(cell)
    if not cell.sets:
        return None
    (example, _) = next(_batches(calibration_of(cell, worker), 1))
    return traced(network, _on_cpu(example))


def _is_large(cell: Cell) -> bool:
    """Whether gradients of all parameters, three times over, are more than a study without them should cost."""
    return cell.dense.model.startswith("hf/")


def _needs_data(pruner: str) -> bool:
    return pruner in CRITERIA and CRITERIA[pruner].needs != "weights"


def by_user(network: nn.Module, cell: Cell, worker: Worker) -> dict[str, Importance]:
    """Layer -> importance by a user's criterion, `package.module:importance`.

    It is called with (a copy of the network, the layer's name, images, labels), in eval mode. Raises Changed where its
    code is not what the sweep was planned with.
    """
    import usercode

    if planned := dict(cell.content).get("pruner"):
        check_content(f"the criterion {cell.pruner}", planned, usercode.fingerprint(cell.pruner))
    importance = usercode.load(cell.pruner)
    calibration = calibration_of(cell, worker)
    (images, labels) = next(_batches(calibration, len(calibration)))
    found = {}
    with seeded(cell.dense.dataset, 0, "importances"):
        for name, _ in cell.layers:
            here = copy.deepcopy(network).to(worker.accelerator.device).eval()
            made = importance(here, name, images, labels)
            if not isinstance(made, torch.Tensor):
                raise ValueError(f"{cell.pruner} gave a {type(made).__name__} for {name}, not a tensor [units]")
            found[name] = _of_units(made, name, network, cell, worker)
    return found


def _of_units(made: torch.Tensor, layer: str, network: nn.Module, cell: Cell, worker: Worker) -> Importance:
    """An importance for each unit from one for each unit or for each output channel: then their sum."""
    channels = units_of(network.get_submodule(layer))
    if layer not in dict(cell.sets):
        return checked(made, channels)
    graph = _graph_of(network, cell, worker)
    assert graph is not None
    sets = graph.sets(layer)
    if made.shape == (channels,) and len(sets) != channels:
        made = torch.stack([made[list(one)].sum() for one in sets])
    return checked(made, len(sets))


def scores(importances: Importances, removed: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """The score_* columns of removed units: the sum of their importances on the dense network, null where a
    criterion has none for a layer; a user's criterion in score_extra."""
    found: dict[str, float | None] = {}
    for criterion, of in importances.items():
        each = [(of[layer].units, units) for layer, units in removed.items()]
        total = sum(score(known, units) for known, units in each if known is not None)
        found[criterion] = None if any(known is None for known, _ in each) else total
    columns: dict[str, Any] = {f"score_{name}": found[name] for name in CRITERIA if name in found}
    extra = tuple((name, value) for name, value in found.items() if name not in CRITERIA and value is not None)
    return columns | ({"score_extra": extra} if extra else {})


def calibration_of(cell: Cell, worker: Worker) -> Samples:
    """The samples that data-driven criteria see, un-augmented: the first of a permutation of the train set that
    is the same for all of a data set; all of a train set that has fewer."""

    def make() -> Samples:
        train = worker.data(cell.dense).train
        order = torch.randperm(len(train), generator=generator(cell.dense.dataset, 0, "calibration"))
        return train.at(order[: cell.calibration])

    return worker._once(("calibration", cell.dense.dataset, cell.dense.validation, cell.calibration), make)


def _gradients(network: nn.Module, cell: Cell, worker: Worker) -> Gradients:
    with seeded(cell.dense.dataset, 0, "importances"):
        here = copy.deepcopy(network).to(worker.accelerator.device)
        return gradients_of(here, _batches(calibration_of(cell, worker), 1))


def _batches(samples: Samples, size: int) -> Iterator[tuple[Any, torch.Tensor]]:
    for batch in samples.in_order(size):
        yield batch.images, batch.labels


def _on_cpu(images: Any) -> Any:
    return {n: t.cpu() for n, t in images.items()} if isinstance(images, Mapping) else images.cpu()
