"""Logs of the reference implementation -> rows and a sweep: which cell, candidate and seed a log's lines are."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator import expand
from orchestrator.documents import Document
from orchestrator.dropped import change_of, check_nothing_dropped
from orchestrator.errors import UserError
from orchestrator.plan import PLAN_COLUMNS
from orchestrator.spec import load_spec
from pruners.candidates import n_removed
from pruners.pruners import find_pruner
from storage.identity import canonical_json, digest, join_id
from storage.manifest import plan_content, read_plan
from storage.phases import Report, silent
from storage.records import IMPORTED, Cell, Removed, Row, Shard, Task, Tasks, row_for
from storage.reference_logs import LoggedCandidate, LoggedEpoch, ReferenceLog, Values, read_log
from storage.userfiles import open_regular

if TYPE_CHECKING:
    from storage.manifest import Manifest
    from storage.store import Store

ENDINGS = (".txt", ".log")
SUMMARY = "_summary"
"""What the reference calls the merged logs of all repeats; the repeats are told apart by their order there."""

WHY_NOT = "imported from a log"
_REPEAT = re.compile(r"_t(\d+)(?=_|$)")
_FIRST_LAYER = re.compile(r"(?:^|_)conv(\d)")


@dataclass(frozen=True)
class Choice:
    """What the logs do not say themselves, where it is given: layers as `conv1+conv3`, ratio, seed, dense model."""

    layers: str | None = None
    ratio: float | None = None
    seed: int | None = None
    dense: str | None = None


@dataclass(frozen=True)
class Placed:
    """A candidate of a log as the task it belongs to."""

    task: Task
    logged: LoggedCandidate
    complete: bool


@dataclass(frozen=True)
class Imported:
    """What an import did: rows written and found there already, candidates without a row, files without candidates."""

    sweep: str
    cells: int
    written: int
    known: int
    incomplete: tuple[str, ...]
    without: tuple[str, ...]
    stray: int


def read_logs(paths: Sequence[Path], report: Report = silent) -> list[ReferenceLog]:
    """Every log in these files and folders, by path. Raises UserError for one that cannot be read, QueryError for one
    that is not of the form."""
    logs = []
    files = list(_files(paths))
    for number, path in enumerate(files, 1):
        report("reading log", number, len(files))
        try:
            with open_regular(path) as file, io.TextIOWrapper(file, encoding="utf-8", errors="replace") as lines:
                logs.append(read_log(lines, str(path)))
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    return logs


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    """The logs; of a summary and the logs it was made from, the logs."""
    found = [p for path in paths for p in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    files = list(dict.fromkeys(p for p in found if p in paths or (p.suffix in ENDINGS and p.is_file())))
    if not files:
        raise UserError(f"no log ({', '.join(ENDINGS)}) in {', '.join(map(str, paths))}")
    stems = [path.stem for path in files]
    for path in files:
        whole = path.stem.removesuffix(SUMMARY)
        if whole == path.stem or not any(other != path.stem and other.startswith(f"{whole}_") for other in stems):
            yield path


def import_logs(
    store: Store,
    paths: Sequence[Path],
    document: Document,
    choice: Choice,
    data_root: str | None = None,
    *,
    replace: bool = False,
    report: Report = silent,
) -> Imported:
    """Write the rows that the logs have and the store has not, and the sweep they make. `document` is the spec whose
    cells the logs are of; its name is the sweep's. Raises UserError or QueryError, and then writes nothing; UserError
    also where the sweep would lose planned tasks, unless `replace`."""
    _check_name_is_free(store, document)
    logs = read_logs(paths, report)
    having = [log for log in logs if log.candidates]
    if not having:
        raise UserError(f"no candidate ([k/N] pruned_index_pair ...) in {_some_names([log.name for log in logs])}")
    _check_percent(having)
    report("matching the logs to cells")
    cells = _cells(document, choice, data_root)
    placed = _placed(having, cells, choice)
    tasks = _grid(placed)
    document.override(f"grid.seed={sorted({one.task.seed for one in placed})}")
    expansion = plan_content(map(_shard, tasks))
    if not replace and store.manifest(load_spec(document).name) is not None:
        check_nothing_dropped(change_of(store, load_spec(document), read_plan(expansion, PLAN_COLUMNS)))
    done = store.statuses() if store.exists() else {}
    rows = [_row(one) for one in placed if one.complete]
    new = [row for row in rows if done.get(row.task_id) != "done"]
    report("writing the rows")
    store.check_writable()
    for cell_tasks in tasks:
        shard, cell_id = _shard(cell_tasks), cell_tasks.cell.cell_id
        if mine := [row for row in new if row.cell_id == cell_id]:
            store.commit_rows(shard.shard_id, mine)
    manifest = _record(store, document, expansion)
    return Imported(
        sweep=manifest.sweep,
        cells=len(tasks),
        written=len(new),
        known=len(rows) - len(new),
        incomplete=tuple(one.logged.where for one in placed if not one.complete),
        without=tuple(log.name for log in logs if not log.candidates),
        stray=sum(log.stray for log in having),
    )


def _check_name_is_free(store: Store, document: Document) -> None:
    """Raise UserError where the sweep's name is that of a sweep that was run."""
    name = load_spec(document).name
    manifest = store.manifest(name)
    if manifest is None:
        return
    recipes = store.plan_table(manifest, ["recipe"])["recipe"].unique().to_pylist()
    if not all(Cell.from_json(recipe).dense.is_imported for recipe in recipes):
        raise UserError(f"{name} is a sweep of {store.location} that was not imported: give another --name")


