"""The compiled back-end: chains on a processor, by code that the machine's own compiler builds once.

chain.cpp says how it computes. Its library is kept in the user's cache folder, named after all that it
depends on.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from workers.chain import Link, chain_of
from workers.checkpoints import State
from workers.datasets import Split
from workers.measures import EVALUATION_BATCH, Measure, measure_of

if TYPE_CHECKING:
    from torch import nn

    from storage.records import Recipe
    from workers.datasets import Samples

SOURCE = Path(__file__).with_name("chain.cpp")
FLAGS = (
    "-O3",
    "-march=native",
    "-std=c++17",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fPIC",
    "-shared",
    "-Wno-psabi",
)
REALS = {torch.float32: "float", torch.float64: "double"}


class NoCompiler(Exception):
    """Why there is no compiled code on this machine."""


class _Rule(ctypes.Structure):
    _fields_ = [
        ("lr", ctypes.c_double),
        ("momentum", ctypes.c_double),
        ("weight_decay", ctypes.c_double),
        ("nesterov", ctypes.c_int64),
    ]


class Compiled:
    """One network in training, float32 or float64, by SGD. Its parameters become views of one vector.

    Raises NotAChain or NoCompiler where it cannot be.
    """

    def __init__(self, network: nn.Module, recipe: Recipe, shape: tuple[int, ...]) -> None:
        assert recipe.optimizer == "sgd", recipe.optimizer
        self.networks = [network.to(memory_format=torch.contiguous_format)]
        self._recipe = recipe
        links = chain_of(network, shape)
        parameters = [p for link in links for p in _weight_and_bias(network, link)]
        self._values = torch.cat([p.detach().reshape(-1) for p in parameters])
        self._momenta = torch.zeros_like(self._values)
        for parameter, view in zip(parameters, self._values.split([p.numel() for p in parameters]), strict=True):
            parameter.data = view.view(parameter.shape)
        table = torch.tensor(_table(links))
        self._library = library(self._values.dtype)
        self._chain = self._library.chain_new(_at(table), len(links), self._values.numel())
        if not self._chain:
            raise MemoryError("no memory for a compiled network")

    def measure(self, split: Samples) -> list[Measure]:
        """Loss and accuracy; a chain has no other mode for it."""
        # What is in memory is read where it is.
        pieces = [split] if isinstance(split, Split) else split.in_order(EVALUATION_BATCH)
        loss, square, correct = map(sum, zip(*map(self._sums, pieces), strict=True))
        return [measure_of(loss, square, correct, len(split))]

    def _sums(self, split: Split) -> tuple[float, float, int]:
        loss, square, correct = ctypes.c_double(0), ctypes.c_double(0), ctypes.c_int64(0)
        sums = ctypes.byref(loss), ctypes.byref(square), ctypes.byref(correct)
        images, labels = self._checked(split)
        self._library.chain_measure(self._chain, _at(self._values), images, labels, len(split), *sums)
        return loss.value, square.value, correct.value

    def step(self, split: Split, indices: torch.Tensor | None, lr: float) -> torch.Tensor:
        """One step on one minibatch, `indices` of `split` or all of it; its mean loss, [1]."""
        recipe, loss = self._recipe, torch.empty(1, dtype=self._values.dtype)
        indices = torch.arange(len(split)) if indices is None else indices
        rule = _Rule(lr, recipe.momentum, recipe.weight_decay, recipe.nesterov)
        self._library.chain_step(
            self._chain,
            _at(self._values),
            _at(self._momenta),
            *self._checked(split),
            _at(indices),
            len(indices),
            ctypes.byref(rule),
            _at(loss),
        )
        return loss

    def state(self) -> State:
        """Weights and momenta."""
        return State({"values": self._values, "momenta": self._momenta}, {})

    def restore(self, state: State) -> None:
        """Be where `state` was taken."""
        self._values.copy_(state.tensors["values"])
        self._momenta.copy_(state.tensors["momenta"])

    def close(self) -> None:
        """Free the working memory; the weights stay."""
        if self._chain:
            self._library.chain_free(self._chain)
        self._chain = None

    def __del__(self) -> None:
        if getattr(self, "_chain", None):
            self.close()

    def _checked(self, split: Split) -> tuple[int, int]:
        """Where the images and labels are, which must be as the compiled code reads them."""
        images, labels = split.images, split.labels
        if not (images.is_contiguous() and labels.is_contiguous() and labels.dtype == torch.int64):
            raise ValueError("the compiled back-end reads contiguous images and int64 labels")
        if images.dtype != self._values.dtype or images.device.type != "cpu":
            raise ValueError(f"the compiled back-end reads {self._values.dtype} on the CPU, not {images.dtype}")
        return _at(images), _at(labels)


def _weight_and_bias(network: nn.Module, link: Link) -> list[Any]:
    layer: Any = network.get_submodule(link.layer)
    return [layer.weight, layer.bias]


def _table(links: list[Link]) -> list[list[int]]:
    """chain.cpp's struct Layer for each link: the weights of each stand before its biases, link after link."""
    rows, at = [], 0
    for link in links:
        weights = link.out * link.channels * link.kernel**2
        sizes = [link.channels, link.height, link.width, link.out, link.kernel]
        rows.append([*sizes, int(link.relu), int(link.pool), at, at + weights])
        at += weights + link.out
    return rows


