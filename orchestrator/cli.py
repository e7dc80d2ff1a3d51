"""The command line. Data goes to stdout, everything else to stderr."""

from __future__ import annotations

import os
import signal
import sys
import tomllib
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import click

from orchestrator.errors import ClusterError, UserError
from orchestrator.phases import Phases
from storage.errors import QueryError, SkippedFile, StoreError
from storage.printable import printable_output
from storage.userfiles import read_regular

PROJECT_FILE = "prunesweep.toml"
PROJECT_KEYS = ("store", "data_root", "address", "job_server")
MAX_PROJECT_BYTES = 10**6
EXIT_CODES: dict[type[Exception], int] = {UserError: 2, QueryError: 2, ClusterError: 4, StoreError: 5}
INTERRUPTED, FAILED_TASKS, INTERNAL = 130, 3, 1

# command -> the module it is in: a command's imports are paid for only when it is run.
COMMANDS = {
    "run": "cli_run",
    "plan": "cli_run",
    "resume": "cli_run",
    "submit": "cli_cluster",
    "logs": "cli_cluster",
    "stop": "cli_cluster",
    "status": "cli_read",
    "ls": "cli_read",
    "rerun": "cli_store",
    "compact": "cli_store",
    "rm": "cli_store",
    "query": "cli_sql",
    "export": "cli_sql",
    "diff": "cli_sql",
    "corr": "cli_corr",
    "plot": "cli_plot",
    "report": "cli_report",
    "import": "cli_import_store",
    "import-logs": "cli_import",
    "studies": "cli_setup",
    "prefetch": "cli_setup",
    "doctor": "cli_doctor",
}
PHASES = {
    "run": "checking the spec",
    "plan": "checking the spec",
    "resume": "reading the store",
    "submit": "checking the spec",
    "logs": "asking the job server",
    "stop": "stopping the sweep",
    "status": "reading the store",
    "ls": "reading the store",
    "rerun": "reading the store",
    "compact": "merging row files",
    "rm": "reading the store",
    "export": "reading the store",
    "diff": "comparing rows",
    "corr": "reading the store",
    "plot": "reading the store",
    "report": "reading the store",
    "import-logs": "reading the logs",
    "import": "merging the stores",
    "studies": "expanding the studies",
    "prefetch": "looking for data sets",
    "doctor": "checking this machine",
}
"""The phase a command begins with. `query` reports its phase itself, after it has forked."""

HELP = {
    "run": "Expand a spec or a study, run it, print the correlation table.",
    "plan": "Say what would run: cells, tasks, shards, cost. Runs nothing.",
    "resume": "Run exactly what a sweep has unfinished.",
    "submit": "Run a spec as a job on a Ray cluster.",
    "logs": "Show the output of a submitted sweep.",
    "stop": "Stop a sweep; what is committed stays.",
    "status": "How a sweep stands: done, failed, running, pending, pace, drivers.",
    "ls": "List the sweeps of a store.",
    "rerun": "Run one task again and compare with its row.",
    "compact": "Merge the row files of a store into few.",
    "rm": "Remove a sweep, or what no sweep needs.",
    "query": "Ask the store in SQL.",
    "export": "Write a sweep, or the store, to one DuckDB, Parquet or CSV file.",
    "diff": "What differs between two sweeps, or within one over an axis: rows and verdicts.",
    "corr": "Does the loss after pruning predict the accuracy after retraining?",
    "plot": "Draw the scatter of a sweep.",
    "report": "Write all there is to say of a sweep into one HTML file.",
    "import": "Merge the sweeps and rows of another store into this one.",
    "import-logs": "Make rows of the reference implementation's text logs.",
    "studies": "List the studies that ship with prunesweep, or show one.",
    "prefetch": "Download data sets into the data root.",
    "doctor": "Check this machine, the store and the data; with --address a cluster.",
}


