"""Coupled channels: which go together, which cannot go, and that what goes is what was asked for."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from models.discovery import prunable_of
from models.layers import Layers
from pruners.coupling import Graph, traced
from pruners.equivalence import LIMIT, PROBE_SAMPLES, equivalence
from pruners.surgery import WrongCut, check_removed, prune
from tests import unusual_networks
from workers.worker import count

SHAPE = (1, 32, 32)


@dataclass(frozen=True)
class Expected:
    """What can be pruned of a network: layer -> (units, channels of each); layer -> a part of why it is refused."""

    units: dict[str, tuple[int, int]]
    refused: dict[str, str] = field(default_factory=dict)


PLAIN_B = {"b": (12, 1)}

EXPECTED = {
    "Chunk": Expected({"a": (8, 2)} | PLAIN_B),
    "Glu": Expected({"a": (8, 2)} | PLAIN_B),
    "Maximum": Expected({"a": (8, 2)} | PLAIN_B),
    "EvenOdd": Expected({"a": (8, 2)} | PLAIN_B),
    "Maxout": Expected({"a": (8, 3)} | PLAIN_B),
    "Mirrored": Expected({"a": (4, 2)} | PLAIN_B),
    "FixedSlices": Expected(PLAIN_B, {"a": "divides its channels at fixed places"}),
    "FixedPart": Expected({"part": (4, 1)} | PLAIN_B, {"a": "at fixed places: without some of them it cannot be run"}),
    "ChannelShuffle": Expected(PLAIN_B, {"a": "a reshape divides its channels into 2 x 8"}),
    "PixelShuffle": Expected(PLAIN_B, {"a": "its units go through pixel_shuffle"}),
    "OneChannelMap": Expected({"a": (16, 1)} | PLAIN_B),
    "Cbam": Expected({"a": (16, 1), "squeeze": (4, 1)} | PLAIN_B),
    "Norms": Expected({"a": (16, 1)} | PLAIN_B),
    "Statistics": Expected({"a": (16, 1)} | PLAIN_B),
    "Depthwise": Expected({"a": (8, 1)} | PLAIN_B),
    "Grouped": Expected(PLAIN_B, {"a": "it is coupled to the grouped convolution groups"}),
    "InputAdded": Expected(PLAIN_B, {"a": "its units are coupled to channels of fixed size"}),
    "OneUnitElsewhere": Expected(PLAIN_B, {"a": "units 3 cannot be removed while others can: it is a map of one"}),
    "Tied": Expected({"a": (8, 1)} | PLAIN_B),
    "UsedTwice": Expected({"a": (8, 1)} | PLAIN_B),
    "TiedToTheOutput": Expected(
        {}, {"b": "the network's output, which cannot lose any; its weight is also that of head"}
    ),
    "LinearImage": Expected({"a": (8, 16)} | PLAIN_B),
    "Recurrent": Expected({"a": (8, 1), "fc": (14, 1)}, {"b": "it is coupled to rnn, a GRU"}),
    "Lstm": Expected({"a": (8, 1), "fc": (14, 1)}, {"b": "it is coupled to rnn, an LSTM"}),
    "Parametrized": Expected(
        PLAIN_B, {"one": "parametrized weight (WeightNorm)", "two": "(SpectralNorm)", "a": "read by one, whose weight"}
    ),
    "Mixer": Expected({"a": (24, 1), "tokens": (20, 1)}, {"back": "channels of fixed size"}),
    "SelfAttention": Expected({"a": (24, 1), "q": (16, 1), "v": (20, 1)}),
}


def network(name: str) -> nn.Module:
    """The network with drawn weights, and statistics that differ by channel."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(unusual_networks, name)()
        with torch.no_grad():
            model.train()(torch.randn(16, *SHAPE))
        return model.eval()


def probe(n: int = PROBE_SAMPLES) -> torch.Tensor:
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(1))


def found_in(model: nn.Module) -> tuple[Layers, Graph]:
    graph = traced(model, probe(1))
    return prunable_of(model, graph, probe(1)), graph


