"""What each cell of a sweep says: its statistics, computed once and kept by content.

Main path: `claims`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from storage.phases import Report, silent
from storage.statistics import association, p_values
from storage.statistics.association import Correlation
from storage.statistics.noise import beyond_noise, noise_of
from storage.statistics.picks import picks_of
from storage.statistics.power import power_of
from storage.statistics.records import NO_INTERVAL, Claim, Interval, Noise, Picks, Power
from storage.statistics.resampling import (
    FEWEST,
    MOST,
    RESAMPLES,
    interval,
    pearson_of,
    resampled,
    resampled_parts,
    seed_of,
    spearman_of,
    tau_interval,
)

if TYPE_CHECKING:
    from storage.correlate import CellData

VALID_TAU, VALID_P = 0.2, 0.05
"""What arXiv 2412.00143 calls valid: this |tau| at least, of the expected sign, and this p at most."""

_VERSION = 2
"""Raised when the same data give other numbers: what was kept counts no more."""


def claims(
    cells: Sequence[CellData],
    x: str,
    y: str,
    *,
    resamples: int = RESAMPLES,
    every_interval: bool = False,
    phase: Report = silent,
) -> list[Claim]:
    """One claim per cell, in their order; p is adjusted over all of them. Without resamples no interval is given.

    With `every_interval` Spearman and Pearson have intervals too. A cell asked about again is answered at once from
    `$XDG_CACHE_HOME/prunesweep/claims`, as long as its values are the same.
    """
    asked = Question(x, y, resamples, every_interval)
    kept = [_kept(cell, asked) for cell in cells]
    new = [cell for cell, claim in zip(cells, kept, strict=True) if claim is None]
    # scipy correlates fifty cells in hardly more time than one.
    correlations = association.correlations([(cell.columns[x], cell.columns[y]) for cell in new])
    made = iter(list(_claims(new, correlations, asked, phase)))
    found = [claim or next(made) for claim in kept]
    for cell, claim, old in zip(cells, found, kept, strict=True):
        if old is None:
            _keep(cell, asked, claim)
    family = [one.p for one in found]
    adjusted = zip(found, p_values.holm(family), p_values.benjamini_hochberg(family), strict=True)
    return [replace(one, p_holm=holm, p_bh=bh) for one, holm, bh in adjusted]


def _claims(
    cells: Sequence[CellData], correlations: Sequence[Correlation], asked: Question, phase: Report
) -> Iterator[Claim]:
    for number, (cell, found) in enumerate(zip(cells, correlations, strict=True), 1):
        phase("computing the statistics of cell", number, len(cells))
        yield _claim(cell, asked, found)


@dataclass(frozen=True)
class Question:
    """What is asked of a cell."""

    x: str
    y: str
    resamples: int
    every_interval: bool


def lower_is_better(x: str) -> bool:
    """Whether the candidate to pick is that of lowest x: of a loss, or of the importance of what is removed."""
    return "accuracy" not in x


def expected_sign(x: str, y: str) -> int:
    """The sign of tau if x predicts y: negative for a loss and an accuracy."""
    return 1 if lower_is_better(x) == (not association.higher_is_better(y)) else -1


def _claim(cell: CellData, asked: Question, found: Correlation) -> Claim:
    x, y, resamples = asked.x, asked.y, asked.resamples
    keep, a, b = _values(cell, x, y)
    by_seed = cell.by_seed.get(y)
    replicates = by_seed[keep] if by_seed is not None else None
    seed = seed_of(b)
    p, method = p_values.kendall_p(a, b, found.kendall_p)
    around = tau_interval(a, b, resamples)
    others = _other_intervals(a, b, resamples if asked.every_interval else 0, seed)
    noise = noise_of(a, replicates, resamples, seed)
    sign = 1 if association.higher_is_better(y) else -1
    parts = resampled_parts(len(a), resamples, seed) if len(a) >= FEWEST else ()
    turned_seeds = None if replicates is None else sign * replicates
    candidate = np.asarray(cell.candidate)[keep]
    picks = picks_of(
        a if lower_is_better(x) else -a, sign * b, turned_seeds, candidate, beyond_noise(noise, len(a)), parts
    )
    said = verdict(found.kendall, p, expected_sign(x, y))
    return Claim(
        cell_id=cell.cell_id,
        title=cell.title,
        x=x,
        y=y,
        n=found.n,
        dropped=found.dropped,
        planned=cell.planned,
        seeds=cell.seeds,
        tau=found.kendall,
        tau_interval=around,
        p=p,
        p_method=method,
        p_holm=association.NAN,
        p_bh=association.NAN,
        spearman=found.spearman,
        spearman_interval=others[0],
        spearman_p=p_values.product_p(_ranked(a), _ranked(b), found.spearman_p),
        pearson=found.pearson,
        pearson_interval=others[1],
        pearson_p=p_values.product_p(a, b, found.pearson_p),
        verdict=said,
        settled=settled(around, said, expected_sign(x, y)),
        picks=picks,
        noise=noise,
        power=power_of(found.n, found.kendall, p, noise, grows=cell.grows),
    )


def _values(cell: CellData, x: str, y: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which candidates have x and y, and both of those."""
    a, b = (np.asarray(cell.columns[name], dtype=np.float64) for name in (x, y))
    keep = np.isfinite(a) & np.isfinite(b)
    return keep, a[keep], b[keep]


