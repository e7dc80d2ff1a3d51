"""The nodes of a cluster: whether they see the store and have the data, what fits on their GPUs, and that they come
and go. Nodes are real raylets on loopback."""

from __future__ import annotations

import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.nodes import KEPT_FREE, Node, one_per_host, part_of_a_gpu, wrong
from orchestrator.placement import Placement
from orchestrator.wishes import NAME
from storage.records import Cell, Dense, Recipe, Shard, Task
from storage.store import Store
from tests.conftest import TINY, Cluster, Prunesweep
from tests.faults.quick import spec
from tests.faults.runs import quick, wait_until_gone
from tests.sweeps import assert_invariants, assert_same, committed, rows
from workers.datasets import DATASETS, Dataset
from workers.fetch import LEFT_SECONDS, Fetched, fetch
from workers.memory import CONTEXT_BYTES, FLOAT, LOOSE, WORKSPACE_BYTES, Load, Size, needed, network_size, shard_bytes

GIB = 1 << 30
RECIPE = Recipe(1, 64, ((0, 0.1),), momentum=0.9)
CELL = Cell(Dense("lenet5_mini", "mnist", RECIPE), (("conv1", 0.2),), "oracle", RECIPE)

# -- memory ---------------------------------------------------------------------------------------


def test_size_of_a_network() -> None:
    """LeNet-5-mini by hand: three convolutions of ten 5x5 filters each, two linear layers of ten."""
    size = network_size("lenet5_mini", 10, (1, 32, 32))
    outputs = (32 * 32, 10 * 28 * 28, 10 * 10 * 10, 10, 10, 10)
    assert size == Size(26 * 10 + 2 * 251 * 10 - 60 + 60 + 2 * 110, sum(outputs), 10 * 28 * 28 + 32 * 32)


def test_memory_by_hand() -> None:
    """A network of 1,000 numbers, in a fleet of 10, on minibatches of 50, with momentum; then one whose evaluation
    takes more than its training."""
    fleet = Load(Size(1000, 2000, 700), members=10, batch=50, held_bytes=4_000_000, states=1)
    used = FLOAT * (10 * 1000 * 3 + 10 * 50 * 2000 * 2) + 4_000_000
    assert needed(fleet) == CONTEXT_BYTES + WORKSPACE_BYTES + int(LOOSE * used)
    alone = Load(Size(1000, 2000, 2000), members=1, batch=1, held_bytes=0, states=0)
    assert needed(alone) == CONTEXT_BYTES + WORKSPACE_BYTES + int(LOOSE * FLOAT * (2000 + 1000 * 2000))


def test_memory_of_a_sweep() -> None:
    """It grows with the fleet, knows the largest shard, and says nothing of networks of transformers."""
    tasks = (Task(CELL, 0, 0),)
    small, large = (shard_bytes([Shard("s", tasks, block=block)], "data") for block in (1, 64))
    assert small and large and CONTEXT_BYTES + 70_000 * 32 * 32 * FLOAT < small < large
    assert shard_bytes([Shard("a", tasks, block=1), Shard("b", tasks, block=64)], "data") == large
    assert shard_bytes([], "data") is None
    other = Cell(Dense("hf/somewhere", "llava:there", RECIPE), (("conv1", 0.2),), "l1", RECIPE)
    assert shard_bytes([Shard("s", tasks), Shard("t", (Task(other, 0, 0),))], "data") is None


