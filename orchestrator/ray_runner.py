"""The runner on Ray: a worker is a Tune trial, which is given one shard after the other. Tune places, runs and reports.

Tune's own reuse of actors, with a trial for each shard, gives the actor of a trial that ends to one whose own actor is
starting, and ends that one: where shards are short or workers many, a new node would never have any.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.cloudpickle
from ray import tune
from ray.exceptions import ActorUnavailableError, RayActorError, RayError
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.account import Account, Failure, failure
from orchestrator.credentials import kept_from_tune, take_credentials
from orchestrator.endings import SPENT, End, Ending, seen, told
from orchestrator.environment import environment
from orchestrator.nodes import capacity, fit_to_run
from orchestrator.placement import Placement, placement
from orchestrator.sharing import LOOK_SECONDS, Board, Claim, Sharing
from orchestrator.together import TogetherTrainable, pulse_of
from orchestrator.tracking import measured
from orchestrator.wishes import Wishes
from storage.machine import is_alive, machine
from storage.records import Row, Shard
from storage.store import Store
from workers.worker import Worker, last_line

if TYPE_CHECKING:
    from orchestrator.drivers import Driver
    from orchestrator.queue import Queue
    from orchestrator.run import Options

WHERE_SECONDS = 10.0
"""So long a worker that is ready may take to say where it is."""

STEP_SECONDS = 1.0
"""A worker reports after this long at the latest, between two tasks."""

_TUNE = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_RESULT_BUFFER_LENGTH": "1",  # a step after a shard's last would be the next shard's
    "TUNE_MAX_PENDING_TRIALS_PG": "100000",  # the searcher hands out no more than may run
    "TUNE_GLOBAL_CHECKPOINT_S": "inf",  # of its own state: nothing is restored from it
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}


class ShardTrainable(tune.Trainable):
    """Tune's side of a worker: it runs one shard after the other."""

    def setup(self, config: dict[str, Any]) -> None:
        take_credentials()
        store, precision = Store(config["store"]), Shard.from_dict(config["shard"]).precision
        self.pulse = pulse_of(store, config)
        self.pulse.__enter__()
        part = config["gpus"]
        self.worker = Worker(store, config["data_root"], precision, cpu=config["cpu"], pulse=self.pulse, part=part)
        self.begin(config)

    def begin(self, config: dict[str, Any]) -> None:
        """Have the shard of `config` to run."""
        shard = Shard.from_dict(config["shard"])
        self.rows = fit_to_run(config, shard, self.worker.run_shard(shard))

    def where(self) -> str:
        """The node of this process, and the GPUs it was given."""
        context = ray.get_runtime_context()
        return f"{context.get_node_id()} {','.join(context.get_accelerator_ids().get('GPU', ()))}"

    def step(self) -> dict[str, Any]:
        """Run tasks for a while; an `ending` once the shard has ended, and how."""
        started, failures, done, measures = time.monotonic(), list[Failure](), 0, list[dict[str, float]]()
        ending: Ending | None = Ending(End.FINISHED)
        try:
            for row in self.rows:
                done += row.status == "done"
                failures += [failure(row)] if row.status == "failed" else []
                measures.append(measured(row))
                if time.monotonic() - started > STEP_SECONDS:
                    ending = None
                    break
        except Exception as error:
            ending = told(error)
        if ending is not None:
            self.rows = _none_given()  # not to find this one ended well, should the next not have come
        return {
            "tasks_done": done,
            "failures": failures,
            "measures": measures,
            "messages": self.worker.take_messages(),
            "ending": None if ending is None else astuple(ending),
        }

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: what is done is in the store."""

    def cleanup(self) -> None:
        self.pulse.__exit__()


def _none_given() -> Iterator[Row]:
    raise RuntimeError("this worker was given no shard")
    yield


class ShardSearcher(Searcher):
    """Hands Tune the queue's shards, as many at once as this driver may run."""

    def __init__(self, queue: Queue, precision: str, common: dict[str, Any], driver: Driver, room: Room) -> None:
        super().__init__()
        self.queue, self.precision, self.common, self.driver, self.room = queue, precision, common, driver, room
        self.shard_of: dict[str, str] = {}

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        if self.driver.stop.is_set():
            self.queue.halt()
        shard = self.next(trial_id) if len(self.shard_of) < self.share() else None
        if shard is None:
            # Tune waits within a step, and has not freed the last worker's place by then: so this run of it ends.
            return None if self.shard_of else Searcher.FINISHED
        return {"shard": shard.to_dict(), **self.common, "gpus": self.room.placement.of(shard)}

    def share(self) -> int:
        """How many workers this driver may have now."""
        return self.room.now(self.queue.wanted(self.precision, self.driver.elsewhere))

    def has_work(self) -> bool:
        """Whether a worker could begin now."""
        return self.share() > 0 and self.queue.wanted(self.precision, self.driver.elsewhere) > 0

    def next(self, trial_id: str, fits: Callable[[Shard], bool] = lambda _: True) -> Shard | None:
        """The next shard, for a trial; None where there is none at the moment."""
        shard = self.queue.next(self.precision, self.driver.elsewhere, fits)
        if shard is not None:
            self.shard_of[trial_id] = shard.shard_id
        return shard

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Nothing: the reporter hears of it, and in case of an error of which."""

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles what it is given, to restore it. A fresh driver resumes from the store."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing, for the same reason."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("resume from the store")


@dataclass
class Room:
    """How many shards this driver may have running at once."""

    placement: Placement
    sharing: Sharing
    at_most: float
    priority: float
    wishes: Wishes
    places: dict[str, str] = field(default_factory=dict)
    """Where its workers are: trial -> node and GPUs, or for several processes the trial itself."""

    def now(self, wanted: int) -> int:
        """So many, of `wanted` that it could run."""
        claim = Claim(self.placement.asked, int(min(wanted, self.at_most)), self.priority)
        return int(min(self.sharing.share(claim, self.places), self.at_most))


class Turns(FIFOScheduler):
    """What a worker is to do after each of its reports: go on, with its shard or the next one, or end.

    It ends where the queue has nothing for it, or other drivers wait for their share: then between two tasks.
    """

    def __init__(self, account: Account, searcher: ShardSearcher) -> None:
        super().__init__()
        self.account, self.searcher = account, searcher
        self.since: dict[str, float] = {}
        self.given: dict[str, Shard] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Nothing, as of the searcher."""
        return {}

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        self.account.rows(result["tasks_done"], [tuple(one) for one in result["failures"]])
        self.account.say_all(result["messages"])
        name, searcher, told = trial.trial_id, self.searcher, result["ending"]
        since = self.since.setdefault(name, time.monotonic())
        searcher.share()
        leaves = searcher.room.sharing.gives_way(name, len(self.since), since)
        if told is None and not leaves:
            return TrialScheduler.CONTINUE
        ending = Ending(End.GAVE_WAY) if told is None else Ending(End(told[0]), *told[1:])
        self.ended(trial, ending)
        shard = None if leaves or ending.kind in SPENT else self._next(trial)
        if shard is None:
            self.gone(name)
            return TrialScheduler.STOP
        self.given[name] = shard
        return TrialScheduler.CONTINUE

    def _next(self, trial: Any) -> Shard | None:
        searcher = self.searcher
        if searcher.driver.stop.is_set():
            searcher.queue.halt()
        if len(searcher.shard_of) >= searcher.share():
            return None
        return searcher.next(trial.trial_id, lambda shard: searcher.room.placement.of(shard) == trial.config["gpus"])

    def gone(self, trial_id: str) -> None:
        """A worker has ended."""
        self.since.pop(trial_id, None)
        self.searcher.room.places.pop(trial_id, None)

    def wish(self) -> None:
        """Show what this driver could use besides its share, once it has all of that at work."""
        searcher = self.searcher
        share, wanted = searcher.share(), searcher.queue.wanted(searcher.precision, searcher.driver.elsewhere)
        idle = len(self.since) < share or searcher.room.sharing.makes_room
        more = 0 if idle else min(wanted, searcher.room.at_most) - share
        searcher.room.wishes.show(int(more), share)

    def ended(self, trial: Any, ending: Ending) -> None:
        """The shard that a trial was at has ended."""
        shard_id = self.searcher.shard_of.pop(trial.trial_id)
        if ending.kind is End.ELSEWHERE:
            self.searcher.driver.leave(shard_id)
        if ending.kind is End.STOPPED:  # by a note in the store, which this process may not have been told of
            self.searcher.driver.stop.set()
        self.account.ended(shard_id, ending)


