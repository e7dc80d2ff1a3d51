"""YAML documents whose every key knows where it stands: file:line:column for messages."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.scalarbool import ScalarBoolean

from orchestrator.errors import UserError

Path_ = tuple[str | int, ...]

# A scalar that is not of its kind (2024-02-31, !!int x) is a bare ValueError.
_BAD_YAML = (YAMLError, ValueError)

_ANY_WIDTH = 10**6
"""No line of a spec is wrapped."""


class Document:
    """A YAML mapping, its name for messages, and the overrides put on it."""

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        self._overridden: dict[Path_, str] = {}
        try:
            self.data = YAML(typ="rt").load(text)
        except MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
            raise UserError(f"{where}: not valid YAML: {error.problem or error.context}") from error
        except _BAD_YAML as error:
            raise UserError(f"{name}: not valid YAML: {error}") from error
        if not isinstance(self.data, CommentedMap):
            raise UserError(f"{name}:1:1: a spec is a mapping of keys to values (see `prunesweep studies`)")

    def override(self, assignment: str) -> None:
        """Apply `a.b=value`; the value is YAML. Raises UserError."""
        path_text, equals, value_text = assignment.partition("=")
        keys: list[str | int] = [int(k) if k.isdecimal() else k for k in path_text.strip().split(".")]
        if not equals or not path_text.strip():
            raise UserError(f"--set {assignment}: write it as key=value, for example grid.ratio=0.2")
        try:
            value = YAML(typ="rt").load(value_text)
        except _BAD_YAML as error:
            raise UserError(f"--set {assignment}: the value is not valid YAML") from error
        target = self.data
        for i, key in enumerate(keys[:-1], 1):
            if isinstance(target, CommentedMap) and key not in target:
                target[key] = CommentedMap()
                self._overridden[tuple(keys[:i])] = assignment
            target = self._child(target, key, assignment)
        if not isinstance(target, CommentedMap | CommentedSeq):
            raise UserError(f"--set {assignment}: {'.'.join(map(str, keys[:-1]))} has no keys")
        if isinstance(target, CommentedSeq) and not (isinstance(keys[-1], int) and keys[-1] < len(target)):
            raise UserError(f"--set {assignment}: {'.'.join(map(str, keys[:-1]))} is a list; use its index")
        target[keys[-1]] = value
        self._overridden[tuple(keys)] = assignment

    def _child(self, target: Any, key: str | int, assignment: str) -> Any:
        try:
            return target[key]
        except (KeyError, IndexError, TypeError) as error:
            raise UserError(f"--set {assignment}: there is no {key} to set something in") from error

    def where(self, path: Sequence[str | int]) -> str:
        """`file:line:column` of the longest part of `path` that is in the document."""
        for n in range(len(path), 0, -1):
            if tuple(path[:n]) in self._overridden:
                return f"--set {self._overridden[tuple(path[:n])]}"
        line, column, node = 0, 0, self.data
        for key in path:
            try:
                position = node.lc.data[key]
                line, column = position[0], position[1]
                node = node[key]
            except (KeyError, IndexError, TypeError, AttributeError):
                break
        return f"{self.name}:{line + 1}:{column + 1}"

    def text(self) -> str:
        """The document with its overrides, comments and lines kept."""
        buffer, yaml = io.StringIO(), YAML(typ="rt")
        yaml.width = _ANY_WIDTH
        yaml.dump(self.data, buffer)
        return buffer.getvalue()

    def plain(self) -> Any:
        """The document as dicts, lists and scalars."""
        return _plain(self.data)


def _plain(node: Any) -> Any:
    if isinstance(node, dict):
        return {_plain(k): _plain(v) for k, v in node.items()}
    if isinstance(node, list):
        return [_plain(v) for v in node]
    for kind, made_of in ((bool, bool | ScalarBoolean), (int, int), (float, float), (str, str)):
        if isinstance(node, made_of):
            return kind(node)
    return node


def nearest(name: object, known: Iterable[str]) -> str:
    """`; did you mean X?` for the known name most like `name`, or nothing."""
    matches = get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.5)
    return f"; did you mean {matches[0]}?" if matches else ""