def _record(store: Store, document: Document, expansion: bytes) -> Manifest:
    name = load_spec(document).name
    text = f"# Imported from logs of the reference implementation: prunesweep ran none of it.\n{document.text()}"
    return store.commit_manifest(name, text, expansion)


def _shard(tasks: Tasks) -> Shard:
    return Shard(join_id("shard", tasks.cell.cell_id, IMPORTED), tasks)


# -- which cell -------------------------------------------------------------------------------------


def _cells(document: Document, choice: Choice, data_root: str | None) -> list[Cell]:
    """The cells that logs may be of. Raises UserError where the spec has none, or none of those chosen."""
    cells = [
        cell
        for cell in expand.cells(load_spec(document), document, data_root)
        if find_pruner(cell.pruner).enumerates and cell.granularity == "filter" and cell.schedule == "one-shot"
    ]
    wanted = [cell for cell in cells if choice.layers in (None, _layers(cell))]
    chosen = [cell for cell in wanted if choice.ratio in (None, cell.pruning_ratio)]
    if chosen:
        return chosen
    if not cells:
        raise UserError(f"{document.name} has no cell of oracle pruning: the logs are of oracle pruning")
    there = ", ".join(f"{_layers(cell)} {cell.pruning_ratio}" for cell in cells)
    raise UserError(f"{document.name} has no cell of these layers and this ratio; it has {there}")


def _layers(cell: Cell) -> str:
    return "+".join(name for name, _ in cell.layers)


def _cell_of(log: ReferenceLog, cells: Sequence[Cell], named: bool) -> Cell:
    """The one cell that a log is of: by how many units it removes of how many layers, by its number of candidates and
    of epochs, then by its name. Raises UserError where it is none or several."""
    first = log.candidates[0]
    fitting = [cell for cell in cells if _fits(first, cell)]
    if not fitting:
        shape = "+".join(str(len(units)) for units in first.removed)
        have = "; ".join(f"{cell}: {'+'.join(str(k) for _, k in expand.space_of(cell).layers)}" for cell in cells)
        raise UserError(
            f"{first.where}: no cell has candidates like this one, number {first.number} of {first.total}, which "
            f"removes {shape} units; there are {have}. Name the spec of the logs with --like, change it with --set"
        )
    epochs = max((len(one.epochs) for one in log.complete), default=0)
    trained = [cell for cell in fitting if epochs in (0, cell.retrain.epochs)]
    if not trained:
        planned = ", ".join(sorted({str(cell.retrain.epochs) for cell in fitting}))
        raise UserError(
            f"{log.name}: its networks were retrained for {epochs} epochs, those of the spec for {planned}: name "
            f"another spec with --like, or give --set retrain.epochs={epochs} and the rates that go with it"
        )
    by_name = [cell for cell in trained if _is_named(log.name, cell)]
    if len(trained) > 1 and len(by_name) != 1:
        found = "; ".join(map(str, by_name or trained))
        raise UserError(f"{log.name} may be of several cells: {found}. Give --layers, --ratio, or --set")
    (cell,) = trained if len(trained) == 1 else by_name
    if not named:
        _check_name(log.name, cell)
    return cell


def _fits(one: LoggedCandidate, cell: Cell) -> bool:
    space = expand.space_of(cell)
    if cell.candidate_mode == "all" and one.total != space.size:
        return False
    if len(one.removed) != len(space.layers):
        return False
    sizes = zip(one.removed, space.layers, strict=True)
    return all(len(units) == k and units[-1] < n for units, (n, k) in sizes)


