"""Surgery: remove units from a copy of a network, with everything coupled to them.

The graph of a network (pruners.coupling) says what is coupled: norms, the next layers' inputs, tensors of a network's
own such as position embeddings. The heads of an attention block (`module.prunable_heads`) are cut by what that says of
them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from pruners.coupling import LAYERS, Graph, Slices, traced

Units = Mapping[str, Sequence[int]]
"""Layer name -> the output channels removed from it; of an attention block, the heads."""

_WIDTHS = ("hidden_dim", "embed_dim", "num_features", "dim", "normalized_shape", "num_channels", "hidden_size")
"""Attributes that say how wide a module's channels are, and that forward passes read."""


class NothingFell(Exception):
    """A pruned network has as many parameters or multiply-adds as before."""


class WrongCut(Exception):
    """A pruned network does not have the units that it should have."""


def prune(
    dense: nn.Module,
    removed: Units,
    example: Any,
    *,
    propagation: str = "exact",
    l1_removed: Units | None = None,
    graph: Graph | None = None,
) -> nn.Module:
    """Return a copy of `dense` without the units in `removed`. `example` is an input batch.

    With propagation `released` the pruned layer loses the candidate's units, but whatever is coupled to it loses those
    of `l1_removed`, the set the L1 criterion would remove (the behaviour of the published code of arXiv 2412.00143).
    `graph` is that of `dense`, where it is known. Raises ValueError where a layer cannot lose units, with the reason,
    and when a layer's units are coupled to those of another pruned layer; WrongCut where the copy has other sizes than
    it should have.
    """
    graph = _graph_for(dense, removed, example, graph)
    own = elsewhere = _all_slices(dense, removed, graph)
    _refuse_shared(own, graph)
    if propagation == "released":
        assert l1_removed is not None, "released propagation needs the L1 set"
        elsewhere = _all_slices(dense, l1_removed, graph)
    chosen = [c for layer in removed for c in own[layer] if c.own]
    chosen += [c for layer in removed for c in elsewhere[layer] if not c.own]
    pruned = copy.deepcopy(dense)
    cut(pruned, chosen, graph)
    for layer, units in removed.items():
        if (heads := _heads(pruned.get_submodule(layer))) is not None:
            _lose_heads(pruned.get_submodule(layer), heads, len(units))
    for module in pruned.modules():
        if callable(told := getattr(module, "after_surgery", None)):
            told()
    check_removed(dense, pruned, removed, chosen)
    return pruned


def _graph_for(dense: nn.Module, removed: Units, example: Any, graph: Graph | None) -> Graph | None:
    """The graph that the layers need: none where only heads are removed."""
    if graph is not None or all(_heads(dense.get_submodule(layer)) is not None for layer in removed):
        return graph
    return traced(dense, example)


def _all_slices(model: nn.Module, removed: Units, graph: Graph | None) -> dict[str, list[Slices]]:
    """For each layer of `removed`, all of `model` that loses channels with its units, its own first."""
    found = {}
    for layer, units in removed.items():
        if (heads := _heads(model.get_submodule(layer))) is not None:
            found[layer] = _of_heads(model, layer, heads, units)
        else:
            assert graph is not None
            found[layer] = graph.removal(layer, units)
            graph.check_groups(layer, units)
    _refuse_empty(model, found)
    return found


def _refuse_empty(model: nn.Module, found: Mapping[str, list[Slices]]) -> None:
    for layer, slices in found.items():
        for one in slices:
            if len(one.indices) >= tensor_of(model, one.tensor).shape[one.dim]:
                raise ValueError(f"{layer}: removing these units leaves {one.tensor} without any")


def _refuse_shared(found: Mapping[str, list[Slices]], graph: Graph | None) -> None:
    """Raise ValueError where two of the layers have the same channels."""
    if graph is None or len(found) < 2:
        return
    outputs = {place: layer for layer in found if layer in graph.outputs for place in graph.outputs[layer][:1]}
    for layer, slices in found.items():
        for one in slices:
            other = outputs.get((one.tensor, one.dim), layer)
            if other != layer:
                raise ValueError(f"the units of {layer} and {other} are the same channels: prune one of them")


