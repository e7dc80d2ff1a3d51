"""`make cluster-demo`: three nodes on this machine, one submitted sweep, one node killed in mid-run, the table.

Everything is real but that the nodes are processes of one machine. Nothing is left of it at the end.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

from storage.store import Store
from tests.conftest import command, free_port

SPEC = """\
name: cluster-demo
grid:
  model: lenet5_mini
  dataset: digits
  layers: conv1
  ratio: 0.2
  pruner: oracle
  seed: [0, 1]
candidates: {mode: all}
dense:   {epochs: 4, batch_size: 64, momentum: 0.9, lr: 0.02, weight_decay: 1.0e-4, seed: 0}
retrain: {epochs: 2, batch_size: 64, momentum: 0.9, lr: 0.002, weight_decay: 1.0e-4}
resources: {candidates_per_shard: 4}
"""
TASKS = 90


def main() -> int:
    """Run the demonstration; the exit code of the sweep."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="prunesweep-cluster-demo-", ignore_cleanup_errors=True) as folder:
        here = Path(folder)
        (here / "demo.yaml").write_text(SPEC)
        _say("starting three nodes of one processor each")
        cluster = _three_nodes()
        try:
            code = _sweep(cluster, here)
        finally:
            cluster.shutdown()
    _say(f"{time.monotonic() - started:.0f} s; the cluster and its store are removed")
    return code


def _three_nodes() -> Any:
    # Of its own, as other Ray heads may run on this machine: the default ports may be taken.
    ports = {"dashboard_port": free_port(), "dashboard_agent_listen_port": free_port()}
    head = {"num_cpus": 1, "include_dashboard": True, "dashboard_host": "127.0.0.1", **ports}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    return cluster


def _sweep(cluster: Any, here: Path) -> int:
    """Submit, kill a node in mid-run, follow to the end, and print the table."""
    server, store = f"http://{cluster.webui_url}", here / "results"
    where = ("--address", server)
    job = _prunesweep(here, "submit", "demo.yaml", *where, "--store", str(store), "--no-wait").stdout.strip()
    _say(f"submitted as {job}")
    if node := _node_at_work(cluster, Store(store)):
        done = len(Store(store).row_files()[0])
        cluster.remove_node(node, allow_graceful=False)
        _say(f"killed a node that was at work, with {done} of {TASKS} tasks done; the others go on")
        _say("(in the job's output are the lost node's last lines, as Ray prints them)")
    ended = _prunesweep(here, "logs", job, "-f", *where, check=False)
    sys.stderr.write("".join(f"  {line}\n" for line in ended.stdout.splitlines()))
    print(_prunesweep(here, "corr", "cluster-demo", "--store", str(store)).stdout)
    return ended.returncode


def _node_at_work(cluster: Any, store: Store, seconds: float = 120) -> Any:
    """A node that is not the head and has a worker at a task, once a tenth is done; None when there is none in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.2)
        if not store.exists() or len(store.row_files()[0]) < TASKS / 10:
            continue
        busy = {note.get("node") for note in store.scratch.notes("workers").values() if note.get("shard")}
        for node in cluster.worker_nodes:
            if node.node_id in busy:
                return node
    return None


def _prunesweep(here: Path, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    said = None if check else subprocess.STDOUT
    return subprocess.run([command(), *words], cwd=here, stdout=subprocess.PIPE, stderr=said, text=True, check=check)


def _say(text: str) -> None:
    print(f"cluster-demo: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "PRUNESWEEP_STORE"):
        os.environ.pop(name, None)
    # As where the environment is active: jobs run the `python` that is found first.
    os.environ["PATH"] = f"{Path(command()).parent}{os.pathsep}{os.environ['PATH']}"
    sys.exit(main())
