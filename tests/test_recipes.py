"""Recipes: each key does what torch's own code does when one writes it out, and what it says of itself."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from storage.records import Recipe
from storage.store import Store
from tests.test_interrupt import in_process
from workers.backends import SERIAL, fastest, is_plain
from workers.checkpoints import State
from workers.datasets import Split
from workers.rates import planned_epochs, rate, steps_left
from workers.serial import Serial

PLAIN = Recipe(3, 8, ((0, 0.1),))
BATCHES, BATCH = 5, 8


def recipe(**keys: Any) -> Recipe:
    return Recipe(**{"epochs": 3, "batch_size": BATCH, "lr": ((0, 0.1),), **keys})


def network() -> nn.Module:
    """A small one in float64, the same every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def data() -> Split:
    draw = torch.Generator().manual_seed(1)
    images = torch.randn(BATCHES * BATCH, 1, 4, 4, generator=draw, dtype=torch.float64)
    return Split(images, torch.randint(0, 4, (BATCHES * BATCH,), generator=draw))


def trained(with_recipe: Recipe) -> tuple[Serial, list[float]]:
    """A back-end after one epoch at its recipe's rates, and the loss of each step."""
    split, backend = data(), Serial(network(), with_recipe, Accelerator(cpu=True), "contiguous_format")
    losses = []
    for i, indices in enumerate(torch.arange(len(split)).split(BATCH)):
        losses += backend.step(split, indices, rate(with_recipe, len(split), 0, i)).tolist()
    return backend, losses


def written_out(make: Callable[[Any], torch.optim.Optimizer], **keys: Any) -> list[torch.Tensor]:
    """The parameters after the same epoch, by a plain loop."""
    split, model = data(), network()
    optimizer = make(model.parameters())
    for indices in torch.arange(len(split)).split(BATCH):
        optimizer.zero_grad()
        F.cross_entropy(model(split.images[indices]), split.labels[indices], **keys).backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def same(backend: Serial, expected: list[torch.Tensor]) -> bool:
    pairs = zip(backend.networks[0].parameters(), expected, strict=True)
    return all(torch.allclose(a, b, rtol=1e-12, atol=1e-14) for a, b in pairs)


# -- the learning rate --------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    st.integers(2, 6), st.integers(1, 40), st.integers(0, 1), st.floats(0, 0.5), st.sampled_from(["cosine", "linear"])
)
def test_a_schedule_is_its_formula(epochs: int, n: int, warm: int, share: float, kind: str) -> None:
    """After the warm-up the rate falls from `lr` towards `final_lr` by the schedule's closed form, step by step."""
    one = recipe(epochs=epochs, lr_schedule=kind, warmup_epochs=warm, final_lr=0.1 * share)
    steps = math.ceil(n / BATCH)
    rates = [rate(one, n, e, s) for e in range(epochs) for s in range(steps)]
    rest = rates[warm * steps :]
    for i, found in enumerate(rest):
        done = i / len(rest)
        falls = (1 + math.cos(math.pi * done)) / 2 if kind == "cosine" else 1 - done
        assert found == pytest.approx(0.1 * share + (0.1 - 0.1 * share) * falls, rel=1e-9, abs=1e-12)
    rising = rates[: warm * steps]
    assert rising == sorted(rising) and all(0 < r < 0.1 for r in rising)


def test_a_table_may_warm_up() -> None:
    """The rates of the table hold from the end of the warm-up on, by epochs done."""
    one = recipe(epochs=4, lr=((0, 0.1), (2, 0.01)), warmup_epochs=1)
    found = [rate(one, 16, e, s) for e in range(4) for s in range(2)]
    assert found == pytest.approx([0.001, 0.0505, 0.1, 0.1, 0.01, 0.01, 0.01, 0.01])


