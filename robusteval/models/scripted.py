"""Networks and layers that torch.jit has compiled, inside of which no hook and no mode looks."""

from __future__ import annotations

import torch
from torch import nn

from robusteval.errors import UsageError


def is_scripted(module: nn.Module) -> bool:
    """Whether torch.jit has compiled a module, by tracing or from its source."""
    return isinstance(module, torch.jit.ScriptModule)


def refuse_scripted(network: nn.Module, module: nn.Module | None = None) -> None:
    """UsageError if what a network computes on its way cannot be seen.

    Parameters
    ----------
    network : nn.Module
        No part of it may be compiled, if `module` is not given.
    module : nn.Module, optional
        The part of it that alone is to be seen: neither it nor what is around it may be compiled.
    """
    for name, part in network.named_modules():
        if is_scripted(part) and (module is None or any(each is module for each in part.modules())):
            raise UsageError(
                f"{f'layer {name!r}' if name else 'the network'} is compiled by torch.jit, inside"
                " of which nothing can be seen: give the network as it was before that"
            )
