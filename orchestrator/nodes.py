"""The nodes of a cluster: what they have, whether each sees the store and has the data, how much memory a GPU has."""

from __future__ import annotations

import math
import os
import socket
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.credentials import take_credentials
from orchestrator.endings import Unfit
from orchestrator.errors import UserError
from orchestrator.progress import say
from storage.errors import StoreError
from storage.machine import machine
from storage.records import Row, Shard
from storage.store import Store
from workers.datasets import DATASETS
from workers.fetch import fetch

PROBE_SECONDS = 90.0
"""So long all nodes may take to answer: a process is started on each, and prunesweep imported."""

HERE_SECONDS = 1.0
"""So long an answer that has been given may take to be brought here."""

SHARED = "a path that all nodes share, or s3://BUCKET/PREFIX"

KEPT_FREE = 0.9
"""Of a GPU's memory, so much is given to shards: allocators keep blocks apart, and drivers take some."""

MOST_ON_A_GPU = 16
"""More processes than that take turns on a GPU more than they fill it."""


@dataclass(frozen=True)
class Node:
    """A node of the cluster, and the resources it has."""

    node_id: str
    host: str
    address: str
    resources: Mapping[str, float]

    @property
    def name(self) -> str:
        return f"{self.host} ({self.address})"


def nodes() -> list[Node]:
    """The nodes that live."""
    return [
        Node(n["NodeID"], n["NodeManagerHostname"], n["NodeManagerAddress"], n["Resources"])
        for n in ray.nodes()
        if n["Alive"]
    ]


def capacity() -> dict[str, float]:
    """All resources of the cluster; where an autoscaler adds nodes, with what it may add."""
    there = ray.cluster_resources()
    return {**there, **{name: max(there.get(name, 0), amount) for name, amount in may_grow_to().items()}}


def may_grow_to() -> dict[str, float]:
    """What an autoscaler may bring the cluster to; nothing where there is none."""
    from ray._private.state import state

    return {name: float(amount) for name, amount in (state.get_max_resources_from_cluster_config() or {}).items()}


def one_per_host(found: Iterable[Node]) -> list[Node]:
    """One node of each machine: several raylets of one share its disk."""
    return list({(node.host, node.address): node for node in found}.values())


def check_nodes(store: Store, data_root: str, datasets: Iterable[str]) -> None:
    """Look at the store and the data sets from every node, as a worker would, before anything runs.

    Raises UserError, naming the node, where one does not see the store that the driver sees, or lacks a data set.
    """
    hosts = one_per_host(nodes())
    if len(hosts) == 1:
        return
    probe, names = f"probes/{uuid.uuid4().hex}", sorted(set(datasets))
    try:
        store.scratch.note(f"{probe}/driver", {"probe": probe})
        answers = _ask(hosts, lambda node: _look.options(**at(node)), store.absolute, probe, data_root, names)
        seen = {node.node_id for node in hosts if store.scratch.noted(f"{probe}/{node.node_id}")}
    finally:
        for node_id in ("driver", *(node.node_id for node in hosts)):
            store.scratch.forget(f"{probe}/{node_id}")
    if problem := wrong(hosts, answers, seen, store.absolute, data_root):
        raise UserError(problem)


def at(node: Node) -> dict[str, Any]:
    """Options of a task that runs on a node and nowhere else."""
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node.node_id, soft=False)}


def _ask(hosts: list[Node], task: Callable[[Node], Any], *arguments: Any) -> dict[str, Any]:
    """What each node answers, by its id: or the error."""
    asked = {node.node_id: task(node).remote(*arguments, node.node_id) for node in hosts}
    return dict(zip(asked, _answers(list(asked.values())), strict=True))


def _answers(asked: list[Any]) -> list[Any]:
    """What each task answers, or the error. All together have PROBE_SECONDS; who is late is waited for no more."""
    if asked:
        ray.wait(asked, num_returns=len(asked), timeout=PROBE_SECONDS)
    return [_answer(reference) for reference in asked]


def _answer(reference: Any) -> Any:
    try:
        return ray.get(reference, timeout=HERE_SECONDS)
    except (RayError, GetTimeoutError) as error:
        return error


