"""What figures call things, and how they write numbers. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from math import isnan
from typing import TypeGuard

from storage.records import Cell, joined
from storage.statistics.records import Claim, Interval

Value = str | float

NAMES = {
    "pruned_train_loss": "Pruned train loss",
    "pruned_test_loss": "Pruned test loss",
    "pruned_test_accuracy": "Pruned test accuracy",
    "best_test_accuracy": "Test accuracy after retraining (best epoch, picked on the test set)",
    "best_test_loss": "Test loss after retraining (best epoch, picked on the test set)",
    "last5_test_accuracy_mean": "Test accuracy after retraining (mean of the last five epochs)",
    "last5_test_loss_mean": "Test loss after retraining (mean of the last five epochs)",
    "last_test_accuracy": "Test accuracy after retraining (last epoch)",
    "last_test_loss": "Test loss after retraining (last epoch)",
}
_SHORT = {
    "pruned_train_loss": "pruned train loss",
    "best_test_accuracy": "best test accuracy",
    "last5_test_accuracy_mean": "last-5 test accuracy",
    "last_test_accuracy": "last test accuracy",
}
AXES = (
    "model", "dataset", "layers", "ratio", "pruner", "pruner_seed", "granularity", "scope", "schedule",
    "propagation", "precision", "candidates", "loss_subset", "calibration", "retrain", "dense",
)  # fmt: skip
"""The axes of a grid in the order in which a cell's words name them; `cell` where they are not known."""

_NAMED = ("model", "dataset", "layers", "ratio", "pruner", "propagation")
"""Those that say what was pruned how: a name of a cell has them even where another of its words would tell them."""


def name(column: str) -> str:
    """What a column is called along an axis of a figure."""
    return NAMES.get(column, column)


def short(column: str) -> str:
    """The same in a word or two: a criterion's score goes by the criterion's name."""
    return _SHORT.get(column, column.removeprefix("score_").replace("_", " "))


def is_share(column: str) -> bool:
    """Whether a column is a fraction in [0, 1], which is written in percent."""
    return "accuracy" in column and "loss" not in column


# -- a grid's axes --------------------------------------------------------------------------------------


def axis_values(cells: Mapping[str, Cell]) -> dict[str, dict[str, Value]]:
    """cell id -> axis -> its value there. Recipes go by their epochs where these tell them apart, else by id."""
    retrains = {cell.retrain.recipe_id: cell.retrain.epochs for cell in cells.values()}
    by_epochs = len(set(retrains.values())) == len(retrains)
    return {cell_id: _values(cell, by_epochs) for cell_id, cell in cells.items()}


def _values(cell: Cell, by_epochs: bool) -> dict[str, Value]:
    ratio = cell.pruning_ratio
    draw = "" if cell.sampling_seed is None else f" {cell.sampling_seed}"
    return {
        "model": cell.dense.model,
        "dataset": cell.dense.dataset,
        "layers": joined([layer for layer, _ in cell.layers]),
        "ratio": joined([repr(r) for _, r in cell.layers]) if ratio is None else ratio,
        "pruner": cell.pruner,
        "pruner_seed": str(cell.pruner_seed),
        "granularity": cell.granularity,
        "scope": cell.scope,
        "schedule": cell.schedule,
        "propagation": cell.propagation,
        "precision": cell.precision,
        "candidates": f"{cell.candidate_mode}{draw}",
        "loss_subset": "all" if cell.loss_subset is None else str(cell.loss_subset),
        "calibration": str(cell.calibration),
        "retrain": f"{cell.retrain.epochs} epochs" if by_epochs else cell.retrain.recipe_id[:6],
        "dense": cell.dense.dense_id[:6],
    }


def varying(values: Mapping[str, Mapping[str, Value]]) -> list[str]:
    """The axes that span these cells: those with more than one value, without those that another one determines, as
    the pruner does how candidates are taken. The ratio always counts, for it is a number that a reader looks for."""
    found = _more_than_one(values)
    return [axis for axis in found if axis == "ratio" or not _told(axis, found, values)]


def telling(values: Mapping[str, Mapping[str, Value]]) -> list[str]:
    """The axes that a name of one of these cells takes."""
    found, spanning = _more_than_one(values), varying(values)
    return [axis for axis in found if axis in spanning or axis in _NAMED]


def common(values: Mapping[str, Mapping[str, Value]]) -> str:
    """What all of these cells have in common, in words."""
    several = _more_than_one(values)
    return words(next(iter(values.values()), {}), [axis for axis in _NAMED if axis not in several])


def _more_than_one(values: Mapping[str, Mapping[str, Value]]) -> list[str]:
    """The axes with more than one value. `dense` counts only where model and data set do not already tell the dense
    networks apart."""
    found = [axis for axis in AXES if len({line[axis] for line in values.values() if axis in line}) > 1]
    pairs = {(line.get("model"), line.get("dataset")) for line in values.values()}
    if "dense" in found and len({line["dense"] for line in values.values()}) == len(pairs):
        found.remove("dense")
    return found


