"""mlflow's client."""

from __future__ import annotations

from typing import Any

import mlflow


class MlflowClient:
    """Writes what it is told to the file of the tracking URI."""

    def __init__(self, tracking_uri: str | None, registry_uri: str | None) -> None:
        mlflow.set_tracking_uri(tracking_uri)

    def create_run(self, run_name: str, experiment_id: str, tags: dict[str, str]) -> Any:
        return mlflow.new_run(run_name, experiment_id)

    def log_param(self, run_id: str, key: str, value: Any) -> None:
        mlflow.note("param", run=run_id, key=key, value=value)

    def log_metric(self, run_id: str, key: str, value: float, step: int) -> None:
        mlflow.note("metric", run=run_id, key=key, value=value, step=step)

    def set_terminated(self, run_id: str, status: str) -> None:
        mlflow.note("end", run=run_id, status=status)
