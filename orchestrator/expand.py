"""Expansion: a spec becomes cells and tasks, lazily and in the same order on every machine."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase

from models.registry import layer_units
from orchestrator.documents import Document, nearest
from orchestrator.errors import UserError
from orchestrator.spec import Retraining, SweepSpec
from pruners.candidates import MAX_ALL, Space, n_removed
from pruners.pruners import PRUNERS
from storage.records import Cell, Dense, Task
from workers.datasets import DATASETS

Layers = tuple[tuple[str, float], ...]


def cells(spec: SweepSpec, document: Document) -> Iterator[Cell]:
    """The cells of the grid, each once. Raises UserError for a point that cannot be."""
    seen: set[str] = set()
    for cell in _grid(spec, document):
        if cell.cell_id not in seen:
            seen.add(cell.cell_id)
            yield cell


def _grid(spec: SweepSpec, document: Document) -> Iterator[Cell]:
    grid = spec.grid
    denses = itertools.product(grid.model, grid.dataset, spec.dense)
    for model, dataset, dense_training in denses:
        recipe = dense_training.recipe(dense_training.seed)
        dense = Dense(model, dataset, recipe, spec.validation)
        for layers, pruner, pruner_seed, granularity, propagation, precision, retrain in itertools.product(
            _layer_points(spec, model, document),
            grid.pruner,
            grid.pruner_seed,
            grid.granularity,
            grid.propagation,
            grid.precision,
            spec.retrain,
        ):
            kind = PRUNERS[pruner]
            sampled = kind.enumerates and spec.candidates.mode == "sample"
            cell = Cell(
                dense=dense,
                layers=layers,
                pruner=pruner,
                retrain=retrain.recipe(),
                granularity=granularity,
                propagation=propagation,
                precision=precision,
                loss_subset=spec.loss_subset,
                candidate_mode="sample" if sampled else "all",
                sampling_seed=spec.candidates.seed if sampled else None,
                pruner_seed=pruner_seed if kind.draws else None,
            )
            _check_candidates(spec, cell, document)
            yield cell


def candidate_count(cell: Cell, sample_count: int | None) -> int:
    """How many candidates of a cell a sweep plans."""
    if not PRUNERS[cell.pruner].enumerates:
        return 1
    if cell.candidate_mode == "sample":
        assert sample_count is not None
        return sample_count
    return space_of(cell).size


def space_of(cell: Cell) -> Space:
    """All candidates of a cell."""
    units = layer_units(cell.dense.model)
    names, ratios = zip(*cell.layers, strict=True)
    return Space.of([units[name] for name in names], ratios)


def tasks(spec: SweepSpec, document: Document) -> Iterator[Task]:
    """The tasks of the grid: cell by cell, candidate by candidate, seed by seed."""
    for cell in cells(spec, document):
        for candidate in range(candidate_count(cell, spec.candidates.count)):
            for seed in spec.grid.seed:
                yield Task(cell, candidate, seed)


def check_data_fits(spec: SweepSpec, document: Document) -> None:
    """Raise UserError where the validation part or the loss subset does not fit a data set."""
    for name in spec.grid.dataset:
        held = int(DATASETS[name].train_size * spec.validation)
        if spec.validation and not held:
            where = document.where(("validation",))
            raise UserError(f"{where}: validation: {spec.validation} holds out nothing of {name}")
        largest = DATASETS[name].train_size - held
        if spec.loss_subset is not None and spec.loss_subset > largest:
            where = document.where(("loss_subset",))
            raise UserError(f"{where}: loss_subset: {spec.loss_subset} of {largest} train samples of {name}")


def _layer_points(spec: SweepSpec, model: str, document: Document) -> Iterator[Layers]:
    """The grid points of the layers axis, each with its ratio or ratios."""
    for i, entry in enumerate(spec.grid.layers):
        fail = _failer(document, "layers", i)
        if isinstance(entry, dict):
            yield _removing_some(model, _resolve(model, entry, fail), fail)
            continue
        patterns = [entry] if isinstance(entry, str) else entry
        for j, ratio in enumerate(spec.grid.ratio or []):
            layers = _resolve(model, dict.fromkeys(patterns, ratio), fail)
            yield _removing_some(model, layers, _failer(document, "ratio", j))


def _failer(document: Document, axis: str, index: int) -> Callable[[str], UserError]:
    """What makes an error of a point of an axis; it says where the point stands."""
    several = isinstance(document.data["grid"][axis], list)
    path = ("grid", axis, index) if several else ("grid", axis)
    return lambda message: UserError(f"{document.where(path)}: {'.'.join(map(str, path))}: {message}")


def _resolve(model: str, ratios: dict[str, float], fail: Callable[[str], UserError]) -> Layers:
    """Names and patterns -> the model's layers in network order, each with its ratio."""
    units = layer_units(model)
    found: dict[str, float] = {}
    for pattern, ratio in ratios.items():
        matching = [name for name in units if name == pattern or fnmatchcase(name, pattern)]
        if not matching:
            known = ", ".join(units)
            raise fail(f"{pattern!r} matches no layer of {model}; it has {known}{nearest(pattern, units)}")
        for name in matching:
            if found.get(name, ratio) != ratio:
                raise fail(f"{name} of {model} is given two ratios, {found[name]} and {ratio}")
            found[name] = ratio
    return tuple((name, found[name]) for name in units if name in found)


def _removing_some(model: str, layers: Layers, fail: Callable[[str], UserError]) -> Layers:
    """`layers`, if each loses some of its units and not all."""
    units = layer_units(model)
    for name, ratio in layers:
        removed = n_removed(units[name], ratio)
        if not 0 < removed < units[name]:
            what = "nothing" if removed == 0 else "everything"
            raise fail(f"ratio {ratio} removes {what} of the {units[name]} units of {name} of {model}")
    return layers


def _check_candidates(spec: SweepSpec, cell: Cell, document: Document) -> None:
    if not PRUNERS[cell.pruner].enumerates:
        return
    size = space_of(cell).size
    if cell.candidate_mode == "all" and size > MAX_ALL:
        where = document.where(("candidates",))
        raise UserError(
            f"{where}: candidates: {cell} has {size:.3g} candidates, more than {MAX_ALL:,}: "
            "use {mode: sample, count: N}"
        )
    count = spec.candidates.count
    if cell.candidate_mode == "sample" and count is not None and count > size:
        where = document.where(("candidates", "count"))
        raise UserError(f"{where}: candidates.count: {count} samples, but {cell} has {size} candidates")


def keeps(retrain: list[Retraining]) -> dict[str, str]:
    """recipe id -> what to keep of the networks retrained by it; of two entries, what keeps something."""
    kept = {one.recipe().recipe_id: one.keep for one in retrain if one.keep != "none"}
    return {one.recipe().recipe_id: "none" for one in retrain} | kept
