"""A run that is stopped: what was committed stays, and `resume` runs exactly the rest."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import TINY, Prunesweep, command

SLOWER = TINY.replace("epochs: 2, batch_size: 128, lr: {0", "epochs: 25, batch_size: 128, lr: {0")


def start_and_wait_for_rows(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """A run in the background that has committed its first row."""
    (folder / "tiny.yaml").write_text(SLOWER)
    process = subprocess.Popen(
        [command(), "run", "tiny.yaml", *arguments],
        cwd=folder,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ,
    )
    for _ in range(1200):
        if row_files(folder) or process.poll() is not None:
            break
        time.sleep(0.05)
    return process


def row_files(folder: Path) -> dict[str, bytes]:
    """Name -> content of the row files."""
    rows = folder / "results" / "rows"
    return {p.name: p.read_bytes() for p in rows.glob("*.parquet")} if rows.is_dir() else {}


def finish(folder: Path, prunesweep: Prunesweep, *arguments: str) -> None:
    """Resume, and check that nothing committed was lost or run again."""
    before = row_files(folder)
    assert 1 <= len(before) < 8
    resumed = prunesweep("resume", "tiny", *arguments, cwd=folder)
    assert resumed.returncode == 0, resumed.stderr
    assert f"{len(before)} done, {8 - len(before)} to run" in resumed.stderr
    after = row_files(folder)
    assert len(after) == 8 and before.items() <= after.items()


@pytest.mark.parametrize("arguments", [[], ["--inline"]], ids=["ray", "inline"])
def test_ctrl_c(arguments: list[str], tmp_path: Path, prunesweep: Prunesweep) -> None:
    """Ctrl-C: exit 130, the command that resumes, no traceback."""
    process = start_and_wait_for_rows(tmp_path, *arguments)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == "" and "Traceback" not in err
    assert "prunesweep resume tiny --store results" in err
    finish(tmp_path, prunesweep, "--inline")


def test_killed_driver(tmp_path: Path, prunesweep: Prunesweep) -> None:
    """SIGKILL of the driver, Ray and all: the store is whole, and a fresh driver goes on."""
    process = start_and_wait_for_rows(tmp_path)
    process.kill()
    process.communicate(timeout=60)
    time.sleep(2)  # its workers end with it; one may be committing
    status = prunesweep("status", "tiny", "-f", "csv")
    assert status.returncode == 0
    assert "a driver noted that it is at work" not in status.stderr
    finish(tmp_path, prunesweep, "--inline")


def test_stop_ends_a_run_of_this_machine(tmp_path: Path, prunesweep: Prunesweep) -> None:
    """`stop SWEEP` without a cluster is Ctrl-C from another terminal; a second one finds nothing."""
    process = start_and_wait_for_rows(tmp_path, "--inline")
    assert "at work on" in prunesweep("status", "tiny").stderr
    stopped = prunesweep("stop", "tiny")
    assert stopped.returncode == 0, stopped.stderr
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert prunesweep("stop", "tiny").returncode == 2
    finish(tmp_path, prunesweep, "--inline")


def test_resume_narrows(tmp_path: Path, prunesweep: Prunesweep) -> None:
    """--where and --shard run a part of what is unfinished, and exit 3 while something is left."""
    process = start_and_wait_for_rows(tmp_path, "--inline")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    for path in (tmp_path / "results" / "rows").iterdir():
        path.unlink()
    some = prunesweep("resume", "tiny", "--inline", "--where", "candidate = 1 and seed = 0")
    assert some.returncode == 3, some.stderr
    found = prunesweep("query", "select candidate, seed from rows", "-f", "jsonl").stdout
    assert found == '{"candidate": 1, "seed": 0}\n'
    nothing = prunesweep("resume", "tiny", "--inline", "--failed")
    assert nothing.returncode == 3 and len(row_files(tmp_path)) == 1
