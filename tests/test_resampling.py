"""Resamples and their intervals, against scipy's bootstrap and by what must hold."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from storage.statistics import kendall, kendall_ci, pearson, spearman
from storage.statistics.p_values import benjamini_hochberg, holm, kendall_p, product_p
from storage.statistics.records import NO_INTERVAL, Interval
from storage.statistics.resampling import (
    Statistic,
    bca,
    interval,
    jackknife_tau_interval,
    left_out,
    pearson_of,
    percentile,
    resampled,
    resampled_parts,
    seed_of,
    spearman_of,
    tau_difference,
    tau_of,
)

PAIRS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=2, max_size=14)
MAKERS = {"tau": (tau_of, kendall), "spearman": (spearman_of, spearman), "pearson": (pearson_of, pearson)}


def _draw(n: int, seed: int = 0, step: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """x and y correlated at about -0.6; with a `step` they are rounded to it, which makes ties."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=n)
    y = -0.75 * x + 0.66 * generator.normal(size=n)
    return (x, y) if not step else (np.round(x / step) * step, np.round(y / step) * step)


@pytest.mark.parametrize("name", MAKERS)
@given(pairs=PAIRS, seed=st.integers(0, 99))
def test_a_statistic_of_counts_is_that_of_the_repeated_candidates(
    name: str, pairs: list[tuple[int, int]], seed: int
) -> None:
    """Counting a candidate twice is having it twice; ones are the data, a zero leaves one out."""
    x, y = (np.array(side, dtype=float) for side in zip(*pairs, strict=True))
    made, direct = MAKERS[name]
    counts = np.concatenate([resampled(len(x), 3, seed), np.ones((1, len(x))), left_out(len(x))])
    for line, value in zip(counts.astype(int), made(x, y)(counts), strict=True):
        again = np.repeat(np.arange(len(x)), line)
        assert value == pytest.approx(direct(x[again], y[again])[0], nan_ok=True, abs=1e-9)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("step", [0.0, 0.5])
def test_bca_is_scipys(name: str, step: float) -> None:
    """The same resamples give scipy's BCa interval: two implementations, one formula."""
    x, y = _draw(40, step=step)
    made, direct = MAKERS[name]
    counts = resampled(40, 400, seed=5)
    own = interval(made(x, y), 40, counts)

    class Replayed(np.random.Generator):
        """Hands scipy our resamples."""

        def integers(self, *_: object, size: tuple[int, ...], **__: object) -> np.ndarray:  # pyright: ignore[reportIncompatibleMethodOverride]
            assert size == (400, 40)
            return np.array([np.repeat(np.arange(40), line) for line in counts.astype(int)])

    found = stats.bootstrap(
        (x, y),
        lambda a, b: direct(a, b)[0],
        paired=True,
        vectorized=False,
        n_resamples=400,
        rng=Replayed(np.random.PCG64(0)),
        method="BCa",
    )
    limits = found.confidence_interval
    assert (own.low, own.high) == pytest.approx((limits.low, limits.high), abs=1e-6)


def test_resamples_are_of_n_and_always_the_same() -> None:
    """Every resample draws n; the seed decides; parts cover them all."""
    counts = resampled(17, 50, seed=3)
    assert (counts.sum(1) == 17).all() and (counts >= 0).all()
    assert (counts == resampled(17, 50, seed=3)).all() and (counts != resampled(17, 50, seed=4)).any()
    assert sum(len(part) for part in resampled_parts(10**6, 70, seed=0)) == 70


def test_what_says_nothing_has_no_interval() -> None:
    """A perfect order, a constant side, four candidates: no interval, never one of width zero."""
    x = np.arange(10.0)
    assert interval(tau_of(x, -x), 10, resampled(10, 200, 0)) == NO_INTERVAL
    for a, b in ((x, -x), (x, np.ones(10)), (x[:4], x[:4][::-1] ** 2), (x[:0], x[:0])):
        assert np.isnan(kendall_ci(a, b)).all()
    assert bca(float("nan"), np.ones(9), np.ones(9)) == percentile(np.array([])) == NO_INTERVAL


def test_the_interval_of_a_list_is_that_of_its_pairs() -> None:
    """kendall_ci, of lists with holes, holds tau between its ends."""
    x, y = _draw(60)
    low, high = kendall_ci(x, y)
    assert low < kendall(x, y)[0] < high
    assert kendall_ci([*x, None, 1.0], [*y, 0.3, float("nan")]) == (low, high)


