"""`torchvision/<name>` and `timm/<name>`: any classifier of those libraries, with arguments as a query.

    torchvision/vit_b_16?image_size=32&patch_size=8&hidden_dim=48&num_heads=3&mlp_dim=96&num_layers=2
    timm/vit_tiny_patch16_224?img_size=32&patch_size=8&embed_dim=48&depth=2&num_heads=3

Where the library's constructor takes them, image size and channels are those of the data set.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import nn

LIBRARIES = ("torchvision", "timm")

_DENSENETS_OLD = re.compile(
    r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\.(?:weight|bias|running_mean|running_var))$"
)
"""What torchvision's files of DenseNets call tensors that its networks call otherwise; its loader knows, too."""

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Named:
    """A name taken apart: the library, the network's name there, the arguments."""

    library: str
    network: str
    arguments: Mapping[str, Any]


def is_library(name: str) -> bool:
    """Whether a name is meant for one of the libraries."""
    return name.partition("/")[0] in LIBRARIES and "/" in name


def parsed(name: str) -> Named:
    """A name taken apart. Raises ValueError for arguments that are no query."""
    library, _, rest = name.partition("/")
    network, _, query = rest.partition("?")
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError:
        raise ValueError(f"{name}: arguments follow the name as ?key=value&key=value, not as ?{query}") from None
    return Named(library, network, {key: _value(text) for key, text in pairs})


def check(name: str) -> None:
    """Raise ValueError for a network that the library does not have, with the nearest; neither is imported."""
    found = parsed(name)
    known = known_names(found.library)
    if found.network.partition(".")[0] in known:
        return
    near = get_close_matches(found.network, known, n=3)
    meant = f"; did you mean {' or '.join(f'{found.library}/{n}' for n in near)}?" if near else ""
    raise ValueError(f"{found.library} has no classifier {found.network!r}{meant}")


@lru_cache
def known_names(library: str) -> tuple[str, ...]:
    """The classifiers that a library registers, read from its source: importing it takes seconds."""
    found = find_spec(library)
    if found is None or found.origin is None:
        raise ValueError(f"{library} is not installed")
    registered = re.compile(r"^@register_model(?:\(\))?\n(?:@[^\n]*(?:\n [^\n]*)*\n(?:\)\n)?)*def (\w+)", re.MULTILINE)
    files = sorted((Path(found.origin).parent / "models").glob("*.py"))
    return tuple(name for file in files for name in registered.findall(file.read_text(encoding="utf-8")))


def usual_shape(name: str) -> Shape:
    """The (channels, height, width) that a network is made for where no data set says otherwise."""
    found = parsed(name)
    if found.library == "timm":
        import timm

        asked, channels = found.arguments.get("img_size"), found.arguments.get("in_chans")
        config = timm.get_pretrained_cfg(found.network)
        usual = tuple(config.input_size) if config else (3, 224, 224)
        height, width = (asked, asked) if isinstance(asked, int) else asked or usual[1:]
        return channels or usual[0], height, width
    size: Any = found.arguments.get("image_size", 299 if found.network == "inception_v3" else 224)
    return 3, size, size


def build(name: str, classes: int, shape: Shape) -> nn.Module:
    """The network for inputs [N, *shape], freshly drawn. Raises ValueError saying what the library refuses."""
    found = parsed(name)
    check(name)
    try:
        if found.library == "timm":
            return _build_timm(found, classes, shape)
        return _build_torchvision(found, classes, shape)
    except (TypeError, AssertionError, RuntimeError, ValueError) as error:
        said = str(error).partition("\n")[0]
        wanted = f"{classes} classes and inputs of {'x'.join(map(str, shape))}"
        raise ValueError(f"{name} cannot be built for {wanted}: {said}") from error


def _build_timm(found: Named, classes: int, shape: Shape, **more: Any) -> nn.Module:
    import timm

    arguments: dict[str, Any] = {"in_chans": shape[0], **found.arguments, "num_classes": classes, **more}
    sized: dict[str, Any] = {"img_size": shape[1] if shape[1] == shape[2] else shape[1:]} | arguments
    try:
        return timm.create_model(found.network, **sized)
    except TypeError as error:  # a network for images of any size takes none
        if "img_size" not in str(error) or "img_size" in found.arguments:
            raise
        return timm.create_model(found.network, **arguments)


def _build_torchvision(found: Named, classes: int, shape: Shape) -> nn.Module:
    from torchvision import models

    from models.attention import separated

    if shape[0] != 3:
        raise ValueError(f"torchvision's networks take 3 channels, not {shape[0]}; timm's take any number")
    arguments = dict(found.arguments)
    if found.network.startswith("vit_"):
        return separated(_vision_transformer(found, classes, shape))
    if found.network in ("googlenet", "inception_v3"):
        # Their auxiliary classifiers would be further outputs in training.
        arguments = {"aux_logits": False, "init_weights": True} | arguments
    return models.get_model(found.network, weights=None, num_classes=classes, **arguments)


def _vision_transformer(found: Named, classes: int, shape: Shape) -> nn.Module:
    """The library's builders fix the sizes that a narrow variant changes; its class takes them all."""
    import torch
    from torchvision import models

    with torch.device("meta"):
        usual: Any = models.get_model(found.network, weights=None)
    sizes = {
        "patch_size": usual.patch_size,
        "num_layers": len(usual.encoder.layers),
        "num_heads": usual.encoder.layers[0].num_heads,
        "hidden_dim": usual.hidden_dim,
        "mlp_dim": usual.mlp_dim,
        "image_size": shape[1],
    }
    return models.VisionTransformer(**(sizes | dict(found.arguments)), num_classes=classes)


