"""What is measured of a network, and how sums over samples become it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from workers.datasets import Samples

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
def measured(logits_of: Callable[[Any], torch.Tensor], split: Samples, batch: int) -> list[Measure]:
    """The measure of each of K networks: `logits_of` maps images [B, ...] to logits [K, B, classes], or for text
    [K, B, classes, T].

    Summed in float64 over fixed batches.
    """
    sums: list[torch.Tensor] = []
    for piece in split.in_order(batch):
        logits = logits_of(piece.images)
        losses, correct = _of_samples(logits if logits.dtype == torch.float64 else logits.float(), piece.labels)
        sums.append(torch.stack([losses.sum(1), losses.square().sum(1), correct.sum(1).double()]))
    loss, square, correct = torch.stack(sums).sum(0).tolist()
    return [measure_of(a, b, int(c), len(split)) for a, b, c in zip(loss, square, correct, strict=True)]


def _of_samples(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each sample's loss, float64, and whether it is classified correctly: both [K, B].

    Of text, labels [B, T], that is the mean loss over the tokens that have a label (none is -100), and whether all
    of them are predicted.
    """
    k, repeats = len(logits), (1,) * (labels.dim() - 1)
    each = F.cross_entropy(logits.flatten(0, 1), labels.repeat(k, *repeats), reduction="none")
    losses, right = each.view(k, *labels.shape).double(), logits.argmax(2) == labels
    if labels.dim() == 1:
        return losses, right
    labelled = labels != -100
    return losses.sum(2) / labelled.sum(1).clamp_min(1), (right | ~labelled).all(2)
