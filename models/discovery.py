"""The prunable layers of a network that is not built in: found by building and tracing it once, then remembered.

Prunable are convolutions and linear layers whose outputs can go one by one, in the order they are run, and blocks of
attention with their heads. Of layers that share their channels (those that are summed), the first stands for all.
Left out are the classifier, and what writes to a grouped convolution.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

CLASSES = 17
"""Of the network that is traced; a number that no layer has as its width."""

HEADS, PROJECTIONS = ("num_heads", "n_heads", "heads"), ("proj", "out_proj", "merge")
"""The attributes by which a block of attention is known, and the layers in one that write to what is outside."""


def remembered(key: Sequence[str]) -> dict[str, int] | None:
    """The layers that were found before under `key`; None where there are none."""
    try:
        return json.loads(_note(key).read_text())
    except (OSError, ValueError):
        return None


def remember(key: Sequence[str], units: Mapping[str, int]) -> None:
    """Keep layers for the next time. Where the folder cannot be written to, nothing is kept."""
    note = _note(key)
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        made = note.with_suffix(f".{os.getpid()}")
        made.write_text(json.dumps(dict(units)))
        made.replace(note)
    except OSError:
        return


def _note(key: Sequence[str]) -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prunesweep" / "layers"
    rules = "".join(
        Path(__file__).with_name(file).read_text() for file in ("discovery.py", "attention.py", "library.py")
    )
    said = "\n".join([*key, version("torch-pruning"), rules])
    return base / f"{hashlib.sha256(said.encode()).hexdigest()[:32]}.json"


def prunable(model: nn.Module, example: torch.Tensor) -> dict[str, int]:
    """Prunable layer -> units of a network, traced on `example` [1, C, H, W]; its weights play no part.

    Raises ValueError where it cannot be traced.
    """
    import torch

    names = {module: name for name, module in model.named_modules()}
    found: dict[str, int] = {}
    covered: set[str] = set()
    with torch.enable_grad():
        graph, order = _traced(model, example)
    inside = _inside_attention(model)
    for module in order:
        name = names[module]
        if (heads := getattr(module, "prunable_heads", None)) is not None:
            found[name] = heads.count
        elif name not in covered and name not in inside and _loses_units(module):
            coupled = _outputs_coupled(graph, module, names)
            if coupled is not None:
                covered |= coupled
                found[name] = len(module.weight)
    return found


def weighted(model: nn.Module) -> dict[str, int]:
    """Convolution or linear layer -> how many weights it has."""
    from torch import nn

    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    return {name: module.weight.numel() for name, module in model.named_modules() if isinstance(module, kinds)}


def _traced(model: nn.Module, example: torch.Tensor) -> tuple[Any, list[Any]]:
    """The dependency graph, and the layers and attention blocks in the order they were run."""
    import torch_pruning
    from torch import nn

    order: dict[Any, None] = {}
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    watched = [m for m in model.modules() if isinstance(m, kinds) or hasattr(m, "prunable_heads")]
    hooks = [m.register_forward_pre_hook(lambda m, _: order.setdefault(m)) for m in watched]
    try:
        graph = torch_pruning.DependencyGraph().build_dependency(
            model.eval().requires_grad_(), example, forward_fn=lambda network, x: network(x), verbose=False
        )
    except Exception as error:  # of a network's own code, or of the tracing
        raise ValueError(f"the network cannot be traced: {type(error).__name__}: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
    return graph, list(order)


def _inside_attention(model: nn.Module) -> set[str]:
    """The layers whose outputs belong to heads, known or not: they go with these, not one by one."""
    blocks = [(name, m) for name, m in model.named_modules() if any(hasattr(m, heads) for heads in HEADS)]
    layers = [(f"{name}.{own}", own) for name, block in blocks for own, _ in block.named_children()]
    return {layer for layer, own in layers if own not in PROJECTIONS}


def _loses_units(module: Any) -> bool:
    return getattr(module, "groups", 1) == 1 and len(module.weight) > 1


def _outputs_coupled(graph: Any, module: Any, names: Mapping[Any, str]) -> set[str] | None:
    """The layers that lose outputs together with the first of `module`; None where they cannot."""
    if module not in graph.module2node:
        return None
    prune = graph.get_pruner_of_module(module).prune_out_channels
    coupled: set[str] = set()
    for dependency, _ in graph.get_pruning_group(module, prune, [0]):
        target = dependency.target.module
        if type(target).__name__ == "_OutputOp" or _is_grouped(target) or type(target).__name__ == "MultiheadAttention":
            return None
        if target in names and graph.is_out_channel_pruning_fn(dependency.handler):
            if not dependency.target.outputs:  # what it gives is what the network gives
                return None
            coupled.add(names[target])
    return coupled


def _is_grouped(module: Any) -> bool:
    groups = getattr(module, "groups", 1)
    return isinstance(groups, int) and 1 < groups != getattr(module, "out_channels", groups)
