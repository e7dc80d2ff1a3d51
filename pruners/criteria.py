"""Criteria: how important each unit of a layer is. Higher = keep.

`l1` and `l2` are norms of the unit's own weights; the others are torch-pruning's group importances, as that
library defines them. docs/criteria.md has each one's definition.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import ModuleType

    import torch
    from torch import nn

    from pruners.candidates import Sets
    from pruners.coupling import Graph

NEEDS = ("weights", "gradients", "activations", "data")
"""What a criterion reads of a network; a user's own may look at the calibration samples themselves."""


@dataclass(frozen=True)
class Criterion:
    """A criterion: what it needs, and the class of torch-pruning that computes it, where it is not ours."""

    name: str
    needs: str = "weights"
    library: str | None = None


CRITERIA: Mapping[str, Criterion] = {
    one.name: one
    for one in (
        Criterion("l1"),
        Criterion("l2"),
        Criterion("taylor", "gradients", "GroupTaylorImportance"),
        Criterion("hessian", "gradients", "GroupHessianImportance"),
        Criterion("fpgm", library="FPGMImportance"),
        Criterion("lamp", library="LAMPImportance"),
        Criterion("bn_scale", library="BNScaleImportance"),
        Criterion("activation", "activations", "ActivationImportance"),
    )
}


class NotScored(ValueError):
    """A criterion has no importance for the units of a layer."""


@dataclass(frozen=True)
class Importance:
    """The importance of each unit of a layer, float64 [units], or the reason why there is none."""

    units: torch.Tensor | None
    reason: str | None = None

    def needed(self, layer: str, criterion: str) -> torch.Tensor:
        """The importances. Raises NotScored, naming the layer, where there are none."""
        if self.units is None:
            raise NotScored(f"{layer}: {criterion} has no importance for it: {self.reason}; choose another criterion")
        return self.units


def checked(importance: torch.Tensor, units: int) -> Importance:
    """An importance that is finite for each of `units`; else none, and why."""
    found = importance.detach().double().cpu()
    if found.shape != (units,):
        return Importance(None, f"its shape is {tuple(found.shape)}, not ({units},)")
    return Importance(found) if found.isfinite().all() else Importance(None, "it is not finite")


def own_norms(model: nn.Module, layer: str, units: int, sets: Sets | None = None) -> dict[str, Importance]:
    """Return l1 and l2 of a layer: the norms of each unit's own weights, bias left out.

    Those of an attention head are the sums over the rows that write its queries, keys and values. `sets` are the
    channels of each unit, where units have several: its norms are those of the weights of all of them.
    """
    import torch

    module: Any = model.get_submodule(layer)
    heads = getattr(module, "prunable_heads", None)
    if heads is not None:
        written = [(getattr(module, name), parts) for name, parts in heads.writes]
        rows = [(_norms(one.weight), parts) for one, parts in written if _is_linear(one)]
        each = {p: torch.stack([of[p].reshape(n, units, -1).sum((0, 2)) for of, n in rows]) for p in ("l1", "l2")}
        return {name: checked(norms.sum(0), units) for name, norms in each.items()}
    weight = getattr(module, "weight", None)
    if weight is None or weight.ndim < 2:
        return {p: Importance(None, "it has no weights of its own") for p in ("l1", "l2")}
    transposed = getattr(module, "transposed", False)
    rows = weight.transpose(0, 1) if transposed else weight
    if sets is not None:
        rows = torch.stack([rows[list(channels)].flatten() for channels in sets])
    return {p: checked(n, units) for p, n in _norms(rows).items()}