@settings(deadline=None)
@given(st.integers(1, 100), st.integers(1, 6), st.none() | st.integers(1, 60))
def test_max_steps_ends_it_there(n: int, epochs: int, most: int | None) -> None:
    """As many steps as asked for and no more, in whole epochs but the last."""
    one = recipe(epochs=epochs, max_steps=most)
    steps = [steps_left(one, n, e) for e in range(planned_epochs(one, n))]
    whole = math.ceil(n / BATCH)
    assert sum(steps) == min(epochs * whole, most or math.inf) and min(steps) > 0
    assert all(s == whole for s in steps[:-1])


# -- steps --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "make"),
    [
        ({"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}, None),
        ({"optimizer": "adam", "weight_decay": 0.1}, torch.optim.Adam),
        ({"optimizer": "adamw", "weight_decay": 0.1, "betas": (0.8, 0.95)}, torch.optim.AdamW),
    ],
    ids=["sgd", "adam", "adamw"],
)
def test_optimizers_are_torchs(keys: dict[str, Any], make: Any) -> None:
    """An epoch by the back-end is an epoch by torch's optimizer."""
    given = {key: value for key, value in keys.items() if key != "optimizer"}
    backend, _ = trained(recipe(**keys))
    assert same(backend, written_out(lambda p: (make or torch.optim.SGD)(p, lr=0.1, **given)))


def test_label_smoothing_trains_and_is_not_in_the_loss() -> None:
    """The gradient is of the smoothed loss; what is reported is the plain one."""
    backend, losses = trained(recipe(label_smoothing=0.2))
    assert same(backend, written_out(lambda p: torch.optim.SGD(p, lr=0.1), label_smoothing=0.2))
    split = data()
    plain = F.cross_entropy(network()(split.images[:BATCH]), split.labels[:BATCH])
    assert losses[0] == pytest.approx(plain.item(), rel=1e-12)


def test_mixed_labels_are_smoothed_in_training_alone() -> None:
    """The gradient is that of timm's smoothed and mixed labels; what is reported is the loss on them unsmoothed."""
    from timm.data.mixup import mixup_target

    split, model = data(), network()
    labels = {s: mixup_target(split.labels[:BATCH], 4, 0.3, s).double() for s in (0.0, 0.2)}
    backend = Serial(network(), recipe(label_smoothing=0.2), Accelerator(cpu=True), "contiguous_format")
    (loss,) = backend.step(Split(split.images[:BATCH], labels[0.0]), None, 0.1).tolist()
    logits = model(split.images[:BATCH])
    assert loss == pytest.approx(F.cross_entropy(logits, labels[0.0]).item(), rel=1e-6)
    F.cross_entropy(logits, labels[0.2]).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    pairs = zip(backend.networks[0].parameters(), model.parameters(), strict=True)
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-8) for a, b in pairs)


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_accumulated_gradients_are_those_of_the_whole(parts: int) -> None:
    """In parts of any size, uneven ones too, a step is the step of the minibatch."""
    backend, losses = trained(recipe(accumulate=parts, label_smoothing=0.1))
    whole, expected = trained(recipe(label_smoothing=0.1))
    assert same(backend, [p.detach() for p in whole.networks[0].parameters()])
    assert losses == pytest.approx(expected, rel=1e-12)


def test_gradients_are_clipped() -> None:
    """A step of plain SGD is no longer than rate times the norm asked for, and as long where it was clipped."""
    split, before = data(), network()
    backend = Serial(copy.deepcopy(before), recipe(clip_norm=0.01), Accelerator(cpu=True), "contiguous_format")
    backend.step(split, torch.arange(BATCH), 0.1)
    moved = [a - b for a, b in zip(before.parameters(), backend.networks[0].parameters(), strict=True)]
    assert math.sqrt(sum(m.square().sum().item() for m in moved)) == pytest.approx(0.1 * 0.01, rel=1e-4)