# -- heads -------------------------------------------------------------------------------------------


def _heads(module: nn.Module) -> Any:
    return getattr(module, "prunable_heads", None)


def _of_heads(model: nn.Module, block: str, heads: Any, units: Sequence[int]) -> list[Slices]:
    if len(units) >= heads.count:
        raise ValueError(f"{block}: removing {len(units)} of {heads.count} heads leaves none")
    rows = tuple(head * heads.width + i for head in units for i in range(heads.width))
    all_rows = heads.count * heads.width
    found = []
    for name, parts in heads.writes:
        indices = tuple(part * all_rows + row for part in range(parts) for row in rows)
        found += _of_member(model, f"{block}.{name}", indices, reads=False, own=True)
    found += [Slices(f"{block}.{name}", dim, tuple(units), own=True) for name, dim in heads.tables]
    for name in heads.reads:
        found += _of_member(model, f"{block}.{name}", rows, reads=True, own=False)
    return found


def _of_member(model: nn.Module, name: str, indices: tuple[int, ...], *, reads: bool, own: bool) -> list[Slices]:
    """What a part of an attention block loses: a vector, the rows or the columns of a layer, a norm's elements."""
    owner = model.get_submodule(name.rpartition(".")[0])
    part: Any = getattr(owner, name.rpartition(".")[2])
    if isinstance(part, torch.Tensor):
        return [Slices(name, part.ndim - 1, indices, own=own)]
    if isinstance(part, nn.Linear) and reads:
        return [Slices(f"{name}.weight", 1, indices, own=own)]
    every = (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False))
    return [Slices(f"{name}.{tensor}", 0, indices, own=own) for tensor, t in every if t.ndim]


def _lose_heads(block: Any, heads: Any, lost: int) -> None:
    block.prunable_heads = replace(heads, count=heads.count - lost)
    for name, per_head in heads.sizes:
        setattr(block, name, getattr(block, name) - per_head * lost)


def head_weights(block: nn.Module) -> torch.Tensor | None:
    """[heads, ...]: the weights that write each head's queries, keys and values; None of any other module."""
    heads = _heads(block)
    if heads is None:
        return None
    layers = [(getattr(block, name), parts) for name, parts in heads.writes]
    weights = [(layer.weight, parts) for layer, parts in layers if isinstance(layer, nn.Linear)]
    parts = [w.reshape(n, heads.count, -1).transpose(0, 1).flatten(1) for w, n in weights]
    return torch.cat(parts, 1)


# -- the cut -----------------------------------------------------------------------------------------


def tensor_of(model: nn.Module, name: str) -> torch.Tensor:
    """Return the parameter or buffer of this name."""
    found = getattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2])
    assert isinstance(found, torch.Tensor)
    return found


def cut(model: nn.Module, chosen: Iterable[Slices], graph: Graph | None = None) -> None:
    """Cut slices out of the tensors of `model` itself, and say the new widths where its forward passes read them.

    A tensor with several names stays one tensor.
    """
    chosen = list(chosen)
    merged: dict[tuple[str, int], set[int]] = {}
    for one in chosen:
        merged.setdefault((one.tensor, one.dim), set()).update(one.indices)
    widths: dict[str, list[tuple[int, int]]] = {}
    for (name, dim), indices in merged.items():
        tensor = tensor_of(model, name)
        kept = [i for i in range(tensor.shape[dim]) if i not in indices]
        left = tensor.detach().index_select(dim, torch.tensor(kept, device=tensor.device))
        made = nn.Parameter(left, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else left
        for alias in _aliases(name, graph):
            owner = model.get_submodule(alias.rpartition(".")[0])
            setattr(owner, alias.rpartition(".")[2], made)
            widths.setdefault(alias.rpartition(".")[0], []).append((tensor.shape[dim], len(kept)))
    if graph is not None and graph.norms:
        gone = {graph.root_of[s.tensor, s.dim, i] for s in chosen if not s.own for i in s.indices}
        for name, place, roots in graph.norms:
            _narrow_norm(model.get_submodule(name), place, sum(root not in gone for root in roots))
    for name, changes in widths.items():
        module = model.get_submodule(name)
        _fit(module)
        parent = model.get_submodule(name.rpartition(".")[0]) if name else module
        for owner in (module, parent):
            for before, now in changes:
                _say_width(owner, before, now)


def _aliases(name: str, graph: Graph | None) -> list[str]:
    """The names of a tensor that modules hold it by."""
    if graph is None:
        return [name]
    return list(graph.aliases[graph.first_name[name]])


def _narrow_norm(module: Any, place: int, left: int) -> None:
    """A norm without weights: its width is an attribute alone."""
    shape = list(module.normalized_shape)
    shape[place] = left
    module.normalized_shape = tuple(shape)


def _fit(module: Any) -> None:
    """Let a module of torch say the sizes that its tensors have."""
    weight = getattr(module, "weight", None)
    normalized: Any = getattr(module, "normalized_shape", None)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.modules.conv._ConvNd):
        _fit_convolution(module)
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        known = [t for t in (weight, module.running_mean) if t is not None]
        module.num_features = len(known[0]) if known else module.num_features
    elif isinstance(module, nn.GroupNorm) and weight is not None:
        module.num_channels = len(weight)
    elif isinstance(normalized, tuple) and isinstance(weight, torch.Tensor):
        setattr(module, "normalized_shape", tuple(weight.shape))  # noqa: B010
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape


