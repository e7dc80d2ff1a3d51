"""Surgery: remove units from a copy of a network, with everything coupled to them.

torch-pruning's dependency graph says what is coupled: norms, the next layers' inputs, tensors of a network's own such
as position embeddings. The heads of an attention block (`module.prunable_heads`) are cut by what that says of them.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from types import ModuleType

Units = Mapping[str, Sequence[int]]
"""Layer name -> the units removed from it."""

_WIDTHS = ("hidden_dim", "embed_dim", "num_features", "dim", "normalized_shape", "num_channels", "hidden_size")
"""Attributes that say how wide a module's channels are, and that forward passes read."""


class NothingFell(Exception):
    """A pruned network has as many parameters or multiply-adds as before."""


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
    """What must lose channels when a layer loses units: a module, the direction, its indices.

    `own` are the layer's own outputs (of heads: those of queries, keys and values). With a `dim` it is no module but
    a tensor, which loses entries along that dimension.
    """

    module: str
    outputs: bool
    indices: tuple[int, ...]
    own: bool = False
    dim: int | None = None


def traced(model: nn.Module, example: Any) -> Any:
    """torch-pruning's dependency graph of a network, run on `example`: a batch, a tensor or a mapping of tensors.

    The network's modes, and which of its parameters are trained, are left as they were.
    """
    modes = {module: module.training for module in model.modules()}
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    for parameter in frozen:
        parameter.requires_grad_()
    try:
        with torch.enable_grad():  # tracing needs gradients, and leaves none behind
            return (
                _torch_pruning()
                .DependencyGraph()
                .build_dependency(model, example, forward_fn=lambda network, x: network(x), verbose=False)
            )
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for module, mode in modes.items():
            module.training = mode


def couplings(model: nn.Module, removed: Units, example: Any) -> dict[str, list[Coupling]]:
    """For each layer of `removed`, all of `model` that loses channels with its units, its own first.

    `example` is an input batch. Raises ValueError where the layer cannot lose them, with the reason.
    """
    heads = {name: found for name in removed if (found := _heads(model.get_submodule(name))) is not None}
    graph = None
    if len(heads) < len(removed):
        model = copy.deepcopy(model)  # some keep what they have computed, with its gradients
        graph = traced(model, example)
    found = {}
    for layer, units in removed.items():
        if layer in heads:
            found[layer] = _of_heads(model, layer, heads[layer], units)
        else:
            found[layer] = _of_channels(graph, model, layer, units)
    return found


def _heads(module: nn.Module) -> Any:
    return getattr(module, "prunable_heads", None)


def _of_heads(model: nn.Module, block: str, heads: Any, units: Sequence[int]) -> list[Coupling]:
    if len(units) >= heads.count:
        raise ValueError(f"{block}: removing {len(units)} of {heads.count} heads leaves none")
    rows = tuple(head * heads.width + i for head in units for i in range(heads.width))
    all_rows = heads.count * heads.width
    found = []
    for name, parts in heads.writes:
        indices = tuple(part * all_rows + row for part in range(parts) for row in rows)
        is_layer = isinstance(getattr(model.get_submodule(block), name), nn.Module)
        found.append(Coupling(f"{block}.{name}", True, indices, own=True, dim=None if is_layer else -1))
    found += [Coupling(f"{block}.{name}", True, tuple(units), own=True, dim=dim) for name, dim in heads.tables]
    weighty = [(name, isinstance(model.get_submodule(f"{block}.{name}"), nn.Linear)) for name in heads.reads]
    return found + [Coupling(f"{block}.{name}", not linear, rows) for name, linear in weighty]


def _of_channels(graph: Any, model: nn.Module, layer: str, units: Sequence[int]) -> list[Coupling]:
    root = model.get_submodule(layer)
    if root not in graph.module2node:
        raise ValueError(f"{layer}: tracing did not find it on the way from the input to the output")
    group = graph.get_pruning_group(root, graph.get_pruner_of_module(root).prune_out_channels, list(units))
    names: dict[int, str] = {id(module): name for name, module in model.named_modules()}
    names |= {id(parameter): name for name, parameter in model.named_parameters()}
    if not graph.check_pruning_group(group):
        raise ValueError(f"{layer}: removing {len(units)} units leaves a coupled layer without any")
    found: list[Coupling] = []
    of_heads = _layers_of_heads(model)
    for dependency, indices in group:
        target = dependency.target.module
        outputs = graph.is_out_channel_pruning_fn(dependency.handler)
        is_last = outputs and id(target) in names and not dependency.target.outputs
        if is_last or type(target).__name__ == "_OutputOp":
            raise ValueError(f"{layer}: its units are coupled to the network's output, which cannot lose any")
        if id(target) not in names:
            continue
        coupled = Coupling(names[id(target)], outputs, tuple(indices), own=target is root and outputs)
        if isinstance(target, nn.Parameter):
            coupled = replace(coupled, dim=dependency.target.pruning_dim)
        if outputs and coupled.module in of_heads:
            raise ValueError(f"{layer}: its units are coupled to {coupled.module}, whose units go with their heads")
        if problem := _cannot(target, coupled):
            raise ValueError(f"{layer}: {problem}")
        found.append(coupled)
    return list(dict.fromkeys(found))


def _layers_of_heads(model: nn.Module) -> set[str]:
    blocks = [(name, _heads(module)) for name, module in model.named_modules()]
    return {f"{name}.{layer}" for name, heads in blocks if heads is not None for layer, _ in heads.writes}


