"""What networks are called with, where there is no data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def example_input(model: nn.Module, shape: tuple[int, ...]) -> Any:
    """A batch of one that a network for inputs [N, *shape] (channels, height, width) can be called with: zeros, or
    what it says itself (`example_input`), as one that takes a mapping must."""
    import torch

    own = getattr(model, "example_input", None)
    return torch.zeros(1, *shape) if own is None else own()
