"""Numbers as a page shows them: a true minus sign, as many digits as they bear, and a dash for what is not there."""

from __future__ import annotations

import datetime as dt
import math

from storage.statistics.p_values import PERMUTATIONS
from storage.statistics.records import Interval

NONE = "\N{EN DASH}"
_MINUS, TIMES = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"
_POWERS = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


def missing(value: float | None) -> bool:
    """Whether there is no number."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def fixed(value: float | None, digits: int = 3) -> str:
    """`-0.275`: a correlation, a ratio."""
    if value is None or missing(value):
        return NONE
    text = f"{value:.{digits}f}"
    return (_MINUS + text[1:] if text.startswith("-") else text) if float(text) or digits == 0 else text.lstrip("-")


def p_value(p: float | None) -> str:
    """`0.031`, and as a power of ten below a thousandth; of permutations the least says that p is that small."""
    if p is None or missing(p):
        return NONE
    if p >= 0.00095:
        return f"{p:#.2g}"
    if p == 0:
        return "< 10⁻³⁰⁰"
    if p == 1 / (PERMUTATIONS + 1):
        return "≤ 10⁻⁴"
    digits, power = f"{p:.1e}".split("e")
    return f"{digits}{TIMES}10{str(int(power)).translate(_POWERS)}"


def p_is(p: float | None) -> str:
    """`p = 0.031`, for running text."""
    text = p_value(p)
    return f"p {text}" if text.startswith(("<", "≤")) else f"p = {text}"


def share(value: float | None, digits: int = 1) -> str:
    """`20.0 %` of a fraction."""
    return NONE if missing(value) else f"{fixed(100 * float(value or 0), digits)} %"


def amount(value: float | None, column: str) -> str:
    """A difference in the units of a column: of accuracies in percentage points, of losses in nats."""
    if value is None or missing(value):
        return NONE
    return f"{fixed(100 * value, 2)} points" if is_accuracy(column) else f"{significant(value)} nats"


def is_accuracy(column: str) -> bool:
    """Whether a column holds accuracies, fractions in [0, 1]."""
    return "accuracy" in column


def significant(value: float | None, digits: int = 3) -> str:
    """Any number to so many significant digits, thousands set apart."""
    if value is None or missing(value):
        return NONE
    if math.isinf(value):
        return "∞" if value > 0 else f"{_MINUS}∞"
    text = f"{value:.{digits}g}"
    if "e" in text:
        text = f"{value:,.0f}" if abs(value) >= 1 else text
    return text.replace("-", _MINUS)


def whole(value: float | None) -> str:
    """A count, thousands set apart."""
    return NONE if value is None or missing(value) else f"{value:,.0f}".replace("-", _MINUS)


def interval(found: Interval, digits: int = 3) -> str:
    """`[-0.45, -0.10]`, or nothing where it cannot be had."""
    if missing(found.low) or missing(found.high):
        return ""
    return f"[{fixed(found.low, digits)}, {fixed(found.high, digits)}]"


def seconds(value: float | None) -> str:
    """`12.3 s`, `1,080 s (18 min)`, `90,000 s (25 h)`."""
    if value is None or missing(value):
        return NONE
    if value < 100:
        return f"{value:.3g} s"
    longer = f"{value / 60:.3g} min" if value < 6000 else f"{value / 3600:.3g} h" if value < 360_000 else _days(value)
    return f"{value:,.0f} s ({longer})"


def _days(value: float) -> str:
    return f"{value / 86_400:,.3g} days" if value < 86_400_000 else f"{value / 86_400:,.0f} days"


def moment(at: dt.datetime | None) -> str:
    """`2026-11-24 01:57 UTC`."""
    return f"{at:%Y-%m-%d %H:%M} UTC" if at else NONE


def some(n: int, one: str, many: str = "") -> str:
    """`1 cell`, `3 cells`."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def listed(words: list[str], limit: int = 12) -> str:
    """`a, b and c`; of more than the limit the first ones and how many there are."""
    if len(words) > limit:
        return f"{', '.join(words[: limit - 1])} and {len(words) - limit + 1} more"
    return " and ".join([*([", ".join(words[:-1])] if len(words) > 1 else []), *words[-1:]])
