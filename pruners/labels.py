"""Labels: which slices of which weights each element of a tensor belongs to.

A node is one slice of a weight: index `i` of dimension `d` of a parameter or buffer. Nodes that can only be removed
together are one class of a union-find structure. An axis is an integer tensor of node numbers, broadcastable to the
shape of the tensor it describes, with size 1 in every dimension along which the labels are constant.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

FIXED = 0
"""The node of everything that cannot be removed, such as the channels of the network's input."""

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
