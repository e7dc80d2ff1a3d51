"""Data sets by name, as tensors that live on the device, prepared once per process.

What a plan needs to know of one (shape, classes, samples, where its files are) needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workers.streams import generator

if TYPE_CHECKING:
    import torch


class DataMissing(Exception):
    """A data set's files are not under the data root."""


@dataclass(frozen=True)
class Split:
    """Images [N, C, H, W], normalised, float32; labels [N], int64."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def at(self, indices: torch.Tensor) -> Split:
        return Split(self.images[indices], self.labels[indices])

    def to(self, device: torch.device) -> Split:
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Data:
    """A prepared data set; `validation` is what was held out of the train set, possibly empty."""

    train: Split
    validation: Split
    test: Split


@dataclass(frozen=True)
class Dataset:
    """A data set the grid can name. `files` are those it needs under the data root."""

    name: str
    load: Callable[[Path], tuple[Split, Split]]
    train_size: int
    test_size: int
    shape: tuple[int, int, int] = (1, 32, 32)
    classes: int = 10
    files: tuple[str, ...] = ()
    source: str | None = None
    mean_std: tuple[float, float] | None = None

    def missing(self, data_root: str | Path) -> list[str]:
        """The files it needs that are not under `data_root`."""
        return [name for name in self.files if not (Path(data_root) / name).exists()]


def _mnist_like(name: str, source: str, mean: float, std: float) -> Dataset:
    parts = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    needed = tuple(f"{source}/raw/{part}-ubyte" for part in parts)
    load = lambda root: _load_mnist_like(source, mean, std, root)  # noqa: E731
    return Dataset(name, load, 60_000, 10_000, files=needed, source=source, mean_std=(mean, std))


def _load_mnist_like(source: str, mean: float, std: float, root: Path) -> tuple[Split, Split]:
    """28x28 bytes, resized to 32x32 as torchvision's transform on a byte image does, normalised."""
    from torchvision import datasets
    from torchvision.transforms.v2 import functional as tv

    def split(train: bool) -> Split:
        raw = getattr(datasets, source)(root, train=train, download=False)
        resized = tv.resize(raw.data.unsqueeze(1), [32, 32], antialias=True)
        return Split(resized.float().div_(255).sub_(mean).div_(std), raw.targets.clone())

    return split(True), split(False)


def _load_digits(_: Path) -> tuple[Split, Split]:
    """scikit-learn's 1,797 handwritten digits, 8x8 in 17 levels, resized to 32x32; 360 for testing."""
    import torch
    from sklearn.datasets import load_digits
    from torch.nn import functional as F

    bunch: Any = load_digits()
    images = torch.from_numpy(bunch["images"]).float().div(16).unsqueeze(1)
    labels = torch.from_numpy(bunch["target"]).long()
    images = F.interpolate(images, size=(32, 32), mode="bilinear", align_corners=False)
    order = torch.randperm(len(labels), generator=generator("digits", 0, "split"))
    test, train = order[:360], order[360:]
    mean, std = images[train].mean(), images[train].std()
    images = (images - mean) / std
    return Split(images[train], labels[train]), Split(images[test], labels[test])


def _load_synthetic(_: Path) -> tuple[Split, Split]:
    """Ten fixed random patterns under noise: small and learnable, for tests and trials."""
    import torch

    draw = generator("synthetic", 0, "images")
    patterns = torch.randn(10, 1, 8, 8, generator=draw).repeat_interleave(4, 2).repeat_interleave(4, 3)

    def split(n: int) -> Split:
        labels = torch.arange(n) % 10
        noise = torch.randn(n, 1, 32, 32, generator=draw)
        return Split(patterns[labels] + noise, labels)

    return split(512), split(256)


DATASETS: Mapping[str, Dataset] = {
    "digits": Dataset("digits", _load_digits, 1437, 360),
    "mnist": _mnist_like("mnist", "MNIST", 0.1307, 0.3081),
    "fmnist": _mnist_like("fmnist", "FashionMNIST", 0.2860, 0.3530),
    "kmnist": _mnist_like("kmnist", "KMNIST", 0.1918, 0.3483),
    "synthetic": Dataset("synthetic", _load_synthetic, 512, 256),
}


def prepare(name: str, data_root: str | Path, validation: float, device: torch.device) -> Data:
    """Load a data set onto `device`, holding out a `validation` share of its train set.

    Raises DataMissing where its files are not there: a worker never downloads.
    """
    import torch

    dataset = DATASETS[name]
    missing = dataset.missing(data_root)
    if missing:
        raise DataMissing(missing_message(name, data_root))
    train, test = dataset.load(Path(data_root))
    order = torch.randperm(len(train), generator=generator(name, 0, "validation"))
    held = int(len(train) * validation)
    # With nothing held out the train set keeps the order of its files.
    rest = order[held:].sort().values
    return Data(train.at(rest).to(device), train.at(order[:held]).to(device), test.to(device))


def missing_message(name: str, data_root: str | Path) -> str:
    """What to tell a person whose data is not there."""
    where = f"{Path(data_root) / DATASETS[name].missing(data_root)[0]}"
    return (
        f"the data set {name} is not under {data_root} (looked for {where}); "
        f"fetch it with `prunesweep prefetch {name} --data-root {data_root}`, "
        "or pass --data-root (PRUNESWEEP_DATA_ROOT) where it is"
    )
