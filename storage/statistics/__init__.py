"""Statistics of one cell, over its candidates. scipy computes what scipy has."""

from storage.statistics.association import (
    NAN,
    Correlation,
    correlation,
    correlations,
    higher_is_better,
    kendall,
    kendalls,
    paired,
    pearson,
    spearman,
)
from storage.statistics.picks import anomaly_ratio, better_than_picked, lowest
from storage.statistics.resampling import kendall_ci

__all__ = [
    "NAN",
    "Correlation",
    "anomaly_ratio",
    "better_than_picked",
    "correlation",
    "correlations",
    "higher_is_better",
    "kendall",
    "kendall_ci",
    "kendalls",
    "lowest",
    "paired",
    "pearson",
    "spearman",
]
