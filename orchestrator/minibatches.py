"""Minibatches of one sample: found when a sweep is planned, before a batch norm refuses one in training.

The sizes of the minibatches follow from the recipes and the data sets, without torch. Only where one sample is alone in
a forward pass, the network is built and called once, to see whether it can be trained on one sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from models.registry import MLP, MODELS, LeNet5
from orchestrator.documents import Document, Path_
from orchestrator.errors import UserError
from storage.phases import Report, silent
from workers.datasets import Dataset, find_dataset
from workers.rates import steps_in_epoch, steps_left

if TYPE_CHECKING:
    import torch
    from torch import nn

    from orchestrator.spec import DenseTraining, Retraining, SweepSpec
    from storage.records import Recipe

ONE_VALUE = "Expected more than 1 value per channel"
"""The error of torch's batch norm for one value per channel in training."""

ONE_PLACE = "Expected more than 1 spatial element"
"""The error of torch's instance norm for one value per channel and sample, whatever the batch size."""


# -- sizes ---------------------------------------------------------------------------------------------


def minibatch_sizes(n: int, recipe: Recipe) -> frozenset[int]:
    """Return the sizes of the minibatches of a training on `n` samples. An epoch's last minibatch is among them only
    if training gets there before `max_steps`."""
    reached = steps_left(recipe, n, 0) == steps_in_epoch(recipe, n)
    full = {recipe.batch_size} if n >= recipe.batch_size else set[int]()
    last = {n % recipe.batch_size} - {0} if reached or not full else set[int]()
    return frozenset(full | last)


def parts(size: int, accumulate: int) -> set[int]:
    """Return the sizes of the parts of a minibatch, as workers.serial.parts_of makes them: each is a forward pass."""
    small, larger = divmod(size, min(accumulate, size))
    return {small, small + 1} if larger else {small}


def leaves_one_alone(n: int, recipe: Recipe) -> bool:
    """Return whether a training on `n` samples has a forward pass of one sample."""
    return any(1 in parts(size, recipe.accumulate) for size in minibatch_sizes(n, recipe))


def sizes_that_work(recipe: Recipe, sizes: Iterable[int]) -> list[int]:
    """Return the nearest smaller and the nearest larger `batch_size` that leave no sample alone, on data sets with
    these numbers of training samples; an empty list if none does."""
    wanted, sizes = recipe.batch_size, tuple(sizes)

    def works(batch_size: int) -> bool:
        return not any(leaves_one_alone(n, replace(recipe, batch_size=batch_size)) for n in sizes)

    smaller = next((b for b in range(wanted - 1, max(1, recipe.accumulate - 1), -1) if works(b)), None)
    larger = next((b for b in range(wanted + 1, max(wanted, *sizes) + 1) if works(b)), None)
    return [b for b in (smaller, larger) if b is not None]


def largest_accumulate(recipe: Recipe, sizes: Iterable[int]) -> int | None:
    """Return the largest `accumulate` up to the recipe's that leaves no sample alone; None if none does."""
    sizes = tuple(sizes)
    lower = (replace(recipe, accumulate=count) for count in range(recipe.accumulate, 0, -1))
    return next((one.accumulate for one in lower if not any(leaves_one_alone(n, one) for n in sizes)), None)


# -- messages ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refusal:
    """Why a network cannot be trained on one sample: the module that fails (`` is the network), its kind and its
    error. `of_size` is whether two samples are all right."""

    module: str
    kind: str
    error: str
    of_size: bool
    is_batch_norm: bool

    def of(self, model: str) -> str:
        if self.is_batch_norm and self.of_size:
            return f"the batch norm `{self.module}` of {model} sees one value per channel"
        return f"{f'`{self.module}` ({self.kind}) of ' if self.module else ''}{model} fails: {self.error}"


def check_minibatches(spec: SweepSpec, document: Document, data_root: str | None, report: Report = silent) -> None:
    """Raise UserError, a line for each problem, if training would call a network with one sample that cannot be
    trained on one.

    Data sets that are not on this machine are left out, and so are the networks of transformers. With several processes
    for one task nothing is looked at: their batch norms take statistics over all of them.
    """
    if spec.resources.processes == 1 and (problems := dict.fromkeys(_problems(spec, document, data_root, report))):
        raise UserError("\n".join(problems))


def _problems(spec: SweepSpec, document: Document, data_root: str | None, report: Report) -> Iterator[str]:
    datasets = _here(spec.grid.dataset, data_root)
    sizes = {name: found.train_size - int(found.train_size * spec.validation) for name, found in datasets.items()}
    for path, training in _trainings(spec, document):
        recipe = training.recipe()
        for name in (name for name, n in sizes.items() if leaves_one_alone(n, recipe)):
            for model in filter(_may_refuse, spec.grid.model):
                report(f"checking minibatches of one sample with {model}")
                refusal = refusal_of(model, datasets[name].classes, datasets[name].shape)
                if refusal and refusal.of_size:
                    yield _of_size(document, path, recipe, sizes[name], sizes.values(), refusal.of(model))
                elif refusal:
                    shape = "x".join(map(str, datasets[name].shape))
                    where = document.where(("grid", "model"))
                    yield f"{where}: grid.model: in training on samples of {shape}, {refusal.of(model)}"


