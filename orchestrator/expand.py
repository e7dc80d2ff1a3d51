"""Expansion: a spec becomes cells and tasks, lazily and in the same order on every machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, Context, Decimal
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import product
from pathlib import Path

from models.layers import Layers as Prunable
from models.library import is_library
from models.registry import absolute_model, input_shape, is_found, model_content, prunable_layers, weight_layers
from models.weights import SUFFIXES, file_hash
from orchestrator.documents import Document, nearest
from orchestrator.errors import UserError
from orchestrator.spec import DenseTraining, Retraining, SweepSpec
from pruners.candidates import MAX_ALL, Space, n_removed
from pruners.pruners import find_pruner, n_removed_together, problem_of, pruner_content
from storage.identity import CELL_DEFAULTS, SCHEMA_VERSION
from storage.phases import Report, silent
from storage.records import Cell, ChannelSets, Dense, Recipe, Task
from workers.datasets import DataMissing, dataset_content, find_dataset

Layers = tuple[tuple[str, float], ...]
Shape = tuple[int, int, int]
CALIBRATION = int(CELL_DEFAULTS[SCHEMA_VERSION]["calibration"])
SHOWN = 4
"""Layers that a message names one by one."""


def cells(spec: SweepSpec, document: Document, data_root: str | None = None, report: Report = silent) -> Iterator[Cell]:
    """The cells of the grid, each once. Raises UserError for a point that cannot be."""
    seen: set[str] = set()
    for cell in _grid(spec, document, data_root, report):
        if cell.cell_id not in seen:
            seen.add(cell.cell_id)
            report("planning cell", len(seen))
            yield cell


def _grid(spec: SweepSpec, document: Document, data_root: str | None, report: Report) -> Iterator[Cell]:
    grid = spec.grid
    for name, dataset, dense_training in product(grid.model, grid.dataset, spec.dense):
        model = absolute_model(name)
        report(f"reading {dataset}")
        _check_input(model, dataset, data_root, document, report)
        content = _content(model=model_content(model), dataset=_data_content(dataset, data_root))
        if weights_file(dense_training.weights):
            report(f"hashing {dense_training.weights}")
        recipe, weights = _recipe_and_weights(model, dense_training, document)
        report("tracing network", grid.model.index(name) + 1, len(grid.model))
        dense = Dense(model, dataset, recipe, spec.validation, (*content, *weights))
        known = _Known(model, dataset, data_root)
        points = [(kind, layers) for kind in grid.granularity for layers in _layer_points(spec, known, kind, document)]
        axes = (grid.pruner, grid.pruner_seed, grid.scope, grid.schedule, grid.propagation, grid.precision)
        for (granularity, by_scope), pruner, pruner_seed, scope, schedule, propagation, precision, retrain in product(
            points, *axes, spec.retrain
        ):
            layers = by_scope[scope]
            if problem := problem_of(pruner, scope, granularity, schedule, propagation):
                raise UserError(f"{document.where(('grid', 'pruner'))}: grid.pruner: {problem}")
            if retrain.lora_rank and (not model.startswith("hf/") or granularity == "weight" or retrain.ema):
                where = document.where(("retrain",))
                raise UserError(
                    f"{where}: retrain.lora_rank: low-rank additions are for hf/ networks, granularity filter, no ema"
                )
            if dataset.startswith("llava:") and any(one.mixup or one.cutmix for one in (dense_training, retrain)):
                where = document.where(("grid", "dataset"))
                raise UserError(f"{where}: mixup and cutmix are for images with classes, not for {dataset}")
            kind = find_pruner(pruner)
            sampled = kind.enumerates and spec.candidates.mode == "sample"
            cell = Cell(
                dense=dense,
                layers=layers,
                pruner=pruner,
                retrain=retrain.recipe(),
                granularity=granularity,
                scope=scope,
                schedule=schedule,
                propagation=propagation,
                precision=precision,
                # The scores of every filter study are computed on these samples, whatever the pruner.
                calibration=spec.calibration if granularity == "filter" else CALIBRATION,
                content=_content(pruner=pruner_content(pruner)),
                loss_subset=spec.loss_subset,
                candidate_mode="sample" if sampled else "all",
                sampling_seed=spec.candidates.seed if sampled else None,
                pruner_seed=pruner_seed if kind.draws else None,
                sets=known.sets(granularity, layers),
            )
            _check_candidates(spec, cell, document, data_root)
            yield cell


Content = tuple[tuple[str, str], ...]


def _recipe_and_weights(model: str, training: DenseTraining, document: Document) -> tuple[Recipe, Content]:
    """A dense recipe, its file of weights by absolute path; and that file's content."""
    recipe, path = training.recipe(), weights_file(training.weights)
    if path is None:
        if training.weights and "://" not in training.weights and not _may_have(model, training.weights):
            where = document.where(("dense",))
            raise UserError(
                f"{where}: dense.weights: {model} has no weights {training.weights!r}; give a file "
                f"({', '.join(SUFFIXES)}), or leave it out"
            )
        return recipe, ()
    try:
        content = file_hash(path)
    except FileNotFoundError:
        where = document.where(("dense",))
        said = f"there is no file {path} (a name of the library's has no suffix)"
        raise UserError(f"{where}: dense.weights: {said}") from None
    except OSError as error:
        raise UserError(f"{document.where(('dense',))}: dense.weights: {error}") from error
    return replace(recipe, weights=str(path.absolute())), _content(weights=content)


