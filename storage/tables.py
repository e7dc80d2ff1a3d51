"""The tables of `corr`: claims and their like as Arrow, one line each.

A number and its interval are three columns, NAME, NAME_low and NAME_high; programs read them, for people they fold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import pyarrow as pa

from storage.correlate import BESIDE
from storage.statistics.records import Claim, Difference, EarlyEpoch, Interval, Predictor

_Columns = Mapping[str, Callable[[Claim], Any]]


def _with_interval(name: str, value: Callable[[Claim], float], interval: Callable[[Claim], Interval]) -> _Columns:
    return {name: value, f"{name}_low": lambda c: interval(c).low, f"{name}_high": lambda c: interval(c).high}


_TAU = _with_interval("tau", lambda c: c.tau, lambda c: c.tau_interval)
_CEILING = _with_interval("ceiling", lambda c: c.noise.ceiling, lambda c: c.noise.ceiling_interval)
_CORRECTED = _with_interval("corrected", lambda c: c.noise.corrected, lambda c: c.noise.corrected_interval)
_ANOMALY = _with_interval("anomaly_ratio", lambda c: c.picks.anomaly_ratio, lambda c: c.picks.anomaly_interval)
_P: _Columns = {"p": lambda c: c.p, "p_holm": lambda c: c.p_holm}

SHOWN: dict[str, _Columns] = {
    "cells": {
        "n": lambda c: c.n,
        "planned": lambda c: c.planned,
        "seeds": lambda c: c.seeds,
        **_TAU,
        **_P,
        "ceiling": lambda c: c.noise.ceiling,
        "anomaly_ratio": lambda c: c.picks.anomaly_ratio,
        "verdict": lambda c: c.verdict,
        "settled": lambda c: c.settled,
    },
    "tests": {
        "n": lambda c: c.n,
        "dropped": lambda c: c.dropped,
        **_TAU,
        **_P,
        "p_bh": lambda c: c.p_bh,
        "p_method": lambda c: c.p_method,
        **_with_interval("spearman", lambda c: c.spearman, lambda c: c.spearman_interval),
        "spearman_p": lambda c: c.spearman_p,
        **_with_interval("pearson", lambda c: c.pearson, lambda c: c.pearson_interval),
        "pearson_p": lambda c: c.pearson_p,
    },
    "noise": {
        "n": lambda c: c.n,
        "seeds": lambda c: c.seeds,
        **_with_interval("reliability", lambda c: c.noise.reliability, lambda c: c.noise.reliability_interval),
        "noise_std": lambda c: c.noise.noise_std,
        "split_half": lambda c: c.noise.split_half,
        **_CEILING,
        "tau": lambda c: c.tau,
        **_CORRECTED,
        "not_estimable": lambda c: c.noise.why_not,
    },
    "picks": {
        "n": lambda c: c.n,
        "picked": lambda c: c.picks.candidate,
        **_ANOMALY,
        **_with_interval("regret", lambda c: c.picks.regret, lambda c: c.picks.regret_interval),
        "regret_held_out": lambda c: c.picks.regret_held_out,
        "percentile": lambda c: c.picks.percentile,
        "top": lambda c: c.picks.top,
        "top_overlap": lambda c: c.picks.top_overlap,
        "counterexamples": lambda c: c.picks.counterexamples,
    },
    "power": {
        "n": lambda c: c.n,
        "seeds": lambda c: c.seeds,
        **_TAU,
        "p": lambda c: c.p,
        "detectable": lambda c: c.power.detectable,
        "more_candidates": lambda c: c.power.more_candidates,
        "more_seeds": lambda c: c.power.more_seeds,
    },
}
"""table -> column -> what of a claim it shows."""

_COUNTS = ("n", "planned", "seeds", "dropped", "top", "picked")
_TEXTS = ("cell", "cell_id", "verdict", "p_method", "not_estimable")


def corr_table(claims: Sequence[Claim], show: str = "cells") -> pa.Table:
    """One line per cell: the columns of SHOWN, or with `all` of all of them; what cannot be had is NaN."""
    wanted = SHOWN[show] if show != "all" else _all()
    columns = {"cell": lambda c: c.title, **wanted, "cell_id": lambda c: c.cell_id}
    arrays = [pa.array([value(c) for c in claims], _kind(name)) for name, value in columns.items()]
    return pa.Table.from_arrays(arrays, names=list(columns))


def _all() -> _Columns:
    """Every column once, those with an interval beside it."""
    first = {name: SHOWN["cells"][name] for name in ("n", "planned", "seeds")}
    rest = [SHOWN[show] for show in ("tests", "noise", "picks", "power", "cells")]
    return first | {name: value for columns in rest for name, value in columns.items()}


def _kind(name: str) -> pa.DataType:
    if name in _TEXTS:
        return pa.string()
    return pa.int64() if name in _COUNTS else pa.bool_() if name == "settled" else pa.float64()


def with_beside(table: pa.Table, taus: Sequence[float], beside: str) -> pa.Table:
    """The table with tau for the column beside y, before the cells' ids."""
    name = "tau_last5" if beside == BESIDE else f"tau_{beside}"
    return table.add_column(table.num_columns - 1, name, pa.array(taus, pa.float64()))


def criteria_table(lines: Sequence[Predictor]) -> pa.Table:
    """The criterion bench, one line per cell and predictor."""
    return _of_records(Predictor, lines, "tau")


def differences_table(lines: Sequence[Difference]) -> pa.Table:
    """Which predictors differ, one line per cell and pair."""
    return _of_records(Difference, lines, "difference")


def early_table(lines: Sequence[EarlyEpoch]) -> pa.Table:
    """One line per cell and epoch."""
    return _of_records(EarlyEpoch, lines, "tau")


_ARROW = {"str": pa.string(), "int": pa.int64(), "float": pa.float64(), "tuple[str, ...]": pa.list_(pa.string())}


def _of_records(kind: Any, lines: Sequence[Any], about: str) -> pa.Table:
    """The fields of records as columns: the cell first, its id last, the interval spread out, of what it is `about`."""
    columns: dict[str, pa.Array] = {}
    names = [f for f in fields(kind) if f.name != "cell_id"]
    for f in sorted(names, key=lambda f: f.name != "cell"):
        if not f.name.endswith("interval"):
            columns[f.name] = pa.array([getattr(line, f.name) for line in lines], _ARROW[str(f.type)])
            continue
        for end in ("low", "high"):
            columns[f"{about}_{end}"] = pa.array([getattr(getattr(line, f.name), end) for line in lines], pa.float64())
    columns["cell_id"] = pa.array([line.cell_id for line in lines], pa.string())
    return pa.table(columns)
