"""Expansion: the same spec is the same tasks in the same order on every machine, one at a time."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import build_model
from orchestrator import expand
from orchestrator.documents import Document
from orchestrator.errors import UserError
from orchestrator.preflight import check_pruning
from orchestrator.spec import load_spec
from orchestrator.study import open_document
from pruners.candidates import n_removed
from storage.records import Cell, Task
from tests import specs

SAMPLE = {"mode": "sample", "count": 3, "seed": 0}

# Points of the layers axis, no two of which are the same cell at any ratio.
LAYERS: list[Any] = ["conv1", ["conv1", "conv2"], "fc?", {"conv3": 0.7}, {"conv1": 0.3, "conv2": 0.6}]


def some_of(values: list[Any]) -> st.SearchStrategy[list[Any]]:
    """Some of the values, each once, in any order."""
    return st.lists(st.sampled_from(values), min_size=1, max_size=len(values), unique_by=repr)


grids = st.fixed_dictionaries(
    {
        "model": some_of(["lenet5_mini", "lenet5_mini_d6", "lenet5"]),
        "dataset": some_of(["digits", "synthetic"]),
        "layers": some_of(LAYERS),
        "ratio": some_of([0.2, 0.5]),
        "pruner": some_of(["oracle", "l1", "random"]),
        "pruner_seed": some_of([0, 1]),
        "propagation": some_of(["exact", "released"]),
        "precision": some_of(["fp32", "bf16"]),
        "seed": some_of([0, 1, 5]),
    }
)


def document_of(grid: dict[str, Any], **keys: Any) -> Document:
    """The document of a drawn grid; the ratio axis goes where no entry wants it."""
    only_own = all(isinstance(entry, dict) for entry in grid["layers"])
    return specs.document(grid | ({"ratio": None} if only_own else {}), **keys)


@settings(max_examples=40)
@given(grids, st.integers(1, 4))
def test_task_count_is_the_product(grid: dict[str, Any], count: int) -> None:
    """Every grid point is there exactly once, with its candidates crossed with the seeds."""
    found = specs.ids(document_of(grid, candidates=SAMPLE | {"count": count}, retrain=[specs.TRAINING, OTHER]))
    points = sum(1 if isinstance(entry, dict) else len(grid["ratio"]) for entry in grid["layers"])
    candidates = {"oracle": count, "l1": 1, "random": len(grid["pruner_seed"])}
    axes = [len(grid[axis]) for axis in ("model", "dataset", "propagation", "precision", "seed")]
    assert len(found) == 2 * points * sum(candidates[pruner] for pruner in grid["pruner"]) * math.prod(axes)
    assert len(set(found)) == len(found)


OTHER = specs.TRAINING | {"epochs": 2}


@settings(max_examples=20)
@given(grids)
def test_two_expansions_are_equal(grid: dict[str, Any]) -> None:
    """The order is that of the spec: cell by cell, candidate by candidate, seed by seed."""
    document = document_of(grid, candidates=SAMPLE)
    found = specs.tasks(document)
    assert found == specs.tasks(document)
    place = {cell.cell_id: i for i, cell in enumerate(expand.cells(load_spec(document), document))}
    seeds = grid["seed"]
    keys = [(place[task.cell.cell_id], task.candidate, seeds.index(task.seed)) for task in found]
    assert keys == sorted(keys)


def test_another_process_expands_alike(tmp_path: Path) -> None:
    """Neither the hash seed nor the machine moves a task: a driver elsewhere resumes the same sweep."""
    grid = {"model": ["lenet5", "lenet5_mini"], "layers": LAYERS, "ratio": [0.5, 0.2], "pruner": ["random", "oracle"]}
    document = specs.document(grid, candidates=SAMPLE)
    code = "import sys; from tests import specs; from orchestrator.documents import Document; "
    code += "print('\\n'.join(specs.ids(Document('made', sys.stdin.read()))))"
    for seed in ("1", "2"):
        found = subprocess.run(
            [sys.executable, "-c", code],
            input=json.dumps(document.plain()),
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[1])},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        assert found.stdout.split() == specs.ids(document)


def test_a_point_named_twice_is_one_point() -> None:
    """Duplicates, whether written so or meeting as patterns, are neither run nor counted twice."""
    grid = {"layers": ["conv1", ["conv1", "conv2"]], "ratio": [0.2, 0.5], "seed": [0, 1]}
    once = specs.document(grid, candidates=SAMPLE)
    twice = specs.document(
        {
            "model": ["lenet5_mini", "lenet5_mini"],
            "dataset": ["synthetic", "synthetic"],
            "layers": ["conv1", "conv1", ["conv1"], ["conv2", "conv1"], "conv[12]", {"conv1": 0.2}],
            "ratio": [0.2, 0.5, 0.2],
            "pruner": ["oracle", "oracle"],
            "seed": [0, 1, 0],
        },
        dense=[specs.TRAINING] * 2,
        retrain=[specs.TRAINING] * 2,
        candidates=SAMPLE,
    )
    assert specs.ids(twice) == specs.ids(once)
    assert len(specs.ids(once)) == 4 * 3 * 2


def test_expansion_is_lazy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of millions of tasks is there after one cell and one task were made."""
    made: list[type] = []
    for kind in (Cell, Task):
        monkeypatch.setattr(expand, kind.__name__, lambda *a, kind=kind, **k: (made.append(kind), kind(*a, **k))[1])
    document = specs.document(
        {"layers": ["conv1", "conv2", "conv3"], "ratio": 0.5, "seed": list(range(1000))},
        retrain=[specs.TRAINING | {"epochs": n} for n in range(1, 21)],
    )
    tasks = expand.tasks(load_spec(document), document)
    assert isinstance(tasks, Iterator)
    assert made == []
    first = list(islice(tasks, 2))
    assert made == [Cell, Task, Task]
    assert [(task.candidate, task.seed) for task in first] == [(0, 0), (0, 1)]
    assert expand.candidate_count(first[0].cell, None) * 1000 * 3 * 20 == 15_120_000


