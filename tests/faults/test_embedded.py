"""An embedded Ray: what ends with what, where it listens, what of its environment can be read by others."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from orchestrator import embedded
from orchestrator.embedded import SETTING, SOCKET_BYTES, check_folder, is_late, start_embedded, start_seconds
from orchestrator.errors import ClusterError, UserError
from orchestrator.guardian import processes, sessions_of
from orchestrator.watch import ClusterLost, Watch, reconnect_seconds, watched
from storage.machine import is_alive, process_started
from storage.signs import Sign
from storage.store import Store
from tests.faults.quick import spec
from tests.faults.runs import Sweep, quick
from tests.s3 import BUCKET, s3_server
from tests.sweeps import committed

slow = pytest.mark.slow


@contextmanager
def at_work(sweep: Sweep, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A run on an embedded Ray of its own that has committed a row. Nothing of it is left afterwards."""
    process = sweep.start("run", "quick.yaml", *arguments)
    try:
        assert sweep.wait_for(lambda: bool(committed(sweep.store)), process), sweep.said()
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)
        for pid in processes(sessions_of(process.pid)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def of_ray(driver: int, name: str) -> int:
    """The process of a driver's Ray that is called so."""
    there = psutil.Process(driver).children(recursive=True)
    return next(one.pid for one in there if name in " ".join(one.cmdline()).split("--")[0])


def wait_until_ended(driver: int, seconds: float) -> None:
    """Until no process uses a Ray session of the driver."""
    end = time.monotonic() + seconds
    while (left := processes(sessions_of(driver))) and time.monotonic() < end:
        time.sleep(0.2)
    assert left == []


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("/raylet/raylet", signal.SIGKILL),
        pytest.param("/gcs_server", signal.SIGKILL, marks=slow),
        pytest.param("ray::DashboardAgent", signal.SIGKILL, marks=slow),
        pytest.param("ray::RuntimeEnvAgent", signal.SIGKILL, marks=slow),
        pytest.param("/raylet/raylet", signal.SIGSTOP, marks=slow),
        pytest.param("/gcs_server", signal.SIGSTOP, marks=slow),
    ],
)
def test_a_node_that_dies_ends_the_run(name: str, number: int, tmp_path: Path) -> None:
    """Exit code 4 within 60 s (two minutes for a process that freezes), the reason and the command that resumes;
    neither a process of Ray nor the driver's note is left."""
    sweep = quick(tmp_path, spec(count=40), seconds=0.5)
    with at_work(sweep) as driver:
        os.kill(of_ray(driver.pid, name), number)
        assert driver.wait(60 if number == signal.SIGKILL else 120) == 4, sweep.said()
        wait_until_ended(driver.pid, 30)
    said = sweep.said()
    assert "prunesweep: the embedded Ray is lost: its " in said and "what was committed stays. Go on with\n" in said
    assert said.rstrip().endswith("prunesweep resume quick --store results --data-root data")
    assert "Traceback" not in said and "internal error" not in said
    assert sweep.notes("drivers") == {}


@pytest.mark.timeout(300)
def test_ray_listens_on_loopback_and_ends_with_a_killed_driver(tmp_path: Path) -> None:
    """Every server of an embedded Ray is on 127.0.0.1. Nothing of it is left soon after the driver was killed."""
    sweep = quick(tmp_path, spec(count=40), seconds=0.5)
    with at_work(sweep) as driver:
        family = [psutil.Process(driver.pid), *psutil.Process(driver.pid).children(recursive=True)]
        open_at = {one.laddr.ip for process in family for one in listening(process)}
        assert open_at and {ip.removeprefix("::ffff:") for ip in open_at} == {"127.0.0.1"}
        assert len(processes(sessions_of(driver.pid))) >= 6
        driver.kill()
        driver.wait(30)
        wait_until_ended(driver.pid, 30)


def listening(process: psutil.Process) -> list[Any]:
    """The servers of a process."""
    try:
        return [one for one in process.net_connections() if one.status == psutil.CONN_LISTEN]
    except psutil.NoSuchProcess:
        return []


