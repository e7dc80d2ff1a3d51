"""Random networks: what is said to go together does, and the pruned network computes what the dense one does."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from models.discovery import prunable_of
from models.layers import Layers, Sets
from pruners.coupling import Graph, traced
from pruners.equivalence import LIMIT, PROBE_SAMPLES, Equivalence, equivalence
from pruners.surgery import WrongCut, check_removed, cut, prune
from tests.random_graphs import EVERY, SIMPLE, Drawn, draw_network

QUICK, MANY, BLOCK = 50, 2000, 50

LATE = (
    "do not divide so",  # what is left, into the groups of a norm
    "without any",  # of a layer whose channels are a part of those removed
    "are the same channels",  # two layers of several
)
"""Reasons for which a layer that can be pruned cannot lose these of its units."""

WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear)

Removed = dict[str, tuple[int, ...]]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small networks: several threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("seed", range(QUICK))
def test_random_graphs(seed: int) -> None:
    """Each layer of a random network loses what was asked, or is refused with its name and a reason."""
    check_network(draw_network(seed, EVERY, PROBE_SAMPLES))


@pytest.mark.parametrize("seed", range(QUICK))
def test_sets_are_those_that_brute_force_finds(seed: int) -> None:
    """Channels form a set exactly if disturbing them one by one disturbs the same inputs of other layers."""
    check_sets(draw_network(seed, SIMPLE, PROBE_SAMPLES))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(QUICK, QUICK + MANY, BLOCK))
def test_many_random_graphs(first: int) -> None:
    """The same for many more networks of all operations."""
    for seed in range(first, first + BLOCK):
        check_network(draw_network(seed, EVERY, PROBE_SAMPLES))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(QUICK, QUICK + MANY, BLOCK))
def test_sets_of_many_random_graphs(first: int) -> None:
    """The same for many more networks of operations that brute force can follow."""
    for seed in range(first, first + BLOCK):
        check_sets(draw_network(seed, SIMPLE, PROBE_SAMPLES))


# -- every network -----------------------------------------------------------------------------------


def check_network(drawn: Drawn) -> None:
    """Check what can be pruned of a network: each layer alone by several selections, and all layers together."""
    model, probe = drawn.model, drawn.probe
    graph = traced(model, probe[:1])
    layers = prunable_of(model, graph, probe[:1])
    check_refusals(drawn, graph, layers)
    draw = random.Random(drawn.seed)
    for layer in (*layers.units, *layers.others):
        sets = sets_of(model, graph, layers, layer)
        for gone in selections(draw, sets):
            check_removal(drawn, graph, {layer: gone})
    together = {layer: selections(draw, sets_of(model, graph, layers, layer))[1] for layer in layers.units}
    if len(together) > 1:
        check_removal(drawn, graph, together)


def sets_of(model: nn.Module, graph: Graph, layers: Layers, layer: str) -> Sets:
    """Return the sets of a layer, which must be equal in size and divide its channels."""
    sets = graph.sets(layer)
    n = width(model, layer)
    assert sorted(channel for one in sets for channel in one) == list(range(n))
    assert len({len(one) for one in sets}) == 1
    assert len(sets) == {**layers.units, **layers.others}[layer]
    return sets


def width(model: nn.Module, layer: str) -> int:
    weight = model.get_submodule(layer).weight
    assert isinstance(weight, torch.Tensor)
    return len(weight)


def selections(draw: random.Random, sets: Sets) -> list[tuple[int, ...]]:
    """The channels of one set, of some, and of all but one."""
    chosen = [draw.sample(sets, count) for count in (1, draw.randint(1, len(sets) - 1), len(sets) - 1)]
    return [tuple(sorted(channel for one in some for channel in one)) for some in chosen]


def check_refusals(drawn: Drawn, graph: Graph, layers: Layers) -> None:
    """A refused layer has a reason that starts with its name, and the others are prunable or have one unit."""
    for layer, reason in layers.refused.items():
        assert reason.startswith(f"{layer}: ")
        assert len(reason) > len(f"{layer}: ")
    for layer in graph.outputs:
        if layer in layers.refused or layer in layers.units or layer in layers.others:
            continue
        try:
            prune(drawn.model, {layer: (0,)}, drawn.probe[:1], graph=graph)
        except ValueError as error:
            assert str(error).startswith(f"{layer}: "), error


def check_removal(drawn: Drawn, graph: Graph, removed: Removed) -> None:
    """The pruned network has the units that are left, computes the same, trains, and keeps its ties."""
    dense, probe = drawn.model, drawn.probe
    said = f"{drawn}: {removed}"
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    try:
        pruned = prune(dense, removed, probe[:1], graph=graph)
    except ValueError as error:
        assert str(error).startswith(tuple(f"{layer}: " for layer in removed)) or len(removed) > 1
        assert any(reason in str(error) for reason in LATE), f"{said}: {error}"
        return
    assert all(tensor.equal(before[name]) for name, tensor in dense.state_dict().items())
    for layer, gone in removed.items():
        assert width(pruned, layer) == width(dense, layer) - len(gone), said
    try:
        found = compared(drawn, pruned, removed, graph)
    except (RuntimeError, IndexError, ValueError):  # of the network itself
        assert is_caught_late(drawn, removed), said
        return
    if is_caught_late(drawn, removed) and not (found.error is not None and found.error <= LIMIT):
        return
    if found.error is None:
        assert found.reason is not None
        assert "takes statistics over groups" in found.reason, f"{said}: {found.reason}"
    else:
        assert found.error <= LIMIT, f"{said}: {found.error}"
    assert parameters(pruned) < parameters(dense), said
    check_training(dense, pruned, probe)


def is_caught_late(drawn: Drawn, removed: Removed) -> bool:
    """Whether only a run without these units shows that they cannot go, which the check then says."""
    return drawn.takes_fixed or any(layer.endswith((".q", ".k")) for layer in removed)


def compared(drawn: Drawn, pruned: nn.Module, removed: Removed, graph: Graph) -> Equivalence:
    return equivalence(drawn.model, pruned, removed, drawn.probe, graph.partners(removed))


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def ties(model: nn.Module) -> set[tuple[str, ...]]:
    """The names of each parameter."""
    found: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), []).append(name)
    return {tuple(names) for names in found.values()}


def check_training(dense: nn.Module, pruned: nn.Module, probe: torch.Tensor) -> None:
    """A step of training changes the pruned network and leaves it finite; one Parameter stays one."""
    assert ties(pruned) == ties(dense)
    trained = copy.deepcopy(pruned).train()
    assert ties(trained) == ties(dense)
    optimizer = torch.optim.SGD(trained.parameters(), lr=1e-3)
    trained(probe).square().mean().backward()
    optimizer.step()
    assert ties(trained) == ties(dense)
    before = dict(pruned.named_parameters())
    assert any(not parameter.equal(before[name]) for name, parameter in trained.named_parameters())
    with torch.no_grad():
        assert trained.eval()(probe[:3]).isfinite().all()


# -- brute force -------------------------------------------------------------------------------------

Place = tuple[str, str, int]
"""`in` or `out`, the layer (the first of those that share a weight), the channel."""

FIXED_PLACE: Place = "", "", 0


class Brute:
    """Which channels go together, found by making one channel after the other not a number."""

    def __init__(self, model: nn.Module, x: torch.Tensor) -> None:
        self.model, self.x = model, x
        self.layers: dict[str, Any] = {n: m for n, m in model.named_modules() if isinstance(m, WEIGHTED)}
        first: dict[int, str] = {}
        self.shared = {name: first.setdefault(id(m.weight), name) for name, m in self.layers.items()}
        self._clean: list[torch.Tensor] = []
        self._seen: set[Place] = set()
        self._joined: dict[Place, Place] = {}
        self._find()

    def root(self, place: Place) -> Place:
        while (above := self._joined.get(place, place)) != place:
            place = above
        return place

    def _join(self, a: Place, b: Place) -> None:
        if (one := self.root(a)) != (other := self.root(b)):
            self._joined[max(one, other)] = min(one, other)

    def _find(self) -> None:
        self._run(-1, "", 0)
        for channel in range(self.x.shape[1]):
            self._touch(FIXED_PLACE, "", channel)
        for name, module in self.layers.items():
            for channel in range(len(module.weight)):
                self._touch(("out", self.shared[name], channel), self.shared[name], channel)
            if getattr(module, "groups", 1) > 1:  # depthwise: an input is what its outputs are made of
                for channel in range(len(module.weight)):
                    read = channel * module.groups // len(module.weight)
                    self._join(("in", self.shared[name], read), ("out", self.shared[name], channel))

    def _touch(self, place: Place, layer: str, channel: int) -> None:
        self._seen = set()
        self._run(1, layer, channel)
        for met in self._seen:
            self._join(place, met)

    def _run(self, sign: int, layer: str, channel: int) -> None:
        """One run: the first records the inputs of each call, a later one spoils a channel and goes on with these."""
        calls = 0
        hooks = []

        def entering(name: str) -> Callable[..., Any]:
            def hook(module: Any, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
                nonlocal calls
                calls += 1
                if sign < 0:
                    self._clean.append(args[0].clone())
                    return args
                spoilt = args[0].isnan()
                dims = [d for d in range(spoilt.ndim) if d != (spoilt.ndim - 1 if isinstance(module, nn.Linear) else 1)]
                self._seen |= {("in", self.shared[name], i) for i in spoilt.amax(dims).nonzero().flatten().tolist()}
                return (self._clean[calls - 1],)

            return hook

        def leaving(module: Any, _: Any, output: torch.Tensor) -> torch.Tensor:
            output = output.clone()
            output.select(-1 if isinstance(module, nn.Linear) else 1, channel).fill_(float("nan"))
            return output

        for name, module in self.layers.items():
            hooks.append(module.register_forward_pre_hook(entering(name)))
            if sign > 0 and self.shared[name] == layer:
                hooks.append(module.register_forward_hook(leaving))
        x = self.x.clone()
        if sign > 0 and not layer:
            x[:, channel] = float("nan")
        with torch.no_grad():
            output = self.model(x)
        for hook in hooks:
            hook.remove()
        if sign > 0 and output.isnan().any():
            self._seen.add(FIXED_PLACE)

    def sets(self, layer: str) -> Sets | None:
        """The sets of a layer's channels; None where some cannot go, or where they differ in size."""
        found: dict[Place, list[int]] = {}
        for channel in range(len(self.layers[layer].weight)):
            found.setdefault(self.root(("out", self.shared[layer], channel)), []).append(channel)
        if self.root(FIXED_PLACE) in found or len({len(one) for one in found.values()}) > 1:
            return None
        return tuple(tuple(channels) for channels in found.values())

    def masked(self, removed: Mapping[str, Sequence[int]], samples: torch.Tensor) -> torch.Tensor:
        """The dense network's outputs, in float64, with zeros for whatever layers read of removed channels."""
        gone = {self.root(("out", self.shared[layer], c)) for layer, channels in removed.items() for c in channels}
        model = copy.deepcopy(self.model).double()

        def zeroing(name: str) -> Callable[..., Any]:
            def hook(module: Any, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
                dim = -1 if isinstance(module, nn.Linear) else 1
                lost = [i for i in range(args[0].shape[dim]) if self.root(("in", self.shared[name], i)) in gone]
                return (args[0].index_fill(dim, torch.tensor(lost, dtype=torch.int64), 0.0),)

            return hook

        for name in self.layers:
            model.get_submodule(name).register_forward_pre_hook(zeroing(name))
        with torch.no_grad():
            return model(samples.double())


def check_sets(drawn: Drawn) -> None:
    """The sets are those that brute force finds, and so is what the pruned network computes."""
    model, probe = drawn.model, drawn.probe
    graph = traced(model, probe[:1])
    layers = prunable_of(model, graph, probe[:1])
    brute = Brute(model, probe[:1])
    draw = random.Random(drawn.seed)
    for layer in brute.layers:
        if getattr(model.get_submodule(layer), "groups", 1) > 1:
            continue
        expected = brute.sets(layer)
        if expected is not None and len(expected) < 2:
            assert layer not in layers.units and layer not in layers.others
            continue
        if expected is None:
            assert layer in layers.refused, f"{drawn}: {layer} is prunable"
            continue
        assert layer not in layers.refused, f"{drawn}: {layers.refused[layer]}"
        assert sets_of(model, graph, layers, layer) == expected, f"{drawn}: {layer}"
        for gone in selections(draw, expected)[1:]:
            check_by_brute_force(drawn, graph, brute, {layer: gone})
        check_wrong_surgery(drawn, graph, draw, layer, expected)


def check_by_brute_force(drawn: Drawn, graph: Graph, brute: Brute, removed: Removed) -> None:
    said = f"{drawn}: {removed}"
    try:
        pruned = prune(drawn.model, removed, drawn.probe[:1], graph=graph)
    except ValueError as error:
        assert str(error).startswith(f"{next(iter(removed))}: ")
        assert "without any" in str(error), f"{said}: {error}"
        return
    found = compared(drawn, pruned, removed, graph)
    assert found.error is not None, f"{said}: {found.reason}"
    assert found.error <= LIMIT, f"{said}: {found.error}"
    assert difference(pruned, brute.masked(removed, drawn.probe), drawn.probe) <= LIMIT, said


def difference(network: nn.Module, expected: torch.Tensor, samples: torch.Tensor) -> float:
    """The largest difference to the expected outputs, relative to the largest of these, in float64."""
    with torch.no_grad():
        got = copy.deepcopy(network).double().eval()(samples.double())
    return float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-300))


