"""How much of y is retraining noise, and what that leaves to be predicted.

Every seed gives every candidate the same minibatches, so seeds are crossed with candidates: y is mean + candidate +
seed + rest, two-way without replication. What a seed adds to all candidates alike does not change their order; the
rest does. Reliability is therefore the ICC of consistency (McGraw and Wong, Psychological Methods 1996: ICC(C,1) of
one seed, ICC(C,k) of the mean of k).
"""

from __future__ import annotations

from itertools import combinations, islice

import numpy as np

from storage.statistics.association import NAN, kendalls
from storage.statistics.records import Interval, Noise
from storage.statistics.resampling import CONFIDENCE, FEWEST, MOST, interval, resampled, tau_of

ONE_SEED = "one seed: retraining noise cannot be told from candidates"
NO_VALUES_BY_SEED = "y is not measured once per seed"
TOO_FEW = f"fewer than {FEWEST} candidates"
ALL_NOISE = "candidates differ by no more than retraining noise (the interval of the reliability reaches 0)"
CONSTANT = "x or y is constant"
SPLITS = 200
"""Of more ways to halve the seeds, the first so many."""


def noise_of(x: np.ndarray, by_seed: np.ndarray | None, resamples: int, seed: int) -> Noise:
    """The noise of y, `by_seed` [n, k], and tau of x [n] with its means, freed from that noise.

    `by_seed` is None where y has no value per seed.
    """
    if by_seed is None:
        return Noise(0, why_not=NO_VALUES_BY_SEED if len(x) >= FEWEST else TOO_FEW)
    n, k = by_seed.shape
    if k < 2:
        return Noise(k, why_not=ONE_SEED)
    if n < FEWEST:
        return Noise(k, why_not=TOO_FEW)
    between, rest = (float(part[0]) for part in mean_squares(by_seed)(np.ones((1, n))))
    if between == 0:
        return Noise(k, noise_std=float(np.sqrt(rest / k)), why_not=CONSTANT)
    whole = reliability_interval(between, rest, n, k)
    found = Noise(
        seeds=k,
        reliability=1 - rest / between,
        reliability_interval=whole,
        reliability_one=(between - rest) / (between + (k - 1) * rest),
        noise_std=float(np.sqrt(rest / k)),
        split_half=split_half(by_seed),
        split_seeds=k // 2,
        ceiling=ceiling(1 - rest / between),
        ceiling_interval=Interval(ceiling(whole.low), ceiling(whole.high)),
    )
    if np.ptp(x) == 0:
        return _with(found, why_not=CONSTANT)
    if not whole.low > 0:
        return _with(found, why_not=ALL_NOISE)
    return _corrected(found, x, by_seed, resamples, seed)


def _with(noise: Noise, **changes: object) -> Noise:
    from dataclasses import replace

    return replace(noise, **changes)  # pyright: ignore[reportArgumentType]


def mean_squares(by_seed: np.ndarray):
    """The statistic (counts [resamples, n] -> mean square between candidates, mean square of the rest)."""
    k = by_seed.shape[1]
    means = by_seed.mean(1)
    means_centred = means - means.mean()
    rest = by_seed - means[:, None]
    squares = (rest**2).sum(1)

    def both(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        n = counts.sum(1)
        middle = counts @ means_centred / n
        between = k * (counts @ means_centred**2 - n * middle**2) / (n - 1)
        by_seeds = counts @ rest / n[:, None]
        within = (counts @ squares - n * (by_seeds**2).sum(1)) / ((n - 1) * (k - 1))
        # Equal values leave rounding errors of either sign.
        return tuple(np.where(part > 1e-20 * (means**2).max(), part, 0.0) for part in (between, within))  # pyright: ignore[reportReturnType]

    return both


def reliability_interval(between: float, rest: float, n: int, k: int) -> Interval:
    """The exact interval of ICC(C,k) under normality (McGraw and Wong 1996, table 7)."""
    if rest == 0:
        return Interval(1.0, 1.0)
    from scipy.special import fdtri

    ratio, free, upper = between / rest, (n - 1, (n - 1) * (k - 1)), (1 + CONFIDENCE) / 2
    low, high = ratio / fdtri(free[0], free[1], upper), ratio * fdtri(free[1], free[0], upper)
    return Interval(float(1 - 1 / low), float(1 - 1 / high))


def ceiling(reliability: float) -> float:
    """The |tau| with y that a perfect predictor of the candidates' true means would reach.

    Its r with the noisy means is the root of their reliability; Greiner's relation, tau = 2/pi asin r, holds for
    normal values (Kendall, Rank Correlation Methods, chapter 9).
    """
    return float(2 / np.pi * np.arcsin(np.sqrt(np.clip(reliability, 0, 1))))


def beyond_noise(noise: Noise, n: int) -> float:
    """The difference of two candidates' means that retraining noise alone exceeds, one way, in 2.5 %: Student's t times
    its standard error, noise being estimated with (n - 1)(k - 1) degrees of freedom. NaN where it is not."""
    if not np.isfinite(noise.noise_std):
        return NAN
    from scipy.special import stdtrit

    return float(stdtrit((n - 1) * (noise.seeds - 1), (1 + CONFIDENCE) / 2) * np.sqrt(2) * noise.noise_std)


def split_half(by_seed: np.ndarray) -> float:
    """Tau-b between the means over disjoint halves of the seeds, averaged over the ways to halve them."""
    k = by_seed.shape[1]
    half = k // 2
    rest = ((a, sorted({*range(k)} - {*a})) for a in combinations(range(k), half))
    pairs = ((a, b) for a, others in rest for b in combinations(others, half) if a < b)
    # Rounded as the view's means are: equal sums must be equal means.
    means = [tuple(by_seed[:, list(part)].mean(1).round(12) for part in pair) for pair in islice(pairs, SPLITS)]
    taus = np.array(kendalls(means))
    return float(np.nanmean(taus)) if np.isfinite(taus).any() else NAN


def attenuated(tau: np.ndarray, reliability: np.ndarray) -> np.ndarray:
    """Tau freed from the noise of y: r / sqrt(reliability) by Greiner's relation (Spearman 1904), within [-1, 1].

    Where no reliability is left, the sign of tau: the correction has no bound there.
    """
    root = np.sqrt(np.where(reliability > 0, reliability, 1))
    r = np.where(reliability > 0, np.sin(np.pi / 2 * tau) / root, np.sign(tau))
    return 2 / np.pi * np.arcsin(np.clip(r, -1, 1))


def _corrected(found: Noise, x: np.ndarray, by_seed: np.ndarray, resamples: int, seed: int) -> Noise:
    """With tau freed from noise; its interval is of resamples of candidates with all their seeds."""
    n, y = len(x), by_seed.mean(1).round(12)
    if n > MOST:
        from storage.statistics.association import kendall

        tau = np.array([kendall(x.tolist(), y.tolist())[0]])
        return _with(found, corrected=float(attenuated(tau, np.array([found.reliability]))[0]))
    tau, squares = tau_of(x, y), mean_squares(by_seed)

    def corrected(counts: np.ndarray) -> np.ndarray:
        between, rest = squares(counts)
        reliability = np.where(between > 0, 1 - np.divide(rest, between, out=np.zeros_like(rest), where=between > 0), 0)
        return attenuated(tau(counts), reliability)

    at = float(corrected(np.ones((1, n)))[0])
    counts = resampled(n, resamples, seed) if resamples else np.empty((0, n))
    return _with(found, corrected=at, corrected_interval=interval(corrected, n, counts))
