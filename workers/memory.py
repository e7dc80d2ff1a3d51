"""How much memory of a GPU a worker's process takes: estimated before any is started, so that several fit on one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from usercode import is_code

if TYPE_CHECKING:
    from torch import nn

    from storage.records import Recipe, Shard

FLOAT = 4
"""Bytes of a number. Half precision keeps its weights in float32; its smaller activations are not counted on."""

CONTEXT_BYTES = 1 << 29
"""What CUDA and its libraries take in each process before anything is computed."""

WORKSPACE_BYTES = 1 << 28
"""What convolutions and matrix products are given to work in."""

LOOSE = 1.2
"""So many times what is in use does torch's allocator hold, in blocks it can fill no better."""

EVALUATION_BATCH = 1000


def keep_to_part(part: float) -> None:
    """Let this process take no more of its GPU's memory: what goes over it fails here, and not in a neighbour."""
    import torch

    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(max(0.01, part - CONTEXT_BYTES / total))


@dataclass(frozen=True)
class Size:
    """Of a network: its parameters; for one sample the numbers that all its modules put out, and those of the two
    widest, which are there at once when it is only evaluated."""

    parameters: int
    activations: int
    widest: int


@dataclass(frozen=True)
class Load:
    """What a process has on the device at its worst: `members` networks in training on one minibatch, samples held
    there, and for each parameter so many numbers more than itself and its gradient."""

    size: Size
    members: int
    batch: int
    held_bytes: int
    states: int


def needed(load: Load) -> int:
    """Bytes of device memory of a process.

    Weights, gradients and the optimizer's states of each member; its activations twice, for what is kept for the
    backward pass and the gradients on the way; or what a large evaluation batch needs, if that is more.
    """
    size = load.size
    weights = load.members * size.parameters * (2 + load.states)
    training = load.members * load.batch * size.activations * 2
    evaluation = EVALUATION_BATCH * size.widest
    used = FLOAT * (weights + max(training, evaluation)) + load.held_bytes
    return CONTEXT_BYTES + WORKSPACE_BYTES + int(LOOSE * used)


def states(recipe: Recipe) -> int:
    """Numbers kept for each parameter besides its gradient: by the optimizer, and a moving average."""
    by_optimizer = (1 if recipe.momentum else 0) if recipe.optimizer == "sgd" else 2
    return by_optimizer + (1 if recipe.ema else 0)


def shard_bytes(shards: Iterable[Shard], data_root: str) -> int | None:
    """Bytes of device memory that the largest of `shards` takes; None where nobody can tell before it runs, as of
    networks of transformers."""
    found = [needed(load) for load in set(_loads(shards, data_root))] if (shards := list(shards)) else []
    names = {shard.needs.model for shard in shards}
    return None if not found or any(name.startswith("hf/") for name in names) else max(found)


def _loads(shards: Iterable[Shard], data_root: str) -> Iterable[Load]:
    from workers.backends import LARGEST, is_plain
    from workers.datasets import find_dataset

    seen: dict[tuple[Any, ...], None] = {}
    for shard in shards:
        dense, cell = shard.needs, None if shard.dense else shard.tasks[0].cell
        if cell is None:
            seen[dense.model, dense.dataset, dense.recipe, 1, 0] = None
            continue
        together = cell.schedule == "one-shot" and cell.granularity != "weight" and is_plain(cell.retrain)
        members = min(shard.block, LARGEST) if together else 1
        seen[dense.model, dense.dataset, cell.retrain, members, cell.calibration] = None
    for model, name, recipe, members, calibration in seen:
        if model.startswith("hf/"):
            continue
        dataset = find_dataset(name, data_root)
        channels, height, width = dataset.shape
        sample = FLOAT * channels * height * width + 8
        held = sample * (dataset.train_size + dataset.test_size if is_held(name) else 2 * recipe.batch_size)
        size = network_size(model, dataset.classes, dataset.shape)
        batch = max(recipe.batch_size, -(-calibration // members))
        yield Load(size, members, batch, held, states(recipe))


def is_held(dataset: str) -> bool:
    """Whether a data set's samples are on the device as long as a worker lives; files are read as they are needed."""
    return ":" not in dataset and dataset != "imagenet" if not is_code(dataset) else True


def network_size(name: str, classes: int, shape: tuple[int, int, int]) -> Size:
    """The size of a network for samples of a shape. Built on no device where it can be. Raises ValueError."""
    import torch

    from models import build_model

    problem = ""
    for device in ("meta", "cpu"):
        try:
            with torch.random.fork_rng(devices=[]), torch.device(device):
                return _measured(build_model(name, classes, shape), torch.zeros(1, *shape))
        except Exception as error:  # of the network's own code: a device with numbers may do
            problem = str(error)
    raise ValueError(f"{name}: {problem}")


def _measured(network: nn.Module, sample: Any) -> Size:
    import torch

    outputs: list[int] = [sample.numel()]

    def note(_: object, __: object, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            outputs.append(output.numel())

    for module in network.modules():
        if not list(module.children()):
            module.register_forward_hook(note)
    with torch.no_grad():
        network.eval()(sample)
    parameters = sum(p.numel() for p in network.parameters())
    return Size(parameters, sum(outputs), sum(sorted(outputs)[-2:]))
