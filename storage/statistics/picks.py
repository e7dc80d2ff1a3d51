"""What picking the candidate of lowest loss costs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from storage.statistics.association import NAN, paired
from storage.statistics.records import Picks
from storage.statistics.resampling import percentile

TOP_SHARE = 0.1
"""The `top` candidates are so many of all, one at least."""


def lowest(x: np.ndarray) -> int:
    """Index of the candidate that oracle pruning picks: the lowest x, ties to the lowest index."""
    return int(np.argmin(x))


def better_than_picked(x: np.ndarray, y: np.ndarray, *, higher: bool = True) -> np.ndarray:
    """Which candidates are strictly better in y than the one with the lowest x; bool [n]."""
    return y > y[lowest(x)] if higher else y < y[lowest(x)]


def anomaly_ratio(x: Sequence[Any], y: Sequence[Any], *, higher: bool = True) -> float:
    """Share of candidates strictly better in y than the one with the lowest x, which counts in the
    denominator (arXiv 2412.00143). NaN with fewer than two candidates, or where x or y is constant."""
    a, b, _ = paired(x, y)
    return float(better_than_picked(a, b, higher=higher).mean()) if _differ(a, b) else NAN


def _differ(*sides: np.ndarray) -> bool:
    """Whether there is anything to pick by, and anything to win."""
    return all(len(side) > 1 and np.ptp(side) > 0 for side in sides)


def picks_of(
    x: np.ndarray,
    y: np.ndarray,
    by_seed: np.ndarray | None,
    candidate: np.ndarray,
    least: float,
    parts: Iterable[np.ndarray],
) -> Picks:
    """What picking the lowest x [n] costs in y [n], of which more is better; `by_seed` is y [n, seeds].

    `least` is the difference beyond retraining noise (NaN: not known), `parts` are the resamples that the intervals are
    of, [some, n] each.
    """
    n = len(x)
    if not _differ(x, y):
        return Picks()
    picked, top = lowest(x), max(round(TOP_SHARE * n), 1)
    draws = [_resampled_picks(x, y, counts) for counts in parts if len(counts)]
    ratios, regrets = np.concatenate(draws, axis=1) if draws else np.empty((2, 0))
    return Picks(
        candidate=int(candidate[picked]),
        anomaly_ratio=float(better_than_picked(x, y).mean()),
        anomaly_interval=percentile(ratios),
        regret=float(y.max() - y[picked]),
        regret_interval=percentile(regrets),
        regret_held_out=held_out_regret(by_seed, picked),
        percentile=float((np.delete(y, picked) <= y[picked]).mean()),
        top=top,
        top_overlap=top_overlap(x, y, top),
        counterexamples=counterexamples(x, y, least),
    )


def _resampled_picks(x: np.ndarray, y: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The anomaly ratio and the regret of each resample, [2, resamples]: a pick is the lowest x that it drew."""
    by_x, by_y = np.argsort(x, kind="stable"), np.argsort(-y, kind="stable")
    picked = by_x[(counts[:, by_x] > 0).argmax(1)]
    best = by_y[(counts[:, by_y] > 0).argmax(1)]
    ratios = np.empty(len(counts))
    for one in np.unique(picked):
        of_it = picked == one
        ratios[of_it] = counts[of_it] @ (y > y[one]) / len(x)
    return np.stack([ratios, y[best] - y[picked]])


def held_out_regret(by_seed: np.ndarray | None, picked: int) -> float:
    """The regret against the candidate that is best on the other seeds, averaged over the seeds [n, k].

    The best of many noisy values looks better than it is; chosen on other seeds it does not. NaN with one seed.
    """
    if by_seed is None or by_seed.shape[1] < 2:
        return NAN
    k = by_seed.shape[1]
    best = [int(np.delete(by_seed, seed, axis=1).mean(1).round(12).argmax()) for seed in range(k)]
    return float(np.mean([by_seed[one, seed] - by_seed[picked, seed] for seed, one in enumerate(best)]))


def top_overlap(x: np.ndarray, y: np.ndarray, top: int) -> float:
    """The share of the `top` candidates of lowest x that are among the `top` of highest y; ties at the border share
    the places that are left."""
    return float((_places(x, top) * _places(-y, top)).sum() / top)


def _places(values: np.ndarray, top: int) -> np.ndarray:
    """The chance of each candidate to be among the `top` lowest, ties broken at random: [n]."""
    border = np.partition(values, top - 1)[top - 1]
    below, tied = values < border, values == border
    return below + tied * (top - below.sum()) / tied.sum()


def counterexamples(x: np.ndarray, y: np.ndarray, least: float) -> float:
    """The share of pairs of candidates that x orders wrongly, y differing by more than retraining noise.

    Noise alone puts at most 2.5 % of the pairs here. NaN where the noise is not known.
    """
    if not np.isfinite(least) or len(x) < 2:
        return NAN
    wrong = 0
    for at in range(0, len(x), 256):
        part = slice(at, at + 256)
        wrong += int(((x[part, None] < x) & (y - y[part, None] > least)).sum())
    return wrong / (len(x) * (len(x) - 1) / 2)