def check_wrong_surgery(drawn: Drawn, graph: Graph, draw: random.Random, layer: str, sets: Sets) -> None:
    """A wrong unit, two swapped channels, another input of a reader: each is caught if it changes the outputs."""
    model, probe = drawn.model, drawn.probe
    if len(sets) < 3:
        return
    asked, other, third = draw.sample(sets, 3)
    removed = {layer: asked}
    try:
        right, wrong_unit = (prune(model, {layer: one}, probe[:1], graph=graph) for one in (asked, other))
    except ValueError as error:
        assert "without any" in str(error), error
        return
    with torch.no_grad():
        expected = copy.deepcopy(right).double()(probe.double())
    slices = graph.removal(layer, asked)
    for wrong in (
        wrong_unit,
        with_swapped_channels(right, layer, kept_at(asked, other[0]), kept_at(asked, third[0])),
        with_another_reader(model, graph, slices, draw),
    ):
        if wrong is None:
            continue
        try:
            is_the_same = difference(wrong, expected, probe) <= 100 * LIMIT
            found = compared(drawn, wrong, removed, graph)
            check_removed(model, wrong, removed, slices)
        except (RuntimeError, WrongCut):
            continue
        is_caught = found.error is None or found.error > LIMIT
        assert is_caught or is_the_same, f"{drawn}: {removed}: wrong surgery passes"


def kept_at(removed: Sequence[int], channel: int) -> int:
    """The place of a channel once others are removed."""
    return channel - sum(one < channel for one in removed)


def with_swapped_channels(network: nn.Module, layer: str, a: int, b: int) -> nn.Module:
    made = copy.deepcopy(network)
    with torch.no_grad():
        for tensor in made.get_submodule(layer).parameters():
            tensor[[a, b]] = tensor[[b, a]]
    return made


def with_another_reader(model: nn.Module, graph: Graph, slices: Sequence[Any], draw: random.Random) -> nn.Module | None:
    """The network cut as the slices say, but for one that belongs to the next channel instead."""
    others = [one for one in slices if not one.own]
    if not others:
        return None
    wrong = draw.choice(others)
    size = model.state_dict()[wrong.tensor].shape[wrong.dim]
    shifted = tuple(sorted({(i + 1) % size for i in wrong.indices}))
    made = copy.deepcopy(model)
    cut(made, [replace(wrong, indices=shifted) if one is wrong else one for one in slices], graph)
    return made
