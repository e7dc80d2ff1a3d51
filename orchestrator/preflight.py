"""Preflight: each network of a sweep is built, traced, pruned and run once on the CPU, before anything is spent.

Weights are random and the batch has two samples: what is looked for is a network that cannot be pruned, not how well
it does. Networks that are built in are known to be all right; those of transformers are left to their workers, for
they may not fit into the driver: only whether their configs take the data is looked at.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.registry import MODELS, layer_units, load_weights, model_content
from models.weights import file_hash, is_file
from orchestrator.errors import UserError
from orchestrator.progress import say
from pruners.candidates import n_removed
from storage.phases import Report, silent
from usercode import is_code, load
from workers.datasets import DataMissing, find_dataset
from workers.execution import installed

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pruners.coupling import Graph
    from storage.records import Cell

SAMPLES = 2

Layers = tuple[tuple[str, float], ...]
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Subject:
    """A network as a sweep trains it, and all that the sweep prunes of it: ((layers, granularity), ...)."""

    model: str
    classes: int
    shape: tuple[int, int, int]
    weights: str | None
    prunings: tuple[tuple[Layers, str], ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Sizes:
    """(parameters, multiply-adds) before and after pruning; the relative difference to the masked network, or why
    there is none."""

    before: tuple[int, int]
    after: tuple[int, int]
    error: float | None
    reason: str | None


def check_models(cells: Iterable[Cell], data_root: str | None, report: Report = silent) -> None:
    """Raise UserError, a line for each problem, where a network of `cells` cannot be pruned as they want."""
    if problems := preflight(cells, data_root, report):
        todo = "Fix the cause and give the same command again; docs/support.md says what can be pruned"
        raise UserError("\n".join([*problems, f"preflight: nothing was planned or run. {todo}"]))


def preflight(cells: Iterable[Cell], data_root: str | None, report: Report = silent) -> list[str]:
    """What stands in the way of pruning the networks of `cells`, a line for each; what passed once is not tried
    again.
    """
    cells = list(cells)
    tried = _with_data([cell for cell in cells if _is_tried(cell)], data_root)
    pairs = dict.fromkeys((cell.dense.model, cell.dense.dataset) for cell in tried)
    problems = [found for model, dataset in pairs if (found := misfit(model, dataset, data_root))]
    problems += [found for pruner in dict.fromkeys(cell.pruner for cell in cells) if (found := _not_callable(pruner))]
    if problems:
        return problems
    subjects = _subjects(tried, data_root)
    for number, subject in enumerate(subjects, 1):
        report("preflight network", number, len(subjects))
        note = _note(subject)
        if note.exists():
            continue
        found = list(problems_of(subject, report, f"preflight network {number} of {len(subjects)}: pruning"))
        problems += found
        if not found:
            _write(note)
    return problems


def misfit(model: str, dataset: str, data_root: str | None) -> str | None:
    """Why a network of transformers does not take a data set, or another network images with text; None where there
    is nothing to say, as of a user's own code.
    """
    from models.multimodal import check_fits

    of_text, with_text = model.startswith("hf/"), dataset.startswith("llava:")
    if is_code(model) or is_code(dataset) or not (of_text or with_text):
        return None
    if not with_text:
        return f"{model} takes images with text: give it a `llava:PATH` data set, not {dataset}"
    if not of_text:
        return f"{model} takes images alone, and {dataset} has text: give it a network of hf/"
    found = find_dataset(dataset, data_root)
    try:
        check_fits(model, found.classes, found.shape)
    except ValueError as error:
        return str(error)
    return None


def _is_tried(cell: Cell) -> bool:
    """Whether a cell is tried with the shape of its data: what is built in is known to be all right."""
    given = cell.dense.recipe.weights is not None
    return given or cell.dense.model not in MODELS or cell.dense.dataset.startswith("llava:")


def _with_data(cells: list[Cell], data_root: str | None) -> list[Cell]:
    """Those whose data set is here: where a job is submitted from it may not be. UserError where it is no good."""
    here, away = set[str](), set[str]()
    for name in dict.fromkeys(cell.dense.dataset for cell in cells):
        try:
            find_dataset(name, data_root)
            here.add(name)
        except DataMissing:
            away.add(name)
        except ValueError as error:
            raise UserError(str(error)) from None
    for name in sorted(away):
        say(f"{name} is not under {data_root} on this machine: its networks are tried where the sweep runs")
    return [cell for cell in cells if cell.dense.dataset in here]


def _not_callable(pruner: str) -> str | None:
    """Why a user's criterion cannot be called; None where it can, and of any other pruner."""
    if not is_code(pruner):
        return None
    try:
        found = load(pruner)
    except ValueError as error:
        return str(error)
    return None if callable(found) else f"{pruner} is no function: it is called with (network, layer, images, labels)"


