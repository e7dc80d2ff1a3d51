"""The networks, as data: their layers are known without torch.

lenet5_mini is the small LeNet5 of arXiv 2412.00143; `_wN` has N filters in conv1, `_dN` has N layers
in all. The linear ones have no activation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class LeNet5:
    """Convolutions, then fully connected layers; `hidden` are the widths before the classifier.

    With `pool`, 5x5 convolutions and a 2x2 max-pool after each of the first two; without, 3x3
    convolutions of stride 2.
    """

    convs: tuple[int, ...]
    hidden: tuple[int, ...]
    linear: bool = False
    pool: bool = True
    input: tuple[int, int, int] = (1, 32, 32)

    def layers(self) -> dict[str, int]:
        convs = {f"conv{i}": units for i, units in enumerate(self.convs, 1)}
        return convs | {f"fc{i}": units for i, units in enumerate(self.hidden, 1)}

    @property
    def classifier(self) -> str:
        return f"fc{len(self.hidden) + 1}"


@dataclass(frozen=True)
class MLP:
    """`depth` fully connected layers, all of `width` but the classifier."""

    depth: int
    width: int = 100
    linear: bool = False
    input: tuple[int, int, int] = (1, 32, 32)

    def layers(self) -> dict[str, int]:
        return {f"fc{i}": self.width for i in range(1, self.depth)}

    @property
    def classifier(self) -> str:
        return f"fc{self.depth}"


Architecture = LeNet5 | MLP

_MINI = LeNet5(convs=(10, 10, 10), hidden=(10,))
_LENET5 = LeNet5(convs=(6, 16, 120), hidden=(84,))

MODELS: Mapping[str, Architecture] = {
    "lenet5": _LENET5,
    "lenet5_linear": replace(_LENET5, linear=True),
    "lenet5_wider_linear": LeNet5(convs=(60, 160, 1200), hidden=(84,), linear=True),
    "lenet5_wider_linear_nomaxpool": LeNet5((100, 100, 100), (84,), linear=True, pool=False),
    "lenet5_mini": _MINI,
    "lenet5_mini_linear": replace(_MINI, linear=True),
    "lenet5_mini_w20": replace(_MINI, convs=(20, 10, 10)),
    "lenet5_mini_w30": replace(_MINI, convs=(30, 10, 10)),
    "lenet5_mini_w40": replace(_MINI, convs=(40, 10, 10)),
    "lenet5_mini_d6": replace(_MINI, hidden=(10,) * 2),
    "lenet5_mini_d7": replace(_MINI, hidden=(10,) * 3),
    "lenet5_mini_d8": replace(_MINI, hidden=(10,) * 4),
    "lenet5_mini_d9": replace(_MINI, hidden=(10,) * 5),
    "mlp_7": MLP(7),
    "mlp_20": MLP(20),
    "mlp_50": MLP(50),
    "mlp_7_linear": MLP(7, linear=True),
    "mlp_20_linear": MLP(20, linear=True),
    "mlp_50_linear": MLP(50, linear=True),
}


def architecture(name: str) -> Architecture:
    """The network called `name`. Raises KeyError, naming those there are."""
    if name not in MODELS:
        raise KeyError(f"no model {name}; there are {', '.join(MODELS)}")
    return MODELS[name]


def layer_units(name: str) -> dict[str, int]:
    """Prunable layer -> units, in network order; the classifier is not among them."""
    return architecture(name).layers()


def input_shape(name: str) -> tuple[int, int, int]:
    """(channels, height, width) of the input."""
    return architecture(name).input


def build_model(name: str, classes: int) -> nn.Module:
    """The network with freshly drawn weights (torch's global generator). Raises KeyError."""
    from models import networks

    found = architecture(name)
    if isinstance(found, LeNet5):
        return networks.LeNet5(found, classes)
    return networks.MLP(found, classes)
