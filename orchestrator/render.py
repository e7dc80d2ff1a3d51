"""A sweep as a file for KubeRay or SLURM: text from text, needing neither a cluster nor Ray.

The templates are in manifests/; what they give for the study lenet5-mini-conv1 is in deploy/.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from orchestrator.errors import UserError
from orchestrator.options import absolute, absolute_store, put

if TYPE_CHECKING:
    from orchestrator.documents import Document
    from orchestrator.spec import Resources, SweepSpec

KINDS = ("rayjob", "raycluster", "slurm")

NAME_LENGTH = 47
"""What KubeRay allows the name of a RayJob, to which it appends."""

POD_CPUS, POD_MEMORY_GB, LARGEST = 8, 16, 8
"""Of a worker pod, where the spec does not ask for more; and pods of a group, where it says no number of workers."""

SECRET = "prunesweep-env"
"""The Kubernetes Secret of variables that --env names and whose values are secrets."""

NODES, NODE_CPUS, NODE_GPUS = 2, 16, 4
"""Of a SLURM job, likewise."""


@dataclass(frozen=True)
class Sweep:
    """What a manifest is made of. `store` and `data_root` as the nodes see them; `bin` is the folder with the command
    there; `arguments` are more of `run`'s options; `folder` is where a SLURM job starts."""

    name: str
    text: str
    datasets: tuple[str, ...]
    resources: Resources
    store: str
    data_root: str
    image: str = ""
    bin: str = ""
    arguments: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    folder: str = ""
    secrets: tuple[str, ...] = ()
    """Variables of which the manifest has a reference in place of the value."""


@dataclass(frozen=True)
class Group:
    """Pods that are alike: their size, and how many there are at least and at most."""

    name: str
    gpus: int
    cpus: int
    memory_gb: int
    smallest: int
    largest: int


@dataclass(frozen=True)
class Volume:
    """A folder of a pod: of a PersistentVolumeClaim, or without one empty and of its own."""

    name: str
    path: str
    claim: str | None
    read_only: bool


def render(kind: str, sweep: Sweep) -> str:
    """The manifest of a sweep, of one of KINDS, as text."""
    values: dict[str, Callable[[Sweep], Mapping[str, Any]]] = {
        "rayjob": lambda one: {**_pods(one), "spec_mounted": True},
        "raycluster": lambda one: {**_pods(one), "spec_mounted": False},
        "slurm": _nodes,
    }
    suffix = "sh" if kind == "slurm" else "yaml"
    return _filled(f"{kind}.{suffix}.j2", values[kind](sweep))


@dataclass(frozen=True)
class Rendering:
    """What `submit` was asked to write instead of submitting: a manifest of `kind`, to `output` or stdout. `store` and
    `data_root` are as the nodes see them."""

    kind: str
    image: str | None
    output: Path | None
    store: str
    data_root: str


def write_manifest(
    rendering: Rendering,
    document: Document,
    spec: SweepSpec,
    arguments: tuple[str, ...] = (),
    env: tuple[tuple[str, str], ...] = (),
    folder: Path | None = None,
    secrets: tuple[str, ...] = (),
) -> None:
    """Write the manifest of a checked spec, with more of `run`'s options, variables, the folder to start in, and the
    names of variables whose values it must not hold."""
    if folder and rendering.kind != "slurm":
        raise UserError("--working-dir cannot go into a manifest for Kubernetes: put your code into the image")
    sweep = Sweep(
        spec.name,
        document.text(),
        tuple(spec.grid.dataset),
        spec.resources,
        rendering.store,
        rendering.data_root,
        rendering.image or "",
        str(Path(sys.executable).parent),
        arguments,
        env,
        str(folder.absolute()) if folder else "",
        secrets,
    )
    put(render(rendering.kind, sweep).encode(), rendering.output)
    if rendering.output and env:  # with the values of --env in it
        rendering.output.chmod(0o600)


