"""A minibatch that a batch norm cannot be trained on is refused when a sweep is planned, with sizes that work."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from models import build_model
from orchestrator import minibatches
from orchestrator.errors import UserError
from orchestrator.plan import check
from storage.records import Recipe
from tests import specs
from tests.test_cli_errors import refused, run
from workers.datasets import Split
from workers.rates import planned_epochs, steps_left
from workers.serial import parts_of
from workers.training import minibatches as order_of

NETWORKS = """
import torch
from torch import nn
from torch.nn import functional as F

class Net(nn.Module):
    def __init__(self, classes, shape, norm):
        super().__init__()
        self.conv = nn.Conv2d(shape[0], 8, 3, 2, 1)
        self.norm = norm
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        return self.head(self.norm(self.conv(x).mean((2, 3))))

class Spatial(Net):
    def forward(self, x):
        return self.head(self.norm(self.conv(x).mean((2, 3), keepdim=True)).flatten(1))

class Function(Net):
    def forward(self, x):
        x = self.conv(x).mean((2, 3))
        return self.head(F.batch_norm(x, None, None, training=True) if self.training else x)

class Pair(nn.Module):
    def forward(self, x):
        return x + x[1] if self.training else x

def vector(classes, shape): return Net(classes, shape, nn.BatchNorm1d(8))
def image(classes, shape): return Spatial(classes, shape, nn.BatchNorm2d(8))
def nested(classes, shape): return Net(classes, shape, nn.Sequential(nn.ReLU(), nn.BatchNorm1d(8)))
def function(classes, shape): return Function(classes, shape, nn.Identity())
def pair(classes, shape): return Net(classes, shape, Pair())
def instance(classes, shape): return Spatial(classes, shape, nn.InstanceNorm2d(8, track_running_stats=True))
def early(classes, shape):
    net = Net(classes, shape, nn.Identity())
    net.conv = nn.Sequential(net.conv, nn.BatchNorm2d(8))
    return net

def load(root):
    labels = torch.arange(49) % 2
    images = torch.randn(49, 3, 16, 16)
    return (images[:33], labels[:33]), (images[33:], labels[33:])
"""

ONE = {"epochs": 1, "batch_size": 32, "lr": 0.1}
"""A recipe whose last minibatch of 33 samples has one."""


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module of networks and a data set of 33 samples, another in each test; one thread."""
    name = f"minibatches_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(NETWORKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield name
    torch.set_num_threads(before)


def planned(nets: str, model: str, recipe: dict[str, Any] = ONE, **keys: Any) -> None:
    """What `plan`, `run` and `submit` check before all else, of a network of `nets` (:name) or another."""
    whole = {"dense": recipe, "retrain": specs.TRAINING} | keys
    grid = {
        "model": f"{nets}{model}" if model[0] == ":" else model,
        "dataset": f"{nets}:load",
        "layers": "conv*" if model[0] == ":" else "*",
        "ratio": 0.5,
        "pruner": "l1",
    }
    check(specs.document(grid, **whole))


def message(nets: str, model: str, recipe: dict[str, Any] = ONE, **keys: Any) -> str:
    with pytest.raises(UserError) as error:
        planned(nets, model, recipe, **keys)
    return str(error.value)


recipes = st.builds(
    lambda epochs, batch_size, accumulate, max_steps: Recipe(
        epochs, batch_size, ((0, 0.1),), accumulate=min(accumulate, batch_size), max_steps=max_steps
    ),
    st.integers(1, 3),
    st.integers(1, 40),
    st.integers(1, 8),
    st.none() | st.integers(1, 30),
)


