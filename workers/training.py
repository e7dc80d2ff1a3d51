"""Training and evaluation of one network, dense or pruned."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from workers.datasets import Data, Split
from workers.streams import generator

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


def train(
    model: nn.Module,
    data: Data,
    recipe: Recipe,
    accelerator: Accelerator,
    *,
    dataset: str,
    seed: int,
    stream: str,
    on_epoch: Callable[[Epoch], None] = lambda _: None,
) -> list[Epoch]:
    """Train `model` in place and return its epochs; they end early where the loss left the finite.

    `stream` names the minibatches: those of dense training are not those of any retraining.
    """
    net, optimizer = _prepared(model, optimizer_of(model, recipe), accelerator)
    if accelerator.scaler is not None:
        # One scaler per process: without this the last task's scale would be this one's.
        accelerator.scaler.load_state_dict(torch.amp.GradScaler(accelerator.device.type).state_dict())
    epochs: list[Epoch] = []
    for done in range(recipe.epochs):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr_at(done)
        batches = minibatches(len(data.train), recipe.batch_size, dataset, seed, f"{stream}/{done}")
        train_loss = _epoch(net, optimizer, data.train, batches, accelerator)
        test = measure(net, data.test, accelerator)
        validation = measure(net, data.validation, accelerator) if len(data.validation) else None
        epochs.append(Epoch(done + 1, train_loss, test, validation))
        on_epoch(epochs[-1])
        if not (math.isfinite(train_loss) and math.isfinite(test.loss)):
            break
    if net is not model or accelerator.scaler is not None:
        accelerator.free_memory()
    return epochs


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


def _epoch(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    train_split: Split,
    batches: Iterable[torch.Tensor],
    accelerator: Accelerator,
) -> float:
    """One pass over the train set; the mean of the minibatch losses."""
    net.train()
    losses: list[torch.Tensor] = []
    for indices in batches:
        batch = train_split.at(indices.to(train_split.labels.device))
        with accelerator.autocast():
            loss = F.cross_entropy(net(batch.images), batch.labels)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).double().mean().item()