@pytest.mark.timeout(300)
def test_keys_of_the_store_are_in_no_command_line_and_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep in a bucket on an embedded Ray: workers have the keys, `ps` and Ray's session folder have not."""
    secret, seen = "hush-8c1f-hush", set[str]()
    with s3_server():
        for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "WANDB_API_KEY", "HF_TOKEN"):
            monkeypatch.setenv(name, secret)
        driver = quick(tmp_path, spec(count=6), seconds=0.2).start(
            "run", "quick.yaml", "--store", f"s3://{BUCKET}/keys"
        )
        while driver.poll() is None:
            for process in psutil.process_iter():
                with suppress(psutil.Error):
                    seen |= {word for word in process.cmdline() if secret in word}
            time.sleep(0.2)
    log = (tmp_path / "log").read_text()
    assert driver.returncode == 0 and "quick: 6 tasks done" in log, log
    assert seen == set() and secret not in log
    (session,) = Path(os.environ.get("RAY_TMPDIR", os.environ.get("TMPDIR", "/tmp")), "ray").glob(
        f"session_*_{driver.pid}"
    )
    files = [path for path in session.rglob("*") if path.is_file()]
    assert len(files) > 10 and not [path for path in files if secret.encode() in path.read_bytes()]


def test_keys_for_workers_of_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver on a cluster hands out the store's keys, and nothing else, until it ends."""
    import ray
    from ray.experimental import internal_kv

    from orchestrator import credentials

    kept: dict[tuple[bytes, bytes], bytes] = {}
    put = lambda key, value, namespace: kept.update({(namespace, key): value})  # noqa: E731
    monkeypatch.setattr(internal_kv, "_internal_kv_put", put)
    monkeypatch.setattr(internal_kv, "_internal_kv_get", lambda key, namespace: kept.get((namespace, key)))
    monkeypatch.setattr(internal_kv, "_internal_kv_del", lambda key, namespace: kept.pop((namespace, key)))
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_job_id=lambda: "01"))
    worker = {"AWS_ACCESS_KEY_ID": "the node's"}
    credentials.take_credentials(worker)
    assert worker == {"AWS_ACCESS_KEY_ID": "the node's"}
    with credentials.handed_out({"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "hush", "HF_TOKEN": "mine"}):
        credentials.take_credentials(worker)
    assert worker == {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "hush"} and kept == {}
    with credentials.handed_out({}):
        assert kept == {}


def test_a_folder_that_is_too_long_for_sockets() -> None:
    """Which variable to shorten, and to what; RAY_TMPDIR wins, as with Ray."""
    longest = SOCKET_BYTES - len(f"/ray/session_2026-01-01_00-00-00_000000_{os.getpid()}/sockets/plasma_store")
    check_folder({"TMPDIR": "/tmp"})
    check_folder({"TMPDIR": "/" + "x" * 200, "RAY_TMPDIR": "/tmp"})
    check_folder({"RAY_TMPDIR": "/tmp/" + "x" * (longest - 5)})
    for name in ("TMPDIR", "RAY_TMPDIR"):
        with pytest.raises(
            ClusterError, match=rf"{name}=/tmp/x+ has .* Set RAY_TMPDIR to a folder of at most {longest}"
        ):
            check_folder({name: "/tmp/" + "x" * (longest - 4)})
    with pytest.raises(ClusterError, match=r"RAY_TMPDIR=/dev/null is .* cannot be written to"):
        check_folder({"RAY_TMPDIR": "/dev/null"})


def test_a_start_that_is_late_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once, with a longer timeout; then the setting is named. What is not late is not tried again."""
    asked: list[float] = []

    def start(arguments: object, seconds: float) -> None:
        asked.append(seconds)
        if len(asked) <= failing:
            raise error

    monkeypatch.setattr(embedded, "_start", start)
    monkeypatch.delenv(SETTING, raising=False)
    error, failing = Exception("The current node timed out during startup."), 1
    start_embedded({})
    assert asked == [30, 120] and "trying again with a timeout of 120 s" in capsys.readouterr().err
    asked, failing = [], 2
    monkeypatch.setenv(SETTING, "50")
    with pytest.raises(ClusterError, match=f"within 200 s: The current node timed out .* Set {SETTING} above 200"):
        start_embedded({})
    assert asked == [50, 200]
    asked, error = [], RuntimeError("no such resource")
    with pytest.raises(ClusterError, match="cannot start an embedded Ray: no such resource"):
        start_embedded({})
    assert asked == [50]
    assert is_late(TimeoutError()) and not is_late(ValueError("Maybe you called ray.init twice by accident?"))
    for wrong in ("soon", "0", "-1", "nan", "inf"):
        with pytest.raises(UserError, match=SETTING):
            start_seconds({SETTING: wrong})


@slow
@pytest.mark.timeout(600)
def test_an_agent_that_is_late(tmp_path: Path) -> None:
    """Ray's raylet gives its agents 15 s. A machine that is slower than that has Ray at the second attempt."""
    (tmp_path / "late").mkdir()
    late = "import sys, time\ntime.sleep(20 if 'dashboard/agent.py' in ' '.join(sys.orig_argv) else 0)\n"
    (tmp_path / "late" / "sitecustomize.py").write_text(late)
    root = Path(__file__).parents[2]
    sweep = quick(tmp_path, spec(count=2), None, 0.0, PYTHONPATH=f"{tmp_path / 'late'}:{root}")
    code, said = sweep.run("run", "quick.yaml")
    assert code == 0 and "trying again with a timeout of 120 s" in said, said


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT as in a terminal: a shell that starts a process in the background has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_the_watch() -> None:
    """A process that dies, a node that is dead, a store that does not answer: KeyboardInterrupts become ClusterLost;
    other errors are their own."""
    child = subprocess.Popen(["sleep", "100"])
    alive = {"raylet": (child.pid, process_started(child.pid))}
    with pytest.raises(ValueError, match="mine"), watched(Watch("it", "again", alive, lambda: True)):
        raise ValueError("mine")
    with pytest.raises(KeyboardInterrupt), watched(Watch("it", "again", alive, lambda: True)):
        raise KeyboardInterrupt
    with (
        pytest.raises(
            ClusterLost, match=rf"it is lost: its node \(raylet\), process {child.pid}, has died; .*\n  again"
        ),
        watched(Watch("it", "again", alive, lambda: True)),
    ):
        child.kill()
        child.wait()
        time.sleep(10)
    assert not is_alive(*alive["raylet"])
    with pytest.raises(ClusterLost, match="its node has died"), watched(Watch("it", "", {}, lambda: False)):
        time.sleep(20)

    def silent() -> bool:
        raise TimeoutError

    with pytest.raises(ClusterLost, match="has not answered for"), watched(Watch("it", "", {}, silent, patience=0.5)):
        time.sleep(20)
    assert reconnect_seconds({}) == 45 and reconnect_seconds({"RAY_gcs_rpc_server_reconnect_timeout_s": "600"}) == 585


def test_sessions_of_a_driver() -> None:
    """By the id at the end of the folder's name, and nothing else."""
    import re

    mine = re.compile(sessions_of(123))
    assert mine.search("/tmp/ray/session_2026-12-01_17-23-20_969337_123/logs/x")
    for other in ("/session_2026-12-01_17-23-20_969337_1234/x", "/data/run_123/x", "/session_latest/123"):
        assert not mine.search(other)


def test_a_note_that_was_withdrawn_stays_so(tmp_path: Path) -> None:
    """Its thread, which still runs in a process that ends at once, does not write it again."""
    store = Store(tmp_path)
    with Sign(store, "drivers", dict) as sign:
        assert len(store.scratch.notes("drivers")) == 1
        sign.withdraw()
        assert not sign.beat() and store.scratch.notes("drivers") == {}
