"""Reading rows/ while others write and compact, and compaction itself.

A row file is never changed. Compaction copies the rows of many files into one, each with the name of
the file it was committed in, its origin, and removes those files once the copy is durable. So a reader
may meet a row's origin, its copy, or both, and counts it once: an origin whose rows are in a compacted
file is left out, and of two compacted files with the same origin the first by name counts. A file that
vanishes while it is read, or a compaction that ends meanwhile, makes the reader look again.
"""

from __future__ import annotations

import uuid
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from storage.digests import is_verified, row_file_name
from storage.encoding import ORIGIN, ROW_FILES_SCHEMA, parquet, rows_of
from storage.errors import SkippedFile, StoreError
from storage.identity import SCHEMA_VERSION
from storage.schema import SCHEMA

if TYPE_CHECKING:
    from storage.store import Store

T = TypeVar("T")

COMPACTED = "compact"
COMPACTED_ROWS = 50_000
"""A compacted file has at most so many rows, but for one origin's. With half of them it is never merged
again; two with less always are."""


ATTEMPTS_COLUMNS = ("task_id", "status")
LOOKS = 100
"""How often a reader looks again before it gives up: each time, a compaction has ended meanwhile."""


@dataclass(frozen=True)
class Problem:
    """A file that is not what its place promises, and why."""

    file: str
    reason: str


def warn_skipped(problem: Problem) -> None:
    """Warn, in Python's way, that a file was left out of an answer."""
    warnings.warn(f"skipped {problem.file}: {problem.reason}", SkippedFile, stacklevel=3)


@dataclass(frozen=True)
class Compaction:
    """What a compaction did: files merged into how many of how many rows, and files set aside."""

    merged: int
    written: int
    rows: int
    aside: tuple[Problem, ...]


@dataclass(frozen=True)
class Listing:
    """The row files at one time, read: name -> its rows, or what is wrong with it."""

    read: dict[str, pa.Table | Problem]

    @property
    def tables(self) -> dict[str, pa.Table]:
        return {name: found for name, found in self.read.items() if not isinstance(found, Problem)}

    @property
    def problems(self) -> list[Problem]:
        return [found for found in self.read.values() if isinstance(found, Problem)]


def every_file(_: str) -> bool:
    return True


def is_compacted(name: str) -> bool:
    """Whether a row file was written by compaction."""
    return name.removeprefix("rows/").startswith(f"{COMPACTED}-")


def valid_rows(store: Store, columns: Sequence[str] | None = None) -> tuple[pa.Table, list[Problem]]:
    """Every valid row once, all columns or some, then its origin; and the files that have none."""
    listing = look(store, every_file, lambda name: row_file(store, name, columns))
    schema = pa.schema(
        [ROW_FILES_SCHEMA.field(name) for name in [*(SCHEMA.names if columns is None else columns), ORIGIN]]
    )
    tables = counted_once(listing.tables).values()
    return pa.concat_tables([pa.Table.from_batches([], schema), *tables]).combine_chunks(), listing.problems


def look(store: Store, wanted: Callable[[str], bool], read: Callable[[str], pa.Table | Problem]) -> Listing:
    """The row files `wanted` by name, each `read`, as they were at one moment.

    Files may be compacted while we read. Whatever was committed before we began is found all the same:
    if a file is gone when it is read, or a compacted one has come or gone since the first listing, all
    is read again.
    """
    for _ in range(LOOKS):
        names = [name for name in store.row_file_names() if wanted(name) or is_compacted(name)]
        try:
            with ThreadPoolExecutor(2 if store.is_local else 8) as pool:  # what decodes them holds Python's lock
                found = dict(zip(names, pool.map(read, names), strict=True))
        except FileNotFoundError:
            continue
        if _compacted(names) == _compacted(store.row_file_names()):
            return Listing(found)
    raise StoreError(f"the row files of {store.location} change faster than they can be read")


def _compacted(names: Iterable[str]) -> set[str]:
    return {name for name in names if is_compacted(name)}


def counted_once(tables: dict[str, pa.Table]) -> dict[str, pa.Table]:
    """`tables` (file -> rows with their origin) without the rows that an earlier one has: compacted files
    first, by name."""
    seen: set[str] = set()
    kept: dict[str, pa.Table] = {}
    for name in sorted(tables, key=lambda name: (not is_compacted(name), name)):
        table = tables[name]
        origins = set(table[ORIGIN].unique().to_pylist()) if is_compacted(name) else {name}
        twice = origins & seen
        if twice:
            table = table.filter(pc.call_function("invert", [is_in(table[ORIGIN], pa.array(sorted(twice)))]))
        kept[name] = table
        seen |= origins
    return kept


def chosen(rows: pa.Table) -> pa.ChunkedArray | pa.Array:
    """Which rows are the chosen ones of their tasks: done beats failed, then the earliest, then the file's name.

    Where no task has two rows that is all of them: a window over them in SQL would take most of a query's time.
    """
    task_ids = rows["task_id"]
    if len(task_ids.unique()) == len(rows):
        return task_ids.is_valid()
    ranks = rows.select(["task_id", "status", "finished_at", ORIGIN])
    order = pc.call_function(
        "sort_indices", [ranks], pc.SortOptions([(name, "ascending") for name in ranks.column_names])
    )
    ids = task_ids.take(order).to_numpy()
    found = np.zeros(len(rows), bool)
    found[order.to_numpy()[np.append(True, ids[1:] != ids[:-1])]] = True
    return pa.array(found)