def _is_named(path: str, cell: Cell) -> bool:
    """Whether a file's name has the layers and the ratio of a cell, as `conv205`, `conv10.530.5` or `conv1230.5`."""
    stem = Path(path).stem
    layers = [name.removeprefix("conv") for name, _ in cell.layers]
    ratios = [f"{ratio:g}" for _, ratio in cell.layers]
    together = [
        *("".join(layers) + ratio for ratio in ratios[:1]),
        "".join(map("".join, zip(layers, ratios, strict=True))),
    ]
    return any(f"conv{form}" in stem for one in together for form in (one, one.replace(".", "")))


def _check_name(path: str, cell: Cell) -> None:
    """Raise UserError where a file's name speaks of another convolution than the cell's first."""
    first, matched = cell.layers[0][0], _FIRST_LAYER.search(Path(path).stem)
    if matched and re.fullmatch(r"conv\d", first) and first != f"conv{matched[1]}":
        raise UserError(
            f"{path} is named as a log of conv{matched[1]}, and the spec's cell is {cell}: name the spec of the "
            f"logs with --like, or give --layers {_layers(cell)} if the name is wrong"
        )


# -- which task -------------------------------------------------------------------------------------


def _placed(logs: Sequence[ReferenceLog], cells: Sequence[Cell], choice: Choice) -> list[Placed]:
    """Every candidate of the logs with its task, each task once, the cells in the order of the grid. Raises UserError
    where two logs contradict."""
    found = [(_cell_of(log, cells, choice.layers is not None), log) for log in logs]
    of = sorted(found, key=lambda pair: cells.index(pair[0]))
    imported = {cell: _imported(cell, [log for c, log in of if c == cell], choice) for cell, _ in of}
    placed: dict[str, Placed] = {}
    numbered: dict[str, LoggedCandidate] = {}
    for cell, log in of:
        for one in _tasks(imported[cell], log, choice):
            _check_same_units(numbered.setdefault(one.task.candidate_id, one.logged), one.logged)
            placed[one.task.task_id] = _better(placed.get(one.task.task_id), one)
    return list(placed.values())


def _imported(cell: Cell, logs: Sequence[ReferenceLog], choice: Choice) -> Cell:
    """`cell` as the logs have it: its dense model is another one, known by name alone, and sampled candidates are the
    logs' own draws. Raises UserError where the logs start from different dense models."""
    names = {choice.dense or log.checkpoint: log.name for log in logs}
    if len(names) > 1:
        raise UserError(
            f"the logs of {cell} start from different dense weights, which are not comparable: "
            + "; ".join(f"{checkpoint or 'not said'} ({name})" for checkpoint, name in names.items())
            + ". Import them as sweeps of their own; if they are the same, give --dense NAME"
        )
    (checkpoint,) = names
    dense = replace(cell.dense, content=(*cell.dense.content, (IMPORTED, digest(checkpoint))))
    return replace(cell, dense=replace(dense, content=tuple(sorted(dense.content))), sampling_seed=None)


def _tasks(cell: Cell, log: ReferenceLog, choice: Choice) -> Iterator[Placed]:
    """A log's candidates as tasks: the number is the rank of the units removed, or the place among the logs' draws."""
    path, times = Path(log.name), dict[int, int]()
    matched = _REPEAT.search(path.stem)
    seed = choice.seed if choice.seed is not None else int(matched[1]) - 1 if matched else 0
    complete = {one.where for one in log.complete}
    for one in sorted(log.candidates, key=lambda one: int(one.where.rpartition(":")[2])):
        if not _fits(one, cell):
            raise UserError(f"{one.where}: a candidate of another cell than the first of this log, {cell}")
        candidate = expand.space_of(cell).rank(one.removed) if cell.candidate_mode == "all" else one.number - 1
        nth = times[one.number] = times.get(one.number, -1) + 1
        repeat = seed + nth if path.stem.endswith(SUMMARY) else seed
        yield Placed(Task(cell, candidate, max(repeat, 0)), one, one.where in complete)


def _check_same_units(first: LoggedCandidate, one: LoggedCandidate) -> None:
    if first.removed != one.removed:
        raise UserError(
            f"{one.where}: candidate {one.number} removes {one.removed}, at {first.where} it removes {first.removed}: "
            "these logs do not number the same candidates"
        )


