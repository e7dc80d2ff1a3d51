"""Tracing: one run of a network that finds which slices of its weights can only be removed together.

The network runs once on an example. Every operation of torch that it calls is seen here, and says what becomes of the
labels of its inputs (pruners.labels): data movement moves them, element-wise operations join them, a weight layer
joins the channels that it reads with the slices of its weight and labels its outputs anew. An operation without a rule
makes the classes that reach it unremovable, and its name is the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, product
from typing import Any

import torch
from torch import nn
from pruners.dispatch import Operations, name_of
from pruners.labels import FIXED, Axis, Classes, Labelled, compressed, varies

aten: Any = torch.ops.aten

OPAQUE = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
"""Modules whose channels cannot go one by one; what they do inside is not looked at."""

FIXED_REASON = "its units are coupled to channels of fixed size, such as those of the network's input"


class Tracer(Operations):
    """Labels every tensor of a network while it runs. `nodes` are each parameter's and buffer's, by dimension."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.classes = Classes()
        self.classes.refuse([FIXED], FIXED_REASON)
        self.names: dict[int, list[str]] = {}
        self.nodes: dict[str, list[range]] = {}
        self.elements: dict[str, range] = {}
        self.reads: list[tuple[int, int]] = []
        self.splits: list[tuple[Axis, str]] = []
        self.divided: list[tuple[Axis, str]] = []
        self.groups: list[tuple[Axis, int, str]] = []
        self.unit_free_norms: list[tuple[str, int, Axis]] = []
        self.users: dict[str, set[str]] = {}
        self.order: dict[str, None] = {}
        self._labels: dict[int, Labelled] = {}
        self._alive: list[Any] = []
        self._stack: list[str] = []
        self._opaque = 0
        every = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
        for name, tensor in chain(*every):
            self._enter(name, tensor)

    def _enter(self, name: str, tensor: torch.Tensor) -> None:
        known = self.names.setdefault(id(tensor), [])
        known.append(name)
        if len(known) > 1 or not tensor.ndim:
            return
        self._alive.append(tensor)
        ranges = [self.classes.new(size) for size in tensor.shape]
        self.nodes[name] = ranges
        # A dimension of size 1 can lose nothing, so it needs no label.
        axes = (_axis(nodes, dim, tensor.ndim) for dim, nodes in enumerate(ranges) if len(nodes) > 1)
        self._labels[id(tensor)] = Labelled(tuple(axes), of_weights=True)

    def refuse_output(self, output: Any) -> None:
        """Note that nothing that labels the network's output can be removed."""
        self.refuse(output, "its units are coupled to the network's output, which cannot lose any")

    # -- what the rules use ------------------------------------------------------------------------

    def of(self, tensor: Any) -> Labelled:
        """Return what is known of a tensor; of one that no traced operation made, nothing."""
        return self._labels.get(id(tensor)) or Labelled()

    def name_of(self, tensor: Any) -> str | None:
        """Return the first name of a parameter or buffer; None for any other tensor."""
        return self.names[id(tensor)][0] if id(tensor) in self.names else None

    def place(self) -> str:
        """Return the name of the module that runs."""
        return self._stack[-1] if self._stack else ""

    def set(self, tensor: Any, axes: Iterable[Axis], **made: Any) -> None:
        """Label a tensor; `made` is what it was made of, as in Labelled."""
        self._alive.append(tensor)
        self._labels[id(tensor)] = Labelled(tuple(self._canonical(axis) for axis in axes), **made)

    def element_axis(self, tensor: torch.Tensor) -> Axis:
        """The axis of a parameter of several dimensions that activations meet element by element, as position
        embeddings: each element is a node of its own, and whole slices of them go."""
        name = self.name_of(tensor)
        assert name is not None
        if name not in self.elements:
            self.elements[name] = self.classes.new(tensor.numel())
        nodes = self.elements[name]
        return torch.arange(nodes.start, nodes.stop).reshape(tensor.shape)

    def _canonical(self, axis: Axis) -> Axis:
        """The axis in terms of the nodes that stand for their classes, compressed."""
        axis = compressed(axis)
        found, places = axis.unique(return_inverse=True)
        roots = torch.tensor([self.classes.root(node) for node in found.tolist()], dtype=torch.int64)
        return compressed(roots[places]) if not torch.equal(roots, found) else axis

    def refuse(self, tensors: Any, reason: str) -> None:
        """Note that no class that labels these tensors can be removed."""
        for tensor in _tensors(tensors):
            for axis in self.of(tensor).axes:
                self.classes.refuse(axis, reason)

    # -- the modules that run ----------------------------------------------------------------------

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Know which module runs, in which order layers do, and look at nothing inside opaque ones."""
        handles = []
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(self._entering(name, module), with_kwargs=True))
            handles.append(module.register_forward_hook(self._leaving(name, module), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _entering(self, name: str, module: nn.Module) -> Any:
        def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
            self._stack.append(name)
            self.order.setdefault(name)
            if isinstance(module, OPAQUE):
                kind = next(k.__name__ for k in type(module).__mro__ if k.__module__.startswith("torch.nn"))
                article = "an" if kind[0] in "LR" else "a"
                said = f"it is coupled to {name}, {article} {kind}, which cannot lose channels one by one"
                if not self._opaque:
                    self.refuse([args, kwargs], said)
                self._opaque += 1
            elif isinstance(getattr(module, "normalized_shape", None), tuple) and args:
                self._note_norm(name, module, args[0])

        return enter

    def _note_norm(self, name: str, module: Any, x: torch.Tensor) -> None:
        """A norm without a weight has no tensor that says its width: that attribute is cut by these labels."""
        if getattr(module, "weight", None) is None:
            for place in range(len(module.normalized_shape)):
                dim = x.ndim - len(module.normalized_shape) + place
                self.unit_free_norms += [(name, place, a) for a in self.of(x).axes if varies(a) == {dim}]

    def _leaving(self, name: str, module: nn.Module) -> Any:
        def leave(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._stack.pop()
            if isinstance(module, OPAQUE):
                self._opaque -= 1
                for tensor in _tensors(output):
                    self.set(tensor, [])

        return leave

    # -- the operations ----------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if self._opaque:
            return output
        for tensor in _tensors([args, kwargs]):
            if (name := self.name_of(tensor)) is not None:
                self.users.setdefault(name, set()).add(self.place())
        try:
            self._follow(func, args, kwargs, output)
        except _Unknown as unknown:
            self._give_up([args, kwargs], output, str(unknown))
        except Exception as error:  # of an operation that does not take labels, such as an index on no device
            said = f"its units go through {func._schema.name.removeprefix('aten::')}, which cannot be followed: {error}"
            self._give_up([args, kwargs], output, said.partition("\n")[0])
        return output

    def _follow(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        name = name_of(func)
        plain = name if name in RULES else name.removesuffix("_")
        if plain in RULES:
            RULES[plain](self, func, args, kwargs, output)
        elif _is_pointwise(func, plain):
            joined(self, func, args, kwargs, output)
        elif not list(_tensors([args, kwargs])):
            for tensor in _tensors(output):
                self.set(tensor, [], free=True)
        elif not any(self.of(tensor).axes for tensor in _tensors([args, kwargs])):
            free = all(self.of(tensor).free for tensor in _tensors([args, kwargs]))
            for tensor in _tensors(output):
                self.set(tensor, [], free=free)
        else:
            raise _Unknown(f"its units go through {plain}, which cannot be followed")
        if name.endswith("_") and not name.startswith("_") and isinstance(args[0], torch.Tensor) and args[0] is not output:
            self.set(args[0], self.of(output).axes)

    def _give_up(self, inputs: Any, output: Any, reason: str) -> None:
        """What an operation does to its inputs is not known: nothing that reaches it can be removed."""
        where = f" ({self.place()})" if self.place() else ""
        self.refuse(inputs, reason + where)
        for tensor in _tensors(output):
            self.set(tensor, [])


class _Unknown(Exception):
    """Why the labels cannot be followed through an operation."""


Rule = Callable[[Tracer, Any, Any, Any, Any], None]


def _tensors(given: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested tuples, lists and mappings."""
    if isinstance(given, torch.Tensor):
        yield given
    elif isinstance(given, Mapping):
        for one in given.values():
            yield from _tensors(one)
    elif isinstance(given, tuple | list):
        for one in given:
            yield from _tensors(one)
    elif hasattr(given, "__dataclass_fields__"):
        yield from _tensors(vars(given))