def _told(axis: str, found: list[str], values: Mapping[str, Mapping[str, Value]]) -> bool:
    """Whether the value along another axis tells this one's; of two that tell each other the first one stays."""
    own = len({line[axis] for line in values.values()})
    for other in found:
        pairs, its = {(line[other], line[axis]) for line in values.values()}, {line[other] for line in values.values()}
        if other != axis and len(pairs) == len(its) and (own < len(its) or found.index(other) < found.index(axis)):
            return True
    return False


def said(axis: str, value: Value) -> str:
    """A value with as much of its axis as it needs to be understood: `conv1`, `ratio 0.5`, `retrain 30 epochs`."""
    plain = axis in ("model", "dataset", "layers", "pruner", "granularity", "propagation", "precision", "cell")
    return f"{value}" if plain else f"{axis.replace('_', ' ')} {value:g}" if is_number(value) else f"{axis} {value}"


def is_number(value: Value) -> TypeGuard[float]:
    """Whether an axis' value can stand on an axis of numbers."""
    return isinstance(value, float)


def words(line: Mapping[str, Value], axes: Iterable[str]) -> str:
    """What a cell is called by its values along some axes."""
    return ", ".join(said(axis, line[axis]) for axis in axes if axis in line)


# -- numbers --------------------------------------------------------------------------------------------


def number(value: float, digits: int = 2) -> str:
    """With a true minus sign; n/a where there is none."""
    if isnan(value):
        return "n/a"
    shown = f"{value:.{digits}f}"
    return (shown[1:] if float(shown) == 0 and shown.startswith("-") else shown).replace("-", "\N{MINUS SIGN}")


def interval(value: Interval, digits: int = 2) -> str:
    """`[low, high]`, and nothing where there is none."""
    return (
        "" if isnan(value.low) or isnan(value.high) else f"[{number(value.low, digits)}, {number(value.high, digits)}]"
    )


def with_interval(value: float, around: Interval, digits: int = 2) -> str:
    """`0.27 [0.10, 0.41]`."""
    return f"{number(value, digits)} {interval(around, digits)}".strip()


def p_value(p: float) -> str:
    """`p = 0.012`, `p < 0.0001`, `p ≤ 0.0001`."""
    if isnan(p):
        return "p n/a"
    # 1 in 10,000 is the least that permutations can give: they say no more than that p is that small.
    return "p < 0.0001" if p < 1e-4 else "p ≤ 0.0001" if p == 1e-4 else f"p = {p:.2g}"


def percent(value: float, digits: int = 1) -> str:
    """A share in percent."""
    return "n/a" if isnan(value) else f"{100 * value:.{digits}f} %"


def ceiling(claim: Claim) -> str:
    """The noise ceiling, or why there is none."""
    if not isnan(claim.noise.ceiling):
        return f"ceiling {with_interval(claim.noise.ceiling, claim.noise.ceiling_interval)}"
    return f"ceiling: not estimable ({'one seed' if claim.seeds < 2 else claim.noise.why_not or 'no reliability'})"


def facts(claim: Claim) -> list[str]:
    """What a scatter says of its cell: tau with its interval, p, n, the anomaly ratio, the ceiling."""
    picks = claim.picks
    low, high = picks.anomaly_interval.low, picks.anomaly_interval.high
    around = "" if isnan(low) or isnan(high) else f" [{100 * low:.0f}, {100 * high:.0f}]"
    return [
        f"τ = {with_interval(claim.tau, claim.tau_interval)}",
        p_value(claim.p),
        f"n = {claim.n}" + (f" ({claim.dropped} without a value)" if claim.dropped else ""),
        f"anomaly ratio {percent(picks.anomaly_ratio)}{around}",
        ceiling(claim),
    ]


def filled(pieces: Iterable[str], width: int, between: str = ", ") -> str:
    """The pieces in lines of at most `width` characters, broken between pieces, and within one only where it
    alone is longer."""
    lines: list[str] = []
    for piece in pieces:
        if lines and len(lines[-1]) + len(between) + len(piece) <= width:
            lines[-1] += between + piece
        else:
            lines += _wrapped(piece, width) or [""]
    return "\n".join(lines)


def _wrapped(text: str, width: int) -> list[str]:
    """Broken after blanks and, within names of layers, after . + _ / and -; a part that is longer is cut."""
    lines = [""]
    for part in (piece for whole in _PARTS.findall(text) for piece in _cut(whole, width)):
        if lines[-1] and len(lines[-1]) + len(part.rstrip()) > width:
            lines.append("")
        lines[-1] += part
    return [line.rstrip() for line in lines if line.strip()]


def _cut(part: str, width: int) -> list[str]:
    return [part[i : i + width] for i in range(0, len(part), width)] if len(part.rstrip()) > width else [part]


_PARTS = re.compile(r"(?:[^\s.+_/-]|[._-](?=\d))*(?:\s+|[.+_/-]|$)")


def wrapped(text: str, width: int) -> str:
    """Text in lines of at most `width` characters; a word that is longer is broken."""
    return "\n".join(_wrapped(text, width))
