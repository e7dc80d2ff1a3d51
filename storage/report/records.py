"""What a report is made of, gathered from the store: frozen, and no text in it that a template would write."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from storage.correlate import CellData
from storage.records import Cell
from storage.statistics.records import Claim, Difference, EarlyEpoch, Predictor

T = TypeVar("T")

FEW = 12
"""Of more cells than this no figure has a panel for each, early epochs have no intervals, and contents name none."""


@dataclass(frozen=True)
class Part(Generic[T]):
    """What was asked for, or why it is not there."""

    value: T | None
    why_not: str = ""


@dataclass(frozen=True)
class PlannedCell:
    """A cell of the grid: what was planned and how it stands. `label` tells it apart within its sweep, in few words."""

    cell: Cell
    label: str
    candidates: int
    seeds: int
    tasks: int
    done: int
    failed: int
    pending: int


@dataclass(frozen=True)
class Plan:
    """A sweep's newest expansion: its spec as given, its cells in the order of the grid, its retraining seeds.

    `common` is what all cells have in common, in words: their labels leave it out.
    """

    sweep: str
    expanded_at: str
    spec: str
    cells: tuple[PlannedCell, ...]
    common: str
    seeds: tuple[int, ...]

    @property
    def tasks(self) -> int:
        return sum(one.tasks for one in self.cells)

    @property
    def done(self) -> int:
        return sum(one.done for one in self.cells)

    @property
    def failed(self) -> int:
        return sum(one.failed for one in self.cells)

    @property
    def pending(self) -> int:
        return sum(one.pending for one in self.cells)


@dataclass(frozen=True)
class Ran:
    """One way in which rows of the sweep were made: the execution, and the versions it was made with."""

    execution: dict[str, Any]
    versions: dict[str, str]
    devices: tuple[str, ...]
    hosts: int
    tasks: int
    first: dt.datetime | None
    last: dt.datetime | None


@dataclass(frozen=True)
class Failure:
    """Tasks that failed and were not done since, by class, with the traceback of one."""

    error_class: str
    tasks: int
    shards: int
    example_task: str
    example_error: str


@dataclass(frozen=True)
class Cost:
    """What attempts at the tasks of a cell took, in seconds of one CPU worker's or one GPU's time (view `cost`).

    Wasted are failed attempts, and rows that another one of their task stands for.
    """

    cell_id: str
    attempts: int
    failed_attempts: int
    wasted_attempts: int
    cpu_seconds: float
    gpu_seconds: float
    wasted_cpu_seconds: float
    wasted_gpu_seconds: float


@dataclass(frozen=True)
class Bench:
    """The criterion bench."""

    predictors: list[Predictor]
    differences: list[Difference]


@dataclass(frozen=True)
class Facts:
    """All that a report says. `beside` is cell id -> tau with y's neighbour, `beside_name` its column.

    `mixed` are labels of cells left out because they mix dense networks, `diverged` counts retrainings.
    """

    store: str
    made_at: dt.datetime
    made_with: str
    x: str
    y: str
    plan: Plan
    ran: Part[list[Ran]]
    mixed: dict[str, str]
    cells: Part[list[CellData]]
    claims: Part[list[Claim]]
    beside_name: str
    beside: dict[str, float]
    criteria: Part[Bench]
    early: Part[list[EarlyEpoch]]
    failures: Part[list[Failure]]
    cost: Part[list[Cost]]
    diverged: Part[int]
    skipped: tuple[str, ...]


@dataclass(frozen=True)
class Figure:
    """A drawing: one inline SVG, what it shows for those who do not see it, its caption, and whether it
    is too wide for a telephone."""

    svg: str
    alt: str
    caption: str
    wide: bool


@dataclass(frozen=True)
class Figures:
    """The drawings of a report: `first` is that of the answer, `scatters` by cell id (none where it is the first)."""

    first: Part[Figure]
    more: tuple[Part[Figure], ...]
    criteria: Part[Figure]
    early: Part[Figure]
    scatters: dict[str, Part[Figure]]
