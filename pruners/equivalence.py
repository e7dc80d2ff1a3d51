"""compact == masked: the pruned network computes what the dense one does with its units silenced.

The masked network is the dense one; what weight layers read of the removed units is multiplied by zero, and norms,
softmaxes and sums over channels see the others alone. What to silence is not taken from surgery: the requested units
of the dense network are disturbed, and what changes at the operations after them is what belongs to them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pruners.dispatch import Operations, is_pointwise, name_of
from pruners.labels import tensors_in
from pruners.surgery import Units

LIMIT = 1e-9
"""Largest relative difference allowed with exact propagation, in float64."""

PROBE_SAMPLES = 8
OBSERVED_SAMPLES = 2
"""Samples on which is found what belongs to the removed units; that does not depend on their values."""


class NoReference(Exception):
    """Why no masked network can be built."""


class NotRead(Exception):
    """Nothing was seen to read the removed units: what is computed of them hides them."""


class _OtherCalls(Exception):
    """The network calls other operations than were observed."""


@dataclass(frozen=True)
class Equivalence:
    """Relative difference between the compact and the masked network, and the reason where it is null or infinite."""

    error: float | None
    reason: str | None = None


def equivalence(
    dense: nn.Module, compact: nn.Module, removed: Units, probe: Any, partners: Units | None = None
) -> Equivalence:
    """Return max |compact - masked| / max |masked| on `probe`, in float64 and eval mode.

    `probe` are inputs [N, ...], a tensor or a mapping of tensors. `partners` are units of other layers that are said to
    share their channels with the removed ones, as the branches of a sum do; those that do not are left as they are.
    The error is null, with the reason, where no masked network can be built.
    """
    samples = _double(probe)
    reference, pruned = copy.deepcopy(dense).double().eval(), copy.deepcopy(compact).double().eval()
    with torch.no_grad(), _in_float64():
        got = _logits(pruned(samples))
        try:
            return Equivalence(_compared(got, reference, removed, samples, partners or {}, OBSERVED_SAMPLES))
        except NoReference as error:
            return Equivalence(None, str(error))
        except NotRead as error:
            return Equivalence(float("inf"), str(error))
        except _OtherCalls:  # a network that does not call the same operations for every number of samples
            return Equivalence(_compared(got, reference, removed, samples, partners or {}, PROBE_SAMPLES))


def _compared(
    got: torch.Tensor, reference: nn.Module, removed: Units, samples: Any, partners: Units, observed: int
) -> float:
    """The difference, once what belongs to the removed units was observed on so many of the samples."""
    silencer = _Silencer(reference, _first(samples, observed))
    silencer.add(removed)
    found = _difference(got, reference, samples, silencer)
    for each_alone in (False, True):  # of most networks whole layers say enough
        if found > LIMIT and partners and silencer.add_partners(partners, each_alone):
            found = _difference(got, reference, samples, silencer)
    return found


def _difference(got: torch.Tensor, reference: nn.Module, samples: Any, silencer: _Silencer) -> float:
    with _Masked(silencer.names(), silencer.parts()) as masked:
        expected = _logits(reference(samples))
    masked.check_complete()
    if got.shape != expected.shape:
        return float("inf")
    return float((got - expected).abs().max()) / (float(expected.abs().max()) or 1.0)


def _logits(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


def _double(probe: Any) -> Any:
    if isinstance(probe, Mapping):
        return {name: _double(tensor) for name, tensor in probe.items()}
    return probe.double() if probe.is_floating_point() else probe


def _first(probe: Any, n: int) -> Any:
    return {name: tensor[:n] for name, tensor in probe.items()} if isinstance(probe, Mapping) else probe[:n]


@contextmanager
def _in_float64() -> Iterator[None]:
    """Compute in float64 also where a network asks for float32; attention step by step, as it is in training."""
    fast, default = torch.backends.mha.get_fastpath_enabled(), torch.get_default_dtype()
    torch.backends.mha.set_fastpath_enabled(False)
    torch.set_default_dtype(torch.float64)
    try:
        with _Float64():
            yield
    finally:
        torch.set_default_dtype(default)
        torch.backends.mha.set_fastpath_enabled(fast)


class _Float64(Operations):
    """Makes every float32 tensor that an operation is given, or is to make, one of float64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*_doubled(args), **_doubled(kwargs or {}))


