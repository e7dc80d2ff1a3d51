"""Quick sweeps as jobs of a cluster: everything is real but what a task computes."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from storage.store import Store
from tests.sweeps import committed

ROOT = Path(__file__).parents[1]


def quickly(seconds: float = 0.05) -> tuple[str, ...]:
    """The options of `submit` and `resume` for a quick job."""
    image = ("--image-has-prunesweep", "--env", f"PYTHONPATH={ROOT}", "--env", f"QUICK_SECONDS={seconds}")
    return (*image, "--env", "QUICK_POISON")


def wait_for(what: Callable[[], bool], seconds: float = 90) -> None:
    """Until something is so; the test fails where it does not become so."""
    give_up = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < give_up, "it did not come to be"
        time.sleep(0.1)


def rows_of(store: Store) -> int:
    """How many tasks are done."""
    return len(committed(store)) if store.exists() else 0
