"""Execution: how the arithmetic is done, chosen once and then repeated by every runner."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    """The processor's name; on Linux with its family and model, since clouds give one name to several."""
    info = Path("/proc/cpuinfo")
    text = info.read_text().split("\n\n")[0] if info.exists() else ""
    pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    said = {key.strip(): value.strip() for key, value in pairs}
    if "model name" not in said:
        return platform.processor() or platform.machine()
    return f"{said['model name']} family {said.get('cpu family', '?')} model {said.get('model', '?')}"


def choose_execution(store: Store, shape: tuple[object, ...], device: torch.device) -> Execution:
    """The execution for a shape on a device: what the store has noted, or else a choice noted now.

    On a CPU workers are many and single-threaded, channels-last.
    """
    model = device_model(device)
    choice = {"backend": "serial", "fleet": 1, "threads": 1, "memory_format": "channels_last"}
    noted = store.scratch.note(f"execution/{digest([list(shape), model])}", choice)
    return Execution(**{key: noted[key] for key in choice}, device_model=model, versions=arithmetic_versions())


def repeated(recorded: Execution, device: torch.device) -> Execution:
    """A recorded execution as it can be had on this device, with what is installed here."""
    return replace(recorded, device_model=device_model(device), versions=arithmetic_versions())


def arithmetic_versions() -> tuple[tuple[str, str], ...]:
    """The versions an execution depends on."""
    return tuple(pair for pair in library_versions() if pair[0] in _ARITHMETIC)


@contextmanager
def arithmetic(execution: Execution) -> Iterator[None]:
    """Threads and deterministic kernels as `execution` says, full float32 products and no TF32, whatever
    was set before; that is restored."""
    import torch

    default = torch.get_default_dtype()
    cudnn: Any = torch.backends.cudnn
    threads, products = torch.get_num_threads(), torch.get_float32_matmul_precision()
    deterministic = torch.are_deterministic_algorithms_enabled()
    benchmark, tf32 = cudnn.benchmark, cudnn.allow_tf32
    # cuBLAS is deterministic only with a fixed workspace, set before its first call.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(execution.threads)
    torch.set_default_dtype(torch.float32)
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(True)
    cudnn.benchmark, cudnn.allow_tf32 = False, False
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(default)
        torch.set_float32_matmul_precision(products)
        torch.use_deterministic_algorithms(deterministic)
        cudnn.benchmark, cudnn.allow_tf32 = benchmark, tf32
