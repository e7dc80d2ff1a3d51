"""A sweep as a Ray job: submit it, read its output, stop it. Ray's job server does the work."""

from __future__ import annotations

import contextlib
import datetime as dt
import logging
import re
import secrets
import shlex
import shutil
import string
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.auth import refusal
from orchestrator.cluster import SHIPPED, check_job_server
from orchestrator.environment import environment
from orchestrator.errors import ClusterError, UserError, first_line
from orchestrator.progress import say
from storage.phases import Report, silent
from storage.records import utc_now

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

AGENT_SECONDS = 90.0
"""How long `submit` waits for a cluster's job agent to come up."""

STOP_WAIT = {"RAY_JOB_STOP_WAIT_TIME_S": "30"}
"""So long Ray waits for a job that it has asked to stop, before it kills it: more than drivers.GRACE_SECONDS."""

SPEC_BYTES = 100_000
"""A spec travels in the job's entrypoint, which Linux passes as one argument of at most 128 KiB."""

SWEEP, STORE, DATA_ROOT = "prunesweep_sweep", "store", "data_root"
"""The job metadata under which a sweep's name, its store and its data root are kept."""

_FIRST = "E" + string.ascii_uppercase + string.ascii_lowercase + string.digits
_TALKATIVE = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray._private.runtime_env.packaging",
    "ray._private.authentication.http_token_authentication",
)


@dataclass(frozen=True)
class Job:
    """What is to run on a cluster: `prunesweep` with these words, and the text on its standard input.

    `working_dir` is uploaded to be the job's working directory. Unless the image has prunesweep, ours is sent along.
    """

    sweep: str
    store: str
    words: tuple[str, ...]
    stdin: str | None = None
    data_root: str = ""
    working_dir: Path | None = None
    image_has_prunesweep: bool = False
    env: tuple[tuple[str, str], ...] = ()
    submission_id: str | None = None
    local: tuple[str, ...] = ()
    """Folders that are not uploaded with the working directory: the store and the data, where they are inside."""
    of_a_sweep: bool = True
    again: tuple[tuple[str, str], ...] = ()
    """More metadata: how the job was submitted, for what it advises (orchestrator/advice.py)."""


@contextlib.contextmanager
def job_server(address: str) -> Iterator[JobSubmissionClient]:
    """Ray's job server at `address` (http://HOST:8265). Raises ClusterError."""
    check_job_server(address)
    from ray.exceptions import AuthenticationError
    from requests.exceptions import RequestException

    try:
        # An address in the environment would win over the argument.
        with environment({"RAY_ADDRESS": None, "RAY_API_SERVER_ADDRESS": None}):
            from ray.job_submission import JobSubmissionClient

            for name in _TALKATIVE:  # which set their levels as they are imported
                logging.getLogger(name).setLevel(logging.ERROR)
            client = JobSubmissionClient(address)
        yield client
    except BrokenPipeError:  # our own stdout: `logs | head`
        raise
    except AuthenticationError as error:
        raise ClusterError(refusal(f"the Ray job server at {address}")) from error
    except (ConnectionError, RequestException, RuntimeError, ValueError) as error:
        raise ClusterError(
            f"cannot reach the Ray job server at {address}: {first_line(error)} Is the head running, and the port of "
            "that address reachable?"
        ) from error


def submission_id(sweep: str) -> str:
    """A new submission id that begins with the sweep's name."""
    return f"{sweep}-{utc_now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def submit_job(address: str, job: Job, report: Report = silent) -> str:
    """Submit a job; return its submission id. Raises UserError where the id is taken or the upload is too large."""
    name = job.submission_id or submission_id(job.sweep)
    if not re.fullmatch(r"[\w.-]+", name):
        raise UserError(f"--submission-id {name}: letters, digits, '.', '_' and '-' are allowed")
    if job.working_dir is not None:
        report(f"measuring {job.working_dir}")
        check_size(job.working_dir, excluded(job))
    report("asking the job server")
    with tempfile.TemporaryDirectory(prefix="prunesweep-job-") as folder, job_server(address) as client:
        there = {one.submission_id: one for one in client.list_jobs()}
        if name in there:
            raise UserError(
                f"this cluster has a job {name} already ({there[name].status.value.lower()}): give another "
                f"--submission-id, or none; `prunesweep logs {name}` shows its output"
            )
        report("packing prunesweep")
        arguments = as_ray_takes_it(job, name, Path(folder))
        for one in there.values():
            if job.of_a_sweep and _is_same_sweep(one, arguments["metadata"]) and not one.status.is_terminal():
                say(f"{one.submission_id} runs {job.sweep} already: both will work on it")
        return _submit(client, arguments, report)


