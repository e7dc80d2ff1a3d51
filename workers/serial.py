"""The serial back-end: one network at a time, eager torch, by Accelerate's device and precision."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from workers.checkpoints import State, optimizer_state, part, prefixed, restore_optimizer
from workers.measures import EVALUATION_BATCH, Measure, measured

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

    from storage.records import Recipe
    from workers.datasets import Split


class Serial:
    """One network in training, any model, any precision."""

    def __init__(self, network: nn.Module, recipe: Recipe, accelerator: Accelerator, memory_format: str) -> None:
        self._network = network.to(accelerator.device).to(memory_format=getattr(torch, memory_format))
        self._recipe, self._accelerator = recipe, accelerator
        self._net, self._optimizer = self._network, None
        self.networks = [self._network]

    def measure(self, split: Split) -> list[Measure]:
        """Loss and accuracy in eval mode."""
        was_training = self._net.training
        self._net.eval()

        def logits(images: torch.Tensor) -> torch.Tensor:
            with self._accelerator.autocast():
                return self._net(images).unsqueeze(0)

        found = measured(logits, split, EVALUATION_BATCH)
        self._net.train(was_training)
        return found

    def step(self, split: Split, indices: torch.Tensor, lr: float) -> torch.Tensor:
        """One step on one minibatch; its mean loss, [1]."""
        optimizer = self._started()
        for group in optimizer.param_groups:
            group["lr"] = lr
        self._net.train()
        batch = split.at(indices)
        with self._accelerator.autocast():
            loss = F.cross_entropy(self._net(batch.images), batch.labels)
        optimizer.zero_grad()
        self._accelerator.backward(loss)
        optimizer.step()
        return loss.detach().unsqueeze(0)

    def state(self) -> State:
        """Weights, optimizer and loss scale."""
        held = optimizer_state(_inner(self._started()))
        scaler = self._accelerator.scaler
        return State(
            prefixed(model=self._network.state_dict(), optimizer=held.tensors),
            {"optimizer": held.values, "scaler": scaler.state_dict() if scaler is not None else None},
        )

    def restore(self, state: State) -> None:
        """Be where `state` was taken."""
        self._network.load_state_dict(part(state.tensors, "model"))
        held = State(part(state.tensors, "optimizer"), state.values["optimizer"])
        restore_optimizer(_inner(self._started()), held)
        if self._accelerator.scaler is not None:
            self._accelerator.scaler.load_state_dict(state.values["scaler"])

    def close(self) -> None:
        """Let go of what Accelerate wrapped."""
        if self._net is not self._network or self._accelerator.scaler is not None:
            self._accelerator.free_memory()

    def _started(self) -> Any:
        """The optimizer. Made at the first step: its import takes seconds, and measuring needs none.

        Accelerate wraps it and the network where it has something to add: loss scaling, several
        processes. Elsewhere only its device and autocast are used: freeing what it wrapped costs a full
        garbage collection per network, a third of the time of a small one.
        """
        if self._optimizer is not None:
            return self._optimizer
        self._optimizer = optimizer_of(list(self._network.parameters()), self._recipe)
        accelerator = self._accelerator
        if accelerator.scaler is not None:
            # One scaler per process: without this the last task's scale would be this one's.
            accelerator.scaler.load_state_dict(torch.amp.GradScaler(accelerator.device.type).state_dict())
        if accelerator.scaler is not None or accelerator.num_processes > 1:
            self._net, self._optimizer = accelerator.prepare(self._network, self._optimizer)
        return self._optimizer


def optimizer_of(parameters: list[Any], recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer, at the learning rate of its first epoch."""
    assert recipe.optimizer == "sgd", recipe.optimizer
    return torch.optim.SGD(
        parameters,
        lr=recipe.lr_at(0),
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
    )


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    """Torch's optimizer, out of Accelerate's wrapper where there is one."""
    return getattr(optimizer, "optimizer", optimizer)
