"""The runner on Ray: a shard is a Tune trial, actors are reused. Tune places, runs and reports."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.cloudpickle
from ray import tune
from ray.exceptions import RayActorError
from ray.tune.search import Searcher
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.account import Account, Failure, failure
from orchestrator.cluster import environment
from orchestrator.endings import End, Ending, seen, told
from orchestrator.errors import UserError
from orchestrator.together import TogetherTrainable, bundle, pulse_of
from orchestrator.tracking import measured
from storage.machine import is_alive
from storage.records import Shard
from storage.store import Store
from workers.worker import Worker, last_line

if TYPE_CHECKING:
    from orchestrator.drivers import Driver
    from orchestrator.queue import Queue
    from orchestrator.run import Options

STEP_SECONDS = 1.0
"""A worker reports after this long at the latest, between two tasks."""

_TUNE = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "inf",  # of its own state: nothing is restored from it
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}


class ShardTrainable(tune.Trainable):
    """Tune's side of a worker: it runs one shard after the other."""

    def setup(self, config: dict[str, Any]) -> None:
        store, precision = Store(config["store"]), Shard.from_dict(config["shard"]).precision
        self.pulse = pulse_of(store, config)
        self.pulse.__enter__()
        self.worker = Worker(store, config["data_root"], precision, cpu=config["cpu"], pulse=self.pulse)
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.rows = self.worker.run_shard(Shard.from_dict(new_config["shard"]))
        return True

    def step(self) -> dict[str, Any]:
        """Run tasks for a while; `done` once the shard has ended, and how."""
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
        return {
            "tasks_done": done,
            "failures": failures,
            "measures": measures,
            "messages": self.worker.take_messages(),
            "ending": None if ending is None else astuple(ending),
            "done": ending is not None,
        }

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: what is done is in the store."""

    def cleanup(self) -> None:
        self.pulse.__exit__()


class ShardSearcher(Searcher):
    """Hands Tune the queue's shards."""

    def __init__(self, queue: Queue, precision: str, common: dict[str, Any], driver: Driver) -> None:
        super().__init__()
        self.queue, self.precision, self.common, self.driver = queue, precision, common, driver
        self.shard_of: dict[str, str] = {}

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        if self.driver.stop.is_set():
            self.queue.halt()
        shard = self.queue.next(self.precision, self.driver.elsewhere)
        if shard is None:
            return Searcher.FINISHED if self.queue.exhausted(self.precision) else None
        self.shard_of[trial_id] = shard.shard_id
        return {"shard": shard.to_dict(), **self.common}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Nothing: the reporter hears of it, and in case of an error of which."""

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles what it is given, to restore it. A fresh driver resumes from the store."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing, for the same reason."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("resume from the store")


class Reporter(tune.Callback):
    """Carries what workers report, and how their shards end, to the account."""

    def __init__(self, account: Account, searcher: ShardSearcher) -> None:
        self.account, self.searcher = account, searcher

    def __getstate__(self) -> dict[str, Any]:
        """Nothing, as of the searcher."""
        return {}

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self.account.shown.beat()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self.account.rows(result["tasks_done"], [tuple(one) for one in result["failures"]])
        self.account.say_all(result["messages"])
        if result["ending"] is not None:
            kind, reason, task = result["ending"]
            self._ended(trial, Ending(End(kind), reason, task))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The process is gone: what our own code raises comes as a result."""
        error = _error_of(trial)
        note = self.searcher.driver.note_of(self.searcher.shard_of[trial.trial_id])
        # Ray goes on with what may have been the cause.
        reason = last_line(str(error)).partition(" Some common causes")[0] or type(error).__name__
        preempted = isinstance(error, RayActorError) and error.preempted
        self._ended(trial, seen(note, reason, preempted=preempted, memory="running low on memory" in str(error)))

    def _ended(self, trial: Any, ending: Ending) -> None:
        shard_id = self.searcher.shard_of.pop(trial.trial_id)
        if ending.kind is End.ELSEWHERE:
            self.searcher.driver.leave(shard_id)
        self.account.ended(shard_id, ending)


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
    gpus = _gpus(options)
    _check_fits(options.cpus, gpus, options.processes)
    several = options.processes > 1
    workers = None if options.workers == "auto" else int(options.workers)
    pending = workers or _slots(options.cpus, gpus, options.processes)
    trainable = TogetherTrainable if several else ShardTrainable
    # Ray Train asks for what its processes get; who starts them only waits, and Tune knows no bundle of nothing.
    asked = {"memory": 1.0} if several else bundle(options.cpus, gpus)
    workers = pending if several else workers
    common = {
        "store": store.absolute,
        "data_root": options.data_root,
        "cpu": gpus == 0,
        "driver": driver.id,
        "limits": asdict(options.limits),
        "processes": options.processes,
        "cpus": options.cpus,
        "gpus": gpus,
    }
    driver.end_worker = end_worker
    with environment({**_TUNE, "TUNE_MAX_PENDING_TRIALS_PG": str(pending)}), contextlib.redirect_stdout(sys.stderr):
        while not driver.stop.is_set() and (precision := account.queue.precision):
            searcher = ShardSearcher(account.queue, precision, common, driver)
            placed = tune.with_resources(trainable, tune.PlacementGroupFactory([asked]))
            _fit(placed, searcher, workers, [Reporter(account, searcher), *_trackers(options, driver)])


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


def _fit(trainable: Any, searcher: ShardSearcher, workers: int | None, callbacks: list[tune.Callback]) -> None:
    """One Tune run. Its own files go to a folder that goes with it; it never raises on failed trials."""
    with tempfile.TemporaryDirectory(prefix="prunesweep-tune-", ignore_cleanup_errors=True) as storage:
        tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                num_samples=-1,
                reuse_actors=True,
                max_concurrent_trials=workers,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=storage,
                verbose=0,
                callbacks=callbacks,
                failure_config=tune.FailureConfig(max_failures=0),
                checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
            ),
        ).fit()


def _gpus(options: Options) -> float:
    if options.gpus != "auto":
        return float(options.gpus)
    return 1.0 if ray.cluster_resources().get("GPU", 0) >= 1 else 0.0


def _slots(cpus: float, gpus: float, processes: int) -> int:
    """How many shards of so many processes fit on the cluster at once."""
    there = ray.cluster_resources()
    wanted = bundle(cpus, gpus)
    return max(1, min(int(there.get(name, 0) // (amount * processes)) for name, amount in wanted.items()))


def _check_fits(cpus: float, gpus: float, processes: int) -> None:
    """Raise UserError where no node could ever run one process, or all together not those of one shard."""
    wanted = bundle(cpus, gpus)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fits = sum(min(int(node.get(name, 0) // amount) for name, amount in wanted.items()) for node in nodes)
    if fits >= processes:
        return
    has = "; ".join(", ".join(f"{node.get(name, 0):g} {name}" for name in ("CPU", "GPU")) for node in nodes)
    asked = ", ".join(f"{amount:g} {name}" for name, amount in wanted.items())
    if not fits:
        raise UserError(f"a shard asks for {asked}, and no node of the cluster has that (it has {has})")
    raise UserError(
        f"a task asks for {processes} processes of {asked}, and the cluster has room for {fits} (it has {has})"
    )
