"""What `doctor` looks at: checks as lines (what, ok | warn | bad, what is so and what to do)."""

from __future__ import annotations

import hashlib
import platform
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from orchestrator.probe import LIBRARIES, free_at, look
from storage.errors import StoreError

if TYPE_CHECKING:
    from storage.store import Store

OK, WARN, BAD = "ok", "warn", "bad"
Check = tuple[str, str, str]

NODE_SECONDS = 60.0
"""So long a node may take to answer: it starts a process and imports torch."""


def machine() -> Iterator[Check]:
    """Python, processors and memory."""
    yield "python", OK, f"{platform.python_version()} at {sys.executable}"
    import psutil

    yield "processors", OK, f"{psutil.cpu_count()}"
    free = psutil.virtual_memory().available / 2**30
    result = OK if free > 2 else WARN
    yield "memory", result, f"{free:.1f} GiB free; a worker with MNIST in memory takes about 1.5 GiB"


def libraries() -> Iterator[Check]:
    """What prunesweep is built on, and whether torch works."""
    for name in LIBRARIES:
        try:
            yield name, OK, version(name)
        except PackageNotFoundError:
            yield name, BAD, "not installed; run `make install`"
    try:
        import torch
        import torchvision  # noqa: F401  a build that does not match torch fails here
    except Exception as error:
        yield "torch works", BAD, f"{error}; install torch and torchvision from the same index"
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(count))
    yield "GPUs", OK, names or "none; workers run on the processors, one thread each"
    yield _compiled()


def _compiled() -> Check:
    import torch

    from workers.compiled import NoCompiler, compiler, library

    try:
        library(torch.float32)
    except NoCompiler as error:
        return "compiler", WARN, f"{error}; with one, small networks train several times faster on a processor"
    return "compiler", OK, f"{compiler()[1]}: small networks train on a processor by code it has built"


def store(location: str) -> Iterator[Check]:
    """Whether the store can be written, and the room for it."""
    from storage.errors import StoreError
    from storage.store import Store

    try:
        opened = Store(location)
        opened.check_writable()
    except StoreError as error:
        yield "store", BAD, f"{error}; choose another with --store or PRUNESWEEP_STORE"
        return
    yield "store", OK, f"{location} is writable; sweeps: {', '.join(opened.sweeps()) or 'none yet'}"
    if opened.is_local:
        free = free_at(Path(opened.root)) / 2**30
        yield "disk", OK if free > 1 else WARN, f"{free:.1f} GiB free where the store is"


def data(data_root: str) -> Iterator[Check]:
    """Which data sets are there."""
    from workers.datasets import DATASETS

    for name, dataset in DATASETS.items():
        if dataset.files:
            missing = dataset.missing(data_root)
            what = f"not under {data_root}; `prunesweep prefetch {name}`" if missing else f"under {data_root}"
            yield f"data {name}", WARN if missing else OK, what


def code() -> str:
    """8 hex digits over prunesweep's own code as this process has it."""
    said, folder = hashlib.sha256(), Path(__file__).resolve().parents[1]
    rooms = ("orchestrator", "workers", "models", "pruners", "storage")
    for path in sorted(path for room in rooms for path in (folder / room).rglob("*.py") if path.is_file()):
        content = path.read_bytes()
        said.update(f"{path.relative_to(folder).as_posix()}\0{len(content)}\0".encode() + content)
    return said.hexdigest()[:8]


def cluster(nodes: Sequence[Mapping[str, Any]], address: str) -> Iterator[Check]:
    """What Ray says of its nodes, as `ray.nodes()` lists them."""
    alive = [node for node in nodes if node["Alive"]]
    yield "cluster", OK, f"{address}: {len(alive)} nodes answer"
    for node in alive:
        there = node["Resources"]
        kinds = [name.partition(":")[2] for name in there if name.startswith("accelerator_type:")]
        gpus = f"{there.get('GPU', 0):g} GPUs{f' ({kinds[0]})' if kinds else ''}"
        yield f"node {node['NodeName']}", OK, f"{there.get('CPU', 0):g} CPUs, {gpus}"


