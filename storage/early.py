"""Early epochs as proxies: how well the accuracy after k epochs of retraining orders candidates as y does."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from storage.correlate import CellData, cell_data
from storage.phases import Report, silent
from storage.sql import quoted, views
from storage.statistics import kendalls, paired
from storage.statistics.records import EarlyEpoch
from storage.statistics.resampling import RESAMPLES, tau_interval

if TYPE_CHECKING:
    from storage.rowfiles import Problem
    from storage.store import Store

CURVE, BEFORE = "epoch_test_accuracy", "pruned_test_accuracy"

_CURVES = f"""select cell_id, candidate, {CURVE}
from tasks where sweep = {{sweep}} and status = 'done' order by cell_id, candidate, seed"""


def early(
    store: Store,
    sweep: str,
    x: str,
    y: str,
    where: str | None = None,
    report: Callable[[Problem], None] | None = None,
    *,
    resamples: int = RESAMPLES,
    phase: Report = silent,
) -> list[EarlyEpoch]:
    """Per cell and epoch, epoch 0 being before retraining; accuracies are averaged over seeds. Raises QueryError.

    A candidate without a finite accuracy at an epoch, as one that diverged, is left out there.
    """
    cells = cell_data(store, sweep, (x, y, BEFORE), where, report)
    with views(store) as found:
        lines = found.ask(_CURVES.format(sweep=quoted(sweep)))
    keys = np.array(lines["cell_id"].to_pylist()), lines["candidate"].to_numpy()
    made: list[EarlyEpoch] = []
    for number, cell in enumerate(cells, 1):
        phase("comparing the epochs of cell", number, len(cells))
        made += _epochs(cell, _curves(cell, lines, *keys), x, y, resamples)
    return made


def _curves(cell: CellData, lines: pa.Table, cell_ids: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """Accuracy of each candidate before retraining and after each epoch, averaged over seeds: [n, 1 + epochs]."""
    chosen = np.flatnonzero((cell_ids == cell.cell_id) & np.isin(candidates, cell.candidate))
    given = [list(curve or ()) for curve in lines[CURVE].take(pa.array(chosen)).to_pylist()]
    longest = max(map(len, given), default=0)
    curves = np.full((len(given), longest), np.nan)
    for at, curve in enumerate(given):
        curves[at, : len(curve)] = [np.nan if value is None else value for value in curve]
    seeds = len(given) // max(len(cell.candidate), 1)
    before = np.asarray(cell.columns[BEFORE], dtype=np.float64)[:, None]
    if not seeds:
        return before
    # Rounded as the view's means are: equal sums must be equal means.
    means = curves.reshape(len(cell.candidate), seeds, longest).mean(1).round(12)
    return np.concatenate([before, means], axis=1)


def _epochs(cell: CellData, curves: np.ndarray, x: str, y: str, resamples: int) -> list[EarlyEpoch]:
    a, b = (np.asarray(cell.columns[name], dtype=np.float64) for name in (x, y))
    if curves.shape[1] < 2:
        return []
    taus = kendalls([(curve, b) for curve in curves.T])
    of_x = kendalls([(a, curve) for curve in curves.T])
    return [
        EarlyEpoch(
            cell_id=cell.cell_id,
            cell=cell.title,
            epoch=epoch,
            n=int((np.isfinite(curve) & np.isfinite(b)).sum()),
            tau=taus[epoch],
            tau_interval=tau_interval(*paired(curve, b)[:2], resamples),
            tau_x=of_x[epoch],
        )
        for epoch, curve in enumerate(curves.T)
    ]
