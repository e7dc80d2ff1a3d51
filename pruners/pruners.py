"""Pruners: which units a task removes, given the dense weights and a candidate's number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from pruners.candidates import Removal, Space, draws, sampled

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Pruner:
    """What a pruner is to the grid: whether it has many candidates, and whether it draws."""

    name: str
    enumerates: bool = False
    draws: bool = False
    criterion: str | None = None
    needs_data: bool = False


PRUNERS: Mapping[str, Pruner] = {
    "oracle": Pruner("oracle", enumerates=True),
    "l1": Pruner("l1", criterion="l1"),
    "l2": Pruner("l2", criterion="l2"),
    "random": Pruner("random", draws=True),
}


def check_pruner(name: str) -> None:
    """Raise ValueError for a name that is no pruner, with those there are."""
    find_pruner(name)


def find_pruner(name: str) -> Pruner:
    """The pruner called `name`; `package.module:importance` is a criterion of a user's own. Raises ValueError."""
    if name not in PRUNERS:
        raise ValueError(f"unknown name {name!r}; allowed: {', '.join(PRUNERS)}")
    return PRUNERS[name]


def pruner_content(name: str) -> str | None:
    """The hash of a pruner that is a user's code; None for any other."""
    del name
    return None


def problem_of(pruner: str, scope: str, granularity: str, schedule: str) -> str | None:
    """Why these do not go together; None where they do."""
    if find_pruner(pruner).enumerates and scope == "global":
        return f"{pruner} has candidates per layer: scope global is for criteria and random"
    if find_pruner(pruner).enumerates and schedule != "one-shot":
        return f"a candidate of {pruner} is removed at once: schedule {schedule} is for criteria and random"
    return None


def choose(
    pruner: str,
    weights: Mapping[str, torch.Tensor],
    ratios: Mapping[str, float],
    *,
    candidate: int = 0,
    sampling_seed: int | None = None,
    pruner_seed: int | None = None,
) -> dict[str, tuple[int, ...]]:
    """The units to remove from each layer.

    `weights` are the dense network's, layer -> [F, ...], and `ratios` the pruning ratios of the same
    layers. `sampling_seed` is None when candidates are numbered over all combinations.
    """
    kind = PRUNERS[pruner]
    space = Space.of([len(weights[name]) for name in ratios], list(ratios.values()))
    if kind.criterion:
        removal = by_criterion(kind.criterion, [weights[name] for name in ratios], space)
    elif kind.draws:
        removal = space.unrank(next(draws(space, pruner_seed or 0, "random")))
    elif sampling_seed is None:
        removal = space.unrank(candidate)
    else:
        removal = space.unrank(_sampled(space, sampling_seed, candidate // 256)[candidate])
    return dict(zip(ratios, removal, strict=True))


def by_criterion(criterion: str, weights: list[torch.Tensor], space: Space) -> Removal:
    """The candidate that removes the least important units of each layer."""
    from pruners.criteria import CRITERIA, least_important

    importances = [CRITERIA[criterion](weight) for weight in weights]
    pairs = zip(importances, space.layers, strict=True)
    return tuple(least_important(importance, k) for importance, (_, k) in pairs)


@lru_cache(maxsize=64)
def _sampled(space: Space, seed: int, block: int) -> list[int]:
    """The draws up to the end of a block of 256, so that neighbours do not draw them all again."""
    return sampled(space, seed, min(space.size, 256 * (block + 1)))
