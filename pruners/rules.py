"""Rules: what each operation of torch does to the labels of its inputs.

Data movement moves them. Element-wise operations join the classes that meet in one element. A weight layer joins the
channels that it reads with the slices of its weight, and labels its outputs anew. A statistic over all channels drops
their labels; one over some channels joins these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from pruners.dispatch import is_pointwise, name_of
from pruners.labels import FIXED, FIXED_REASON, Axis, Labels, compressed, tensors_in, varies


class CannotFollow(Exception):
    """Why the labels cannot be followed through an operation."""


@dataclass(frozen=True)
class Call:
    """One call of an operation: what it was given, and what it returned."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    @property
    def name(self) -> str:
        """The operation's name, such as `convolution`."""
        return name_of(self.func)

    def argument(self, at: int, name: str, default: Any) -> Any:
        """Return an argument that may be given by place or by name."""
        return dict(enumerate(self.args)).get(at, self.kwargs.get(name, default))

    @property
    def inputs(self) -> list[torch.Tensor]:
        """The tensors that it was given."""
        return list(tensors_in([self.args, self.kwargs]))


Rule = Callable[[Labels, Call], None]


def follow(labels: Labels, call: Call) -> None:
    """Label the outputs of a call. Raises CannotFollow for an operation without a rule that labels reach."""
    name = call.name if call.name in RULES else call.name.removesuffix("_")
    if name in RULES:
        RULES[name](labels, call)
    elif is_pointwise(call.func):
        joined(labels, call)
    elif any(labels.of(tensor).axes for tensor in call.inputs):
        raise CannotFollow(f"its units go through {name}, which cannot be followed")
    else:
        free = all(labels.of(tensor).free for tensor in call.inputs)
        for tensor in tensors_in(call.output):
            labels.set(tensor, [], free=free)
    is_in_place = call.name.endswith("_") and not call.name.startswith("_")
    if is_in_place and isinstance(call.args[0], torch.Tensor) and call.args[0] is not call.output:
        labels.set(call.args[0], labels.of(call.output).axes)


def _full(axis: Axis, shape: Sequence[int]) -> Axis:
    """The axis in the shape of its tensor, without memory of its own."""
    return axis.expand(tuple(shape))


def _without_dims(axis: Axis, dims: Iterable[int], keepdim: bool) -> Axis:
    """An axis that is constant along `dims`, after these are reduced."""
    if keepdim:
        return axis
    for dim in sorted(dims, reverse=True):
        axis = axis.squeeze(dim)
    return axis


def _dims(given: Any, ndim: int) -> list[int]:
    """Dimensions as the operations take them, as numbers from 0; None and an empty list are all."""
    if given is None or (isinstance(given, tuple | list) and not given):
        return list(range(ndim))
    return [dim % max(1, ndim) for dim in (given if isinstance(given, tuple | list) else [given])]


# -- element-wise ------------------------------------------------------------------------------------


def join(labels: Labels, inputs: Sequence[torch.Tensor], shape: Sequence[int]) -> list[Axis]:
    """Return the axes of what an element-wise operation makes of tensors that broadcast to `shape`."""
    has_activations = any(labels.of(tensor).axes and not labels.of(tensor).of_weights for tensor in inputs)
    aligned = [_aligned(labels, tensor, len(shape), has_activations) for tensor in inputs]
    axes, free, size = aligned[0]
    for other_axes, other_free, other_size in aligned[1:]:
        axes = _join_two(labels, (axes, free, size), (other_axes, other_free, other_size))
        free = free and other_free
        size = [max(a, b) for a, b in zip(size, other_size, strict=True)]
    return axes


_Aligned = tuple[list[Axis], bool, list[int]]
"""Axes of the rank of the result, whether the tensor is free, its sizes: 1 where it is broadcast."""


