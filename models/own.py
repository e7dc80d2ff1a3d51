"""A person's own network, `package.module:build`: called as `build(classes)` or `build(classes, shape)`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import usercode

if TYPE_CHECKING:
    from torch import nn


def build(name: str, classes: int, shape: tuple[int, int, int]) -> nn.Module:
    """The network of `name`. Raises ValueError where it cannot be called so, fails, or makes something else."""
    from torch import nn

    make = usercode.load(name)
    if not callable(make):
        raise ValueError(
            f"{name} is no function or class: it must be callable as build(classes) or build(classes, shape)"
        )
    arguments = _arguments(make, classes, shape)
    try:
        made = make(*arguments)
    except Exception as error:  # of the user's own code
        raise ValueError(f"{name} failed when called with {arguments}: {type(error).__name__}: {error}") from error
    if not isinstance(made, nn.Module):
        raise ValueError(f"{name} made a {type(made).__name__}: it must return a torch.nn.Module")
    return made


def _arguments(make: Callable[..., Any], classes: int, shape: tuple[int, int, int]) -> tuple[Any, ...]:
    try:
        inspect.signature(make).bind(classes, shape)
    except TypeError:
        return (classes,)
    except ValueError:  # a builtin has no signature
        return classes, shape
    return classes, shape
