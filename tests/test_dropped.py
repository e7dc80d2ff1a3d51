"""A changed grid drops no planned task by accident; tasks that only edited code renames are not dropped."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.cli import command_line
from orchestrator.documents import Document
from orchestrator.dropped import Change, change_of, check_nothing_dropped
from orchestrator.errors import UserError
from orchestrator.plan import PLAN_COLUMNS
from orchestrator.run import Options, run_spec
from orchestrator.spec import load_spec
from storage.errors import SkippedFile
from storage.manifest import PlannedTask, plan_content, read_plan
from storage.records import Shard, Task, Tasks, row_for
from storage.store import Store
from tests import specs
from tests.test_interrupt import in_process

WIDE = {"ratio": [0.2, 0.4], "pruner": ["oracle", "l1"], "seed": [0, 1]}
FEW: dict[str, Any] = {"candidates": {"mode": "sample", "count": 3}}
"""2 ratios, each 3 candidates of the oracle and one of l1, with 2 seeds: 16 tasks."""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "results")


def record(store: Store, document: Document) -> list[Task]:
    """Record a document as its sweep's newest expansion; return its tasks."""
    tasks = specs.tasks(document)
    store.write_manifest(load_spec(document).name, document.text(), [PlannedTask("s", task) for task in tasks])
    return tasks


def change(store: Store, document: Document) -> Change | None:
    """What a document changes of its sweep."""
    return change_of(store, load_spec(document), specs.plan_of(document))


axes = st.fixed_dictionaries(
    {
        "ratio": st.lists(st.sampled_from([0.2, 0.4, 0.6]), min_size=1, max_size=2, unique=True),
        "pruner": st.lists(st.sampled_from(["oracle", "l1"]), min_size=1, max_size=2, unique=True),
        "seed": st.lists(st.integers(0, 2), min_size=1, max_size=2, unique=True),
    }
)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(axes, axes, st.integers(1, 3), st.integers(1, 3), st.randoms(use_true_random=False))
def test_dropped_is_what_the_new_grid_lacks(
    tmp_path: Path, before: Any, after: Any, old: int, new: int, draw: Any
) -> None:
    """The tasks dropped, by cell, with those done: as sets of ids say. A grid that only grows drops none."""
    store = Store(tmp_path / uuid.uuid4().hex)
    tasks = record(store, specs.document(before, candidates={"mode": "sample", "count": old}))
    done = [task for task in tasks if draw.random() < 0.5]
    store.commit_rows("s", [row_for(task, "done", {}) for task in done])
    document = specs.document(after, candidates={"mode": "sample", "count": new})
    gone = [task for task in tasks if task.task_id not in set(specs.ids(document))]
    found = change(store, document)
    assert (found is None) == (not gone)
    if found is not None:
        assert sum(one.tasks for one in found.dropped) == len(gone)
        assert sum(one.done for one in found.dropped) == len(set(gone) & set(done))
        assert len(found.dropped) == len({task.cell.cell_id for task in gone})
        assert found.planned == len(tasks) and not found.renewed


def edited(task: Task, content: str) -> Task:
    """A task as it is planned after an edit of the user's network."""
    dense = replace(task.cell.dense, content=(("model", content),))
    return Task(replace(task.cell, dense=dense), task.candidate, task.seed)


@pytest.mark.parametrize("where", ["model", "dataset", "weights", "pruner"])
def test_a_task_with_other_content_is_not_dropped(store: Store, where: str) -> None:
    """Edited code, data and weights of the user rename tasks; what the grid drops besides is dropped all the same."""
    document = specs.document(WIDE, **FEW)

    def with_content(task: Task, content: str) -> Task:
        held = ((where, content),)
        if where == "pruner":
            return Task(replace(task.cell, content=held), task.candidate, task.seed)
        return Task(replace(task.cell, dense=replace(task.cell.dense, content=held)), task.candidate, task.seed)

    tasks = specs.tasks(document)
    before = [PlannedTask("s", with_content(task, "1" * 16)) for task in tasks]
    store.write_manifest("made", document.text(), before)
    store.commit_rows("s", [row_for(one.task, "done", {}) for one in before[:3]])
    after = [PlannedTask("s", with_content(task, "2" * 16)) for task in tasks]
    found = change_of(store, load_spec(document), read_plan(plan_content(after), PLAN_COLUMNS))
    assert found is not None and not found.dropped
    assert sum(one.tasks for one in found.renewed) == 16 and sum(one.done for one in found.renewed) == 3
    assert "16 tasks (3 done) planned anew" in str(found.note())
    check_nothing_dropped(found)

    narrow = specs.document(WIDE | {"ratio": [0.2]}, **FEW)
    after = [PlannedTask("s", with_content(task, "2" * 16)) for task in specs.tasks(narrow)]
    found = change_of(store, load_spec(narrow), read_plan(plan_content(after), PLAN_COLUMNS))
    assert found is not None
    assert (sum(one.tasks for one in found.dropped), sum(one.tasks for one in found.renewed)) == (8, 8)


