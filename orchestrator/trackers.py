"""Experiment trackers, told through Ray's own callbacks.

A shard is a run of the tracker, a task a step of it. What a tracker cannot do is said once, and the sweep goes on:
the rows are in the store, whatever a tracker has of them.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import ray
from ray import tune
from ray.air.constants import TRAINING_ITERATION
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.errors import first_line
from orchestrator.progress import say
from storage.records import Shard

if TYPE_CHECKING:
    from ray.tune.logger import LoggerCallback

PROJECT = "prunesweep"
_WANDB_KEY = "WANDB_API_KEY"

UPLOAD_SECONDS = 60
"""So long a sweep waits at its end for what wandb has still to send."""


@dataclass(frozen=True, eq=False)
class ShardRun:
    """What Ray's callbacks ask of a trial: here of a shard, described by its cell."""

    trial_id: str
    experiment_dir_name: str
    local_path: str
    name: str
    config: dict[str, Any]

    def __str__(self) -> str:
        return self.name


class Trackers(tune.Callback):
    """Passes on what the workers of a sweep report of their tasks."""

    def __init__(self, tracker: str, sweep: str) -> None:
        self.sweep, self.works, self.begun = sweep, True, 0
        self.runs: dict[str, ShardRun] = {}
        self.steps: Counter[str] = Counter()
        self.tracker: LoggerCallback | None = None
        self._tell(lambda: setattr(self, "tracker", _OF[tracker](sweep)))

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its callbacks, to restore them."""
        return {}

    def setup(
        self, stop: Any = None, num_samples: int | None = None, total_num_samples: int | None = None, **info: Any
    ) -> None:
        self._tell(lambda: self._told.setup())

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        for measures in result["measures"]:
            self._tell(lambda measures=measures: self._task(trial, measures))
        if result["ending"] is not None:  # the trial, which is a worker, may go on with another shard
            self._end(trial, failed=False)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._end(trial, failed=False)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._end(trial, failed=True)

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        self._tell(lambda: self._check(UPLOAD_SECONDS))
        self._tell(lambda: self._told.on_experiment_end([]))

    def _check(self, seconds: float = 0) -> None:
        """Raise what ended a process in which Ray tells wandb of a run, or TimeoutError where one is still there after
        `seconds`, unless that is at once. Ray itself never looks."""
        working = list(getattr(self._told, "_trial_logging_futures", {}).values())
        if not working:
            return
        ended, late = ray.wait(working, num_returns=len(working), timeout=seconds)
        for one in ended:
            try:
                ray.get(one)
            except RayTaskError as error:
                raise error.cause from None
        if late and seconds:
            left = f"{len(late)} runs could not be sent within {seconds:g} s"
            raise TimeoutError(f"{left}; WANDB_MODE=offline keeps them here")

    @property
    def _told(self) -> LoggerCallback:
        assert self.tracker is not None
        return self.tracker

    def _task(self, trial: Any, measures: dict[str, float]) -> None:
        run = self.runs.get(trial.trial_id)
        if run is None:
            self.begun += 1
            run = self.runs[trial.trial_id] = shard_run(self.sweep, trial, f"{trial.trial_id}-{self.begun}")
            self._told.log_trial_start(run)  # pyright: ignore[reportArgumentType]
        self.steps[trial.trial_id] += 1
        result = {**measures, TRAINING_ITERATION: self.steps[trial.trial_id]}
        self._told.log_trial_result(self.steps[trial.trial_id], run, result)  # pyright: ignore[reportArgumentType]

    def _end(self, trial: Any, *, failed: bool) -> None:
        run = self.runs.pop(trial.trial_id, None)
        self.steps.pop(trial.trial_id, None)
        if run is not None:
            self._tell(self._check)  # Ray drops what has ended as it is told of an end
            self._tell(lambda: self._told.log_trial_end(run, failed))  # pyright: ignore[reportArgumentType]

    def _tell(self, what: Callable[[], Any]) -> None:
        if not self.works:
            return
        try:
            what()
        except Exception as error:  # whatever a tracker's library raises: the sweep does not depend on it
            self.works = False
            say(f"the tracker is told nothing more, the sweep goes on: {first_line(error)}")


def shard_run(sweep: str, trial: Any, run_id: str) -> ShardRun:
    """The shard that a trial is at, as a tracker sees it: named after the shard, with its cell as configuration."""
    shard = Shard.from_dict(trial.config["shard"])
    cell = shard.tasks[0].cell
    config = {
        "sweep": sweep,
        "shard": shard.shard_id,
        "cell_id": cell.cell_id,
        "model": cell.dense.model,
        "dataset": cell.dense.dataset,
        "layers": " ".join(name for name, _ in cell.layers),
        "ratios": " ".join(f"{ratio:g}" for _, ratio in cell.layers),
        "pruner": cell.pruner,
        "precision": cell.precision,
        "propagation": cell.propagation,
        "schedule": cell.schedule,
        "tasks": len(shard.tasks),
    }
    return ShardRun(run_id, sweep, trial.local_path, f"{sweep} {shard.shard_id}", config)


def _wandb(sweep: str) -> LoggerCallback:
    """Runs grouped by sweep. Ray's logger works in a folder that goes with the run: offline runs are kept in ours."""
    import_module("wandb")  # Ray would not say what of it is missing
    from ray.air.integrations.wandb import WandbLoggerCallback

    kept = os.path.abspath(os.environ.get("WANDB_DIR", Path.cwd()))
    mode: dict[str, Any] = {"mode": os.environ["WANDB_MODE"]} if "WANDB_MODE" in os.environ else {}
    project = os.environ.get("WANDB_PROJECT", PROJECT)
    callback: Any = WandbLoggerCallback(project, group=sweep, dir=kept, **mode)
    callback._remote_logger_class = _with_key(callback._logger_actor_cls)
    return callback


def _with_key(logging: Any) -> Any:
    """The actor class with which Ray tells wandb of a run. Ray would pass the API key on as a variable of its runtime
    environment, which is in command lines and logs; here it is an argument."""

    class WithKey(logging):
        def __init__(self, *args: Any, key: str | None, **kwargs: Any) -> None:
            os.environ.update({_WANDB_KEY: key} if key else {})
            super().__init__(*args, **kwargs)

    here: Any = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote: Any = ray.remote(num_cpus=0, scheduling_strategy=here, max_restarts=-1, max_task_retries=-1)(WithKey)
    return SimpleNamespace(remote=partial(remote.remote, key=os.environ.get(_WANDB_KEY)))


def _mlflow(sweep: str) -> LoggerCallback:
    """An experiment named after the sweep, at MLFLOW_TRACKING_URI; without it in the file mlflow.db here."""
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mlflow.db').absolute()}"
    return MLflowLoggerCallback(uri, experiment_name=os.environ.get("MLFLOW_EXPERIMENT_NAME", sweep))


_OF: dict[str, Callable[[str], LoggerCallback]] = {"wandb": _wandb, "mlflow": _mlflow}
