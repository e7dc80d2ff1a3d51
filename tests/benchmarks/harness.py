"""Timing side by side: A B A B, median and a bootstrap interval. Needs numpy only."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

PAIRS = 7


@dataclass(frozen=True)
class Figure:
    """One line of the table: a quantity measured `n` times, and what was asked of it.

    `unit` is `x` for a ratio. `least` and `aim` are limits in the same unit: from below where `more` is better.
    """

    name: str
    what: str
    unit: str
    samples: tuple[float, ...]
    least: float | None = None
    aim: float | None = None
    more: bool = False
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float:
        return float(np.median(self.samples))

    @property
    def interval(self) -> tuple[float, float]:
        """95 % percentile bootstrap interval of the median (Efron and Tibshirani 1993, chapter 13)."""
        draws = np.random.default_rng(0).choice(self.samples, (2000, len(self.samples)))
        low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
        return float(low), float(high)

    @property
    def verdict(self) -> str:
        """`aim`, `least` or `missed`, by the median; empty where nothing was asked."""
        meets = lambda limit: self.median >= limit if self.more else self.median <= limit  # noqa: E731
        if self.aim is not None and meets(self.aim):
            return "aim"
        if self.least is None:
            return ""
        return "least" if meets(self.least) else "missed"

    def to_dict(self) -> dict[str, Any]:
        low, high = self.interval
        return {
            **{k: getattr(self, k) for k in ("name", "what", "unit", "least", "aim", "more", "verdict", "median")},
            "low": low,
            "high": high,
            "n": len(self.samples),
            "samples": list(self.samples),
            "notes": self.notes,
        }


def seconds(work: Callable[[], Any]) -> float:
    """How long `work` takes, the garbage collected before."""
    gc.collect()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def pairs(a: Callable[[], float], b: Callable[[], float], n: int = PAIRS) -> list[tuple[float, float]]:
    """`a` and `b` in turn, n times, after one round that does not count; each returns what it measured."""
    a(), b()
    return [(a(), b()) for _ in range(n)]


def ratios(measured: Sequence[tuple[float, float]]) -> tuple[float, ...]:
    """The second of each pair over the first: how many times the first is faster, of seconds."""
    return tuple(b / a for a, b in measured)
