"""The runner without Ray: shards in this process, one after the other, for debugging.

What ends a process ends the run: limits of time and memory are for Ray's workers.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING

from orchestrator.endings import End, Ending, told
from storage.records import Row, Shard
from storage.store import Store
from workers.pulse import Limits, Pulse
from workers.worker import Worker

if TYPE_CHECKING:
    from orchestrator.account import Account
    from orchestrator.drivers import Driver
    from orchestrator.run import Options

BUSY_SECONDS = 0.5
"""How long to wait while other drivers have all that is left."""


def run_inline(account: Account, store: Store, options: Options, driver: Driver) -> None:
    """Run a queue to its end, or until the driver is asked to stop."""
    limits = Limits(checkpoint_seconds=options.limits.checkpoint_seconds)
    with Pulse(store, driver.id, limits, stop=driver.stop) as pulse:
        worker = Worker(store, options.data_root, cpu=options.gpus == 0, pulse=pulse)
        while not driver.stop.is_set() and (precision := account.queue.precision):
            _run(precision, worker, options, account, driver)


def _run(precision: str, worker: Worker, options: Options, account: Account, driver: Driver) -> None:
    queue = account.queue
    while not (driver.stop.is_set() or queue.exhausted(precision)):
        shard = queue.next(precision, driver.elsewhere)
        if shard is None:
            driver.stop.wait(BUSY_SECONDS)
            continue
        ending = Ending(End.FINISHED)
        try:
            for row in _rows(shard, worker, driver.id):
                account.row(row)
        except Exception as error:
            if options.debug:
                raise
            ending = told(error)
        if ending.kind is End.ELSEWHERE:
            driver.leave(shard.shard_id)
        account.say_all(worker.take_messages())
        account.ended(shard.shard_id, ending)


def _rows(shard: Shard, worker: Worker, driver_id: str) -> Iterator[Row]:
    """The shard's rows; a precision other than this process's in a process of its own."""
    if shard.precision == worker.precision:
        yield from worker.run_shard(shard)
        return
    assert worker.pulse is not None
    here = (worker.store.absolute, worker.data_root, worker.cpu, driver_id, worker.pulse.limits)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        yield from pool.submit(_elsewhere, shard, *here).result()


def _elsewhere(shard: Shard, location: str, data_root: str, cpu: bool, driver_id: str, limits: Limits) -> list[Row]:
    """The shard's rows, by a worker that heeds the driver's wish to stop; signals are the driver's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    store = Store(location)
    with Pulse(store, driver_id, limits) as pulse:
        return list(Worker(store, data_root, shard.precision, cpu=cpu, pulse=pulse).run_shard(shard))
