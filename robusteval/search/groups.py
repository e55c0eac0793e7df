"""Squares of pixels, all channels together, and changes that are zero on most of them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

HALVINGS = 60


class Groups:
    """Squares of `side` pixels that tile images; those at the right and below may be smaller.

    Parameters
    ----------
    side : int
        Of a square, in pixels.
    """

    def __init__(self, side: int) -> None:
        if side < 1:
            raise ValueError(f"side must be at least 1 pixel, not {side}")
        self.side = side

    def measure(self, delta: Tensor) -> Tensor:
        """The l2 length of a change ``(n, c, h, w)`` in each square ``(n, 1, rows, columns)``."""
        n, _, h, w = delta.shape
        right, below = -w % self.side, -h % self.side
        square = F.pad(delta.square().sum(1), (0, right, 0, below))
        # one after the other, so that an image's sums do not depend on the batch
        square = square.view(n, h + below, -1, self.side).sum(3)  # (n, h', columns)
        square = square.view(n, -1, self.side, square.shape[2]).sum(2)
        return square.sqrt().unsqueeze(1)

    def spread(self, values: Tensor, like: Tensor) -> Tensor:
        """Values of squares ``(n, 1, rows, columns)`` at their pixels ``(n, 1, h, w)``."""
        h, w = like.shape[2:]
        wide = values.repeat_interleave(self.side, 2).repeat_interleave(self.side, 3)
        return wide[..., :h, :w]

    def shrink(self, delta: Tensor, by: float) -> Tensor:
        """Every square's change shorter by so much, zero where it was no longer than that.

        The proximal operator of `by` times the sum of the lengths (group soft threshold).
        """
        length = self.measure(delta)
        factor = (1 - by / length.clamp_min(1e-30)).clamp_min(0)
        return delta * self.spread(factor, delta)

    def price(self, delta: Tensor, tau: float, gamma: float) -> Tensor:
        """`gamma` times the squared l2 length, plus `tau` times that of each square: ``(n,)``."""
        whole = delta.square().flatten(1).sum(1)
        return gamma * whole + tau * self.measure(delta).flatten(1).sum(1)

    def solve_linear(
        self, grad: Tensor, gap: Tensor, tau: float, gamma: float
    ) -> tuple[Tensor, Tensor]:
        """The cheapest change that lowers a linear function by `gap` ``(n,)``, the box left aside.

        Where its multiplier is m, a square of gradient g changes by ``-m g`` shrunk by `tau` and
        divided by twice `gamma`; m is found by halving.

        Returns
        -------
        tuple of Tensor
            The change ``(n, c, h, w)``, and m ``(n,)``; infinite where there is no gradient.
        """
        length = self.measure(grad).flatten(1)
        low = torch.zeros_like(gap)
        strongest = length.amax(1)
        # the strongest square alone would do it
        high = (tau + 2 * gamma * gap.clamp_min(0) / strongest) / strongest
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            moved = ((middle.unsqueeze(1) * length - tau).clamp_min(0) * length).sum(1)
            enough = moved / (2 * gamma) >= gap
            low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
        delta = -self.shrink(high.view(-1, 1, 1, 1) * grad, tau) / (2 * gamma)
        return delta, high
