"""Compare a new expansion of a sweep with its newest one: which planned tasks it drops, and which it plans anew."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from orchestrator.documents import Document
from orchestrator.errors import UserError
from orchestrator.plan import PLAN_COLUMNS, Codes
from orchestrator.progress import some
from orchestrator.spec import load_spec
from storage.errors import DamagedError
from storage.records import Cell, titles
from storage.rowfiles import Problem, is_in, warn_skipped

if TYPE_CHECKING:
    from orchestrator.spec import SweepSpec
    from storage.store import Store

SHOWN = 8
"""Cells that a message names one by one."""

CONTENT = ("model", "dataset", "weights", "pruner")
"""What a cell can hold by the hash of its content, because it is code or a file of the user."""


@dataclass(frozen=True)
class CellCount:
    """A number of tasks of one cell, and how many of them are done."""

    cell: str
    tasks: int
    done: int


@dataclass(frozen=True)
class Change:
    """How a new expansion differs from the newest one of its sweep, which has `planned` tasks.

    `dropped` are tasks that it lacks, by cell. `renewed` are tasks that it has under other ids, because the content
    of `edited` has changed.
    """

    sweep: str
    planned: int
    dropped: tuple[CellCount, ...]
    renewed: tuple[CellCount, ...] = ()
    edited: tuple[str, ...] = ()

    def warning(self) -> str:
        """Return the tasks that are dropped as text: a line in all, then a line for each cell."""
        tasks, done = _sums(self.dropped)
        lines = [f"{self.sweep}: this spec drops {tasks} of its {some(self.planned, 'planned task')}, {done} done:"]
        lines += [f"  {one.cell}: {some(one.tasks, 'task')}, {one.done} done" for one in self.dropped[:SHOWN]]
        if rest := self.dropped[SHOWN:]:
            tasks, done = _sums(rest)
            lines.append(f"  and {some(len(rest), 'more cell')}: {some(tasks, 'task')}, {done} done")
        return "\n".join(lines)

    def note(self) -> str | None:
        """Return a line on the tasks that are planned anew; None where there are none."""
        if not self.renewed:
            return None
        tasks, done = _sums(self.renewed)
        why = f"{', '.join(self.edited)} changed" if self.edited else "the units of its layers changed"
        return (
            f"{self.sweep}: {why} since the sweep was planned: {some(tasks, 'task')} ({done} done) planned anew; "
            "the old rows stay in the store and leave the counts of the sweep"
        )


def _sums(counts: Iterable[CellCount]) -> tuple[int, int]:
    given = list(counts)
    return sum(one.tasks for one in given), sum(one.done for one in given)


def check_nothing_dropped(change: Change | None) -> None:
    """Raise UserError, with the cells and what to do, where a new expansion drops planned tasks."""
    if change is not None and change.dropped:
        raise UserError(
            f"{change.warning()}\n"
            "Nothing was planned or run. Pass --replace (in Python replace=True) to drop these tasks; their rows stay "
            "in the store. To keep them, add to the grid instead of changing it, or give the spec another name "
            "(--set name=NAME)."
        )


def change_of(store: Store, spec: SweepSpec, planned: pa.Table) -> Change | None:
    """Compare `planned` (at least PLAN_COLUMNS) with the newest expansion of a sweep; None where no task is missing, or
    the newest expansion is damaged, with a warning.

    A task is the same under another id where only the content of the user's code or files differs. What such content
    decides (which layers a pattern matches, how many candidates there are) counts only if the spec changed it too.
    """
    manifest = store.manifest(spec.name)
    if manifest is None:
        return None
    try:
        ids = store.plan_table(manifest, ["task_id"])["task_id"]
    except DamagedError as error:  # a new expansion takes its place
        warn_skipped(Problem(error.file, f"{error.reason}. Whether the grid drops tasks that it planned is unknown"))
        return None
    missing = ~_is_in(ids, planned["task_id"])
    if not missing.any():
        return None
    before = store.plan_table(manifest, PLAN_COLUMNS)
    gone, new = before.filter(pa.array(missing)), planned.filter(pa.array(~_is_in(planned["task_id"], ids)))
    same = _Sameness.of(spec, store.spec_text(manifest))
    old_cells, new_cells = _cells(gone["recipe"]), _cells(new["recipe"])
    known = set(_cells(before["recipe"]))
    codes: dict[str, int] = {}
    keys = {recipe: codes.setdefault(same.key(recipe), len(codes)) for recipe in [*old_cells, *new_cells]}
    on = ["key", "seed"] if same.candidates else ["key", "seed", "candidate"]
    new = _keyed(new, {recipe: code for recipe, code in keys.items() if recipe not in known}, on)
    gone = _keyed(gone, keys, on).append_column("place", pa.array(np.arange(len(gone))))
    left = gone.select([*on, "place"]).join(new.select(on), keys=on, join_type="left anti")["place"].to_numpy()
    is_dropped = np.zeros(len(gone), bool)
    is_dropped[left] = True
    done = _is_in(gone["task_id"], _done(store))
    dropped, renewed = (_counts(gone["recipe"], done, chosen, old_cells) for chosen in (is_dropped, ~is_dropped))
    again = _cells(gone["recipe"].filter(pa.array(~is_dropped)))
    edited = _contents(again.values()) - _contents(new_cells.values())
    return Change(spec.name, len(ids), dropped, renewed, tuple(sorted({name for name, _ in edited})))


@dataclass(frozen=True)
class _Sameness:
    """When two cells are the same but for content: whether the spec leaves the layers and the candidates as they
    were, so that only content can have changed them."""

    layers: bool
    candidates: bool

    @staticmethod
    def of(spec: SweepSpec, before: str) -> _Sameness:
        try:
            old = load_spec(Document("the newest expansion", before))
        except UserError:  # of another version
            return _Sameness(False, False)
        return _Sameness(_layers_of(spec) == _layers_of(old), spec.candidates == old.candidates)

    def key(self, recipe: str) -> str:
        """Return a cell (its recipe) as text without what the user's content decides."""
        cell = json.loads(recipe)
        cell.pop("sets", None)
        if self.layers:
            cell["layers"] = sorted({ratio for _, ratio in cell["layers"]})
        for one in (cell, cell["dense"]):
            one["content"] = {name: value for name, value in one.get("content", {}).items() if name not in CONTENT}
        return json.dumps(cell, sort_keys=True)


