"""How drivers that are at work on one cluster share it.

Each tells the others, through Ray's own key-value store, what a shard of it asks for, how many it could run, and its
priority. Who may run how many follows from that alone, so that all come to the same without asking anyone.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace

from orchestrator import vacating
from orchestrator.vacating import Vacating

LOOK_SECONDS = 1.0
"""How old a driver's knowledge of the others may be."""

TURN_SECONDS = 20.0
"""So long a driver holds on where there are fewer slots than drivers, once it has one."""

_NAMESPACE = "prunesweep"
_PREFIX = "claims/"


@dataclass(frozen=True)
class Claim:
    """What a driver asks of the cluster: `wants` shards at once, each with the resources `shard`; `priority` is its
    weight, `waits` the seconds for which it has had none at work."""

    shard: Mapping[str, float]
    wants: int
    priority: float = 1.0
    waits: float = 0.0


def dealt(capacity: Mapping[str, float], claims: Mapping[str, Claim]) -> dict[str, int]:
    """How many shards each driver may have running on a cluster of this capacity.

    One after the other is dealt to the driver whose largest part of any resource, divided by its priority, is the
    smallest, as long as it fits: dominant resource fairness, Ghodsi et al., NSDI 2011, algorithm 1, with weights.
    Nothing stays free that somebody could use.
    """
    held, left = dict.fromkeys(claims, 0), dict(capacity)

    def part(name: str) -> float:
        claim = claims[name]
        of = max((amount / capacity.get(r, 0) if capacity.get(r) else math.inf) for r, amount in claim.shard.items())
        return held[name] * of / claim.priority if held[name] else 0.0

    hungry = {name for name, claim in claims.items() if claim.wants > 0}
    while hungry:
        name = min(hungry, key=lambda name: (part(name), -claims[name].priority, name))
        asked = claims[name].shard
        if held[name] >= claims[name].wants or any(left.get(r, 0) < a - 1e-6 for r, a in asked.items()):
            hungry.remove(name)
            continue
        held[name] += 1
        left |= {resource: left[resource] - amount for resource, amount in asked.items()}
    return held


def helped(
    name: str, there: Mapping[str, float], claims: Mapping[str, Claim], held: Mapping[str, int]
) -> frozenset[str]:
    """The drivers that were dealt nothing, and whom it would help if driver `name` had nothing either: it is for turns.

    A claim that would not fit even then, as for GPUs of nodes that are not there yet, is helped by nobody's leaving.
    """

    def free_with_mine(resource: str) -> float:
        others = sum(held[other] * one.shard.get(resource, 0) for other, one in claims.items() if other != name)
        return there.get(resource, 0) - others

    return frozenset(
        other
        for other, one in claims.items()
        if one.wants > 0
        and not held[other]
        and other != name
        and all(free_with_mine(r) >= amount - 1e-6 for r, amount in one.shard.items())
    )


def makes_room(mine: Claim, theirs: Claim) -> int:
    """How many shards of `mine` take what one of `theirs` asks for."""
    parts = [amount / mine.shard[r] for r, amount in theirs.shard.items() if mine.shard.get(r)]
    return max((math.ceil(part - 1e-6) for part in parts), default=1)


def read_claim(shown: bytes | None) -> Claim | None:
    """A claim as it was shown; None for one that is gone, or that another version shows in a form unknown here."""
    try:
        found = json.loads(shown or b"null")
        claim = Claim(
            {str(k): float(v) for k, v in found["shard"].items()},
            int(found["wants"]),
            float(found["priority"]),
            float(found.get("waits", 0)),
        )
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    return claim if claim.shard and claim.priority > 0 else None


