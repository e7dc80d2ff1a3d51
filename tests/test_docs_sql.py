"""docs/sql.md is executed: its queries, commands and Python; its tables name every view, column and function."""

from __future__ import annotations

import io
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from storage.records import Cell, Removed, Row, Task
from storage.schema import COLUMNS
from storage.sql import FUNCTIONS, VIEWS
from storage.store import Store
from tests.rows import NOON, ORACLE, done, failed, plan
from tests.test_cli_errors import run

PAGE = (Path(__file__).parents[1] / "docs" / "sql.md").read_text()
CELLS = [
    replace(ORACLE, layers=((layer, 0.5),), propagation=propagation)
    for layer in ("conv1", "conv2")
    for propagation in ("exact", "released")
]
CANDIDATES, SEEDS = 12, 2


def blocks(language: str) -> list[str]:
    """The fenced code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def table(heading: str) -> dict[str, str]:
    """The tables below a heading: what is in backticks in the first column, comma by comma, and what is beside it."""
    (text,) = re.findall(rf"^#+ {heading}\n(.*?)(?=^#)", f"{PAGE}\n#", re.DOTALL | re.MULTILINE)
    lines = re.findall(r"^\| `(.*?)` \| (.*) \|$", text, re.MULTILINE)
    return {name: meaning for names, meaning in lines for name in re.sub(r"\(.*\)", "", names).split(", ")}


def row(cell: Cell, candidate: int, seed: int) -> Row:
    """A finished task, its numbers made up."""
    loss = 0.1 * ((candidate * 7) % CANDIDATES) + (cell.propagation == "released")
    best = 0.9 - loss / 10 + 0.04 * seed * (candidate % 3)
    return done(
        Task(cell, candidate, seed),
        removed=(Removed(cell.layers[0][0], (candidate, candidate + 1)),),
        pruned_train_loss=loss,
        pruned_test_loss=loss,
        pruned_test_accuracy=0.5,
        best_test_accuracy=best,
        epoch_test_accuracy=(best - 0.1 * loss, best),
        score_l1=loss,
        score_l2=float(candidate),
        seconds_prune=1.0,
        seconds_retrain=2.0,
        device="cpu",
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a store: the sweep `study` over two axes, and `again` in another precision."""
    found = tmp_path_factory.mktemp("docs")
    store = Store(found / "results")
    for name, cells in {"study": CELLS, "again": [replace(cell, precision="bf16") for cell in CELLS[:1]]}.items():
        rows = [row(cell, c, s) for cell in cells for c in range(CANDIDATES) for s in range(SEEDS)]
        plan(store, name, [one.task() for one in rows])
        store.commit_rows("s0", [*rows, failed(rows[0].task(), started_at=NOON, host="here")])
    return found


@pytest.fixture
def store(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The store, seen from its folder."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    return Store("results")


@pytest.mark.parametrize("query", blocks("sql"), ids=lambda query: query[:40])
def test_a_recipe_answers(query: str, store: Store) -> None:
    """Every one, with lines that are not all null."""
    found = store.sql(query).fetchall()
    assert found
    assert all(any(line[i] is not None for line in found) for i in range(len(found[0])))


def test_recipes_say_what_they_are_said_to() -> None:
    """There are as many as the page has sentences for."""
    (recipes,) = re.findall(r"^## Recipes\n(.*?)(?=^## )", PAGE, re.DOTALL | re.MULTILINE)
    assert recipes.count("```sql") == len(blocks("sql")) == 10


def commands() -> list[str]:
    """Each command of the page."""
    return [line for block in blocks("bash") for line in block.splitlines()]


@pytest.mark.parametrize("line", commands())
def test_a_command_works(
    line: str, store: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every one exits 0, and prints or writes what it is for."""
    given, _, command = line.rpartition(" | ")
    if given:
        monkeypatch.setattr("sys.stdin", io.StringIO(" ".join(shlex.split(given)[1:])))
    name, *arguments = shlex.split(command)
    assert name == "prunesweep"
    assert run(*arguments, "--store", store.location) == 0
    out, err = capsys.readouterr()
    assert out or "wrote" in err


@pytest.mark.parametrize("code", blocks("python"), ids=["notebook", "without prunesweep"])
def test_python_works(code: str, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """The notebook's, and that of plain duckdb and pandas."""
    found: dict[str, object] = {}
    exec(compile(code, "docs/sql.md", "exec"), found)
    rows = (len(CELLS) + 1) * CANDIDATES * SEEDS + 2
    assert len(pd.DataFrame(found["frame"])) == (rows if "read_parquet" in code else len(CELLS) * CANDIDATES)
    assert capsys.readouterr().out
    assert store.exists()


@pytest.mark.parametrize("view", VIEWS)
def test_every_column_of_a_view_is_explained(view: str, store: Store) -> None:
    """In the order of the page, none too many and none missing."""
    documented = set(table(view)) | (set(table("rows")) if view in ("tasks", "attempts") else set())
    assert documented == set(store.sql(f"from {view}").columns)


def test_views_functions_and_columns_are_all_there() -> None:
    """What the code has, the page has, in the same words."""
    assert set(table("Views")) == set(VIEWS)
    assert set(table("Functions")) == set(FUNCTIONS)
    assert table("rows") == {name: meaning for group in COLUMNS.values() for name, (_, meaning) in group.items()}
