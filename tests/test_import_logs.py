"""`prunesweep import-logs`: text logs of the reference implementation become rows, cut off logs included."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator import cli
from orchestrator.plan import plan_of_spec
from orchestrator.spec import load_spec
from orchestrator.study import open_document
from pruners.candidates import Space
from storage.correlate import cell_data
from storage.errors import QueryError
from storage.records import Row
from storage.reference_logs import LoggedCandidate, LoggedEpoch, ReferenceLog, Values, read_log
from storage.schema import table_to_rows
from storage.store import Store
from tests.rows import ORACLE, plan, tasks, tree

CHECKPOINT = "./Experiments/dense-1/weights/ckpt_best.pth"
ALL = list(combinations(range(10), 2))
"""What conv1 of lenet5_mini can lose at ratio 0.2, as the reference counts it."""


# -- logs as the reference writes them ----------------------------------------------------------------


def percent(fraction: float, digits: int = 6) -> str:
    return f"{100 * fraction:.{digits}f}"


def lines_of(one: LoggedCandidate) -> list[str]:
    """The lines of a candidate, without their prefix."""
    at = f"[{one.number}/{one.total}]"
    found = ["", f"{at} pruned_index_pair {{{one.removed!r}}}"]
    if one.pruned_train_loss is not None:
        found += [f"{at} pruned_train_loss {one.pruned_train_loss:.6f}", "Pruned model: macs: 0.3 MMac, params: 5.1 k"]
    for e in one.epochs:
        train = f"TrainAcc1 99.0 TrainAcc5 100.0 TrainLoss {e.train_loss:.4f} " if e.train_loss is not None else ""
        shown = f"Acc1 {percent(e.test_accuracy, 4)} Acc5 99.9000 TestLoss {e.test_loss:.4f} {train}"
        found.append(f"\x1b[32mEpoch {e.number - 1} {shown}BestAcc1 98.0 BestAcc1Epoch 0 LR 0.001\x1b[0m")
    for name, values, end in (("final", one.best, ""), *_last5(one)):
        if values is not None:
            losses = f"{name}_train_loss {values.train_loss:.6f} {name}_test_loss {values.test_loss:.6f}"
            found.append(f"{at} {losses} {name}_test_acc {percent(values.test_accuracy)}{end}")
    return found


def _last5(one: LoggedCandidate) -> list[tuple[str, Values | None, str]]:
    return [("last5", one.last5_mean, " (mean)"), ("last5", one.last5_std, " (std)")]


def text_of(candidates: Sequence[LoggedCandidate], checkpoint: str | None = CHECKPOINT) -> str:
    """A whole log."""
    head = [f'Load pretrained_ckpt: "{checkpoint}"'] if checkpoint else []
    body = [line for one in candidates for line in lines_of(one)]
    stamped = [
        f"[224104 3241 2024/07/11-22:{i // 60 % 60:02}:{i % 60:02}] {line}" for i, line in enumerate(head + body)
    ]
    return "".join(f"{line}\n" for line in ["{'arch': 'lenet5_mini'}", *stamped])


def read(text: str) -> ReferenceLog:
    return read_log(text.splitlines(keepends=True), "a.txt")


def measured(number: int, seed: int = 0, *, epochs: int = 3, removed: Any = None) -> LoggedCandidate:
    """The `number`-th candidate of conv1 at 0.2, with values that tell it and its seed."""
    accuracies = [0.9 + (number * 7 + seed * 3 + e) % 50 / 1000 for e in range(epochs)]
    curve = [LoggedEpoch(e + 1, a, 0.25 + e / 8, 0.5) for e, a in enumerate(accuracies)]
    best = max(curve, key=lambda e: (e.test_accuracy, -e.number))
    return LoggedCandidate(
        where="",
        number=number,
        total=len(ALL),
        removed=removed or (ALL[number - 1],),
        pruned_train_loss=number * 37 % 45 / 10 + 0.125,
        best=Values(0.5, best.test_loss, best.test_accuracy),
        last5_mean=Values(0.25, 0.375, math.fsum(accuracies) / epochs),
        last5_std=Values(0.0, 0.125, 0.001),
        epochs=tuple(curve),
    )


# -- the text -----------------------------------------------------------------------------------------

_millionths = st.integers(0, 10**7).map(lambda n: n / 10**6)
_fractions = st.integers(0, 10**8).map(lambda n: n / 10**8)
_values = st.builds(Values, _millionths, _millionths, _fractions)
_units = st.sets(st.integers(0, 63), min_size=1, max_size=5).map(lambda units: tuple(sorted(units)))


@st.composite
def logged(draw: st.DrawFn, number: int, total: int, last5: bool) -> LoggedCandidate:
    """Any candidate with all its lines, and the epochs that its best is the best of."""
    accuracies = draw(st.lists(st.integers(0, 10**6), max_size=3))
    train = st.none() | st.integers(0, 10**5).map(lambda n: n / 10**4)
    curve = [
        LoggedEpoch(i + 1, a / 10**6, draw(st.integers(0, 10**5)) / 10**4, draw(train))
        for i, a in enumerate(accuracies)
    ]
    best = draw(_values)
    if curve:
        best = Values(best.train_loss, best.test_loss, max(e.test_accuracy for e in curve))
    mean, std = (draw(_values), draw(_values)) if last5 else (None, None)
    removed = tuple(draw(st.lists(_units, min_size=1, max_size=3)))
    return LoggedCandidate("", number, total, removed, draw(_millionths), best, mean, std, tuple(curve))


@st.composite
def logs(draw: st.DrawFn) -> list[LoggedCandidate]:
    total, last5 = draw(st.integers(1, 4)), draw(st.booleans())
    return [draw(logged(k, total, last5)) for k in range(1, total + 1)]


def plain(found: Sequence[LoggedCandidate]) -> list[LoggedCandidate]:
    """Without what no log is made from."""
    return [replace(one, where="", seconds_retrain=None) for one in found]


@given(logs())
@settings(max_examples=60)
def test_what_is_written_is_read(given: list[LoggedCandidate]) -> None:
    """Every value of a log comes back equal, a percentage as the float nearest to its fraction."""
    found = read(text_of(given))
    alone = len(given) == 1 and given[0].last5_mean is None  # nothing shows that no last5 lines were to come
    assert plain(found.incomplete if alone else found.complete) == given
    assert len(found.candidates) == len(given)
    assert (found.checkpoint, found.stray) == (CHECKPOINT, 0)


@given(logs(), st.data())
@settings(max_examples=30)
def test_any_two_cuts_of_a_log_agree(given: list[LoggedCandidate], data: st.DataObject) -> None:
    """A log cut off anywhere says nothing that the whole one does not, and never less than an earlier cut."""
    text = text_of(given)
    first, second = sorted(data.draw(st.tuples(st.integers(0, len(text)), st.integers(0, len(text)))))
    early, late = read(text[:first]).complete, read(text[:second]).complete
    assert set(early) <= set(late) <= set(read(text).complete)


def test_a_log_cut_off_at_every_byte() -> None:
    """No cut crashes, none invents a candidate or a value, and only the lines that stand are believed."""
    text = text_of([measured(1), measured(2)])
    whole = read(text).complete
    counts = []
    for end in range(len(text) + 1):
        found = read(text[:end])
        assert found.complete == whole[: len(found.complete)]
        counts.append(len(found.complete))
    assert counts == sorted(counts)
    assert (counts[0], counts[-2], counts[-1]) == (0, 1, 2)


def test_lines_of_others_are_left_alone() -> None:
    """Progress lines, the summary of the end and other numbers in brackets are no candidates'."""
    other = [
        "Epoch: [0][100/235] Loss 1.0",
        "==> Finished. Picked pruned_index_pair: {((0, 3),)}",
        "[3/4] other 1.0",
        "\x00",
    ]
    assert read("".join(f"{line}\n" for line in other)).candidates == ()


