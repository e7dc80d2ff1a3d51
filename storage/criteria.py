"""The criterion bench: which number known before retraining predicts y best, and whether the lead is real."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from storage.claims import expected_sign
from storage.phases import Report, silent
from storage.statistics import kendall
from storage.statistics.noise import noise_of
from storage.statistics.p_values import holm, kendall_p
from storage.statistics.records import NO_INTERVAL, Difference, Interval, Predictor
from storage.statistics.resampling import FEWEST, MOST, RESAMPLES, bca, left_out, percentile, resampled, seed_of, tau_of

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
    cells: Sequence[CellData],
    y: str,
    names: Sequence[str] | None = None,
    *,
    resamples: int = RESAMPLES,
    phase: Report = silent,
) -> tuple[list[Predictor], list[Difference]]:
    """Every predictor against y, ranked in each cell and, with several cells, over all of them by the mean strength;
    and every pair's difference. `names` are the predictors, all columns but y where left out.

    Over the candidates of a cell that have every predictor it has at all, resampled together: differences are paired.
    The resamples of `all cells` are independent between cells, which are taken as given. Cells with too few candidates
    to be resampled are left out of it, and its name then says of how many cells it is.
    """
    wanted = [name for name in (names or (list(cells[0].columns) if cells else [])) if name != y]
    measured: list[_Part] = []
    for number, cell in enumerate(cells, 1):
        phase("comparing the predictors of cell", number, len(cells))
        measured.append(_measured(cell, y, wanted, resamples))
    parts = [one for one in measured if one.names]
    pooled = _pooled(parts, wanted)
    parts += [pooled] if pooled else []
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
    counts = resampled(n, resamples, seed_of(b)) if FEWEST <= n <= MOST else np.empty((0, n))
    for name in there if n > 1 else []:
        _add(part, name, columns[name][keep], b, counts)
    return part


def _add(part: _Part, name: str, a: np.ndarray, b: np.ndarray, counts: np.ndarray) -> None:
    part.names.append(name)
    part.tau[name], asymptotic = kendall(a, b)
    part.p[name] = kendall_p(a, b, asymptotic)[0]
    part.draws[name], part.interval[name] = np.empty(0), NO_INTERVAL
    if len(counts):
        statistic = tau_of(a, b)
        draws = statistic(counts)
        part.draws[name] = part.sign * draws
        part.interval[name] = bca(part.tau[name], draws, statistic(left_out(part.n)))


def _pooled(parts: Sequence[_Part], wanted: Sequence[str]) -> _Part | None:
    """The mean over the cells large enough to be resampled; a predictor without a tau in one of them has none."""
    whole = [part for part in parts if any(len(draws) for draws in part.draws.values())]
    if len(whole) < 2:
        return None
    title = ALL_CELLS if len(whole) == len(parts) else f"{len(whole)} of {len(parts)} cells"
    pooled = _Part("", title, sum(part.n for part in whole), whole[0].sign, _mean([part.ceiling for part in whole]))
    for name in [name for name in wanted if any(name in part.names for part in whole)]:
        taus = [part.tau.get(name, np.nan) for part in whole]
        pooled.names.append(name)
        pooled.tau[name] = _mean(taus)
        everywhere = bool(np.isfinite(taus).all())
        draws = np.mean([part.draws[name] for part in whole], axis=0) if everywhere else np.empty(0)
        pooled.draws[name], pooled.interval[name] = draws, percentile(pooled.sign * draws)
        pooled.p[name] = _two_sided(pooled.tau[name], draws)
    return pooled


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _two_sided(found: float, draws: np.ndarray) -> float:
    """p of what was found being zero: normal, with the standard error of its resamples. Counting resamples beyond zero
    would end at one in their number, which many pairs could never pass."""
    from scipy.special import ndtr

    defined = draws[np.isfinite(draws)]
    if not np.isfinite(found) or len(defined) < 2:
        return float("nan")
    error = defined.std(ddof=1)
    return float(2 * ndtr(-abs(found) / error)) if error > 0 else (1.0 if found == 0 else float("nan"))


def _differences(part: _Part) -> list[Difference]:
    """Of every pair of predictors the stronger less the weaker."""
    found: list[Difference] = []
    for one, other in combinations(part.names, 2):
        lead = part.sign * (part.tau[one] - part.tau[other])
        better, worse = (one, other) if lead >= 0 else (other, one)
        there = len(part.draws[better]) and len(part.draws[worse])
        draws = part.draws[better] - part.draws[worse] if there else np.empty(0)
        p = _two_sided(lead, draws)
        found.append(Difference(part.cell_id, part.title, better, worse, abs(lead), percentile(draws), p, float("nan")))
    return [replace(one, p_holm=p) for one, p in zip(found, holm([one.p for one in found]), strict=True)]


def _ranked(part: _Part, differences: Sequence[Difference]) -> list[Predictor]:
    """The predictors, the strongest first; those without a tau last."""
    strength = {name: part.sign * part.tau[name] + 0.0 for name in part.names}  # no -0
    order = sorted(part.names, key=lambda name: (np.isnan(strength[name]), -strength[name]))
    beaten = {name: tuple(d.worse for d in differences if d.better == name and d.p_holm <= REAL) for name in order}
    rank = {name: 1 + sum(strength[other] > strength[name] for other in order) for name in order}
    rank |= {name: len(order) for name in order if np.isnan(strength[name])}
    return [
        Predictor(
            cell_id=part.cell_id,
            cell=part.title,
            rank=rank[name],
            name=name,
            n=part.n,
            tau=part.tau[name],
            tau_interval=part.interval[name],
            strength=strength[name],
            p=part.p[name],
            ceiling=part.ceiling,
            beats=beaten[name],
        )
        for name in order
    ]
