"""Augmentation: windows of the padded image, the same draws for every candidate, others in every epoch."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from models import build_model
from storage.records import Execution, Recipe
from tests.benchmarks.compute import accelerator
from workers.augment import PADDING, Draws, crop_and_flip, mixed
from workers.backends import open_backend
from workers.datasets import Data, Split
from workers.training import _fed, minibatches

DRAWS = Draws("synthetic", 0, "retrain/0")
PAD = (-1.0, -2.0, -3.0)
PLAIN = Recipe(1, 16, ((0, 0.1),))


def samples(n: int, height: int = 8, width: int = 6, pad: tuple[float, ...] | None = PAD) -> Split:
    """Images whose every pixel is one of a kind, and their labels."""
    images = torch.arange(n * 3 * height * width, dtype=torch.float32).view(n, 3, height, width)
    return Split(images, torch.arange(n) % 4, pad)


def data_of(train: Split, classes: int = 4) -> Data:
    return Data(train, train.at(torch.arange(0)), train, classes)


def fed(train: Split, recipe: Recipe, draws: Draws, skip: int = 0) -> list[tuple[Split, torch.Tensor | None]]:
    """An epoch's minibatches, as a back-end gets them, the first few left out."""
    order = list(enumerate(minibatches(len(train), recipe.batch_size, draws.dataset, draws.seed, draws.stream)))
    return list(_fed(data_of(train), recipe, order[skip:], draws))


def augmented(train: Split, draws: Draws, number: int = 0) -> torch.Tensor:
    """The images of a minibatch of the first 16."""
    ((batch, _),) = train.minibatches([(number, torch.arange(16))], draws)
    return batch.images


@given(st.integers(1, 12), st.integers(1, 9), st.integers(1, 9), st.integers(0, 10**6))
def test_each_image_is_a_window_of_itself_padded(n: int, height: int, width: int, seed: int) -> None:
    """One of the 9 x 9 x 2 windows, mirrored or not, of the image with its padding around."""
    split = samples(n, height, width)
    made = crop_and_flip(split.images, PAD, torch.Generator().manual_seed(seed))
    assert made.shape == split.images.shape and made.is_contiguous()
    for image, one in zip(split.images, made, strict=True):
        padded = torch.stack([F.pad(c, (PADDING,) * 4, value=v) for c, v in zip(image, PAD, strict=True)])
        places = product(range(2 * PADDING + 1), range(2 * PADDING + 1))
        windows = [padded[:, top : top + height, left : left + width] for top, left in places]
        assert any(torch.equal(one, w) or torch.equal(one, w.flip(2)) for w in windows)


def test_every_window_comes_up() -> None:
    """All 81 places and both sides, about as often."""
    image = samples(1, 10, 10).images.expand(20_000, 3, 10, 10)
    corner = crop_and_flip(image, PAD, torch.Generator().manual_seed(0))[:, 0, 5, 5]
    counts = corner.unique(return_counts=True)[1]
    # The middle pixel tells the place; a mirrored window has it from a column to the right.
    assert len(counts) == 9 * 10 and counts.min() > 60
    assert max(counts.tolist()) < 20_000 / 81 * 1.4


