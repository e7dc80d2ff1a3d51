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


def couplings(model: nn.Module, removed: Units, example: torch.Tensor) -> dict[str, list[Coupling]]:
    """For each layer of `removed`, all modules of `model` that lose channels with its units, itself first.

    `example` is an input batch, [N, C, H, W]. Raises ValueError where a coupled layer would lose all.
    """
    names = {module: name for name, module in model.named_modules()}
    with torch.enable_grad():  # tracing needs gradients, and leaves none behind
        graph = _torch_pruning().DependencyGraph().build_dependency(model, example_inputs=example)
    found: dict[str, list[Coupling]] = {}
    for layer, units in removed.items():
        root = model.get_submodule(layer)
        group = graph.get_pruning_group(root, graph.get_pruner_of_module(root).prune_out_channels, list(units))
        if not graph.check_pruning_group(group):
            raise ValueError(f"{layer}: removing {len(units)} units leaves a coupled layer without any")
        coupled = [
            Coupling(names[dep.layer], graph.is_out_channel_pruning_fn(dep.handler), tuple(indices))
            for dep, indices in group
            if dep.layer in names
        ]
        found[layer] = list(dict.fromkeys(coupled))
    return found


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
    own = elsewhere = couplings(dense, removed, example)
    _refuse_shared(own)
    if propagation == "released":
        assert l1_removed is not None, "released propagation needs the L1 set"
        elsewhere = couplings(dense, l1_removed, example)
    pruned = copy.deepcopy(dense)
    modules = dict(pruned.named_modules())
    pruners = _torch_pruning().DependencyGraph()
    for layer in removed:
        for coupling in [own[layer][0], *elsewhere[layer][1:]]:
            module = modules[coupling.module]
            pruner = pruners.get_pruner_of_module(module)
            cut = pruner.prune_out_channels if coupling.outputs else pruner.prune_in_channels
            cut(module, list(coupling.indices))
    return pruned


def _refuse_shared(found: Mapping[str, list[Coupling]]) -> None:
    for layer, coupled in found.items():
        shared = [c.module for c in coupled[1:] if c.outputs and c.module in found and c.module != layer]
        if shared:
            raise ValueError(f"the units of {layer} and {shared[0]} are the same channels: prune one of them")
