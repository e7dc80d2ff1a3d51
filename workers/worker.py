"""A worker: one process, one device, one precision. It turns shards into rows."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from storage.records import Row, row_for, utc_now

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import nn

    from storage.records import Cell, Dense, Execution, Shard, Task
    from storage.store import Store
    from workers.datasets import Data, Split

LOOK_AGAIN_SECONDS = 5.0
"""How old a worker's knowledge of what others have done may be when it starts a task."""

PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
"""Our names of a precision -> Accelerate's."""


class PrecisionMissing(Exception):
    """This device does not have the precision."""


class DenseMissing(Exception):
    """The dense weights a task starts from are not in the store."""


@dataclass(frozen=True)
class DenseModel:
    """A dense model on the CPU and the hash of the file it came from."""

    model: nn.Module
    sha256: str

    def weight(self, layer: str) -> torch.Tensor:
        """A layer's weights, [F, ...]."""
        weight = self.model.get_submodule(layer).weight
        return weight.detach()  # pyright: ignore[reportCallIssue]


class Worker:
    """What one process holds between tasks: the prepared data sets and the dense models."""

    def __init__(self, store: Store, data_root: str, precision: str = "fp32", *, cpu: bool = False) -> None:
        self.store, self.data_root, self.precision, self.cpu = store, data_root, precision, cpu
        self._cache: dict[tuple[Any, ...], Any] = {}

    @cached_property
    def accelerator(self) -> Accelerator:
        """Accelerate's view of this process: device and precision. A process has one precision."""
        from accelerate import Accelerator

        accelerator = Accelerator(mixed_precision=PRECISIONS[self.precision], cpu=self.cpu)
        if self.precision == "fp16" and accelerator.device.type == "cpu":
            # Accelerate would go on in fp32 without a word.
            raise PrecisionMissing("fp16 needs a GPU; on a CPU there are fp32 and bf16")
        return accelerator

    def run_shard(self, shard: Shard) -> Iterator[Row]:
        """Run what the store does not have yet of a shard; each row is durable when it is yielded.

        A task that fails leaves a failed row. A dense model that fails raises.
        """
        if shard.dense:
            self.train_dense(shard.dense)
            return
        looked = -LOOK_AGAIN_SECONDS
        attempts: dict[str, list[str]] = {}
        for task in shard.tasks:
            if time.monotonic() - looked >= LOOK_AGAIN_SECONDS:
                # Another driver may be at the same shard.
                attempts, looked = self.store.shard_attempts(shard.filed_under), time.monotonic()
            statuses = attempts.get(task.task_id, [])
            if "done" not in statuses:
                row = self.attempt(task, keep=shard.keep, attempt=len(statuses) + 1)
                self.store.commit_rows(shard.filed_under, [row])
                yield row

    def attempt(self, task: Task, *, keep: str = "none", attempt: int = 1) -> Row:
        """The row of `task`: done, or failed with the error's class and traceback."""
        from workers.task import provenance, run_task

        started = utc_now()
        try:
            return run_task(task, self, keep=keep, attempt=attempt)
        except Exception as error:
            what = {
                "error_class": type(error).__name__,
                "error": traceback.format_exc(),
                "started_at": started,
                "finished_at": utc_now(),
            }
            return row_for(task, "failed", provenance(attempt) | what)

    def train_dense(self, dense: Dense) -> None:
        """Train a dense model and keep it, unless the store has it."""
        from workers.dense import train_dense
        from workers.execution import arithmetic, choose_execution

        if self.store.dense(dense.dense_id) is not None:
            return
        shape = (dense.model, dense.dataset, dense.recipe.batch_size, "dense")
        execution = choose_execution(self.store, shape, self.accelerator.device)
        with arithmetic(execution):
            content = train_dense(dense, self.data(dense), self.accelerator, execution.memory_format)
        self.store.commit_dense(dense.dense_id, content)

    # -- what tasks share, made once per process ---------------------------------------------------

    def _once(self, key: tuple[Any, ...], make: Any) -> Any:
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    def dense(self, dense: Dense) -> DenseModel:
        """The dense model from the store. Raises DenseMissing."""
        from workers.dense import load_dense

        def make() -> DenseModel:
            file = self.store.dense(dense.dense_id)
            if file is None:
                raise DenseMissing(f"no weights dense/{dense.dense_id}-*; `resume` trains them")
            return DenseModel(load_dense(dense, file.content), file.sha256)

        return self._once(("dense", dense.dense_id), make)

    def data(self, dense: Dense) -> Data:
        """The prepared data set a dense model and all that is pruned from it are trained on."""
        from workers.datasets import prepare

        key = ("data", dense.dataset, dense.validation)
        device = self.accelerator.device
        return self._once(key, lambda: prepare(dense.dataset, self.data_root, dense.validation, device))

    def loss_set(self, cell: Cell) -> Split:
        """What pruned train loss is measured on: the train set, or a fixed subset of it."""
        import torch

        from workers.streams import generator

        train = self.data(cell.dense).train
        if cell.loss_subset is None:
            return train

        def make() -> Split:
            order = torch.randperm(len(train), generator=generator(cell.dense.dataset, 0, "loss_subset"))
            return train.at(order[: cell.loss_subset].sort().values.to(train.labels.device))

        return self._once(("loss_set", cell.dense.dataset, cell.dense.validation, cell.loss_subset), make)

    def execution(self, cell: Cell) -> Execution:
        """How tasks of this shape are computed here."""
        from models import layer_units
        from pruners.candidates import n_removed
        from workers.execution import choose_execution

        units = layer_units(cell.dense.model)
        removed = tuple(n_removed(units[name], ratio) for name, ratio in cell.layers)
        names = tuple(name for name, _ in cell.layers)
        shape = (cell.dense.model, cell.dense.dataset, names, removed, cell.retrain.batch_size, cell.precision)
        return self._once(("execution", shape), lambda: choose_execution(self.store, shape, self.accelerator.device))

    def baseline(self, cell: Cell) -> dict[str, Any]:
        """The dense_* columns: what the dense model achieves, measured as the pruned ones are."""
        import copy

        from workers.dense import on_device
        from workers.training import measure

        def make() -> dict[str, Any]:
            dense = copy.deepcopy(self.dense(cell.dense).model)
            model = on_device(dense, self.accelerator, self.execution(cell).memory_format)
            on_train = measure(model, self.loss_set(cell), self.accelerator)
            on_test = measure(model, self.data(cell.dense).test, self.accelerator)
            return {
                "dense_train_loss": on_train.loss,
                "dense_test_loss": on_test.loss,
                "dense_test_accuracy": on_test.accuracy,
            }

        key = ("baseline", cell.dense.dense_id, cell.loss_subset, self.execution(cell).json)
        return self._once(key, make)

    def size(self, network: nn.Module, example: torch.Tensor, shape: tuple[Any, ...]) -> tuple[int, int]:
        """(parameters, multiply-adds) of a network; `shape` names it."""
        return self._once(("size", *shape), lambda: count(network, example))


def count(network: nn.Module, example: torch.Tensor) -> tuple[int, int]:
    """(parameters, multiply-adds for `example` by torch.utils.flop_counter / 2)."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(example)
    return sum(p.numel() for p in network.parameters()), counter.get_total_flops() // 2
