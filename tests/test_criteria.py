"""Criteria: each one's importances are what its definition says, computed here another way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from pruners.criteria import (
    CRITERIA,
    NotScored,
    activations_of,
    gradients_of,
    library_importances,
    lowest,
    lowest_together,
    own_norms,
)
from pruners.pruners import PRUNERS, by_importance, choose, find_pruner, marked, n_removed_together, steps_of

UNITS, CLASSES, SAMPLES = 5, 3, 12


class Small(nn.Module):
    """A convolution, its batch norm, a convolution that reads it, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(1, UNITS, 3), nn.BatchNorm2d(UNITS), nn.Conv2d(UNITS, 4, 3)
        self.fc = nn.Linear(4 * 4 * 4, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.two(F.relu(self.norm(self.one(x)))).flatten(1))


@pytest.fixture(scope="module")
def made() -> tuple[Small, torch.Tensor, torch.Tensor]:
    """A network with drawn weights and statistics, in eval mode, and samples."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Small().eval()
        model.norm.weight.data.uniform_(0.5, 2)
        model.norm.running_var = torch.rand(UNITS) + 0.5
        return model, torch.randn(SAMPLES, 1, 8, 8), torch.arange(SAMPLES) % CLASSES


def importances(made: Any, samples: int = SAMPLES, **only: Any) -> dict[str, torch.Tensor]:
    """criterion -> importance of the units of the first convolution."""
    import copy

    model, images, labels = copy.deepcopy(made[0]), made[1], made[2]
    each = list(zip(images.split(1), labels.split(1), strict=True))
    found = library_importances(
        copy.deepcopy(model),
        {"one": UNITS},
        images[:1],
        gradients=gradients_of(model, each),
        activations=activations_of(model, list(zip(images.split(5), labels.split(5), strict=True))),
        **only,
    )
    return {name: of["one"].needed("one", name) for name, of in found.items()}


def tensors(model: Small) -> list[tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]]:
    """What is coupled to the first convolution's units, each with what makes it [units, ...]."""
    return [
        (model.one.weight, lambda t: t.flatten(1)),
        (model.norm.weight, lambda t: t[:, None]),
        (model.two.weight, lambda t: t.transpose(0, 1).flatten(1)),
    ]


def group_mean(each: Sequence[torch.Tensor]) -> torch.Tensor:
    """torch-pruning's mean over the coupled tensors, [units], divided by its mean over the units."""
    found = torch.stack([one.double() for one in each]).mean(0)
    return found / found.mean()


def expected_taylor(made: Any) -> torch.Tensor:
    model, images, labels = made
    used = [tensors(model)[0], tensors(model)[2]]  # the library leaves batch norm out here
    found = torch.autograd.grad(F.cross_entropy(model(images), labels), [t for t, _ in used])
    return group_mean([shape((t * g).abs()).sum(1) for (t, shape), g in zip(used, found, strict=True)])


def expected_hessian(made: Any) -> torch.Tensor:
    model, images, labels = made
    used = tensors(model)
    squares = [torch.zeros_like(t) for t, _ in used]
    for i in range(SAMPLES):
        found = torch.autograd.grad(F.cross_entropy(model(images[i : i + 1]), labels[i : i + 1]), [t for t, _ in used])
        squares = [s + g.square() / SAMPLES for s, g in zip(squares, found, strict=True)]
    return group_mean([shape(t.square() * h).sum(1) for (t, shape), h in zip(used, squares, strict=True)])


def expected_fpgm(made: Any) -> torch.Tensor:
    used = [tensors(made[0])[0], tensors(made[0])[2]]
    rows = [shape(t.square()) for t, shape in used]
    return group_mean([(r[:, None] - r[None]).square().sum(2).sqrt().sum(1) for r in rows])


def expected_lamp(made: Any) -> torch.Tensor:
    score = group_mean([shape(t.square()).sum(1) for t, shape in tensors(made[0])])
    return torch.stack([one / score[score >= one].sum() for one in score])


def expected_bn_scale(made: Any) -> torch.Tensor:
    return group_mean([made[0].norm.weight.abs()])


