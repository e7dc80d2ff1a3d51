"""Random networks: blocks of a few operations each, chained, summed and concatenated at random."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

CLASSES = 5
WIDTHS = (4, 6, 8, 12, 16)
SHAPES = ((1, 8, 8), (3, 12, 12), (2, 6, 6))


# -- operations without weights ----------------------------------------------------------------------


class Apply(nn.Module):
    """A function of one tensor as a module."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


def _glu(x: torch.Tensor) -> torch.Tensor:
    return F.glu(x, 1)


def _chunked_glu(x: torch.Tensor) -> torch.Tensor:
    value, gate = x.chunk(2, 1)
    return value * torch.sigmoid(gate)


def _larger_half(x: torch.Tensor) -> torch.Tensor:
    return torch.maximum(*x.chunk(2, 1))


def _split_halves(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[1] // 2
    return x[:, :half] - 0.5 * x[:, half:]


def _even_and_odd(x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x[:, ::2]) + x[:, 1::2]


def _maxout(x: torch.Tensor) -> torch.Tensor:
    return x.view(x.shape[0], 2, -1, *x.shape[2:]).amax(1)


def _maxout_of_neighbours(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(x.shape[0], -1, 2, *x.shape[2:]).max(2).values


def _softmax(x: torch.Tensor) -> torch.Tensor:
    return F.softmax(x, 1)


def _shuffled(x: torch.Tensor) -> torch.Tensor:
    return x.view(x.shape[0], 2, x.shape[1] // 2, *x.shape[2:]).transpose(1, 2).reshape(x.shape)


def _channel_shuffle(x: torch.Tensor) -> torch.Tensor:
    return F.channel_shuffle(x, 2)


def _pixel_shuffled(x: torch.Tensor) -> torch.Tensor:
    return F.pixel_shuffle(x, 2)


def _first_three(x: torch.Tensor) -> torch.Tensor:
    return x[:, :3]


def _without_the_first(x: torch.Tensor) -> torch.Tensor:
    return x[:, 1:]


def _fixed_halves(x: torch.Tensor) -> torch.Tensor:
    return x[:, :4] * torch.sigmoid(x[:, 4:8])


def _reversed(x: torch.Tensor) -> torch.Tensor:
    return x + x.flip(1)


def _padded(x: torch.Tensor) -> torch.Tensor:
    return F.pad(x, (1, 0, 0, 1))


def _interpolated(x: torch.Tensor) -> torch.Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear")


def _nearest(x: torch.Tensor) -> torch.Tensor:
    return F.interpolate(x, size=(6, 6))


def _adaptive(x: torch.Tensor) -> torch.Tensor:
    return F.adaptive_avg_pool2d(x, 2)


def _normalised(x: torch.Tensor) -> torch.Tensor:
    return F.normalize(x, dim=1)


def _centred(x: torch.Tensor) -> torch.Tensor:
    return x - x.mean(1, keepdim=True)


def _tokens(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(2).transpose(1, 2)


def _mean_token(x: torch.Tensor) -> torch.Tensor:
    return x.mean(1)


def _first_token(x: torch.Tensor) -> torch.Tensor:
    return x[:, 0]


def _global_mean(x: torch.Tensor) -> torch.Tensor:
    return x.mean((2, 3))


def _global_maximum(x: torch.Tensor) -> torch.Tensor:
    return x.amax((-2, -1))


def _flattened(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1)


# -- norms -------------------------------------------------------------------------------------------


class Frozen(nn.Module):
    """A batch norm that holds its scale, shift and statistics in buffers."""

    weight: torch.Tensor
    bias: torch.Tensor
    running_mean: torch.Tensor
    running_var: torch.Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(width) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (1, -1, 1, 1)
        scale = (self.weight * (self.running_var + 1e-5).rsqrt()).reshape(shape)
        return x * scale + self.bias.reshape(shape) - self.running_mean.reshape(shape) * scale


class Last(nn.Module):
    """A module that takes channels last, for tensors that have them second."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.movedim(1, -1)).movedim(-1, 1)


class Scale(nn.Module):
    """A learned factor for each channel, as ConvNeXt has it."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(shape) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gamma


# -- blocks ------------------------------------------------------------------------------------------


class Branches(nn.Module):
    """Modules side by side, their outputs summed, multiplied or concatenated."""

    def __init__(self, how: str, *branches: nn.Module) -> None:
        super().__init__()
        self.how = how
        self.branches = nn.ModuleList(branches)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [branch(x) for branch in self.branches]
        if self.how == "concatenated":
            return torch.cat(parts, 1)
        first, *rest = parts
        for part in rest:
            first = first + part if self.how == "summed" else first * torch.sigmoid(part)
        return first


class Excited(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, width: int, squeezed: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, squeezed, 1), nn.Conv2d(squeezed, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))


class ExcitedByLinear(nn.Module):
    """Squeeze and excitation by fully connected layers."""

    def __init__(self, width: int, squeezed: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, squeezed), nn.Linear(squeezed, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, c = x.shape[:2]
        gates = torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1).view(n, c)))))
        return x * gates.view(n, c, 1, 1).expand_as(x)


