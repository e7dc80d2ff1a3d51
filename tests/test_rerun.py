"""`prunesweep rerun`: one task again, by what its row and the store have, and how it compares."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from models import build_model
from orchestrator.documents import Document
from orchestrator.run import Options, run_spec
from storage.identity import canonical_json
from storage.records import Execution, Row, row_for
from storage.schema import PROVENANCE, table_to_rows
from storage.store import Store
from tests.conftest import TINY
from tests.rows import DENSE, ORACLE, failed, tasks, tree
from tests.samples import in_memory
from tests.test_interrupt import in_process
from workers import load_network
from workers.backends import open_backend
from workers.datasets import prepare
from workers.weights import packed

Rerun = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The tiny sweep, run once in this process; nobody changes it."""
    store = Store(tmp_path_factory.mktemp("rerun") / "results")
    assert run_spec(store, Document("tiny.yaml", TINY), Options(inline=True)).complete
    return store


@pytest.fixture
def store(original: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A copy of it in a working directory of its own."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(original.root, tmp_path / "results")
    return Store(tmp_path / "results")


@pytest.fixture
def rerun(store: Store, capsys: pytest.CaptureFixture[str]) -> Rerun:
    """`prunesweep rerun` in this process, which must leave the store as it was: exit code, stdout, stderr."""

    def command(*arguments: str) -> tuple[int, str, str]:
        before = tree(Path(store.root))
        found = in_process(capsys, "rerun", *arguments)
        assert tree(Path(store.root)) == before
        assert "Traceback" not in found[2]
        return found

    return command


def rows(store: Store) -> list[Row]:
    """The rows of a store, in one order."""
    return sorted(table_to_rows(store.row_files()[0]), key=lambda row: row.task_id)


def tamper(store: Store, **changed: Any) -> Row:
    """Another row in place of the first; returns it."""
    first, *rest = rows(store)
    other = replace(first, **changed)
    for name in store.row_file_names():
        store.delete(name)
    store.commit_rows("s0", [other, *rest])
    return other


def execution(row: Row, **changed: Any) -> str:
    """The execution of a row with something else in it."""
    return canonical_json(json.loads(str(row.execution)) | changed)


def differing(out: str) -> set[str]:
    """The columns that the command's JSON names."""
    return {line["column"] for line in json.loads(out)}


def accuracy(file: str) -> float:
    """The test accuracy of a network that was left in a file."""
    network, test = load_network(file), in_memory(prepare("synthetic", "data", 0.0, torch.device("cpu")).test)
    with torch.no_grad():
        return (network(test.images).argmax(1) == test.labels).double().mean().item()


# -- the same row -------------------------------------------------------------------------------------


def test_the_same_row_again(store: Store, rerun: Rerun) -> None:
    """With the recorded execution a task gives its row again, bit for bit; its id may be cut short. Nothing is
    printed for machines, and the global generators stand where they stood."""
    row = rows(store)[-1]
    state = torch.get_rng_state()
    assert rerun(row.task_id[:6]) == (0, "", f"task {row.task_id}: the same row, bit for bit\n")
    assert torch.equal(torch.get_rng_state(), state)


def test_a_lost_scratch_changes_nothing(store: Store, rerun: Rerun) -> None:
    """The execution is the row's, not what the store would choose now: rerun needs no scratch, and makes none."""
    shutil.rmtree(Path(store.root, "scratch"))
    code, _, err = rerun(rows(store)[0].task_id)
    assert code == 0 and "the same row, bit for bit" in err
    assert not Path(store.root, "scratch").exists()


def test_the_recorded_execution_is_repeated(store: Store, rerun: Rerun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Back-end, threads and memory format are those of the row, not what the store has chosen."""
    other = tamper(
        store, execution=execution(rows(store)[0], backend="serial", threads=2, memory_format="preserve_format")
    )
    seen: list[tuple[int, str, str]] = []

    def watched(execution: Execution, *arguments: Any) -> Any:
        seen.append((torch.get_num_threads(), execution.backend, execution.memory_format))
        return open_backend(execution, *arguments)

    monkeypatch.setattr("workers.task.open_backend", watched)
    assert "execution differs" not in rerun(other.task_id)[2]
    assert seen == [(2, "serial", "preserve_format")]


# -- the network --------------------------------------------------------------------------------------


def test_save_leaves_the_network(store: Store, rerun: Rerun) -> None:
    """--save writes the retrained network, which loads and is as accurate as the row says; its path is told."""
    row = rows(store)[0]
    code, out, err = rerun(row.task_id, "--save", "network.safetensors")
    assert code == 0 and "network.safetensors" in out + err and "the same row" in err
    network = load_network("network.safetensors")
    assert sum(p.numel() for p in network.parameters()) == row.params
    assert accuracy("network.safetensors") == pytest.approx(row.last_test_accuracy, abs=1e-9)
    assert rerun(row.task_id[:8], "--save", "again.safetensors")[0] == 0
    assert Path("again.safetensors").read_bytes() == Path("network.safetensors").read_bytes()


def test_save_of_the_best_epoch(store: Store, rerun: Rerun) -> None:
    """--keep best leaves the network of the best epoch, not that of the last."""
    row = rows(store)[0]
    cell = row.task().cell
    worse = replace(cell, retrain=replace(cell.retrain, lr=((0, 0.01), (1, 0.5))))
    task = replace(row.task(), cell=worse)
    measured = {"dense_sha256": row.dense_sha256, "execution": row.execution, "device": "cpu"}
    store.commit_rows("s0", [row_for(task, "done", measured)])
    for keep in ("best", "last"):
        assert (
            rerun(task.task_id, "--save", f"{keep}.safetensors", "--keep", keep, "-f", "json", "-o", "found.json")[0]
            == 3
        )
    found = {line["column"]: line["rerun"] for line in json.loads(Path("found.json").read_text())}
    best, last = float(found["best_test_accuracy"]), float(found["last_test_accuracy"])
    assert found["best_epoch"] == "1" and last < best
    assert accuracy("best.safetensors") == pytest.approx(best, abs=1e-9)
    assert accuracy("last.safetensors") == pytest.approx(last, abs=1e-9)


def test_stdout_is_what_the_format_says(store: Store, rerun: Rerun) -> None:
    """-f json is JSON whether columns differ or not, with --save too."""
    row = rows(store)[0]
    assert json.loads(rerun(row.task_id, "-f", "json")[1]) == []
    code, out, _ = rerun(tamper(store, best_epoch=7).task_id, "-f", "json", "--save", "network.safetensors")
    assert (code, differing(out)) == (3, {"best_epoch"})


def test_a_file_that_cannot_be_written_is_told_first(
    store: Store, rerun: Rerun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--save into a folder that is not there is refused before the work is done."""
    monkeypatch.setattr("orchestrator.rerun.rerun", lambda *_: pytest.fail("it was run all the same"))
    assert rerun(rows(store)[0].task_id, "--save", "nowhere/network.safetensors")[0] == 2


def test_save_where_there_is_no_folder(rerun: Rerun, store: Store) -> None:
    """A file that cannot be written is a usage error."""
    code, _, err = rerun(rows(store)[0].task_id, "--save", "nowhere/network.safetensors")
    assert code == 2 and "cannot write nowhere/network.safetensors" in err


# -- another row --------------------------------------------------------------------------------------


def test_a_row_that_is_another(store: Store, rerun: Rerun) -> None:
    """The same execution and other numbers: the columns are named with both values, and the exit code tells."""
    row = rows(store)[0]
    assert row.last_test_loss is not None and row.epoch_test_loss is not None
    lost = 0.5 + row.last_test_loss
    other = tamper(store, last_test_loss=lost, epoch_test_loss=(9.0, *row.epoch_test_loss[1:]))
    code, out, err = rerun(other.task_id, "-f", "json")
    assert code == 3
    assert err == f"task {row.task_id}: the same execution gives another row: 2 columns differ\n"
    lines = {line["column"]: line for line in json.loads(out)}
    assert lines.keys() == {"last_test_loss", "epoch_test_loss"}
    assert lines["last_test_loss"] == {"column": "last_test_loss", "row": str(lost), "rerun": str(row.last_test_loss)}
    code, out, _ = rerun(other.task_id, "--save", "network.safetensors")
    assert code == 3 and "last_test_loss" in out
    assert load_network("network.safetensors")


def test_the_last_bit_counts(store: Store, rerun: Rerun) -> None:
    """A difference in the last bit of a number is a difference; one in a column of provenance is none."""
    row = rows(store)[0]
    assert row.last_test_loss is not None
    nearly = float(torch.nextafter(torch.tensor(row.last_test_loss).double(), torch.tensor(9.0).double()))
    code, out, _ = rerun(tamper(store, last_test_loss=nearly).task_id, "-f", "json")
    assert (code, differing(out)) == (3, {"last_test_loss"})
    changed = {"host": "other", "seconds_retrain": 9.0, "attempt": 7, "peak_memory_bytes": 1}
    assert changed.keys() <= PROVENANCE
    assert rerun(tamper(store, last_test_loss=row.last_test_loss, **changed).task_id)[0] == 0


# -- another execution --------------------------------------------------------------------------------


def test_another_device_and_the_same_row(store: Store, rerun: Rerun) -> None:
    """It is told what differs in the execution, though the rows are equal."""
    row = rows(store)[0]
    device = json.loads(str(row.execution))["device_model"]
    other = tamper(store, execution=execution(row, device_model="Abacus 3000"))
    told = f"the same row, bit for bit, though the execution differs (device_model Abacus 3000 -> {device})"
    assert rerun(other.task_id) == (0, "", f"task {row.task_id}: {told}\n")


@pytest.mark.parametrize(
    ("column", "factor", "code", "told"),
    [
        ("last_test_loss", 2.0, 0, "agrees before retraining, to rounding"),
        ("pruned_train_loss", 1 + 1e-7, 0, "agrees before retraining, to rounding"),
        ("pruned_train_loss", 1 + 1e-3, 3, "differs before retraining"),
    ],
)
def test_another_device_and_another_row(
    store: Store, rerun: Rerun, column: str, factor: float, code: int, told: str
) -> None:
    """With another execution what comes before retraining must agree to rounding, and nothing else; all columns
    that differ are named."""
    row = rows(store)[0]
    device = execution(row, device_model="Abacus 3000", versions={"numpy": "0.1", "torch": "0.1"})
    other = tamper(store, execution=device, **{column: getattr(row, column) * factor})
    found, out, err = rerun(other.task_id, "-f", "json")
    assert (found, differing(out)) == (code, {column})
    assert told in err and "the execution is another one (device_model Abacus 3000 -> " in err
    assert "versions {'numpy': '0.1', 'torch': '0.1'} -> " in err


def test_another_rounding_of_the_equivalence_error_is_no_difference(store: Store, rerun: Rerun) -> None:
    """It is a rounding error itself: on another device another one, and the rows agree all the same."""
    row = rows(store)[0]
    assert row.equivalence_error is not None and row.equivalence_error < 1e-12
    device = execution(row, device_model="Abacus 3000")
    other = tamper(store, execution=device, equivalence_error=row.equivalence_error + 3e-16)
    code, _, err = rerun(other.task_id)
    assert code == 0 and "agrees before retraining, to rounding" in err


# -- what cannot be run again -------------------------------------------------------------------------


def test_which_task(store: Store, rerun: Rerun) -> None:
    """An id that no row has, or that several begin with, is told with what to do."""
    code, out, err = rerun("ffffffffffff0000")
    assert (code, out) == (2, "") and "no task ffffffffffff0000 has a row in results" in err
    assert "prunesweep query" in err
    code, out, err = rerun("")
    assert (code, out) == (2, "") and "several tasks begin with : give more of the id, as " in err
    assert any(row.task_id in err for row in rows(store))
    code, _, err = rerun("' or true --")
    assert code == 2 and "no task ' or true -- has a row" in err


def test_a_failed_task(store: Store, rerun: Rerun) -> None:
    """It has no measurements to compare with; once it is done, it has."""
    task = rows(store)[0].task()
    for name in store.row_file_names():
        store.delete(name)
    store.commit_rows("s0", [failed(task)])
    code, out, err = rerun(task.task_id[:8])
    assert (code, out) == (2, "") and f"task {task.task_id} failed (RuntimeError)" in err


def test_dense_weights_that_are_gone_or_others(store: Store, rerun: Rerun) -> None:
    """A task is compared only where it starts from the same dense weights."""
    row = rows(store)[0]
    (file,) = Path(store.root, "dense").iterdir()
    file.unlink()
    code, out, err = rerun(row.task_id)
    assert (code, out) == (2, "") and f"task {row.task_id} cannot be run here: " in err
    model = build_model("lenet5_mini", 10, (1, 32, 32))
    store.commit_dense(row.dense_id, packed(model.state_dict(), {}))
    code, out, err = rerun(row.task_id)
    assert (code, out) == (2, "") and "was pruned from other dense weights than the store has now" in err


def test_dense_weights_that_are_gone_are_said_to_be(store: Store, rerun: Rerun) -> None:
    """The message says why the task cannot be run."""
    shutil.rmtree(Path(store.root, "dense"))
    assert rerun(rows(store)[0].task_id)[2].endswith(" cannot be run here: its dense weights are gone.\n")


def test_damaged_dense_weights(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """They are never pruned: they are set aside, and that is told."""
    (file,) = Path(store.root, "dense").iterdir()
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    code, out, err = in_process(capsys, "rerun", rows(store)[0].task_id)
    assert (code, out) == (2, "") and "set aside" in err
    assert f"dense/{file.name}" in err and "its content does not match" in err
    assert not file.exists() and len(list(Path(store.root, "aside").iterdir())) == 1


def test_a_precision_that_this_device_lacks(store: Store, rerun: Rerun, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp16 on a CPU is told, not computed in fp32."""
    # Not Accelerate's own: a process that has held fp32 is refused another precision.
    monkeypatch.setattr("accelerate.Accelerator", lambda **_: SimpleNamespace(device=torch.device("cpu")))
    first = rows(store)[0]
    half = replace(first.task(), cell=replace(first.task().cell, precision="fp16"))
    measured = {"dense_sha256": first.dense_sha256, "execution": first.execution, "device": "cpu"}
    store.commit_rows("s0", [row_for(half, "done", measured)])
    code, out, err = rerun(half.task_id)
    assert (code, out) == (2, "") and "cannot be run here: fp16 needs a GPU" in err


def test_data_that_is_not_there(store: Store, rerun: Rerun) -> None:
    """A data root without the task's data set is a person's mistake, told with how to fetch it."""
    task, first = tasks(ORACLE, 1)[0], rows(store)[0]
    model = build_model("lenet5_mini", 10, (1, 32, 32))
    name = store.commit_dense(DENSE.dense_id, packed(model.state_dict(), {}))
    dense = store.dense(DENSE.dense_id)
    assert dense is not None and dense.name == name
    measured = {"dense_sha256": dense.sha256, "execution": first.execution, "device": "cpu"}
    store.commit_rows("s0", [row_for(task, "done", measured)])
    code, out, err = rerun(task.task_id, "--data-root", "nowhere")
    assert (code, out) == (2, "") and "prunesweep prefetch mnist --data-root" in err
