"""compact == masked: the pruned network computes what the dense one does with its units silenced.

The masked network multiplies the removed channels by zero where the next weight layers read them,
after norm and activation.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pruners.surgery import Coupling, Units, couplings

LIMIT = 1e-9
"""Largest relative difference allowed with exact propagation, in float64."""

PROBE_SAMPLES = 8

_READS_CHANNELS_LAST = (nn.Linear,)
_WEIGHT_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_STATISTICS_OVER_CHANNELS = (nn.LayerNorm, nn.GroupNorm, nn.MultiheadAttention)


@dataclass(frozen=True)
class Equivalence:
    """Relative difference between the compact and the masked network, or the reason for none."""

    error: float | None
    reason: str | None = None


def equivalence(dense: nn.Module, compact: nn.Module, removed: Units, probe: torch.Tensor) -> Equivalence:
    """max |compact - masked| / max |masked| on `probe` [N, C, H, W], in float64 and eval mode."""
    reference = copy.deepcopy(dense).double().eval()
    example = probe.double()
    found = [one for coupled in couplings(reference, removed, example).values() for one in coupled]
    mixing = [c.module for c in found if isinstance(reference.get_submodule(c.module), _STATISTICS_OVER_CHANNELS)]
    if mixing:
        return Equivalence(None, f"{mixing[0]} takes statistics over the removed units")
    with torch.no_grad():
        got = copy.deepcopy(compact).double().eval()(example)
        with _silenced(reference, found):
            expected = reference(example)
    return Equivalence(float((got - expected).abs().max() / expected.abs().max()))


@contextmanager
def _silenced(model: nn.Module, found: Sequence[Coupling]) -> Iterator[None]:
    """Multiply by zero what every weight layer that is coupled by its inputs reads of them."""
    readers = [c for c in found if not c.outputs and isinstance(model.get_submodule(c.module), _WEIGHT_LAYERS)]
    assert readers, "no layer reads the removed units"
    hooks = [_silence(model.get_submodule(c.module), c.indices) for c in readers]
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
