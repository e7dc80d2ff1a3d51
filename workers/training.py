"""Training of networks, dense or pruned, by any back-end: minibatches, epochs, checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

import torch

from storage.phases import Report, silent
from workers.augment import Draws, mixed
from workers.checkpoints import Checkpoint, State, generators, part, prefixed, restore_generators
from workers.measures import Epoch, Measure
from workers.rates import planned_epochs, rate, steps_left
from workers.streams import generator, seeded

if TYPE_CHECKING:
    from torch import nn

    from storage.records import Recipe
    from workers.datasets import Data, Minibatch, Samples, Split


class Backend(Protocol):
    """Networks of one shape in training, on the same minibatches: its members, one or many.

    No member's numbers depend on another's. `networks` hold the weights as they are now.
    """

    @property
    def networks(self) -> Sequence[nn.Module]: ...

    def measure(self, split: Samples) -> list[Measure]:
        """Loss and accuracy of each member in eval mode."""
        ...

    def step(self, split: Split, indices: torch.Tensor | None, lr: float) -> torch.Tensor:
        """One step of all on one minibatch, `indices` of `split` or all of it; their mean losses, [members]."""
        ...

    def state(self) -> State: ...

    def restore(self, state: State) -> None: ...

    def close(self) -> None: ...


class Watcher(Protocol):
    """What is told of each epoch of a member, and goes into the checkpoint."""

    def see(self, epoch: Epoch) -> None: ...

    def state(self) -> State: ...

    def restore(self, state: State) -> None: ...


def minibatches(n: int, batch_size: int, dataset: str, seed: int, stream: str) -> Iterator[torch.Tensor]:
    """Sample indices of each minibatch of an epoch: the same for every candidate of a data set."""
    order = torch.randperm(n, generator=generator(dataset, seed, f"order/{stream}"))
    yield from order.split(batch_size)


@dataclass
class _Position:
    """Where a training stands: each member's epochs, how many are behind it, and within the one it is at
    the losses so far, each [members]."""

    epochs: list[list[Epoch]]
    done: int
    losses: list[torch.Tensor]


def train(
    backend: Backend,
    data: Data,
    recipe: Recipe,
    *,
    dataset: str,
    seed: int,
    stream: str,
    watchers: Sequence[Watcher] = (),
    checkpoint: Checkpoint | None = None,
    phase: str = "training",
    report: Report = silent,
) -> list[list[Epoch]]:
    """Train a back-end's networks in place. Each one's epochs; they end early where its loss left the finite.

    `stream` names the minibatches: those of dense training are not those of any retraining. With a
    `checkpoint` it goes on from there, on a CPU to the very bits of a training that never stopped.
    Raises Stopped where the checkpoint says so. `report` is called before each epoch, with the name `phase`.
    """
    at = _Position([[] for _ in backend.networks], 0, [])
    with seeded(dataset, seed, f"layers/{stream}"):  # dropout and the like draw from the global generators
        saved = checkpoint.load() if checkpoint else None
        if saved is not None:
            at = _restored(saved, backend, watchers)
        n = len(data.train)
        planned = planned_epochs(recipe, n)
        while at.done < planned and any(map(_is_finite, at.epochs)):
            report(phase, at.done + 1, planned, "epoch")
            draws = Draws(dataset, seed, f"{stream}/{at.done}")
            order = enumerate(minibatches(n, recipe.batch_size, dataset, seed, draws.stream))
            left = list(islice(order, len(at.losses), steps_left(recipe, n, at.done)))
            for batch, indices in _fed(data, recipe, left, draws):
                if checkpoint is not None and checkpoint.due():
                    checkpoint.save(_state(at, backend, watchers))
                lr = rate(recipe, n, at.done, len(at.losses))
                at.losses.append(_step(backend, batch, indices, lr))
            _end_epoch(at, backend, data, watchers)
    return at.epochs


def _fed(
    data: Data, recipe: Recipe, order: Sequence[Minibatch], draws: Draws
) -> Iterator[tuple[Split, torch.Tensor | None]]:
    """What a back-end's step takes for each minibatch: (samples, indices of those meant), or the minibatch and None."""
    given = data.train.minibatches(order, draws if recipe.augment else None)
    for (number, _), (split, indices) in zip(order, given, strict=True):
        if recipe.mixup or recipe.cutmix:
            batch = split if indices is None else split.at(indices)
            yield mixed(batch, recipe, data.classes, draws, number), None
        else:
            yield split, indices


def _step(backend: Backend, split: Split, indices: torch.Tensor | None, lr: float) -> torch.Tensor:
    return backend.step(split, indices, lr)


def _end_epoch(at: _Position, backend: Backend, data: Data, watchers: Sequence[Watcher]) -> None:
    """Measure every member after an epoch; one that has diverged has no more epochs."""
    losses = torch.stack(at.losses).double().mean(0).tolist()
    tests = backend.measure(data.test)
    validations = backend.measure(data.validation) if len(data.validation) else [None] * len(tests)
    at.done, at.losses = at.done + 1, []
    for member, measured in enumerate(zip(losses, tests, validations, strict=True)):
        if _is_finite(at.epochs[member]):
            at.epochs[member].append(Epoch(at.done, *measured))
            if watchers:
                watchers[member].see(at.epochs[member][-1])


def _is_finite(epochs: Sequence[Epoch]) -> bool:
    """Whether a member's losses are finite as far as they are known."""
    return not epochs or (math.isfinite(epochs[-1].train_loss) and math.isfinite(epochs[-1].test.loss))


def _state(at: _Position, backend: Backend, watchers: Sequence[Watcher]) -> State:
    """All that a training needs to go on from where it stands."""
    held, drawn = backend.state(), generators()
    seen = [watcher.state() for watcher in watchers]
    losses = {"losses": torch.stack(at.losses)} if at.losses else {}
    watched = {f"watcher{i}": state.tensors for i, state in enumerate(seen)}
    tensors = prefixed(backend=held.tensors, generators=drawn.tensors, epoch=losses, **watched)
    values = {
        "epochs": [[asdict(epoch) for epoch in epochs] for epochs in at.epochs],
        "done": at.done,
        "backend": held.values,
        "generators": drawn.values,
        "watchers": [state.values for state in seen],
    }
    return State(tensors, values)


def _restored(saved: State, backend: Backend, watchers: Sequence[Watcher]) -> _Position:
    """Put everything where `saved` was taken."""
    tensors, values = saved.tensors, saved.values
    backend.restore(State(part(tensors, "backend"), values["backend"]))
    restore_generators(State(part(tensors, "generators"), values["generators"]))
    for i, watcher in enumerate(watchers):
        watcher.restore(State(part(tensors, f"watcher{i}"), values["watchers"][i]))
    losses = part(tensors, "epoch").get("losses")
    epochs = [[Epoch(**(e | _measures(e))) for e in member] for member in values["epochs"]]
    return _Position(epochs, values["done"], [] if losses is None else list(losses.unbind()))


def _measures(epoch: Mapping[str, Any]) -> dict[str, Measure | None]:
    return {name: Measure(**epoch[name]) if epoch[name] else None for name in ("test", "validation")}
