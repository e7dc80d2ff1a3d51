"""Every form of a table: for people, for papers, for programs."""

import csv
import datetime as dt
import io
import json
import math
import re
import shutil
import subprocess
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.formats import FORMATS, render, shown
from storage.records import Task
from storage.sql import run_query
from storage.store import Store
from tests.rows import NOON, ORACLE, done

LINES: list[dict[str, Any]] = [
    {
        "model": "lenet5_mini",
        "layers": ["conv1", "conv3"],
        "tau": -0.123456789012345,
        "n": 12,
        "ok": True,
        "at": NOON,
        "removed": [{"layer": "conv1", "units": [0, 3]}],
    },
    {"model": 'a_b & "c"|d, é', "layers": [], "tau": math.nan, "n": None, "ok": None, "at": None, "removed": None},
    {
        "model": None,
        "layers": None,
        "tau": 1e-07,
        "n": 0,
        "ok": False,
        "at": NOON.replace(microsecond=5),
        "removed": [],
    },
]
_REMOVED = pa.list_(pa.struct([("layer", pa.string()), ("units", pa.list_(pa.int32()))]))
TABLE = pa.Table.from_pylist(
    LINES,
    schema=pa.schema(
        [
            ("model", pa.string()),
            ("layers", pa.list_(pa.string())),
            ("tau", pa.float64()),
            ("n", pa.int64()),
            ("ok", pa.bool_()),
            ("at", pa.timestamp("us")),
            ("removed", _REMOVED),
        ]
    ),
)
SMALL = TABLE.select(["model", "layers", "tau", "n"]).slice(0, 2)
OBJECTS = [
    LINES[0] | {"at": "2025-01-31T12:00:00"},
    LINES[1] | {"tau": None},
    LINES[2] | {"at": "2025-01-31T12:00:00.000005"},
]


def _text(table: pa.Table, form: str) -> str:
    return render(table, form).decode()


def test_the_formats_are_those_that_are_documented() -> None:
    """`-f` takes these seven."""
    assert sorted(FORMATS) == ["csv", "json", "jsonl", "latex", "markdown", "parquet", "table"]


@pytest.mark.parametrize("form", [form for form in FORMATS if form != "parquet"])
def test_text_ends_in_one_newline(form: str) -> None:
    """Output can be appended to a file and read by lines."""
    text = _text(TABLE, form)
    assert text.endswith("\n")
    assert not text.endswith("\n\n")


def test_table_is_for_people() -> None:
    """Four significant digits, lists joined by +, `-` for what is missing, numbers to the right."""
    assert _text(SMALL, "table").splitlines() == [
        "model           layers           tau    n",
        "--------------  -----------  -------  ---",
        "lenet5_mini     conv1+conv3  -0.1235   12",
        'a_b & "c"|d, é                     -    -',
    ]
    rest = _text(TABLE.select(["ok", "at", "removed"]).slice(0, 1), "table").splitlines()[2]
    assert rest.split("  ") == ["True", "2025-01-31 12:00:00", '[{"layer": "conv1", "units": [0, 3]}]']


def test_markdown_is_a_table() -> None:
    """A pipe or a line break in a value does not break the table."""
    table = pa.table({"error": ["a|b", "Traceback:\n  *boom*"], "n": [1, 22]})
    lines = _text(table, "markdown").splitlines()
    assert len(lines) == 4
    assert [line.replace("\\|", "").count("|") for line in lines] == [3] * 4
    assert lines[2].split() == ["|", "a\\|b", "|", "1", "|"]
    assert "Traceback:" in lines[3]
    assert "\\*boom\\*" in lines[3]


def test_latex_is_a_booktabs_table() -> None:
    """It goes into a paper as it is: booktabs rules, special characters escaped, numbers to the right."""
    assert len(_text(pa.table({"error": ["a\n\nb"]}), "latex").splitlines()) == 8
    comment, *lines = _text(SMALL, "latex").splitlines()
    assert comment == r"% needs \usepackage{booktabs}"
    assert lines[0] == r"\begin{tabular}{llrr}"
    assert lines[-1] == r"\end{tabular}"
    assert [line for line in lines if "rule" in line] == [r"\toprule", r"\midrule", r"\bottomrule"]
    head, first, second = (line.replace(" ", "") for line in (lines[2], *lines[4:6]))
    assert head == r"model&layers&$\tau$&$n$\\"
    assert first == r"lenet5\_mini&conv1+conv3&$-0.1235$&12\\"
    assert second == r'a\_b\&"c"\textbar{}d,é&&--&--\\'


