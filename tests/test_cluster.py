"""First contact with a cluster: run, submit, logs and stop against `ray start --head` on loopback."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from ray.job_submission import JobStatus

from orchestrator.cli_cluster import _ended, _of_manifest, _variable
from orchestrator.errors import UserError
from orchestrator.jobs import Job, check_size, entrypoint, excluded, find_jobs, job_server, ship, submit_job
from orchestrator.render import Rendering
from storage.signs import signs
from storage.store import Store
from tests.conftest import TINY, Cluster, Prunesweep, command
from tests.jobs import ROOT, quickly, rows_of, wait_for
from tests.sweeps import committed, left_over
from tests.test_interrupt import in_process


@pytest.fixture
def beside_models(tmp_path: Path) -> Path:
    """A working directory with folders named as our rooms: packages, and folders that only look so."""
    folder = tmp_path / "project"
    for room in ("models", "storage", "workers"):
        (folder / room).mkdir(parents=True)
        (folder / room / "__init__.py").write_text("raise ImportError('the wrong one')\n")
    (folder / "orchestrator").mkdir()
    (folder / "tiny.yaml").write_text(TINY)
    return folder


def test_run_on_a_running_cluster(cluster: Cluster, beside_models: Path, prunesweep: Prunesweep) -> None:
    """`run --address` from a folder with a `models` of its own; --address wins over RAY_ADDRESS."""
    found = prunesweep(
        "run", "tiny.yaml", "--address", cluster.address, "-f", "json", cwd=beside_models, RAY_ADDRESS="127.0.0.1:1"
    )
    assert found.returncode == 0, found.stderr
    assert '"n": 4' in found.stdout
    assert Store(beside_models / "results").sql("select count(*) from rows where status = 'done'").fetchall() == [(8,)]


def test_embedded_ray_from_such_a_folder(beside_models: Path, prunesweep: Prunesweep) -> None:
    """The same without a cluster: embedded Ray's workers import the right rooms too."""
    found = prunesweep("run", "tiny.yaml", "--set", "candidates.count=2", "--set", "grid.seed=0", cwd=beside_models)
    assert found.returncode == 0, found.stderr
    assert "Traceback" not in found.stderr and "Configuration for experiment" not in found.stdout + found.stderr


