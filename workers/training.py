"""Training and evaluation of one network, dense or pruned."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from torch.nn import functional as F

from workers.checkpoints import (
    Checkpoint,
    State,
    generators,
    optimizer_state,
    part,
    prefixed,
    restore_generators,
    restore_optimizer,
)
from workers.datasets import Data, Split
from workers.streams import generator, seeded

if TYPE_CHECKING:
    from accelerate import Accelerator

    from storage.records import Recipe

EVALUATION_BATCH = 1000


@dataclass(frozen=True)
class Measure:
    """Mean cross-entropy in nats, its standard error, the share classified correctly, over n."""

    loss: float
    loss_se: float
    accuracy: float
    n: int


@dataclass(frozen=True)
class Epoch:
    """One epoch of training, 1 the first: mean minibatch loss, and what was measured after it."""

    number: int
    train_loss: float
    test: Measure
    validation: Measure | None


@torch.no_grad()
def measure(model: nn.Module, split: Split, accelerator: Accelerator) -> Measure:
    """Loss and accuracy of `model` in eval mode, summed in float64 over fixed batches."""
    was_training = model.training
    model.eval()
    loss = square = 0.0
    correct = 0
    for start in range(0, len(split), EVALUATION_BATCH):
        images, labels = (t[start : start + EVALUATION_BATCH] for t in (split.images, split.labels))
        with accelerator.autocast():
            logits = model(images).float()
        losses = F.cross_entropy(logits, labels, reduction="none").double()
        loss, square = loss + losses.sum().item(), square + losses.square().sum().item()
        correct += int((logits.argmax(1) == labels).sum())
    model.train(was_training)
    n = len(split)
    variance = max(0.0, square / n - (loss / n) ** 2) * n / max(1, n - 1)
    return Measure(loss / n, math.sqrt(variance / n), correct / n, n)


def optimizer_of(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer over all parameters, at the learning rate of its first epoch."""
    assert recipe.optimizer == "sgd", recipe.optimizer
    return torch.optim.SGD(
        model.parameters(),
        lr=recipe.lr_at(0),
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
    )


def minibatches(n: int, batch_size: int, dataset: str, seed: int, stream: str) -> Iterator[torch.Tensor]:
    """Sample indices of each minibatch of an epoch: the same for every candidate of a data set."""
    order = torch.randperm(n, generator=generator(dataset, seed, f"order/{stream}"))
    yield from order.split(batch_size)


class Watcher(Protocol):
    """What is told of each epoch of a training, and goes into its checkpoint."""

    def see(self, epoch: Epoch) -> None: ...

    def state(self) -> State: ...

    def restore(self, state: State) -> None: ...


@dataclass
class _Position:
    """Where a training stands: epochs behind it, and within the one it is at the losses so far."""

    epochs: list[Epoch]
    losses: list[torch.Tensor]


