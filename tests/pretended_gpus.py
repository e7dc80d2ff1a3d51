"""Run by test_runners: shards are packed on two GPUs that are only pretended, two on each as 3 GiB hold.

Prints the device each worker was given, sorted. Every worker waits until all four are there.
"""

from __future__ import annotations

import logging
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import ray
import ray.cloudpickle

from orchestrator import placement, ray_runner
from orchestrator.account import Account
from orchestrator.drivers import Driver
from orchestrator.progress import Progress
from orchestrator.queue import Queue
from orchestrator.run import Options
from storage.records import Cell, Dense, Recipe, Row, Shard, Task
from storage.store import Store

HERE = Path.cwd()


class Placed:
    """A worker that notes what it was given, and waits for the others."""

    def __init__(self, *_: object, **__: object) -> None:
        self.precision = "fp32"

    def take_messages(self) -> list[str]:
        return []

    def run_shard(self, shard: Shard) -> Iterator[Row]:
        (HERE / f"placed-{shard.shard_id}").write_text(os.environ["CUDA_VISIBLE_DEVICES"])
        for _ in range(1500):
            if len(list(HERE.glob("placed-*"))) == 4:
                return
            time.sleep(0.1)
        raise TimeoutError("the others never came")
        yield  # a generator: nothing runs before Tune asks for a step


def main() -> None:
    recipe = Recipe(1, 1, ((0, 0.1),))
    cell = Cell(Dense("lenet5_mini", "synthetic", recipe), (("conv1", 0.2),), "oracle", recipe)
    queue = Queue.of([Shard(f"s{i}", (Task(cell, i, 0),)) for i in range(4)], [], random.Random(0))
    ray_runner.Worker = Placed  # pyright: ignore[reportAttributeAccessIssue]
    placement.gpu_memory = lambda: 3 << 30
    ray.init(address="local", num_cpus=4, num_gpus=2, include_dashboard=False, logging_level=logging.ERROR)
    ray.cloudpickle.register_pickle_by_value(ray_runner)
    ray.cloudpickle.register_pickle_by_value(sys.modules["__main__"])
    store = Store(str(HERE / "store"))
    with Driver(store, "pretended", None, dict) as driver:
        ray_runner.run_on_ray(Account(store, queue, Progress(4)), store, Options(gpus="auto"), driver)
    print(*sorted(path.read_text() for path in HERE.glob("placed-*")))


if __name__ == "__main__":
    main()