def test_the_same_draws_for_every_candidate_and_others_in_every_epoch() -> None:
    """What is drawn depends on data set, seed, stream, epoch and minibatch, on no global generator."""
    train, recipe = samples(40), PLAIN
    first = [batch.images for batch, _ in fed(train, recipe, DRAWS)]
    torch.manual_seed(1)
    np.random.seed(1)
    again = [batch.images for batch, _ in fed(train, recipe, DRAWS)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(first[2], fed(train, recipe, DRAWS, skip=2)[0][0].images)
    same = augmented(train, DRAWS)
    for other in (replace(DRAWS, stream="retrain/1"), replace(DRAWS, seed=1), replace(DRAWS, dataset="digits")):
        assert not torch.equal(same, augmented(train, other))
    assert not torch.equal(same, augmented(train, DRAWS, number=1))


@pytest.mark.parametrize("recipe, pad", [(PLAIN, None), (replace(PLAIN, augment=False), PAD)])
def test_what_is_not_augmented_is_read_in_place(recipe: Recipe, pad: tuple[float, ...] | None) -> None:
    """The whole train set and the indices: no copy is made."""
    train = samples(40, pad=pad)
    for batch, indices in fed(train, recipe, DRAWS):
        assert batch is train and indices is not None
    assert torch.cat([i for _, i in fed(train, recipe, DRAWS) if i is not None]).sort().values.tolist() == list(
        range(40)
    )


@pytest.mark.parametrize("mixup, cutmix", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_labels_follow_what_is_mixed(mixup: float, cutmix: float) -> None:
    """A sample and its partner by the share the label says; rows sum to 1; the data set is left as it was."""
    train, recipe = samples(32, pad=None), replace(PLAIN, mixup=mixup, cutmix=cutmix, label_smoothing=0.1)
    before = train.images.clone()
    for (batch, indices), chosen in zip(
        fed(train, recipe, DRAWS), minibatches(32, 16, "synthetic", 0, "retrain/0"), strict=True
    ):
        assert indices is None and batch.labels.shape == (16, 4)
        assert torch.allclose(batch.labels.sum(1), torch.ones(16), atol=1e-6)
        own, partner = train.at(chosen), train.at(chosen.flip(0))
        hard = [F.one_hot(s.labels, 4).float() for s in (own, partner)]
        apart = own.labels != partner.labels
        share = ((batch.labels - hard[1]) / (hard[0] - hard[1]))[apart & (batch.labels.sum(1) > 0)]
        shares = share[share.isfinite()]
        assert shares.max() - shares.min() < 1e-4
        lam = shares.mean().item()
        is_cut = ((batch.images == own.images) | (batch.images == partner.images)).all()
        expected = (batch.images == own.images).float().mean().item() if is_cut else lam
        assert expected == pytest.approx(lam, abs=0.02)
        if not is_cut:
            assert torch.allclose(batch.images, lam * own.images + (1 - lam) * partner.images, rtol=1e-3, atol=1e-2)
    assert torch.equal(train.images, before)


def test_an_odd_minibatch_keeps_its_last_sample() -> None:
    """timm mixes pairs; nobody is left out, and the draws do not move the global generators."""
    batch = samples(5, pad=None)
    state = np.random.get_state(legacy=False)
    made = mixed(batch.at(torch.arange(5)), replace(PLAIN, mixup=1.0), 4, DRAWS, 0)
    assert str(np.random.get_state(legacy=False)) == str(state)
    assert torch.equal(made.images[4], batch.images[4]) and made.labels[4].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert len(made) == 5 and not torch.equal(made.images[:4], batch.images[:4])


@pytest.mark.parametrize("name", ["serial", "compiled", "fleet"])
def test_every_back_end_takes_a_minibatch_made_for_it(name: str) -> None:
    """A minibatch without indices is what the same samples are by their indices: losses and weights, bit for bit."""
    split = Split(torch.randn(24, 1, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 10)
    chosen, found = torch.tensor([3, 1, 4, 15, 9, 2, 6, 5]), []
    for batch in ((split, chosen), (split.at(chosen), None)):
        torch.manual_seed(0)
        networks = [build_model("lenet5_mini", 10, (1, 32, 32)) for _ in range(3 if name == "fleet" else 1)]
        execution = Execution(name, len(networks), 1, "contiguous_format", "", ())
        with closing(open_backend(execution, networks, PLAIN, accelerator(), (1, 32, 32))) as backend:
            losses = [backend.step(*batch, 0.1) for _ in range(3)]
            weights = [p.detach().clone() for network in backend.networks for p in network.parameters()]
            found.append([*losses, *weights])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert found[0][0].shape == (3 if name == "fleet" else 1,)
