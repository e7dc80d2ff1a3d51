"""Kendall, Spearman and Pearson, by scipy, over the pairs that are there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

NAN = float("nan")

Values = Sequence[Any] | np.ndarray
"""Numbers, null and NaN among them: [n]."""


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


def paired(x: Values, y: Values) -> tuple[np.ndarray, np.ndarray, int]:
    """`x` and `y` as float64 arrays of the pairs without null, NaN or infinity, and the rest's count.

    Raises ValueError when their lengths differ.
    """
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"lists of different length: {len(a)} and {len(b)}")
    keep = np.isfinite(a) & np.isfinite(b)
    return a[keep], b[keep], int((~keep).sum())


def _with_p(test: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """scipy.stats' `test` of each line of a and b, both [lines, n]: statistic and p, [lines, 2]; NaN where it is not
    defined. Fifty lines at once take scipy hardly longer than one."""
    found = np.full((len(a), 2), NAN)
    defined = (np.ptp(a, axis=1) > 0) & (np.ptp(b, axis=1) > 0) if a.shape[1] > 1 else np.zeros(len(a), bool)
    if defined.any():
        from scipy import stats

        x, y = a[defined], b[defined]
        if test == "spearman":  # by its definition
            x, y = stats.rankdata(x, axis=1), stats.rankdata(y, axis=1)
        correlated: Any = stats.kendalltau if test == "kendall" else stats.pearsonr
        result = correlated(x, y, axis=1)
        found[defined] = np.stack([result.statistic, result.pvalue], axis=1)
    return found


def _one(test: str, x: Values, y: Values) -> tuple[float, float]:
    statistic, p = _all_with_p(test, [(x, y)])[0].tolist()
    return statistic, p


def kendall(x: Values, y: Values) -> tuple[float, float]:
    """Kendall's tau-b and its two-sided p (scipy: exact for small n without ties)."""
    return _one("kendall", x, y)


def spearman(x: Values, y: Values) -> tuple[float, float]:
    """Spearman's rho, Pearson's r of the ranks, and its two-sided p."""
    return _one("spearman", x, y)


def pearson(x: Values, y: Values) -> tuple[float, float]:
    """Pearson's r and its two-sided p."""
    return _one("pearson", x, y)


def correlation(x: Values, y: Values) -> Correlation:
    """All three, over the pairs that are there."""
    return correlations([(x, y)])[0]


Sides = Sequence[tuple[Values, Values]]


def correlations(sides: Sides) -> list[Correlation]:
    """The same of many x and y."""
    counts = [(len(a), dropped) for a, _, dropped in (paired(x, y) for x, y in sides)]
    numbers = np.concatenate([_all_with_p(test, sides) for test in ("kendall", "spearman", "pearson")], axis=1)
    return [Correlation(*n, *line) for n, line in zip(counts, numbers.tolist(), strict=True)]


def kendalls(sides: Sides) -> list[float]:
    """Kendall's tau-b of many x and y."""
    return _all_with_p("kendall", sides)[:, 0].tolist()


def _all_with_p(test: str, sides: Sides) -> np.ndarray:
    """Statistic and p of each x and y, [sides, 2]; those with equally many pairs are computed together."""
    found = [paired(x, y)[:2] for x, y in sides]
    numbers = np.full((len(found), 2), NAN)
    alike: dict[int, list[int]] = {}
    for i, (a, _) in enumerate(found):
        alike.setdefault(len(a), []).append(i)
    for lines in alike.values():
        numbers[lines] = _with_p(test, *(np.stack([found[i][side] for i in lines]) for side in (0, 1)))
    return numbers


def higher_is_better(column: str) -> bool:
    """Whether more of `column` is better: losses are not, everything else is."""
    return "loss" not in column
