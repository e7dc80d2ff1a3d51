"""The back-ends by name: which can run a network, which is fastest, and how one is opened."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from storage.records import Recipe
from workers.datasets import first
from workers.serial import Serial

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

    from storage.records import Execution
    from workers.datasets import Samples, Split
    from workers.training import Backend

SERIAL = {"backend": "serial", "fleet": 1, "threads": 1, "memory_format": "channels_last"}
COMPILED = {"backend": "compiled", "fleet": 1, "threads": 1, "memory_format": "contiguous_format"}
FLEET = {"backend": "fleet", "threads": 1, "memory_format": "contiguous_format"}
LARGEST = 256
PAIRS, STEPS = 3, 2
WINS_BY = 1.1
"""So many times faster than serial must a back-end be timed to be chosen."""
TOLERANCE = 1e-3
"""Of a gradient's largest component: more than this between two back-ends is no rounding, in float32."""


class Wrong(Exception):
    """A back-end does not compute what eager torch does."""


def open_backend(
    execution: Execution, networks: Sequence[nn.Module], recipe: Recipe, accelerator: Accelerator, shape: Sequence[int]
) -> Backend:
    """The back-end of an execution with these networks, for samples of a shape [C, H, W]."""
    if execution.backend == "fleet":
        from workers.fleet import Fleet

        return Fleet(networks, recipe, accelerator)
    (network,) = networks
    if execution.backend == "compiled":
        from workers.compiled import Compiled

        return Compiled(network, recipe, tuple(shape))
    return Serial(network, recipe, accelerator, execution.memory_format)


def fastest(
    network: nn.Module,
    train: Samples,
    recipe: Recipe,
    accelerator: Accelerator,
    block: int,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """The choice for a network's shape on this device, found by timing it against serial; fleets of at
    most `block`.

    On a CPU that is the compiled back-end where a network is a chain (a fleet by torch.func only loses
    there: docs/performance.md); on an accelerator a fleet, its size halved until it fits the memory.
    """
    if not is_plain(recipe):
        return SERIAL
    batch = first(train, recipe.batch_size)
    if isinstance(batch.images, Mapping):  # text with images: neither chains nor fleets read it
        return SERIAL
    if accelerator.device.type == "cpu":
        return _compiled_or_serial(network, batch, recipe, accelerator, report)
    return _fleet_or_serial(network, batch, recipe, accelerator, min(block, LARGEST))


def is_plain(recipe: Recipe) -> bool:
    """Whether a recipe is SGD on the mean cross-entropy and no more: what back-ends other than serial know."""
    return recipe == Recipe(
        recipe.epochs,
        recipe.batch_size,
        recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
        seed=recipe.seed,
        lr_schedule=recipe.lr_schedule,
        warmup_epochs=recipe.warmup_epochs,
        final_lr=recipe.final_lr,
        max_steps=recipe.max_steps,
        augment=recipe.augment,
        weights=recipe.weights,
    )


def _compiled_or_serial(
    network: nn.Module, batch: Split, recipe: Recipe, accelerator: Accelerator, report: Callable[[str], None]
) -> dict[str, Any]:
    if why := why_not_compiled(network, tuple(batch.images.shape[1:]), accelerator):
        if "compiler" in why:
            report(f"{why}: networks are trained by eager torch, several times slower")
        return SERIAL
    from workers.compiled import Compiled

    eager = copy.deepcopy(network).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    compiled = Compiled(copy.deepcopy(network), _plain(recipe), tuple(batch.images.shape[1:]))
    indices = torch.arange(len(batch))
    try:
        check_gradient(network, compiled, batch)
    except Wrong as error:
        report(f"the compiled code is not used: {error}")
        return SERIAL
    ratio = _times_faster(lambda: compiled.step(batch, indices, 0.0), lambda: _gradient(eager, batch))
    return COMPILED if ratio >= WINS_BY else SERIAL


def _fleet_or_serial(
    network: nn.Module, batch: Split, recipe: Recipe, accelerator: Accelerator, size: int
) -> dict[str, Any]:
    from workers.fleet import Fleet, NoFleet

    serial = Serial(copy.deepcopy(network), recipe, accelerator, SERIAL["memory_format"])
    indices = torch.arange(len(batch), device=batch.labels.device)
    while size > 1:
        try:
            fleet = Fleet([copy.deepcopy(network) for _ in range(size)], recipe, accelerator)
            fleet.measure(batch)
            # A loss that is read has been computed: no need to wait for the device by its name.
            ratio = _times_faster(
                partial(lambda fleet: fleet.step(batch, indices, 0.0).tolist(), fleet),
                lambda: serial.step(batch, indices, 0.0).tolist(),
            )
            return {**FLEET, "fleet": size} if ratio * size >= WINS_BY else SERIAL
        except NoFleet:
            return SERIAL
        except torch.OutOfMemoryError:
            size //= 2
            torch.cuda.empty_cache()
    return SERIAL


def why_not_compiled(network: nn.Module, shape: tuple[int, ...], accelerator: Accelerator) -> str | None:
    """Why a network cannot be run by compiled code on this machine; None where it can."""
    from workers.chain import NotAChain, chain_of
    from workers.compiled import NoCompiler, library

    if accelerator.mixed_precision != "no":
        return f"compiled code knows no {accelerator.mixed_precision}"
    try:
        chain_of(network, shape)
        library(torch.float32)
    except (NotAChain, NoCompiler) as error:
        return str(error)
    return None


def check_gradient(network: nn.Module, backend: Backend, batch: Split) -> None:
    """Raise Wrong where one plain step of a back-end at learning rate 1 is not minus the eager gradient.

    `backend` holds a copy of `network` and has no momentum and no weight decay.
    """
    eager = copy.deepcopy(network).train()
    before = [p.detach().clone() for p in eager.parameters()]
    _gradient(eager, batch)
    backend.step(batch, torch.arange(len(batch)), 1.0)
    for (name, parameter), was, now in zip(
        eager.named_parameters(), before, backend.networks[0].parameters(), strict=True
    ):
        assert parameter.grad is not None
        apart = (was - parameter.grad - now).abs().max() / parameter.grad.abs().max().clamp_min(1e-6)
        if not apart <= TOLERANCE:
            raise Wrong(f"the gradient of {name} is off by {apart:.1e} of its largest component")


def _plain(recipe: Recipe) -> Recipe:
    return Recipe(1, recipe.batch_size, ((0, 1.0),))


def _gradient(network: nn.Module, batch: Split) -> None:
    network.zero_grad()
    F.cross_entropy(network(batch.images), batch.labels).backward()


def _times_faster(a: Callable[[], Any], b: Callable[[], Any]) -> float:
    """How many times faster `a` is than `b`: the median of a few pairs, in turn."""

    def seconds(work: Callable[[], Any]) -> float:
        start = time.perf_counter()
        for _ in range(STEPS):
            work()
        return time.perf_counter() - start

    a(), b()
    return median(1 / seconds(a) * seconds(b) for _ in range(PAIRS))
