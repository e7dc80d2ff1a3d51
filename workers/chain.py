"""Networks that are chains, as the compiled back-end can run them: told from their graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Sequence

KERNELS = (1, 3, 5)
"""Kernel sizes that chain.cpp has code for."""


class NotAChain(Exception):
    """Why a network cannot be run as a chain."""


@dataclass(frozen=True)
class Link:
    """A layer with weights, on an input [channels, height, width], and what follows it: ReLU, 2x2 max-pool.

    A fully connected layer is a 1x1 convolution of a 1x1 image; so is a convolution as large as its input.
    """

    layer: str
    channels: int
    height: int
    width: int
    out: int
    kernel: int
    relu: bool = False
    pool: bool = False

    @property
    def passes(self) -> tuple[int, int, int]:
        """The shape of what it passes on."""
        by = 2 if self.pool else 1
        return self.out, (self.height - self.kernel + 1) // by, (self.width - self.kernel + 1) // by


def chain_of(network: nn.Module, shape: Sequence[int]) -> list[Link]:
    """The links of a network for samples of a shape [C, H, W]. Raises NotAChain, saying why."""
    hooked = next((n for n, m in network.named_modules() if m._forward_pre_hooks or m._forward_hooks), None)
    if hooked is not None:
        raise NotAChain(f"{hooked} has a hook, as a mask is one")
    try:
        graph = fx.symbolic_trace(network).graph
    except Exception as error:  # whatever the model's own code does with a proxy
        raise NotAChain(f"its forward pass cannot be traced: {error}") from error
    links: list[Link] = []
    at, before = tuple(shape), None
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            if before is not None:
                raise NotAChain(f"it reads {node.target} on the way")
            before = node
            continue
        if node.all_input_nodes != [before]:
            raise NotAChain(f"{node.name} does not follow from what is just before it alone")
        before = node
        if node.op == "output":
            break
        at = _follow(links, at, network, node)
    _check_parameters(links, network)
    if not links or at[1:] != (1, 1) or links[-1].relu or links[-1].pool:
        raise NotAChain("it does not end with a layer that gives logits")
    return links


def _check_parameters(links: list[Link], network: nn.Module) -> None:
    """Raise NotAChain where compiled code would train other parameters than a network has: one in two layers would be
    held twice, and frozen ones would be trained."""
    if not all(parameter.requires_grad for parameter in network.parameters()):
        raise NotAChain("some of its parameters are frozen")
    of_links = {id(p) for link in links for p in network.get_submodule(link.layer).parameters()}
    if any(id(parameter) not in of_links for parameter in network.parameters()):
        raise NotAChain("it has parameters that its forward pass does not use")
    seen: dict[int, str] = {}
    for link in links:
        for parameter in network.get_submodule(link.layer).parameters():
            if (other := seen.setdefault(id(parameter), link.layer)) != link.layer:
                raise NotAChain(f"{other} and {link.layer} share a parameter")
    if len({link.layer for link in links}) < len(links):
        raise NotAChain("a layer runs twice")


def _follow(links: list[Link], at: tuple[int, ...], network: nn.Module, node: fx.Node) -> tuple[int, ...]:
    """Take one operation into the links; the shape after it."""
    module = network.get_submodule(str(node.target)) if node.op == "call_module" else None
    if isinstance(module, nn.Conv2d | nn.Linear):
        links.append(_link(str(node.target), module, at))
    elif _is(node, module, nn.ReLU, F.relu, torch.relu, "relu") and links:
        links[-1] = Link(**{**vars(links[-1]), "relu": True})
    elif _is(node, module, nn.MaxPool2d, F.max_pool2d, torch.max_pool2d) and links and not links[-1].pool:
        _check_pool(node, module)
        links[-1] = Link(**{**vars(links[-1]), "pool": True})
    elif _is(node, module, nn.Flatten, torch.flatten, "flatten") and _flattens(node, module):
        return at[0] * at[1] * at[2], 1, 1
    elif not (isinstance(module, nn.Identity | nn.Dropout) and getattr(module, "p", 0) == 0):
        raise NotAChain(f"{node.name} ({node.target if module is None else type(module).__name__}) has no place in one")
    return links[-1].passes if links else at


def _link(name: str, module: nn.Conv2d | nn.Linear, at: tuple[int, ...]) -> Link:
    channels, height, width = at
    if module.bias is None:
        raise NotAChain(f"{name} has no bias")
    if isinstance(module, nn.Linear):
        if (height, width) != (1, 1) or channels != module.in_features:
            raise NotAChain(f"{name} is applied to an image")
        return Link(name, channels, 1, 1, module.out_features, 1)
    kernel = module.kernel_size[0]
    plain = module.stride == (1, 1) and module.padding in ((0, 0), "valid") and module.dilation == (1, 1)
    if not plain or module.groups != 1 or module.kernel_size != (kernel, kernel):
        raise NotAChain(f"{name} has a stride, padding, dilation, groups, or a kernel that is not square")
    if (height, width) == (kernel, kernel):
        return Link(name, channels * kernel * kernel, 1, 1, module.out_channels, 1)
    if kernel not in KERNELS or kernel > min(height, width):
        raise NotAChain(f"{name} has a kernel of {kernel}, not one of {', '.join(map(str, KERNELS))}")
    return Link(name, channels, height, width, module.out_channels, kernel)


def _is(node: fx.Node, module: nn.Module | None, kind: type[nn.Module], *functions: Any) -> bool:
    return isinstance(module, kind) if module is not None else node.target in functions


def _check_pool(node: fx.Node, module: nn.Module | None) -> None:
    if isinstance(module, nn.MaxPool2d):
        said = {k: getattr(module, k) for k in ("kernel_size", "stride", "padding", "dilation", "ceil_mode")}
    else:
        names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
        said = dict(zip(names, node.args[1:], strict=False)) | node.kwargs
    plain = {"kernel_size": (2, (2, 2)), "stride": (None, 2, (2, 2), ()), "padding": (0, (0, 0))}
    plain |= {"dilation": (1, (1, 1)), "ceil_mode": (False,), "return_indices": (False,)}
    if "kernel_size" not in said or any(value not in plain.get(name, ()) for name, value in said.items()):
        raise NotAChain(f"{node.name} is no 2x2 max-pool")


def _flattens(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether all but the samples is flattened."""
    if isinstance(module, nn.Flatten):
        return (module.start_dim, module.end_dim) == (1, -1)
    return node.args[1:] == (1,) and not node.kwargs
