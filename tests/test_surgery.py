"""Surgery: exactly what was named is removed, and nothing else changes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import MODELS, build_model, input_shape, layer_units
from pruners.candidates import n_removed
from pruners.equivalence import LIMIT, PROBE_SAMPLES, equivalence
from pruners.pruners import choose
from pruners.surgery import prune

if TYPE_CHECKING:
    from torch import nn


def dense(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A network with fixed random weights, and a probe batch."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = input_shape(name) or (3, 16, 16)
        model, probe = build_model(name, 10, shape), torch.randn(PROBE_SAMPLES, *shape)
        model(probe)  # running statistics that differ by channel
        return model.eval(), probe


def removed_from(
    model: nn.Module, ratios: dict[str, float], pruner: str = "random", seed: int = 0
) -> dict[str, tuple[int, ...]]:
    weights = {name: model.get_submodule(name).weight.detach() for name in ratios}  # pyright: ignore[reportCallIssue]
    return choose(pruner, weights, ratios, pruner_seed=seed)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("resnet110", "vgg19", "vgg16", "vgg13")])
def test_compact_equals_masked_for_every_model(name: str) -> None:
    """All layers pruned at once: the compact network is the dense one with its units silenced."""
    model, probe = dense(name)
    removed = removed_from(model, dict.fromkeys(layer_units(name), 0.3))
    pruned = prune(model, removed, probe[:1])
    found = equivalence(model, pruned, removed, probe)
    assert found.error is not None and found.error <= LIMIT
    for layer, n in layer_units(name).items():
        assert len(pruned.get_submodule(layer).weight) == n - n_removed(n, 0.3)  # pyright: ignore[reportArgumentType]


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(["lenet5_mini", "lenet5", "lenet5_mini_d6", "mlp_7"]),
    ratio=st.floats(0.2, 0.8),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
def test_any_layers_any_ratio(name: str, ratio: float, seed: int, data: st.DataObject) -> None:
    """Any subset of layers, any ratio, any candidate: floor(n * r) units go and the rest computes the same."""
    layers = data.draw(st.sets(st.sampled_from(sorted(layer_units(name))), min_size=1))
    model, probe = dense(name)
    removed = removed_from(model, {layer: ratio for layer in layer_units(name) if layer in layers}, seed=seed)
    assert {layer: len(units) for layer, units in removed.items()} == {
        layer: n_removed(layer_units(name)[layer], ratio) for layer in layers
    }
    found = equivalence(model, prune(model, removed, probe[:1]), removed, probe)
    assert found.error is not None and found.error <= LIMIT


def test_surviving_weights_are_the_dense_ones() -> None:
    """conv1 without filters 2 and 5: its rows and conv2's input channels are cut there, by hand."""
    model, probe = dense("lenet5_mini")
    pruned = prune(model, {"conv1": (2, 5)}, probe[:1])
    kept = [i for i in range(10) if i not in (2, 5)]
    state, cut = model.state_dict(), pruned.state_dict()
    assert torch.equal(cut["conv1.weight"], state["conv1.weight"][kept])
    assert torch.equal(cut["conv1.bias"], state["conv1.bias"][kept])
    assert torch.equal(cut["conv2.weight"], state["conv2.weight"][:, kept])
    for name in ("conv2.bias", "conv3.weight", "conv3.bias", "fc1.weight", "fc2.weight", "fc2.bias"):
        assert torch.equal(cut[name], state[name])


def test_flattened_channels_are_cut_in_the_first_fully_connected_layer() -> None:
    """A channel of 3 x 3 positions takes nine inputs of the layer behind the flattening with it."""
    model, probe = dense("lenet5_wider_linear_nomaxpool")
    pruned = prune(model, {"conv3": (0, 99)}, probe[:1])
    expected = model.state_dict()["fc1.weight"][:, 9:-9]
    assert torch.equal(pruned.state_dict()["fc1.weight"], expected)