def train(
    model: nn.Module,
    data: Data,
    recipe: Recipe,
    accelerator: Accelerator,
    *,
    dataset: str,
    seed: int,
    stream: str,
    watcher: Watcher | None = None,
    checkpoint: Checkpoint | None = None,
) -> list[Epoch]:
    """Train `model` in place and return its epochs; they end early where the loss left the finite.

    `stream` names the minibatches: those of dense training are not those of any retraining. With a
    `checkpoint` it goes on from there, on a CPU to the very bits of a training that never stopped.
    Raises Stopped where the checkpoint says so.
    """
    net, optimizer = _prepared(model, optimizer_of(model, recipe), accelerator)
    if accelerator.scaler is not None:
        # One scaler per process: without this the last task's scale would be this one's.
        accelerator.scaler.load_state_dict(torch.amp.GradScaler(accelerator.device.type).state_dict())
    at = _Position([], [])
    with seeded(dataset, seed, f"layers/{stream}"):  # dropout and the like draw from the global generators
        saved = checkpoint.load() if checkpoint else None
        if saved is not None:
            at = _restored(saved, model, optimizer, accelerator, watcher)
        finite = True
        while len(at.epochs) < recipe.epochs and finite:
            done = len(at.epochs)
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr_at(done)
            batches = minibatches(len(data.train), recipe.batch_size, dataset, seed, f"{stream}/{done}")
            net.train()
            for indices in islice(batches, len(at.losses), None):
                if checkpoint is not None and checkpoint.due():
                    checkpoint.save(_state(at, model, optimizer, accelerator, watcher))
                at.losses.append(_step(net, optimizer, data.train, indices, accelerator))
            train_loss = torch.stack(at.losses).double().mean().item()
            test = measure(net, data.test, accelerator)
            validation = measure(net, data.validation, accelerator) if len(data.validation) else None
            at = _Position([*at.epochs, Epoch(done + 1, train_loss, test, validation)], [])
            if watcher is not None:
                watcher.see(at.epochs[-1])
            finite = math.isfinite(train_loss) and math.isfinite(test.loss)
    if net is not model or accelerator.scaler is not None:
        accelerator.free_memory()
    return at.epochs


def _state(at: _Position, model: nn.Module, optimizer: Any, accelerator: Accelerator, watcher: Watcher | None) -> State:
    """All that a training needs to go on from where it stands."""
    held, drawn = optimizer_state(_inner(optimizer)), generators()
    seen = watcher.state() if watcher else State({}, {})
    losses = {"losses": torch.stack(at.losses)} if at.losses else {}
    tensors = prefixed(
        model=model.state_dict(), optimizer=held.tensors, generators=drawn.tensors, watcher=seen.tensors, epoch=losses
    )
    values = {
        "epochs": [asdict(epoch) for epoch in at.epochs],
        "optimizer": held.values,
        "generators": drawn.values,
        "watcher": seen.values,
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
    }
    return State(tensors, values)


def _restored(
    saved: State, model: nn.Module, optimizer: Any, accelerator: Accelerator, watcher: Watcher | None
) -> _Position:
    """Put everything where `saved` was taken."""
    tensors, values = saved.tensors, saved.values
    model.load_state_dict(part(tensors, "model"))
    restore_optimizer(_inner(optimizer), State(part(tensors, "optimizer"), values["optimizer"]))
    restore_generators(State(part(tensors, "generators"), values["generators"]))
    if watcher is not None:
        watcher.restore(State(part(tensors, "watcher"), values["watcher"]))
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(values["scaler"])
    losses = part(tensors, "epoch").get("losses")
    epochs = [Epoch(**(e | _measures(e))) for e in values["epochs"]]
    return _Position(epochs, [] if losses is None else list(losses.to(accelerator.device).unbind()))


def _measures(epoch: Mapping[str, Any]) -> dict[str, Measure | None]:
    return {name: Measure(**epoch[name]) if epoch[name] else None for name in ("test", "validation")}


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    """Torch's optimizer, out of Accelerate's wrapper where there is one."""
    return getattr(optimizer, "optimizer", optimizer)


def _prepared(
    model: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Both wrapped by Accelerate where it has something to add: loss scaling, several processes.

    Elsewhere only its device and autocast are used: freeing what it wrapped costs a full garbage
    collection per network, a third of the time of a small one.
    """
    if accelerator.scaler is None and accelerator.num_processes == 1:
        return model, optimizer
    return accelerator.prepare(model, optimizer)


def _step(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    train_split: Split,
    indices: torch.Tensor,
    accelerator: Accelerator,
) -> torch.Tensor:
    """One step on one minibatch; its mean loss."""
    batch = train_split.at(indices.to(train_split.labels.device))
    with accelerator.autocast():
        loss = F.cross_entropy(net(batch.images), batch.labels)
    optimizer.zero_grad()
    accelerator.backward(loss)
    optimizer.step()
    return loss.detach()
