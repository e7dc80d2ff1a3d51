"""Dense models: trained once per (model, dataset, recipe), kept as safetensors."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from models import build_model, load_weights
from models.registry import model_content
from models.weights import file_hash, load_state
from storage.phases import TRAINING_DENSE, Report, silent
from usercode import is_code
from workers.backends import open_backend
from workers.datasets import check_content, find_dataset
from workers.rates import planned_epochs
from workers.streams import seeded
from workers.training import train
from workers.weights import packed, portable

if TYPE_CHECKING:
    from accelerate import Accelerator

    from storage.records import Dense, Execution
    from workers.checkpoints import Checkpoint
    from workers.datasets import Data


class Diverged(Exception):
    """The dense model's loss left the finite numbers: there is nothing to prune."""


def initial_model(dense: Dense, data_root: str | None = None) -> nn.Module:
    """The untrained network of a dense model, its weights drawn from the stream `init`. Raises Changed where a user's
    code is not what the sweep was planned with."""
    if is_code(dense.model):
        _check_network(dense)
    with seeded(dense.dataset, dense.recipe.seed or 0, "init"):
        dataset = find_dataset(dense.dataset, data_root)
        return build_model(dense.model, dataset.classes, dataset.shape)


def starting_model(dense: Dense, data_root: str | None = None) -> nn.Module:
    """What the training of a dense model starts from: its recipe's weights, or the untrained network. Raises
    ValueError where the weights do not fit it, Changed where they or the network's files are others than planned."""
    if not is_code(dense.model):
        _check_network(dense)  # a folder of a large network is read whole: once, not by every worker
    model, weights = initial_model(dense, data_root), dense.recipe.weights
    if weights is None:
        return model
    planned = dict(dense.content).get("weights")
    if planned and Path(weights).is_file():  # where it is not, loading says so
        check_content(f"the file of weights {weights}", planned, file_hash(Path(weights)))
    with seeded(dense.dataset, dense.recipe.seed or 0, "weights"):  # a library may draw a classifier of its own
        load_weights(model, dense.model, weights)
    return model


def _check_network(dense: Dense) -> None:
    if planned := dict(dense.content).get("model"):
        check_content(f"the network {dense.model}", planned, model_content(dense.model))


def train_dense(
    dense: Dense,
    data: Data,
    accelerator: Accelerator,
    execution: Execution,
    checkpoint: Checkpoint | None = None,
    data_root: str | None = None,
    report: Report = silent,
) -> bytes:
    """Train a dense model and return it as the content of a safetensors file.

    The content depends on the weights and what they achieve only. Raises Diverged, or Stopped. `report` gets each
    epoch.
    """
    name = f"{TRAINING_DENSE} {dense.model} on {dense.dataset}"
    report(name)
    recipe, model = dense.recipe, starting_model(dense, data_root)
    shape = find_dataset(dense.dataset, data_root).shape
    with closing(open_backend(execution, [model], recipe, accelerator, shape)) as backend:
        (epochs,) = train(
            backend,
            data,
            recipe,
            dataset=dense.dataset,
            seed=recipe.seed or 0,
            stream="dense",
            checkpoint=checkpoint,
            phase=name,
            report=report,
        )
        report(f"{name}: measuring it")
        ((on_train,), (on_test,)) = backend.measure(data.train), backend.measure(data.test)
        (trained,) = backend.networks
    if len(epochs) < planned_epochs(recipe, len(data.train)) or on_train.loss != on_train.loss:
        raise Diverged(f"training {dense.model} on {dense.dataset} diverged in epoch {len(epochs)}")
    about = {
        "dense": dense.to_dict(),
        "train_loss": on_train.loss,
        "test_loss": on_test.loss,
        "test_accuracy": on_test.accuracy,
    }
    return packed(portable(trained), about)


def load_dense(dense: Dense, content: bytes, data_root: str | None = None) -> nn.Module:
    """The dense model of a file's content, on the CPU, in eval mode."""
    from safetensors.torch import load

    model = initial_model(dense, data_root)
    load_state(model, load(content))
    return model.eval()
