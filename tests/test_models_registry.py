"""What the registry says of a network without torch is what torch builds."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from models.registry import MLP, MODELS, LeNet5, architecture, build_model, input_shape, layer_units


def weight_layers(model: nn.Module, x: torch.Tensor) -> list[tuple[str, int]]:
    """(name, units) of every convolution and fully connected layer, in the order they are run."""
    found: list[tuple[str, int]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            layer = (name, module.weight.shape[0])
            module.register_forward_hook(lambda *_, layer=layer: found.append(layer))
    model(x)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_layer_table_is_that_of_the_network(name: str) -> None:
    """Plans are made from the table: its names, units and order are the real ones, classifier left out."""
    model = build_model(name, classes=7).eval()
    ran = weight_layers(model, torch.zeros(2, *input_shape(name)))
    assert list(layer_units(name).items()) == ran[:-1]
    assert ran[-1] == (architecture(name).classifier, 7)


def test_lenet5_mini_is_the_papers() -> None:
    """The network that 84 % of the reference trainings use has its 5,500 parameters."""
    shapes = {name: tuple(weight.shape) for name, weight in build_model("lenet5_mini", 10).named_parameters()}
    assert sum(p.numel() for p in build_model("lenet5_mini", 10).parameters()) == 5500
    assert [shapes[f"{layer}.weight"] for layer in ("conv1", "conv2", "conv3", "fc1", "fc2")] == [
        (10, 1, 5, 5),
        (10, 10, 5, 5),
        (10, 10, 5, 5),
        (10, 10),
        (10, 10),
    ]


@pytest.mark.parametrize("name", [name for name in MODELS if re.search(r"_[wd]\d+$", name)])
def test_variants_are_what_they_are_called(name: str) -> None:
    """`_wN` has N filters in conv1, `_dN` has N layers in all, and nothing else differs."""
    kind, n = name[len("lenet5_mini_")], int(name[len("lenet5_mini_") + 1 :])
    usual = layer_units("lenet5_mini")
    if kind == "w":
        assert layer_units(name) == usual | {"conv1": n}
    else:
        assert len(layer_units(name)) + 1 == n
        assert set(layer_units(name).values()) == {10}


def test_lenet5_is_the_papers() -> None:
    """lenet5 has 6, 16 and 120 filters, then 84 units, and its 61,706 parameters."""
    assert list(layer_units("lenet5").values()) == [6, 16, 120, 84]
    assert sum(p.numel() for p in build_model("lenet5", 10).parameters()) == 61_706


@pytest.mark.parametrize("name", MODELS)
def test_only_the_linear_ones_are_linear(name: str) -> None:
    """A network called linear has no activation; every other one has."""
    model = build_model(name, 10).double().eval()
    found = architecture(name)
    # Constant weights and inputs: every position is equal, so that max-pooling bends nothing.
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.01)
    channels, height, width = input_shape(name)
    x = torch.ones(1, channels, height, width, dtype=torch.float64)
    with torch.no_grad():
        bend = (model(x) + model(-x) - 2 * model(0 * x)).abs().max() / model(x).abs().max()
    assert isinstance(found, LeNet5 | MLP)
    assert (bend < 1e-9) == found.linear == ("linear" in name)


def test_an_unknown_name_is_told_the_known_ones() -> None:
    """The message for a misspelt model says which there are."""
    for lookup in (layer_units, input_shape, lambda name: build_model(name, 10)):
        with pytest.raises(KeyError, match=r"no model lenet6; there are lenet5, .*mlp_50_linear"):
            lookup("lenet6")
