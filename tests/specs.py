"""Specs made by hand, for the tests of what becomes of them."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa

from orchestrator import expand
from orchestrator.documents import Document
from orchestrator.plan import planned
from orchestrator.spec import load_spec
from storage.manifest import plan_batches
from storage.records import Task

GRID: dict[str, Any] = {"model": "lenet5_mini", "dataset": "synthetic", "layers": "conv1", "ratio": 0.2}
TRAINING: dict[str, Any] = {"epochs": 1, "batch_size": 64, "lr": 0.1}


def document(grid: dict[str, Any] | None = None, **keys: Any) -> Document:
    """A spec's document: `grid` and `keys` beside a small usual one; a value of None leaves a key out."""
    whole = {"name": "made", "grid": GRID | (grid or {}), "dense": TRAINING, "retrain": TRAINING} | keys
    whole["grid"] = {key: value for key, value in whole["grid"].items() if value is not None}
    return Document("made.yaml", json.dumps(whole))


def tasks(document: Document) -> list[Task]:
    """Every task of a document."""
    return list(expand.tasks(load_spec(document), document))


def ids(document: Document) -> list[str]:
    """Every task's id."""
    return [task.task_id for task in tasks(document)]


def plan_of(document: Document) -> pa.Table:
    """Every task with its shard, as a manifest has them."""
    return pa.Table.from_batches(plan_batches(planned(load_spec(document), document)))
