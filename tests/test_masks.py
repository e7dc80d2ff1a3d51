"""Masks: exactly so many weights go, which ones depends on what it should, and they stay gone."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from pruners.candidates import priorities
from pruners.masks import (
    MaskBroken,
    choose_masks,
    held_ratio,
    mask_sha256,
    masked,
    n_weights,
    packed_masks,
    permanent,
    unpacked_masks,
    zeroed,
)
from workers.chain import NotAChain, chain_of

SHAPES = {"a": (4, 3, 3, 3), "b": (7, 10)}


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}


@settings(max_examples=60)
@given(
    ratio=st.floats(0.01, 0.99),
    pruner=st.sampled_from(["l1", "random", "oracle"]),
    scope=st.sampled_from(["local", "global"]),
)
def test_exactly_so_many_weights_go(ratio: float, pruner: str, scope: str) -> None:
    """floor(n * ratio) of each layer's, or of all together; l1 takes those of the lowest absolute value."""
    if pruner == "oracle":
        scope = "local"
    found = choose_masks(pruner, weights(), dict.fromkeys(SHAPES, ratio), scope=scope, sampling_seed=1)
    sizes = {name: weights()[name].numel() for name in SHAPES}
    assert {name: one.shape for name, one in found.items()} == {n: w.shape for n, w in weights().items()}
    if scope == "local":
        assert {n: int(one.sum()) for n, one in found.items()} == {n: int(k * ratio + 1e-9) for n, k in sizes.items()}
    else:
        assert n_weights(found) == min(int(sum(sizes.values()) * ratio + 1e-9), sum(sizes.values()) - 2)
    if pruner == "l1":
        groups = [list(SHAPES)] if scope == "global" else [[name] for name in SHAPES]
        for names in groups:
            gone = torch.cat([weights()[n].abs()[found[n]] for n in names])
            left = torch.cat([weights()[n].abs()[~found[n]] for n in names])
            last_ones = scope == "global" and ratio > 0.9  # one is left in each layer, however small
            assert not len(gone) or last_ones or gone.max() <= left.min()


def test_equal_weights_go_by_index() -> None:
    """Among equals the first go first, and those that are gone already before all others."""
    same = {"a": torch.ones(2, 3)}
    assert choose_masks("l1", same, {"a": 0.5})["a"].tolist() == [[True, True, True], [False, False, False]]
    gone = {"a": torch.tensor([[False, False, False], [False, False, True]])}
    found = choose_masks("l1", same, {"a": 0.5}, gone=gone)["a"].tolist()
    assert found == [[True, True, False], [False, False, True]]


def test_a_candidate_is_its_number() -> None:
    """Candidate k is the same mask whatever else is drawn; another number, layer or seed is another mask."""
    ratios = dict.fromkeys(SHAPES, 0.5)
    one = choose_masks("oracle", weights(), ratios, candidate=3, sampling_seed=5)
    again = choose_masks("oracle", weights(1), ratios, candidate=3, sampling_seed=5)  # other weights: the same
    assert mask_sha256(one) == mask_sha256(again)
    hashes = {
        mask_sha256(choose_masks("oracle", weights(), ratios, candidate=k, sampling_seed=s))
        for k in range(40)
        for s in (0, 1)
    }
    assert len(hashes) == 80
    assert mask_sha256(choose_masks("random", weights(), ratios, pruner_seed=1)) not in hashes
    alone = choose_masks("oracle", {"b": weights()["b"]}, {"b": 0.5}, candidate=3, sampling_seed=5)
    assert torch.equal(alone["b"], one["b"])
    with pytest.raises(ValueError, match="mode: sample"):
        choose_masks("oracle", weights(), ratios)


def test_few_masks_are_drawn_without_replacement() -> None:
    """All six ways to remove two of four weights come before any comes twice."""
    few = {"a": torch.ones(2, 2)}
    found = [choose_masks("oracle", few, {"a": 0.5}, candidate=k, sampling_seed=0)["a"] for k in range(6)]
    assert len({tuple(one.flatten().tolist()) for one in found}) == 6