def test_dense_is_untouched() -> None:
    """Pruning works on a copy."""
    model, probe = dense("lenet5_mini")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    prune(model, {"conv1": (0,), "fc1": (3,)}, probe[:1])
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_released_propagation_keeps_the_l1_inputs() -> None:
    """`released`: conv1 keeps what the candidate says, conv2's inputs what L1 would keep."""
    model, probe = dense("lenet5_mini")
    l1 = removed_from(model, {"conv1": 0.2}, "l1")
    candidate = {"conv1": tuple(i for i in range(10) if i not in l1["conv1"])[:2]}
    pruned = prune(model, candidate, probe[:1], propagation="released", l1_removed=l1)
    state, cut = model.state_dict(), pruned.state_dict()
    own, by_l1 = ([i for i in range(10) if i not in gone["conv1"]] for gone in (candidate, l1))
    assert torch.equal(cut["conv1.weight"], state["conv1.weight"][own])
    assert torch.equal(cut["conv2.weight"], state["conv2.weight"][:, by_l1])
    error = equivalence(model, pruned, candidate, probe).error
    assert error is not None and error > 1e-3


def test_released_equals_exact_for_the_l1_candidate() -> None:
    """Where the candidate is the L1 set, the two propagations are the same network."""
    model, probe = dense("lenet5_mini")
    l1 = removed_from(model, {"conv1": 0.3, "conv3": 0.3}, "l1")
    exact = prune(model, l1, probe[:1])
    released = prune(model, l1, probe[:1], propagation="released", l1_removed=l1)
    assert all(torch.equal(t, released.state_dict()[name]) for name, t in exact.state_dict().items())


@pytest.mark.parametrize("wrong", ["weight", "channel", "bias"])
def test_the_check_catches_wrong_surgery(wrong: str) -> None:
    """One weight off by 1e-6, two channels swapped, one bias lost: the difference is above the limit."""
    model, probe = dense("lenet5_mini")
    removed = {"conv1": (2, 5)}
    pruned = prune(model, removed, probe[:1])
    with torch.no_grad():
        if wrong == "weight":
            pruned.get_parameter("conv2.weight")[0, 0, 0, 0] += 1e-6
        elif wrong == "channel":
            pruned.get_parameter("conv1.weight")[[0, 1]] = pruned.get_parameter("conv1.weight")[[1, 0]]
        else:
            pruned.get_parameter("conv1.bias")[0] = 0
    error = equivalence(model, pruned, removed, probe).error
    assert error is not None and error > LIMIT


def test_statistics_over_removed_units_have_no_reference() -> None:
    """A layer norm over the pruned units: no error is made up, the reason is given."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.LayerNorm(6), torch.nn.Linear(6, 3)).eval()
    probe = torch.randn(PROBE_SAMPLES, 8, generator=torch.Generator().manual_seed(0))
    pruned = prune(model, {"0": (1,)}, probe[:1])
    found = equivalence(model, pruned, {"0": (1,)}, probe)
    assert found.error is None and found.reason == "1 takes statistics over the removed units"


def test_batch_norm_is_cut_with_its_convolution() -> None:
    """Running statistics, scale and shift go with the filters, and the check sees it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [torch.nn.Conv2d(1, 6, 3), torch.nn.BatchNorm2d(6), torch.nn.ReLU(), torch.nn.Conv2d(6, 4, 3)]
        model = torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(4 * 16, 3))
        probe = torch.randn(PROBE_SAMPLES, 1, 8, 8)
        model.train()(torch.randn(32, 1, 8, 8))  # running statistics that differ by channel
    model.eval()
    pruned = prune(model, {"0": (0, 4)}, probe[:1])
    assert torch.equal(pruned.state_dict()["1.running_mean"], model.state_dict()["1.running_mean"][[1, 2, 3, 5]])
    found = equivalence(model, pruned, {"0": (0, 4)}, probe)
    assert found.error is not None and found.error <= LIMIT


def test_layers_that_share_channels_are_refused() -> None:
    """Two summed branches have the same channels: pruning both by different candidates is no candidate."""

    class Sum(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = torch.nn.Linear(4, 6), torch.nn.Linear(4, 6), torch.nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(torch.relu(self.a(x) + self.b(x)))

    with pytest.raises(ValueError, match="same channels"):
        prune(Sum(), {"a": (0,), "b": (1,)}, torch.zeros(1, 4))