def _may_have(model: str, weights: str) -> bool:
    """Whether a network may have weights of this name; torchvision's and timm's are known once they are imported."""
    return "/" not in weights and (is_library(model) or (model.startswith("hf/") and weights == "library"))


def weights_file(weights: str | None) -> Path | None:
    """The local file that `weights` names; None for a name of the library's, and for a URI."""
    if weights is None or "://" in weights:
        return None
    return Path(weights).expanduser() if weights.endswith(SUFFIXES) else None


def _content(**hashes: str | None) -> Content:
    """What is known by content, in the records' form."""
    return tuple(sorted((name, value) for name, value in hashes.items() if value))


def _data_content(dataset: str, data_root: str | None) -> str | None:
    """The hash of a data set that is known by content. One that is not here can be planned, and not be run: then
    its tasks are not those they will be."""
    try:
        return dataset_content(dataset, data_root)
    except DataMissing:
        return "missing"


def _check_input(model: str, dataset: str, data_root: str | None, document: Document, report: Report) -> None:
    try:
        given = find_dataset(dataset, data_root, report).shape
    except DataMissing:
        return
    except ValueError as error:
        raise UserError(f"{document.where(('grid', 'dataset'))}: grid.dataset: {error}") from None
    wanted = input_shape(model)
    if wanted is not None and wanted != given:
        shapes = ["x".join(map(str, shape)) for shape in (wanted, given)]
        where = document.where(("grid", "dataset"))
        raise UserError(
            f"{where}: grid.dataset: {model} takes samples of {shapes[0]}, those of {dataset} are {shapes[1]}"
        )


@dataclass(frozen=True)
class _Known:
    """What can be pruned of a network, for samples of a data set."""

    model: str
    dataset: str
    data_root: str | None

    @cached_property
    def prunable(self) -> Prunable:
        """The layers, traced on samples of the data set's shape where the data are here. Raises ValueError."""
        return prunable_layers(self.model, *_classes_and_shape(self.model, self.dataset, self.data_root))

    def units(self, granularity: str) -> Mapping[str, int]:
        """Return layer -> what can be removed of it: units, or single weights. Raises ValueError."""
        if granularity == "weight":
            return weight_layers(self.model, *_classes_and_shape(self.model, self.dataset, self.data_root))
        return {**self.prunable.units, **self.prunable.others}

    def others(self, granularity: str) -> Mapping[str, int]:
        """Return the layers that only their exact names stand for."""
        return {} if granularity == "weight" else self.prunable.others

    def refused(self, granularity: str) -> Mapping[str, str]:
        """Return layer -> why its units cannot be removed."""
        return {} if granularity == "weight" else self.prunable.refused

    def sets(self, granularity: str, layers: Layers) -> tuple[tuple[str, ChannelSets], ...]:
        """Return the channels of the units of those layers whose channels are removed in sets."""
        if granularity == "weight":
            return ()
        found = self.prunable.sets
        return tuple(sorted((name, found[name]) for name, _ in layers if name in found))


def _classes_and_shape(model: str, dataset: str, data_root: str | None) -> tuple[int | None, Shape | None]:
    """The classes and the sample shape of a data set, for a network that has to be traced; nothing where the data set
    is not here, or cannot be used, which other checks report."""
    if not is_found(model):
        return None, None
    try:
        found = find_dataset(dataset, data_root)
    except ValueError:
        return None, None
    return found.classes, found.shape


def candidate_count(cell: Cell, sample_count: int | None, data_root: str | None = None) -> int:
    """How many candidates of a cell a sweep plans."""
    if not find_pruner(cell.pruner).enumerates:
        return 1
    if cell.candidate_mode == "sample":
        assert sample_count is not None
        return sample_count
    return space_of(cell, data_root).size


