"""Ids are pinned: they must stay what they are as long as rows exist."""

import hashlib
import json
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.identity import CELL_DEFAULTS, RECIPE_DEFAULTS, canonical_json, digest, without_defaults
from storage.records import Cell, Dense, Recipe, Row, Shard, Task, Tasks, row_for
from tests.rows import DENSE, L1, ORACLE, SAMPLED, any_tasks, cells

GOLDEN = {
    # cell: cell_id, task_id and candidate_id of candidate 7 with seed 2, dense_id, recipe_id
    "oracle all": (
        ORACLE,
        "6a166a7dcc89e97f",
        "9be89a4eee94cc9d",
        "ab34f01392a5b691",
        "62d6a8411e0d1261",
        "6bdb8eaecda316aa",
    ),
    "oracle sample": (
        SAMPLED,
        "9e90be12d24eff0e",
        "1670249deb8636e5",
        "7e6961837cd7738d",
        "62d6a8411e0d1261",
        "6bdb8eaecda316aa",
    ),
    "l1": (
        L1,
        "7e9b24268853e2a9",
        "c476836092cca74f",
        "09f995094ac015dc",
        "a9063ae769109175",
        "710c1418f8b556b6",
    ),
}

# Every field in the id, with another value than ORACLE has.
CHANGES: dict[type, dict[str, Any]] = {
    Cell: {
        "layers": (("conv1", 0.4),),
        "pruner": "l1",
        "granularity": "weight",
        "propagation": "released",
        "schedule": "iterative",
        "precision": "bf16",
        "loss_subset": 100,
        "candidate_mode": "sample",
        "sampling_seed": 0,
        "pruner_seed": 0,
        "scope": "global",
        "calibration": 128,
        "content": (("pruner", "ab"),),
        "sets": (("conv1", ((0, 1), (2, 3))),),
    },
    Dense: {"model": "lenet5", "dataset": "digits", "validation": 0.1, "content": (("model", "ab"),)},
    Recipe: {
        "epochs": 31,
        "batch_size": 128,
        "lr": ((0, 0.5),),
        "optimizer": "adamw",
        "momentum": 0.5,
        "nesterov": True,
        "weight_decay": 0.5,
        "seed": 9,
        "lr_schedule": "cosine",
        "warmup_epochs": 5,
        "final_lr": 1e-5,
        "betas": (0.8, 0.9),
        "label_smoothing": 0.1,
        "clip_norm": 1.0,
        "ema": 0.999,
        "accumulate": 2,
        "max_steps": 100,
        "augment": False,
        "mixup": 0.2,
        "cutmix": 1.0,
        "lora_rank": 8,
        "weights": "library",
    },
}


