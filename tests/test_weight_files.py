"""Files of weights: known by their content under any name, opened if regular, refused without torch's advice."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from models import weights
from models.weights import NotRegular, file_hash
from storage.records import Dense, Recipe
from workers.datasets import Changed
from workers.dense import starting_model

STATE = {"0.weight": torch.arange(12.0).view(3, 4), "0.bias": torch.ones(3), "n": torch.tensor(5)}


def saved(path: Path, state: Any = STATE) -> Path:
    torch.save(state, path)
    return path


def test_the_hash_of_weights_does_not_depend_on_the_files_name(tmp_path: Path) -> None:
    """Saved under two names, in two processes, again after loading; other tensors and names have another."""
    one, other = saved(tmp_path / "a.pt"), saved(tmp_path / "a-much-longer-name.of.pth")
    assert one.read_bytes() != other.read_bytes()
    code = (
        "import torch; torch.save({'0.weight': torch.arange(12.0).view(3, 4), '0.bias': torch.ones(3), "
        f"'n': torch.tensor(5)}}, {str(tmp_path / 'there.pt')!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    again = saved(tmp_path / "again.bin", torch.load(one))
    assert len({file_hash(path) for path in (one, other, again, tmp_path / "there.pt")}) == 1
    others = [
        saved(tmp_path / "b.pt", STATE | {"n": torch.tensor(6)}),
        saved(tmp_path / "c.pt", {f"x{name}": tensor for name, tensor in STATE.items()}),
        saved(tmp_path / "d.pt", STATE | {"more": torch.tensor(6)}),
    ]
    assert len({file_hash(path) for path in (one, *others)}) == 4


def test_the_hash_of_weights_does_not_depend_on_the_order_of_an_archive(tmp_path: Path) -> None:
    """Nor on its padding or its serialization id, which follows the order."""
    one, other = saved(tmp_path / "a.pt"), tmp_path / "b.pt"
    with zipfile.ZipFile(one) as archive, zipfile.ZipFile(other, "w") as made:
        members = [(name, archive.read(name)) for name in reversed(archive.namelist())]
        for name, held in members:
            changed = bytes(40) if name.endswith("serialization_id") else held
            info = zipfile.ZipInfo(name.replace("a/", "b/", 1))
            info.extra = b"FB\x08\x00" + b"Z" * 8
            made.writestr(info, changed)
    assert all(torch.equal(a, b) for a, b in zip(torch.load(other).values(), STATE.values(), strict=True))
    assert file_hash(other) == file_hash(one)


def test_the_hash_of_other_files_is_over_their_bytes(tmp_path: Path) -> None:
    """Safetensors, torch's older format, damaged archives, archives of another kind, and no archive."""
    from safetensors.torch import save_file

    save_file(STATE, tmp_path / "a.safetensors")
    torch.save(STATE, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    whole = saved(tmp_path / "a.pt").read_bytes()
    (tmp_path / "torn.pt").write_bytes(whole[:-100])
    middle = whole.index(STATE["0.weight"].numpy().tobytes())
    (tmp_path / "flipped.pt").write_bytes(whole[:middle] + b"\xff" + whole[middle + 1 :])
    (tmp_path / "zip.safetensors").write_bytes(whole)
    (tmp_path / "empty.pt").touch()
    with zipfile.ZipFile(tmp_path / "two.pt", "w") as archive:
        archive.writestr("a/data.pkl", b"1")
        archive.writestr("b/data.pkl", b"2")
    with zipfile.ZipFile(tmp_path / "deflated.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(10**6))
    paths = sorted(path for path in tmp_path.iterdir() if path.is_file() and path.name != "a.pt")
    assert len(paths) == 8
    for path in paths:
        assert file_hash(path) == hashlib.sha256(path.read_bytes()).hexdigest()[:16], path.name
    assert file_hash(tmp_path / "a.pt") != hashlib.sha256(whole).hexdigest()[:16]


def network(classes: int) -> nn.Module:
    """A user's network."""
    return nn.Sequential(nn.Flatten(), nn.Linear(1024, classes))


def test_the_worker_takes_the_same_weights_under_another_name(tmp_path: Path) -> None:
    """The planned hash holds for a copy that torch.save wrote under another name, and not for other weights."""
    torch.manual_seed(0)
    state = network(10).state_dict()
    planned = file_hash(saved(tmp_path / "a.pt", state))
    other = saved(tmp_path / "b.pt", state)

    def dense(path: Path) -> Dense:
        recipe = Recipe(1, 50, ((0, 0.01),), seed=0, weights=str(path))
        return Dense("tests.test_weight_files:network", "digits", recipe, content=(("weights", planned),))

    assert torch.equal(starting_model(dense(other)).state_dict()["1.weight"], state["1.weight"])
    assert dense(other).dense_id == dense(tmp_path / "a.pt").dense_id
    saved(other, {name: tensor + 1 for name, tensor in state.items()})
    with pytest.raises(Changed, match=f"the file of weights {other}"):
        starting_model(dense(other))


def test_weights_that_are_not_regular_files_are_not_opened(tmp_path: Path) -> None:
    """By path and by address: the file is named."""
    fifo, zero = tmp_path / "fifo.pt", tmp_path / "zero.safetensors"
    os.mkfifo(fifo)
    zero.symlink_to("/dev/zero")
    for where, said in ((str(fifo), "is a FIFO"), (str(zero), "is a character device"), (f"file://{fifo}", "regular")):
        with pytest.raises(ValueError, match=rf"the weights {where} cannot be read: .*{said}"):
            weights.read(where)
    with pytest.raises(NotRegular, match="is a FIFO"):
        file_hash(fifo)
    path = saved(tmp_path / "a.pt")
    assert list(weights.read(f"file://{path}")) == list(weights.read(str(path))) == list(STATE)


class Thing:
    """An object that is not a tensor."""


def damaged(folder: Path) -> Iterator[tuple[Path, str]]:
    """Weights that torch refuses, and the reason that is expected."""
    whole = saved(folder / "whole.pt").read_bytes()
    at = whole.index(b"data.pkl") + 60
    for name, held, said in (
        ("zeros", bytes(500), "its pickle cannot be read"),
        ("empty", b"", "it is empty"),
        ("torn", whole[:-200], "RuntimeError: PytorchStreamReader failed reading zip archive: failed finding central"),
        ("flipped", whole[:at] + b"\xff" * 20 + whole[at + 20 :], "codec can't decode byte 0xff"),
    ):
        (folder / f"{name}.pt").write_bytes(held)
        yield folder / f"{name}.pt", said
    yield saved(folder / "net.pt", nn.Linear(2, 2)), "it holds the Python object torch.nn.modules.linear.Linear"
    yield saved(folder / "thing.pt", {"a": Thing()}), "it holds the Python object tests.test_weight_files.Thing"
    script: Any = torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))
    script.save(str(folder / "script.pt"))
    yield folder / "script.pt", "it is a TorchScript archive"


@pytest.mark.filterwarnings("ignore")
def test_damaged_weights_are_refused_without_torchs_advice(tmp_path: Path) -> None:
    """What is wrong, what is allowed, what to do; nowhere that the file can be loaded unsafely."""
    for path, said in damaged(tmp_path):
        with pytest.raises(ValueError, match="damaged or holds more than tensors") as raised:
            weights.read(str(path))
        message = str(raised.value)
        assert message.startswith(str(path)) and said in message, message
        assert "Allowed: a .safetensors" in message and "save `model.state_dict()` alone" in message
        assert "weights_only" not in message and "trust" not in message and raised.value.__cause__ is None
