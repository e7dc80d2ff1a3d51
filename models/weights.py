"""Weights from files: read safely, and put into a network only where all of them fit."""

from __future__ import annotations

import hashlib
import io
import os
import re
import zipfile
from collections import OrderedDict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from storage.errors import StoreError
from storage.printable import printable
from storage.userfiles import NotRegular, open_regular

if TYPE_CHECKING:
    import torch
    from torch import nn

SHOWN = 4
"""How many tensors that do not fit a message names."""

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")

_SERIALIZATION_ID = ".data/serialization_id"
"""The member of a torch.save archive that is a checksum of the others in the order in which torch wrote them."""

_WRAPPERS = ("state_dict", "model_state_dict", "model", "model_ema", "params")


def is_file(weights: str) -> bool:
    """Whether given weights are a file or an address, not a name that a library has for its own."""
    return "/" in weights or Path(weights).suffix in SUFFIXES


def file_hash(path: Path) -> str:
    """Return 16 hex digits of sha256 that identify a local file of weights.

    The digits of a torch.save archive depend on its members, not on the file name that torch writes into it. All
    bytes of any other file count. Raises OSError.
    """
    with open_regular(path) as file:
        whole = None if path.suffix == ".safetensors" else _archive_hash(file)
        if whole is None:
            file.seek(0)
            whole = hashlib.file_digest(file, "sha256").hexdigest()
    return whole[:16]


def _archive_hash(file: io.BufferedReader) -> str | None:
    """Return sha256 over the members of a torch.save archive, by their names without the common folder; None where
    the file is not such an archive or is damaged."""
    if file.read(4) != b"PK\x03\x04":
        return None
    try:
        with zipfile.ZipFile(file) as archive:
            every = archive.infolist()
            members = {member.filename.partition("/")[2]: member for member in every}
            stored = all(member.compress_type == zipfile.ZIP_STORED for member in every)
            if len({member.filename.partition("/")[0] for member in every}) > 1 or len(members) < len(every):
                return None
            # torch stores without compression, so a member larger than the file is damage.
            if not stored or sum(member.file_size for member in every) > os.fstat(file.fileno()).st_size:
                return None
            members.pop(_SERIALIZATION_ID, None)
            whole = hashlib.sha256()
            for name, member in sorted(members.items()):
                with archive.open(member) as part:
                    held = hashlib.file_digest(part, "sha256").hexdigest()  # type: ignore[arg-type]
                whole.update(f"{name}\0{held}\n".encode(errors="surrogatepass"))
            return whole.hexdigest()
    except OSError:
        raise
    except Exception:  # of another kind for each way to be broken
        return None


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
            f"{printable(where)} does not fit the network: {'; '.join(found)}. Give a file of exactly this network, "
            "with as many classes as the data set has"
        )
    load_state(model, state, strict=False)


def load_state(model: nn.Module, state: Mapping[str, torch.Tensor], *, strict: bool = True) -> None:
    """Put the tensors of a state dict of this network into it. Raises what torch raises where they do not fit.

    A state dict also has a version for each module, which files of tensors alone do not keep, and without which some
    modules (torchvision's MNASNet) refuse to load: it is that of the modules which are here.
    """
    versioned = OrderedDict(state)
    versioned._metadata = model.state_dict()._metadata  # pyright: ignore[reportAttributeAccessIssue]
    model.load_state_dict(versioned, strict=strict)


def read(where: str) -> dict[str, torch.Tensor]:
    """Name -> tensor of a .safetensors or .pt/.pth file. Raises ValueError; nothing is unpickled but tensors."""
    suffix = Path(where.partition("?")[0]).suffix
    if suffix == ".safetensors":
        return _parsed(where, _safetensors)
    if suffix in SUFFIXES:
        return _unwrapped(_parsed(where, _torch), where)
    raise ValueError(f"{printable(where)}: weights are a .safetensors file or a .pt/.pth file with a state dict")


def content(where: str) -> bytes:
    """The bytes of a local file, an http(s) address or a pyarrow.fs URI. Raises ValueError."""
    try:
        if where.startswith(("http://", "https://")):
            from urllib.request import urlopen

            with urlopen(where, timeout=60) as answer:
                return answer.read()
        if "://" in where:
            return _remote_content(where)
        with open_regular(Path(where).expanduser()) as file:
            return file.read()
    except (OSError, ValueError, StoreError) as error:
        raise ValueError(f"the weights {printable(where)} cannot be read: {error}") from error


def _remote_content(uri: str) -> bytes:
    """The bytes of a pyarrow.fs URI, within the time limit of storage.remote."""
    from storage.remote import Budget, open_filesystem, within

    system, path = open_filesystem(uri)
    budget = Budget()

    def read() -> bytes:
        if not system.get_file_info(path).is_file:
            raise NotRegular("the address is not that of a regular file")
        with system.open_input_file(path) as file:
            budget.allow(file.size())
            return file.read()

    return within(budget, read)


def _parsed(where: str, parse: Any) -> Any:
    raw = content(where)
    try:
        return parse(raw)
    except MemoryError:
        raise
    except Exception as error:  # of another kind for each way to be broken
        # Without the cause: torch's message advises to load the file unsafely.
        raise ValueError(
            f"{printable(where)} is damaged or holds more than tensors: {_reason(raw, error)}. Allowed: a .safetensors "
            "file, or a .pt/.pth file with a state dict of tensors alone. Copy the file again, or save "
            "`model.state_dict()` alone"
        ) from None


def _reason(raw: bytes, error: Exception) -> str:
    """Return why a file cannot be parsed, without torch's advice on `weights_only`."""
    said = str(error)
    if not raw:
        return "it is empty"
    if found := re.search(r"GLOBAL (\S+)", said):
        return f"it holds the Python object {found[1]}"
    if "TorchScript" in said:
        return "it is a TorchScript archive"
    if "weights_only" in said or "Weights only" in said:
        return "its pickle cannot be read"
    first = re.split(r"\n|\. ", said)[0].removesuffix(".")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


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
        raise ValueError(f"{printable(where)} holds no state dict (names and tensors)")
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
