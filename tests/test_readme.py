"""The README is executed: every command in its bash blocks, its Python block, and its tree."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Prunesweep

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """The fenced code blocks of a language."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return [text for kind, text in found if kind == language]


@pytest.mark.timeout(900)
def test_commands(tmp_path: Path, prunesweep: Prunesweep) -> None:
    """After a (shortened) demo, every command of the tour does what it says and exits 0."""
    short = ["--set", "dense.epochs=3", "--set", "retrain.epochs=1", "--set", "candidates={mode: sample, count: 6}"]
    assert prunesweep("run", "digits", "--inline", *short).returncode == 0
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    script = "set -euo pipefail\n" + "\n".join(blocks("bash"))
    found = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PATH": path}
    )
    assert found.returncode == 0, found.stderr
    assert "Traceback" not in found.stderr
    assert (tmp_path / "scratch").exists() is False
    assert (tmp_path / "scatter.pdf").read_bytes().startswith(b"%PDF")
    assert "mine: all 40 tasks are done; nothing to run" in found.stderr
    assert "mine: 60 tasks in 8 cells, 40 done, 20 to run" in found.stderr
    (python,) = blocks("python")
    shown = subprocess.run(
        [sys.executable, "-c", python.replace("Store(", "print(Store(").replace(".df()", ".df().shape)")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 0 and shown.stdout.startswith("("), shown.stderr
    assert shown.stderr == ""


def test_tree() -> None:
    """The tree names every top-level package and file of code, and nothing that is not there."""
    (tree,) = blocks("")
    named = [line.split()[0] for line in tree.splitlines()]
    assert all((ROOT / name).exists() for name in named)
    packages = {f"{path.parent.name}/" for path in ROOT.glob("*/__init__.py")}
    assert packages <= set(named)


def test_links_and_commands_exist() -> None:
    """Every relative link leads somewhere, and every command of the tool is one it has."""
    from orchestrator.cli import COMMANDS

    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    shown = [
        *"".join(blocks("bash")).splitlines(),
        *(line.strip() for line in README.splitlines() if line[:4] == "    "),
    ]
    mentioned = {line.split()[1] for line in shown if line.startswith("prunesweep ")}
    assert mentioned <= set(COMMANDS)
    assert "make demo" in README and "make test" in README


def test_every_test_that_the_promises_name_is_there() -> None:
    """docs/reliability.md names for each promise a file of tests, or a test in it."""
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (ROOT / "docs/reliability.md").read_text())
    assert len(named) > 15
    for file, test in named:
        assert f"def {test}" in (ROOT / file).read_text(), (file, test)
