"""What Ray's callback uses of mlflow, written to a file of JSON lines: mlflow itself is too large for the tests."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

__version__ = "3.0"
_state: dict[str, Any] = {"uri": None, "runs": set()}


def note(what: str, **about: Any) -> None:
    """Write a line of what was asked."""
    with Path(str(_state["uri"]).removeprefix("file:")).open("a") as file:
        file.write(json.dumps({"what": what, **about}) + "\n")


def set_tracking_uri(uri: str | None) -> None:
    _state["uri"] = uri


def get_tracking_uri() -> str | None:
    return _state["uri"]


def set_registry_uri(uri: str | None) -> None:
    _state["registry"] = uri


def get_registry_uri() -> str | None:
    return _state["registry"]


def get_experiment_by_name(name: str) -> None:
    return None


def create_experiment(name: str, artifact_location: str | None = None) -> str:
    note("experiment", name=name)
    return name


def active_run() -> None:
    return None


def get_run(run_id: str) -> SimpleNamespace:
    from mlflow.exceptions import MlflowException

    if run_id not in _state["runs"]:
        raise MlflowException(run_id)
    return SimpleNamespace(info=SimpleNamespace(run_id=run_id))


def new_run(name: str, experiment: str) -> SimpleNamespace:
    """A run that has begun."""
    run_id = uuid.uuid4().hex
    _state["runs"].add(run_id)
    note("run", run=run_id, name=name, experiment=experiment)
    return get_run(run_id)