def test_submit_follow_and_read(cluster: Cluster, beside_models: Path, prunesweep: Prunesweep) -> None:
    """`submit --no-wait` from a folder with code of its own, uploaded without what .gitignore names: prunesweep comes
    along, the environment reaches the workers and is shown nowhere; `logs -f` follows; the rows are there."""
    (beside_models / "mine").mkdir()
    (beside_models / "mine" / "nets.py").write_text(OWN_NETWORK)
    (beside_models / ".gitignore").write_text("*.yaml\n/large\n")
    (beside_models / "large").write_bytes(b"0" * 10**6)
    own = TINY.replace("lenet5_mini", '"mine.nets:build"').replace("conv1", '"0"').replace("count: 4", "count: 2")
    (beside_models / "tiny.yaml").write_text(own.replace("seed: [0, 1]", "seed: 0"))
    environment = {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:1", "RAY_ADDRESS": "127.0.0.1:1"}  # --address wins
    given = ["--working-dir", ".", "--env", "OWN_SETTING=hush-7", "--submission-id", "tiny-by-name"]
    submitted = prunesweep(
        "submit", "tiny.yaml", "--address", cluster.jobs, "--no-wait", *given, cwd=beside_models, **environment
    )
    assert submitted.returncode == 0, submitted.stderr
    assert submitted.stdout == "tiny-by-name\n"
    assert f"prunesweep logs tiny-by-name -f --address {cluster.jobs}" in submitted.stderr
    followed = prunesweep("logs", "tiny", "-f", "--address", cluster.jobs, cwd=beside_models)
    assert followed.returncode == 0, followed.stdout + followed.stderr
    assert "tiny: 2 tasks done, none left" in followed.stdout
    assert "mine.nets:build synthetic 0 0.2 oracle" in followed.stdout
    assert "tiny-by-name: succeeded" in followed.stderr
    assert "hush-7" not in submitted.stdout + submitted.stderr + followed.stdout + followed.stderr
    with job_server(cluster.jobs) as client:
        job = client.get_job_info("tiny-by-name")
    assert "hush-7" not in str(job.metadata) + job.entrypoint
    again = prunesweep("submit", "tiny.yaml", "--address", cluster.jobs, *given, cwd=beside_models)
    assert again.returncode == 2
    assert "this cluster has a job tiny-by-name already (succeeded): give another --submission-id" in again.stderr


OWN_NETWORK = """\
import os, sys
from pathlib import Path
from torch import nn

def build(classes, shape):
    if "ray" in sys.modules and os.environ.get("RAY_JOB_STOP_WAIT_TIME_S"):  # on the cluster
        assert os.environ["OWN_SETTING"] == "hush-7"
        assert "prunesweep_shipped" in sys.modules["workers"].__file__, sys.modules["workers"].__file__
        assert not Path("large").exists()
    return nn.Sequential(
        nn.Conv2d(shape[0], 6, 5, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, classes)
    )
"""


def test_a_job_that_drops_planned_tasks_is_refused(
    cluster: Cluster, quick_jobs: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where only the job sees the store, its message and its exit code 2 arrive; --replace goes with it."""
    monkeypatch.setenv("QUICK_POISON", "{}")
    at = ("--address", cluster.jobs, *quickly())
    assert in_process(capsys, "submit", "quick.yaml", *at)[0] == 0
    before = quick_jobs.newest("quick")
    monkeypatch.setattr("orchestrator.cli_cluster._check_kept", lambda *_: None)
    code, out, _ = in_process(capsys, "submit", "quick.yaml", *at, "--set", "candidates.count=4")
    assert code == 2 and "this spec drops 6 of its 10 planned tasks, 6 done:" in out and "--replace" in out
    assert quick_jobs.newest("quick") == before
    code, out, _ = in_process(capsys, "submit", "quick.yaml", *at, "--set", "candidates.count=4", "--replace")
    assert code == 0 and len(quick_jobs.plan_table(quick_jobs.newest("quick"))) == 4


def test_stop_drains_and_resume_goes_on(
    cluster: Cluster, quick_jobs: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`stop` lets the tasks at work end, the job is stopped and what is committed stays; `status` and `ls` show the
    cluster's jobs; `resume` to a job server is a job too, and ends the sweep."""
    monkeypatch.setenv("QUICK_POISON", "{}")
    Path("quick.yaml").write_text(Path("quick.yaml").read_text().replace("count: 10", "count: 45"))  # 20 s
    at = ("--address", cluster.jobs)
    code, out, err = in_process(capsys, "submit", "quick.yaml", *at, "--no-wait", *quickly(1.0))
    assert code == 0, err
    job = out.strip()
    wait_for(lambda: rows_of(quick_jobs) >= 1)
    code, _, err = in_process(capsys, "status", "quick", *at)
    assert code == 0 and f"job {job} runs quick: running, since" in err and "a driver is at work" in err
    code, _, err = in_process(capsys, "stop", "quick", *at)
    assert code == 0 and f"{job}: stopped; what is committed stays" in err
    again = err.splitlines()[-1].split()
    assert again[:3] == ["prunesweep", "resume", "quick"] and again[3:5] == list(at)
    assert again[5:7] == ["--store", quick_jobs.absolute]
    before = committed(quick_jobs)
    assert 1 <= len(before) < 45
    code, out, err = in_process(capsys, "logs", "quick", "-f", *at)
    assert code == 130 and "stopping: what is finished is committed" in out and "interrupted: what was" in out
    assert f"{job}: stopped" in err
    assert left_over(quick_jobs) == []
    code, out, err = in_process(capsys, *again[1:], *quickly())
    assert code == 0, out + err
    assert len(committed(quick_jobs)) == 45 and before < committed(quick_jobs)
    code, out, _ = in_process(capsys, "ls", *at, "-f", "json")
    (line,) = json.loads(out)
    assert code == 0 and line["job_state"] == "succeeded" and line["job"] != job


def test_stop_now(
    cluster: Cluster, quick_jobs: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`stop --now` does not wait for tasks that would take minutes; what is committed stays."""
    monkeypatch.setenv("QUICK_POISON", '{"2": "hang", "3": "hang", "4": "hang"}')
    Path("quick.yaml").write_text(Path("quick.yaml").read_text().replace("shard: 2", "shard: 1"))
    at = ("--address", cluster.jobs)
    code, out, err = in_process(capsys, "submit", "quick.yaml", *at, "--no-wait", *quickly())
    assert code == 0, err
    wait_for(lambda: len([note for note in signs(quick_jobs, "workers").values() if note.get("task")]) == 2)
    time.sleep(1)
    asked, before = time.monotonic(), committed(quick_jobs)
    code, _, err = in_process(capsys, "stop", out.strip(), *at, "--now")
    assert code == 0 and "stopped; what is committed stays" in err
    assert time.monotonic() - asked < 12  # a drain would wait 25 s for them
    assert before <= committed(quick_jobs)


def test_failed_tasks_fail_the_job(
    cluster: Cluster, quick_jobs: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that ends with failed tasks: exit code 3, and failed in Ray's eyes too."""
    monkeypatch.setenv("QUICK_POISON", '{"1": "raise"}')
    code, out, err = in_process(capsys, "submit", "quick.yaml", "--address", cluster.jobs, *quickly())
    assert code == 3, out + err
    assert "9 tasks done, 1 failed, 0 pending" in out
    assert "failed: exit code 3" in err
    with job_server(cluster.jobs) as client:
        assert find_jobs(client, "quick")[0].status.value == "FAILED"


def test_a_laptop_needs_neither_the_data_nor_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A network of a library on data that only the cluster has, in a bucket that only the cluster reaches."""
    sent: list[Job] = []
    monkeypatch.setattr("orchestrator.jobs.submit_job", lambda server, job, *_: sent.append(job) or "tiny-1")
    monkeypatch.chdir(tmp_path)
    text = TINY.replace("lenet5_mini", "torchvision/resnet18").replace("synthetic", "imagenet")
    Path("tiny.yaml").write_text(text.replace("conv1", "layer1.0.conv1"))
    at = (
        "--address",
        "http://127.0.0.1:1",
        "--no-wait",
        "--store",
        "s3://only-there/results",
        "--data-root",
        "/none",
    )
    code, out, err = in_process(capsys, "submit", "tiny.yaml", *at)
    assert (code, out) == (0, "tiny-1\n"), err
    assert "imagenet is not under /none on this machine: its networks are tried where the sweep runs" in err
    (job,) = sent
    assert job.words == ("run", "-", "--store", "s3://only-there/results", "--data-root", "/none")
    code, _, err = in_process(capsys, "submit", "tiny.yaml", *at, "--store", "s3://key:hush-7@bucket/results")
    assert code == 5 and "a store's URI holds no credentials" in err and "hush-7" not in err


def test_a_sweep_that_runs_already(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A second job of it in the same store is taken, and the first is named; one that has ended is not."""
    about = {"prunesweep_sweep": "tiny", "store": "/shared", "data_root": "/data"}
    states = ("RUNNING", "STOPPED")
    there = [SimpleNamespace(submission_id=state, metadata=about, status=JobStatus(state)) for state in states]
    client = SimpleNamespace(list_jobs=lambda: there, submit_job=lambda **job: job["submission_id"])
    monkeypatch.setattr("orchestrator.jobs.job_server", lambda address: nullcontext(client))
    second = Job("tiny", "/shared", (), data_root="/data", submission_id="tiny-2")
    assert submit_job("http://head:8265", second) == "tiny-2"
    assert capsys.readouterr().err == "RUNNING runs tiny already: both will work on it\n"
    submit_job("http://head:8265", Job("tiny", "/elsewhere", (), data_root="/data"))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("status", "exit_code", "code"), [("FAILED", 3, 3), ("FAILED", -9, 1), ("FAILED", None, 4)])
def test_how_a_job_failed(status: str, exit_code: int | None, code: int) -> None:
    """With the driver's own exit code; as one of ours where it was killed; as the cluster's where it never was."""
    info = SimpleNamespace(status=JobStatus(status), driver_exit_code=exit_code, message="why", metadata={})
    client: Any = SimpleNamespace(get_job_info=lambda name: info)
    assert _ended(client, "tiny-1", "http://head:8265") == code


def test_what_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than Ray uploads is refused with what is largest; what is ignored, or the store inside, does not count."""
    from ray._private.runtime_env import packaging

    monkeypatch.setattr(packaging, "GCS_STORAGE_MAX_SIZE", 2 * 2**20)
    for name in ("results", "large", "ignored", ".git"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(b"0" * 2**21)
    (tmp_path / ".gitignore").write_text("ignored\n")
    job = Job("s", str(tmp_path / "results"), (), working_dir=tmp_path, local=(str(tmp_path / "results"),))
    assert excluded(job) == ["/results"]
    with pytest.raises(UserError, match=r"has 2 MiB, and Ray uploads less than 2; the largest: large \(2 MiB\)"):
        check_size(tmp_path, excluded(job))
    (tmp_path / "large" / "file").unlink()
    check_size(tmp_path, excluded(job))


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), max_size=300))
@example("A\x80\nE\xe9\nEN\u20ac\nEND_OF_SPEC\n")
@example("\n".join("EABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789") + "\nEND_OF_SPEC")
def test_a_spec_reaches_the_job_as_it_is(text: str) -> None:
    """Whatever the text, the shell hands it over unchanged (with a newline at its end)."""
    command = entrypoint(Job("s", "store", (), text, image_has_prunesweep=True)).replace(
        "python -m prunesweep", "cat", 1
    )
    got = subprocess.run(["sh", "-c", command], capture_output=True, check=True).stdout.decode()
    assert got == (text if text.endswith("\n") else f"{text}\n")


def test_what_is_sent_along_is_all_of_prunesweep(tmp_path: Path) -> None:
    """Every file that is installed is sent, and can be imported as it lies."""
    sent = ship(tmp_path) / "rooms"
    assert not list(sent.rglob("__pycache__"))
    code = "import prunesweep_shipped.rooms.prunesweep as p; p.claim_rooms(); import storage, usercode; "
    code += "print(storage.__file__, usercode.__file__)"
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert found.stdout.split() == [str(sent / "storage/__init__.py"), str(sent / "usercode.py")], found.stderr
    for name in ("workers/chain.cpp", "storage/views.sql", "orchestrator/studies/digits.yaml", "prunesweep.py"):
        assert (sent / name).read_bytes() == (ROOT / name).read_bytes()


def test_env_is_read_here_and_never_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """KEY=VALUE, or KEY for its value here; what is refused is not repeated."""
    monkeypatch.setenv("KEPT_HERE", "x=y")
    assert [_variable("A=b=c"), _variable("A="), _variable("KEPT_HERE")] == [
        ("A", "b=c"), ("A", ""), ("KEPT_HERE", "x=y")]  # fmt: skip
    with pytest.raises(UserError, match="write it as KEY=VALUE") as told:
        _variable("not a name=hush")
    assert "hush" not in str(told.value)
    with pytest.raises(UserError, match="NOT_SET_ANYWHERE: it is not set here"):
        _variable("NOT_SET_ANYWHERE")


SECRETS = """
HF_TOKEN AWS_SECRET_ACCESS_KEY aws_session_token WANDB_API_KEY MY_PASSWORD DB_PASS MySecret AZURE_CLIENT_SECRET apikey
SSH_PRIVATE_KEY GOOGLE_CREDENTIALS SENTRY_DSN MLFLOW_TRACKING_TOKEN OPENAI_API_KEYS RAY_AUTH_TOKEN
"""
NO_SECRETS = """
PYTHONPATH AWS_PROFILE AWS_REGION TOKENIZERS_PARALLELISM MAX_TOKENS KEYBOARD AUTHOR HF_HOME RAY_AUTH_MODE PATH MONKEY
AWS_WEB_IDENTITY_TOKEN_FILE RAY_AUTH_TOKEN_PATH GOOGLE_APPLICATION_CREDENTIALS COMPASS MLFLOW_TRACKING_URI
"""


@pytest.mark.parametrize(
    "text",
    [f"{name}=hush" for name in SECRETS.split()]
    + ["MLFLOW_TRACKING_URI=https://me:hush@host", "SETTING=-----BEGIN RSA PRIVATE KEY-----hush", "HF_TOKEN"],
)
def test_env_of_a_secret_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its name or its value, given or inherited, with the ways that there are; the value is not repeated."""
    monkeypatch.setenv("HF_TOKEN", "hush")
    with pytest.raises(UserError, match=r"looks like a secret, and Ray shows .* in which the nodes start Ray") as told:
        _variable(text)
    assert "hush" not in str(told.value)
    rendering = Rendering("rayjob", "image", None, "s3://b/r", "/data")
    if "=" in text:
        with pytest.raises(UserError, match="does not go into a file: write --env") as told:
            _of_manifest((text,), rendering)
        assert "hush" not in str(told.value)
    else:
        assert _of_manifest((text, "A=b"), rendering) == ((("A", "b"),), ("HF_TOKEN",))


@pytest.mark.parametrize("name", NO_SECRETS.split())
def test_env_of_other_variables_is_not(name: str) -> None:
    """Names in which a secret's word is a part of another word, and names of files."""
    assert _variable(f"{name}=some:thing/x") == (name, "some:thing/x")


def test_messages_name_the_address_that_was_used(quick_jobs: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """Not a port that others have."""
    code, _, err = in_process(capsys, "submit", "quick.yaml", "--address", "http://127.0.0.1:1", "--no-wait")
    assert code == 4 and "cannot reach the Ray job server at http://127.0.0.1:1: " in err and "8265" not in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "tiny.yaml", "--address", "127.0.0.1:1"],
        ["run", "tiny.yaml", "--address", "localhost:99999"],
        ["submit", "tiny.yaml", "--address", "http://127.0.0.1:1"],
        ["resume", "tiny", "--address", "http://127.0.0.1:1"],
        ["status", "tiny", "--address", "http://127.0.0.1:1"],
        ["logs", "tiny", "--address", "http://127.0.0.1:1"],
        ["stop", "tiny", "--address", "http://127.0.0.1:1"],
    ],
)
def test_no_cluster_is_exit_code_4(arguments: list[str], beside_models: Path, prunesweep: Prunesweep) -> None:
    """Nobody answers: one message, exit code 4, no traceback."""
    found = prunesweep(*arguments, cwd=beside_models)
    assert found.returncode == 4, found.stderr
    assert "Traceback" not in found.stderr and found.stdout == ""
    assert found.stderr.splitlines()[-1].startswith("prunesweep: ")