class Commands(click.Group):
    """The commands, each imported when it is needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        name = {"import": "import_store"}.get(cmd_name, cmd_name.replace("-", "_"))  # `import` is a keyword
        return getattr(import_module(f"orchestrator.{COMMANDS[cmd_name]}"), name)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args[0] not in COMMANDS:
            from difflib import get_close_matches

            near = get_close_matches(args[0], COMMANDS, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            ctx.fail(f"No such command '{args[0]}'.{hint} There are: {', '.join(COMMANDS)}.")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, HELP[name]) for name in COMMANDS])


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="prunesweep")
@click.option("--debug", is_flag=True, help="Show tracebacks and what Ray logs.")
@click.pass_context
def command_line(ctx: click.Context, debug: bool) -> None:
    """Pruning sweeps: grids of prune-retrain tasks on Ray, one Parquet row each, answers in SQL.

    \b
    prunesweep run digits                     a study, on this machine
    prunesweep run sweep.yaml --set grid.ratio=0.5
    prunesweep corr digits                    the table again
    prunesweep query "select * from cells"
    prunesweep submit sweep.yaml --address http://head:8265

    An option not given is taken from the environment (PRUNESWEEP_STORE, PRUNESWEEP_DATA_ROOT), then
    from prunesweep.toml in the working directory, as `store = "results"`.
    """
    ctx.obj = {"debug": debug, "phases": ctx.with_resource(Phases())}
    if ctx.invoked_subcommand in PHASES:
        ctx.obj["phases"](PHASES[ctx.invoked_subcommand])
    found = _project_file()
    # Ray's own address and its job server's are two things, and one option name.
    jobs = {**found, "address": found.get("job_server")}
    # What reads only looks at a cluster when it is told to: that imports ray.
    reads = {key: value for key, value in found.items() if key != "address"}
    of_module = {"cli_cluster": jobs, "cli_read": reads, "cli_doctor": reads}
    ctx.default_map = {name: of_module.get(module, found) for name, module in COMMANDS.items()}


def _project_file() -> dict[str, Any]:
    path = Path(PROJECT_FILE)
    if not path.is_file():
        return {}
    try:
        found = tomllib.loads(read_regular(path, MAX_PROJECT_BYTES).decode())
    except (OSError, ValueError, RecursionError) as error:  # a number too long to read is a bare ValueError
        raise UserError(f"{path}: not valid TOML: {error}") from error
    unknown = sorted(set(found) - set(PROJECT_KEYS))
    if unknown:
        raise UserError(f"{path}: unknown key {unknown[0]}; allowed: {', '.join(PROJECT_KEYS)}")
    for key, value in found.items():
        if not isinstance(value, str) or not value:
            raise UserError(f'{path}: {key} is text, as {key} = "...", not {value!r}')
    return found


def main(arguments: list[str] | None = None) -> None:
    """Run a command and exit with its code: a person's mistake is one message, never a traceback."""
    with printable_output():
        _main(sys.argv[1:] if arguments is None else arguments)


def _main(given: list[str]) -> NoReturn:
    debug = "--debug" in given  # wherever it stands
    given = ["--debug", *(word for word in given if word != "--debug")] if debug else given
    try:
        with _warnings_in_lines():
            code = command_line.main(given, prog_name="prunesweep", standalone_mode=False)
    except click.exceptions.Abort:
        code = INTERRUPTED
    except KeyboardInterrupt:
        code = INTERRUPTED
    except click.ClickException as error:
        error.show()
        code = 2
    except tuple(EXIT_CODES) as error:
        if debug:
            traceback.print_exc()
        click.echo(f"prunesweep: {error}", err=True)
        code = next(c for kind, c in EXIT_CODES.items() if isinstance(error, kind))
    except BrokenPipeError:
        sys.stderr.close()
        code = 0
    except Exception as error:
        code = _unforeseen(error, debug)
    sys.exit(code if isinstance(code, int) else 0)


@contextmanager
def _warnings_in_lines() -> Iterator[None]:
    """Print each warning of the store as one line, once a command, not as Python prints it."""
    with warnings.catch_warnings():
        printed: set[str] = set()
        otherwise = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if not issubclass(category, SkippedFile):
                otherwise(message, category, *where, **more)
            elif str(message) not in printed:
                printed.add(str(message))
                click.echo(f"warning: {message}", err=True)

        warnings.simplefilter("always", SkippedFile)
        warnings.showwarning = show
        yield


def _unforeseen(error: Exception, debug: bool) -> int:
    """Say what is neither a mistake of the person's nor a fault that is known; the exit code."""
    from prunesweep import ROOMS, lacking

    if isinstance(error, ModuleNotFoundError) and str(error.name).partition(".")[0] not in ROOMS and not debug:
        click.echo(f"prunesweep: {lacking(error)}", err=True)
        return EXIT_CODES[ClusterError]
    traceback.print_exc()
    click.echo(f"prunesweep: internal error, please report it: {type(error).__name__}: {error}", err=True)
    return INTERNAL


def entry() -> None:
    """`main`, in a process of its own: it leaves at once where Ray was used, or a store left without an answer.

    Ray's threads can abort an interpreter that winds down, and with it the exit code. A request to a store that is over
    its time would keep it. SIGTERM is a Ctrl-C, wherever it comes.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except SystemExit as end:
        if "ray" not in sys.modules and not _has_left_behind():
            raise
        for stream in (sys.stdout, sys.stderr):
            if not stream.closed:
                stream.flush()
        os._exit(end.code if isinstance(end.code, int) else 1)


def _has_left_behind() -> bool:
    if "storage.remote" not in sys.modules:
        return False
    from storage.remote import has_left_behind

    return has_left_behind()
