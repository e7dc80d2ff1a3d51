"""Quick sweeps in processes of their own, to be killed, frozen, and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from orchestrator.documents import Document
from orchestrator.expand import tasks
from orchestrator.spec import load_spec
from storage.machine import is_alive
from storage.records import Row
from storage.schema import rows_to_table, table_to_rows
from storage.store import Store
from tests.faults.quick import quick_row, spec

QUICK = Path(__file__).with_name("quick.py")
ROOT = Path(__file__).parents[2]


@dataclass
class Sweep:
    """A quick sweep in a folder of its own."""

    folder: Path
    text: str
    environment: dict[str, str]

    @property
    def store(self) -> Store:
        return Store(self.folder / "results")

    def start(self, *arguments: str, within: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        """A driver in the background, in a session of its own; run by the command `within`, where there is one."""
        (self.folder / "quick.yaml").write_text(self.text)
        log = (self.folder / "log").open("a")
        return subprocess.Popen(
            [*within, sys.executable, str(QUICK), *arguments],
            cwd=self.folder,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | self.environment,
            start_new_session=True,
        )

    def run(self, *arguments: str) -> tuple[int, str]:
        """A driver to its end: exit code, and what it said."""
        before = len(self.said())
        process = self.start(*arguments)
        code = process.wait(240)
        return code, self.said()[before:]

    def resume(self) -> None:
        """One resume in this process' stead, which must succeed."""
        code, said = self.run("resume", "quick", "--inline")
        assert code == 0, said

    def said(self) -> str:
        log = self.folder / "log"
        return log.read_text() if log.exists() else ""

    def notes(self, folder: str = "workers") -> dict[str, dict[str, Any]]:
        return self.store.scratch.notes(folder)

    def wait_for(self, what: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120) -> bool:
        """Until something is so; False when the driver ended before."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if what():
                return True
            if process.poll() is not None:
                return False
            time.sleep(0.02)
        pytest.fail(f"waited too long:\n{self.said()}")

    def reference(self) -> dict[str, Row]:
        """The rows of an undisturbed run: each is a function of its task."""
        document = Document("quick.yaml", self.text)
        made = [quick_row(task) for task in tasks(load_spec(document), document)]
        return {row.task_id: row for row in table_to_rows(rows_to_table(made))}


def quick(
    folder: Path,
    text: str | None = None,
    poison: Mapping[int, str] | None = None,
    seconds: float = 0.05,
    **environment: str,
) -> Sweep:
    """A quick sweep below `folder`."""
    given = {"QUICK_SECONDS": str(seconds), "QUICK_POISON": json.dumps(poison or {}), **environment}
    return Sweep(folder, text or spec(), given)


def end_group(process: subprocess.Popen[str]) -> None:
    """SIGKILL to a driver and all it started, and until they are gone."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)


def wait_until_gone(notes: Mapping[str, Mapping[str, Any]], seconds: float = 60) -> None:
    """Until the processes of these notes are gone: no stray process."""
    end = time.monotonic() + seconds
    alive = [note["pid"] for note in notes.values()]
    while alive and time.monotonic() < end:
        alive = [note["pid"] for note in notes.values() if is_alive(note["pid"], note["process_started"])]
        time.sleep(0.1)
    assert alive == []
