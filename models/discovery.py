"""The prunable layers of a network that is not built in: found by building and tracing it once, then remembered.

Prunable are convolutions and linear layers whose outputs can go, one by one or in sets, in the order they are run, and
blocks of attention with their heads. Of layers that share their channels (those that are summed), the first stands for
all. Left out are the classifier, and what cannot be removed, each layer with its reason.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.layers import Layers
from pruners.candidates import Sets

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pruners.coupling import Graph

CLASSES = 17
"""Of the network that is traced; a number that no layer has as its width."""

HEADS, PROJECTIONS = ("num_heads", "n_heads", "heads"), ("proj", "out_proj", "merge")
"""The attributes by which a block of attention is known, and the layers in one that write to what is outside."""


def remembered(key: Sequence[str]) -> Any:
    """Return what was found before under `key`; None where there is nothing."""
    try:
        return json.loads(_note(key).read_text())
    except (OSError, ValueError):
        return None


def remember(key: Sequence[str], found: Any) -> None:
    """Keep what was found, plain data, for the next time. Where the folder cannot be written to, nothing is kept."""
    note = _note(key)
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        made = note.with_suffix(f".{os.getpid()}")
        made.write_text(json.dumps(found))
        made.replace(note)
    except OSError:
        return


def _note(key: Sequence[str]) -> Path:
    import pruners

    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prunesweep" / "layers"
    here, there = Path(__file__).parent, Path(str(pruners.__file__)).parent
    files = [here / name for name in ("discovery.py", "layers.py", "attention.py", "library.py")]
    files += sorted(there.glob("*.py"))
    said = "\n".join([*key, version("torch"), *(file.read_text() for file in files)])
    return base / f"{hashlib.sha256(said.encode()).hexdigest()[:32]}.json"


def prunable(model: nn.Module, example: torch.Tensor) -> Layers:
    """Return what can be pruned of a network, traced on `example` [1, C, H, W]; its weights play no part.

    Raises ValueError where it cannot be run.
    """
    from pruners.coupling import traced

    return prunable_of(model, traced(model, example), example)


def prunable_of(model: nn.Module, graph: Graph, example: Any) -> Layers:
    """Return what can be pruned of a network whose graph is known. One layer that cannot hides no other."""
    modules = dict(model.named_modules())
    has_values = _has_values(model, example)
    inside = _inside_attention(model)
    units: dict[str, int] = {}
    sets: dict[str, Sets] = {}
    others: dict[str, int] = {}
    refused: dict[str, str] = {}
    covered: set[int] = set()
    for name in graph.order:
        module: Any = modules[name]
        if (heads := getattr(module, "prunable_heads", None)) is not None:
            one_by_one = tuple((head,) for head in range(heads.count))
            if (problem := _cannot_go(model, name, one_by_one, graph, example, has_values)) is not None:
                refused[name] = f"{name}: {problem}"
            else:
                units[name] = heads.count
            continue
        if not _is_layer(module) or name in inside:
            continue
        if (problem := parametrized(module)) is not None:
            refused[name] = f"{name}: {problem}"
            continue
        try:
            classes = set(graph.classes_of(name))
            if len(classes) == 1:
                raise ValueError(f"{name}: its channels could only be removed all together, which leaves nothing of it")
            found = graph.sets(name)
        except ValueError as error:
            refused[name] = str(error)
            continue
        if (problem := _cannot_go(model, name, found, graph, example, has_values)) is not None:
            refused[name] = f"{name}: {problem}"
            continue
        (others if classes & covered else units)[name] = len(found)
        covered |= classes
        if len(found[0]) > 1 or graph.shares_a_tensor(name):
            sets[name] = found
    return Layers(units, sets, others, refused)


SMALL = 5_000_000
"""Parameters of a network of which removals from every layer are tried with values."""


def _has_values(model: nn.Module, example: Any) -> bool:
    """Return whether smaller networks can be compared by what they compute: only on a device, only of a small network,
    and only where two runs agree. Preflight reports runs that differ."""
    import torch

    if example.device.type == "meta" or sum(p.numel() for p in model.parameters()) > SMALL:
        return False
    with torch.no_grad():
        first, second = model.eval()(example), model(example)
    return isinstance(first, torch.Tensor) and torch.equal(first, second)


def _cannot_go(model: nn.Module, layer: str, sets: Sets, graph: Graph, example: Any, has_values: bool) -> str | None:
    """Why a layer cannot lose units as the labels say that it can; None where it can.

    A forward pass may take channels apart at places that it computes, or at places that it fixes: only a run of a
    smaller network shows which. What that computes is looked at where the network has values and is small.
    """
    place = graph.divided_at(layer) if layer in graph.outputs else None
    if place is None and not has_values:
        return None
    some = random.Random(0).sample(sets, len(sets) // 2)
    for chosen in ((sets[0],), (sets[-1],), some):
        channels = tuple(sorted(channel for unit in chosen for channel in unit))
        if (said := _fault(model, {layer: channels}, graph, example, has_values)) is not None:
            fixed = f"the forward pass ({place}) divides its channels at fixed places: " if place else ""
            return fixed + said
    return None


def _fault(
    model: nn.Module, removed: dict[str, tuple[int, ...]], graph: Graph, example: Any, has_values: bool
) -> str | None:
    """Return what goes wrong without these channels; None where nothing does, or only their number is in the way."""
    import torch

    from pruners.equivalence import LIMIT, equivalence
    from pruners.surgery import prune

    try:
        pruned = prune(model, removed, example, graph=graph)
    except ValueError:  # such as a number that does not divide into the groups of a norm
        return None
    try:
        with torch.no_grad():
            pruned.eval()(example)
    except Exception as error:  # of the network's own code once it is smaller
        said = str(error).partition("\n")[0]
        return f"without some of them it cannot be run: {type(error).__name__}: {said}"
    if not has_values:
        return None
    found = equivalence(model, pruned, removed, torch.randn_like(example), graph.partners(removed))
    if found.error is not None and not found.error <= LIMIT:
        return found.reason or "without some of them it computes something else than with them silenced"
    return None


def parametrized(module: Any) -> str | None:
    """Why a layer whose weight is computed from other tensors cannot be pruned; None where it is not."""
    kinds = getattr(module, "parametrizations", None)
    own = module._parameters
    if kinds is not None and "weight" in kinds:
        said = type(kinds["weight"][0]).__name__.strip("_")
    elif own.get("weight") is None and any(name.startswith("weight_") for name in own):
        said = "weight_norm" if "weight_g" in own else "spectral_norm or another of torch.nn.utils"
    else:
        return None
    return (
        f"it has a parametrized weight ({said}), which cannot lose units; remove the parametrization in the function "
        "that builds the network, or prune another layer"
    )


def weighted(model: nn.Module) -> dict[str, int]:
    """Convolution or linear layer -> how many weights it has."""
    from torch import nn

    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    return {name: module.weight.numel() for name, module in model.named_modules() if isinstance(module, kinds)}


def _inside_attention(model: nn.Module) -> set[str]:
    """The layers whose outputs belong to heads, known or not: they go with these, not one by one."""
    blocks = [(name, m) for name, m in model.named_modules() if any(hasattr(m, heads) for heads in HEADS)]
    layers = [(f"{name}.{own}", own) for name, block in blocks for own, _ in block.named_children()]
    return {layer for layer, own in layers if own not in PROJECTIONS}


def _is_layer(module: Any) -> bool:
    from torch import nn

    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    return isinstance(module, kinds) and getattr(module, "groups", 1) == 1