def test_the_average_is_what_is_measured_and_kept() -> None:
    """`ema`: after each step the average moves to the weights by 1 - decay; measures and networks are the average's."""
    split, plain = data(), Serial(network(), recipe(), Accelerator(cpu=True), "contiguous_format")
    backend = Serial(network(), recipe(ema=0.9), Accelerator(cpu=True), "contiguous_format")
    average: list[torch.Tensor] = []
    for indices in torch.arange(len(split)).split(BATCH):
        plain.step(split, indices, 0.1)
        backend.step(split, indices, 0.1)
        now = [p.detach().clone() for p in plain.networks[0].parameters()]
        average = [0.9 * a + 0.1 * b for a, b in zip(average, now, strict=True)] if average else now
    assert same(backend, average)
    expected = F.cross_entropy(backend.networks[0](split.images), split.labels).item()
    assert backend.measure(split)[0].loss == pytest.approx(expected, rel=1e-12)
    assert plain.measure(split)[0].loss != pytest.approx(expected, rel=1e-6)


RICH = {"optimizer": "adamw", "ema": 0.9, "clip_norm": 1.0, "accumulate": 2, "label_smoothing": 0.1}


def test_a_rich_recipe_goes_on_from_its_state() -> None:
    """Weights, moments and average come back: the next steps have the same bits."""
    split, backend = data(), trained(recipe(**RICH))[0]
    held = backend.state()
    saved = State({k: v.clone() for k, v in held.tensors.items()}, json.loads(json.dumps(held.values)))
    other = Serial(network(), recipe(**RICH), Accelerator(cpu=True), "contiguous_format")
    other.restore(saved)
    for indices in torch.arange(len(split)).split(BATCH):
        assert torch.equal(backend.step(split, indices, 0.05), other.step(split, indices, 0.05))
    assert same(other, [p.detach() for p in backend.networks[0].parameters()])


@pytest.mark.parametrize(
    "key", ["ema", "clip_norm", "label_smoothing", "accumulate", "optimizer", "mixup", "lora_rank"]
)
def test_only_plain_recipes_leave_eager_torch(key: str) -> None:
    """What other back-ends do not know is never given to them."""
    rich = recipe(**{key: {"optimizer": "adam", "accumulate": 2, "lora_rank": 4}.get(key, 0.5)})
    assert is_plain(recipe(momentum=0.9, lr_schedule="cosine", max_steps=3)) and not is_plain(rich)
    assert fastest(network(), data(), rich, Accelerator(cpu=True), 1) == SERIAL


# -- a sweep ------------------------------------------------------------------------------------------

SPEC = """
name: rich
grid: {model: lenet5_mini, dataset: synthetic, layers: conv1, ratio: 0.5, pruner: l1, seed: [0, 1]}
dense:   {epochs: 1, batch_size: 64, lr: 0.05, lr_schedule: linear, momentum: 0.9}
retrain:
  - {epochs: 3, batch_size: 64, optimizer: adamw, lr: 0.002, lr_schedule: cosine, warmup_epochs: 1, final_lr: 1.0e-5,
     betas: [0.9, 0.99], weight_decay: 0.05, label_smoothing: 0.1, clip_norm: 1.0, ema: 0.8, accumulate: 2}
  - {epochs: 3, batch_size: 64, optimizer: adam, lr: 0.002, max_steps: 10}
"""


def test_a_sweep_of_rich_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Every key of a recipe goes from the spec to the row; curves are as long as the training was."""
    monkeypatch.chdir(tmp_path)
    Path("rich.yaml").write_text(SPEC)
    assert in_process(capsys, "run", "rich.yaml", "--inline")[0] == 0
    rows = (
        Store("results")
        .sql(
            "select len(epoch_test_accuracy), json_extract_string(recipe, '$.retrain.optimizer'), best_test_accuracy, "
            "json_extract(execution, '$.backend') from rows order by 1, 2"
        )
        .fetchall()
    )
    assert [row[:2] for row in rows] == [(2, "adam")] * 2 + [(3, "adamw")] * 2
    assert all(0 < row[2] <= 1 and row[3] == '"serial"' for row in rows)
