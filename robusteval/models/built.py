"""What a network is built from and called, for those who build it and those who read its file."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

State = dict[str, Tensor]


@dataclass(frozen=True)
class Built:
    """A network and what it is called in public; `sha256` is that of a user's own code."""

    network: nn.Module
    name: str
    sha256: str | None = None


def escape(text: str) -> str:
    """Text from a file, safe to print."""
    return text[:200] if text.isprintable() else ascii(text[:200])
