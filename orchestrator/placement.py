"""What a shard asks of the cluster, and whether the cluster has it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ray

from orchestrator.errors import UserError
from orchestrator.nodes import gpu_memory, may_grow_to, nodes, part_of_a_gpu
from orchestrator.progress import say
from workers.memory import shard_bytes

if TYPE_CHECKING:
    from orchestrator.run import Options
    from storage.records import Shard


@dataclass(frozen=True)
class Placement:
    """Resources of each of a shard's processes. `gpus` may be a part of one, which several then share."""

    cpus: float
    gpus: float
    processes: int = 1

    def of(self, shard: Shard) -> float:
        """The GPUs of a shard's processes: a task that runs alone, since it took too much, has a whole one."""
        return 1.0 if shard.is_alone and 0 < self.gpus < 1 else self.gpus

    def bundle(self, gpus: float) -> dict[str, float]:
        """What one process gets, in Ray's words."""
        return {"CPU": self.cpus, "GPU": gpus} if gpus else {"CPU": self.cpus}

    @property
    def asked(self) -> dict[str, float]:
        """What a whole shard asks for."""
        return {name: amount * self.processes for name, amount in self.bundle(self.gpus).items()}


def placement(options: Options, shards: Iterable[Shard]) -> Placement:
    """How the shards of a run are placed on the cluster this process is connected to. Raises UserError where they
    cannot be."""
    gpus = float(options.gpus) if options.gpus != "auto" else _auto(options, list(shards))
    found = Placement(options.cpus, gpus, options.processes)
    check_fits(found, [node.resources for node in nodes()], may_grow_to())
    return found


def _auto(options: Options, shards: list[Shard]) -> float:
    """Where the cluster has GPUs one for each process, or a part of one where several surely fit its memory."""
    there = ray.cluster_resources().get("GPU", 0)
    if there < 1:
        return 1.0 if may_grow_to().get("GPU", 0) >= 1 else 0.0
    of_a_run = len(shards)
    if options.processes > 1 or of_a_run <= there:
        return 1.0
    each = shard_bytes(shards, options.data_root)
    device = gpu_memory() if each is not None else None
    if each is None or device is None:
        return 1.0
    node = min((n.resources for n in nodes() if n.resources.get("GPU", 0) >= 1), key=lambda has: has.get("CPU", 0))
    part = part_of_a_gpu(device, each, options.cpus, node, of_a_run, there)
    if part < 1:
        at_once = f"{round(1 / part)} shards at once on each GPU"
        say(f"{at_once}: one takes about {each / 2**30:.1f} GiB of its {device / 2**30:.0f} GiB (resources.gpus)")
    return part


def check_fits(wanted: Placement, found: Sequence[Mapping[str, float]], grown: Mapping[str, float]) -> None:
    """Raise UserError where no node of those `found` could ever run one process, or all together not those of one
    shard. What an autoscaler may have `grown` the cluster to counts as there."""
    one, processes = wanted.bundle(wanted.gpus), wanted.processes
    if all(grown.get(name, 0) >= amount * processes for name, amount in one.items()):
        return
    fits = sum(min(int(node.get(name, 0) // amount) for name, amount in one.items()) for node in found)
    if fits >= processes:
        return
    has = "; ".join(", ".join(f"{node.get(name, 0):g} {name}" for name in ("CPU", "GPU")) for node in found)
    asked = ", ".join(f"{amount:g} {name}" for name, amount in one.items())
    if not fits:
        raise UserError(f"a shard asks for {asked}, and no node of the cluster has that (it has {has})")
    raise UserError(
        f"a task asks for {processes} processes of {asked}, and the cluster has room for {fits} (it has {has})"
    )
