"""Single operations: what they couple, and that the check follows them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from models.discovery import prunable_of
from models.layers import Layers
from pruners.coupling import Graph, traced
from pruners.equivalence import LIMIT, PROBE_SAMPLES, equivalence
from pruners.surgery import prune


def known(model: nn.Module, *shape: int) -> tuple[nn.Module, torch.Tensor, Graph, Layers]:
    """A network in eval mode, a probe batch, its graph, and what can be pruned."""
    probe = torch.randn(PROBE_SAMPLES, *shape, generator=torch.Generator().manual_seed(0))
    graph = traced(model.eval(), probe[:1])
    return model, probe, graph, prunable_of(model, graph, probe[:1])


def error_without(model: nn.Module, probe: torch.Tensor, graph: Graph, removed: dict[str, tuple[int, ...]]) -> float:
    """The difference of the pruned network to the masked one."""
    pruned = prune(model, removed, probe[:1], graph=graph)
    found = equivalence(model, pruned, removed, probe, graph.partners(removed))
    assert found.error is not None, found.reason
    return found.error


def test_layers_that_take_parts_of_one_convolution_are_pruned_together() -> None:
    """A depthwise convolution over a concatenation loses what either of two layers removes."""

    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 6, 1), nn.Conv2d(6, 4, 1)
            self.each, self.out = nn.Conv2d(10, 10, 3, groups=10), nn.Linear(10, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.a(x)
            return self.out(self.each(torch.cat([x, self.b(x)], 1)).mean((2, 3)))

    model, probe, graph, _ = known(Dense(), 2, 5, 5)
    removed = {"a": (0, 2), "b": (1,)}
    assert len(prune(model, removed, probe[:1], graph=graph).get_parameter("each.weight")) == 7
    assert error_without(model, probe, graph, removed) <= LIMIT


def test_activations_without_torchs_tag_are_followed() -> None:
    """Hardswish and the logarithm of a sigmoid change no channel."""
    layers = [nn.Conv2d(2, 6, 3), nn.Hardswish(), nn.Conv2d(6, 4, 3), nn.LogSigmoid(), nn.Flatten(), nn.Linear(16, 3)]
    model, probe, graph, found = known(nn.Sequential(*layers), 2, 6, 6)
    assert found.units == {"0": 6, "2": 4}
    assert error_without(model, probe, graph, {"0": (1, 4), "2": (0,)}) <= LIMIT


def test_shuffled_channels_are_not_removed_one_by_one() -> None:
    """A shuffle of two groups divides the channels into a grid."""
    layers = [nn.Conv2d(2, 8, 3), nn.ChannelShuffle(2), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(16, 3)]
    found = known(nn.Sequential(*layers), 2, 6, 6)[-1]
    assert found.units == {"2": 4}
    assert "divides its channels into 2 x 4" in found.refused["0"]


def test_channels_one_after_the_other_go_together() -> None:
    """Tokens of two layers in one tensor: it stays rectangular, and a norm over the channels couples nothing else."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            both = torch.cat([self.a(x[:, :1]), self.b(x[:, 1:])], 1)
            both = both / both.square().mean(-1, keepdim=True)
            return self.out(both[:, 0]) + self.out(both[:, 1])

    model, probe, graph, found = known(Tokens(), 3, 4)
    assert found.units == {"a": 6} and found.others == {"b": 6}
    assert error_without(model, probe, graph, {"a": (1, 4)}) <= LIMIT


class TwoBranches(nn.Module):
    """Two layers whose outputs meet as `meet` says."""

    def __init__(self, reader: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.reader = nn.Conv2d(2, 4, 1), nn.Conv2d(2, 4, 1), reader

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.reader(self.meet(self.a(x), self.b(x)))

    def meet(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


def reader(width: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3))


def test_the_larger_of_two_channels_goes_with_either() -> None:
    """A maximum over some of the removed units is no statistic of the others."""

    class Maxout(TwoBranches):
        def meet(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return torch.cat([a, b], 1).view(a.shape[0], 2, -1, *a.shape[2:]).amax(1)

    model, probe, graph, found = known(Maxout(reader(4)), 2, 3, 3)
    assert found.units == {"a": 4}
    assert error_without(model, probe, graph, {"a": (1, 2)}) <= LIMIT


def test_the_check_silences_what_stands_beside_a_channel() -> None:
    """Padding, and a class token, are parts of the channels that they stand in: a norm over these sees neither."""

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.out = nn.Conv2d(2, 4, 1), nn.LayerNorm([4, 4, 4]), nn.Linear(64, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.norm(F.pad(self.a(x), (1, 0, 0, 1))).flatten(1))

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.token = nn.Conv2d(2, 4, 1), nn.Parameter(torch.randn(1, 1, 4))
            self.norm, self.out = nn.RMSNorm(4), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.a(x).flatten(2).transpose(1, 2)
            return self.out(self.norm(torch.cat([self.token.expand(len(x), -1, -1), x], 1)).mean(1))

    for network in (Padded(), Tokens()):
        model, probe, graph, found = known(network, 2, 3, 3)
        assert found.units == {"a": 4}
        assert error_without(model, probe, graph, {"a": (1, 2)}) <= LIMIT


def test_the_check_finds_partners_that_are_read_elsewhere_too() -> None:
    """A partner of which one reader reads more inputs than those that it shares with the removed units."""

    class Beside(TwoBranches):
        def meet(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return torch.cat([a + b, b], 1)

    model, probe, graph, found = known(Beside(reader(8)), 2, 3, 3)
    assert found.units == {"a": 4} and found.others == {"b": 4}
    assert error_without(model, probe, graph, {"a": (1, 2)}) <= LIMIT
    wrong = prune(model, {"a": (0, 2)}, probe[:1], graph=graph)
    caught = equivalence(model, wrong, {"a": (1, 2)}, probe, graph.partners({"a": (0, 2)}))
    assert caught.error is not None and caught.error > LIMIT
