"""Augmentation as tensor code; every draw comes from a named generator, the same for every candidate."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from workers.streams import generator, seeded, stream_seed

if TYPE_CHECKING:
    import torch

    from storage.records import Recipe
    from workers.datasets import Split

PADDING = 4
"""Pixels around a small image that a crop may reach into (He et al. 2015, section 4.2)."""


@dataclass(frozen=True)
class Draws:
    """What is drawn in one epoch of one training: by minibatch or by sample, so that it depends neither on where
    the training was taken up again nor on which process reads a sample."""

    dataset: str
    seed: int
    stream: str

    def of_minibatch(self, number: int) -> torch.Generator:
        """For the crops and flips of a minibatch, 0 the epoch's first."""
        return generator(self.dataset, self.seed, f"augment/{self.stream}/minibatch/{number}")

    def of_sample(self, number: int) -> int:
        """A seed for a sample of the data set."""
        return stream_seed(self.dataset, self.seed, f"augment/{self.stream}/sample/{number}")


def crop_and_flip(images: torch.Tensor, pad: tuple[float, ...], draw: torch.Generator) -> torch.Tensor:
    """A random window of each image with PADDING pixels of `pad` ([C]) around it, mirrored left to right half
    the time: [N, C, H, W] -> [N, C, H, W]."""
    import torch

    n, channels, height, width = images.shape
    top, left = torch.randint(0, 2 * PADDING + 1, (2, n, 1), generator=draw)
    mirrored = torch.randint(0, 2, (n, 1), generator=draw).bool()
    across = torch.arange(width).expand(n, width)
    rows = torch.arange(height) + top
    columns = torch.where(mirrored, across.flip(1), across) + left
    padded = images.new_tensor(pad).view(1, -1, 1, 1).repeat(n, 1, height + 2 * PADDING, width + 2 * PADDING)
    padded[:, :, PADDING:-PADDING, PADDING:-PADDING] = images
    rows, columns = rows.to(images.device), columns.to(images.device)
    sample = torch.arange(n, device=images.device).view(n, 1, 1, 1)
    channel = torch.arange(channels, device=images.device).view(1, channels, 1, 1)
    return padded[sample, channel, rows.view(n, 1, height, 1), columns.view(n, 1, 1, width)]


def mixed(batch: Split, recipe: Recipe, classes: int, draws: Draws, number: int) -> Split:
    """A minibatch under the recipe's mixup or cutmix, timm's, one or the other half the time where both are given;
    its labels become soft, [N, classes], without label smoothing. `batch` is not used again.

    timm mixes pairs: of an odd number the last sample stays as it is. Raises ValueError for images with text.
    """
    if batch.labels.dim() > 1:
        raise ValueError("mixup and cutmix are for images with classes, not for images with text: leave them out")
    from timm.data.mixup import Mixup, mixup_target

    even = len(batch) // 2 * 2
    images, labels = batch.images, mixup_target(batch.labels, classes)
    if even:
        mix = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=0.0, num_classes=classes)
        with seeded(draws.dataset, draws.seed, f"mixup/{draws.stream}/minibatch/{number}"):
            images[:even], labels[:even] = mix(images[:even], batch.labels[:even])
    return replace(batch, images=images, labels=labels)
