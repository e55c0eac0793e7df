"""Defects that make a network look robust without making it so, planted on a sound one."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Function(nn.Module):
    """A layer that is nothing but a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Rounding(nn.Module):
    """Values rounded to so many levels between 0 and 1."""

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.levels = levels

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.levels).round() / self.levels


class Threshold(nn.Module):
    """Ones above a threshold, zeros below."""

    def __init__(self, at: float) -> None:
        super().__init__()
        self.at = at

    def forward(self, x: Tensor) -> Tensor:
        return (x > self.at).float()


class KWinners(nn.Module):
    """Only the largest values of each image stay: k-winners-take-all, arXiv:1905.10510."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        values = x.flatten(1)
        count = max(1, int(self.share * values.shape[1]))
        least = values.topk(count, 1).values[:, -1:]
        return (values * (values >= least)).view_as(x)


class Jpeg(nn.Module):
    """What JPEG loses: the cosine transform of blocks of 8x8, rounded to multiples of a step."""

    def __init__(self, step: float) -> None:
        super().__init__()
        self.step = step
        place = torch.arange(8.0)
        waves = torch.cos(math.pi * (2 * place + 1) * place[:, None] / 16) / 2
        waves[0] /= 2**0.5
        self.register_buffer("waves", waves)

    def forward(self, x: Tensor) -> Tensor:
        waves, (h, w) = self.get_buffer("waves"), x.shape[2:]
        padded = F.pad(x, (0, -w % 8, 0, -h % 8), mode="replicate")
        n, c, rows, columns = padded.shape
        blocks = padded.view(n, c, rows // 8, 8, columns // 8, 8).transpose(3, 4)
        spectrum = ((waves @ blocks @ waves.T) / self.step).round() * self.step
        blocks = waves.T @ spectrum @ waves
        return blocks.transpose(3, 4).reshape(padded.shape)[:, :, :h, :w]


class Noise(nn.Module):
    """Gaussian noise of this size on whatever comes, as a random defense adds."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return x + self.size * torch.randn_like(x)


class Dropout(nn.Module):
    """Dropout that nobody switches off."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.share, training=True)


class BatchStatistics(nn.Module):
    """Batch normalisation by the batch itself, brought back to a mean and a deviation."""

    def __init__(self, mean: float, deviation: float) -> None:
        super().__init__()
        self.mean, self.deviation = mean, deviation

    def forward(self, x: Tensor) -> Tensor:
        normal = F.batch_norm(x, None, None, training=True)
        return self.deviation * normal + self.mean


class Planted(nn.Module):
    """A network with something in front of it and something behind it.

    Parameters
    ----------
    network : nn.Module
        Maps images ``(n, c, h, w)`` in [0, 1] to logits ``(n, k)``.
    front, behind : nn.Module, optional
        Of images, and of logits.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        front: nn.Module | None = None,
        behind: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.front = front or nn.Identity()
        self.network = network
        self.behind = behind or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.behind(self.network(self.front(x)))
        return logits


def plant_inline(network: nn.Module, function: Callable[[Tensor], Tensor]) -> nn.Module:
    """The network with a function of its images that is no layer of its own."""

    class Inline(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.network(function(x))
            return logits

    return Inline()
