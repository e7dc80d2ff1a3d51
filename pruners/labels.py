"""Labels: which slices of which weights each element of a tensor belongs to.

A node is one slice of a weight: index `i` of dimension `d` of a parameter or buffer. Nodes that can only be removed
together are one class of a union-find structure. An axis is an integer tensor of node numbers, broadcastable to the
shape of the tensor it describes, with size 1 in every dimension along which the labels are constant.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn

FIXED = 0
"""The node of everything that cannot be removed, such as the channels of the network's input."""

FIXED_REASON = "its units are coupled to channels of fixed size, such as those of the network's input"

Axis = torch.Tensor
"""Node numbers, int64, of the rank of the tensor described; the dimensions along which they vary are full, others 1."""


class Classes:
    """Disjoint sets of nodes, and the reasons why some of them cannot be removed."""

    def __init__(self) -> None:
        self._parents = [FIXED]
        self._reasons: list[tuple[int, str]] = []

    def __len__(self) -> int:
        return len(self._parents)

    def new(self, count: int) -> range:
        """Return `count` new nodes, each a class of its own."""
        first = len(self._parents)
        self._parents.extend(range(first, first + count))
        return range(first, first + count)

    def root(self, node: int) -> int:
        """Return the node that stands for the class of `node`."""
        parents = self._parents
        while parents[node] != node:
            parents[node] = parents[parents[node]]
            node = parents[node]
        return node

    def join(self, a: int, b: int) -> None:
        """Make one class of two."""
        low, high = sorted((self.root(a), self.root(b)))
        self._parents[high] = low

    def join_all(self, a: Axis, b: Axis) -> None:
        """Make one class of the nodes of two axes, position by position."""
        a, b = torch.broadcast_tensors(a, b)
        pairs = torch.stack([a.reshape(-1), b.reshape(-1)], 1)
        for one, other in {(x, y) for x, y in pairs.tolist() if x != y}:
            self.join(one, other)

    def refuse(self, nodes: Axis | Iterable[int], reason: str) -> None:
        """Note why these nodes cannot be removed."""
        found = nodes.unique().tolist() if isinstance(nodes, torch.Tensor) else nodes
        self._reasons += [(node, reason) for node in found]

    def reasons(self) -> dict[int, str]:
        """Return root -> the first reason why its class cannot be removed."""
        found: dict[int, str] = {}
        for node, reason in self._reasons:
            found.setdefault(self.root(node), reason)
        return found

    def collapsed(self, axis: Axis, dims: Sequence[int]) -> Axis:
        """Return `axis` constant along `dims`: what differs along them becomes one class."""
        for dim in dims:
            if axis.shape[dim] > 1:
                first = axis.narrow(dim, 0, 1)
                self.join_all(axis, first)
                axis = first
        return axis


def varies(axis: Axis) -> frozenset[int]:
    """Return the dimensions along which the labels of an axis differ."""
    return frozenset(dim for dim, size in enumerate(axis.shape) if size > 1)


def compressed(axis: Axis) -> Axis:
    """Return the same axis with size 1 in every dimension along which it is constant."""
    for dim in range(axis.ndim):
        if axis.shape[dim] > 1 and (axis.stride(dim) == 0 or bool((axis == axis.narrow(dim, 0, 1)).all())):
            axis = axis.narrow(dim, 0, 1)
    return axis


@dataclass(frozen=True)
class Labelled:
    """What is known of a tensor: its axes, and what it was made of.

    A `free` tensor was made from a shape alone (zeros, a range): it has the size that the forward pass gives it. One
    `of_weights` was made of parameters and buffers alone; it is `computed` if it is more than a view or a cast of one.
    `repeated` are the dimensions that were expanded from size 1: there it holds one value, as a broadcast one does.
    """

    axes: tuple[Axis, ...] = ()
    free: bool = False
    of_weights: bool = False
    computed: bool = False
    repeated: frozenset[int] = frozenset()


def axis_of(nodes: range, dim: int, ndim: int) -> Axis:
    """Return the axis of nodes that stand along one dimension of a tensor of `ndim` dimensions."""
    shape = [1] * ndim
    shape[dim] = len(nodes)
    return torch.arange(nodes.start, nodes.stop).reshape(shape)


def tensors_in(given: Any) -> Iterator[torch.Tensor]:
    """Return the tensors in nested tuples, lists and mappings."""
    if isinstance(given, torch.Tensor):
        yield given
    elif isinstance(given, Mapping):
        for one in given.values():
            yield from tensors_in(one)
    elif isinstance(given, tuple | list):
        for one in given:
            yield from tensors_in(one)
    elif hasattr(given, "__dataclass_fields__"):
        yield from tensors_in(vars(given))


class Labels:
    """The labels of every tensor of a run.

    `names` are those of each parameter and buffer by id, `nodes` its slices by dimension, `elements` its single
    elements where activations meet it element by element. `reads` are pairs (slice of a weight, what it reads) where
    one goes without the other. `splits` are axes that a reshape divides, `divided` those of which operations take
    parts, each with the module that runs. `groups` are the channels of norms over several groups.
    """

    def __init__(self, model: nn.Module) -> None:
        self.classes = Classes()
        self.classes.refuse([FIXED], FIXED_REASON)
        self.names: dict[int, list[str]] = {}
        self.nodes: dict[str, list[range]] = {}
        self.elements: dict[str, range] = {}
        self.reads: list[tuple[int, int]] = []
        self.splits: list[tuple[Axis, str]] = []
        self.divided: list[tuple[Axis, str]] = []
        self.groups: list[tuple[Axis, int, str]] = []
        self.running: list[str] = []
        self._labels: dict[int, Labelled] = {}
        self._alive: list[Any] = []  # an id stands for a tensor only as long as that lives
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
        axes = (axis_of(nodes, dim, tensor.ndim) for dim, nodes in enumerate(ranges) if len(nodes) > 1)
        self._labels[id(tensor)] = Labelled(tuple(axes), of_weights=True)

    def place(self) -> str:
        """Return the name of the module that runs."""
        return self.running[-1] if self.running else ""

    def of(self, tensor: Any) -> Labelled:
        """Return what is known of a tensor; of one that no traced operation made, nothing."""
        return self._labels.get(id(tensor)) or Labelled()

    def name_of(self, tensor: Any) -> str | None:
        """Return the first name of a parameter or buffer; None for any other tensor."""
        return self.names[id(tensor)][0] if id(tensor) in self.names else None

    def set(self, tensor: Any, axes: Iterable[Axis], **made: Any) -> None:
        """Label a tensor; `made` is what it was made of, as in Labelled."""
        self._alive.append(tensor)
        self._labels[id(tensor)] = Labelled(tuple(self._canonical(axis) for axis in axes), **made)

    def element_axis(self, tensor: torch.Tensor) -> Axis:
        """Return the axis of a parameter of several dimensions that activations meet element by element, as position
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
        for tensor in tensors_in(tensors):
            for axis in self.of(tensor).axes:
                self.classes.refuse(axis, reason)
