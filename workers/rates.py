"""The learning rate at every step of a training, by torch's own schedulers, and how long it is."""

from __future__ import annotations

from array import array
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from storage.records import Recipe

WARMUP_FROM = 0.01
"""Warm-up starts at this share of the first rate."""


def steps_in_epoch(recipe: Recipe, n: int) -> int:
    """Minibatches of an epoch over n samples; the last one may be smaller."""
    return -(-n // recipe.batch_size)


def planned_epochs(recipe: Recipe, n: int) -> int:
    """How many epochs a training on n samples has; with `max_steps` the last one may end early."""
    if recipe.max_steps is None:
        return recipe.epochs
    return min(recipe.epochs, -(-recipe.max_steps // steps_in_epoch(recipe, n)))


def steps_left(recipe: Recipe, n: int, epochs_done: int) -> int:
    """Minibatches of the epoch that follows `epochs_done`."""
    steps = steps_in_epoch(recipe, n)
    return steps if recipe.max_steps is None else min(steps, recipe.max_steps - epochs_done * steps)


def rate(recipe: Recipe, n: int, epochs_done: int, step: int) -> float:
    """The learning rate of minibatch `step`, 0 the first, of the epoch that follows `epochs_done`."""
    if recipe.lr_schedule == "table" and not recipe.warmup_epochs:
        return recipe.lr_at(epochs_done)
    steps = steps_in_epoch(recipe, n)
    return _rates(recipe, steps)[epochs_done * steps + step]


@lru_cache(maxsize=8)
def _rates(recipe: Recipe, steps: int) -> array[float]:
    """Every step's rate: warm-up, then the schedule over what is left."""
    import torch
    from torch.optim import lr_scheduler

    first, warm, total = recipe.lr[0][1], recipe.warmup_epochs * steps, recipe.epochs * steps
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=first)
    if recipe.lr_schedule == "cosine":
        after = lr_scheduler.CosineAnnealingLR(optimizer, total - warm, recipe.final_lr)
    elif recipe.lr_schedule == "linear":
        after = lr_scheduler.LinearLR(optimizer, 1.0, recipe.final_lr / first, total - warm)
    else:
        after = lr_scheduler.LambdaLR(optimizer, lambda step: recipe.lr_at((step + warm) // steps) / first)
    schedule = after
    if warm:
        rising = lr_scheduler.LinearLR(optimizer, WARMUP_FROM, 1.0, warm)
        schedule = lr_scheduler.SequentialLR(optimizer, [rising, after], [warm])
    rates = array("d")
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates
