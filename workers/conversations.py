"""LLaVA-format JSON as items: one image, what was said about it, and the letters to choose from."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from storage.printable import printable
from storage.userfiles import mode_of, open_regular

IMAGE = "<image>"
"""Stands in a question where the image is."""

ROLES = {"human": "user", "gpt": "assistant"}
"""LLaVA's names of who speaks -> those of chat templates, in the order they take turns."""

_OPTION = re.compile(r"^\s*\(?([A-Z])[.):]\s", re.MULTILINE)
_LETTER = re.compile(r"\(?([A-Z])\)?[.:]?")


@dataclass(frozen=True)
class Item:
    """One sample. `turns` are (user or assistant, text) in turn, from a user's to an assistant's, without `<image>`.

    `letters` are those of a multiple-choice item, whose last turn is one of them; else empty.
    """

    id: str
    image: Path
    turns: tuple[tuple[str, str], ...]
    letters: tuple[str, ...] = ()

    @property
    def letter(self) -> str:
        """The right letter of a multiple-choice item."""
        return letter_of(self.turns[-1][1]) or ""


def read_items(file: Path, images: Path) -> list[Item]:
    """The items of a file; their images lie in the folder `images`. Raises ValueError naming file and item."""
    return [
        item_of(data, f"{printable(file)}: item {_id(data, at)}", at, images) for at, data in enumerate(read_list(file))
    ]


def read_list(file: Path) -> list[Any]:
    """A JSON file's list. Raises ValueError."""
    found = read_json(file)
    if not isinstance(found, list) or not found:
        raise ValueError(f"{printable(file)} is no list of items (LLaVA's format: id, image, conversations)")
    return found


def read_json(file: Path) -> Any:
    """The content of a JSON file. Raises ValueError."""
    try:
        with open_regular(file) as opened:
            return json.load(opened)
    except OSError as error:
        raise ValueError(f"{printable(file)} cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{printable(file)} is no JSON: {error}") from error


def item_of(data: Any, where: str, at: int, images: Path) -> Item:
    """The item of plain data, the `at`-th. Raises ValueError that begins with `where`."""
    if not isinstance(data, dict) or not isinstance(data.get("conversations"), list):
        raise ValueError(f"{where} has no list `conversations`")
    if not isinstance(data.get("image"), str):
        raise ValueError(f"{where} names no image: every item needs one, a file under {printable(images)}")
    image = images / data["image"]
    if not stat.S_ISREG(kind := mode_of(image)):
        wrong = "the image is not a regular file:" if kind else "there is no image"
        raise ValueError(f"{where}: {wrong} {printable(image)}; `image` names a file under {printable(images)}")
    turns = tuple(_turns(data["conversations"], where))
    letters = tuple(_letters(data, turns, where))
    return Item(str(_id(data, at)), image, turns, letters)


def letter_of(answer: str) -> str | None:
    """`B` of `B`, `B.` or `(B)`; None of any other answer."""
    found = _LETTER.fullmatch(answer.strip())
    return found[1] if found else None


def _id(data: Any, at: int) -> Any:
    return data.get("id", at) if isinstance(data, Mapping) else at


def _turns(conversations: list[Any], where: str) -> Iterator[tuple[str, str]]:
    if not conversations or len(conversations) % 2:
        raise ValueError(f"{where} has no answer to its last question: turns go human, gpt, human, gpt")
    texts = [turn.get("value") if isinstance(turn, dict) else None for turn in conversations]
    if sum(text.count(IMAGE) for text in texts if isinstance(text, str)) > 1:
        raise ValueError(f"{where} has {IMAGE} more than once: an item has one image")
    for number, (turn, text) in enumerate(zip(conversations, texts, strict=True)):
        speaker = list(ROLES)[number % 2]
        if not isinstance(turn, dict) or turn.get("from") != speaker:
            raise ValueError(f"{where}: turn {number + 1} is not from {speaker}: turns go human, gpt, human, gpt")
        said = text.replace(IMAGE, "").strip() if isinstance(text, str) else ""
        if not said:
            raise ValueError(f"{where}: turn {number + 1}, of {speaker}, has no text")
        yield ROLES[speaker], said


def _letters(data: Mapping[str, Any], turns: tuple[tuple[str, str], ...], where: str) -> list[str]:
    """The letters to choose from: of the field `choices`, or of lines `A. ...` in the last question."""
    answer = letter_of(turns[-1][1])
    if (choices := data.get("choices")) is None:
        letters = list(dict.fromkeys(_OPTION.findall(turns[-2][1])))
        return letters if len(letters) > 1 and answer in letters else []
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(ascii_uppercase):
        raise ValueError(f"{where}: `choices` is a list of letters or of at least two options")
    own = all(isinstance(one, str) and one in ascii_uppercase and one for one in choices)
    letters = list(choices) if own else list(ascii_uppercase[: len(choices)])
    if answer not in letters:
        raise ValueError(f"{where}: the answer {turns[-1][1]!r} is none of its letters {', '.join(letters)}")
    return letters
