"""Masks: single weights removed from a copy of a network whose shapes stay (granularity `weight`).

The mask is torch's own (torch.nn.utils.prune): the weight is multiplied by it in every forward pass, so that
neither momentum nor weight decay brings one back.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from pruners.candidates import Space, n_removed, priorities, sampled
from pruners.pruners import find_pruner, marked

Masks = Mapping[str, torch.Tensor]
"""Layer name -> which of its weights are removed: bool, of the weight's shape."""

FEW = 2.0**64
"""Where a cell has fewer masks than this they are drawn without replacement; among more, each is drawn for
itself: two alike are rarer than a damaged disk."""


class MaskBroken(Exception):
    """A weight that was removed is there after retraining."""


def choose_masks(
    pruner: str,
    weights: Mapping[str, torch.Tensor],
    ratios: Mapping[str, float],
    *,
    scope: str = "local",
    share: float = 1.0,
    gone: Masks | None = None,
    candidate: int = 0,
    sampling_seed: int | None = None,
    pruner_seed: int | None = None,
) -> dict[str, torch.Tensor]:
    """The weights to remove from each layer, given its weights: exactly floor(n * ratio * share + 1e-9) of n.

    l1 takes those of the lowest absolute value, the weights that are `gone` already before all others; random
    goes by its own seed; a candidate of oracle by its number and the sampling seed.
    """
    kind = find_pruner(pruner)
    sizes = {name: weights[name].numel() for name in ratios}
    if kind.enumerates:
        if sampling_seed is None:
            raise ValueError("masks are sampled, not enumerated: use candidates: {mode: sample, count: N}")
        found = _candidate(sizes, ratios, sampling_seed, candidate)
    else:
        if kind.draws:
            ranked = [_drawn(f"random/{pruner_seed or 0}/{name}", n) for name, n in sizes.items()]
        else:
            ranked = [weights[name].detach().double().cpu().abs().flatten() for name in ratios]
        for name, importance in zip(ratios, ranked, strict=True):
            if not importance.isfinite().all():
                raise ValueError(f"{name}: a weight is not finite: there is nothing to choose by")
            if gone:
                importance[gone[name].flatten()] = -1.0
        found = marked(ranked, list(ratios.values()), scope, share)
    return {name: removed.reshape(weights[name].shape) for name, removed in zip(ratios, found, strict=True)}


def _candidate(sizes: Mapping[str, int], ratios: Mapping[str, float], seed: int, candidate: int) -> list[torch.Tensor]:
    counts = {name: n_removed(n, ratios[name]) for name, n in sizes.items()}
    if sum(_log_combinations(n, counts[name]) for name, n in sizes.items()) < math.log(FEW):
        space = Space(tuple((n, counts[name]) for name, n in sizes.items()))
        removal = space.unrank(_sampled(space, seed, candidate // 256)[candidate])
    else:
        drawn = {name: priorities(f"masks/{seed}/{name}/{candidate}", n) for name, n in sizes.items()}
        removal = [np.argsort(of, kind="stable")[: counts[name]] for name, of in drawn.items()]
    return [_marking(n, units) for n, units in zip(sizes.values(), removal, strict=True)]


def _log_combinations(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


@lru_cache(maxsize=16)
def _sampled(space: Space, seed: int, block: int) -> list[int]:
    return sampled(space, seed, min(space.size, 256 * (block + 1)))


def _drawn(key: str, n: int) -> torch.Tensor:
    return torch.from_numpy(priorities(key, n))


def _marking(n: int, units: object) -> torch.Tensor:
    removed = torch.zeros(n, dtype=torch.bool)
    removed[torch.as_tensor(np.asarray(units, dtype=np.int64))] = True
    return removed


def masked(dense: nn.Module, masks: Masks) -> nn.Module:
    """A copy of `dense` whose weights in `masks` are zero and stay so while it is trained."""
    network = copy.deepcopy(dense)
    # Without gradients the masked weight is a leaf, and the network can be copied.
    with torch.no_grad():
        for layer, removed in masks.items():
            torch_prune.custom_from_mask(network.get_submodule(layer), "weight", ~removed)
    return network


def zeroed(dense: nn.Module, masks: Masks) -> nn.Module:
    """A copy of `dense` with the weights in `masks` set to zero: what the masked network computes."""
    network = copy.deepcopy(dense)
    with torch.no_grad():
        for layer, removed in masks.items():
            network.get_submodule(layer).get_parameter("weight")[removed] = 0
    return network


def permanent(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state of a network, its masks applied: that of the same network without masks."""
    made = {}
    for name, tensor in state.items():
        if name.endswith("_orig") and (mask := name.removesuffix("_orig") + "_mask") in state:
            made[name.removesuffix("_orig")] = tensor * state[mask]
        elif not (name.endswith("_mask") and name.removesuffix("_mask") + "_orig" in state):
            made[name] = tensor
    return made


def held_ratio(network: nn.Module, masks: Masks) -> float:
    """The share of the layers' weights that are removed, as the network's last forward pass had them.

    What is no number was removed too: training has diverged. Raises MaskBroken where a removed weight is not zero.
    """
    zero = 0
    for layer, removed in masks.items():
        weight = network.get_submodule(layer).weight
        assert isinstance(weight, torch.Tensor)
        found = weight.detach().cpu()[removed]
        back = int(((found != 0) & ~found.isnan()).sum())
        if back:
            raise MaskBroken(f"{layer}: {back} of {int(removed.sum())} removed weights are not zero after retraining")
        zero += len(found)
    return zero / sum(removed.numel() for removed in masks.values())


def n_weights(masks: Masks) -> int:
    """How many weights are removed."""
    return sum(int(removed.sum()) for removed in masks.values())


def packed_masks(masks: Masks) -> dict[str, bytes]:
    """Layer -> the places of its removed weights, a bit each."""
    return {layer: np.packbits(removed.cpu().numpy().reshape(-1)).tobytes() for layer, removed in masks.items()}


def unpacked_masks(packed: Mapping[str, bytes], shapes: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
    """The inverse of `packed_masks`, for weights of these shapes."""
    bits = {n: np.unpackbits(np.frombuffer(p, np.uint8), count=shapes[n].numel()) for n, p in packed.items()}
    return {layer: torch.from_numpy(found.astype(bool)).reshape(shapes[layer]) for layer, found in bits.items()}


def mask_sha256(masks: Masks) -> str:
    """SHA-256 over each layer's name, its size and the places of its removed weights."""
    hashed = hashlib.sha256()
    for layer, bits in packed_masks(masks).items():
        hashed.update(f"{layer}/{masks[layer].numel()}/".encode() + bits)
    return hashed.hexdigest()
