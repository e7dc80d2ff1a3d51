"""Data sets by name: CIFAR from torchvision's files, a person's own function, names that cannot be."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from workers import userdata
from workers.datasets import DATASETS, Split, check_dataset, dataset_content, find_dataset, prepare
from workers.training import minibatches

CPU = torch.device("cpu")

MODULE = """\
import torch

def images(n, seed):
    return torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))

def good(root):
    drawn = torch.rand(4, 3, 8, 8)
    return (drawn, torch.tensor([0, 1, 2, 4])), (images(3, 1).double(), torch.tensor([0, 1, 3], dtype=torch.int32))

def root_in_shape(root):
    n = len((root / "some").read_text())
    return (images(n, 0), torch.zeros(n).long()), (images(n, 0), torch.zeros(n).long())

def one(root):
    return images(3, 0)

def raw(root):
    return (images(3, 0).byte(), torch.zeros(3).long()), (images(3, 0), torch.zeros(3).long())

def arrays(root):
    return (images(3, 0).numpy(), [0, 1, 2]), (images(3, 0), torch.zeros(3).long())

def fewer(root):
    return (images(3, 0), torch.zeros(2).long()), (images(3, 0), torch.zeros(3).long())

def floats(root):
    return (images(3, 0), torch.zeros(3)), (images(3, 0), torch.zeros(3).long())

def negative(root):
    return (images(3, 0), torch.tensor([0, -1, 1])), (images(3, 0), torch.zeros(3).long())

def shapes(root):
    return (images(3, 0), torch.zeros(3).long()), (images(3, 0)[:, :, :4], torch.zeros(3).long())

def broken(root):
    return open(root / "nowhere")

thing = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a module of a person's own that no other test has."""
    name = f"own_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    userdata.find_user_dataset.cache_clear()
    return tmp_path / f"{name}.py"


def cifar(root: Path, name: str) -> tuple[np.ndarray, list[int]]:
    """Files as torchvision finds them, 7 samples in each; the test part's."""
    dataset, draw = DATASETS[name], np.random.default_rng(0)
    data, labels = draw.integers(0, 256, (7, 3072), dtype=np.uint8), [3, 1, 0, 2, 9, 5, 4]
    for file in dataset.files:
        data = draw.integers(0, 256, (7, 3072), dtype=np.uint8)
        entry = {"data": data, "labels" if name == "cifar10" else "fine_labels": labels}
        names = {"label_names": list("abcdefghij"), "fine_label_names": [str(i) for i in range(100)]}
        (root / file).parent.mkdir(exist_ok=True)
        (root / file).write_bytes(pickle.dumps(names if "meta" in file else entry))
    test = "test_batch" if name == "cifar10" else "test"
    return pickle.loads((root / str(dataset.folder) / test).read_bytes())["data"], labels


@pytest.mark.parametrize("name, trained", [("cifar10", 35), ("cifar100", 7)])
def test_cifar_is_torchvisions_normalised(
    name: str, trained: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Channel by channel; around an image is black, as far from the mean as a black pixel is."""
    from torchvision.datasets import cifar as library

    assert len(DATASETS[name].missing(tmp_path)) == len(DATASETS[name].files)
    data, labels = cifar(tmp_path, name)
    with pytest.raises(ValueError, match=f"damaged; remove them and run `prunesweep prefetch {name}"):
        prepare(name, tmp_path, 0.0, CPU)  # by their checksums these are not the real ones
    monkeypatch.setattr(library, "check_integrity", lambda *_: True)
    found = prepare(name, tmp_path, 0.0, CPU)
    assert isinstance(found.test, Split) and found.test.pad is not None and len(found.train) == trained
    assert found.test.images.shape[1:] == DATASETS[name].shape and found.test.labels.tolist() == labels
    black = torch.tensor(found.test.pad).view(1, 3, 1, 1)
    raw = torch.from_numpy(data.reshape(7, 3, 32, 32)).float() / 255
    scale = (found.test.images - black) / raw.clamp_min(1e-9)
    for channel in range(3):
        values = scale[:, channel][raw[:, channel] > 0.1]
        assert values.std() < 1e-4 and 3.6 < values.mean() < 4.2
    assert dataset_content(name) is None


def test_a_held_out_part_is_nobody_elses(tmp_path: Path) -> None:
    """Validation and train part together are the train set, in the order of its files."""
    whole, parted = (prepare("synthetic", tmp_path, share, CPU) for share in (0.0, 0.25))
    assert (len(parted.train), len(parted.validation), len(whole.validation)) == (384, 128, 0)
    sums = [s.images.sum((1, 2, 3)).tolist() for s in (parted.train, parted.validation, whole.train)]  # type: ignore[attr-defined]
    assert sorted(sums[0] + sums[1]) == sorted(sums[2])
    assert [value for value in sums[2] if value in set(sums[0])] == sums[0]
    assert sum(len(batch) for batch in minibatches(384, 50, "synthetic", 0, "dense/0")) == 384


def test_a_persons_own_data(own: Path) -> None:
    """Its shape and classes are found by loading it; its global draws are named ones; its code is its content."""
    name = f"{own.stem}:good"
    check_dataset(name)
    found = find_dataset(name, own.parent)
    assert (found.shape, found.classes, found.train_size, found.test_size) == ((3, 8, 8), 5, 4, 3)
    first = prepare(name, own.parent, 0.0, CPU)
    assert isinstance(first.train, Split) and isinstance(first.test, Split)
    assert first.test.images.dtype == torch.float32 and first.test.labels.dtype == torch.int64
    userdata.find_user_dataset.cache_clear()
    torch.manual_seed(9)
    again = prepare(name, own.parent, 0.0, CPU)
    assert isinstance(again.train, Split) and torch.equal(first.train.images, again.train.images)
    (own.parent / "some").write_text("12345")
    assert find_dataset(f"{own.stem}:root_in_shape", own.parent).train_size == 5
    before = dataset_content(name)
    own.write_text(f"{MODULE}\n# edited\n")
    assert before and dataset_content(name) != before


@pytest.mark.parametrize(
    "function, message",
    [
        ("one", r"gave a Tensor; it must return \(train, test\)"),
        ("raw", r"train: images must be normalised floats \[N, C, H, W\], not torch.uint8 \[3, 3, 8, 8\]"),
        ("arrays", r"train: images and labels must be tensors, not a ndarray and 3 things"),
        ("fewer", r"train: it has 3 images and 2 labels"),
        ("floats", r"train: labels must be whole numbers \[N\], not torch.float32"),
        ("negative", r"train: labels must be 0, 1, 2, ..., not -1"),
        ("shapes", r"train and test have images of other shapes"),
        ("broken", r"failed when called with .*FileNotFoundError"),
        ("thing", r"failed when called with .*not callable"),
        ("nothing", r"has no nothing; it has .*good"),
    ],
)
def test_what_a_persons_function_must_give(own: Path, function: str, message: str) -> None:
    """The function is named, what it gave, and what is wanted."""
    with pytest.raises(ValueError, match=message) as raised:
        find_dataset(f"{own.stem}:{function}", own.parent)
    assert f"{own.stem}:{function}" in str(raised.value)


def test_every_built_in_name_is_known_and_others_are_said() -> None:
    """The nearest name is offered."""
    for name in (*DATASETS, "imagenet", "imagefolder:/some/where", "llava:x", "a_package.a_module:load"):
        check_dataset(name)
    with pytest.raises(ValueError, match=r"unknown name 'cifar-10'; .*did you mean cifar10"):
        check_dataset("cifar-10")
