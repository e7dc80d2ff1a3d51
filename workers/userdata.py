"""A person's own data set, `package.module:load`: called with the data root, it gives train and test."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import usercode
from workers.datasets import Dataset, Split
from workers.streams import seeded


@cache
def find_user_dataset(name: str, root: Path) -> Dataset:
    """The data set that a person's function loads from under `root`, loaded once per process.

    Raises ValueError naming the function where it fails, or gives no two pairs of images and labels.
    """
    train, test = _loaded(name, root)
    shapes = {tuple(split.images.shape[1:]) for split in (train, test)}
    if len(shapes) > 1:
        raise ValueError(f"{name}: train and test have images of other shapes, {' and '.join(map(str, shapes))}")
    classes = int(max(train.labels.max(), test.labels.max())) + 1
    return Dataset(name, lambda _: (train, test), len(train), len(test), shapes.pop(), classes)


def _loaded(name: str, root: Path) -> tuple[Split, Split]:
    load = usercode.load(name)
    try:
        with seeded(name, 0, "load"):
            made = load(root)
    except Exception as error:  # of the user's own code
        raise ValueError(f"{name} failed when called with {root}: {type(error).__name__}: {error}") from error
    if not isinstance(made, tuple | list) or len(made) != 2:
        raise ValueError(f"{name} gave {_what(made)}; it must return (train, test), each a pair (images, labels)")
    train, test = (_split(name, part, one) for part, one in zip(("train", "test"), made, strict=True))
    return train, test


def _split(name: str, part: str, made: Any) -> Split:
    """One of the two, checked."""
    if not isinstance(made, Split):
        if not isinstance(made, tuple | list) or len(made) != 2:
            raise ValueError(f"{name} gave {_what(made)} as {part}; it must be a pair (images, labels)")
        made = Split(*made)
    if problem := _problem(made.images, made.labels):
        raise ValueError(f"{name}, {part}: {problem}")
    return Split(made.images.float().contiguous(), made.labels.long().contiguous(), made.pad)


def _problem(images: Any, labels: Any) -> str | None:
    """What is wrong with the images and labels of a split."""
    import torch

    if not isinstance(images, torch.Tensor) or not isinstance(labels, torch.Tensor):
        return f"images and labels must be tensors, not {_what(images)} and {_what(labels)}"
    if images.dim() != 4 or not images.is_floating_point():
        return f"images must be normalised floats [N, C, H, W], not {images.dtype} {list(images.shape)}"
    if labels.dim() != 1 or labels.is_floating_point() or labels.is_complex():
        return f"labels must be whole numbers [N], not {labels.dtype} {list(labels.shape)}"
    if not 0 < len(images) == len(labels):
        return f"it has {len(images)} images and {len(labels)} labels"
    if labels.min() < 0:
        return f"labels must be 0, 1, 2, ..., not {int(labels.min())}"
    return None


def _what(made: Any) -> str:
    return f"{len(made)} things" if isinstance(made, tuple | list) else f"a {type(made).__name__}"
