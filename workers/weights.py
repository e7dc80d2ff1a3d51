"""Weights as safetensors, with what is known about them as JSON in one metadata key."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

METADATA = "prunesweep"
"""The one metadata key of our safetensors files; several would come in no fixed order."""


def packed(tensors: Mapping[str, torch.Tensor], about: Any) -> bytes:
    """A safetensors file's content: the same for the same tensors and `about`."""
    from safetensors.torch import save

    contiguous = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    return save(_apart(contiguous), {METADATA: json.dumps(about, sort_keys=True, separators=(",", ":"))})


def _apart(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors that are one (an embedding that is the head too), each with memory of its own, as safetensors asks."""
    seen: set[int] = set()
    apart: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        place = tensor.data_ptr()
        apart[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return apart


def metadata(content: bytes) -> dict[str, Any]:
    """What one of our safetensors files says about itself. Raises ValueError for any other file."""
    length = int.from_bytes(content[:8], "little")
    try:
        return json.loads(json.loads(content[8 : 8 + length])["__metadata__"][METADATA])
    except (KeyError, ValueError) as error:
        raise ValueError("not a file that prunesweep wrote") from error


def portable(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state of `model` on the CPU and contiguous, its low-rank additions merged: a copy."""
    import torch

    from models.multimodal import merged

    return {
        n: t.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for n, t in merged(model).state_dict().items()
    }