def units_of(cell: Cell, data_root: str | None = None) -> Mapping[str, int]:
    """Return layer -> what can be removed of it in a cell: units, or single weights."""
    return _Known(cell.dense.model, cell.dense.dataset, data_root).units(cell.granularity)


def space_of(cell: Cell, data_root: str | None = None) -> Space:
    """All candidates of a cell."""
    units = units_of(cell, data_root)
    names, ratios = zip(*cell.layers, strict=True)
    return Space.of([units[name] for name in names], ratios)


def sets_of(cell: Cell) -> list[str]:
    """Return a line for each layer of a cell whose units are several channels each, with the channels of the first."""
    lines = []
    for layer, sets in cell.sets:
        if len(sets[0]) > 1:
            shown = ", ".join(str(list(channels)) for channels in sets[:SHOWN])
            more = f" and {len(sets) - SHOWN} more" if len(sets) > SHOWN else ""
            said = f"its channels can only be removed in {len(sets)} sets of {len(sets[0])}, which are its units"
            lines.append(f"{layer} of {cell.dense.model}: {said}: {shown}{more}")
    return lines


def tasks(spec: SweepSpec, document: Document, data_root: str | None = None) -> Iterator[Task]:
    """The tasks of the grid: cell by cell, candidate by candidate, seed by seed."""
    for cell in cells(spec, document, data_root):
        for candidate in range(candidate_count(cell, spec.candidates.count, data_root)):
            for seed in spec.grid.seed:
                yield Task(cell, candidate, seed)


def check_data_fits(spec: SweepSpec, document: Document, data_root: str | None = None) -> None:
    """Raise UserError where the validation part or the loss subset does not fit a data set."""
    for name in spec.grid.dataset:
        try:
            size = find_dataset(name, data_root).train_size
        except DataMissing:
            continue
        held = int(size * spec.validation)
        if spec.validation and not held:
            where = document.where(("validation",))
            raise UserError(f"{where}: validation: {spec.validation} holds out nothing of {name}")
        largest = size - held
        if spec.loss_subset is not None and spec.loss_subset > largest:
            where = document.where(("loss_subset",))
            raise UserError(f"{where}: loss_subset: {spec.loss_subset} of {largest} train samples of {name}")


def _layer_points(
    spec: SweepSpec, known: _Known, granularity: str, document: Document
) -> Iterator[Mapping[str, Layers]]:
    """The grid points of the layers axis, each with its ratio or ratios: scope -> layers."""
    for i, entry in enumerate(spec.grid.layers):
        fail = _failer(document, "layers", i)
        if isinstance(entry, dict):
            units = _units(known, granularity, fail)
            yield _by_scope(spec, known.model, granularity, units, _resolve(known, granularity, entry, fail), fail)
            continue
        patterns = [entry] if isinstance(entry, str) else entry
        for j, ratio in enumerate(spec.grid.ratio or []):
            units = _units(known, granularity, fail)
            layers = _resolve(known, granularity, dict.fromkeys(patterns, ratio), fail)
            yield _by_scope(spec, known.model, granularity, units, layers, _failer(document, "ratio", j))


def _failer(document: Document, axis: str, index: int) -> Callable[[str], UserError]:
    """What makes an error of a point of an axis; it says where the point stands."""
    several = isinstance(document.data["grid"][axis], list)
    path = ("grid", axis, index) if several else ("grid", axis)
    return lambda message: UserError(f"{document.where(path)}: {'.'.join(map(str, path))}: {message}")


def _resolve(known: _Known, granularity: str, ratios: dict[str, float], fail: Callable[[str], UserError]) -> Layers:
    """Names and patterns -> the model's layers in network order, each with its ratio."""
    units, refused = known.units(granularity), known.refused(granularity)
    by_pattern = [name for name in units if name not in known.others(granularity)]
    found: dict[str, float] = {}
    for pattern, ratio in ratios.items():
        matching = [pattern] if pattern in units else [name for name in by_pattern if fnmatchcase(name, pattern)]
        if not matching and pattern in refused:
            raise fail(f"{known.model}: {refused[pattern]}")
        if not matching:
            there = ", ".join(by_pattern) or "none"
            hint = nearest(pattern, by_pattern)
            raise fail(f"{pattern!r} matches no layer of {known.model} that can be pruned; it has {there}{hint}")
        for name in matching:
            if found.get(name, ratio) != ratio:
                raise fail(f"{name} of {known.model} is given two ratios, {found[name]} and {ratio}")
            found[name] = ratio
    return tuple((name, found[name]) for name in units if name in found)


