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

    def exhausted(self, precision: str) -> bool:
        """Nothing of a precision waits and nothing runs."""
        return not self.running and all(shard.precision != precision for shard in self.waiting)

    @property
    def precisions(self) -> list[str]:
        """The precisions that wait, fp32 first: dense models are trained in it."""
        return sorted({shard.precision for shard in self.waiting}, key=lambda p: (p != "fp32", p))

    def next(self, precision: str) -> Shard | None:
        """The next shard of a precision that can start, now running; None while all must wait."""
        for i, shard in enumerate(self.waiting):
            ready = shard.dense or shard.needs.dense_id not in self.pending_dense
            if ready and shard.precision == precision:
                del self.waiting[i]
                self.running[shard.shard_id] = shard
                return shard
        return None

    def succeeded(self, shard_id: str) -> None:
        """The shard ran to its end; its failed tasks have rows."""
        shard = self.running.pop(shard_id)
        if shard.dense:
            self.pending_dense.discard(shard.dense.dense_id)

    def failed(self, shard_id: str, reason: str) -> None:
        """The shard ended by an error that is no task's own: its dense model, or the store.

        What it did not do stays pending; a dense model takes what needs it along.
        """
        shard = self.running.pop(shard_id)
        if shard.dense is None:
            self.problems.append(f"shard {shard.filed_under} stopped, and its tasks stay pending: {reason}")
            return
        dense_id = shard.dense.dense_id
        left = sum(len(s.tasks) for s in self.waiting if s.needs.dense_id == dense_id)
        self.waiting = [s for s in self.waiting if s.needs.dense_id != dense_id]
        self.problems.append(
            f"the dense model {shard.dense.model} on {shard.dense.dataset} could not be trained, "
            f"so {left} tasks stay pending: {reason}"
        )

    def died(self, shard_id: str) -> None:
        """The shard's process died. Its tasks run again one by one, so that one poisoned task cannot
        take its neighbours down; one that dies alone becomes a suspect, for the driver to write a row.
        """
        shard = self.running[shard_id]
        if shard.dense:
            self.failed(shard_id, "the process that trained it died")
            return
        del self.running[shard_id]
        if shard.shard_id != shard.filed_under:
            self.suspects.append(shard)
            return
        alone = [replace(shard, shard_id=f"{shard.shard_id}.{t.task_id}", tasks=(t,)) for t in shard.tasks]
        self.waiting = alone + self.waiting
