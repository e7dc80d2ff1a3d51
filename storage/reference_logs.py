"""The text logs of the reference implementation of arXiv 2412.00143, as records. Pure: lines in, records out.

A log has, among much else, for every candidate k of N (docs/import-logs.md shows one whole):

    [4317 52 2024/07/11-22:41:04] [1/45] pruned_index_pair {((0, 3),)}      the units removed, by layer
    [...] [1/45] pruned_train_loss 1.234567
    [...] Epoch 0 Acc1 97.1200 Acc5 99.9100 TestLoss 0.0951 ...             one for each epoch of retraining
    [...] [1/45] final_train_loss 0.012345 final_test_loss 0.034567 final_test_acc 98.910000
    [...] [1/45] last5_train_loss ... last5_test_loss ... last5_test_acc ... (mean)
    [...] [1/45] last5_train_loss ... last5_test_loss ... last5_test_acc ... (std)

`final_*` is measured at the epoch of the best test accuracy, the first of several: `best_*` here. The standard
deviation is the population's.
"""

from __future__ import annotations

import ast
import datetime as dt
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from itertools import pairwise

from storage.errors import QueryError

_LINE = re.compile(r"\[(\d+)/(\d+)\] (pruned_index_pair|pruned_train_loss|final_train_loss|last5_train_loss)(.*)")
_PAIR = re.compile(r" \{(.*)\}")
_LOSS = re.compile(r" (\S+)")
_FINAL = re.compile(r" (\S+) final_test_loss (\S+) final_test_acc (\S+)")
_LAST5 = re.compile(r" (\S+) last5_test_loss (\S+) last5_test_acc (\S+) \((mean|std)\)")
_EPOCH = re.compile(
    r"\bEpoch (\d+) Acc1 (\S+) Acc5 \S+ TestLoss (\S+)(?: TrainAcc1 \S+ TrainAcc5 \S+ TrainLoss (\S+))? "
)
_CHECKPOINT = re.compile(r'Load pretrained_ckpt: "(.*)"')
_TIME = re.compile(r"^\[[^\]]*?(\d{4}/\d{2}/\d{2}-\d{2}:\d{2}:\d{2})\]")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")

_SAME = 1e-6
"""Accuracies of epochs have four digits of a percent: equal ones differ by less, as fractions."""


@dataclass(frozen=True)
class Values:
    """Losses in nats, the accuracy as a fraction; NaN where the log says nan."""

    train_loss: float
    test_loss: float
    test_accuracy: float


@dataclass(frozen=True)
class LoggedEpoch:
    """After epoch `number` of retraining, 1 for the first; the train loss in eval mode, where the log has it."""

    number: int
    test_accuracy: float
    test_loss: float
    train_loss: float | None


@dataclass(frozen=True)
class LoggedCandidate:
    """One candidate of a log: the `number`-th of `total`, from 1; `where` is the file and line that names its units.

    `removed` has the units of each pruned layer, ascending, the layers in network order. `epochs` is empty where the
    log does not have all of them, or they are not this candidate's. `seconds_retrain` is from the log's clock.
    """

    where: str
    number: int
    total: int
    removed: tuple[tuple[int, ...], ...]
    pruned_train_loss: float | None = None
    best: Values | None = None
    last5_mean: Values | None = None
    last5_std: Values | None = None
    epochs: tuple[LoggedEpoch, ...] = ()
    seconds_retrain: float | None = None


@dataclass(frozen=True)
class ReferenceLog:
    """What one log says. `checkpoint` names the dense weights it started from; `stray` counts the lines of candidates
    whose units the log does not name."""

    name: str
    checkpoint: str | None
    complete: tuple[LoggedCandidate, ...]
    incomplete: tuple[LoggedCandidate, ...]
    stray: int

    @property
    def candidates(self) -> tuple[LoggedCandidate, ...]:
        """All that it names the units of."""
        return self.complete + self.incomplete


def read_log(lines: Iterable[str], name: str) -> ReferenceLog:
    """The candidates of a log. `lines` keep their line ends: a last line without one was cut off and does not count.

    A candidate is complete when all its lines are there; in a log without `last5_*` lines, when its `final_*` line is
    and another candidate shows that there are none. So a log that was cut off never says more than the whole one.
    Raises QueryError, with file:line, for a line that is none of these forms.
    """
    reading = _Reading(name)
    for number, line in enumerate(lines, 1):
        if not line.endswith("\n"):
            break
        reading.take(f"{name}:{number}", _COLOUR.sub("", line).rstrip())
    found = [_checked(one) for one in reading.found]
    has_last5 = len(found) < 2 or any(one.last5_mean for one in found)
    complete = [_is_complete(one, has_last5) for one in found]
    return ReferenceLog(
        name,
        reading.checkpoint,
        tuple(one for one, whole in zip(found, complete, strict=True) if whole),
        tuple(one for one, whole in zip(found, complete, strict=True) if not whole),
        reading.stray,
    )