def _sha16(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _changed() -> dict[str, Cell]:
    cases = {f"cell.{key}": replace(ORACLE, **{key: value}) for key, value in CHANGES[Cell].items()}
    cases |= {f"dense.{k}": replace(ORACLE, dense=replace(DENSE, **{k: v})) for k, v in CHANGES[Dense].items()}
    for key, value in CHANGES[Recipe].items():
        recipe, retrain = replace(DENSE.recipe, **{key: value}), replace(ORACLE.retrain, **{key: value})
        cases[f"dense.recipe.{key}"] = replace(ORACLE, dense=replace(DENSE, recipe=recipe))
        cases[f"retrain.{key}"] = replace(ORACLE, retrain=retrain)
    return cases


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_ids(name: str) -> None:
    """Ids written today are the ids of every later version."""
    cell, *expected = GOLDEN[name]
    task = Task(cell, 7, 2)
    found = [cell.cell_id, task.task_id, task.candidate_id, cell.dense.dense_id, cell.retrain.recipe_id]
    assert found == expected


def test_ids_are_sha256_of_canonical_json() -> None:
    """An id is 16 hex digits of SHA-256 over canonical JSON without defaults: anyone can recompute it."""
    trained = '{"batch_size":256,"epochs":30,"lr":[[0,0.01],[20,0.001]],"momentum":0.9,"seed":0,"weight_decay":0.0001}'
    retrain = '{"batch_size":256,"epochs":30,"lr":[[0,0.001],[20,0.0001]],"momentum":0.9,"weight_decay":0.0001}'
    dense_id = _sha16(f'{{"dataset":"mnist","model":"lenet5_mini","recipe":{trained}}}')
    cell_id = _sha16(f'{{"dense":"{dense_id}","layers":[["conv1",0.2]],"pruner":"oracle","retrain":{retrain}}}')
    assert (ORACLE.dense.dense_id, ORACLE.retrain.recipe_id) == (dense_id, _sha16(retrain))
    assert ORACLE.cell_id == cell_id
    assert Task(ORACLE, 7, 2).task_id == _sha16(f"{cell_id}/7/2")
    assert Task(ORACLE, 7, 2).candidate_id == _sha16(f"{cell_id}/7")


def test_defaults_of_schema_1_are_frozen() -> None:
    """The tables of defaults never change once rows exist."""
    assert CELL_DEFAULTS[1] == {
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
    assert RECIPE_DEFAULTS[1] == {
        "optimizer": "sgd",
        "momentum": 0.0,
        "nesterov": False,
        "weight_decay": 0.0,
        "seed": None,
    }


def test_defaults_of_schema_2_are_frozen() -> None:
    """They are those of schema 1 and some more."""
    assert CELL_DEFAULTS[2] == {**CELL_DEFAULTS[1], "scope": "local", "calibration": 256, "content": {}}
    assert RECIPE_DEFAULTS[2] == {
        **RECIPE_DEFAULTS[1],
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


def test_files_enter_by_content() -> None:
    """What lies in a folder or a file of weights is in the id, where it lies is not."""
    weights = replace(DENSE.recipe, weights="/a/w.safetensors")
    content = (("dataset", "d1"), ("weights", "w1"))
    here = Dense("timm/x", "imagefolder:/a", weights, content=content)
    there = replace(here, dataset="imagefolder:/b", recipe=replace(weights, weights="s3://b/w"))
    assert here.dense_id == there.dense_id
    assert replace(here, content=(("dataset", "d2"), ("weights", "w1"))).dense_id != here.dense_id
    assert replace(here, content=(("dataset", "d1"), ("weights", "w2"))).dense_id != here.dense_id
    assert replace(here, content=()).dense_id != here.dense_id
    code = replace(DENSE, model="mine.nets:build", content=(("model", "c"),))
    assert replace(code, model="mine.nets:other").dense_id != code.dense_id


def test_a_field_said_at_its_default_leaves_the_id() -> None:
    """Saying a default is the same grid point as leaving it out."""
    said = replace(ORACLE, **{k: v for k, v in CELL_DEFAULTS[1].items() if k != "validation"})
    recipe = Recipe(1, 1, ((0, 0.1),))
    assert said.cell_id == ORACLE.cell_id
    assert set(recipe.identity()) == {"epochs", "batch_size", "lr"}
    assert replace(recipe, **RECIPE_DEFAULTS[1]).recipe_id == recipe.recipe_id
    assert replace(DENSE, validation=0.0).dense_id == DENSE.dense_id


@settings(deadline=None)
@given(cells())
def test_a_field_added_with_a_default_leaves_old_ids(cell: Cell) -> None:
    """A field of a later schema counts only where it differs from its default."""
    old, defaults = cell.to_dict(), CELL_DEFAULTS[1]
    later = {**defaults, "rewind": 0}
    before = digest(without_defaults(old, defaults))
    assert digest(without_defaults(old | {"rewind": 0}, later)) == before
    assert digest(without_defaults(old | {"rewind": 1}, later)) != before


@pytest.mark.parametrize("name", _changed())
def test_every_identity_field_changes_the_ids(name: str) -> None:
    """Two grid points that differ anywhere never share a row."""
    changed = _changed()[name]
    assert changed.cell_id != ORACLE.cell_id
    assert Task(changed, 0, 0).task_id != Task(ORACLE, 0, 0).task_id
    assert (changed.dense.dense_id != DENSE.dense_id) == name.startswith("dense.")
    assert (changed.retrain.recipe_id != ORACLE.retrain.recipe_id) == name.startswith("retrain.")


def test_no_identity_field_is_untried() -> None:
    """A field added to a record needs a line in CHANGES, and every change gives an id of its own."""
    nested = {Cell: {"dense", "retrain"}, Dense: {"recipe"}, Recipe: set()}
    for record, changes in CHANGES.items():
        assert {f.name for f in fields(record)} - nested[record] == set(changes)
    ids = {cell.cell_id for cell in _changed().values()}
    assert len(ids) == len(_changed())


def test_candidate_and_seed_change_the_task_and_only_the_candidate_the_candidate_id() -> None:
    """A candidate's seeds share its candidate_id, and no two tasks share an id."""
    grid = [Task(ORACLE, candidate, seed) for candidate in range(12) for seed in range(12)]
    assert len({task.task_id for task in grid}) == 144
    assert len({task.candidate_id for task in grid}) == 12
    assert Task(ORACLE, 3, 0).candidate_id == Task(ORACLE, 3, 1).candidate_id


def test_layer_order_and_floats_count_exactly() -> None:
    """Ratios enter as repr: the next float is another cell, the same float spelt otherwise is not."""
    assert canonical_json([0.1, 1e-4, 0.1 + 0.2, 1e22, 2.0]) == "[0.1,0.0001,0.30000000000000004,1e+22,2.0]"
    assert canonical_json({"b": "é", "a": None}) == '{"a":null,"b":"\\u00e9"}'
    assert replace(ORACLE, layers=(("conv1", 2e-1),)).cell_id == ORACLE.cell_id
    assert replace(ORACLE, layers=(("conv1", 0.2 + 2**-54),)).cell_id != ORACLE.cell_id
    assert replace(SAMPLED, layers=SAMPLED.layers[::-1]).cell_id != SAMPLED.cell_id


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_an_id_of_no_number_is_refused(value: float) -> None:
    """NaN and infinity are not JSON: they raise instead of entering an id."""
    with pytest.raises(ValueError, match="JSON"):
        digest({"ratio": value})


@settings(deadline=None)
@given(cells())
def test_a_cell_comes_back_from_its_json(cell: Cell) -> None:
    """The `recipe` column holds the whole cell, floats bit for bit."""
    again = Cell.from_json(cell.json)
    assert again == cell
    assert (again.cell_id, again.json) == (cell.cell_id, cell.json)
    assert cell.json == canonical_json(json.loads(cell.json))


@settings(deadline=None)
@given(any_tasks())
def test_a_row_alone_rebuilds_its_task(task: Task) -> None:
    """Resume and rerun need nothing but the row."""
    row: Row = row_for(task, "failed", {})
    again = row.task()
    assert again == task
    assert (row.task_id, row.cell_id, row.candidate_id) == (again.task_id, again.cell.cell_id, again.candidate_id)
    assert (row.dense_id, row.recipe_id) == (again.cell.dense.dense_id, again.cell.retrain.recipe_id)
    assert tuple(zip(row.layers, row.ratios, strict=True)) == again.cell.layers


@given(any_tasks(), st.lists(st.tuples(st.integers(0, 2**63 - 1), st.integers(0, 2**63 - 1))), st.slices(5))
def test_many_tasks_are_as_the_single_ones(first: Task, numbers: list[tuple[int, int]], part: slice) -> None:
    """Tasks kept as numbers have the ids, the order and the parts of tasks kept one by one, and travel so."""
    singly = [first, *(Task(first.cell, candidate, seed) for candidate, seed in numbers)]
    tasks = Tasks.of(singly)
    assert list(tasks) == singly and [tasks[i] for i in range(len(tasks))] == singly and tasks[-1] == singly[-1]
    assert tasks.ids() == [task.task_id for task in singly]
    assert tasks.candidate_ids() == [task.candidate_id for task in singly]
    assert list(tasks[part]) == singly[part]
    shard = Shard("s", tasks, keep="best", block=8)
    assert Shard.from_dict(shard.to_dict()) == replace(shard, tasks=tuple(singly))
