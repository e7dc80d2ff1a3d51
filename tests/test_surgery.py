"""Surgery: exactly what was named is removed, and nothing else changes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import MODELS, build_model, input_shape, layer_units
from pruners.candidates import n_removed
from pruners.criteria import own_norms
from pruners.equivalence import LIMIT, PROBE_SAMPLES, equivalence
from pruners.pruners import choose
from pruners.surgery import NothingFell, check_fell, prune

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small networks: several threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
    units = {name: len(model.get_submodule(name).weight) for name in ratios}  # pyright: ignore[reportArgumentType]
    importances = None
    if pruner != "random":
        importances = {name: own_norms(model, name, n)[pruner].needed(name, pruner) for name, n in units.items()}
    return choose(pruner, units, ratios, importances=importances, pruner_seed=seed)


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


def test_a_layer_norm_is_evaluated_on_what_is_kept() -> None:
    """A layer norm over the pruned units: the reference sees the kept ones, and the check still catches surgery."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.LayerNorm(6), torch.nn.Linear(6, 3)).eval()
    probe = torch.randn(PROBE_SAMPLES, 8, generator=torch.Generator().manual_seed(0))
    pruned = prune(model, {"0": (1,)}, probe[:1])
    assert pruned.get_submodule("1").normalized_shape == (5,)
    found = equivalence(model, pruned, {"0": (1,)}, probe)
    assert found.error is not None and found.error <= LIMIT
    with torch.no_grad():
        pruned.get_parameter("1.weight")[0] += 1e-6
    wrong = equivalence(model, pruned, {"0": (1,)}, probe)
    assert wrong.error is not None and wrong.error > LIMIT


def test_statistics_over_groups_are_taken_over_those_left() -> None:
    """Removed units move the others to other groups of a group norm: so they do in the reference, which still catches
    a wrong cut; a number that leaves groups of different sizes is refused."""
    layers = [torch.nn.Conv2d(3, 8, 3), torch.nn.GroupNorm(2, 8), torch.nn.Conv2d(8, 4, 3), torch.nn.Flatten()]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(4, 3)).eval()
    probe = torch.randn(PROBE_SAMPLES, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    pruned = prune(model, {"0": (1, 2)}, probe[:1])
    found = equivalence(model, pruned, {"0": (1, 2)}, probe)
    assert found.error is not None and found.error <= LIMIT
    with torch.no_grad():
        pruned.get_parameter("1.weight")[0] += 1e-6
    wrong = equivalence(model, pruned, {"0": (1, 2)}, probe)
    assert wrong.error is not None and wrong.error > LIMIT
    with pytest.raises(ValueError, match="0: it is coupled to 1, a norm over 2 groups, and 7 channels do not divide"):
        prune(model, {"0": (1,)}, probe[:1])


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


def test_layers_that_cut_one_concatenation_are_cut_together() -> None:
    """What two layers remove of a concatenation is cut at once: the indices are those from before."""

    class Concatenated(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = torch.nn.Conv2d(3, 4, 1), torch.nn.Conv2d(3, 4, 1), torch.nn.Conv2d(8, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(torch.relu(torch.cat([self.a(x), self.b(x)], 1))).flatten(1)

    model, probe = Concatenated().eval(), torch.randn(PROBE_SAMPLES, 3, 2, 2)
    removed = {"a": (0, 2), "b": (1,)}
    pruned = prune(model, removed, probe[:1])
    assert torch.equal(pruned.get_parameter("out.weight"), model.state_dict()["out.weight"][:, [1, 3, 4, 6, 7]])
    found = equivalence(model, pruned, removed, probe)
    assert found.error is not None and found.error <= LIMIT


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        ("grouped", "grouped: it is coupled to the grouped convolution grouped, whose channels"),
        ("before", "before: it is coupled to the grouped convolution grouped"),
        ("last", "last: its units are coupled to the network's output"),
        ("idle", "idle: tracing did not find it"),
    ],
)
def test_layers_that_cannot_lose_units_are_refused(layer: str, why: str) -> None:
    """Grouped convolutions, what they read, the network's output, what is not run: the reason is told."""

    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.grouped = torch.nn.Conv2d(3, 8, 1), torch.nn.Conv2d(8, 8, 1, groups=2)
            self.idle, self.last = torch.nn.Linear(2, 2), torch.nn.Linear(8, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.grouped(self.before(x)).mean((2, 3)))

    with pytest.raises(ValueError, match=why):
        prune(Odd(), {layer: (0,)}, torch.zeros(1, 3, 4, 4))


def test_tracing_leaves_the_network_as_it_was() -> None:
    """Modes of modules, and which parameters are frozen, are the same afterwards; frozen ones are cut too."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Dropout(), torch.nn.Linear(6, 2)).train()
    model[0].requires_grad_(False)
    pruned = prune(model, {"0": (0, 1)}, torch.zeros(1, 4))
    assert all(m.training for m in model.modules())
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]
    assert pruned.get_parameter("2.weight").shape == (2, 4)


def test_a_network_that_did_not_get_smaller_is_told() -> None:
    """Parameters and multiply-adds must both fall."""
    check_fell((10, 100), (9, 99))
    for after in ((10, 99), (9, 100)):
        with pytest.raises(NothingFell, match="the pruned network has"):
            check_fell((10, 100), after)
