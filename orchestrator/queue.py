"""Which shard runs next, and what follows from how one ended.

Dense models first, and what starts from one only once it is there. Every kind of failure has a budget
of its own, stated here and in docs/reliability.md.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from orchestrator.endings import End, Ending
from storage.records import Dense, Shard, Task
from workers.worker import OUT_OF_MEMORY, PAUSE_AFTER

SHARD_DEATHS = 1
"""So often a shard whose process died is run again whole; then its tasks run one by one."""

NODE_LOSSES = 3
"""So often a shard whose node was lost at one task is run again whole; then it is as if its process had died."""

STARTS_LOST = 20
"""So often a shard is begun whose node was lost before it could begin."""

ALONE_TRIES = 2
"""So often a task that takes its process down is run alone; then it has failed."""

IN_A_ROW = 3
"""So many shards in a row that end by the store, or workers that do not start, end the run."""

PROCESS_DIED, TIMED_OUT = "ProcessDied", "TimedOut"


@dataclass(frozen=True)
class Burial:
    """A task that could not write its own failed row: the driver does."""

    filed_under: str
    task: Task
    error_class: str
    error: str


@dataclass
class Queue:
    """The shards of a run. Whoever runs them asks for the next one and says how it ended."""

    waiting: list[Shard]
    running: dict[str, Shard] = field(default_factory=dict)
    pending_dense: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    store_problem: str | None = None
    _deaths: Counter[str] = field(default_factory=Counter)
    _losses: Counter[tuple[str, str | None]] = field(default_factory=Counter)
    _failed: defaultdict[tuple[str, str], set[str]] = field(default_factory=lambda: defaultdict(set))
    _paused: set[str] = field(default_factory=set)
    _in_a_row: Counter[End] = field(default_factory=Counter)
    _halted: bool = False
    _tried: set[str] = field(default_factory=set)
    _remade: set[str] = field(default_factory=set)

    @staticmethod
    def of(shards: Iterable[Shard], denses: Iterable[Dense], order: random.Random) -> Queue:
        """Shards in a random order of this driver's own, so that two drivers seldom meet."""
        training = [_training(dense) for dense in denses]
        rest = list(shards)
        order.shuffle(rest)
        return Queue([*training, *rest], pending_dense={s.needs.dense_id for s in training})

    @property
    def precision(self) -> str | None:
        """A precision of which shards can start, fp32 first: dense models are trained in it."""
        return min(
            (s.precision for s in self.waiting if self._can_start(s)), key=lambda p: (p != "fp32", p), default=None
        )

    def exhausted(self, precision: str) -> bool:
        """Nothing runs, and nothing of a precision can start."""
        return not self.running and not any(s.precision == precision and self._can_start(s) for s in self.waiting)

    def wanted(self, precision: str, elsewhere: frozenset[str] = frozenset()) -> int:
        """How many shards of a precision run, or could."""
        return len(self.running) + sum(self._may_start(shard, precision, elsewhere) for shard in self.waiting)

    def next(
        self,
        precision: str,
        elsewhere: frozenset[str] = frozenset(),
        fits: Callable[[Shard], bool] = lambda _: True,
    ) -> Shard | None:
        """The next shard of a precision that can start, and `fits` who asks, now running; None while all must wait.

        Shards that another driver has running, `elsewhere`, wait: they may be done soon.
        """
        for i, shard in enumerate(self.waiting):
            if self._may_start(shard, precision, elsewhere) and fits(shard):
                del self.waiting[i]
                self.running[shard.shard_id] = shard
                return shard
        return None

    def _may_start(self, shard: Shard, precision: str, elsewhere: frozenset[str]) -> bool:
        return shard.precision == precision and self._can_start(shard) and shard.filed_under not in elsewhere

    def _can_start(self, shard: Shard) -> bool:
        return shard.dense is not None or shard.needs.dense_id not in self.pending_dense

    def halt(self) -> None:
        """Hand out nothing more; what runs may end."""
        self._halted = True
        self.waiting.clear()

    def failed_at(self, task_id: str, cell_id: str, where: str, error: str) -> None:
        """A task of a cell has failed at this place: enough of them, and the cell is paused."""
        self._tried.add(task_id)
        failed = self._failed[cell_id, where]
        failed.add(task_id)
        if len(failed) >= PAUSE_AFTER and cell_id not in self._paused:
            self._paused.add(cell_id)
            self.waiting = [shard for shard in self.waiting if not self._is_paused(shard)]
            self.problems.append(
                f"cell {cell_id} is paused: {PAUSE_AFTER} of its tasks failed at the same place ({error}). "
                "Fix the cause and continue"
            )

    def _is_paused(self, shard: Shard) -> bool:
        return shard.dense is None and shard.tasks[0].cell.cell_id in self._paused

    def _untried(self, shard: Shard) -> Shard:
        return replace(shard, tasks=tuple(task for task in shard.tasks if task.task_id not in self._tried))

    def _put(self, shards: Iterable[Shard], *, first: bool = True) -> None:
        """Let shards wait, unless the run is halted or their cell paused meanwhile; of a shard, the tasks that
        have not failed in this run."""
        left = [] if self._halted else [self._untried(shard) for shard in shards]
        more = [shard for shard in left if shard.dense or (shard.tasks and not self._is_paused(shard))]
        self.waiting = [*more, *self.waiting] if first else [*self.waiting, *more]

    def ended(self, shard_id: str, ending: Ending) -> list[Burial]:
        """The shard ended: decide what runs again. Returns the tasks that get a failed row now."""
        shard = self.running.pop(shard_id)
        for kind in set(self._in_a_row) - {ending.kind}:
            del self._in_a_row[kind]
        follow: dict[End, Callable[[Shard, Ending], list[Burial]]] = {
            End.FINISHED: self._finished,
            End.ELSEWHERE: self._later,
            End.NO_DENSE: self._no_dense,
            End.NO_MEMORY: self._no_memory,
            End.STORE: self._again_a_few_times,
            End.NOT_STARTED: self._again_a_few_times,
            End.ERROR: self._error,
            End.TIME: self._out_of_time,
            End.DIED: self._died,
            End.NODE_LOST: self._node_lost,
            End.PREEMPTED: self._again,
            End.GAVE_WAY: self._again,
        }
        # STOPPED and REPEATED: what is unfinished stays so.
        return follow[ending.kind](shard, ending) if ending.kind in follow else []

    def _finished(self, shard: Shard, _: Ending) -> list[Burial]:
        if shard.dense:
            self.pending_dense.discard(shard.dense.dense_id)
        return []

    def _again(self, shard: Shard, _: Ending) -> list[Burial]:
        self._put([shard])
        return []

    def _later(self, shard: Shard, _: Ending) -> list[Burial]:
        self._put([shard], first=False)
        return []

    def _again_a_few_times(self, shard: Shard, ending: Ending) -> list[Burial]:
        self._in_a_row[ending.kind] += 1
        if self._in_a_row[ending.kind] < IN_A_ROW:
            return self._again(shard, ending)
        self.halt()
        if ending.kind is End.STORE:
            self.store_problem = ending.reason
        else:
            self.problems.append(f"{IN_A_ROW} workers in a row did not start, and the run ended: {ending.reason}")
        return []

    def _no_dense(self, shard: Shard, ending: Ending) -> list[Burial]:
        """The dense weights are gone or were damaged: train them again, once."""
        dense = shard.needs
        if dense.dense_id not in self.pending_dense:
            if dense.dense_id in self._remade:
                return self._error(shard, ending)
            self._remade.add(dense.dense_id)
            self.pending_dense.add(dense.dense_id)
            self._put([_training(dense)])
        self._put([shard], first=False)
        return []

    def _error(self, shard: Shard, ending: Ending) -> list[Burial]:
        """An error that is no task's own. What it did not do stays pending; a dense model takes what
        needs it along."""
        if shard.dense is None:
            self.problems.append(f"shard {shard.filed_under} stopped, and its tasks stay pending: {ending.reason}")
            return []
        dense_id = shard.dense.dense_id
        self.pending_dense.discard(dense_id)
        left = sum(len(s.tasks) for s in self.waiting if s.needs.dense_id == dense_id)
        self.waiting = [s for s in self.waiting if s.needs.dense_id != dense_id]
        self.problems.append(
            f"the dense model {shard.dense.model} on {shard.dense.dataset} could not be trained, "
            f"so {left} tasks stay pending: {ending.reason}"
        )
        return []

    def _no_memory(self, shard: Shard, ending: Ending) -> list[Burial]:
        """The task runs alone; its neighbours without it."""
        mine = [task for task in shard.tasks if task.task_id == ending.task]
        if not mine:
            return self._died(shard, ending)
        if shard.is_alone:
            return [Burial(shard.filed_under, mine[0], OUT_OF_MEMORY, ending.reason)]
        self._set_apart(shard, mine)
        return []

    def _out_of_time(self, shard: Shard, ending: Ending) -> list[Burial]:
        """The task has failed; its neighbours go on."""
        mine = [task for task in shard.tasks if task.task_id == ending.task]
        if not mine:
            return self._died(shard, ending)
        rest = tuple(task for task in shard.tasks if task not in mine)
        self._put([replace(shard, tasks=rest)] if rest else [])
        why = "it did not end within its limit, and its process was ended"
        return [Burial(shard.filed_under, task, TIMED_OUT, why) for task in mine]

    def _died(self, shard: Shard, ending: Ending) -> list[Burial]:
        """Whole again, then one by one, so that one poisoned task cannot take its neighbours down."""
        self._deaths[shard.shard_id] += 1
        deaths = self._deaths[shard.shard_id]
        if deaths <= (ALONE_TRIES - 1 if shard.is_alone else SHARD_DEATHS):
            return self._again(shard, ending)
        if shard.dense:
            return self._error(shard, replace(ending, reason=f"the process that trained it died: {ending.reason}"))
        if shard.is_alone:
            why = f"its process died {deaths} times while it ran this task alone: {ending.reason}"
            return [Burial(shard.filed_under, shard.tasks[0], PROCESS_DIED, why)]
        self._set_apart(shard, shard.tasks)
        return []

    def _node_lost(self, shard: Shard, ending: Ending) -> list[Burial]:
        """Nodes come and go; one that goes each time at the same task may go because of it."""
        self._losses[shard.filed_under, ending.task] += 1
        losses = self._losses[shard.filed_under, ending.task]
        if losses <= (NODE_LOSSES if ending.task else STARTS_LOST):
            return self._again(shard, ending)
        return self._died(shard, ending) if ending.task else self._error(shard, ending)

    def _set_apart(self, shard: Shard, tasks: Iterable[Task]) -> None:
        """`tasks` of a shard one by one, then the rest of it."""
        apart = [replace(shard, shard_id=f"{shard.filed_under}.{t.task_id}", tasks=(t,)) for t in tasks]
        taken = {one.tasks[0].task_id for one in apart}
        rest = tuple(task for task in shard.tasks if task.task_id not in taken)
        self._put([*apart, replace(shard, tasks=rest)] if rest else apart)


def _training(dense: Dense) -> Shard:
    return Shard(f"dense-{dense.dense_id}", dense=dense)
