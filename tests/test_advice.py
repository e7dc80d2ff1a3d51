"""After a failure in the user's own code the printed command works: followed to the letter, everything ends done."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.advice import OPTIONS, SPEC, given
from orchestrator.cli_cluster import _given_again
from orchestrator.drivers import OF_RAY
from storage.store import Store
from tests.sweeps import committed
from tests.test_interrupt import in_process

NETWORK = """
from torch import nn

class Net(nn.Module):
    def __init__(self, classes, channels):
        super().__init__()
        self.first, self.rest = nn.Conv2d(channels, 6, 5, stride=4), nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.last = nn.Linear(6, classes)

    def forward(self, x):
        FAULT
        return self.last(self.rest(self.first(x)).flatten(1))

def build(classes, shape):
    return Net(classes, shape[0])
"""
FAULTS = {
    "dense": "if self.training and len(x) > 2: raise RuntimeError('my fault')",
    "task": "if self.first.out_channels < 6 and len(x) > 2: raise RuntimeError('my fault')",
    "preflight": "raise RuntimeError('my fault')",
}
CRITERION = """
def importance(model, layer, images, labels):
    FAULT
    return model.get_submodule(layer).weight.flatten(1).abs().sum(1)
"""
SPEC_TEXT = """
name: own
grid: {{model: [{models}], dataset: synthetic, layers: [{layers}], ratio: 0.5, pruner: [{pruners}], seed: [0, 1]}}
dense:   {{epochs: 1, batch_size: 256, lr: 0.05}}
retrain: {{epochs: 1, batch_size: 256, lr: 0.05}}
resources: {{workers: 1}}
"""
OPTIONS_GIVEN = ("--inline", "--data-root", "my data")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of this file's tests: the compiled back-end is built once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


class Work:
    """A working directory with a spec of two networks or criteria, one of them in the module `mine`."""

    def __init__(self, folder: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "path", [*sys.path])
        self.module, self.what = f"mine_{what}", what
        is_criterion = what == "criterion"
        self.text = CRITERION if is_criterion else NETWORK
        names = {"models": "lenet5_mini", "layers": "conv1", "pruners": f"l1, '{self.module}:importance'"}
        if not is_criterion:  # one pattern for the layers of both
            names = {
                "models": f"lenet5_mini, '{self.module}:build'",
                "layers": "'[cf][oi][nr][vs][1t]'",
                "pruners": "l1",
            }
        Path("own.yaml").write_text(SPEC_TEXT.format(**names))

    def write(self, fault: str) -> None:
        Path(f"{self.module}.py").write_text(self.text.replace("FAULT", fault or "pass"))
        sys.modules.pop(self.module, None)


def advice(err: str) -> list[str]:
    """The command that a message says to give."""
    (line,) = [line for line in err.splitlines() if line.startswith("go on  ")]
    words = shlex.split(line.removeprefix("go on  "))
    assert words[0] == "prunesweep"
    return words[1:]


def assert_all_done(store: Store, before: set[tuple[str, str]], capsys: Any) -> None:
    """Four tasks, all done; what was done before was not run again; no failed row is counted."""
    assert before and len(before) == len({task for task, _ in before}) == 2
    after = committed(store)
    assert before <= after
    lines = store.sql("select status, count(*) from tasks where sweep = 'own' group by all").fetchall()
    assert lines == [("done", 4)]
    table = store.row_files(["task_id", "status"])[0].to_pylist()
    done = [one["task_id"] for one in table if one["status"] == "done"]
    assert len(done) == len(set(done)) == 4
    code, out, err = in_process(capsys, "status", "own", "-f", "json")
    assert code == 0 and sum(line["failed"] + line["pending"] for line in json.loads(out)) == 0
    code, _, err = in_process(capsys, "resume", "own", "--inline")
    assert code == 0 and "all 4 tasks are done" in err


@pytest.mark.parametrize("what", ["dense", "task", "criterion"])
def test_run_advises_what_works(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A network or criterion of the user fails, in a dense model or a task: the command runs the edited code, and what
    is done stays. Without an edit it tries again. `resume` on edited code advises the same."""
    work = Work(tmp_path, what, monkeypatch)
    work.write(FAULTS.get(what, "if len(images) > 2: raise RuntimeError('my fault')"))
    code, _, err = in_process(capsys, "run", "own.yaml", "--set", "retrain.lr=0.04", *OPTIONS_GIVEN)
    assert code == 3 and "An edit of it makes new tasks" in err
    words = advice(err)
    assert words[:2] == ["run", "own.yaml"] and "retrain.lr=0.04" in words and {"--inline", "my data"} <= set(words)
    store = Store("results")
    before = committed(store)
    assert in_process(capsys, *words)[0] == 3  # as it was
    work.write("")
    code, _, err = in_process(capsys, "resume", "own", "--inline")
    assert code == 3
    resumed = advice(err)
    assert resumed[0] == "run" and Path(resumed[1]).is_file() and "--inline" in resumed
    code, _, err = in_process(capsys, *(resumed if what == "task" else words))
    assert code == 0, err
    assert f"{work.module}:" in err and "2 tasks (0 done) planned anew" in err
    assert_all_done(store, before, capsys)


