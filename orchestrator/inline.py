"""The runner without Ray: shards in this process, one after the other, for debugging."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING

from orchestrator.progress import Progress
from orchestrator.queue import Queue
from storage.records import Row, Shard
from storage.store import Store
from workers.worker import Worker

if TYPE_CHECKING:
    from orchestrator.run import Options


def run_inline(queue: Queue, store: Store, options: Options, progress: Progress) -> None:
    """Run a queue to its end. Interrupts pass through; a dense model's error ends with it."""
    worker = Worker(store, options.data_root, cpu=options.gpus == 0)
    for precision in queue.precisions:
        _run(queue, precision, worker, options, progress)


def _run(queue: Queue, precision: str, worker: Worker, options: Options, progress: Progress) -> None:
    while (shard := queue.next(precision)) is not None:
        try:
            for row in _rows(shard, worker):
                progress.advance(row.status == "done", row.status != "done")
        except Exception as error:
            if options.debug:
                raise
            queue.failed(shard.shard_id, f"{type(error).__name__}: {error}")
        else:
            queue.succeeded(shard.shard_id)


def _rows(shard: Shard, worker: Worker) -> Iterator[Row]:
    """The shard's rows; a precision other than this process's in a process of its own."""
    if shard.precision == worker.precision:
        yield from worker.run_shard(shard)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        yield from pool.submit(_elsewhere, shard, worker.store.absolute, worker.data_root, worker.cpu).result()


def _elsewhere(shard: Shard, location: str, data_root: str, cpu: bool) -> list[Row]:
    return list(Worker(Store(location), data_root, shard.precision, cpu=cpu).run_shard(shard))