def _axis(nodes: range, dim: int, ndim: int) -> Axis:
    shape = [1] * ndim
    shape[dim] = len(nodes)
    return torch.arange(nodes.start, nodes.stop).reshape(shape)


def _is_pointwise(func: Any, name: str) -> bool:
    if torch.Tag.pointwise in func.tags:
        return True
    out_of_place = getattr(aten, name, None)
    overloads = [getattr(out_of_place, o) for o in out_of_place.overloads()] if out_of_place is not None else []
    return any(torch.Tag.pointwise in overload.tags for overload in overloads)


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


def join(tracer: Tracer, inputs: Sequence[torch.Tensor], shape: Sequence[int]) -> list[Axis]:
    """Return the axes of what an element-wise operation makes of tensors that broadcast to `shape`."""
    has_activations = any(tracer.of(tensor).axes and not tracer.of(tensor).of_weights for tensor in inputs)
    aligned = [_aligned(tracer, tensor, len(shape), has_activations) for tensor in inputs]
    axes, free, size = aligned[0]
    for other_axes, other_free, other_size in aligned[1:]:
        axes = _join_two(tracer, (axes, free, size), (other_axes, other_free, other_size))
        free = free and other_free
        size = [max(a, b) for a, b in zip(size, other_size, strict=True)]
    return axes