def sizes_of_training(n: int, recipe: Recipe) -> set[int]:
    """The sizes of every forward pass, by the code that trains."""
    found = set[int]()
    for epoch in range(planned_epochs(recipe, n)):
        order = order_of(n, recipe.batch_size, "made", 0, "here")
        for indices in islice(order, steps_left(recipe, n, epoch)):
            batch = Split(torch.zeros(len(indices), 1), torch.zeros(len(indices), dtype=torch.long))
            found |= {len(part) for part, _ in parts_of(batch, recipe.accumulate)}
    return found


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 60), recipes)
def test_sizes_are_those_of_training(n: int, recipe: Recipe) -> None:
    """The sizes that are computed are exactly the sizes that the worker's own loop makes."""
    computed = {
        part for size in minibatches.minibatch_sizes(n, recipe) for part in minibatches.parts(size, recipe.accumulate)
    }
    assert computed == sizes_of_training(n, recipe)
    assert minibatches.leaves_one_alone(n, recipe) == (1 in computed)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=3), recipes)
def test_suggested_sizes_work(sizes: list[int], recipe: Recipe) -> None:
    """No suggested size leaves a sample alone on any data set, and none between it and the asked one would do."""
    assume(any(minibatches.leaves_one_alone(n, recipe) for n in sizes))

    def works(**changed: int) -> bool:
        return all(1 not in sizes_of_training(n, replace(recipe, **changed)) for n in sizes)

    found = minibatches.sizes_that_work(recipe, sizes)
    assert recipe.batch_size not in found and all(b >= recipe.accumulate for b in found)
    assert all(works(batch_size=b) for b in found)
    near = range(max([b for b in found if b < recipe.batch_size], default=recipe.accumulate - 1) + 1, recipe.batch_size)
    assert not any(works(batch_size=b) for b in near if b)
    if lower := minibatches.largest_accumulate(recipe, sizes):
        assert lower < recipe.accumulate and works(accumulate=lower)
    if recipe.accumulate == 1 and min(sizes) > 1:
        assert found


def test_the_batch_norm_is_named_with_sizes_that_work(nets: str) -> None:
    """The message has the place, the numbers and the layer, and each suggested size is accepted."""
    found = message(nets, ":nested")
    assert found.startswith("made.yaml:1:")
    assert found.endswith(
        ": dense.batch_size: 33 training samples in minibatches of 32 leave one of 1 sample, in which the batch norm "
        f"`norm.1` of {nets}:nested sees one value per channel; use a batch_size of 31 or 33"
    )
    for size in (31, 33):
        planned(nets, ":nested", ONE | {"batch_size": size})


@pytest.mark.parametrize("model", ["vgg11", "timm/resnet10t", "torchvision/resnet18", ":vector", ":image"])
def test_a_network_of_any_kind_is_refused(nets: str, model: str) -> None:
    """Built-in networks and a library's see one value per channel of images of 16x16, as one's own may."""
    assert "33 training samples in minibatches of 32" in (found := message(nets, model))
    assert "sees one value per channel" in found


@pytest.mark.parametrize("model", ["resnet20", "timm/vit_tiny_patch16_224?img_size=16&patch_size=4", ":early"])
def test_one_sample_is_enough_for_others(nets: str, model: str) -> None:
    """A batch norm over more than one pixel, and a network without one, are trained on one sample."""
    network = build_model(model.replace(":", f"{nets}:"), 2, (3, 16, 16)).train()
    assert network(torch.randn(1, 3, 16, 16)).shape == (1, 2)
    planned(nets, model, specs.TRAINING | {"batch_size": 1}, retrain=ONE)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (":function", "in which {}:function fails: ValueError: Expected more than 1 value per channel"),
        (":pair", "`norm` (Pair) of {}:pair fails: IndexError: index 1 is out of bounds"),
    ],
)
def test_other_layers_fail_with_their_own_reason(nets: str, model: str, why: str) -> None:
    """What is no batch norm but cannot be trained on one sample either is refused with its own error."""
    found = message(nets, model)
    assert why.format(nets) in found and found.endswith("use a batch_size of 31 or 33")


