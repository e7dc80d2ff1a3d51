"""Upkeep: what nobody needs any more is removed. Rows, plans and kept networks are not touched (storage/removal.py)."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from storage.commit import sweep_temporaries, temporaries
from storage.signs import dead, living

if TYPE_CHECKING:
    from storage.manifest import Manifest
    from storage.store import Store

FOLDERS = ("rows", "sweeps", "dense", "networks", "scratch", "aside")
"""All that is the store's below its root: what else lies there is not."""

DENSE_NAME = re.compile(r"[0-9a-f]{16}-[0-9a-f]{8}\.safetensors")


@dataclass(frozen=True)
class Unused:
    """Files that no sweep needs, by name in the store, and their size in bytes."""

    names: tuple[str, ...]
    size: int


def tidy(store: Store, is_done: Callable[[str], bool]) -> None:
    """Remove what processes that are gone left: temporary files, signs of life, wishes to stop, and
    checkpoints of tasks whose row is there."""
    if store.is_local:
        sweep_temporaries(store.root, FOLDERS)
    for folder in ("drivers", "workers"):
        for name in dead(store, folder):
            store.scratch.forget(name)
    at_work = {name.removeprefix("drivers/") for name in living(store, "drivers")}
    for name in store.names("scratch/stops"):
        if name.removesuffix(".json") not in at_work:
            store.delete(f"scratch/stops/{name}")
    trained = store.dense_ids()
    for key in store.scratch.checkpoints():
        if key in trained or is_done(key):
            store.scratch.drop_checkpoint(key)


def left_over(store: Store, is_done: Callable[[str], bool]) -> dict[str, int]:
    """Return what `tidy` would remove, by name, with its sizes in bytes. Changes nothing."""
    found = temporaries(store.root, FOLDERS) if store.is_local else {}
    gone = {f"scratch/{name}.json" for folder in ("drivers", "workers") for name in dead(store, folder)}
    at_work = {name.removeprefix("drivers/") for name in living(store, "drivers")}
    stops = store.names("scratch/stops")
    gone |= {f"scratch/stops/{name}" for name in stops if name.removesuffix(".json") not in at_work}
    trained = store.dense_ids()
    keys = [key for key in store.scratch.checkpoints() if key in trained or is_done(key)]
    gone |= {f"scratch/checkpoints/{key}.checkpoint" for key in keys}
    for folder in sorted({name.rpartition("/")[0] for name in gone}):
        found |= {f"{folder}/{name}": n for name, n in store.sizes(folder).items() if f"{folder}/{name}" in gone}
    return found


def unused(store: Store, manifests: list[Manifest], more: Mapping[str, int] | None = None) -> Unused:
    """Return the dense weights and checkpoints that no task of `manifests` needs, and `more` files (name -> size)."""
    tables = [store.plan_table(manifest) for manifest in manifests]
    dense = {dense_id for table in tables for dense_id in table["dense_id"].unique().to_pylist()}
    tasks = {task_id for table in tables for task_id in table["task_id"].to_pylist()}
    ours = {name: size for name, size in store.sizes("dense").items() if DENSE_NAME.fullmatch(name)}
    weights = _without("dense", ours, dense, "-")
    checkpoints = _without("scratch/checkpoints", store.sizes("scratch/checkpoints"), dense | tasks, ".")
    found = weights | checkpoints | dict(more or {})
    return Unused(tuple(sorted(found)), sum(found.values()))


def _without(folder: str, sizes: dict[str, int], needed: Container[str], mark: str) -> dict[str, int]:
    """name -> size of those files whose key, up to `mark`, is not needed."""
    return {f"{folder}/{name}": size for name, size in sizes.items() if name.split(mark)[0] not in needed}
