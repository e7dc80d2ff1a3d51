"""A long training's checkpoint: written every few minutes, and when it is asked to stop.

Safetensors, with what is no tensor as JSON in its metadata; nothing is pickled. There is at most one
per task, in the store's scratch; whoever runs the task next goes on from it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from storage.errors import StoreError
from workers.pulse import Stopped
from workers.weights import metadata, packed

if TYPE_CHECKING:
    from storage.scratch import Scratch


FORMAT = 2
"""Of a checkpoint's content: one of another format is as none."""


@dataclass(frozen=True)
class State:
    """A training between two minibatches: tensors by name, and what is no tensor."""

    tensors: dict[str, torch.Tensor]
    values: dict[str, Any]


class Checkpoint:
    """The checkpoint of one task or dense model, `key`.

    `about` is what must be the same for going on to give the same row: the task, its dense weights, the
    execution. A checkpoint of something else, or a damaged one, is as none; `report` is told.
    """

    def __init__(
        self,
        scratch: Scratch,
        key: str,
        about: Mapping[str, Any],
        seconds: float,
        stop: Callable[[], bool] = lambda: False,
        report: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._scratch, self._key, self._about, self._seconds = scratch, key, {"format": FORMAT, **about}, seconds
        self._stop, self._report = stop, report
        self._last = time.monotonic()
        self._anew = False
        self.exists = False

    def found(self) -> dict[str, Any] | None:
        """What the one that is there is of, where it is of this, and more: the step of a task of several."""
        try:
            content = self._scratch.checkpoint(self._key)
            about = metadata(content).get("about") if content is not None else None
        except ValueError:
            return None
        if not isinstance(about, dict) or len(about) == len(self._about):
            return None
        return about if self._about.items() <= about.items() else None

    def go_on(self, more: Mapping[str, Any], *, anew: bool) -> None:
        """The training that begins is of this too; begun `anew` it does not look for a checkpoint."""
        self._about, self._anew = {**self._about, **more}, anew

    def due(self) -> bool:
        """Whether it is time to save, or to stop."""
        return self._stop() or time.monotonic() - self._last >= self._seconds

    def save(self, state: State) -> None:
        """Keep `state` in place of the last one. Raises Stopped where that was asked for.

        A store that cannot take it now costs the checkpoint, not the training.
        """
        try:
            content = packed(state.tensors, {"about": self._about, "values": state.values})
            self._scratch.save_checkpoint(self._key, content)
            self.exists = True
        except StoreError as error:
            self._report(f"a checkpoint of {self._key} could not be written: {error}")
        self._last = time.monotonic()
        if self._stop():
            raise Stopped

    def drop(self) -> None:
        """Remove it: its row is committed."""
        if self.exists:
            self._scratch.drop_checkpoint(self._key)

    def load(self) -> State | None:
        """The state to go on from, or None."""
        from safetensors.torch import load

        if self._anew:
            return None
        try:
            content = self._scratch.checkpoint(self._key)
            if content is None:
                return None
            self.exists = True
            found = metadata(content)
        except ValueError as error:
            self._report(f"{error}: {self._key} is trained from its start")
            self.exists = True
            return None
        if found.get("about") != self._about:
            self._report(
                f"the checkpoint of {self._key} is of another execution, or format: it is trained from its start"
            )
            return None
        return State(load(content), found["values"])


def optimizer_state(optimizer: torch.optim.Optimizer) -> State:
    """An optimizer's state: `<parameter>/<name>` tensors, and the rest as values."""
    held = optimizer.state_dict()
    pairs = [(f"{index}/{name}", value) for index, slot in held["state"].items() for name, value in slot.items()]
    return State(
        {name: value for name, value in pairs if isinstance(value, torch.Tensor)},
        {
            "scalars": {name: value for name, value in pairs if not isinstance(value, torch.Tensor)},
            "groups": held["param_groups"],
        },
    )


def restore_optimizer(optimizer: torch.optim.Optimizer, state: State) -> None:
    """Put an optimizer where `state` was taken.

    Its tensors get their parameter's memory layout: another one is computed by other instructions, and
    the last bit may differ.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    slots: dict[int, dict[str, Any]] = {}
    for path, value in [*state.tensors.items(), *state.values["scalars"].items()]:
        index, _, name = path.partition("/")
        parameter = parameters[int(index)]
        if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        slots.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": slots, "param_groups": state.values["groups"]})


def generators() -> State:
    """Where the global generators stand: Python's, numpy's, torch's on the CPU and on each GPU."""
    import numpy as np

    kind, words, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, state, gauss = random.getstate()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return State(
        {
            "torch": torch.get_rng_state(),
            "numpy": torch.from_numpy(np.asarray(words).astype(np.int64)),
            **{f"cuda/{i}": t for i, t in enumerate(gpus)},
        },
        {"numpy": [kind, position, has_gauss, cached], "python": [version, list(state), gauss]},
    )


def restore_generators(state: State) -> None:
    """Put the global generators where `state` was taken."""
    import numpy as np

    torch.set_rng_state(state.tensors["torch"])
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"cuda/{i}" in state.tensors:  # another process may have seen fewer
            torch.cuda.set_rng_state(state.tensors[f"cuda/{i}"], i)
    kind, position, has_gauss, cached = state.values["numpy"]
    np.random.set_state((kind, state.tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, cached))
    version, words, gauss = state.values["python"]
    random.setstate((version, tuple(words), gauss))


def prefixed(**parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of several parts in one dict: `<part>/<name>`."""
    return {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


def part(tensors: Mapping[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """The tensors of one part, by their names in it."""
    return {key.removeprefix(f"{name}/"): t for key, t in tensors.items() if key.startswith(f"{name}/")}
