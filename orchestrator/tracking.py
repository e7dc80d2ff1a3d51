"""--track: which experiment trackers there are, and what of a task they are told. trackers.py tells them."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import click

from orchestrator.errors import UserError

if TYPE_CHECKING:
    from storage.records import Row

TRACKERS = ("wandb", "mlflow")

MEASURES = (
    "pruned_train_loss",
    "pruned_test_accuracy",
    "best_test_accuracy",
    "last_test_accuracy",
    "last5_test_accuracy_mean",
    "seconds_prune",
    "seconds_retrain",
)

track_option = click.option(
    "--track",
    type=click.Choice(TRACKERS),
    help="Also tell an experiment tracker of every shard and task (needs prunesweep[track]).",
)


def check_tracker(name: str | None, inline: bool) -> None:
    """Raise UserError where a tracker cannot be used from here."""
    if name is None:
        return
    if inline:
        raise UserError("--track goes through Ray: leave out --inline")
    if find_spec(name) is None:
        raise UserError(f"--track {name}: {name} is not installed; pip install 'prunesweep[track]'")


def measured(row: Row) -> dict[str, float]:
    """What a tracker is told of a task: its numbers, without those it has not."""
    found = {name: getattr(row, name) for name in MEASURES}
    known = {name: float(value) for name, value in found.items() if value is not None}
    return {"candidate": row.candidate, "seed": row.seed, "failed": float(row.status != "done"), **known}
