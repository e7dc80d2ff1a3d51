"""Preflight and docs/support.md: what cannot be pruned is refused before anything is spent, with the reason."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from models.registry import layer_units
from orchestrator.cli import main
from orchestrator.preflight import Subject, all_layers, preflight, problems_of
from orchestrator.support import COLUMNS, Finding, findings, names_of, page
from storage.records import Cell, Dense, Recipe

if TYPE_CHECKING:
    from collections.abc import Iterator

NETWORKS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes, kind):
        super().__init__()
        self.kind = kind
        self.first = nn.Conv2d(1, 8, 3, stride=4)
        self.grouped = nn.Conv2d(8, 8, 1, groups=2 if kind == "grouped" else 1)
        self.fc = nn.Linear(8, classes + (kind == "classes"))

    def forward(self, x):
        x = self.grouped(self.first(x)).relu().mean((2, 3))
        if self.kind == "random":
            x = x + torch.randn_like(x)
        if self.kind == "fixed":
            x = x.reshape(-1, 8)
        x = self.fc(x)
        return {"logits": x} if self.kind == "mapping" else x

def good(classes): return Net(classes, "")
def grouped(classes): return Net(classes, "grouped")
def random(classes): return Net(classes, "random")
def fixed(classes): return Net(classes, "fixed")
def mapping(classes): return Net(classes, "mapping")
def classes(classes): return Net(classes, "classes")
def colour(classes): return nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.Flatten(), nn.Linear(8 * 64, classes))
"""


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module of networks in the working directory, another in each test; one thread."""
    name = f"nets_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(NETWORKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield name
    torch.set_num_threads(before)


def cell(model: str, layers: dict[str, float], *, granularity: str = "filter", weights: str | None = None) -> Cell:
    recipe = Recipe(1, 64, ((0, 0.1),))
    dense = Dense(model, "synthetic", Recipe(1, 64, ((0, 0.1),), seed=0, weights=weights))
    return Cell(dense, tuple(layers.items()), "l1", recipe, granularity=granularity)


def test_a_good_network_passes_once(nets: str) -> None:
    """No problem; the second time it is not tried, until its code has changed."""
    wanted = [cell(f"{nets}:good", {"first": 0.5})]
    assert preflight(wanted, None) == []
    notes = lambda: len(list(passed().glob("*")))  # noqa: E731
    assert notes() == 1
    assert preflight(wanted, None) == [] and notes() == 1
    assert preflight([cell(f"{nets}:good", {"first": 0.25, "grouped": 0.5})], None) == [] and notes() == 2


def passed() -> Path:
    """Where preflight keeps what has passed."""
    return Path(os.environ["XDG_CACHE_HOME"]) / "prunesweep" / "preflight"


@pytest.mark.parametrize(
    ("build", "layers", "said"),
    [
        ("grouped", {"first": 0.5}, "pruning first by 0.5: first: it is coupled to the grouped convolution grouped"),
        ("random", {"first": 0.5}, "its forward pass is not deterministic in eval mode"),
        ("fixed", {"grouped": 0.5}, "pruning grouped by 0.5: it cannot be"),
        ("mapping", {"first": 0.5}, r"its output is a dict; it must be a tensor \[N, 10\]"),
        ("classes", {"first": 0.5}, r"for 2 samples its output is \[2, 11\]; it must be"),
        ("colour", {"0": 0.5}, "it cannot be run on inputs of 1x32x32: RuntimeError"),
        ("good", {"second": 0.5}, "it has no layer second"),
        ("good", {"fc": 0.5}, "coupled to the network's output"),
        ("missing", {"first": 0.5}, "has no missing; it has"),
    ],
)
def test_a_network_that_cannot_be_pruned_is_refused(nets: str, build: str, layers: dict[str, float], said: str) -> None:
    """Each problem names the model, the layers where it is about them, and the reason."""
    (problem,) = preflight([cell(f"{nets}:{build}", layers)], None)
    assert problem.startswith(f"{nets}:{build}: ")
    assert re.search(said, problem), problem


FIVE = [
    "torchvision/mnasnet0_5",  # its weights load only with a version, which files of tensors do not keep
    "torchvision/shufflenet_v2_x0_5",  # some of its layers cannot be pruned
    "timm/resnet10t",
    "timm/vit_tiny_patch16_224?patch_size=8&embed_dim=48&depth=2&num_heads=4",
    "timm/convnext_atto?depths=[1,1,1,1]",
]


@pytest.mark.parametrize("name", FIVE)
def test_networks_of_five_kinds_go_all_the_way(nets: str, name: str) -> None:
    """Built, saved, loaded, pruned in every layer, trained by a step, evaluated, kept and loaded again."""
    layers = all_layers(name, 0.25, 10, (3, 32, 32))
    wanted = cell(name, dict(layers))
    subject = Subject(name, 10, (3, 32, 32), None, ((wanted.layers, "filter"),))
    assert list(problems_of(subject)) == []
    assert len(layers) > 3


def test_state_outside_of_the_state_dict_is_found(nets: str) -> None:
    """A network that draws a part of itself anew each time it is built computes something else once it is loaded."""
    with Path(f"{nets}.py").open("a") as file:
        file.write("""
