"""No long silence: what stderr says while a command works, when it says nothing, and that stdout is not touched."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from orchestrator import cli, cli_corr, drivers, status
from orchestrator.documents import Document
from orchestrator.phases import CLEAR, Phases, fitted, phases
from orchestrator.plan import check
from orchestrator.preflight import Subject, preflight
from orchestrator.progress import Progress
from orchestrator.run import Options, run_spec
from storage import claims, fallbacks
from storage.phases import TRAINING_DENSE, Phase
from storage.store import Store
from tests import specs
from tests.conftest import TINY
from tests.test_cli_errors import here, results, run
from tests.test_images import folder
from workers import folders, training
from workers.datasets import find_dataset
from workers.pulse import Limits, Pulse

__all__ = ["here", "results"]

QUIET, AGAIN = 0.15, 0.6
"""Seconds, in place of the real thresholds."""


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands report phases after a moment, not after two seconds."""
    monkeypatch.setattr(cli, "Phases", partial(Phases, QUIET, AGAIN))


def delayed(monkeypatch: pytest.MonkeyPatch, module: object, name: str, seconds: float = 3 * QUIET) -> None:
    """Make a function take that much longer."""
    real: Callable[..., Any] = getattr(module, name)

    def slow(*arguments: Any, **options: Any) -> Any:
        time.sleep(seconds)
        return real(*arguments, **options)

    monkeypatch.setattr(module, name, slow)


# -- commands ------------------------------------------------------------------------------------------


def test_every_command_begins_with_a_phase() -> None:
    """But `query`, which forks first."""
    assert set(cli.PHASES) == set(cli.COMMANDS) - {"query"}


