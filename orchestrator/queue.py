"""Which shard runs next: dense models first, and what starts from one only once it is there."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from storage.records import Dense, Shard


@dataclass
class Queue:
    """The shards of a run. Whoever runs them asks for the next one and says how it ended."""

    waiting: list[Shard]
    running: dict[str, Shard] = field(default_factory=dict)
    pending_dense: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    suspects: list[Shard] = field(default_factory=list)

    @staticmethod
    def of(shards: Iterable[Shard], denses: Iterable[Dense], order: random.Random) -> Queue:
        """Shards in a random order of this driver's own, so that two drivers seldom meet."""
        training = [Shard(f"dense-{dense.dense_id}", dense=dense) for dense in denses]
        rest = list(shards)
        order.shuffle(rest)
        return Queue([*training, *rest], pending_dense={s.needs.dense_id for s in training})

    @property
    def exhausted(self) -> bool:
        """Nothing waits and nothing runs."""
        return not self.waiting and not self.running

    def next(self) -> Shard | None:
        """The next shard that can start, now running; None while all must wait."""
        for i, shard in enumerate(self.waiting):
            if shard.dense or shard.needs.dense_id not in self.pending_dense:
                del self.waiting[i]
                self.running[shard.shard_id] = shard
                return shard
        return None

    def succeeded(self, shard_id: str) -> None:
        """The shard ran to its end; its failed tasks have rows."""
        shard = self.running.pop(shard_id)
        if shard.dense:
            self.pending_dense.discard(shard.dense.dense_id)

    def died(self, shard_id: str, reason: str) -> None:
        """The shard's process died, or its dense model could not be trained.

        A dense model takes what needs it along. The tasks of a shard run again one by one; one that
        takes its process down when it is alone becomes a suspect, for the driver to write a row.
        """
        shard = self.running.pop(shard_id)
        if shard.dense:
            lost = shard.dense.dense_id
            left = sum(len(s.tasks) for s in self.waiting if s.needs.dense_id == lost)
            self.waiting = [s for s in self.waiting if s.needs.dense_id != lost]
            self.problems.append(
                f"the dense model {shard.dense.model} on {shard.dense.dataset} could not be trained, "
                f"so {left} tasks stay pending: {reason}"
            )
        elif len(shard.tasks) == 1:
            self.suspects.append(shard)
        else:
            alone = [replace(shard, shard_id=f"{shard.shard_id}.{t.task_id}", tasks=(t,)) for t in shard.tasks]
            self.waiting = alone + self.waiting
