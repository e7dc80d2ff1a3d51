"""What can be pruned of a network, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Sets = tuple[tuple[int, ...], ...]
"""For each unit of a layer its output channels, ascending."""


@dataclass(frozen=True)
class Layers:
    """What can be pruned of a network: layer -> its units, in the order in which the network runs them.

    `sets` has the channels of each unit, for layers whose channels can only be removed in sets or whose weight is that
    of another layer too. `refused` is layer -> why it cannot be pruned.
    """

    units: Mapping[str, int]
    sets: Mapping[str, Sets] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {"units": dict(self.units), "sets": dict(self.sets), "refused": dict(self.refused)}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Layers:
        sets = {layer: tuple(map(tuple, of)) for layer, of in data["sets"].items()}
        return Layers(data["units"], sets, data["refused"])