def test_priorities_are_pinned() -> None:
    """The numbers that masks come from are the same on every machine."""
    assert priorities("masks/0/a/0", 3).tolist() == [0.8311212805681566, 0.2387692674796279, 0.2985944603654167]
    assert len(set(priorities("x", 10_000).tolist())) == 10_000


class Net(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Linear(4 * 4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(F.relu(self.a(x)).flatten(1))


def trained(network: nn.Module, steps: int = 6) -> nn.Module:
    """`network` after some steps with momentum and a strong weight decay."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True)
    draw = torch.Generator().manual_seed(0)
    for _ in range(steps):
        images, labels = torch.randn(8, 3, 4, 4, generator=draw), torch.randint(0, 5, (8,), generator=draw)
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()
    with torch.no_grad():
        network.eval()(torch.zeros(1, 3, 4, 4))
    return network


def test_a_mask_holds_while_it_is_trained() -> None:
    """Momentum and weight decay bring no weight back; those that are left learn as under any mask."""
    dense = Net()
    masks = choose_masks("l1", {n: dense.get_parameter(f"{n}.weight") for n in "ab"}, {"a": 0.5, "b": 0.75})
    network = trained(copy.deepcopy(masked(dense, masks)))
    state = permanent(network.state_dict())
    assert state.keys() == dense.state_dict().keys()
    for name, removed in masks.items():
        now, before = state[f"{name}.weight"], dense.get_parameter(f"{name}.weight")
        assert (now[removed] == 0).all() and (now[~removed] != before[~removed]).all()
    assert held_ratio(network, masks) == n_weights(masks) / sum(m.numel() for m in masks.values())
    # The same by hand: weights set to zero after every step, their gradients too.
    by_hand = zeroed(dense, masks)
    for name, removed in masks.items():
        by_hand.get_parameter(f"{name}.weight").register_hook(lambda g, removed=removed: g.masked_fill(removed, 0.0))
    expected = trained(by_hand).state_dict()
    for name in state:
        assert torch.allclose(state[name], expected[name], rtol=1e-4, atol=1e-6)


def test_a_mask_that_does_not_hold_is_found() -> None:
    """Weights that were only set to zero come back; what is no number is no weight that came back."""
    dense = Net()
    masks = choose_masks("l1", {"a": dense.get_parameter("a.weight")}, {"a": 0.5})
    with pytest.raises(MaskBroken, match=r"a: \d+ of 54 removed weights are not zero after retraining"):
        held_ratio(trained(zeroed(dense, masks)), masks)
    network = zeroed(dense, masks)
    with torch.no_grad():
        network.get_parameter("a.weight").fill_(torch.nan)
    assert held_ratio(network, masks) == 0.5


def test_masks_go_through_bits() -> None:
    """Packed and unpacked again; the hash tells the places, and the layer they are in."""
    masks = choose_masks("random", weights(), dict.fromkeys(SHAPES, 0.3))
    again = unpacked_masks(packed_masks(masks), {name: one.shape for name, one in masks.items()})
    assert all(torch.equal(masks[name], again[name]) for name in SHAPES)
    other = {name: one.clone() for name, one in masks.items()}
    other["a"].view(-1)[0] ^= True
    renamed = {"c": masks["a"], "b": masks["b"]}
    assert len({mask_sha256(one) for one in (masks, other, renamed)}) == 3


def test_compiled_code_takes_no_masks() -> None:
    """A network with a mask is no chain: its hook would be passed over."""
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 4, 3))
    assert len(chain_of(network, (1, 4, 4))) == 2
    masks = choose_masks("random", {"0": network.get_parameter("0.weight")}, {"0": 0.5})
    with pytest.raises(NotAChain, match="0 has a hook"):
        chain_of(masked(network, masks), (1, 4, 4))
