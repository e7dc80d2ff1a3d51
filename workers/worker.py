"""A worker: one process, one device, one precision. It turns shards into rows."""

from __future__ import annotations

import copy
import math
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from storage.errors import StoreError
from storage.phases import Report, silent
from storage.records import Row, row_for, utc_now
from storage.rowfiles import Attempts
from workers.pulse import Elsewhere, Stopped

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from torch import nn

    from pruners.coupling import Graph
    from storage.records import Cell, Dense, Execution, Recipe, Shard, Task
    from storage.store import Store
    from workers.checkpoints import Checkpoint
    from workers.datasets import Data, Dataset, Samples
    from workers.pulse import Pulse

LOOK_AGAIN_SECONDS = 5.0
"""How old a worker's knowledge of what others have done may be when it starts a task."""

QUICK_SECONDS = 0.02
"""The row of a task that took longer is committed at once."""

GROUP_SECONDS = 0.2
"""Rows of tasks that end within this long of the first one's start are committed together."""

PAUSE_AFTER = 5
"""So many tasks of a cell that fail at the same place pause the cell: the rest stays pending."""

OUT_OF_MEMORY = "OutOfMemory"
"""The error class of a task that ran out of memory alone, whatever the library called it."""

PART_SECONDS = 10.0
"""So long a process that met an error waits for the first one to write it down."""

PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
"""Our names of a precision -> Accelerate's."""


class PrecisionMissing(Exception):
    """This device does not have the precision."""


class DenseMissing(Exception):
    """The dense weights a task starts from are not in the store, or were damaged."""


class MemoryShort(Exception):
    """A task ran out of memory beside others: (task id, the error's message)."""


class Halved(Exception):
    """A fleet did not fit the memory: the shard again, in fleets of half the size."""


class Together(Exception):
    """Tasks of a fleet failed together: each is to be tried for itself."""


class Parted(Exception):
    """A task failed that several processes trained: they may not be at the same point any more."""


class Repeated(Exception):
    """Too many tasks of one cell fail at the same place."""


@dataclass(frozen=True)
class DenseModel:
    """A dense model on the CPU and the hash of the file it came from."""

    model: nn.Module
    sha256: str