def _units(known: _Known, granularity: str, fail: Callable[[str], UserError]) -> Mapping[str, int]:
    """Layer -> what can be removed of it: units, or single weights."""
    try:
        return known.units(granularity)
    except ValueError as error:
        raise fail(str(error)) from None


def _by_scope(
    spec: SweepSpec,
    model: str,
    granularity: str,
    units: Mapping[str, int],
    layers: Layers,
    fail: Callable[[str], UserError],
) -> dict[str, Layers]:
    """Return the layers of a point for each scope of the grid. Raise UserError for a layer that loses all its units,
    or none. With `skip_small_layers`, a layer that loses none is left out.

    Scope global has one rounding over all layers (`_check_together`), so each layer may lose none.
    """
    if set(spec.grid.scope) == {"global"}:
        return {"global": layers}
    noun = "weights" if granularity == "weight" else "units"
    removed = {name: n_removed(units[name], ratio) for name, ratio in layers}
    for name, ratio in layers:
        if removed[name] >= units[name]:
            raise fail(f"ratio {ratio} removes everything of the {units[name]} {noun} of {name} of {model}; lower it")
    rest = tuple(layer for layer in layers if removed[layer[0]])
    if len(rest) < len(layers) and not (rest and spec.skip_small_layers):
        small = {name: units[name] for name, _ in layers if not removed[name]}
        ratios = sorted({ratio for name, ratio in layers if name in small})
        raise fail(_too_small(model, small, ratios, noun, skippable=bool(rest)))
    return {scope: layers if scope == "global" else rest for scope in spec.grid.scope}


def _too_small(model: str, small: Mapping[str, int], ratios: list[float], noun: str, *, skippable: bool) -> str:
    """Return the message for layers that lose nothing: layer -> units, and which ratios work."""
    if len(small) == 1:
        ((name, n),) = small.items()
        of = f"of the {n} {noun} of {name} of {model}"
    else:
        shown = [f"{name} has {n}" for name, n in list(small.items())[:SHOWN]]
        more = [f"and {len(small) - SHOWN} more"] if len(small) > SHOWN else []
        of = f"of the {noun} of {len(small)} layers of {model} ({', '.join([*shown, *more])})"
    least = min(small.values())
    if least > 1:
        todo = f"use a ratio of at least {smallest_ratio(least)}"
    else:
        todo = f"no ratio can prune a layer that has 1 of these {noun}: name other layers"
    skip = ", or set skip_small_layers: true, which leaves such layers out" if skippable else ""
    return f"ratio {' or '.join(map(str, ratios))} removes nothing {of}; {todo}{skip}"


def smallest_ratio(n: int) -> float:
    """Return the smallest ratio that removes one of `n` units, n > 1, rounded up to three significant digits."""
    return float(Context(prec=3, rounding=ROUND_CEILING).divide(Decimal(1), Decimal(n)))


def _check_candidates(spec: SweepSpec, cell: Cell, document: Document, data_root: str | None) -> None:
    if cell.scope == "global":
        _check_together(cell, document, data_root)
    if not find_pruner(cell.pruner).enumerates:
        return
    if cell.granularity == "weight":
        if cell.candidate_mode == "all":
            where = document.where(("candidates",))
            raise UserError(
                f"{where}: candidates: of single weights there are too many: use {{mode: sample, count: N}}"
            )
        return
    size = space_of(cell, data_root).size
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


def _check_together(cell: Cell, document: Document, data_root: str | None) -> None:
    """All layers together are to lose something, and each layer is to keep something, wherever the others lose it."""
    known = units_of(cell, data_root)
    units, ratios = [known[name] for name, _ in cell.layers], [ratio for _, ratio in cell.layers]
    where = document.where(("grid", "scope"))
    if not (removed := n_removed_together(units, ratios)):
        todo = f"use a ratio of at least {smallest_ratio(sum(units))}" if sum(units) > 1 else "name more layers"
        raise UserError(f"{where}: grid.scope: nothing of the {sum(units)} units of {cell} is removed; {todo}")
    if removed > sum(units) - len(units):
        raise UserError(
            f"{where}: grid.scope: of the {sum(units)} units of {cell} together {removed} are removed, which leaves "
            f"none in one of {len(units)} layers: use a lower ratio"
        )


def keeps(retrain: list[Retraining]) -> dict[str, str]:
    """recipe id -> what to keep of the networks retrained by it; of two entries, what keeps something."""
    kept = {one.recipe().recipe_id: one.keep for one in retrain if one.keep != "none"}
    return {one.recipe().recipe_id: "none" for one in retrain} | kept