@given(
    st.integers(4, 192), st.integers(1, 200), st.sampled_from([0.5, 1, 2, 4]), st.integers(1, 256), st.integers(1, 500)
)
def test_packing(device: int, shard: int, cpus: float, has: int, shards: int) -> None:
    """What is packed on a GPU fits its memory, its node's processors and Ray's count of a whole."""
    part = part_of_a_gpu(device * GIB, shard * GIB // 4, cpus, {"CPU": has, "GPU": 2}, shards, 2)
    k = round(1 / part)
    assert k * part <= 1 and k <= max(1, -(-shards // 2))
    assert k == 1 or (k * shard / 4 <= KEPT_FREE * device and k * cpus <= has / 2)


def test_packing_by_hand() -> None:
    """80 GiB, shards of 10 GiB: seven, for a tenth is kept free; fewer where processors or shards are few."""
    node = {"CPU": 64.0, "GPU": 4.0}
    assert part_of_a_gpu(80 * GIB, 10 * GIB, 1, node, 1000, 4) == 0.1428
    assert part_of_a_gpu(80 * GIB, 10 * GIB, 8, node, 1000, 4) == 0.5
    assert part_of_a_gpu(80 * GIB, 10 * GIB, 1, node, 12, 4) == 0.3333
    assert part_of_a_gpu(80 * GIB, 100 * GIB, 1, node, 1000, 4) == 1.0


def test_a_task_that_took_too_much_has_a_gpu_to_itself() -> None:
    """It runs alone: then nothing else is on its GPU either. On processors there is nothing to change."""
    whole, alone = Shard("s", (Task(CELL, 0, 0),)), Shard("s.t", (Task(CELL, 0, 0),))
    packed = Placement(1, 0.25)
    assert packed.bundle(packed.of(whole)) == {"CPU": 1, "GPU": 0.25}
    assert packed.bundle(packed.of(alone)) == {"CPU": 1, "GPU": 1.0}
    assert Placement(2, 0).bundle(Placement(2, 0).of(alone)) == {"CPU": 2}


# -- what every node must have ----------------------------------------------------------------------

HOSTS = [Node("n1", "one", "10.0.0.1", {}), Node("n2", "two", "10.0.0.2", {})]
FINE = {"sees": True, "lacking": {}}


def test_raylets_of_one_machine_share_its_disk() -> None:
    again = Node("n3", "one", "10.0.0.1", {})
    assert {node.host for node in one_per_host([*HOSTS, again])} == {"one", "two"}
    assert len(one_per_host([*HOSTS, again])) == 2


@pytest.mark.parametrize(
    ("answer", "seen", "said"),
    [
        (FINE, ["n1", "n2"], None),
        ({"sees": False, "lacking": {}}, ["n1"], r"two \(10.0.0.2\) does not see the store /here.*s3://BUCKET"),
        (FINE, ["n1"], r"two \(10.0.0.2\) does not see the store"),
        ({"error": "no credentials"}, ["n1"], "two .*cannot use the store /here: no credentials"),
        (
            {"sees": True, "lacking": {"mnist": "offline"}},
            ["n1", "n2"],
            "two .*lacks the data set mnist: offline.*pref",
        ),
        (TimeoutError("late"), ["n1"], None),
    ],
)
def test_what_nodes_answer(answer: Any, seen: list[str], said: str | None) -> None:
    """One message that names the node and what to do; a node that is too busy to answer is not in the way."""
    found = wrong(HOSTS, {"n1": FINE, "n2": answer}, seen, "/here", "/data")
    assert found is None if said is None else re.search(said, found or ""), found


def _fetch(root: str, go: Any, told: Any) -> None:
    """In a process of its own: a data set whose source counts its downloads and takes a while."""

    def download(dataset: Dataset, folder: Path) -> None:
        with (Path(root) / "downloads").open("a") as log:
            log.write("x")
        for name in dataset.files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with (folder / name).open("w") as file:
                file.write("half")
                file.flush()
                time.sleep(0.2)
                file.write(" and half")

    go.wait()
    found = fetch("mnist", root, download)
    whole = {(Path(root) / name).read_text() for name in DATASETS["mnist"].files}
    told.put((found.downloaded, found.problem, whole))


def test_a_node_downloads_once(tmp_path: Path) -> None:
    """Four workers begin at once on a node without the data: one downloads, the others wait and find files that are
    whole; nothing else is left there."""
    fork: Any = multiprocessing.get_context("fork")
    go, told = fork.Event(), fork.Queue()
    processes = [fork.Process(target=_fetch, args=(str(tmp_path), go, told)) for _ in range(4)]
    for process in processes:
        process.start()
    go.set()
    found = [told.get(timeout=30) for _ in processes]
    for process in processes:
        process.join(30)
    assert sorted(downloaded for downloaded, _, _ in found) == [False, False, False, True]
    assert all(problem is None and whole == {"half and half"} for _, problem, whole in found)
    assert (tmp_path / "downloads").read_text() == "x"
    assert {path.name for path in tmp_path.iterdir()} == {"downloads", "MNIST", ".prunesweep-fetch.lock"}


def test_a_download_that_fails_leaves_nothing(tmp_path: Path) -> None:
    """It is said why, and the next one tries again; what a killed one left is removed a day later."""

    def fails(dataset: Dataset, folder: Path) -> None:
        (folder / "part").write_text("half")
        raise OSError("no route to host")

    def damaged(dataset: Dataset, folder: Path) -> None:
        (folder / "part").write_bytes(b"half")
        zipfile.ZipFile(folder / "part")

    killed = tmp_path / ".prunesweep-fetch-killed"
    for then in (time.time(), time.time() - 2 * LEFT_SECONDS):
        killed.mkdir(exist_ok=True)
        os.utime(killed, (then, then))
        assert fetch("mnist", tmp_path, fails).problem == "no route to host"
        assert killed.exists() == (time.time() - then < LEFT_SECONDS)
    assert fetch("mnist", tmp_path, damaged).problem == "File is not a zip file"
    assert [path.name for path in tmp_path.iterdir()] == [".prunesweep-fetch.lock"]
    assert fetch("digits", tmp_path, fails) == Fetched()
    assert "none" in (fetch("imagefolder:none", tmp_path, fails).problem or "")


# -- on real raylets --------------------------------------------------------------------------------


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A cluster with a head of one CPU, whose tasks take 0.3 s; nodes can be added."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("QUICK_SECONDS", "0.3")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        yield cluster
    finally:
        cluster.shutdown()


def namespaces(*flags: str) -> bool:
    """Whether this process may make namespaces."""
    command = ["unshare", *flags, "true"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.skipif(not namespaces("-m", "-u"), reason="this machine lets nobody make a mount namespace")
def test_a_store_that_one_node_does_not_see(head: Any, tmp_path: Path) -> None:
    """A second machine, with a disk of its own where the store is on the first: refused before anything runs, naming
    it."""
    sweep = quick(tmp_path / "mine", spec(count=4))
    sweep.folder.mkdir()
    ray = shlex.join([str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats"])
    script = f"hostname elsewhere && mount -t tmpfs none '{sweep.folder}' && exec {ray} --address={head.address}"
    log = (tmp_path / "node.log").open("w")
    node = subprocess.Popen(
        ["unshare", "-m", "-u", "sh", "-c", f"{script} --num-cpus=1"], stdout=log, stderr=log, start_new_session=True
    )
    try:
        wait_until(lambda: alive(head.address) == 2)
        code, said = sweep.run("doctor", "--address", head.address, "--store", "results", "-f", "csv")
        assert code != 0 and re.search(r"store,bad,.*results is another folder there", said), said
        code, said = sweep.run("run", "quick.yaml", "--address", head.address)
        assert code == 2, said
        assert "the node elsewhere (" in said and f"does not see the store {sweep.store.absolute}" in said
        assert "s3://BUCKET/PREFIX" in said and "Traceback" not in said
        assert committed(sweep.store) == set() and list(sweep.store.scratch.notes("probes")) == []
    finally:
        os.killpg(node.pid, signal.SIGKILL)
        node.wait(30)


def wait_until(what: Callable[[], bool], seconds: float = 60) -> None:
    """Until something is so."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, f"not so after {seconds} s"
        time.sleep(0.2)


def alive(address: str) -> int:
    """How many nodes of a cluster live."""
    from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]

    return sum(node.state == 0 for node in GcsClient(address=address).get_all_node_info().values())


def wishes(cluster: Any) -> int:
    """How many shards drivers could run besides, as the cluster sees it."""
    table = cluster.global_state.placement_group_table()
    return sum(one["name"].startswith(NAME) and one["state"] == "PENDING" for one in table.values())


@pytest.mark.timeout(600)
def test_a_node_that_comes_is_used(head: Any, tmp_path: Path) -> None:
    """With `workers: auto` a sweep that has begun on one processor goes on on three, once nodes have come."""
    sweep = quick(tmp_path, spec(count=45, seeds=4))
    driver = sweep.start("run", "quick.yaml", "--address", head.address)
    assert sweep.wait_for(lambda: len(committed(sweep.store)) >= 2, driver)
    assert len([note for note in sweep.notes().values() if note["task"]]) <= 1
    wait_until(lambda: wishes(head) == 1)  # for as many again as there are: what an autoscaler would add
    added = {head.add_node(num_cpus=1).node_id for _ in range(2)}
    used = set[str]()
    while driver.poll() is None and not added <= used:
        used |= {note["node"] for note in sweep.notes().values() if note["task"]}
        time.sleep(0.1)
    assert added <= used, sweep.said()
    assert driver.wait(300) == 0, sweep.said()
    assert wishes(head) == 0
    assert_invariants(sweep.store, "quick", committed(sweep.store), sweep.reference())


@pytest.mark.timeout(900)
def test_a_head_that_dies_costs_the_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The head is killed in mid-run: Ray ends the driver and its workers. A resume on another
    cluster does what is left, and runs nothing twice that was committed."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("QUICK_SECONDS", "0.3")
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "5")
    sweep = quick(tmp_path, spec(count=45))
    first = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        first.add_node(num_cpus=1)
        driver = sweep.start("run", "quick.yaml", "--address", str(first.address))
        assert sweep.wait_for(lambda: len(committed(sweep.store)) >= 3, driver)
        notes = sweep.notes()
        first.remove_node(first.head_node, allow_graceful=False)
        code = driver.wait(240)
        assert code not in (0, 2), sweep.said()  # 4, unless Ray was first, which gives up after 5 s here
        wait_until_gone(notes, 120)
    finally:
        first.shutdown()
    before = committed(sweep.store)
    assert 3 <= len(before) < 45
    second = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    try:
        code, said = sweep.run("resume", "quick", "--address", str(second.address))
        assert code == 0, said
    finally:
        second.shutdown()
    assert_invariants(sweep.store, "quick", before, sweep.reference())


@pytest.mark.timeout(600)
def test_inline_embedded_and_submitted_give_the_same_rows(
    cluster: Cluster, tmp_path: Path, prunesweep: Prunesweep
) -> None:
    """One spec, three ways, bit for bit."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    ways = {
        "inline": ("run", "tiny.yaml", "--inline"),
        "embedded": ("run", "tiny.yaml"),
        "submitted": ("submit", "tiny.yaml", "--address", cluster.jobs),
    }
    found = {}
    for way, words in ways.items():
        ended = prunesweep(*words, "--store", way)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        found[way] = rows(Store(tmp_path / way))
    assert len(found["inline"]) == 8
    assert_same(found["embedded"], found["inline"])
    assert_same(found["submitted"], found["inline"])


@pytest.mark.timeout(400)
def test_the_demonstration() -> None:
    """`make cluster-demo`: a node is killed in mid-run, and the table has every candidate."""
    module = [sys.executable, "-m", "tests.faults.cluster_demo"]
    found = subprocess.run(module, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "killed a node that was at work" in found.stderr
    assert re.search(r"lenet5_mini digits conv1 0.2 oracle +45 ", found.stdout), found.stdout