def _at(tensor: torch.Tensor) -> int:
    return tensor.data_ptr()


@cache
def compiler() -> tuple[str, str]:
    """(path, version line) of the C++ compiler: CXX, or the first of c++, g++, clang++. Raises NoCompiler."""
    for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        if found := shutil.which(name):
            said = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout
            return found, said.partition("\n")[0]
    raise NoCompiler("no C++ compiler (c++, g++ or clang++) on PATH, nor in CXX")


@cache
def code() -> str:
    """What the arithmetic depends on, in a word: the source, the flags, the compiler. Raises NoCompiler."""
    return hashlib.sha256("\n".join([SOURCE.read_text(), *FLAGS, compiler()[1]]).encode()).hexdigest()[:12]


@cache
def library(dtype: torch.dtype) -> Any:
    """The compiled code for a type of number, built where it is not there yet. Raises NoCompiler."""
    from workers.execution import device_model

    real = REALS[dtype]
    name = hashlib.sha256(f"{code()} {real} {device_model(torch.device('cpu'))}".encode()).hexdigest()[:16]
    path = _cache_folder() / f"chain-{name}.so"
    if not path.exists():
        _build(path, real)
    try:
        loaded: Any = ctypes.CDLL(str(path))
    except OSError as error:
        raise NoCompiler(f"{path} cannot be loaded: {error}; remove it to have it built again") from error
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    loaded.chain_new.restype = pointer
    loaded.chain_new.argtypes = [pointer, number, number]
    loaded.chain_free.argtypes = [pointer]
    loaded.chain_step.argtypes = [*[pointer] * 6, number, pointer, pointer]
    loaded.chain_measure.argtypes = [*[pointer] * 4, number, *[pointer] * 3]
    return loaded


def _build(path: Path, real: str) -> None:
    """Compile chain.cpp to `path`, whole or not at all: another process may be at it too."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        command = [compiler()[0], *FLAGS, f"-DREAL={real}", str(SOURCE), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise NoCompiler(f"{compiler()[0]} could not build chain.cpp: {done.stderr.strip()[:500]}")
        made.replace(path)


def _cache_folder() -> Path:
    """A folder of this user's alone: what lies in it is loaded as code."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    for folder in (base / "prunesweep", Path(tempfile.gettempdir()) / f"prunesweep-{os.getuid()}"):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            continue
        found = folder.stat()
        if found.st_uid == os.getuid() and not found.st_mode & 0o022 and os.access(folder, os.W_OK):
            return folder
    raise NoCompiler(f"no folder for compiled code: neither {base} nor the temporary folder can be used")