def test_the_epochs_of_a_mixed_up_log_are_left_out() -> None:
    """Where two processes wrote into one file, the numbered lines are told apart, the epochs are not."""
    one, two = (lines_of(measured(k)) for k in (1, 2))
    mixed = "".join(f"{line}\n" for pair in zip(one, two, strict=True) for line in pair)
    found = read(mixed).complete
    assert [c.best for c in found] == [measured(1).best, measured(2).best]
    assert [c.epochs for c in found] == [(), ()]


def test_the_rest_of_a_log_without_its_beginning() -> None:
    """Lines of a candidate whose units were named before are counted, not guessed."""
    text = text_of([measured(1), measured(2)])
    found = read(text[text.index("pruned_train_loss") - 60 :].partition("\n")[2])
    assert [c.number for c in found.complete] == [2]
    assert found.stray == 4


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[1/45] final_train_loss 0.1 final_test_loss 0.1 final_test_acc 101.0", "101.0 is no percentage"),
        ("[1/45] final_train_loss 0.1 final_test_loss 0.1 final_test_acc -1", "-1 is no percentage"),
        ("[1/45] final_train_loss 0.1 final_test_loss 0.1 final_test_acc x", "'x' is no percentage"),
        ("[1/45] final_train_loss 0.1 final_test_loss zero final_test_acc 98", "'zero' is no number"),
        ("[1/45] final_train_loss 0.1 final_test_acc 98", "is not of the form"),
        ("[1/45] pruned_train_loss", "is not of the form"),
        ("[46/45] pruned_train_loss 1.0", "counts from 1 to 45"),
        ("[1/45] pruned_index_pair {((3, 0),)}", "ascending"),
        ("[1/45] pruned_index_pair {((0, 3)}", "ascending"),
        ("[1/45] pruned_index_pair {__import__('os')}", "ascending"),
        ("[1/45] pruned_index_pair {((True,),)}", "ascending"),
        ("[1/45] last5_train_loss 0.1 last5_test_loss 0.1 last5_test_acc 98 (median)", "is not of the form"),
    ],
)
def test_a_line_of_another_form_is_refused_by_file_and_line(line: str, said: str) -> None:
    """The message says which line of which file."""
    with pytest.raises(QueryError) as caught:
        read(f"\n[1/45] pruned_index_pair {{((0, 3),)}}\n{line}\n")
    assert str(caught.value).startswith("a.txt:3: ")
    assert said in str(caught.value)