@pytest.mark.parametrize(
    ("entry", "names"),
    [
        ("conv2", ["conv2"]),
        (["conv3", "conv1"], ["conv1", "conv3"]),
        ("conv*", ["conv1", "conv2", "conv3"]),
        (["fc1", "conv[12]"], ["conv1", "conv2", "fc1"]),
        (["conv1", "conv*"], ["conv1", "conv2", "conv3"]),
        ("*", ["conv1", "conv2", "conv3", "fc1"]),
    ],
)
def test_layers_are_in_network_order(entry: Any, names: list[str]) -> None:
    """A cell is what is pruned, not how it was written: patterns become names, in the network's order."""
    (cell,) = cells(specs.document({"layers": [entry], "ratio": 0.3}, candidates=SAMPLE))
    assert cell.layers == tuple((name, 0.3) for name in names)
    assert cell.pruning_ratio == 0.3


def test_a_list_of_names_is_a_list_of_points() -> None:
    """[a, b] prunes one or the other; [[a, b]] prunes both."""
    either = cells(specs.document({"layers": ["conv1", "conv2"]}))
    assert [cell.layers for cell in either] == [(("conv1", 0.2),), (("conv2", 0.2),)]
    both = cells(specs.document({"layers": [["conv1", "conv2"]]}))
    assert [cell.layers for cell in both] == [(("conv1", 0.2), ("conv2", 0.2))]