def _aligned(labels: Labels, tensor: torch.Tensor, ndim: int, has_activations: bool) -> _Aligned:
    known = labels.of(tensor)
    axes = list(known.axes)
    if has_activations and len(axes) > 1 and labels.name_of(tensor) is not None:
        axes = [labels.element_axis(tensor)]
    ahead = [1] * (ndim - tensor.ndim)
    size = [1 if dim in known.repeated else n for dim, n in enumerate(tensor.shape)]
    return [axis.reshape(ahead + list(axis.shape)) for axis in axes], known.free, ahead + size


def _join_two(labels: Labels, one: _Aligned, other: _Aligned) -> list[Axis]:
    a_axes, a_free, a_size = one
    b_axes, b_free, b_size = other
    made: list[Axis] = []
    matched: set[int] = set()
    for x in a_axes:
        partners = [y for y in b_axes if varies(x) & varies(y) or not (varies(x) | varies(y))]
        for y in partners:
            common = varies(x) & varies(y)
            x = labels.classes.collapsed(x, sorted(varies(x) - common))
            labels.classes.join_all(x, labels.classes.collapsed(y, sorted(varies(y) - common)))
            matched.add(id(y))
        made += [x] if partners else _alone(labels, x, bool(b_axes), b_free, b_size)
    for y in b_axes:
        if id(y) not in matched:
            made += _alone(labels, y, bool(a_axes), a_free, a_size)
    return made


def _alone(labels: Labels, axis: Axis, has_others: bool, free: bool, size: Sequence[int]) -> list[Axis]:
    """An axis of which the other tensor has nothing: it is broadcast there, or of fixed size."""
    if not varies(axis):
        if not has_others:
            return [axis]
        labels.classes.refuse(axis, "it is a map of one channel for all channels of another tensor")
        return []
    if any(size[dim] > 1 for dim in varies(axis)) and not free:
        labels.classes.refuse(axis, FIXED_REASON)
        return []
    return [axis]


def joined(labels: Labels, call: Call) -> None:
    """Element-wise: units that meet in one element go together."""
    inputs = [tensor for tensor in call.inputs if tensor.ndim or labels.of(tensor).axes]
    known = [labels.of(tensor) for tensor in inputs]
    of_weights = bool(known) and all(one.of_weights for one in known)
    free = all(one.free for one in known)
    for made in tensors_in(call.output):
        axes = join(labels, inputs, made.shape) if inputs else []
        labels.set(
            made, axes, free=free, of_weights=of_weights, computed=True, repeated=_repeated(labels, inputs, made)
        )


def _repeated(labels: Labels, inputs: Sequence[torch.Tensor], made: torch.Tensor) -> frozenset[int]:
    """The dimensions along which every input is broadcast, or holds one value."""
    sizes = [_aligned(labels, tensor, made.ndim, False)[2] for tensor in inputs]
    return frozenset(d for d in range(made.ndim) if made.shape[d] > 1 and all(size[d] == 1 for size in sizes))


def _foreign(labels: Labels, call: Call) -> None:
    """A copy into (a part of) another tensor."""
    target, source = call.args[0], call.args[1]
    if not isinstance(source, torch.Tensor) or not (labels.of(source).axes or labels.of(target).axes):
        return
    is_whole = target.untyped_storage().nbytes() == target.numel() * target.element_size()
    if is_whole and target.shape == source.shape and labels.of(target).free and labels.name_of(target) is None:
        labels.set(target, labels.of(source).axes)
        return
    raise CannotFollow("its units are written into a part of another tensor in place")


# -- data movement -----------------------------------------------------------------------------------


