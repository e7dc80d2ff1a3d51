"""What picking the candidate of lowest loss costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from storage.statistics.association import NAN, paired


def lowest(x: np.ndarray) -> int:
    """Index of the candidate that oracle pruning picks: the lowest x, ties to the lowest index."""
    return int(np.argmin(x))


def better_than_picked(x: np.ndarray, y: np.ndarray, *, higher: bool = True) -> np.ndarray:
    """Which candidates are strictly better in y than the one with the lowest x; bool [n]."""
    return y > y[lowest(x)] if higher else y < y[lowest(x)]


def anomaly_ratio(x: Sequence[Any], y: Sequence[Any], *, higher: bool = True) -> float:
    """Share of candidates strictly better in y than the one with the lowest x, which counts in the
    denominator (arXiv 2412.00143). NaN with fewer than two candidates."""
    a, b, _ = paired(x, y)
    return float(better_than_picked(a, b, higher=higher).mean()) if len(a) > 1 else NAN