CORR = pa.table(
    {
        "cell": ["[conv1] 50% & more_#1 {x}^2 ~ \\ $", "*conv2*"],
        "n": [252, 7],
        "tau": [-0.2476123, math.nan],
        "tau_low": [-0.4123, math.nan],
        "tau_high": [-0.0712, math.nan],
        "p": [3.2e-7, 0.04961],
        "p_method": ["exact", "permutation"],
        "spearman_p": [1.0, None],
        "regret": [1.5e-7, -math.inf],
        "regret_high": [0.5, 0.25],
    }
)


def test_intervals_and_p_values_are_for_people() -> None:
    """NAME_low and NAME_high side by side are one column of two digits of its width; p has three digits or is small."""
    text = _text(CORR.drop_columns(["cell"]), "table").splitlines()
    names = ["n", "tau", "tau 95 % interval", "p", "p_method", "spearman_p", "regret", "regret_high"]
    assert re.split(r"  +", text[0].strip()) == names
    line = ["252", "-0.2476", "[-0.41, -0.07]", "<0.001", "exact", "1", "1.5e-07", "0.5"]
    assert re.split(r"  +", text[2].strip()) == line
    assert re.split(r"  +", text[3].strip()) == ["7", "-", "-", "0.0496", "permutation", "-", "-inf", "0.25"]
    assert json.loads(_text(CORR, "json"))[0]["tau_low"] == -0.4123
    assert json.loads(_text(CORR, "json"))[0]["p"] == 3.2e-7
    assert _text(CORR, "csv").startswith("cell,n,tau,tau_low,tau_high,p,")


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [
        (-0.41234, -0.07123, "[-0.41, -0.07]"),
        (0.9871, 0.9912, "[0.9871, 0.9912]"),
        (-0.0001, 0.34, "[0.00, 0.34]"),
        (12.0, 245.0, "[12, 245]"),
        (0.5, 0.5, "[0.5, 0.5]"),
        (math.nan, 0.5, "[-, 0.5]"),
        (None, None, "-"),
        (-math.inf, 1.0, "[-inf, 1]"),
    ],
)
def test_an_interval_is_as_exact_as_it_is_narrow(low: float | None, high: float | None, text: str) -> None:
    """Two significant digits of the width, for both ends."""
    table = pa.table({"x_low": pa.array([low], pa.float64()), "x_high": pa.array([high], pa.float64())})
    (column,) = shown(table)
    assert (column.name, column.texts, column.is_number) == ("x 95 % interval", (text,), True)


def test_intervals_of_a_column_have_equally_many_digits() -> None:
    """Those of the narrowest; but one far narrower does not make the others unreadable."""
    low, high = [-0.612, -0.1612, math.nan], [0.4, 0.2512, math.nan]
    assert shown(pa.table({"x_low": low, "x_high": high}))[0].texts == ("[-0.61, 0.40]", "[-0.16, 0.25]", "-")
    narrow = pa.table({"x_low": [0.1, 0.5], "x_high": [0.4, 0.50000001]})
    assert shown(narrow)[0].texts == ("[0.1000, 0.4000]", "[0.5000, 0.5000]")
    assert [column.name for column in shown(pa.table({"x_low": [0.1], "x_high": ["b"]}))] == ["x_low", "x_high"]


def test_latex_numbers_are_mathematics() -> None:
    """A minus is a minus, powers of ten are written out, and no line begins with what LaTeX takes for an argument."""
    lines = _text(CORR, "latex").splitlines()[1:]
    head, first, second = (line.replace(" ", "") for line in (lines[2], *lines[4:6]))
    assert "$\\tau$95~\\%interval&$p$&$p$method&spearman$p$&regret&regrethigh" in head
    assert first.startswith(r"{}[conv1]50\%\&more\_\#1\{x\}\textasciicircum{}2\textasciitilde{}\textbackslash{}\$&252&")
    assert first.endswith(r"$-0.2476$&$[-0.41,-0.07]$&$<0.001$&exact&1&$1.5\times10^{-7}$&0.5\\")
    assert second == r"{}*conv2*&7&--&--&0.0496&permutation&--&$-\infty$&0.25\\"


