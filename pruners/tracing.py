"""Tracing: one run of a network that labels every tensor of it.

Every operation of torch that the network calls on an example is seen here, and followed by its rule (pruners.rules). An
operation without a rule makes the classes that reach it unremovable, and its name is the reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pruners.dispatch import Operations
from pruners.labels import Axis, Labels, tensors_in, varies
from pruners.rules import Call, CannotFollow, follow

OPAQUE = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
"""Modules whose channels cannot go one by one; what they do inside is not looked at."""


class Tracer(Operations):
    """Labels every tensor of a network while it runs.

    `order` are the modules in the order in which they run, `users` the modules that use each parameter or buffer.
    `norms` are (module, place in its `normalized_shape`, labels) of norms that have no weight to say their width.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.labels = Labels(model)
        self.norms: list[tuple[str, int, Axis]] = []
        self.users: dict[str, set[str]] = {}
        self.order: dict[str, None] = {}
        self._opaque = 0

    def refuse_output(self, output: Any) -> None:
        """Note that nothing that labels the network's output can be removed."""
        self.labels.refuse(output, "its units are coupled to the network's output, which cannot lose any")

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Know which module runs, in which order layers do, and look at nothing inside opaque ones."""
        handles = []
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(self._entering(name, module), with_kwargs=True))
            handles.append(module.register_forward_hook(self._leaving(module)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _entering(self, name: str, module: nn.Module) -> Any:
        def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
            self.labels.running.append(name)
            self.order.setdefault(name)
            if isinstance(module, OPAQUE):
                kind = next(k.__name__ for k in type(module).__mro__ if k.__module__.startswith("torch.nn"))
                article = "an" if kind[0] in "LR" else "a"
                said = f"it is coupled to {name}, {article} {kind}, which cannot lose channels one by one"
                if not self._opaque:
                    self.labels.refuse([args, kwargs], said)
                self._opaque += 1
            elif isinstance(getattr(module, "normalized_shape", None), tuple) and args:
                self._note_norm(name, module, args[0])

        return enter

    def _note_norm(self, name: str, module: Any, x: torch.Tensor) -> None:
        """A norm without a weight has no tensor that says its width: that attribute is cut by these labels."""
        if getattr(module, "weight", None) is None:
            for place in range(len(module.normalized_shape)):
                dim = x.ndim - len(module.normalized_shape) + place
                self.norms += [(name, place, a) for a in self.labels.of(x).axes if varies(a) == {dim}]

    def _leaving(self, module: nn.Module) -> Any:
        def leave(_: nn.Module, __: Any, output: Any) -> None:
            self.labels.running.pop()
            if isinstance(module, OPAQUE):
                self._opaque -= 1
                for tensor in tensors_in(output):
                    self.labels.set(tensor, [])

        return leave

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if self._opaque:
            return output
        call = Call(func, args, kwargs, output)
        for tensor in call.inputs:
            if (name := self.labels.name_of(tensor)) is not None:
                self.users.setdefault(name, set()).add(self.labels.place())
        try:
            follow(self.labels, call)
        except CannotFollow as error:
            self._give_up(call, str(error))
        except Exception as error:  # of an operation that does not take labels, such as an index on no device
            said = str(error).partition("\n")[0]
            self._give_up(call, f"its units go through {call.name}, which cannot be followed: {said}")
        return output

    def _give_up(self, call: Call, reason: str) -> None:
        """What an operation does to its inputs is not known: nothing that reaches it can be removed."""
        place = self.labels.place()
        self.labels.refuse(call.inputs, f"{reason} ({place})" if place else reason)
        for tensor in tensors_in(call.output):
            self.labels.set(tensor, [])