def _better(known: Placed | None, one: Placed) -> Placed:
    """Of two accounts of one task the complete one. Raises UserError where both are, and differ."""
    if known is None or not known.complete:
        return one
    if one.complete and _measured(known.logged) != _measured(one.logged):
        raise UserError(
            f"{one.logged.where} and {known.logged.where} are the same candidate and seed {one.task.seed}, with other "
            "values: name the files NAME_t1..., NAME_t2... by repeat, or import them one by one with --seed"
        )
    return known


def _measured(one: LoggedCandidate) -> str:
    return repr((one.pruned_train_loss, one.best, one.last5_mean, one.last5_std))


def _grid(placed: Sequence[Placed]) -> list[Tasks]:
    """Per cell every candidate that a log names with every seed that a log has."""
    found: dict[Cell, list[Task]] = {}
    for one in placed:
        found.setdefault(one.task.cell, []).append(one.task)
    grid = []
    for cell, tasks in found.items():
        candidates, seeds = ({getattr(task, name) for task in tasks} for name in ("candidate", "seed"))
        grid.append(Tasks.from_pairs(cell, product(sorted(candidates), sorted(seeds))))
    return grid


def _check_percent(logs: Sequence[ReferenceLog]) -> None:
    """Raise UserError where no accuracy is above 1 percent: then they are fractions."""
    best = [(one.best.test_accuracy, one.where) for log in logs for one in log.complete if one.best]
    if best and max(best)[0] <= 0.01:
        raise UserError(
            f"{max(best)[1]}: no final_test_acc is above 1: accuracies are in percent, and these look like fractions"
        )


# -- rows -------------------------------------------------------------------------------------------


def _row(one: Placed) -> Row:
    """The row of a candidate that is complete. What a log does not say is null."""
    task, logged, best = one.task, one.logged, one.logged.best
    assert best is not None
    layers, units = task.cell.layers, expand.units_of(task.cell)
    removed = [Removed(name, of) for (name, _), of in zip(layers, logged.removed, strict=True)]
    measured: dict[str, Any] = {
        "removed": tuple(removed),
        "achieved_ratio": sum(n_removed(units[name], r) for name, r in layers) / sum(units[name] for name, _ in layers),
        "pruned_train_loss": logged.pruned_train_loss,
        "equivalence_reason": WHY_NOT,
        "seconds_retrain": logged.seconds_retrain,
        "versions": canonical_json({IMPORTED: f"{Path(logged.where).name}"}),
        "diverged": not _all_finite(best, logged.last5_mean),
        **_best(best, logged.epochs),
        **_last5(logged.last5_mean, logged.last5_std),
        **_curves(logged.epochs),
    }
    return row_for(task, "done", measured)


def _all_finite(*values: Values | None) -> bool:
    return all(isfinite(v) for one in values if one for v in (one.train_loss, one.test_loss, one.test_accuracy))


def _best(best: Values, epochs: Sequence[LoggedEpoch]) -> dict[str, Any]:
    if not _all_finite(best):
        return {}
    accuracies = [epoch.test_accuracy for epoch in epochs]
    return {
        "best_epoch": 1 + accuracies.index(max(accuracies)) if accuracies else None,
        "best_test_accuracy": best.test_accuracy,
        "best_test_loss": best.test_loss,
    }


def _last5(mean: Values | None, std: Values | None) -> dict[str, Any]:
    if mean is None or std is None or not _all_finite(mean, std):
        return {}
    return {
        "last5_test_loss_mean": mean.test_loss,
        "last5_test_loss_std": std.test_loss,
        "last5_test_accuracy_mean": mean.test_accuracy,
        "last5_test_accuracy_std": std.test_accuracy,
    }


def _curves(epochs: Sequence[LoggedEpoch]) -> dict[str, Any]:
    """The test curves and the last epoch; the train loss of a log is of the whole set, after the epoch."""
    if not epochs:
        return {}
    last = epochs[-1]
    ended = isfinite(last.test_loss)
    return {
        "epoch_test_loss": tuple(e.test_loss if isfinite(e.test_loss) else None for e in epochs),
        "epoch_test_accuracy": tuple(e.test_accuracy if isfinite(e.test_loss) else None for e in epochs),
        "last_train_loss": last.train_loss if ended else None,
        "last_test_loss": last.test_loss if ended else None,
        "last_test_accuracy": last.test_accuracy if ended else None,
    }


def _some_names(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} files more" if len(names) > 3 else "")
