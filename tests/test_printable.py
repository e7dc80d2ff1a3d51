"""Control and bidirectional characters: never in what people see, and exact in what programs read."""

from __future__ import annotations

import csv
import io
import json
import os
import pty
import subprocess
import sys
import unicodedata
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.formats import FOR_PEOPLE, render
from storage.printable import Printable, printable, printable_lines, printable_page

HOSTILE = "a\x1b[31mb\x07\x9b\x7f\r\u202ec\u2066\u200f\u061c\u200b\u2028\ufeff\udce9z"
"""Colour, bell, C1, DEL, bidirectional and invisible characters, a line separator, a byte of a name."""

UNSAFE = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def unsafe(text: str, keep: str = "\n") -> set[str]:
    """The characters of a text that may not reach a person."""
    return {c for c in text if unicodedata.category(c) in UNSAFE and c not in keep}


@given(st.text(alphabet=st.characters(exclude_categories=())))
def test_nothing_unsafe_is_left_of_any_text(text: str) -> None:
    """Of controls and separators; letters, digits and blanks of any script stay."""
    controls = {c for c in unsafe(printable(text), "") if c in "\u202a\u2066\u200e\u061c" or ord(c) < 0xA0}
    assert not controls
    assert unsafe(printable(HOSTILE + text[:0]), "") == set()
    assert all(c in printable(text) for c in text if unicodedata.category(c)[0] in "LN")
    assert "\ud800" not in printable_page(text) and printable_page("\u202e") == r"\u202e"


def test_escapes_name_the_characters() -> None:
    """As Python writes them; a byte that is not UTF-8 is a byte."""
    assert printable("a\nb\x1b[0m\udce9é\ud800\u202e漢") == r"a\nb\x1b[0m\xe9é\ud800\u202e漢"
    assert printable_lines("a\n\tb\r") == "a\n\tb\\r"


@pytest.mark.parametrize("form", FOR_PEOPLE)
def test_tables_for_people_are_escaped(form: str) -> None:
    """Names of columns and cells, also inside lists; a line break in a cell stays one."""
    table = pa.table({"name\u202e\x1b": ["x\x1b[2J\u202ey\nz\r"], "list": [["p\x9bq", "r"]]})
    text = render(table, form).decode()
    assert unsafe(text) == set()
    assert "x1b" in text and "u202e" in text


def test_tables_for_programs_are_exact() -> None:
    """CSV and JSON give back what is in the store."""
    text = "x\x1b[2J\u202ey\r"
    table = pa.table({"a": [text]})
    assert next(csv.DictReader(io.StringIO(render(table, "csv").decode(), newline="")))["a"] == text
    assert json.loads(render(table, "json"))[0]["a"] == text


def test_a_stream_escapes_what_is_written() -> None:
    """But for a carriage return at the start, which bars of progress have."""
    out = io.StringIO()
    stream = Printable(out)
    assert stream.write("\r50 %\x1b[A\n") == 9
    stream.writelines(["a\rb\n"])
    assert out.getvalue() == "\r50 %\\x1b[A\na\\rb\n"


@pytest.mark.parametrize(
    "words",
    [
        ["plan", HOSTILE],
        ["corr", HOSTILE],
        ["query", f"select '{HOSTILE[:-2]}' x from nosuch"],
        ["run", "digits", "--set", HOSTILE],
        [HOSTILE],
        ["ls", "--store", HOSTILE],
        ["plot", "s", "-o", f"{HOSTILE}.png"],
        ["query", "--memory", HOSTILE],
    ],
    ids=lambda words: words[0][:5],
)
def test_messages_are_escaped(words: list[str], tmp_path: Path) -> None:
    """Whatever an argument holds, stderr holds no control character."""
    found = subprocess.run([sys.executable, "-m", "prunesweep", *words], capture_output=True, cwd=tmp_path)
    err = found.stderr.decode()
    assert found.returncode in (2, 5), err
    assert unsafe(err) == set() and "Traceback" not in err


def test_csv_on_a_terminal_is_escaped_and_in_a_pipe_exact(tmp_path: Path) -> None:
    """What a terminal would obey goes to programs alone."""
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows/x.parquet").write_bytes(b"")
    words = [sys.executable, "-m", "prunesweep", "query", "select 'a' || chr(27) || '[2J' x", "-f", "csv"]
    words += ["--store", str(tmp_path)]
    piped = subprocess.run(words, capture_output=True).stdout
    assert piped == b"x\na\x1b[2J\n"
    ours, theirs = pty.openpty()
    subprocess.run(words, stdout=theirs, stderr=subprocess.DEVNULL)
    os.close(theirs)
    assert os.read(ours, 1000).replace(b"\r", b"") == rb"x" + b"\n" + rb"a\x1b[2J" + b"\n"
    os.close(ours)
