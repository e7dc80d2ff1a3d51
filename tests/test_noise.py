"""Retraining noise: reliability, the ceiling, correction, power, and what picking costs."""

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from storage.statistics import kendall
from storage.statistics.noise import (
    ALL_NOISE,
    CONSTANT,
    NO_VALUES_BY_SEED,
    ONE_SEED,
    TOO_FEW,
    attenuated,
    ceiling,
    mean_squares,
    noise_of,
    reliability_interval,
    split_half,
)
from storage.statistics.picks import counterexamples, held_out_regret, picks_of, top_overlap
from storage.statistics.power import detectable, power_of
from storage.statistics.records import Noise, Picks
from storage.statistics.resampling import resampled

SHROUT_FLEISS = np.array([[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]], float)
"""Six targets and four judges: Shrout and Fleiss, Psychological Bulletin 1979, table 2."""


def _values(n: int, k: int, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(x, true y, y by seed): x predicts y at r = -0.8, y has variance 1, and each seed its own mean."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=n)
    true = -0.8 * x + 0.6 * generator.normal(size=n)
    return x, true, true[:, None] + generator.normal(size=k) * 3 + noise * generator.normal(size=(n, k))


def test_reliability_is_the_published_one() -> None:
    """ICC(3,1) = .71 and ICC(3,k) = .91 of the data everyone checks against (table 4 there)."""
    found = noise_of(np.arange(6.0), SHROUT_FLEISS, 200, 0)
    assert round(found.reliability_one, 2) == 0.71
    assert round(found.reliability, 2) == 0.91
    assert (found.reliability_interval.low, found.reliability_interval.high) == pytest.approx((0.676, 0.986), abs=5e-4)


@given(st.integers(0, 99), st.integers(2, 5), st.integers(5, 9))
def test_mean_squares_by_the_sums_of_an_analysis_of_variance(seed: int, k: int, n: int) -> None:
    """Against loops over candidates and seeds; in a resample a candidate drawn twice is there twice."""
    _, _, y = _values(n, k, 1.0, seed)
    counts = np.concatenate([np.ones((1, n)), resampled(n, 2, seed)])
    between, rest = mean_squares(y)(counts)
    for at, line in enumerate(counts.astype(int)):
        table = np.repeat(y, line, axis=0)
        grand, rows, columns = table.mean(), table.mean(1), table.mean(0)
        m = len(table)
        ms_rows = k * sum((r - grand) ** 2 for r in rows) / (m - 1)
        residual = sum((table[i, j] - rows[i] - columns[j] + grand) ** 2 for i in range(m) for j in range(k))
        assert (between[at], rest[at]) == pytest.approx((ms_rows, residual / ((m - 1) * (k - 1))), abs=1e-9)


def test_what_a_seed_adds_to_all_candidates_changes_nothing() -> None:
    """Seeds are crossed with candidates: a seed's own mean is no noise of their order."""
    x, _, y = _values(20, 3, 0.5)
    shifted = noise_of(x, y + np.array([0.0, 5.0, -2.0]), 200, 0)
    plain = noise_of(x, y, 200, 0)
    assert shifted.reliability == pytest.approx(plain.reliability)
    assert shifted.corrected == pytest.approx(plain.corrected)


@pytest.mark.parametrize(
    ("by_seed", "why"),
    [
        (None, NO_VALUES_BY_SEED),
        (np.arange(9.0)[:, None], ONE_SEED),
        (np.arange(8.0).reshape(4, 2), TOO_FEW),
        (np.ones((9, 2)), CONSTANT),
    ],
)
def test_what_is_not_estimable_says_why_and_gives_no_number(by_seed: np.ndarray | None, why: str) -> None:
    """One seed never gives a ceiling."""
    found = noise_of(np.arange(9.0 if by_seed is None or len(by_seed) == 9 else 4), by_seed, 200, 0)
    assert found.why_not == why
    assert all(math.isnan(v) for v in (found.reliability, found.ceiling, found.corrected, found.corrected_interval.low))


def test_pure_noise_has_no_corrected_tau() -> None:
    """Where the reliability may be zero nothing is divided by it."""
    generator = np.random.default_rng(3)
    found = noise_of(generator.normal(size=30), generator.normal(size=(30, 3)), 200, 0)
    assert found.why_not == ALL_NOISE and math.isnan(found.corrected)
    assert found.ceiling_interval.low == 0 and found.reliability < 0.6


@pytest.mark.parametrize(("noise", "k"), [(0.5, 2), (1.0, 3), (2.0, 6)])
def test_the_ceiling_recovers_a_known_reliability(noise: float, k: int) -> None:
    """Of values made with it; and tau of the true values with the noisy ones is at the ceiling."""
    known = 1 / (1 + noise**2 / k)
    x, true, y = _values(3000, k, noise)
    found = noise_of(x, y, 0, 0)
    assert found.reliability == pytest.approx(known, abs=0.02)
    assert found.reliability_interval.low < known < found.reliability_interval.high
    assert found.ceiling == pytest.approx(abs(kendall(true, y.mean(1))[0]), abs=0.02)
    assert found.corrected == pytest.approx(kendall(x, true)[0], abs=0.02)
    assert found.noise_std == pytest.approx(noise / math.sqrt(k), rel=0.05)


def test_without_noise_nothing_is_corrected() -> None:
    """A y that every seed repeats has reliability 1, a ceiling of 1, and its tau stands."""
    x, true, _ = _values(15, 1, 0)
    found = noise_of(x, np.repeat(true[:, None], 3, axis=1), 200, 0)
    assert (found.reliability, found.ceiling, found.split_half) == pytest.approx((1, 1, 1))
    assert found.corrected == pytest.approx(kendall(x, true)[0])


def test_greiner_of_the_ends() -> None:
    """No reliability no ceiling, all of it 1; r = 0.5 is tau 1/3."""
    assert [ceiling(value) for value in (-0.2, 0, 0.25, 1)] == pytest.approx([0, 0, 1 / 3, 1])
    assert attenuated(np.array([-1 / 3, 0.9, 0.1]), np.array([0.25, 0.5, 0.0])) == pytest.approx([-1, 1, 1])


def test_split_half_is_the_mean_over_all_halves() -> None:
    """By hand for three seeds, and for four: three pairs of single seeds, three ways of two and two."""
    _, _, y = _values(12, 4, 1.0)
    singles = [kendall(y[:, a], y[:, b])[0] for a, b in combinations(range(3), 2)]
    assert split_half(y[:, :3]) == pytest.approx(np.mean(singles))
    assert math.isfinite(split_half(np.random.default_rng(0).normal(size=(6, 24))))  # of millions of ways some
    halves = [((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 3), (1, 2))]
    pairs = [kendall(y[:, a].mean(1), y[:, b].mean(1))[0] for a, b in halves]
    assert split_half(y) == pytest.approx(np.mean(pairs))


def test_the_interval_of_the_reliability_is_the_f_test() -> None:
    """It ends at 0 exactly where the F test of candidates is at 2.5 %."""
    n, k = 12, 3
    critical = float(stats.f.ppf(0.975, n - 1, (n - 1) * (k - 1)))
    assert reliability_interval(critical, 1.0, n, k).low == pytest.approx(0, abs=1e-9)


# -- picking ------------------------------------------------------------------------------------------


def test_picks_by_hand() -> None:
    """Five candidates, two seeds; the second has the lowest loss."""
    x = np.array([0.5, 0.2, 0.9, 0.4, 0.3])
    by_seed = np.array([[0.90, 0.90], [0.80, 0.80], [0.80, 0.80], [0.70, 0.70], [0.95, 0.95]])
    found = picks_of(x, by_seed.mean(1), by_seed, np.arange(10, 15), 0.0, [resampled(5, 500, 0)])
    assert isinstance(found, Picks)
    assert (found.candidate, found.anomaly_ratio, found.regret) == (11, pytest.approx(0.4), pytest.approx(0.15))
    assert (found.percentile, found.regret_held_out) == (pytest.approx(0.5), pytest.approx(0.15))
    assert (found.top, found.top_overlap) == (1, 0)
    assert found.anomaly_interval.low == 0 and found.anomaly_interval.high <= 0.8
    assert found.regret_interval.low == 0 and found.regret_interval.high <= 0.25 + 1e-12
    # wrong pairs: 1 before 4, 3, 0; 4 before none; 3 before 0 and 2; 0 before none
    wrong = [(1, 4), (1, 0), (3, 0), (3, 2)]
    assert found.counterexamples == pytest.approx(len(wrong) / 10)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=9), st.floats(0, 2))
