"""Work on a store, killed before any one of the C calls it makes. Run as a process of its own:

python -m tests.faults.kills WORK TEMPLATE OUT STEPS

Every death has its own copy of TEMPLATE, OUT/<n>-<the call it did not make>; OUT/whole is the copy of the
work done undisturbed. Forked children die; this process has one thread, so that forking it is safe.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from pyarrow import fs as pafs

from storage.commit import commit, replace
from storage.machine import machine
from storage.store import Store

ROOT = Path(__file__).parents[2]

STORE, CONTENT, NAME = "store", "content", "rows/s0-one.parquet"
"""In a template: the store, the bytes to commit; and the name that they get in the store."""

STEPS = ("stat", "mkdir", "statvfs", "open", "write", "flush", "fsync", "__exit__", "link", "replace", "unlink")
"""The calls of a commit that reach the file system. All others leave it as it is."""

UNCERTAIN = ("threading", "concurrent", "_weakrefset")
"""How often these call depends on the time that threads take: such calls are not counted."""

Work = Callable[[], object]


def _commit(folder: Path) -> Work:
    content = (folder / CONTENT).read_bytes()
    return lambda: commit(pafs.LocalFileSystem(), str(folder / STORE / NAME), content)


def _replace(folder: Path) -> Work:
    content = (folder / CONTENT).read_bytes()
    return lambda: replace(pafs.LocalFileSystem(), str(folder / STORE / NAME), content)


def _compact(folder: Path) -> Work:
    return Store(folder / STORE).compact


WORKS: dict[str, Callable[[Path], Work]] = {"commit": _commit, "replace": _replace, "compact": _compact}


def deaths(work: str, template: Path, out: Path, steps: str = "all") -> list[Path]:
    """What `work` left, one folder for each of `steps` at which it was killed: at `all` calls, at the
    `few` that are at the file system and between two of pyarrow's, or after so many written bytes (`1,2,3`)."""
    alone("tests.faults.kills", work, str(template), str(out), steps)
    return sorted(folder for folder in out.iterdir() if folder.name != "whole")


def alone(module: str, *arguments: str) -> str:
    """What a module prints that is run in a process of its own. All that it started is ended."""
    env = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    command, pipe = [sys.executable, "-m", module, *arguments], subprocess.PIPE
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    try:
        printed, said = process.communicate(timeout=300)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, said
    return printed


def main(work: str, template: Path, out: Path, steps: str) -> None:
    """Kill `work` at every step asked for, one after the other."""
    # What is done once per process is done here, not in every child: which files it reads is not looked at.
    machine()
    if work == "compact":
        importlib.import_module("pandas")  # pyarrow would, at the first table
    gc.disable()
    calls = _calls(WORKS[work](_copy(template, out / "whole")))
    if steps in ("all", "few"):
        for n, (module, call) in enumerate(calls):
            if steps == "all" or call in STEPS or module in ("storage.store", "__main__"):
                prepared = WORKS[work](_copy(template, out / f"{n:04}-{call}"))
                _expect(-signal.SIGKILL, _child(lambda todo=prepared, n=n: _die_before(n, todo)))
    else:
        for size in map(int, steps.split(",")):
            prepared = WORKS[work](_copy(template, out / f"{size:07}-bytes"))
            _expect(-signal.SIGXFSZ, _child(lambda todo=prepared, size=size: _die_beyond(size, todo)))


def _copy(template: Path, folder: Path) -> Path:
    return Path(shutil.copytree(template, folder))


def _child(work: Work) -> int:
    """Do `work` in a child, which ends with 0 or an error's message and 1; return its process id."""
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    except BaseException as error:
        sys.setprofile(None)
        os.write(2, f"{error!r}\n".encode())
    finally:
        os._exit(1)


def _expect(end: int, child: int) -> None:
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if ended != end:
        sys.exit(f"a child ended with {ended}, not with {end}")


def _calls(work: Work) -> list[tuple[str, str]]:
    """Module and name of every C call that counts, of `work` done undisturbed in a child."""
    reading, writing = os.pipe()

    def record() -> None:
        calls: list[tuple[str, str]] = []
        _tell(work, lambda module, call: calls.append((module, call)))
        with os.fdopen(writing, "w") as pipe:
            json.dump(calls, pipe)

    child = _child(record)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        content = pipe.read()
    _expect(0, child)
    return [(module, call) for module, call in json.loads(content)]


def _die_before(n: int, work: Work) -> None:
    """Do `work` until the n-th C call that counts: this process is killed before it."""
    left = n

    def count(*_: str) -> None:
        nonlocal left
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    _tell(work, count)


def _die_beyond(size: int, work: Work) -> None:
    """Do `work` until it writes a file beyond `size` bytes: those are written, and the process killed."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    work()


def _tell(work: Work, told: Callable[[str, str], None]) -> None:
    """Do `work`; `told` hears module and name of every C call that counts, before it is made."""

    def watch(frame: FrameType, event: str, call: Any) -> None:
        module = frame.f_globals.get("__name__", "")
        if event == "c_call" and module.partition(".")[0] not in UNCERTAIN:
            told(module, call.__name__)

    sys.setprofile(watch)
    work()
    sys.setprofile(None)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
