"""What is measured of a network, and how sums over samples become it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from workers.datasets import Split

EVALUATION_BATCH = 256
"""Larger ones fall out of a processor's cache."""


@dataclass(frozen=True)
class Measure:
    """Mean cross-entropy in nats, its standard error, the share classified correctly, over n."""

    loss: float
    loss_se: float
    accuracy: float
    n: int


@dataclass(frozen=True)
class Epoch:
    """One epoch of training, 1 the first: mean minibatch loss, and what was measured after it."""

    number: int
    train_loss: float
    test: Measure
    validation: Measure | None


def measure_of(loss: float, square: float, correct: int, n: int) -> Measure:
    """From the sums over n samples of the losses, of their squares, of correct answers."""
    variance = max(0.0, square / n - (loss / n) ** 2) * n / max(1, n - 1)
    return Measure(loss / n, math.sqrt(variance / n), correct / n, n)


@torch.no_grad()
def measured(logits_of: Callable[[torch.Tensor], torch.Tensor], split: Split, batch: int) -> list[Measure]:
    """The measure of each of K networks: `logits_of` maps images [B, ...] to logits [K, B, classes].

    Summed in float64 over fixed batches.
    """
    sums: list[torch.Tensor] = []
    for start in range(0, len(split), batch):
        images, labels = (t[start : start + batch] for t in (split.images, split.labels))
        logits = logits_of(images)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        k = len(logits)
        losses = F.cross_entropy(logits.flatten(0, 1), labels.repeat(k), reduction="none").view(k, -1).double()
        correct = (logits.argmax(2) == labels).sum(1)
        sums.append(torch.stack([losses.sum(1), losses.square().sum(1), correct.double()]))
    loss, square, correct = torch.stack(sums).sum(0).tolist()
    return [measure_of(a, b, int(c), len(split)) for a, b, c in zip(loss, square, correct, strict=True)]
