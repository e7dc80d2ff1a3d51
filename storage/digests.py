"""Digests in file names: a name that holds the SHA-256 of the content shows damage in any byte of the file.

A Parquet file cannot protect its own footer, where one flipped bit renames a column or moves a value's unit. Its name
can, and the file stays plain Parquet for every other program.
"""

from __future__ import annotations

import hashlib
import re

ROWS_DIGITS = 40
"""Hexadecimal digits of the digest of a row file. Older row files have a random id of 32 digits there instead."""

EXPANSION_DIGITS = 8
"""Hexadecimal digits of the digest that an expansion's two files have in common."""

_ROW_FILE = re.compile(rf"rows/.+-([0-9a-f]{{{ROWS_DIGITS}}})\.parquet")


def row_file_name(stem: str, content: bytes) -> str:
    """Return `rows/<stem>-<digest>.parquet`, the name of a row file with this content."""
    return f"rows/{stem}-{_digest(content)[:ROWS_DIGITS]}.parquet"


def is_verified(name: str, content: bytes) -> bool:
    """Return True where the content of a row file matches the digest in its name, False where the name has none.

    Raises ValueError where they differ.
    """
    found = _ROW_FILE.fullmatch(name)
    if found is None:
        return False
    if not _digest(content).startswith(found[1]):
        raise ValueError("its content does not match the digest in its name: it is damaged or was edited")
    return True


def expansion_digest(spec: bytes, plan: bytes) -> str:
    """Return the digest in the name of an expansion with this spec and this table of tasks."""
    return _digest(spec + plan)[:EXPANSION_DIGITS]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
