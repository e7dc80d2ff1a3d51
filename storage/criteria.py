"""The criterion bench: which number known before retraining predicts y best, and whether the lead is real."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from storage.claims import expected_sign, seed_of
from storage.statistics import kendall
from storage.statistics.noise import noise_of
from storage.statistics.p_values import holm, kendall_p
from storage.statistics.records import NO_INTERVAL, Difference, Interval, Predictor
from storage.statistics.resampling import FEWEST, MOST, RESAMPLES, bca, left_out, percentile, resampled, tau_of

if TYPE_CHECKING:
    from storage.correlate import CellData
    from storage.store import Store

ALL_CELLS = "all cells"
MOSTLY = 0.9
"""A predictor that fewer of the candidates have is left out of a cell: the others would be judged by those few."""
REAL = 0.05
"""A difference is real with at most this p, adjusted by Holm over the pairs of its cell."""


def predictors(store: Store, sweep: str) -> list[str]:
    """The numbers known before retraining that candidates of a sweep have: the pruned train loss and the scores."""
    from storage.schema import COLUMNS
    from storage.sql import quoted, views

    names = ["pruned_train_loss", *(name for name in COLUMNS["criterion scores"] if name != "score_extra")]
    counts = ", ".join(f"count({name}) as {name}" for name in names)
    with views(store) as found:
        line = found.ask(f"select {counts} from candidates where sweep = {quoted(sweep)}").to_pylist()[0]
    return [name for name in names if line[name]]


def bench(
    cells: Sequence[CellData], y: str, names: Sequence[str] | None = None, *, resamples: int = RESAMPLES
) -> tuple[list[Predictor], list[Difference]]:
    """Every predictor against y, ranked in each cell and, with several cells, over all of them by the mean strength;
    and every pair's difference. `names` are the predictors, all columns but y where left out.

    Over the candidates of a cell that have every predictor it has at all, resampled together: differences are paired.
    The resamples of `all cells` are independent between cells, which are taken as given.
    """
    wanted = [name for name in (names or (list(cells[0].columns) if cells else [])) if name != y]
    measured = [_measured(cell, y, wanted, resamples) for cell in cells]
    parts = [one for one in measured if one.names]
    if len(parts) > 1:
        parts.append(_pooled(parts, wanted))
    lines: list[Predictor] = []
    pairs: list[Difference] = []
    for part in parts:
        differences = _differences(part)
        pairs += differences
        lines += _ranked(part, differences)
    return lines, pairs


@dataclass
class _Part:
    """What a cell, or all of them, gave: of each predictor tau, and tau turned (strength) in each resample."""

    cell_id: str
    title: str
    n: int
    sign: int
    ceiling: float
    names: list[str] = field(default_factory=list)
    tau: dict[str, float] = field(default_factory=dict)
    p: dict[str, float] = field(default_factory=dict)
    interval: dict[str, Interval] = field(default_factory=dict)
    draws: dict[str, np.ndarray] = field(default_factory=dict)


def _measured(cell: CellData, y: str, wanted: Sequence[str], resamples: int) -> _Part:
    columns = {name: np.asarray(cell.columns[name], dtype=np.float64) for name in (*wanted, y)}
    counts_of = {name: int(np.isfinite(columns[name]).sum()) for name in wanted}
    there = [name for name in wanted if counts_of[name] > MOSTLY * max(counts_of.values())]
    keep = np.all([np.isfinite(columns[name]) for name in (*there, y)], axis=0)
    b, n = columns[y][keep], int(keep.sum())
    by_seed = cell.by_seed.get(y)
    noise = noise_of(b, by_seed[keep] if by_seed is not None else None, 0, 0)
    part = _Part(cell.cell_id, cell.title, n, expected_sign("pruned_train_loss", y), noise.ceiling)
    counts = resampled(n, resamples, seed_of(cell)) if FEWEST <= n <= MOST else np.empty((0, n))
    for name in there if n > 1 else []:
        _add(part, name, columns[name][keep], b, counts)
    return part


def _add(part: _Part, name: str, a: np.ndarray, b: np.ndarray, counts: np.ndarray) -> None:
    part.names.append(name)
    part.tau[name], asymptotic = kendall(a.tolist(), b.tolist())
    part.p[name] = kendall_p(a, b, asymptotic)[0]
    statistic = tau_of(a, b)
    draws = statistic(counts) if len(counts) else np.empty(0)
    part.interval[name] = bca(part.tau[name], draws, statistic(left_out(part.n))) if len(draws) else NO_INTERVAL
    part.draws[name] = part.sign * draws


def _pooled(parts: Sequence[_Part], wanted: Sequence[str]) -> _Part:
    """The mean over the cells that have every predictor that any has."""
    names = [name for name in wanted if any(name in part.names for part in parts)]
    whole = [part for part in parts if set(part.names) == set(names)]
    ceilings = [part.ceiling for part in whole]
    pooled = _Part("", ALL_CELLS, sum(part.n for part in whole), parts[0].sign, float(np.mean(ceilings or [np.nan])))
    for name in names if whole else []:
        pooled.names.append(name)
        pooled.tau[name] = float(np.mean([part.tau[name] for part in whole]))
        drawn = [part.draws[name] for part in whole]
        draws = np.mean(drawn, axis=0) if len({len(d) for d in drawn}) == 1 else np.empty(0)
        found = percentile(pooled.sign * draws)
        pooled.draws[name], pooled.interval[name] = draws, found
        pooled.p[name] = _two_sided(draws)
    return pooled


def _two_sided(draws: np.ndarray) -> float:
    """p of no difference from zero: twice the share of resamples on the rarer side, never 0."""
    defined = draws[np.isfinite(draws)]
    if not len(defined):
        return float("nan")
    rarer = min((defined <= 0).sum(), (defined >= 0).sum())
    return float(min(2 * (rarer + 1) / (len(defined) + 1), 1))


def _differences(part: _Part) -> list[Difference]:
    """Of every pair of predictors the stronger less the weaker."""
    found: list[Difference] = []
    for one, other in combinations(part.names, 2):
        lead = part.sign * (part.tau[one] - part.tau[other])
        better, worse = (one, other) if lead >= 0 else (other, one)
        draws = part.draws[better] - part.draws[worse]
        found.append(
            Difference(
                part.cell_id, part.title, better, worse, abs(lead), percentile(draws), _two_sided(draws), float("nan")
            )
        )
    return [replace(one, p_holm=p) for one, p in zip(found, holm([one.p for one in found]), strict=True)]


def _ranked(part: _Part, differences: Sequence[Difference]) -> list[Predictor]:
    """The predictors, the strongest first; those without a tau last."""
    strength = {name: part.sign * part.tau[name] for name in part.names}
    order = sorted(part.names, key=lambda name: (np.isnan(strength[name]), -strength[name]))
    beaten = {name: tuple(d.worse for d in differences if d.better == name and d.p_holm <= REAL) for name in order}
    return [
        Predictor(
            cell_id=part.cell_id,
            cell=part.title,
            rank=rank,
            name=name,
            n=part.n,
            tau=part.tau[name],
            tau_interval=part.interval[name],
            strength=strength[name],
            p=part.p[name],
            ceiling=part.ceiling,
            beats=beaten[name],
        )
        for rank, name in enumerate(order, 1)
    ]
