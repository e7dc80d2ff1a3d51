"""Execution: how the arithmetic is done, chosen once and then repeated by every runner."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from storage.identity import digest
from storage.records import Execution

if TYPE_CHECKING:
    import torch

    from storage.store import Store

RECORDED = ("torch", "torchvision", "torch-pruning", "accelerate", "ray", "numpy", "pyarrow")
_ARITHMETIC = ("torch", "numpy")


@cache
def library_versions() -> tuple[tuple[str, str], ...]:
    """(name, version) of Python and of the libraries a row is made with."""
    return (("python", platform.python_version()), *((name, version(name)) for name in RECORDED))


def device_model(device: torch.device) -> str:
    """The model name of a device: the GPU's, or the processor's with its instruction set."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()} ({torch.backends.cpu.get_cpu_capability()})"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def choose_execution(store: Store, shape: tuple[object, ...], device: torch.device) -> Execution:
    """The execution for a shape on a device: what the store has noted, or else a choice noted now.

    On a CPU workers are many and single-threaded, channels-last.
    """
    model = device_model(device)
    choice = {"backend": "serial", "fleet": 1, "threads": 1, "memory_format": "channels_last"}
    noted = store.note(f"execution/{digest([list(shape), model])}", choice)
    versions = tuple(pair for pair in library_versions() if pair[0] in _ARITHMETIC)
    return Execution(**{key: noted[key] for key in choice}, device_model=model, versions=versions)


@contextmanager
def arithmetic(execution: Execution) -> Iterator[None]:
    """Threads and deterministic kernels as `execution` says; what was set before is restored."""
    import torch

    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    benchmark = torch.backends.cudnn.benchmark
    # cuBLAS is deterministic only with a fixed workspace, set before its first call.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(execution.threads)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        torch.backends.cudnn.benchmark = benchmark