def _ranked(values: np.ndarray) -> np.ndarray:
    from scipy.stats import rankdata

    return rankdata(values)


def _other_intervals(x: np.ndarray, y: np.ndarray, resamples: int, seed: int) -> tuple[Interval, Interval]:
    """Of Spearman's rho and Pearson's r."""
    n = len(x)
    if not resamples or not FEWEST <= n <= MOST or np.ptp(x) == 0 or np.ptp(y) == 0:
        return NO_INTERVAL, NO_INTERVAL
    counts = resampled(n, resamples, seed)
    return interval(spearman_of(x, y), n, counts), interval(pearson_of(x, y), n, counts)


def verdict(tau: float, p: float, sign: int) -> str:
    """The paper's: `valid` or `not valid`; empty without a tau."""
    if not isfinite(tau) or not isfinite(p):
        return ""
    return "valid" if sign * tau >= VALID_TAU and p <= VALID_P else "not valid"


def settled(interval: Interval, verdict: str, sign: int) -> bool | None:
    """Whether the whole interval lies on the verdict's side of the paper's 0.2; None without one of the two."""
    if not verdict or not isfinite(interval.low):
        return None
    low, high = sorted((sign * interval.low, sign * interval.high))
    return low >= VALID_TAU if verdict == "valid" else high < VALID_TAU


# -- kept by content ------------------------------------------------------------------------------------


def _kept(cell: CellData, asked: Question) -> Claim | None:
    """The claim that was kept, if it is of the same values."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        digest, kept = _file(cell, asked).read_text(encoding="utf-8").split("\n", 1)
        claim = json.loads(kept)
        if digest == _digest(cell, asked, kept):
            return replace(_from_plain(claim), title=cell.title, planned=cell.planned)
    return None


def _keep(cell: CellData, asked: Question, claim: Claim) -> None:
    """Write it down; a cache that cannot be written is none."""
    file = _file(cell, asked)
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_name(f".{file.name}.{os.getpid()}")
        kept = json.dumps(asdict(claim))
        draft.write_text(f"{_digest(cell, asked, kept)}\n{kept}", encoding="utf-8")
        draft.replace(file)


def _file(cell: CellData, asked: Question) -> Path:
    """A cell and a question have one file, whatever the values: the cache does not grow with them."""
    return _folder() / f"{cell.cell_id}-{hashlib.sha256(repr(asked).encode()).hexdigest()[:16]}.json"


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prunesweep" / "claims"


def _digest(cell: CellData, asked: Question, kept: str) -> str:
    """A hash of all that a claim is made of, and of the claim as it is kept."""
    about = [_VERSION, repr(asked), cell.seeds, cell.grows, cell.candidate]
    found = hashlib.sha256(json.dumps(about).encode())
    for values in (cell.columns[asked.x], cell.columns[asked.y], cell.by_seed.get(asked.y)):
        found.update(b"none" if values is None else np.asarray(values, dtype=np.float64).tobytes())
    found.update(kept.encode())
    return found.hexdigest()


def _from_plain(plain: dict[str, Any]) -> Claim:
    """A claim from what `asdict` made of it. Raises TypeError for another version's."""
    parts = {"picks": (Picks, plain.pop("picks")), "noise": (Noise, plain.pop("noise"))}
    nested = {name: kind(**_with_intervals(values)) for name, (kind, values) in parts.items()}
    return Claim(**_with_intervals(plain | {"power": Power(**plain["power"])}), **nested)


def _with_intervals(plain: dict[str, Any]) -> dict[str, Any]:
    return {k: Interval(**v) if k.endswith("_interval") else v for k, v in plain.items()}
