"""Folders of images as data sets: the same bits whoever decodes, content by content, damage named."""

from __future__ import annotations

import os
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from storage.records import Cell, Dense, Recipe, Row, Shard, Task
from storage.store import Store
from tests.test_checkpoints import measured, run_until_stopped
from workers import folders
from workers.augment import Draws
from workers.datasets import DataMissing, Dataset, Split, check_dataset, dataset_content, find_dataset, prepare
from workers.folders import BadFolder
from workers.images import CROP, LOADERS, ImageFiles
from workers.streams import stream_seed
from workers.worker import Worker

CPU = torch.device("cpu")
RECIPE = Recipe(1, 50, ((0, 0.01),), seed=0)
DRAWS = Draws("x", 0, "retrain/0")


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache folder of the test's own, and nothing known of any folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folders.look.cache_clear()
    yield
    folders.look.cache_clear()


def picture(path: Path, size: tuple[int, int], seed: int) -> None:
    """A smooth picture of its own."""
    draw = np.random.default_rng(seed)
    small = Image.fromarray(draw.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    small.resize(size, Image.Resampling.BILINEAR).save(path)


def folder(root: Path, sizes: Callable[[int], tuple[int, int]], *, count: int = 6, test: str = "test") -> Path:
    """`count` pictures of each of two classes in train/, half of them in `test`/."""
    number = 0
    for part, n in (("train", count), (test, count // 2)):
        for name in ("cat", "dog"):
            for i in range(n):
                number += 1
                picture(root / part / name / f"{i:03}.jpg", sizes(number), number)
    return root


def large(root: Path, **more: Any) -> Path:
    return folder(root, lambda number: (240 + 10 * (number % 3), 230 + number), **more)


def small(root: Path, **more: Any) -> Path:
    return folder(root, lambda _: (16, 16), **more)


def found(root: Path) -> Dataset:
    """The folder as it is now."""
    folders.look.cache_clear()
    return find_dataset(f"imagefolder:{root}")


def content(root: Path) -> str | None:
    folders.look.cache_clear()
    return dataset_content(f"imagefolder:{root}")


def epoch(files: ImageFiles, draws: Draws | None, loaders: int, skip: int = 0) -> list[Split]:
    """The minibatches of an epoch, by so many processes, the first few left out."""
    order = list(enumerate(torch.arange(len(files)).flip(0).split(5)))[skip:]
    return [batch for batch, _ in replace(files, loaders=loaders).minibatches(order, draws)]


def equal(one: Sequence[Split], other: Sequence[Split]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) for a, b in pairs)


def test_the_number_of_processes_changes_no_bit(tmp_path: Path) -> None:
    """With none and with two: the same minibatches, whether taken up in the middle, and no global generator moves."""
    train, _ = found(large(tmp_path / "data")).load(tmp_path)
    assert isinstance(train, ImageFiles) and len(train) == 12
    before = torch.get_rng_state()
    alone, shared = epoch(train, DRAWS, 0), epoch(train, DRAWS, 2)
    assert torch.equal(before, torch.get_rng_state())
    assert equal(alone, shared) and equal(alone[1:], epoch(train, DRAWS, 2, skip=1))
    assert [tuple(batch.images.shape) for batch in alone] == [(n, 3, CROP, CROP) for n in (5, 5, 2)]
    assert torch.cat([batch.labels for batch in alone]).tolist() == [1] * 6 + [0] * 6
    # Another epoch, another seed: other crops. Evaluation: none.
    for other in (replace(DRAWS, stream="retrain/1"), replace(DRAWS, seed=1), None):
        assert not equal(alone, epoch(train, other, 0))
    assert equal(epoch(train, None, 0), epoch(train, None, 2))


def test_a_sample_is_seen_the_same_in_any_minibatch(tmp_path: Path) -> None:
    """What is drawn for a sample depends on the sample, not on its place."""
    train, _ = found(large(tmp_path / "data")).load(tmp_path)
    assert isinstance(train, ImageFiles)
    one = dict(enumerate(torch.cat([batch.images for batch in epoch(train, DRAWS, 0)]).flip(0)))
    chosen = torch.tensor([7, 2, 9])
    ((other, _),) = train.at(chosen).minibatches([(0, torch.arange(3))], DRAWS)
    assert all(torch.equal(one[i], image) for i, image in zip(chosen.tolist(), other.images, strict=True))


def test_evaluation_is_torchvisions(tmp_path: Path) -> None:
    """Resized to 256, the middle 224, ImageNet's mean and standard deviation."""
    from torchvision.transforms import v2

    root = large(tmp_path / "data", test="val")
    _, test = found(root).load(tmp_path)
    usual = v2.Compose([v2.Resize(256), v2.CenterCrop(224), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])
    norm = v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    paths = sorted(root.glob("val/*/*.jpg"))
    expected = torch.stack([norm(usual(Image.open(path).convert("RGB"))) for path in paths])
    ours = torch.cat([batch.images for batch in test.in_order(4)])
    assert torch.allclose(ours, expected, atol=1e-5) and len(paths) == len(test) == 6


def test_small_images_live_in_memory(tmp_path: Path) -> None:
    """Decoded once, normalised by the train part's channels, with black to crop into."""
    dataset = found(small(tmp_path / "data"))
    assert (dataset.shape, dataset.classes, dataset.train_size, dataset.test_size) == ((3, 16, 16), 2, 12, 6)
    train, test = dataset.load(tmp_path)
    assert isinstance(train, Split) and isinstance(test, Split) and train.pad is not None
    assert torch.allclose(train.images.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(train.images.std((0, 2, 3)), torch.ones(3), atol=1e-2)
    assert torch.all(train.images >= torch.tensor(train.pad).view(1, 3, 1, 1) - 1e-6)
    raw = torch.from_numpy(np.asarray(Image.open(tmp_path / "data" / "train" / "cat" / "000.jpg")).copy()).float()
    scale = (train.images[0] - torch.tensor(train.pad).view(3, 1, 1)).permute(1, 2, 0) / raw.clamp_min(1)
    assert scale[raw > 0].std() < 0.005


@pytest.mark.parametrize("sizes", [lambda n: (16, 16 + n % 2), lambda n: (65, 65)], ids=["several", "large"])
def test_only_small_ones_of_one_size(tmp_path: Path, sizes: Callable[[int], tuple[int, int]]) -> None:
    """Sizes decide, nothing else."""
    assert found(folder(tmp_path / "data", sizes)).shape == (3, CROP, CROP)


def test_images_of_a_few_pixels_are_whole(tmp_path: Path) -> None:
    """A side below eight pixels, of which a draft has an eighth, is no damage."""
    dataset = found(folder(tmp_path / "tiny", lambda _: (6, 40)))
    assert dataset.damaged == () and dataset.shape == (3, 40, 6)


def test_content_is_what_files_hold_not_where_they_lie(tmp_path: Path) -> None:
    """Another place, another time: the same. One edited, one more, another name: another."""
    root = small(tmp_path / "a")
    first = content(root)
    shutil.copytree(root, tmp_path / "b")
    os.utime(tmp_path / "b" / "train" / "cat" / "000.jpg", (1, 1))
    assert first is not None and content(tmp_path / "b") == first
    one = root / "train" / "cat" / "000.jpg"
    picture(one, (16, 16), 999)
    edited = content(root)
    one.rename(one.with_name("zzz.jpg"))
    renamed = content(root)
    picture(root / "test" / "dog" / "new.png", (16, 16), 5)
    assert len({first, edited, renamed, content(root)}) == 4


def test_draws_do_not_depend_on_where_a_folder_lies(tmp_path: Path) -> None:
    """Nor does the part held out: a task has one id wherever its data is."""
    root = small(tmp_path / "a")
    shutil.copytree(root, tmp_path / "b")
    names = ["imagefolder:b", f"imagefolder:{root}"]
    held = [prepare(name, tmp_path, 0.5, CPU).validation for name in names]
    assert all(isinstance(split, Split) for split in held)
    assert torch.equal(*[split.images for split in held if isinstance(split, Split)])
    assert stream_seed(names[0], 3, "x") == stream_seed(names[1], 3, "x") != stream_seed("mnist", 3, "x")
    dense = [Dense("resnet20", name, RECIPE, content=(("dataset", str(content(root))),)) for name in names]
    assert dense[0].dense_id == dense[1].dense_id


def test_files_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second look reads only what has changed; a damaged memory of it is as none."""
    root, read = small(tmp_path / "data"), list[Path]()
    inspect = folders._inspect

    def watched(path: Path) -> Any:
        read.append(path)
        return inspect(path)

    monkeypatch.setattr(folders, "_inspect", watched)
    first = content(root)
    assert len(read) == 18
    assert content(root) == first and len(read) == 18
    picture(root / "train" / "cat" / "000.jpg", (16, 16), 999)
    assert content(root) != first and len(read) == 19
    (kept,) = (tmp_path / "cache" / "prunesweep" / "folders").iterdir()
    kept.write_bytes(b"no parquet")
    assert content(root) != first and len(read) == 37


def test_damaged_images_are_named_and_left_out(tmp_path: Path) -> None:
    """Up to 1 % of a part; beyond that an error that names them."""
    root = small(tmp_path / "data", count=100)
    one = root / "train" / "dog" / "041.jpg"
    one.write_bytes(one.read_bytes()[:-200])
    dataset = found(root)
    assert dataset.damaged == (str(one),) and dataset.train_size == 199
    data = prepare(f"imagefolder:{root}", tmp_path, 0.0, CPU)
    assert data.skipped == 1 and len(data.train) == 199
    for name in ("042.jpg", "043.jpg"):
        (root / "train" / "dog" / name).write_text("no picture")
    with pytest.raises(BadFolder, match=r"3 of the 200 images .*1% .*train/dog/041.jpg, train/dog/042.jpg"):
        found(root)


def test_a_damaged_image_is_in_the_row_and_said(tmp_path: Path) -> None:
    """The worker says which; the row says how many."""
    root = small(tmp_path / "data", count=100)
    (root / "train" / "cat" / "007.jpg").write_bytes(b"")
    name = f"imagefolder:{root}"
    dense = Dense("tests.test_images:tiny_network", name, RECIPE, content=(("dataset", str(content(root))),))
    cell = Cell(dense, (("conv", 0.5),), "l1", replace(RECIPE, seed=None), loss_subset=50)
    store = Store(str(tmp_path / "store"))
    worker = Worker(store, str(tmp_path))
    list(worker.run_shard(Shard("dense", dense=dense)))
    (row,) = worker.run_shard(Shard("s", (Task(cell, 0, 0),)))
    assert row.error is None and row.skipped_samples == 1
    assert row.pruned_train_loss_n == 50 and row.pruned_train_loss_se is not None
    assert any("train/cat/007.jpg" in message for message in worker.take_messages())


def test_a_stopped_training_on_files_goes_on_to_the_same_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of an epoch, by another number of processes, dropout included: bit for bit."""
    name = f"imagefolder:{large(tmp_path / 'data')}"
    recipe = Recipe(1, 3, ((0, 0.01),), seed=0)
    dense = Dense("tests.test_images:tiny_network", name, recipe)
    cell = Cell(dense, (("conv", 0.5),), "l1", Recipe(2, 3, ((0, 0.01),)), loss_subset=7)
    store, shard = Store(str(tmp_path / "store")), Shard("s", (Task(cell, 0, 0),))
    list(Worker(store, str(tmp_path)).run_shard(Shard("dense", dense=dense)))
    (whole,) = Worker(store, str(tmp_path)).run_shard(shard)
    shutil.rmtree(tmp_path / "store" / "rows")
    rows: list[Row] = []
    for loaders, after in (("2", 2), ("0", 4), ("2", 100)):
        monkeypatch.setenv(LOADERS, loaders)
        rows += run_until_stopped(store, shard, after, data_root=str(tmp_path))
    assert whole.error is None and [measured(row) for row in rows] == [measured(whole)]


def tiny_network(classes: int) -> nn.Module:
    """A user's network."""
    layers = {"conv": nn.Conv2d(3, 4, 3), "relu": nn.ReLU(), "pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten()}
    return nn.Sequential(OrderedDict(layers | {"drop": nn.Dropout(), "fc": nn.Linear(4, classes)}))


def test_what_is_wrong_with_a_folder_is_said(tmp_path: Path) -> None:
    """Classes that differ, by name; an empty one; no test part; nothing at all."""
    root = small(tmp_path / "a")
    picture(root / "train" / "emu" / "0.jpg", (16, 16), 1)
    with pytest.raises(BadFolder, match=r"train/ has classes that test/ has not: emu"):
        found(root)
    (root / "test" / "emu").mkdir()
    with pytest.raises(BadFolder, match=r"no image in test/emu; allowed: \.jpg"):
        found(root)
    (root / "train" / "emu" / "0.jpg").unlink()
    (root / "train" / "emu").rmdir()
    with pytest.raises(BadFolder, match=r"test/ has classes that train/ has not: emu"):
        found(root)
    shutil.rmtree(root / "test")
    with pytest.raises(BadFolder, match=r"needs train/ and test/ or val/.*it has train"):
        found(root)
    with pytest.raises(DataMissing, match=r"no folder .*/nowhere .*--data-root"):
        find_dataset("imagefolder:nowhere", tmp_path)


def test_a_folder_of_subfolders_with_a_file_nobody_may_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deeper folders count, files that are no images do not; what cannot be opened is no damaged image, and said."""
    root = small(tmp_path / "a")
    picture(root / "train" / "cat" / "deeper" / "still" / "0.PNG", (16, 16), 1)
    (root / "train" / "cat" / "notes.txt").write_text("a cat")
    (root / "train" / "list.csv").write_text("cat")
    assert found(root).train_size == 13

    def refused(path: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(folders, "_inspect", refused)
    picture(root / "train" / "dog" / "000.jpg", (16, 16), 77)
    with pytest.raises(BadFolder, match=r"cannot be read: .*Permission denied: .*train/dog/000.jpg"):
        found(root)


def test_a_file_that_goes_while_it_is_needed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a wrong number of processes, too."""
    root = large(tmp_path / "data")
    train, _ = found(root).load(tmp_path)
    (root / "train" / "cat" / "003.jpg").unlink()
    with pytest.raises(ValueError, match=r"train/cat/003.jpg could be read before and cannot now"):
        list(train.in_order(3))
    monkeypatch.setenv(LOADERS, "two")
    with pytest.raises(ValueError, match="PRUNESWEEP_LOADERS=two: a number of processes"):
        list(train.in_order(3))


def test_imagenet_has_a_thousand_classes(tmp_path: Path) -> None:
    """The folder imagenet under the data root, and not another."""
    large(tmp_path / "imagenet", test="val")
    with pytest.raises(BadFolder, match="has 2 classes; imagenet has 1000"):
        find_dataset("imagenet", tmp_path)


def test_a_folder_that_changed_since_the_plan_is_refused(tmp_path: Path) -> None:
    """A task's data is what its id says."""
    root = small(tmp_path / "data")
    planned = content(root)
    name = f"imagefolder:{root}"
    assert len(prepare(name, tmp_path, 0.0, CPU, planned).train) == 12
    picture(root / "train" / "cat" / "000.jpg", (16, 16), 999)
    folders.look.cache_clear()
    with pytest.raises(ValueError, match=f"another one here than where the sweep was planned .*{planned}"):
        prepare(name, tmp_path, 0.0, CPU, planned)


@pytest.mark.parametrize("made", [small, large])
def test_a_bit_that_flips_in_an_image_is_found(made: Callable[..., Path], tmp_path: Path) -> None:
    """Size and time are as they were, the folder's inspection is remembered: the image that is read is refused."""
    root = made(tmp_path / "data")
    planned, one = content(root), root / "train" / "dog" / "002.jpg"
    times, flipped = one.stat(), bytearray(one.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    one.write_bytes(flipped)
    os.utime(one, ns=(times.st_atime_ns, times.st_mtime_ns))
    folders.look.cache_clear()
    assert content(root) == planned
    with pytest.raises(ValueError, match=r"train/dog/002.jpg could be read before .* its content has changed"):
        data = prepare(f"imagefolder:{root}", tmp_path, 0.0, CPU, planned)  # here those in memory
        list(data.train.in_order(3))


@pytest.mark.parametrize("name", ["imagefolder:", "mnst", "cifar"])
def test_names_that_cannot_be(name: str) -> None:
    """What is allowed is said."""
    with pytest.raises(ValueError, match=r"allowed: digits, mnist|names no folder; write imagefolder:PATH"):
        check_dataset(name)