def _moved(labels: Labels, call: Call) -> None:
    """Whatever moves elements moves their labels in the same way."""
    x = call.args[0]
    known, outputs = labels.of(x), list(tensors_in(call.output))
    found: list[list[Axis]] = [[] for _ in outputs]
    for axis in known.axes:
        moved = call.func(
            _full(axis, x.shape), *call.args[1:], **{k: v for k, v in call.kwargs.items() if k not in _NUMERIC}
        )
        for into, part in zip(found, tensors_in(moved), strict=True):
            into.append(part)
        if call.name in _DIVIDING and compressed(found[0][-1]).numel() < axis.numel():
            labels.divided.append((axis, labels.place()))
    repeated = frozenset[int]()
    if call.name in ("expand", "repeat") and len(outputs) == 1:
        ahead = outputs[0].ndim - x.ndim
        repeated = frozenset(ahead + d for d in range(x.ndim) if x.shape[d] == 1 < outputs[0].shape[ahead + d])
    for made, axes in zip(outputs, found, strict=True):
        labels.set(made, axes, free=known.free, of_weights=known.of_weights, computed=known.computed, repeated=repeated)


_DIVIDING = ("select", "slice", "split", "split_with_sizes", "unsafe_split", "chunk", "unbind", "index", "index_select")
"""Operations that take a part of the channels, at places that a forward pass may fix."""

_NUMERIC = ("dtype", "layout", "device", "pin_memory", "memory_format", "copy", "non_blocking")


def _same(labels: Labels, call: Call) -> None:
    """The labels of the first input: casts, copies, tensors made like another."""
    for made in tensors_in(call.output):
        if made.shape != call.args[0].shape:
            raise CannotFollow(f"its units go through {call.name}, which cannot be followed")
        _take_on(labels, made, call.args[0], labels.of(call.args[0]).axes)


def _made_from_a_shape(labels: Labels, call: Call) -> None:
    """The first input gives only its type and device."""
    labels.set(call.output, [], free=True)


def _reshaped(labels: Labels, call: Call) -> None:
    """A view: where it divides the units of one dimension into several, what is removed must leave a grid."""
    x = call.args[0]
    axes = []
    for axis in labels.of(x).axes:
        made = compressed(_full(axis, x.shape).reshape(call.output.shape))
        if len(varies(made)) > len(varies(axis)):
            labels.splits.append((made, labels.place()))
            labels.divided.append((axis, labels.place()))
        axes.append(made)
    _take_on(labels, call.output, x, axes)


def _take_on(labels: Labels, made: torch.Tensor, x: torch.Tensor, axes: Iterable[Axis]) -> None:
    """Label a tensor that holds the same values as `x`."""
    known = labels.of(x)
    repeated = known.repeated if made.shape == x.shape else frozenset[int]()
    labels.set(made, axes, free=known.free, of_weights=known.of_weights, computed=known.computed, repeated=repeated)


def _concatenated(labels: Labels, call: Call) -> None:
    """Axes of the parts that stand for the same dimensions become one; a part without labels is of fixed size."""
    parts = [part for part in call.args[0] if part.numel() or part.ndim == call.output.ndim]
    dim = call.argument(1, "dim", 0) % max(1, call.output.ndim)
    keys = {varies(axis) | {dim} for part in parts for axis in labels.of(part).axes}
    axes = []
    for key in sorted(keys, key=sorted):
        pieces, aligned = [], []
        for part in parts:
            own = [a for a in labels.of(part).axes if varies(a) | {dim} == key]
            axis = own[0] if own else torch.full([1] * part.ndim, FIXED)
            for more in own[1:]:
                labels.classes.join_all(axis, more)
            if not own and labels.of(part).free and key != {dim}:
                axis = _wildcard(labels, parts, key, dim)
            pieces.append(_full(axis, part.shape))
            aligned.append(axis)
        if any(dim in varies(axis) for axis in aligned) or key == {dim}:
            axes.append(torch.cat(pieces, dim))
        else:
            axes.append(_beside(labels, aligned))
    labels.set(call.output, axes, free=all(labels.of(part).free for part in parts))


def _beside(labels: Labels, aligned: Sequence[Axis]) -> Axis:
    """The labels of parts that stand one after the other in the same channels: these go together."""
    widest = max(aligned, key=torch.Tensor.numel)
    for axis in aligned:
        labels.classes.join_all(widest, axis)
    return widest