def expected_activation(made: Any) -> torch.Tensor:
    model, images, _ = made
    return group_mean([F.relu(model.norm(model.one(images))).abs().mean((0, 2, 3))])


EXPECTED = {
    "taylor": expected_taylor,
    "hessian": expected_hessian,
    "fpgm": expected_fpgm,
    "lamp": expected_lamp,
    "bn_scale": expected_bn_scale,
    "activation": expected_activation,
}


@pytest.mark.parametrize("criterion", EXPECTED)
def test_importances_are_what_the_definition_says(criterion: str, made: Any) -> None:
    """By the formula, written down independently: all samples at once, or one by one."""
    with torch.enable_grad():
        expected = EXPECTED[criterion](made).detach()
    found = importances(made)[criterion]
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-4)


def test_every_criterion_of_the_library_is_checked() -> None:
    """A criterion added later has a definition above too; l1 and l2 are in test_candidates."""
    assert {name for name, one in CRITERIA.items() if one.library} == set(EXPECTED)
    assert set(CRITERIA) <= set(PRUNERS)


def test_one_criterion_alone_is_the_same(made: Any) -> None:
    """Asking for one gives what asking for all gives."""
    whole = importances(made)
    for name in ("taylor", "lamp"):
        assert torch.equal(importances(made, only=name)[name], whole[name])


def test_what_cannot_be_scored_says_why() -> None:
    """No batch norm: no bn_scale; choosing by it is an error that names the layer."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.Flatten())
    found = library_importances(model, {"0": 4}, torch.randn(1, 1, 5, 5))
    assert set(found) == {"fpgm", "lamp", "bn_scale"}  # what needs no gradients and no activations
    with pytest.raises(NotScored, match=r"0: bn_scale has no importance for it: .*; choose another criterion"):
        found["bn_scale"]["0"].needed("0", "bn_scale")
    assert own_norms(nn.Sequential(nn.ReLU()), "0", 4)["l1"].units is None


def test_heads_are_scored_by_the_rows_that_write_them() -> None:
    """A head's l1 and l2 are sums over its rows; the library's criteria see those rows and what reads them."""
    from models import build_model

    name = "timm/vit_tiny_patch16_224?img_size=8&patch_size=4&embed_dim=12&depth=1&num_heads=3"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model(name, 4, (3, 8, 8)).eval()
        images, labels = torch.randn(2, 3, 8, 8), torch.tensor([0, 3])
    rows = model.get_parameter("blocks.0.attn.qkv.weight").detach().double()  # queries, keys, values of 3 heads of 4
    heads = [torch.cat([rows[part * 12 + head * 4 :][:4] for part in range(3)]) for head in range(3)]
    norms = own_norms(model, "blocks.0.attn", 3)
    assert norms["l1"].needed("", "").tolist() == pytest.approx([head.abs().sum().item() for head in heads])
    assert norms["l2"].needed("", "").tolist() == pytest.approx([head.norm(dim=1).sum().item() for head in heads])

    found = library_importances(
        model,
        {"blocks.0.attn": 3},
        images[:1],
        gradients=gradients_of(model, list(zip(images.split(1), labels.split(1), strict=True))),
    )
    loss = F.cross_entropy(model(images), labels)
    qkv, proj = model.get_parameter("blocks.0.attn.qkv.weight"), model.get_parameter("blocks.0.attn.proj.weight")
    of_qkv, of_proj = torch.autograd.grad(loss, [qkv, proj])
    written = (qkv * of_qkv).abs().sum(1).reshape(3, 3, 4).sum((0, 2))
    read = (proj * of_proj).abs().sum(0).reshape(3, 4).sum(1)
    expected = group_mean([written, read]).tolist()
    assert found["taylor"]["blocks.0.attn"].needed("", "").tolist() == pytest.approx(expected, rel=1e-4)


scores = st.lists(st.lists(st.integers(-3, 3), min_size=1, max_size=8), min_size=1, max_size=4)


@given(scores, st.data())
def test_global_removes_the_lowest_of_all_but_leaves_one_in_each(values: list[list[int]], data: st.DataObject) -> None:
    """Against walking through all of them in order: ties by layer, then index; a layer's last unit is passed over."""
    total = sum(map(len, values))
    count = data.draw(st.integers(0, total - len(values)))
    found = lowest_together([torch.tensor(v, dtype=torch.float64) for v in values], count)
    left, gone = [len(v) for v in values], set()
    for _, layer, unit in sorted((v, i, j) for i, of in enumerate(values) for j, v in enumerate(of)):
        if len(gone) < count and left[layer] > 1:
            left[layer] -= 1
            gone.add((layer, unit))
    assert {(i, int(j)) for i, one in enumerate(found) for j in one.nonzero()} == gone
    with pytest.raises(ValueError, match="leave none"):
        lowest_together([torch.tensor(v, dtype=torch.float64) for v in values], total - len(values) + 1)


