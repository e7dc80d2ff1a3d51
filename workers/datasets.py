"""Data sets by name, as tensors that live on the device, prepared once per process, or as files read as they
are needed.

What a plan needs to know of one (shape, classes, samples, where its files are) needs no torch.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from storage.identity import FOLDERS
from storage.phases import Report, silent
from workers.augment import crop_and_flip
from workers.streams import generator

if TYPE_CHECKING:
    import torch

    from workers.augment import Draws


Minibatch = tuple[int, "torch.Tensor"]
"""A minibatch's number in its epoch, from 0, and the indices of its samples."""


class DataMissing(ValueError):
    """A data set's files are not under the data root."""


class Changed(ValueError):
    """What a task was planned with by its content has another content here."""


class Samples(Protocol):
    """Samples of a data set, wherever they are: in memory (Split), or read as they are needed."""

    def __len__(self) -> int: ...

    def at(self, indices: torch.Tensor) -> Samples:
        """Those at `indices` [n], in that order."""
        ...

    def to(self, device: torch.device) -> Samples:
        """The same, giving tensors on `device`."""
        ...

    def in_order(self, batch: int) -> Iterator[Split]:
        """All of them, `batch` at a time, as they are for evaluation."""
        ...

    def minibatches(
        self, order: Sequence[Minibatch], draws: Draws | None
    ) -> Iterator[tuple[Split, torch.Tensor | None]]:
        """For each minibatch in `order` what a back-end's step takes: (samples, indices of those
        meant), or the minibatch itself and None. Augmented by `draws`, where there are any."""
        ...


@dataclass(frozen=True)
class Split:
    """Samples in memory. `images` are [N, C, H, W], normalised, float32, or a mapping of tensors [N, ...] for a
    network that takes several; `labels` are [N], int64, or soft [N, classes], or of text [N, T], -100 where none.
    With `pad`, [C], training crops and flips: that is what lies around an image. With `choices`, [N, C], samples of
    text are multiple-choice items: their first label is one of these tokens; -1 is none."""

    images: Any
    labels: torch.Tensor
    pad: tuple[float, ...] | None = None
    choices: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def at(self, indices: torch.Tensor) -> Split:
        chosen = indices.to(self.labels.device)
        return self._each(lambda tensor: tensor[chosen])

    def to(self, device: torch.device) -> Split:
        return self._each(lambda tensor: tensor.to(device))

    def in_order(self, batch: int) -> Iterator[Split]:
        for start in range(0, len(self), batch):
            yield self._each(lambda tensor, start=start: tensor[start : start + batch])

    def minibatches(
        self, order: Sequence[Minibatch], draws: Draws | None
    ) -> Iterator[tuple[Split, torch.Tensor | None]]:
        """In place where there is nothing to augment: a back-end reads what it needs."""
        for number, indices in order:
            if self.pad is None or draws is None:
                yield self, indices.to(self.labels.device)
            else:
                batch = self.at(indices)
                yield replace(batch, images=crop_and_flip(batch.images, self.pad, draws.of_minibatch(number))), None

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Split:
        if isinstance(self.images, Mapping):
            changed = {name: change(tensor) for name, tensor in self.images.items()}
        else:
            changed = change(self.images)
        choices = None if self.choices is None else change(self.choices)
        return replace(self, images=changed, labels=change(self.labels), choices=choices)


@dataclass(frozen=True)
class Data:
    """A prepared data set; `validation` is what was held out of the train set, possibly empty. `damaged` are the
    files that were left out."""

    train: Samples
    validation: Samples
    test: Samples
    classes: int
    damaged: tuple[str, ...] = ()

    @property
    def skipped(self) -> int:
        """How many samples were left out."""
        return len(self.damaged)


Shape = tuple[int, int, int]
Color = tuple[float, float, float]


@dataclass(frozen=True)
class Dataset:
    """A data set the grid can name. `files` are those it needs under the data root; `source` is torchvision's
    name for what can fetch them, `folder` where they then lie. `damaged` files are left out."""

    name: str
    load: Callable[[Path], tuple[Samples, Samples]]
    train_size: int
    test_size: int
    shape: Shape = (1, 32, 32)
    classes: int = 10
    files: tuple[str, ...] = ()
    source: str | None = None
    folder: str | None = None
    damaged: tuple[str, ...] = ()

    def missing(self, data_root: str | Path) -> list[str]:
        """Those of `files` that are not under `data_root` as regular files: torchvision would open a FIFO."""
        return [name for name in self.files if not (Path(data_root) / name).is_file()]