def _wildcard(labels: Labels, parts: Sequence[torch.Tensor], key: frozenset[int], dim: int) -> Axis:
    """The labels that a free part takes on: those of a neighbour."""
    every = [a for part in parts for a in labels.of(part).axes if varies(a) | {dim} == key]
    return every[0].narrow(dim, 0, 1)


def _stacked(labels: Labels, call: Call) -> None:
    dim = call.argument(1, "dim", 0) % call.output.ndim
    parts = []
    for part in call.args[0]:
        wider = part.unsqueeze(dim)
        labels.set(wider, [a.unsqueeze(dim) for a in labels.of(part).axes], free=labels.of(part).free)
        parts.append(wider)
    _concatenated(labels, Call(call.func, (parts, dim), {}, call.output))


def _padded(labels: Labels, call: Call) -> None:
    """Padding of a dimension along which units stand adds channels that cannot be removed."""
    x, pads = call.args[0], list(call.args[1])
    axes = []
    for axis in labels.of(x).axes:
        own = list(pads) + [0] * (2 * x.ndim - len(pads))
        for place in range(x.ndim):
            if axis.shape[x.ndim - 1 - place] == 1:
                own[2 * place : 2 * place + 2] = [0, 0]
        axes.append(torch.constant_pad_nd(axis, own, FIXED))
    labels.set(call.output, axes)


def _shuffled(labels: Labels, call: Call) -> None:
    """A shuffle numbers channels as a grid of groups: what is removed must leave one."""
    for axis in labels.of(call.args[0]).axes:
        if axis.shape[1] > 1:
            labels.splits.append((axis.unflatten(1, (call.args[1], -1)), labels.place()))
            labels.divided.append((axis, labels.place()))
    _moved(labels, call)


def _gated(labels: Labels, call: Call) -> None:
    """glu: the first half of a dimension times the sigmoid of the second."""
    x = call.args[0]
    dim = call.argument(1, "dim", -1) % x.ndim
    axes = []
    for axis in labels.of(x).axes:
        if axis.shape[dim] == 1:
            axes.append(axis)
            continue
        first, second = axis.chunk(2, dim)
        labels.classes.join_all(first, second)
        axes.append(first)
    labels.set(call.output, axes)


# -- weight layers -----------------------------------------------------------------------------------


def _read(labels: Labels, x: Sequence[Axis], weight: Sequence[Axis], free: bool = False) -> None:
    """Sum channels `x` over with the slices `weight`, [n] each: removing one removes the other.

    Of several labels of a channel each takes the slice of the weight with it, and not each other.
    """
    if len(x) == 1 and len(weight) == 1:
        labels.classes.join_all(x[0], weight[0])
    else:
        for channels, slices in product(x, weight):
            labels.reads += zip(slices.tolist(), channels.tolist(), strict=True)
    if not x and not free:
        for slices in weight:
            labels.classes.refuse(slices, FIXED_REASON)
    if not weight:
        said = (
            f"its units are read by {labels.place() or 'the network itself'}, whose weight is computed or parametrized"
        )
        for channels in x:
            labels.classes.refuse(channels, said)


def _vector(labels: Labels, axis: Axis, dim: int) -> Axis:
    """An axis along one dimension alone, [n]: what differs along the others goes together."""
    return labels.classes.collapsed(axis, [d for d in varies(axis) if d != dim]).reshape(-1)


