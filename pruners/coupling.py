"""Coupling: which channels of a layer can only be removed together, and what else must go with them.

A unit of a layer is a set of its output channels that share one class of the trace (pruners.tracing): mostly a single
channel, two where the halves of a layer gate each other, sixteen where a fully connected layer is viewed as an image.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from pruners.candidates import Sets
from pruners.labels import Axis
from pruners.tracing import Tracer

LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
"""The modules whose output channels are units."""

SHOWN = 8


@dataclass(frozen=True)
class Slices:
    """Slices of one tensor that a removal takes: these indices of a dimension.

    `own` are the outputs of the pruned layer itself.
    """

    tensor: str
    dim: int
    indices: tuple[int, ...]
    own: bool = False


@dataclass(frozen=True)
class Graph:
    """The couplings of a network's channels, as one run of it has shown them.

    A class is a set of slices that can only be removed together, known by a number. `members` are its slices as
    (tensor, dimension, index), `readers` those that go with it and not the other way round, `elements` its single
    elements of tensors of these `shapes`, `reasons` why it cannot be removed. A tensor that has several names
    (`aliases`) has its first; `users` are modules that use it without holding it. `outputs` are the tensors that a
    layer writes its channels with. `splits` are grids of classes that a reshape makes, `divided` the classes that
    operations take apart, `groups` those of norms over groups, `norms` those whose number only an attribute says.
    """

    sizes: Mapping[str, int]
    order: tuple[str, ...]
    aliases: Mapping[str, tuple[str, ...]]
    users: Mapping[str, tuple[str, ...]]
    members: Mapping[int, tuple[tuple[str, int, int], ...]]
    root_of: Mapping[tuple[str, int, int], int]
    readers: Mapping[int, tuple[tuple[str, int, int], ...]]
    elements: Mapping[int, tuple[tuple[str, int], ...]]
    shapes: Mapping[str, tuple[int, ...]]
    reasons: Mapping[int, str]
    splits: tuple[tuple[Axis, str], ...]
    divided: tuple[tuple[frozenset[int], str], ...]
    groups: tuple[tuple[tuple[int, ...], int, str], ...]
    norms: tuple[tuple[str, int, tuple[int, ...]], ...]
    outputs: Mapping[str, tuple[tuple[str, int], ...]]

    @cached_property
    def first_name(self) -> Mapping[str, str]:
        """Every name of a tensor -> its first."""
        return {name: first for first, names in self.aliases.items() for name in names}

    @cached_property
    def _splits_of(self) -> Mapping[int, set[int]]:
        """Class -> which of the splits divide it."""
        found: dict[int, set[int]] = {}
        for at, (axis, _) in enumerate(self.splits):
            for root in set(axis.reshape(-1).tolist()):
                found.setdefault(root, set()).add(at)
        return found

    @cached_property
    def _layer_at(self) -> Mapping[tuple[str, int], tuple[str, ...]]:
        """(tensor, dimension) -> the layers of which these are the output channels."""
        found: dict[tuple[str, int], tuple[str, ...]] = {}
        for layer, places in self.outputs.items():
            if layer in self._ran:
                found[places[0]] = (*found.get(places[0], ()), layer)
        return found

    @cached_property
    def _ran(self) -> frozenset[str]:
        return frozenset(self.order)

    def classes_of(self, layer: str) -> list[int]:
        """The class of each output channel of a layer. Raises ValueError where the layer was not run."""
        if layer not in self.outputs or layer not in self._ran:
            raise ValueError(f"{layer}: tracing did not find it on the way from the input to the output")
        weight, dim = self.outputs[layer][0]
        return [self.root_of[weight, dim, i] for i in range(self.sizes[layer])]

    def sets(self, layer: str) -> Sets:
        """The units of a layer. Raises ValueError where its channels cannot be removed, or not in equal sets."""
        classes = self.classes_of(layer)
        found: dict[int, list[int]] = {}
        for channel, root in enumerate(classes):
            found.setdefault(root, []).append(channel)
        problems = {root: said for root in found if (said := self.problem([root])) is not None}
        if len(problems) == len(found):
            raise ValueError(f"{layer}: {next(iter(problems.values()))}{self._shared(layer)}")
        if problems:
            fixed = [channel for channel, root in enumerate(classes) if root in problems]
            said = next(iter(problems.values()))
            raise ValueError(f"{layer}: units {some(fixed)} cannot be removed while others can: {said}")
        sets = tuple(tuple(channels) for channels in found.values())
        if len({len(one) for one in sets}) > 1:
            by_size = sorted(sets, key=len)
            raise ValueError(
                f"{layer}: its units go in sets of different sizes, such as {list(by_size[0][:SHOWN])} and "
                f"{list(by_size[-1][:SHOWN])}: prune another layer"
            )
        return sets

    def problem(self, roots: Iterable[int]) -> str | None:
        """Return why these classes cannot be removed together; None where they can."""
        gone = set(roots)
        for root in gone:
            if root in self.reasons:
                return self.reasons[root]
            if (said := self._ragged(root)) is not None:
                return said
        for at in sorted({at for root in gone for at in self._splits_of.get(root, ())}):
            axis, place = self.splits[at]
            if not _leaves_a_grid(axis, gone):
                grid = " x ".join(str(n) for n in axis.shape if n > 1)
                where = f" in {place}" if place else ""
                return f"a reshape{where} divides its channels into {grid}, which removing single ones breaks"
        return None

    def _ragged(self, root: int) -> str | None:
        """Why the elements of a class are not whole slices of the tensors that hold them; None where they are."""
        for tensor, place in self._slices_of_elements.get(root, {}).items():
            if place is None:
                return f"it is coupled to single elements of {tensor} {list(self.shapes[tensor])}, not to slices of it"
        return None

    @cached_property
    def _slices_of_elements(self) -> Mapping[int, Mapping[str, tuple[int, list[int]] | None]]:
        """Class -> tensor -> the dimension, and its indices, that the class has of it; None where it has no slices."""
        found: dict[int, dict[str, set[int]]] = {}
        for root, places in self.elements.items():
            for tensor, element in places:
                found.setdefault(root, {}).setdefault(tensor, set()).add(element)
        return {
            root: {t: _slice_dim(self.shapes[t], of) for t, of in tensors.items()} for root, tensors in found.items()
        }

    def divided_at(self, layer: str) -> str | None:
        """Return the module that takes parts of a layer's channels apart; None where there is no such module."""
        classes = set(self.classes_of(layer))
        return next((place or "the network" for roots, place in self.divided if roots & classes), None)

    def removal(self, layer: str, channels: Sequence[int]) -> list[Slices]:
        """All that goes with these output channels of a layer. Raises ValueError where they cannot go."""
        classes = self.classes_of(layer)
        gone = list(dict.fromkeys(classes[channel] for channel in channels))
        if (said := self.problem(gone)) is not None:
            raise ValueError(f"{layer}: {said}{self._shared(layer)}")
        outside = [i for i, root in enumerate(classes) if root in set(gone) and i not in set(channels)]
        if outside:
            raise ValueError(f"{layer}: its units {some(outside)} can only be removed with {some(list(channels))}")
        taken: dict[tuple[str, int], set[int]] = {}
        for root in gone:
            for tensor, dim, index in (*self.members[root], *self.readers.get(root, ())):
                taken.setdefault((tensor, dim), set()).add(index)
            for tensor, place in self._slices_of_elements.get(root, {}).items():
                assert place is not None, "problem() has refused it"
                taken.setdefault((tensor, place[0]), set()).update(place[1])
        own = set(self.outputs[layer])
        return [Slices(t, d, tuple(sorted(i)), own=(t, d) in own) for (t, d), i in taken.items()]

    def partners(self, removed: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
        """Return layer -> the outputs of other layers that go with removed units: those that share their channels."""
        gone = {self.classes_of(layer)[unit] for layer in removed if layer in self.outputs for unit in removed[layer]}
        found: dict[str, set[int]] = {}
        for root in gone:
            for tensor, dim, index in self.members[root]:
                for layer in self._layer_at.get((tensor, dim), ()):
                    if layer not in removed:
                        found.setdefault(layer, set()).add(index)
        return {layer: sorted(found[layer]) for layer in self.outputs if layer in found}

    def check_groups(self, layer: str, channels: Sequence[int]) -> None:
        """Raise ValueError where the channels that are left do not divide into the groups of a norm."""
        gone = {self.classes_of(layer)[channel] for channel in channels}
        for roots, groups, name in self.groups:
            left = sum(root not in gone for root in roots)
            if left != len(roots) and left % groups:
                said = f"it is coupled to {name}, a norm over {groups} groups"
                raise ValueError(f"{layer}: {said}, and {left} channels do not divide so")

    def _shared(self, layer: str) -> str:
        """What to add where the layer's weight is that of another module too."""
        others = self.shared_with(layer)
        return f"; its weight is also that of {some(others)}" if others else ""

    def shares_a_tensor(self, layer: str) -> bool:
        """Return whether what goes with a layer's channels is held or used in several places."""
        tensors = {tensor for root in self.classes_of(layer) for tensor, _, _ in self.members[root]}
        return any(len(self.aliases[tensor]) > 1 or self.users.get(tensor) for tensor in tensors)

    def shared_with(self, layer: str) -> list[str]:
        """Return the other modules that hold, or use, the weight of a layer."""
        weight, _ = self.outputs[layer][0]
        modules = [name.rpartition(".")[0] for name in self.aliases[weight]] + list(self.users.get(weight, ()))
        return [name or "the network itself" for name in dict.fromkeys(modules) if name != layer]


def some(names: Sequence[Any]) -> str:
    """The first few of `names`, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(str, names[:SHOWN])) + more


def _leaves_a_grid(axis: Axis, gone: set[int]) -> bool:
    """Whether what is left of a grid of classes is a grid: whole slices of it were removed, or nothing."""
    left = ~torch.isin(axis, torch.tensor(sorted(gone)))
    grid = torch.ones_like(left)
    for dim in range(left.ndim):
        grid = grid & left.amax([d for d in range(left.ndim) if d != dim], keepdim=True)
    return bool((grid == left).all())


def _slice_dim(shape: Sequence[int], elements: set[int]) -> tuple[int, list[int]] | None:
    """The dimension of which these elements are whole slices, and which of it; None where there is none."""
    held = torch.zeros(tuple(shape), dtype=torch.bool)
    held.view(-1)[list(elements)] = True
    for dim in range(len(shape)):
        others = [d for d in range(len(shape)) if d != dim]
        slices = held.amax(others)
        if shape[dim] > 1 and bool((held.amin(others) == slices).all()):
            return dim, slices.nonzero().flatten().tolist()
    return None


def traced(model: nn.Module, example: Any) -> Graph:
    """Return the graph of a network, run once in eval mode on `example`: a batch, a tensor or a mapping of tensors.

    Raises ValueError where the network cannot be run. Its modes are left as they were.
    """
    modes = {module: module.training for module in model.modules()}
    tracer = Tracer(model)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    model.eval()
    try:
        with torch.no_grad(), tracer.watching(model):
            with tracer:
                output = model(example)
            tracer.refuse_output(output)
    except Exception as error:  # of a network's own code
        raise ValueError(f"the network cannot be run: {type(error).__name__}: {error}") from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, mode in modes.items():
            module.training = mode
    _refuse_heads(tracer, model)
    return _graph(tracer, model)


def _refuse_heads(tracer: Tracer, model: nn.Module) -> None:
    """The outputs of queries, keys and values go with their heads, not one by one."""
    for block, module in model.named_modules():
        heads = getattr(module, "prunable_heads", None)
        for name, _ in heads.writes if heads is not None else ():
            own = f"{block}.{name}"
            for tensor in (own, f"{own}.weight", f"{own}.bias"):
                if tensor in tracer.labels.nodes:
                    dim = len(tracer.labels.nodes[tensor]) - 1 if tensor == own else 0
                    said = f"its units are coupled to {own}, whose units go with their heads"
                    tracer.labels.classes.refuse(list(tracer.labels.nodes[tensor][dim]), said)


def _graph(tracer: Tracer, model: nn.Module) -> Graph:
    root = tracer.labels.classes.root
    members: dict[int, list[tuple[str, int, int]]] = {}
    root_of: dict[tuple[str, int, int], int] = {}
    node_at: dict[int, tuple[str, int, int]] = {}
    for tensor, dims in tracer.labels.nodes.items():
        for dim, nodes in enumerate(dims):
            for index, node in enumerate(nodes):
                place = tensor, dim, index
                node_at[node] = place
                root_of[place] = root(node)
                members.setdefault(root(node), []).append(place)
    readers: dict[int, list[tuple[str, int, int]]] = {}
    for node, channel in tracer.labels.reads:
        readers.setdefault(root(channel), []).append(node_at[node])
    elements: dict[int, list[tuple[str, int]]] = {}
    for tensor, nodes in tracer.labels.elements.items():
        for element, node in enumerate(nodes):
            elements.setdefault(root(node), []).append((tensor, element))
    shapes = {tensor: tuple(len(nodes) for nodes in tracer.labels.nodes[tensor]) for tensor in tracer.labels.elements}
    rooted = lambda axis: axis.clone().apply_(root)  # noqa: E731
    first = {name: names[0] for names in tracer.labels.names.values() for name in names}
    outputs: dict[str, tuple[tuple[str, int], ...]] = {}
    sizes: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, LAYERS) and f"{name}.weight" in first:
            dim = 1 if getattr(module, "transposed", False) else 0
            outputs[name] = ((first[f"{name}.weight"], dim),)
            if f"{name}.bias" in first:
                outputs[name] += ((first[f"{name}.bias"], 0),)
            sizes[name] = module.weight.shape[dim]
    aliases = {names[0]: tuple(names) for names in tracer.labels.names.values()}
    users: dict[str, tuple[str, ...]] = {}
    for name, places in tracer.users.items():
        holders = {alias.rpartition(".")[0] for alias in aliases[name]}
        users[name] = tuple(sorted(places - holders)) if len(places) > 1 else ()
    return Graph(
        sizes=sizes,
        order=tuple(tracer.order),
        aliases=aliases,
        users=users,
        members={key: tuple(places) for key, places in members.items()},
        root_of=root_of,
        readers={key: tuple(places) for key, places in readers.items()},
        elements={key: tuple(places) for key, places in elements.items()},
        shapes=shapes,
        reasons=tracer.labels.classes.reasons(),
        splits=tuple((rooted(axis), place) for axis, place in tracer.labels.splits),
        divided=tuple((frozenset(rooted(axis).reshape(-1).tolist()), place) for axis, place in tracer.labels.divided),
        groups=tuple((tuple(rooted(axis).tolist()), groups, name) for axis, groups, name in tracer.labels.groups),
        norms=tuple((name, place, tuple(rooted(axis).reshape(-1).tolist())) for name, place, axis in tracer.norms),
        outputs=outputs,
    )
