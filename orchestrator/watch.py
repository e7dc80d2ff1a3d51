"""The watch over the Ray that a run needs: where its node or control store dies, the run ends with exit code 4.

Ray itself lets a driver without its node wait for ever, and aborts one without its control store from C++.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from orchestrator.errors import ClusterError
from storage.machine import is_alive, process_started

if TYPE_CHECKING:
    from orchestrator.drivers import Driver

LOOK_SECONDS = 1.0

ASK_SECONDS = 3.0
"""How often the control store is asked for this node, and its time for an answer."""

BEFORE_RAY_SECONDS = 15.0
"""A run ends this long before Ray would abort it for a control store that does not answer."""

GRACE_SECONDS = 6.0
"""How long a run may take to end before its process does."""

NEEDED = ("gcs_server", "raylet")
_NAMES = {"gcs_server": "control store (gcs_server)", "raylet": "node (raylet)"}


class ClusterLost(ClusterError):
    """The cluster has died under a run."""


@dataclass
class Watch:
    """Ends the run of the main thread by a KeyboardInterrupt, and this process where that is not enough.

    `processes` are those of an embedded Ray, name -> (pid, start); `answers` asks the control store whether this node
    lives; `again` is the command that resumes; `leave` is called before this process is ended.
    """

    where: str
    again: str
    processes: Mapping[str, tuple[int, float]]
    answers: Callable[[], bool]
    driver: Driver | None = None
    leave: Callable[[], None] = lambda: None
    patience: float = 45.0
    reason: str | None = None
    _answered: float = field(default_factory=time.monotonic)
    _node_lives: bool = True
    _thread: int = field(default_factory=lambda: threading.main_thread().ident or 0)
    _over: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self) -> None:
        """Begin to watch, on two threads: a question to a store that is gone blocks one."""
        for target in (self._look, self._ask):
            threading.Thread(target=target, name="watch over Ray", daemon=True).start()

    def end(self) -> None:
        """Interrupt the main thread no more."""
        while not self._over.is_set():
            with suppress(KeyboardInterrupt), self._lock:
                self._over.set()

    def lost(self) -> str | None:
        """Return why the cluster is lost, None where it is not."""
        if self.reason:
            return self.reason
        for name, (pid, started) in self.processes.items():
            if not is_alive(pid, started):
                return f"its {_NAMES[name]}, process {pid}, has died"
        if not self._node_lives:
            return "its node has died"
        silent = time.monotonic() - self._answered
        return f"its control store has not answered for {silent:.0f} s" if silent > self.patience else None

    @property
    def message(self) -> str:
        """What to say of the loss."""
        resume = f"; what was committed stays. Go on with\n  {self.again}" if self.again else ""
        return f"{self.where} is lost: {self.reason or self.lost()}{resume}"

    def _look(self) -> None:
        while not self._over.wait(LOOK_SECONDS):
            if reason := self.lost():
                self._interrupt(reason)
                return

    def _ask(self) -> None:
        while not self._over.wait(ASK_SECONDS):
            with suppress(Exception):  # no answer is one
                self._node_lives = self.answers()
                self._answered = time.monotonic()

    def _interrupt(self, reason: str) -> None:
        with self._lock:
            if self._over.is_set():
                return
            self.reason = reason
            if self.driver:
                self.driver.stop.set()  # so that the signal is not taken for a first wish to stop
            with suppress(ProcessLookupError):
                signal.pthread_kill(self._thread, signal.SIGINT)
        if not self._over.wait(GRACE_SECONDS):
            self._exit()

    def _exit(self) -> None:
        """End this process in the main thread's stead, which waits within Ray."""
        from orchestrator.cli import EXIT_CODES

        os.write(2, f"prunesweep: {self.message}\n".encode())
        for last in (self.driver.withdraw if self.driver else lambda: None, self.leave):
            thread = threading.Thread(target=last, daemon=True)
            thread.start()
            thread.join(GRACE_SECONDS)
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        os._exit(EXIT_CODES[ClusterError])


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Watch as long as this lasts. Raises ClusterLost in place of what a lost cluster makes the run raise."""
    watch.start()
    try:
        yield
    except (KeyboardInterrupt, Exception) as error:
        watch.end()
        if watch.lost():
            raise ClusterLost(watch.message) from error
        raise
    finally:
        watch.end()
    if watch.reason:
        raise ClusterLost(watch.message)


def needed_processes() -> dict[str, tuple[int, float]]:
    """Return the processes of the embedded Ray that this process has started, without which it cannot run."""
    from ray._private import worker

    node: Any = worker._global_node
    found: dict[str, tuple[int, float]] = {}
    for name in NEEDED:
        for one in node.all_processes.get(name, ()):
            with suppress(Exception):  # one that has died already is missed by the control store
                found[name] = one.process.pid, process_started(one.process.pid)
    return found


def node_lives() -> Callable[[], bool]:
    """Return a question to the control store: whether it knows the node of this driver as alive. It raises where the
    store does not answer in time."""
    import ray
    from ray._private import worker

    mine = ray.NodeID.from_hex(ray.get_runtime_context().get_node_id())
    of_driver: Any = worker.global_worker
    client = of_driver.gcs_client

    def ask() -> bool:
        found = client.get_all_node_info(timeout=ASK_SECONDS)
        return mine not in found or found[mine].state == _ALIVE

    return ask


_ALIVE = 0
"""GcsNodeInfo.ALIVE."""


def reconnect_seconds(environ: Mapping[str, str] = os.environ) -> float:
    """Return how long a control store may be silent: less than Ray allows it to."""
    try:
        of_ray = float(environ.get("RAY_gcs_rpc_server_reconnect_timeout_s", "60"))
    except ValueError:
        of_ray = 60.0
    return max(3 * ASK_SECONDS, of_ray - BEFORE_RAY_SECONDS)
