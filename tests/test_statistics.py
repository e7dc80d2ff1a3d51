"""The statistics of one cell, against definitions written out here."""

import math
import warnings
from itertools import combinations, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.statistics import (
    anomaly_ratio,
    better_than_picked,
    correlation,
    correlations,
    higher_is_better,
    kendall,
    lowest,
    paired,
    pearson,
    spearman,
)

NAN = math.nan
PAIRS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12)


def _tau_b(x: list[int], y: list[int]) -> float:
    """Kendall's tau-b by its definition: concordant less discordant pairs, over pairs untied in x and in y."""
    pairs = list(combinations(range(len(x)), 2))
    untied_x = sum(x[i] != x[j] for i, j in pairs)
    untied_y = sum(y[i] != y[j] for i, j in pairs)
    score = sum(np.sign(x[i] - x[j]) * np.sign(y[i] - y[j]) for i, j in pairs)
    return score / math.sqrt(untied_x * untied_y) if untied_x and untied_y else NAN


def _ranks(x: list[int]) -> list[float]:
    """Ranks, ties at their mean."""
    return [sum(other < one for other in x) + (sum(other == one for other in x) - 1) / 2 for one in x]


def _pearson(x: list[float], y: list[float]) -> float:
    """Pearson's r by its definition."""
    a, b = (np.array(values) - np.mean(values) for values in (x, y))
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


@settings(deadline=None)
@given(PAIRS)
def test_kendall_is_tau_b(pairs: list[tuple[int, int]]) -> None:
    """Ties count as tau-b counts them, and a constant side gives NaN."""
    x, y = (list(side) for side in zip(*pairs, strict=True))
    assert kendall(x, y)[0] == pytest.approx(_tau_b(x, y), nan_ok=True, abs=1e-12)


@settings(deadline=None)
@given(PAIRS)
def test_spearman_is_pearson_of_ranks(pairs: list[tuple[int, int]]) -> None:
    """Spearman's rho and Pearson's r are what their definitions say, ties at the mean rank."""
    x, y = (list(side) for side in zip(*pairs, strict=True))
    if len(set(x)) > 1 and len(set(y)) > 1:
        assert spearman(x, y)[0] == pytest.approx(_pearson(_ranks(x), _ranks(y)), abs=1e-12)
        assert pearson(x, y)[0] == pytest.approx(_pearson(list(x), list(y)), abs=1e-12)


def test_the_p_of_kendall_is_exact_for_few_candidates() -> None:
    """p is the share of all orders at least as far from zero: two-sided, counted here for five candidates."""
    x, y = [1, 2, 3, 4, 5], [2, 1, 3, 5, 4]
    tau = _tau_b(x, y)
    orders = [_tau_b(x, list(order)) for order in permutations(y)]
    share = sum(abs(other) >= abs(tau) - 1e-12 for other in orders) / len(orders)
    assert kendall(x, y) == (pytest.approx(tau), pytest.approx(share))


def test_values_known_from_a_table() -> None:
    """A perfect order is 1, a reversed one -1, and r sees a line where tau sees an order."""
    x = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    found = correlation(x, [value**9 for value in x])
    assert (found.n, found.dropped, found.kendall, found.spearman) == (6, 0, pytest.approx(1), pytest.approx(1))
    assert 0.5 < found.pearson < 0.99
    assert kendall(x, x[::-1]) == (pytest.approx(-1), pytest.approx(2 / math.factorial(6)))
    assert pearson(x, [2 - value for value in x])[0] == pytest.approx(-1)


