"""What ids stand for by content: a task is never run with other code or weights than it was planned with."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from models import build_model
from storage.records import Dense, Recipe
from storage.store import Store
from tests.test_interrupt import in_process
from workers import dense as dense_models
from workers.datasets import Changed
from workers.dense import starting_model

NETWORK = """
from torch import nn

def build(classes, shape):
    return nn.Sequential(
        nn.Conv2d(shape[0], 6, 5, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, classes)
    )
"""
CRITERION = """
def importance(model, layer, images, labels):
    return model.get_submodule(layer).weight.flatten(1).abs().sum(1)
"""
SPEC = """
name: own
grid: {{model: "{model}", dataset: synthetic, layers: "{layer}", ratio: 0.5, pruner: "{pruner}", seed: 0}}
dense:   {{epochs: 1, batch_size: 256, lr: 0.05}}
retrain: {{epochs: 1, batch_size: 256, lr: 0.05}}
"""


@pytest.mark.parametrize("what", ["network", "criterion"])
def test_edited_code_does_not_run_under_old_ids(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """After an edit `resume` refuses and says so; `run` has tasks of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    module = f"changed_{what}"
    text = NETWORK if what == "network" else CRITERION
    Path(f"{module}.py").write_text(text)
    network = {"model": f"{module}:build", "layer": "0", "pruner": "l1"}
    criterion = {"model": "lenet5_mini", "layer": "conv1", "pruner": f"{module}:importance"}
    Path("own.yaml").write_text(SPEC.format(**(network if what == "network" else criterion)))
    assert in_process(capsys, "run", "own.yaml", "--inline")[0] == 0
    for file in Path("results/rows").iterdir():
        file.unlink()
    Path(f"{module}.py").write_text(text + "\n# another one\n")
    code, _, said = in_process(capsys, "resume", "own", "--inline")
    assert code == 3 and f"{module}:" in said + _errors() and "another one here than where" in said + _errors()
    assert Store("results").sql("select count(*) from rows where status = 'done'").fetchall() == [(0,)]
    assert in_process(capsys, "run", "own.yaml", "--inline")[0] == 0


def _errors() -> str:
    return str(Store("results").sql("select error from rows").fetchall())


def test_an_edited_file_of_weights_is_not_a_planned_one(tmp_path: Path) -> None:
    """Its content is looked at again before it is loaded."""
    path = tmp_path / "given.safetensors"
    save_file(dict(build_model("lenet5_mini", 10, (1, 32, 32)).state_dict()), path)
    recipe = Recipe(0, 1, ((0, 1.0),), seed=0, weights=str(path))
    with pytest.raises(Changed, match="is another one here"):
        starting_model(Dense("lenet5_mini", "synthetic", recipe, content=(("weights", "0" * 16),)))


def test_what_a_library_draws_beside_its_weights_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A classifier for another number of classes is drawn as weights are loaded: by the dense seed alone."""

    def drawing(model: torch.nn.Module, *_: str) -> None:
        with torch.no_grad():
            model.get_submodule("fc2").get_parameter("weight").normal_()

    monkeypatch.setattr(dense_models, "load_weights", drawing)
    found = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(noise)
        dense = Dense("lenet5_mini", "synthetic", Recipe(1, 8, ((0, 0.1),), seed=seed, weights="library"))
        found.append(starting_model(dense).get_submodule("fc2").get_parameter("weight"))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
