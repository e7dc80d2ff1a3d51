"""Whether intervals hold what they promise, in simulations of cells with a known truth: `make test-all`.

Each coverage is of 1,000 simulated cells (95 % of them give 95 % within 1.4 points), with 1,000 resamples a cell.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from storage.correlate import CellData
from storage.criteria import bench
from storage.statistics import kendall
from storage.statistics.noise import ceiling, noise_of
from storage.statistics.picks import picks_of
from storage.statistics.power import detectable, power_of
from storage.statistics.records import Interval, Noise, Picks
from storage.statistics.resampling import interval, resampled, tau_of

pytestmark = pytest.mark.slow

CELLS, RESAMPLES = 1000, 1000


def _pairs(n: int, r: float, step: float = 0.0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Normal x and y with correlation r; accuracies are counted in samples, so y may be rounded to a `step`."""
    for seed in range(CELLS):
        x, e = np.random.default_rng([seed, n]).normal(size=(2, n))
        y = r * x + math.sqrt(1 - r * r) * e
        yield x, (np.round(y / step) * step if step else y)


def _seeded(n: int, k: int, noise: float, r: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """x, and y by seed, with so much noise of a standard deviation of 1 of the true y."""
    for seed, (x, y) in enumerate(_pairs(n, r)):
        yield x, y[:, None] + noise * np.random.default_rng([seed, n, k]).normal(size=(n, k))


def _coverage(what: str, truth: float, intervals: Iterator[Interval], cells: int = CELLS) -> float:
    found = list(intervals)
    assert len(found) == cells and not any(math.isnan(one.low) for one in found)
    share = float(np.mean([one.low <= truth <= one.high for one in found]))
    print(f"\n{what}: {share:.1%} of {cells} intervals hold the truth")  # docs/statistics.md has these
    return share


@pytest.mark.parametrize(
    ("n", "r", "step", "least"),
    [
        (10, -0.3, 0, 0.92),
        (20, -0.3, 0, 0.92),
        (45, -0.3, 0, 0.93),
        (120, -0.3, 0, 0.935),
        (45, 0, 0, 0.93),
        (45, -0.9, 0, 0.93),
    ],
)
def test_tau(n: int, r: float, step: float, least: float) -> None:
    """BCa intervals of tau-b of 20 to 120 candidates."""
    found = (interval(tau_of(x, y), n, resampled(n, RESAMPLES, at)) for at, (x, y) in enumerate(_pairs(n, r, step)))
    assert least <= _coverage(f"tau, n = {n}, r = {r}", 2 / math.pi * math.asin(r), found) <= 0.975


def test_tau_with_ties() -> None:
    """Accuracies of a small test set: y takes about a dozen values. The truth is of 20,000 such pairs."""
    n, r, step = 60, -0.5, 0.5
    x, e = np.random.default_rng(0).normal(size=(2, 20_000))
    truth = kendall(x, np.round((r * x + math.sqrt(1 - r * r) * e) / step) * step)[0]
    found = (interval(tau_of(x, y), n, resampled(n, RESAMPLES, at)) for at, (x, y) in enumerate(_pairs(n, r, step)))
    assert 0.93 <= _coverage(f"tau with ties, n = {n}", truth, found) <= 0.975


@pytest.mark.parametrize(("n", "k", "noise"), [(20, 2, 0.5), (45, 3, 1.0), (100, 5, 2.0)])
def test_reliability_ceiling_and_corrected_tau(n: int, k: int, noise: float) -> None:
    """Exact intervals of the ICC and the ceiling that follows; BCa ones of tau freed from noise, where there is one."""
    r, known = -0.6, 1 / (1 + noise**2 / k)
    found = [noise_of(x, y, RESAMPLES, at) for at, (x, y) in enumerate(_seeded(n, k, noise, r))]
    assert 0.93 <= _coverage(f"reliability, {n} x {k}", known, (one.reliability_interval for one in found)) <= 0.97
    assert 0.93 <= _coverage(f"ceiling, {n} x {k}", ceiling(known), (one.ceiling_interval for one in found)) <= 0.97
    assert np.median([one.ceiling for one in found]) == pytest.approx(ceiling(known), abs=0.02)
    given = [one for one in found if not one.why_not]
    truth = 2 / math.pi * math.asin(r)
    covered = _coverage(f"corrected, {n} x {k}", truth, (one.corrected_interval for one in given), len(given))
    assert len(given) > 0.9 * CELLS and 0.92 <= covered <= 0.98
    assert np.median([one.corrected for one in given]) == pytest.approx(truth, abs=0.03)


def test_the_anomaly_ratio_and_the_regret() -> None:
    """Percentile intervals, of what cells of this size have on average: rough statistics, so wide ones."""
    n, r = 45, -0.5

    def picks(parts: Callable[[int], list[np.ndarray]]) -> list[Picks]:
        nothing = math.nan
        return [picks_of(x, y, None, np.arange(n), nothing, parts(at)) for at, (x, y) in enumerate(_pairs(n, r))]

    found = picks(lambda at: [resampled(n, RESAMPLES, at)])
    for name in ("anomaly", "regret"):
        truth = float(np.mean([getattr(one, "anomaly_ratio" if name == "anomaly" else name) for one in found]))
        assert 0.9 <= _coverage(name, truth, (getattr(one, f"{name}_interval") for one in found)) <= 1


@pytest.mark.parametrize("n", [20, 45, 120])
def test_power_is_what_it_says(n: int) -> None:
    """Of cells with the detectable tau as their true one, about 80 % are found at 5 %."""
    r = -math.sin(math.pi / 2 * detectable(n))
    found = np.mean([kendall(x, y)[1] <= 0.05 for x, y in _pairs(n, r)])
    assert found == pytest.approx(0.8, abs=0.06)


def test_so_many_candidates_settle_the_sign() -> None:
    """Cells grown to what was advised find the tau the advice was for in about 80 %."""
    tau = -0.2
    n = 40 + int(power_of(40, tau, 0.2, Noise(1), grows=True).more_candidates)
    found = np.mean([kendall(x, y)[1] <= 0.05 for x, y in _pairs(n, math.sin(math.pi / 2 * tau))])
    assert found == pytest.approx(0.8, abs=0.06)


def test_two_criteria_that_predict_alike_rarely_differ() -> None:
    """Of cells in which both are as good, the paired test of their difference finds one in about 5 %."""
    n = 45
    found = []
    for seed, (x, y) in enumerate(_pairs(n, -0.5)):
        one, other = (x + 0.7 * e for e in np.random.default_rng([seed, 7]).normal(size=(2, n)))
        columns = {"score_l1": one.tolist(), "score_l2": other.tolist(), "best_test_accuracy": y.tolist()}
        _, (pair,) = bench([CellData("c", "c", list(range(n)), columns, n, 1)], "best_test_accuracy", resamples=400)
        found.append(pair.p)
    assert 0.03 <= np.mean(np.array(found) <= 0.05) <= 0.075