def _subjects(cells: Iterable[Cell], data_root: str | None) -> list[Subject]:
    """The distinct networks that are to be tried, each with its distinct prunings."""
    prunings: dict[Subject, dict[tuple[Layers, str], None]] = {}
    for cell in cells:
        weights = cell.dense.recipe.weights
        given = weights if weights is not None and is_file(weights) and "://" not in weights else None
        if cell.dense.model.startswith("hf/") or (cell.dense.model in MODELS and given is None):
            continue
        dataset = find_dataset(cell.dense.dataset, data_root)
        subject = Subject(cell.dense.model, dataset.classes, dataset.shape, given)
        prunings.setdefault(subject, {})[cell.layers, cell.granularity] = None
    return [Subject(s.model, s.classes, s.shape, s.weights, tuple(of)) for s, of in prunings.items()]


def problems_of(subject: Subject, report: Report = silent, phase: str = "preflight: pruning") -> Iterator[str]:
    """Yield what stands in the way of a network's prunings: it is built, saved and loaded, and each pruning is tried as
    a worker would do it."""
    import torch

    from workers.rehearsal import check_parameters, check_saved

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            model = built(subject.model, subject.classes, subject.shape)
            if subject.weights is not None:
                load_weights(model, subject.model, subject.weights)
            probe = torch.randn(SAMPLES, *subject.shape)
            check_forward(model, probe, subject.classes)
            check_parameters(model)
            check_saved(model, subject.model, subject.classes, subject.shape, probe)
        except ValueError as error:
            yield f"{subject.model}: {_without_name(subject.model, error)}"
            return
        for number, (layers, granularity) in enumerate(subject.prunings, 1):
            report(phase, number, len(subject.prunings))
            try:
                check_pruning(model, layers, granularity, probe, subject.model)
            except ValueError as error:
                ratios = sorted({ratio for _, ratio in layers})
                named = ", ".join(name for name, _ in layers[:4]) + (" ..." if len(layers) > 4 else "")
                yield f"{subject.model}: pruning {named} by {', '.join(map(str, ratios))}: {error}"


def _without_name(name: str, error: ValueError) -> str:
    return str(error).removeprefix(f"{name}: ")


def built(name: str, classes: int, shape: tuple[int, int, int]) -> nn.Module:
    """The network in eval mode, with random weights that leave no channel idle. Raises ValueError."""
    from models import build_model

    return stirred(build_model(name, classes, shape)).eval()