def test_content_decides_layers_and_candidates_only_where_the_spec_does_not(store: Store) -> None:
    """An edited network may have other layers under the same pattern, and other candidates: with the same spec
    nothing is dropped. With a smaller sample it is."""
    document = specs.document({"layers": ["conv*"], "seed": [0, 1]}, **FEW)
    tasks = [edited(task, "1" * 16) for task in specs.tasks(document)]
    store.write_manifest("made", document.text(), [PlannedTask("s", task) for task in tasks])
    renamed = replace(edited(tasks[0], "2" * 16).cell, layers=(("first", 0.2), ("second", 0.2)))
    after = read_plan(plan_content([PlannedTask("s", Task(renamed, 0, seed)) for seed in (0, 1)]), PLAN_COLUMNS)
    found = change_of(store, load_spec(document), after)
    assert found is not None and not found.dropped and sum(one.tasks for one in found.renewed) == 6
    smaller = specs.document({"layers": ["conv*"], "seed": [0, 1]}, candidates={"mode": "sample", "count": 1})
    found = change_of(store, load_spec(smaller), after)
    assert found is not None and sum(one.tasks for one in found.dropped) == 4
    other = specs.document({"layers": ["conv1"], "seed": [0, 1]}, **FEW)
    found = change_of(store, load_spec(other), after)
    assert found is not None and sum(one.tasks for one in found.dropped) == 6


def test_logs_that_were_imported_are_not_code_that_was_edited(store: Store) -> None:
    """A sweep of logs is not replaced by a run of its spec under the same name."""
    document = specs.document(WIDE, **FEW)
    logs = [replace(task.cell, dense=replace(task.cell.dense, content=(("imported", "1" * 16),)))
            for task in specs.tasks(document)]  # fmt: skip
    store.write_manifest("made", document.text(), [PlannedTask("s", Task(cell, 0, 0)) for cell in dict.fromkeys(logs)])
    found = change(store, document)
    assert found is not None and found.dropped and not found.renewed


def test_the_newest_expansion_counts(store: Store) -> None:
    """What an older expansion has and the newest lacks was dropped before."""
    record(store, specs.document(WIDE, **FEW))
    record(store, specs.document(WIDE | {"ratio": [0.2]}, **FEW))
    assert change(store, specs.document(WIDE | {"ratio": [0.2, 0.6]}, **FEW)) is None
    assert change(store, specs.document(WIDE | {"ratio": 0.4}, **FEW)) is not None


def test_a_damaged_expansion_cannot_be_compared(store: Store) -> None:
    """The new one takes its place; that it may drop tasks is a warning."""
    record(store, specs.document({"ratio": [0.2, 0.4]}, **FEW))
    (Path(store.root) / store.newest("made").files[0]).write_text("")
    with pytest.warns(SkippedFile, match="Whether the grid drops tasks that it planned is unknown"):
        assert change(store, specs.document({"ratio": 0.2}, **FEW)) is None