class SpatialGate(nn.Module):
    """A map of one channel that weighs every position of all channels."""

    def __init__(self, width: int, expands: bool) -> None:
        super().__init__()
        self.gate = nn.Conv2d(width, 1, 1)
        self.expands = expands

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = torch.sigmoid(self.gate(x))
        return x * (gate.expand_as(x) if self.expands else gate)


class Cbam(nn.Module):
    """The spatial attention of CBAM: from the mean and the maximum over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True).values], 1)
        return x * torch.sigmoid(self.gate(seen))


class Twice(nn.Module):
    """A module that is called two times in a row."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(F.relu(self.inner(x)))


class SameWeight(nn.Module):
    """Two layers that hold one Parameter as their weight, side by side or in a row."""

    def __init__(self, first: Any, second: Any, in_a_row: bool) -> None:
        super().__init__()
        self.first, self.second, self.in_a_row = first, second, in_a_row
        second.weight = first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.in_a_row:
            return self.second(F.relu(self.first(x)))
        return torch.cat([self.first(x), F.relu(self.second(x))], 1)


class Autoencoded(nn.Module):
    """A layer, and its weight used the other way round after it."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.gelu(self.down(x)), self.down.weight.t())


class Borrowed(nn.Module):
    """A convolution, and its weight used once more by the block itself."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, out, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.conv(x)) + F.conv2d(x, self.conv.weight, padding=2, dilation=2)


