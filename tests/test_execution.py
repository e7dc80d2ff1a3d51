"""What an execution sets for its arithmetic, and what of a machine it records."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from storage.records import Execution
from tests.benchmarks.compute import RECIPE, accelerator, random_split, resnet20
from tests.conftest import TINY
from workers.execution import arithmetic, library_versions
from workers.serial import Serial

SERIAL = Execution("serial", 1, 1, "channels_last", "a processor", ())
memory: Any = torch.utils.deterministic


def trained(*, filled: bool) -> Iterator[torch.Tensor]:
    """The losses of two steps and all that a residual network holds after them; new tensors are `filled` or not."""
    torch.manual_seed(0)
    with arithmetic(SERIAL):
        memory.fill_uninitialized_memory = filled
        backend, data = Serial(resnet20(), RECIPE, accelerator(), "channels_last"), random_split(12, (3, 32, 32))
        for _ in range(2):
            yield backend.step(data, None, 0.05)
        yield from backend.networks[0].state_dict().values()
        yield torch.tensor(backend.measure(data)[0].loss)


def test_new_tensors_are_not_filled_and_no_bit_depends_on_it() -> None:
    """The deterministic mode's fill is off while an execution lasts, and put back; it changes no result."""
    for before in (True, False):
        memory.fill_uninitialized_memory = before
        try:
            with arithmetic(SERIAL):
                assert torch.are_deterministic_algorithms_enabled()
                assert not torch.empty(1000).isnan().all()
                assert memory.fill_uninitialized_memory is False
            assert memory.fill_uninitialized_memory is before
        finally:
            memory.fill_uninitialized_memory = True
    with_fill, without = list(trained(filled=True)), list(trained(filled=False))
    assert len(with_fill) == len(without) > 100
    assert all(map(torch.equal, with_fill, without))


def test_a_missing_library_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row is made without Ray and torchvision, and names those libraries that are there."""

    def version(name: str) -> str:
        if name in ("ray", "torchvision"):
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.2"

    monkeypatch.setattr("workers.execution.version", version)
    found = dict(library_versions.__wrapped__())
    assert found.keys() == {"python", "torch", "torch-pruning", "accelerate", "numpy", "pyarrow"}
    assert found["torch"] == "1.2"


WITHOUT = """\
import importlib.metadata, sys

ABSENT = {absent}


class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)


sys.meta_path.insert(0, Absent())
distribution = importlib.metadata.Distribution.from_name.__func__


def from_name(cls, name):
    if name in ABSENT:
        raise importlib.metadata.PackageNotFoundError(name)
    return distribution(cls, name)


importlib.metadata.Distribution.from_name = classmethod(from_name)
sys.argv[1:] = ["run", "tiny.yaml", "--inline", "--store", "store", "-f", "csv"]
import prunesweep

prunesweep.main()
"""


def test_an_inline_run_needs_neither_ray_nor_model_libraries(tmp_path: Path) -> None:
    """With Ray, timm and torchvision absent, modules and metadata: a sweep of a network of our own is done."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    code = WITHOUT.format(absent={"ray", "timm", "torchvision"})
    paths = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=200, cwd=tmp_path, env=paths
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "tiny: 8 tasks done, none left" in run.stderr
