"""What belongs to units of a network, found by watching what it computes from them.

The units are made not a number. Whatever is computed from them, up to the next operations that read channels, is not a
number either; those go on with the numbers that they gave before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pruners.dispatch import Operations, is_pointwise, name_of
from pruners.labels import tensors_in
from pruners.readers import (
    NoReference,
    Part,
    Parts,
    is_constant,
    kind_of,
    norm_parts,
    outputs_of,
    read_parts,
    weight_at,
)
from pruners.surgery import Units


class NotRead(Exception):
    """Nothing was seen to read the removed units: what is computed of them hides them."""


@dataclass(frozen=True)
class _Call:
    """A call of an operation that reads channels, on the undisturbed network."""

    name: str
    weight: tuple[Any, ...]
    outputs: list[torch.Tensor]


class Silencer:
    """Finds, for each call of an operation that reads channels, what of its inputs belongs to the removed units.

    The units are made not a number: whatever is computed from them is not a number either.
    """

    def __init__(self, model: nn.Module, samples: Any) -> None:
        self._model, self._samples = model, samples
        plain = _Recorded({parameter.data_ptr() for parameter in model.parameters()})
        with plain:
            model(samples)
        self._calls = plain.calls
        self._parts: list[Parts] = [{} for _ in plain.calls]

    def names(self) -> list[str]:
        """Return the operations of the calls."""
        return [call.name for call in self._calls]

    def parts(self) -> list[Parts]:
        """Return them, call by call, in the order in which the network makes them."""
        return self._parts

    def add(self, units: Units) -> None:
        """Silence these units. Raises NotRead where nothing is seen to read them."""
        found = self._observed(units)
        if not any(found):
            raise NotRead("no operation was seen to read the removed units")
        self._take(found)

    def add_partners(self, partners: Units, each_alone: bool) -> bool:
        """Silence those units of other layers that are read together with silenced ones; whether there are any.

        The units of a layer are silenced together, if some call reads nothing else of them than what is silenced; or
        `each_alone`, if some call reads one of its inputs as one of those that are silenced.
        """
        parts_of = [{layer: units} for layer, units in partners.items()]
        if each_alone:
            parts_of = [{layer: (unit,)} for layer, units in partners.items() for unit in units]
        left = dict(enumerate(map(self._observed, parts_of)))
        taken = False
        while (found := self._next_silenced(left, each_alone)) is not None:
            self._take(left.pop(found))
            taken = True
        return taken

    def _next_silenced(self, left: Mapping[int, Sequence[Parts]], each_alone: bool) -> int | None:
        return next((at for at, parts in left.items() if self._is_silenced_somewhere(parts, each_alone)), None)

    def _observed(self, units: Units) -> list[Parts]:
        weights = {_weight_key(_own(self._model, layer)): tuple(own) for layer, own in units.items()}
        while True:
            with _disturbed(self._model, units), _Observed(self._calls, weights) as seen:
                self._model(self._samples)
            # A weight that is used transposed too gives, there, what it does not read any more here.
            if not (lost := self._lost_transposed(seen.parts, weights)):
                return seen.parts
            weights |= lost

    def _lost_transposed(self, parts: Sequence[Parts], known: Mapping[Any, Any]) -> dict[Any, tuple[int, ...]]:
        """For each weight that is used transposed too: the inputs that it does not read any more, its outputs there."""
        uses = {call.weight for call in self._calls}
        lost: dict[Any, tuple[int, ...]] = {}
        for call, own in zip(self._calls, parts, strict=True):
            if own and call.weight and call.weight not in known and _transposed(call.weight) in uses:
                lost[call.weight] = next(iter(own.values())).indices
        return lost

    def _is_silenced_somewhere(self, parts: Sequence[Parts], in_part: bool) -> bool:
        """Whether all that some call reads of these units, or a part of it, is silenced there already."""
        for own, known in zip(parts, self._parts, strict=True):
            for at, part in own.items():
                silenced = known.get(at)
                if silenced is None or silenced.dim != part.dim:
                    continue
                read, gone = set(part.indices), set(silenced.indices)
                if read & gone if in_part else read <= gone:
                    return True
        return False

    def _take(self, parts: Sequence[Parts]) -> None:
        both = [_united(known, own) for known, own in zip(self._parts, parts, strict=True)]
        self._parts = _same_of_shared(self._calls, both)


def _united(one: Parts, other: Parts) -> Parts:
    made = dict(one)
    for at, part in other.items():
        known = made.get(at, part)
        if known.dim != part.dim:
            raise NoReference("the removed units are read along several dimensions")
        made[at] = Part(part.dim, tuple(sorted({*known.indices, *part.indices})))
    return made


def _own(model: nn.Module, layer: str) -> torch.Tensor | None:
    return getattr(model.get_submodule(layer), "weight", None)


def _weight_key(weight: torch.Tensor | None) -> tuple[Any, ...]:
    """What tells one weight, and the way in which it is used, from others."""
    return () if weight is None else (weight.data_ptr(), tuple(weight.shape), weight.stride())


def _transposed(key: tuple[Any, ...]) -> tuple[Any, ...]:
    """The key of a matrix that is used the other way round; of any other weight, one that no weight has."""
    pointer, shape, stride = key
    return (pointer, shape[::-1], stride[::-1]) if len(shape) == 2 and shape != (1, 1) else (None,)


def _same_of_shared(calls: Sequence[_Call], parts: Sequence[Parts]) -> list[Parts]:
    """Calls with one and the same weight lose the same inputs."""
    together: dict[tuple[Any, ...], Parts] = {}
    for call, own in zip(calls, parts, strict=True):
        if call.weight:
            together[call.weight] = _united(together.get(call.weight, {}), own)
    return [together[call.weight] if call.weight else own for call, own in zip(calls, parts, strict=True)]


@contextmanager
def _disturbed(model: nn.Module, removed: Units) -> Iterator[None]:
    """Make what the requested units give not a number, wherever their layers are run: of heads, their values."""
    hooks = []
    for layer, units in removed.items():
        module: Any = model.get_submodule(layer)
        if (heads := getattr(module, "prunable_heads", None)) is None:
            hooks.append(module.register_forward_hook(_after(units)))
        else:
            name, parts = next((name, parts) for name, parts in heads.writes if name in ("qkv", "v"))
            first = (parts - 1) * heads.count * heads.width
            rows = [first + unit * heads.width + i for unit in units for i in range(heads.width)]
            hooks.append(getattr(module, name).register_forward_hook(_after(rows)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _after(channels: Sequence[int]) -> Any:
    def hook(module: nn.Module, _: Any, output: torch.Tensor) -> torch.Tensor:
        return _spoilt(output, -1 if isinstance(module, nn.Linear) else 1, channels)

    return hook


def _spoilt(output: torch.Tensor, dim: int, channels: Sequence[int]) -> torch.Tensor:
    index = torch.tensor(list(channels), device=output.device)
    return output.index_fill(dim, index, float("nan"))


class _Recorded(Operations):
    """Keeps the outputs of what reads channels, and which weights it reads them with.

    `parameters` are the addresses of the network's: those of activations are used again and again.
    """

    def __init__(self, parameters: set[int]) -> None:
        super().__init__()
        self._parameters = parameters
        self.calls: list[_Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if (kind := kind_of(func)) is not None:
            weight = args[weight_at(func)] if kind == "weights" else None
            key = _weight_key(weight) if weight is not None and weight.data_ptr() in self._parameters else ()
            self.calls.append(_Call(name_of(func), key, [t.clone() for t in outputs_of(output)]))
        return output


class _Observed(Operations):
    """Sees which inputs of what reads channels are not a number any more, and goes on with undisturbed outputs.

    Where one of the requested `weights` is used outside of its layer too, what that gives is disturbed in the same way.
    """

    def __init__(self, calls: Sequence[_Call], weights: Mapping[tuple[Any, ...], tuple[int, ...]]) -> None:
        super().__init__()
        self._calls = calls
        self._weights = weights
        self._spoilt_masks: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.parts: list[Parts] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        kind = kind_of(func)
        if kind is None:
            if name_of(func) in ("constant_pad_nd", "cat"):
                output = _beside_spoilt(args[0], output)
            return self._kept_visible(func, args, output)
        call = self._calls[len(self.parts)]
        if kind == "weights":
            self.parts.append(read_parts(func, args))
            output = _as_returned(output, call.outputs) if self.parts[-1] else output
            return self._tied(func, args, output)
        changed = self._spoilt(args[0])
        self.parts.append(norm_parts(func, args, changed) if changed is not None else {})
        if not self.parts[-1] or changed is None:
            return output
        if call.outputs[0].shape != args[0].shape:
            return _as_returned(output, call.outputs)
        # A norm gives the removed channels too, and they are still theirs.
        spoilt = call.outputs[0].masked_fill(changed, float("nan"))
        return _as_returned(output, [spoilt, *call.outputs[1:]])

    def _kept_visible(self, func: Any, args: Any, output: Any) -> Any:
        """What is computed element by element from no number may be one, such as a comparison, a sign or a cast to
        whole numbers: it counts as none all the same."""
        if not isinstance(output, torch.Tensor) or not (is_pointwise(func) or name_of(func) == "_to_copy"):
            return output
        spoilt = [found for a in tensors_in(args) if (found := self._spoilt(a)) is not None and found.any()]
        if not spoilt:
            return output
        mask = torch.zeros_like(output, dtype=torch.bool)
        for one in spoilt:
            mask = mask | one
        if not output.is_floating_point():
            self._spoilt_masks[id(output)] = (output, mask)
            return output
        is_in_place = output is args[0]
        return output.masked_fill_(mask, float("nan")) if is_in_place else output.masked_fill(mask, float("nan"))

    def _spoilt(self, tensor: torch.Tensor) -> torch.Tensor | None:
        if tensor.is_floating_point():
            return tensor.isnan()
        return self._spoilt_masks[id(tensor)][1] if id(tensor) in self._spoilt_masks else None

    def _tied(self, func: Any, args: Any, output: Any) -> Any:
        weight = args[weight_at(func)]
        if name_of(func) == "convolution":
            units, dim = self._weights.get(_weight_key(weight)), 1
        else:
            units, dim = self._weights.get(_weight_key(weight.mT)), -1
        return _spoilt(output, dim, units) if units else output


def _beside_spoilt(given: Any, output: torch.Tensor) -> torch.Tensor:
    """What stands beside a channel that is not a number, such as its padding or a class token's, is not one either."""
    for part in given if isinstance(given, tuple | list) else [given]:
        spoilt = part.isnan() if part.ndim == output.ndim and part.is_floating_point() else None
        if spoilt is None or not spoilt.any() or spoilt.all():
            continue
        grown = [dim for dim in range(part.ndim) if part.shape[dim] != output.shape[dim]]
        if all(is_constant(spoilt, dim) for dim in grown):
            for dim in grown:
                spoilt = spoilt.narrow(dim, 0, 1)
            output = output.masked_fill(spoilt, float("nan"))
    return output


def _as_returned(output: Any, tensors: Sequence[torch.Tensor]) -> Any:
    """`tensors` in the form that an operation returns them in."""
    if isinstance(output, torch.Tensor):
        return tensors[0].clone()
    return type(output)([t.clone() for t in tensors])