def _norms(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    rows = weight.detach().double().cpu().flatten(1)
    return {"l1": rows.abs().sum(1), "l2": rows.square().sum(1).sqrt()}


def _is_linear(module: Any) -> bool:
    from torch import nn

    return isinstance(module, nn.Linear)


# -- torch-pruning's ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gradients:
    """Of the mean loss over the calibration samples, by parameter name: the gradient, and the mean square of
    the gradients of single samples, which stands for the Hessian's diagonal."""

    mean: Mapping[str, torch.Tensor]
    square: Mapping[str, torch.Tensor]


Batches = Iterable[tuple[Any, "torch.Tensor"]]
"""(images, labels) after (images, labels)."""


def gradients_of(model: nn.Module, samples: Batches) -> Gradients:
    """The gradients of a network in eval mode over `samples`, given one by one.

    A backward pass for each: torch.func would take them together, but its first use imports for longer than a small
    network's passes last.
    """
    import torch
    from torch.nn import functional as F

    model.eval().requires_grad_(True)
    names, parameters = zip(*model.named_parameters(), strict=True)
    mean, square = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    count = 0
    for images, labels in samples:
        with torch.enable_grad():
            logits = model(images)
            if labels.dim() > 1:  # text: token by token, as torch refuses its other form on a GPU
                logits, labels = logits.movedim(1, -1).flatten(0, -2), labels.flatten()
            loss = F.cross_entropy(logits, labels)
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
        for into, squared, gradient in zip(mean, square, found, strict=True):
            if gradient is not None:
                into.add_(gradient)
                squared.addcmul_(gradient, gradient)
        count += 1
    held = [{name: total.div(count).cpu() for name, total in zip(names, of, strict=True)} for of in (mean, square)]
    return Gradients(*held)


def library_importances(
    model: nn.Module,
    layers: Mapping[str, int],
    example: Any,
    *,
    gradients: Gradients | None = None,
    activations: Mapping[str, torch.Tensor] | None = None,
    only: str | None = None,
    graph: Graph | None = None,
) -> dict[str, dict[str, Importance]]:
    """Return criterion -> layer -> importance, by torch-pruning, of layers that have so many units.

    `model` is a copy on the CPU, to be used up; `example` is an input batch, `graph` the model's, where it is known.
    What needs gradients, or activations, is left out without them; with `only` all but that one is.
    """
    groups = _groups(model, layers, example, graph)
    if activations is not None:
        for name, found in activations.items():
            model.get_submodule(name)._importance = found  # pyright: ignore[reportArgumentType]
    there = {"weights": True, "gradients": gradients is not None, "activations": activations is not None}
    made: dict[str, dict[str, Importance]] = {}
    for criterion in CRITERIA.values():
        if criterion.library and there[criterion.needs] and only in (None, criterion.name):
            if gradients is not None and criterion.needs == "gradients":
                _set_gradients(model, gradients.square if criterion.name == "hessian" else gradients.mean)
            made[criterion.name] = {n: _scored(criterion.library, group, layers[n]) for n, group in groups.items()}
    return made


def _groups(model: nn.Module, layers: Mapping[str, int], example: Any, graph: Graph | None) -> dict[str, Any]:
    """All units of each layer with every tensor that is coupled to them, as torch-pruning's importances read it."""
    from pruners.coupling import traced

    groups = {}
    for layer, units in layers.items():
        root: Any = model.get_submodule(layer)
        heads = getattr(root, "prunable_heads", None)
        if heads is None:
            graph = graph or traced(model, example)
            groups[layer] = _group_of_units(model, layer, graph)
        else:
            groups[layer] = _group_of_heads(root, heads, units)
    return groups


class _Part:
    """One tensor of a group: a layer, which of its channels, and the unit that each of them belongs to."""

    def __init__(
        self, layer: nn.Module, handler: Any, units: Sequence[int], channels: Sequence[int] | None = None
    ) -> None:
        self.dep = SimpleNamespace(layer=layer, target=SimpleNamespace(module=layer), handler=handler)
        self.dep.pruning_fn = handler
        self.idxs = list(range(len(units))) if channels is None else list(channels)
        self.root_idxs = list(units)

    def __iter__(self) -> Iterator[Any]:
        return iter((self.dep, self.idxs))


def _group_of_units(model: nn.Module, layer: str, graph: Graph) -> list[_Part]:
    """The group of a layer's units: the layer itself, then what is coupled to it in the order in which it runs."""
    parts: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for unit, channels in enumerate(graph.sets(layer)):
        for one in graph.removal(layer, channels):
            parts.setdefault((one.tensor, one.dim), []).extend((index, unit) for index in one.indices)
    modules = dict(model.named_modules())
    order = {name: at for at, name in enumerate(graph.order)}
    found = []
    for (tensor, dim), pairs in parts.items():
        module = tensor.rpartition(".")[0]
        handler = _handler(modules[module], tensor.rpartition(".")[2], dim)
        if handler is not None:
            is_own = (tensor, dim) in graph.outputs[layer]
            indices, units = zip(*sorted(pairs), strict=True)
            found.append((not is_own, order.get(module, 0), _Part(modules[module], handler, units, indices)))
    return [part for _, _, part in sorted(found, key=lambda one: one[:2])]


def _handler(module: nn.Module, tensor: str, dim: int) -> Any:
    """torch-pruning's name for what a removal does to a weight; None of what its importances do not look at."""
    from torch import nn

    functions = _torch_pruning().pruner.function
    if tensor != "weight":
        return None
    if isinstance(module, nn.Linear):
        return (functions.prune_linear_out_channels, functions.prune_linear_in_channels)[dim]
    if isinstance(module, nn.modules.conv._ConvNd) and dim < 2:
        if module.groups > 1:
            return functions.prune_depthwise_conv_out_channels
        is_input = (dim == 1) != module.transposed
        return functions.prune_conv_in_channels if is_input else functions.prune_conv_out_channels
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return functions.prune_batchnorm_out_channels
    return functions.prune_layernorm_out_channels if isinstance(module, nn.LayerNorm) else None


@contextmanager
def _without_timm() -> Iterator[None]:
    """torch-pruning imports timm (seconds) only to count its attention blocks' operations."""
    if "timm" in sys.modules:
        yield
        return
    blocked: dict[str, Any] = sys.modules
    blocked["timm"] = None
    try:
        yield
    finally:
        del blocked["timm"]


def _torch_pruning() -> ModuleType:
    with _without_timm():
        import torch_pruning
    return torch_pruning


def _group_of_heads(block: Any, heads: Any, units: int) -> list[_Part]:
    """The group of an attention block's heads: the rows that write queries, keys and values, the columns that read
    the heads' channels. torch-pruning has none of heads."""
    functions = _torch_pruning().pruner.function
    one = [unit for unit in range(units) for _ in range(heads.width)]
    writes = [(getattr(block, name), one * parts) for name, parts in heads.writes]
    reads = [(getattr(block, name), one) for name in heads.reads]
    group = [_Part(layer, functions.prune_linear_out_channels, of) for layer, of in writes if _is_linear(layer)]
    return group + [_Part(layer, functions.prune_linear_in_channels, of) for layer, of in reads if _is_linear(layer)]


def _set_gradients(model: nn.Module, held: Mapping[str, torch.Tensor]) -> None:
    import torch

    for name, parameter in model.named_parameters():
        parameter.grad = held[name].clone() if name in held else torch.zeros_like(parameter)


def _scored(library: str, group: Any, units: int) -> Importance:
    """The importance of a group's units by one of the library's classes."""
    scorer = getattr(_torch_pruning().pruner.importance, library)()
    # Of a group whose first tensor has several channels per unit the library gives zeros beyond the units, which
    # are not to be normalised over.
    normalizer, scorer.normalizer = scorer.normalizer, None
    try:
        found = scorer(group)
    except (RuntimeError, ValueError, IndexError, AttributeError, TypeError) as error:
        return Importance(None, f"torch-pruning cannot compute it: {error}")
    if found is None:
        return Importance(None, "nothing that is coupled to its units has what it looks at")
    return checked(scorer._normalize(found[:units], normalizer), units)


def _contiguous(_: Any, inputs: Any) -> Any:
    return tuple(one.contiguous() if hasattr(one, "contiguous") else one for one in inputs)


def activations_of(model: nn.Module, samples: Batches) -> dict[str, torch.Tensor]:
    """What torch-pruning's activation importance looks at, by module: the absolute inputs of each channel, summed
    over the samples by a fully connected layer, their mean by a convolution."""
    import torch

    scorer = _torch_pruning().pruner.importance.ActivationImportance()
    for module in model.modules():
        module.register_forward_pre_hook(_contiguous)  # the library's hook takes views of them
    sums: dict[str, torch.Tensor] = {}
    seen = 0
    model.eval()
    for images, labels in samples:
        with torch.no_grad(), scorer.compute_importance(model):
            model(images)
        seen += len(labels)
        for name, module in model.named_modules():
            found = vars(module).pop("_importance", None)
            if found is not None:
                # The library's hook sums over samples of a fully connected layer, and takes the mean of a convolution.
                weighted = found.double() * (1 if _is_linear(module) else len(labels))
                sums[name] = sums[name] + weighted if name in sums else weighted
    return {n: (t if _is_linear(model.get_submodule(n)) else t / seen).cpu() for n, t in sums.items()}


# -- which units are the least important -------------------------------------------------------------


def lowest(importances: Sequence[torch.Tensor], counts: Sequence[int]) -> list[torch.Tensor]:
    """Of each layer the so many least important ones, bool [units]; among equals the lowest index goes first."""
    import torch

    found = []
    for importance, count in zip(importances, counts, strict=True):
        chosen = torch.zeros(len(importance), dtype=torch.bool)
        chosen[importance.argsort(stable=True)[:count]] = True
        found.append(chosen)
    return found


def lowest_together(importances: Sequence[torch.Tensor], count: int) -> list[torch.Tensor]:
    """The `count` least important ones of all layers together, bool [units] each; one is left in every layer.

    Among equals the first layer's go first, then the lowest index. Raises ValueError where there are not so many.
    """
    import torch

    sizes = [len(importance) for importance in importances]
    if count > sum(sizes) - len(sizes):
        raise ValueError(f"{count} of {sum(sizes)} units leave none in one of {len(sizes)} layers")
    free = torch.ones(sum(sizes), dtype=torch.bool)
    first = 0
    for importance, size in zip(importances, sizes, strict=True):
        free[first + int(importance.argsort(stable=True)[-1])] = False
        first += size
    order = torch.cat(list(importances)).argsort(stable=True)
    chosen = torch.zeros(sum(sizes), dtype=torch.bool)
    chosen[order[free[order]][:count]] = True
    return list(chosen.split(sizes))


def score(importance: torch.Tensor, units: Sequence[int]) -> float:
    """Sum of the importances of `units`."""
    return float(importance[list(units)].sum())
