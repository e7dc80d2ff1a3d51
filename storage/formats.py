"""Tables for people, papers and programs: `-f table|json|jsonl|csv|markdown|latex|parquet`."""

from __future__ import annotations

import csv
import datetime as dt
import io
import json
import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

_TABULATE = {"table": "simple", "markdown": "github", "latex": "latex_booktabs"}
FORMATS = (*_TABULATE, "json", "jsonl", "csv", "parquet")


def render(table: pa.Table, form: str) -> bytes:
    """`table` in one of FORMATS; text is UTF-8 and ends in a newline.

    json is a list of objects; null and NaN are both null there, empty in csv, `-` for people.
    """
    table = _intervals_as_text(table)
    if form == "parquet":
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
        return buffer.getvalue()
    text = _text(table, form).rstrip("\n")
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
    lines = [[column[i].as_py(maps_as_pydicts="lossy") for column in table.columns] for i in range(len(table))]
    if form in _TABULATE:
        from tabulate import tabulate

        shown = [[_in_one_cell(_shown(v), form) for v in line] for line in lines]
        align = ["right" if _is_number(f.type) else "left" for f in table.schema]
        return tabulate(
            shown, names, tablefmt=_TABULATE[form], disable_numparse=True, colalign=align if lines else None
        )
    if form == "csv":
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerows([names, *([_flat(v) for v in line] for line in lines)])
        return buffer.getvalue()
    objects = [dict(zip(names, map(_json, line), strict=True)) for line in lines]
    if form == "jsonl":
        return "\n".join(json.dumps(o) for o in objects)
    return json.dumps(objects, indent=1)


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _in_one_cell(text: str, form: str) -> str:
    """`text` without what would end a cell of the format; tabulate escapes LaTeX itself."""
    if form == "markdown":
        return text.replace("|", "\\|").replace("\n", "<br>")
    return text.replace("\n", " ") if form == "latex" else text


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
