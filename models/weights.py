"""Weights from files: read safely, and put into a network only where all of them fit."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

SHOWN = 4
"""How many tensors that do not fit a message names."""

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")

_WRAPPERS = ("state_dict", "model_state_dict", "model", "model_ema", "params")


def is_file(weights: str) -> bool:
    """Whether given weights are a file or an address, not a name that a library has for its own."""
    return "/" in weights or Path(weights).suffix in SUFFIXES


def file_hash(path: Path) -> str:
    """16 hex digits of sha256 over a local file: what it is known by."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def put(model: nn.Module, state: Mapping[str, torch.Tensor], where: str) -> None:
    """Put `state`, read from `where`, into `model`. Raises ValueError where any tensor does not fit."""
    own = model.state_dict()
    problems = [
        _list("there is no tensor called {} in it", [n for n in own if n not in state and not _counts(n)]),
        _list("the network has no tensor called {}", [n for n in state if n not in own]),
        *_misshapen(own, state),
    ]
    if found := [p for p in problems if p]:
        raise ValueError(
            f"{where} does not fit the network: {'; '.join(found)}. Give a file of exactly this network, with as many "
            "classes as the data set has"
        )
    model.load_state_dict(dict(state), strict=False)


def read(where: str) -> dict[str, torch.Tensor]:
    """Name -> tensor of a .safetensors or .pt/.pth file. Raises ValueError; nothing is unpickled but tensors."""
    suffix = Path(where.partition("?")[0]).suffix
    if suffix == ".safetensors":
        return _parsed(where, _safetensors)
    if suffix in SUFFIXES:
        return _unwrapped(_parsed(where, _torch), where)
    raise ValueError(f"{where}: weights are a .safetensors file or a .pt/.pth file with a state dict")


def content(where: str) -> bytes:
    """The bytes of a local file, an http(s) address or a pyarrow.fs URI. Raises ValueError."""
    try:
        if where.startswith(("http://", "https://")):
            from urllib.request import urlopen

            with urlopen(where, timeout=60) as answer:
                return answer.read()
        if "://" in where:
            from pyarrow import fs

            system, path = fs.FileSystem.from_uri(where)
            with system.open_input_file(path) as file:
                return file.read()
        return Path(where).expanduser().read_bytes()
    except (OSError, ValueError) as error:
        raise ValueError(f"the weights {where} cannot be read: {error}") from error


def _parsed(where: str, parse: Any) -> Any:
    raw = content(where)
    try:
        return parse(raw)
    except Exception as error:  # of another kind for each way to be broken
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{where} is damaged or holds more than tensors, and is not loaded: {reason}") from error


def _safetensors(raw: bytes) -> Any:
    from safetensors.torch import load

    return load(raw)


def _torch(raw: bytes) -> Any:
    import torch

    return torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)


def _unwrapped(loaded: Any, where: str) -> dict[str, torch.Tensor]:
    """The state dict, out of what training scripts put around one: a key, and DataParallel's `module.`"""
    import torch

    for key in _WRAPPERS:
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not loaded or not all(isinstance(t, torch.Tensor) for t in loaded.values()):
        raise ValueError(f"{where} holds no state dict (names and tensors)")
    inside = all(name.startswith("module.") for name in loaded)
    return {name.removeprefix("module.") if inside else name: tensor for name, tensor in loaded.items()}


def _counts(name: str) -> bool:
    """Batch norm's counter, which older files do not have."""
    return name.endswith("num_batches_tracked")


def _list(message: str, names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
    return message.format(shown) if names else ""


def _misshapen(own: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> list[str]:
    apart = [name for name in own if name in state and own[name].shape != state[name].shape]
    said = [f"{n} is {list(state[n].shape)} in it and {list(own[n].shape)} here" for n in apart[:SHOWN]]
    return said + ([f"and {len(apart) - SHOWN} more"] if len(apart) > SHOWN else [])
