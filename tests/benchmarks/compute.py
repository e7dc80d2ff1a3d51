"""Training: prunesweep's back-ends against the loops a person would write. Needs torch and numpy; the plain loop
torchvision, the Accelerate loop accelerate."""

from __future__ import annotations

import contextlib
import copy
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from storage.records import Recipe
from tests.benchmarks.harness import PAIRS, Figure, pairs, ratios, seconds
from workers.backends import check_gradient
from workers.compiled import Compiled
from workers.datasets import Split
from workers.fleet import Fleet
from workers.serial import Serial
from workers.training import minibatches

CORES = 2
EPOCHS = 30
BATCH = 256
IMAGE = (1, 32, 32)
RECIPE = Recipe(EPOCHS, BATCH, ((0, 0.001), (20, 0.0001)), momentum=0.9, weight_decay=1e-4)


def network() -> nn.Sequential:
    """lenet5_mini with conv1 pruned by 0.5, as anyone would write it."""
    return nn.Sequential(
        *(nn.Conv2d(1, 5, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(5, 10, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(10, 10, 5), nn.ReLU(), nn.Flatten(), nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 10)),
    )


def random_split(n: int, shape: Sequence[int] = IMAGE, dtype: torch.dtype = torch.float32) -> Split:
    """Images and labels of nothing: a step costs the same as on real ones."""
    draw = torch.Generator().manual_seed(n)
    images = torch.randn(n, *shape, generator=draw).to(dtype)
    return Split(images, torch.randint(10, (n,), generator=draw))


def accelerator(device: str = "cpu") -> Any:
    """What a back-end needs of Accelerate, for one process in float32."""
    return SimpleNamespace(
        device=torch.device(device),
        scaler=None,
        num_processes=1,
        mixed_precision="no",
        autocast=contextlib.nullcontext,
        backward=lambda loss: loss.backward(),
    )


@contextlib.contextmanager
def threads(n: int) -> Iterator[None]:
    """With so many threads in torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# -- whole epochs, on all cores ------------------------------------------------------------------------


def plain_epoch(root: str, epochs: int = 1) -> dict[str, float]:
    """The plain loop: PIL transforms per sample, a DataLoader with 2 workers, one network. Seconds of an epoch:
    `train`, and of the evaluation on the test set and on the train set after it."""
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    steps = [transforms.Resize((32, 32)), transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))]
    train, test = (datasets.MNIST(root, train=t, transform=transforms.Compose(steps)) for t in (True, False))
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9, weight_decay=1e-4)

    def fit() -> None:
        model.train()
        for images, labels in DataLoader(train, BATCH, shuffle=True, num_workers=2):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()

    @torch.no_grad()
    def evaluate(dataset: Any) -> None:
        model.eval()
        correct, loss = 0, 0.0
        for images, labels in DataLoader(dataset, BATCH, num_workers=2):
            logits = model(images)
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            correct += int((logits.argmax(1) == labels).sum())

    found = {"train": 0.0, "test": 0.0, "train_set": 0.0}
    for _ in range(epochs):
        for name, work in (
            ("train", fit),
            ("test", lambda: evaluate(test)),
            ("train_set", lambda: evaluate(train)),
        ):
            found[name] += seconds(work) / epochs
    return found


_held: dict[str, Any] = {}


def _hold(backend: str, n: int) -> None:
    """In a process of its own: data, and a back-end, as a worker holds them."""
    torch.set_num_threads(1)
    _held["train"], _held["test"] = random_split(n), random_split(n // 6)
    _held["open"] = BACKENDS[backend]


def _best_loop(model: nn.Module, train: Split, test: Split) -> None:
    """The best serial loop we know to write in eager torch: in memory, channels-last, fused SGD, small batches."""
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9, weight_decay=1e-4, fused=True)
    for indices in torch.randperm(len(train)).split(BATCH):
        optimizer.zero_grad()
        F.cross_entropy(model(train.images[indices]), train.labels[indices]).backward()
        optimizer.step()
    with torch.no_grad():
        for images, labels in zip(test.images.split(BATCH), test.labels.split(BATCH), strict=True):
            (model(images).argmax(1) == labels).sum()


def _our_loop(model: nn.Module, train: Split, test: Split) -> None:
    backend = Compiled(model, RECIPE, IMAGE)
    for indices in minibatches(len(train), BATCH, "synthetic", 0, "benchmark"):
        backend.step(train, indices, 0.001)
    backend.measure(test)
    backend.close()


BACKENDS: dict[str, Callable[[nn.Module, Split, Split], None]] = {"best": _best_loop, "ours": _our_loop}


def _epoch(_: int) -> None:
    _held["open"](network(), _held["train"], _held["test"])


class Workers:
    """One single-threaded process per core, each with its data; they train one network each, at once."""

    def __init__(self, backend: str, n: int) -> None:
        self._pool = ProcessPoolExecutor(CORES, get_context("spawn"), _hold, (backend, n))

    def epoch(self) -> float:
        """Seconds per network: an epoch of training and its evaluation, on the whole machine."""
        return seconds(lambda: list(self._pool.map(_epoch, range(CORES)))) / CORES

    def close(self) -> None:
        self._pool.shutdown()


def gate() -> None:
    """Both sides of the comparisons compute the same: the gradient, and twenty steps."""
    torch.manual_seed(0)
    model, data = network(), random_split(5 * BATCH)
    check_gradient(model, random_split(BATCH))
    ours, serial = Compiled(copy.deepcopy(model), RECIPE, IMAGE), Serial(model, RECIPE, accelerator(), "channels_last")
    for epoch in range(4):
        for indices in minibatches(len(data), BATCH, "synthetic", epoch, "gate"):
            torch.testing.assert_close(ours.step(data, indices, 0.01), serial.step(data, indices, 0.01))


def networks_per_hour(n: int = 60_000, number: int = PAIRS) -> Iterator[Figure]:
    """lenet5_mini conv1 0.5 on MNIST, the whole machine: prunesweep against the plain loop."""
    root = os.environ.get("PRUNESWEEP_DATA_ROOT", "data")
    gate()
    workers = Workers("ours", n)
    plain: list[dict[str, float]] = []

    def a_plain_epoch() -> float:
        plain.append(plain_epoch(root))
        return sum(plain[-1].values())

    measured = pairs(workers.epoch, a_plain_epoch, number)
    workers.close()
    less = [(ours, p["train"] + p["test"]) for (ours, _), p in zip(measured, plain[1:], strict=True)]
    notes = {"seconds_per_epoch": [ours for ours, _ in measured], "plain": plain[1:]}
    what = "networks per hour, vs the plain loop"
    yield Figure("networks_per_hour", what, "x", ratios(measured), 15, 30, more=True, notes=notes)
    yield Figure("networks_per_hour_2", f"{what} without its train-set pass", "x", ratios(less), 15, 30, more=True)


def best_serial_loop(n: int = 60_000, number: int = PAIRS) -> Iterator[Figure]:
    """The same against the best serial torch loop, one single-threaded process per core."""
    gate()
    ours, best = Workers("ours", n), Workers("best", n)
    found = ratios(pairs(ours.epoch, best.epoch, number))
    ours.close(), best.close()
    yield Figure("best_serial_loop", "the same, vs the best serial torch loop", "x", found, 1.3, 2, more=True)


# -- steps, on one core --------------------------------------------------------------------------------


def step_seconds(backend: Any, data: Split, steps: int) -> float:
    """Seconds per optimizer step of a back-end, per network."""
    order = torch.arange(steps * BATCH) % len(data)
    chunks = order.to(data.labels.device).split(BATCH)

    def work() -> None:
        losses = [backend.step(data, indices, 0.001) for indices in chunks]
        losses[-1].tolist()

    return seconds(work) / steps / len(backend.networks)


def sgemm_rate(n: int = 2048) -> float:
    """FLOP per second of a square product in float32, with torch's threads as they are."""
    a, b = torch.randn(n, n), torch.randn(n, n)
    a @ b
    return 2 * n**3 / min(seconds(lambda: a @ b) for _ in range(3))


def flop_per_step(model: nn.Module) -> float:
    """Of forward and backward on a minibatch, by torch's counter."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(model(torch.randn(BATCH, *IMAGE)), torch.zeros(BATCH).long()).backward()
    return counter.get_total_flops()


def step(steps: int = 20, number: int = PAIRS) -> Iterator[Figure]:
    """One step on one core: against eager, and as a share of what the machine can multiply."""
    gate()
    data = random_split(20 * BATCH)
    with threads(1):
        ours, model = Compiled(network(), RECIPE, IMAGE), network()
        eager = Serial(model, RECIPE, accelerator(), "contiguous_format")
        last = Serial(copy.deepcopy(model), RECIPE, accelerator(), "channels_last")
        fleet = Fleet([network() for _ in range(16)], RECIPE, accelerator())
        for other, what in ((eager, "eager"), (last, "eager, channels-last"), (fleet, "a torch.func fleet of 16")):
            few = max(1, steps // len(other.networks))
            found = pairs(lambda: step_seconds(ours, data, steps), lambda: step_seconds(other, data, few), number)  # noqa: B023
            notes = {"ms": [(a * 1e3, b * 1e3) for a, b in found]}
            yield Figure("step", f"a step on one core, vs {what}", "x", ratios(found), more=True, notes=notes)
        flop = flop_per_step(network())
        shares = tuple(flop / step_seconds(ours, data, steps) / sgemm_rate() for _ in range(number))
        tflop = flop * 235 * EPOCHS / 1e12
        what = f"share of sgemm's rate ({tflop:.1f} TFLOP a network of {EPOCHS} epochs)"
        yield Figure("sgemm_share", what, "", shares, more=True)


def input_pipeline(n: int = 60_000, number: int = PAIRS) -> Iterator[Figure]:
    """What minibatches cost, over the steps: drawing the order, and a step of a single neuron, which is little
    more than fetching the samples."""
    data, neuron = random_split(n), nn.Sequential(nn.Flatten(), nn.Linear(1024, 1))
    nothing = Split(data.images, torch.zeros_like(data.labels))
    with threads(1):
        backend, fetching = Compiled(network(), RECIPE, IMAGE), Compiled(neuron, RECIPE, IMAGE)

        def fetch() -> float:
            return seconds(lambda: [fetching.step(nothing, i, 0.0) for i in batches()]) / (n // BATCH)

        def batches() -> Iterator[torch.Tensor]:
            return minibatches(n, BATCH, "synthetic", 0, "benchmark")

        found = pairs(fetch, lambda: step_seconds(backend, data, min(60, n // BATCH)), number)
    shares = tuple(a / b for a, b in found)
    yield Figure("input_pipeline", "input pipeline, share of a training step", "", shares, 0.05, 0.03)


# -- a residual network ----------------------------------------------------------------------------------


class Block(nn.Module):
    """Of a CIFAR ResNet (He et al. 2016, section 4.2), shortcut A."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(into, out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(out), nn.BatchNorm2d(out)
        self.stride, self.more = stride, out - into

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more))
        return F.relu(y + shortcut)