def _mnist_like(name: str, source: str, mean: float, std: float) -> Dataset:
    parts = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    needed = tuple(f"{source}/raw/{part}-ubyte" for part in parts)
    load = lambda root: _load_mnist_like(source, mean, std, root)  # noqa: E731
    return Dataset(name, load, 60_000, 10_000, files=needed, source=source, folder=f"{source}/raw")


def _load_mnist_like(source: str, mean: float, std: float, root: Path) -> tuple[Split, Split]:
    """28x28 bytes, resized to 32x32 as torchvision's transform on a byte image does, normalised."""
    from torchvision import datasets
    from torchvision.transforms.v2 import functional as tv

    def split(train: bool) -> Split:
        raw = getattr(datasets, source)(root, train=train, download=False)
        resized = tv.resize(raw.data.unsqueeze(1), [32, 32], antialias=True)
        return Split(resized.float().div_(255).sub_(mean).div_(std), raw.targets.clone())

    return split(True), split(False)


def _cifar(name: str, classes: int, folder: str, parts: Sequence[str], mean: Color, std: Color) -> Dataset:
    source = name.upper()
    load = lambda root: _load_cifar(source, folder, mean, std, root)  # noqa: E731
    needed = tuple(f"{folder}/{part}" for part in parts)
    return Dataset(name, load, 50_000, 10_000, (3, 32, 32), classes, needed, source, folder)


def _load_cifar(source: str, folder: str, mean: Color, std: Color, root: Path) -> tuple[Split, Split]:
    """32x32 bytes, normalised per channel; training crops with 4 black pixels around, and flips.

    Raises ValueError where torchvision finds the files damaged.
    """
    import torch
    from torchvision import datasets

    def split(train: bool) -> Split:
        try:
            raw = getattr(datasets, source)(root, train=train, download=False)
        except RuntimeError as error:
            raise ValueError(
                f"the files in {root / folder} are damaged; remove them and run "
                f"`prunesweep prefetch {source.lower()} --data-root {root}`"
            ) from error
        return normalised(torch.from_numpy(raw.data).permute(0, 3, 1, 2), torch.tensor(raw.targets), mean, std)

    return split(True), split(False)


def normalised(images: torch.Tensor, labels: torch.Tensor, mean: Color, std: Color) -> Split:
    """Bytes [N, C, H, W] as samples in memory that training crops and flips, with black around them."""
    import torch

    shape = (1, len(mean), 1, 1)
    floats = images.contiguous().float().div_(255)
    floats.sub_(torch.tensor(mean).view(shape)).div_(torch.tensor(std).view(shape))
    return Split(floats, labels.long(), tuple(-m / s for m, s in zip(mean, std, strict=True)))


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
    "cifar10": _cifar(
        "cifar10",
        10,
        "cifar-10-batches-py",
        ("batches.meta", *(f"data_batch_{i}" for i in range(1, 6)), "test_batch"),
        (0.4914, 0.4822, 0.4465),
        (0.2470, 0.2435, 0.2616),
    ),
    "cifar100": _cifar(
        "cifar100",
        100,
        "cifar-100-python",
        ("meta", "train", "test"),
        (0.5071, 0.4865, 0.4409),
        (0.2673, 0.2564, 0.2762),
    ),
}
"""Those built in. Others are found by what their names say: `find_dataset`."""

OTHERS = ("imagenet", "imagefolder:PATH", "llava:PATH", "package.module:load")


def check_dataset(name: str) -> None:
    """Raise ValueError for a name that no data set can have. Looks at no file."""
    if name in DATASETS or name == "imagenet":
        return
    kind, colon, rest = name.partition(":")
    if colon and kind in FOLDERS:
        if not rest:
            raise ValueError(f"{name!r} names no folder; write {kind}:PATH, relative to the data root or absolute")
        return
    from usercode import is_code

    if not is_code(name):
        close = difflib.get_close_matches(name, [*DATASETS, "imagenet"], 1)
        meant = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"unknown name {name!r}; allowed: {', '.join([*DATASETS, *OTHERS])}{meant}")


