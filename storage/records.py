"""The records everything else speaks in: Recipe, Dense, Cell, Task, Shard, Execution, Row.

All are frozen. Each knows its id and how to become plain JSON and come back, nothing else.
"""

from __future__ import annotations

import datetime as dt
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from itertools import groupby
from struct import Struct
from typing import Any, overload

from storage.identity import (
    CELL_DEFAULTS,
    FOLDERS,
    RECIPE_DEFAULTS,
    SCHEMA_VERSION,
    canonical_json,
    digest,
    join_id,
    join_ids,
    without_defaults,
    without_later,
)

MANY = 4
"""Layers that a cell's words name one by one; of more the first and the last."""

IMPORTED = "imported"
"""The entry in a dense model's content that tells one known from logs: a hash of what the logs call it."""


@dataclass(frozen=True)
class Recipe:
    """How a network is trained. `lr` is ((epochs already done, value), ...), ascending from 0.

    With `lr_schedule` cosine or linear the rate goes from its one value to `final_lr` over the epochs, after
    `warmup_epochs` from near 0. `ema` is a decay per step; `max_steps` ends training early; `augment` is
    whether the data set's own augmentation is used. `seed` and `weights` (what training starts from: a name of the
    library's, a file, a URI) are set for dense training only: a retraining's seed belongs to the task. With
    `lora_rank` only low-rank additions are trained.
    """

    epochs: int
    batch_size: int
    lr: tuple[tuple[int, float], ...]
    optimizer: str = "sgd"
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    seed: int | None = None
    lr_schedule: str = "table"
    warmup_epochs: int = 0
    final_lr: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    label_smoothing: float = 0.0
    clip_norm: float | None = None
    ema: float | None = None
    accumulate: int = 1
    max_steps: int | None = None
    augment: bool = True
    mixup: float = 0.0
    cutmix: float = 0.0
    lora_rank: int | None = None
    weights: str | None = None

    def lr_at(self, epochs_done: int) -> float:
        """The learning rate once `epochs_done` epochs are behind."""
        return [value for start, value in self.lr if start <= epochs_done][-1]

    def identity(self) -> dict[str, Any]:
        """The fields that make the id, defaults left out."""
        return without_defaults(self.to_dict(), RECIPE_DEFAULTS[SCHEMA_VERSION])

    @cached_property
    def recipe_id(self) -> str:
        return digest(self.identity())

    def to_dict(self) -> dict[str, Any]:
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        plain |= {"lr": [list(step) for step in self.lr], "betas": list(self.betas)}
        return without_later(plain, RECIPE_DEFAULTS)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Recipe:
        lr = tuple((int(start), float(value)) for start, value in data["lr"])
        first, second = data.get("betas", (0.9, 0.999))
        return Recipe(**{**data, "lr": lr, "betas": (float(first), float(second))})


@dataclass(frozen=True)
class Dense:
    """A dense model: which network, trained on what, how. `validation` is the held-out share.

    `content` is ((`model`, `dataset` or `weights`, hash of what it is), ...), by name, for those that are files
    or code of a user: then their content is in the id, and the path where they lie is not. A dense model known
    from imported logs alone has IMPORTED there instead: it is not here, and is no other's.
    """

    model: str
    dataset: str
    recipe: Recipe
    validation: float = 0.0
    content: tuple[tuple[str, str], ...] = ()

    @property
    def is_imported(self) -> bool:
        """Whether it is known from imported logs alone: nothing can be pruned from it here."""
        return IMPORTED in dict(self.content)

    @cached_property
    def dense_id(self) -> str:
        held, recipe = dict(self.content), self.recipe.identity()
        data = {
            "model": "hf" if "model" in held and self.model.startswith("hf/") else self.model,
            "dataset": kind_of(self.dataset) if "dataset" in held else self.dataset,
            "recipe": recipe | ({"weights": "file"} if "weights" in held else {}),
            "validation": self.validation,
            "content": held,
        }
        return digest(without_defaults(data, CELL_DEFAULTS[SCHEMA_VERSION]))

    def to_dict(self) -> dict[str, Any]:
        data = {
            "model": self.model,
            "dataset": self.dataset,
            "recipe": self.recipe.to_dict(),
            "validation": self.validation,
            "content": dict(self.content),
        }
        return without_later(data, CELL_DEFAULTS)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Dense:
        content = tuple(sorted(data.get("content", {}).items()))
        return Dense(**{**data, "recipe": Recipe.from_dict(data["recipe"]), "content": content})


def kind_of(dataset: str) -> str:
    """`imagefolder` of `imagefolder:PATH`; of any other data set its name."""
    kind = dataset.partition(":")[0]
    return kind if kind in FOLDERS else dataset


