"""Images of a folder as samples: in memory where they are small, else decoded as they are needed.

Decoding is done by processes of torch's DataLoader. Every draw is named after its sample, so that how many
processes there are changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils import data as loading

from storage.printable import printable
from workers.datasets import Split, normalised
from workers.folders import picture

if TYPE_CHECKING:
    from workers.augment import Draws
    from workers.datasets import Color, Minibatch
    from workers.folders import Folder, Part

RESIZED, CROP = 256, 224
"""Pixels: of the shorter side for evaluation, and of the middle that a network sees, as of the crops it learns from."""

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's channels, as its networks are trained everywhere."""

LOADERS = "PRUNESWEEP_LOADERS"
"""How many processes decode for one worker, where a person wants another number."""

MOST_LOADERS = 8


def in_memory(folder: Folder) -> tuple[Split, Split]:
    """Train and test of a folder of small images of one size, normalised by the channels of its train part;
    training crops with 4 black pixels around, and flips."""
    train, test = (_decoded(folder.root, part) for part in (folder.train, folder.test))
    mean, std = _mean_and_std(train)
    return tuple(  # type: ignore[return-value]
        normalised(torch.from_numpy(images).permute(0, 3, 1, 2), torch.tensor(part.labels), mean, std)
        for images, part in ((train, folder.train), (test, folder.test))
    )


def _decoded(root: Path, part: Part) -> np.ndarray:
    """Bytes [N, H, W, 3]."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return np.stack(list(pool.map(lambda number: np.asarray(_opened(root, part, number)), range(len(part.paths)))))


def _mean_and_std(images: np.ndarray) -> tuple[Color, Color]:
    """Of each channel of bytes [N, H, W, 3], as shares of 255: from whole numbers, so the same everywhere."""
    means, stds = [], []
    for channel in range(3):
        counts = np.bincount(images[..., channel].ravel(), minlength=256).tolist()
        n, total = sum(counts), sum(level * count for level, count in enumerate(counts))
        square = sum(level * level * count for level, count in enumerate(counts))
        means.append(total / n / 255)
        stds.append(max((square * n - total * total) ** 0.5 / n / 255, 1 / 255))
    return (means[0], means[1], means[2]), (stds[0], stds[1], stds[2])


def _opened(root: Path, part: Part, number: int) -> Any:
    """A decoded picture in three colours. Raises ValueError naming a file whose content has changed since the folder
    was inspected, though its size and its time may not have."""
    path = part.paths[number]
    try:
        return picture(root / path, part.digest(number))
    except MemoryError:
        raise
    except Exception as error:  # its decoders raise many kinds
        raise ValueError(f"{printable(root / path)} could be read before and cannot now: {error}") from error


@dataclass(frozen=True)
class ImageFiles:
    """Samples read from files when they are needed: those of `part` with these `numbers`, [n]. What it gives is on
    `device`. `loaders` processes decode; None is as many as suit this machine."""

    root: Path
    part: Part
    numbers: torch.Tensor
    device: torch.device
    loaders: int | None = None

    def __len__(self) -> int:
        return len(self.numbers)

    def at(self, indices: torch.Tensor) -> ImageFiles:
        return replace(self, numbers=self.numbers[indices.cpu()])

    def to(self, device: torch.device) -> ImageFiles:
        return replace(self, device=device)

    def in_order(self, batch: int) -> Iterator[Split]:
        """`batch` at a time: the shorter side resized to 256, the middle 224 x 224."""
        return self._read(self.numbers.split(batch) if len(self) else (), None)

    def minibatches(self, order: Sequence[Minibatch], draws: Draws | None) -> Iterator[tuple[Split, None]]:
        """Each image a random part of it, resized to 224 x 224, mirrored half the time; as for evaluation without
        `draws`."""
        for batch in self._read([self.numbers[indices] for _, indices in order], draws):
            yield batch, None

    def _read(self, order: Sequence[torch.Tensor], draws: Draws | None) -> Iterator[Split]:
        shape = (1, 3, 1, 1)
        mean, std = (torch.tensor(values, device=self.device).view(shape) for values in (MEAN, STD))
        for images, labels in self._loader(order, draws):
            floats = images.to(self.device, non_blocking=True).float().div_(255).sub_(mean).div_(std)
            yield Split(floats, labels.to(self.device, non_blocking=True))

    def _loader(self, order: Sequence[torch.Tensor], draws: Draws | None) -> loading.DataLoader[Any]:
        processes = default_loaders(self.device) if self.loaders is None else self.loaders
        return loading.DataLoader(
            _Pictures(self.root, self.part, draws),
            batch_sampler=[numbers.tolist() for numbers in order],
            num_workers=processes if len(order) > 1 else 0,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # else it would draw from the global one, which a network's dropout uses
        )


def default_loaders(device: torch.device) -> int:
    """How many processes decode for a worker: as LOADERS says; else none beside a CPU worker, which has one core,
    and up to MOST_LOADERS beside an accelerator."""
    if said := os.environ.get(LOADERS):
        if not said.isdecimal():
            raise ValueError(f"{LOADERS}={said}: a number of processes is 0, 1, 2, ...")
        return int(said)
    return 0 if device.type == "cpu" else min(MOST_LOADERS, len(os.sched_getaffinity(0)))


class _Pictures(loading.Dataset[tuple[torch.Tensor, int]]):
    """What a loader's process reads: bytes [3, 224, 224] and the label of a numbered sample."""

    def __init__(self, root: Path, part: Part, draws: Draws | None) -> None:
        self.root, self.part, self.draws = root, part, draws

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
        from torchvision.transforms.v2 import functional as tv

        picture = _opened(self.root, self.part, number)
        if self.draws is None:
            seen = tv.center_crop(tv.resize(picture, [RESIZED]), [CROP])
        else:
            seen = _random_view(picture, self.draws.of_sample(number))
        return tv.pil_to_tensor(seen), self.part.labels[number]


def _random_view(picture: Any, seed: int) -> Any:
    """torchvision's random crop and flip, which draw from torch's global generator: saved, seeded, restored."""
    from torchvision.transforms import v2

    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        return v2.RandomHorizontalFlip()(v2.RandomResizedCrop(CROP)(picture))
    finally:
        torch.set_rng_state(state)
