"""The bootstrap over candidates, and BCa intervals (Efron, JASA 1987, section 4).

A resample is how often it drew each candidate: counts [resamples, n]. Every statistic here is a function of such
counts, computed for all resamples at once; leaving one candidate out is a count of 0 among ones. This is what makes
2,000 resamples of Kendall's tau cost two matrix products.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import numpy as np

from storage.statistics.association import NAN, Values, paired
from storage.statistics.records import NO_INTERVAL, Interval

RESAMPLES = 2000
CONFIDENCE = 0.95
FEWEST = 5
"""Of fewer candidates no interval is given."""
MOST = 3000
"""Of more candidates than this, tau's interval is the normal one from the jackknife: n x n signs take too long."""

Statistic = Callable[[np.ndarray], np.ndarray]
"""counts [resamples, n] -> value of each resample [resamples]; NaN where it is not defined."""


def resampled(n: int, resamples: int, seed: int) -> np.ndarray:
    """How often each of n candidates is drawn, in resamples of n with replacement: float64 [resamples, n]."""
    drawn = np.random.Generator(np.random.Philox(seed)).integers(0, n, (resamples, n))
    cells = drawn + np.arange(resamples)[:, None] * n
    return np.bincount(cells.ravel(), minlength=resamples * n).reshape(resamples, n).astype(np.float64)


def seed_of(y: np.ndarray) -> int:
    """The seed of the resamples of candidates with these y [n]: alike wherever they are asked about, with whatever x;
    cells with other values are resampled independently."""
    return int(hashlib.sha256(np.ascontiguousarray(y, dtype=np.float64).tobytes()).hexdigest()[:8], 16)


