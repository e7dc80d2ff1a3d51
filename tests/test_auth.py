"""Token authentication against a Ray head on loopback that wants one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from orchestrator.auth import HOW, Token, refusal, token
from storage.store import Store
from tests.conftest import TINY, Cluster, Prunesweep, ray_head
from tests.faults.quick import spec
from tests.faults.runs import quick
from tests.sweeps import committed


@dataclass(frozen=True)
class Guarded:
    """A cluster with a token, and the environment with which one gets in."""

    cluster: Cluster
    key: dict[str, str]


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    """A head in token mode. Neither it nor anybody else looks into the real home folder."""
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "token").write_text("the-right-token-0123456789abcdef")
    key = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token"), "HOME": str(folder)}
    with ray_head(folder, **key) as head:
        yield Guarded(head, key)
    assert not (folder / ".ray").exists()


def test_with_the_token(guarded: Guarded, tmp_path: Path, prunesweep: Prunesweep) -> None:
    """`run`, `submit` and `logs` work with it; a submitted job and its workers have it from their node."""
    sweep = quick(tmp_path, spec(count=4), None, 0.0, **guarded.key)
    code, said = sweep.run("run", "quick.yaml", "--address", guarded.cluster.address)
    assert code == 0, said
    assert len(committed(sweep.store)) == 4
    (tmp_path / "tiny.yaml").write_text(TINY.replace("count: 4", "count: 1").replace("seed: [0, 1]", "seed: 0"))
    arguments = ["--address", guarded.cluster.jobs, "--store", "submitted"]
    found = prunesweep("submit", "tiny.yaml", *arguments, **guarded.key)
    assert found.returncode == 0, found.stdout + found.stderr
    assert len(committed(Store(tmp_path / "submitted"))) == 1
    shown = prunesweep("logs", "tiny", *arguments[:2], **guarded.key)
    assert shown.returncode == 0 and "tiny: 1 task done, none left" in shown.stdout


@pytest.mark.parametrize("command", ["run tiny.yaml", "submit tiny.yaml", "logs tiny", "stop tiny"])
@pytest.mark.parametrize("wrong", [True, False], ids=["wrong", "missing"])
def test_without_the_right_token(
    wrong: bool, command: str, guarded: Guarded, tmp_path: Path, prunesweep: Prunesweep
) -> None:
    """One message that says what to set, exit code 4, within seconds; nothing is written."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    (tmp_path / "wrong").write_text("some-other-token-0123456789abcdef")
    # Without a mode Ray shows none, though there be one.
    env = {"HOME": str(tmp_path), "RAY_AUTH_TOKEN_PATH": str(tmp_path / "wrong")}
    env |= {"RAY_AUTH_MODE": "token" if wrong else ""}
    address = guarded.cluster.address if command.startswith("run") else guarded.cluster.jobs
    asked = time.monotonic()
    found = prunesweep(*command.split(), "--address", address, **env)
    assert time.monotonic() - asked < 60  # Ray alone tries for 20 s; most of ours is what this machine imports
    assert (found.returncode, found.stdout) == (4, ""), found.stderr
    *phases, line = found.stderr.splitlines()  # a slow machine reports phases first
    assert not any(phase.startswith("prunesweep") for phase in phases)
    assert line.startswith("prunesweep: the Ray ") and address in line and line.endswith(HOW)
    told = (
        f"does not take the token of RAY_AUTH_TOKEN_PATH={tmp_path / 'wrong'}"
        if wrong
        else "none was shown (RAY_AUTH_MODE is not set here)"
    )
    assert told in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.yaml", "wrong"]


def test_where_the_token_is_from(tmp_path: Path) -> None:
    """Ray's order: RAY_AUTH_TOKEN, the file that RAY_AUTH_TOKEN_PATH names, ~/.ray/auth_token; none in another mode."""
    home = {"HOME": str(tmp_path), "RAY_AUTH_MODE": "token"}
    default = tmp_path / ".ray" / "auth_token"
    assert token(home) == Token(None, f"there is no {default}")
    default.parent.mkdir()
    default.write_text("of-home\n")
    assert token(home) == Token("of-home", str(default))
    named = home | {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "named")}
    assert token(named) == Token(None, f"RAY_AUTH_TOKEN_PATH={tmp_path / 'named'} cannot be read or is empty")
    (tmp_path / "named").write_text("of-file")
    assert token(named).value == "of-file"
    given = named | {"RAY_AUTH_TOKEN": "given"}
    assert token(given) == Token("given", "RAY_AUTH_TOKEN")
    assert token(given | {"RAY_AUTH_MODE": "disabled"}) == Token(None, "RAY_AUTH_MODE is disabled here")
    assert token(given | {"RAY_AUTH_MODE": "tokn"}) == Token(None, "RAY_AUTH_MODE is tokn here")
    assert token({"HOME": str(tmp_path)}) == Token(None, "RAY_AUTH_MODE is not set here")
    assert "given" not in refusal("the cluster", token(given)).replace("given (", "")


def test_the_token_of_a_local_run_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray makes one, for everybody to read, where it starts without a mode."""
    monkeypatch.delenv("RAY_AUTH_MODE")
    sweep = quick(tmp_path, spec(count=1), None, 0.0, HOME=str(tmp_path))
    code, said = sweep.run("run", "quick.yaml")
    assert code == 0, said
    assert (tmp_path / ".ray/auth_token").stat().st_mode & 0o077 == 0
