"""A fault that sends tasks to a slower back-end is reported while they run, and by `run`, `status` and `corr`."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import pytest

import workers.dense
import workers.task
from orchestrator.account import Account
from orchestrator.documents import Document
from orchestrator.drivers import Driver
from orchestrator.progress import Progress
from orchestrator.queue import Queue
from orchestrator.run import Options, run_spec
from storage.fallbacks import Fallback, fallbacks
from storage.records import Cell, Execution
from storage.store import Store
from tests.conftest import TINY
from tests.rows import ORACLE, SAMPLED, done, failed, plan, tasks
from tests.test_backends import NO_COMPILER, forget_code
from tests.test_interrupt import in_process
from workers.pulse import Limits, Pulse

COMPILED = Execution("compiled", 1, 1, "contiguous_format", "a processor", (("torch", "2"),))
SLOWER = Execution("serial", 1, 1, "channels_last", "a processor", (("torch", "2"),), fallback=NO_COMPILER)
WRONG = Execution("serial", 1, 1, "channels_last", "a processor", (("torch", "1"),), fallback="a wrong gradient")


def test_an_execution_holds_its_fallback_only_where_there_is_one() -> None:
    assert "fallback" not in COMPILED.json
    assert Execution.from_json(COMPILED.json) == COMPILED
    assert Execution.from_json(SLOWER.json) == SLOWER


def sweep(store: Store, *executions: tuple[Cell, Execution]) -> None:
    """A sweep of two cells; for each execution one more candidate of a cell is done, and one failed."""
    a, b = tasks(ORACLE, 4), tasks(SAMPLED, 4)
    plan(store, "mini", [*a, *b])
    left = {ORACLE: iter(a), SAMPLED: iter(b)}
    store.commit_rows("s0", [done(next(left[cell]), execution=execution.json) for cell, execution in executions])
    store.commit_rows("s0", [failed(task) for task in (next(left[ORACLE]), next(left[SAMPLED]))])


def test_fallbacks_are_by_reason_with_their_cells(tmp_path: Path) -> None:
    """Tasks of a reason are added up over cells; done tasks without a reason, failed and pending ones do not count."""
    store = Store(tmp_path)
    sweep(store, (SAMPLED, SLOWER), (ORACLE, COMPILED), (ORACLE, SLOWER), (SAMPLED, SLOWER), (SAMPLED, WRONG))
    plan(store, "other", tasks(ORACLE, 1))  # a candidate that ran compiled code
    assert fallbacks(store, "mini") == [
        Fallback(NO_COMPILER, "serial", 3, (str(ORACLE), str(SAMPLED))),
        Fallback("a wrong gradient", "serial", 1, (str(SAMPLED),)),
    ]
    assert fallbacks(store, "other") == []


@pytest.mark.parametrize("command", [("status",), ("corr",), ("corr", "--show", "criteria")])
def test_status_and_corr_report_them(
    command: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line says how many tasks of which cells ran on the slower back-end, and why; none where none did."""
    name, *options = command
    for execution, expected in ((SLOWER, [LINE]), (COMPILED, [])):
        store = Store(tmp_path / execution.backend)
        sweep(store, (ORACLE, execution), (ORACLE, execution))
        code, _, err = in_process(capsys, name, "mini", *options, "--store", store.location)
        assert code == 0
        assert [line for line in err.splitlines() if line.startswith("slower: ")] == expected


LINE = f"slower: 2 tasks ran on the serial back-end: {NO_COMPILER} ({ORACLE})"


def test_many_cells_are_named_in_part() -> None:
    from orchestrator.progress import slower

    found = slower(Fallback("why", "serial", 1, tuple("abcdefg")))
    assert found == "slower: 1 task ran on the serial back-end: why (a, b, c, d, e and 2 more cells)"


def test_a_message_arrives_while_its_task_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver finds it in the worker's note; of another driver's workers it reports nothing."""
    monkeypatch.setattr("orchestrator.drivers.LOOK_SECONDS", 0.05)
    store, heard, arrived = Store(tmp_path), list[str](), threading.Event()
    with Driver(store, "mini", None, dict) as driver:

        def hear(message: str) -> None:
            heard.append(message)
            arrived.set()

        driver.report = hear
        with Pulse(store, "another", Limits()) as other, Pulse(store, driver.id, Limits()) as mine:
            other.report("not ours")
            with mine.at("s0", "t0"):
                mine.report("slow")
                assert arrived.wait(30)
    assert set(heard) == {"slow"}


def test_a_message_is_reported_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It comes in the worker's note and in its result, and several workers may have the same."""
    account = Account(Store(tmp_path), Queue.of([], [], random.Random(0)), Progress(0))
    account.say("slow")
    account.say_all(["slow", "damaged", "slow"])
    assert capsys.readouterr().err == "slow\ndamaged\n"


def test_a_run_without_a_compiler_reports_it_before_the_first_task_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Dense training and the first task wait here until the person was told why each is slow."""
    monkeypatch.setattr("orchestrator.drivers.LOOK_SECONDS", 0.05)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    forget_code(monkeypatch)
    told, seen = {"the dense lenet5_mini": threading.Event(), "conv1 0.2": threading.Event()}, list[str]()

    def say(message: str) -> None:
        seen.append(message)
        for part, event in told.items():
            if part in message and message.startswith("eager torch trains"):
                event.set()

    def waiting(work: Any, part: str) -> Any:
        def wait(*arguments: Any) -> Any:
            assert told[part].wait(60), f"nothing was reported of {part}"
            return work(*arguments)

        return wait

    monkeypatch.setattr("orchestrator.account.say", say)
    monkeypatch.setattr(workers.task, "retrain_and_measure", waiting(workers.task.retrain_and_measure, "conv1 0.2"))
    monkeypatch.setattr("workers.dense.train_dense", waiting(workers.dense.train_dense, "the dense lenet5_mini"))
    store = Store(tmp_path / "store")
    assert run_spec(store, Document("tiny.yaml", TINY), Options(inline=True)).complete
    assert [message for message in seen if message.endswith(NO_COMPILER)] == [
        f"eager torch trains the dense lenet5_mini on synthetic, several times slower: {NO_COMPILER}",
        f"eager torch trains lenet5_mini on synthetic with conv1 0.2 removed, several times slower: {NO_COMPILER}",
    ]
    (found,) = fallbacks(store, "tiny")
    assert (found.reason, found.tasks) == (NO_COMPILER, 8)
