"""Statistics of one cell, over its candidates. scipy computes what scipy has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

NAN = float("nan")


@dataclass(frozen=True)
class Correlation:
    """Kendall's tau-b, Spearman's rho and Pearson's r with their two-sided p, over n pairs.

    `dropped` pairs had a null or a NaN. Fewer than two pairs, or a constant side, give NaN.
    """

    n: int
    dropped: int
    kendall: float
    kendall_p: float
    spearman: float
    spearman_p: float
    pearson: float
    pearson_p: float


def paired(x: Sequence[Any], y: Sequence[Any]) -> tuple[np.ndarray, np.ndarray, int]:
    """`x` and `y` as float64 arrays of the pairs without null, NaN or infinity, and the rest's count.

    Raises ValueError when their lengths differ.
    """
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"lists of different length: {len(a)} and {len(b)}")
    keep = np.isfinite(a) & np.isfinite(b)
    return a[keep], b[keep], int((~keep).sum())


def _with_p(test: str, a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """scipy.stats' `test` of a and b; NaN where it is not defined."""
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return NAN, NAN
    from scipy import stats

    tests: dict[str, Callable[[np.ndarray, np.ndarray], Any]] = {
        "kendall": stats.kendalltau,
        "spearman": stats.spearmanr,
        "pearson": stats.pearsonr,
    }
    result = tests[test](a, b)
    return float(result.statistic), float(result.pvalue)


def kendall(x: Sequence[Any], y: Sequence[Any]) -> tuple[float, float]:
    """Kendall's tau-b and its two-sided p (scipy: exact for small n without ties)."""
    a, b, _ = paired(x, y)
    return _with_p("kendall", a, b)


def spearman(x: Sequence[Any], y: Sequence[Any]) -> tuple[float, float]:
    """Spearman's rho and its two-sided p."""
    a, b, _ = paired(x, y)
    return _with_p("spearman", a, b)


def pearson(x: Sequence[Any], y: Sequence[Any]) -> tuple[float, float]:
    """Pearson's r and its two-sided p."""
    a, b, _ = paired(x, y)
    return _with_p("pearson", a, b)


def correlation(x: Sequence[Any], y: Sequence[Any]) -> Correlation:
    """All three, over the pairs that are there."""
    a, b, dropped = paired(x, y)
    values = [number for test in ("kendall", "spearman", "pearson") for number in _with_p(test, a, b)]
    return Correlation(len(a), dropped, *values)


def higher_is_better(column: str) -> bool:
    """Whether more of `column` is better: losses are not, everything else is."""
    return "loss" not in column


def lowest(x: np.ndarray) -> int:
    """Index of the candidate that oracle pruning picks: the lowest x, ties to the lowest index."""
    return int(np.argmin(x))


def better_than_picked(x: np.ndarray, y: np.ndarray, *, higher: bool = True) -> np.ndarray:
    """Which candidates are strictly better in y than the one with the lowest x; bool [n]."""
    return y > y[lowest(x)] if higher else y < y[lowest(x)]


def anomaly_ratio(x: Sequence[Any], y: Sequence[Any], *, higher: bool = True) -> float:
    """Share of candidates strictly better in y than the one with the lowest x, which counts in the
    denominator (arXiv 2412.00143). NaN with fewer than two candidates."""
    a, b, _ = paired(x, y)
    return float(better_than_picked(a, b, higher=higher).mean()) if len(a) > 1 else NAN