def test_an_instance_norm_is_not_about_the_batch_size(nets: str) -> None:
    """Over one pixel it fails with any batch size: the message has that reason, and no size."""
    found = message(nets, ":instance")
    assert f"grid.model: in training on samples of 3x16x16, `norm` (InstanceNorm2d) of {nets}:instance fails: " in found
    assert "Expected more than 1 spatial element" in found and "batch_size" not in found


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"batch_size": 1}, "dense.batch_size: batch_size 1 makes minibatches of 1 sample from 33 training samples"),
        ({"batch_size": 1}, "use a batch_size of 3"),
        (
            {"batch_size": 33, "accumulate": 33},
            "dense.accumulate: accumulate 33 makes a part of 1 sample of a minibatch",
        ),
        ({"batch_size": 33, "accumulate": 17}, "use accumulate 16"),
        ({"batch_size": 30, "accumulate": 2}, "of a minibatch of 3, in which"),
        ({"batch_size": 30, "accumulate": 2}, "use a batch_size of 29 or 33, or accumulate 1"),
    ],
)
def test_parts_of_minibatches(nets: str, recipe: dict[str, int], said: str) -> None:
    """A minibatch of one sample, and one that accumulate divides into parts of one, are told apart."""
    assert said in message(nets, ":vector", ONE | recipe)


def test_only_what_training_sees_counts(nets: str) -> None:
    """Neither a minibatch beyond max_steps, nor samples held out, nor a recipe without epochs."""
    planned(nets, ":vector", ONE | {"max_steps": 1})
    assert "dense.batch_size" in message(nets, ":vector", ONE | {"max_steps": 2})
    planned(nets, ":vector", validation=0.1)
    assert "29 training samples in minibatches of 28" in message(
        nets, ":vector", ONE | {"batch_size": 28}, validation=0.13
    )
    planned(nets, "torchvision/resnet18", {"weights": "library"})
    assert "dense.batch_size" in message(nets, "torchvision/resnet18", ONE | {"weights": "library"})
    planned(nets, ":vector", resources={"processes": 2})  # their batch norms take statistics over both


def test_every_recipe_and_data_set_is_looked_at(nets: str) -> None:
    """Recipes in a list are told by their place, and a suggested size is right for each data set of the grid."""
    recipes = [specs.TRAINING, specs.TRAINING, ONE]
    grid = {"model": f"{nets}:vector", "dataset": [f"{nets}:load", "synthetic"], "layers": "conv", "ratio": 0.5}
    whole = specs.document(grid | {"pruner": "l1"}, dense=specs.TRAINING, retrain=recipes)
    with pytest.raises(UserError, match=r"retrain\.2\.batch_size: 33 training .*; use a batch_size of 31 or 33"):
        check(whole)
    whole.override("retrain.2.batch_size=16")  # 512 samples in minibatches of 7 leave one: 8 is the nearest
    with pytest.raises(UserError, match=r"--set retrain\.2\.batch_size=16: .* use a batch_size of 15 or 17"):
        check(whole)
    whole.override("retrain.2.batch_size=8")
    with pytest.raises(UserError, match=r"minibatches of 8 .* use a batch_size of 6 or 9"):
        check(whole)


def test_the_random_state_is_left_alone(nets: str) -> None:
    before = torch.random.get_rng_state()
    message(nets, ":vector")
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    "command", ["plan spec.yaml", "run spec.yaml --inline", "submit spec.yaml --address http://h:1"]
)
def test_nothing_is_written(nets: str, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each command that plans ends with exit code 2 and the place in the file; the changed spec is accepted."""
    recipe = "{epochs: 1, batch_size: 32, lr: 0.1}"
    grid = f"  model: {nets}:vector\n  dataset: {nets}:load\n  layers: conv\n  ratio: 0.5\n  pruner: l1\n"
    Path("spec.yaml").write_text(f"name: one\ngrid:\n{grid}dense: {recipe}\nretrain: {recipe.replace('32', '31')}\n")
    assert run("plan", "spec.yaml", "--set", "dense.batch_size=31") == 0
    capsys.readouterr()
    said = refused(capsys, 2, *command.split())
    assert said.splitlines()[-1].startswith("prunesweep: spec.yaml:8:20: dense.batch_size: 33 training samples in")
