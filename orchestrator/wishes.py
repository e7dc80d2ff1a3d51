"""What a driver could use besides what the cluster has, shown where an autoscaler looks for it.

Trials that wait would show it too, but each would keep a shard from the workers that are there.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress

from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

NAME = "prunesweep-wish"

LOOK_SECONDS = 1.0
"""How often it is looked whether a wish was granted."""

AT_ONCE = 16
"""So many wishes at most: more are shown as the cluster grows."""

AGAIN_SECONDS = 30.0
"""A wish that was granted by what happened to be free is not shown again for so long."""


class Wishes:
    """Placement groups of one shard each, that are removed as soon as they could be placed."""

    def __init__(self, bundles: Sequence[Mapping[str, float]]) -> None:
        self._bundles = [dict(bundle) for bundle in bundles]
        self._shown: list[PlacementGroup] = []
        self._granted = self._looked = -math.inf

    def show(self, more: int, share: int) -> None:
        """Wish for so many `more` shards than this driver's `share`: for as many again at most."""
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS and more > 0:
            return
        self._looked = now
        with suppress(RayError):  # a wish is not worth a run
            self._show(max(0, min(more, share, AT_ONCE)), now)

    def _show(self, wanted: int, now: float) -> None:
        for one in [one for one in self._shown if _is_placed(one)]:
            self._forget(one)
            self._granted = now
        wanted = wanted if now - self._granted >= AGAIN_SECONDS else 0
        while len(self._shown) > wanted:
            self._forget(self._shown[-1])
        while len(self._shown) < wanted:
            self._shown.append(placement_group(self._bundles, name=f"{NAME}-{uuid.uuid4().hex}"))

    def _forget(self, one: PlacementGroup) -> None:
        self._shown.remove(one)
        remove_placement_group(one)


def _is_placed(one: PlacementGroup) -> bool:
    """Whether the cluster has given it its place. (`wait` with no time to wait often says no to one that has it.)"""
    return placement_group_table(one).get("state") == "CREATED"
