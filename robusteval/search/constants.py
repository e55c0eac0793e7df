"""What the class weighs beside the distance: the constant of Carlini and Wagner, image by image."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, autograd

RAISE = 10.0  # by what a constant grows as long as none has led to the class


class Constants:
    """The binary search for the least constant with which an image reaches its goal.

    Towards Evaluating the Robustness of Neural Networks, arXiv:1608.04644, section V: the
    distance plus `now` times ``max(gap, -slack)`` is lowered, over and over, where the gap is by
    how much the logits miss the goal. Departs from it in where the search starts: at the constant
    with which a linear network of the slope at `x` would just be led there, instead of at 0.001.

    Parameters
    ----------
    measure_gap : callable
        Of images ``(n, c, h, w)`` the gap ``(n,)``, differentiable.
    x : Tensor
        Images ``(n, c, h, w)`` in [0, 1].
    slack : float
        How far beyond the goal is enough, as an l2 distance in units of the [0, 1] pixel range.
    beyond : float
        The same in logits, added to it.

    Attributes
    ----------
    now : Tensor
        The constants ``(n,)`` to search with.
    slack : Tensor
        How far beyond the goal is enough, in logits ``(n,)``.
    slope : Tensor
        Of the gap at `x`, ``(n, c, h, w)``.
    far : Tensor
        How far the gap has to fall ``(n,)``.
    """

    def __init__(
        self,
        measure_gap: Callable[[Tensor], Tensor],
        x: Tensor,
        slack: float,
        beyond: float = 0.0,
    ) -> None:
        z = x.detach().requires_grad_()
        with torch.enable_grad():
            gap = measure_gap(z)
            self.slope = autograd.grad(gap.sum(), z)[0].nan_to_num(0.0, 0.0, 0.0)
        size = self.slope.flatten(1).norm(dim=1)
        self.slack = slack * size + beyond
        self.far = (gap.detach() + self.slack).clamp_min(0)
        # the distance's slope there is 2 far / size, that of the gap the constant times size
        first = 2 * self.far / size.square()
        usable = first.isfinite() & (first > 0)
        self.now = torch.where(usable, first, torch.ones_like(first))
        self.low, self.high = torch.zeros_like(first), torch.full_like(first, torch.inf)

    def weigh(self, gap: Tensor) -> Tensor:
        """What there is to lower until the goal is reached ``(n,)``, of gaps ``(n,)``."""
        return self.now * torch.maximum(gap, -self.slack)

    def halve(self, reached: Tensor) -> None:
        """Choose the next constants by whether the last have led there ``(n,)`` bool."""
        self.high = torch.where(reached, torch.minimum(self.high, self.now), self.high)
        self.low = torch.where(reached, self.low, torch.maximum(self.low, self.now))
        between = (self.low + self.high) / 2
        self.now = torch.where(self.high.isfinite(), between, RAISE * self.now)
