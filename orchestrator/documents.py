"""YAML documents whose every key knows where it stands: file:line:column for messages."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.constructor import ConstructorError, RoundTripConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, NodeEvent
from ruamel.yaml.reader import ReaderError
from ruamel.yaml.scalarbool import ScalarBoolean

from orchestrator.errors import UserError
from storage.printable import printable

Path_ = tuple[str | int, ...]

MAX_BYTES, MAX_DEPTH, MAX_NODES = 10**6, 50, 10**5
"""Limits of a spec: its bytes, the depth of nested lists and mappings, and the number of keys and values after every
alias is replaced by its node."""

MAX_BITS = 128
"""Of a whole number; Python refuses to print long ones."""

_TAGS = {None, "!", *(f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "seq", "map"))}

_UNMARKED = (YAMLError, ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError, RecursionError)
"""Errors of ruamel.yaml that name no line."""

_ANY_WIDTH = 10**6
"""No line of a spec is wrapped."""

_SHOWN = 200
"""Characters of an override that messages show at most."""


class _Constructor(RoundTripConstructor):
    """ruamel's, whose every error names a line: of a scalar that is not of its kind (2024-02-31, !!int x) too."""

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            made = super().construct_object(node, deep)
        except YAMLError:
            raise
        except Exception as error:
            raise ConstructorError(None, None, str(error).partition(";")[0], node.start_mark) from error
        if isinstance(made, int) and made.bit_length() > MAX_BITS:
            raise ConstructorError(None, None, f"a number of more than {MAX_BITS} bits", node.start_mark)
        return made


def _yaml() -> YAML:
    yaml = YAML(typ="rt")
    yaml.Constructor = _Constructor
    yaml.composer.warn_double_anchors = False
    return yaml


class _Wrong(UserError):
    """A fault at a place of a YAML text; `message` goes on after "the value is"."""

    def __init__(self, name: str, line: int, column: int, message: str) -> None:
        super().__init__(f"{name}:{line}:{column}: {message}")
        self.message = message


def decoded(name: str, content: bytes) -> str:
    """The text of a spec's bytes. Raises UserError where it is too large or not UTF-8."""
    if len(content) > MAX_BYTES:
        raise _too_large(name, content[:MAX_BYTES].decode(errors="replace"))
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        place = _place(content[: error.start].decode(errors="replace"))
        raise _Wrong(name, *place, f"not text in UTF-8 ({error.reason}); save the file as UTF-8") from error


def _too_large(name: str, allowed: str) -> UserError:
    return _Wrong(name, *_place(allowed), f"larger than {MAX_BYTES // 10**6} MB, the maximum size of a spec")


def _place(before: str) -> tuple[int, int]:
    """Line and column of the character after `before`."""
    return before.count("\n") + 1, len(before) - before.rfind("\n")


def _parsed(name: str, text: str) -> tuple[Any, int]:
    """What a YAML text holds, and its number of nodes. Raises _Wrong, before anything is built where the text is over
    the limits."""
    encoded = text.encode(errors="surrogatepass")
    if len(encoded) > MAX_BYTES:
        raise _too_large(name, encoded[:MAX_BYTES].decode(errors="replace"))
    try:
        nodes = _Measure(name).of(text)
        return _yaml().load(text), nodes
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        raise _Wrong(name, *place, f"not valid YAML: {printable(error.problem or error.context)}") from error
    except ReaderError as error:
        raise _Wrong(name, *_place(text[: error.position]), f"not valid YAML: {error.reason}") from error
    except _UNMARKED as error:
        raise _Wrong(name, 1, 1, f"not valid YAML: {printable(error)}") from error