def stirred(model: nn.Module) -> nn.Module:
    """`model`, its constant tensors (a classifier of zeros, scales of 1e-6, running statistics) made random: with
    them as they are a wrong cut would not be seen.
    """
    import torch

    norm = torch.nn.modules.batchnorm._BatchNorm
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, norm) and module.running_mean is not None and module.running_var is not None:
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
        for parameter in model.parameters():
            if parameter.is_floating_point() and (parameter.numel() == 1 or float(parameter.std()) < 1e-3):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def check_forward(model: nn.Module, probe: torch.Tensor, classes: int) -> None:
    """Raise ValueError unless a network gives [N, classes], and the same again, in eval mode."""
    first, second = _run(model, probe), _run(model, probe)
    if not hasattr(first, "shape"):
        raise ValueError(f"its output is a {type(first).__name__}; it must be a tensor [N, {classes}]")
    if tuple(first.shape) != (len(probe), classes):
        said = f"for {len(probe)} samples its output is {list(first.shape)}"
        raise ValueError(f"{said}; it must be [N, classes], here [{len(probe)}, {classes}]")
    if not first.isfinite().all():
        raise ValueError("its output on random inputs is not finite")
    if not first.allclose(second, rtol=1e-5, atol=1e-6):
        raise ValueError(
            "its forward pass is not deterministic in eval mode: two runs on the same input differ by "
            f"{float((first - second).abs().max()):.2g}; draw random numbers only where self.training"
        )


def _run(model: nn.Module, probe: torch.Tensor) -> Any:
    import torch

    try:
        with torch.no_grad():
            return model(probe)
    except Exception as error:  # of a network's own code
        shape = "x".join(map(str, probe.shape[1:]))
        raise ValueError(f"it cannot be run on inputs of {shape}: {type(error).__name__}: {error}") from error


def check_pruning(
    model: nn.Module, layers: Layers, granularity: str, probe: torch.Tensor, name: str | None = None
) -> Sizes | None:
    """Prune a copy of `model`, compare, train it by a step, keep it and load it. Raises ValueError with the reason.

    Of several layers that cannot be pruned together, those that cannot be alone are named. Without a `name` to build
    the network by, nothing is trained and kept. None for granularity weight, which leaves sizes as they are.
    """
    if granularity == "weight":
        _check_maskable(model, [layer for layer, _ in layers])
        return None
    graph = graph_of(model, probe)
    try:
        return prune_together(model, layers, probe, graph, name)
    except ValueError as error:
        if len(layers) == 1:
            raise
        alone = [found for layer in layers if (found := _alone(model, layer, probe, graph)) is not None]
        if not alone:
            raise
        more = f"; and {len(alone) - MOST} more layers" if len(alone) > MOST else ""
        raise ValueError("; ".join(alone[:MOST]) + more) from error


MOST = 4
"""Layers whose reasons are told one by one."""


def graph_of(model: nn.Module, probe: torch.Tensor) -> Graph:
    """Return the couplings of a network's channels. Raises ValueError where it cannot be run."""
    from pruners.coupling import traced

    return traced(model, probe[:1])


def _alone(model: nn.Module, layer: tuple[str, float], probe: torch.Tensor, graph: Graph) -> str | None:
    """Why a layer alone cannot be pruned; None where it can."""
    try:
        prune_together(model, (layer,), probe, graph)
    except ValueError as error:
        return str(error) if str(error).startswith(f"{layer[0]}: ") else f"{layer[0]}: {error}"
    return None


def _check_maskable(model: nn.Module, layers: list[str]) -> None:
    """Raise ValueError for a layer whose weight is not its own parameter alone."""
    from models.discovery import parametrized

    for layer in layers:
        module: Any = model.get_submodule(layer)
        if getattr(module, "weight", None) is None:
            raise ValueError(f"{layer} has no weights of its own to mask: with granularity weight name a layer")
        if (problem := parametrized(module)) is not None:
            raise ValueError(f"{layer}: {problem}")
        holders = [name for name, other in model.named_modules() if getattr(other, "weight", None) is module.weight]
        others = [name for name in holders if name != layer]
        if others:
            raise ValueError(
                f"{layer}: its weight is also that of {', '.join(others)}, where a mask of {layer} has no effect; "
                "prune layers with weights of their own"
            )


