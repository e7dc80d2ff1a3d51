"""A candidate is a number: the same units on every machine, whatever is drawn besides."""

from __future__ import annotations

import math
from itertools import combinations, islice, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from pruners.candidates import (
    Space,
    draws,
    n_removed,
    rank_combination,
    sampled,
    unrank_combination,
)
from pruners.criteria import own_norms
from pruners.pruners import choose

C10_2 = Space(((10, 2),))
HUGE = Space(((16, 8),) * 27)
"""The 27 prunable layers of resnet56: 12,870 combinations each, 369 bits in all."""

layers = st.integers(1, 14).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n)))
spaces = st.lists(layers, min_size=1, max_size=4).map(lambda found: Space(tuple(found)))
small_spaces = spaces.filter(lambda space: space.size <= 300)


@given(st.data())
def test_rank_is_the_inverse_of_unrank(data: st.DataObject) -> None:
    """A number names one candidate and a candidate one number, in spaces of several layers."""
    space = data.draw(spaces)
    rank = data.draw(st.integers(0, space.size - 1))
    assert space.rank(space.unrank(rank)) == rank


@given(small_spaces)
def test_the_order_is_that_of_itertools(space: Space) -> None:
    """Anyone can recompute the numbering with the standard library, last layer fastest."""
    expected = list(product(*(combinations(range(n), k) for n, k in space.layers)))
    assert [space.unrank(rank) for rank in range(space.size)] == expected
    assert len(expected) == space.size


@pytest.mark.parametrize("rank", [-1, 45])
def test_a_rank_outside_the_space_is_refused(rank: int) -> None:
    """No candidate is silently taken for another one."""
    with pytest.raises(ValueError, match="outside"):
        C10_2.unrank(rank)


@pytest.mark.parametrize("units", [(0,), (0, 1, 2), (1, 0), (1, 1), (-1, 3), (3, 10)])
def test_what_is_no_combination_has_no_rank(units: tuple[int, ...]) -> None:
    """A set of the wrong size, order or range is an error, not some other candidate's number."""
    with pytest.raises(ValueError, match="not 2 ascending units of 10"):
        rank_combination(10, 2, units)


@pytest.mark.parametrize(
    ("n", "ratio", "removed"),
    [
        (10, 0.3, 3),
        (10, 0.7, 7),
        (10, 0.2, 2),
        (3, 1 / 3, 1),
        (10, 0.05, 0),
        (10, 0.99, 9),
        (16, 0.4375, 7),
        (120, 0.433, 51),
        (1024, 0.4316, 441),
        (10, 0.9999999999, 10),
    ],
)
def test_the_rounding_rule(n: int, ratio: float, removed: int) -> None:
    """floor(n * ratio + 1e-9): ten filters at 0.3 and 0.7 lose three and seven, whatever the float says."""
    assert n_removed(n, ratio) == removed


@given(st.data())
def test_a_ratio_of_whole_units_removes_them(data: st.DataObject) -> None:
    """k of n units written as the ratio k / n are k units, for every n a layer may have."""
    n = data.draw(st.integers(1, 20_000))
    k = data.draw(st.integers(0, n))
    assert n_removed(n, k / n) == k


@given(st.data())
def test_every_candidate_removes_what_the_ratio_says(data: st.DataObject) -> None:
    """All candidates of a cell have the same size: n_removed ascending units of each layer."""
    units = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    ratios = data.draw(st.lists(st.floats(0.01, 0.99), min_size=len(units), max_size=len(units)))
    space = Space.of(units, ratios)
    removal = space.unrank(data.draw(st.integers(0, space.size - 1)))
    for n, ratio, removed in zip(units, ratios, removal, strict=True):
        assert len(removed) == math.floor(n * ratio + 1e-9)
        assert list(removed) == sorted(set(removed) & set(range(n)))


@given(small_spaces, st.integers(0, 5))
def test_draws_take_every_candidate_once(space: Space, seed: int) -> None:
    """Sampling is without replacement, and a sample of everything is everything."""
    assert sorted(draws(space, seed)) == list(range(space.size))


@given(small_spaces, st.integers(0, 5), st.data())
def test_a_draw_does_not_depend_on_the_count(space: Space, seed: int, data: st.DataObject) -> None:
    """A sweep can grow: the first draws of a larger sample are those of the smaller one."""
    few = data.draw(st.integers(0, space.size))
    many = data.draw(st.integers(few, space.size))
    assert sampled(space, seed, many)[:few] == sampled(space, seed, few)


def test_the_first_draws_are_pinned() -> None:
    """Rows name candidates by draw index, so these numbers can never change."""
    assert sampled(C10_2, 0, 5) == [11, 43, 30, 36, 2]
    assert sampled(Space(((10, 5), (10, 5))), 7, 5) == [7353, 3551, 29485, 46665, 26078]


def test_seeds_spaces_and_streams_draw_apart() -> None:
    """Another sampling seed, and the pruner `random`, draw other candidates."""
    kinds = [sampled(C10_2, 0, 20), sampled(C10_2, 1, 20), list(islice(draws(C10_2, 0, "random"), 20))]
    assert len({tuple(kind) for kind in kinds}) == 3


