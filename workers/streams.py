"""Named random streams: every random choice comes from one, derived from (data set, seed, name).

Never from the candidate or the pruner, so that seeds are crossed with candidates; never from a
global generator.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from storage.records import kind_of

if TYPE_CHECKING:
    import torch


def stream_seed(dataset: str, seed: int, name: str) -> int:
    """63 bits that only this stream has. Where a folder of data lies does not matter, as in ids."""
    key = f"prunesweep/{kind_of(dataset)}/{seed}/{name}"
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) >> 1


def generator(dataset: str, seed: int, name: str) -> torch.Generator:
    """A CPU generator at the start of a stream."""
    import torch

    return torch.Generator().manual_seed(stream_seed(dataset, seed, name))


@contextmanager
def seeded(dataset: str, seed: int, name: str) -> Iterator[None]:
    """Run library code that draws from the global generators: saved, seeded, restored."""
    import numpy as np
    import torch

    value = stream_seed(dataset, seed, name)
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(value)
        np.random.seed(value % 2**32)
        torch.manual_seed(value)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
