"""The prompt: what is typed is asked, errors are shown and do not end it, words are completed, questions kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput

from orchestrator import cli_sql, prompt
from storage.confined import Limits
from storage.errors import QueryError
from storage.sql import VIEWS
from storage.store import Store
from tests.rows import ORACLE, done, plan, tasks
from tests.test_cli_errors import run

LIMITS = Limits(2**30, 60)
CTRL_C, CTRL_D = "\x03", "\x04"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where history is kept, for one test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def keys() -> Iterator[PipeInput]:
    """A keyboard."""
    with create_pipe_input() as given:
        yield given


class Asked:
    """Notes what is asked, and answers with it."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def __call__(self, text: str, form: str) -> bytes:
        self.asked.append((text, form))
        if "nosuch" in text:
            raise QueryError("there is no nosuch")
        if "endless" in text:
            raise KeyboardInterrupt
        return f"<{text}>\n".encode()


def typed(keys: PipeInput, text: str) -> Asked:
    """What is asked when `text` is typed at a prompt, which ends."""
    keys.send_text(text)
    asked = Asked()
    prompt.converse(prompt.session(asked, keys, DummyOutput()), asked, "table")
    return asked


def test_sql_is_sent_at_its_semicolon(keys: PipeInput, capsys: pytest.CaptureFixture[str]) -> None:
    """Over as many lines as it takes; an empty line asks nothing."""
    asked = typed(keys, f"\rselect 1\rfrom rows;\rfrom cells;\r{CTRL_D}")
    assert asked.asked == [("select 1\nfrom rows;", "table"), ("from cells;", "table")]
    assert capsys.readouterr().out == "<select 1\nfrom rows;>\n<from cells;>\n"


def test_an_error_is_shown_and_the_prompt_stays(keys: PipeInput, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where Ctrl-C stops what is asked."""
    asked = typed(keys, "from nosuch;\rfrom endless;\rfrom rows;\r.quit\r")
    assert len(asked.asked) == 3
    out, err = capsys.readouterr()
    assert out == "<from rows;>\n"
    assert "there is no nosuch\nstopped\n" in err


def test_ctrl_c_clears_and_ctrl_d_leaves(keys: PipeInput) -> None:
    """What was typed before Ctrl-C is gone."""
    assert typed(keys, f"from wrong{CTRL_C}from rows;\r{CTRL_D}").asked == [("from rows;", "table")]


def test_commands(keys: PipeInput, capsys: pytest.CaptureFixture[str]) -> None:
    """.format holds from there on; .schema and .views ask; what is none is told."""
    asked = typed(
        keys, ".help\r.format json\r.views\r.schema rows\r.format xml\r.schema a;b\r.nosuch\rfrom a;\r.quit\r"
    )
    assert [form for _, form in asked.asked] == ["json"] * 3
    assert asked.asked[1][0].endswith("(describe rows)")
    out, err = capsys.readouterr()
    assert all(name in out for name in prompt.COMMANDS)
    assert [line for line in err.splitlines() if line.startswith("there is no")] == [
        f"there is no {text}; .help says what there is" for text in (".format xml", ".schema a;b", ".nosuch")
    ]


def test_history_is_kept_for_the_next_time(cache: Path) -> None:
    """In the cache; the arrow finds it in another session. Where it cannot be written the prompt works all the same."""
    for text in ("from rows;\r.quit\r", "\x1b[A\x1b[A\r.quit\r"):
        with create_pipe_input() as keys:
            asked = typed(keys, text)
        assert asked.asked == [("from rows;", "table")]
    assert prompt.history_file().is_relative_to(cache) and "from rows;" in prompt.history_file().read_text()
    prompt.history_file().unlink()
    prompt.history_file().mkdir()
    with create_pipe_input() as keys:
        assert typed(keys, "from cells;\r.quit\r").asked == [("from cells;", "table")]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """One task done."""
    found, (task,) = Store(tmp_path / "results"), tasks(ORACLE, 1)
    plan(found, "mini", [task])
    found.commit_rows("s0", [done(task, best_test_accuracy=0.5)])
    return found


def test_words_are_completed(store: Store) -> None:
    """Views, columns of the views that are named first, functions, keywords, commands, formats."""
    words = prompt.Words(lambda text, form: cli_sql.answer(store.location, text, form, LIMITS))

    def completed(text: str) -> list[str]:
        return [found.text for found in words.get_completions(Document(text), CompleteEvent())]

    assert completed("from can") == ["candidates"]
    assert completed("from cri")[0] == "criteria"
    assert completed("from cost where wa") == ["wasted_attempts", "wasted_cpu_seconds", "wasted_gpu_seconds"]
    assert completed("select best_test_acc") == ["best_test_accuracy", "best_test_accuracy_std"]
    assert completed("from curves select epo")[0] == "epoch"
    assert completed("select kend") == ["kendall", "kendall_p", "kendall_ci"]
    assert "select" in completed("sel") and "median" in completed("select med")
    assert "task_id" in completed("from rows where ") and "epoch" not in completed("from rows where ")
    assert completed("") == completed("from ") == list(VIEWS) == completed(".schema ")
    assert completed(".format j") == ["json", "jsonl"]
    assert completed(".q") == completed(" .q") == [".quit"]
    assert completed("from curves c where c.epoch_va") == ["epoch_val_accuracy"]


def test_completion_of_no_store_says_nothing(tmp_path: Path) -> None:
    """A question will tell what is wrong; completing does not."""
    words = prompt.Words(lambda text, form: cli_sql.answer(str(tmp_path), text, form, LIMITS))
    assert list(words.get_completions(Document("from ro"), CompleteEvent())) == []


def test_the_command_asks_the_store_as_it_is(
    store: Store, keys: PipeInput, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that come while the prompt is open are in the next answer."""
    made = prompt.session
    monkeypatch.setattr(prompt, "session", lambda ask: made(ask, keys, DummyOutput()))
    keys.send_text("from nosuch;\r.format csv\rselect count(*) as n from rows;\r.schema sweeps\r.quit\r")
    assert run("query", "--interactive", "--store", store.location) == 0
    out, err = capsys.readouterr()
    assert out.startswith("n\n1\ncolumn_name,column_type\nsweep,VARCHAR\n")
    assert "nosuch" in err
    store.commit_rows("s1", [done(task) for task in tasks(ORACLE, 3)[1:]])
    keys.send_text("select count(*) as n from rows;\r.quit\r")
    assert run("query", "--interactive", "--store", store.location, "-f", "csv") == 0
    assert capsys.readouterr().out == "n\n3\n"


def test_a_prompt_takes_no_sql_and_needs_a_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Mistakes are told before the prompt is there."""
    assert run("query", "select 1", "--interactive") == 2
    assert "at a prompt there is no SQL" in capsys.readouterr().err
    assert run("query", "--interactive", "-f", "parquet", "-o", str(tmp_path / "x")) == 2
    assert "no SQL, --file, --param or -o beforehand" in capsys.readouterr().err
    assert run("query", "--interactive", "--store", str(tmp_path)) == 5
    assert "no store at" in capsys.readouterr().err
