"""Phases of long work: the step that a command or a worker is at, with a counter. Every room may report them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

TRAINING_DENSE = "training the dense model"
"""The start of the name of the phase in which a worker trains a dense model."""


class Report(Protocol):
    """The receiver of phases: a function that is called whenever the work gets to another step."""

    def __call__(self, name: str, at: int = 0, of: int = 0, unit: str = "") -> None: ...


def silent(name: str, at: int = 0, of: int = 0, unit: str = "") -> None:
    """Report nothing."""


@dataclass(frozen=True)
class Phase:
    """A step of long work. `at` counts from 1, 0 is not shown; `of` is the total, 0 if it is unknown; `unit` is the
    noun of the counted things."""

    name: str
    at: int = 0
    of: int = 0
    unit: str = ""

    def __str__(self) -> str:
        """Return `tracing network 3 of 6`, or with a unit `training the dense model (epoch 4 of 30)`."""
        if not self.at:
            return self.name
        counted = f"{self.at:,} of {self.of:,}" if self.of else f"{self.at:,}"
        return f"{self.name} ({self.unit} {counted})" if self.unit else f"{self.name} {counted}"

    def to_dict(self) -> dict[str, Any]:
        """Return the phase as plain data, for a note in scratch."""
        return asdict(self)

    @staticmethod
    def from_note(note: Mapping[str, Any]) -> Phase | None:
        """Return the phase that a note in scratch shows; None if it shows none, or none that this version knows."""
        given = note.get("phase")
        try:
            return Phase(**given) if isinstance(given, Mapping) else None
        except TypeError:
            return None
