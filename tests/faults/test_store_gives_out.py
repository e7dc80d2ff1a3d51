"""A store that fills up or turns read-only in the middle of a run: loud, nothing false, and it resumes."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.quick import spec
from tests.faults.runs import Sweep, quick
from tests.sweeps import assert_invariants, committed

MIB = 2**20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 96 MiB of its own."""
    at = tmp_path / "disk"
    at.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96m", "none", str(at)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this machine does not let us mount a small disk")
    try:
        yield at
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


def _fill(disk: Path) -> None:
    (disk / "filler").write_bytes(bytes(40 * MIB))


def _empty(disk: Path) -> None:
    (disk / "filler").unlink()


def _remount(disk: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True)


FAULTS: dict[str, tuple[Callable[[Path], None], Callable[[Path], None], str]] = {
    "full": (_fill, _empty, "is full (64 MiB are kept free): make room and resume"),
    "read-only": (lambda disk: _remount(disk, "ro"), lambda disk: _remount(disk, "rw"), "Read-only file system"),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_disk_that_gives_out(fault: str, disk: Path) -> None:
    """In the middle of a run: exit code 5 and why, every committed row stays and no other is called done; while it
    lasts a resume says so too; once mended, it goes on."""
    broken, mended, message = FAULTS[fault]
    sweep = quick(disk, spec(count=30), seconds=0.2)
    log = disk.parent / "elsewhere"
    log.mkdir()
    driver = _start(sweep, log, "run", "quick.yaml", "--inline")
    assert sweep.wait_for(lambda: len(committed(sweep.store)) >= 3, driver)
    broken(disk)
    assert driver.wait(60) == 5, (log / "log").read_text()
    assert message in (log / "log").read_text() and "Traceback" not in (log / "log").read_text()
    before = committed(sweep.store)
    assert 3 <= len(before) < 30
    assert sweep.store.statuses() == dict.fromkeys((task_id for task_id, _ in before), "done")
    assert _start(sweep, log, "resume", "quick", "--inline").wait(60) == 5
    assert committed(sweep.store) == before
    mended(disk)
    assert _start(sweep, log, "resume", "quick", "--inline").wait(60) == 0
    assert_invariants(sweep.store, "quick", before, sweep.reference())


def _start(sweep: Sweep, log: Path, *arguments: str) -> subprocess.Popen[str]:
    """A driver whose output goes to another disk."""
    elsewhere = Sweep(log, sweep.text, sweep.environment | {"PRUNESWEEP_STORE": sweep.store.root})
    return elsewhere.start(*arguments)