_Aligned = tuple[list[Axis], bool, list[int]]
"""Axes of the rank of the result, whether the tensor is free, its sizes: 1 where it is broadcast."""


def _aligned(tracer: Tracer, tensor: torch.Tensor, ndim: int, has_activations: bool) -> _Aligned:
    known = tracer.of(tensor)
    axes = list(known.axes)
    if has_activations and len(axes) > 1 and tracer.name_of(tensor) is not None:
        axes = [tracer.element_axis(tensor)]
    ahead = [1] * (ndim - tensor.ndim)
    size = [1 if dim in known.repeated else n for dim, n in enumerate(tensor.shape)]
    return [axis.reshape(ahead + list(axis.shape)) for axis in axes], known.free, ahead + size


def _join_two(tracer: Tracer, one: _Aligned, other: _Aligned) -> list[Axis]:
    a_axes, a_free, a_size = one
    b_axes, b_free, b_size = other
    made: list[Axis] = []
    matched: set[int] = set()
    for x in a_axes:
        partners = [y for y in b_axes if varies(x) & varies(y) or not (varies(x) | varies(y))]
        for y in partners:
            common = varies(x) & varies(y)
            x = tracer.classes.collapsed(x, sorted(varies(x) - common))
            tracer.classes.join_all(x, tracer.classes.collapsed(y, sorted(varies(y) - common)))
            matched.add(id(y))
        made += [x] if partners else _alone(tracer, x, bool(b_axes), b_free, b_size)
    for y in b_axes:
        if id(y) not in matched:
            made += _alone(tracer, y, bool(a_axes), a_free, a_size)
    return made


def _alone(tracer: Tracer, axis: Axis, has_others: bool, free: bool, size: Sequence[int]) -> list[Axis]:
    """An axis of which the other tensor has nothing: it is broadcast there, or of fixed size."""
    if not varies(axis):
        if not has_others:
            return [axis]
        tracer.classes.refuse(axis, "it is a map of one channel for all channels of another tensor")
        return []
    if any(size[dim] > 1 for dim in varies(axis)) and not free:
        tracer.classes.refuse(axis, FIXED_REASON)
        return []
    return [axis]