def test_a_preflight_that_fails_leaves_the_sweep_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is planned; the same command after the edit runs everything."""
    work = Work(tmp_path, "preflight", monkeypatch)
    work.write(FAULTS["preflight"])
    code, _, err = in_process(capsys, "run", "own.yaml", "--inline")
    assert code == 2 and "my fault" in err and not Store("results").exists()
    work.write("")
    assert in_process(capsys, "run", "own.yaml", "--inline")[0] == 0
    rows = committed(Store("results"))
    work.write(FAULTS["preflight"])
    code, _, err = in_process(capsys, "run", "own.yaml", "--inline")
    assert code == 2 and committed(Store("results")) == rows
    task = (
        Store("results").sql(f"select task_id from rows where model = '{work.module}:build' limit 1").fetchall()[0][0]
    )
    code, _, err = in_process(capsys, "rerun", task)
    assert code == 2 and "prunesweep run results/sweeps/own/" in err and "Traceback" not in err


def test_a_job_advises_what_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A submitted job knows from its metadata how it was submitted; values of --env are not shown."""
    options = {"working_dir": Path("my code"), "image_has_prunesweep": False, "env": ("KEY=hush", "OTHER")}
    again = _given_again(
        "http://head:8265", "/shared", "/data", ("own.yaml", "--set", "a=[1, 2]"), ("--priority", "2"), options
    )
    assert "hush" not in str(again)

    def told(metadata: dict[str, str], **more: Any) -> None:
        about = {"metadata": {"job_submission_id": "own-1", **metadata}, **more}
        monkeypatch.setenv(OF_RAY, json.dumps(about))

    store: Any = SimpleNamespace(location="/shared", absolute="/shared")
    manifest: Any = SimpleNamespace(sweep="own", stem="1-a")
    told(dict(again))
    found = given((), ("--store", "/shared"), ("--address", "10.0.0.1:6379"))
    rest = "--address http://head:8265 --store /shared --data-root /data --priority 2 --working-dir 'my code' --env KEY"
    assert found.run(store, manifest) == f"prunesweep submit own.yaml --set 'a=[1, 2]' {rest} --env OTHER"
    assert found.resume("own") == f"prunesweep resume own {rest} --env OTHER"
    told({SPEC: "", OPTIONS: "--address http://head:8265"})
    assert given((), (), ()).run(store, manifest).startswith("prunesweep submit /shared/sweeps/own/1-a.yaml --address")
    told({}, runtime_env={"working_dir": "gcs://x"})  # of a manifest
    found = given((), ("--store", "/shared"), ("--address", "auto"))
    assert found.resume("own") == "prunesweep resume own --store /shared --address http://HOST:8265 --working-dir ."
