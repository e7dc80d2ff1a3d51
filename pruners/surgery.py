"""Surgery: remove units from a copy of a network, with everything coupled to them.

torch-pruning's dependency graph says what is coupled (norms, the next layers' inputs).
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from types import ModuleType

Units = Mapping[str, Sequence[int]]
"""Layer name -> the units removed from it."""


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


@dataclass(frozen=True)
class Coupling:
    """What must lose channels when a layer loses units: module name, direction, its indices."""

    module: str
    outputs: bool
    indices: tuple[int, ...]


def couplings(model: nn.Module, layer: str, units: Sequence[int], example: torch.Tensor) -> list[Coupling]:
    """All modules of `model` that lose channels with `units` of `layer`, that layer first.

    `example` is an input batch, [N, C, H, W]. Raises ValueError where torch-pruning finds no group.
    """
    tp = _torch_pruning()
    names = {module: name for name, module in model.named_modules()}
    graph = _graph(tp, model, example)
    root = model.get_submodule(layer)
    group = graph.get_pruning_group(root, graph.get_pruner_of_module(root).prune_out_channels, list(units))
    if not graph.check_pruning_group(group):
        raise ValueError(f"{layer}: removing {len(units)} units leaves a coupled layer without any")
    found = [
        Coupling(names[dep.layer], graph.is_out_channel_pruning_fn(dep.handler), tuple(indices))
        for dep, indices in group
        if dep.layer in names
    ]
    return list(dict.fromkeys(found))


def _graph(tp: ModuleType, model: nn.Module, example: torch.Tensor) -> Any:
    """The dependency graph; tracing needs gradients and leaves none behind."""
    with torch.enable_grad():
        return tp.DependencyGraph().build_dependency(model, example_inputs=example)


def prune(
    dense: nn.Module,
    removed: Units,
    example: torch.Tensor,
    *,
    propagation: str = "exact",
    l1_removed: Units | None = None,
) -> nn.Module:
    """A copy of `dense` without the units in `removed`.

    With propagation `released` the pruned layer loses the candidate's units, but whatever is coupled
    to it loses those of `l1_removed`, the set the L1 criterion would remove (the behaviour of the
    published code of arXiv 2412.00143). Raises ValueError when a layer's units are coupled to those
    of another pruned layer.
    """
    tp = _torch_pruning()
    pruned = copy.deepcopy(dense)
    modules = dict(pruned.named_modules())
    graph = _graph(tp, pruned, example)
    for layer, units in removed.items():
        own = couplings(dense, layer, units, example)
        _refuse_shared(layer, own, removed)
        elsewhere = own
        if propagation == "released":
            assert l1_removed is not None, "released propagation needs the L1 set"
            elsewhere = couplings(dense, layer, l1_removed[layer], example)
        for coupling in [own[0], *elsewhere[1:]]:
            module = modules[coupling.module]
            pruner = graph.get_pruner_of_module(module)
            cut = pruner.prune_out_channels if coupling.outputs else pruner.prune_in_channels
            cut(module, list(coupling.indices))
    return pruned


def _refuse_shared(layer: str, found: list[Coupling], removed: Units) -> None:
    shared = [c.module for c in found[1:] if c.outputs and c.module in removed and c.module != layer]
    if shared:
        raise ValueError(f"the units of {layer} and {shared[0]} are the same channels: prune one of them")