def joined(tracer: Tracer, func: Any, args: Any, kwargs: Any, output: Any) -> None:
    """Element-wise: units that meet in one element go together."""
    inputs = [tensor for tensor in _tensors([args, kwargs]) if tensor.ndim or tracer.of(tensor).axes]
    known = [tracer.of(tensor) for tensor in inputs]
    of_weights = bool(known) and all(one.of_weights for one in known)
    free = all(one.free for one in known)
    for made in _tensors(output):
        axes = join(tracer, inputs, made.shape) if inputs else []
        tracer.set(made, axes, free=free, of_weights=of_weights, computed=True, repeated=_repeated(tracer, inputs, made))


def _repeated(tracer: Tracer, inputs: Sequence[torch.Tensor], made: torch.Tensor) -> frozenset[int]:
    """The dimensions along which every input is broadcast, or holds one value."""
    sizes = [_aligned(tracer, tensor, made.ndim, False)[2] for tensor in inputs]
    return frozenset(d for d in range(made.ndim) if made.shape[d] > 1 and all(size[d] == 1 for size in sizes))


def _foreign(tracer: Tracer, func: Any, args: Any, kwargs: Any, output: Any) -> None:
    """A copy into (a part of) another tensor."""
    target, source = args[0], args[1]
    if not isinstance(source, torch.Tensor) or not (tracer.of(source).axes or tracer.of(target).axes):
        return
    if target.shape == source.shape and tracer.of(target).free and tracer.name_of(target) is None:
        tracer.set(target, tracer.of(source).axes)
        return
    raise _Unknown("its units are written into a part of another tensor in place")


# -- data movement -----------------------------------------------------------------------------------


def _moved(tracer: Tracer, func: Any, args: Any, kwargs: Any, output: Any) -> None:
    """Whatever moves elements moves their labels in the same way."""
    x = args[0]
    known, outputs = tracer.of(x), list(_tensors(output))
    found: list[list[Axis]] = [[] for _ in outputs]
    for axis in known.axes:
        moved = func(_full(axis, x.shape), *args[1:], **{k: v for k, v in kwargs.items() if k not in _NUMERIC})
        for into, part in zip(found, _tensors(moved), strict=True):
            into.append(part)
        if name_of(func) in _DIVIDING and compressed(found[0][-1]).numel() < axis.numel():
            tracer.divided.append((axis, tracer.place()))
    repeated = frozenset[int]()
    if name_of(func) in ("expand", "repeat") and len(outputs) == 1:
        ahead = outputs[0].ndim - x.ndim
        repeated = frozenset(ahead + d for d in range(x.ndim) if x.shape[d] == 1 < outputs[0].shape[ahead + d])
    for made, axes in zip(outputs, found, strict=True):
        tracer.set(
            made, axes, free=known.free, of_weights=known.of_weights, computed=known.computed, repeated=repeated
        )


_DIVIDING = ("select", "slice", "split", "split_with_sizes", "unsafe_split", "chunk", "unbind", "index", "index_select")
"""Operations that take a part of the channels, at places that a forward pass may fix."""

_NUMERIC = ("dtype", "layout", "device", "pin_memory", "memory_format", "copy", "non_blocking")


def _same(tracer: Tracer, func: Any, args: Any, kwargs: Any, output: Any) -> None:
    """The labels of the first input: casts, copies, tensors made like another."""
    for made in _tensors(output):
        if made.shape != args[0].shape:
            raise _Unknown(f"its units go through {func._schema.name.removeprefix('aten::')}, which cannot be followed")
        _take_on(tracer, made, args[0], tracer.of(args[0]).axes)


def _made_from_a_shape(tracer: Tracer, func: Any, args: Any, kwargs: Any, output: Any) -> None:
    """The first input gives only its type and device."""
    tracer.set(output, [], free=True)


