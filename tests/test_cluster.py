"""First contact with a cluster: run, submit, logs and stop against `ray start --head` on loopback."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from orchestrator.run import Options, run_sweep
from storage.store import Store
from tests.conftest import TINY, Cluster, Prunesweep, command
from tests.sweeps import committed


@pytest.fixture
def beside_models(tmp_path: Path) -> Path:
    """A working directory with folders named as our rooms: packages, and folders that only look so."""
    folder = tmp_path / "project"
    for room in ("models", "storage", "workers"):
        (folder / room).mkdir(parents=True)
        (folder / room / "__init__.py").write_text("raise ImportError('the wrong one')\n")
    (folder / "orchestrator").mkdir()
    (folder / "tiny.yaml").write_text(TINY)
    return folder


def test_run_on_a_running_cluster(cluster: Cluster, beside_models: Path, prunesweep: Prunesweep) -> None:
    """`run --address` from a folder with a `models` of its own; --address wins over RAY_ADDRESS."""
    found = prunesweep(
        "run", "tiny.yaml", "--address", cluster.address, "-f", "json", cwd=beside_models, RAY_ADDRESS="127.0.0.1:1"
    )
    assert found.returncode == 0, found.stderr
    assert '"n": 4' in found.stdout
    assert Store(beside_models / "results").sql("select count(*) from rows where status = 'done'").fetchall() == [(8,)]


def test_embedded_ray_from_such_a_folder(beside_models: Path, prunesweep: Prunesweep) -> None:
    """The same without a cluster: embedded Ray's workers import the right rooms too."""
    found = prunesweep("run", "tiny.yaml", "--set", "candidates.count=2", "--set", "grid.seed=0", cwd=beside_models)
    assert found.returncode == 0, found.stderr
    assert "Traceback" not in found.stderr and "Configuration for experiment" not in found.stdout + found.stderr


def test_submit_follow_and_read(cluster: Cluster, beside_models: Path, prunesweep: Prunesweep) -> None:
    """`submit --no-wait` prints the id and next steps; `logs -f` follows to the end; the rows are there."""
    environment = {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:1"}  # --address wins over it
    submitted = prunesweep(
        "submit", "tiny.yaml", "--address", cluster.jobs, "--no-wait", cwd=beside_models, **environment
    )
    assert submitted.returncode == 0, submitted.stderr
    job = submitted.stdout.strip()
    assert job.startswith("tiny-") and f"prunesweep logs {job} -f --address {cluster.jobs}" in submitted.stderr
    followed = prunesweep("logs", "tiny", "-f", "--address", cluster.jobs, cwd=beside_models)
    assert followed.returncode == 0, followed.stdout + followed.stderr
    assert "tiny: 8 tasks done, none left" in followed.stdout
    assert "lenet5_mini synthetic conv1 0.2 oracle" in followed.stdout
    corr = prunesweep("corr", "tiny", "-f", "csv", cwd=beside_models)
    assert corr.stdout.splitlines()[1].startswith("lenet5_mini synthetic conv1 0.2 oracle,4,4,2,")


def test_stop_a_submitted_sweep(cluster: Cluster, beside_models: Path, prunesweep: Prunesweep) -> None:
    """`stop --address` ends the job; what is committed stays, and the rest can be run here."""
    long = TINY.replace("epochs: 2, batch_size: 64", "epochs: 150, batch_size: 64")
    (beside_models / "tiny.yaml").write_text(long)
    submitted = prunesweep("submit", "tiny.yaml", "--address", cluster.jobs, "--no-wait", cwd=beside_models)
    assert submitted.returncode == 0, submitted.stderr
    store = Store(beside_models / "results")
    for _ in range(1800):
        if store.exists() and len(store.row_files()[0]) >= 1:
            break
        time.sleep(0.1)
    stopped = prunesweep("stop", submitted.stdout.strip(), "--address", cluster.jobs, cwd=beside_models)
    assert stopped.returncode == 0 and "stopped" in stopped.stderr, stopped.stderr
    before = committed(store)
    assert 1 <= len(before) < 8
    manifest = store.newest("tiny")
    assert run_sweep(store, manifest, Options(inline=True)).complete
    assert before < committed(store) and len(committed(store)) == 8


def test_submit_without_no_wait_fails_as_the_job_does(
    cluster: Cluster, beside_models: Path, prunesweep: Prunesweep
) -> None:
    """A job that ends with unfinished tasks: exit code 3, and failed in Ray's eyes too."""
    arguments = ["--set", "dense.lr=1.0e30", "--set", "candidates.count=1", "--address", cluster.jobs]
    found = prunesweep("submit", "tiny.yaml", *arguments, cwd=beside_models)
    assert found.returncode == 3, found.stdout + found.stderr
    assert "could not be trained" in found.stdout
    assert "failed" in found.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "tiny.yaml", "--address", "127.0.0.1:1"],
        ["submit", "tiny.yaml", "--address", "http://127.0.0.1:1"],
        ["logs", "tiny", "--address", "http://127.0.0.1:1"],
        ["stop", "tiny", "--address", "http://127.0.0.1:1"],
    ],
)
def test_no_cluster_is_exit_code_4(arguments: list[str], beside_models: Path, prunesweep: Prunesweep) -> None:
    """Nobody answers: one message, exit code 4, no traceback."""
    found = prunesweep(*arguments, cwd=beside_models)
    assert found.returncode == 4, found.stderr
    assert "Traceback" not in found.stderr and found.stdout == ""
    assert found.stderr.splitlines()[-1].startswith("prunesweep: ")


def test_unknown_job(cluster: Cluster, beside_models: Path, prunesweep: Prunesweep) -> None:
    """A job that is not there: exit code 2, and which there are."""
    found = prunesweep("logs", "nosuch", "--address", cluster.jobs, cwd=beside_models)
    assert found.returncode == 2 and "no job or sweep nosuch" in found.stderr


def test_command_is_installed() -> None:
    """The tests above run the installed command."""
    assert subprocess.run([command(), "--version"], capture_output=True, check=True).stdout