def is_in(values: pa.ChunkedArray, these: pa.Array) -> pa.ChunkedArray:
    """Return which of the `values` are among `these`."""
    return pc.call_function("is_in", [values], pc.SetLookupOptions(these))


def row_file(
    store: Store, name: str, columns: Sequence[str] | None = None, *, unknown: bool = False
) -> pa.Table | Problem:
    """Return the rows of one file in the pinned schema with their origin, all columns or some; with `unknown`, those
    that the schema lacks too.

    Raises FileNotFoundError where it is gone, StoreError where it cannot be read now.
    """
    content = store.read(name)
    try:
        verified = is_verified(name, content)
        origin = None if is_compacted(name) else name
        found = rows_of(content, columns, origin, verified=verified, unknown=unknown)
    except pa.ArrowMemoryError as error:
        raise StoreError(f"no memory to read {store.location}/{name}") from error
    except (pa.ArrowException, ValueError, OSError, KeyError) as error:
        return Problem(name, str(error).splitlines()[0] if str(error) else type(error).__name__)
    return found.select([*columns, ORIGIN]) if columns is not None else found


class Attempts:
    """What a shard's tasks have been through, by any driver: looked at before each task, each file once."""

    def __init__(self, store: Store, shard_id: str, task_ids: Iterable[str]) -> None:
        self._store, self._prefix = store, f"rows/{shard_id}-"
        self._tasks = pa.array(sorted(task_ids), pa.string())
        self._read: dict[str, pa.Table | Problem] = {}

    def look(self) -> dict[str, list[str]]:
        """task id -> the statuses of its rows, for those of the tasks that have any."""
        listing = look(self._store, lambda name: name.startswith(self._prefix), self._rows)
        statuses: dict[str, list[str]] = {}
        for table in counted_once(listing.tables).values():
            for task_id, status in zip(*(table[c].to_pylist() for c in ATTEMPTS_COLUMNS), strict=True):
                statuses.setdefault(task_id, []).append(status)
        return statuses

    def _rows(self, name: str) -> pa.Table | Problem:
        if name not in self._read:
            found = row_file(self._store, name, ATTEMPTS_COLUMNS)
            if not isinstance(found, Problem):
                found = found.filter(is_in(found["task_id"], self._tasks))
            self._read[name] = found
        return self._read[name]


# -- compaction ---------------------------------------------------------------------------------------


def compact(store: Store) -> Compaction:
    """Merge the row files, and set aside what is none. Safe to kill at any step, and beside anything.

    What a killed compaction left is finished by the next: files whose rows are copied already go.
    """
    listing = look(store, every_file, lambda name: row_file(store, name, unknown=True))
    aside = tuple(set_aside(store, problem) for problem in listing.problems)
    once = counted_once(listing.tables)
    small = [name for name, table in listing.tables.items() if not (_is_full(name, table) or has_more(table))]
    if len(small) < 2 and all(is_compacted(name) for name in small):
        return Compaction(0, 0, 0, aside)
    written = rows = 0
    among = set(small)
    try:
        for group in in_groups({name: table for name, table in once.items() if name in among}):
            table = pa.concat_tables([once[name] for name in group])
            if len(table):
                write_compacted(store, table)
                written, rows = written + 1, rows + len(table)
    except FileNotFoundError:  # another compaction has taken our file, or set it aside: the rest is its to do
        return Compaction(0, 0, 0, aside)
    for name in small:  # only now: each of their rows is in a file of ours, or in one that stays
        store.delete(name)
    return Compaction(len(small), written, rows, aside)


def _is_full(name: str, table: pa.Table) -> bool:
    """Whether a file is never removed: what others leave out because it is there, stays there."""
    return is_compacted(name) and len(table) >= COMPACTED_ROWS / 2


def has_more(table: pa.Table) -> bool:
    """Return whether a file has what this version would drop: columns that it does not know, or a newer schema."""
    if len(table.column_names) > len(ROW_FILES_SCHEMA):
        return True
    newest = pc.call_function("max", [table["schema_version"]]).as_py()
    return (newest or 0) > SCHEMA_VERSION


def in_groups(tables: dict[str, pa.Table]) -> list[list[str]]:
    """The names in groups of at most COMPACTED_ROWS rows together, or of one file; no two groups fit in one."""
    groups: list[list[str]] = []
    room: list[int] = []
    for name, table in tables.items():
        at = next((i for i, left in enumerate(room) if len(table) <= left), len(room))
        if at == len(room):
            groups.append([])
            room.append(COMPACTED_ROWS)
        groups[at].append(name)
        room[at] -= len(table)
    return groups


def write_compacted(store: Store, table: pa.Table) -> str:
    """Make `table` durable as one compacted file, make sure that it reads back as it is, and return its name.

    Raises FileNotFoundError where it is gone by then.
    """
    content = parquet(table.sort_by([(name, "ascending") for name in ("cell_id", "candidate", "seed", ORIGIN)]))
    name = row_file_name(COMPACTED, content)
    store.commit(name, content)
    found, back = row_file(store, name), store.read(name)
    if isinstance(found, Problem) or len(found) != len(table) or back != content:
        store.delete(name)
        raise StoreError(f"{name} did not read back as it was written: nothing was removed")
    return name


def set_aside(store: Store, problem: Problem) -> Problem:
    """Move a file that is none of ours out of the readers' way, into aside/."""
    stem = problem.file.replace("/", "-")
    store.move(problem.file, f"aside/{uuid.uuid4().hex[:8]}-{stem}")
    return problem