class _Reading:
    """What has been read of a log so far."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.checkpoint: str | None = None
        self.found: list[LoggedCandidate] = []
        self.stray = 0
        self._place: dict[int, int] = {}  # a candidate's number -> its latest place in `found`
        self._since: dict[int, dt.datetime | None] = {}

    def take(self, where: str, line: str) -> None:
        """One line of the log."""
        if matched := _LINE.search(line):
            number, total = int(matched[1]), int(matched[2])
            if not 1 <= number <= total:
                raise QueryError(f"{where}: [{number}/{total}] counts from 1 to {total}")
            self._of_candidate(where, line, number, total, matched[3], matched[4])
        elif matched := _EPOCH.search(line):
            self._epoch(where, matched)
        elif matched := _CHECKPOINT.search(line):
            self.checkpoint = matched[1]

    def _of_candidate(self, where: str, line: str, number: int, total: int, key: str, rest: str) -> None:
        if key == "pruned_index_pair":
            self._place[number] = len(self.found)
            self.found.append(LoggedCandidate(where, number, total, _removed(where, rest)))
            return
        if number not in self._place:
            self.stray += 1
            return
        place = self._place[number]
        one = self.found[place]
        if key == "pruned_train_loss":
            self._since[place] = _time(line)
            self.found[place] = _with(
                one, where, "pruned_train_loss", _loss(where, _parts(where, _LOSS, key + rest, rest)[0])
            )
        elif key == "final_train_loss":
            began, ended = self._since.get(place), _time(line)
            seconds = (ended - began).total_seconds() if began and ended else None
            values = _values(where, _parts(where, _FINAL, key + rest, rest))
            self.found[place] = _with(replace(one, seconds_retrain=seconds), where, "best", values)
        else:
            *texts, which = _parts(where, _LAST5, key + rest, rest)
            self.found[place] = _with(one, where, f"last5_{which}", _values(where, texts))

    def _epoch(self, where: str, matched: re.Match[str]) -> None:
        """An epoch belongs to the candidate that was named last, until its `final_*` line."""
        if not self.found or self.found[-1].best is not None:
            return
        train_loss = None if matched[4] is None else _loss(where, matched[4])
        epoch = LoggedEpoch(int(matched[1]) + 1, _fraction(where, matched[2]), _loss(where, matched[3]), train_loss)
        self.found[-1] = replace(self.found[-1], epochs=(*self.found[-1].epochs, epoch))


def _with(one: LoggedCandidate, where: str, name: str, value: float | Values) -> LoggedCandidate:
    if getattr(one, name) is not None:
        raise QueryError(f"{where}: candidate {one.number} of {one.where} has this line twice")
    return replace(one, **{name: value})


def _parts(where: str, form: re.Pattern[str], shown: str, text: str) -> tuple[str, ...]:
    matched = form.fullmatch(text)
    if matched is None:
        raise QueryError(f"{where}: {shown!r} is not of the form of the reference implementation (docs/import-logs.md)")
    return matched.groups()


def _removed(where: str, text: str) -> tuple[tuple[int, ...], ...]:
    """`{((0, 3), (1,))}` -> the units by layer."""
    (inner,) = _parts(where, _PAIR, f"pruned_index_pair{text}", text)
    try:
        layers = ast.literal_eval(inner)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        layers = None
    if not isinstance(layers, tuple) or not layers or not all(_are_units(units) for units in layers):
        raise QueryError(
            f"{where}: {{{inner[:60]}}} is not, by layer, the units removed: ascending numbers, as {{((0, 3),)}}"
        )
    return layers


def _are_units(units: object) -> bool:
    if not isinstance(units, tuple) or not units or not all(type(unit) is int for unit in units):
        return False
    return units[0] >= 0 and all(a < b for a, b in pairwise(units))


def _values(where: str, texts: Iterable[str]) -> Values:
    train_loss, test_loss, accuracy = texts
    return Values(_loss(where, train_loss), _loss(where, test_loss), _fraction(where, accuracy))


def _loss(where: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise QueryError(f"{where}: {text!r} is no number") from None


def _fraction(where: str, text: str) -> float:
    """A percentage as the nearest float of its fraction."""
    try:
        percent = Decimal(text)
    except InvalidOperation:
        raise QueryError(f"{where}: {text!r} is no percentage") from None
    if percent.is_nan():
        return math.nan
    if not 0 <= percent <= 100:
        raise QueryError(f"{where}: {text} is no percentage: accuracies are in percent, from 0 to 100")
    return float(percent / 100)


def _time(line: str) -> dt.datetime | None:
    """The time in a line's prefix, of a clock whose zone is unknown: good for differences alone."""
    matched = _TIME.match(line)
    try:
        return dt.datetime.strptime(matched[1], "%Y/%m/%d-%H:%M:%S") if matched else None
    except ValueError:
        return None


def _checked(one: LoggedCandidate) -> LoggedCandidate:
    """`one`, its epochs only if they are all there and their best is its best."""
    accuracies = [epoch.test_accuracy for epoch in one.epochs]
    whole = [epoch.number for epoch in one.epochs] == list(range(1, len(one.epochs) + 1))
    if one.best and accuracies and whole and abs(max(accuracies) - one.best.test_accuracy) < _SAME:
        return one
    return replace(one, epochs=())


def _is_complete(one: LoggedCandidate, has_last5: bool) -> bool:
    if one.pruned_train_loss is None or one.best is None:
        return False
    return not has_last5 or (one.last5_mean is not None and one.last5_std is not None)