@pytest.mark.parametrize("name", EXPECTED)
def test_units_are_what_can_go_together(name: str) -> None:
    """Each layer has the units that it should have, or is refused for the reason that it should be."""
    layers, graph = found_in(network(name))
    expected = EXPECTED[name]
    assert {layer: (n, len(graph.sets(layer)[0])) for layer, n in layers.units.items()} == expected.units
    for layer, reason in expected.refused.items():
        assert layers.refused[layer].startswith(f"{layer}: ")
        assert reason in layers.refused[layer], layers.refused[layer]


@pytest.mark.parametrize("name", EXPECTED)
def test_what_goes_is_what_was_asked_for(name: str) -> None:
    """One unit, some, all but one: the layer loses exactly their channels, the rest computes what the masked network
    does, the network gets smaller and can be trained."""
    model = network(name)
    layers, graph = found_in(model)
    for layer in (*layers.units, *layers.others):
        sets = graph.sets(layer)
        for n in {1, len(sets) // 3, len(sets) - 1}:
            chosen = random.Random(n).sample(sets, n)
            channels = tuple(sorted(channel for unit in chosen for channel in unit))
            removed = {layer: channels}
            pruned = prune(model, removed, probe(1), graph=graph)
            dense: Any = model.get_submodule(layer)
            left: Any = pruned.get_submodule(layer)
            assert len(left.weight) == len(dense.weight) - len(channels)
            error = equivalence(model, pruned, removed, probe(), graph.partners(removed)).error
            assert error is not None and error <= LIMIT, (layer, channels)
            assert all(now < was for now, was in zip(count(pruned, probe(1)), count(model, probe(1)), strict=True))
            pruned.train()(probe()).square().mean().backward()


def test_halves_that_gate_each_other_are_pairs() -> None:
    """Channel i goes with channel i + 8."""
    _, graph = found_in(network("Chunk"))
    assert graph.sets("a") == tuple((i, i + 8) for i in range(8))
    assert found_in(network("EvenOdd"))[1].sets("a") == tuple((2 * i, 2 * i + 1) for i in range(8))
    assert found_in(network("LinearImage"))[1].sets("a")[1] == tuple(range(16, 32))


def test_a_part_of_a_unit_is_refused() -> None:
    """Channels 2, 3, 10 and 12 are one whole unit and two halves of units."""
    model = network("Chunk")
    with pytest.raises(ValueError, match=r"a: its units 4, 11 can only be removed with 2, 3, 10, 12"):
        prune(model, {"a": (2, 3, 10, 12)}, probe(1))


@pytest.mark.parametrize("name", ["Tied", "UsedTwice"])
def test_a_shared_parameter_stays_one(name: str) -> None:
    """After surgery, training and a copy both layers still hold one Parameter."""
    model = network(name)
    pruned: Any = prune(model, {"a": (0, 5)}, probe(1))
    optimizer = torch.optim.SGD(pruned.parameters(), 0.1)
    pruned.train()(probe()).square().mean().backward()
    optimizer.step()
    for one in (pruned, copy.deepcopy(pruned)):
        assert one.one.weight.shape == (6, 6, 3, 3)
        assert name == "UsedTwice" or one.two.weight is one.one.weight


def test_two_layers_of_one_parameter_are_named() -> None:
    """Removing units of both at once is refused: they are the same channels."""
    with pytest.raises(ValueError, match="the units of one and two are the same channels"):
        prune(network("Tied"), {"one": (0,), "two": (1,)}, probe(1))


WRONG = ["a unit too many", "another unit", "a partner left", "swapped"]


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_surgery_is_caught_by_a_reference_of_its_own(wrong: str) -> None:
    """The check takes nothing from surgery: whatever surgery removes, it is compared with what was asked for."""
    model = network("Chunk")
    asked = {"a": (1, 9)}
    done = {"a unit too many": (1, 2, 9, 10), "another unit": (2, 10), "a partner left": (1, 9), "swapped": (1, 9)}[
        wrong
    ]
    pruned: Any = prune(model, {"a": done}, probe(1))
    if wrong == "a partner left":  # the gate of unit 1 stays where the gate of unit 0 was
        with torch.no_grad():
            pruned.a.weight[7] = model.get_parameter("a.weight")[9]
            pruned.a.bias[7] = model.get_parameter("a.bias")[9]
    if wrong == "swapped":
        with torch.no_grad():
            pruned.a.weight[[0, 1]] = pruned.a.weight[[1, 0]].clone()
    if wrong in ("a unit too many", "another unit"):
        with pytest.raises(WrongCut, match=r"a has (12|lost)"):
            check_removed(model, pruned, asked)
    error = equivalence(model, pruned, asked, probe()).error
    assert error is not None and error > LIMIT


def test_the_reference_sees_through_conditions() -> None:
    """A comparison hides what is not a number: the removed units are found all the same."""

    class Conditions(unusual_networks.Net):
        widths = (8, 8)

        def between(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.where(x > 0.1, x, torch.full_like(x, 0.3))
            return x.masked_fill(x < 0.2, 0.25)

    model = Conditions().eval()
    pruned = prune(model, {"a": (0, 3)}, probe(1))
    error = equivalence(model, pruned, {"a": (0, 3)}, probe()).error
    assert error is not None and error <= LIMIT


def test_branches_that_are_added_lose_the_same_units() -> None:
    """What one branch removes is gone from the other too, also where that is read before the sum."""

    class Branches(unusual_networks.Net):
        widths = (8, 8)

        def make(self) -> None:
            self.one, self.two, self.side = (unusual_networks.conv(8, 8) for _ in range(3))

        def between(self, x: torch.Tensor) -> torch.Tensor:
            first, second = self.one(x), torch.relu(self.two(x))
            return torch.relu(first + second) + self.side(second)

    model = Branches().eval()
    graph = traced(model, probe(1))
    pruned = prune(model, {"one": (2, 6)}, probe(1), graph=graph)
    assert graph.partners({"one": (2, 6)})["two"] == [2, 6]
    error = equivalence(model, pruned, {"one": (2, 6)}, probe(), graph.partners({"one": (2, 6)})).error
    assert error is not None and error <= LIMIT


class Signs(unusual_networks.Net):
    """A sign hides what is not a number; behind it channels are scaled by their places."""

    widths = (16, 16)

    def between(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.sign(x)
        return torch.cat([x[:, :4] * 2, x[:, 4:]], 1)


class GroupsByPlace(unusual_networks.Net):
    """A norm over groups, then a factor for each place among the channels."""

    widths = (16, 16)

    def make(self) -> None:
        self.norm = nn.GroupNorm(4, 16)

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x) * torch.linspace(0.5, 2, x.shape[1], dtype=x.dtype).view(1, -1, 1, 1)


class TwoBranches(unusual_networks.Net):
    """Each half of the channels goes through a convolution of its own: the halves stay equal for some candidates."""

    widths = (16, 8)

    def make(self) -> None:
        self.other = unusual_networks.conv(8, 12, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, two = self.a(x).chunk(2, 1)
        return self.head((self.b(one) + self.other(two)).relu().mean((2, 3)))


class PartRolled(unusual_networks.Net):
    """The first half of the channels is numbered anew."""

    widths = (16, 16)

    def between(self, x: torch.Tensor) -> torch.Tensor:
        half = x.shape[1] // 2
        return torch.cat([x[:, :half].roll(1, 2).roll(1, 1), x[:, half:]], 1)


@pytest.mark.parametrize("kind", [Signs, GroupsByPlace, TwoBranches, PartRolled])
def test_layers_whose_places_count_are_refused(kind: type[nn.Module]) -> None:
    """Where what a channel does depends on its place, no candidate is accepted because the check looked away."""
    model = kind().eval()
    layers, graph = found_in(model)
    assert "a" in layers.refused and list(layers.units) == ["b"]
    if kind in (Signs, GroupsByPlace):
        pruned = prune(model, {"a": (2, 3, 10, 12)}, probe(1), graph=graph)
        error = equivalence(model, pruned, {"a": (2, 3, 10, 12)}, probe()).error
        assert error is not None and error > LIMIT


class Float32(unusual_networks.Net):
    """A root-mean-square norm in float32, as language models have it; a kernel that is a plain tensor."""

    widths = (16, 16)

    def make(self) -> None:
        self.kernel = torch.full((1, 1, 3, 3), 1 / 9)

    def between(self, x: torch.Tensor) -> torch.Tensor:
        y = x.float()
        y = (y * torch.rsqrt(y.square().mean(1, keepdim=True) + 1e-6)).to(x.dtype)
        return y * torch.sigmoid(nn.functional.conv2d(y.mean(1, keepdim=True), self.kernel, padding=1))


class OneLinearOverAndOver(nn.Module):
    """A fully connected layer, with and without its bias, runs in a loop; statistics by std_mean."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.linear, self.head = nn.Conv2d(1, 16, 8, 8), nn.Linear(16, 16), nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x).flatten(2).transpose(1, 2)
        for _ in range(2):
            x = x + self.linear(x).relu() + (x @ self.linear.weight.t()).tanh()
        std, mean = torch.std_mean(x, -1, keepdim=True)
        return self.head(((x - mean) / (std + 1)).mean(1))


class TwoAttentions(nn.Module):
    """Two blocks of attention of one head and one size: their products may lie at one address after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Conv2d(1, 24, 8, 8), nn.Linear(24, 10)
        self.blocks = nn.ModuleList(nn.ModuleList(nn.Linear(24, 24) for _ in range(3)) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            q, k, v = (layer(x) for layer in block)  # type: ignore[union-attr]
            x = x + (q @ k.transpose(1, 2) / 5).softmax(-1) @ v
        return self.head(x.mean(1))


def test_activations_at_one_address_are_not_one_weight() -> None:
    """Queries of the first block alone are silenced."""
    model = TwoAttentions().eval()
    graph = traced(model, probe(1))
    removed = {"blocks.0.0": (1, 5)}
    pruned = prune(model, removed, probe(1), graph=graph)
    error = equivalence(model, pruned, removed, probe(), graph.partners(removed)).error
    assert error is not None and error <= LIMIT


class Hiding(unusual_networks.Net):
    """Operations that make numbers of what is not a number."""

    widths = (16, 16)

    def between(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.fmax(torch.nan_to_num(x), torch.zeros_like(x) - 0.5)
        return x + (x * 8).to(torch.int32).to(x.dtype) + torch.sign(x)


@pytest.mark.parametrize("kind", [Float32, OneLinearOverAndOver, Hiding])
def test_the_check_raises_no_false_alarm(kind: type[nn.Module]) -> None:
    """What can be pruned is compared, whatever the network computes on the way."""
    model = kind().eval()
    layers, graph = found_in(model)
    removed = {"a": (2, 3, 10, 12)}
    assert "a" in layers.units
    pruned = prune(model, removed, probe(1), graph=graph)
    error = equivalence(model, pruned, removed, probe(), graph.partners(removed)).error
    assert error is not None and error <= LIMIT


def test_attention_is_counted() -> None:
    """Multiply-adds of attention count as they are computed in training, not as one kernel that counts nothing."""
    model = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True).eval()
    expected = 64 * (4 * 16 * 16 + 2 * 16 * 24) + 2 * 64 * 64 * 16
    assert count(model, torch.zeros(1, 64, 16))[1] == expected


def test_channels_that_all_hang_together_are_refused() -> None:
    """Each channel is multiplied with the next: only all could go."""

    class Neighbours(unusual_networks.Net):
        widths = (8, 7)

        def between(self, x: torch.Tensor) -> torch.Tensor:
            return x[:, 1:] * x[:, :-1]

    layers, _ = found_in(Neighbours().eval())
    assert list(layers.units) == ["b"]
    assert layers.refused["a"] == "a: its channels could only be removed all together, which leaves nothing of it"


def test_networks_are_left_as_they_were() -> None:
    """Tracing keeps modes, gradients and hooks."""
    model = network("Norms").train()
    traced(model, probe(1))
    assert all(module.training for module in model.modules())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
