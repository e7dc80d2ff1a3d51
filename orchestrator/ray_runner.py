"""The runner on Ray: a shard is a Tune trial, actors are reused. Tune places, runs and reports."""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from typing import TYPE_CHECKING, Any

import ray
from ray import tune
from ray.tune.search import Searcher

from orchestrator.cluster import environment
from orchestrator.errors import UserError
from storage.records import Shard
from storage.store import Store
from workers.worker import Worker

if TYPE_CHECKING:
    from orchestrator.progress import Progress
    from orchestrator.queue import Queue
    from orchestrator.run import Options

STEP_SECONDS = 1.0
"""A worker reports after this long at the latest, between two tasks."""

_TUNE = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}


class ShardTrainable(tune.Trainable):
    """Tune's side of a worker: it runs one shard after the other."""

    def setup(self, config: dict[str, Any]) -> None:
        precision = Shard.from_dict(config["shard"]).precision
        self.worker = Worker(Store(config["store"]), config["data_root"], precision, cpu=config["cpu"])
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.rows = self.worker.run_shard(Shard.from_dict(new_config["shard"]))
        return True

    def step(self) -> dict[str, Any]:
        """Run tasks for a while; `done` once the shard is at its end, or at an error that is no task's own."""
        started, counts = time.monotonic(), {"done": 0, "failed": 0}
        problem: str | None = None
        finished = True
        try:
            for row in self.rows:
                counts[row.status] += 1
                if time.monotonic() - started > STEP_SECONDS:
                    finished = False
                    break
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        return {"tasks_done": counts["done"], "tasks_failed": counts["failed"], "problem": problem, "done": finished}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: what is done is in the store."""


class ShardSearcher(Searcher):
    """Hands Tune the queue's shards, and tells the queue how they ended."""

    def __init__(self, queue: Queue, precision: str, common: dict[str, Any]) -> None:
        super().__init__()
        self.queue, self.precision, self.common = queue, precision, common
        self.shard_of: dict[str, str] = {}

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        shard = self.queue.next(self.precision)
        if shard is None:
            return Searcher.FINISHED if self.queue.exhausted(self.precision) else None
        self.shard_of[trial_id] = shard.shard_id
        return {"shard": shard.to_dict(), **self.common}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """An error here is a death: what our own code raises comes as a result."""
        shard_id = self.shard_of.pop(trial_id)
        problem = (result or {}).get("problem")
        if error:
            self.queue.died(shard_id)
        elif problem:
            self.queue.failed(shard_id, problem)
        else:
            self.queue.succeeded(shard_id)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: a fresh driver resumes from the store."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("resume from the store")


class Reporter(tune.Callback):
    """Carries what workers report to the progress bar."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self.progress.beat()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self.progress.advance(result["tasks_done"], result["tasks_failed"])


def run_on_ray(queue: Queue, store: Store, options: Options, progress: Progress) -> None:
    """Run a queue to its end on the cluster this process is connected to.

    A process holds one precision, so each precision has its own Tune run, with actors of its own.
    """
    gpus = _gpus(options)
    _check_fits(options.cpus, gpus)
    workers = None if options.workers == "auto" else int(options.workers)
    pending = workers or _slots(options.cpus, gpus)
    common = {"store": store.absolute, "data_root": options.data_root, "cpu": gpus == 0}
    with environment({**_TUNE, "TUNE_MAX_PENDING_TRIALS_PG": str(pending)}), contextlib.redirect_stdout(sys.stderr):
        for precision in queue.precisions:
            searcher = ShardSearcher(queue, precision, common)
            _fit(searcher, _bundle(options.cpus, gpus), workers, Reporter(progress))


def _fit(searcher: ShardSearcher, bundle: dict[str, float], workers: int | None, reporter: Reporter) -> None:
    """One Tune run. Its own files go to a folder that goes with it; it never raises on failed trials."""
    with tempfile.TemporaryDirectory(prefix="prunesweep-tune-", ignore_cleanup_errors=True) as storage:
        tune.Tuner(
            tune.with_resources(ShardTrainable, tune.PlacementGroupFactory([bundle])),
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
                callbacks=[reporter],
                failure_config=tune.FailureConfig(max_failures=0),
                checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
            ),
        ).fit()


def _bundle(cpus: float, gpus: float) -> dict[str, float]:
    return {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}


def _gpus(options: Options) -> float:
    if options.gpus != "auto":
        return float(options.gpus)
    return 1.0 if ray.cluster_resources().get("GPU", 0) >= 1 else 0.0


def _slots(cpus: float, gpus: float) -> int:
    """How many shards fit on the cluster at once."""
    there = ray.cluster_resources()
    wanted = _bundle(cpus, gpus)
    return max(1, min(int(there.get(name, 0) // amount) for name, amount in wanted.items()))


def _check_fits(cpus: float, gpus: float) -> None:
    """Raise UserError where no node could ever run one shard."""
    wanted = _bundle(cpus, gpus)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(all(node.get(name, 0) >= amount for name, amount in wanted.items()) for node in nodes):
        has = "; ".join(", ".join(f"{node.get(name, 0):g} {name}" for name in ("CPU", "GPU")) for node in nodes)
        asked = ", ".join(f"{amount:g} {name}" for name, amount in wanted.items())
        raise UserError(f"a shard asks for {asked}, and no node of the cluster has that (it has {has})")