class Sharing:
    """This driver's claim beside those of others, looked at again every LOOK_SECONDS. Until the first look, and where
    the cluster does not answer, it is as it was.

    `capacity` is what the cluster may grow to, which shares are of, and `there` what it has: turns are taken at that.
    """

    def __init__(
        self,
        name: str,
        board: Board,
        capacity: Callable[[], Mapping[str, float]],
        there: Callable[[], Mapping[str, float]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name, self._board, self._capacity, self._there, self._clock = name, board, capacity, there, clock
        self._looked, self._at_work = -math.inf, clock()
        self._share, self._others, self._crowd = 1, False, False
        self._vacating = Vacating(clock)

    def share(self, claim: Claim, places: Mapping[str, str]) -> int:
        """How many shards may run, by a claim that is shown to the others, and where the workers are that there are.

        None at all while others are made room for, if all have left.
        """
        from ray.exceptions import RayError

        now = self._clock()
        if places or not claim.wants:
            self._at_work = now
        if now - self._looked >= LOOK_SECONDS:
            self._looked = now
            with suppress(RayError):
                self._look(replace(claim, waits=now - self._at_work), places)
        return min(self._share, len(places)) if self.makes_room else self._share

    def _look(self, claim: Claim, places: Mapping[str, str]) -> None:
        claims = {**self._board.exchange(self._name, claim), self._name: claim}
        there = self._there()
        at_once = dealt(there, claims)
        in_turn = helped(self._name, there, claims, at_once)
        self._others = len(claims) > 1
        self._crowd = bool(in_turn) or (claim.wants > 0 and not at_once[self._name])
        # Where not everybody can have one, everybody tries: Ray gives a free place to who asked first.
        self._share = max(1, dealt(self._capacity(), claims)[self._name])
        late = [name for name, one in claims.items() if one.waits >= vacating.STARVED_SECONDS and name != self._name]
        starved = {name: makes_room(claim, claims[name]) for name in late if at_once[name] or name in in_turn}
        self._vacating.look(starved, places)

    def gives_way(self, worker: str, running: int, since: float) -> bool:
        """Whether a worker, one of so many, at work `since` then, is to leave: others wait for its place."""
        over = self._others and running > self._share
        turn = self._crowd and self._clock() - since > TURN_SECONDS
        return over or turn or worker in self._vacating.leaving

    @property
    def makes_room(self) -> bool:
        """Whether workers leave for others that have none: nothing more is to be asked for meanwhile."""
        return bool(self._vacating.leaving)

    def leave(self) -> None:
        """Claim nothing any more."""
        self._board.forget(self._name)


class Board:
    """Where drivers of a cluster show their claims: Ray's key-value store, which every driver is connected to.

    A claim counts as long as Ray says that its driver lives. Who finds a dead one's removes it.
    """

    def exchange(self, name: str, claim: Claim) -> dict[str, Claim]:
        """Show a claim, and return the others'."""
        from ray.experimental import internal_kv as kv

        kv._internal_kv_put(f"{_PREFIX}{name}", json.dumps(asdict(claim)), namespace=_NAMESPACE)
        keys = [key.decode() for key in kv._internal_kv_list(_PREFIX, namespace=_NAMESPACE)]
        others = [key.removeprefix(_PREFIX) for key in keys if key != f"{_PREFIX}{name}"]
        dead = self._dead() if others else frozenset[str]()
        for gone in dead.intersection(others):
            self.forget(gone)
        found = {other: self._claim(other) for other in others if other not in dead}
        return {other: one for other, one in found.items() if one is not None}

    def forget(self, name: str) -> None:
        """Remove a claim; it may be gone already."""
        from ray.experimental import internal_kv as kv

        kv._internal_kv_del(f"{_PREFIX}{name}", namespace=_NAMESPACE)

    def _claim(self, name: str) -> Claim | None:
        from ray.experimental import internal_kv as kv

        return read_claim(kv._internal_kv_get(f"{_PREFIX}{name}", namespace=_NAMESPACE))

    def _dead(self) -> frozenset[str]:
        """Drivers, by the ids of their Ray jobs, that the cluster has seen end."""
        from ray._private.state import jobs

        return frozenset(str(job["JobID"]) for job in jobs() if job["IsDead"])
