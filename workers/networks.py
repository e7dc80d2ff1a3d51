"""Retrained networks, kept and loaded (`retrain.keep: last | best`)."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from models import build_model, input_shape
from storage.userfiles import NotRegular, open_regular

if TYPE_CHECKING:
    import torch
    from torch import nn

_NAME = re.compile(r"[0-9a-f]+-([0-9a-f]{8})\.safetensors")
"""The name that a store gives to a kept network: its task, then the digest of its content."""


def network_content(
    state: Mapping[str, torch.Tensor],
    task_id: str,
    model: str,
    removed: Mapping[str, Sequence[int]],
    classes: int,
    shape: Sequence[int],
) -> bytes:
    """Return the content of a kept network's file: its weights, and what is needed to build it again.

    `removed` are the output channels (of attention blocks, the heads) of each layer, `shape` the inputs' (channels,
    height, width).
    """
    from workers.weights import packed

    about = {
        "task_id": task_id,
        "model": model,
        "classes": classes,
        "shape": list(shape),
        "removed": {layer: list(units) for layer, units in removed.items()},
    }
    return packed(state, about)


def load_network(path: str | os.PathLike[str]) -> nn.Module:
    """Return the pruned, retrained network of a file under `networks/`, on the CPU, in eval mode.

    Rows name it in `kept_network`; for a store that is no folder, copy the file first. Raises
    FileNotFoundError, or ValueError for another kind of file, and for content that does not match the digest in the
    file's name.
    """
    content = _content(Path(path))
    named = _NAME.fullmatch(Path(path).name)
    if named and not hashlib.sha256(content).hexdigest().startswith(named[1]):
        raise ValueError(f"{path} is damaged: its content does not match the digest in its name")
    return network_of(content, str(path))


def _content(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            return file.read()
    except NotRegular as error:
        raise ValueError(str(error)) from error


def network_of(content: bytes, path: str = "this file") -> nn.Module:
    """Return the network of the content of such a file. Raises ValueError for another kind of file."""
    import torch
    from safetensors.torch import load

    from models.inputs import example_input
    from models.weights import load_state
    from pruners.surgery import prune
    from workers.weights import metadata

    about = metadata(content)
    if "removed" not in about:
        raise ValueError(f"{path} is no kept network")
    name, removed = str(about["model"]), about["removed"]
    assert isinstance(removed, dict) and isinstance(about["classes"], int)
    channels, height, width = about.get("shape") or input_shape(name) or (3, 32, 32)
    shape = channels, height, width
    with torch.random.fork_rng():
        dense = build_model(name, about["classes"], shape)
        model = prune(dense, removed, example_input(dense, shape))
    load_state(model, load(content))
    return model.eval()
