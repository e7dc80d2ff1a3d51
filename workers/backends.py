"""The back-ends by name: which can run a network, which is fastest, and how one is opened."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
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
TOLERANCE = 1e-8
"""The largest error of a gradient's component, as a share of the largest component, in float64."""
PARTS, ROUGHLY = 8, 0.1
"""In float32 the gradient of half of this many parts of a minibatch must agree to this share."""
FLOOR = 1e-4
"""A gradient counts as at least this share of the largest weight, or of 1: below that, rounding is all there is."""


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


def fastest(network: nn.Module, train: Samples, recipe: Recipe, accelerator: Accelerator, block: int) -> dict[str, Any]:
    """Return the fields of Execution for a network's shape on this device: the back-end that is fastest when timed
    against serial, in fleets of at most `block`.

    On a CPU that is the compiled back-end where a network is a chain (a fleet by torch.func only loses
    there: docs/performance.md); on an accelerator a fleet, its size halved until it fits the memory. `fallback` is the
    reason where a fault, and not the timing, rules the faster back-end out.
    """
    if not is_plain(recipe):
        return SERIAL
    batch = first(train, recipe.batch_size)
    if isinstance(batch.images, Mapping):  # text with images: neither chains nor fleets read it
        return SERIAL
    if accelerator.device.type == "cpu":
        return _compiled_or_serial(network, batch, recipe, accelerator)
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


def _compiled_or_serial(network: nn.Module, batch: Split, recipe: Recipe, accelerator: Accelerator) -> dict[str, Any]:
    from workers.chain import NotAChain, chain_of
    from workers.compiled import Compiled, NoCompiler

    shape = tuple(batch.images.shape[1:])
    try:
        chain_of(network, shape)
    except NotAChain:
        return SERIAL
    if accelerator.mixed_precision != "no":  # compiled code computes in float32
        return SERIAL
    try:
        check_gradient(network, batch)
    except (NoCompiler, Wrong) as error:
        return {**SERIAL, "fallback": str(error)}
    eager = copy.deepcopy(network).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    indices = torch.arange(len(batch))
    with closing(Compiled(copy.deepcopy(network), _plain(recipe.batch_size), shape)) as compiled:
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
        except NoFleet as error:
            return {**SERIAL, "fallback": f"no fleet: {error}"}
        except torch.OutOfMemoryError:
            size //= 2
            torch.cuda.empty_cache()
    return SERIAL


def check_gradient(network: nn.Module, batch: Split) -> None:
    """Raise Wrong where the compiled code's gradient on a minibatch is not eager torch's; NoCompiler where there is
    no compiled code.

    The comparison is in float64: in float32, rounding alone changes the argument of a max-pool now and then. The
    float32 code is the same source, and is compared with the float64 code: most parts of the minibatch must agree
    roughly, since such a change reaches one part.
    """
    from workers.compiled import REALS, library

    with ThreadPoolExecutor(len(REALS)) as pool:  # both are built at once, where they are not there yet
        list(pool.map(library, REALS))
    exact = copy.deepcopy(network).double().train()
    double = replace(batch, images=batch.images.double())
    _gradient(exact, double)
    for (name, parameter), found in zip(exact.named_parameters(), _by_compiled(exact, double), strict=True):
        assert parameter.grad is not None
        apart = _apart(parameter.grad, found, parameter)
        if not apart <= TOLERANCE:
            raise Wrong(f"in compiled code the gradient of {name} is off by {apart:.1e} of its largest component")
    indices = torch.arange(len(batch)).chunk(PARTS)
    agree = [_agrees_roughly(network, exact, batch.at(part), double.at(part)) for part in indices]
    if 2 * sum(agree) < len(agree):
        raise Wrong(f"in compiled code the float32 gradient is off in {agree.count(False)} of {len(agree)} parts")


def _agrees_roughly(single: nn.Module, exact: nn.Module, part: Split, double: Split) -> bool:
    """Compare the compiled code's gradients in float32 and float64."""
    pairs = zip(_by_compiled(exact, double), _by_compiled(single, part), exact.parameters(), strict=True)
    return all(_apart(right, found.double(), parameter) <= ROUGHLY for right, found, parameter in pairs)


def _by_compiled(network: nn.Module, batch: Split) -> list[torch.Tensor]:
    """Return the gradients of a network's parameters by the compiled code: the change of a step at learning rate 1."""
    from workers.compiled import Compiled

    before = [p.detach().clone() for p in network.parameters()]
    with closing(Compiled(copy.deepcopy(network), _plain(len(batch)), tuple(batch.images.shape[1:]))) as backend:
        backend.step(batch, None, 1.0)
        return [was - now.detach() for was, now in zip(before, backend.networks[0].parameters(), strict=True)]


def _apart(right: torch.Tensor, found: torch.Tensor, parameter: torch.Tensor) -> float:
    """Return the largest error of a gradient's component, as a share of the largest component; NaN where one is."""
    floor = FLOOR * parameter.detach().abs().max().clamp_min(1).item()
    return ((right - found).abs().max() / right.abs().max().clamp_min(floor)).item()


def _plain(batch_size: int) -> Recipe:
    """Return SGD without momentum and weight decay."""
    return Recipe(1, batch_size, ((0, 1.0),))


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