def _convolved(labels: Labels, call: Call) -> None:
    x, weight, bias, *_ = call.args
    transposed, groups = call.args[6], call.args[8]
    into, out = (1, 0) if not transposed else (0, 1)
    reads = _of_dim(labels, weight, into)
    writes = _of_dim(labels, weight, out)
    carried = []
    channels = []
    for axis in labels.of(x).axes:
        along = varies(axis)
        if any(dim > 1 for dim in along) and 1 not in along:
            labels.classes.refuse(axis, f"a convolution ({labels.place()}) runs over its units as positions")
        elif 1 in along:
            channels.append(_vector(labels, axis, 1))
        elif along == {0}:
            carried.append(axis)
        else:
            labels.classes.refuse(axis, f"one of its units alone is read by {labels.place()}")
    if groups == 1:
        _read(labels, channels, [] if labels.of(weight).computed else reads)
    elif groups == x.shape[1] and not transposed and weight.shape[1] == 1:
        each = call.output.shape[1] // groups
        for own in channels:
            for slices in writes:
                labels.classes.join_all(own.repeat_interleave(each), slices)
        if not channels:
            for slices in writes:
                labels.classes.refuse(slices, FIXED_REASON)
    else:
        name = labels.place()
        said = f"it is coupled to the grouped convolution {name}, whose channels cannot go one by one"
        for own in [*channels, *reads, *writes]:
            labels.classes.refuse(own, said)
    if bias is not None:
        for own in _of_dim(labels, bias, 0):
            for slices in writes:
                labels.classes.join_all(own, slices)
    axes = [
        slices.reshape([1, -1] + [1] * (call.output.ndim - 2))
        for slices in writes
        if len(slices) == call.output.shape[1]
    ]
    carried = [axis.reshape([-1] + [1] * (call.output.ndim - 1)) for axis in carried]
    labels.set(call.output, axes + carried)


def _of_dim(labels: Labels, tensor: torch.Tensor, dim: int) -> list[Axis]:
    """The nodes of the slices of a weight along one of its dimensions, [n] each."""
    return [axis.reshape(-1) for axis in labels.of(tensor).axes if varies(axis) == {dim}]


def _multiplied(labels: Labels, a: torch.Tensor, b: torch.Tensor) -> list[Axis]:
    """The axes of a matrix product [..., M, K] x [..., K, N] of tensors of one rank."""
    inner_a, carried_a = _inner(labels, a, a.ndim - 1)
    inner_b, carried_b = _inner(labels, b, b.ndim - 2)
    is_computed = labels.of(b).of_weights and labels.of(b).computed
    if inner_a or inner_b:
        _read(labels, inner_a, [] if is_computed else inner_b, labels.of(a).free)
    return _merged(labels, carried_a + carried_b)


_PRODUCT = "its units are the inner dimension of a product of activations, as the heads of attention are"


def _inner(labels: Labels, tensor: torch.Tensor, dim: int) -> tuple[list[Axis], list[Axis]]:
    """The labels along the dimension that is summed over, [n] each; and the axes that pass on."""
    inner, carried = [], []
    for axis in labels.of(tensor).axes:
        along = varies(axis)
        if dim not in along:
            carried.append(axis)
        elif any(d < tensor.ndim - 2 for d in along):
            labels.classes.refuse(axis, _PRODUCT)
        else:
            inner.append(_vector(labels, axis, dim))
    return inner, carried


def _merged(labels: Labels, axes: Sequence[Axis]) -> list[Axis]:
    """Axes along the same dimensions are one: both factors lose what either loses."""
    made: dict[frozenset[int], Axis] = {}
    for axis in axes:
        known = made.setdefault(varies(axis), axis)
        if known is not axis:
            labels.classes.join_all(known, axis)
    return list(made.values())


def _mm(labels: Labels, call: Call) -> None:
    labels.set(call.output, _multiplied(labels, call.args[0], call.args[1]))


def _addmm(labels: Labels, call: Call) -> None:
    """bias + a @ b; only a bias that is a vector of the outputs occurs in networks."""
    axes = _multiplied(labels, call.args[1], call.args[2])
    product = torch.empty(call.output.shape, device="meta")
    labels.set(product, axes)
    labels.set(call.output, join(labels, [product, call.args[0]], call.output.shape))