def test_draws_are_uniform() -> None:
    """No candidate is favoured: 45 is no power of two, so taking bits modulo 45 would show here."""
    first = [next(draws(C10_2, seed)) for seed in range(4500)]
    counts = [first.count(rank) for rank in range(45)]
    assert stats.chisquare(counts).pvalue > 0.01


def test_huge_spaces() -> None:
    """Spaces far beyond 256 bits are numbered and drawn as small ones are, each layer evenly."""
    assert HUGE.size == math.comb(16, 8) ** 27
    found = sampled(HUGE, 0, 1000)
    assert len(set(found)) == 1000
    for layer in range(27):
        removals = [HUGE.unrank(rank)[layer] for rank in found]
        counts = [sum(unit in removal for removal in removals) for unit in range(16)]
        assert all(abs(count - 500) < 5 * math.sqrt(250) for count in counts)
    assert all(HUGE.rank(HUGE.unrank(rank)) == rank for rank in [0, HUGE.size - 1, *found[:10]])


def test_more_samples_than_candidates_are_refused() -> None:
    """A sample larger than the space is an error, not an endless loop."""
    with pytest.raises(ValueError, match="46 samples of 45 candidates"):
        sampled(C10_2, 0, 46)


def filters(norms: list[list[float]]) -> torch.Tensor:
    """A layer's weights [F, 1, 1, n] from one list per filter."""
    return torch.tensor(norms)[:, None, None, :]


def by_norm(pruner: str, weights: dict[str, torch.Tensor], ratios: dict[str, float]) -> dict[str, tuple[int, ...]]:
    """What a pruner removes of layers with these weights."""
    layers = {name: nn.Linear(1, len(weight)) for name, weight in weights.items()}
    for name, layer in layers.items():
        layer.weight = nn.Parameter(weights[name])
    model = nn.ModuleDict(layers)
    units = {name: len(weight) for name, weight in weights.items()}
    importances = {name: own_norms(model, name, n)[pruner].needed(name, pruner) for name, n in units.items()}
    return choose(pruner, units, ratios, importances=importances)


def test_l1_and_l2_are_the_norms_they_are_called() -> None:
    """l1 takes the filter of the lowest absolute sum, l2 that of the lowest euclidean norm."""
    weights = {"conv1": filters([[3.0, 0.0], [-2.0, -2.0], [9.0, 9.0]])}
    assert by_norm("l1", weights, {"conv1": 0.34}) == {"conv1": (0,)}
    assert by_norm("l2", weights, {"conv1": 0.34}) == {"conv1": (1,)}


@given(st.lists(st.integers(-3, 3), min_size=2, max_size=64), st.floats(0.01, 0.99), st.sampled_from(["l1", "l2"]))
def test_criteria_remove_the_lowest_and_break_ties_by_index(values: list[int], ratio: float, pruner: str) -> None:
    """The filters of the lowest norm go, and among equals those of the lowest index."""
    k = n_removed(len(values), ratio)
    expected = sorted(range(len(values)), key=lambda unit: (abs(values[unit]), unit))[:k]
    weights = {"conv1": filters([[float(value), 0.0] for value in values])}
    assert by_norm(pruner, weights, {"conv1": ratio}) == {"conv1": tuple(sorted(expected))}


def test_layers_are_told_apart() -> None:
    """Each layer is scored by its own weights and loses by its own ratio."""
    weights = {"a": filters([[1.0], [2.0], [3.0], [4.0]]), "b": filters([[4.0], [3.0], [2.0], [1.0]])}
    assert by_norm("l1", weights, {"a": 0.25, "b": 0.5}) == {"a": (0,), "b": (2, 3)}


def test_random_depends_on_pruner_seed_only() -> None:
    """The pruner `random` draws from pruner_seed: neither candidate nor sampling seed move it."""
    ratios, units = {"conv1": 0.5, "conv2": 0.3}, {"conv1": 10, "conv2": 10}
    found = choose("random", units, ratios, pruner_seed=3)
    assert choose("random", units, ratios, pruner_seed=3, candidate=7, sampling_seed=9) == found
    assert [len(units) for units in found.values()] == [5, 3]
    seeds = {tuple(choose("random", units, ratios, pruner_seed=seed).values()) for seed in range(8)}
    assert len(seeds) == 8


def test_oracle_candidate_k_is_the_kth_combination() -> None:
    """With mode all, the candidate number is the rank."""
    expected = product(combinations(range(6), 2), combinations(range(5), 2))
    for candidate, removal in enumerate(expected):
        found = choose("oracle", {"a": 6, "b": 5}, {"a": 0.34, "b": 0.4}, candidate=candidate)
        assert tuple(found.values()) == removal


@pytest.mark.parametrize("candidate", [0, 1, 255, 256, 700])
def test_oracle_sample_k_is_the_kth_draw(candidate: int) -> None:
    """With mode sample, the candidate number is the draw index, also beyond the blocks draws are kept in."""
    space = Space(((12, 6),))
    found = choose("oracle", {"a": 12}, {"a": 0.5}, candidate=candidate, sampling_seed=4)
    rank = sampled(space, 4, candidate + 1)[candidate]
    assert found == {"a": unrank_combination(12, 6, rank)}