def _fit_convolution(module: Any) -> None:
    """Channels of a convolution; a depthwise one has as many groups as channels are left."""
    first, second = module.weight.shape[:2]
    if module.groups > 1 and module.groups == module.in_channels and not module.transposed:
        module.groups = first // (module.out_channels // module.groups)
    wide = second * module.groups
    module.out_channels, module.in_channels = (wide, first) if module.transposed else (first, wide)


def _say_width(owner: Any, before: int, now: int) -> None:
    for name in _WIDTHS:
        said = getattr(owner, name, None)
        if isinstance(said, tuple) and said == (before,):
            setattr(owner, name, (now,))
        elif isinstance(said, int) and not isinstance(said, bool) and said == before:
            setattr(owner, name, now)


# -- checks ------------------------------------------------------------------------------------------


def units_of(module: Any) -> int:
    """Return how many units a layer has: heads, or output channels."""
    heads = _heads(module)
    return heads.count if heads is not None else module.weight.shape[1 if getattr(module, "transposed", False) else 0]


def check_removed(dense: nn.Module, pruned: nn.Module, removed: Units, chosen: Iterable[Slices] = ()) -> None:
    """Raise WrongCut unless each layer of `removed` has lost exactly the units named there, and every other layer
    those of the `chosen` slices.

    Where the inputs of a pruned layer are whole, the weights of the units that are left must be the dense ones.
    """
    coupled: dict[int, set[int]] = {}
    for one in chosen:
        if one.dim == 0:
            coupled.setdefault(id(tensor_of(dense, one.tensor)), set()).update(one.indices)
    for name, before in dense.named_modules():
        if not isinstance(before, LAYERS) and _heads(before) is None:
            continue
        after = pruned.get_submodule(name)
        lost = len(set(removed[name]) if name in removed else coupled.get(id(getattr(before, "weight", None)), ()))
        is_known = name in removed or isinstance(before, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
        if is_known and units_of(after) != units_of(before) - lost:
            said = f"{units_of(before) - lost} of {units_of(before)} units were to be left"
            raise WrongCut(f"{name} has {units_of(after)} units after pruning, {said}")
        if name in removed and isinstance(before, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            _check_rows(name, before, after, set(removed[name]))


def _check_rows(name: str, before: Any, after: Any, lost: set[int]) -> None:
    kept = [i for i in range(len(before.weight)) if i not in lost]
    if after.weight.shape[1:] == before.weight.shape[1:] and not after.weight.equal(before.weight[kept]):
        raise WrongCut(f"{name} has lost other units than {sorted(lost)}")


def check_fell(before: tuple[int, int], after: tuple[int, int]) -> None:
    """Raise NothingFell unless (parameters, multiply-adds) are both fewer than before."""
    for what, was, now in zip(("parameters", "multiply-adds"), before, after, strict=True):
        if now >= was:
            raise NothingFell(f"the pruned network has {now:,} {what}, the network before it {was:,}")
