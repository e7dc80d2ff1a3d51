"""On the real MNIST and Fashion-MNIST, where they are at hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.conftest import Prunesweep
from tests.samples import in_memory
from workers.datasets import DATASETS, prepare


@pytest.mark.parametrize("name", ["mnist", "fmnist"])
def test_prepared_as_the_protocol_says(name: str, mnist_root: str) -> None:
    """60,000 and 10,000 images of 32x32, normalised to about mean 0 and standard deviation 1."""
    data = prepare(name, mnist_root, 0.0, torch.device("cpu"))
    assert (len(data.train), len(data.test)) == (60_000, 10_000)
    train = in_memory(data.train)
    assert tuple(train.images.shape[1:]) == DATASETS[name].shape == (1, 32, 32)
    assert abs(train.images.mean().item()) < 0.02
    assert train.images.std().item() == pytest.approx(1, abs=0.1)  # resizing smooths
    assert train.labels.bincount().min() > 5000


def test_resized_as_torchvision_does_to_a_picture(mnist_root: str) -> None:
    """Our tensors are those of the usual transform on PIL pictures, to one grey level."""
    from torchvision import datasets, transforms

    usual = transforms.Compose(
        [transforms.Resize((32, 32)), transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))]
    )
    raw = datasets.MNIST(mnist_root, train=False, transform=usual)
    ours = in_memory(prepare("mnist", mnist_root, 0.0, torch.device("cpu")).test)
    for i in range(0, 200, 7):
        image, label = raw[i]
        assert label == ours.labels[i]
        assert (image - ours.images[i]).abs().max() <= 1.01 / 255 / 0.3081


def test_a_study_on_real_mnist(mnist_root: str, prunesweep: Prunesweep, tmp_path: Path) -> None:
    """lenet5-mini-conv1 shrunken to seconds: real data through the whole path, and a network that learns."""
    small = ["grid.ratio=0.2", "grid.seed=0", "retrain.epochs=1", "dense.epochs=1", "loss_subset=5000"]
    small += ["candidates={mode: sample, count: 2, seed: 0}", "name=small"]
    overrides = [word for assignment in small for word in ("--set", assignment)]
    found = prunesweep("run", "lenet5-mini-conv1", "--inline", "--data-root", mnist_root, *overrides)
    assert found.returncode == 0, found.stderr
    query = "select min(best_test_accuracy) > 0.8 as learned, count(*) as n from rows"
    assert prunesweep("query", query, "-f", "jsonl").stdout == '{"learned": true, "n": 2}\n'