def _reshaped(tracer: Tracer, func: Any, args: Any, kwargs: Any, output: Any) -> None:
    """A view: where it divides the units of one dimension into several, what is removed must leave a grid."""
    x = args[0]
    axes = []
    for axis in tracer.of(x).axes:
        made = compressed(_full(axis, x.shape).reshape(output.shape))
        if len(varies(made)) > len(varies(axis)):
            tracer.splits.append((made, tracer.place()))
            tracer.divided.append((axis, tracer.place()))
        axes.append(made)
    _take_on(tracer, output, x, axes)


def _take_on(tracer: Tracer, made: torch.Tensor, x: torch.Tensor, axes: Iterable[Axis]) -> None:
    """Label a tensor that holds the same values as `x`."""
    known = tracer.of(x)
    repeated = known.repeated if made.shape == x.shape else frozenset[int]()
    tracer.set(made, axes, free=known.free, of_weights=known.of_weights, computed=known.computed, repeated=repeated)


def _concatenated(tracer: Tracer, func: Any, args: Any, kwargs: Any, output: Any) -> None:
    """Axes of the parts that stand for the same dimensions become one; a part without labels is of fixed size."""
    parts = [part for part in args[0] if part.numel() or part.ndim == output.ndim]
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % max(1, output.ndim)
    keys = {varies(axis) | {dim} for part in parts for axis in tracer.of(part).axes}
    axes = []
    for key in sorted(keys, key=sorted):
        pieces = []
        for part in parts:
            own = [a for a in tracer.of(part).axes if varies(a) | {dim} == key]
            axis = own[0] if own else torch.full([1] * part.ndim, FIXED)
            for more in own[1:]:
                tracer.classes.join_all(axis, more)
            if not own and tracer.of(part).free and key != {dim}:
                axis = _wildcard(tracer, parts, key, dim)
            pieces.append(_full(axis, part.shape))
        axes.append(torch.cat(pieces, dim))
    tracer.set(output, axes, free=all(tracer.of(part).free for part in parts))


def _wildcard(tracer: Tracer, parts: Sequence[torch.Tensor], key: frozenset[int], dim: int) -> Axis:
    """The labels that a free part takes on: those of a neighbour."""
    every = [a for part in parts for a in tracer.of(part).axes if varies(a) | {dim} == key]
    return every[0].narrow(dim, 0, 1)


def _stacked(tracer: Tracer, func: Any, args: Any, kwargs: Any, output: Any) -> None:
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % output.ndim
    parts = []
    for part in args[0]:
        wider = part.unsqueeze(dim)
        tracer.set(wider, [a.unsqueeze(dim) for a in tracer.of(part).axes], free=tracer.of(part).free)
        parts.append(wider)
    _concatenated(tracer, func, (parts, dim), {}, output)


def _padded(tracer: Tracer, func: Any, args: Any, kwargs: Any, output: Any) -> None:
    """Padding of a dimension along which units stand adds channels that cannot be removed."""
    x, pads = args[0], list(args[1])
    axes = []
    for axis in tracer.of(x).axes:
        own = list(pads) + [0] * (2 * x.ndim - len(pads))
        for place in range(x.ndim):
            if axis.shape[x.ndim - 1 - place] == 1:
                own[2 * place : 2 * place + 2] = [0, 0]
        axes.append(torch.constant_pad_nd(axis, own, FIXED))
    tracer.set(output, axes)


def _gated(tracer: Tracer, func: Any, args: Any, kwargs: Any, output: Any) -> None:
    """glu: the first half of a dimension times the sigmoid of the second."""
    x, dim = args[0], (args[1] if len(args) > 1 else kwargs.get("dim", -1)) % args[0].ndim
    axes = []
    for axis in tracer.of(x).axes:
        if axis.shape[dim] == 1:
            axes.append(axis)
            continue
        first, second = axis.chunk(2, dim)
        tracer.classes.join_all(first, second)
        axes.append(first)
    tracer.set(output, axes)


# -- weight layers -----------------------------------------------------------------------------------


