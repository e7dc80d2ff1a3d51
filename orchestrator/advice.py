"""The commands that a person types to continue a sweep: as they began, and after an edit of their own code."""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa

from orchestrator.drivers import OF_RAY
from orchestrator.dropped import contents
from orchestrator.plan import STATUSES, statuses_of
from storage.records import Cell

if TYPE_CHECKING:
    from storage.manifest import Manifest
    from storage.store import Store

SPEC, OPTIONS = "prunesweep_spec", "prunesweep_options"
"""The job metadata that hold SPEC with its --set, and the other options, as they were given to `submit`."""


@dataclass(frozen=True)
class Given:
    """Record how a run was started: SPEC and its --set, the other options, and whether it is a submitted job. `spec` is
    empty where no file or study holds the spec."""

    spec: tuple[str, ...]
    options: tuple[str, ...]
    is_job: bool = False

    def resume(self, sweep: str) -> str:
        """Return the command that runs the tasks of a sweep that are left."""
        return shlex.join(["prunesweep", "resume", sweep, *self.options])

    def run(self, store: Store, manifest: Manifest) -> str:
        """Return the command that plans the spec again and runs the tasks that are left."""
        spec = self.spec or (spec_path(store, manifest),)
        return shlex.join(["prunesweep", "submit" if self.is_job else "run", *spec, *self.options])


def given(spec: tuple[str, ...], options: tuple[str, ...], address: tuple[str, ...]) -> Given:
    """Return how this run was started; in a job of Ray as its `submit` or `resume` was given. `address` holds the
    options that name the cluster, which are of no use where a job was submitted from."""
    found = _job()
    if found is None:
        return Given(spec, (*options, *address))
    metadata = found.get("metadata", {})
    if OPTIONS in metadata:
        return Given(tuple(shlex.split(metadata.get(SPEC, ""))), tuple(shlex.split(metadata[OPTIONS])), True)
    folder = ("--working-dir", ".") if found.get("runtime_env", {}).get("working_dir") else ()
    return Given((), (*options, "--address", "http://HOST:8265", *folder), True)


def _job() -> dict[str, dict[str, str]] | None:
    """The configuration of the Ray job that this process is, or None."""
    try:
        found = json.loads(os.environ.get(OF_RAY, "{}"))
        return found if found["metadata"]["job_submission_id"] else None
    except (ValueError, TypeError, KeyError):
        return None


def spec_path(store: Store, manifest: Manifest) -> str:
    """Return where the store has the spec of an expansion, in a form that `run` takes."""
    location = store.absolute if store.location.startswith("~") else store.location
    return f"{location.rstrip('/')}/sweeps/{manifest.sweep}/{manifest.stem}.yaml"


def own_content(store: Store, manifest: Manifest) -> list[str]:
    """Return the names of the user's code and files that the unfinished tasks of a sweep use."""
    table = store.plan_table(manifest, ["task_id", "recipe"])
    left = statuses_of(store, table["task_id"]) != STATUSES.index("done")
    return contents(Cell.from_json(recipe) for recipe in table["recipe"].filter(pa.array(left)).unique().to_pylist())


def next_command(store: Store, manifest: Manifest, started: Given) -> str:
    """Return the command that runs the tasks of a sweep that are left, whether the user's code was edited or not."""
    return _command(store, manifest, started, own_content(store, manifest))


def _command(store: Store, manifest: Manifest, started: Given, own: list[str]) -> str:
    return started.run(store, manifest) if own else started.resume(manifest.sweep)


def next_steps(store: Store, sweep: str, started: Given) -> str:
    """Return the lines that say how to continue a sweep whose run has ended with tasks left."""
    manifest = store.newest(sweep)
    own = own_content(store, manifest)
    lines = [f"go on  {_command(store, manifest, started, own)}"]
    if own:
        lines += [
            f"The tasks that are left use {', '.join(own)}. An edit of it makes new tasks: this command plans and runs",
            "them, and skips the tasks that are done. `prunesweep resume` cannot run edited code.",
        ]
    return "\n       ".join(lines)