def load(model: nn.Module, name: str, weights: str) -> None:
    """Put a library's own weights into its network: `library` for its default, or their name there.

    A classifier for another number of classes keeps its fresh weights. Raises ValueError.
    """
    from models.weights import put

    found = parsed(name)
    if getattr(model, "transform_input", None) is False:
        added = f"{name}{'&' if '?' in name else '?'}transform_input=True"
        raise ValueError(f"torchvision's weights of {found.network} are for inputs that it transforms: name it {added}")
    with _explained(found, weights):
        state = _timm_state(found, model, weights) if found.library == "timm" else _torchvision_state(found, weights)
    own = model.state_dict()
    last = _classifier(model)
    fresh = {n for n in (f"{last}.weight", f"{last}.bias") if n in state and state[n].shape != own[n].shape}
    put(model, fitted(model, state) | {n: own[n] for n in fresh}, f"{found.library}'s {found.network} {weights}")


def fitted(model: nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A library's state dict under the names that `model` has."""
    from models.attention import separated_state

    own = model.state_dict()
    extra = [n for n in state if n not in own and n.startswith(("AuxLogits.", "aux1.", "aux2."))]
    return {n: t for n, t in separated_state(model, state).items() if n not in extra}


def _torchvision_state(found: Named, weights: str) -> Mapping[str, torch.Tensor]:
    from torchvision import models

    kinds: Any = models.get_model_weights(found.network)
    if weights != "library" and weights not in kinds.__members__:
        there = ", ".join(kinds.__members__)
        raise ValueError(f"{found.network} has no weights {weights!r}; torchvision has {there} (or: library, a file)")
    kind = kinds.DEFAULT if weights == "library" else kinds[weights]
    state = kind.get_state_dict(progress=False, check_hash=True)
    return {_DENSENETS_OLD.sub(r"\1\2", tensor): value for tensor, value in state.items()}


def _timm_state(found: Named, model: nn.Module, weights: str) -> Mapping[str, torch.Tensor]:
    """What timm's own loading makes of them for this image size, these channels and classes."""
    tag = "" if weights == "library" else f".{weights}"
    network = f"{found.network.partition('.')[0]}{tag}" if tag else found.network
    if tag and weights not in (tags := _timm_tags(found.network)):
        raise ValueError(f"{found.network} has no weights {weights!r}; timm has {', '.join(tags) or 'none'}")
    channels, height, width = getattr(model, "built_for", usual_shape(f"timm/{found.network}"))
    named = Named("timm", network, found.arguments)
    classes: Any = model.num_classes
    made: Any = _build_timm(named, classes, (channels, height, width), pretrained=True)
    return _for_our_normalisation(made, found.network)


def _for_our_normalisation(model: Any, network: str) -> Mapping[str, torch.Tensor]:
    """The state of a network made for images of another mean and standard deviation than ImageNet's, which ours have:
    the difference goes into its first convolution. Raises ValueError where that pads, so that it cannot."""
    from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    config, state = model.pretrained_cfg, dict(model.state_dict())
    theirs, ours = (config["mean"], config["std"]), (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    if theirs == ours:
        return state
    name = config["first_conv"]
    first: Any = model.get_submodule(name) if isinstance(name, str) else None
    if first is None or first.bias is None or any(first.padding) or first.in_channels != len(ours[0]):
        raise ValueError(
            f"timm's weights of {network} are for images of mean {theirs[0]} and standard deviation {theirs[1]}, "
            "and ours have ImageNet's: take other weights of it, or none"
        )
    weight, bias = renormalised(first.weight.detach(), first.bias.detach(), theirs, ours)
    return state | {f"{name}.weight": weight, f"{name}.bias": bias}


Statistics = tuple[Sequence[float], Sequence[float]]


def renormalised(
    weight: torch.Tensor, bias: torch.Tensor, theirs: Statistics, ours: Statistics
) -> tuple[torch.Tensor, torch.Tensor]:
    """A convolution without padding that gives on images normalised by `ours` (mean and standard deviation per
    channel) what `weight` [F, C, ...] and `bias` [F] give on those normalised by `theirs`."""
    import torch

    (mean, std), (mean_here, std_here) = ([torch.tensor(v, dtype=weight.dtype) for v in s] for s in (theirs, ours))
    shape = (1, -1, *[1] * (weight.ndim - 2))
    shifted = (weight * ((mean_here - mean) / std).reshape(shape)).flatten(1).sum(1)
    return weight * (std_here / std).reshape(shape), bias + shifted


def _timm_tags(network: str) -> list[str]:
    import timm

    base = network.partition(".")[0]
    return [n.partition(".")[2] for n in timm.list_pretrained(f"{base}.*") if n.partition(".")[0] == base]


@contextmanager
def _explained(found: Named, weights: str) -> Iterator[None]:
    """Whatever goes wrong on the way to a library's weights is told with what to do instead."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:  # of the network, the disk, the library
        said = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ValueError(
            f"{found.library}'s weights {weights!r} of {found.network} cannot be had: {said}. Without a network, fetch "
            "them elsewhere and give the file"
        ) from error


def _classifier(model: nn.Module) -> str:
    """The last layer with weights of two or more dimensions."""
    names = [n for n, p in model.named_parameters() if p.ndim > 1 and n.endswith(".weight")]
    return names[-1].removesuffix(".weight")


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False}.get(text.lower(), text)
