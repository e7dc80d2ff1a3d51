"""A run that is stopped: what was committed stays, and `resume` runs exactly the rest."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from orchestrator.cli import main
from storage.store import Store
from tests.conftest import TINY, command
from tests.sweeps import committed, left_over, lose

SLOWER = TINY.replace("epochs: 2, batch_size: 64", "epochs: 300, batch_size: 64").replace("shard: 2", "shard: 4")
"""One shard of eight tasks of two seconds: who is asked to stop hears it within three, in the middle of one."""


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
        start_new_session=True,
    )
    for _ in range(3600):
        if done_rows(folder) or process.poll() is not None:
            break
        time.sleep(0.05)
    return process


def done_rows(folder: Path) -> set[tuple[str, str]]:
    """What is committed so far."""
    store = Store(folder / "results")
    return committed(store) if store.exists() else set()


def in_process(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """A command in this process, where torch is loaded already: exit code, stdout, stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main(list(arguments))
    out, err = capsys.readouterr()
    return int(str(exit_.value.code)), out, err


def finish(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Resume, and check that nothing committed was lost or run again."""
    before = done_rows(folder)
    assert 1 <= len(before) < 8
    code, _, err = in_process(capsys, "resume", "tiny", "--inline")
    assert code == 0, err
    assert f"{len(before)} done, {8 - len(before)} to run" in err
    after = done_rows(folder)
    assert before < after and len(after) == len({task for task, _ in after}) == 8
    assert left_over(Store(folder / "results")) == []


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("signal_", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_a_run_that_is_asked_to_stop(signal_: signal.Signals, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C, in the whole process group as a terminal sends it, and SIGTERM of a run on embedded Ray: within 30 s
    what was at work is checkpointed, exit 130, the command that resumes, no traceback, nobody left at work."""
    process = start_and_wait_for_rows(here)
    asked = time.monotonic()
    (os.killpg if signal_ is signal.SIGINT else os.kill)(process.pid, signal_)
    out, err = process.communicate(timeout=120)
    assert time.monotonic() - asked < 30
    assert process.returncode == 130, err
    assert out == "" and "Traceback" not in err
    assert "stopping: what is finished is committed" in err
    assert "prunesweep resume tiny --store results" in err
    store = Store(here / "results")
    assert left_over(store) == [f"scratch/checkpoints/{key}.checkpoint" for key in store.scratch.checkpoints()]
    assert len(store.scratch.checkpoints()) == 1  # one worker was at one task
    finish(here, capsys)


def test_stop_ends_a_run_of_this_machine(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`stop SWEEP` without a cluster is Ctrl-C from another terminal; a second one finds nothing."""
    process = start_and_wait_for_rows(here, "--inline")
    assert "a driver is at work on" in in_process(capsys, "status", "tiny")[2]
    assert in_process(capsys, "stop", "tiny")[0] == 0
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert in_process(capsys, "stop", "tiny")[0] == 2
    finish(here, capsys)


def test_resume_narrows(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--where, --failed and --shard run a part of what is unfinished; the exit code is about that part."""
    (here / "tiny.yaml").write_text(TINY)
    assert in_process(capsys, "run", "tiny.yaml", "--inline")[0] == 0
    assert len(lose(Store(here / "results"), slice(None))) == 8
    code, _, err = in_process(capsys, "resume", "tiny", "--inline", "--where", "candidate = 1 and seed = 0")
    assert code == 0, err
    assert "tiny: 1 task done, none left" in err
    assert in_process(capsys, "query", "select candidate, seed from rows", "-f", "jsonl")[1] == (
        '{"candidate": 1, "seed": 0}\n'
    )
    code, _, err = in_process(capsys, "resume", "tiny", "--inline", "--failed")
    assert code == 0 and "none of the others was asked for; nothing to run" in err
    assert len(done_rows(here)) == 1
    shard = in_process(capsys, "query", "select shard from tasks where candidate = 3 limit 1", "-f", "csv")[1]
    assert in_process(capsys, "resume", "tiny", "--inline", "--shard", shard.split()[1])[0] == 0
    assert len(done_rows(here)) == 5
    assert in_process(capsys, "resume", "tiny", "--inline", "--shard", "nosuch")[0] == 2
