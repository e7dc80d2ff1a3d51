"""The networks by name. Built-in ones are data: their layers are known without torch.

Others are `torchvision/<name>` and `timm/<name>` (models.library), `hf/<path or id>` (models.multimodal) and a user's
own `package.module:build` (models.own).

lenet5_mini is the small LeNet5 of arXiv 2412.00143; `_wN` has N filters in conv1, `_dN` has N layers
in all. The linear ones have no activation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import lru_cache
from importlib.metadata import version
from typing import TYPE_CHECKING, TypeVar

import usercode
from models import library
from models.layers import Layers

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
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


@dataclass(frozen=True)
class ResNet:
    """A CIFAR ResNet of 6 * blocks + 2 layers, one stage per width.

    Prunable are the first convolutions of its blocks. All others write to the shortcuts, where option A's zeros
    have their places among the channels.
    """

    blocks: int
    widths: tuple[int, ...] = (16, 32, 64)
    input: None = None

    def layers(self) -> dict[str, int]:
        stages = enumerate(self.widths, 1)
        return {f"layer{stage}.{block}.conv1": n for stage, n in stages for block in range(self.blocks)}

    @property
    def classifier(self) -> str:
        return "fc"


@dataclass(frozen=True)
class VGG:
    """A CIFAR VGG: `convs` convolutions in each stage of these widths."""

    convs: tuple[int, ...]
    widths: tuple[int, ...] = (64, 128, 256, 512, 512)
    input: None = None

    def layers(self) -> dict[str, int]:
        units = [width for n, width in zip(self.convs, self.widths, strict=True) for _ in range(n)]
        return {f"conv{i}": n for i, n in enumerate(units, 1)}

    @property
    def classifier(self) -> str:
        return "fc"


Architecture = LeNet5 | MLP | ResNet | VGG

Shape = tuple[int, int, int]
Found = TypeVar("Found")

USUAL_SHAPES = ((3, 32, 32), (3, 224, 224), (1, 32, 32), (1, 28, 28))
"""(channels, height, width) that a user's own network is tried with where no data set says its own."""

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
    "resnet20": ResNet(3),
    "resnet56": ResNet(9),
    "resnet110": ResNet(18),
    "vgg11": VGG((1, 1, 2, 2, 2)),
    "vgg13": VGG((2, 2, 2, 2, 2)),
    "vgg16": VGG((2, 2, 3, 3, 3)),
    "vgg19": VGG((2, 2, 4, 4, 4)),
}


def check_model(name: str) -> None:
    """Raise ValueError for a name that no network can have, with the nearest ones. Imports no torch."""
    if name in MODELS:
        return
    if name.startswith("hf/"):
        from models.multimodal import check_hf

        check_hf(name)
    elif library.is_library(name):
        library.check(name)
    elif usercode.is_code(name):
        usercode.fingerprint(name)
    else:
        raise ValueError(_unknown(name))


def _unknown(name: str) -> str:
    near = get_close_matches(name, MODELS, n=1)
    meant = f"; did you mean {near[0]}?" if near else ""
    known = f"{', '.join(MODELS)}, torchvision/<name>, timm/<name>, hf/<path or id>, package.module:build"
    return f"unknown model {name!r}; allowed: {known}{meant}"


def architecture(name: str) -> Architecture:
    """The built-in network called `name`. Raises ValueError, naming those there are."""
    check_model(name)
    return MODELS[name]


def layer_units(name: str, classes: int | None = None, shape: Shape | None = None) -> dict[str, int]:
    """Return prunable layer -> units, in network order; the classifier is not among them. Raises ValueError.

    See `prunable_layers`, which also has the channels of each unit.
    """
    return dict(prunable_layers(name, classes, shape).units)


def prunable_layers(name: str, classes: int | None = None, shape: Shape | None = None) -> Layers:
    """Return what can be pruned of a network for samples [N, *shape] (channels, height, width). Raises ValueError.

    Heads are the units of an attention block. A network that is not built in is built and traced the first time, for
    the given classes and shape, or for usual ones where they are not known.
    """
    if name.startswith("hf/"):
        from models.multimodal import hf_layer_units

        return Layers(hf_layer_units(name))
    if not is_found(name):
        return Layers(architecture(name).layers())
    return _found_layers(name, classes, shape)


@lru_cache
def weight_layers(name: str, classes: int | None = None, shape: Shape | None = None) -> dict[str, int]:
    """Return convolution or linear layer -> its weights, in the order of the modules, the classifier too.

    These are what masks can be put on. Raises ValueError.

    A network is built the first time, on no device if it can be, for the given classes and shape.
    """
    from models import discovery

    check_model(name)
    if name.startswith("hf/"):
        raise ValueError(f"{name}: masks of single weights are for classifiers, not for language models")
    key = ["weights", name, _version(name), str(classes), str(shape)]
    if (found := discovery.remembered(key)) is None:
        found = _build_and(name, lambda model, _: discovery.weighted(model), classes, shape)
        discovery.remember(key, found)
    return found