def _doubled(given: Any) -> Any:
    if isinstance(given, torch.Tensor):
        return given.double() if given.dtype == torch.float32 else given
    if isinstance(given, tuple | list):
        return type(given)(_doubled(one) for one in given)
    if isinstance(given, dict):
        return {name: _doubled(one) for name, one in given.items()}
    return torch.float64 if given is torch.float32 else given


# -- what belongs to the units -----------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """The slices of a dimension of one input of an operation that belong to the removed units."""

    dim: int
    indices: tuple[int, ...]


Parts = dict[int, Part]
"""Factor of a product (0 or 1), or 0 of what a norm or a sum is over -> what of it belongs to the removed units."""


@dataclass(frozen=True)
class _Call:
    """A call of an operation that reads channels, on the undisturbed network."""

    name: str
    weight: tuple[Any, ...]
    outputs: list[torch.Tensor]


class _Silencer:
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


# -- the operations that read channels ---------------------------------------------------------------


def _kind(func: Any) -> str | None:
    """`weights` of what multiplies with weights, `statistic` of what sums or normalises; None of any other."""
    name = name_of(func)
    if name in _CONTRACTIONS:
        return "weights"
    return "statistic" if name in _STATISTICS else None


_CONTRACTIONS: Mapping[str, tuple[tuple[int, int], ...]] = {
    "convolution": ((0, 1),),
    "mm": ((0, -1), (1, -2)),
    "bmm": ((0, -1), (1, -2)),
    "addmm": ((1, -1), (2, -2)),
    "baddbmm": ((1, -1), (2, -2)),
}
"""Operation -> (argument, the dimension that it sums over)."""

_SUMS = (
    "mean",
    "sum",
    "amax",
    "amin",
    "max",
    "min",
    "prod",
    "var",
    "std",
    "var_mean",
    "std_mean",
    "nansum",
    "linalg_vector_norm",
    "logsumexp",
)
_STATISTICS = ("native_layer_norm", "native_group_norm", "_softmax", "_log_softmax", *_SUMS)


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
        if (kind := _kind(func)) is not None:
            weight = args[_weight_at(func)] if kind == "weights" else None
            key = _weight_key(weight) if weight is not None and weight.data_ptr() in self._parameters else ()
            self.calls.append(_Call(name_of(func), key, [t.clone() for t in _outputs(output)]))
        return output


def _weight_at(func: Any) -> int:
    """Which argument of a product is the second factor."""
    return _CONTRACTIONS[name_of(func)][-1][0] if name_of(func) != "convolution" else 1


def _outputs(output: Any) -> list[torch.Tensor]:
    return [t for t in (output if isinstance(output, tuple | list) else [output]) if isinstance(t, torch.Tensor)]


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
        kind = _kind(func)
        if kind is None:
            if name_of(func) in ("constant_pad_nd", "cat"):
                output = _beside_spoilt(args[0], output)
            return self._kept_visible(func, args, output)
        call = self._calls[len(self.parts)]
        if kind == "weights":
            self.parts.append(_read_parts(func, args))
            output = _as_returned(output, call.outputs) if self.parts[-1] else output
            return self._tied(func, args, output)
        changed = self._spoilt(args[0])
        self.parts.append(_norm_parts(func, args, changed) if changed is not None else {})
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
        weight = args[_weight_at(func)]
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
        if all(_is_constant(spoilt, dim) for dim in grown):
            for dim in grown:
                spoilt = spoilt.narrow(dim, 0, 1)
            output = output.masked_fill(spoilt, float("nan"))
    return output


def _as_returned(output: Any, tensors: Sequence[torch.Tensor]) -> Any:
    """`tensors` in the form that an operation returns them in."""
    if isinstance(output, torch.Tensor):
        return tensors[0].clone()
    return type(output)([t.clone() for t in tensors])


def _along(changed: torch.Tensor, dim: int) -> list[int]:
    """The slices of a dimension in which something differs."""
    others = [d for d in range(changed.ndim) if d != dim % changed.ndim]
    found = changed.amax(others) if others else changed
    return found.nonzero().flatten().tolist()


def _is_constant(changed: torch.Tensor, dim: int) -> bool:
    return bool((changed == changed.narrow(dim, 0, 1)).all())


def _read_parts(func: Any, args: Any) -> Parts:
    """What a product sums over of the disturbed units; rows that are disturbed as a whole go through it."""
    name = name_of(func)
    if name == "convolution" and args[8] > 1:  # each channel for itself: it goes on as one
        return {}
    parts: Parts = {}
    for factor, (argument, dim) in enumerate(_CONTRACTIONS[name]):
        differs = args[argument].isnan()
        if not differs.any():
            continue
        is_whole = _is_constant(differs, dim % differs.ndim)
        if is_whole and (name != "convolution" or not _all_samples(differs)):
            continue
        parts[factor] = Part(dim, tuple(_along(differs, dim)))
    return parts


