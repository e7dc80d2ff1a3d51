"""A prompt for SQL: `prunesweep query` on a terminal. Every question is asked of the store as it is then."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import Completer, Completion
from prompt_toolkit.filters import Condition
from prompt_toolkit.history import FileHistory, History, InMemoryHistory

from orchestrator.options import FORMATS
from storage.errors import QueryError, StoreError
from storage.printable import printable_lines

if TYPE_CHECKING:
    from prompt_toolkit.document import Document
    from prompt_toolkit.input import Input
    from prompt_toolkit.output import Output

Ask = Callable[[str, str], bytes]
"""A query and a format to the answer. Raises QueryError, StoreError."""

SHOWN = tuple(form for form in FORMATS if form != "parquet")
COMMANDS = {
    ".help": "this",
    ".views": "the views there are",
    ".schema VIEW": "the columns of a view",
    f".format {'|'.join(SHOWN)}": "how answers are shown from here on",
    ".quit": "leave; so does Ctrl-D",
}
HELP = "\n".join(
    [
        "SQL over the store's views, ended by a ;",
        *(f"  {name:<52}{what}" for name, what in COMMANDS.items()),
        "Ctrl-C clears the line, or stops what is asked. Tab completes. The arrows find what was asked before.",
    ]
)
_BEFORE_A_VIEW = re.compile(r"\b(from|join|describe|summarize)\s+\w*$", re.IGNORECASE)
_WORD = re.compile(r"(^\s*\.)?\w*$")


def history_file() -> Path:
    """Where what was asked is kept."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "prunesweep" / "query_history"


def _history() -> History:
    """What was asked before, in a file; where none can be written, only in memory."""
    path = history_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            return FileHistory(path)
    except OSError:
        return InMemoryHistory()


def is_whole(text: str) -> bool:
    """Whether Enter sends `text`: SQL ended by a ;, a line with a dot before it, or nothing."""
    text = text.strip()
    return not text or text.startswith(".") or text.endswith(";")


class Words(Completer):
    """Completes commands, views, columns (those of the views that are named first), functions and keywords."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._columns: Mapping[str, list[str]] | None = None
        self._others: list[str] = []

    def get_completions(self, document: Document, complete_event: object) -> Iterator[Completion]:  # noqa: ARG002
        """The words that begin as the one before the cursor does."""
        before = document.text_before_cursor
        found = _WORD.search(before)
        start = found[0] if found else ""
        for word in dict.fromkeys(self._candidates(before)):
            if word.lower().startswith(start.strip().lower()) and word != start.strip():
                yield Completion(word, -len(start.strip()))

    def _candidates(self, before: str) -> Iterable[str]:
        line = before.lstrip()
        if line.startswith(".schema "):
            return self._views()
        if line.startswith(".format "):
            return SHOWN
        if line.startswith("."):
            return [name.split()[0] for name in COMMANDS]
        columns = self._views()
        if not line or _BEFORE_A_VIEW.search(before):
            return columns
        named = set(re.findall(r"\w+", before)) & set(columns)
        mine = [name for view in columns if view in named for name in columns[view]]
        every = [name for names in columns.values() for name in names]
        return [*mine, *every, *columns, *self._others] if re.search(r"\w$", before) else mine

    def _views(self) -> Mapping[str, list[str]]:
        """view -> its columns, looked up once."""
        if self._columns is None:
            try:
                self._columns, self._others = vocabulary(self._ask)
            except (QueryError, StoreError):  # a question will say it
                self._columns = {}
        return self._columns


_COLUMNS = "select table_name as view, column_name as name from duckdb_columns() where table_name in ({views})"
_OTHERS = """select keyword_name as name from duckdb_keywords() where keyword_category <> 'unreserved'
union all (select distinct function_name from duckdb_functions()
           where function_type in ('scalar', 'aggregate') and regexp_full_match(function_name, '[a-z]\\w+')
           order by 1)"""


def vocabulary(ask: Ask) -> tuple[dict[str, list[str]], list[str]]:
    """view -> its columns; and our functions, then keywords, then DuckDB's functions."""
    from storage.sql import FUNCTIONS, VIEWS

    columns: dict[str, list[str]] = {view: [] for view in VIEWS}
    views = ", ".join(f"'{view}'" for view in VIEWS)
    for line in json.loads(ask(_COLUMNS.format(views=views), "json")):
        columns[line["view"]].append(line["name"])
    return columns, [*FUNCTIONS, *(line["name"] for line in json.loads(ask(_OTHERS, "json")))]


def session(ask: Ask, given: Input | None = None, output: Output | None = None) -> PromptSession[str]:
    """A prompt that sends what is whole, with completion and history."""
    from prompt_toolkit.lexers import PygmentsLexer
    from pygments.lexers.sql import SqlLexer

    def unfinished() -> bool:
        return not is_whole(made.default_buffer.text)

    made: PromptSession[str] = PromptSession(
        "prunesweep> ",
        multiline=Condition(unfinished),
        prompt_continuation=lambda width, *_: "... ".rjust(width),
        history=_history(),
        completer=Words(ask),
        complete_while_typing=False,
        lexer=PygmentsLexer(SqlLexer),
        input=given,
        output=output,
    )
    return made


def converse(prompt: PromptSession[str], ask: Ask, form: str) -> None:
    """Answer one question after the other, until there are no more."""
    click.echo("SQL ended by a ; or .help", err=True)
    while True:
        try:
            text = prompt.prompt().strip()
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
        if text == ".quit":
            return
        try:
            form = _answered(text, ask, form)
        except (QueryError, StoreError) as error:
            click.echo(printable_lines(error), err=True)
        except KeyboardInterrupt:
            click.echo("stopped", err=True)


def _answered(text: str, ask: Ask, form: str) -> str:
    """Answer one question; returns the format from here on. Raises QueryError, StoreError."""
    name, *words = text.rstrip(";").split() or [""]
    if not name.startswith("."):
        if name:
            _show(ask(text, form))
        return form
    if name == ".help":
        click.echo(HELP)
    elif name == ".views":
        _show(ask("select view_name as view from duckdb_views() where not internal order by all", form))
    elif name == ".schema" and len(words) == 1 and words[0].isidentifier():
        _show(ask(f"select column_name, column_type from (describe {words[0]})", form))
    elif name == ".format" and len(words) == 1 and words[0] in SHOWN:
        return words[0]
    else:
        raise QueryError(f"there is no {text}; .help says what there is")
    return form


def _show(content: bytes) -> None:
    click.echo(printable_lines(content.decode()), nl=False)
