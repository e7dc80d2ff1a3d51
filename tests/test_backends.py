# ruff: noqa: F401, F811
"""The back-ends compute the same: eager torch is the reference, in float64 to 1e-10."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import workers.compiled
from models import MODELS, build_model
from storage.records import Execution, Recipe, Row, Shard
from storage.store import Store
from tests.benchmarks.compute import BATCH, accelerator, gate, network, random_split, resnet20, threads
from tests.test_checkpoints import TASK, copy_of, measured, run_until_stopped, trained
from workers.backends import COMPILED, SERIAL, Wrong, _fleet_or_serial, check_gradient, fastest
from workers.chain import NotAChain, chain_of
from workers.compiled import Compiled, NoCompiler
from workers.datasets import Split
from workers.execution import arithmetic_versions
from workers.fleet import Fleet, NoFleet, evaluation_batch
from workers.serial import Serial
from workers.training import Backend
from workers.worker import Worker, fleets

IMAGE = (1, 32, 32)
RECIPE = Recipe(1, 64, ((0, 0.05),), momentum=0.9, nesterov=True, weight_decay=1e-3)
CHAINS = [name for name in MODELS if name.startswith(("lenet5", "mlp")) and "wider" not in name]


class Normed(nn.Module):
    """What LeNets do not have: batch norm, dropout, a residual sum, a pool by means, padding, stride."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.drop, self.fc = nn.Dropout(0.3), nn.Linear(4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(x + self.bn2(self.conv2(x)))
        return self.fc(self.drop(x.mean((2, 3))))