def _all_samples(differs: torch.Tensor) -> bool:
    return bool(differs.flatten(1).any(1).all())


def _norm_parts(func: Any, args: Any, changed: torch.Tensor) -> Parts:
    """What a norm or a sum takes its statistics over of the disturbed units."""
    name = name_of(func)
    dims = _statistic_dims(func, name, args, changed.ndim)
    along = [dim for dim in dims if changed.any() and not _is_constant(changed, dim)]
    if not along:
        return {}
    wide = [dim for dim in along if _whole_slices(changed, dim)]
    if not wide and name in _SUMS:  # such as the larger of two channels: it goes with either of them
        return {}
    dim = (wide or along)[0]
    return {0: Part(dim, tuple(_along(changed, dim)))}


def _whole_slices(changed: torch.Tensor, dim: int) -> bool:
    """Whether what differs are slices of this dimension, and the same ones everywhere."""
    return all(_is_constant(changed, other) for other in range(changed.ndim) if other != dim)


def _statistic_dims(func: Any, name: str, args: Any, ndim: int) -> list[int]:
    if name == "native_layer_norm":
        return list(range(ndim - len(args[1]), ndim))
    if name == "native_group_norm":
        return list(range(1, ndim))
    names = [argument.name for argument in func._schema.arguments]
    if "dim" not in names:
        return list(range(ndim))
    at = names.index("dim")
    given = args[at] if at < len(args) else None
    if given is None or (isinstance(given, tuple | list) and not given):
        return list(range(ndim))
    return [dim % ndim for dim in (given if isinstance(given, tuple | list) else [given])]


# -- the masked network ------------------------------------------------------------------------------


class _Masked(Operations):
    """Runs a network with the removed units silenced: zeros for weights, not there for norms and sums."""

    def __init__(self, names: Sequence[str], silenced: Sequence[Parts]) -> None:
        super().__init__()
        self._names, self._silenced, self._at = names, silenced, 0

    def _next(self, name: str) -> Parts:
        self._at += 1
        if self._at > len(self._names) or self._names[self._at - 1] != name:
            raise _OtherCalls
        return self._silenced[self._at - 1]

    def check_complete(self) -> None:
        """Raise _OtherCalls where the network did not call all that was observed."""
        if self._at != len(self._names):
            raise _OtherCalls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = _kind(func)
        parts = self._next(name_of(func)) if kind is not None else {}
        if not parts:
            return func(*args, **(kwargs or {}))
        given = list(args)
        if kind == "weights":
            for factor, part in parts.items():
                at = _CONTRACTIONS[name_of(func)][factor][0]
                given[at] = _zeroed(given[at], part)
            return func(*given, **(kwargs or {}))
        return _on_kept(func, given, kwargs or {}, parts[0])


def _zeroed(tensor: torch.Tensor, part: Part) -> torch.Tensor:
    index = torch.tensor(part.indices, dtype=torch.int64, device=tensor.device)
    return tensor.index_fill(part.dim, index, 0.0)


def _on_kept(func: Any, args: list[Any], kwargs: Mapping[str, Any], part: Part) -> Any:
    """A norm or a sum of the kept slices; a norm gives zeros in place of the others."""
    x, name = args[0], name_of(func)
    kept = torch.tensor([i for i in range(x.shape[part.dim]) if i not in set(part.indices)], device=x.device)
    args[0] = x.index_select(part.dim, kept)
    if name == "native_layer_norm":
        own = part.dim - (x.ndim - len(args[1]))
        args[1] = [len(kept) if i == own else n for i, n in enumerate(args[1])]
        for at in (2, 3):
            args[at] = None if args[at] is None else args[at].index_select(own, kept)
    elif name == "native_group_norm":
        if len(kept) % args[6]:
            raise NoReference(f"the channels that are left do not divide into the {args[6]} groups of a norm")
        args[4] = len(kept)
        for at in (1, 2):
            args[at] = None if args[at] is None else args[at].index_select(0, kept)
    output = func(*args, **kwargs)
    first = _outputs(output)[0]
    if first.ndim != x.ndim or first.shape[part.dim] != len(kept) or name in _SUMS:
        return output
    whole = torch.zeros_like(x).index_copy(part.dim, kept, first)
    return whole if isinstance(output, torch.Tensor) else (whole, *output[1:])