def rendering_of(kind: str, image: str | None, output: Path | None, store: str, data_root: str) -> Rendering:
    """What the options ask for, places as they were typed. Raises UserError where one is missing or of another kind."""
    output = output and output.absolute()  # --working-dir goes elsewhere before it is written
    if kind == "slurm":
        if image:
            raise UserError("--image is of --render rayjob and raycluster; a SLURM job runs what is installed here")
        return Rendering(kind, None, output, absolute_store(store), absolute(data_root))
    if not image:
        raise UserError(f"--render {kind} needs --image, which all nodes run: deploy/Dockerfile builds it")
    return Rendering(kind, image, output, _of_pods(store), data_root if data_root.startswith("/") else "/data")


def _of_pods(store: str) -> str:
    if "://" in store or store.startswith("/"):
        return store
    raise UserError(
        f"pods do not see {store}, a folder of this machine: give --store s3://BUCKET/PREFIX, or the absolute path at "
        "which they are to mount a PersistentVolumeClaim prunesweep-store"
    )


def _pods(sweep: Sweep) -> Mapping[str, Any]:
    """The values of rayjob.yaml.j2 and raycluster.yaml.j2."""
    from importlib.metadata import version

    from orchestrator.jobs import DATA_ROOT, STOP_WAIT, STORE, SWEEP

    needed, prefetched = _data(sweep.datasets)
    # No places in the entrypoint: KubeRay and `ray job submit` both join it anew, without its quotes.
    places = {"PRUNESWEEP_STORE": sweep.store, "PRUNESWEEP_DATA_ROOT": sweep.data_root}
    return {
        "sweep": sweep.name,
        "name": kubernetes_name(sweep.name),
        "text": sweep.text.rstrip("\n"),
        "entrypoint": " ".join(["prunesweep", "run", "/etc/prunesweep/spec.yaml", *sweep.arguments]),
        "metadata": {SWEEP: sweep.name, STORE: sweep.store, DATA_ROOT: sweep.data_root},
        "store": sweep.store,
        "data_root": sweep.data_root,
        "on_s3": sweep.store.startswith("s3://"),
        "volumes": _volumes(sweep, needed, prefetched),
        "prefetched": prefetched,
        "image": sweep.image,
        # Whoever stops the job, Ray waits as long as the sweep may take to stop: by the head's environment.
        "env": {**STOP_WAIT, **dict(sweep.env), **places}.items(),
        "secret": SECRET,
        "secrets": sweep.secrets,
        "groups": groups(sweep.resources),
        "ray": version("ray"),
    }


def _data(datasets: Iterable[str]) -> tuple[bool, list[str]]:
    """Whether any data set has files, and those that are fetched, if all are that need any."""
    from workers.datasets import DATASETS

    with_files = [name for name in datasets if name not in DATASETS or DATASETS[name].files]
    return bool(with_files), with_files if all(name in DATASETS for name in with_files) else []


def _volumes(sweep: Sweep, needed: bool, prefetched: list[str]) -> list[Volume]:
    data = Volume("data", sweep.data_root, None if prefetched else "prunesweep-data", not prefetched)
    store = Volume("store", sweep.store, "prunesweep-store", False)
    return ([data] if needed else []) + ([store] if sweep.store.startswith("/") else [])


def kubernetes_name(sweep: str) -> str:
    """The sweep's name as Kubernetes allows names; where it has to be changed, with something of its own at the end."""
    name = re.sub(r"[^a-z0-9]+", "-", sweep.lower()).strip("-")
    if name == sweep and len(name) <= NAME_LENGTH and not name[0].isdecimal():
        return name
    mark = hashlib.sha256(sweep.encode()).hexdigest()[:6]
    return f"{'s-' if name[0].isdecimal() else ''}{name}"[: NAME_LENGTH - 7].strip("-") + f"-{mark}"