@dataclass
class _Measure:
    """The size of a YAML text as its events tell it: nothing is built, and no alias is replaced."""

    name: str
    nodes: int = 0
    open: list[tuple[str | None, int, int]] = field(default_factory=list)
    """Of each collection around the event: its anchor, the nodes before it, the deepest level in it."""
    anchored: dict[str, tuple[int, int]] = field(default_factory=dict)
    """anchor -> (nodes, levels) of what it stands for."""

    def of(self, text: str) -> int:
        """The number of nodes. Raises UserError over the limits, and for a tag or an alias that is not allowed."""
        for event in _yaml().parse(text):
            if isinstance(event, AliasEvent):
                self._alias(event)
            elif isinstance(event, CollectionStartEvent):
                self._check_tag(event)
                self._add(event, 1, 1)
                self.open.append((event.anchor, self.nodes - 1, 0))
            elif isinstance(event, CollectionEndEvent):
                anchor, before, levels = self.open.pop()
                self._close(anchor, self.nodes - before, levels + 1)
            elif isinstance(event, NodeEvent):
                self._check_tag(event)
                self._add(event, 1, 0)
                self._close(event.anchor, 1, 0)
        return self.nodes

    def _alias(self, event: Any) -> None:
        if any(anchor == event.anchor for anchor, _, _ in self.open):
            raise self._wrong(event, f"not valid: *{event.anchor} stands for a value that contains it")
        nodes, levels = self.anchored.get(event.anchor, (1, 0))  # an unknown one is for ruamel to report
        self._add(event, nodes, levels)
        self._deepen(levels)

    def _add(self, event: Any, nodes: int, levels: int) -> None:
        self.nodes += nodes
        if len(self.open) + levels > MAX_DEPTH:
            raise self._wrong(event, f"nested more than {MAX_DEPTH} deep, the maximum")
        if self.nodes > MAX_NODES:
            raise self._wrong(event, f"too large: more than {MAX_NODES} keys and values with aliases replaced")

    def _close(self, anchor: str | None, nodes: int, levels: int) -> None:
        if anchor is not None:
            self.anchored[anchor] = nodes, levels
        self._deepen(levels)

    def _deepen(self, levels: int) -> None:
        if self.open and levels > self.open[-1][2]:
            self.open[-1] = (*self.open[-1][:2], levels)

    def _check_tag(self, event: Any) -> None:
        if event.tag not in _TAGS:
            raise self._wrong(event, f"not allowed: the tag {event.tag!a}; write the value without it")

    def _wrong(self, event: Any, message: str) -> UserError:
        mark = event.start_mark
        return _Wrong(self.name, mark.line + 1, mark.column + 1, printable(message))


class Document:
    """A YAML mapping, its name for messages, and the overrides put on it."""

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        self._overridden: dict[Path_, str] = {}
        self.data, self._nodes = _parsed(name, text)
        if not isinstance(self.data, CommentedMap):
            raise UserError(f"{name}:1:1: a spec is a mapping of keys to values (see `prunesweep studies`)")

    def override(self, assignment: str) -> None:
        """Apply `a.b=value`; the value is YAML. Raises UserError."""
        path_text, equals, value_text = assignment.partition("=")
        assignment = _short(assignment)
        keys: list[str | int] = [int(k) if k.isdecimal() and len(k) < 10 else k for k in path_text.strip().split(".")]
        if not equals or not path_text.strip():
            raise UserError(f"--set {assignment}: write it as key=value, for example grid.ratio=0.2")
        if len(keys) > MAX_DEPTH:
            raise UserError(f"--set {assignment}: the key has more than {MAX_DEPTH} parts")
        try:
            value, nodes = _parsed("value", value_text)
        except _Wrong as error:
            raise UserError(f"--set {assignment}: the value is {error.message}") from error
        self._nodes += nodes
        if self._nodes > MAX_NODES:
            raise UserError(f"--set {assignment}: with it the spec has more than {MAX_NODES} keys and values")
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
        buffer, yaml = io.StringIO(), _yaml()
        yaml.width = _ANY_WIDTH
        yaml.dump(self.data, buffer)
        return buffer.getvalue()

    def plain(self) -> Any:
        """The document as dicts, lists and scalars."""
        return _plain(self.data)


def _short(assignment: str) -> str:
    return assignment if len(assignment) <= _SHOWN else f"{assignment[:_SHOWN]}..."


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
