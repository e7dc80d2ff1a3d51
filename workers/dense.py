"""Dense models: trained once per (model, dataset, recipe), kept as safetensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from models import build_model
from workers.datasets import DATASETS
from workers.streams import seeded
from workers.training import measure, train
from workers.weights import packed

if TYPE_CHECKING:
    from accelerate import Accelerator

    from storage.records import Dense
    from workers.checkpoints import Checkpoint
    from workers.datasets import Data


class Diverged(Exception):
    """The dense model's loss left the finite numbers: there is nothing to prune."""


def initial_model(dense: Dense) -> nn.Module:
    """The untrained network of a dense model, its weights drawn from the stream `init`."""
    with seeded(dense.dataset, dense.recipe.seed or 0, "init"):
        return build_model(dense.model, DATASETS[dense.dataset].classes)


def train_dense(
    dense: Dense, data: Data, accelerator: Accelerator, memory_format: str, checkpoint: Checkpoint | None = None
) -> bytes:
    """Train a dense model and return it as the content of a safetensors file.

    The content depends on the weights and what they achieve only. Raises Diverged, or Stopped.
    """
    recipe = dense.recipe
    model = on_device(initial_model(dense), accelerator, memory_format)
    epochs = train(
        model,
        data,
        recipe,
        accelerator,
        dataset=dense.dataset,
        seed=recipe.seed or 0,
        stream="dense",
        checkpoint=checkpoint,
    )
    on_train = measure(model, data.train, accelerator)
    if len(epochs) < recipe.epochs or on_train.loss != on_train.loss:
        raise Diverged(f"training {dense.model} on {dense.dataset} diverged in epoch {len(epochs)}")
    about = {
        "dense": dense.to_dict(),
        "train_loss": on_train.loss,
        "test_loss": epochs[-1].test.loss,
        "test_accuracy": epochs[-1].test.accuracy,
    }
    return packed(model.state_dict(), about)


def load_dense(dense: Dense, content: bytes) -> nn.Module:
    """The dense model of a file's content, on the CPU, in eval mode."""
    from safetensors.torch import load

    model = initial_model(dense)
    model.load_state_dict(load(content))
    return model.eval()


def on_device(model: nn.Module, accelerator: Accelerator, memory_format: str) -> nn.Module:
    """`model` on the accelerator's device in a memory format, by torch's name of it."""
    return model.to(accelerator.device).to(memory_format=getattr(torch, memory_format))
