"""The benchmarks of the driver run, with sizes that take seconds; what they assert, they assert here too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest

from tests.benchmarks import orchestration as bench
from tests.benchmarks.harness import Figure

WITHOUT_RAY: dict[str, Callable[[], Iterator[Figure]]] = {
    "driver_memory": lambda: bench.driver_memory(10, 40, n=1),
    "expansion": lambda: bench.expansion(1000, n=1),
    "resume_plan": lambda: bench.resume_plan(40, 1000, n=1),
    "orchestration_curve": lambda: bench.orchestration_curve((10,), (10, 100)),
}


@pytest.mark.parametrize("name", [*WITHOUT_RAY])
def test_figures(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every figure has its samples; here runs are pretended, and nothing starts a process."""
    monkeypatch.setattr(bench, "ray_up", nullcontext)
    monkeypatch.setattr(bench, "run", lambda tasks: bench.Ran(1.0, 1000 + tasks, 2000 + tasks))
    monkeypatch.setattr(bench, "in_process", _in_this_process)
    figures = list(WITHOUT_RAY[name]())
    assert figures and all(sample > 0 for figure in figures for sample in figure.samples)


def _in_this_process(function: str, *arguments: int) -> dict[str, Any]:
    return getattr(bench, function)(*arguments)


def test_orchestration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks that do nothing, through Ray, and as many Tune trials."""
    monkeypatch.setattr(bench, "pairs", lambda a, b, n: [(a(), b())])
    ours, ratio = bench.orchestration(40, 6)
    assert ours.median > 0 and ratio.median > 0