def is_found(name: str) -> bool:
    """Whether a network's layers are found by tracing it: one of a library, or a user's own."""
    return name not in MODELS and (library.is_library(name) or usercode.is_code(name))


@lru_cache
def _found_layers(name: str, classes: int | None = None, shape: Shape | None = None) -> Layers:
    from models import discovery

    check_model(name)
    key = [name, _version(name), str(classes), str(shape)]
    if (kept := discovery.remembered(key)) is not None:
        return Layers.from_dict(kept)
    found = _build_and(name, discovery.prunable, classes, shape)
    discovery.remember(key, found.to_dict())
    return found


def _version(name: str) -> str:
    """Of what a network is built by: its library, or a user's code."""
    if name in MODELS:
        return ""
    return version(name.partition("/")[0]) if library.is_library(name) else usercode.fingerprint(name)


def _build_and(
    name: str,
    look: Callable[[nn.Module, torch.Tensor], Found],
    classes: int | None = None,
    shape: Shape | None = None,
) -> Found:
    """Return what `look` finds in a network and an input of it; on no device if it can be.

    Without a `shape` the network is built for each that it may be for until one works.
    """
    import torch

    from models import discovery

    problems: dict[Shape, str] = {}
    for known in [shape] if shape is not None else _usual_shapes(name):
        # A user's network is small enough to be looked at with values, which shows more.
        for device in ("cpu",) if usercode.is_code(name) else ("meta", "cpu"):
            try:
                with torch.random.fork_rng(devices=[]), torch.device(device):
                    model = build_model(name, classes or discovery.CLASSES, known)
                    return look(model, torch.zeros(1, *known))
            except Exception as error:  # of the network's own code: another shape, or a device with numbers, may do
                problems[known] = f"for samples of {_times(known)}: {error}"
    raise ValueError(f"the layers of {name} cannot be found; {'; '.join(problems.values())}")


def _usual_shapes(name: str) -> list[Shape]:
    if name in MODELS:
        return [MODELS[name].input or USUAL_SHAPES[0]]
    return [library.usual_shape(name)] if library.is_library(name) else list(USUAL_SHAPES)


def absolute_model(name: str) -> str:
    """A network's name as it means the same in every working directory. Raises ValueError."""
    if not name.startswith("hf/"):
        return name
    from models.multimodal import absolute

    return absolute(name)


def input_shape(name: str) -> tuple[int, int, int] | None:
    """(channels, height, width) of the input; None where the data set decides. Raises ValueError."""
    if name not in MODELS:
        check_model(name)
        return None
    return MODELS[name].input


def build_model(name: str, classes: int, shape: tuple[int, int, int]) -> nn.Module:
    """The network for inputs [N, *shape] (channels, height, width), with freshly drawn weights.

    They come from torch's global generator. Raises ValueError where there is no such network, or not for this shape.
    """
    if name.startswith("hf/"):
        from models.multimodal import build_hf

        return build_hf(name, classes, shape)
    if is_found(name):
        return _built_by_others(name, classes, shape)
    found = architecture(name)
    if found.input not in (None, tuple(shape)):
        raise ValueError(f"{name} takes inputs of {_times(found.input)}, not {_times(shape)}: take another data set")
    return _built(found, classes, shape[0])


def _built_by_others(name: str, classes: int, shape: tuple[int, int, int]) -> nn.Module:
    from models import own
    from models.attention import mark_heads

    model = (library if library.is_library(name) else own).build(name, classes, shape)
    model.built_for = shape  # pyright: ignore[reportArgumentType]
    return mark_heads(model)


def _built(found: Architecture, classes: int, channels: int) -> nn.Module:
    from models import cifar, networks

    if isinstance(found, ResNet):
        return cifar.ResNet(found, classes, channels)
    if isinstance(found, VGG):
        return cifar.VGG(found, classes, channels)
    if isinstance(found, LeNet5):
        return networks.LeNet5(found, classes)
    return networks.MLP(found, classes)


def load_weights(model: nn.Module, name: str, weights: str) -> None:
    """Put given weights into a network: `library` (its default pretrained ones; of `hf/` those beside its config), the
    library's own name of others, a local .safetensors or .pt file, or a URI of one.

    Of a library's weights the classifier is left out where it is for another number of classes. Raises ValueError
    naming the file, what does not fit, and what to do.
    """
    from models.weights import is_file, put, read

    if is_file(weights):
        state = read(weights)
        return put(model, library.fitted(model, state), weights)
    if name.startswith("hf/") and weights == "library":
        from models.multimodal import load_hf

        return load_hf(model, name)
    if not library.is_library(name):
        raise ValueError(f"{name} has no weights {weights!r}: give a .safetensors or .pt file, or leave `weights` out")
    return library.load(model, name, weights)


def model_content(name: str) -> str | None:
    """A hash of the code or files that a network is made of, where they are a user's; else None."""
    if name.startswith("hf/"):
        from models.multimodal import hf_content

        return hf_content(name)
    check_model(name)
    return usercode.fingerprint(name) if usercode.is_code(name) and name not in MODELS else None


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
