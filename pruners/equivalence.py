"""compact == masked: the pruned network computes what the dense one does with its units silenced.

The masked network multiplies the removed channels by zero where the next weight layers read them, after norm and
activation. A layer norm over removed channels is evaluated on those that are kept.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from pruners.surgery import Coupling, Units, couplings, cut

LIMIT = 1e-9
"""Largest relative difference allowed with exact propagation, in float64."""

PROBE_SAMPLES = 8

_READS_CHANNELS_LAST = (nn.Linear,)
_WEIGHT_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear)


@dataclass(frozen=True)
class Equivalence:
    """Relative difference between the compact and the masked network, or the reason for none."""

    error: float | None
    reason: str | None = None


def equivalence(dense: nn.Module, compact: nn.Module, removed: Units, probe: Any) -> Equivalence:
    """max |compact - masked| / max |masked| on `probe`, in float64 and eval mode.

    `probe` are inputs [N, ...], a tensor or a mapping of tensors. The error is null, with the reason, where no
    masked network can be built.
    """
    example = _double(probe)
    reference = copy.deepcopy(dense).double().eval()
    found = [one for coupled in couplings(reference, removed, _first(example)).values() for one in coupled]
    over = {_norm_of(reference, c): c for c in found}
    mixing = [name for name in over if name is not None and _mixes_groups(reference.get_submodule(name))]
    if mixing:
        return Equivalence(None, f"{mixing[0]} takes statistics over groups, which the removed units change")
    norms = {name: replace(c, indices=_all_indices(found, c)) for name, c in over.items() if name is not None}
    readers = [c for c in found if not c.outputs and isinstance(_module(reference, c), _WEIGHT_LAYERS)]
    if not readers:
        return Equivalence(None, "no layer reads the removed units")
    with torch.no_grad():
        got = copy.deepcopy(compact).double().eval()(example)
        with _silenced(reference, readers, norms):
            expected = reference(example)
    scale = float(expected.abs().max())
    return Equivalence(float((got - expected).abs().max()) / (scale or 1.0))


def _double(probe: Any) -> Any:
    if isinstance(probe, Mapping):
        return {name: _double(tensor) for name, tensor in probe.items()}
    return probe.double() if probe.is_floating_point() else probe


def _first(probe: Any) -> Any:
    return {name: tensor[:1] for name, tensor in probe.items()} if isinstance(probe, Mapping) else probe[:1]


def _module(model: nn.Module, coupled: Coupling) -> nn.Module | None:
    return model.get_submodule(coupled.module) if coupled.dim is None else None


def _norm_of(model: nn.Module, coupled: Coupling) -> str | None:
    """The norm that takes statistics over these channels: the module, or the one whose tensor it is; or None."""
    name = coupled.module if coupled.dim is None else coupled.module.rpartition(".")[0]
    module = model.get_submodule(name)
    each_alone = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
    return name if "norm" in type(module).__name__.lower() and not isinstance(module, each_alone) else None


def _mixes_groups(module: nn.Module) -> bool:
    return isinstance(module, nn.GroupNorm) and module.num_groups > 1


def _all_indices(found: Sequence[Coupling], norm: Coupling) -> tuple[int, ...]:
    """Of a norm over a concatenation, what all layers remove."""
    return tuple(sorted({i for c in found if c.module == norm.module for i in c.indices}))


@contextmanager
def _silenced(model: nn.Module, readers: Sequence[Coupling], norms: Mapping[str, Coupling]) -> Iterator[None]:
    """Multiply by zero what weight layers read of the removed channels; norms do not see them."""
    hooks = [_silence(model.get_submodule(c.module), c.indices) for c in readers]
    hooks += [_on_kept(model.get_submodule(name), c) for name, c in norms.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _silence(module: nn.Module, channels: Sequence[int]) -> Any:
    dim = -1 if isinstance(module, _READS_CHANNELS_LAST) else 1

    def zero(_: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        shape = [1] * inputs[0].ndim
        shape[dim] = inputs[0].shape[dim]
        mask = torch.ones(shape[dim], dtype=inputs[0].dtype, device=inputs[0].device)
        mask[list(channels)] = 0
        return (inputs[0] * mask.reshape(shape),)

    return module.register_forward_pre_hook(zero)


def _on_kept(norm: nn.Module, coupled: Coupling) -> Any:
    """Let a norm give what it would give of the kept channels alone, and zero for the others."""
    own = coupled.module.rpartition(".")[2] if coupled.dim is not None else ""
    tensors = [name for name, p in norm.named_parameters(recurse=False) if own and p.numel() > 1]
    smaller = nn.Sequential(copy.deepcopy(norm))
    parts = [replace(coupled, module=f"0.{name}") for name in tensors] or [replace(coupled, module="0")]
    cut(smaller, parts)
    gone = set(coupled.indices)

    def replaced(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        (x,) = inputs
        dim = _channel_dim(module, x)
        kept = torch.tensor([i for i in range(x.shape[dim]) if i not in gone], device=x.device)
        return torch.zeros_like(output).index_copy(dim, kept, smaller(x.index_select(dim, kept)))

    return norm.register_forward_hook(replaced)


def _channel_dim(norm: nn.Module, x: torch.Tensor) -> int:
    """Where the channels of a norm's input are: by its number of them; where that is in doubt, by its name."""
    size = max(p.numel() for p in norm.parameters())
    places = [dim for dim in range(1, x.ndim) if x.shape[dim] == size]
    if len(places) == 1:
        return places[0]
    return 1 if type(norm).__name__.endswith("2d") or isinstance(norm, nn.GroupNorm) else x.ndim - 1