def test_counterexamples_are_counted_pair_by_pair(pairs: list[tuple[int, int]], noise: float) -> None:
    """Ordered wrongly, and by more than noise; ties in x order nothing."""
    x, y = (np.array(side, float) for side in zip(*pairs, strict=True))
    wrong = sum(
        (x[i] - x[j]) * (y[i] - y[j]) > 0 and abs(y[i] - y[j]) > noise for i, j in combinations(range(len(x)), 2)
    )
    assert counterexamples(x, y, noise) == pytest.approx(wrong / math.comb(len(x), 2))
    assert math.isnan(counterexamples(x, y, math.nan))


def test_the_regret_of_noise_is_none_when_held_out() -> None:
    """All candidates are equal: the best looks better by noise alone, and on other seeds it does not."""
    y = np.random.default_rng(0).normal(size=(40, 3, 200))
    plain = np.mean([one.mean(1).max() - one.mean(1)[0] for one in np.moveaxis(y, 2, 0)])
    held = np.mean([held_out_regret(one, 0) for one in np.moveaxis(y, 2, 0)])
    assert plain > 1 and abs(held) < 0.2
    assert math.isnan(held_out_regret(y[:, :1, 0], 0)) and math.isnan(held_out_regret(None, 0))


def test_ties_at_the_border_of_the_top_share_its_places() -> None:
    """Two of four for one place count half each; a constant side overlaps as chance does."""
    assert top_overlap(np.array([1, 1, 2, 3.0]), np.array([5, 4, 3, 2.0]), 1) == pytest.approx(0.5)
    assert top_overlap(np.ones(10), np.arange(10.0), 3) == pytest.approx(0.3)
    assert top_overlap(-np.arange(10.0), np.arange(10.0), 4) == 1


