"""p values of few candidates, and of many tests at once."""

from __future__ import annotations

from collections.abc import Sequence
from math import factorial
from typing import Any

import numpy as np

from storage.statistics.association import NAN, Values, kendall, paired, pearson, spearman

FEW = 50
"""Up to so many candidates p is exact or by permutation, beyond it is scipy's asymptotic one."""
PERMUTATIONS = 9999
_FLOOR = 1 / (PERMUTATIONS + 1)


def p_of(test: str, x: Values, y: Values) -> float:
    """The two-sided p that `corr` gives of `kendall`, `spearman` or `pearson`; NaN where it is not defined."""
    from scipy.stats import rankdata

    a, b, _ = paired(x, y)
    asymptotic = {"kendall": kendall, "spearman": spearman, "pearson": pearson}[test](a, b)[1]
    if test == "kendall":
        return kendall_p(a, b, asymptotic)[0]
    return product_p(*((rankdata(a), rankdata(b)) if test == "spearman" else (a, b)), asymptotic)


def kendall_p(x: np.ndarray, y: np.ndarray, asymptotic: float) -> tuple[float, str]:
    """Two-sided p of tau-b and how it was found: `exact` (all orders), `permutation` or `asymptotic`."""
    n = len(x)
    if not _defined(x, y):
        return NAN, ""
    if n > FEW:
        return asymptotic, "asymptotic"
    if len(np.unique(x)) == len(np.unique(y)) == n:
        from scipy import stats

        found: Any = stats.kendalltau(x, y, method="exact")
        return float(found.pvalue), "exact"
    signs = [np.sign(side[:, None] - side[None, :]) for side in (x, y)]
    orders, exact = _orders(n)
    scores = np.array([np.vdot(signs[0], signs[1][np.ix_(order, order)]) for order in orders])
    p = _share(scores, float(np.vdot(*signs)), exact)
    return _below(p, asymptotic), "exact" if exact else "permutation" if p > _FLOOR else "asymptotic"


def product_p(a: np.ndarray, b: np.ndarray, asymptotic: float) -> float:
    """Two-sided p of Pearson's r, and with ranks of Spearman's rho: by permutation where there are few."""
    if not _defined(a, b):
        return NAN
    if len(a) > FEW:
        return asymptotic
    orders, exact = _orders(len(a))
    centred, other = (side - side.mean() for side in (a, b))
    scale = np.linalg.norm(centred) * np.linalg.norm(other)
    return _below(_share(other[orders] @ centred / scale, float(other @ centred / scale), exact), asymptotic)


def _defined(x: np.ndarray, y: np.ndarray) -> bool:
    return len(x) > 1 and bool(np.ptp(x) > 0) and bool(np.ptp(y) > 0)


def _orders(n: int) -> tuple[np.ndarray, bool]:
    """Every order of n where they are few, and whether these are all; else PERMUTATIONS random ones."""
    if factorial(n) <= PERMUTATIONS:
        from itertools import permutations

        return np.array(list(permutations(range(n)))), True
    generator = np.random.Generator(np.random.Philox(n))
    return generator.permuted(np.tile(np.arange(n), (PERMUTATIONS, 1)), axis=1), False


def _below(p: float, asymptotic: float) -> float:
    """p, and where none of the orders was as far, which says no more than that it is small, the asymptotic one."""
    return p if p > _FLOOR else min(p, asymptotic)


def _share(scores: np.ndarray, found: float, exact: bool) -> float:
    """The share of orders at least as far from zero; of random ones with the one found among them."""
    as_far = int((np.abs(scores) >= abs(found) * (1 - 1e-9) - 1e-12).sum())
    return as_far / len(scores) if exact else (as_far + 1) / (len(scores) + 1)


def holm(p: Sequence[float]) -> list[float]:
    """p adjusted by Holm's step-down (Scandinavian Journal of Statistics 1979), over those that are numbers."""
    values = np.asarray(p, dtype=np.float64)
    adjusted, there = np.full(len(values), NAN), np.flatnonzero(np.isfinite(values))
    order = there[np.argsort(values[there], kind="stable")]
    steps = values[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1) if len(order) else steps
    return adjusted.tolist()


def benjamini_hochberg(p: Sequence[float]) -> list[float]:
    """p adjusted for the false discovery rate (Benjamini and Hochberg 1995), over those that are numbers."""
    values = np.asarray(p, dtype=np.float64)
    adjusted, there = np.full(len(values), NAN), np.isfinite(values)
    if there.any():
        from scipy.stats import false_discovery_control

        adjusted[there] = false_discovery_control(values[there], method="bh")
    return adjusted.tolist()
