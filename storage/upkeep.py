"""Upkeep: what nobody needs any more is removed. Rows, plans and kept networks are never touched."""

from __future__ import annotations

import re
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import TYPE_CHECKING

from storage.commit import sweep_temporaries
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


def unused(store: Store, manifests: list[Manifest]) -> Unused:
    """The dense weights and checkpoints that no task of `manifests` needs."""
    tables = [store.plan_table(manifest) for manifest in manifests]
    dense = {dense_id for table in tables for dense_id in table["dense_id"].unique().to_pylist()}
    tasks = {task_id for table in tables for task_id in table["task_id"].to_pylist()}
    ours = {name: size for name, size in store.sizes("dense").items() if DENSE_NAME.fullmatch(name)}
    weights = _without("dense", ours, dense, "-")
    checkpoints = _without("scratch/checkpoints", store.sizes("scratch/checkpoints"), dense | tasks, ".")
    found = weights | checkpoints
    return Unused(tuple(sorted(found)), sum(found.values()))


def _without(folder: str, sizes: dict[str, int], needed: Container[str], mark: str) -> dict[str, int]:
    """name -> size of those files whose key, up to `mark`, is not needed."""
    return {f"{folder}/{name}": size for name, size in sizes.items() if name.split(mark)[0] not in needed}
