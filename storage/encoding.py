"""Rows as the bytes of a Parquet file, and back.

A file carries the CRC-32 of all that stands before its footer, besides one on every page: whoever wants a few columns
checks the whole file at the speed of memory, where to decode all of it, page by page, takes ten times as long.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage.schema import COLUMNS, REQUIRED, SCHEMA, conform

ORIGIN = "file"
"""The column of a compacted file that names the file each row was committed in."""

ROW_FILES_SCHEMA = SCHEMA.append(pa.field(ORIGIN, pa.string()))

CHECKSUM = b"prunesweep.crc32"
FOOTER_END = 8
"""A Parquet file ends with its footer, then the footer's length in four bytes and PAR1."""

FEW_ROWS = 512
"""Up to so many rows are written plainly: to set up compression and dictionaries costs more than they save."""

# What differs from row to row: a dictionary of it would hold everything once more. All else repeats, by cell, by
# candidate or by machine; accuracies are fractions of few samples. Floats are split into streams of their first
# bytes, their second bytes, ...: only the last ones are noise.
_FLOATS = {
    *(name for name in COLUMNS["after retraining"] if "accuracy" not in name and "epoch" not in name),
    *(f"{name}.list.element" for name in ("epoch_train_loss", "epoch_test_loss")),
    *("seconds_prune", "seconds_retrain"),
}
_VARYING = {*_FLOATS, ORIGIN, "task_id", "error", "started_at", "finished_at"}


def parquet(table: pa.Table) -> bytes:
    """`table` as a Parquet file. A small one is without its columns of nulls, which readers see all the same."""
    ours = table.schema.equals(SCHEMA) or table.schema.equals(ROW_FILES_SCHEMA)
    if 0 < len(table) <= FEW_ROWS:
        there = [name for name in table.column_names if table[name].null_count < len(table)]
        plain = {"compression": "none", "use_dictionary": False, "write_statistics": False}
        return _written(table.select(there), ours=ours, **plain)
    paths = [path for field in table.schema for path in _paths(field.name, field.type)]
    repeating, split = [path for path in paths if path not in _VARYING], [path for path in paths if path in _FLOATS]
    return _written(table, ours=ours, compression="zstd", use_dictionary=repeating, use_byte_stream_split=split)


def _paths(name: str, kind: pa.DataType) -> Iterator[str]:
    """The names that Parquet gives to the leaves of a column."""
    if isinstance(kind, pa.MapType):
        yield from (f"{name}.key_value.{side}" for side in ("key", "value"))
    elif isinstance(kind, pa.ListType):
        yield from _paths(f"{name}.list.element", kind.value_type)
    elif isinstance(kind, pa.StructType):
        for field in kind:
            yield from _paths(f"{name}.{field.name}", field.type)
    else:
        yield name


def _written(table: pa.Table, *, ours: bool, **options: Any) -> bytes:
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, table.schema, write_page_checksum=True, store_schema=False, **options) as writer:
        writer.write_table(table)
        if ours:
            writer.add_key_value_metadata({CHECKSUM: str(zlib.crc32(sink.getvalue()))})
    return sink.getvalue()


def rows_of(content: bytes, columns: Sequence[str] | None, origin: str | None) -> pa.Table:
    """The rows in the bytes of a file, with all columns or some, in the types of the pinned schema; then their origin.

    `origin` is the file itself, or None where the rows carry theirs. Raises ValueError or a pyarrow exception where
    the file is torn or none of ours, whatever columns are asked for.
    """
    file = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True)
    some = columns is not None and _is_ours(file, content)
    names = [*dict.fromkeys([*REQUIRED, *columns])] if some and columns is not None else SCHEMA.names
    # Any other file is read as a whole: then the checksum of its every page is looked at.
    table = file.read([*names, ORIGIN] if some else None, use_threads=file.metadata.num_rows > FEW_ROWS)
    found = conform(table, names)
    if origin is not None:
        return found.append_column(ORIGIN, repeated(origin, len(table)))
    if ORIGIN not in table.column_names or table[ORIGIN].null_count:
        raise ValueError(f"no column {ORIGIN}")
    return found.append_column(ORIGIN, table[ORIGIN].cast(pa.string()))


def _is_ours(file: pq.ParquetFile, content: bytes) -> bool:
    """Whether `parquet` wrote the file, with columns of our types, and it is undamaged since."""
    noted = (file.metadata.metadata or {}).get(CHECKSUM)
    rows = memoryview(content)[: len(content) - FOOTER_END - file.metadata.serialized_size]
    return noted == str(zlib.crc32(rows)).encode()


def repeated(text: str, n: int) -> pa.StringArray:
    """An array of n times `text`. (pyarrow's own `array` and `repeat` import pandas, half a second.)"""
    one = text.encode()
    ends = np.arange(n + 1, dtype=np.int32) * len(one)
    return pa.StringArray.from_buffers(n, pa.py_buffer(ends), pa.py_buffer(one * n))
