"""Seeing every operation of torch that a network calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


class Operations(TorchDispatchMode):
    """A TorchDispatchMode that does not import torch's compiler, which takes every process some seconds."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


def name_of(func: Any) -> str:
    """Return the name of an operation, such as `convolution` of aten::convolution."""
    return str(func._schema.name).removeprefix("aten::")


def is_pointwise(func: Any) -> bool:
    """Return whether an operation works element by element, by torch's own tag; of one in place, the other form's."""
    if torch.Tag.pointwise in func.tags:
        return True
    found = getattr(torch.ops.aten, name_of(func).removesuffix("_"), None)
    overloads = [getattr(found, name) for name in found.overloads()] if found is not None else []
    return any(torch.Tag.pointwise in overload.tags for overload in overloads)


def shapes_of(network: nn.Module, example: Any) -> tuple[Any, ...]:
    """Return the shapes of a network's tensors and of every activation on `example`: networks with equal shapes have
    equal numbers of parameters and multiply-adds."""
    seen = _Shapes()
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        with torch.no_grad(), seen:
            network(example)
    finally:
        for module, mode in modes.items():
            module.training = mode
    tensors = {id(t): tuple(t.shape) for t in (*network.parameters(), *network.buffers())}
    return tuple(tensors.values()), tuple(seen.shapes)


class _Shapes(Operations):
    """Notes the shape of each operation's output."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        first = output[0] if isinstance(output, tuple | list) and output else output
        if isinstance(first, torch.Tensor):
            self.shapes.append((name_of(func), tuple(first.shape)))
        return output