def _attention(labels: Labels, call: Call) -> None:
    """softmax(q k^T) v: the channels of the call.output are those of v."""
    q, k, v = call.args[:3]
    labels.refuse([q, k], _PRODUCT)
    made, *rest = list(tensors_in(call.output))
    labels.set(made, labels.of(v).axes if made.shape[-1] == v.shape[-1] else [])
    for more in rest:
        labels.set(more, [])


def _embedded(labels: Labels, call: Call) -> None:
    labels.set(
        call.output,
        [slices.reshape([1] * (call.output.ndim - 1) + [-1]) for slices in _of_dim(labels, call.args[0], 1)],
    )


# -- norms and reductions ----------------------------------------------------------------------------


def _per_channel(labels: Labels, x: torch.Tensor, vectors: Sequence[Any], dim: int) -> list[Axis]:
    """The axes of `x` once vectors along one of its dimensions have met it."""
    shape = [1] * x.ndim
    shape[dim] = -1
    inputs = [x]
    for vector in vectors:
        if vector is not None:
            wider = torch.empty([n if n != -1 else vector.numel() for n in shape], device="meta")
            labels.set(wider, [axis.reshape(shape) for axis in labels.of(vector).axes])
            inputs.append(wider)
    return join(labels, inputs, x.shape)


def _batch_norm(labels: Labels, call: Call) -> None:
    vectors = [a for a in call.args[1:5] if isinstance(a, torch.Tensor)]
    _norm_outputs(labels, call.output, _per_channel(labels, call.args[0], vectors, 1))


def _group_norm(labels: Labels, call: Call) -> None:
    x, weight, bias, _, _, _, groups, _ = call.args
    axes = _per_channel(labels, x, [weight, bias], 1)
    if groups > 1:
        labels.groups += [(_vector(labels, axis, 1), groups, labels.place()) for axis in axes if 1 in varies(axis)]
    _norm_outputs(labels, call.output, axes)


def _layer_norm(labels: Labels, call: Call) -> None:
    x, _, weight, bias = call.args[:4]
    inputs = [x, *(one for one in (weight, bias) if one is not None)]
    _norm_outputs(labels, call.output, join(labels, inputs, x.shape))


def _norm_outputs(labels: Labels, output: Any, axes: Sequence[Axis]) -> None:
    made, *statistics = list(tensors_in(output))
    labels.set(made, axes)
    for one in statistics:
        labels.set(one, [])


def _reduced(labels: Labels, call: Call) -> None:
    """A sum, mean or maximum: over all units it is a statistic of those that are left, over some it joins them."""
    x = call.args[0]
    names = [argument.name for argument in call.func._schema.arguments]
    given = dict(zip(names, call.args, strict=False)) | call.kwargs
    dims = _dims(given.get("dim"), x.ndim)
    keepdim = bool(given.get("keepdim", False))
    axes = []
    for axis in labels.of(x).axes:
        along = varies(axis)
        if not along <= set(dims):
            axes.append(_without_dims(labels.classes.collapsed(axis, dims), dims, keepdim))
        elif not along:
            axes.append(_without_dims(axis, dims, keepdim))
    for made in tensors_in(call.output):
        labels.set(made, [a for a in axes if a.ndim == made.ndim])


def _first_as_input(labels: Labels, call: Call) -> None:
    """The labels of the input, for the first output; others, such as buffers of a gradient, have none."""
    made, *rest = list(tensors_in(call.output))
    labels.set(made, labels.of(call.args[0]).axes)
    for more in rest:
        labels.set(more, [])