class Odd(nn.Module):
    """A chain whose pools leave a row and a column out, with kernels of 3 and 1, and a pool before its ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(1, 7, 3), nn.Conv2d(7, 6, 1), nn.Conv2d(6, 11, 3)
        self.fc = nn.Linear(11 * 6 * 6, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.relu(F.max_pool2d(self.conv3(self.conv2(x)), 2))
        return self.fc(torch.flatten(x, 1))


class Small(nn.Module):
    """A convolution, a pool, a layer: for many of them at once, on images [1, 12, 12]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 5, 5), nn.Linear(80, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(F.max_pool2d(F.relu(self.conv(x)), 2).flatten(1))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As workers compute."""
    with threads(1):
        yield


def made(build: Callable[[], nn.Module] | str, n: int, dtype: torch.dtype = torch.float64) -> list[nn.Module]:
    """So many networks of one shape, each with weights of its own; of a model by its name, or what `build` gives."""
    torch.manual_seed(0)
    return [(build_model(build, 10, (1, 32, 32)) if isinstance(build, str) else build()).to(dtype) for _ in range(n)]


def assert_same_training(many: Backend, networks: Sequence[nn.Module], data: Split, recipe: Recipe = RECIPE) -> None:
    """Three steps and a measure give what eager torch gives for each network on its own."""
    alone = [Serial(network, recipe, accelerator(), "contiguous_format") for network in networks]
    for i in range(3):
        indices = torch.randperm(len(data), generator=torch.Generator().manual_seed(i))[:50]
        torch.manual_seed(i)
        losses = many.step(data, indices, 0.05)
        for k, one in enumerate(alone):
            torch.manual_seed(i)
            torch.testing.assert_close(losses[k], one.step(data, indices, 0.05)[0], rtol=1e-10, atol=1e-10)
    for mine, one in zip(many.networks, alone, strict=True):
        for (name, a), b in zip(mine.state_dict().items(), one.networks[0].state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=name)
    for mine, one in zip(many.measure(data), alone, strict=True):
        (other,) = one.measure(data)
        assert (mine.accuracy, mine.n) == (other.accuracy, other.n)
        assert mine.loss == pytest.approx(other.loss, rel=1e-10)
        assert mine.loss_se == pytest.approx(other.loss_se, rel=1e-8)


# -- compiled --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [*CHAINS, Odd, network])
def test_compiled_is_eager(build: Any) -> None:
    """Every chain of the registry, and one with odd sizes: the same training in float64."""
    networks = made(build, 1)
    data = random_split(70, dtype=torch.float64)
    assert_same_training(Compiled(copy.deepcopy(networks[0]), RECIPE, IMAGE), networks, data)


@pytest.mark.parametrize("recipe", [Recipe(1, 64, ((0, 0.05),)), replace(RECIPE, nesterov=False)])
def test_compiled_sgd_is_torchs(recipe: Recipe) -> None:
    """With and without momentum, Nesterov's and the other."""
    networks = made(network, 1)
    backend = Compiled(copy.deepcopy(networks[0]), recipe, IMAGE)
    assert_same_training(backend, networks, random_split(70, dtype=torch.float64), recipe)


def test_a_float32_step_is_eagers_to_rounding() -> None:
    """One step to 1e-6; twenty steps of both sides of the benchmarks agree too."""
    (mine,) = made(network, 1, torch.float32)
    data, other = random_split(BATCH), copy.deepcopy(mine)
    Compiled(mine, RECIPE, IMAGE).step(data, torch.arange(BATCH), 0.01)
    Serial(other, RECIPE, accelerator(), "channels_last").step(data, torch.arange(BATCH), 0.01)
    for a, b in zip(mine.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    gate()


def two_layers(kind: str) -> nn.Module:
    """A chain of fully connected layers of which something is not as usual."""
    first, second = nn.Linear(1024, 10), nn.Linear(10, 10)
    if kind == "twice":
        return nn.Sequential(nn.Flatten(), first, second, second)
    made = nn.Sequential(nn.Flatten(), first, second)
    if kind == "frozen":
        first.requires_grad_(False)
    elif kind == "unused":
        made.register_parameter("more", nn.Parameter(torch.zeros(3)))
    else:
        second.bias = first.bias
    return made


def test_nan_is_seen() -> None:
    """A network whose weights left the finite has a loss that is none, as in torch: it never looks recovered."""
    for where, value in (("conv1.weight", math.nan), ("fc2.bias", math.inf), ("conv2.bias", math.nan)):
        model = build_model("lenet5_mini", 10, (1, 32, 32))
        with torch.no_grad():
            model.get_parameter(where).flatten()[0] = value
        backend, data = Compiled(model, RECIPE, IMAGE), random_split(64)
        assert not math.isfinite(backend.measure(data)[0].loss)
        assert not math.isfinite(backend.step(data, torch.arange(64), 0.01).item())


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ("lenet5_wider_linear_nomaxpool", "conv1 has a stride"),
        (resnet20, "0 has no bias"),
        (Normed, "conv1 has a stride"),
        (lambda: nn.Sequential(nn.Conv2d(1, 2, 7), nn.Flatten(), nn.Linear(2 * 26 * 26, 10)), "a kernel of 7"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(1024, 10), nn.Tanh()), "Tanh"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(1024, 10), nn.ReLU()), "does not end with"),
        (lambda: two_layers("frozen"), "some of its parameters are frozen"),
        (lambda: two_layers("unused"), "parameters that its forward pass does not use"),
        (lambda: two_layers("shared"), "1 and 2 share a parameter"),
        (lambda: two_layers("twice"), "a layer runs twice"),
    ],
)
def test_what_is_no_chain_says_why(model: Any, why: str) -> None:
    """The reason, in words."""
    built = build_model(model, 10, (1, 32, 32)) if isinstance(model, str) else model()
    with pytest.raises(NotAChain, match=why):
        chain_of(built, (3, 32, 32) if model is resnet20 else IMAGE)


