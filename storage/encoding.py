"""Rows as the bytes of a Parquet file, and back.

The name of a row file holds the digest of its content (storage/digests.py), and a reader compares the two. A copy
under another name, and a file of an older version, are checked by the CRC-32 of all bytes before the footer, besides
one on every page: that takes a tenth of the time of decoding every page.
"""

from __future__ import annotations

import io
import uuid
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage.identity import SCHEMA_VERSION
from storage.schema import COLUMNS, REQUIRED, SCHEMA, conform

ORIGIN = "file"
"""The column of a compacted file that names the file each row was committed in."""

ROW_FILES_SCHEMA = SCHEMA.append(pa.field(ORIGIN, pa.string()))

CHECKSUM = b"prunesweep.crc32"
COMMIT = b"prunesweep.commit"
"""A random id in the footer, so that no two commits have the same content, and with it the same name."""

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
            writer.add_key_value_metadata({CHECKSUM: str(zlib.crc32(sink.getvalue())), COMMIT: uuid.uuid4().hex})
    return sink.getvalue()


def rows_of(
    content: bytes, columns: Sequence[str] | None, origin: str | None, *, verified: bool = False, unknown: bool = False
) -> pa.Table:
    """Return the rows in the bytes of a file: all columns of the pinned schema or some, then their origin.

    `origin` is the file itself, or None where the rows carry theirs. `verified` tells that the content matches its
    digest. With `unknown`, and all columns, those that the schema lacks follow. Raises ValueError or a pyarrow
    exception where the file is damaged or not one of prunesweep's, whatever columns are asked for.
    """
    file = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=not verified)
    ours = verified or _is_ours(file, content)
    some = columns is not None and ours
    names = [*dict.fromkeys([*REQUIRED, *columns])] if some and columns is not None else SCHEMA.names
    # Any other file is read as a whole: then the checksum of its every page is compared.
    table = file.read([*names, ORIGIN] if some else None, use_threads=file.metadata.num_rows > FEW_ROWS)
    if ours and not verified:
        _check_names(file)
    found = conform(table, names)
    if origin is not None:
        found = found.append_column(ORIGIN, repeated(origin, len(table)))
    elif ORIGIN not in table.column_names or table[ORIGIN].null_count:
        raise ValueError(f"no column {ORIGIN}")
    else:
        found = found.append_column(ORIGIN, table[ORIGIN].cast(pa.string()))
    if unknown:
        for name, column in zip(table.column_names, table.columns, strict=True):
            if name not in ROW_FILES_SCHEMA.names:
                found = found.append_column(name, column)
    return found


def _check_names(file: pq.ParquetFile) -> None:
    """Raise ValueError where a file of this version or an older one has a column that no such version has written:
    a bit of the name has flipped. Only a digest of the whole file, which this one lacks, shows all such damage."""
    unknown = [name for name in file.schema_arrow.names if name not in ROW_FILES_SCHEMA.names]
    if unknown and "schema_version" in file.schema_arrow.names:
        versions = file.read(["schema_version"])["schema_version"].unique().to_pylist()
        if all(version is not None and version <= SCHEMA_VERSION for version in versions):
            raise ValueError(f"its footer is damaged: no version of prunesweep has a column {unknown[0]}")


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