def _is_same_sweep(job: JobDetails, metadata: dict[str, str]) -> bool:
    """Whether a job works on the sweep, store and data that this metadata names."""
    return all((job.metadata or {}).get(key) == metadata[key] for key in (SWEEP, STORE, DATA_ROOT))


def as_ray_takes_it(job: Job, name: str, folder: Path) -> dict[str, Any]:
    """The arguments of Ray's submit_job. What is sent along of prunesweep is put into `folder`."""
    env_vars = {**STOP_WAIT, **dict(job.env)}
    about = {SWEEP: job.sweep, STORE: job.store, DATA_ROOT: job.data_root, **dict(job.again)}
    runtime_env: dict[str, Any] = {"env_vars": env_vars}
    if job.working_dir is not None:
        runtime_env |= {"working_dir": str(job.working_dir), "excludes": excluded(job)}
    if not job.image_has_prunesweep:
        runtime_env["py_modules"] = [str(ship(folder))]
    return {
        "entrypoint": entrypoint(job),
        "submission_id": name,
        "runtime_env": runtime_env,
        "metadata": about if job.of_a_sweep else {},
    }


def entrypoint(job: Job) -> str:
    """The job's shell command. The spec is its standard input, whatever else is uploaded."""
    module = "prunesweep" if job.image_has_prunesweep else f"{SHIPPED}.rooms.prunesweep"
    command = shlex.join(["python", "-m", module, *job.words])
    if job.stdin is None:
        return command
    if len(job.stdin.encode()) > SPEC_BYTES:
        raise UserError(
            f"the spec has {len(job.stdin.encode())} bytes, and a job takes at most {SPEC_BYTES}: write lists of "
            "layers as patterns, or split it"
        )
    text, end = job.stdin if job.stdin.endswith("\n") else f"{job.stdin}\n", end_of(job.stdin)
    return f"{command} <<'{end}'\n{text}{end}\n"


def end_of(text: str) -> str:
    """A line that ends `text` as a here-document. Its first character begins no line there, where there is such a one.

    Of a line that begins as the mark does, and goes on with a character outside ASCII, dash 0.5.12 loses a byte.
    """
    lines = text.split("\n")
    taken = {line[:1] for line in lines}
    end = next((c for c in _FIRST if c not in taken), "E") + "ND_OF_SPEC"
    while end in lines:
        end += "_"
    return end


