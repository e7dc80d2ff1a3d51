"""What is measured: the same by batches of any size, with its standard error; text token by token."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from workers.datasets import Split
from workers.measures import cross_entropy, measured


@given(st.integers(2, 40), st.integers(1, 50), st.integers(1, 3), st.integers(0, 10**6))
def test_a_measure_is_that_of_all_samples_at_once(n: int, batch: int, members: int, seed: int) -> None:
    """Mean loss, the standard error of a mean, the share classified correctly; of each network."""
    draw = torch.Generator().manual_seed(seed)
    logits, labels = torch.randn(members, n, 5, generator=draw), torch.randint(5, (n,), generator=draw)
    # An image is its own number: the networks look their logits up.
    split = Split(torch.arange(n).view(n, 1, 1, 1), labels)
    for member, found in enumerate(measured(lambda images: logits[:, images.flatten()], split, batch)):
        losses = F.cross_entropy(logits[member], labels, reduction="none").double()
        assert found.n == n and found.loss == pytest.approx(losses.mean().item())
        assert found.loss_se == pytest.approx(losses.std().item() / math.sqrt(n), rel=1e-4, abs=1e-6)
        assert found.accuracy == pytest.approx((logits[member].argmax(1) == labels).double().mean().item())


@given(st.integers(1, 6), st.integers(1, 7), st.integers(0, 10**6), st.sampled_from([0.0, 0.1]))
def test_the_loss_of_text_is_torchs(n: int, tokens: int, seed: int, smoothing: float) -> None:
    """Over the tokens that have a label; each token's own where no mean is asked for."""
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, 11, tokens, generator=draw, dtype=torch.float64)
    labels = torch.randint(11, (n, tokens), generator=draw)
    labels[torch.rand(n, tokens, generator=draw) < 0.3] = -100
    labels[0, 0] = 3
    mine, usual = (of(logits, labels, label_smoothing=smoothing) for of in (cross_entropy, F.cross_entropy))
    assert torch.allclose(mine, usual)
    each = cross_entropy(logits, labels, reduction="none").view(n, tokens)
    assert torch.allclose(each, F.cross_entropy(logits, labels, reduction="none"))


def test_soft_labels_are_torchs() -> None:
    """[N, classes], as mixup makes them."""
    logits, soft = torch.randn(8, 5), torch.randn(8, 5).softmax(1)
    assert torch.equal(cross_entropy(logits, soft), F.cross_entropy(logits, soft))