@pytest.mark.parametrize(
    ("was", "now"),
    [
        ("(labels[samples[lane]] == k)", "-(labels[samples[lane]] == k)"),
        ("gradients[l.bias + o] += total", "gradients[l.bias + o] -= total"),
        ("sums[n][j] += by[", "sums[n][j] -= by["),
        ("squared - 1 - q]", "q]"),
    ],
)
def test_a_wrong_gradient_is_found(was: str, now: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sign flipped anywhere in the compiled gradient: it is refused with the reason, and eager torch is chosen."""
    change_code(monkeypatch, tmp_path, was, now)
    model, data = network(), random_split(BATCH)
    with pytest.raises(Wrong, match="is off by"):
        check_gradient(model, data)
    found = fastest(model, data, RECIPE, accelerator(), 1)
    assert found == {**SERIAL, "fallback": found["fallback"]}
    assert found["fallback"].startswith("in compiled code the gradient of")


@pytest.mark.parametrize("build", [network, Odd])
def test_no_minibatch_rejects_a_right_gradient(build: Callable[[], nn.Module]) -> None:
    """Networks with max-pools on many minibatches, each with weights of its own."""
    for i in range(12):
        torch.manual_seed(i)
        check_gradient(build(), random_split(100 + i))


class Mirrored(nn.Module):
    """A filter that is its own mirror image to float32's last digits, over an image that is its own mirror image: the
    pool's windows in the middle compare two numbers that differ by less than float32 rounds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc = nn.Conv2d(1, 6, 5), nn.Linear(6 * 14 * 13, 10)
        with torch.no_grad():
            weight = self.conv.weight
            weight.copy_(weight + weight.flip(3))
            weight[..., 0] *= 1 + 2**-22

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(F.max_pool2d(F.relu(self.conv(x)), 2).flatten(1))


def test_an_argument_that_rounding_changes_is_not_a_wrong_gradient() -> None:
    """In float32 both sides choose other arguments of a max-pool; the check passes all the same."""
    model, data = Mirrored(), random_split(BATCH, (1, 32, 30))
    data.images[:8] += data.images[:8].flip(3)
    eager = copy.deepcopy(model)
    F.cross_entropy(eager(data.images), data.labels).backward()
    compiled = Compiled(copy.deepcopy(model), Recipe(1, BATCH, ((0, 1.0),)), (1, 32, 30))
    compiled.step(data, None, 1.0)
    right = eager.conv.weight.grad
    assert right is not None
    found = model.conv.weight - compiled.networks[0].get_parameter("conv.weight")
    assert (found - right).abs().max() > 1e-3 * right.abs().max()
    check_gradient(model, data)


def test_float32_that_is_not_the_same_code_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault in float32 alone."""
    right = "(labels[samples[lane]] == k)"
    change_code(monkeypatch, tmp_path, right, f"(sizeof(real) == 8 ? {right} : !{right})")
    with pytest.raises(Wrong, match="float32 gradient is off in 8 of 8 parts"):
        check_gradient(network(), random_split(BATCH))


NO_COMPILER = "no C++ compiler (c++, g++ or clang++) on PATH, nor in CXX"


def change_code(monkeypatch: pytest.MonkeyPatch, folder: Path, was: str, now: str) -> None:
    """Let the compiled code be another for this test, built in little time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    text = workers.compiled.SOURCE.read_text()
    assert text.count(was) == 1
    (folder / "chain.cpp").write_text(text.replace(was, now))
    monkeypatch.setattr(workers.compiled, "SOURCE", folder / "chain.cpp")
    monkeypatch.setattr(workers.compiled, "FLAGS", tuple(f.replace("-O3", "-O1") for f in workers.compiled.FLAGS))
    forget_code(monkeypatch)


def forget_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let compiler and code be looked for anew, for this test alone."""
    for name in ("compiler", "code", "library"):
        monkeypatch.setattr(workers.compiled, name, getattr(workers.compiled, name).__wrapped__)


def test_without_a_compiler_there_is_eager_torch(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trained: Store,
) -> None:
    """No compiler: rows all the same, with the reason, which each worker reports; and the choice is noted apart from
    that of other machines."""
    store = copy_of(trained)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    forget_code(monkeypatch)
    with pytest.raises(NoCompiler, match="no C\\+\\+ compiler"):
        workers.compiled.compiler()
    for task in (TASK, replace(TASK, candidate=8)):  # the second finds the choice noted
        worker = Worker(store, "none")
        (row,) = worker.run_shard(Shard("s0", (task,)))
        assert row.status == "done", row.error
        execution = Execution.from_json(str(row.execution))
        assert (execution.backend, execution.fallback) == ("serial", NO_COMPILER)
        assert worker.take_messages() == [
            "eager torch trains lenet5_mini on synthetic with conv1 0.4, conv2 0.4 removed, several times slower: "
            + NO_COMPILER
        ]
    monkeypatch.undo()
    (other,) = Worker(copy_of(trained), "none").run_shard(Shard("s0", (TASK,)))
    assert Execution.from_json(str(other.execution)).backend == "compiled"
    assert '"fallback"' not in str(other.execution)


def test_the_choice_on_a_processor() -> None:
    """What wins is chosen: compiled code for a small chain, eager torch for what is no chain."""
    data = random_split(BATCH)
    assert fastest(network(), data, RECIPE, accelerator(), 64) == COMPILED
    assert fastest(Normed(), data, RECIPE, accelerator(), 64) == SERIAL


# -- fleets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 64, 252])
def test_a_fleet_of_any_size_is_eager(size: int) -> None:
    """Each member of a fleet trains as if it were alone."""
    networks = made(Small, size)
    fleet = Fleet(copy.deepcopy(networks), RECIPE, accelerator())
    assert_same_training(fleet, networks, random_split(52, (1, 12, 12), torch.float64))


@pytest.mark.parametrize("build", [*CHAINS, "lenet5_wider_linear_nomaxpool", Normed, Odd])
def test_every_model_is_a_fleet(build: Any) -> None:
    """Every model of the registry, and what they do not have: batch norm with running statistics, dropout."""
    networks = made(build, 2)
    fleet = Fleet(copy.deepcopy(networks), RECIPE, accelerator())
    assert_same_training(fleet, networks, random_split(60, dtype=torch.float64))


def test_a_residual_network_is_a_fleet() -> None:
    networks = made(resnet20, 2)
    fleet = Fleet(copy.deepcopy(networks), RECIPE, accelerator())
    assert_same_training(fleet, networks, random_split(8, (3, 16, 16), torch.float64))


def test_members_do_not_see_each_other() -> None:
    """Bit for bit the same member, whoever its neighbours are; one that is NaN leaves the others as they were."""
    mine, *others = made(network, 5, torch.float32)
    poisoned = copy.deepcopy(others)
    with torch.no_grad():
        poisoned[1].get_parameter("0.weight").fill_(math.nan)
    data, ends = random_split(BATCH), []
    for neighbours in (others, copy.deepcopy(others[::-1]), poisoned):
        fleet = Fleet([*neighbours[:2], copy.deepcopy(mine), *neighbours[2:]], RECIPE, accelerator())
        losses = [fleet.step(data, torch.arange(BATCH), 0.05)[2] for _ in range(3)]
        ends.append([*losses, *fleet.networks[2].state_dict().values()])
    for end in ends[1:]:
        assert all(map(torch.equal, end, ends[0]))


@pytest.mark.parametrize(
    ("members", "shape", "device", "samples"),
    [
        (252, (1, 32, 32), "cpu", 4),
        (1, (1, 32, 32), "cpu", 1024),
        (16, (1, 32, 32), "cpu", 64),
        (252, (1, 32, 32), "cuda", 260),
        (252, (3, 32, 32), "cuda", 86),
        (16, (3, 224, 224), "cuda", 27),
        (256, (3, 224, 224), "cuda", 4),
    ],
)
def test_samples_of_an_evaluation_are_chosen_by_bytes(
    members: int, shape: tuple[int, ...], device: str, samples: int
) -> None:
    assert evaluation_batch(members, 4 * math.prod(shape), device) == samples


def test_a_fleet_is_evaluated_in_batches_of_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """On this processor and, as if it were one, on an accelerator: the same measures, in fewer calls."""
    fleet, data = Fleet(made(Small, 64), RECIPE, accelerator()), random_split(150, (1, 12, 12), torch.float64)
    sizes, logits, found = list[int](), fleet._logits, []

    def counted(images: torch.Tensor) -> torch.Tensor:
        sizes.append(len(images))
        return logits(images)

    monkeypatch.setattr(fleet, "_logits", counted)
    for budget, expected in ((4 * 2**20, [56, 56, 38]), (256 * 2**20, [150])):
        monkeypatch.setattr("workers.fleet.CPU_BYTES", budget)
        found.append(fleet.measure(data))
        assert sizes == expected
        sizes.clear()
    for one, other in zip(*found, strict=True):
        assert (one.accuracy, one.n) == (other.accuracy, other.n)
        assert one.loss == pytest.approx(other.loss, rel=1e-12)


class Slow(nn.Module):
    """An operation that vmap has no rule for."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(1024, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        lengths = torch.tensor([len(x)]), torch.tensor([1])
        return F.ctc_loss(self.fc(x.flatten(1)).log_softmax(1)[:, None], torch.ones(1, 1).long(), *lengths)


def test_a_silent_slow_path_is_an_error() -> None:
    """What vmap would run network by network is refused with the reason."""
    fleet = Fleet(made(Slow, 2, torch.float32), RECIPE, accelerator())
    with pytest.raises(NoFleet, match=r"batching rule|vmap"):
        fleet._logits(random_split(5).images)


def test_what_cannot_be_a_fleet_says_why() -> None:
    mixed = [network(), nn.Sequential(nn.Conv2d(1, 6, 5), *list(network())[1:])]
    with pytest.raises(NoFleet, match="not of one shape"):
        Fleet(mixed, RECIPE, accelerator())
    scaled = accelerator()
    scaled.scaler = object()
    with pytest.raises(NoFleet, match="loss scale"):
        Fleet([network()], RECIPE, scaled)


# -- fleets in a worker ----------------------------------------------------------------------------------

FLEET_OF_4 = Execution("fleet", 4, 1, "contiguous_format", "any", arithmetic_versions())
TASKS = tuple(replace(TASK, candidate=c, seed=s) for c in range(6) for s in (0, 1))


def run(store: Store, tasks: Sequence[Any], **given: Any) -> dict[str, Row]:
    """The rows of tasks, run as one shard in fleets of four."""
    shard = Shard("s0", tuple(tasks), keep="last", block=6)
    return {row.task_id: row for row in Worker(store, "none", fixed=FLEET_OF_4, **given).run_shard(shard)}


@pytest.fixture(scope="module")
def whole(trained: Store) -> dict[str, Row]:
    """The rows of all tasks, run in one go."""
    return run(copy_of(trained), TASKS)


def test_fleets_are_blocks_of_candidates() -> None:
    assert [[(t.candidate, t.seed) for t in fleet] for fleet in fleets(TASKS, 4)] == [
        [(c, s) for c in block] for block in ((0, 1, 2, 3), (4, 5)) for s in (0, 1)
    ]


def test_rows_of_a_fleet_are_those_of_serial(whole: dict[str, Row], trained: Store) -> None:
    """Before retraining to rounding, after it nearly: the same networks on the same minibatches."""
    serial = Worker(copy_of(trained), "none", fixed=replace(FLEET_OF_4, backend="serial", fleet=1))
    for row in serial.run_shard(Shard("s0", TASKS)):
        other = whole[row.task_id]
        assert (other.removed, other.status) == (row.removed, "done")
        assert other.pruned_train_loss == pytest.approx(row.pruned_train_loss, rel=1e-5)
        assert other.last_test_loss == pytest.approx(row.last_test_loss, rel=1e-2)


def test_a_resumed_fleet_repeats_itself(whole: dict[str, Row], trained: Store) -> None:
    """Members that are done, or were never asked for, are padding: each row is the same, bit for bit."""
    store = copy_of(trained)
    rows = run(store, TASKS[3:4]) | run(store, TASKS[:7]) | run(store, TASKS)
    assert rows.keys() == whole.keys()
    for task_id, row in rows.items():
        assert measured(row) == measured(whole[task_id])


def test_a_stopped_fleet_goes_on(whole: dict[str, Row], trained: Store) -> None:
    """From its one checkpoint, to the same rows."""
    store, shard = copy_of(trained), Shard("s0", TASKS[:8], keep="last", block=6)
    for after in (17, 20):
        assert run_until_stopped(store, shard, after, FLEET_OF_4) == []
        assert len(store.scratch.checkpoints()) == 1
    rows = run_until_stopped(store, shard, 10**6, FLEET_OF_4)
    assert len(rows) == 8 and store.scratch.checkpoints() == []
    for row in rows:
        assert measured(row) == measured(whole[row.task_id])


def test_what_breaks_one_member_breaks_no_other(
    whole: dict[str, Row],
    trained: Store,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A task that fails in a fleet gets its failed row; the others are run, each for itself, to the same rows."""
    import workers.task

    prune = workers.task.prune_task

    def broken(task: Any, *rest: Any) -> Any:
        if task.candidate == 1:
            raise ValueError("not this one")
        return prune(task, *rest)

    monkeypatch.setattr(workers.task, "prune_task", broken)
    rows = run(copy_of(trained), TASKS)
    assert {row.task().candidate for row in rows.values() if row.status == "failed"} == {1}
    for task_id, row in rows.items():
        if row.status == "done":
            assert measured(row) == measured(whole[task_id])


def test_the_fleet_halves_until_it_fits(trained: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory while it is timed, and again at work: half the fleet, noted for the next; every row is done."""
    tried: list[int] = []
    step = Fleet.step

    def short(self: Fleet, *arguments: Any) -> torch.Tensor:
        tried.append(len(self.networks))
        if len(self.networks) > (4 if len(tried) < 30 else 2):  # after a while something else takes the memory
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, *arguments)

    monkeypatch.setattr(Fleet, "step", short)
    monkeypatch.setattr(Worker, "_has_accelerator", lambda _: True)
    monkeypatch.setattr("workers.backends._compiled_or_serial", lambda n, b, r, a: _fleet_or_serial(n, b, r, a, 6))
    monkeypatch.setattr("workers.backends.WINS_BY", 0.0)
    store = copy_of(trained)
    rows = list(Worker(store, "none").run_shard(Shard("s0", TASKS[:8], block=6)))
    assert {row.status for row in rows} == {"done"} and len(rows) == 8
    assert tried[0] == 6 and tried[1] == 3 and tried[-1] == 1
    assert Execution.from_json(str(rows[-1].execution)).fleet == 1
