"""Cells that are the same but for what may differ are found, their rows matched, their verdicts compared."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from storage.diff import Side, cell_fields, moved, paired, summary, verdicts
from storage.errors import QueryError
from storage.records import Cell, Dense, Removed, Task
from storage.store import Store
from tests.rows import L1, ORACLE, done, failed, plan, tasks
from tests.test_cli_errors import run

X, Y = "pruned_train_loss", "best_test_accuracy"
RELEASED = replace(ORACLE, propagation="released")
OTHER = replace(ORACLE, layers=(("conv2", 0.2),))
BF16 = replace(ORACLE, precision="bf16")
SLOW = replace(ORACLE, retrain=replace(ORACLE.retrain, epochs=60))


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claims are kept where the test ends."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def filled(path: Path, name: str, cells: dict[Cell, list[tuple[float, float]]], **columns: object) -> Side:
    """A sweep whose candidates have these losses and accuracies, with one seed."""
    store = Store(path)
    planned = {cell: tasks(cell, len(numbers)) for cell, numbers in cells.items()}
    plan(store, name, [task for each in planned.values() for task in each])
    rows = [
        done(task, **{X: x, Y: y}, **columns)
        for cell, numbers in cells.items()
        for task, (x, y) in zip(planned[cell], numbers, strict=True)
    ]
    store.commit_rows("s0", rows)
    return Side(store, name)


BEFORE = [(0.1, 0.9), (0.2, 0.8), (0.3, 0.7), (0.4, 0.6), (0.5, 0.5), (0.6, 0.4)]
AFTER = [(0.1, 0.9), (0.2, 0.8), (0.5, 0.7), (0.4, 0.9), (0.5, 0.6), (0.6, 0.9)]


def test_one_sweep_over_an_axis(tmp_path: Path) -> None:
    """Each cell meets its like once, the earlier in the grid first; rows of equal candidate and seed are matched."""
    side = filled(tmp_path, "both", {ORACLE: BEFORE, RELEASED: AFTER, OTHER: BEFORE})
    found = paired(side, side, ["propagation"])
    ((pair),) = found.cells
    assert (pair.cell_a, pair.cell_b, pair.a, pair.b) == (ORACLE.cell_id, RELEASED.cell_id, "exact", "released")
    rows = moved(found, X, Y).to_pylist()
    assert [(row["candidate_a"], row["candidate_b"]) for row in rows] == [(5, 5), (3, 3), (4, 4), (2, 2)]
    assert [row[f"{Y}_difference"] for row in rows] == pytest.approx([0.5, 0.3, 0.1, 0])
    assert [row[f"{X}_difference"] for row in rows] == pytest.approx([0, 0, 0, 0.2])
    assert {(row["task_a"], row["task_b"]) for row in rows} == {
        (Task(ORACLE, i, 0).task_id, Task(RELEASED, i, 0).task_id) for i in (2, 3, 4, 5)
    }


def test_the_summary_counts_what_moved_and_how_far(tmp_path: Path) -> None:
    """y first, then x: rows, moved, mean, largest, and the range of each side."""
    side = filled(tmp_path, "both", {ORACLE: BEFORE, RELEASED: AFTER[:5]})
    of_y, of_x = summary(paired(side, side, ["propagation"]), X, Y).to_pylist()
    assert [line["column"] for line in (of_y, of_x)] == [Y, X]
    counts = ("rows", "only_a", "only_b", "moved")
    assert [of_y[name] for name in counts] == [5, 1, 0, 2]
    assert [of_x[name] for name in counts] == [5, 1, 0, 1]
    assert of_y["mean_difference"] == of_y["mean_distance"] == pytest.approx(0.4 / 5)
    assert of_y["max_distance"] == pytest.approx(0.3)
    assert [of_x[name] for name in ("low_a", "high_a", "low_b", "high_b")] == [0.1, 0.5, 0.1, 0.5]
    assert [of_y[name] for name in ("low_a", "high_a", "low_b", "high_b")] == [0.5, 0.9, 0.6, 0.9]


def test_cells_without_a_row_in_both_are_in_the_summary(tmp_path: Path) -> None:
    """Nothing to compare yet: counted, without numbers."""
    side = filled(tmp_path, "both", {ORACLE: BEFORE, RELEASED: []})
    plan(side.store, "both", [*tasks(ORACLE, 6), *tasks(RELEASED, 6)])
    of_y, _ = summary(paired(side, side, ["propagation"]), X, Y).to_pylist()
    assert [of_y[name] for name in ("rows", "only_a", "only_b", "moved", "max_distance")] == [0, 6, 0, 0, None]


def test_verdicts_that_changed_come_first(tmp_path: Path) -> None:
    """Each side's tau, p and verdict are those of its cell."""
    other = replace(OTHER, propagation="released")
    side = filled(tmp_path, "both", {OTHER: BEFORE, ORACLE: BEFORE, RELEASED: AFTER, other: BEFORE})
    first, second = verdicts(paired(side, side, ["propagation"]), X, Y).to_pylist()
    assert (first["cell_a"], first["changed"], second["changed"]) == (ORACLE.cell_id, True, False)
    assert (first["verdict_a"], first["verdict_b"]) == ("valid", "not valid")
    assert (first["n_a"], first["tau_a"], second["tau_b"]) == (6, pytest.approx(-1), pytest.approx(-1))
    assert first["tau_difference"] == pytest.approx(first["tau_b"] + 1)
    assert first["tau_difference_low"] <= first["tau_difference"] <= first["tau_difference_high"]