def find_dataset(name: str, data_root: str | Path | None = None, report: Report = silent) -> Dataset:
    """The data set called `name`; folders and a user's code are looked at, under `data_root` (without one,
    PRUNESWEEP_DATA_ROOT, then `data`). `report` gets the number of images read, on the first look at a folder.

    Raises ValueError where there is none or it cannot be used; DataMissing where its folder is not there.
    """
    check_dataset(name)
    if name in DATASETS:
        return DATASETS[name]
    root = root_or_default(data_root)
    kind, _, path = name.partition(":")
    if kind == "llava":
        from workers.multimodal import find_llava

        return find_llava(str(root / Path(path).expanduser()))
    if kind in ("imagefolder", "imagenet"):
        from workers.folders import find_folder

        return find_folder(name, root / Path(path or name).expanduser(), report)
    from workers.userdata import find_user_dataset

    return find_user_dataset(name, root)


def dataset_content(name: str, data_root: str | Path | None = None, report: Report = silent) -> str | None:
    """The hash (16 hex digits) of what a folder holds, or of a user's code; None for a data set built in. `report` gets
    the number of images read, on the first look at a folder."""
    if name in DATASETS:
        return None
    root = root_or_default(data_root)
    kind, _, path = name.partition(":")
    if kind == "llava":
        from workers.multimodal import llava_content

        return llava_content(str(root / Path(path).expanduser()))
    if kind in ("imagefolder", "imagenet"):
        from workers.folders import folder_content

        return folder_content(name, root / Path(path or name).expanduser(), report)
    from usercode import fingerprint

    return fingerprint(name)


def root_or_default(data_root: str | Path | None) -> Path:
    """`data_root`, or the environment's, as an absolute path."""
    return Path(data_root or os.environ.get("PRUNESWEEP_DATA_ROOT") or "data").expanduser().absolute()


def prepare(
    name: str,
    data_root: str | Path,
    validation: float,
    device: torch.device,
    content: str | None = None,
    report: Report = silent,
) -> Data:
    """Load a data set onto `device`, holding out a `validation` share of its train set.

    Raises DataMissing where its files are not there: a worker never downloads; Changed where it has not the
    `content` it was planned with. `report` gets the phases.
    """
    import torch

    report(f"loading {name}")
    if content is not None:
        check_content(f"the data set {name}", content, dataset_content(name, data_root, report))
    dataset = find_dataset(name, data_root, report)
    if dataset.missing(data_root):
        raise DataMissing(missing_message(name, data_root))
    train, test = dataset.load(Path(data_root))
    order = torch.randperm(len(train), generator=generator(name, 0, "validation"))
    held = int(len(train) * validation)
    # With nothing held out the train set keeps the order of its files, and its memory.
    rest = train.at(order[held:].sort().values) if held else train
    return Data(rest.to(device), train.at(order[:held]).to(device), test.to(device), dataset.classes, dataset.damaged)


def check_content(what: str, planned: str, found: str | None) -> None:
    """Raise Changed where the content that is found here is not the one that an id stands for."""
    if found != planned:
        raise Changed(
            f"{what} is another one here than where the sweep was planned (content {found}, planned {planned}): run "
            "the spec again for tasks on what is there now, or bring back what was"
        )


def first(samples: Samples, n: int) -> Split:
    """The first n samples, or all where there are fewer, as they are for evaluation."""
    import torch

    count = min(n, len(samples))
    return next(samples.at(torch.arange(count)).in_order(max(1, count)))


def probe(samples: Samples, n: int) -> Any:
    """The images of the first n samples, on the CPU: to trace a network, and to check a pruned one."""
    import torch

    return first(samples, n).to(torch.device("cpu")).images


def missing_message(name: str, data_root: str | Path) -> str:
    """What to tell a person whose data is not there."""
    where = f"{Path(data_root) / find_dataset(name, data_root).missing(data_root)[0]}"
    return (
        f"the data set {name} is not under {data_root} (looked for {where}); "
        f"fetch it with `prunesweep prefetch {name} --data-root {data_root}`, "
        "or pass --data-root (PRUNESWEEP_DATA_ROOT) where it is"
    )
