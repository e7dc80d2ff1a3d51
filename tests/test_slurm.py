"""The SLURM script runs: two nodes with processes, network and name of their own, and `srun` and `scontrol` of ours.

It wants namespaces (root, `unshare`, `ip`); elsewhere it is skipped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.render import Sweep, render
from orchestrator.spec import Resources
from storage.store import Store
from tests.conftest import TINY

SPEC = TINY.replace("epochs: 2, batch_size: 64", "epochs: 60, batch_size: 64").replace("workers: 1", "gpus: 0")

NETWORK = """\
mount -t tmpfs none /run
for n in 1 2; do ip netns add n$n; ip -n n$n link set lo up; done
ip -n n1 link add eth0 type veth peer name eth0 netns n2
for n in 1 2; do ip -n n$n addr add 10.9.0.$n/24 dev eth0; ip -n n$n link set eth0 up; done
"""

ON = """\
#!/bin/bash
# on N COMMAND...: run it on node N.
export NODE=$1
shift
exec nsenter --net=/run/netns/n$NODE unshare --pid --fork --kill-child --mount --mount-proc --uts \\
  bash -c 'hostname node$NODE && mkdir -p /tmp/ray && mount -t tmpfs none /tmp/ray && exec "$@"' on "$@"
"""

SRUN = """\
#!/bin/bash
# One task on each node; the batch script is on the first.
while [[ $1 == --* ]]; do shift; done
SLURM_NODEID=1 on 2 "$@" >node2.log 2>&1 &
SLURM_NODEID=0 "$@"
wait # as the real one, for all of them
"""

SCONTROL = """\
#!/bin/bash
if [ "$1" = show ]; then printf '10.9.0.1\\n10.9.0.2\\n'; else echo "$@" >>asked; fi
"""

BATCH = """\
bash sweep.sh &
batch=$!
if [ "$1" = shortest ]; then
  (sleep 2 && kill -USR1 $batch) &
elif [ "$1" = short ]; then
  (until compgen -G 'store/rows/*.parquet' >/dev/null; do sleep 0.2; done; kill -USR1 $batch) &
fi
wait $batch
"""


def namespaces() -> bool:
    """Whether this machine permits what the test needs."""
    if not all(map(shutil.which, ("unshare", "nsenter", "ip"))):
        return False
    tried = ["unshare", "--mount", "--net", "bash", "-ec", NETWORK]
    return subprocess.run(tried, capture_output=True).returncode == 0


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """A working folder with the script of a small sweep, and what stands for SLURM."""
    if not namespaces():
        pytest.skip("no network and process namespaces here")
    (tmp_path / "bin").mkdir()
    for name, text in {"on": ON, "srun": SRUN, "scontrol": SCONTROL}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    store, commands = str(tmp_path / "store"), str(Path(sys.executable).parent)
    sweep = Sweep("tiny", SPEC, ("synthetic",), Resources(gpus=0), store, str(tmp_path), bin=commands)
    (tmp_path / "sweep.sh").write_text(render("slurm", sweep))
    (tmp_path / "batch.sh").write_text(BATCH)
    return tmp_path


def sbatch(folder: Path, time: str) -> subprocess.CompletedProcess[str]:
    """Run the job; with a `short` time it is told of its end once there is a row, with the `shortest` at its start."""
    slurm = {"NODELIST": "node[1-2]", "NUM_NODES": "2", "ID": "7"}
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {f"SLURM_JOB_{key}": value for key, value in slurm.items()} | {"SLURM_CPUS_PER_TASK": "1"}
    environment["RAY_API_SERVER_ADDRESS"] = "http://127.0.0.1:1"  # of another cluster
    environment |= {"HOME": str(folder), "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    outer = ["unshare", "--mount", "--net", "bash", "-ec", f"{NETWORK} on 1 bash batch.sh {time}"]
    return subprocess.run(outer, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_that_runs_out_of_time_is_queued_again_and_goes_on(cluster: Path) -> None:
    """With a token; both nodes work; told of its end the sweep stops, and the next job runs what is left."""
    first = sbatch(cluster, "short")
    assert first.returncode == 130, first.stdout + first.stderr
    assert (cluster / "asked").read_text() == "requeue 7\n"
    token = cluster / ".ray/auth_token"
    assert token.stat().st_mode & 0o077 == 0
    store = Store(cluster / "store")
    before = store.sql("select count(*) from rows where status = 'done'").fetchall()[0][0]
    assert 1 <= before < 8
    second = sbatch(cluster, "enough")
    assert second.returncode == 0, second.stdout + second.stderr
    assert f"8 tasks in 1 cell, {before} done" in second.stderr
    assert (cluster / "asked").read_text() == "requeue 7\n"
    found = store.sql("select count(*), count(distinct host) from rows where status = 'done'").fetchall()
    assert found == [(8, 2)], found


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_job_that_runs_out_of_time_while_it_starts(cluster: Path) -> None:
    """There is no driver yet that could be told: it is told once it is there, and the job is queued again."""
    found = sbatch(cluster, "shortest")
    assert found.returncode == 130, found.stdout + found.stderr
    assert (cluster / "asked").read_text() == "requeue 7\n"
    assert Store(cluster / "store").sql("select * from rows where status = 'done'").fetchall() == []
