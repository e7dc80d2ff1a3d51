"""Execution: how the arithmetic is done, chosen once and then repeated by every runner."""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
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
    """Return (name, version) of Python and of those of RECORDED that are installed."""
    return (("python", platform.python_version()), *installed(RECORDED))


def installed(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield (name, version) of those libraries that are installed."""
    for name in names:
        with suppress(PackageNotFoundError):
            yield name, version(name)


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


def choose_execution(
    store: Store, shape: tuple[object, ...], device: torch.device, decide: Callable[[], dict[str, Any]]
) -> Execution:
    """The execution for a shape on a device: what the store has noted, or else what is decided now, and noted.

    Machines with and without compiled code note theirs apart.
    """
    name = note_name(shape, device)
    noted = store.scratch.noted(name) or store.scratch.note(name, decide())
    return execution_of(noted, device)


def note_name(shape: tuple[object, ...], device: torch.device) -> str:
    """The note of the choice for a shape on a device, in the store's scratch."""
    return f"execution/{digest([list(shape), device_model(device), *_compiled_code()])}"


def execution_of(choice: Mapping[str, Any], device: torch.device) -> Execution:
    """Return the execution of a choice, with the device and the versions of this process."""
    kept = {key: choice[key] for key in ("backend", "fleet", "threads", "memory_format")}
    return Execution(
        **kept,
        device_model=device_model(device),
        versions=_versions(choice["backend"]),
        fallback=choice.get("fallback"),
    )


def repeated(recorded: Execution, device: torch.device) -> Execution:
    """A recorded execution as it can be had on this device, with what is installed here."""
    changes = {"backend": "serial"} if recorded.backend == "compiled" and not _compiled_code() else {}
    return execution_of(asdict(recorded) | changes, device)


def _versions(backend: str) -> tuple[tuple[str, str], ...]:
    """The versions an execution depends on, by name."""
    compiled = [("compiled", code) for code in _compiled_code() if backend == "compiled"]
    return tuple(sorted([*arithmetic_versions(), *compiled]))


def _compiled_code() -> list[str]:
    """What the compiled back-end's arithmetic depends on here; nothing where there is none."""
    from workers.compiled import NoCompiler, code

    try:
        return [code()]
    except NoCompiler:
        return []


def arithmetic_versions() -> tuple[tuple[str, str], ...]:
    """The versions an execution depends on."""
    return tuple(pair for pair in library_versions() if pair[0] in _ARITHMETIC)


@dataclass
class Kernels:
    """What is seen of the kernels that a computation uses: whether each of them repeats its bits."""

    deterministic: bool = True


NOT_DETERMINISTIC = "does not have a deterministic implementation"
"""Torch's words for an operation that a device has only without a fixed order of its sums."""


@contextmanager
def arithmetic(execution: Execution) -> Iterator[Kernels]:
    """Threads and deterministic kernels as `execution` says, full float32 products and no TF32, whatever
    was set before; that is restored. An operation without a deterministic kernel is run all the same, and seen.

    Torch's deterministic mode would also fill every new tensor with NaN, which takes time and changes no result.
    """
    import torch

    default = torch.get_default_dtype()
    deterministic_mode: Any = torch.utils.deterministic
    filled = deterministic_mode.fill_uninitialized_memory
    cudnn: Any = torch.backends.cudnn
    threads, products = torch.get_num_threads(), torch.get_float32_matmul_precision()
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark, tf32 = cudnn.benchmark, cudnn.allow_tf32
    # cuBLAS is deterministic only with a fixed workspace, set before its first call.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(execution.threads)
    torch.set_default_dtype(torch.float32)
    torch.set_float32_matmul_precision("highest")
    _use_deterministic_algorithms(True, warn_only=True)
    deterministic_mode.fill_uninitialized_memory = False
    cudnn.benchmark, cudnn.allow_tf32 = False, False
    try:
        with _watched() as kernels:
            yield kernels
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(default)
        torch.set_float32_matmul_precision(products)
        _use_deterministic_algorithms(*deterministic)
        deterministic_mode.fill_uninitialized_memory = filled
        cudnn.benchmark, cudnn.allow_tf32 = benchmark, tf32


@contextmanager
def _watched() -> Iterator[Kernels]:
    """Note what torch warns of; other warnings go on as ever."""
    kernels = Kernels()
    with warnings.catch_warnings():
        show = warnings.showwarning

        def note(message: Warning | str, *where: Any, **more: Any) -> None:
            if NOT_DETERMINISTIC in str(message):
                kernels.deterministic = False
            else:
                show(message, *where, **more)

        warnings.filterwarnings("always", message=f".*{NOT_DETERMINISTIC}")
        warnings.showwarning = note
        yield kernels


def _use_deterministic_algorithms(mode: bool, warn_only: bool) -> None:
    """torch.use_deterministic_algorithms without a setting of its compiler, which we do not use: importing
    that takes every worker some seconds."""
    import torch

    torch._C._set_deterministic_algorithms(mode, warn_only=warn_only)  # pyright: ignore[reportAttributeAccessIssue]