class Reporter(tune.Callback):
    """Gives workers the shards they are to go on with, after trackers were told of the last; and sees them die."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns

    def __getstate__(self) -> dict[str, Any]:
        """Nothing, as of the searcher."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A worker is ready, and was not asked for a step yet."""
        told = ""
        with contextlib.suppress(RayError):  # of its death another call tells
            told = str(ray.get(trial.temporary_state.ray_actor.where.remote(), timeout=WHERE_SECONDS))
        self.turns.searcher.room.places[trial.trial_id] = told or trial.trial_id

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self.turns.account.shown.beat()
        self.turns.wish()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        shard = self.turns.given.pop(trial.trial_id, None)
        if shard is not None:
            trial.config = {**trial.config, "shard": shard.to_dict()}
            trial.temporary_state.ray_actor.begin.remote(trial.config)  # before the step that Tune asks for next

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The process is gone: what our own code raises comes as a result."""
        error, searcher = _error_of(trial), self.turns.searcher
        self.turns.gone(trial.trial_id)
        note = searcher.driver.note_of(searcher.shard_of[trial.trial_id])
        # Ray goes on with what may have been the cause.
        reason = last_line(str(error)).partition(" Some common causes")[0] or type(error).__name__
        preempted = isinstance(error, RayActorError) and error.preempted
        # A raylet that goes with its workers is missed later than they are.
        lost = isinstance(error, ActorUnavailableError) or "node has died" in str(error)
        memory = "running low on memory" in str(error)
        self.turns.ended(trial, seen(note, reason, preempted=preempted, node_lost=lost, memory=memory))


def _error_of(trial: Any) -> Exception | None:
    """What ended a trial. Tune has just written it to a file of its own, which is not yet where it looks for it."""
    if not trial.pickled_error_file:
        return None
    try:
        with Path(trial.pickled_error_file).open("rb") as file:
            return ray.cloudpickle.load(file)
    except Exception as error:  # whatever its class does when it is loaded: the death is what counts
        return error


def run_on_ray(account: Account, store: Store, options: Options, driver: Driver) -> None:
    """Run a queue to its end on the cluster this process is connected to, or until it is asked to stop.

    A process holds one precision, so each precision has its own Tune run, with actors of its own.
    """
    placed = placement(options, account.queue.waiting)
    several = options.processes > 1
    sharing = Sharing(ray.get_runtime_context().get_job_id(), Board(), capacity, ray.cluster_resources)
    room = Room(
        placed, sharing, _most(options), options.priority, Wishes([placed.bundle(placed.gpus)] * options.processes)
    )
    common = {
        "store": store.absolute,
        "data_root": options.data_root,
        "cpu": placed.gpus == 0,
        "driver": driver.id,
        "machine": machine(),
        "limits": asdict(options.limits),
        "processes": options.processes,
        "cpus": options.cpus,
    }

    def asked(config: dict[str, Any]) -> tune.PlacementGroupFactory:
        # Ray Train asks for what its processes get; who starts them only waits, and Tune knows no bundle of nothing.
        return tune.PlacementGroupFactory([{"memory": 1.0} if several else placed.bundle(config["gpus"])])

    trainable = tune.with_resources(TogetherTrainable if several else ShardTrainable, asked)
    driver.end_worker = end_worker
    with environment(_TUNE), kept_from_tune(), contextlib.redirect_stdout(sys.stderr):
        try:
            while not driver.stop.is_set() and (precision := account.queue.precision):
                searcher = ShardSearcher(account.queue, precision, common, driver, room)
                if searcher.has_work():
                    _fit(trainable, searcher, Turns(account, searcher), _trackers(options, driver))
                else:  # it is at other drivers, or they are made room for: a wish that is granted would be in the way
                    room.wishes.show(0, 0)
                    account.shown.beat()
                    driver.stop.wait(LOOK_SECONDS)
        finally:
            room.sharing.leave()
            room.wishes.show(0, 0)


def _most(options: Options) -> float:
    """So many shards at once at most, by the spec and by who runs it."""
    given = [n for n in (options.workers, options.max_workers) if isinstance(n, int)]
    return min(given, default=math.inf)


def _trackers(options: Options, driver: Driver) -> list[tune.Callback]:
    if options.track is None:
        return []
    from orchestrator.trackers import Trackers

    return [Trackers(options.track, driver.sweep)]


def end_worker(note: Mapping[str, Any]) -> None:
    """End the process of a worker's note, on its node; one that is frozen too. Does not wait."""
    if not ray.is_initialized():  # the run is over; asking would start another Ray
        return
    strategy = NodeAffinitySchedulingStrategy(note["node"], soft=False)
    _kill.options(scheduling_strategy=strategy).remote(note["pid"], note["process_started"])


@ray.remote(num_cpus=0, max_retries=0)
def _kill(pid: int, started: float) -> None:
    if is_alive(pid, started):
        os.kill(pid, signal.SIGKILL)


def _fit(trainable: Any, searcher: ShardSearcher, turns: Turns, trackers: list[tune.Callback]) -> None:
    """One Tune run. Its own files go to a folder that goes with it; it never raises on failed trials."""
    with tempfile.TemporaryDirectory(prefix="prunesweep-tune-", ignore_cleanup_errors=True) as storage:
        tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=turns,
                num_samples=-1,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=storage,
                verbose=0,
                callbacks=[*trackers, Reporter(turns)],
                failure_config=tune.FailureConfig(max_failures=0),
                checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
            ),
        ).fit()
