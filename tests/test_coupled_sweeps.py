"""Sweeps of networks whose channels hang together: a row says what its own network has lost."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from orchestrator.cli import main
from orchestrator.expand import cells, tasks
from orchestrator.run import Options, run_spec
from orchestrator.spec import load_spec
from storage.records import Cell, Row
from storage.store import Store
from tests import unusual_networks
from tests.specs import document
from tests.sweeps import rows
from workers import load_network
from workers.datasets import Changed
from workers.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Iterator

    from orchestrator.documents import Document


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module of the unusual networks in the working directory, another in each test."""
    name = f"unusual_{tmp_path.name.replace('-', '_')}"
    shutil.copy(unusual_networks.__file__, tmp_path / f"{name}.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield name
    torch.set_num_threads(before)


def swept(store: str, spec: Document) -> list[Row]:
    """The rows of a sweep, run inline to its end, by candidate."""
    assert run_spec(Store(store), spec, Options(inline=True)).complete
    return sorted(rows(Store(store)).values(), key=lambda row: (row.pruner, row.candidate))


TRAINING = {"epochs": 1, "batch_size": 256, "lr": 0.01}


def keeping(grid: dict[str, Any], **keys: Any) -> Document:
    """A spec that keeps its networks."""
    return document(grid, dense=TRAINING, retrain=TRAINING | {"keep": "last"}, **keys)


@pytest.mark.parametrize(
    ("network", "layer", "ratio", "channels"),
    [("Chunk", "a", 0.25, 4), ("LinearImage", "a", 0.25, 32), ("Tied", "two", 0.5, 4), ("Maxout", "a", 0.5, 12)],
)
def test_a_row_says_what_its_network_has_lost(nets: str, network: str, layer: str, ratio: float, channels: int) -> None:
    """The units of each row are the channels that its kept network lacks; ratio, parameters and candidates follow."""
    grid = {"model": f"{nets}:{network}", "layers": layer, "ratio": ratio, "pruner": ["oracle", "l1"]}
    found = swept("store", keeping(grid, candidates={"mode": "sample", "count": 3}))
    assert len(found) == 4
    dense = load_file(next(Path("store/dense").glob("*.safetensors")))
    for row in found:
        assert row.removed is not None and row.params is not None and row.kept_network is not None
        (removed,) = row.removed
        assert len(removed.units) == channels and row.achieved_ratio == ratio
        assert row.equivalence_error is not None and row.equivalence_error <= 1e-9
        kept: Any = load_network(f"store/{row.kept_network}")
        assert len(kept.get_submodule(layer).weight) == len(dense[f"{layer}.weight"]) - channels
        assert sum(p.numel() for p in kept.parameters()) == row.params < (row.dense_params or 0)
    assert len({row.removed for row in found if row.pruner == "oracle"}) == 3


def test_a_tie_survives_retraining(nets: str) -> None:
    """The network that is kept, and loaded, has one Parameter in both layers."""
    grid = {"model": f"{nets}:Tied", "layers": "a", "ratio": 0.25, "pruner": "l2"}
    (row,) = swept("store", keeping(grid))
    kept: Any = load_network(f"store/{row.kept_network}")
    assert kept.one.weight is kept.two.weight and kept.one.weight.shape == (6, 6, 3, 3)
    saved = load_file(f"store/{row.kept_network}")
    assert torch.equal(saved["one.weight"], saved["two.weight"])


def test_candidates_are_counted_in_units(nets: str) -> None:
    """Of 8 pairs 2 go: 28 candidates, not the 1,820 that 4 of 16 channels would have."""
    spec = document({"model": f"{nets}:Chunk", "layers": "a", "ratio": 0.25, "pruner": "oracle"})
    assert len(list(tasks(load_spec(spec), spec))) == math.comb(8, 2)


def test_every_criterion_ranks_units(nets: str) -> None:
    """Each criterion, global scope, iterative schedules and released propagation run on sets of channels."""
    grid = {"model": f"{nets}:Chunk", "layers": "a", "ratio": 0.5}
    pruners = ["l1", "l2", "taylor", "hessian", "fpgm", "lamp", "activation", "random"]
    found = swept("store", document(grid | {"pruner": pruners, "scope": ["local", "global"]}, calibration=8))
    found += swept("steps", document(grid | {"pruner": ["l1", "taylor"], "schedule": "iterative-2"}, calibration=8))
    found += swept("released", document(grid | {"pruner": "l2", "propagation": "released"}))
    for row in found:
        assert row.removed is not None
        channels = row.removed[0].units
        assert len(channels) == 8 and {c + 8 for c in channels if c < 8} == {c for c in channels if c >= 8}
    (l1,) = [row for row in found if (row.pruner, row.scope, row.schedule) == ("l1", "local", "one-shot")]
    weight = load_file(next(Path("store/dense").glob("*.safetensors")))["a.weight"].double().flatten(1).abs().sum(1)
    norms = weight[:8] + weight[8:]
    assert l1.removed is not None
    assert sorted(norms.argsort(stable=True)[:4].tolist()) == [c for c in l1.removed[0].units if c < 8]
    assert l1.score_l1 == pytest.approx(float(norms.sort().values[:4].sum()))


def test_coupled_cells_have_an_identity_of_their_own(nets: str) -> None:
    """Rows that an earlier version wrote for single channels do not count as done; plain layers keep their ids."""
    spec = document({"model": f"{nets}:Chunk", "layers": ["a", "b"], "ratio": 0.25, "pruner": "l1"})
    coupled, plain = cells(load_spec(spec), spec)
    assert dict(coupled.sets)["a"][0] == (0, 8) and plain.sets == ()
    assert coupled.cell_id != replace(coupled, sets=()).cell_id
    assert "sets" in json.loads(coupled.json) and "sets" not in json.loads(plain.json)
    assert Cell.from_json(coupled.json) == coupled and Cell.from_json(plain.json) == plain
    (tied,) = cells(load_spec(other := document({"model": f"{nets}:Tied", "layers": "two", "ratio": 0.5})), other)
    assert dict(tied.sets)["two"][0] == (0,)


def test_a_task_planned_for_single_channels_fails(nets: str) -> None:
    """A manifest of an earlier version names channels, of which this one knows that they go in sets."""
    spec = document({"model": f"{nets}:Chunk", "layers": "a", "ratio": 0.25, "pruner": "l1"})
    swept("store", spec)
    (cell,) = cells(load_spec(spec), spec)
    worker = Worker(Store("store"), "none")
    assert worker.graph(cell) is not None
    with pytest.raises(Changed, match="some of its channels can only be removed together"):
        worker.graph(replace(cell, sets=()))


def test_sizes_are_those_of_the_network(nets: str) -> None:
    """Two networks that lost as many units of other layers are counted each for itself."""
    spec = document({"model": f"{nets}:Chunk", "layers": "b", "ratio": 0.25, "pruner": "l1"})
    (row,) = swept("store", spec)
    (cell,) = cells(load_spec(spec), spec)
    worker = Worker(Store("store"), "none")
    wide: nn.Module = unusual_networks.Chunk()
    narrow: nn.Module = unusual_networks.Glu()
    narrow.b = unusual_networks.conv(8, 4, stride=2)  # type: ignore[assignment]
    narrow.head = nn.Linear(4, 10)  # type: ignore[assignment]
    example = torch.zeros(1, 1, 32, 32)
    sizes = [worker.size(one, example, cell.dense)[0] for one in (wide, narrow)]
    assert sizes == [sum(p.numel() for p in one.parameters()) for one in (wide, narrow)]
    assert row.params is not None and row.dense_params == sizes[0]


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit code and stderr of a command in this process."""
    with pytest.raises(SystemExit) as done:
        main(list(arguments))
    return int(str(done.value.code)), capsys.readouterr().err


def test_plan_names_the_sets_and_the_reasons(nets: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`plan` says which channels go together; a layer that cannot be pruned is refused with the reason, and does not
    hide the others from a pattern."""

    def plan(network: str, layers: str) -> tuple[int, str]:
        Path("spec.yaml").write_text(document({"model": f"{nets}:{network}", "layers": layers}).text())
        return printed(capsys, "plan", "spec.yaml", "--store", "store")

    code, err = plan("Chunk", "a")
    assert code == 0 and "can only be removed in 8 sets of 2, which are its units: [0, 8], [1, 9]" in err
    code, err = plan("Recurrent", "b")
    assert code == 2 and "b: it is coupled to rnn, a GRU, which cannot lose channels one by one" in err
    code, err = plan("Parametrized", "one")
    assert code == 2 and "one: it has a parametrized weight (WeightNorm)" in err
    assert plan("Recurrent", "*")[0] == 0
    assert not (tmp_path / "store").exists()