def test_entries_with_ratios_of_their_own() -> None:
    """{pattern: ratio} gives each layer its ratio; the cell's one ratio is null where they differ."""
    entry = {"conv3": 0.5, "conv[12]": 0.2}
    (cell,) = cells(specs.document({"layers": entry, "ratio": None}, candidates=SAMPLE))
    assert cell.layers == (("conv1", 0.2), ("conv2", 0.2), ("conv3", 0.5))
    assert cell.pruning_ratio is None
    same = cells(specs.document({"layers": [{"conv1": 0.4}], "ratio": None}))
    assert same == cells(specs.document({"ratio": 0.4}))
    assert same[0].pruning_ratio == 0.4


def test_criterion_pruners_have_one_candidate() -> None:
    """l1, l2 and random choose one set: their ids know nothing of how the oracle's candidates are taken."""
    grid = {"pruner": ["l1", "l2", "random"], "ratio": [0.2, 0.5]}
    ways = [{"mode": "all"}, SAMPLE, SAMPLE | {"seed": 9}, SAMPLE | {"count": 44}]
    found = [specs.ids(specs.document(grid, candidates=way)) for way in ways]
    assert len(found[0]) == 6
    assert all(other == found[0] for other in found)


def test_sampling_seed_makes_other_tasks_and_count_more_of_them() -> None:
    """Another sampling seed is another cell; a larger count is the same tasks and more."""
    few = specs.ids(specs.document(candidates=SAMPLE))
    more = specs.ids(specs.document(candidates=SAMPLE | {"count": 7}))
    assert (len(few), len(more), more[:3]) == (3, 7, few)
    assert not set(few) & set(specs.ids(specs.document(candidates=SAMPLE | {"seed": 1})))
    assert not set(few) & set(specs.ids(specs.document(candidates={"mode": "all"})))


def test_pruner_seed_matters_for_random_only() -> None:
    """pruner_seed is an axis of the pruners that draw, and nobody else's id has it."""
    pruners = ["oracle", "l1", "random"]
    one = {p: specs.ids(specs.document({"pruner": p, "pruner_seed": 0})) for p in pruners}
    other = {p: specs.ids(specs.document({"pruner": p, "pruner_seed": 7})) for p in pruners}
    assert [one[p] == other[p] for p in pruners] == [True, True, False]
    both = specs.ids(specs.document({"pruner": pruners, "pruner_seed": [0, 7]}))
    assert both == [*one["oracle"], *one["l1"], *one["random"], *other["random"]]


@given(st.sampled_from([0.1, 0.2, 0.5, 0.8, 0.9]), st.sampled_from(["conv1", "conv3", "fc1"]))
@settings(max_examples=10)
def test_mode_all_numbers_every_combination(ratio: float, layer: str) -> None:
    """Mode all plans as many candidates as there are ways to choose, numbered from 0."""
    found = specs.tasks(specs.document({"layers": layer, "ratio": ratio}))
    assert [task.candidate for task in found] == list(range(math.comb(10, round(10 * ratio))))


COUNTS = [45, 120, 210, 252, 210, 120, 45]


@pytest.mark.parametrize("layer", ["conv1", "conv2", "conv3"])
def test_lenet5_mini_studies_are_the_papers(layer: str) -> None:
    """The shipped studies are the experiments of arXiv 2412.00143: cells, candidates, seeds, recipes."""
    document = open_document(f"lenet5-mini-{layer}")
    spec = load_spec(document)
    found = cells(document)
    assert [expand.candidate_count(cell, spec.candidates.count) for cell in found] == COUNTS
    assert [cell.layers for cell in found] == [((layer, n / 10),) for n in range(2, 9)]
    assert len(specs.tasks(document)) == sum(COUNTS) * 3 == 3006
    dense, retrain = found[0].dense, found[0].retrain
    assert (dense.model, dense.dataset) == ("lenet5_mini", "mnist")
    assert (dense.recipe.lr, retrain.lr) == (((0, 0.01), (20, 0.001)), ((0, 0.001), (20, 1e-4)))
    for recipe in (dense.recipe, retrain):
        assert (recipe.epochs, recipe.batch_size, recipe.momentum, recipe.weight_decay) == (30, 256, 0.9, 1e-4)