def _pooled(labels: Labels, call: Call) -> None:
    """Pooling and resizing mix positions, not channels. Windows run over the last dimensions."""
    x = call.args[0]
    made = next(tensors_in(call.output))
    spatial = list(range(2, x.ndim)) if x.ndim > 2 else [x.ndim - 1]
    if x.ndim == 3 and made.ndim == 3 and made.shape[1] != x.shape[1]:
        spatial = [1, 2]
    changed = [dim for dim in range(x.ndim) if x.shape[dim] != made.shape[dim]]
    axes = []
    for axis in labels.of(x).axes:
        along = varies(axis)
        if along & set(changed) or along & set(spatial):
            if not along - set(spatial):
                labels.classes.refuse(axis, f"a pooling ({labels.place()}) runs over its units as positions")
                continue
            axis = labels.classes.collapsed(axis, spatial)
        axes.append(axis)
    for one in tensors_in(call.output):
        labels.set(one, axes if one.shape == made.shape else [])


_MOVES = """
    permute transpose t unsqueeze squeeze select slice split split_with_sizes unbind expand alias narrow diagonal unfold
    repeat flip roll index_select gather index rot90 movedim as_strided_copy take_along_dim
    split_copy split_with_sizes_copy unsafe_split unsafe_chunk chunk
"""
_SAMES = """
    clone contiguous as_strided _to_copy detach lift_fresh lift_fresh_copy zeros_like ones_like empty_like full_like
    rand_like randn_like bernoulli to alias_copy detach_copy native_dropout
"""
_MADE = "new_zeros new_ones new_full new_empty new_empty_strided"
_REDUCTIONS = """
    sum mean amax amin max min prod var std norm linalg_vector_norm logsumexp any all var_mean std_mean nansum
"""
_POOLS = """
    max_pool2d_with_indices avg_pool2d _adaptive_avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d avg_pool3d
    max_pool3d_with_indices _adaptive_avg_pool3d adaptive_max_pool3d adaptive_avg_pool1d max_pool1d avg_pool1d
    upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact2d upsample_bilinear2d
    _upsample_bilinear2d_aa upsample_bicubic2d _upsample_bicubic2d_aa upsample_linear1d upsample_trilinear3d
    reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d max_pool2d mkldnn_max_pool2d
"""

RULES: dict[str, Rule] = {
    **dict.fromkeys(_MOVES.split(), _moved),
    **dict.fromkeys(_SAMES.split(), _same),
    **dict.fromkeys(_MADE.split(), _made_from_a_shape),
    **dict.fromkeys(
        ("view", "_unsafe_view", "reshape", "_reshape_alias", "view_copy", "flatten", "unflatten"), _reshaped
    ),
    **dict.fromkeys(_REDUCTIONS.split(), _reduced),
    **dict.fromkeys(_POOLS.split(), _pooled),
    **dict.fromkeys(("_softmax", "_log_softmax", "softmax", "log_softmax", "_safe_softmax"), _first_as_input),
    **dict.fromkeys(("hardswish", "log_sigmoid_forward"), _first_as_input),  # element-wise, but without torch's tag
    **dict.fromkeys(("channel_shuffle", "native_channel_shuffle"), _shuffled),
    **dict.fromkeys(("convolution", "_convolution", "conv2d", "convolution_overrideable"), _convolved),
    **dict.fromkeys(("mm", "bmm"), _mm),
    **dict.fromkeys(("addmm", "baddbmm"), _addmm),
    **dict.fromkeys(
        (
            "native_batch_norm",
            "cudnn_batch_norm",
            "_native_batch_norm_legit",
            "_native_batch_norm_legit_no_training",
            "_batch_norm_with_update",
            "miopen_batch_norm",
        ),
        _batch_norm,
    ),
    "native_layer_norm": _layer_norm,
    "native_group_norm": _group_norm,
    "cat": _concatenated,
    "stack": _stacked,
    "constant_pad_nd": _padded,
    "glu": _gated,
    "embedding": _embedded,
    "_prelu_kernel": joined,
    "copy": _foreign,
    **dict.fromkeys(
        (
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_cudnn_attention",
            "_scaled_dot_product_attention_math",
            "_scaled_dot_product_fused_attention_overrideable",
        ),
        _attention,
    ),
}
"""What an operation of torch, by its name, does to labels; element-wise ones are known by torch's own tag."""
