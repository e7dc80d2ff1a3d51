"""What can be pruned of a network, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pruners.candidates import Sets


@dataclass(frozen=True)
class Layers:
    """What can be pruned of a network: layer -> its units, in the order in which the network runs them.

    `sets` has the channels of each unit, for layers whose channels can only be removed in sets or whose weight is that
    of another layer too. `others` are further layers with their units: their channels are those of one that runs before
    them, which stands for them where layers are named by a pattern. `refused` is layer -> why it cannot be pruned.
    """

    units: Mapping[str, int]
    sets: Mapping[str, Sets] = field(default_factory=dict)
    others: Mapping[str, int] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        named = {"units": self.units, "sets": self.sets, "others": self.others, "refused": self.refused}
        return {name: dict(value) for name, value in named.items()}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Layers:
        sets = {layer: tuple(map(tuple, of)) for layer, of in data["sets"].items()}
        return Layers(data["units"], sets, data["others"], data["refused"])
