"""What tests share: a tiny sweep, stores, and a real Ray cluster on loopback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from storage.store import Store

settings.register_profile("patient", deadline=None)  # these machines are slow at times
settings.load_profile("patient")

# Before ray is imported anywhere: no token is written to the home folder, no call to the outside.
os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "MPLBACKEND": "Agg"}
for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "PRUNESWEEP_STORE"):
    os.environ.pop(name, None)

# Under another name, which test processes inherit and the commands under test do not look at.
DATA_ROOT = os.environ.setdefault("PRUNESWEEP_TEST_DATA", os.environ.pop("PRUNESWEEP_DATA_ROOT", ""))
"""Real data, where it is at hand."""

TINY = """\
name: tiny
grid:
  model: lenet5_mini
  dataset: synthetic
  layers: conv1
  ratio: 0.2
  pruner: oracle
  seed: [0, 1]
candidates: {mode: sample, count: 4, seed: 0}
dense:   {epochs: 3, batch_size: 32, lr: 0.05, momentum: 0.9}
retrain: {epochs: 2, batch_size: 64, lr: {0: 0.01, 1: 0.001}, momentum: 0.9}
resources: {candidates_per_shard: 2, workers: 1}
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """The file of a sweep of 4 candidates x 2 seeds that takes seconds."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="session")
def mnist_root() -> str:
    """The data root with the real MNIST; the test is skipped where there is none."""
    if not DATA_ROOT or not Path(DATA_ROOT, "MNIST", "raw").is_dir():
        pytest.skip("no real MNIST here: set PRUNESWEEP_DATA_ROOT to a folder with torchvision's MNIST")
    return DATA_ROOT


@pytest.fixture(autouse=True)
def no_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let commands in this process report no phase, however slow the machine is: tests compare what stderr says."""
    from orchestrator import cli
    from orchestrator.phases import Phases

    monkeypatch.setattr(cli, "Phases", partial(Phases, quiet=1e6))


Prunesweep = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def prunesweep(tmp_path: Path) -> Prunesweep:
    """The command, as a person would run it, in a working directory of its own."""

    def run(*arguments: str, cwd: Path = tmp_path, **env: str) -> subprocess.CompletedProcess[str]:
        given = [command(), *arguments]
        return subprocess.run(given, cwd=cwd, capture_output=True, text=True, timeout=280, env=os.environ | env)

    return run


def command() -> str:
    """The installed command, beside this Python."""
    return str(Path(sys.executable).with_name("prunesweep"))


@dataclass(frozen=True)
class Cluster:
    """A Ray head on loopback: where drivers connect, and where its job server is."""

    address: str
    jobs: str


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """`ray start --head` with two CPUs, for the whole test session."""
    with ray_head(tmp_path_factory.mktemp("ray")) as head:
        yield head


@contextmanager
def ray_head(folder: Path, **env: str) -> Iterator[Cluster]:
    """A Ray head with two CPUs, its log in `folder`; only our own process is ended."""
    port, dashboard = free_port(), free_port()
    arguments = ["start", "--head", "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1"]
    arguments += [f"--port={port}", "--num-cpus=2", "--include-dashboard=true", "--dashboard-host=127.0.0.1"]
    # Of its own, as other Ray heads may run here: embedded ones take the default.
    arguments += [f"--dashboard-agent-listen-port={free_port()}"]
    arguments += [f"--dashboard-port={dashboard}", f"--temp-dir=/tmp/ps-{os.getpid()}-{port}"]
    log = folder / "head.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name("ray")), *arguments],
            cwd=folder,
            # As on a node where the environment was activated: a job's entrypoint runs its `python`.
            env=os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"} | env,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        jobs = f"http://127.0.0.1:{dashboard}"
        _wait_for_job_server(jobs, process, log)
        yield Cluster(f"127.0.0.1:{port}", jobs)
    finally:
        process.terminate()  # it ends what it started
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def _wait_for_job_server(jobs: str, process: subprocess.Popen[bytes], log: Path) -> None:
    import urllib.error
    import urllib.request

    for _ in range(480):
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(f"{jobs}/api/version", timeout=2).close()
            return
        except urllib.error.HTTPError:  # it is there, and wants a token
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.25)
    pytest.fail(f"the Ray head did not come up:\n{log.read_text()}")


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def quick_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A working directory with quick.yaml, whose jobs run quick tasks; and its store."""
    from orchestrator import jobs
    from storage.store import Store
    from tests.faults.quick import spec

    real = jobs.entrypoint
    monkeypatch.setattr(jobs, "entrypoint", lambda job: real(job).replace("-m prunesweep", "-m tests.faults.quick", 1))
    monkeypatch.chdir(tmp_path)
    Path("quick.yaml").write_text(spec(count=10, resources="candidates_per_shard: 2, workers: 2"))
    return Store(tmp_path / "results")


SLOWEST_FIRST = (
    "test_readme",
    "test_workers",
    "test_drivers",
    "test_cluster",
    "test_auth",
    "test_doctor",
    "test_poison",
    "test_together",
    "test_nodes",
    "test_fair",
    "test_interrupt",
    "test_runners",
    "test_tracking",
    "test_studies",
)
"""Files of long tests: begun last, one of them would keep one processor waiting for the other."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; xdist hands files out in this order."""
    places = {name: place for place, name in enumerate(SLOWEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))