ChannelSets = tuple[tuple[int, ...], ...]
"""For each unit of a layer its output channels, ascending."""


@dataclass(frozen=True)
class Cell:
    """One grid point without candidate and seed: what one correlation is computed over.

    `layers` is ((layer name, pruning ratio), ...) in network order. `sampling_seed` is set when
    candidates are sampled, `pruner_seed` when the pruner draws. With `scope` global a criterion ranks the units
    of all layers together. `calibration` is how many samples data-driven criteria see. `content` is as a
    dense model's, of a `pruner` that is a user's code. `sets` is ((layer, the output channels of each of its units),
    ...) for the layers whose channels can only be removed in sets, or share their weight with another layer.
    """

    dense: Dense
    layers: tuple[tuple[str, float], ...]
    pruner: str
    retrain: Recipe
    granularity: str = "filter"
    propagation: str = "exact"
    schedule: str = "one-shot"
    precision: str = "fp32"
    loss_subset: int | None = None
    candidate_mode: str = "all"
    sampling_seed: int | None = None
    pruner_seed: int | None = None
    scope: str = "local"
    calibration: int = 256
    content: tuple[tuple[str, str], ...] = ()
    sets: tuple[tuple[str, ChannelSets], ...] = ()

    @cached_property
    def cell_id(self) -> str:
        data = self.to_dict() | {"retrain": self.retrain.identity(), "dense": self.dense.dense_id}
        return digest(without_defaults(data, CELL_DEFAULTS[SCHEMA_VERSION]))

    def channels(self, layer: str, units: Iterable[int]) -> tuple[int, ...]:
        """Return the output channels of these units of a layer, ascending: mostly the units themselves."""
        sets = dict(self.sets).get(layer)
        return tuple(sorted(units if sets is None else (channel for unit in units for channel in sets[unit])))

    @property
    def pruning_ratio(self) -> float | None:
        """The one ratio of all layers; None where they differ."""
        ratios = {ratio for _, ratio in self.layers}
        return ratios.pop() if len(ratios) == 1 else None

    @cached_property
    def json(self) -> str:
        """Everything the cell is, as canonical JSON: the `recipe` column of its rows."""
        return canonical_json(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        data["dense"] = self.dense.to_dict()
        data["retrain"] = self.retrain.to_dict()
        data["layers"] = [list(layer) for layer in self.layers]
        data["content"] = dict(self.content)
        data["sets"] = {layer: [list(channels) for channels in sets] for layer, sets in self.sets}
        return without_later(data, CELL_DEFAULTS)

    @staticmethod
    def from_json(text: str) -> Cell:
        data = json.loads(text)
        layers = tuple((str(name), float(ratio)) for name, ratio in data["layers"])
        dense, retrain = Dense.from_dict(data["dense"]), Recipe.from_dict(data["retrain"])
        content = tuple(sorted(data.get("content", {}).items()))
        sets = tuple((name, tuple(map(tuple, of))) for name, of in sorted(data.get("sets", {}).items()))
        return Cell(**{**data, "dense": dense, "retrain": retrain, "layers": layers, "content": content, "sets": sets})

    def __str__(self) -> str:
        layers = joined([name for name, _ in self.layers])
        ratio = self.pruning_ratio
        shown = joined([repr(r) for _, r in self.layers]) if ratio is None else repr(ratio)
        extra = [
            value
            for value, default in (
                (self.pruner_seed, None),
                (self.granularity, "filter"),
                (self.scope, "local"),
                (self.schedule, "one-shot"),
                (self.propagation, "exact"),
                (self.precision, "fp32"),
            )
            if value != default
        ]
        words = [self.dense.model, self.dense.dataset, layers, shown, self.pruner, *map(str, extra)]
        return " ".join(words)


def joined(words: Sequence[str]) -> str:
    """`a+b+c`; of more than MANY the first and the last, and how many there are."""
    return "+".join(words) if len(words) <= MANY else f"{words[0]}+..+{words[-1]}({len(words)})"


@dataclass(frozen=True)
class Task:
    """Cell x candidate x seed: the unit of work and of storage."""

    cell: Cell
    candidate: int
    seed: int

    @cached_property
    def task_id(self) -> str:
        return join_id(self.cell.cell_id, self.candidate, self.seed)

    @cached_property
    def candidate_id(self) -> str:
        return join_id(self.cell.cell_id, self.candidate)


_PAIR = Struct("=qq")


@dataclass(frozen=True, slots=True)
class Tasks(Sequence[Task]):
    """Tasks of one cell as (candidate, seed) pairs, 16 bytes each; a task is made when it is asked for."""

    cell: Cell
    pairs: bytes

    @staticmethod
    def of(tasks: Sequence[Task]) -> Tasks:
        """`tasks`, of which there are some, in this form."""
        if isinstance(tasks, Tasks):
            return tasks
        return Tasks.from_pairs(tasks[0].cell, ((task.candidate, task.seed) for task in tasks))

    @staticmethod
    def from_pairs(cell: Cell, pairs: Iterable[tuple[int, int]]) -> Tasks:
        return Tasks(cell, b"".join(_PAIR.pack(candidate, seed) for candidate, seed in pairs))

    def ids(self) -> list[str]:
        """Their task ids."""
        return join_ids(self.cell.cell_id, (f"{candidate}/{seed}" for candidate, seed in _PAIR.iter_unpack(self.pairs)))

    def candidate_ids(self) -> list[str]:
        """Their candidate ids; tasks of one candidate that follow each other have it hashed once."""
        each = [(candidate, len(list(same))) for candidate, same in groupby(self.numbers[::2])]
        ids = join_ids(self.cell.cell_id, (str(candidate) for candidate, _ in each))
        return [one for one, (_, times) in zip(ids, each, strict=True) for _ in range(times)]

    @property
    def numbers(self) -> memoryview:
        """candidate, seed, candidate, seed, ..."""
        return memoryview(self.pairs).cast("q")

    def __len__(self) -> int:
        return len(self.pairs) // _PAIR.size

    def __iter__(self) -> Iterator[Task]:
        return (Task(self.cell, candidate, seed) for candidate, seed in _PAIR.iter_unpack(self.pairs))

    @overload
    def __getitem__(self, at: int) -> Task: ...
    @overload
    def __getitem__(self, at: slice) -> Tasks: ...
    def __getitem__(self, at: int | slice) -> Task | Tasks:
        places = range(len(self))[at]
        if isinstance(places, int):
            return Task(self.cell, *_PAIR.unpack_from(self.pairs, places * _PAIR.size))
        return Tasks.from_pairs(self.cell, (_PAIR.unpack_from(self.pairs, i * _PAIR.size) for i in places))


@dataclass(frozen=True)
class Shard:
    """The unit of scheduling: tasks of one cell, or, with `dense`, one dense model to train.

    `block` is how many candidates a whole shard has: what may train in one fleet.
    """

    shard_id: str
    tasks: Sequence[Task] = ()
    dense: Dense | None = None
    keep: str = "none"
    block: int = 1

    @property
    def needs(self) -> Dense:
        """The dense model that this shard trains or starts from."""
        return self.dense or self.tasks[0].cell.dense

    @property
    def filed_under(self) -> str:
        """What its row files are named after: tasks run alone share their shard's name."""
        return filed_under(self.shard_id)

    @property
    def is_alone(self) -> bool:
        """Whether this is one task of a shard, set apart from the others."""
        return self.shard_id != self.filed_under

    @property
    def precision(self) -> str:
        """One process holds one precision; dense models are trained in fp32."""
        return "fp32" if self.dense else self.tasks[0].cell.precision

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the wire, all of it immutable: the cell once, then its (candidate, seed) pairs."""
        return {
            "shard_id": self.shard_id,
            "cell": self.tasks[0].cell.json if self.tasks else None,
            "tasks": zlib.compress(Tasks.of(self.tasks).pairs) if self.tasks else b"",
            "dense": self.dense.to_dict() if self.dense else None,
            "keep": self.keep,
            "block": self.block,
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Shard:
        cell = Cell.from_json(data["cell"]) if data["cell"] else None
        tasks = tuple(Tasks(cell, zlib.decompress(data["tasks"]))) if cell else ()
        dense = Dense.from_dict(data["dense"]) if data["dense"] else None
        return Shard(data["shard_id"], tasks, dense, data["keep"], data["block"])


def filed_under(shard_id: str) -> str:
    """The shard of an id that may be of one of its tasks, run alone: `<shard>.<task>`."""
    return shard_id.split(".", maxsplit=1)[0]


@dataclass(frozen=True)
class Execution:
    """How the arithmetic is done. Two rows of one task with equal execution are equal, unless it is not
    `deterministic`: the device has some operation only with sums in no fixed order. `fallback` is the reason where a
    fault, and not the timing, ruled a faster back-end out."""

    backend: str
    fleet: int
    threads: int
    memory_format: str
    device_model: str
    versions: tuple[tuple[str, str], ...]
    processes: int = 1
    deterministic: bool = True
    fallback: str | None = None

    @cached_property
    def json(self) -> str:
        plain = asdict(self) | {"versions": dict(self.versions)}
        return canonical_json(without_defaults(plain, {"processes": 1, "deterministic": True, "fallback": None}))

    @staticmethod
    def from_json(text: str) -> Execution:
        data = json.loads(text)
        return Execution(**{**data, "versions": tuple(sorted(data["versions"].items()))})


@dataclass(frozen=True)
class Removed:
    """The units of one layer that a candidate removes, ascending."""

    layer: str
    units: tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """What a task leaves behind. storage/schema.py gives each column's type and meaning."""

    task_id: str
    cell_id: str
    candidate_id: str
    schema_version: int
    model: str
    dataset: str
    dense_id: str
    granularity: str
    layers: tuple[str, ...]
    ratios: tuple[float, ...]
    pruning_ratio: float | None
    pruner: str
    propagation: str
    schedule: str
    precision: str
    recipe_id: str
    recipe: str
    candidate: int
    seed: int
    scope: str | None
    status: str
    dense_sha256: str | None = None
    removed: tuple[Removed, ...] | None = None
    params: int | None = None
    macs: int | None = None
    dense_params: int | None = None
    dense_macs: int | None = None
    achieved_ratio: float | None = None
    mask_sha256: str | None = None
    dense_train_loss: float | None = None
    dense_test_loss: float | None = None
    dense_test_accuracy: float | None = None
    pruned_train_loss: float | None = None
    pruned_train_loss_se: float | None = None
    pruned_train_loss_n: int | None = None
    pruned_test_loss: float | None = None
    pruned_test_accuracy: float | None = None
    equivalence_error: float | None = None
    equivalence_reason: str | None = None
    best_epoch: int | None = None
    best_test_accuracy: float | None = None
    best_test_loss: float | None = None
    last_train_loss: float | None = None
    last_test_loss: float | None = None
    last_test_accuracy: float | None = None
    last5_test_loss_mean: float | None = None
    last5_test_loss_std: float | None = None
    last5_test_accuracy_mean: float | None = None
    last5_test_accuracy_std: float | None = None
    val_best_epoch: int | None = None
    val_best_val_accuracy: float | None = None
    val_best_test_accuracy: float | None = None
    val_best_test_loss: float | None = None
    epoch_train_loss: tuple[float | None, ...] | None = None
    epoch_test_loss: tuple[float | None, ...] | None = None
    epoch_test_accuracy: tuple[float | None, ...] | None = None
    epoch_val_accuracy: tuple[float | None, ...] | None = None
    score_l1: float | None = None
    score_l2: float | None = None
    score_taylor: float | None = None
    score_hessian: float | None = None
    score_fpgm: float | None = None
    score_lamp: float | None = None
    score_bn_scale: float | None = None
    score_activation: float | None = None
    score_extra: tuple[tuple[str, float], ...] | None = None
    error_class: str | None = None
    error: str | None = None
    attempt: int | None = None
    diverged: bool | None = None
    execution: str | None = None
    device: str | None = None
    host: str | None = None
    seconds_prune: float | None = None
    seconds_retrain: float | None = None
    peak_memory_bytes: int | None = None
    versions: str | None = None
    kept_network: str | None = None
    skipped_samples: int | None = None
    started_at: dt.datetime | None = None
    finished_at: dt.datetime | None = None

    def task(self) -> Task:
        """The task this row belongs to, rebuilt from the row alone."""
        return Task(Cell.from_json(self.recipe), self.candidate, self.seed)


def row_for(task: Task, status: str, measured: Mapping[str, Any]) -> Row:
    """A row of `task`: its identity columns, then what was `measured`."""
    cell = task.cell
    return Row(
        task_id=task.task_id,
        cell_id=cell.cell_id,
        candidate_id=task.candidate_id,
        schema_version=SCHEMA_VERSION,
        model=cell.dense.model,
        dataset=cell.dense.dataset,
        dense_id=cell.dense.dense_id,
        granularity=cell.granularity,
        layers=tuple(name for name, _ in cell.layers),
        ratios=tuple(ratio for _, ratio in cell.layers),
        pruning_ratio=cell.pruning_ratio,
        pruner=cell.pruner,
        propagation=cell.propagation,
        schedule=cell.schedule,
        scope=cell.scope,
        precision=cell.precision,
        recipe_id=cell.retrain.recipe_id,
        recipe=cell.json,
        candidate=task.candidate,
        seed=task.seed,
        status=status,
        **measured,
    )


def utc_now() -> dt.datetime:
    """The time in UTC, without a zone: what every `*_at` column holds."""
    return dt.datetime.now(dt.UTC).replace(tzinfo=None)


def titles(cells: Iterable[Cell]) -> dict[str, str]:
    """cell id -> what to call it among these: its words, and its id where the words do not tell it apart."""
    named = {cell.cell_id: str(cell) for cell in cells}
    often = Counter(named.values())
    return {i: f"{words} [{i[:6]}]" if often[words] > 1 else words for i, words in named.items()}