def test_digits_study() -> None:
    """The demo is every way to remove two of ten filters, with two seeds."""
    found = specs.tasks(open_document("digits"))
    assert len(found) == 45 * 2
    assert {task.seed for task in found} == {0, 1}


def cells(document: Document) -> list[Cell]:
    """Every cell of a document."""
    return list(expand.cells(load_spec(document), document))


@given(st.integers(2, 10**9), st.integers(0, 10**6))
def test_the_ratio_that_a_message_names_works(least: int, more: int) -> None:
    """It removes a unit, and not all, of the smallest layer and of any larger one; it is the smallest to 1 %."""
    ratio = expand.smallest_ratio(least)
    assert n_removed(least, ratio) == 1
    assert 1 <= n_removed(least + more, ratio) < least + more
    assert n_removed(least, ratio / 1.02) == 0


SMALL = {"model": "lenet5", "layers": "*", "ratio": 0.1, "pruner": "l1"}  # conv1 has 6 units, conv2 has 16


def refusal(grid: dict[str, Any], **keys: Any) -> str:
    """The message for a grid that cannot be expanded."""
    with pytest.raises(UserError) as error:
        cells(specs.document(grid, **keys))
    return str(error.value)


def test_a_small_layer_is_named_with_the_ratios_that_work() -> None:
    """Following either half of the message gives a cell."""
    assert refusal(SMALL).startswith("made.yaml:1:")
    assert refusal(SMALL).endswith(
        "grid.ratio: ratio 0.1 removes nothing of the 6 units of conv1 of lenet5; use a ratio of at least 0.167, or "
        "set skip_small_layers: true, which leaves such layers out"
    )
    (cell,) = cells(specs.document(SMALL | {"ratio": 0.167}))
    assert [name for name, _ in cell.layers] == ["conv1", "conv2", "conv3", "fc1"]
    (cell,) = cells(specs.document(SMALL, skip_small_layers=True))
    assert [name for name, _ in cell.layers] == ["conv2", "conv3", "fc1"]


def test_only_a_few_small_layers_are_named() -> None:
    """A network of many layers is not listed whole, and the smallest of them sets the ratio."""
    found = refusal({"model": "resnet20", "dataset": "cifar10", "layers": "*", "ratio": 0.02, "pruner": "l1"})
    assert "removes nothing of the units of 6 layers of resnet20 (layer1.0.conv1 has 16, " in found
    assert "layer2.0.conv1 has 32, and 2 more); use a ratio of at least 0.0625, or set skip" in found


def test_layers_left_out_are_in_no_id() -> None:
    """A cell is what is pruned: the key alone changes nothing, and what it leaves out is as if it was not named."""
    skipping = {"skip_small_layers": True}
    usual = specs.document({"layers": ["conv1", "*"], "ratio": [0.2, 0.5], "pruner": "l1"})
    same = specs.document({"layers": ["conv1", "*"], "ratio": [0.2, 0.5], "pruner": "l1"}, **skipping)
    assert specs.ids(usual) == specs.ids(same)
    named = specs.document(SMALL | {"layers": [["conv2", "conv3", "fc1"]]})
    assert specs.ids(specs.document(SMALL, **skipping)) == specs.ids(named)
    own = SMALL | {"layers": [{"conv*": 0.1, "fc1": 0.2}], "ratio": None}
    (cell,) = cells(specs.document(own, **skipping))
    assert cell.layers == (("conv2", 0.1), ("conv3", 0.1), ("fc1", 0.2))
    document = specs.document(SMALL)
    document.override("skip_small_layers=true")
    assert specs.ids(document) == specs.ids(named)