def test_many_tasks_are_compared_in_a_moment(store: Store) -> None:
    """Nothing dropped: the ids alone are compared. One seed of two dropped: half the tasks, in one cell."""
    cell, document, n = specs.tasks(specs.document())[0].cell, specs.document(), 50_000

    def table(candidates: int, seeds: range) -> bytes:
        pairs = ((candidate, seed) for candidate in range(candidates) for seed in seeds)
        return plan_content([Shard("s", Tasks.from_pairs(cell, pairs))])

    whole = table(n, range(2))
    store.commit_manifest("made", document.text(), whole)
    half = read_plan(table(n, range(1)), PLAN_COLUMNS)
    began = time.monotonic()
    assert change_of(store, load_spec(document), read_plan(whole, PLAN_COLUMNS)) is None
    found = change_of(store, load_spec(document), half)
    assert time.monotonic() - began < 3
    assert found is not None and [one.tasks for one in found.dropped] == [n]


# -- commands -----------------------------------------------------------------------------------------

NARROWER = ("--set", "grid.ratio=[0.2]", "--set", "grid.seed=[0]")


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A working directory with made.json, and its sweep of 16 tasks, 5 done; nothing is run here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("orchestrator.run.drive", lambda *_: [])
    document = specs.document(WIDE, **FEW)
    Path("made.json").write_text(json.dumps(document.plain()))
    store = Store("results")
    store.commit_rows("s", [row_for(task, "done", {}) for task in record(store, document)[:5]])
    return store


def test_run_refuses_to_drop_planned_tasks(made: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit 2 with cells and numbers and --replace; nothing was written. With --replace it is the sweep; rows stay."""
    before = made.newest("made")
    code, out, err = in_process(capsys, "run", "made.json", "--inline", *NARROWER)
    assert (code, out) == (2, "") and made.newest("made") == before
    assert "made: this spec drops 12 of its 16 planned tasks, 2 done:" in err
    assert "  lenet5_mini synthetic conv1 0.2 oracle: 3 tasks, 2 done\n" in err
    assert "  lenet5_mini synthetic conv1 0.4 l1: 2 tasks, 0 done\n" in err
    assert "--replace" in err and "Traceback" not in err
    assert in_process(capsys, "run", "made.json", "--inline", "--replace", *NARROWER)[0] == 3
    assert len(made.plan_table(made.newest("made"))) == 4 and len(made.statuses()) == 5
    assert in_process(capsys, "run", "made.json", "--inline")[0] == 3  # wider: no flag
    assert len(made.plan_table(made.newest("made"))) == 16


def test_plan_shows_the_same_and_goes_on(made: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """A person plans first: exit 0, the table on stdout, the warning on stderr."""
    code, out, err = in_process(capsys, "plan", "made.json", *NARROWER, "-f", "csv")
    assert code == 0 and out.startswith("cell,")
    assert "warning: made: this spec drops 12 of its 16 planned tasks, 2 done:" in err and "--replace" in err
    code, _, err = in_process(capsys, "plan", "made.json", "--set", "grid.seed=[0,1,2]")
    assert code == 0 and "drops" not in err


def test_python_raises(made: Store) -> None:
    """`run_spec` raises UserError unless it is told to replace."""
    document = specs.document(WIDE | {"ratio": 0.2}, **FEW)
    with pytest.raises(UserError, match=r"drops 8 of its 16 planned tasks"):
        run_spec(made, document, Options(inline=True))
    assert run_spec(made, document, Options(inline=True), replace=True).done == 5


def test_submit_refuses_before_anything_is_sent(made: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that is seen from here is looked at here; --replace is passed on to the job, and into manifests."""
    sent: list[tuple[str, ...]] = []
    monkeypatch.setattr("orchestrator.cli_cluster.send", lambda *given, **_: sent.append(given[5]))
    server = ("--address", "http://127.0.0.1:1")
    with pytest.raises(UserError, match=r"drops 12 of its 16 planned tasks"):
        CliRunner().invoke(command_line, ["submit", "made.json", *server, *NARROWER], catch_exceptions=False)
    assert not sent
    CliRunner().invoke(command_line, ["submit", "made.json", *server, *NARROWER, "--replace"], catch_exceptions=False)
    assert len(sent) == 1 and sent[0][:2] == ("run", "-") and "--replace" in sent[0]
    for kind in (["slurm"], ["rayjob", "--image", "i", "--store", "s3://b/p"]):
        done = CliRunner().invoke(command_line, ["submit", "made.json", "--replace", "--render", *kind])
        assert done.exit_code == 0 and " --replace" in done.output