def _read(tracer: Tracer, x: Sequence[Axis], weight: Sequence[Axis], free: bool = False) -> None:
    """Sum channels `x` over with the slices `weight`, [n] each: removing one removes the other.

    Of several labels of a channel each takes the slice of the weight with it, and not each other.
    """
    if len(x) == 1 and len(weight) == 1:
        tracer.classes.join_all(x[0], weight[0])
    else:
        for channels, slices in product(x, weight):
            tracer.reads += zip(slices.tolist(), channels.tolist(), strict=True)
    if not x and not free:
        for slices in weight:
            tracer.classes.refuse(slices, FIXED_REASON)
    if not weight:
        said = f"its units are read by {tracer.place() or 'the network itself'}, whose weight is computed or parametrized"
        for channels in x:
            tracer.classes.refuse(channels, said)


def _vector(tracer: Tracer, axis: Axis, dim: int) -> Axis:
    """An axis along one dimension alone, [n]: what differs along the others goes together."""
    return tracer.classes.collapsed(axis, [d for d in varies(axis) if d != dim]).reshape(-1)


def _convolved(tracer: Tracer, func: Any, args: Any, kwargs: Any, output: Any) -> None:
    x, weight, bias, *_ = args
    transposed, groups = args[6], args[8]
    into, out = (1, 0) if not transposed else (0, 1)
    reads = _of_dim(tracer, weight, into)
    writes = _of_dim(tracer, weight, out)
    carried = []
    channels = []
    for axis in tracer.of(x).axes:
        along = varies(axis)
        if any(dim > 1 for dim in along) and 1 not in along:
            tracer.classes.refuse(axis, f"a convolution ({tracer.place()}) runs over its units as positions")
        elif 1 in along:
            channels.append(_vector(tracer, axis, 1))
        elif along == {0}:
            carried.append(axis)
        else:
            tracer.classes.refuse(axis, f"one of its units alone is read by {tracer.place()}")
    if groups == 1:
        _read(tracer, channels, [] if tracer.of(weight).computed else reads)
    elif groups == x.shape[1] and not transposed and weight.shape[1] == 1:
        each = output.shape[1] // groups
        for own in channels:
            for slices in writes:
                tracer.classes.join_all(own.repeat_interleave(each), slices)
        if not channels:
            for slices in writes:
                tracer.classes.refuse(slices, FIXED_REASON)
    else:
        name = tracer.place()
        said = f"it is coupled to the grouped convolution {name}, whose channels cannot go one by one"
        for own in [*channels, *reads, *writes]:
            tracer.classes.refuse(own, said)
    if bias is not None:
        for own in _of_dim(tracer, bias, 0):
            for slices in writes:
                tracer.classes.join_all(own, slices)
    axes = [slices.reshape([1, -1] + [1] * (output.ndim - 2)) for slices in writes if len(slices) == output.shape[1]]
    carried = [axis.reshape([-1] + [1] * (output.ndim - 1)) for axis in carried]
    tracer.set(output, axes + carried)


def _of_dim(tracer: Tracer, tensor: torch.Tensor, dim: int) -> list[Axis]:
    """The nodes of the slices of a weight along one of its dimensions, [n] each."""
    return [axis.reshape(-1) for axis in tracer.of(tensor).axes if varies(axis) == {dim}]


def _multiplied(tracer: Tracer, a: torch.Tensor, b: torch.Tensor) -> list[Axis]:
    """The axes of a matrix product [..., M, K] x [..., K, N] of tensors of one rank."""
    inner_a, carried_a = _inner(tracer, a, a.ndim - 1)
    inner_b, carried_b = _inner(tracer, b, b.ndim - 2)
    is_computed = tracer.of(b).of_weights and tracer.of(b).computed
    if inner_a or inner_b:
        _read(tracer, inner_a, [] if is_computed else inner_b, tracer.of(a).free)
    return _merged(tracer, carried_a + carried_b)


_PRODUCT = "its units are the inner dimension of a product of activations, as the heads of attention are"