def test_a_cell_without_layers_is_refused() -> None:
    """A layer named alone that loses nothing is an error with the key as well, and the key is not offered."""
    for entry in ("conv1", ["conv1"], {"conv1": 0.1}):
        grid = SMALL | {"layers": [entry]} | ({"ratio": None} if isinstance(entry, dict) else {})
        for skip in (False, True):
            found = refusal(grid, skip_small_layers=skip)
            assert found.endswith("removes nothing of the 6 units of conv1 of lenet5; use a ratio of at least 0.167")


def test_weights_are_counted_as_units_are() -> None:
    """With granularity weight the message counts weights, and the key leaves out the layers with too few."""
    grid = {"layers": "*", "ratio": 0.002, "pruner": "l1", "granularity": "weight"}  # conv1 has 250 weights
    assert "removes nothing of the weights of 3 layers of lenet5_mini (conv1 has 250, fc1 has" in refusal(grid)
    (cell,) = cells(specs.document(grid, skip_small_layers=True))
    assert [name for name, _ in cell.layers] == ["conv2", "conv3"]


def test_scope_global_rounds_once() -> None:
    """Ranked together, no single layer has to lose a unit: nothing is left out, and all together must lose one."""
    both = specs.document(SMALL | {"scope": ["local", "global"]}, skip_small_layers=True)
    local, together = cells(both)
    assert [len(cell.layers) for cell in (local, together)] == [3, 4]
    assert cells(specs.document(SMALL | {"scope": "global"})) == [together]
    assert "conv1" in refusal(SMALL | {"scope": ["local", "global"]})
    found = refusal(SMALL | {"scope": "global", "ratio": 0.004})
    assert "nothing of the 226 units of lenet5 synthetic" in found and "use a ratio of at least 0.00443" in found
    (one,) = cells(specs.document(SMALL | {"scope": "global", "ratio": 0.00443}))
    tried = check_pruning(
        build_model("lenet5", 10, (1, 32, 32)).eval(), one.layers, "filter", torch.randn(2, 1, 32, 32)
    )
    assert tried is not None and tried.after < tried.before  # preflight prunes where no single layer is to lose a unit


def test_low_rank_additions_are_for_language_models() -> None:
    """Elsewhere they are refused before anything runs."""
    with pytest.raises(UserError, match=r"retrain\.lora_rank: low-rank additions are for hf/ networks"):
        cells(specs.document(retrain=specs.TRAINING | {"lora_rank": 4}))


def test_text_is_not_mixed() -> None:
    """mixup and cutmix of images with text are refused before anything runs."""
    grid = {"model": "hf/llava-hf/llava-1.5-7b-hf", "dataset": "llava:nosuch", "layers": "*", "ratio": 0.5}
    document = specs.document(grid=grid | {"pruner": "l1", "seed": 0}, retrain=specs.TRAINING | {"mixup": 0.2})
    with pytest.raises(UserError, match="mixup and cutmix are for images with classes, not for llava:nosuch"):
        cells(document)


def test_layers_are_traced_on_samples_of_the_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that runs on samples of no usual shape, and only on those of its data, has its layers."""
    name = f"shaped_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(SHAPED)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    grid = {"model": f"{name}:Net", "dataset": f"{name}:load", "layers": "*", "ratio": 0.5, "pruner": "l1"}
    spec = specs.document(grid)
    (cell,) = expand.cells(load_spec(spec), spec)
    assert cell.layers == (("a", 0.5),)
    masked = specs.document(grid | {"granularity": "weight", "layers": "a"})
    (cell,) = expand.cells(load_spec(masked), masked)
    assert expand.units_of(cell)["a"] == 6 * 2 * 9


SHAPED = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes, shape):
        super().__init__()
        assert (classes, shape) == (3, (2, 20, 12))
        self.a, self.b = nn.Conv2d(2, 6, 3), nn.Linear(6 * 18 * 10, classes)

    def forward(self, x):
        return self.b(self.a(x).flatten(1))

def load(root):
    images, labels = torch.zeros(9, 2, 20, 12), torch.arange(9) % 3
    return (images, labels), (images, labels)
"""