def test_a_side_without_a_verdict_has_changed_nothing(tmp_path: Path) -> None:
    """Too few candidates are no change."""
    side = filled(tmp_path, "both", {ORACLE: BEFORE, RELEASED: AFTER[:1]})
    (line,) = verdicts(paired(side, side, ["propagation"]), X, Y).to_pylist()
    assert (line["changed"], line["verdict_b"]) == (False, "")


def test_two_sweeps_are_matched_but_for_what_sets_them_apart(tmp_path: Path) -> None:
    """No cell of one is released, none of the other exact: that is what differs, and layers must agree."""
    a = filled(tmp_path, "a", {ORACLE: BEFORE, OTHER: BEFORE})
    b = filled(tmp_path, "b", {RELEASED: AFTER})
    found = paired(a, b)
    assert [(pair.cell_a, pair.cell_b) for pair in found.cells] == [(ORACLE.cell_id, RELEASED.cell_id)]
    assert len(moved(found, X, Y)) == 4


def test_a_group_of_fields_is_named_at_once(tmp_path: Path) -> None:
    """`retrain` stands for every field of the recipe; the one that differs is shown."""
    side = filled(tmp_path, "both", {ORACLE: BEFORE, SLOW: AFTER})
    for name in ("retrain", "recipe", "retrain.epochs"):
        (pair,) = paired(side, side, [name]).cells
        assert (pair.a, pair.b, pair.differing) == ("30", "60", {"retrain.epochs"})


def test_the_same_sweep_in_two_stores(tmp_path: Path) -> None:
    """Equal rows have not moved; with --over versions only tasks whose versions differ are compared."""
    versions = [json.dumps({"torch": torch, "numpy": "2.4"}) for torch in ("2.14", "2.15")]
    a = filled(tmp_path / "a", "same", {ORACLE: BEFORE}, versions=versions[0])
    b = filled(tmp_path / "b", "same", {ORACLE: AFTER}, versions=versions[1])
    assert len(moved(paired(a, b), X, Y)) == 4
    rows = moved(paired(a, b, ["versions"]), X, Y).to_pylist()
    assert [(row["versions_a"], row["versions_b"]) for row in rows] == [("torch 2.14", "torch 2.15")] * 4
    assert rows[0]["task_a"] == rows[0]["task_b"] == Task(ORACLE, 5, 0).task_id
    assert len(moved(paired(a, b, ["host"]), X, Y)) == 0


def test_a_value_on_one_side_only_has_moved_farthest(tmp_path: Path) -> None:
    """A retraining that diverged has no accuracy: it comes first, without a difference."""
    side = filled(tmp_path, "both", {ORACLE: BEFORE, RELEASED: [*AFTER[:5], (0.6, float("nan"))]})
    side.store.commit_rows("s1", [failed(Task(RELEASED, 9, 0))])
    rows = moved(paired(side, side, ["propagation"]), X, Y).to_pylist()
    assert rows[0]["candidate_a"] == 5


