"""What is measured of a network, and how sums over samples become it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from accelerate import Accelerator

    from workers.datasets import Samples, Split

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


def measure_of_text(sums: Sequence[float], n: int) -> Measure:
    """From the sums over n samples of what `_of_text` gives. The loss is the mean over tokens; its standard error
    that of a ratio of two sums over samples (W. G. Cochran, Sampling Techniques, 1977, section 2.11)."""
    loss, square, cross, tokens, tokens_square, correct, judged = sums
    mean = loss / max(1.0, tokens)
    residual = max(0.0, square - 2 * mean * cross + mean**2 * tokens_square)
    error = math.sqrt(residual * n / max(1, n - 1)) / max(1.0, tokens)
    return Measure(mean, error, correct / max(1.0, judged), n)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, **how: Any) -> torch.Tensor:
    """torch's, of logits [B, classes] and labels [B] or soft [B, classes]; or of text, [B, classes, T] and [B, T],
    taken token by token: torch's own kernel for that form is not deterministic on a GPU, and refused."""
    if labels.dim() > 1 and not labels.is_floating_point():
        logits, labels = logits.movedim(1, -1).flatten(0, -2), labels.flatten()
    return F.cross_entropy(logits, labels, **how)


@torch.no_grad()
def measured(
    logits_of: Callable[[Any], torch.Tensor],
    split: Samples,
    batch: int,
    accelerator: Accelerator | None = None,
) -> list[Measure]:
    """The measure of each of K networks: `logits_of` maps images [B, ...] to logits [K, B, classes], or for text
    [K, B, classes, T].

    Summed in float64 over fixed batches. The processes of an `accelerator` share them out.
    """
    sums: list[torch.Tensor] = []
    is_text = False
    shares = accelerator if accelerator and 1 < accelerator.num_processes <= len(split) / batch else None
    own = split.at(_share(len(split), batch, shares)) if shares else split
    for piece in own.in_order(batch):
        logits = logits_of(piece.images)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        is_text = piece.labels.dim() > 1
        sums.append(_of_text(logits, piece) if is_text else _of_classes(logits, piece.labels))
    total = torch.stack(sums).sum(0)
    if shares:
        total = shares.reduce(total, "sum")
        assert isinstance(total, torch.Tensor)
    found = total.T.tolist()
    if is_text:
        return [measure_of_text(member, len(split)) for member in found]
    return [measure_of(loss, square, int(correct), len(split)) for loss, square, correct in found]


def _share(n: int, batch: int, accelerator: Accelerator) -> torch.Tensor:
    """The samples whose batches are this process's: only those are read."""
    return torch.cat(torch.arange(n).split(batch)[accelerator.process_index :: accelerator.num_processes])


def _of_classes(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sums over samples of the loss, its square, correct answers: [3, K], float64."""
    k = len(logits)
    losses = F.cross_entropy(logits.flatten(0, 1), labels.repeat(k), reduction="none").view(k, -1).double()
    correct = (logits.argmax(2) == labels).sum(1)
    return torch.stack([losses.sum(1), losses.square().sum(1), correct.double()])


def _of_text(logits: torch.Tensor, piece: Split) -> torch.Tensor:
    """Sums over samples of the loss (itself one over a sample's tokens), its square, its product with the number of
    tokens, that number, its square, correct answers, samples that are judged: [7, K], float64.

    Judged are the multiple-choice items: correct is one whose right letter has the highest logit among its letters.
    Where there are none, every sample is, and is correct if each of its tokens has the highest logit.
    """
    labels, k = piece.labels, len(logits)
    each = cross_entropy(logits.flatten(0, 1), labels.repeat(k, 1), reduction="none").view(k, *labels.shape)
    losses, tokens = each.double().sum(2), (labels != -100).sum(1).double().expand(k, -1)
    correct, judged = _correct(logits, piece)
    sums = (losses, losses.square(), losses * tokens, tokens, tokens.square(), correct, judged.expand(k, -1))
    return torch.stack([one.double().sum(1) for one in sums])


def _correct(logits: torch.Tensor, piece: Split) -> tuple[torch.Tensor, torch.Tensor]:
    """Which samples are correct, [K, B], and which are judged, [B]."""
    labels, choices = piece.labels, piece.choices
    if choices is None:
        right = (logits.argmax(2) == labels) | (labels == -100)
        return right.all(2), torch.ones_like(labels[:, 0])
    index = choices.clamp_min(0).expand(len(logits), -1, -1)
    among = logits[..., 0].gather(2, index).masked_fill(choices < 0, -math.inf)
    chosen = choices.gather(1, among.argmax(2).T).T
    judged = choices[:, 0] >= 0
    return (chosen == labels[:, 0]) & judged, judged