class Outside(Net):
    def __init__(self, classes):
        super().__init__(classes, "")
        self.scale = torch.rand(1)

    def forward(self, x):
        return super().forward(x) * self.scale
""")
    (problem,) = preflight([cell(f"{nets}:Outside", {"first": 0.5})], None)
    assert "some of its state is not in its state dict" in problem


def test_weights_that_share_memory_or_carry_masks_are_refused(nets: str) -> None:
    """Two Parameters over one memory would drift apart in a copy; a mask of torch's own would be taken for ours."""
    with Path(f"{nets}.py").open("a") as file:
        file.write("""
from torch.nn.utils import prune

def made():
    layers = [nn.Conv2d(1, 8, 4, 4), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(512, 10))

def memory(classes):
    net = made()
    net[2].weight = nn.Parameter(net[1].weight)
    return net

def masked(classes):
    net = made()
    prune.l1_unstructured(net[1], "weight", 0.3)
    return net
""")
    (problem,) = preflight([cell(f"{nets}:memory", {"0": 0.5})], None)
    assert "1.weight and 2.weight are two Parameters that share memory" in problem
    (problem,) = preflight([cell(f"{nets}:masked", {"2": 0.5})], None)
    assert "1: it carries a mask of torch.nn.utils.prune" in problem


def test_masks_of_a_shared_weight_are_refused(nets: str) -> None:
    """A mask in one layer would have no effect in the other: both are named."""
    with Path(f"{nets}.py").open("a") as file:
        file.write("""
def tied(classes):
    layers = [nn.Conv2d(1, 8, 4, 4), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Flatten()]
    made = nn.Sequential(*layers, nn.Linear(512, classes))
    made[2].weight = made[1].weight
    return made
""")
    (problem,) = preflight([cell(f"{nets}:tied", {"2": 0.5}, granularity="weight")], None)
    assert "2: its weight is also that of 1" in problem