@pytest.mark.parametrize("command", ["run tiny.yaml", "doctor"])
def test_a_job_server_s_port_is_no_head(
    command: str, cluster: Cluster, beside_models: Path, prunesweep: Prunesweep
) -> None:
    """Something answers there: Ray itself would try for minutes. Nothing is written."""
    at = cluster.jobs.removeprefix("http://")
    found = prunesweep(*command.split(), "--address", at, cwd=beside_models)
    told = f"no Ray head answers at {at}: give the port that `ray start --head` names"
    assert found.returncode == 4 and told in found.stderr + found.stdout
    assert f"a job server is given as {cluster.jobs}" in found.stderr + found.stdout
    assert not (beside_models / "results").exists()


@pytest.mark.parametrize("address", ["ray://127.0.0.1:10001", "htp://127.0.0.1:8265", "127.0.0.1", ":6379"])
def test_addresses_of_other_forms(address: str, beside_models: Path, prunesweep: Prunesweep) -> None:
    """A usage error, before anything is written."""
    found = prunesweep("run", "tiny.yaml", "--address", address, cwd=beside_models)
    assert found.returncode == 2 and "give HOST:PORT of a Ray head, or auto" in found.stderr, found.stderr
    assert not (beside_models / "results").exists()


def test_unknown_job(cluster: Cluster, beside_models: Path, prunesweep: Prunesweep) -> None:
    """A job that is not there: exit code 2, and which there are."""
    found = prunesweep("logs", "nosuch", "--address", cluster.jobs, cwd=beside_models)
    assert found.returncode == 2 and "no job or sweep nosuch" in found.stderr


def test_command_is_installed() -> None:
    """The tests above run the installed command."""
    assert subprocess.run([command(), "--version"], capture_output=True, check=True).stdout
