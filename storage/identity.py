"""Ids: a hash of what a thing is, so that two machines agree without talking.

An id is 16 hex digits of the SHA-256 of canonical JSON. Fields at their default are left out, and
the defaults are frozen here per schema number: a field added later, with a default, leaves every
old id as it was.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

SCHEMA_VERSION = 3

SWEEP_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")
"""A sweep's name is a folder's name."""

MAX_SWEEP_NAME = 215
"""Characters of a new sweep's name. A file name has 255; Ray's log of a job, `job-driver-NAME-DATE-TIME-xxxx.log`, adds
the most to it."""

# One table per schema number, never edited once rows exist. A later schema repeats the entries of
# the one before and adds its own; the field's value then counts only where it differs.
_CELL_1: Mapping[str, Any] = {
    "granularity": "filter",
    "propagation": "exact",
    "schedule": "one-shot",
    "precision": "fp32",
    "loss_subset": None,
    "validation": 0.0,
    "candidate_mode": "all",
    "sampling_seed": None,
    "pruner_seed": None,
}
_RECIPE_1: Mapping[str, Any] = {
    "optimizer": "sgd",
    "momentum": 0.0,
    "nesterov": False,
    "weight_decay": 0.0,
    "seed": None,
}
_CELL_2: Mapping[str, Any] = {**_CELL_1, "scope": "local", "calibration": 256, "content": {}}
_RECIPE_2: Mapping[str, Any] = {
    **_RECIPE_1,
    "lr_schedule": "table",
    "warmup_epochs": 0,
    "final_lr": 0.0,
    "betas": [0.9, 0.999],
    "label_smoothing": 0.0,
    "clip_norm": None,
    "ema": None,
    "accumulate": 1,
    "max_steps": None,
    "augment": True,
    "mixup": 0.0,
    "cutmix": 0.0,
    "lora_rank": None,
    "weights": None,
}
CELL_DEFAULTS: Mapping[int, Mapping[str, Any]] = {1: _CELL_1, 2: _CELL_2, 3: {**_CELL_2, "sets": {}}}
RECIPE_DEFAULTS: Mapping[int, Mapping[str, Any]] = {1: _RECIPE_1, 2: _RECIPE_2, 3: _RECIPE_2}

FOLDERS = ("imagefolder", "llava")
"""Data sets named `<kind>:<path>`: their ids depend on what lies there, not on where."""


def canonical_json(value: Any) -> str:
    """JSON with sorted keys, no spaces and floats as `repr`; NaN and infinity raise ValueError."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any) -> str:
    """16 hex digits over the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:16]


def without_defaults(fields: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """`fields` less those at their default."""
    return {key: v for key, v in fields.items() if key not in defaults or v != defaults[key]}


def without_later(fields: Mapping[str, Any], defaults: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """`fields` less those that schema 1 did not have and that are at their default: what schema 1 had written."""
    later = {key: value for key, value in defaults[SCHEMA_VERSION].items() if key not in defaults[1]}
    return without_defaults(fields, later)


def join_id(*parts: object) -> str:
    """16 hex digits over `a/b/c`: the ids of candidates and tasks, hashed millions at a time."""
    return hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()[:16]


def join_ids(first: str, rest: Iterable[str]) -> list[str]:
    """`join_id(first, one)` for each of `rest`; what they share is hashed once."""
    start = hashlib.sha256(f"{first}/".encode())
    ids: list[str] = []
    for one in rest:
        made = start.copy()
        made.update(one.encode())
        ids.append(made.hexdigest()[:16])
    return ids
