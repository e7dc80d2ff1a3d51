"""The serial back-end: one network at a time, eager torch, by Accelerate's device and precision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from models.weights import load_state
from workers.checkpoints import State, optimizer_state, part, prefixed, restore_optimizer
from workers.datasets import Split
from workers.measures import EVALUATION_BATCH, Measure, cross_entropy, measured

if TYPE_CHECKING:
    from collections.abc import Iterator

    from accelerate import Accelerator
    from torch import nn
    from torch.optim.swa_utils import AveragedModel

    from storage.records import Recipe
    from workers.datasets import Samples


IGNORED = -100
"""The label of what no loss is taken of, in torch's cross-entropy."""


class Serial:
    """One network in training, any model, any recipe, any precision.

    With a moving average of the weights (`recipe.ema`) it is the average that is measured and kept.
    """

    def __init__(self, network: nn.Module, recipe: Recipe, accelerator: Accelerator, memory_format: str) -> None:
        self._network = network.to(accelerator.device).to(memory_format=getattr(torch, memory_format))
        self._recipe, self._accelerator = recipe, accelerator
        self._net, self._optimizer = self._network, None
        if recipe.ema and recipe.lora_rank:
            raise ValueError(
                "a moving average (ema) of low-rank additions (lora_rank) is not kept: leave one of them out"
            )
        self._average = averaged(self._network, recipe.ema) if recipe.ema else None
        self.networks = [self._average.module if self._average else self._network]

    def measure(self, split: Samples) -> list[Measure]:
        """Loss and accuracy in eval mode."""
        net = self._average or (self._network if self._accelerator.num_processes > 1 else self._net)
        was_training = net.training
        net.eval()

        def logits(images: torch.Tensor) -> torch.Tensor:
            with self._accelerator.autocast():
                return net(images).unsqueeze(0)

        found = measured(logits, split, self._evaluation_batch(split), self._accelerator)
        net.train(was_training)
        return found

    def _evaluation_batch(self, split: Samples) -> int:
        """Of text only what fits in training: a sample is many times an image's size."""
        if not (isinstance(split, Split) and isinstance(split.images, Mapping)):
            return EVALUATION_BATCH
        return min(EVALUATION_BATCH, -(-self._recipe.batch_size // self._recipe.accumulate))

    def step(self, split: Split, indices: torch.Tensor | None, lr: float) -> torch.Tensor:
        """One step on one minibatch, `indices` of `split` or all of it; its mean loss, [1]."""
        optimizer, recipe = self._started(), self._recipe
        for group in optimizer.param_groups:
            group["lr"] = lr
        self._net.train()
        batch = split if indices is None else split.at(indices)
        optimizer.zero_grad()
        loss = self._accumulated(batch)
        if recipe.clip_norm is not None:
            self._accelerator.clip_grad_norm_(self._net.parameters(), recipe.clip_norm)
        optimizer.step()
        if self._average and not getattr(optimizer, "step_was_skipped", False):  # fp16's scaler skips some
            self._average.update_parameters(self._network)
        return loss.unsqueeze(0)

    def _accumulated(self, batch: Split) -> torch.Tensor:
        """Add the gradient of a minibatch's mean loss, part by part where that is asked for; the loss, without
        label smoothing."""
        losses: list[torch.Tensor] = []
        smoothing = self._recipe.label_smoothing
        for whole, part_share in parts_of(batch, self._recipe.accumulate):
            piece, share = self._own_part(whole, part_share)
            with self._accelerator.autocast():
                logits = self._net(piece.images)
                loss = cross_entropy(logits, piece.labels, label_smoothing=smoothing)
            self._accelerator.backward(loss if share == 1 else loss * share)
            shown = cross_entropy(logits.detach(), piece.labels) if smoothing else loss.detach()
            losses.append(shown if share == 1 else shown * share)
        total = torch.stack(losses).sum()
        if self._accelerator.num_processes == 1:
            return total
        mean = self._accelerator.reduce(total, "mean")
        assert isinstance(mean, torch.Tensor)
        return mean

    def _own_part(self, batch: Split, share: float) -> tuple[Split, float]:
        """This process's part of a minibatch that is a `share` of a step, and the factor by which the mean over the
        processes becomes that of the step: those without a sample add nothing."""
        accelerator, n = self._accelerator, len(batch)
        if accelerator.num_processes == 1:
            return batch, share
        everyone = torch.arange(n, device=batch.labels.device)
        own = everyone.tensor_split(accelerator.num_processes)[accelerator.process_index]
        part = batch.at(own if len(own) else everyone[:1])
        return part, share * accelerator.num_processes * (counted(part) / counted(batch) if len(own) else 0.0)

    def state(self) -> State:
        """Weights, optimizer and loss scale."""
        held = optimizer_state(_inner(self._started()))
        scaler = self._accelerator.scaler
        average = self._average.state_dict() if self._average else {}
        return State(
            prefixed(model=self._network.state_dict(), optimizer=held.tensors, average=average),
            {"optimizer": held.values, "scaler": scaler.state_dict() if scaler is not None else None},
        )

    def restore(self, state: State) -> None:
        """Be where `state` was taken."""
        self._started()  # gives the network its low-rank additions
        load_state(self._network, part(state.tensors, "model"))
        if self._average:
            load_state(self._average, part(state.tensors, "average"))
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
        if self._recipe.lora_rank:
            from models.multimodal import with_lora

            with_lora(self._network, self._recipe.lora_rank)
        self._optimizer = optimizer_of(list(self._network.parameters()), self._recipe)
        accelerator = self._accelerator
        if accelerator.scaler is not None:
            # One scaler per process: without this the last task's scale would be this one's.
            accelerator.scaler.load_state_dict(torch.amp.GradScaler(accelerator.device.type).state_dict())
        if accelerator.num_processes > 1:
            self._network = synchronised(self._network)
        if accelerator.scaler is not None or accelerator.num_processes > 1:
            self._net, self._optimizer = accelerator.prepare(self._network, self._optimizer)
        return self._optimizer


def optimizer_of(parameters: list[Any], recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer of what requires gradients, at the learning rate of its first epoch."""
    trained, lr = [p for p in parameters if p.requires_grad], recipe.lr_at(0)
    if recipe.optimizer == "adam":
        return torch.optim.Adam(trained, lr=lr, betas=recipe.betas, weight_decay=recipe.weight_decay)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(trained, lr=lr, betas=recipe.betas, weight_decay=recipe.weight_decay)
    assert recipe.optimizer == "sgd", recipe.optimizer
    return torch.optim.SGD(
        trained, lr=lr, momentum=recipe.momentum, nesterov=recipe.nesterov, weight_decay=recipe.weight_decay
    )


def synchronised(network: nn.Module) -> nn.Module:
    """A network whose batch norms take their statistics over all processes. Raises ValueError on CPUs, where torch
    has none that do."""
    norms = [m for m in network.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    if norms and next(network.parameters()).device.type == "cpu":
        raise ValueError("batch norm over several processes needs GPUs: set resources.processes to 1")
    return torch.nn.SyncBatchNorm.convert_sync_batchnorm(network) if norms else network


def averaged(network: nn.Module, decay: float) -> AveragedModel:
    """A moving average of a network's weights and buffers, `decay` per step."""
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    return AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


def parts_of(batch: Split, count: int) -> Iterator[tuple[Split, float]]:
    """A minibatch in `count` parts of about one size, each with its share of what the loss is a mean over."""
    if count == 1:
        yield batch, 1.0
        return
    for indices in torch.arange(len(batch), device=batch.labels.device).tensor_split(min(count, len(batch))):
        part = batch.at(indices)
        yield part, counted(part) / counted(batch)


def counted(batch: Split) -> int:
    """What a mean loss over a batch is a mean over: its samples, or of text its answer tokens."""
    labels = batch.labels
    return len(batch) if labels.is_floating_point() else int((labels != IGNORED).sum())


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    """Torch's optimizer, out of Accelerate's wrapper where there is one."""
    return getattr(optimizer, "optimizer", optimizer)
