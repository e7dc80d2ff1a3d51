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

from pruners.dispatch import Operations, name_of
from pruners.readers import CONTRACTIONS, SUMS, NoReference, Part, Parts, kind_of, outputs_of
from pruners.silencing import NotRead, Silencer
from pruners.surgery import Units

LIMIT = 1e-9
"""Largest relative difference allowed with exact propagation, in float64."""

PROBE_SAMPLES = 8
OBSERVED_SAMPLES = 2
"""Samples on which is found what belongs to the removed units; that does not depend on their values."""


class OtherCalls(Exception):
    """The network calls other operations than those that were observed."""


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
        except OtherCalls:  # a network that does not call the same operations for every number of samples
            return Equivalence(_compared(got, reference, removed, samples, partners or {}, PROBE_SAMPLES))


def _compared(
    got: torch.Tensor, reference: nn.Module, removed: Units, samples: Any, partners: Units, observed: int
) -> float:
    """The difference, once what belongs to the removed units was observed on so many of the samples."""
    silencer = Silencer(reference, _first(samples, observed))
    silencer.add(removed)
    found = _difference(got, reference, samples, silencer)
    for each_alone in (False, True):  # of most networks whole layers say enough
        if found > LIMIT and partners and silencer.add_partners(partners, each_alone):
            found = _difference(got, reference, samples, silencer)
    return found


def _difference(got: torch.Tensor, reference: nn.Module, samples: Any, silencer: Silencer) -> float:
    with Masked(silencer.names(), silencer.parts()) as masked:
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


# -- the masked network ------------------------------------------------------------------------------


class Masked(Operations):
    """Runs a network with the removed units silenced: zeros for weights, not there for norms and sums."""

    def __init__(self, names: Sequence[str], silenced: Sequence[Parts]) -> None:
        super().__init__()
        self._names, self._silenced, self._at = names, silenced, 0

    def _next(self, name: str) -> Parts:
        self._at += 1
        if self._at > len(self._names) or self._names[self._at - 1] != name:
            raise OtherCalls
        return self._silenced[self._at - 1]

    def check_complete(self) -> None:
        """Raise OtherCalls where the network did not call all that was observed."""
        if self._at != len(self._names):
            raise OtherCalls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = kind_of(func)
        parts = self._next(name_of(func)) if kind is not None else {}
        if not parts:
            return func(*args, **(kwargs or {}))
        given = list(args)
        if kind == "weights":
            for factor, part in parts.items():
                at = CONTRACTIONS[name_of(func)][factor][0]
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
    first = outputs_of(output)[0]
    if first.ndim != x.ndim or first.shape[part.dim] != len(kept) or name in SUMS:
        return output
    whole = torch.zeros_like(x).index_copy(part.dim, kept, first)
    return whole if isinstance(output, torch.Tensor) else (whole, *output[1:])
