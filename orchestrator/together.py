"""Several processes for each task: Ray Train starts them, Accelerate joins them, the first one decides and writes.

A shard is a Tune trial as ever; its actor only waits. Where a task fails, or a process dies, all end, and
what is left begins anew.
"""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import astuple, replace
from typing import Any

import ray
from ray import tune
from ray.util.queue import Empty, Queue

from orchestrator.account import Failure, failure
from orchestrator.credentials import take_credentials
from orchestrator.endings import End, Ending, told
from orchestrator.placement import Placement
from orchestrator.tracking import measured
from storage.records import Shard
from storage.store import Store
from workers.pulse import Limits, Pulse
from workers.worker import Parted, Worker

LAST_WORD_SECONDS = 2.0


class TogetherTrainable(tune.Trainable):
    """Tune's side of the processes that run a shard."""

    def setup(self, config: dict[str, Any]) -> None:
        self.begin(config)

    def begin(self, config: dict[str, Any]) -> None:
        """Have the shard of `config` to run."""
        self.left, self.common = Shard.from_dict(config["shard"]), config

    def where(self) -> str:
        """Nowhere in particular: its processes may be on several nodes."""
        return ""

    def step(self) -> dict[str, Any]:
        """Run what is left of the shard, to its end or to the first task that fails."""
        found = run_processes({**self.common, "shard": self.left.to_dict()})
        failed = {task_id for task_id, *_ in found["failures"]}
        self.left = replace(self.left, tasks=tuple(t for t in self.left.tasks if t.task_id not in failed))
        if found["ending"] is None and not self.left.tasks:
            found["ending"] = astuple(Ending(End.FINISHED))
        return found

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: what is done is in the store."""


def run_processes(config: dict[str, Any]) -> dict[str, Any]:
    """What the first process tells of a shard's run. Raises what ended the processes where it told nothing."""
    # Here, since it imports torch, which a driver does without.
    from ray import train
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    words, lost = Queue(actor_options={"num_cpus": 0}), None
    try:
        with tempfile.TemporaryDirectory(prefix="prunesweep-train-", ignore_cleanup_errors=True) as storage:
            TorchTrainer(
                in_each_process,
                train_loop_config={**config, "words": words},
                scaling_config=train.ScalingConfig(
                    num_workers=config["processes"],
                    use_gpu=config["gpus"] > 0,
                    resources_per_worker=Placement(config["cpus"], config["gpus"]).bundle(config["gpus"]),
                ),
                run_config=train.RunConfig(storage_path=storage),
            ).fit()
    except TrainingFailedError as error:
        lost = error
    try:
        return words.get(timeout=LAST_WORD_SECONDS)
    except Empty:
        raise lost or RuntimeError("the processes ended without a word") from None
    finally:
        words.shutdown(grace_period_s=0)


class Ended(Exception):
    """The first process has told how the shard ended; the others wait for it in vain, and are to be ended."""


def in_each_process(config: dict[str, Any]) -> None:
    """Run a shard as one of its processes. Raises Ended where the others cannot come to the same end."""
    from ray import train

    take_credentials()
    store, shard = Store(config["store"]), Shard.from_dict(config["shard"])
    leads = train.get_context().get_world_rank() == 0
    with pulse_of(store, config) if leads else contextlib.nullcontext() as pulse:
        worker = Worker(store, config["data_root"], shard.precision, cpu=config["cpu"], pulse=pulse, joined=True)
        if not leads:
            for _ in worker.run_shard(shard):
                pass
            return
        found = _told(worker, shard)
        config["words"].put(found)
    if found["ending"] != astuple(Ending(End.FINISHED)):
        raise Ended


def pulse_of(store: Store, config: dict[str, Any]) -> Pulse:
    """The sign of life of this process, a worker of the driver that made `config`."""
    where = {"node": ray.get_runtime_context().get_node_id()}
    return Pulse(store, config["driver"], Limits(**config["limits"]), where)


def _told(worker: Worker, shard: Shard) -> dict[str, Any]:
    """Run a shard, and what is to be told of it: no ending where a task failed, and others are left."""
    done, failures, ending = 0, list[Failure](), Ending(End.FINISHED)
    measures: list[dict[str, float]] = []
    try:
        for row in worker.run_shard(shard):
            done += row.status == "done"
            failures += [failure(row)] if row.status == "failed" else []
            measures.append(measured(row))
    except Parted:
        ending = None
    except Exception as error:
        ending = told(error)
    return {
        "tasks_done": done,
        "failures": failures,
        "measures": measures,
        "messages": worker.take_messages(),
        "ending": None if ending is None else astuple(ending),
    }