@given(st.lists(st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=12), min_size=1, max_size=3))
def test_no_text_ends_a_cell_of_latex(texts: list[str]) -> None:
    """Whatever a cell says, the table keeps its cells: every special character is escaped."""
    table = pa.table({f"c{i}": [text] for i, text in enumerate(texts)})
    (line,) = _text(table, "latex").splitlines()[5:6]
    cells = line.removesuffix(r"\\").removeprefix("{}")
    plain = re.sub(r"\\(text\w+\{\}|[&%$#_{}])", "", cells)
    assert plain.count("&") == len(texts) - 1
    assert not set(plain) & set("%$#_{}\\^~")


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex here")
def test_latex_is_compiled(tmp_path: Path) -> None:
    """A paper that has it and booktabs compiles, without a warning."""
    head = "\\documentclass{article}\\usepackage{booktabs}\\hbadness=10000\\hfuzz=1000pt\\begin{document}\n"
    odd = pa.table(
        {"error": ["".join(map(chr, range(32, 127))), "[a]", "*"], "x_low": [-1e-9] * 3, "x_high": [1.0] * 3}
    )
    body = "\n\n".join(_text(table, "latex") for table in (CORR, odd, SMALL.slice(0, 0), CORR.select(["cell"])))
    (tmp_path / "paper.tex").write_text(f"{head}{body}\\end{{document}}\n")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
    assert "Warning" not in found.stdout


def test_markdown_keeps_its_cells_and_shows_tags() -> None:
    """A name with a pipe is one cell, and a class in angle brackets is text."""
    lines = _text(pa.table({"a|b": ["<module> x < 3", "<0.001"], "n": [-1, 2]}), "markdown").splitlines()
    assert [cell.strip() for cell in re.split(r"(?<!\\)\|", lines[0])] == ["", "a\\|b", "n", ""]
    assert set(lines[1].split("|")[2]) == {"-", ":"}
    assert lines[1].rstrip("|").endswith("-:")
    assert "&lt;module> x < 3" in lines[2]
    assert "<0.001" in lines[3]


def test_a_table_too_wide_is_cut_between_columns() -> None:
    """No line is longer than the terminal, and every part names its lines; where all fits there is one part."""
    text = render(CORR, "table", 60).decode()
    parts = text.rstrip("\n").split("\n\n")
    assert len(parts) > 1
    assert all(len(line) <= 60 for line in text.splitlines())
    assert all(part.splitlines()[3].startswith("*conv2*") for part in parts)
    names = [name for part in parts for name in re.split(r"  +", part.splitlines()[0].strip())[1:]]
    assert names == [column.name for column in shown(CORR)][1:]
    assert render(CORR, "table", 500) == render(CORR, "table")
    assert render(CORR, "markdown", 20) == render(CORR, "markdown")
    assert render(TABLE, "table", 5).decode().count("model") == len(TABLE.column_names) - 1


def test_json_is_a_list_of_objects() -> None:
    """Any JSON parser reads it: null and NaN are null, times ISO 8601, floats exact, lists lists."""
    text = _text(TABLE, "json")
    assert json.loads(text, parse_constant=pytest.fail) == OBJECTS
    assert list(json.loads(text)[0]) == TABLE.column_names


def test_jsonl_is_one_object_per_line() -> None:
    """Every line is an object of its own."""
    assert [json.loads(line, parse_constant=pytest.fail) for line in _text(TABLE, "jsonl").splitlines()] == OBJECTS


def test_no_infinity_in_json() -> None:
    """JSON has no infinity, in a cell or in a list."""
    table = pa.table({"a": [math.inf, -math.inf], "curve": [[math.nan, 1.0], [math.inf, None]]})
    expected = [{"a": None, "curve": [None, 1.0]}, {"a": None, "curve": [None, None]}]
    assert json.loads(_text(table, "json"), parse_constant=pytest.fail) == expected


