"""Attention blocks: which parts of one belong to which head, and one that can hold any number of heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Heads:
    """How the heads of an attention block lie in its layers: what surgery reads in `module.prunable_heads`.

    A head has `width` channels. `writes` are (layer or vector of the block, parts): of each part (queries, keys,
    values), one after the other, rows `head * width` to `(head + 1) * width` belong to a head. `reads` are the layers
    that read these channels of all heads; `tables` are (parameter, dimension) with one entry per head. `sizes` are
    attributes of the block and what a head adds to each.
    """

    count: int
    width: int
    writes: tuple[tuple[str, int], ...]
    reads: tuple[str, ...]
    tables: tuple[tuple[str, int], ...] = ()
    sizes: tuple[tuple[str, int], ...] = ()


class SeparateAttention(nn.Module):
    """Self-attention as torch.nn.MultiheadAttention's, with a layer each for queries, keys and values.

    It can lose heads: their number times their width need not be the width of the input. [N, T, width] -> the same.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.p = heads, width // heads, dropout
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.proj = nn.Linear(width, width)

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, need_weights: bool = False
    ) -> tuple[torch.Tensor, None]:
        """As MultiheadAttention's, without masks; never gives weights."""
        assert not need_weights, "the weights of attention are not kept"
        q, k, v = (self._split(layer(x)) for layer, x in ((self.q, query), (self.k, key), (self.v, value)))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.p if self.training else 0.0)
        return self.proj(y.transpose(1, 2).flatten(2)), None

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(x.shape[0], x.shape[1], self.num_heads, self.head_dim).transpose(1, 2)


def separated(model: nn.Module) -> nn.Module:
    """`model` with each MultiheadAttention replaced by its equal, weights included."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.MultiheadAttention):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, _separate(module))
    return model


def _separate(module: nn.MultiheadAttention) -> SeparateAttention:
    assert module.batch_first and module.in_proj_bias is not None, "another attention than torchvision's ViTs have"
    made = SeparateAttention(module.embed_dim, module.num_heads, module.dropout)
    made.load_state_dict(_split_projections({"": made}, dict(module.state_dict())))
    return made.to(module.in_proj_weight)


def separated_state(model: nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a MultiheadAttention under the names of the SeparateAttention that stands for it in `model`."""
    blocks = {f"{n}." if n else "": m for n, m in model.named_modules() if isinstance(m, SeparateAttention)}
    return _split_projections(blocks, dict(state))


def _split_projections(blocks: Mapping[str, nn.Module], state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    for start in blocks:
        for kind in ("weight", "bias"):
            if (joined := state.pop(f"{start}in_proj_{kind}", None)) is not None:
                parts = zip("qkv", joined.chunk(3), strict=True)
                state |= {f"{start}{part}.{kind}": tensor.clone() for part, tensor in parts}
            if (out := state.pop(f"{start}out_proj.{kind}", None)) is not None:
                state[f"{start}proj.{kind}"] = out
    return state


def mark_heads(model: nn.Module) -> nn.Module:
    """`model`, with `prunable_heads` on each block whose heads can be told apart and removed."""
    for module in model.modules():
        if not isinstance(module, nn.MultiheadAttention) and (found := heads_of(module)) is not None:
            module.prunable_heads = found  # pyright: ignore[reportArgumentType]
    return model


def heads_of(module: Any) -> Heads | None:
    """The heads of an attention block: `num_heads`, the projection `proj`, and `qkv` or `q`, `k` and `v`.

    None for any other module, and where a part of it belongs to heads in a way that is not known here.
    """
    count, proj = getattr(module, "num_heads", None), getattr(module, "proj", None)
    names = ("qkv",) if isinstance(getattr(module, "qkv", None), nn.Linear) else ("q", "k", "v")
    parts = 3 if names == ("qkv",) else 1
    if not (isinstance(count, int) and count > 1 and isinstance(proj, nn.Linear)):
        return None
    width = proj.in_features // count
    if any(_outputs(getattr(module, name, None)) != parts * count * width for name in names):
        return None
    writes, reads = [(name, parts) for name in names], ["proj"]
    tables: list[tuple[str, int]] = []
    for name, part in _others(module, {*names, "proj"}):
        shape = _shape(part)
        if name == "gate" or (shape == (count * width,) and isinstance(part, torch.Tensor)):
            writes.append((name, 1))
        elif shape == (count * width,):
            reads.append(name)
        elif name == "relative_position_bias_table" and shape[-1:] == (count,):
            tables.append((name, len(shape) - 1))
        elif shape != (width,):
            return None
    return Heads(count, width, tuple(writes), tuple(reads), tuple(tables), _sizes(module, count, width))


def _outputs(layer: Any) -> int | None:
    return layer.out_features if isinstance(layer, nn.Linear) else None


def _shape(part: Any) -> tuple[int, ...]:
    """Of a tensor, or of what a norm is over; of any other layer none."""
    return tuple(part.shape if isinstance(part, torch.Tensor) else getattr(part, "normalized_shape", ()))


def _others(module: nn.Module, known: set[str]) -> list[tuple[str, Any]]:
    """What else of a block has weights: its own parameters and vectors, and layers."""
    own = [(name, p) for name, p in module.named_parameters(recurse=False) if p is not None]
    buffers = [(name, b) for name, b in module.named_buffers(recurse=False) if b.is_floating_point()]
    layers = [(n, m) for n, m in module.named_children() if n not in known and next(m.parameters(), None) is not None]
    return own + buffers + layers


def _sizes(module: nn.Module, count: int, width: int) -> tuple[tuple[str, int], ...]:
    """The attributes that a forward pass reads of a block with so many heads."""
    per_head = {"num_heads": 1, "attn_dim": width, "all_head_dim": width, "inner_dim": width}
    return tuple((name, n) for name, n in per_head.items() if getattr(module, name, None) == n * count)