def _units(model: nn.Module, layers: Layers, graph: Graph) -> dict[str, tuple[int, ...]]:
    """Layer -> the channels (of attention blocks, the heads) of units that are drawn at random, as many as its ratio
    says. With scope global a layer alone may lose nothing: a unit of each is tried all the same."""
    from pruners.surgery import units_of

    draw = random.Random(0)
    removed = {}
    for layer, ratio in layers:
        try:
            module: Any = model.get_submodule(layer)
        except AttributeError:
            raise ValueError(f"it has no layer {layer}") from None
        if hasattr(module, "prunable_heads"):
            sets = tuple((head,) for head in range(units_of(module)))
        else:
            sets = graph.sets(layer)
        chosen = draw.sample(range(len(sets)), min(len(sets) - 1, max(1, n_removed(len(sets), ratio))))
        if chosen:
            removed[layer] = tuple(sorted(channel for unit in chosen for channel in sets[unit]))
    return removed


def prune_together(
    model: nn.Module, layers: Layers, probe: torch.Tensor, graph: Graph, name: str | None = None
) -> Sizes:
    """Prune these layers of a copy of `model` at once, and check it as `check_pruning` says. Raises ValueError."""
    from pruners.equivalence import LIMIT, equivalence
    from pruners.surgery import NothingFell, check_fell, prune
    from workers.rehearsal import rehearse
    from workers.worker import count

    try:
        removed = _units(model, layers, graph)
        pruned = prune(model, removed, probe[:1], graph=graph)
        made = _output(pruned, probe)
        before, after = count(model, probe[:1]), count(pruned, probe[:1])
        check_fell(before, after)
        found = equivalence(model, pruned, removed, probe, graph.partners(removed))
    except NothingFell as error:
        raise ValueError(str(error)) from error
    except ValueError:
        raise
    except Exception as error:  # of tracing, or of the network's own code once it is smaller
        raise ValueError(f"it cannot be pruned: {type(error).__name__}: {str(error).partition(chr(10))[0]}") from error
    if made.shape != _run(model, probe).shape:
        raise ValueError(f"pruned, its output is {list(made.shape)}")
    if found.error is not None and not found.error <= LIMIT:
        said = found.reason or f"relative difference {found.error:.2g}, limit {LIMIT}"
        raise ValueError(f"pruned, it does not compute what it does with these units silenced ({said})")
    if name is not None:
        rehearse(pruned, name, made.shape[1], tuple(probe.shape[1:]), removed, probe)  # type: ignore[arg-type]
    return Sizes(before, after, found.error, found.reason)


def _output(pruned: nn.Module, probe: torch.Tensor) -> torch.Tensor:
    """Return what a pruned network gives. Raises ValueError if its code fixes the sizes of the dense one."""
    import torch

    try:
        with torch.no_grad():
            return pruned.eval()(probe)
    except Exception as error:  # of a network's own code
        said = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise ValueError(
            f"it cannot be pruned: its forward pass fixes the sizes of the dense network: {said}"
        ) from error


def _note(subject: Subject) -> Path:
    """The file that says that a subject has passed, named after all that this depends on."""
    import pruners

    files = [Path(__file__), *sorted(Path(str(pruners.__file__)).parent.glob("*.py"))]
    rules = [path.read_bytes() for path in files]
    given = file_hash(Path(subject.weights)) if subject.weights else None
    libraries = list(installed(("torch", "torchvision", "timm", "torch-pruning")))
    said = [subject.model, model_content(subject.model), subject.classes, subject.shape, given, subject.prunings]
    key = hashlib.sha256(json.dumps([*said, libraries]).encode() + b"".join(rules)).hexdigest()[:32]
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "prunesweep" / "preflight" / key


def _write(note: Path) -> None:
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.touch()
    except OSError:
        return


def all_layers(name: str, ratio: float, classes: int | None = None, shape: Shape | None = None) -> Layers:
    """Every prunable layer of a network that loses some units at `ratio`, for samples of a shape, if one is given."""
    units = layer_units(name, classes, shape)
    return tuple((layer, ratio) for layer, n in units.items() if n_removed(n, ratio))