class Worker:
    """What one process holds between tasks: the prepared data sets and the dense models.

    With a `pulse` it shows what it is at, heeds limits and the wish to stop, and checkpoints. `fixed` is
    an execution to repeat, in place of the one the store has for a shape. Several `joined` workers train each task
    together: the first decides and writes, and is the only one with a pulse. Of a GPU it uses `part` of the memory,
    where that is less than all. `phase` gets the phases of its work: the pulse, unless another is set.
    """

    def __init__(
        self,
        store: Store,
        data_root: str,
        precision: str = "fp32",
        *,
        cpu: bool = False,
        pulse: Pulse | None = None,
        fixed: Execution | None = None,
        joined: bool = False,
        part: float = 1.0,
    ) -> None:
        self.store, self.data_root, self.precision, self.cpu = store, data_root, precision, cpu
        self.pulse, self.fixed, self.joined, self.part = pulse, fixed, joined, part
        self.phase: Report = pulse.phase if pulse else silent
        self.messages: list[str] = []
        self._cache: dict[tuple[Any, ...], Any] = {}
        self._checkpoints: list[Checkpoint] = []
        self._most = 1

    @cached_property
    def accelerator(self) -> Accelerator:
        """Accelerate's view of this process: device and precision. A process has one precision."""
        from accelerate import Accelerator, DistributedDataParallelKwargs

        # Of a user's network, or of the vision tower of another, some parameters may have no gradient.
        together = [DistributedDataParallelKwargs(find_unused_parameters=True)] if self.joined else []
        accelerator = Accelerator(mixed_precision=PRECISIONS[self.precision], cpu=self.cpu, kwargs_handlers=[*together])
        if self.precision == "fp16" and accelerator.device.type == "cpu":
            # Accelerate would go on in fp32 without a word.
            raise PrecisionMissing("fp16 needs a GPU; on a CPU there are fp32 and bf16")
        if accelerator.device.type == "cuda" and 0 < self.part < 1:
            from workers.memory import keep_to_part

            keep_to_part(self.part)
        return accelerator

    def run_shard(self, shard: Shard) -> Iterator[Row]:
        """Run what the store does not have yet of a shard; each row is durable when it is yielded.

        A task that fails leaves a failed row. Raises what is no task's own: Stopped, Elsewhere,
        DenseMissing, StoreError, Diverged of a dense model, MemoryShort for a task to be run alone, Repeated.
        """
        with self._at(shard):
            self.phase("preparing a shard")
            if self.pulse and self.pulse.is_elsewhere(shard.filed_under):
                raise Elsewhere
            while True:
                try:
                    for group in grouped(self._attempts(shard)):
                        if self.leads:
                            with self._at(shard, group[-1].task_id):
                                self.store.commit_rows(shard.filed_under, group)
                                self._drop_checkpoints()
                        yield from group
                        if self.joined and group[-1].status == "failed":
                            raise Parted
                    return
                except Halved:
                    continue

    def _attempts(self, shard: Shard) -> Iterator[Row]:
        """The same, each row to be made durable. Raises Halved too."""
        self._checkpoints = []  # those of a shard that did not end here are not ours to drop
        if shard.dense is None:
            self.dense(shard.needs)
        if shard.dense:
            with self._at(shard, shard.dense.dense_id):
                self.train_dense(shard.dense)
            return
        known = Attempts(self.store, shard.filed_under, (task.task_id for task in shard.tasks))
        attempts, looked = self._agreed(known.look()), time.monotonic()
        failures: Counter[str] = Counter()
        size = self._fleet_size(shard)
        for fleet in fleets(shard.tasks, size):
            if self._agreed(bool(self.pulse and self.pulse.stop.is_set())):
                raise Stopped
            if self._agreed(time.monotonic() - looked >= LOOK_AGAIN_SECONDS):
                # Another driver may be at the same shard.
                attempts, looked = self._agreed(known.look()), time.monotonic()
            tries = {task: len(attempts.get(task.task_id, [])) + 1 for task in fleet}
            left = [task for task in fleet if "done" not in attempts.get(task.task_id, [])]
            for row in self._rows(shard, left, tries, size) if left else ():
                yield row
                if row.status == "failed":
                    failures[where_it_failed(row)] += 1
                    if failures[where_it_failed(row)] == PAUSE_AFTER:
                        raise Repeated(f"{PAUSE_AFTER} tasks failed at the same place: {last_line(row.error)}")

    def _fleet_size(self, shard: Shard) -> int:
        """How many networks train at once. On a CPU one: what goes wrong before then is the task's failure."""
        self._most = shard.block
        if self.fixed is None and not self._has_accelerator():
            return 1
        return self.execution(shard.tasks[0].cell).fleet

    def _rows(self, shard: Shard, tasks: Sequence[Task], tries: Mapping[Task, int], size: int) -> Iterator[Row]:
        """The rows of a fleet's tasks: of all at once, or one by one where together they failed."""
        try:
            with self._at(shard, *(task.task_id for task in tasks), limited=size):
                rows = self.attempt(tasks, keep=shard.keep, attempts=[tries[t] for t in tasks], alone=shard.is_alone)
            yield from rows
        except Together:
            for task in tasks:
                yield from self._rows(shard, [task], tries, size)

    def _has_accelerator(self) -> bool:
        if self.cpu:
            return False
        import torch

        return torch.accelerator.is_available()

    def attempt(
        self, tasks: Sequence[Task], *, keep: str = "none", attempts: Sequence[int] = (1,), alone: bool = True
    ) -> list[Row]:
        """The rows of a fleet's tasks: done, or of a single task failed with the error's class and traceback.

        Several that fail raise Together. Memory that runs out is a task's own failure only where it ran
        `alone`; else MemoryShort is raised, or the fleet's size halved.
        """
        from workers.task import provenance, run_tasks

        started = utc_now()
        before = list(self._checkpoints)
        try:
            return run_tasks(tasks, self, keep=keep, attempts=attempts)
        except (Stopped, StoreError, DenseMissing):
            self._checkpoints = before  # nor is that of this task
            raise
        except Exception as error:
            if not self.leads:
                time.sleep(PART_SECONDS)  # that the first, which has met the same, can write it down
                raise
            short, (task, *others) = is_memory_short(error), tasks
            if short and self._halve_fleet(task.cell):
                raise Halved from None
            if others:
                raise Together from error
            if short and not alone:
                self._checkpoints = before
                raise MemoryShort(task.task_id, str(error)) from None
            what = {
                "error_class": OUT_OF_MEMORY if short else type(error).__name__,
                "error": traceback.format_exc(),
                "started_at": started,
                "finished_at": utc_now(),
            }
            return [row_for(task, "failed", provenance(attempts[0]) | what)]

    def train_dense(self, dense: Dense) -> None:
        """Train a dense model and keep it, unless the store has it. Raises Diverged, or Stopped."""
        from workers.backends import is_plain
        from workers.dense import initial_model, train_dense
        from workers.execution import arithmetic, choose_execution

        if self._agreed(self.store.dense(dense.dense_id) is not None):
            return
        if self.leads:
            self._set_damaged_aside(dense)  # what is there would be in the way of the same name
        data, device = self.data(dense), self.accelerator.device
        kind = () if is_plain(dense.recipe) else ("eager",)
        shape = (dense.model, dense.dataset, dense.recipe.batch_size, "dense", *kind)
        decide = lambda: self._fastest(initial_model(dense, self.data_root), data, dense.recipe, 1)  # noqa: E731
        execution = self._joined_execution() or choose_execution(self.store, shape, device, decide)
        execution = self._reported(execution, f"the dense {dense.model} on {dense.dataset}")
        checkpoint = self.checkpoint(dense.dense_id, {"execution": execution.json})
        with arithmetic(execution):
            content = train_dense(dense, data, self.accelerator, execution, checkpoint, self.data_root, self.phase)
        if self.leads:
            self.store.commit_dense(dense.dense_id, content)
            self._drop_checkpoints()

    # -- several processes -------------------------------------------------------------------------

    @property
    def leads(self) -> bool:
        """Whether this process decides and writes."""
        return not self.joined or self.accelerator.is_main_process

    def _agreed(self, found: Any) -> Any:
        """What the first of joined processes found: each must go the same way."""
        if not self.joined:
            return found
        from accelerate.utils import broadcast_object_list

        assert self.accelerator  # its process group is what this talks through
        return broadcast_object_list([found])[0]

    def take_messages(self) -> list[str]:
        """What the person should know, since the last time."""
        taken, self.messages = self.messages, []
        return taken

    # -- what a pulse adds -------------------------------------------------------------------------

    def _at(self, shard: Shard, *keys: str, limited: int = 0) -> AbstractContextManager[None]:
        """While this lasts the pulse shows the tasks, or the dense model, and holds tasks to their limits."""
        return self.pulse.at(shard.shard_id, *keys, limited=limited) if self.pulse else nullcontext()

    def checkpoint(self, key: str, about: Mapping[str, Any]) -> Checkpoint | None:
        """The checkpoint of the training that begins; none without a pulse. Who does not lead only reads it."""
        from workers.checkpoints import Checkpoint

        if not self.leads:
            return Checkpoint(self.store.scratch, key, about, math.inf)
        if self.pulse is None:
            return None
        seconds, stop = self.pulse.limits.checkpoint_seconds, self.pulse.stop.is_set
        self._checkpoints.append(Checkpoint(self.store.scratch, key, about, seconds, stop, self._report))
        return self._checkpoints[-1]

    def _report(self, message: str) -> None:
        """Keep a message for the person, and show it at once where there is a pulse."""
        self.messages.append(message)
        if self.pulse:
            self.pulse.report(message)

    def _reported(self, execution: Execution, trained: str) -> Execution:
        """Return `execution`, after a report of the fault that makes it a slower one."""
        if execution.fallback:
            self._report(f"eager torch trains {trained}, several times slower: {execution.fallback}")
        return execution

    def _drop_checkpoints(self) -> None:
        """Their rows are committed: the checkpoints of the last trainings go."""
        for checkpoint in self._checkpoints:
            checkpoint.drop()
        self._checkpoints = []

    # -- what tasks share, made once per process ---------------------------------------------------

    def _once(self, key: tuple[Any, ...], make: Any) -> Any:
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    def dense(self, dense: Dense) -> DenseModel:
        """The dense model from the store. Raises DenseMissing; weights that are damaged are set aside."""
        from workers.dense import load_dense

        def make() -> DenseModel:
            file = self.store.dense(dense.dense_id)
            if file is None:
                raise DenseMissing(self._set_damaged_aside(dense))
            return DenseModel(load_dense(dense, file.content, self.data_root), file.sha256)

        return self._once(("dense", dense.dense_id), make)

    def _set_damaged_aside(self, dense: Dense) -> str:
        """Move weights that are not what their name says out of the way; which, in words."""
        damaged = self.store.set_damaged_dense_aside(dense.dense_id)
        return "; ".join(f"{p.file}: {p.reason}; it is set aside" for p in damaged)

    def dataset(self, dense: Dense) -> Dataset:
        """What is known of a dense model's data set without its samples."""
        from workers.datasets import find_dataset

        return self._once(("dataset", dense.dataset), lambda: find_dataset(dense.dataset, self.data_root))

    def data(self, dense: Dense) -> Data:
        """The prepared data set a dense model and all that is pruned from it are trained on."""
        from workers.datasets import prepare

        content, device = dict(dense.content).get("dataset"), self.accelerator.device

        def make() -> Data:
            data = prepare(dense.dataset, self.data_root, dense.validation, device, content, self.phase)
            if data.damaged:
                some = f"{', '.join(data.damaged[:5])}{', ...' if data.skipped > 5 else ''}"
                self._report(f"{dense.dataset}: {data.skipped} damaged images are left out: {some}")
            return data

        return self._once(("data", dense.dataset, dense.validation, content), make)

    def loss_set(self, cell: Cell) -> Samples:
        """What pruned train loss is measured on: the train set, or a fixed subset of it."""
        import torch

        from workers.streams import generator

        train = self.data(cell.dense).train
        if cell.loss_subset is None:
            return train

        def make() -> Samples:
            order = torch.randperm(len(train), generator=generator(cell.dense.dataset, 0, "loss_subset"))
            return train.at(order[: cell.loss_subset].sort().values)

        return self._once(("loss_set", cell.dense.dataset, cell.dense.validation, cell.loss_subset), make)

    def execution(self, cell: Cell) -> Execution:
        """How tasks of this shape are computed here."""
        from workers.backends import SERIAL
        from workers.execution import choose_execution, repeated

        device = self.accelerator.device
        if self.fixed:
            return repeated(self.fixed, device)
        shape = self._shape(cell)
        # A mask lives in the modules, which only the serial back-end runs; a task in steps runs for itself.
        at_once = self._most if cell.schedule == "one-shot" else 1
        decide = lambda: (  # noqa: E731
            SERIAL
            if cell.granularity == "weight"
            else self._fastest(self._example(cell), self.data(cell.dense), cell.retrain, at_once)
        )
        choose = lambda: self._joined_execution() or choose_execution(self.store, shape, device, decide)  # noqa: E731
        layers = ", ".join(f"{name} {ratio:g}" for name, ratio in cell.layers)
        trained = f"{cell.dense.model} on {cell.dense.dataset} with {layers} removed"
        return self._once(("execution", shape), lambda: self._reported(choose(), trained))

    def _joined_execution(self) -> Execution | None:
        """How tasks are computed by several processes; None for one alone."""
        from workers.backends import SERIAL
        from workers.execution import execution_of

        if not self.joined:
            return None
        return replace(execution_of(SERIAL, self.accelerator.device), processes=self.accelerator.num_processes)

    def _shape(self, cell: Cell) -> tuple[Any, ...]:
        from workers.backends import is_plain

        if cell.granularity == "weight":
            removed = tuple(ratio for _, ratio in cell.layers)
        else:
            removed = tuple(len(channels) for channels in self._first_channels(cell).values())
        names = tuple(name for name, _ in cell.layers)
        kind = () if is_plain(cell.retrain) else ("eager",)
        usual = {cell.granularity: "filter", cell.schedule: "one-shot", cell.scope: "local"}
        kind += tuple(given for given, default in usual.items() if given != default)
        shape = (cell.dense.model, cell.dense.dataset, names, removed, cell.retrain.batch_size, cell.precision, *kind)
        return shape if self.accelerator.device.type == "cpu" else (*shape, self._most)

    def _example(self, cell: Cell) -> nn.Module:
        """A pruned network of a cell's shape."""
        from pruners.surgery import prune
        from workers.datasets import probe

        removed = {name: gone for name, gone in self._first_channels(cell).items() if gone}
        example = probe(self.data(cell.dense).train, 1)
        return prune(self.dense(cell.dense).model, removed, example, graph=self.graph(cell))

    def _first_channels(self, cell: Cell) -> dict[str, tuple[int, ...]]:
        """The channels of as many of the first units of each layer as its ratio removes."""
        from pruners.candidates import n_removed

        units = self.units(cell)
        return {name: cell.channels(name, range(n_removed(units[name], ratio))) for name, ratio in cell.layers}

    def units(self, cell: Cell) -> dict[str, int]:
        """Return layer -> how many units a cell's layers have in the dense model."""
        from pruners.surgery import units_of

        model, sets = self.dense(cell.dense).model, dict(cell.sets)
        return {n: len(sets[n]) if n in sets else units_of(model.get_submodule(n)) for n, _ in cell.layers}

    def graph(self, cell: Cell) -> Graph | None:
        """Return the couplings of a cell's dense model; None where only heads are pruned.

        Raises Changed where the units of a layer are others than the cell was planned with.
        """
        from pruners.coupling import traced
        from workers.datasets import probe

        model = self.dense(cell.dense).model
        layers = [name for name, _ in cell.layers if not hasattr(model.get_submodule(name), "prunable_heads")]
        if not layers:
            return None

        def make() -> Graph:
            return traced(model, probe(self.data(cell.dense).train, 1))

        found: Graph = self._once(("graph", cell.dense.dense_id), make)
        self._once(("sets", cell.cell_id), lambda: _check_sets(found, cell, layers))
        return found

    def _fastest(self, network: nn.Module, data: Data, recipe: Recipe, block: int) -> dict[str, Any]:
        """The choice for networks like this one, in fleets of at most `block`."""
        from workers.backends import SERIAL, fastest
        from workers.execution import arithmetic, execution_of

        self.phase("choosing the fastest back-end")
        with arithmetic(execution_of(SERIAL, self.accelerator.device)):
            return fastest(network, data.train, recipe, self.accelerator, block)

    def _halve_fleet(self, cell: Cell) -> bool:
        """Note half the fleet for this shape, where there is more than one to halve: memory ran out."""
        from workers.execution import note_name

        if self.fixed or not self._has_accelerator() or (fleet := self.execution(cell).fleet) == 1:
            return False
        shape = self._shape(cell)
        name = note_name(shape, self.accelerator.device)
        noted = self.store.scratch.noted(name) or {}
        if noted.get("fleet", 1) >= fleet:
            self.store.scratch.renew(name, {**noted, "fleet": fleet // 2})
        del self._cache["execution", shape]
        return True

    def baseline(self, cell: Cell) -> dict[str, Any]:
        """The dense_* columns: what the dense model achieves, measured as the pruned ones are."""
        from workers.backends import SERIAL, open_backend

        execution, data = self.execution(cell), self.data(cell.dense)
        if execution.backend == "fleet":  # of a single network it would be another computation anyway
            execution = replace(execution, **SERIAL)

        def make() -> dict[str, Any]:
            dense = copy.deepcopy(self.dense(cell.dense).model)
            shape = self.dataset(cell.dense).shape
            with closing(open_backend(execution, [dense], cell.retrain, self.accelerator, shape)) as backend:
                (on_train,), (on_test,) = backend.measure(self.loss_set(cell)), backend.measure(data.test)
            return {
                "dense_train_loss": on_train.loss,
                "dense_test_loss": on_test.loss,
                "dense_test_accuracy": on_test.accuracy,
            }

        # Text is measured in batches as small as those it is trained in.
        batch = (cell.retrain.batch_size, cell.retrain.accumulate) if cell.dense.model.startswith("hf/") else None
        key = ("baseline", cell.dense.dense_id, cell.loss_subset, execution.json, batch)
        return self._once(key, make)

    def size(self, network: nn.Module, example: torch.Tensor, dense: Dense) -> tuple[int, int]:
        """Return (parameters, multiply-adds) of a network, dense or pruned from it, counted once for each set of shapes
        of all its tensors and activations."""
        from pruners.dispatch import shapes_of

        return self._once(("size", dense.dense_id, shapes_of(network, example)), lambda: count(network, example))


def _check_sets(graph: Graph, cell: Cell, layers: Sequence[str]) -> bool:
    """Raise Changed where the units of these layers are others than the cell was planned with."""
    from workers.datasets import Changed

    planned = dict(cell.sets)
    for layer in layers:
        found = graph.sets(layer)
        is_plain = layer not in planned and all(len(channels) == 1 for channels in found)
        if not is_plain and found != planned.get(layer):
            said = "other units than the sweep was planned with: some of its channels can only be removed together"
            raise Changed(f"{layer} of {cell.dense.model} has {said}; run the spec again to plan new tasks")
    return True


def grouped(rows: Iterator[Row]) -> Iterator[list[Row]]:
    """`rows` as groups to commit: the row of a task that took no time waits for others, but only GROUP_SECONDS
    long; any other, and a failed one, goes at once. What ends `rows` early is raised after the last group."""
    group: list[Row] = []
    began = last = time.monotonic()
    try:
        for row in rows:
            group.append(row)
            now = time.monotonic()
            if row.status == "failed" or now - last >= QUICK_SECONDS or now - began >= GROUP_SECONDS:
                yield group
                group, began = [], time.monotonic()
            last = time.monotonic()
    except Exception:
        if group:
            yield group
        raise
    if group:
        yield group


def count(network: nn.Module, example: torch.Tensor) -> tuple[int, int]:
    """(parameters, multiply-adds for `example` by torch.utils.flop_counter / 2)."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    # The counter hooks gradients, and fails on a parameter that is a module's input (a class token). It does not know
    # the one kernel that attention is in eval mode.
    frozen, fast = copy.deepcopy(network).requires_grad_(False), torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            frozen(example)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return sum(p.numel() for p in network.parameters()), counter.get_total_flops() // 2


def fleets(tasks: Sequence[Task], size: int) -> list[list[Task]]:
    """The tasks that train together: of one seed, and one block of `size` candidate numbers."""
    if size == 1:
        return [[task] for task in tasks]
    found: dict[tuple[int, int], list[Task]] = {}
    for task in tasks:
        found.setdefault((task.candidate // size, task.seed), []).append(task)
    return list(found.values())


def is_memory_short(error: BaseException) -> bool:
    """Whether an error says that memory ran out, of the machine or of the device."""
    said = str(error).lower()
    # Of torch, on a GPU and on a CPU; its OutOfMemoryError is a RuntimeError.
    by_torch = isinstance(error, RuntimeError) and ("out of memory" in said or "can't allocate memory" in said)
    return by_torch or isinstance(error, MemoryError)


def where_it_failed(row: Row) -> str:
    """A failed row's error class and the lines of its traceback, without what differs from task to task."""
    frames = [line.strip() for line in (row.error or "").splitlines() if line.startswith("  File ")]
    return "\n".join([str(row.error_class), *frames])


def last_line(text: str | None) -> str:
    """A traceback's last line: what went wrong."""
    return (text or "").strip().splitlines()[-1] if (text or "").strip() else ""
