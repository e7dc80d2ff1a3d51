"""A task in small: what a worker does with a network, tried on random samples before anything is spent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from models import build_model
from models.weights import load_state
from workers.datasets import Split
from workers.measures import cross_entropy, measured
from workers.networks import network_content, network_of
from workers.weights import packed, portable

if TYPE_CHECKING:
    from torch import nn

LR = 1e-3


def check_parameters(model: nn.Module) -> None:
    """Raise ValueError for parameters that would not be, in a copy, what they are here: two that share memory, and
    weights that carry a mask of torch's own."""
    from torch.nn.utils import prune as torch_prune

    for name, module in model.named_modules():
        if any(isinstance(hook, torch_prune.BasePruningMethod) for hook in module._forward_pre_hooks.values()):
            said = "it carries a mask of torch.nn.utils.prune"
            raise ValueError(
                f"{name}: {said}; call torch.nn.utils.prune.remove in the function that builds the network"
            )
    seen: dict[int, tuple[str, torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        other, known = seen.setdefault(parameter.data_ptr(), (name, parameter))
        if known is not parameter and parameter.numel():
            raise ValueError(
                f"{other} and {name} are two Parameters that share memory, which a copy of the network would not; "
                "assign one and the same Parameter to both modules"
            )


def check_saved(model: nn.Module, name: str, classes: int, shape: tuple[int, int, int], probe: torch.Tensor) -> None:
    """Raise ValueError unless the network, built anew with the weights of `model`, computes what `model` does."""
    from safetensors.torch import load

    content = packed(portable(model), {})
    with torch.random.fork_rng(devices=[]):
        again = build_model(name, classes, shape)
    try:
        load_state(again, load(content))
    except Exception as error:  # of another kind for each way not to fit
        said = " ".join(str(error).split())[:300]
        raise ValueError(f"its saved weights cannot be loaded again: {type(error).__name__}: {said}") from error
    _check_equal("built anew from its saved weights", again.eval(), model, probe)


def rehearse(
    pruned: nn.Module,
    name: str,
    classes: int,
    shape: tuple[int, int, int],
    removed: Mapping[str, Sequence[int]],
    probe: torch.Tensor,
) -> None:
    """Train a pruned network by one step, evaluate it, keep it and load it again. Raises ValueError where it cannot."""
    labels = torch.arange(len(probe)) % classes
    try:
        with torch.enable_grad():
            pruned.train()
            cross_entropy(pruned(probe), labels).backward()
        with torch.no_grad():
            for parameter in pruned.parameters():
                if parameter.grad is not None:
                    parameter -= LR * parameter.grad
    except Exception as error:  # of the network's own code
        said = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise ValueError(f"pruned, it cannot be trained: {said}") from error
    pruned.zero_grad()
    pruned.eval()
    measured(lambda images: pruned(images).unsqueeze(0), Split(probe, labels), len(probe))
    content = network_content(portable(pruned), "preflight", name, removed, classes, shape)
    try:
        again = network_of(content)
    except Exception as error:  # of another kind for each way not to fit
        said = " ".join(str(error).split())[:300]
        raise ValueError(f"pruned and kept, it cannot be loaded again: {type(error).__name__}: {said}") from error
    _check_equal("pruned, kept and loaded again", again, pruned, probe)


def _check_equal(when: str, found: nn.Module, expected: nn.Module, probe: torch.Tensor) -> None:
    with torch.no_grad():
        if not torch.equal(found(probe), expected(probe)):
            raise ValueError(f"{when}, it computes something else: some of its state is not in its state dict")
