"""Two nodes with addresses of their own, in network namespaces joined by a bridge, whose link is cut and healed.

It runs where this process may make network namespaces (root with CAP_NET_ADMIN, and iproute2), else is skipped.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.faults.quick import spec
from tests.faults.runs import Sweep, quick
from tests.sweeps import assert_invariants, committed, rows
from tests.test_nodes import wait_until

CUT_SECONDS = 60
"""The head gives a node up after 4 s without an answer (HEALTH)."""

HEALTH = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}


def _may() -> bool:
    """Whether this process may make and remove a network namespace."""
    if shutil.which("ip") is None:
        return False
    name = f"ps-try-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    return made and subprocess.run(["ip", "netns", "del", name], capture_output=True).returncode == 0


@dataclass
class Net:
    """A bridge and namespaces at it, each with one address 10.77.0.N. What was made is removed by `close`."""

    bridge: str
    names: list[str] = field(default_factory=list)
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def kept(self) -> str:
        """Where Ray keeps its files: a short path, for its sockets."""
        return f"/tmp/{self.bridge}"

    def open(self) -> None:
        _ip("link", "add", self.bridge, "type", "bridge")
        _ip("link", "set", self.bridge, "up")

    def add(self, number: int) -> str:
        """A namespace with the address 10.77.0.<number>; its name."""
        name, outer, inner = f"{self.bridge}-{number}", self.outer(number), f"{self.bridge}i{number}"
        _ip("netns", "add", name)
        self.names.append(name)
        _ip("link", "add", outer, "type", "veth", "peer", "name", inner)
        _ip("link", "set", outer, "master", self.bridge, "up")
        _ip("link", "set", inner, "netns", name)
        _ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", inner)
        _ip("-n", name, "link", "set", inner, "up")
        _ip("-n", name, "link", "set", "lo", "up")
        return name

    def outer(self, number: int) -> str:
        """The end of a namespace's link that is at the bridge."""
        return f"{self.bridge}o{number}"

    def ray(self, name: str, log: Path, *arguments: str) -> subprocess.Popen[bytes]:
        """`ray start` in a namespace, with a folder of its own for what Ray keeps."""
        ray = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats", *arguments]
        # Nodes of one session share a folder, which machines do not; `ip netns exec` makes a namespace of mounts too.
        alone = f'mkdir -p {self.kept} && mount -t tmpfs none {self.kept} && exec "$@"'
        command = ray if "--head" in arguments else ["sh", "-c", alone, "sh", *ray]
        with log.open("w") as out:
            process = subprocess.Popen(
                ["ip", "netns", "exec", name, *command],
                stdout=out,
                stderr=out,
                env=os.environ | HEALTH | {"QUICK_SECONDS": "0.3"},
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def close(self) -> None:
        """End what runs in the namespaces, by its ids; remove them, their links and the bridge."""
        for name in self.names:
            inside = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()
            for pid in inside:
                _kill(int(pid))
        for process in self.processes:
            process.wait(30)
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        subprocess.run(["ip", "link", "del", self.bridge], capture_output=True)
        shutil.rmtree(self.kept, ignore_errors=True)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


@pytest.fixture
def net() -> Iterator[Net]:
    if not _may():
        pytest.skip("this machine lets this process make no network namespaces (root, CAP_NET_ADMIN, iproute2)")
    found = Net(f"ps{os.getpid() % 100_000}")
    try:
        found.open()
        yield found
    finally:
        found.close()


def _in(name: str, sweep: Sweep, *arguments: str) -> subprocess.Popen[str]:
    """A driver in a namespace."""
    return sweep.start(*arguments, within=("ip", "netns", "exec", name))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_link_that_is_cut_and_healed(net: Net, tmp_path: Path) -> None:
    """The node behind the link is lost, with the tasks it was at; the sweep goes on without it, uses a node that
    comes in its place once the link is healed, and at the end every task is done once and nothing is lost."""
    here, there = net.add(1), net.add(2)
    address, cpu = "10.77.0.1:6379", "--num-cpus=1"
    net.ray(here, tmp_path / "head.log", "--head", "--node-ip-address=10.77.0.1", "--port=6379", cpu,
            "--include-dashboard=false", f"--temp-dir={net.kept}")  # fmt: skip
    wait_until(lambda: "Ray runtime started" in (tmp_path / "head.log").read_text(), 120)
    lost = net.ray(there, tmp_path / "node.log", f"--address={address}", "--node-ip-address=10.77.0.2", cpu)
    wait_until(lambda: "Ray runtime started" in (tmp_path / "node.log").read_text(), 120)
    sweep = quick(tmp_path, spec(count=45, seeds=12))
    driver = _in(here, sweep, "run", "quick.yaml", "--address", address)
    assert sweep.wait_for(lambda: len(_nodes_at_work(sweep)) == 2, driver)
    before = committed(sweep.store)
    _ip("link", "set", net.outer(2), "down")
    time.sleep(CUT_SECONDS)
    assert sweep.wait_for(lambda: len(committed(sweep.store)) > len(before) + 5, driver), sweep.said()
    _ip("link", "set", net.outer(2), "up")
    lost.wait(90)  # it learns that it was given up, and ends: who keeps nodes alive starts it again
    again = len(committed(sweep.store))
    net.ray(there, tmp_path / "again.log", f"--address={address}", "--node-ip-address=10.77.0.2", cpu)
    assert sweep.wait_for(lambda: len(_nodes_at_work(sweep)) == 2, driver), sweep.said()
    assert driver.wait(300) == 0, sweep.said()
    assert len(before) < again
    assert before <= committed(sweep.store)
    assert_invariants(sweep.store, "quick", committed(sweep.store), sweep.reference())
    assert len(rows(sweep.store)) == 540


def _nodes_at_work(sweep: Sweep) -> set[str]:
    from storage.signs import age

    return {str(n["node"]) for n in sweep.notes().values() if n["task"] and age(n) < 5}
