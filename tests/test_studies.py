"""The studies: as many tasks as the protocol's table says, and each of them runs, shrunken, end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.expand import cells, tasks
from orchestrator.spec import load_spec
from orchestrator.study import open_study, study_names
from storage.store import Store
from tests.test_interrupt import in_process

ALL = 45 + 120 + 210 + 252 + 210 + 120 + 45
TASKS = {
    **{f"lenet5-mini-conv{i}": 3 * ALL for i in (1, 2, 3)},
    **{f"lenet5-mini-conv{i}": 3 * 1000 for i in (12, 13, 23, 123)},
    "lenet5-mini-fmnist": 3 * 252,
    "lenet5-mini-kmnist": 3 * 252,
    "lenet5-mini-depth": 3 * 3 * 252,
    "lenet5-mini-width": 3 * 3 * 1000,
    "resnet56-cifar10": 3 * 1000,
    "vgg19-cifar100": 3 * 1000,
    "resnet18-imagenet": 3 * 200,
    "resnet50-imagenet": 3 * 20,
    "vit-b16-imagenet": 3 * 20,
    "unstructured-imagenet": 3 * 200,
    "mllm": 3 * 20,
}
SHORT = [name for name in TASKS if name.startswith(("lenet5-mini", "resnet56", "resnet18"))]


def test_there_are_these_studies() -> None:
    """Each row of the table, the short ones, and each of them with the one candidate of l1; and the digits."""
    named = [*TASKS, *(f"{name}-short" for name in SHORT)]
    assert sorted(study_names()) == sorted(["digits", *named, *(f"{name}-l1" for name in named)])


@pytest.mark.parametrize("name", TASKS)
def test_a_study_has_the_tasks_of_the_table(name: str) -> None:
    """Its tasks are as many as the protocol says; with l1 there is one candidate in each cell, trained alike."""
    document, by_l1 = open_study(name), open_study(f"{name}-l1")
    spec = load_spec(document)
    found = list(cells(spec, document))
    assert sum(1 for _ in tasks(spec, document)) == TASKS[name]
    alone = list(cells(load_spec(by_l1), by_l1))
    assert sum(1 for _ in tasks(load_spec(by_l1), by_l1)) == 3 * len(found) == 3 * len(alone)
    assert [(a.layers, a.retrain, a.dense) for a in found] == [(a.layers, a.retrain, a.dense) for a in alone]


@pytest.mark.parametrize("name", SHORT)
def test_a_short_study_retrains_for_a_tenth(name: str) -> None:
    """The epochs and the steps of the rate are divided by ten, nothing else changes."""
    whole, short = (load_spec(open_study(one)) for one in (name, f"{name}-short"))
    (long,), (brief,) = whole.retrain, short.retrain
    assert brief.epochs * 10 == long.epochs and [start * 10 for start, _ in brief.lr] == [start for start, _ in long.lr]
    assert [lr for _, lr in brief.lr] == [lr for _, lr in long.lr] and short.dense == whole.dense
    assert short.grid == whole.grid


def test_the_wide_ones_name_their_layers() -> None:
    """The patterns take the layers they mean: first convolutions of blocks, all convolutions, every width."""

    def layers(name: str) -> dict[str, float]:
        document = open_study(name)
        return dict(next(iter(cells(load_spec(document), document))).layers)

    assert len(layers("resnet56-cifar10")) == 27 and len(layers("vgg19-cifar100")) == 16
    assert list(layers("resnet18-imagenet")) == [f"layer{i}.{j}.conv1" for i in (1, 2, 3, 4) for j in (0, 1)]
    fifty = layers("resnet50-imagenet")
    assert len(fifty) == 1 + 2 * 16 and fifty["conv1"] == fifty["layer2.3.conv2"] == 0.4375
    assert (fifty["layer3.0.conv1"], fifty["layer4.2.conv2"]) == (0.433, 0.4316)
    assert len(layers("unstructured-imagenet")) == 20 and "fc" not in layers("unstructured-imagenet")
    widths = layers("vit-b16-imagenet")
    assert len(widths) == 1 + 2 * 12 and set(widths.values()) == {0.5}
    assert len(layers("mllm")) == 32


# -- each of them, shrunken ---------------------------------------------------------------------------

TRAINED = "dense={epochs: 1, batch_size: 4, lr: 0.01}"
FEW = ["candidates={mode: sample, count: 2}", "grid.seed=[0]", "retrain.epochs=1", "calibration=4"]
ON_DISK = [TRAINED, *FEW, "retrain.batch_size=4", "resources={processes: 1}"]
NARROW = "torchvision/vit_b_16?patch_size=32&hidden_dim=48&num_heads=4&mlp_dim=64&num_layers=2"
SYNTHETIC = ["grid.dataset=synthetic", "dense={epochs: 1, batch_size: 64, lr: 0.05}", *FEW]
SMOKE: dict[str, list[str]] = {
    **{name: SYNTHETIC for name in TASKS if name.startswith("lenet5-mini")},
    "resnet56-cifar10": [*ON_DISK, "grid.dataset=imagefolder:small"],
    "vgg19-cifar100": [*ON_DISK, "grid.dataset=imagefolder:small"],
    "resnet18-imagenet": [*ON_DISK, "grid.dataset=imagefolder:large"],
    "resnet50-imagenet": [*ON_DISK, "grid.dataset=imagefolder:large", "candidates.count=1"],
    "unstructured-imagenet": [*ON_DISK, "grid.dataset=imagefolder:large"],
    "vit-b16-imagenet": [*ON_DISK, "grid.dataset=imagefolder:large", f"grid.model={NARROW}"],
    "mllm": [*ON_DISK, "grid.dataset=llava:talk", "grid.model=hf/net", "retrain.accumulate=2"],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of noise, small and large, and a small vision-language network with its data."""
    from PIL import Image

    root, draw = tmp_path_factory.mktemp("studies"), np.random.default_rng(0)
    for name, side, counts in (("small", 32, (8, 4)), ("large", 80, (4, 2))):
        for part, count in zip(("train", "test"), counts, strict=True):
            for label in ("a", "b"):
                folder = root / name / part / label
                folder.mkdir(parents=True)
                for i in range(count // 2):
                    pixels = draw.integers(0, 255, (side, side, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def smoke(name: str, folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, store: Path) -> list[tuple[Any, ...]]:
    """Run a study with its overrides; status, granularity, ratios and counts of its rows."""
    monkeypatch.chdir(folders)
    overrides = [part for one in SMOKE[name] for part in ("--set", one)]
    arguments = ["--inline", "--store", str(store), "--data-root", str(folders), "-f", "json"]
    code, out, err = in_process(capsys, "run", name, *arguments, *overrides)
    assert code == 0, err
    assert len(json.loads(out)) >= 1
    return (
        Store(str(store))
        .sql(
            "select status, candidate, params, dense_params, macs, dense_macs, achieved_ratio, equivalence_error, "
            "len(epoch_test_accuracy), best_test_accuracy, pruned_train_loss from rows order by candidate"
        )
        .fetchall()
    )


@pytest.mark.parametrize("name", [name for name in SMOKE if name != "mllm"])
def test_a_study_runs(name: str, folders: Path, monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    """On little data, with few candidates, every study goes from its spec to rows that say what they should."""
    for row in (rows := smoke(name, folders, monkeypatch, capsys, tmp_path / "store")):
        status, _, params, dense_params, macs, dense_macs, ratio, error, epochs, accuracy, loss = row
        assert status == "done" and params < dense_params and 0.15 < ratio < 0.85 and error <= 1e-9
        assert macs < dense_macs or (name == "unstructured-imagenet" and macs == dense_macs)
        assert epochs == 1 and 0 <= accuracy <= 1 and loss > 0
    assert len(rows) == len(list(_cells(name))) * (1 if name == "resnet50-imagenet" else 2)


def test_the_multimodal_study_runs(folders: Path, monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    """The same of the language model of a vision-language network."""
    pytest.importorskip("transformers")
    from tests.conversations import make_data, make_network

    make_network(folders / "net")
    make_data(folders / "talk")
    rows = smoke("mllm", folders, monkeypatch, capsys, tmp_path / "store")
    assert [row[:2] for row in rows] == [("done", 0), ("done", 1)]
    assert all(row[2] < row[3] and row[4] < row[5] and row[6] == 0.5 and row[7] <= 1e-9 for row in rows)


def _cells(name: str) -> Any:
    document = open_study(name)
    return cells(load_spec(document), document)