@ray.remote(num_cpus=0, max_retries=1)
def _look(location: str, probe: str, data_root: str, datasets: list[str], node_id: str) -> dict[str, Any]:
    """On a node: see the driver's probe, leave one, and get the data sets that are not there."""
    take_credentials()
    try:
        scratch = Store(location).scratch
        sees = scratch.noted(f"{probe}/driver") is not None
        if sees:  # where not, this would make a store on a disk of its own
            scratch.note(f"{probe}/{node_id}", {"probe": probe})
    except StoreError as error:
        return {"error": str(error)}
    lacking = {name: said for name in datasets if (said := fetch(name, data_root).problem)} if sees else {}
    return {"sees": sees, "lacking": lacking}


def wrong(
    hosts: Iterable[Node], answers: Mapping[str, Any], seen: Iterable[str], store: str, data_root: str
) -> str | None:
    """What the nodes' answers say against running: the first problem, in words; `seen` are the nodes whose probe
    the driver has found."""
    for node in hosts:
        answer = answers[node.node_id]
        if isinstance(answer, Exception):
            say(f"the node {node.name} did not answer whether it sees the store: {type(answer).__name__}")
            continue
        if error := answer.get("error"):
            return f"the node {node.name} cannot use the store {store}: {error}; give --store {SHARED}"
        if not answer["sees"] or node.node_id not in set(seen):
            return (
                f"the node {node.name} does not see the store {store}, which is on this machine's own disk: rows "
                f"written there would be lost to the others. Give --store {SHARED}"
            )
        for name, problem in answer["lacking"].items():
            return (
                f"the node {node.name} lacks the data set {name}: {problem}. Give --data-root a path that all nodes "
                f"share, or run `prunesweep prefetch {name} --data-root {data_root}` on each node"
            )
    return None


def gpu_memory() -> int | None:
    """The memory of the cluster's smallest GPU in bytes; None where that cannot be told."""
    with_gpus = [node for node in nodes() if node.resources.get("GPU", 0) >= 1]
    tasks = [_memory.options(**at(node)).remote() for node in with_gpus]
    sizes = _answers(tasks)
    for task in tasks:
        ray.cancel(task, force=True)
    return min(sizes) if sizes and all(isinstance(size, int) and size > 0 for size in sizes) else None


@ray.remote(num_cpus=0, max_retries=0, max_calls=1)
def _memory() -> int:
    """On a node: the memory of its smallest GPU. It asks for no part of one, since all may be taken; its process, which
    sees them all, is not used again."""
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    import torch

    sizes = (torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
    return min(sizes, default=0)


def part_of_a_gpu(device: int, shard: int, cpus: float, node: Mapping[str, float], shards: int, gpus: float) -> float:
    """The part of a GPU, 1/k in Ray's four digits, for shards that take `shard` bytes of its `device` bytes each.

    So many as its memory holds, as the node has CPUs for (`cpus` each), and as there are shards to run on all `gpus`.
    """
    by_memory = int(KEPT_FREE * device // max(1, shard))
    by_cpus = int(node.get("CPU", 0) / max(1.0, node.get("GPU", 1.0)) // cpus)
    by_shards = math.ceil(shards / max(1.0, gpus))
    k = max(1, min(by_memory, by_cpus, by_shards, MOST_ON_A_GPU))
    return math.floor(1e4 / k) / 1e4


def fit_to_run(config: Mapping[str, Any], shard: Shard, rows: Iterator[Row]) -> Iterator[Row]:
    """`rows` of a shard, on a node that was seen to be fit: it may have come later than all checks.

    Raises Unfit where it does not see the store, or has not the data set and cannot get it.
    """
    if not (store := Store(config["store"])).is_local or config["machine"] == machine() or _sees(store, config):
        name = shard.needs.dataset
        if name in DATASETS and (problem := fetch(name, config["data_root"]).problem):
            raise Unfit(f"the node {_here()} lacks the data set {name}: {problem}")
        yield from rows
        return
    raise Unfit(f"the node {_here()} does not see the store {config['store']}: give --store {SHARED}")


def _sees(store: Store, config: Mapping[str, Any]) -> bool:
    return store.scratch.noted(f"drivers/{config['driver']}") is not None


def _here() -> str:
    return f"{socket.gethostname()} ({ray.util.get_node_ip_address()})"
