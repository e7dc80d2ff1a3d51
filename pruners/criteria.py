"""Criteria: how important each unit of a layer is. Higher = keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Importance = Callable[["torch.Tensor"], "torch.Tensor"]


def l1(weight: torch.Tensor) -> torch.Tensor:
    """L1 norm of each filter's own weights, float64: weight [F, ...] -> [F]."""
    return weight.detach().double().cpu().reshape(len(weight), -1).abs().sum(1)


def l2(weight: torch.Tensor) -> torch.Tensor:
    """L2 norm of each filter's own weights, float64: weight [F, ...] -> [F]."""
    return weight.detach().double().cpu().reshape(len(weight), -1).square().sum(1).sqrt()


CRITERIA: Mapping[str, Importance] = {"l1": l1, "l2": l2}


def least_important(importance: torch.Tensor, k: int) -> tuple[int, ...]:
    """The k units of the lowest importance, ascending; among equals the lowest index goes first."""
    order = importance.argsort(stable=True).tolist()
    return tuple(sorted(order[:k]))


def score(importance: torch.Tensor, units: tuple[int, ...]) -> float:
    """Sum of the importances of `units`."""
    return float(importance[list(units)].sum())