def test_a_line_twice_is_refused() -> None:
    """Two runs in one file under one number are not one candidate."""
    with pytest.raises(QueryError, match=r"a\.txt:3: candidate 1 of a\.txt:1 has this line twice"):
        read("[1/45] pruned_index_pair {((0, 3),)}\n" + "[1/45] pruned_train_loss 1.0\n" * 2)


# -- rows and sweeps ----------------------------------------------------------------------------------

LIKE = """\
name: mini
grid: {model: lenet5_mini, dataset: mnist, layers: [conv1, conv2], ratio: [0.2, 0.5], pruner: [oracle, l1], seed: 7}
dense: {epochs: 1, batch_size: 64, lr: 0.1}
retrain: {epochs: 3, batch_size: 64, lr: 0.1}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a spec and a folder of logs: three repeats of conv1 at 0.2, the last one cut off."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mini.yaml").write_text(LIKE)
    for repeat in (1, 2, 3):
        for batch, numbers in enumerate((range(1, 24), range(24, 46))):
            write(f"record/conv102_lr2_t{repeat}_batch{batch}.txt", [measured(k, repeat - 1) for k in numbers])
    cut = tmp_path / "record/conv102_lr2_t3_batch1.txt"
    cut.write_text(cut.read_text()[:-20])
    return tmp_path


def write(name: str, candidates: Sequence[LoggedCandidate], checkpoint: str | None = CHECKPOINT) -> None:
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text(text_of(candidates, checkpoint))


def run(*arguments: str) -> int:
    """The exit code of `prunesweep ARGUMENTS`."""
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    return int(str(ended.value.code or 0))


def imports(*arguments: str) -> int:
    return run("import-logs", "record", "--like", "mini.yaml", *arguments)


def rows() -> dict[tuple[int, int], Row]:
    """The rows of ./results by candidate and seed."""
    found = table_to_rows(Store("results").row_files()[0])
    return {(row.candidate, row.seed): row for row in found}


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message with which an import ends, having written nothing."""
    before = tree(Path.cwd())
    assert imports(*arguments) == 2
    out, err = capsys.readouterr()
    assert (out, tree(Path.cwd())) == ("", before)
    assert "Traceback" not in err
    return err


