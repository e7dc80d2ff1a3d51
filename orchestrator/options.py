"""Options that several commands share."""

from __future__ import annotations

import functools
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from orchestrator.errors import UserError
from orchestrator.phases import phases

if TYPE_CHECKING:
    import pyarrow as pa

    from orchestrator.documents import Document
    from storage.store import Problem, Store

FORMATS = ("table", "json", "jsonl", "csv", "markdown", "latex", "parquet")

FOR_PEOPLE = ("table", "markdown", "latex")
"""The formats that people read; programs read the others."""

store_option = click.option(
    "--store",
    envvar="PRUNESWEEP_STORE",
    default="results",
    show_default=True,
    help="The store: a folder, or a URI as s3://bucket/prefix.",
)
data_root_option = click.option(
    "--data-root",
    envvar="PRUNESWEEP_DATA_ROOT",
    default="data",
    show_default=True,
    help="The folder data sets are in, in torchvision's layout.",
)
set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change the spec: grid.ratio=0.5, retrain.epochs=3."
)
replace_option = click.option(
    "--replace",
    is_flag=True,
    help="Let a changed grid drop planned tasks from the sweep of this name. Rows stay in the store.",
)
inline_option = click.option("--inline", is_flag=True, help="Run in this process, without Ray.")
run_address_option = click.option(
    "--address",
    envvar="RAY_ADDRESS",
    help="A running Ray cluster (auto, or HOST:PORT). Without it, Ray is started for this run.",
)


def share_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--max-workers and --priority: what a run takes of a cluster that others use too."""
    most = click.option("--max-workers", type=click.IntRange(1), help="So many shards at once at most.")
    priority = click.option(
        "--priority",
        type=click.FloatRange(0.01, 1000),
        default=1.0,
        show_default=True,
        help="The weight of this sweep where several share a cluster: one of 2 gets twice the share of one of 1.",
    )
    return most(priority(command))


def share_words(max_workers: int | None, priority: float) -> tuple[str, ...]:
    """The same as they were given."""
    words = () if max_workers is None else ("--max-workers", str(max_workers))
    return words + (() if priority == 1 else ("--priority", f"{priority:g}"))


where_option = click.option("--where", metavar="SQL", help="Only candidates for which this holds.")


def read_spec(spec: str, overrides: tuple[str, ...]) -> Document:
    """The document of a spec or a study with its --set overrides on it. Raises UserError."""
    from orchestrator.study import open_document

    document = open_document(spec)
    for assignment in overrides:
        document.override(assignment)
    return document


def output_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """-f and -o, checked before the command runs: after it would be late."""

    @functools.wraps(command)
    def checked(*args: Any, form: str, output: Path | None, **options: Any) -> Any:
        if form == "parquet" and output is None and sys.stdout.isatty():
            raise click.UsageError("-f parquet needs -o FILE (or a pipe)")
        if output is not None and not output.parent.is_dir():
            raise click.UsageError(f"cannot write {output}: there is no folder {output.parent}")
        return command(*args, form=form, output=output, **options)

    form = click.option(
        "-f",
        "--format",
        "form",
        type=click.Choice(FORMATS),
        default="table",
        show_default=True,
        help="table, markdown and latex (with booktabs) are rounded for people, the others exact.",
    )
    output = click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Write to a file.")
    return form(output(checked))


def emit(table: pa.Table, form: str, output: Path | None) -> None:
    """Print a table, or write it to a file."""
    from storage.formats import render

    try:
        content = render(table, form, width(output))
    except (OverflowError, NotImplementedError) as error:  # dates that Python has not, types that Parquet has not
        raise UserError(f"a value of the answer cannot be written as {form}: {error}") from error
    put(content, output)


def width(output: Path | None) -> int | None:
    """How wide a table for people may be: lines that a terminal breaks cannot be read; a file or a pipe gets them
    whole."""
    return shutil.get_terminal_size().columns if output is None and sys.stdout.isatty() else None


def put(content: bytes, output: Path | None) -> None:
    """Print `content`, or write it to a file. It ends the phase that stderr shows."""
    phases().rest()
    if output is None and sys.stdout.isatty():
        click.echo(content.decode(errors="replace"), nl=False)  # the stream escapes it
        return
    if output is None:
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
        return
    write_file(output, lambda: output.write_bytes(content))
    click.echo(f"wrote {output}", err=True)


def write_file(path: Path, write: Callable[[], object]) -> None:
    """Run `write`; a folder that is missing or closed to us is a usage error, not a traceback."""
    try:
        write()
    except OSError as error:
        raise click.UsageError(f"cannot write {path}: {error.strerror or error}") from error


def existing_store(location: str) -> Store:
    """The store at `location`. Raises StoreError where there is none."""
    from storage.store import Store

    store = Store(location)
    store.check_exists()
    return store


def absolute_store(location: str) -> str:
    """A store's location as any machine that sees it would say it. Raises StoreError where it is of no known form.

    A remote one is not opened: it may be one that only a cluster reaches.
    """
    from storage.remote import kind_of
    from storage.store import Store, check_location

    check_location(location)
    return location if kind_of(location) else Store(location).absolute


def warn(problem: Problem) -> None:
    """Tell of a file in rows/ that was skipped."""
    click.echo(skipped(problem), err=True)


def skipped(problem: Problem) -> str:
    """What there is to say of a file in rows/ that was skipped."""
    return f"warning: skipped {problem.file}: {problem.reason}"


def absolute(data_root: str) -> str:
    """The data root as workers elsewhere see it."""
    return os.path.abspath(os.path.expanduser(data_root))
