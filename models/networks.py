"""The networks of the registry, in torch."""

from __future__ import annotations

import itertools

import torch
from torch import nn
from torch.nn import functional as F

from models import registry


class LeNet5(nn.Module):
    """LeNet5 and its variants: input [N, 1, 32, 32] -> logits [N, classes]."""

    def __init__(self, spec: registry.LeNet5, classes: int) -> None:
        super().__init__()
        self.linear, self.pool = spec.linear, spec.pool
        kernel, stride = (5, 1) if spec.pool else (3, 2)
        channels, size, _ = spec.input
        for i, units in enumerate(spec.convs, 1):
            self.add_module(f"conv{i}", nn.Conv2d(channels, units, kernel, stride))
            channels, size = units, (size - kernel) // stride + 1
            size = size // 2 if spec.pool and i <= 2 else size
        widths = (channels * size * size, *spec.hidden, classes)
        _add_fully_connected(self, widths)
        self.n_convs, self.n_fc = len(spec.convs), len(widths) - 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i in range(1, self.n_convs + 1):
            x = self.get_submodule(f"conv{i}")(x)
            x = x if self.linear else F.relu(x)
            x = F.max_pool2d(x, 2) if self.pool and i <= 2 else x
        return _fully_connected(self, x.flatten(1), self.n_fc, self.linear)


class MLP(nn.Module):
    """Fully connected layers: input [N, C, H, W] -> logits [N, classes]."""

    def __init__(self, spec: registry.MLP, classes: int) -> None:
        super().__init__()
        channels, height, width = spec.input
        _add_fully_connected(self, (channels * height * width, *[spec.width] * (spec.depth - 1), classes))
        self.linear, self.n_fc = spec.linear, spec.depth

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _fully_connected(self, x.flatten(1), self.n_fc, self.linear)


def _add_fully_connected(model: nn.Module, widths: tuple[int, ...]) -> None:
    for i, (into, out) in enumerate(itertools.pairwise(widths), 1):
        model.add_module(f"fc{i}", nn.Linear(into, out))


def _fully_connected(model: nn.Module, x: torch.Tensor, n: int, linear: bool) -> torch.Tensor:
    for i in range(1, n):
        x = model.get_submodule(f"fc{i}")(x)
        x = x if linear else F.relu(x)
    return model.get_submodule(f"fc{n}")(x)