def test_built_in_networks_are_not_tried_but_their_weights_are(tmp_path: Path, nets: str) -> None:
    """lenet5_mini passes without torch's help; with a file of another network's weights it does not."""
    from safetensors.torch import save_file

    assert preflight([cell("lenet5_mini", {"conv1": 0.5})], None) == []
    assert not passed().exists()
    save_file({"conv1.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    wrong = cell("lenet5_mini", {"conv1": 0.5}, weights=str(tmp_path / "other.safetensors"))
    (problem,) = preflight([wrong], None)
    assert problem.startswith("lenet5_mini: ") and "other.safetensors does not fit the network" in problem


def test_a_criterion_that_cannot_be_called_is_refused(nets: str) -> None:
    """Of a user's own criterion the module is imported, and the function looked for."""
    one = cell("lenet5_mini", {"conv1": 0.5})
    for name, said in ((f"{nets}:nosuch", "has no nosuch; it has"), (f"{nets}:torch", "is no function")):
        (problem,) = preflight([replace(one, pruner=name)], None)
        assert said in problem
    assert preflight([replace(one, pruner=f"{nets}:good")], None) == []


def test_masks_need_weights(nets: str) -> None:
    """With granularity weight an attention block, whose units are heads, has nothing to mask."""
    vit = "timm/vit_tiny_patch16_224?patch_size=8&embed_dim=48&depth=2&num_heads=4"
    (problem,) = preflight([cell(vit, {"blocks.0.attn": 0.5}, granularity="weight")], None)
    assert "blocks.0.attn has no weights of its own to mask" in problem
    assert preflight([cell(vit, {"blocks.0.mlp.fc1": 0.5}, granularity="weight")], None) == []


def test_run_and_plan_refuse_it_with_exit_code_2(tmp_path: Path, nets: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`run` and `plan --preflight` exit 2 with the message; nothing is written, and `plan` alone does not look."""
    spec = {
        "name": "refused",
        "grid": {"model": f"{nets}:random", "dataset": "synthetic", "layers": "first", "ratio": 0.5, "pruner": "l1"},
        "dense": {"epochs": 1, "batch_size": 64, "lr": 0.1},
        "retrain": {"epochs": 1, "batch_size": 64, "lr": 0.1},
    }
    (tmp_path / "spec.yaml").write_text(json.dumps(spec))
    for command in (["run", "spec.yaml", "--inline"], ["plan", "spec.yaml", "--preflight"]):
        code, err = ended(capsys, *command, "--store", "store")
        assert code == 2 and "Traceback" not in err
        assert f"{nets}:random: its forward pass is not deterministic in eval mode" in err
    assert not (tmp_path / "store").exists()
    assert ended(capsys, "plan", "spec.yaml", "--store", "store")[0] == 0


def ended(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit code and stderr of a command in this process."""
    with pytest.raises(SystemExit) as done:
        main(list(arguments))
    return int(str(done.value.code)), capsys.readouterr().err


def test_doctor_tries_networks_by_name(nets: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit 2 where one cannot be pruned at all; a name that there is not is refused at once."""
    code, err = ended(capsys, "doctor", "--models", f"lenet5_mini,{nets}:random")
    assert code == 2 and "lenet5_mini: passes" in err and f"{nets}:random: fails" in err
    code, err = ended(capsys, "doctor", "--models", "timm/none")
    assert code == 2 and "timm has no classifier 'none'" in err


# -- docs/support.md ---------------------------------------------------------------------------------


def test_the_table_is_what_the_command_writes() -> None:
    """docs/support.md has the page's words and columns, all of torchvision, 40 families of timm, and no network that
    was tried is larger than it says."""
    text = (Path(__file__).parents[1] / "docs" / "support.md").read_text()
    assert "prunesweep doctor --models all -f markdown" in text
    lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:1] == "|"]
    head, _, *rows = lines
    assert tuple(head) == COLUMNS
    tried = {row[0]: row for row in rows}
    assert set(names_of(["all"])) == set(tried)
    assert all(float(row[1]) > 100 for row in rows if row[4] == "not tried")
    families = [row for row in rows if row[0].startswith("timm/") and row[4] in ("passes", "partly")]
    assert len(families) >= 40


def test_two_of_its_networks_are_tried_again(nets: str) -> None:
    """What the table says of two small networks comes out again; a name that is not there fails with the reason."""
    names = ["torchvision/squeezenet1_1", "timm/resnet10t", "timm/none"]
    one, two, none = findings(names, seconds=240)
    assert (one.result, two.result, none.result) == ("passes", "passes", "fails")
    assert one.layers == len(layer_units("torchvision/squeezenet1_1")) == len(all_layers(one.network, 0.25))
    assert "timm has no classifier 'none'" in none.remark
    assert f"| {one.network} " in page([one, Finding("x|y", remark="a|b")]) and "x\\|y" in page([Finding("x|y")])
