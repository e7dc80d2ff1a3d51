"""A sweep as a Ray job: submit it, read its output, stop it. Ray's job server does the work."""

from __future__ import annotations

import contextlib
import secrets
import shlex
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.cluster import environment, first_line
from orchestrator.errors import ClusterError, UserError
from storage.records import utc_now

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

AGENT_SECONDS = 90.0
"""How long `submit` waits for a cluster's job agent to come up."""

SWEEP = "prunesweep_sweep"
"""The job metadata under which a sweep's name is kept."""


@contextlib.contextmanager
def job_server(address: str) -> Iterator[JobSubmissionClient]:
    """Ray's job server at `address` (http://HOST:8265). Raises ClusterError."""
    try:
        # An address in the environment would win over the argument.
        with environment({"RAY_ADDRESS": None, "RAY_API_SERVER_ADDRESS": None}):
            from ray.job_submission import JobSubmissionClient

            client = JobSubmissionClient(address)
        yield client
    except BrokenPipeError:  # our own stdout: `logs | head`
        raise
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(f"the Ray job server at {address} does not answer as asked: {first_line(error)}") from error


def submit_job(address: str, sweep: str, spec: str, store: str, data_root: str) -> str:
    """Submit a spec's text as a job that runs it on the cluster; return the submission id.

    The cluster has prunesweep installed, and sees the store and the data root.
    """
    submission_id = f"{sweep}-{utc_now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    with tempfile.TemporaryDirectory() as folder, job_server(address) as client:
        Path(folder, "spec.yaml").write_text(spec, encoding="utf-8")
        # No --address: Ray tells a job its cluster in RAY_ADDRESS, where `auto` might find another one.
        command = ["python", "-m", "prunesweep", "run", "spec.yaml"]
        command += ["--store", store, "--data-root", data_root]
        job = {
            "entrypoint": shlex.join(command),
            "submission_id": submission_id,
            "runtime_env": {"working_dir": folder},
            "metadata": {SWEEP: sweep, "store": store},
        }
        return _submit(client, job)


def _submit(client: JobSubmissionClient, job: dict[str, Any]) -> str:
    """Submit a job; a cluster that has just started may take a while until it takes any."""
    give_up = time.monotonic() + AGENT_SECONDS
    while True:
        try:
            return client.submit_job(**job)
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > give_up:
                raise
            time.sleep(1)


def find_job(client: JobSubmissionClient, name: str) -> JobDetails:
    """The job with this submission id, or the newest of this sweep. Raises UserError."""
    jobs = [job for job in client.list_jobs() if job.submission_id]
    found = [j for j in jobs if name in (j.submission_id, (j.metadata or {}).get(SWEEP))]
    if not found:
        known = sorted({(j.metadata or {}).get(SWEEP, j.submission_id or "") for j in jobs})
        raise UserError(f"no job or sweep {name} on this cluster; there are: {', '.join(known) or 'none'}")
    return max(found, key=lambda j: j.start_time or 0)
