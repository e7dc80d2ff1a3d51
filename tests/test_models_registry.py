"""What the registry says of a network without torch is what torch builds."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from models.cifar import Block
from models.registry import (
    MLP,
    MODELS,
    LeNet5,
    ResNet,
    architecture,
    build_model,
    check_model,
    input_shape,
    layer_units,
)


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
    shape = input_shape(name) or (3, 16, 16)
    model = build_model(name, 7, shape).eval()
    ran = weight_layers(model, torch.zeros(2, *shape))
    prunable = [layer for layer in ran[:-1] if not isinstance(architecture(name), ResNet) or is_first(layer[0])]
    assert list(layer_units(name).items()) == prunable
    assert ran[-1] == (architecture(name).classifier, 7)


def is_first(layer: str) -> bool:
    """Whether it is the first convolution of a block of a CIFAR ResNet."""
    return layer.startswith("layer") and layer.endswith("conv1")


@pytest.mark.parametrize(
    ("name", "layers", "prunable", "parameters"),
    [
        ("resnet20", 20, 9, 269_722),
        ("resnet56", 56, 27, 853_018),
        ("resnet110", 110, 54, 1_727_962),
        ("vgg11", 9, 8, 9_228_362),
        ("vgg19", 17, 16, 20_035_018),
    ],
)
def test_networks_for_cifar_are_those_of_the_papers(name: str, layers: int, prunable: int, parameters: int) -> None:
    """Depth and parameters are those published: 0.27, 0.85 and 1.7 million (ResNets), 20 million (vgg19); an option-A
    shortcut adds none."""
    model = build_model(name, 10, (3, 32, 32))
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules()) == layers
    assert len(layer_units(name)) == prunable
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_option_a_shortcuts_slice_and_pad() -> None:
    """With its convolutions at zero a block passes on every second pixel, between channels of zeros."""
    block = Block(4, 8, stride=2).eval()
    with torch.no_grad():
        block.conv2.weight.zero_()
    x = torch.rand(2, 4, 6, 6)
    y = block(x)
    assert torch.equal(y[:, 2:6], x[:, :, ::2, ::2])
    assert not y[:, :2].any() and not y[:, 6:].any()


def test_lenet5_mini_is_the_papers() -> None:
    """The network that 84 % of the reference trainings use has its 5,500 parameters."""
    shapes = {
        name: tuple(weight.shape) for name, weight in build_model("lenet5_mini", 10, (1, 32, 32)).named_parameters()
    }
    assert sum(p.numel() for p in build_model("lenet5_mini", 10, (1, 32, 32)).parameters()) == 5500
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
    assert sum(p.numel() for p in build_model("lenet5", 10, (1, 32, 32)).parameters()) == 61_706


@pytest.mark.parametrize("name", [name for name, found in MODELS.items() if isinstance(found, LeNet5 | MLP)])
def test_only_the_linear_ones_are_linear(name: str) -> None:
    """A network called linear has no activation; every other one has."""
    model = build_model(name, 10, (1, 32, 32)).double().eval()
    found = architecture(name)
    # Constant weights and inputs: every position is equal, so that max-pooling bends nothing.
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.01)
    x = torch.ones(1, 1, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        bend = (model(x) + model(-x) - 2 * model(0 * x)).abs().max() / model(x).abs().max()
    assert isinstance(found, LeNet5 | MLP)
    assert (bend < 1e-9) == found.linear == ("linear" in name)


def test_an_unknown_name_is_told_the_known_ones() -> None:
    """The message for a misspelt model says which there are, and the nearest."""
    for lookup in (check_model, layer_units, input_shape, lambda name: build_model(name, 10, (1, 32, 32))):
        with pytest.raises(ValueError, match=r"unknown model 'lenet6'; .*lenet5, .*mlp_50_linear.* mean lenet5\?"):
            lookup("lenet6")


def test_a_network_is_not_built_for_data_of_another_shape() -> None:
    """LeNets have one input shape; the message names both."""
    with pytest.raises(ValueError, match="lenet5 takes inputs of 1x32x32, not 3x32x32"):
        build_model("lenet5", 10, (3, 32, 32))
