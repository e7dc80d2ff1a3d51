"""report: a sweep as one HTML file. Neither torch nor ray is imported here."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from orchestrator.cli_corr import x_option, y_option
from orchestrator.options import existing_store, store_option, write_file
from orchestrator.phases import phases

if TYPE_CHECKING:
    from storage.report import Commands
    from storage.report.records import Facts


@click.command()
@click.argument("sweep")
@x_option
@y_option
@store_option
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The HTML file; SWEEP.html if left out.",
)
def report(sweep: str, x: str, y: str, store: str, output: Path | None) -> None:
    """Write all there is to say of SWEEP into one HTML file that opens without a network.

    What ran, the answer in words, the tables of `corr`, figures, failures, cost, a paragraph on methods and the
    commands that make it again. A sweep that is not finished is reported as far as it is, and says so.

    \b
    prunesweep report digits
    prunesweep report digits -o report.html
    prunesweep report digits --y last5_test_accuracy_mean -o last5.html
    """
    from importlib.metadata import version

    from storage.report import draw, gather, page

    path = output or Path(f"{sweep}.html")
    if not path.name:
        raise click.UsageError("--output: give the name of a file")
    if path.suffix not in (".html", ".htm"):
        raise click.UsageError(f"{path}: a report is HTML; name it {path.with_suffix('.html')}")
    if not path.parent.is_dir():
        raise click.UsageError(f"cannot write {path}: there is no folder {path.parent}")
    facts = gather(existing_store(store), sweep, x, y, version("prunesweep"), phases())
    figures = draw(facts, phases())
    phases()("writing the page")
    text = page(facts, figures, commands(facts, store, path.name))
    write_file(path, lambda: path.write_text(text, encoding="utf-8"))
    click.echo(str(path))
    for name, part in (("the tables", facts.claims), ("criteria", facts.criteria), ("early epochs", facts.early)):
        if part.value is None:
            click.echo(f"warning: {name} left out: {part.why_not}", err=True)
    for one in facts.skipped:
        click.echo(f"warning: skipped {one}", err=True)
    click.echo(f"wrote {len(text.encode()) / 2**20:.1f} MiB; it opens in any browser, without a network", err=True)


def commands(facts: Facts, store: str, file: str) -> Commands:
    """What to type to make the sweep, its tables and this report again, and to go on with it."""
    from storage.report import Commands

    sweep = facts.plan.sweep
    where = "" if store == "results" else f" --store {shlex.quote(store)}"
    axes = "".join(
        f" --{name} {shlex.quote(value)}"
        for name, value, usual in (("x", facts.x, "pruned_train_loss"), ("y", facts.y, "best_test_accuracy"))
        if value != usual
    )
    made = f"prunesweep report {sweep}{axes}{where} -o {shlex.quote(file)}"
    study = _as_study(facts.plan.spec)
    spec = [] if study else [_written(sweep, facts.plan.spec)]
    first = [*spec, f"prunesweep run {study or f'{sweep}.yaml'}{where}"]
    lines = [*_pinned(facts), *first, f"prunesweep corr {sweep}{axes}{where}", made]
    return Commands("\n".join(lines), f"prunesweep resume {sweep}{where}", made)


def _pinned(facts: Facts) -> list[str]:
    """The versions that made the rows, for pip."""
    ran = facts.ran.value
    if not ran:
        return []
    pins = [f"{name}=={version}" for name, version in sorted(ran[0].versions.items()) if name != "python"]
    about = "# the versions that made " + ("most of the rows" if len(ran) > 1 else "the rows")
    install = [f"{about}, beside prunesweep {facts.made_with}", shlex.join(["pip", "install", *pins])]
    return install if pins else []


def _written(sweep: str, spec: str) -> str:
    """The spec as a here-document whose end is no line of it."""
    end = "EOF"
    while end in spec.splitlines():
        end += "_"
    return f"cat > {sweep}.yaml <<'{end}'\n{spec.rstrip()}\n{end}"


def _as_study(spec: str) -> str:
    """`digits --set retrain.epochs=1` of a spec that is a study with overrides; nothing for any other."""
    from orchestrator.documents import Document
    from orchestrator.errors import UserError
    from orchestrator.study import open_study, study_names

    try:
        given = Document("the spec", spec).plain()
        if given.get("name") not in study_names():
            return ""
        study = open_study(given["name"])
        sets = _overrides(study.plain(), given)
        for assignment in sets:
            study.override(assignment)
    except UserError:
        return ""
    words = [given["name"], *(word for assignment in sets for word in ("--set", assignment))]
    return shlex.join(words) if study.plain() == given else ""


def _overrides(study: dict[str, Any], given: dict[str, Any]) -> list[str]:
    """The `--set`s that make the given spec of a study, if any can."""
    found = []
    for key, value in given.items():
        usual = study.get(key)
        if isinstance(value, dict) and isinstance(usual, dict) and usual.keys() <= value.keys():
            found += [f"{key}.{name}={_flow(one)}" for name, one in value.items() if usual.get(name) != one]
        elif usual != value:
            found.append(f"{key}={_flow(value)}")
    return found


def _flow(value: Any) -> str:
    """A value as YAML in one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_flow(k)}: {_flow(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(_flow, value))}]"
    plain = isinstance(value, str) and value.replace("_", "").replace("-", "").isalnum() and not value[0].isdigit()
    return value if plain and value not in ("true", "false", "null") else json.dumps(value)