def _inner(tracer: Tracer, tensor: torch.Tensor, dim: int) -> tuple[list[Axis], list[Axis]]:
    """The labels along the dimension that is summed over, [n] each; and the axes that pass on."""
    inner, carried = [], []
    for axis in tracer.of(tensor).axes:
        along = varies(axis)
        if dim not in along:
            carried.append(axis)
        elif any(d < tensor.ndim - 2 for d in along):
            tracer.classes.refuse(axis, _PRODUCT)
        else:
            inner.append(_vector(tracer, axis, dim))
    return inner, carried


def _merged(tracer: Tracer, axes: Sequence[Axis]) -> list[Axis]:
    """Axes along the same dimensions are one: both factors lose what either loses."""
    made: dict[frozenset[int], Axis] = {}
    for axis in axes:
        known = made.setdefault(varies(axis), axis)
        if known is not axis:
            tracer.classes.join_all(known, axis)
    return list(made.values())


def _mm(tracer: Tracer, func: Any, args: Any, kwargs: Any, output: Any) -> None:
    tracer.set(output, _multiplied(tracer, args[0], args[1]))


def _addmm(tracer: Tracer, func: Any, args: Any, kwargs: Any, output: Any) -> None:
    """bias + a @ b; only a bias that is a vector of the outputs occurs in networks."""
    axes = _multiplied(tracer, args[1], args[2])
    product = torch.empty(output.shape, device="meta")
    tracer.set(product, axes)
    tracer.set(output, join(tracer, [product, args[0]], output.shape))


def _mv(tracer: Tracer, func: Any, args: Any, kwargs: Any, output: Any) -> None:
    raise _Unknown("its units are multiplied with a vector")


def _attention(tracer: Tracer, func: Any, args: Any, kwargs: Any, output: Any) -> None:
    """softmax(q k^T) v: the channels of the output are those of v."""
    q, k, v = args[:3]
    tracer.refuse([q, k], _PRODUCT)
    made, *rest = list(_tensors(output))
    tracer.set(made, tracer.of(v).axes if made.shape[-1] == v.shape[-1] else [])
    for more in rest:
        tracer.set(more, [])


def _embedded(tracer: Tracer, func: Any, args: Any, kwargs: Any, output: Any) -> None:
    tracer.set(output, [slices.reshape([1] * (output.ndim - 1) + [-1]) for slices in _of_dim(tracer, args[0], 1)])


# -- norms and reductions ----------------------------------------------------------------------------


def _per_channel(tracer: Tracer, x: torch.Tensor, vectors: Sequence[Any], dim: int) -> list[Axis]:
    """The axes of `x` once vectors along one of its dimensions have met it."""
    shape = [1] * x.ndim
    shape[dim] = -1
    inputs = [x]
    for vector in vectors:
        if vector is not None:
            wider = torch.empty([n if n != -1 else vector.numel() for n in shape], device="meta")
            tracer.set(wider, [axis.reshape(shape) for axis in tracer.of(vector).axes])
            inputs.append(wider)
    return join(tracer, inputs, x.shape)


def _batch_norm(tracer: Tracer, func: Any, args: Any, kwargs: Any, output: Any) -> None:
    vectors = [a for a in args[1:5] if isinstance(a, torch.Tensor)]
    _norm_outputs(tracer, output, _per_channel(tracer, args[0], vectors, 1))


def _group_norm(tracer: Tracer, func: Any, args: Any, kwargs: Any, output: Any) -> None:
    x, weight, bias, _, _, _, groups, _ = args
    axes = _per_channel(tracer, x, [weight, bias], 1)
    if groups > 1:
        tracer.groups += [(_vector(tracer, axis, 1), groups, tracer.place()) for axis in axes if 1 in varies(axis)]
    _norm_outputs(tracer, output, axes)


def _layer_norm(tracer: Tracer, func: Any, args: Any, kwargs: Any, output: Any) -> None:
    x, _, weight, bias = args[:4]
    inputs = [x, *(one for one in (weight, bias) if one is not None)]
    _norm_outputs(tracer, output, join(tracer, inputs, x.shape))


def _norm_outputs(tracer: Tracer, output: Any, axes: Sequence[Axis]) -> None:
    made, *statistics = list(_tensors(output))
    tracer.set(made, axes)
    for one in statistics:
        tracer.set(one, [])


