"""What a worker is to do after each of its reports: go on, with its shard or the next one, or end."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from dataclasses import astuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler

from orchestrator.account import Account
from orchestrator.endings import End, Ending
from orchestrator.placement import Placement
from orchestrator.progress import Progress
from orchestrator.queue import Queue
from orchestrator.ray_runner import Reporter, ShardSearcher, Turns
from storage.records import Shard
from storage.store import Store
from tests.rows import ORACLE, tasks

TRIAL = "a trial"


class Run:
    """A worker at the first of three shards, of a driver that may have two of them."""

    def __init__(self, store: Store) -> None:
        self.queue = Queue.of((), (), random.Random(0))
        self.queue.waiting = [Shard(name, tuple(tasks(ORACLE, 3)), keep="last") for name in ("s0", "s1", "s2")]
        self.left: list[str] = []
        self.driver = SimpleNamespace(stop=threading.Event(), elsewhere=frozenset(), leave=self.left.append)
        self.sharing = SimpleNamespace(gives_way=lambda worker, running, since: False, makes_room=False)
        self.wished: list[int] = []
        wishes = SimpleNamespace(show=lambda more, share: self.wished.append(more))
        room = SimpleNamespace(
            placement=Placement(1, 0), sharing=self.sharing, now=lambda wanted: 1, places={}, at_most=9, wishes=wishes
        )
        driver: Any = self.driver
        given: Any = room
        self.searcher = ShardSearcher(self.queue, "fp32", {}, driver, given)
        self.turns = Turns(Account(store, self.queue, Progress(9)), self.searcher)
        self.begun: list[dict[str, Any]] = []
        actor = SimpleNamespace(begin=SimpleNamespace(remote=lambda config: self.begun.append(config["shard"])))
        config = self.searcher.suggest(TRIAL)
        self.trial = SimpleNamespace(
            trial_id=TRIAL, config=config, temporary_state=SimpleNamespace(ray_actor=actor), pickled_error_file=None
        )

    def report(self, ending: Ending | None) -> str:
        """What Tune is told after a report, of a task that is done, and an ending."""
        found = {
            "tasks_done": 1,
            "failures": [],
            "measures": [],
            "messages": [],
            "ending": astuple(ending) if ending else None,
        }
        said = self.turns.on_trial_result(None, self.trial, found)
        Reporter(self.turns).on_trial_result(0, [], self.trial, found)
        return said


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(Store(tmp_path / "store"))


def test_a_worker_goes_on_with_its_shard(run: Run) -> None:
    assert run.report(None) == TrialScheduler.CONTINUE
    assert list(run.queue.running) == ["s0"] and run.begun == []


@pytest.mark.parametrize("kind", [End.FINISHED, End.REPEATED, End.ELSEWHERE, End.ERROR])
def test_a_worker_goes_on_with_the_next_shard(kind: End, run: Run) -> None:
    """Before Tune asks it for the next step it has the next shard."""
    assert run.report(Ending(kind)) == TrialScheduler.CONTINUE
    assert list(run.queue.running) == ["s1"] == [Shard.from_dict(one).shard_id for one in run.begun]
    assert run.left == (["s0"] if kind is End.ELSEWHERE else [])


@pytest.mark.parametrize("kind", [End.STORE, End.NOT_STARTED])
def test_what_is_tried_again_is_tried_by_a_new_worker(kind: End, run: Run) -> None:
    """Or all tries would be over within milliseconds, in one process, on one node."""
    assert run.report(Ending(kind, "why")) == TrialScheduler.STOP
    assert run.begun == [] and not run.queue.running
    assert [one.shard_id for one in run.queue.waiting] == ["s0", "s1", "s2"]


def test_a_worker_that_was_stopped_tells_the_driver(run: Run) -> None:
    """Others may have written the wish into the store: nothing more is handed out, and the run ends as stopped."""
    assert run.report(Ending(End.STOPPED)) == TrialScheduler.STOP
    assert run.driver.stop.is_set() and run.begun == []
    assert run.searcher.suggest("another") == ShardSearcher.FINISHED and run.queue.waiting == []


def test_nothing_is_wished_for_while_others_are_made_room_for(run: Run) -> None:
    """A wish that is granted holds a place for a while: the very one that somebody else waits for."""
    run.report(None)
    run.turns.wish()
    run.sharing.makes_room = True
    run.turns.wish()
    assert run.wished == [2, 0]


def test_a_driver_needs_no_torch() -> None:
    """It only hands out shards: torch would cost its start seconds."""
    code = "import sys, orchestrator.ray_runner; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert found.stdout == "False\n", found.stderr