def groups(resources: Resources) -> tuple[Group, Group]:
    """Pods with a GPU and pods without. Of those that the sweep uses there is room for one task from the start: a run
    looks at the nodes there are. The others come when a task asks for them."""
    share = _gpu_share(resources)
    on_gpu, on_cpu = max(1, math.floor(1 / share + 1e-9)), max(1, math.floor(POD_CPUS / resources.cpus))
    cpus = max(POD_CPUS, math.ceil(resources.cpus * on_gpu)), max(POD_CPUS, math.ceil(resources.cpus))
    return (
        _group("gpu", math.ceil(share), cpus[0], on_gpu, resources, resources.gpus != 0),
        _group("cpu", 0, cpus[1], on_cpu, resources, resources.gpus == 0),
    )


def _gpu_share(resources: Resources) -> float:
    """GPUs of one process, where it is one of those that have any."""
    return float(resources.gpus) if resources.gpus not in ("auto", 0) else 1.0


def _group(name: str, gpus: int, cpus: int, processes: int, resources: Resources, used: bool) -> Group:
    """Pods that hold so many processes each, with a quarter more memory than these are said to take."""
    memory = max(POD_MEMORY_GB, 4 + math.ceil(1.25 * processes * (resources.memory_gb or 0)))
    smallest = math.ceil(resources.processes / processes) if used else 0
    return Group(name, gpus, cpus, memory, smallest, max(smallest, _how_many(resources, processes, LARGEST)))


def _how_many(resources: Resources, processes: int, otherwise: int) -> int:
    """Nodes of so many processes each that the workers of the spec fill; `otherwise`, where it says no number."""
    if resources.workers == "auto":
        return otherwise
    return math.ceil(resources.workers * resources.processes / processes)


def _nodes(sweep: Sweep) -> Mapping[str, Any]:
    """The values of slurm.sh.j2."""
    from orchestrator.jobs import end_of

    resources = sweep.resources
    gpus = max(NODE_GPUS, math.ceil(_gpu_share(resources))) if resources.gpus != 0 else 0
    processes = max(1, math.floor(gpus / _gpu_share(resources) + 1e-9 if gpus else NODE_CPUS / resources.cpus))
    return {
        "sweep": sweep.name,
        "text": sweep.text.rstrip("\n"),
        "end": end_of(sweep.text),
        "bin": shlex.quote(sweep.bin),
        "store": shlex.quote(sweep.store),
        "data_root": shlex.quote(sweep.data_root),
        "more": f" {shlex.join(sweep.arguments)}" if sweep.arguments else "",
        "env": [f"{key}={shlex.quote(value)}" for key, value in sweep.env],
        "secrets": sweep.secrets,
        "folder": shlex.quote(sweep.folder) if sweep.folder else "",
        "nodes": _how_many(resources, processes, NODES),
        "cpus": max(NODE_CPUS, math.ceil(resources.cpus * (processes if gpus else 1))),
        "gpus": gpus,
    }


def _literal(text: str) -> str:
    """Text in a pod's variables or command, in which Kubernetes would put variables' values for $(NAME)."""
    return text.replace("$", "$$")


def _filled(template: str, values: Mapping[str, Any]) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    # No HTML is made here; each value is quoted as YAML or as a word of the shell where it is put in.
    environment = Environment(
        loader=PackageLoader("orchestrator", "manifests"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"quote": shlex.quote, "literal": _literal}
    return environment.get_template(template).render(values)


def render_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--render, --image and -o of `submit`: its argument `rendering`."""

    @functools.wraps(command)
    def checked(*args: Any, kind: str | None, image: str | None, output: Path | None, **options: Any) -> Any:
        if not kind and (image or output):
            raise click.UsageError("--image and -o say how to write a manifest: give --render as well")
        places = options["store"], options["data_root"]
        rendering = rendering_of(kind, image, output, *places) if kind else None
        return command(*args, rendering=rendering, **options)

    kind = click.option(
        "--render", "kind", type=click.Choice(KINDS), help="Write a manifest for this sweep instead of submitting it."
    )
    image = click.option("--image", help="With --render rayjob or raycluster: the container image.")
    path = click.Path(dir_okay=False, path_type=Path)
    output = click.option("-o", "--output", type=path, help="With --render: write to a file.")
    return kind(image(output(checked)))
