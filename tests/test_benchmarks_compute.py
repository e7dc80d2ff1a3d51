"""The training benchmarks run, at small sizes; their harness computes what it says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.benchmarks import __main__ as command
from tests.benchmarks import compute
from tests.benchmarks.harness import Figure, pairs, ratios


def test_steps_and_the_input_pipeline() -> None:
    found = [*compute.step(steps=1, number=1), *compute.input_pipeline(n=1024, number=1)]
    assert [figure.unit for figure in found] == ["x", "x", "x", "", ""]
    assert all(figure.median > 0 and len(figure.samples) == 1 for figure in found)
    assert "2.1 TFLOP" in found[3].what


@pytest.mark.slow
def test_whole_epochs() -> None:
    """Against the best serial loop and the Accelerate loop, in processes of their own."""
    found = [*compute.best_serial_loop(n=600, number=1), *compute.residual(steps=1, number=1)]
    assert all(figure.median > 0 and figure.more for figure in found)


@pytest.mark.slow
def test_the_plain_loop(mnist_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On real MNIST prunesweep is far ahead of it, though here it trains on a tenth."""
    monkeypatch.setenv("PRUNESWEEP_DATA_ROOT", mnist_root)
    with_train_set, without = compute.networks_per_hour(number=1)
    assert with_train_set.median > without.median > 5


def test_a_figure_says_whether_it_met_its_limits() -> None:
    """From below where more is better, from above otherwise; the interval is the median's."""
    figure = Figure("a", "a", "x", (1.0, 2.0, 9.0), least=1.5, aim=3, more=True)
    assert (figure.median, figure.verdict) == (2.0, "least")
    assert Figure("a", "a", "s", (1.0, 2.0, 9.0), least=1.5, aim=1).verdict == "missed"
    assert Figure("a", "a", "s", (1.0, 2.0, 9.0), least=3, aim=2).verdict == "aim"
    assert Figure("a", "a", "s", (1.0,)).verdict == ""
    samples = tuple(np.random.default_rng(1).normal(5, 1, 101).tolist())
    low, high = Figure("a", "a", "x", samples).interval
    assert 4.5 < low < float(np.median(samples)) < high < 5.5


def test_pairs_are_measured_in_turn() -> None:
    """A B A B, after a round that does not count; a ratio is how many times the first is faster."""
    order: list[str] = []
    found = pairs(lambda: order.append("a") or 2.0, lambda: order.append("b") or 6.0, 2)  # type: ignore[func-returns-value]
    assert "".join(order) == "ababab" and ratios(found) == (3.0, 3.0)


def test_one_benchmark_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A table on stdout, JSON in a file; an unknown name names those there are."""
    monkeypatch.setattr("sys.argv", ["benchmarks", "gpu_fleet", "input_pipeline", "--json", str(tmp_path / "b.json")])
    monkeypatch.setattr(compute.input_pipeline, "__defaults__", (512, 2))
    command.main()
    assert "input pipeline, share of a training step" in capsys.readouterr().out
    written = json.loads((tmp_path / "b.json").read_text())
    (figure,) = written["figures"]
    assert figure["name"] == "input_pipeline" and figure["n"] == 2 and written["machine"]["torch"]
    monkeypatch.setattr("sys.argv", ["benchmarks", "nonsense"])
    with pytest.raises(SystemExit):
        command.main()
    assert "no benchmark nonsense; there are networks_per_hour" in capsys.readouterr().err


def test_the_page_tells_of_every_benchmark() -> None:
    """docs/performance.md has a figure of each, or says why there is none."""
    page = (Path(__file__).parents[1] / "docs" / "performance.md").read_text()
    assert [name for name in command.BENCHMARKS if f"`{name}`" not in page] == []
