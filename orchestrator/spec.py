"""The spec: what a person writes. Checked here, key by key, before anything else happens."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from models.registry import check_model
from orchestrator.documents import Document, nearest
from orchestrator.errors import UserError
from pruners.pruners import check_pruner, steps_of
from storage.identity import MAX_SWEEP_NAME, SWEEP_NAME
from storage.records import Recipe
from workers.datasets import check_dataset
from workers.worker import PRECISIONS


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


def _one_of(known: Any) -> AfterValidator:
    """A name that must be among `known`; the message says which there are."""

    def check(value: str) -> str:
        if value not in known:
            raise ValueError(f"unknown name {value!r}; allowed: {', '.join(known)}{nearest(value, known)}")
        return value

    return AfterValidator(check)


def _checked(check: Callable[[str], None]) -> AfterValidator:
    """A name that `check` finds no fault with; what it raises is the message."""

    def same(value: str) -> str:
        check(value)
        return value

    return AfterValidator(same)


def _schedule(value: str) -> str:
    steps_of(value)
    return value


def _inside(value: float) -> float:
    if not 0 < value < 1:
        raise ValueError(f"{value} is not a pruning ratio; allowed: more than 0 and less than 1")
    return value


def _once(values: list[Any]) -> list[Any]:
    """A point named twice is one point."""
    try:
        return list(dict.fromkeys(values))
    except TypeError:
        return [value for i, value in enumerate(values) if value not in values[:i]]


Model = Annotated[str, _checked(check_model)]
DatasetName = Annotated[str, _checked(check_dataset)]
PrunerName = Annotated[str, _checked(check_pruner)]
# Strict: `true` and '1' are no numbers.
Count = Annotated[int, Field(ge=1, le=2**63 - 1, strict=True)]
Number = Annotated[float, Field(ge=0, strict=True, allow_inf_nan=False)]
Ratio = Annotated[float, Field(strict=True), AfterValidator(_inside)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1, strict=True)]
LayersEntry = str | tuple[str, ...] | dict[str, float]


def _layers_entry(entry: Any) -> LayersEntry:
    """A name or pattern, a list of them, or {pattern: ratio}."""
    if isinstance(entry, str):
        return entry
    if isinstance(entry, list) and entry and all(isinstance(name, str) for name in entry):
        return tuple(entry)
    if isinstance(entry, dict) and entry and all(isinstance(name, str) for name in entry):
        return {name: _inside(_number(ratio)) for name, ratio in entry.items()}
    raise ValueError(f"{entry!r} names no layers; allowed: a name or pattern, a list of them, {{pattern: ratio}}")


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{value!r} is not a number")
    return float(value)


_points = (BeforeValidator(_as_list), Field(min_length=1))
_axis = (*_points, AfterValidator(_once))


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Grid(Strict):
    """The axes. Every one takes a scalar or a list; the grid is their product."""

    model: Annotated[list[Model], *_axis]
    dataset: Annotated[list[DatasetName], *_axis]
    layers: Annotated[list[Annotated[Any, AfterValidator(_layers_entry)]], *_points]
    ratio: Annotated[list[Ratio], *_points] | None = None
    pruner: Annotated[list[PrunerName], *_axis] = ["oracle"]
    pruner_seed: Annotated[list[Seed], *_axis] = [0]
    granularity: Annotated[list[Literal["filter", "weight"]], *_axis] = ["filter"]
    scope: Annotated[list[Literal["local", "global"]], *_axis] = ["local"]
    schedule: Annotated[list[Annotated[str, AfterValidator(_schedule)]], *_axis] = ["one-shot"]
    propagation: Annotated[list[Literal["exact", "released"]], *_axis] = ["exact"]
    precision: Annotated[list[Annotated[str, _one_of(PRECISIONS)]], *_axis] = ["fp32"]
    seed: Annotated[list[Seed], *_axis] = [0]


class Candidates(Strict):
    """Which candidates of a cell the oracle pruner takes."""

    mode: Literal["all", "sample"] = "all"
    count: Count | None = None
    seed: Seed = 0


def _lr_table(value: Any) -> Any:
    """A number, or `epochs already done: value`."""
    table = value if isinstance(value, dict) else {0: value}
    steps = []
    for start, lr in table.items():
        if not isinstance(start, int) or isinstance(start, bool) or not 0 <= start < 2**63:
            raise ValueError(f"{start!r} is no number of epochs already done; allowed: 0, 1, 2, ...")
        rate = _number(lr)
        if not 0 < rate < float("inf"):
            raise ValueError(f"{rate} is no learning rate; allowed: more than 0")
        steps.append((start, rate))
    if not steps or min(steps)[0] != 0:
        raise ValueError("the table must start at 0: {0: first rate, epochs already done: next rate}")
    return tuple(sorted(steps))


class Training(Strict):
    """What dense training and retraining have in common."""

    epochs: Count
    batch_size: Count
    lr: Annotated[tuple[tuple[int, float], ...], BeforeValidator(_lr_table)]
    lr_schedule: Literal["table", "cosine", "linear"] = "table"
    warmup_epochs: Annotated[int, Field(ge=0, le=2**63 - 1, strict=True)] = 0
    final_lr: Number = 0.0
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    momentum: Annotated[Number, Field(lt=1)] = 0.0
    nesterov: bool = False
    betas: tuple[Annotated[Number, Field(lt=1)], Annotated[Number, Field(lt=1)]] = (0.9, 0.999)
    weight_decay: Number = 0.0
    label_smoothing: Annotated[Number, Field(lt=1)] = 0.0
    clip_norm: Annotated[Number, Field(gt=0)] | None = None
    ema: Annotated[Number, Field(gt=0, lt=1)] | None = None
    accumulate: Count = 1
    max_steps: Count | None = None
    augment: bool = True
    mixup: Number = 0.0
    cutmix: Number = 0.0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if problem := _recipe_problem(self):
            raise ValueError(problem)
        return self


def _recipe_problem(one: Training) -> str | None:
    """What no single key of a recipe can know."""
    plain = one.lr_schedule == "table"
    (_, first), *later = one.lr
    problems = {
        "nesterov needs a momentum of more than 0": one.nesterov and not one.momentum,
        f"momentum is sgd's; {one.optimizer} has betas": one.optimizer != "sgd" and one.momentum > 0,
        "betas are adam's and adamw's; sgd has a momentum": one.optimizer == "sgd" and "betas" in one.model_fields_set,
        f"lr_schedule {one.lr_schedule} starts from one lr; a table is lr_schedule: table": not plain and bool(later),
        "final_lr is where lr_schedule cosine or linear ends": plain and one.final_lr > 0,
        f"final_lr {one.final_lr} is not below lr {first}": not plain and one.final_lr >= first,
        f"{one.warmup_epochs} warmup_epochs leave nothing of {one.epochs} epochs": 0 < one.epochs <= one.warmup_epochs,
        f"accumulate {one.accumulate} is more than batch_size {one.batch_size}": one.accumulate > one.batch_size,
    }
    return next((text for text, wrong in problems.items() if wrong), None)


class DenseTraining(Training):
    """`weights`, what a dense model starts from, alone: it is taken as it is. With epochs it is trained further."""

    epochs: Annotated[int, Field(ge=0, le=2**63 - 1, strict=True)]
    seed: Seed = 0
    weights: Annotated[str, Field(min_length=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _weights_alone(cls, given: Any) -> Any:
        if not isinstance(given, dict) or "weights" not in given or given.get("epochs", 0):
            return given
        if more := sorted(set(given) - {"weights", "epochs", "seed"}):
            raise ValueError(f"{', '.join(more)} say how to train: give epochs as well, or leave them out")
        return {"batch_size": 1, "lr": {0: 1.0}, **given, "epochs": 0}

    @model_validator(mode="after")
    def _trained_or_given(self) -> Self:
        if not self.epochs and self.weights is None:
            raise ValueError("0 epochs need weights: library, a file, a URI")
        return self

    def recipe(self) -> Recipe:
        return _recipe(self, seed=self.seed, weights=self.weights)


class Retraining(Training):
    lora_rank: Count | None = None
    keep: Literal["none", "last", "best"] = "none"

    def recipe(self) -> Recipe:
        return _recipe(self, lora_rank=self.lora_rank)


def _recipe(one: Training, **more: Any) -> Recipe:
    return Recipe(**{name: getattr(one, name) for name in Training.model_fields}, **more)


class Resources(Strict):
    """What a shard gets, and how many run at once. With `processes` so many train each task together, each with
    these cpus and gpus. `gpus: auto` is 1 where the cluster has any;
    `candidates_per_shard: auto` grows with the grid (`plan.block_size`).

    A task over `task_minutes`, or a worker over `memory_gb`, ends its process, not the sweep. What takes
    longer than `checkpoint_minutes` is checkpointed that often.
    """

    workers: Count | Literal["auto"] = "auto"
    cpus: Annotated[Number, Field(gt=0)] = 1
    gpus: Number | Literal["auto"] = "auto"
    processes: Count = 1
    candidates_per_shard: Count | Literal["auto"] = "auto"
    task_minutes: Annotated[Number, Field(gt=0)] | None = None
    memory_gb: Annotated[Number, Field(gt=0)] | None = None
    checkpoint_minutes: Annotated[Number, Field(gt=0)] = 10


class SweepSpec(Strict):
    """A sweep: a grid, the candidates, and the recipes.

    `skip_small_layers` is in no id: what it leaves out is not among a cell's layers.
    """

    name: str
    grid: Grid
    candidates: Candidates = Candidates()
    dense: Annotated[list[DenseTraining], *_axis]
    retrain: Annotated[list[Retraining], *_axis]
    validation: Annotated[Number, Field(lt=1)] = 0.0
    loss_subset: Count | None = None
    calibration: Count = 256
    skip_small_layers: bool = False
    resources: Resources = Resources()


MESSAGES, MESSAGE_LENGTH = 50, 2000
"""Mistakes of a spec that are reported at once, and characters of a message."""


def load_spec(document: Document) -> SweepSpec:
    """The checked spec of a document. Raises UserError, one line per mistake."""
    try:
        spec = SweepSpec.model_validate(document.plain())
    except ValidationError as error:
        raise UserError("\n".join(_messages(document, error))) from None
    problem = _contradiction(spec)
    if problem:
        path, message = problem
        raise UserError(f"{document.where(path)}: {'.'.join(path)}: {message}")
    return spec


def _contradiction(spec: SweepSpec) -> tuple[tuple[str, ...], str] | None:
    """What no single key can know."""
    if not SWEEP_NAME.fullmatch(spec.name) or len(spec.name) > MAX_SWEEP_NAME:
        allowed = f"letters, digits, '.', '_' and '-', a letter or digit first, {MAX_SWEEP_NAME} characters at most"
        return ("name",), f"{_given(spec.name)} is no sweep name; allowed: {allowed}"
    patterns = [entry for entry in spec.grid.layers if not isinstance(entry, dict)]
    if patterns and spec.grid.ratio is None:
        return ("grid", "layers"), "needs grid.ratio (only {pattern: ratio} entries carry their own)"
    if not patterns and spec.grid.ratio is not None:
        return ("grid", "ratio"), "leave it out: every entry of grid.layers carries its own ratio"
    if spec.candidates.mode == "sample" and spec.candidates.count is None:
        return ("candidates",), "mode sample needs a count"
    if spec.candidates.mode == "all" and spec.candidates.count is not None:
        return ("candidates", "count"), "leave it out: mode all takes every candidate (or use mode: sample)"
    return None


def _messages(document: Document, error: ValidationError) -> list[str]:
    """One message per mistaken place, MESSAGES at most."""
    seen: dict[tuple[str | int, ...], str] = {}
    details = error.errors()
    for detail in details:
        path = _path(document, detail["loc"])
        if path not in seen:
            seen[path] = f"{document.where(path)}: {_cut('.'.join(map(str, path)))}: {_message(detail)}"
        if len(seen) == MESSAGES:
            break
    more = len(details) - MESSAGES
    return [*seen.values(), *([f"and {more} more mistakes"] if more > 0 else [])]


def _cut(text: str) -> str:
    """The start of a text that is too long for a message."""
    return text if len(text) <= MESSAGE_LENGTH else f"{text[:MESSAGE_LENGTH]}..."


def _given(value: Any) -> str:
    return _cut(repr(value))


def _path(document: Document, loc: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """pydantic's location as one in the document: without the index of a scalar that stands for a
    list."""
    path: list[str | int] = []
    node: Any = document.data
    for key in loc:
        if isinstance(node, dict) and (key in node or (key == loc[-1] and isinstance(key, str))):
            path.append(key)
            node = node.get(key)
        elif isinstance(node, list) and isinstance(key, int) and key < len(node):
            path.append(key)
            node = node[key]
    return tuple(path)


def _message(detail: ErrorDetails) -> str:
    kind, given = detail["type"], detail["input"]
    if kind == "extra_forbidden":
        known = _keys_beside(detail["loc"])
        return f"unknown key; allowed: {', '.join(known)}{nearest(detail['loc'][-1], known)}"
    if kind == "missing":
        return "this key is missing"
    if kind == "literal_error":
        allowed = re.findall(r"'([^']*)'", detail.get("ctx", {}).get("expected", ""))
        return f"unknown name {_given(given)}; allowed: {', '.join(allowed)}{nearest(given, allowed)}"
    if kind == "too_short":
        return "this list is empty; give at least one value"
    if kind == "model_type":
        return f"this is a mapping of keys to values, not {_given(given)}"
    message = _cut(detail["msg"].removeprefix("Value error, "))
    return message if kind == "value_error" else f"{message}, not {_given(given)}"


def _keys_beside(loc: tuple[str | int, ...]) -> list[str]:
    """The keys allowed where an unknown one was found."""
    rooms: dict[str, type[BaseModel]] = {
        "grid": Grid,
        "candidates": Candidates,
        "dense": DenseTraining,
        "retrain": Retraining,
        "resources": Resources,
    }
    model = rooms[str(loc[0])] if len(loc) > 1 else SweepSpec
    return list(model.model_fields)
