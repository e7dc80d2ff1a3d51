"""What the driver costs: tasks that do nothing end to end, expansion, planning, memory.

All is real but what a task computes (tests/faults/quick.py): queue, Tune, workers, durable rows, account.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from tests.benchmarks.harness import PAIRS, Figure, pairs, ratios, seconds

if TYPE_CHECKING:
    from orchestrator.documents import Document
    from storage.store import Store

ROOT = Path(__file__).parents[2]
SEEDS, RATIOS = 2, (0.3, 0.4, 0.5, 0.6, 0.7)


def spec(tasks: int) -> str:
    """A sweep of `tasks` tasks, ten or a multiple of it: five cells, two seeds; shards of the default size."""
    return f"""\
name: made
grid:
  model: lenet5
  dataset: synthetic
  layers: conv3
  ratio: {list(RATIOS)}
  seed: {list(range(SEEDS))}
candidates: {{mode: sample, count: {tasks // (SEEDS * len(RATIOS))}}}
dense:   {{epochs: 1, batch_size: 32, lr: 0.05}}
retrain: {{epochs: 1, batch_size: 64, lr: 0.01}}
"""


def document_of(tasks: int) -> Document:
    from orchestrator.documents import Document

    return Document("made.yaml", spec(tasks))


def ids_singly(document: Document) -> list[str]:
    """Every task's id, each computed for itself."""
    from orchestrator import expand
    from orchestrator.spec import load_spec

    return [task.task_id for task in expand.tasks(load_spec(document), document)]


# -- end to end ---------------------------------------------------------------------------------------


def orchestration(tasks: int = 10_000, trials: int = 150, n: int = PAIRS) -> Iterator[Figure]:
    """Tasks that do nothing, and beside them one Tune trial per task, in one Ray."""
    with ray_up():
        measured = pairs(lambda: run(tasks).seconds / tasks, lambda: one_trial_per_task(trials), n)
    ours = tuple(1000 * a for a, _ in measured)
    yield Figure("orchestration", f"{tasks:,} tasks that do nothing, per task", "ms", ours, 2, 1)
    notes = {"ms per trial": [1000 * b for _, b in measured], "trials": trials}
    what = "the same vs one Tune trial per task"
    yield Figure("orchestration_vs_tune", what, "x", ratios(measured), 20, 50, more=True, notes=notes)


@contextmanager
def ray_up() -> Iterator[None]:
    """An embedded Ray whose workers compute nothing, up for as long as this lasts; every run is in it."""
    import ray.cloudpickle

    import orchestrator.cluster
    import orchestrator.run
    from orchestrator.run import Options
    from tests.faults import quick

    ray.cloudpickle.register_pickle_by_value(quick)
    try:
        with (
            patch.dict(os.environ, {"QUICK_SECONDS": "0", "QUICK_POISON": "{}"}),
            patch.object(orchestrator.cluster, "SETUP_HOOK", quick.plant),
            orchestrator.cluster.connected(Options()),
            patch.object(orchestrator.run, "connected", lambda *_: nullcontext()),
        ):
            yield
    finally:
        ray.cloudpickle.unregister_pickle_by_value(quick)


@dataclass(frozen=True)
class Ran:
    """A run: its seconds, and the process's peak in bytes while tasks ran and at the run's end."""

    seconds: float
    running: int
    whole: int


def run(tasks: int) -> Ran:
    """`prunesweep run`, from the spec to the outcome, in a store that has the dense models only.

    Then every row is there, once.
    """
    import orchestrator.run
    from orchestrator.plan import plan_of_spec
    from orchestrator.run import Options, Outcome, run_spec
    from orchestrator.spec import load_spec
    from storage.store import Store

    document, outcomes, running = document_of(tasks), list[Outcome](), list[int]()
    finish = orchestrator.run.finish

    def noted(store: Store) -> None:
        running.append(peak_bytes())
        finish(store)

    with (
        tempfile.TemporaryDirectory(prefix="prunesweep-bench-") as folder,
        patch.object(orchestrator.run, "finish", noted),
    ):
        store = Store(folder)
        for dense in plan_of_spec(store, load_spec(document), document).denses:
            store.commit_dense(dense.dense_id, b"quick")
        took = seconds(lambda: outcomes.append(run_spec(store, document, Options())))
        ran = Ran(took, running[0], peak_bytes())
        assert outcomes == [Outcome("made", done=tasks, failed=0, pending=0)]
        table, problems = store.row_files()
        assert sorted(table["task_id"].to_pylist()) == sorted(ids_singly(document)) and problems == []
    return ran


def peak_bytes() -> int:
    """This process's peak resident memory. (ru_maxrss begins at what the parent process had.)"""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def one_trial_per_task(trials: int) -> float:
    """Seconds per Tune trial that does nothing, in reused actors; from the end of the first trial, so that
    starting actors is not counted."""
    from ray import tune

    class Task(tune.Trainable):
        def setup(self, config: dict[str, Any]) -> None: ...

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            return True

        def step(self) -> dict[str, Any]:
            return {"best_test_accuracy": self.config["candidate"] / trials, "done": True}

        def save_checkpoint(self, checkpoint_dir: str) -> None: ...

    ends: list[float] = []

    class Ends(tune.Callback):
        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory(prefix="prunesweep-bench-") as folder, redirect_stdout(sys.stderr):
        grid = {"candidate": tune.grid_search(list(range(trials)))}
        found = tune.Tuner(
            Task,
            param_space=grid,
            tune_config=tune.TuneConfig(reuse_actors=True),
            run_config=tune.RunConfig(storage_path=folder, verbose=0, callbacks=[Ends()]),
        ).fit()
        assert len({result.metrics["best_test_accuracy"] for result in found if result.metrics}) == trials
    return (ends[-1] - ends[0]) / (trials - 1)


# -- in processes of their own ------------------------------------------------------------------------


def in_process(function: str, *arguments: int) -> dict[str, Any]:
    """What a function of this module gives in a process of its own."""
    code = f"import json; from tests.benchmarks import orchestration as o; print(json.dumps(o.{function}{arguments}))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment, check=True)
    return json.loads(found.stdout.splitlines()[-1])


def driver_memory(few: int = 10_000, many: int = 100_000, n: int = 3) -> Iterator[Figure]:
    """How much the driver's peak grows with the number of tasks, by real runs; few, since the larger takes a minute."""
    samples, whole = [], []
    for _ in range(n):
        small, large = in_process("run_alone", few), in_process("run_alone", many)
        samples.append((large["running"] - small["running"]) / (many - few))
        whole.append((large["whole"] - small["whole"]) / (many - few))
    what = f"driver's peak memory, {few:,} to {many:,} tasks, per task"
    yield Figure("driver_memory", what, "B", tuple(samples), 1000, 200)
    yield Figure("driver_memory_whole", "the same, with compaction and the outcome", "B", tuple(whole))


def run_alone(tasks: int) -> dict[str, Any]:
    """A run in a Ray of its own."""
    with ray_up():
        return asdict(run(tasks))


def expansion(tasks: int = 1_000_000, n: int = PAIRS) -> Iterator[Figure]:
    """A spec to all that its manifest has, every task's id with it."""
    measured = [in_process("expanded", tasks) for _ in range(n)]
    what = f"expand and identify {tasks:,} tasks"
    yield Figure("expansion", what, "s", tuple(one["seconds"] for one in measured), 20, 5)
    peaks = tuple(one["bytes"] / 1e6 for one in measured)
    yield Figure("expansion_memory", f"{what}: the process's peak", "MB", peaks, 500, 300)


def expanded(tasks: int) -> dict[str, Any]:
    """Seconds and peak of expanding so many tasks; then their ids are those of the single tasks."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from orchestrator.plan import check, planned
    from storage.manifest import plan_content

    document, contents = document_of(tasks), list[bytes]()
    took = seconds(lambda: contents.append(plan_content(planned(check(document), document))))
    found = {"seconds": took, "bytes": peak_bytes()}
    table = pq.ParquetFile(pa.BufferReader(contents[0])).read(["task_id"])
    assert table["task_id"].to_pylist() == ids_singly(document) and len(table) == tasks
    return found


# -- planning -----------------------------------------------------------------------------------------


def resume_plan(small: int = 40_000, large: int = 1_000_000, n: int = PAIRS) -> Iterator[Figure]:
    """The plan of a resume, most tasks done: in this process, from the manifest and the rows."""
    yield planning("resume_plan", small, small * 37 // 40, n, 1.5, 0.5)
    yield planning("resume_plan_large", large, large * 97 // 100, min(n, 3), 20, 10)


def planning(name: str, tasks: int, done: int, n: int, least: float | None = None, aim: float | None = None) -> Figure:
    """Seconds of planning a resume; the plan is what a set difference gives."""
    from orchestrator.plan import check, plan_of_sweep, planned
    from storage.store import Store

    document = document_of(tasks)
    with tempfile.TemporaryDirectory(prefix="prunesweep-bench-") as folder:
        store = Store(folder)
        manifest = store.write_manifest("made", document.text(), planned(check(document), document))
        ids = store.plan_table(manifest, ["task_id"])["task_id"].to_pylist()
        finished = set(random.Random(0).sample(range(tasks), done))
        put_rows(store, store.plan_table(manifest), sorted(finished))
        plan = plan_of_sweep(store, manifest)
        left = [task_id for i, task_id in enumerate(ids) if i not in finished]
        assert [task.task_id for shard in plan.shards for task in shard.tasks] == left
        assert plan.statuses == {"done": done, "failed": 0, "pending": tasks - done}
        del plan, ids
        samples = tuple(seconds(lambda: plan_of_sweep(Store(folder), manifest)) for _ in range(n))
    return Figure(name, f"plan a resume, {done:,} of {tasks:,} tasks done", "s", samples, least, aim)


def put_rows(store: Store, planned: Any, places: list[int], at_once: int = 50_000) -> None:
    """Done rows with curves of 30 epochs, in files as a compaction makes them."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from storage.manifest import planned_tasks
    from storage.records import row_for
    from storage.rowfiles import ORIGIN
    from storage.schema import rows_to_table

    (first,) = planned_tasks(planned.slice(0, 1))
    like = rows_to_table([row_for(first.task, "done", {"seconds_prune": 0.1, "seconds_retrain": 1.0})])
    chance = np.random.default_rng(0)
    for start in range(0, len(places), at_once):
        some = planned.take(pa.array(places[start : start + at_once]))
        rows = like.take(pa.array([0] * len(some)))
        for name in (name for name in some.column_names if name in rows.column_names):
            rows = rows.set_column(rows.column_names.index(name), name, some[name])
        for name in ("epoch_train_loss", "epoch_test_loss", "epoch_test_accuracy"):
            values = pa.array(chance.random(30 * len(some), np.float32))
            curve = pa.ListArray.from_arrays(pa.array(range(0, len(values) + 1, 30), pa.int32()), values)
            rows = rows.set_column(rows.column_names.index(name), name, curve)
        origin = pa.array([f"rows/made-{start}.parquet"] * len(some), pa.string())
        content = pa.BufferOutputStream()
        pq.write_table(rows.append_column(ORIGIN, origin), content, compression="zstd", write_page_checksum=True)
        store.commit(f"rows/compact-{uuid.uuid4().hex}.parquet", content.getvalue().to_pybytes())


# -- where the driver bends ---------------------------------------------------------------------------


def orchestration_curve(
    runs: tuple[int, ...] = (1_000, 10_000, 100_000), grids: tuple[int, ...] = (1_000, 10_000, 100_000, 1_000_000)
) -> Iterator[Figure]:
    """Per task, at several sizes: a run end to end, expansion, the plan of a resume."""
    with ray_up():
        run(runs[0])
        for tasks in runs:
            n = 3 if tasks <= 10_000 else 1
            took = tuple(1000 * run(tasks).seconds / tasks for _ in range(n))
            yield Figure(f"run_{tasks}", f"a run of {tasks:,} tasks that do nothing, per task", "ms", took)
    for tasks in grids:
        took = tuple(1e6 * in_process("expanded", tasks)["seconds"] / tasks for _ in range(3))
        yield Figure(f"expand_{tasks}", f"expanding {tasks:,} tasks, per task", "us", took)
    for tasks in grids:
        took = planning(f"plan_{tasks}", tasks, tasks * 9 // 10, 3)
        per_task = tuple(1e6 * sample / tasks for sample in took.samples)
        yield Figure(took.name, f"planning a resume of {tasks:,} tasks, per task", "us", per_task)
