"""The networks for CIFAR, in torch: ResNets with option-A shortcuts and VGGs with batch norm.

Weights are drawn as in He et al. (arXiv 1502.01852): normal, variance 2 / fan-out of a convolution.
"""

from __future__ import annotations

import itertools

import torch
from torch import nn
from torch.nn import functional as F

from models import registry


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (option A of arXiv 1512.03385):
    [N, into, H, W] -> [N, out, H / stride, W / stride]; the shortcut takes every stride-th pixel, and zeros stand
    for the channels that it lacks.
    """

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(into, out, stride)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = _conv3x3(out, out)
        self.bn2 = nn.BatchNorm2d(out)
        self.stride, self.missing = stride, out - into

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.missing:
            before = self.missing // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.missing - before))
        return F.relu(y + x)


class ResNet(nn.Module):
    """A CIFAR ResNet: input [N, C, H, W] -> logits [N, classes]."""

    def __init__(self, spec: registry.ResNet, classes: int, channels: int) -> None:
        super().__init__()
        into = spec.widths[0]
        self.conv1 = _conv3x3(channels, into)
        self.bn1 = nn.BatchNorm2d(into)
        self.stages = [f"layer{i}" for i in range(1, len(spec.widths) + 1)]
        for stage, width in zip(self.stages, spec.widths, strict=True):
            strides = [1 if stage == "layer1" else 2] + [1] * (spec.blocks - 1)
            inputs = [into] + [width] * (spec.blocks - 1)
            blocks = [Block(n, width, stride) for n, stride in zip(inputs, strides, strict=True)]
            self.add_module(stage, nn.Sequential(*blocks))
            into = width
        self.fc = nn.Linear(into, classes)
        _draw(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in self.stages:
            x = self.get_submodule(stage)(x)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class VGG(nn.Module):
    """A CIFAR VGG: input [N, C, H, W], H and W at least 16 -> logits [N, classes].

    A 2x2 max-pool stands between its stages; global average pooling comes after the last.
    """

    def __init__(self, spec: registry.VGG, classes: int, channels: int) -> None:
        super().__init__()
        for i, width in enumerate(spec.layers().values(), 1):
            self.add_module(f"conv{i}", _conv3x3(channels, width))
            self.add_module(f"bn{i}", nn.BatchNorm2d(width))
            channels = width
        self.last_of_stages = list(itertools.accumulate(spec.convs))
        self.fc = nn.Linear(channels, classes)
        _draw(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        *pooled_after, last = self.last_of_stages
        for i in range(1, last + 1):
            x = F.relu(self.get_submodule(f"bn{i}")(self.get_submodule(f"conv{i}")(x)))
            x = F.max_pool2d(x, 2) if i in pooled_after else x
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def _conv3x3(into: int, out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(into, out, 3, stride, padding=1, bias=False)


def _draw(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