def _here(names: Iterable[str], data_root: str | None) -> dict[str, Dataset]:
    """Return the data sets of images that are on this machine, by name; other checks report those that are not."""
    found: dict[str, Dataset] = {}
    for name in names:
        if not name.startswith("llava:"):
            try:
                found[name] = find_dataset(name, data_root)
            except ValueError:
                continue
    return found


def _trainings(spec: SweepSpec, document: Document) -> Iterator[tuple[Path_, DenseTraining | Retraining]]:
    """Return each recipe that trains, with its place in the document."""
    for key, trainings in (("dense", spec.dense), ("retrain", spec.retrain)):
        given = document.plain()[key]
        for training in (one for one in trainings if one.epochs):
            if isinstance(given, list):
                yield (key, next(i for i, one in enumerate(given) if type(training)(**one) == training)), training
            else:
                yield (key,), training


def _may_refuse(model: str) -> bool:
    """Return whether a network may have a layer that cannot be trained on one sample."""
    return not (model.startswith("hf/") or isinstance(MODELS.get(model), LeNet5 | MLP))


def _of_size(document: Document, path: Path_, recipe: Recipe, n: int, sizes: Iterable[int], why: str) -> str:
    """Return the message for a network that cannot be trained on one sample, but on two."""
    sizes = list(sizes)
    key = "batch_size" if leaves_one_alone(n, replace(recipe, accumulate=1)) else "accumulate"
    place = (*path, key)
    said = _one_alone(recipe, n, key)
    return f"{document.where(place)}: {'.'.join(map(str, place))}: {said}, in which {why}; {_todo(recipe, sizes, key)}"


def _one_alone(recipe: Recipe, n: int, key: str) -> str:
    if key == "accumulate":
        whole = max(size for size in minibatch_sizes(n, recipe) if 1 in parts(size, recipe.accumulate))
        return f"accumulate {recipe.accumulate} makes a part of 1 sample of a minibatch of {whole}"
    if 1 in (n, recipe.batch_size):
        return f"batch_size {recipe.batch_size} makes minibatches of 1 sample from {n} training samples"
    return f"{n} training samples in minibatches of {recipe.batch_size} leave one of 1 sample"


def _todo(recipe: Recipe, sizes: list[int], key: str) -> str:
    found, lower = sizes_that_work(recipe, sizes), largest_accumulate(recipe, sizes)
    ways = [f"a batch_size of {' or '.join(map(str, found))}"] if found else []
    ways += [f"accumulate {lower}"] if lower and key == "accumulate" else []
    if not ways and min(sizes) > 1:
        ways = ["a lower accumulate"]
    return f"use {', or '.join(ways)}" if ways else "training needs at least 2 samples of each data set"


# -- networks ------------------------------------------------------------------------------------------


@lru_cache
def refusal_of(model: str, classes: int, shape: tuple[int, int, int]) -> Refusal | None:
    """Return why a network cannot be trained on one sample of a shape. Return None if it can be, and for a network that
    cannot be built or called at all, which other checks report.

    The network is built on the CPU, with random weights, inside a saved random state.
    """
    import torch

    from models import build_model

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        try:
            network = build_model(model, classes, shape).train()
        except Exception:  # of a network's own code
            return None
        inside = _watched(network)
        alone = _failure(network, torch.randn(1, *shape))
        if alone is None:
            return None
        name = inside[-1] if inside else ""
        found = network.get_submodule(name)
        of_size = _failure(network, torch.randn(2, *shape)) is None
        if not (of_size or alone.startswith(f"ValueError: {ONE_PLACE}")):
            return None
        norm = isinstance(found, torch.nn.modules.batchnorm._BatchNorm) and ONE_VALUE in alone
        return Refusal(name, type(found).__name__, alone, of_size, norm)


def _watched(network: nn.Module) -> list[str]:
    """Return a list that holds the names of the modules whose forward pass has begun and not ended, at any time."""
    inside: list[str] = []

    def watch(name: str, module: nn.Module) -> None:
        def begin(*_: object) -> None:
            inside.append(name)

        def end(*_: object) -> None:
            inside.pop()

        module.register_forward_pre_hook(begin)
        module.register_forward_hook(end)

    for name, module in network.named_modules():
        watch(name, module)
    return inside


def _failure(network: nn.Module, probe: torch.Tensor) -> str | None:
    """Return the error of a forward pass, its first line with its type; None if there is none."""
    try:
        network(probe)
    except Exception as error:  # of torch, or of a network's own code
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return None