@pytest.mark.parametrize("hole", [None, NAN, math.inf, -math.inf])
def test_pairs_with_a_hole_are_dropped_and_counted(hole: float | None) -> None:
    """A null, a NaN or an infinity on either side takes its pair out and nothing else."""
    x = [3, hole, 1, 2, hole, 5]
    y = [4, 2, 1, hole, hole, 3]
    found = correlation(x, y)
    assert (found.n, found.dropped) == (3, 3)
    full = correlation([3, 1, 5], [4, 1, 3])
    assert (found.kendall, found.spearman, found.pearson) == (full.kendall, full.spearman, full.pearson)
    assert (found.kendall_p, found.spearman_p, found.pearson_p) == (full.kendall_p, full.spearman_p, full.pearson_p)
    assert anomaly_ratio(x, y) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("x", "y"), [([], []), ([1], [2]), ([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [5, 5, 5]), ([None, 1], [2, None])]
)
def test_what_is_not_defined_is_nan(x: list[float], y: list[float]) -> None:
    """Fewer than two pairs or a constant side give NaN everywhere: no crash, no 0, no 1, no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = correlation(x, y)
    numbers = [found.kendall, found.kendall_p, found.spearman, found.spearman_p, found.pearson, found.pearson_p]
    assert all(math.isnan(number) for number in numbers)
    assert found.n + found.dropped == len(x)


@settings(deadline=None)
@given(st.lists(PAIRS, max_size=5))
def test_many_at_once_are_what_each_is_alone(cells: list[list[tuple[int, int]]]) -> None:
    """Cells of equal and of different size, with ties, holes and constant sides, in any order."""
    sides = [([x if x < 5 else None for x, _ in cell], [y for _, y in cell]) for cell in cells]
    found = correlations(sides)
    assert [(one.n, one.dropped) for one in found] == [(len(p[0]), p[2]) for p in (paired(x, y) for x, y in sides)]
    for one, (x, y) in zip(found, sides, strict=True):
        numbers = (one.kendall, one.kendall_p, one.spearman, one.spearman_p, one.pearson, one.pearson_p)
        alone = (*kendall(x, y), *spearman(x, y), *pearson(x, y))
        assert numbers == pytest.approx(alone, nan_ok=True, rel=1e-12)


def test_lists_of_different_length_are_an_error() -> None:
    """Values that are no pairs never are paired by chance."""
    for test in (paired, kendall, spearman, pearson, correlation, anomaly_ratio):
        with pytest.raises(ValueError, match="different length: 2 and 1"):
            test([1.0, 2.0], [1.0])


def test_anomaly_ratio_by_hand() -> None:
    """The share strictly better than the candidate of lowest loss, which counts below the line."""
    loss = [0.5, 0.2, 0.9, 0.4, 0.3]
    accuracy = [0.9, 0.8, 0.8, 0.7, 0.95]
    assert anomaly_ratio(loss, accuracy) == pytest.approx(2 / 5)  # 0.9 and 0.95 beat 0.8; the other 0.8 does not
    assert anomaly_ratio(loss, accuracy, higher=False) == pytest.approx(1 / 5)  # as if it were a loss: 0.7
    picked = lowest(np.array(loss))
    assert picked == 1
    better = better_than_picked(np.array(loss), np.array(accuracy))
    assert better.tolist() == [True, False, False, False, True]


def test_of_equal_losses_the_first_is_picked() -> None:
    """Ties go to the lowest index, so that the ratio does not depend on the machine."""
    assert anomaly_ratio([1, 1, 2], [0.5, 0.9, 0.7]) == pytest.approx(2 / 3)
    assert anomaly_ratio([1, 1, 2], [0.9, 0.5, 0.7]) == 0


def test_anomaly_ratio_of_one_candidate_is_nan() -> None:
    """One candidate cannot be picked wrongly or rightly."""
    assert math.isnan(anomaly_ratio([1], [1]))
    assert math.isnan(anomaly_ratio([], []))
    assert math.isnan(anomaly_ratio([1, NAN], [1, 2]))


@settings(deadline=None)
@given(PAIRS.filter(lambda pairs: len(pairs) > 1), st.booleans())
def test_anomaly_ratio_is_a_share(pairs: list[tuple[int, int]], higher: bool) -> None:
    """It is a count over n in [0, 1), and 0 exactly when the picked candidate is among the best."""
    x, y = (list(side) for side in zip(*pairs, strict=True))
    found, chosen = anomaly_ratio(x, y, higher=higher), y[x.index(min(x))]
    if len(set(x)) == 1 or len(set(y)) == 1:  # nothing to pick by, or nothing to win
        assert math.isnan(found)
        return
    assert 0 <= found < 1
    assert found * len(x) == pytest.approx(sum(value > chosen if higher else value < chosen for value in y))
    assert (found == 0) == (chosen == (max(y) if higher else min(y)))


@pytest.mark.parametrize(
    ("column", "higher"),
    [
        ("best_test_accuracy", True),
        ("last5_test_accuracy_mean", True),
        ("score_l1", True),
        ("best_test_loss", False),
        ("last5_test_loss_mean", False),
        ("pruned_train_loss", False),
    ],
)
def test_losses_are_better_when_lower(column: str, higher: bool) -> None:
    """`corr --y` counts the right candidates as better for losses and accuracies."""
    assert higher_is_better(column) is higher
