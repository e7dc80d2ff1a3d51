"""Remove rows and kept networks that no sweep plans: the newest expansion of each sweep counts.

Row files are immutable. Those with unplanned rows are replaced as compaction replaces files: the planned rows are
written to compacted files with their origins, and the old files are deleted once these are durable. At every moment a
reader counts each planned row once (storage/rowfiles.py); an unplanned row counts until its file is gone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from storage.encoding import parquet
from storage.errors import StoreError
from storage.manifest import Manifest
from storage.rowfiles import (
    Problem,
    counted_once,
    every_file,
    has_more,
    in_groups,
    is_in,
    look,
    row_file,
    write_compacted,
)
from storage.signs import living

if TYPE_CHECKING:
    from storage.store import Store

NETWORK_NAME = re.compile(r"([0-9a-f]{16})-[0-9a-f]{8}\.safetensors")


@dataclass(frozen=True)
class UnplannedRows:
    """Rows that no sweep plans: their number, the files that hold any, and what is kept of these files, by file.

    `size` is how many bytes their removal frees, to within a few for each file that is written.
    `left` are unplanned rows that stay, in files of a newer version.
    `plan` are the expansions that were read.
    """

    rows: int
    names: tuple[str, ...]
    kept: tuple[pa.Table, ...]
    size: int
    left: int
    problems: tuple[Problem, ...]
    plan: tuple[Manifest, ...]


@dataclass(frozen=True)
class UnneededNetworks:
    """Kept networks whose task no sweep plans, or which no row names: their files, and their size in bytes."""

    names: tuple[str, ...]
    size: int


def at_work(store: Store) -> str | None:
    """Return what is at work in a store, as text; None where nothing is."""
    for folder, noun in (("drivers", "a driver"), ("workers", "a worker")):
        for note in living(store, folder).values():
            sweep = f" on {note['sweep']}" if note.get("sweep") else ""
            return f"{noun} is at work{sweep} (process {note['pid']} on {note.get('host', 'another machine')})"
    return None


def unplanned_rows(store: Store) -> UnplannedRows:
    """Find the rows of tasks that no sweep plans. Changes nothing."""
    plan = tuple(store.manifests())
    planned = _planned(store, plan)
    listing = look(store, every_file, lambda name: row_file(store, name, unknown=True))
    once, sizes = counted_once(listing.tables), store.sizes("rows")
    names: list[str] = []
    kept: dict[str, pa.Table] = {}
    rows = left = 0
    for name, table in listing.tables.items():
        unplanned = _without(once[name], planned)
        if has_more(table):
            left += len(unplanned)
        elif len(_without(table, planned)):
            names.append(name)
            rows += len(unplanned)
            kept[name] = once[name].filter(is_in(once[name]["task_id"], planned))
    groups = [pa.concat_tables([kept[name] for name in group]) for group in in_groups(kept)]
    tables = tuple(table for table in groups if len(table))
    size = sum(sizes.get(name.removeprefix("rows/"), 0) for name in names) - sum(len(parquet(one)) for one in tables)
    return UnplannedRows(rows, tuple(names), tables, size, left, tuple(listing.problems), plan)


def remove_rows(store: Store, found: UnplannedRows) -> int:
    """Remove what `unplanned_rows` found, and return how many bytes that has freed.

    A kill at any moment leaves every planned row, once.

    Raises StoreError, and then removes nothing, where a sweep was planned or a driver began meanwhile.
    """
    written: list[str] = []
    try:
        written += [write_compacted(store, table) for table in found.kept]
        busy = at_work(store)
        if busy or tuple(store.manifests()) != found.plan:
            raise StoreError(f"nothing was removed: {busy or 'a sweep was planned or removed'} meanwhile. Try again")
    except (StoreError, FileNotFoundError):
        for name in written:  # they hide the unplanned rows of the files that stay
            store.delete(name)
        raise
    sizes = {f"rows/{name}": size for name, size in store.sizes("rows").items()}
    for name in found.names:
        store.delete(name)
    return sum(sizes.get(name, 0) for name in found.names) - sum(sizes.get(name, 0) for name in written)


def unneeded_networks(store: Store) -> UnneededNetworks:
    """Find the kept networks whose task no sweep plans, or which no row names. Changes nothing."""
    planned = set(_planned(store, tuple(store.manifests())).to_pylist())
    rows, problems = store.row_files(("kept_network",)) if store.row_file_names() else (None, [])
    named = set(rows["kept_network"].to_pylist()) if rows is not None else set[str]()
    sizes: dict[str, int] = {}
    for name, size in store.sizes("networks").items():
        match = NETWORK_NAME.fullmatch(name)
        unnamed = f"networks/{name}" not in named and not problems  # a damaged row file may name it
        if match and (match[1] not in planned or unnamed):
            sizes[f"networks/{name}"] = size
    return UnneededNetworks(tuple(sorted(sizes)), sum(sizes.values()))


def _planned(store: Store, plan: tuple[Manifest, ...]) -> pa.Array:
    """The ids of the tasks that the newest expansion of any sweep plans."""
    ids = [chunk for one in plan for chunk in store.plan_table(one, ["task_id"])["task_id"].chunks]
    return pa.chunked_array(ids, pa.string()).combine_chunks()


def _without(rows: pa.Table, planned: pa.Array) -> pa.Table:
    return rows.filter(pc.call_function("invert", [is_in(rows["task_id"], planned)]))