def test_logs_become_rows(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Candidates have prunesweep's numbers, repeats are seeds, percent are fractions, and what was cut off is said."""
    assert imports() == 0
    out, err = capsys.readouterr()
    assert out == "mini-logs\n"
    assert "134 rows in 1 cell imported" in err
    assert "1 candidate cut off" in err
    assert "record/conv102_lr2_t3_batch1.txt:" in err
    found = rows()
    assert set(found) == {(k, seed) for k in range(45) for seed in range(3)} - {(44, 2)}
    space = Space(((10, 2),))
    for (candidate, seed), row in found.items():
        logged = measured(candidate + 1, seed)
        assert row.removed is not None
        assert tuple(one.units for one in row.removed) == space.unrank(candidate) == logged.removed
        assert logged.best is not None
        assert logged.last5_mean is not None
        assert row.best_test_accuracy == pytest.approx(logged.best.test_accuracy, abs=1e-12)
        assert (row.pruned_train_loss, row.best_test_loss) == (logged.pruned_train_loss, logged.best.test_loss)
        assert row.last5_test_accuracy_mean == pytest.approx(logged.last5_mean.test_accuracy, abs=1e-8)
        assert (row.last5_test_loss_std, row.last5_test_accuracy_std) == (0.125, 0.001)
        accuracies = [e.test_accuracy for e in logged.epochs]
        assert row.epoch_test_accuracy == pytest.approx(accuracies, abs=1e-6)
        assert row.best_epoch == 1 + accuracies.index(max(accuracies))
        assert (row.last_test_loss, row.last_train_loss, row.achieved_ratio) == (0.5, 0.5, 0.2)
    (one,) = {
        (r.model, r.dataset, r.layers, r.pruning_ratio, r.propagation, r.pruner, r.diverged) for r in found.values()
    }
    assert one == ("lenet5_mini", "mnist", ("conv1",), 0.2, "released", "oracle", False)
    assert {(r.execution, r.device, r.dense_sha256, r.finished_at) for r in found.values()} == {(None,) * 4}
    assert {r.seconds_retrain for r in found.values()} == {5.0}
    assert found[0, 1].versions == '{"imported":"conv102_lr2_t2_batch0.txt:4"}'


def test_the_sweep_answers_at_once_and_cannot_be_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """corr, plot, status, query and compact take it as any sweep; resume and rerun say why they do not."""
    assert imports("--name", "theirs") == 0
    (cell,) = cell_data(Store("results"), "theirs", ("pruned_train_loss", "best_test_accuracy"))
    assert (cell.candidate, cell.planned, cell.seeds) == (list(range(44)), 45, 3)
    for command in (["corr", "theirs"], ["status", "theirs"], ["compact"], ["ls"], ["rm", "--unused", "--yes"]):
        assert run(*command) == 0
    assert len(rows()) == 134
    capsys.readouterr()
    assert run("resume", "theirs", "--inline") == 2
    assert "imported from logs: 1 task without a row cannot be run" in capsys.readouterr().err
    task = rows()[0, 0].task_id
    assert run("rerun", task) == 2
    assert "was imported from a log" in capsys.readouterr().err


def test_an_import_is_not_what_a_run_would_find_done(here: Path) -> None:
    """Their networks were pruned from another dense model: no task of ours is theirs."""
    assert imports() == 0
    assert run("plan", "mini.yaml", "--set", "grid.propagation=released", "--set", "grid.seed=0") == 0
    store = Store("results")
    document = open_document("mini.yaml")
    document.override("grid.propagation=released")
    document.override("grid.seed=[0, 1, 2]")
    assert plan_of_spec(store, load_spec(document), document).statuses["done"] == 0


def test_once_more_adds_only_what_is_new(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same logs change nothing; longer ones add the rest."""
    assert imports() == 0
    before = tree(here / "results")
    assert imports() == 0
    assert tree(here / "results") == before
    assert "0 rows in 1 cell imported, 134 rows there already" in capsys.readouterr().err
    write("record/conv102_lr2_t3_batch1.txt", [measured(k, 2) for k in range(24, 46)])
    assert imports() == 0
    assert len(rows()) == 135
    assert run("resume", "mini-logs", "--inline") == 0


def test_a_summary_counts_its_repeats(here: Path) -> None:
    """The reference's merged file names no repeats: they follow each other. Beside its logs it is left out."""
    three = [measured(k, repeat) for repeat in range(3) for k in range(1, 46)]
    summary = "".join(f"{line}\n" for one in three for line in lines_of(one) if line.startswith("["))
    Path("record/summary").mkdir()
    Path("record/summary/conv102_lr2_summary.txt").write_text(summary)
    assert imports() == 0
    assert len(rows()) == 134
    assert run("import-logs", "record/summary", "--like", "mini.yaml", "--store", "other") == 0
    again = {(r.candidate, r.seed): r for r in table_to_rows(Store("other").row_files()[0])}
    assert len(again) == 135
    assert again[3, 2].best_test_accuracy == rows()[3, 2].best_test_accuracy


def test_sampled_candidates_have_the_numbers_of_the_log(here: Path) -> None:
    """The reference draws its own samples: a candidate's number is its place among them, and `removed` tells it."""
    pairs = [((0, 1, 2, 3, 9), (1, 2, 3, 4, 5)), ((0, 1, 2, 3, 4), (5, 6, 7, 8, 9)), ((1, 3, 5, 7, 9), (0, 2, 4, 6, 8))]
    drawn = [measured(k + 1, removed=pair) for k, pair in enumerate(pairs)]
    write("drawn/conv10.520.5_lr2_t1_batch0.txt", drawn)
    sets = ["--set", "grid.layers=[[conv1, conv2], [conv1, conv3]]", "--set", "grid.ratio=0.5"]
    sets += ["--set", "candidates={mode: sample, count: 1000}"]
    assert run("import-logs", "drawn", "--like", "mini.yaml", *sets) == 0
    found = rows()
    assert {k: tuple(one.units for one in row.removed or ()) for (k, _), row in found.items()} == dict(enumerate(pairs))
    assert {row.layers for row in found.values()} == {("conv1", "conv2")}


def test_a_diverged_retraining_is_a_result(here: Path) -> None:
    """nan is null, and the row says that it diverged."""
    nan = measured(1)
    text = text_of([nan, measured(2)]).replace("last5_test_loss 0.375000", "last5_test_loss nan", 1)
    Path("one.txt").write_text(text)
    assert run("import-logs", "one.txt", "--like", "mini.yaml", "--layers", "conv1") == 0
    found = rows()
    assert (found[0, 0].diverged, found[1, 0].diverged) == (True, False)
    assert found[0, 0].last5_test_loss_mean is None
    assert found[0, 0].best_test_accuracy is not None


def test_what_the_logs_leave_open_is_asked_for(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each message names the file and the option that settles it, and nothing is written."""
    assert "no cell of these layers and this ratio" in refused(capsys, "--layers", "conv3")
    assert "removes 2 units; there are lenet5_mini mnist conv1 0.5" in refused(capsys, "--ratio", "0.5")
    assert "retrained for 3 epochs, those of the spec for 30" in refused(capsys, "--set", "retrain.epochs=30")
    assert "is named as a log of conv1" in refused(capsys, "--set", "grid.layers=conv2")
    assert "no cell of oracle pruning" in refused(capsys, "--set", "grid.pruner=l1")
    write("record/conv102_lr2_t4_batch0.txt", [measured(1, 3)], checkpoint="other.pth")
    said = refused(capsys)
    assert "start from different dense weights" in said
    assert "other.pth (record/conv102_lr2_t4_batch0.txt)" in said
    assert imports("--dense", "the same") == 0
    capsys.readouterr()
    write("record/conv102_lr2_again_t1_batch0.txt", [measured(1, 5)])
    Path("record/conv102_lr2_t4_batch0.txt").unlink()
    assert "are the same candidate and seed 0, with other values" in refused(capsys)
    for file in Path("record").iterdir():
        file.unlink()
    assert "no log (.txt, .log) in record" in refused(capsys)
    write("record/a.txt", [])
    assert "no candidate" in refused(capsys)
    write("record/a.txt", [measured(k) for k in (1, 2)])
    assert "may be of several cells: lenet5_mini mnist conv1 0.2" in refused(capsys)


def test_a_sweep_that_was_run_is_not_replaced(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An import takes no name of a sweep of one's own."""
    plan(Store("results"), "mine", tasks(ORACLE, 2))
    assert "mine is a sweep of results that was not imported" in refused(capsys, "--name", "mine")
    assert imports("--name", "theirs") == imports("--name", "theirs") == 0


def test_fractions_in_place_of_percent_are_noticed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A whole import without an accuracy above one percent is not believed."""
    for file in Path("record").iterdir():
        lines = [line for line in file.read_text().splitlines(keepends=True) if "Epoch" not in line]
        file.write_text(re.sub(r"test_acc \d+", "test_acc 0", "".join(lines)))
    assert "look like fractions" in refused(capsys)


def test_the_page_does_what_it_says(tmp_path: Path) -> None:
    """docs/import-logs.md is executed, and prints what it shows."""
    page = (Path(__file__).parent.parent / "docs" / "import-logs.md").read_text()
    script, said = re.findall(r"^```(?:bash)?\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {k: v for k, v in os.environ.items() if k != "PRUNESWEEP_STORE"} | {"PATH": path}
    found = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert found.returncode == 0, found.stderr
    assert said in found.stderr
    assert found.stdout.partition("\n")[2] in page
