"""Leaving places of a cluster to a driver that has none, though its shards would fit there.

What is free in all may be free in no one place: where small shards are on every GPU, a shard that asks for a whole one
would wait until all of them have ended.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping

STARVED_SECONDS = 60.0
"""So long a driver has had no worker until others leave places to it: a worker takes some seconds to start."""

AGAIN_SECONDS = 600.0
"""So long after it was in vain nothing is left to the same driver."""


class Vacating:
    """The workers that this driver has leave: enough for one shard of who waits, and as many again whenever that was
    no help."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.leaving: frozenset[str] = frozenset()
        self._since = clock()
        self._in_vain: dict[str, float] = {}

    def look(self, starved: Mapping[str, int], places: Mapping[str, str]) -> None:
        """What follows from the drivers that have nothing (name -> how many of our shards make room for one of theirs),
        and from where our workers are (worker -> place).

        Once all have left, and that was no help, no notice is taken of those who still have nothing for a while.
        """
        now = self._clock()
        self._in_vain = {n: since for n, since in self._in_vain.items() if n in starved and now - since < AGAIN_SECONDS}
        wanted = max((n for name, n in starved.items() if name not in self._in_vain), default=0)
        if not wanted:
            self.leaving = frozenset()
        elif self.leaving & places.keys():  # workers end between two tasks
            self._since = now
        elif self.leaving and now - self._since < STARVED_SECONDS:
            return  # somebody's worker may be starting
        elif places:
            here = Counter(places.values())
            place = min(here, key=lambda one: (here[one], one))
            self.leaving |= set([worker for worker, at in places.items() if at == place][:wanted])
            self._since = now
        else:
            self._in_vain, self.leaving = dict.fromkeys(starved, now), frozenset()
