"""What tests know of samples."""

from __future__ import annotations

from workers.datasets import Samples, Split


def in_memory(samples: Samples) -> Split:
    """Samples that are held in memory as tensors."""
    assert isinstance(samples, Split)
    return samples