def _cannot(target: Any, coupled: Coupling) -> str | None:
    """Why a coupled module or tensor cannot lose these channels; None where it can."""
    name = coupled.module
    if isinstance(target, nn.Parameter):
        size = target.shape[coupled.dim] if coupled.dim is not None else 0
        return None if max(coupled.indices) < size else f"{name} {list(target.shape)} has no entry for each unit"
    groups = getattr(target, "groups", 1)
    if isinstance(groups, int) and 1 < groups != getattr(target, "out_channels", groups):
        return f"it is coupled to the grouped convolution {name}, whose channels cannot go one by one"
    if isinstance(target, nn.GroupNorm) and (target.num_channels - len(coupled.indices)) % target.num_groups:
        left = target.num_channels - len(coupled.indices)
        return f"it is coupled to {name}, a norm over {target.num_groups} groups, and {left} channels do not divide so"
    if isinstance(target, nn.MultiheadAttention | nn.LSTM | nn.GRU | nn.RNN):
        return f"it is coupled to {name}, a {type(target).__name__}, which cannot lose channels one by one"
    return None


def prune(
    dense: nn.Module,
    removed: Units,
    example: Any,
    *,
    propagation: str = "exact",
    l1_removed: Units | None = None,
) -> nn.Module:
    """A copy of `dense` without the units in `removed`. `example` is an input batch.

    With propagation `released` the pruned layer loses the candidate's units, but whatever is coupled
    to it loses those of `l1_removed`, the set the L1 criterion would remove (the behaviour of the
    published code of arXiv 2412.00143). Raises ValueError where a layer cannot lose units, with the reason, and when
    a layer's units are coupled to those of another pruned layer.
    """
    own = elsewhere = couplings(dense, removed, example)
    _refuse_shared(own)
    if propagation == "released":
        assert l1_removed is not None, "released propagation needs the L1 set"
        elsewhere = couplings(dense, l1_removed, example)
    chosen = [c for layer in removed for c in own[layer] if c.own]
    chosen += [c for layer in removed for c in elsewhere[layer] if not c.own]
    pruned = copy.deepcopy(dense)
    cut(pruned, chosen)
    for layer, units in removed.items():
        if (heads := _heads(pruned.get_submodule(layer))) is not None:
            _lose_heads(pruned.get_submodule(layer), heads, len(units))
    for module in pruned.modules():
        if callable(told := getattr(module, "after_surgery", None)):
            told()
    return pruned


def cut(model: nn.Module, chosen: Sequence[Coupling]) -> None:
    """Cut channels out of `model` itself, and say the new widths where its forward passes read them."""
    merged: dict[tuple[str, bool, int | None], set[int]] = {}
    for c in chosen:
        # Of a concatenation several layers may cut: all at once, since their indices are those from before.
        merged.setdefault((c.module, c.outputs, c.dim), set()).update(c.indices)
    pruners = _torch_pruning().DependencyGraph()
    for (name, outputs, dim), indices in merged.items():
        owner = model.get_submodule(name.rpartition(".")[0])
        if dim is not None:
            before = getattr(owner, name.rpartition(".")[2]).shape[dim]
            _cut_tensor(owner, name.rpartition(".")[2], dim, indices)
        else:
            module = model.get_submodule(name)
            pruner = pruners.get_pruner_of_module(module)
            before = (pruner.get_out_channels if outputs else pruner.get_in_channels)(module)
            (pruner.prune_out_channels if outputs else pruner.prune_in_channels)(module, sorted(indices))
        _say_width(owner, before, before - len(indices))


def _cut_tensor(owner: nn.Module, name: str, dim: int, indices: set[int]) -> None:
    tensor = getattr(owner, name)
    kept = [i for i in range(tensor.shape[dim]) if i not in indices]
    left = tensor.detach().index_select(dim, torch.tensor(kept, device=tensor.device))
    is_parameter = isinstance(tensor, nn.Parameter)
    setattr(owner, name, nn.Parameter(left, tensor.requires_grad) if is_parameter else left)


def _say_width(owner: nn.Module, before: int, now: int) -> None:
    for name in _WIDTHS:
        said = getattr(owner, name, None)
        if isinstance(said, tuple) and said == (before,):
            setattr(owner, name, (now,))
        elif isinstance(said, int) and said == before:
            setattr(owner, name, now)


def _lose_heads(block: Any, heads: Any, lost: int) -> None:
    block.prunable_heads = replace(heads, count=heads.count - lost)
    for name, per_head in heads.sizes:
        setattr(block, name, getattr(block, name) - per_head * lost)


def _refuse_shared(found: Mapping[str, list[Coupling]]) -> None:
    for layer, coupled in found.items():
        shared = [c.module for c in coupled if not c.own and c.outputs and c.module in found and c.module != layer]
        if shared:
            raise ValueError(f"the units of {layer} and {shared[0]} are the same channels: prune one of them")


def head_weights(block: nn.Module) -> torch.Tensor | None:
    """[heads, ...]: the weights that write each head's queries, keys and values; None of any other module."""
    heads = _heads(block)
    if heads is None:
        return None
    layers = [(getattr(block, name), parts) for name, parts in heads.writes]
    weights = [(layer.weight, parts) for layer, parts in layers if isinstance(layer, nn.Linear)]
    parts = [w.reshape(n, heads.count, -1).transpose(0, 1).flatten(1) for w, n in weights]
    return torch.cat(parts, 1)


def check_fell(before: tuple[int, int], after: tuple[int, int]) -> None:
    """Raise NothingFell unless (parameters, multiply-adds) are both fewer than before."""
    for what, was, now in zip(("parameters", "multiply-adds"), before, after, strict=True):
        if now >= was:
            raise NothingFell(f"the pruned network has {now:,} {what}, the network before it {was:,}")