def test_the_difference_of_two_taus_is_of_the_same_resamples() -> None:
    """Against tau of candidates repeated one resample at a time; nothing of nothing, and 0 of a cell with itself."""
    x, y = _draw(30)
    other = (np.random.default_rng(9).normal(size=30), y + 0.1 * x)
    draws = []
    for line in resampled(30, 2000, seed_of(y)).astype(int):
        again = np.repeat(np.arange(30), line)
        draws.append(kendall(other[0][again], other[1][again])[0] - kendall(x[again], y[again])[0])
    found = tau_difference((x, y), other)
    assert (found.low, found.high) == pytest.approx(np.quantile(draws, [0.025, 0.975]))
    assert tau_difference((x, y), (x, y)) == Interval(0, 0)
    assert tau_difference((x, y), (x, np.ones(30))) == tau_difference((x[:4], y[:4]), (x[:4], y[:4])) == NO_INTERVAL


def test_of_many_candidates_the_jackknife_stands_in() -> None:
    """Beyond the largest matrix the normal interval is used; where both can be had they nearly agree."""
    x, y = _draw(400, step=0.05)
    exact = interval(tau_of(x, y), 400, resampled(400, 2000, 1))
    quick = jackknife_tau_interval(x, y)
    assert (quick.low, quick.high) == pytest.approx((exact.low, exact.high), abs=0.01)
    x, y = _draw(3500)
    low, high = kendall_ci(x, y)
    assert low < kendall(x, y)[0] < high and high - low < 0.05


# -- p -------------------------------------------------------------------------------------------------


@given(PAIRS.filter(lambda pairs: len(pairs) < 7))
def test_p_of_few_is_a_count_of_all_orders(pairs: list[tuple[int, int]]) -> None:
    """With ties too: the share of the orders of y that are at least as far from zero."""
    from itertools import permutations

    x, y = (np.array(side, dtype=float) for side in zip(*pairs, strict=True))
    p, method = kendall_p(x, y, 0.5)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        assert np.isnan(p) and method == ""
        return
    found = abs(kendall(x, y)[0])
    as_far = [abs(kendall(x, order)[0]) >= found - 1e-9 for order in permutations(y)]
    assert (p, method) == (pytest.approx(np.mean(as_far)), "exact")


def test_p_says_how_it_was_found() -> None:
    """Exact without ties, by permutation with them, scipy's asymptotic beyond fifty; all near each other."""
    x, y = _draw(30)
    rounded = _draw(30, step=0.4)
    want = stats.kendalltau(x, y, method="exact").pvalue  # pyright: ignore[reportAttributeAccessIssue]
    assert kendall_p(x, y, 0.5) == (want, "exact")
    assert kendall_p(*rounded, 1e-9) == (1e-9, "asymptotic")  # no order of 9,999 is as far: 1e-4 would be a floor
    faint = np.round(np.random.default_rng(2).normal(size=(2, 30)))
    p, method = kendall_p(faint[0], faint[1], 0.5)
    assert method == "permutation" and p == pytest.approx(kendall(faint[0], faint[1])[1], abs=0.03)
    assert kendall_p(*_draw(51), 0.25) == (0.25, "asymptotic")
    weak = np.random.default_rng(1).normal(size=(2, 40))
    assert product_p(weak[0], weak[1], 0.5) == pytest.approx(pearson(*weak)[1], abs=0.02)


@given(st.lists(st.floats(0, 1) | st.just(float("nan")), max_size=8))
def test_families_by_their_definitions(p: list[float]) -> None:
    """Holm and Benjamini-Hochberg, written out; NaN is in no family."""
    there = sorted(value for value in p if value == value)
    m = len(there)
    stepped = [max(min((m - k) * there[k], 1) for k in range(rank + 1)) for rank in range(m)]
    rates = [min(min(m * there[k] / (k + 1), 1) for k in range(rank, m)) for rank in range(m)]
    for value, by_holm, by_rate in zip(p, holm(p), benjamini_hochberg(p), strict=True):
        if value != value:
            assert by_holm != by_holm and by_rate != by_rate
        else:
            last = m - 1 - there[::-1].index(value)
            assert by_holm == pytest.approx(stepped[last]) or by_holm == pytest.approx(stepped[there.index(value)])
            assert by_rate == pytest.approx(rates[there.index(value)]) or by_rate == pytest.approx(rates[last])


def test_statistics_are_typed_alike() -> None:
    """Every maker gives a Statistic."""
    makers: list[Statistic] = [maker(*_draw(9)) for maker, _ in MAKERS.values()]
    assert {one(np.ones((2, 9))).shape for one in makers} == {(2,)}