def test_candidates_of_different_pruners_are_matched_by_their_units(tmp_path: Path) -> None:
    """The one that l1 chose is one of the oracle's, under another number."""
    chosen = replace(ORACLE, pruner="l1")
    store = Store(tmp_path)
    oracle, (mine,) = tasks(ORACLE, 3), tasks(chosen, 1)
    plan(store, "both", [*oracle, mine])
    units = [(Removed("conv1", (i,)),) for i in range(3)]
    rows = [done(task, removed=r, **{X: 1.0, Y: 0.5}) for task, r in zip(oracle, units, strict=True)]
    store.commit_rows("s0", [*rows, done(mine, removed=units[2], **{X: 1.0, Y: 0.25})])
    side = Side(store, "both")
    (row,) = moved(paired(side, side, ["pruner"]), X, Y).to_pylist()
    assert (row["candidate_a"], row["candidate_b"], row[f"{Y}_difference"]) == (2, 0, -0.25)


def test_cells_of_other_layers_have_verdicts_and_no_rows_in_common(tmp_path: Path) -> None:
    """What cannot be matched is refused, with what can be done."""
    side = filled(tmp_path, "both", {ORACLE: BEFORE, OTHER: AFTER})
    found = paired(side, side, ["layers"])
    (line,) = verdicts(found, X, Y).to_pylist()
    assert line["changed"] and math.isnan(line["tau_difference_low"])
    for compare in (moved, summary):
        with pytest.raises(QueryError, match=r"differ in layers have no candidate in common.*--what cells"):
            compare(found, X, Y)


def test_every_field_of_a_cell_can_differ() -> None:
    """What makes an id is among the fields: cells with equal fields are the same cell."""
    dense = replace(ORACLE.dense, recipe=replace(ORACLE.dense.recipe, seed=1))
    others = [RELEASED, OTHER, BF16, SLOW, L1, replace(ORACLE, dense=dense), replace(ORACLE, sampling_seed=3)]
    others += [replace(ORACLE, dense=replace(ORACLE.dense, validation=0.1)), replace(ORACLE, scope="global")]
    others += [replace(ORACLE, dense=Dense(**{**vars_of(ORACLE.dense), "content": (("dataset", "ab"),)}))]
    seen = [repr(cell_fields(cell)) for cell in (ORACLE, *others)]
    assert len({cell.cell_id for cell in (ORACLE, *others)}) == len(set(seen)) == len(seen)


def vars_of(dense: Dense) -> dict[str, object]:
    """The fields of a dense model."""
    return {name: getattr(dense, name) for name in ("model", "dataset", "recipe", "validation", "content")}


def test_mistakes_are_told(tmp_path: Path) -> None:
    """An unknown field with the nearest, a sweep with itself, sides that have nothing in common, an unknown column."""
    side = filled(tmp_path, "one", {ORACLE: BEFORE, RELEASED: AFTER})
    other = filled(tmp_path, "two", {replace(OTHER, precision="bf16"): BEFORE})
    told = {
        r"--over propagatoin: no field of a cell; did you mean propagation\? allowed: model, ": (side, ["propagatoin"]),
        "one with itself: --over says what may differ": (side, []),
        "no two cells of one differ in precision alone": (side, ["precision"]),
        "differ in no versions: name another with --store-b": (side, ["versions"]),
        r"no cell of one .* differ in layers: name all that may with --over": (other, ["precision"]),
        "no sweep three": (Side(side.store, "three"), ["precision"]),
    }
    for message, (b, over) in told.items():
        with pytest.raises(QueryError, match=message):
            paired(side, b, over)
    with pytest.raises(QueryError, match="status is no number of a row; allowed: "):
        moved(paired(side, side, ["propagation"]), X, "status")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Data on stdout, the count on stderr; ids are for programs."""
    filled(tmp_path, "both", {ORACLE: BEFORE, RELEASED: AFTER})
    arguments = ["diff", "both", "both", "--over", "propagation", "--store", str(tmp_path)]
    assert run(*arguments, "-f", "json") == 0
    out, err = capsys.readouterr()
    assert [line["moved"] for line in json.loads(out)] == [3, 1]
    assert err.startswith("1 pair of cells; --what rows")
    assert run(*arguments, "--what", "rows") == 0
    out, err = capsys.readouterr()
    assert err == "1 pair of cells: 4 rows moved\n" and "task_a" not in out
    assert run(*arguments, "--what", "cells", "-f", "csv") == 0
    out, err = capsys.readouterr()
    assert err == "1 pair of cells: 1 verdict changed\n" and RELEASED.cell_id in out
    assert run("diff", "both", "both", "--store", str(tmp_path)) == 2
    assert "--over says what may differ" in capsys.readouterr().err
