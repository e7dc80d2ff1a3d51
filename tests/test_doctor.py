"""doctor: what follows from what a node shows of itself, and a look at a real cluster."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator import checks, probe
from orchestrator.checks import BAD, OK, WARN, Check, code, node
from orchestrator.cli_doctor import _code, _lines
from storage.store import Store
from tests.conftest import Cluster
from tests.test_interrupt import in_process

HERE: dict[str, str | None] = {"python": "3.11.7", "torch": "2.15.0", "ray": "2.60.0"}
WELL: dict[str, Any] = {
    "node": "n1",
    "gpus": 0.0,
    "host": "n1",
    "versions": HERE,
    "temporary": 50 * 2**30,
    "problem": None,
    "code": "0123abcd",
    "data": ["mnist"],
    "store": None,
    "same": True,
    "disk": None,
}


def told(**differs: Any) -> dict[str, Check]:
    """What is said of a node that is well, but for what differs; by what is looked at."""
    return {line[0].removeprefix("n1 "): line for line in node(WELL | differs, HERE, "0123abcd", "/shared/results")}


def test_a_node_that_is_well() -> None:
    """Every line is ok, and says where it was looked from."""
    lines = told()
    assert set(lines) == {"versions", "prunesweep", "store", "data", "disk"}
    assert {result for _, result, _ in lines.values()} == {OK}
    assert lines["store"][2] == "/shared/results is writable from a worker"


@pytest.mark.parametrize(
    ("differs", "what", "result", "says"),
    [
        ({"versions": HERE | {"torch": "2.9"}}, "versions", WARN, "torch 2.9 (here 2.15.0): use one image"),
        ({"versions": HERE | {"ray": None}}, "versions", WARN, "ray is missing (here 2.60.0)"),
        ({"problem": "ModuleNotFoundError: No module named 'duckdb'"}, "prunesweep", BAD, "'duckdb'; install its req"),
        ({"code": "ffffffff"}, "prunesweep", WARN, "other code (ffffffff, here 0123abcd); `submit` sends ours along"),
        ({"gpus": 2.0, "versions": HERE | {"torch": "2.15.0+cpu"}}, "GPUs", BAD, "install a CUDA build"),
        (
            {"store": "the store /x is not writable: Read-only"},
            "store",
            BAD,
            "Read-only; every node must see one store",
        ),
        ({"same": False}, "store", BAD, "/shared/results is another folder there: every node must see one store"),
        ({"disk": 2**29}, "store disk", WARN, "0.5 GiB free where the store is"),
        ({"data": []}, "data", WARN, "`prunesweep prefetch` into a shared folder"),
        ({"temporary": 2**30}, "disk", WARN, "1.0 GiB free for temporary files; Ray wants more than 5"),
    ],
)
def test_what_is_wrong_with_a_node(differs: dict[str, Any], what: str, result: str, says: str) -> None:
    """One thing that differs is one line that says so, and what to do."""
    line = told(**differs)[what]
    assert line[1] == result and says in line[2]
    others = {name: line for name, line in told(**differs).items() if name not in (what, "versions")}
    assert {line[1] for line in others.values()} <= {OK}


def test_exit_codes() -> None:
    """A cluster out of reach is 4, a store alone 5, anything else 1."""
    assert _code(["cluster"]) == _code(["store", "cluster"]) == 4
    assert _code(["store"]) == _code(["store", "there: n1 store"]) == 5
    assert _code(["store", "torch"]) == _code(["n1 prunesweep"]) == 1


def test_lines_of_a_job() -> None:
    """Among a job's other output, and what else is JSON, the lines are found."""
    line = {"check": "disk", "result": "ok", "what": "1 GiB"}
    text = f"Running entrypoint for job x\n3\nnull\n{{}}\n{json.dumps(line)}\n[1]\n{{broken\n"
    assert list(_lines(text)) == [("disk", "ok", "1 GiB")]


def test_what_a_process_shows_of_itself(tmp_path: Path) -> None:
    """The store's mark is seen in the same store only; what cannot be imported is told, not raised."""
    store = Store(tmp_path / "results")
    store.scratch.renew("doctor/mark", {})
    seen = probe.look("prunesweep", store.absolute, str(tmp_path), "doctor/mark")
    assert (seen["problem"], seen["store"], seen["same"]) == (None, None, True)
    assert seen["code"] == code() and seen["data"] == [] and seen["disk"] > 0
    other = probe.look("prunesweep", str(tmp_path / "other"), str(tmp_path), "doctor/mark")
    assert other["store"] is None and other["same"] is False and not (tmp_path / "other").exists()
    (tmp_path / "file").touch()
    assert "is a file" in probe.look("prunesweep", str(tmp_path / "file"), str(tmp_path), None)["store"]
    missing = probe.look("no_such_module", store.absolute, str(tmp_path), None)
    assert missing["problem"] == "ModuleNotFoundError: No module named 'no_such_module'"
    assert missing["versions"] == probe.versions()


def test_a_cluster_from_here(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A Ray task on each node looks; here every node is this machine. Nothing is left in the store."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checks, "libraries", lambda: iter(()))  # tested without a cluster
    store = Store(tmp_path / "results")
    store.commit_dense("dense", b"something")
    code_, out, err = in_process(capsys, "doctor", "--address", cluster.address, "-f", "json")
    assert code_ == 0, out + err
    lines = {line["check"]: line for line in json.loads(out)}
    assert lines["cluster"]["what"] == f"{cluster.address}: 1 nodes answer"
    (name,) = [check.removeprefix("node ") for check in lines if check.startswith("node ")]
    assert lines[f"node {name}"]["what"] == "2 CPUs, 0 GPUs"
    assert [lines[f"{name} {what}"]["what"] for what in ("versions", "prunesweep")] == ["as here", "as here"]
    assert lines[f"{name} store"]["what"] == "results is writable from a worker"
    assert list((tmp_path / "results").rglob("doctor")) == []
    code_, out, err = in_process(capsys, "doctor", "--address", cluster.address, "--store", "new", "-f", "json")
    assert code_ == 0 and "new is writable from a worker" in out and not (tmp_path / "new").exists()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "http://127.0.0.1:1"])
def test_a_cluster_out_of_reach(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is a line like the others, and exit code 4."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checks, "libraries", lambda: iter(()))
    code_, out, _ = in_process(capsys, "doctor", "--address", address, "-f", "json")
    assert code_ == 4
    assert json.loads(out)[-1]["check"] == "cluster" and json.loads(out)[-1]["result"] == BAD


def test_a_cluster_through_its_job_server(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A job looks from the cluster, with the prunesweep that is sent along; it is no sweep's job."""
    monkeypatch.chdir(tmp_path)
    code_, out, err = in_process(capsys, "doctor", "--address", cluster.jobs, "-f", "json")
    assert code_ == 0, out + err
    lines = {line["check"]: line for line in json.loads(out)}
    assert lines["cluster"]["result"] == lines["there: cluster"]["result"] == OK
    assert "doctor" not in in_process(capsys, "ls", "--address", cluster.jobs)[2]
