"""Small networks whose channels hang together in unusual ways, for samples [N, 1, 32, 32].

Each is called as `build(classes, shape)`. tests/test_coupling.py says what can be removed of each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torchvision.ops.misc import FrozenBatchNorm2d


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, **more: object) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, **more)  # type: ignore[arg-type]


class Net(nn.Module):
    """A first convolution `a`, something in between, a second convolution `b` and a classifier."""

    widths = (16, 8)
    """Channels that `a` writes, and that `b` reads."""

    def __init__(self, classes: int = 10, shape: tuple[int, ...] = (1, 32, 32)) -> None:
        super().__init__()
        self.a, self.b = conv(shape[0], self.widths[0], stride=2), conv(self.widths[1], 12, stride=2)
        self.head = nn.Linear(12, classes)
        self.make()

    def make(self) -> None:
        """Make what else it has."""

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.b(self.between(self.a(x)))).mean((2, 3)))


class Chunk(Net):
    def between(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = x.chunk(2, 1)
        return value * torch.sigmoid(gate)


class Glu(Net):
    def between(self, x: torch.Tensor) -> torch.Tensor:
        return F.glu(x, 1)


class Maximum(Net):
    def between(self, x: torch.Tensor) -> torch.Tensor:
        half = x.shape[1] // 2
        return torch.maximum(x[:, :half], x[:, half:])


class EvenOdd(Net):
    def between(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, ::2] * torch.sigmoid(x[:, 1::2])


class Maxout(Net):
    widths = (24, 8)

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(1, (-1, 3)).amax(2)


class Mirrored(Net):
    widths = (8, 8)

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return x + x.flip(1)


class FixedSlices(Net):
    def between(self, x: torch.Tensor) -> torch.Tensor:
        return torch.maximum(x[:, :8], x[:, 8:])


class FixedPart(Net):
    """The first channels alone go through a layer of their own; the sizes agree without some of them, too."""

    widths = (16, 16)

    def make(self) -> None:
        self.part = conv(4, 4)

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.part(x[:, :4]), x[:, 4:]], 1)


class ChannelShuffle(Net):
    widths = (16, 16)

    def between(self, x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class PixelShuffle(Net):
    widths = (16, 4)

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return F.pixel_shuffle(x, 2)


class OneChannelMap(Net):
    widths = (16, 16)

    def make(self) -> None:
        self.gate = conv(16, 1)

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.gate(x)).expand_as(x) * x


class Cbam(Net):
    """Attention over channels, then over positions: a map made of the mean and the maximum over channels."""

    widths = (16, 16)

    def make(self) -> None:
        self.squeeze, self.excite, self.gate = nn.Linear(16, 4), nn.Linear(4, 16), conv(2, 1, 7)

    def between(self, x: torch.Tensor) -> torch.Tensor:
        each = [self.excite(F.relu(self.squeeze(y))) for y in (x.mean((2, 3)), x.amax((2, 3)))]
        x = x * torch.sigmoid(each[0] + each[1])[:, :, None, None]
        return x * torch.sigmoid(self.gate(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)))


class Norms(Net):
    """Norms with running statistics of several types."""

    widths = (16, 16)

    def make(self) -> None:
        kinds = (nn.BatchNorm2d(16), nn.SyncBatchNorm(16), FrozenBatchNorm2d(16), nn.BatchNorm2d(16, affine=False))
        self.norms = nn.Sequential(*kinds, nn.InstanceNorm2d(16, affine=True, track_running_stats=True))

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.norms(x))


class Statistics(Net):
    """Norms and a softmax that take their statistics over channels."""

    widths = (16, 16)

    def make(self) -> None:
        self.norms = nn.Sequential(nn.GroupNorm(1, 16), nn.LayerNorm([16, 16, 16]))
        self.last = nn.RMSNorm(16, elementwise_affine=False)

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norms(x).softmax(1).movedim(1, -1)).movedim(-1, 1)


class Depthwise(Net):
    widths = (8, 16)

    def make(self) -> None:
        self.each = conv(8, 16, groups=8)

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.each(F.relu(x)))


class Grouped(Net):
    widths = (16, 16)

    def make(self) -> None:
        self.groups = conv(16, 16, groups=4)

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return self.groups(x)


class InputAdded(Net):
    """The units of `a` are added to what has as many channels as the input, spread over all of them."""

    widths = (3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.repeat(1, 3, 1, 1)
        return self.head(F.relu(self.b(self.a(x[:, :1]) + x[:, :, ::2, ::2])).mean((2, 3)))


class OneUnitElsewhere(Net):
    widths = (16, 16)

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(x[:, 3:4])


class Tied(Net):
    """Two layers hold one and the same Parameter."""

    widths = (8, 8)

    def make(self) -> None:
        self.one, self.two = conv(8, 8, bias=False), conv(8, 8, bias=False)
        self.two.weight = self.one.weight

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.two(F.relu(self.one(F.relu(x)))))


class UsedTwice(Net):
    """The weight of a layer is used by a function, too."""

    widths = (8, 8)

    def make(self) -> None:
        self.one = conv(8, 8, bias=False)

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(F.conv2d(F.relu(self.one(F.relu(x))), self.one.weight, None, 1, 1))


class TiedToTheOutput(nn.Module):
    """The classifier has the weight of the layer before it."""

    def __init__(self, classes: int = 10, shape: tuple[int, ...] = (1, 32, 32)) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(shape[0], classes), nn.Linear(classes, classes), nn.Linear(classes, classes)
        self.head.weight = self.b.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.b(F.relu(self.a(x)).mean((2, 3)))))


class LinearImage(nn.Module):
    """A fully connected layer is viewed as an image of eight channels."""

    def __init__(self, classes: int = 10, shape: tuple[int, ...] = (1, 32, 32)) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(64 * shape[0], 128), conv(8, 12), nn.Linear(12, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.a(F.adaptive_avg_pool2d(x, 8).flatten(1)))
        return self.head(F.relu(self.b(x.unflatten(1, (-1, 4, 4)))).mean((2, 3)))


class Recurrent(nn.Module):
    """Columns of a feature map go through a recurrent layer."""

    kind: Any = nn.GRU

    def __init__(self, classes: int = 10, shape: tuple[int, ...] = (1, 32, 32)) -> None:
        super().__init__()
        self.a, self.b = conv(shape[0], 8, stride=2), conv(8, 12, stride=2)
        self.rnn = self.kind(12, 16, batch_first=True)
        self.fc, self.head = nn.Linear(16, 14), nn.Linear(14, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.b(F.relu(self.a(x)))).mean(2).transpose(1, 2)
        return self.head(F.relu(self.fc(self.rnn(x)[0][:, -1])))


class Lstm(Recurrent):
    kind = nn.LSTM


class Parametrized(Net):
    widths = (8, 8)

    def make(self) -> None:
        self.one, self.two = weight_norm(conv(8, 8)), spectral_norm(conv(8, 8))

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.two(F.relu(self.one(F.relu(x)))))


class Mixer(nn.Module):
    """Layers over tokens, layers over channels, and a position embedding."""

    def __init__(self, classes: int = 10, shape: tuple[int, ...] = (1, 32, 32)) -> None:
        super().__init__()
        self.a = nn.Conv2d(shape[0], 24, 8, 8)
        self.position = nn.Parameter(torch.randn(1, 16, 24))
        self.tokens, self.back = nn.Linear(16, 20), nn.Linear(20, 16)
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x).flatten(2).transpose(1, 2) + self.position
        x = x + self.back(F.gelu(self.tokens(x.transpose(1, 2)))).transpose(1, 2)
        return self.head(self.norm(x).mean(1))


class SelfAttention(nn.Module):
    """Attention of one head: queries and keys are multiplied unit by unit."""

    def __init__(self, classes: int = 10, shape: tuple[int, ...] = (1, 32, 32)) -> None:
        super().__init__()
        self.a, self.q, self.k, self.v = nn.Conv2d(shape[0], 24, 8, 8), *(nn.Linear(24, n) for n in (16, 16, 20))
        self.out, self.head = nn.Linear(20, 24), nn.Linear(24, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x).flatten(2).transpose(1, 2)
        weights = (self.q(x) @ self.k(x).transpose(1, 2) / 4).softmax(-1)
        return self.head((x + self.out(weights @ self.v(x))).mean(1))