# -- power ---------------------------------------------------------------------------------------------


def test_power_falls_with_candidates_and_is_none_for_five() -> None:
    """About 0.18 with 100 candidates; published tables have 0.19."""
    assert math.isnan(detectable(5))
    assert detectable(100) == pytest.approx(0.187, abs=0.002)
    assert detectable(50) > detectable(252) > detectable(10_000)


def test_what_would_settle_the_sign() -> None:
    """So many candidates more make this tau detectable, one fewer does not; a settled sign needs none."""
    found = power_of(40, -0.12, 0.28, Noise(1), grows=True)
    whole = 40 + int(found.more_candidates)
    assert detectable(whole) <= 0.12 < detectable(whole - 1)
    assert math.isnan(found.more_seeds)
    assert math.isnan(power_of(40, -0.12, 0.28, Noise(1), grows=False).more_candidates)
    settled = power_of(40, -0.5, 1e-6, Noise(3), grows=True)
    assert (settled.more_candidates, settled.more_seeds) == (0, 0)
    assert math.isnan(power_of(40, 0.0, 1.0, Noise(1), grows=True).more_candidates)


def test_more_seeds_help_as_far_as_noise_hides_tau() -> None:
    """A tau that noise has halved shows with more seeds; one that is small without noise never does."""
    noisy = Noise(2, reliability=0.4, reliability_one=0.25, corrected=-0.45)
    found = power_of(100, -0.15, 0.2, noisy, grows=False)
    assert found.more_seeds >= 1
    needed = 2 + int(found.more_seeds)
    reliability = needed * 0.25 / (1 + (needed - 1) * 0.25)
    reached = 2 / math.pi * math.asin(math.sin(math.pi / 2 * 0.45) * math.sqrt(reliability))
    assert reached >= detectable(100)
    assert math.isnan(
        power_of(100, -0.02, 0.8, Noise(2, 0.9, reliability_one=0.8, corrected=-0.03), grows=True).more_seeds
    )