def _layers_of(spec: SweepSpec) -> tuple[Any, ...]:
    """All that decides, with the network, which layers of it are pruned, and by how much."""
    return spec.grid.layers, spec.grid.ratio, spec.skip_small_layers


def contents(cells: Iterable[Cell]) -> list[str]:
    """Return the names of the user's code and files in `cells`, sorted."""
    return sorted({name for name, _ in _contents(cells)})


def _contents(cells: Iterable[Cell]) -> set[tuple[str, str]]:
    """The (name, hash) of everything in `cells` that is known by content."""
    found: set[tuple[str, str]] = set()
    for cell in cells:
        recipe = cell.dense.recipe
        names = {"model": cell.dense.model, "dataset": cell.dense.dataset, "weights": str(recipe.weights)}
        held = {**dict(cell.dense.content), **dict(cell.content)}
        names["pruner"] = cell.pruner
        found |= {(names[kind], value) for kind, value in held.items() if kind in names}
    return found


def _cells(recipes: pa.ChunkedArray) -> dict[str, Cell]:
    """Recipe -> its cell, for each recipe once."""
    return {recipe: Cell.from_json(recipe) for recipe in recipes.unique().to_pylist()}


def _keyed(tasks: pa.Table, keys: Mapping[str, int], on: list[str]) -> pa.Table:
    """The tasks of the cells (recipes) in `keys`, with the code of their cell as the column `key`."""
    recipes = Codes.of(tasks["recipe"])
    codes = np.array([keys.get(recipe, -1) for recipe in recipes.values], np.int64)
    key = codes[recipes.codes] if len(tasks) else np.array([], np.int64)
    found = tasks.append_column("key", pa.array(key)).filter(pa.array(key >= 0))
    return found.select([name for name in found.column_names if name in {"task_id", "recipe", *on}])


def _counts(
    recipes: pa.ChunkedArray, done: np.ndarray, chosen: np.ndarray, cells: Mapping[str, Cell]
) -> tuple[CellCount, ...]:
    """The chosen tasks by cell, in the order of the grid; `cells` by recipe."""
    found, named = Codes.of(recipes), titles(cells.values())
    tasks, finished = (
        np.bincount(found.codes[which], minlength=len(found.values)).tolist() for which in (chosen, chosen & done)
    )
    return tuple(
        CellCount(named[cells[recipe].cell_id], n, k)
        for recipe, n, k in zip(found.values, tasks, finished, strict=True)
        if n
    )


def _done(store: Store) -> pa.ChunkedArray:
    """The ids of the tasks that are done."""
    return pa.chunked_array([[i for i, status in store.statuses().items() if status == "done"]], pa.string())


def _is_in(values: pa.ChunkedArray, these: pa.ChunkedArray) -> np.ndarray:
    return is_in(values, these.combine_chunks()).to_numpy()