def test_csv_is_read_back() -> None:
    """Quotes, commas and line breaks survive, lists are JSON, what is missing is empty, floats are exact."""
    found = list(csv.DictReader(io.StringIO(_text(TABLE, "csv"))))
    assert [line["model"] for line in found] == [LINES[0]["model"], LINES[1]["model"], ""]
    assert [line["layers"] for line in found] == ['["conv1", "conv3"]', "[]", ""]
    assert [line["tau"] for line in found] == ["-0.123456789012345", "", "1e-07"]
    assert [line["n"] for line in found] == ["12", "", "0"]
    assert [line["at"] for line in found] == ["2025-01-31T12:00:00", "", "2025-01-31T12:00:00.000005"]
    assert [json.loads(line["removed"] or "null") for line in found] == [line["removed"] for line in LINES]
    broken = pa.table({"error": ['line 1\nline "2"', "x"]})
    assert list(csv.reader(io.StringIO(_text(broken, "csv")))) == [["error"], ['line 1\nline "2"'], ["x"]]


def test_parquet_reads_back_equal() -> None:
    """The table itself, types and NaN and all."""
    again = pq.read_table(io.BytesIO(render(TABLE, "parquet")))
    assert again.schema == TABLE.schema
    assert repr(again.to_pylist()) == repr(LINES)


@pytest.mark.parametrize(
    ("form", "expected"), [("json", "[]\n"), ("jsonl", ""), ("csv", "model,layers,tau,n\n"), ("table", None)]
)
def test_no_line_is_no_error(form: str, expected: str | None) -> None:
    """An empty answer is valid in every form, and people still see its columns."""
    text = _text(SMALL.slice(0, 0), form)
    if expected is None:
        assert text.split()[:4] == SMALL.column_names
    else:
        assert text == expected
    for other in FORMATS:
        assert isinstance(render(SMALL.slice(0, 0), other), bytes)


def test_sums_are_numbers() -> None:
    """DuckDB sums integers into decimals: they are numbers in every form, not text."""
    table = pa.table({"s": pa.array([Decimal(12), None], pa.decimal128(38, 0)), "d": [Decimal("1.25"), Decimal("0.5")]})
    assert json.loads(_text(table, "json")) == [{"s": 12, "d": 1.25}, {"s": None, "d": 0.5}]
    assert _text(table, "csv") == "s,d\n12,1.25\n,0.5\n"
    assert _text(table, "table").splitlines()[2:] == [" 12  1.25", "  -   0.5"]


def test_times_and_intervals_are_text(tmp_path: Path) -> None:
    """How long a task took, `finished_at - started_at`, has every form, Parquet too."""
    took = "timestamp '2025-01-31 13:00:02.5' - timestamp '2025-01-30 12:00:00' as took, interval 14 month as long"
    (tmp_path / "rows").mkdir()
    answer = run_query(Store(tmp_path), f"select {took}, date '2025-01-31' as day, time '12:00' as time")
    expected = ["1 day, 1:00:02.500000", "14 months, 0:00:00", "2025-01-31", "12:00:00"]
    assert list(json.loads(_text(answer, "json"))[0].values()) == expected
    assert next(csv.reader(_text(answer, "csv").splitlines()[1:])) == expected
    assert all(value in _text(answer, "table").splitlines()[2] for value in expected)
    assert '"' not in _text(answer, "table")
    assert pq.read_table(io.BytesIO(render(answer, "parquet")))["took"].to_pylist() == expected[:1]


def test_whatever_duckdb_answers_can_be_shown(tmp_path: Path) -> None:
    """Every column of a row and every type of a query has a form."""
    store = Store(tmp_path)
    store.commit_rows("s0", [done(Task(ORACLE, 0, 0), score_extra=(("fpgm", 1.5),), epoch_test_loss=(0.5, None))])
    odd = "date '2025-01-31' as d, time '12:00' as t, uuid() as u, 'x'::blob as b, {'a': 1} as s"
    answer = run_query(store, f"select *, {odd}, sum(seed) over () as total from rows")
    (line,) = json.loads(_text(answer, "json"))
    assert (line["d"], line["s"], line["total"]) == ("2025-01-31", {"a": 1}, 0)
    assert line["epoch_test_loss"] == [0.5, None]
    assert line["score_extra"] == {"fpgm": 1.5}
    assert dt.datetime.fromisoformat(line["finished_at"]) == NOON
    for form in FORMATS:
        assert render(answer, form)
