"""scratch/: notes, signs of life and checkpoints. All of it may vanish without losing a result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from storage.store import Store

_DIGEST = hashlib.sha256().digest_size


class Scratch:
    """The scratch of a store. Names are relative to it; a note is a JSON object."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def note(self, name: str, value: Mapping[str, Any]) -> dict[str, Any]:
        """Note `value` under `name` unless something is there, and return what is there."""
        self._store.commit(_note(name), _json(value))
        return self.noted(name) or dict(value)

    def renew(self, name: str, value: Mapping[str, Any]) -> None:
        """Note `value` under `name`, in place of what is there; a power failure may undo it."""
        self._store.replace(_note(name), _json(value), durable=False)

    def noted(self, name: str) -> dict[str, Any] | None:
        """What was noted under `name`, or None."""
        try:
            return json.loads(self._store.read(_note(name)))
        except (FileNotFoundError, ValueError):
            return None

    def forget(self, name: str) -> None:
        """Remove a note; it may be gone already."""
        self._store.delete(_note(name))

    def notes(self, folder: str) -> dict[str, dict[str, Any]]:
        """All notes under a folder of scratch, by name."""
        names = [f"{folder}/{name.removesuffix('.json')}" for name in self._store.names(f"scratch/{folder}")]
        return {name: value for name in names if (value := self.noted(name)) is not None}

    def save_checkpoint(self, key: str, content: bytes) -> None:
        """Keep `content` as the checkpoint of a task or a dense model, in place of an earlier one."""
        self._store.replace(_checkpoint(key), hashlib.sha256(content).digest() + content)

    def checkpoint(self, key: str) -> bytes | None:
        """The checkpoint of a task or a dense model, or None. Raises ValueError where it is damaged."""
        try:
            content = self._store.read(_checkpoint(key))
        except FileNotFoundError:
            return None
        if hashlib.sha256(content[_DIGEST:]).digest() != content[:_DIGEST]:
            raise ValueError(f"the checkpoint {_checkpoint(key)} is damaged")
        return content[_DIGEST:]

    def drop_checkpoint(self, key: str) -> None:
        """Remove a checkpoint; there may be none."""
        self._store.delete(_checkpoint(key))

    def checkpoints(self) -> list[str]:
        """The keys that have a checkpoint."""
        return [name.removesuffix(".checkpoint") for name in self._store.names("scratch/checkpoints")]


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(dict(value)).encode()


def _note(name: str) -> str:
    return f"scratch/{name}.json"


def _checkpoint(key: str) -> str:
    return f"scratch/checkpoints/{key}.checkpoint"