def reports(nodes: Sequence[Mapping[str, Any]], location: str, data_root: str) -> Iterator[dict[str, Any]]:
    """What each node shows of itself, asked by a Ray task on it; `problem` where it does not answer.

    This process is connected to the cluster.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from orchestrator import probe
    from orchestrator.cluster import START
    from orchestrator.errors import first_line
    from storage.store import Store

    opened, alive = Store(location), [node for node in nodes if node["Alive"]]
    with _by_value(probe), _marked(opened) as mark:
        asked = ray.remote(num_cpus=0, max_retries=0)(look)
        on = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in alive]
        answers = [asked.options(scheduling_strategy=one).remote(START, opened.absolute, data_root, mark) for one in on]
        ray.wait(answers, num_returns=len(answers), timeout=NODE_SECONDS)
        for node, answer in zip(alive, answers, strict=True):
            about = {"node": node["NodeName"], "gpus": node["Resources"].get("GPU", 0)}
            try:
                yield {**about, **ray.get(answer, timeout=0.1)}
            except Exception as error:  # of Ray, of the node, of time
                yield {**about, "versions": {}, "problem": first_line(error)}


@contextmanager
def _by_value(module: ModuleType) -> Iterator[None]:
    """While this lasts functions of a module are sent whole, also to where it is not."""
    import ray.cloudpickle

    ray.cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        ray.cloudpickle.unregister_pickle_by_value(module)


@contextmanager
def _marked(store: Store) -> Iterator[str | None]:
    """A note in the store that whoever sees the store can see; the folders made for it go with it. None where it
    cannot be written, which is said elsewhere."""
    mark, root = f"doctor/{uuid.uuid4().hex}", Path(store.root)
    made = [folder for folder in (root, *root.parents) if not folder.exists()]
    try:
        store.scratch.renew(mark, {})
    except StoreError:
        yield None
        return
    try:
        yield mark
    finally:
        store.scratch.forget(mark)
        for folder in (root / "scratch/doctor", root / "scratch", *made) if store.is_local else ():
            with suppress(OSError):  # not empty: it was there before
                folder.rmdir()


def node(report: Mapping[str, Any], here: Mapping[str, str | None], our_code: str, location: str) -> Iterator[Check]:
    """What follows from a node's report, beside the versions and the code that this process has."""
    name = report["node"]
    differ = [
        f"{library} {there or 'is missing'} (here {here.get(library)})"
        for library, there in report["versions"].items()
        if there != here.get(library)
    ]
    if differ:
        yield f"{name} versions", WARN, f"{'; '.join(differ)}: use one image or lock file on all nodes"
    if report["problem"]:
        todo = "install its requirements there, or use an image that has prunesweep"
        yield f"{name} prunesweep", BAD, f"cannot run there: {report['problem']}; {todo}"
        return
    if not differ:
        yield f"{name} versions", OK, "as here"
    same = report["code"] == our_code
    told = "as here" if same else f"other code ({report['code']}, here {our_code}); `submit` sends ours along"
    yield f"{name} prunesweep", OK if same else WARN, told
    torch = str(report["versions"].get("torch"))
    if report["gpus"] and "+cpu" in torch:
        yield f"{name} GPUs", BAD, f"torch {torch} is built for processors: install a CUDA build there"
    yield from _node_store(name, report, location)
    yield f"{name} data", OK if report["data"] else WARN, _node_data(report["data"])
    free = report["temporary"] / 2**30
    yield f"{name} disk", OK if free > 5 else WARN, f"{free:.1f} GiB free for temporary files; Ray wants more than 5"


def _node_store(name: str, report: Mapping[str, Any], location: str) -> Iterator[Check]:
    shared = "every node must see one store: a shared folder under the same name, or s3://"
    if report["store"]:
        yield f"{name} store", BAD, f"{report['store']}; {shared}"
    elif not report["same"]:
        yield f"{name} store", BAD, f"{location} is another folder there: {shared}"
    else:
        yield f"{name} store", OK, f"{location} is writable from a worker"
    if report["disk"] is not None and report["disk"] < 2**30:
        yield f"{name} store disk", WARN, f"{report['disk'] / 2**30:.1f} GiB free where the store is"


def _node_data(there: Sequence[str]) -> str:
    return ", ".join(there) if there else "no data set under the data root; `prunesweep prefetch` into a shared folder"