def resampled_parts(n: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """The same as parts that memory holds, whatever n."""
    done, most = 0, max(2**25 // n, 1)
    while done < resamples:
        yield resampled(n, min(most, resamples - done), seed + done)
        done += most


def left_out(n: int) -> np.ndarray:
    """The counts of the jackknife: each line lacks one candidate."""
    return 1.0 - np.eye(n)


def bca(found: float, draws: np.ndarray, jackknife: np.ndarray) -> Interval:
    """The bias-corrected and accelerated interval of what was `found`, from its `draws` and its jackknife values.

    Nothing where any is not defined, or where all draws are one value: resamples of a perfect order are perfect, and
    say nothing of how certain it is.
    """
    from scipy.special import ndtr, ndtri

    defined = draws[np.isfinite(draws)]
    if not np.isfinite(found) or len(defined) < 0.95 * len(draws) or np.ptp(defined) == 0:
        return NO_INTERVAL
    away = jackknife[np.isfinite(jackknife)].mean() - jackknife[np.isfinite(jackknife)]
    spread = (away**2).sum()
    acceleration = (away**3).sum() / (6 * spread**1.5) if spread > 0 else 0.0
    bias = ndtri(((defined < found).mean() + (defined <= found).mean()) / 2)
    if not np.isfinite(bias):
        return NO_INTERVAL
    tail = ndtri((1 - CONFIDENCE) / 2)
    shares = [ndtr(bias + (bias + z) / (1 - acceleration * (bias + z))) for z in (tail, -tail)]
    low, high = np.quantile(defined, shares)
    return Interval(float(low), float(high))


def percentile(draws: np.ndarray) -> Interval:
    """The percentile interval, for statistics too rough for BCa: shares of a few, maxima."""
    defined = draws[np.isfinite(draws)]
    if len(defined) < 0.95 * len(draws) or not len(defined):
        return NO_INTERVAL
    low, high = np.quantile(defined, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(low), float(high))


def interval(statistic: Statistic, n: int, counts: np.ndarray) -> Interval:
    """The BCa interval of a statistic of n candidates."""
    if n < FEWEST or not len(counts):
        return NO_INTERVAL
    found = float(statistic(np.ones((1, n)))[0])
    return bca(found, statistic(counts), statistic(left_out(n)))


def tau_of(x: np.ndarray, y: np.ndarray) -> Statistic:
    """Kendall's tau-b of x and y, both [n]: 2 (concordant - discordant) is w' S w for counts w and signs S [n, n],
    and candidates drawn twice are ties."""
    signs = _signs(x) * _signs(y)
    ties = [np.unique(side, return_inverse=True)[1] for side in (x, y)]

    def tau(counts: np.ndarray) -> np.ndarray:
        score = np.einsum("bn,bn->b", (counts.astype(np.float32) @ signs).astype(np.float64), counts)
        pairs = counts.sum(1) ** 2
        untied = [pairs - (_grouped(counts, group) ** 2).sum(1) for group in ties]
        return _ratio(score, np.sqrt(untied[0] * untied[1]))

    return tau


def _signs(values: np.ndarray) -> np.ndarray:
    return np.sign(values[:, None] - values[None, :]).astype(np.float32)


def _grouped(counts: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Counts summed over groups of candidates: [resamples, groups]."""
    if group.max() + 1 == len(group):
        return counts
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(group.max() + 1))
    return np.add.reduceat(counts[:, order], starts, axis=1)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.full(len(above), NAN), where=below > 0)


def pearson_of(x: np.ndarray, y: np.ndarray) -> Statistic:
    """Pearson's r of x and y, both [n]."""
    a, b = x - x.mean(), y - y.mean()
    return lambda counts: _weighted_r(counts, np.broadcast_to(a, counts.shape), np.broadcast_to(b, counts.shape))


def tau_difference(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> Interval:
    """The percentile interval of tau-b of b less that of a: x and y of the same candidates [n], resampled together."""
    n = len(a[0])
    if not FEWEST <= n <= MOST or any(np.ptp(side) == 0 for side in (*a, *b)):
        return NO_INTERVAL
    counts = resampled(n, RESAMPLES, seed_of(a[1]))
    return percentile(tau_of(*b)(counts) - tau_of(*a)(counts))


def spearman_of(x: np.ndarray, y: np.ndarray) -> Statistic:
    """Spearman's rho of x and y, both [n]: ranks anew in each resample, ties at their mean."""
    ties = [np.unique(side, return_inverse=True)[1] for side in (x, y)]
    return lambda counts: _weighted_r(counts, *(_ranks(counts, group) for group in ties))


def _ranks(counts: np.ndarray, group: np.ndarray) -> np.ndarray:
    """The rank of each candidate in each resample, around their mean; groups are numbered in the order of values."""
    sizes = _grouped(counts, group) if group.max() + 1 < len(group) else counts[:, np.argsort(group)]
    middle = np.cumsum(sizes, axis=1) - (sizes - 1) / 2
    return middle[:, group] - (counts.sum(1, keepdims=True) + 1) / 2


def _weighted_r(counts: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    n = counts.sum(1)
    means = [np.einsum("bn,bn->b", counts, side) / n for side in (a, b)]
    a, b = (side - mean[:, None] for side, mean in zip((a, b), means, strict=True))
    moment = [np.einsum("bn,bn,bn->b", counts, *sides) for sides in ((a, b), (a, a), (b, b))]
    # Of equal values rounding leaves a little more than nothing.
    spread = [
        np.where(m > 1e-24 * n * np.abs(side).max(initial=0) ** 2, m, 0)
        for m, side in zip(moment[1:], (a, b), strict=True)
    ]
    return _ratio(moment[0], np.sqrt(spread[0] * spread[1]))


def jackknife_tau_interval(x: np.ndarray, y: np.ndarray) -> Interval:
    """The normal interval of tau-b, on the scale of artanh, with the standard error of the jackknife."""
    n = len(x)
    score, untied_x, untied_y = (np.empty(n) for _ in range(3))
    for start in range(0, n, 256):
        part = slice(start, start + 256)
        a, b = (np.sign(side[part, None] - side[None, :]) for side in (x, y))
        score[part], untied_x[part], untied_y[part] = (a * b).sum(1), (a != 0).sum(1), (b != 0).sum(1)
    whole = [side.sum() for side in (score, untied_x, untied_y)]
    less = [total - 2 * one for total, one in zip(whole, (score, untied_x, untied_y), strict=True)]
    tau, values = whole[0] / np.sqrt(whole[1] * whole[2]), less[0] / np.sqrt(less[1] * less[2])
    if abs(tau) >= 1:
        return NO_INTERVAL
    error = np.sqrt((n - 1) / n * ((values - values.mean()) ** 2).sum()) / (1 - tau**2)
    low, high = np.tanh(np.arctanh(tau) + np.array([-1, 1]) * 1.959964 * error)
    return Interval(float(low), float(high))


def tau_interval(x: np.ndarray, y: np.ndarray, resamples: int = RESAMPLES) -> Interval:
    """The interval of Kendall's tau-b of x and y, both [n] and finite: BCa over `resamples`, of many candidates
    `jackknife_tau_interval`; none without resamples, of too few candidates, or where a side is constant."""
    n = len(x)
    if not resamples or n < FEWEST or np.ptp(x) == 0 or np.ptp(y) == 0:
        return NO_INTERVAL
    if n > MOST:
        return jackknife_tau_interval(x, y)
    return interval(tau_of(x, y), n, resampled(n, resamples, seed_of(y)))


def kendall_ci(x: Values, y: Values) -> tuple[float, float]:
    """The same of the pairs that are there: (low, high), NaN where there is none."""
    found = tau_interval(*paired(x, y)[:2])
    return found.low, found.high