def resnet20() -> nn.Sequential:
    """Three stages of three blocks; 0.27 million parameters."""
    widths = [16] * 3 + [32] * 3 + [64] * 3
    blocks = [Block(a, b, 1 + (a != b)) for a, b in zip([16, *widths], widths, strict=False)]
    stem = (nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def _residual_steps(steps: int) -> None:
    torch.set_num_threads(1)
    data = _held.setdefault("cifar", random_split(2 * BATCH, (3, 32, 32)))
    backend = Serial(resnet20(), RECIPE, accelerator(), "channels_last")
    for indices in minibatches(steps * 128, 128, "synthetic", 0, "benchmark"):
        backend.step(data, indices % len(data), 0.01)


def residual(steps: int = 6, number: int = PAIRS) -> Iterator[Figure]:
    """resnet20 on CIFAR-shaped tensors: two single-threaded workers against an Accelerate loop, data in memory."""
    from accelerate import Accelerator
    from torch.utils.data import DataLoader, TensorDataset

    accelerate = Accelerator(cpu=True)
    data = random_split(steps * 128, (3, 32, 32))

    def loop() -> float:
        model = resnet20()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
        loader = DataLoader(TensorDataset(data.images, data.labels), 128, shuffle=True)
        model, optimizer, loader = accelerate.prepare(model, optimizer, loader)

        def work() -> None:
            for images, labels in loader:
                optimizer.zero_grad()
                accelerate.backward(F.cross_entropy(model(images), labels))
                optimizer.step()

        return seconds(work)

    pool = ProcessPoolExecutor(CORES, get_context("spawn"))
    ours = lambda: seconds(lambda: list(pool.map(_residual_steps, [steps] * CORES))) / CORES  # noqa: E731
    with threads(CORES):
        found = ratios(pairs(ours, loop, number))
    pool.shutdown()
    yield Figure("residual", "resnet20, vs an Accelerate loop in memory", "x", found, 1.2, 1.5, more=True)


# -- a fleet on a GPU --------------------------------------------------------------------------------------


def gpu_fleet(members: int = 252, steps: int = 50, number: int = PAIRS) -> Iterator[Figure]:
    """252 candidates of lenet5_mini conv1 0.5 as one fleet: against eager, one after the other, and CUDA-graphed.

    Nothing where there is no GPU.
    """
    if not torch.cuda.is_available():
        return
    cuda = accelerator("cuda")
    data = random_split(60_000).to(cuda.device)
    fleet = Fleet([network() for _ in range(members)], RECIPE, cuda)
    eager = Serial(network(), RECIPE, cuda, "contiguous_format")
    graphed = Graphed(network().cuda(), data)
    for other, what, least in ((eager, "eager", 50), (graphed, "CUDA-graphed", 10)):
        found = pairs(lambda: step_seconds(fleet, data, steps), lambda: step_seconds(other, data, steps), number)  # noqa: B023
        yield Figure("gpu_fleet", f"a fleet of {members}, vs {what}", "x", ratios(found), least, more=True)
    whole = []
    for _ in range(3):
        start = time.perf_counter()
        for indices in minibatches(60_000, BATCH, "synthetic", 0, "benchmark"):
            fleet.step(data, indices.to(cuda.device), 0.001)
        fleet.measure(data.at(torch.arange(10_000, device=cuda.device)))
        whole.append((time.perf_counter() - start) * EPOCHS / members)
    yield Figure("gpu_network", "a network of 30 epochs, in a fleet", "s", tuple(whole), 0.3)


class Graphed:
    """One network whose step is a CUDA graph: what a careful person would write for one at a time."""

    def __init__(self, model: nn.Module, data: Split) -> None:
        self.networks = [model]
        self._images, self._labels = data.images[:BATCH].clone(), data.labels[:BATCH].clone()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9, weight_decay=1e-4)

        def once() -> torch.Tensor:
            optimizer.zero_grad(set_to_none=True)
            loss = F.cross_entropy(model(self._images), self._labels)
            loss.backward()
            optimizer.step()
            return loss

        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                once()
        torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._loss = once()

    def step(self, split: Split, indices: torch.Tensor, _: float) -> torch.Tensor:
        """Copy a minibatch in, replay."""
        self._images.copy_(split.images[indices])
        self._labels.copy_(split.labels[indices])
        self._graph.replay()
        return self._loss
