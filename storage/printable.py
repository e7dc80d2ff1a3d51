"""Text from users, files and other machines as text that is safe to print.

A terminal obeys control characters, and bidirectional controls show a text in another order than it has. Names,
messages and cells of tables can hold both. `printable` escapes them; `Printable` does it for a whole stream.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TextIO

_UNSAFE = re.compile(
    "["
    "\x00-\x1f\x7f-\x9f"  # C0, DEL, C1
    "\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"  # format, bidirectional, separators
    "\U000e0000-\U000e007f"  # tags
    "\ud800-\udfff"  # lone surrogates; of these \udc80-\udcff are bytes of file names that are not UTF-8
    "]"
)


def printable(text: object, keep: str = "") -> str:
    r"""Return `str(text)` with each character that could mislead a reader or a terminal as its escape: \x1b, \u202e.

    Bytes of a file name that are not UTF-8 become \xNN. Characters in `keep` stay, for example a newline.
    """
    return _UNSAFE.sub(lambda found: found[0] if found[0] in keep else _escape(found[0]), str(text))


def printable_lines(text: object) -> str:
    """Return the same with newlines and tabs as they are."""
    return printable(text, keep="\n\t")


def printable_page(text: str) -> str:
    r"""Return a page of HTML, or a script in it, with the same characters as \uNNNN, an escape that JSON has too."""
    return _UNSAFE.sub(lambda found: found[0] if found[0] in "\n\t" else _in_json(found[0]), text)


def is_utf8(text: str) -> bool:
    """Return whether a text can be encoded: whether it has no byte of a file name or argument that is not UTF-8."""
    return not any("\ud800" <= char <= "\udfff" for char in text)


def _escape(char: str) -> str:
    return f"\\x{ord(char) - 0xDC00:02x}" if "\udc80" <= char <= "\udcff" else ascii(char)[1:-1]


def _in_json(char: str) -> str:
    code = ord(char)
    if code > 0xFFFF:
        return "".join(f"\\u{half:04x}" for half in (0xD7C0 + (code >> 10), 0xDC00 + (code & 0x3FF)))
    return f"\\u{code:04x}"


class Printable:
    """A text stream that escapes what is written to it, and is else the stream itself.

    A carriage return stays at the start of what is written: bars of progress begin with it.
    """

    def __init__(self, stream: TextIO) -> None:
        self.unescaped = stream

    def write(self, text: str) -> int:
        """Write `text` escaped; return its own length."""
        start = "\r" if text.startswith("\r") else ""
        self.unescaped.write(start + printable_lines(text.removeprefix("\r")))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        """Write each of `lines` escaped."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unescaped, name)


def unescaped(stream: Any) -> TextIO:
    """Return the stream below a Printable, for a program of terminals that writes control characters itself."""
    return getattr(stream, "unescaped", stream)


@contextmanager
def printable_output() -> Iterator[None]:
    """Within this, stderr is escaped, and stdout where it is a terminal. Programs get stdout as it is."""
    before = sys.stdout, sys.stderr
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors == "strict":
        # A file name that is not UTF-8 leaves as its own bytes.
        sys.stdout.reconfigure(errors="surrogateescape" if sys.stdout.encoding == "utf-8" else "backslashreplace")
    if sys.stdout.isatty():
        sys.stdout = Printable(sys.stdout)
    sys.stderr = Printable(sys.stderr)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
