"""Merge another store into this one: its sweeps and rows, and the dense weights and kept networks that they need.

Everything is read before anything is written, the plans before the rows and the rows before the weights: a row is
durable after the weights that it names, so a store that is being written is read as it was at one moment. Sweeps are
written last. A row keeps its origin, the file that it was committed in, so that it never counts twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa

from storage.encoding import ORIGIN, ROW_FILES_SCHEMA
from storage.errors import DamagedError
from storage.identity import digest
from storage.manifest import Manifest
from storage.rowfiles import (
    COMPACTED_ROWS,
    Problem,
    counted_once,
    every_file,
    has_more,
    look,
    row_file,
    write_compacted,
)

if TYPE_CHECKING:
    from storage.store import Store

MARK = "~"
"""Between the origin of rows and a digest of them, where the target has only other rows of this origin."""


@dataclass(frozen=True)
class Expansion:
    """An expansion to write: its place in the source, its spec and its tasks."""

    manifest: Manifest
    spec: bytes
    plan: bytes


@dataclass(frozen=True)
class Merge:
    """What a merge would write, and what it found. `weights` are files of dense weights and kept networks by name.
    `conflicts` are sweeps that both stores have with other content; `known` are counts of what the target has."""

    sweeps: tuple[tuple[str, tuple[Expansion, ...]], ...]
    conflicts: tuple[str, ...]
    rows: pa.Table
    weights: tuple[str, ...]
    problems: tuple[Problem, ...]
    known: tuple[int, int]


@dataclass(frozen=True)
class Merged:
    """Counts of what a merge has written, and its size in bytes."""

    sweeps: int
    rows: int
    dense: int
    networks: int
    size: int
    problems: tuple[Problem, ...]


def find_merge(source: Store, target: Store) -> Merge:
    """Compare two stores: what of `source` is to be written to `target`. Writes nothing."""
    sweeps: list[tuple[str, tuple[Expansion, ...]]] = []
    conflicts: list[str] = []
    known = 0
    needed: set[str] = set()
    damaged: list[Problem] = []
    for name in source.sweeps():
        try:
            newest = source.newest(name)
            new = _new_expansions(source, target, newest)
            needed |= set(source.plan_table(newest, ["dense_id"])["dense_id"].unique().to_pylist())
        except DamagedError as error:
            damaged.append(Problem(error.file, error.reason))
            continue
        if new is None:
            conflicts.append(name)
        elif new:
            sweeps.append((name, new))
        else:
            known += 1
    rows, problems, all_rows = _new_rows(source, target)
    weights = _weights(source, target, needed, all_rows)
    return Merge(
        tuple(sweeps), tuple(conflicts), rows, weights, (*damaged, *problems), (known, len(all_rows) - len(rows))
    )


def write_merge(source: Store, target: Store, merge: Merge) -> Merged:
    """Write a merge without conflicts: weights and networks, then rows, then sweeps. One that was cut off is completed
    by the next. Raises StoreError."""
    size, problems = 0, list(merge.problems)
    copied = {"dense": 0, "networks": 0}
    for name in merge.weights:
        content = _checked(source, name)
        if isinstance(content, Problem):
            problems.append(content)
            continue
        target.commit(name, content)
        copied[name.partition("/")[0]] += 1
        size += len(content)
    for part in _parts(merge.rows):
        size += target.sizes("rows").get(write_compacted(target, part).removeprefix("rows/"), 0)
    for sweep, expansions in merge.sweeps:
        for one in expansions:
            target.commit_manifest(sweep, one.spec.decode(), one.plan)
            size += len(one.spec) + len(one.plan)
    return Merged(len(merge.sweeps), len(merge.rows), copied["dense"], copied["networks"], size, tuple(problems))


def _new_expansions(source: Store, target: Store, newest: Manifest) -> tuple[Expansion, ...] | None:
    """The expansions of a sweep that the target lacks, the oldest first; none where it has the newest; None where the
    two stores have planned the sweep apart from each other."""
    theirs, ours = source.expansions(newest.sweep), target.expansions(newest.sweep)
    digests = [_digest(one) for one in theirs]
    if digests[-1] in map(_digest, ours):
        return ()
    if ours and (_digest(ours[-1]) not in digests or not _has_all(source, newest, target, ours[-1])):
        return None
    after = digests.index(_digest(ours[-1])) + 1 if ours else 0
    found: list[Expansion] = []
    for one in theirs[after:]:
        with suppress(DamagedError):  # the newest is whole
            found.append(Expansion(one, *source.expansion(one)))
    return tuple(found)


def _digest(manifest: Manifest) -> str:
    """The digest of an expansion, which is in the names of its files."""
    return manifest.stem.rpartition("-")[2]


def _has_all(source: Store, newer: Manifest, target: Store, older: Manifest) -> bool:
    """Whether an expansion of the source has all tasks of one of the target."""
    ids = [store.plan_table(one, ["task_id"])["task_id"] for store, one in ((source, newer), (target, older))]
    return set(ids[1].to_pylist()) <= set(ids[0].to_pylist())


def _new_rows(source: Store, target: Store) -> tuple[pa.Table, list[Problem], pa.Table]:
    """The rows of the source that the target lacks; what was not read, and why; and all rows of the source."""
    listing = look(source, every_file, lambda name: row_file(source, name, unknown=True))
    problems = list(listing.problems)
    newer = [name for name, table in listing.tables.items() if has_more(table)]
    problems += [Problem(name, "a newer prunesweep wrote it: import it with that version") for name in newer]
    tables = [table for name, table in counted_once(listing.tables).items() if name not in newer]
    rows = pa.concat_tables([pa.Table.from_batches([], ROW_FILES_SCHEMA), *tables]).combine_chunks()
    if not target.exists() or not len(rows):
        return rows, problems, rows
    there, _ = target.row_files(("task_id",))
    origins = {_base(origin) for origin in there[ORIGIN].unique().to_pylist()}
    have = set(zip(map(_base, there[ORIGIN].to_pylist()), there["task_id"].to_pylist(), strict=True))
    named = rows[ORIGIN].to_pylist()
    lacks = [key not in have for key in zip(map(_base, named), rows["task_id"].to_pylist(), strict=True)]
    new = rows.filter(pa.array(lacks, pa.bool_()))
    return _renamed(new, origins), problems, rows


def _renamed(rows: pa.Table, origins: set[str]) -> pa.Table:
    """`rows` with an origin of their own where the target has other rows of theirs, which would hide them."""
    by_origin: dict[str, list[str]] = {}
    for origin, task_id in zip(rows[ORIGIN].to_pylist(), rows["task_id"].to_pylist(), strict=True):
        if _base(origin) in origins:
            by_origin.setdefault(origin, []).append(task_id)
    if not by_origin:
        return rows
    names = {
        origin: f"{_base(origin).removesuffix('.parquet')}{MARK}{digest(sorted(ids))}.parquet"
        for origin, ids in by_origin.items()
    }
    column = pa.array([names.get(origin, origin) for origin in rows[ORIGIN].to_pylist()], pa.string())
    return rows.set_column(rows.schema.get_field_index(ORIGIN), ORIGIN, column)


def _base(origin: str) -> str:
    """The file that rows were first committed in."""
    stem, mark, _ = origin.partition(MARK)
    return f"{stem}.parquet" if mark else origin


def _parts(rows: pa.Table) -> Iterator[pa.Table]:
    """Yield `rows` in parts of about COMPACTED_ROWS: the rows of one origin are never divided."""
    ordered = rows.sort_by(ORIGIN)
    names = ordered[ORIGIN].to_pylist()
    start = 0
    while start < len(names):
        end = min(start + COMPACTED_ROWS, len(names))
        while end < len(names) and names[end] == names[end - 1]:
            end += 1
        yield ordered.slice(start, end - start)
        start = end


def _weights(source: Store, target: Store, needed: set[str], rows: pa.Table) -> tuple[str, ...]:
    """The files of dense weights and kept networks that plans and rows need and the target lacks, the one committed
    first before the others."""
    needed = needed | set(rows["dense_id"].unique().to_pylist())
    named = {name.removeprefix("networks/") for name in rows["kept_network"].unique().to_pylist() if name}
    wanted = {"dense": lambda name: name.split("-")[0] in needed, "networks": lambda name: name in named}
    found: list[str] = []
    for folder, is_wanted in wanted.items():
        have = set(target.names(folder))
        found += [f"{folder}/{name}" for name in source.by_age(folder) if is_wanted(name) and name not in have]
    return tuple(found)


def _checked(source: Store, name: str) -> bytes | Problem:
    """The content of a file whose name ends with its digest."""
    try:
        content = source.read(name)
    except FileNotFoundError:
        return Problem(name, "it was removed while the store was read")
    if not name.removesuffix(".safetensors").endswith(f"-{hashlib.sha256(content).hexdigest()[:8]}"):
        return Problem(name, "its content does not match the digest in its name: it was left out")
    return content
