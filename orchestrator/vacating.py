"""Leaving places of a cluster to a driver that was dealt some and has none.

What is free in all may be free in no one place: where small shards are on every GPU, a shard that asks for a whole one
would wait until all of them have ended.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable

STARVED_SECONDS = 60.0
"""So long a driver has had no worker until others leave places to it: a worker takes some seconds to start."""


class Vacating:
    """The places that this driver leaves: one, and another whenever that was no help."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.left: frozenset[str] = frozenset()
        self._since = clock()
        self._in_vain: frozenset[str] = frozenset()

    def look(self, starved: frozenset[str], places: Iterable[str]) -> None:
        """What follows from the drivers that have nothing, and from the places of this one's workers.

        Once it has left them all, and that was no help, it takes no notice of those who still have nothing.
        """
        self._in_vain &= starved
        here = Counter(places)
        if starved <= self._in_vain:
            self.left = frozenset()
        elif here.keys() & self.left:  # workers end between two tasks
            self._since = self._clock()
        elif self.left and self._clock() - self._since < STARVED_SECONDS:
            return  # somebody's worker may be starting there
        elif here:
            self.left |= {min(here, key=lambda place: (here[place], place))}
            self._since = self._clock()
        else:
            self._in_vain, self.left = starved, frozenset()
