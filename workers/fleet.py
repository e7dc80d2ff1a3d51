"""The fleet back-end: many networks of one shape as one, stacked and mapped by torch.func.

The members share each minibatch, so that the first convolution of them all is one dense convolution. A
member's numbers do not depend on what the others are, only on how many there are.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from workers.checkpoints import State, optimizer_state, part, prefixed, restore_optimizer
from workers.datasets import first
from workers.measures import Measure, measured
from workers.serial import optimizer_of

if TYPE_CHECKING:
    from accelerate import Accelerator

    from storage.records import Recipe
    from workers.datasets import Samples, Split

CPU_BYTES, ACCELERATOR_BYTES = 4 * 2**20, 256 * 2**20
"""Input bytes of a call that evaluates a fleet, counted once per member. On a CPU, more falls out of the cache; on an
accelerator, less leaves it waiting for the next call."""
FEWEST = 4
"""Minimum number of samples of such a call."""


class NoFleet(Exception):
    """Why a network cannot be one of a fleet."""


class Fleet:
    """Networks of one shape in training, by stacked parameters and one optimizer.

    Raises NoFleet where a model cannot be mapped: an operation without a rule of its own would be run
    once per network in silence.
    """

    def __init__(self, networks: Sequence[nn.Module], recipe: Recipe, accelerator: Accelerator) -> None:
        if accelerator.scaler is not None:
            raise NoFleet("with fp16 the loss scale of one network would be that of all")
        if recipe.optimizer != "sgd":
            raise NoFleet(f"the optimizer {recipe.optimizer} is not known to work on each network for itself")
        self.networks = [network.to(accelerator.device) for network in networks]
        self._accelerator, self._recipe = accelerator, recipe
        self._parameters = _stacked([dict(n.named_parameters()) for n in self.networks])
        self._buffers = _stacked([dict(n.named_buffers()) for n in self.networks])
        for parameter in self._parameters.values():
            parameter.requires_grad_()
        for i, network in enumerate(self.networks):
            _view(network, {**self._parameters, **self._buffers}, i)
        self._form = copy.deepcopy(self.networks[0]).to("meta")
        self._optimizer: torch.optim.Optimizer | None = None

    def measure(self, split: Samples) -> list[Measure]:
        """Loss and accuracy of each member in eval mode."""
        self._form.eval()
        sample = first(split, 1).images
        batch = evaluation_batch(len(self.networks), sample.nbytes, self._accelerator.device.type)
        return measured(self._logits, split, batch)

    def step(self, split: Split, indices: torch.Tensor | None, lr: float) -> torch.Tensor:
        """One step of all on one minibatch, `indices` of `split` or all of it; their mean losses, [members]."""
        self._form.train()
        optimizer = self._started()
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch = split if indices is None else split.at(indices)
        logits = self._logits(batch.images)
        members = len(self.networks)
        each = F.cross_entropy(logits.flatten(0, 1), batch.labels.repeat(members), reduction="none")
        losses = each.view(members, -1).mean(1)
        optimizer.zero_grad()
        with _no_slow_path():
            self._accelerator.backward(losses.sum())
        optimizer.step()
        return losses.detach()

    def state(self) -> State:
        """Stacked weights, buffers and optimizer."""
        held = optimizer_state(self._started())
        tensors = prefixed(parameters=self._parameters, buffers=self._buffers, optimizer=held.tensors)
        return State(tensors, {"optimizer": held.values})

    @torch.no_grad()
    def restore(self, state: State) -> None:
        """Be where `state` was taken."""
        for name, held in (("parameters", self._parameters), ("buffers", self._buffers)):
            for key, tensor in part(state.tensors, name).items():
                held[key].copy_(tensor)
        restore_optimizer(self._started(), State(part(state.tensors, "optimizer"), state.values["optimizer"]))

    def close(self) -> None:
        """Nothing to let go of: the weights stay with the networks."""

    def _logits(self, images: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [members, B, classes]."""

        def one(parameters: dict[str, torch.Tensor], buffers: dict[str, torch.Tensor]) -> torch.Tensor:
            return torch.func.functional_call(self._form, (parameters, buffers), (images,))

        with self._accelerator.autocast(), _no_slow_path():
            # randomness: a dropout mask is the same for all, as it is for one network after the other
            return torch.func.vmap(one, randomness="same")(self._parameters, self._buffers)

    def _started(self) -> torch.optim.Optimizer:
        if self._optimizer is None:
            self._optimizer = optimizer_of(list(self._parameters.values()), self._recipe)
        return self._optimizer


def evaluation_batch(members: int, sample_bytes: int, device: str) -> int:
    """Return the number of samples that a fleet evaluates per call, on a type of device. It depends on nothing else, so
    that equal executions sum in the same order."""
    budget = CPU_BYTES if device == "cpu" else ACCELERATOR_BYTES
    return max(FEWEST, budget // (members * sample_bytes))


def _stacked(tensors: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Name -> [members, ...]. Raises NoFleet where shapes differ."""
    try:
        return {name: torch.stack([t[name].detach() for t in tensors]).contiguous() for name in tensors[0]}
    except (RuntimeError, KeyError) as error:
        raise NoFleet(f"the networks are not of one shape: {error}") from error


def _view(network: nn.Module, stacked: dict[str, torch.Tensor], member: int) -> None:
    """Let a network's tensors be slices of the stacked ones."""
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        tensor.data = stacked[name].detach()[member]


@contextmanager
def _no_slow_path() -> Iterator[None]:
    """An operation that vmap would run once per member raises NoFleet."""
    functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    before = functorch._is_vmap_fallback_enabled()
    functorch._set_vmap_fallback_enabled(False)
    try:
        yield
    except RuntimeError as error:
        said = str(error)
        if "vmap" in said or "batching rule" in said:
            raise NoFleet(said.partition("\n")[0]) from error
        raise
    finally:
        functorch._set_vmap_fallback_enabled(before)
