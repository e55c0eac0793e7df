"""Faster passes for attacks: in half precision, or by the compiled network. Verdicts take none."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from robusteval.models.forward_modes import (
    ImageByImage,
    is_observed,
    is_twice_differentiable,
    without_checkpointing,
)

Shortcut = Literal["amp", "compile"]
SHORTCUTS: tuple[Shortcut, ...] = get_args(Shortcut)


class Shortcuts:
    """How passes are made whose derivative is wanted, faster than in float32 step by step.

    Whatever only looks at logits, such as a verdict or a search that asks whether it is done, goes
    through the network as ever. So do passes that somebody looks on at, and those whose derivative
    is differentiated.

    Parameters
    ----------
    autocast : torch.dtype, optional
        What torch's autocast computes in; None for none.
    compiles : bool
        Call the network as `torch.compile` makes it.
    """

    def __init__(self, autocast: torch.dtype | None, *, compiles: bool) -> None:
        self.autocast = autocast
        self.compiles = compiles
        self.compiled: dict[int, Callable[[Tensor], Any]] = {}  # by the id of what they hold

    def __reduce__(self) -> tuple[Any, ...]:
        return make_shortcuts, (self.autocast, self.compiles)  # what was compiled stays here

    def describe(self) -> dict[str, str]:
        """What they are, JSON-able: part of the key of each attack."""
        kind = {} if self.autocast is None else {"amp": str(self.autocast).removeprefix("torch.")}
        return {**kind, **({"compile": "inductor"} if self.compiles else {})}

    def suit(self, x: Tensor, network: nn.Module) -> bool:
        """Whether a pass of normalised images ``(n, c, h, w)`` may take them."""
        wanted = x.requires_grad and torch.is_grad_enabled() and len(x) > 0
        return wanted and not is_observed(network) and not is_twice_differentiable()

    def call(self, network: nn.Module, x: Tensor, block: int) -> Any:
        """What the network returns for a block of normalised images ``(block, c, h, w)``."""
        kind = x.device.type
        with (
            without_checkpointing(),
            torch.autocast(kind, dtype=self.autocast, enabled=self.autocast is not None),
        ):
            if self.compiles:  # a mode that looks on would end every graph
                with without_remarks():
                    return self._compile(network)(x)
            with ImageByImage(len(x), block):
                return network(x)

    def _compile(self, network: nn.Module) -> Callable[[Tensor], Any]:
        if id(network) not in self.compiled:
            self.compiled[id(network)] = torch.compile(network, dynamic=False)
        return self.compiled[id(network)]


@contextmanager
def without_remarks() -> Iterator[None]:
    """Let torch's compiler keep to itself what it remarks on machine and network.

    Such as that there is no GPU; its errors are raised as ever, and who sets ``TORCH_LOGS`` or
    Python's ``-W`` is told what he asks for.
    """
    logger = logging.getLogger("torch")
    level = logger.level
    try:
        if "TORCH_LOGS" not in os.environ:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.filterwarnings("ignore", module=r"torch\.")
            yield
    finally:
        logger.setLevel(level)


def make_shortcuts(autocast: torch.dtype | None, compiles: bool) -> Shortcuts:
    """`Shortcuts`, all given by position."""
    return Shortcuts(autocast, compiles=compiles)