@pytest.mark.parametrize(
    "command", [("ls",), ("corr", "made"), ("query", "select 1 as one"), ("export", "made", "-o", "made.csv")]
)
def test_a_quick_command_reports_no_phase(
    command: tuple[str, ...], results: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that is done before the threshold is worth a line."""
    monkeypatch.setattr(cli, "Phases", partial(Phases, 100.0, AGAIN))
    assert run(*command) == 0
    said = capfd.readouterr().err
    assert not re.search("reading|computing|asking|writing", said)


def test_a_slow_command_reports_its_phase_and_leaves_stdout_as_it_is(
    results: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, soon: None
) -> None:
    """The phase comes once it has lasted; another one when it begins; the data are the same, byte for byte."""
    assert run("corr", "made", "-f", "json", "--store", "results") == 0
    quick = capfd.readouterr()
    delayed(monkeypatch, cli_corr, "correlations")
    delayed(monkeypatch, claims, "_claim")
    delayed(monkeypatch, fallbacks, "fallbacks")  # which is asked after the table
    monkeypatch.setenv("XDG_CACHE_HOME", str(results / "cache"))
    assert run("corr", "made", "-f", "json", "--store", "results") == 0
    slow = capfd.readouterr()
    assert slow.out == quick.out and json.loads(slow.out)
    lines = slow.err.splitlines()
    assert lines[0] == "reading the store"
    assert "computing the statistics of cell 1 of 1" in lines
    assert "looking for tasks on slower back-ends" in lines


def test_a_slow_query_reports_its_phase(results: Path, capfd: pytest.CaptureFixture[str], soon: None) -> None:
    """A query runs in a child, which is forked before the thread that reports begins."""
    sql = "select count(*) as n from range(30000000) a(i) where hash(i) % 7 = 3 and sqrt(i) > sin(i)"
    before = time.monotonic()
    assert run("query", sql, "-f", "csv") == 0
    if time.monotonic() - before < QUIET * 4:
        pytest.skip("this machine is too quick")
    found = capfd.readouterr()
    assert re.fullmatch(r"n\s+\d+\s*", found.out)
    assert found.err.splitlines()[:1] == ["asking the store"]


def test_an_error_comes_alone_after_its_phase(
    results: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, soon: None
) -> None:
    """Nothing is printed once the command has ended."""
    delayed(monkeypatch, status, "living")
    assert run("status", "nosuch") == 2
    time.sleep(2 * QUIET)
    *phases, error = capfd.readouterr().err.splitlines()
    assert set(phases) <= {"reading the store"} and error.startswith("prunesweep: no sweep nosuch")


# -- lines ---------------------------------------------------------------------------------------------


def test_a_phase_that_lasts_is_repeated_with_its_counter(capfd: pytest.CaptureFixture[str]) -> None:
    """Each phase has a line once it lasts, and one now and then, which says how long it takes; quick ones have none."""
    with Phases(QUIET, AGAIN) as report:
        report("quick")
        for i in range(20):
            report("tracing network", i + 1, 20)
            time.sleep(AGAIN / 8)
        report("uploading")
        time.sleep(2 * QUIET)
    time.sleep(2 * QUIET)
    first, *repeated, last = capfd.readouterr().err.splitlines()
    assert re.fullmatch(r"tracing network \d+ of 20", first) and last == "uploading"
    assert 1 <= len(repeated) <= 4
    assert all(re.fullmatch(r"tracing network \d+ of 20, 0:0\d elapsed", line) for line in repeated)


def test_phases_that_rest_say_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """`rest` ends the thread, so that a process may fork; the next phase begins another."""
    report = Phases(QUIET, AGAIN)
    report("reading")
    report.rest()
    time.sleep(2 * QUIET)
    assert capfd.readouterr().err == ""
    report("writing")
    time.sleep(2 * QUIET)
    report.rest()
    assert capfd.readouterr().err == "writing\n"


def test_phases_in_words() -> None:
    assert str(Phase("starting Ray")) == "starting Ray"
    assert str(Phase("tracing network", 3, 6)) == "tracing network 3 of 6"
    assert str(Phase("planning cell", 1200)) == "planning cell 1,200"
    assert str(Phase(f"{TRAINING_DENSE} m on d", 4, 30, "epoch")) == "training the dense model m on d (epoch 4 of 30)"
    assert Phase.from_note({"phase": Phase("a", 1, 2, "b").to_dict()}) == Phase("a", 1, 2, "b")
    assert [Phase.from_note(note) for note in ({}, {"phase": None}, {"phase": "x"}, {"phase": {"n": 1}})] == [None] * 4


def test_what_fits_a_line() -> None:
    assert fitted("abcdef", 4) == "abcd" and fitted("abc", 4) == "abc"
    assert fitted("日本語", 5) == "日本"  # two columns each


_ON_A_TERMINAL = """
import sys, time
from orchestrator.phases import Phases
with Phases(0.1, 5.0) as report:
    report("planning")
    time.sleep(0.5)
    print("a warning", file=sys.stderr)
    report("x" * 200)
    time.sleep(0.5)
    report("uploading")
    time.sleep(0.5)
    print("data in between")
    time.sleep(0.3)
print("data at the end")
"""


@pytest.mark.parametrize("stdout_too", [True, False])
def test_a_terminal_has_one_line_that_is_rewritten(stdout_too: bool) -> None:
    """It disappears before anything else is written, and at the end; a stdout that is elsewhere has the data alone."""
    ours, theirs = pty.openpty()
    out = theirs if stdout_too else subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", _ON_A_TERMINAL], stdout=out, stderr=theirs)
    os.close(theirs)
    said = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        said += piece
    data = process.stdout.read().decode() if process.stdout else ""
    assert process.wait() == 0
    os.close(ours)
    text = said.decode()
    assert [f"{CLEAR}{word}" in text for word in ("planning, 0:00", "x" * 79, "uploading, 0:0")] == [True] * 3
    assert "x" * 80 not in text  # it would take two lines
    left = [line.rpartition(CLEAR)[2] for line in text.replace("\r\n", "\n").split("\n")]
    data_lines = ["data in between", "data at the end"]
    assert left == ["a warning", *(data_lines if stdout_too else []), ""]
    assert data.splitlines() == ([] if stdout_too else data_lines)


# -- planning ------------------------------------------------------------------------------------------


def reported() -> tuple[list[str], Callable[..., None]]:
    """A receiver of phases, and what it was given, in words."""
    said: list[str] = []
    return said, lambda *phase: said.append(str(Phase(*phase)))


def test_planning_reports_networks_and_cells() -> None:
    document = specs.document(grid={"model": ["lenet5_mini", "lenet5_mini_w20"], "ratio": [0.2, 0.4]})
    said, report = reported()
    check(document, None, report)
    assert said[0] == "checking the spec"
    assert [line for line in said if line.startswith("tracing")] == ["tracing network 1 of 2", "tracing network 2 of 2"]
    assert "planning cell 4" in said


def test_preflight_reports_networks_and_prunings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subjects = [Subject(f"m{i}:build", 10, (1, 8, 8), None) for i in (1, 2)]
    monkeypatch.setattr("orchestrator.preflight._subjects", lambda cells, root: subjects)
    monkeypatch.setattr("orchestrator.preflight._note", lambda subject: tmp_path / subject.model)
    monkeypatch.setattr("orchestrator.preflight.problems_of", lambda subject, report, phase: [report(phase, 1, 1)][:0])
    said, report = reported()
    assert preflight([], None, report) == []
    networks = [f"preflight network {i} of 2" for i in (1, 2)]
    assert said == [networks[0], f"{networks[0]}: pruning 1 of 1", networks[1], f"{networks[1]}: pruning 1 of 1"]


def test_the_first_look_at_a_folder_reports_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second look, which reads none, does not."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(folders, "PIECE", 2)
    folder(tmp_path / "pictures", lambda _: (8, 8))
    (said, report), (again, second) = reported(), reported()
    folders.look.cache_clear()
    first = find_dataset(f"imagefolder:{tmp_path / 'pictures'}", None, report)
    n = first.train_size + first.test_size
    assert said[0].startswith("listing the images in ")
    assert said[1].endswith(f"(image 2 of {n})") and said[-1].endswith(f"(image {n} of {n})")
    find_dataset(f"imagefolder:{tmp_path / 'pictures'}", None, second)  # known to this process
    folders.look.cache_clear()
    find_dataset(f"imagefolder:{tmp_path / 'pictures'}", None, second)
    assert len(again) == 1


# -- runs ----------------------------------------------------------------------------------------------


def test_a_run_reports_the_epochs_of_its_dense_model(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They come from the worker's note, whoever runs the worker; status counts the worker, and names the epoch."""
    for name in ("workers.pulse.TICK_SECONDS", "workers.pulse.PHASE_SECONDS", "orchestrator.drivers.LOOK_SECONDS"):
        monkeypatch.setattr(name, 0.05)
    monkeypatch.setattr("orchestrator.progress.QUIET_SECONDS", 0.05)
    monkeypatch.setattr("orchestrator.progress.HEARTBEAT_SECONDS", 0.1)
    store, seen = Store(tmp_path / "results"), list[status.Standing]()
    real, slowed = training._end_epoch, iter([0.4] * 5)  # of the dense model, and of the first task

    def slow(at: Any, *more: Any) -> None:
        time.sleep(next(slowed, 0.0))
        if not seen and at.done == 1:
            seen.append(status.standing(store, "tiny", "driver"))
        real(at, *more)

    monkeypatch.setattr(training, "_end_epoch", slow)
    with Phases(0.05, 0.1) as phases:
        outcome = run_spec(store, Document("tiny", TINY), Options(inline=True, gpus=0), phases)
    assert outcome.complete
    said = capfd.readouterr().err
    for epoch in (2, 3):
        assert re.search(
            rf"0/8 tasks, .* left; training the dense model lenet5_mini on synthetic \(epoch {epoch} of 3\)", said
        )
    assert re.search(r"; retraining \(epoch \d of 2\)", said)
    (standing,) = seen
    assert (standing.whole["running"], standing.whole["pending"]) == (1, 7)
    assert standing.phases == ["training the dense model lenet5_mini on synthetic (epoch 2 of 3)"]
    assert standing.table["phase"].to_pylist() != [None]


def test_progress_reports_the_workers_phases_before_the_drivers(capfd: pytest.CaptureFixture[str]) -> None:
    """A dense model's training comes first, as the tasks wait for it; the driver's phase only while no worker works."""
    shown = Progress(9, phase=Phase("starting Ray"))
    assert shown.phase_text() == "starting Ray"
    shown.see_phases(())
    assert shown.phase_text() == ""
    dense = [Phase(f"{TRAINING_DENSE} m{i} on d", i, 9, "epoch") for i in (1, 2)]
    shown.see_phases((Phase("retraining", 1, 2, "epoch"), *dense))
    assert shown.phase_text() == "training the dense model m1 on d (epoch 1 of 9) and 1 other dense model"
    shown.see_phases(None)
    assert shown.counts() == {"to_run": 9, "done": 0, "failed": 0, "phase": "starting Ray"}
    assert capfd.readouterr().err == ""  # it was too quick


def test_a_driver_sees_its_own_workers_phases(tmp_path: Path) -> None:
    """Not those of other drivers' workers; and while none of its own is at a shard, it has none to show."""
    store, seen = Store(tmp_path), list[Any]()
    with drivers.Driver(store, "mini", None, dict) as driver:
        driver.see_phases = seen.append
        with Pulse(store, "another", Limits()) as other, Pulse(store, driver.id, Limits()) as pulse:
            with other.at("s1", "t1"):
                other.phase("loading")
                other.report("so that it is shown")
                driver._look()
            with pulse.at("s0", "t0"):
                pulse.phase("retraining", 3, 9, "epoch")
                pulse.report("so that it is shown")
                driver._look()
    assert None in seen and (Phase("retraining", 3, 9, "epoch"),) in seen
    assert not any(Phase("loading") in (phases or ()) for phases in seen)


def test_a_counter_is_written_down_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A note costs a request on an object store: another phase is worth one, another epoch only after a while."""
    written = list[Any]()
    store = Store(tmp_path)
    with Pulse(store, "d", Limits()) as pulse, pulse.at("s0", "t0"):
        monkeypatch.setattr(
            pulse, "_show", lambda: (written.append(pulse._about["phase"]), setattr(pulse, "_shown", pulse._about))
        )
        monkeypatch.setattr(pulse, "_shown_at", time.monotonic())
        for epoch in range(5):
            pulse.phase("retraining", epoch + 1, 5, "epoch")
            pulse._tick()
        assert [one["at"] for one in written] == [1]
        pulse._shown_at = time.monotonic() - 100
        pulse._tick()
        assert [one["at"] for one in written] == [1, 5]
        pulse.phase("measuring")
        pulse._tick()
        assert written[-1]["name"] == "measuring"


def test_outside_a_command_no_thread_is_left() -> None:
    """A notebook that asks the store reads its answer, and no line for the rest of its life."""
    before = threading.active_count()
    phases()("asking the store")
    assert threading.active_count() == before
