"""Tables for people, papers and programs: `-f table|json|jsonl|csv|markdown|latex|parquet`."""

from __future__ import annotations

import csv
import datetime as dt
import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from storage.printable import printable

FOR_PEOPLE = ("table", "markdown", "latex")
FORMATS = (*FOR_PEOPLE, "json", "jsonl", "csv", "parquet")

SMALL_P = 0.001
"""Below it people are shown `<0.001`; programs get every digit."""

_LATEX = {
    **{c: f"\\{c}" for c in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
}
_SYMBOLS = {"tau": r"$\tau$", "p": "$p$", "n": "$n$"}


def render(table: pa.Table, form: str, width: int | None = None) -> bytes:
    """`table` in one of FORMATS; text is UTF-8 and ends in a newline.

    json is a list of objects; null and NaN are both null there, empty in csv, `-` for people. A table for people that
    is wider than `width` is cut into several below each other, each with the first column.
    """
    table = _intervals_as_text(table)
    if form == "parquet":
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
        return buffer.getvalue()
    text = (_people(table, form, width) if form in FOR_PEOPLE else _text(table, form)).rstrip("\n")
    return f"{text}\n".encode() if text else b""


def _intervals_as_text(table: pa.Table) -> pa.Table:
    """Parquet and JSON have no intervals, and `finished_at - started_at` is one."""

    def text(value: pa.MonthDayNano | None) -> str | None:
        if value is None:
            return None
        rest = dt.timedelta(days=value.days, microseconds=value.nanoseconds // 1000)
        return f"{value.months} months, {rest}" if value.months else str(rest)

    for at, field in enumerate(table.schema):
        if pa.types.is_interval(field.type):
            texts = [text(value) for value in table.column(at).to_pylist()]
            table = table.set_column(at, field.name, pa.array(texts, pa.string()))
    return table


def _text(table: pa.Table, form: str) -> str:
    names = table.column_names
    lines = [[_value(column[i]) for column in table.columns] for i in range(len(table))]
    if form == "csv":
        written = _CsvLines()
        # csv quotes the characters of its own line end alone, and a carriage return in a cell must be quoted too.
        csv.writer(written, lineterminator="\r\n").writerows([names, *([_flat(v) for v in line] for line in lines)])
        return "".join(written.lines)
    objects = [dict(zip(names, map(_json, line), strict=True)) for line in lines]
    if form == "jsonl":
        return "\n".join(json.dumps(o) for o in objects)
    return json.dumps(objects, indent=1)


class _CsvLines:
    """What csv.writer writes, with a newline alone at the end of each line."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def write(self, line: str) -> None:
        """Take one line of the table, which can have several lines of text."""
        self.lines.append(line.removesuffix("\r\n") + "\n")


def _value(scalar: Any) -> Any:
    return scalar.as_py(maps_as_pydicts="lossy")


# -- for people -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """A column as people see it; numbers stand to the right."""

    name: str
    texts: tuple[str, ...]
    is_number: bool


def shown(table: pa.Table) -> list[Shown]:
    """The columns as people see them: numbers of four significant digits, p values of three, lists joined by `+`, `-`
    for what is missing; NAME_low and NAME_high side by side are one column, `NAME 95 % interval`. Control and
    bidirectional characters are escaped."""
    found, names, at = list[Shown](), table.column_names, 0
    while at < len(names):
        name, column, kind = names[at], table.column(at), table.schema.types[at]
        whole = name.removesuffix("_low")
        floats = all(map(pa.types.is_floating, table.schema.types[at : at + 2]))
        if whole != name and names[at + 1 : at + 2] == [f"{whole}_high"] and floats:
            pairs = list(zip(column.to_pylist(), table.column(at + 1).to_pylist(), strict=True))
            found.append(Shown(printable(f"{whole} 95 % interval"), _intervals(pairs), True))
            at += 2
            continue
        show = _p_value if _is_p(name) and pa.types.is_floating(kind) else _shown
        texts = tuple(printable(show(_value(scalar)), keep="\n") for scalar in column)
        found.append(Shown(printable(name), texts, _is_number(kind)))
        at += 1
    return found


def _people(table: pa.Table, form: str, width: int | None) -> str:
    columns = shown(table)
    if form == "latex":
        return _latex(columns)
    if form == "markdown":
        return _tabulated(
            [Shown(_markdown(c.name), tuple(map(_markdown, c.texts)), c.is_number) for c in columns], "pipe"
        )
    return "\n\n".join(_tabulated(part, "simple") for part in _parts(columns, width))


def _tabulated(columns: Sequence[Shown], style: str) -> str:
    from tabulate import tabulate

    lines = list(zip(*(c.texts for c in columns), strict=True))
    align = ["right" if c.is_number else "left" for c in columns] if lines else None
    names = [c.name for c in columns]
    return tabulate(lines, names, tablefmt=style, disable_numparse=True, colalign=align)


def _parts(columns: list[Shown], width: int | None) -> Iterator[list[Shown]]:
    """The columns in groups that fit side by side, two spaces between them, the first column in each."""
    part = columns[:1]
    for column in columns[1:]:
        if width is not None and len(part) > 1 and sum(_wide(c) + 2 for c in part) + _wide(column) > width:
            yield part
            part = columns[:1]
        part = [*part, column]
    yield part


def _wide(column: Shown) -> int:
    """How wide tabulate sets a column: two more than its name at least."""
    return max(len(column.name) + 2, *(len(line) for text in column.texts for line in text.split("\n")), 0)


def _is_p(name: str) -> bool:
    return name == "p" or name.startswith("p_") or name.endswith("_p")


def _p_value(value: float | None) -> str:
    """Three significant digits, and `<0.001`."""
    if value is None or not 0 <= value <= 1:
        return _shown(value)
    return f"<{SMALL_P:g}" if value < SMALL_P else f"{value:.3g}"


def _intervals(pairs: Sequence[tuple[float | None, float | None]]) -> tuple[str, ...]:
    """`[low, high]` of each, all with as many digits as show two of the narrowest's width; one far narrower is passed
    over."""
    widths = [high - low for low, high in pairs if low is not None and high is not None]
    needed = [1 - math.floor(math.log10(width)) for width in widths if math.isfinite(width) and width > 0]
    digits = min(max(needed), min(needed) + 2, 12) if needed else 0
    return tuple(_interval(low, high, max(0, digits)) for low, high in pairs)


def _interval(low: float | None, high: float | None, digits: int) -> str:
    if _missing(low) and _missing(high):
        return "-"
    if low is None or high is None or not (math.isfinite(high - low) and high > low):
        return f"[{_shown(low)}, {_shown(high)}]"
    return f"[{_rounded(low, digits)}, {_rounded(high, digits)}]"


def _rounded(value: float, digits: int) -> str:
    """So many digits after the point, and no minus before a zero."""
    return f"{value:.{digits}f}" if round(value, digits) else f"{0:.{digits}f}"


def _markdown(text: str) -> str:
    """`text` without what would end a cell, begin a tag or be set in italics."""
    plain = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text)
    return re.sub(r"([|*])", r"\\\1", plain).replace("\n", "<br>")


def _latex(columns: Sequence[Shown]) -> str:
    """A booktabs tabular: numbers in mathematics, everything else escaped."""
    cells = [[_latex_name(c.name), *(_latex_cell(c, text) for text in c.texts)] for c in columns]
    wide = [max(map(len, column)) for column in cells]
    lines = []
    for line in zip(*cells, strict=True):
        padded = [
            cell.rjust(n) if c.is_number else cell.ljust(n) for cell, n, c in zip(line, wide, columns, strict=True)
        ]
        # What stands behind \\\\ in brackets, or as a star, would be its argument.
        guard = "{}" if padded[0].lstrip().startswith(("[", "*")) else ""
        lines.append(f"{guard}{' & '.join(padded)} \\\\")
    align = "".join("r" if c.is_number else "l" for c in columns)
    head, *body = lines
    parts = [r"% needs \usepackage{booktabs}", f"\\begin{{tabular}}{{{align}}}", r"\toprule", head, r"\midrule", *body]
    return "\n".join([*parts, r"\bottomrule", r"\end{tabular}"])


def _latex_name(name: str) -> str:
    """A column's name in words: `tau_last5` is tau of last5."""
    return " ".join(_SYMBOLS.get(word, _escaped(word)) for word in re.split(r"[_ ]", name.replace(" %", "\u00a0%")))


def _latex_cell(column: Shown, text: str) -> str:
    if not column.is_number:
        return _escaped(text)
    if text == "-":
        return "--"
    if not re.search(r"[-<\[e]|inf", text):
        return text
    return f"${re.sub(_POWER, _power, text).replace('inf', _INFINITY)}$"


_POWER = re.compile(r"e([+-]\d+)")
_INFINITY = r"\infty"


def _power(matched: re.Match[str]) -> str:
    return rf" \times 10^{{{int(matched[1])}}}"


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(c, c) for c in text.replace("\n", " ")).replace("\u00a0", "~")


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _shown(value: Any) -> str:
    """A value for people: four significant digits, lists joined by +."""
    if _missing(value):
        return "-"
    if isinstance(value, Decimal):
        value = _json(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dt.datetime):
        return f"{value:%Y-%m-%d %H:%M:%S}"
    if isinstance(value, list) and all(isinstance(v, str | int | float) for v in value):
        return "+".join(map(_shown, value))
    plain = _json(value)
    return str(plain) if isinstance(plain, str | int | bool) else json.dumps(plain)


def _flat(value: Any) -> Any:
    """A value for a CSV field: lists and structs as JSON."""
    if _missing(value):
        return ""
    plain = _json(value)
    return json.dumps(plain) if isinstance(plain, list | dict) else plain


def _json(value: Any) -> Any:
    """A value as JSON has it: timestamps in ISO 8601, no NaN and no infinity. DuckDB's sums are decimals."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, dt.datetime | dt.date | dt.time):
        return value.isoformat()
    if isinstance(value, Mapping):
        return {str(k): _json(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_json(v) for v in value]
    return value if isinstance(value, str | int | bool | None) else str(value)