def ship(folder: Path) -> Path:
    """A copy of prunesweep's own packages in `folder`, as a package that Ray puts on every worker's path.

    Two levels deep, so that no pattern that excludes a user's `/storage` meets ours.
    """
    from prunesweep import ROOMS

    ours, rooms = Path(__file__).resolve().parents[1], folder / SHIPPED / "rooms"
    rooms.mkdir(parents=True)
    for name in ROOMS:
        if (ours / name).is_dir():
            shutil.copytree(ours / name, rooms / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        else:
            shutil.copy(ours / f"{name}.py", rooms)
    shutil.copy(ours / "prunesweep.py", rooms)
    for package in (rooms, rooms.parent):
        (package / "__init__.py").touch()
    return rooms.parent


def excluded(job: Job) -> list[str]:
    """What of the working directory is not uploaded, besides what .gitignore and .rayignore there name."""
    if job.working_dir is None:
        return []
    here = job.working_dir.resolve()
    inside = [Path(one).resolve() for one in job.local if "://" not in one]
    return [f"/{one.relative_to(here).as_posix()}" for one in inside if here in one.parents]


def check_size(folder: Path, excludes: list[str]) -> None:
    """Raise UserError where a folder is more than Ray uploads."""
    measured = _measured(folder, excludes)
    if measured is None:
        return
    sizes, limit = measured
    total = sum(sizes.values())
    if total >= limit:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
        named = ", ".join(f"{name} ({sizes[name] / 2**20:.0f} MiB)" for name in largest)
        raise UserError(
            f"--working-dir {folder} has {total / 2**20:.0f} MiB, and Ray uploads less than {limit / 2**20:.0f}; the "
            f"largest: {named}. Name what the sweep's code does not need in {folder}/.gitignore or .rayignore; data "
            "and stores belong where every node sees them"
        )


def _measured(folder: Path, excludes: list[str]) -> tuple[dict[str, int], int] | None:
    """Bytes of what Ray would upload by its first name, and how many it takes; None with a Ray that counts otherwise,
    which then refuses by itself and says less."""
    sizes: dict[str, int] = {}
    root = folder.absolute()

    def add(path: Path) -> None:
        if path.is_file():
            first = path.relative_to(root).parts[0]
            sizes[first] = sizes.get(first, 0) + path.stat().st_size

    try:
        from ray._private.ray_constants import get_runtime_env_default_excludes
        from ray._private.runtime_env import packaging

        left_out = [packaging._get_excludes(root, [*get_runtime_env_default_excludes(), *excludes])]
        packaging._dir_travel(root, left_out, add, include_gitignore=True)
        return sizes, packaging.GCS_STORAGE_MAX_SIZE
    except (ImportError, AttributeError, TypeError):
        return None


def _submit(client: JobSubmissionClient, job: dict[str, Any], report: Report) -> str:
    """Submit a job; a cluster that has just started may take a while until it takes any."""
    give_up = time.monotonic() + AGENT_SECONDS
    while True:
        try:
            report("uploading")
            return client.submit_job(**job)
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > give_up:
                raise
            report("waiting for the cluster's job agent")
            time.sleep(1)


def finished(address: str, name: str) -> str:
    """The output of a job, once it has ended."""
    with job_server(address) as client:
        while not client.get_job_status(name).is_terminal():
            time.sleep(0.5)
        return client.get_job_logs(name)


def find_jobs(client: JobSubmissionClient, name: str) -> list[JobDetails]:
    """The job with this submission id, or those of this sweep, the newest first; UserError where there is none."""
    jobs = [job for job in client.list_jobs() if job.submission_id]
    found = [j for j in jobs if name == j.submission_id] or [j for j in jobs if name == sweep_of(j)]
    if not found:
        known = sorted({sweep_of(j) or j.submission_id or "" for j in jobs})
        raise UserError(f"no job or sweep {name} on this cluster; there are: {', '.join(known) or 'none'}")
    return sorted(found, key=lambda j: -(j.start_time or 0))


def resume_command(job: JobDetails, server: str) -> str:
    """What to type to go on with the sweep of a job."""
    about = job.metadata or {}
    words = ["prunesweep", "resume", about.get(SWEEP, "SWEEP"), "--address", server]
    for option, key in (("--store", STORE), ("--data-root", DATA_ROOT)):
        words += [option, about[key]] if about.get(key) else []
    return shlex.join([*words, *(["--working-dir", "."] if (job.runtime_env or {}).get("working_dir") else [])])


def sweep_of(job: JobDetails) -> str | None:
    """The sweep that a job runs; None for a job of somebody else."""
    return (job.metadata or {}).get(SWEEP)


@dataclass(frozen=True)
class SweepJob:
    """A job of a cluster that runs a sweep: `state` in Ray's words, in small letters; `submitted_at` is UTC."""

    job: str
    sweep: str
    store: str
    state: str
    submitted_at: str


def jobs_of_sweeps(client: JobSubmissionClient) -> list[SweepJob]:
    """The jobs of this cluster that run a sweep, the newest first."""
    found = [(job, sweep) for job in client.list_jobs() if job.submission_id and (sweep := sweep_of(job))]
    found.sort(key=lambda one: -(one[0].start_time or 0))
    return [
        SweepJob(
            str(job.submission_id), sweep, (job.metadata or {}).get(STORE, ""), job.status.value.lower(), _utc(job)
        )
        for job, sweep in found
    ]


def _utc(job: JobDetails) -> str:
    began = dt.datetime.fromtimestamp((job.start_time or 0) / 1000, dt.UTC)
    return f"{began:%Y-%m-%d %H:%M:%S}"
