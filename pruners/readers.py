"""The operations that read channels: products with weights, norms and sums; and what they read of spoilt channels.

A spoilt channel is not a number. Products sum over one dimension of each factor, norms and sums over some dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pruners.dispatch import name_of


class NoReference(Exception):
    """Why no masked network can be built."""


@dataclass(frozen=True)
class Part:
    """The slices of a dimension of one input of an operation that belong to the removed units."""

    dim: int
    indices: tuple[int, ...]


Parts = dict[int, Part]
"""Factor of a product (0 or 1), or 0 of what a norm or a sum is over -> what of it belongs to the removed units."""


def kind_of(func: Any) -> str | None:
    """`weights` of what multiplies with weights, `statistic` of what sums or normalises; None of any other."""
    name = name_of(func)
    if name in CONTRACTIONS:
        return "weights"
    return "statistic" if name in _STATISTICS else None


CONTRACTIONS: Mapping[str, tuple[tuple[int, int], ...]] = {
    "convolution": ((0, 1),),
    "mm": ((0, -1), (1, -2)),
    "bmm": ((0, -1), (1, -2)),
    "addmm": ((1, -1), (2, -2)),
    "baddbmm": ((1, -1), (2, -2)),
}
"""Operation -> (argument, the dimension that it sums over)."""

SUMS = (
    "mean",
    "sum",
    "amax",
    "amin",
    "max",
    "min",
    "prod",
    "var",
    "std",
    "var_mean",
    "std_mean",
    "nansum",
    "linalg_vector_norm",
    "logsumexp",
)
_STATISTICS = ("native_layer_norm", "native_group_norm", "_softmax", "_log_softmax", *SUMS)


def weight_at(func: Any) -> int:
    """Which argument of a product is the second factor."""
    return CONTRACTIONS[name_of(func)][-1][0] if name_of(func) != "convolution" else 1


def outputs_of(output: Any) -> list[torch.Tensor]:
    return [t for t in (output if isinstance(output, tuple | list) else [output]) if isinstance(t, torch.Tensor)]


def _along(changed: torch.Tensor, dim: int) -> list[int]:
    """The slices of a dimension in which something differs."""
    others = [d for d in range(changed.ndim) if d != dim % changed.ndim]
    found = changed.amax(others) if others else changed
    return found.nonzero().flatten().tolist()


def is_constant(changed: torch.Tensor, dim: int) -> bool:
    return bool((changed == changed.narrow(dim, 0, 1)).all())


def read_parts(func: Any, args: Any) -> Parts:
    """What a product sums over of the disturbed units; rows that are disturbed as a whole go through it."""
    name = name_of(func)
    if name == "convolution" and args[8] > 1:  # each channel for itself: it goes on as one
        return {}
    parts: Parts = {}
    for factor, (argument, dim) in enumerate(CONTRACTIONS[name]):
        differs = args[argument].isnan()
        if not differs.any():
            continue
        is_whole = is_constant(differs, dim % differs.ndim)
        if is_whole and (name != "convolution" or not _all_samples(differs)):
            continue
        parts[factor] = Part(dim, tuple(_along(differs, dim)))
    return parts


def _all_samples(differs: torch.Tensor) -> bool:
    return bool(differs.flatten(1).any(1).all())


def norm_parts(func: Any, args: Any, changed: torch.Tensor) -> Parts:
    """What a norm or a sum takes its statistics over of the disturbed units."""
    name = name_of(func)
    dims = _statistic_dims(func, name, args, changed.ndim)
    along = [dim for dim in dims if changed.any() and not is_constant(changed, dim)]
    if not along:
        return {}
    wide = [dim for dim in along if _whole_slices(changed, dim)]
    if not wide and name in SUMS:  # such as the larger of two channels: it goes with either of them
        return {}
    dim = (wide or along)[0]
    return {0: Part(dim, tuple(_along(changed, dim)))}


def _whole_slices(changed: torch.Tensor, dim: int) -> bool:
    """Whether what differs are slices of this dimension, and the same ones everywhere."""
    return all(is_constant(changed, other) for other in range(changed.ndim) if other != dim)


def _statistic_dims(func: Any, name: str, args: Any, ndim: int) -> list[int]:
    if name == "native_layer_norm":
        return list(range(ndim - len(args[1]), ndim))
    if name == "native_group_norm":
        return list(range(1, ndim))
    names = [argument.name for argument in func._schema.arguments]
    if "dim" not in names:
        return list(range(ndim))
    at = names.index("dim")
    given = args[at] if at < len(args) else None
    if given is None or (isinstance(given, tuple | list) and not given):
        return list(range(ndim))
    return [dim % ndim for dim in (given if isinstance(given, tuple | list) else [given])]
