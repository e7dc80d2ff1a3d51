"""Candidates by number: which units a candidate removes, computed anywhere from the number alone.

`all` numbers the combinations (mixed radix over the layers, each in lexicographic order). `sample`
numbers the draws without replacement from a generator of raw bits, so that draw k does not depend on
how many are drawn.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

MAX_ALL = 10**6
"""Above this many combinations in a cell, `all` is refused."""

Removal = tuple[tuple[int, ...], ...]
"""The units removed from each layer of a space, ascending, in the order of its layers."""


Sets = tuple[tuple[int, ...], ...]
"""The units of a layer as sets of its output channels, ascending; units in the order of their first channels."""


def n_removed(n: int, ratio: float) -> int:
    """How many of n units a pruning ratio removes: the one rounding rule of every pruner."""
    return math.floor(n * ratio + 1e-9)


@dataclass(frozen=True)
class Space:
    """All candidates of a cell: for each layer, (units, how many of them are removed)."""

    layers: tuple[tuple[int, int], ...]

    @staticmethod
    def of(units: Sequence[int], ratios: Sequence[float]) -> Space:
        """The space of layers with `units` units pruned by `ratios`."""
        return Space(tuple((n, n_removed(n, r)) for n, r in zip(units, ratios, strict=True)))

    @cached_property
    def size(self) -> int:
        """How many candidates there are; asked for at every draw, and a product of large numbers."""
        return math.prod(math.comb(n, k) for n, k in self.layers)

    def unrank(self, rank: int) -> Removal:
        """The candidate of this rank, 0 <= rank < size; the last layer turns fastest."""
        if not 0 <= rank < self.size:
            raise ValueError(f"rank {rank} is outside 0 .. {self.size - 1}")
        removal: list[tuple[int, ...]] = []
        for n, k in reversed(self.layers):
            rank, digit = divmod(rank, math.comb(n, k))
            removal.append(unrank_combination(n, k, digit))
        return tuple(reversed(removal))

    def rank(self, removal: Removal) -> int:
        """The inverse of `unrank`."""
        rank = 0
        for (n, k), units in zip(self.layers, removal, strict=True):
            rank = rank * math.comb(n, k) + rank_combination(n, k, units)
        return rank


def unrank_combination(n: int, k: int, rank: int) -> tuple[int, ...]:
    """The rank-th k-subset of 0..n-1 in lexicographic order (that of itertools.combinations)."""
    units: list[int] = []
    for unit in range(n):
        if len(units) == k:
            break
        starting_here = math.comb(n - unit - 1, k - len(units) - 1)
        if rank < starting_here:
            units.append(unit)
        else:
            rank -= starting_here
    return tuple(units)


def rank_combination(n: int, k: int, units: Sequence[int]) -> int:
    """The inverse of `unrank_combination`; raises ValueError unless `units` are k, ascending, < n."""
    ascending = all(a < b for a, b in pairwise(units))
    if len(units) != k or not ascending or (k and not (units[0] >= 0 and units[-1] < n)):
        raise ValueError(f"{units} are not {k} ascending units of {n}")
    rank, previous = 0, -1
    for chosen, unit in enumerate(units):
        skipped = range(previous + 1, unit)
        rank += sum(math.comb(n - s - 1, k - chosen - 1) for s in skipped)
        previous = unit
    return rank


def draws(space: Space, seed: int, stream: str = "sample") -> Iterator[int]:
    """Ranks drawn without replacement, uniformly, for ever new until the space is used up."""
    seen: set[int] = set()
    integers = _integers_below(space.size, f"prunesweep/{stream}/{seed}/{space.layers}")
    while len(seen) < space.size:
        rank = next(integers)
        if rank not in seen:
            seen.add(rank)
            yield rank


def sampled(space: Space, seed: int, count: int) -> list[int]:
    """The ranks of the first `count` draws. Raises ValueError when there are fewer candidates."""
    if count > space.size:
        raise ValueError(f"{count} samples of {space.size} candidates")
    return list(islice(draws(space, seed), count))


def priorities(key: str, n: int) -> np.ndarray:
    """n numbers to rank by, float64 below 1: those of a key, whatever else is drawn. The k lowest are a subset
    that is drawn uniformly."""
    import numpy as np

    seed = int.from_bytes(hashlib.sha256(f"prunesweep/{key}".encode()).digest()[:16])
    return (np.random.Philox(key=seed).random_raw(n) >> 11) * 2.0**-53


def _integers_below(limit: int, key: str) -> Iterator[int]:
    """Uniform integers below `limit`: SHA-256 in counter mode, rejection of what is too large."""
    bits = (limit - 1).bit_length()
    n_bytes = (bits + 7) // 8
    counter = 0
    while True:
        raw = b""
        while len(raw) < n_bytes:
            raw += hashlib.sha256(f"{key}/{counter}".encode()).digest()
            counter += 1
        value = int.from_bytes(raw[:n_bytes]) >> (8 * n_bytes - bits)
        if value < limit:
            yield value