def _reduced(tracer: Tracer, func: Any, args: Any, kwargs: Any, output: Any) -> None:
    """A sum, mean or maximum: over all units it is a statistic of those that are left, over some it joins them."""
    x = args[0]
    names = [argument.name for argument in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    dims = _dims(given.get("dim"), x.ndim)
    keepdim = bool(given.get("keepdim", False))
    axes = []
    for axis in tracer.of(x).axes:
        along = varies(axis)
        if not along <= set(dims):
            axes.append(_without_dims(tracer.classes.collapsed(axis, dims), dims, keepdim))
        elif not along:
            axes.append(_without_dims(axis, dims, keepdim))
    for made in _tensors(output):
        tracer.set(made, [a for a in axes if a.ndim == made.ndim])


def _softmax(tracer: Tracer, func: Any, args: Any, kwargs: Any, output: Any) -> None:
    tracer.set(output, tracer.of(args[0]).axes)


def _pooled(tracer: Tracer, func: Any, args: Any, kwargs: Any, output: Any) -> None:
    """Pooling and resizing mix positions, not channels. Windows run over the last dimensions."""
    x = args[0]
    made = next(_tensors(output))
    spatial = [dim for dim in range(2, x.ndim)] if x.ndim > 2 else [x.ndim - 1]
    if x.ndim == 3 and made.ndim == 3 and made.shape[1] != x.shape[1]:
        spatial = [1, 2]
    changed = [dim for dim in range(x.ndim) if x.shape[dim] != made.shape[dim]]
    axes = []
    for axis in tracer.of(x).axes:
        along = varies(axis)
        if along & set(changed) or along & set(spatial):
            if not along - set(spatial):
                tracer.classes.refuse(axis, f"a pooling ({tracer.place()}) runs over its units as positions")
                continue
            axis = tracer.classes.collapsed(axis, spatial)
        axes.append(axis)
    for one in _tensors(output):
        tracer.set(one, axes if one.shape == made.shape else [])


_MOVES = """
    permute transpose t unsqueeze squeeze select slice split split_with_sizes unbind expand alias narrow diagonal unfold
    repeat flip roll index_select gather index rot90 channel_shuffle movedim as_strided_copy take_along_dim
    split_copy split_with_sizes_copy unsafe_split unsafe_chunk chunk
"""
_SAMES = """
    clone contiguous as_strided _to_copy detach lift_fresh lift_fresh_copy zeros_like ones_like empty_like full_like rand_like
    randn_like bernoulli to alias_copy detach_copy native_dropout
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
    reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d max_pool2d mkldnn_max_pool2d fractional_max_pool2d
"""

RULES: dict[str, Rule] = {
    **dict.fromkeys(_MOVES.split(), _moved),
    **dict.fromkeys(_SAMES.split(), _same),
    **dict.fromkeys(_MADE.split(), _made_from_a_shape),
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias", "view_copy", "flatten", "unflatten"), _reshaped),
    **dict.fromkeys(_REDUCTIONS.split(), _reduced),
    **dict.fromkeys(_POOLS.split(), _pooled),
    **dict.fromkeys(("_softmax", "_log_softmax", "softmax", "log_softmax", "_safe_softmax"), _softmax),
    **dict.fromkeys(("convolution", "_convolution", "conv2d", "convolution_overrideable"), _convolved),
    **dict.fromkeys(("mm", "bmm"), _mm),
    **dict.fromkeys(("addmm", "baddbmm"), _addmm),
    **dict.fromkeys(("mv", "dot", "vdot", "addmv", "addr"), _mv),
    **dict.fromkeys(
        ("native_batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
         "_batch_norm_with_update", "miopen_batch_norm"),
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
        ("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu",
         "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
         "_scaled_dot_product_attention_math", "_scaled_dot_product_fused_attention_overrideable"),
        _attention,
    ),
}
"""What an operation of torch, by its name, does to labels; element-wise ones are known by torch's own tag."""
