"""Retrained networks, kept and loaded (`retrain.keep: last | best`)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from models import build_model, input_shape

if TYPE_CHECKING:
    import torch
    from torch import nn

    from storage.records import Task


def network_file(
    state: Mapping[str, torch.Tensor],
    task: Task,
    removed: Mapping[str, Sequence[int]],
    classes: int,
    shape: Sequence[int],
) -> bytes:
    """The content of a kept network's file: its weights, and what is needed to build it again; `shape` is the
    inputs' (channels, height, width).
    """
    from workers.weights import packed

    about = {
        "task_id": task.task_id,
        "model": task.cell.dense.model,
        "classes": classes,
        "shape": list(shape),
        "removed": {layer: list(units) for layer, units in removed.items()},
    }
    return packed(state, about)


def load_network(path: str | os.PathLike[str]) -> nn.Module:
    """The pruned, retrained network of a file under `networks/`, on the CPU, in eval mode.

    Rows name it in `kept_network`; for a store that is no folder, copy the file first. Raises
    FileNotFoundError, or ValueError for another kind of file.
    """
    import torch
    from safetensors.torch import load

    from models.inputs import example_input
    from pruners.surgery import prune
    from workers.weights import metadata

    content = Path(path).read_bytes()
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
    model.load_state_dict(load(content))
    return model.eval()
