"""Logits in whatever a network returns: an object with `.logits`, a dict, a tuple, one number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from robusteval.errors import UsageError

NAMES = ("logits", "out", "output", "outputs", "pred", "preds", "prediction", "predictions")


class Reading(NamedTuple):
    """Where logits are in an output: a key or a position, and whether one stands for two."""

    key: str | int | None = None
    single: bool = False

    def pick(self, output: Any) -> Tensor:
        """Logits ``(n, k)`` of an output of the kind that was read."""
        found = _get(output, self.key)
        assert isinstance(found, Tensor)
        if not self.single:
            return found
        z = found.reshape(len(found), 1)
        return torch.cat([torch.zeros_like(z), z], 1)

    def describe(self) -> str:
        """What was understood, in words; empty where the output is logits."""
        said = []
        if isinstance(self.key, str):
            said.append(f"logits are `{self.key}` of what the network returns")
        elif self.key is not None:
            said.append("logits are the first of what the network returns")
        if self.single:
            said.append("one logit z is read as two classes, 0 and z")
        return "; ".join(said)


class LogitsOf(nn.Module):
    """A network whose logits are picked out of what it returns.

    Parameters
    ----------
    network : nn.Module
        Maps images ``(n, c, h, w)`` to an output.
    reading : Reading
        Where the logits are in it.
    flip : bool
        Whether it takes channels in reverse order.
    """

    def __init__(self, network: nn.Module, reading: Reading, *, flip: bool = False) -> None:
        super().__init__()
        self.network, self.reading, self.flip = network, reading, flip
        self.training = network.training

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(n, k)`` of images ``(n, c, h, w)``."""
        return self.reading.pick(self.network(x.flip(1) if self.flip else x))


def read_output(output: object, n: int) -> Reading | None:
    """Where logits of `n` images are in an output; None where it cannot be told."""
    if isinstance(output, Tensor):
        return _read_tensor(None, output, n)
    if isinstance(getattr(output, "logits", None), Tensor):
        return _read_tensor("logits", getattr(output, "logits"), n)  # noqa: B009
    if isinstance(output, Mapping):
        named = [key for key in NAMES if isinstance(output.get(key), Tensor)]
        keys = named[:1] or [k for k, v in output.items() if isinstance(k, str) and _may_be(v, n)]
        return _read_tensor(keys[0], output[keys[0]], n) if len(keys) == 1 else None
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        others = [part for part in output[1:] if _may_be(part, n)]
        # features beside logits look like them
        return None if others else _read_tensor(0, output[0], n)
    return None


def _read_tensor(key: str | int | None, found: Tensor, n: int) -> Reading | None:
    if found.ndim == 2 and len(found) == n and found.shape[1] > 1:
        return Reading(key)
    if found.numel() == n and found.ndim in (1, 2) and len(found) == n:
        return Reading(key, single=True)
    return None


def _may_be(value: object, n: int) -> bool:
    return isinstance(value, Tensor) and value.ndim == 2 and len(value) == n and value.shape[1] > 1


def _get(output: Any, key: str | int | None) -> Any:
    if key is None:
        return output
    if isinstance(key, str) and not isinstance(output, Mapping):
        return getattr(output, key)
    return output[key]


def describe_output(output: object) -> str:
    """What a network returned, for a message."""
    if isinstance(output, Tensor):
        return f"a tensor {tuple(output.shape)}"
    if isinstance(output, Mapping):
        return f"{type(output).__name__} with {', '.join(map(str, list(output)[:4]))}"
    if isinstance(output, tuple | list):
        parts = ", ".join(str(tuple(getattr(part, "shape", ()))) for part in output[:4])
        return f"{type(output).__name__} of {len(output)} ({parts})"
    return type(output).__name__


def refuse_probabilities(network: nn.Module, reading: Reading, x: Tensor) -> None:
    """Refuse one output that seems to be a probability instead of a logit; UsageError.

    Parameters
    ----------
    network : nn.Module
        In eval mode.
    reading : Reading
        Where its output is.
    x : Tensor
        An image ``(1, c, h, w)``; others of its shape are made up.
    """
    if not reading.single:
        return
    noise = torch.Generator().manual_seed(0)
    drawn = torch.randn(15, *x.shape[1:], generator=noise).to(x) * 3
    with torch.no_grad():
        z = torch.cat([reading.pick(network(part[None]))[:, 1] for part in (*x, *drawn)])
    if bool(((z >= 0) & (z <= 1)).all()):
        raise UsageError(
            "the network has one output, which stays between 0 and 1 as a probability does: leave"
            " the sigmoid at its end out, so that it returns a logit"
        )


def unwrap_logits(network: nn.Module) -> nn.Module:
    """The network inside, where its logits are picked out."""
    return network.network if isinstance(network, LogitsOf) else network