class AsImage(nn.Module):
    """A fully connected layer whose outputs are viewed as maps."""

    def __init__(self, width: int, channels: int, side: int) -> None:
        super().__init__()
        self.wide, self.side = nn.Linear(width, channels * side * side), side
        self.norm, self.conv = nn.BatchNorm2d(channels), nn.Conv2d(channels, 2 * channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(self.norm(self.wide(x).view(x.shape[0], -1, self.side, self.side)))


class Recurrent(nn.Module):
    """A GRU or LSTM over tokens."""

    def __init__(self, kind: type[nn.GRU] | type[nn.LSTM], width: int, hidden: int) -> None:
        super().__init__()
        self.rnn = kind(width, hidden, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rnn(x)[0]


class Positions(nn.Module):
    """Position embeddings, and a class token ahead where one is wanted."""

    def __init__(self, tokens: int, width: int, has_class: bool) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, width)) if has_class else None
        self.positions = nn.Parameter(torch.randn(1, tokens + has_class, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.token is not None:
            x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        return x + self.positions


class Attention(nn.Module):
    """Self-attention of several heads or one. Its scale is stored, or is computed from how many channels are left."""

    def __init__(self, width: int, heads: int, fixed: bool, scale: str) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.merge, self.parts = nn.Linear(width, width), heads
        self.each = width // heads if fixed else -1
        self.how, self.scale = scale, (width // heads) ** -0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (self._divided(layer(x)) for layer in (self.q, self.k, self.v))
        if self.how == "fused":
            made = F.scaled_dot_product_attention(q, k, v)
        else:
            scale = self.scale if self.how == "stored" else q.shape[-1] ** -0.5
            made = (q @ k.transpose(-2, -1) * scale).softmax(-1) @ v
        return x + self.merge(made if self.parts == 1 else made.transpose(1, 2).flatten(2))

    def _divided(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.parts == 1 else x.reshape(*x.shape[:2], self.parts, self.each).transpose(1, 2)


class Mlp(nn.Module):
    """A residual block of two fully connected layers behind a norm."""

    def __init__(self, norm: nn.Module, width: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = norm, nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Over(nn.Module):
    """A module that takes positions last, for tokens."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.transpose(1, 2)).transpose(1, 2)


class Network(nn.Module):
    """Steps one after the other; the output of some is summed or concatenated with that of an earlier one."""

    def __init__(self, steps: Sequence[nn.Module], links: Sequence[tuple[str, int]], head: nn.Module) -> None:
        super().__init__()
        self.steps, self.links, self.head = nn.ModuleList(steps), tuple(links), head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = [x]
        for step, (how, at) in zip(self.steps, self.links, strict=True):
            x = step(x)
            if how == "sum":
                x = x + seen[at]
            elif how == "cat":
                x = torch.cat([x, seen[at]], 1)
            seen.append(x)
        return self.head(x)


# -- drawing -----------------------------------------------------------------------------------------

Draw = random.Random
Made = nn.Module | None
"""A step; None where it does not fit the shape."""

Shape = tuple[int, ...]


def _conv(draw: Draw, shape: Shape) -> Made:
    kernel = draw.choice((1, 3, 3))
    stride = draw.choice((1, 1, 2)) if shape[-1] > 3 else 1
    width = draw.choice(WIDTHS)
    return nn.Conv2d(shape[1], width, kernel, stride, padding=kernel // 2, bias=draw.random() < 0.6)


def _branch(draw: Draw, width: int, out: int) -> nn.Module:
    """A convolution that keeps the size of maps, with a norm behind some."""
    kernel = draw.choice((1, 3))
    conv = nn.Conv2d(width, out, kernel, padding=kernel // 2, bias=draw.random() < 0.5)
    return conv if draw.random() < 0.5 else nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU())


def _summed(draw: Draw, shape: Shape) -> Made:
    out = draw.choice(WIDTHS)
    return Branches("summed", _branch(draw, shape[1], out), _branch(draw, shape[1], out))


def _residual(draw: Draw, shape: Shape) -> Made:
    inner = draw.choice(WIDTHS)
    return Branches("summed", nn.Identity(), nn.Sequential(_branch(draw, shape[1], inner), _conv_to(inner, shape[1])))


def _conv_to(width: int, out: int) -> nn.Module:
    return nn.Conv2d(width, out, 3, padding=1)


def _concatenated(draw: Draw, shape: Shape) -> Made:
    parts = [_branch(draw, shape[1], draw.choice(WIDTHS)) for _ in range(draw.choice((2, 3)))]
    return Branches("concatenated", *parts)


def _densely(draw: Draw, shape: Shape) -> Made:
    return Branches("concatenated", nn.Identity(), _branch(draw, shape[1], draw.choice(WIDTHS)))


def _multiplied(draw: Draw, shape: Shape) -> Made:
    out = draw.choice(WIDTHS)
    return Branches("multiplied", _branch(draw, shape[1], out), _branch(draw, shape[1], out))


def _depthwise(draw: Draw, shape: Shape) -> Made:
    each = draw.choice((1, 1, 2))
    return nn.Conv2d(shape[1], each * shape[1], 3, padding=1, groups=shape[1], bias=draw.random() < 0.5)


def _transposed(draw: Draw, shape: Shape) -> Made:
    return nn.ConvTranspose2d(shape[1], draw.choice(WIDTHS), 2, 2) if shape[-1] < 7 else None


def _grouped(draw: Draw, shape: Shape) -> Made:
    return nn.Conv2d(shape[1], 8, 1, groups=2) if shape[1] % 2 == 0 and shape[1] > 2 else None


def _halving(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Draw, Shape], Made]:
    return lambda _, shape: Apply(function) if shape[1] % 2 == 0 and shape[1] > 3 else None


def _always(function: Callable[[torch.Tensor], torch.Tensor], least: int = 1) -> Callable[[Draw, Shape], Made]:
    return lambda _, shape: Apply(function) if shape[1] >= least else None


def _pooling(draw: Draw, shape: Shape) -> Made:
    return draw.choice((nn.MaxPool2d, nn.AvgPool2d))(2) if shape[-1] > 3 else None


def _activation(draw: Draw, shape: Shape) -> Made:
    return draw.choice((nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.PReLU, nn.Hardswish, nn.LeakyReLU, nn.Softplus))()


def _prelu(draw: Draw, shape: Shape) -> Made:
    return nn.PReLU(shape[1])


def _image_norm(draw: Draw, shape: Shape) -> Made:
    width = shape[1]
    kinds: list[Callable[[], nn.Module]] = [
        lambda: Frozen(width),
        lambda: nn.LayerNorm(list(shape[1:])),
        lambda: nn.LayerNorm(list(shape[1:]), elementwise_affine=False),
        lambda: Last(nn.LayerNorm(width)),
        lambda: Last(nn.LayerNorm(width, elementwise_affine=False)),
        lambda: Last(nn.RMSNorm(width)),
        lambda: nn.GroupNorm(1, width),
        lambda: nn.GroupNorm(1, width, affine=False),
        lambda: Scale(width, 1, 1),
        lambda: Last(Scale(width)),
    ]
    if width % 2 == 0:
        kinds.append(lambda: nn.GroupNorm(2, width))
    if shape[-1] > 1:
        kinds.append(lambda: nn.InstanceNorm2d(width, affine=True, track_running_stats=True))
        kinds.append(lambda: nn.InstanceNorm2d(width))
    return draw.choice(kinds)()


def _batch_norm(draw: Draw, shape: Shape) -> Made:
    norm = nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d
    return norm(shape[1], affine=draw.random() < 0.8)


def _excited(draw: Draw, shape: Shape) -> Made:
    return draw.choice((Excited, ExcitedByLinear))(shape[1], draw.choice((2, 4, 6)))


def _twice(draw: Draw, shape: Shape) -> Made:
    return Twice(nn.Conv2d(shape[1], shape[1], 1) if len(shape) == 4 else nn.Linear(shape[-1], shape[-1]))


def _same_weight(draw: Draw, shape: Shape) -> Made:
    in_a_row = draw.random() < 0.5
    width = shape[1] if len(shape) == 4 else shape[-1]
    out = width if in_a_row else draw.choice(WIDTHS)
    kind = nn.Linear if len(shape) == 2 else lambda a, b: nn.Conv2d(a, b, 1)
    return SameWeight(kind(width, out), kind(width, out), in_a_row)


def _tokens_of(draw: Draw, shape: Shape) -> Made:
    if shape[-1] > 6:
        return None
    steps: list[nn.Module] = [Apply(_tokens)]
    if draw.random() < 0.6:
        steps.append(Positions(shape[2] * shape[3], shape[1], draw.random() < 0.5))
    return nn.Sequential(*steps)


def _to_vector(draw: Draw, shape: Shape) -> Made:
    return Apply(draw.choice((_global_mean, _global_maximum, _flattened)))


def _linear(draw: Draw, shape: Shape) -> Made:
    return nn.Linear(shape[-1], draw.choice(WIDTHS), bias=draw.random() < 0.7)


def _vector_branch(draw: Draw, width: int, out: int) -> nn.Module:
    linear = nn.Linear(width, out)
    return linear if draw.random() < 0.5 else nn.Sequential(linear, nn.ReLU())


def _vector_branches(how: str) -> Callable[[Draw, Shape], Made]:
    def make(draw: Draw, shape: Shape) -> Made:
        out = draw.choice(WIDTHS)
        widths = [out, out if how != "concatenated" else draw.choice(WIDTHS)]
        return Branches(how, *(_vector_branch(draw, shape[1], width) for width in widths))

    return make


def _vector_residual(draw: Draw, shape: Shape) -> Made:
    inner = draw.choice(WIDTHS)
    block = nn.Sequential(_vector_branch(draw, shape[1], inner), nn.Linear(inner, shape[1]))
    return Branches("summed", nn.Identity(), block)


def _last_norm(draw: Draw, shape: Shape) -> Made:
    width = shape[-1]
    kinds: list[Callable[[], nn.Module]] = [
        lambda: nn.LayerNorm(width),
        lambda: nn.LayerNorm(width, elementwise_affine=False),
        lambda: nn.RMSNorm(width),
        lambda: nn.RMSNorm(width, elementwise_affine=False),
        lambda: Scale(width),
    ]
    return draw.choice(kinds)()


def _autoencoded(draw: Draw, shape: Shape) -> Made:
    return Autoencoded(shape[-1], draw.choice(WIDTHS))


def _as_image(draw: Draw, shape: Shape) -> Made:
    return AsImage(shape[1], draw.choice((4, 6)), draw.choice((2, 3)))


def _attention(draw: Draw, shape: Shape) -> Made:
    heads = draw.choice((1, 1, 2))
    how = draw.choice(("stored", "computed", "fused"))
    fits = heads == 1 or (shape[-1] % heads == 0 and shape[-1] > heads)
    return Attention(shape[-1], heads, draw.random() < 0.3, how) if fits else None


def _mlp(draw: Draw, shape: Shape) -> Made:
    norm = draw.choice((nn.LayerNorm, nn.RMSNorm))(shape[-1])
    return Mlp(norm, shape[-1], draw.choice(WIDTHS))


def _recurrent(draw: Draw, shape: Shape) -> Made:
    return Recurrent(draw.choice((nn.GRU, nn.LSTM)), shape[-1], draw.choice((4, 6)))


def _over_tokens(draw: Draw, shape: Shape) -> Made:
    return Over(nn.Conv1d(shape[-1], draw.choice(WIDTHS), 3, padding=1))


def _end_of_tokens(draw: Draw, shape: Shape) -> Made:
    return Apply(draw.choice((_mean_token, _first_token)))


Steps = Mapping[str, tuple[int, Callable[[Draw, Shape], Made]]]
"""Name -> how often it is drawn relative to the others, and what makes it for a shape [N, ...]."""

_HALVINGS: Steps = {
    "glu": (2, _halving(_glu)),
    "chunked glu": (2, _halving(_chunked_glu)),
    "larger half": (2, _halving(_larger_half)),
    "split halves": (1, _halving(_split_halves)),
    "even and odd": (2, _halving(_even_and_odd)),
    "maxout": (2, _halving(_maxout)),
    "maxout of neighbours": (2, _halving(_maxout_of_neighbours)),
    "with its reverse": (1, _always(_reversed)),
}

SIMPLE: Mapping[int, Steps] = {
    4: {
        "conv": (10, _conv),
        "batch norm": (3, _batch_norm),
        "activation": (4, _activation),
        "prelu": (1, _prelu),
        "sum": (3, _summed),
        "residual": (3, _residual),
        "concatenation": (3, _concatenated),
        "dense": (3, _densely),
        "product": (1, _multiplied),
        "depthwise": (3, _depthwise),
        "pooling": (2, _pooling),
        "upsampling": (1, lambda _, shape: Apply(_interpolated) if shape[-1] < 7 else None),
        "twice": (1, _twice),
        "same weight": (1, _same_weight),
        "vector": (2, _to_vector),
        **_HALVINGS,
    },
    2: {
        "linear": (8, _linear),
        "batch norm": (2, _batch_norm),
        "activation": (3, _activation),
        "sum": (2, _vector_branches("summed")),
        "residual": (2, _vector_residual),
        "concatenation": (2, _vector_branches("concatenated")),
        "twice": (1, _twice),
        "same weight": (1, _same_weight),
        "image": (2, _as_image),
        **_HALVINGS,
    },
}
"""Rank of a tensor -> operations in which every channel meets others element by element, or by a weight layer."""

EVERY: Mapping[int, Steps] = {
    4: {
        **SIMPLE[4],
        "transposed": (2, _transposed),
        "grouped": (1, _grouped),
        "norm": (8, _image_norm),
        "excited": (3, _excited),
        "spatial gate": (2, lambda draw, shape: SpatialGate(shape[1], draw.random() < 0.5)),
        "cbam": (2, lambda _, shape: Cbam()),
        "softmax": (1, _always(_softmax)),
        "normalised": (1, _always(_normalised)),
        "centred": (1, _always(_centred)),
        "shuffle": (1, _halving(_shuffled)),
        "channel shuffle": (1, _halving(_channel_shuffle)),
        "pixel shuffle": (1, lambda _, shape: Apply(_pixel_shuffled) if shape[1] % 4 == 0 else None),
        "first three": (1, _always(_first_three, 4)),
        "without the first": (1, _always(_without_the_first, 4)),
        "fixed halves": (1, _always(_fixed_halves, 8)),
        "padded": (1, _always(_padded)),
        "resized": (1, _always(_nearest)),
        "adaptive": (1, _always(_adaptive)),
        "borrowed": (1, lambda draw, shape: Borrowed(shape[1], draw.choice(WIDTHS))),
        "tokens": (4, _tokens_of),
    },
    3: {
        "linear": (4, _linear),
        "norm": (3, _last_norm),
        "activation": (2, _activation),
        "mlp": (3, _mlp),
        "attention": (4, _attention),
        "recurrent": (1, _recurrent),
        "over tokens": (2, _over_tokens),
        "autoencoded": (1, _autoencoded),
        "vector": (2, _end_of_tokens),
    },
    2: {
        **SIMPLE[2],
        "norm": (3, _last_norm),
        "softmax": (1, _always(_softmax)),
        "normalised": (1, _always(_normalised)),
        "autoencoded": (2, _autoencoded),
        "first three": (1, _always(_first_three, 4)),
        "fixed halves": (1, _always(_fixed_halves, 8)),
    },
}
"""Rank of a tensor -> all operations."""

TAKES_FIXED = frozenset({"first three", "without the first", "fixed halves", "shuffle", "channel shuffle"})
"""Operations that divide channels at places, or into groups, that the code fixes: only some units, or none, can go."""

LARGEST = 64
"""Channels of a tensor: concatenations and depthwise convolutions make no more."""


@dataclass(frozen=True)
class Drawn:
    """A random network, a probe batch, and the names of its steps."""

    seed: int
    model: Network
    probe: torch.Tensor
    steps: tuple[str, ...]

    @property
    def takes_fixed(self) -> bool:
        """Whether a forward pass divides channels at fixed places, which only a run without some of them shows."""
        return not TAKES_FIXED.isdisjoint(step.partition(" (")[0] for step in self.steps)

    def __str__(self) -> str:
        return f"seed {self.seed}, input {list(self.probe.shape[1:])}: " + " > ".join(self.steps)


def draw_network(seed: int, steps: Mapping[int, Steps], samples: int) -> Drawn:
    """Return the network of a seed, in eval mode, with norms whose statistics differ by channel."""
    draw = random.Random(seed)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        shape = draw.choice(SHAPES)
        probe = torch.randn(samples, *shape)
        made, links, names = _chained(draw, probe[:2], steps)
        x = probe[:2]
        head = _head(Network(made, links, nn.Identity()).eval()(x), draw)
        model = Network(made, links, head).eval()
        _differ(model)
    return Drawn(seed, model, probe, tuple(names))


def _chained(
    draw: Draw, x: torch.Tensor, steps: Mapping[int, Steps]
) -> tuple[list[nn.Module], list[tuple[str, int]], list[str]]:
    made: list[nn.Module] = []
    links: list[tuple[str, int]] = []
    names: list[str] = []
    seen = [x]
    wanted = draw.randint(3, 8)
    while len(made) < wanted:
        of_rank = steps[x.ndim]
        name = draw.choices(list(of_rank), [often for often, _ in of_rank.values()])[0]
        if not made:
            name = "conv"
        step = of_rank[name][1](draw, tuple(x.shape))
        if step is None:
            continue
        y = step.eval()(x)
        if y.shape[-1 if y.ndim == 3 else 1] > LARGEST and y.ndim != 2:
            continue
        link = _link(draw, y, seen)
        y = y + seen[link[1]] if link[0] == "sum" else torch.cat([y, seen[link[1]]], 1) if link[0] == "cat" else y
        made.append(step)
        links.append(link)
        names.append(name + (f" ({link[0]} with {link[1]})" if link[0] else ""))
        seen.append(y)
        x = y
    return made, links, names


def _link(draw: Draw, y: torch.Tensor, seen: Sequence[torch.Tensor]) -> tuple[str, int]:
    """An earlier tensor that the output of a step is summed or concatenated with; mostly none."""
    same = [at for at, other in enumerate(seen) if other.shape == y.shape]
    beside = [at for at, other in enumerate(seen) if other.ndim == y.ndim and other.shape[2:] == y.shape[2:]]
    if same and draw.random() < 0.25:
        return "sum", draw.choice(same)
    if y.ndim == 4 and beside and draw.random() < 0.08:
        return "cat", draw.choice(beside)
    return "", 0


def _head(x: torch.Tensor, draw: Draw) -> nn.Module:
    if x.ndim == 4:
        pooled = draw.choice((_global_mean, _global_maximum, _flattened))
        width = x.flatten(1).shape[1] if pooled is _flattened else x.shape[1]
        return nn.Sequential(Apply(pooled), nn.Linear(width, CLASSES))
    if x.ndim == 3:
        return nn.Sequential(Apply(draw.choice((_mean_token, _first_token))), nn.Linear(x.shape[-1], CLASSES))
    return nn.Linear(x.shape[1], CLASSES)


def _differ(model: nn.Module) -> None:
    """Make norms scale, shift and centre each channel in its own way."""
    for module in model.modules():
        weights, statistics = module._parameters, module._buffers
        if "running_var" in statistics or type(module).__name__.endswith("Norm") or isinstance(module, nn.PReLU):
            for tensor in (weights.get("weight"), weights.get("bias"), statistics.get("running_mean")):
                if tensor is not None:
                    tensor.uniform_(-0.5, 0.5)
            if (weight := weights.get("weight")) is not None:
                weight.add_(1)
            if (variance := statistics.get("running_var")) is not None:
                variance.uniform_(0.5, 1.5)