@given(scores, st.floats(0.01, 0.99), st.integers(1, 7))
def test_steps_are_nested_and_end_where_one_shot_does(values: list[list[int]], ratio: float, steps: int) -> None:
    """With the same importances every step removes what the one before did and more, exactly floor(n * r * i / N)."""
    ranked = [torch.tensor(v, dtype=torch.float64) for v in values]
    before = [torch.zeros(len(v), dtype=torch.bool) for v in values]
    for step in range(1, steps + 1):
        now = marked(ranked, [ratio] * len(values), "local", step / steps)
        assert all(bool((b <= n).all()) for b, n in zip(before, now, strict=True))
        assert [int(n.sum()) for n in now] == [int(len(v) * ratio * step / steps + 1e-9) for v in values]
        before = now
    assert all(map(torch.equal, before, lowest(ranked, [int(len(v) * ratio + 1e-9) for v in values])))


def test_the_global_count_is_rounded_once() -> None:
    """Three layers of 3 at 0.25 lose 2 together, where each alone would lose none; ratios of their own add up."""
    ranked = {name: torch.arange(3, dtype=torch.float64) for name in "abc"}
    ratios = dict.fromkeys("abc", 0.25)
    assert by_importance(ranked, ratios, "local") == {"a": (), "b": (), "c": ()}
    assert by_importance(ranked, ratios, "global") == {"a": (0,), "b": (0,), "c": ()}
    assert n_removed_together([10, 10], [0.1, 0.25]) == 3
    assert n_removed_together([10, 10], [0.3, 0.3]) == 6


def test_random_global_draws_from_its_own_seed() -> None:
    """The floor over all units together, another set for another seed, the same for the same."""
    units, ratios = {"a": 20, "b": 30}, {"a": 0.3, "b": 0.3}
    found = [choose("random", units, ratios, scope="global", pruner_seed=seed) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    assert [sum(map(len, one.values())) for one in found] == [15] * 3


def test_names_of_pruners_and_schedules() -> None:
    """What a spec may say; the message says what is allowed."""
    assert find_pruner("taylor").needs_data and not find_pruner("lamp").needs_data
    assert find_pruner("some.module:rule").criterion == "some.module:rule"
    with pytest.raises(ValueError, match=r"unknown name 'tailor'; allowed: oracle, .* did you mean taylor\?"):
        find_pruner("tailor")
    assert [steps_of(s) for s in ("one-shot", "iterative-2", "iterative-10")] == [1, 2, 10]
    for wrong in ("iterative", "iterative-1", "iterative-x", "twice"):
        with pytest.raises(ValueError, match="one-shot, iterative-N"):
            steps_of(wrong)


def test_activations_of_inputs_that_are_not_contiguous() -> None:
    """A transposed feature map is what a fully connected layer reads in attention written by hand."""

    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(1, 4, 3), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(self.one(x).flatten(2).transpose(1, 2)).mean(1)

    model, images = Transposed().eval(), torch.randn(6, 1, 5, 5)
    found = activations_of(model, [(images, torch.zeros(6, dtype=torch.long))])["two"]
    expected = model.one(images).detach().abs().sum((0, 2, 3))
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-4)
