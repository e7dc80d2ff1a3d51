"""Pruners: which units a task removes, given their importances, or a candidate's number."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from pruners.candidates import Space, draws, n_removed, priorities, sampled
from pruners.criteria import CRITERIA

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Pruner:
    """What a pruner is to the grid: whether it has many candidates, whether it draws, and by which criterion
    it chooses; one that `needs_data` looks at the calibration samples."""

    name: str
    enumerates: bool = False
    draws: bool = False
    criterion: str | None = None
    needs_data: bool = False


PRUNERS: Mapping[str, Pruner] = {
    "oracle": Pruner("oracle", enumerates=True),
    "random": Pruner("random", draws=True),
    **{name: Pruner(name, criterion=name, needs_data=one.needs != "weights") for name, one in CRITERIA.items()},
}

OF_WEIGHTS = ("oracle", "l1", "random")
"""The pruners that choose single weights."""


def check_pruner(name: str) -> None:
    """Raise ValueError for a name that is no pruner, with those there are, or of code that is not there."""
    find_pruner(name)
    pruner_content(name)


def find_pruner(name: str) -> Pruner:
    """The pruner called `name`; `package.module:importance` is a criterion of a user's own. Raises ValueError."""
    if name in PRUNERS:
        return PRUNERS[name]
    if ":" in name:
        import usercode

        if usercode.is_code(name):
            return Pruner(name, criterion=name, needs_data=True)
    close = difflib.get_close_matches(name, PRUNERS, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise ValueError(f"unknown name {name!r}; allowed: {', '.join(PRUNERS)}, or package.module:importance{hint}")


def pruner_content(name: str) -> str | None:
    """The hash of a pruner that is a user's code; None for any other."""
    if name in PRUNERS:
        return None
    import usercode

    return usercode.fingerprint(name)


def steps_of(schedule: str) -> int:
    """How many steps of pruning and retraining a schedule has. Raises ValueError for what is no schedule."""
    if schedule == "one-shot":
        return 1
    kind, _, number = schedule.partition("-")
    if kind != "iterative" or not number.isdecimal() or number != str(int(number)) or int(number) < 2:
        raise ValueError(f"unknown schedule {schedule!r}; allowed: one-shot, iterative-N with N from 2 (iterative-5)")
    return int(number)


def problem_of(pruner: str, scope: str, granularity: str, schedule: str, propagation: str = "exact") -> str | None:
    """Why these do not go together; None where they do."""
    if find_pruner(pruner).enumerates and scope == "global":
        return f"{pruner} has candidates per layer: scope global is for criteria and random"
    if find_pruner(pruner).enumerates and schedule != "one-shot":
        return f"a candidate of {pruner} is removed at once: schedule {schedule} is for criteria and random"
    if granularity == "weight" and pruner not in OF_WEIGHTS:
        return f"{pruner} ranks filters: with granularity weight the pruners are {', '.join(OF_WEIGHTS)}"
    if propagation == "released" and (granularity, scope, schedule) != ("filter", "local", "one-shot"):
        return "propagation released is for granularity filter, scope local and schedule one-shot"
    return None


def choose(
    pruner: str,
    units: Mapping[str, int],
    ratios: Mapping[str, float],
    *,
    importances: Mapping[str, torch.Tensor] | None = None,
    scope: str = "local",
    candidate: int = 0,
    sampling_seed: int | None = None,
    pruner_seed: int | None = None,
) -> dict[str, tuple[int, ...]]:
    """The units to remove from each layer, of layers with so many units and such pruning ratios.

    `importances`, float64 [units] each, are what a criterion goes by. `sampling_seed` is None when candidates
    are numbered over all combinations.
    """
    kind = find_pruner(pruner)
    space = Space.of([units[name] for name in ratios], list(ratios.values()))
    if kind.criterion:
        assert importances is not None, f"{pruner} needs importances"
        return by_importance(importances, ratios, scope)
    if kind.draws and scope == "global":
        return by_importance(drawn(units, ratios, pruner_seed), ratios, scope)
    if kind.draws:
        removal = space.unrank(next(draws(space, pruner_seed or 0, "random")))
    elif sampling_seed is None:
        removal = space.unrank(candidate)
    else:
        removal = space.unrank(_sampled(space, sampling_seed, candidate // 256)[candidate])
    return dict(zip(ratios, removal, strict=True))


def by_importance(
    importances: Mapping[str, torch.Tensor], ratios: Mapping[str, float], scope: str, share: float = 1.0
) -> dict[str, tuple[int, ...]]:
    """The least important units of each layer, or of all together with scope global, of which the ratios take
    `share` of their way."""
    found = marked([importances[name] for name in ratios], list(ratios.values()), scope, share)
    return {name: tuple(one.nonzero().flatten().tolist()) for name, one in zip(ratios, found, strict=True)}


def marked(
    importances: Sequence[torch.Tensor], ratios: Sequence[float], scope: str, share: float = 1.0
) -> list[torch.Tensor]:
    """The same as bool [units] for each layer; the units may be single weights."""
    from pruners.criteria import lowest, lowest_together

    sizes = [len(importance) for importance in importances]
    if scope == "local":
        return lowest(importances, [n_removed(n, r * share) for n, r in zip(sizes, ratios, strict=True)])
    return lowest_together(importances, n_removed_together(sizes, ratios, share))


def n_removed_together(units: Sequence[int], ratios: Sequence[float], share: float = 1.0) -> int:
    """How many units of all layers together are removed: one rounding over all of them."""
    wanted = sum(units) * ratios[0] if len(set(ratios)) == 1 else sum(n * r for n, r in zip(units, ratios, strict=True))
    return math.floor(wanted * share + 1e-9)


def drawn(units: Mapping[str, int], layers: Iterable[str], seed: int | None) -> dict[str, torch.Tensor]:
    """What `random` goes by where it ranks units: numbers in place of importances, from its own seed."""
    import torch

    return {layer: torch.from_numpy(priorities(f"random/{seed or 0}/{layer}", units[layer])) for layer in layers}


@lru_cache(maxsize=64)
def _sampled(space: Space, seed: int, block: int) -> list[int]:
    """The draws up to the end of a block of 256, so that neighbours do not draw them all again."""
    return sampled(space, seed, min(space.size, 256 * (block + 1)))
