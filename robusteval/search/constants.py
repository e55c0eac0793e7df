"""What the class weighs beside the distance: the constant of Carlini and Wagner, image by image."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, autograd

from robusteval.models.steps import book_rows
from robusteval.search.losses import margin

RAISE = 10.0  # by what a constant grows as long as none has led to the class


class Constants:
    """The binary search for the least constant with which an image reaches its class.

    Towards Evaluating the Robustness of Neural Networks, arXiv:1608.04644, section V: the
    distance plus `now` times ``max(max_j Z_j - Z_t, -slack)`` is lowered, over and over. Departs
    from it in where the search starts: at the constant with which a linear network of the slope
    at `x` would just be led there, instead of at 0.001.

    Parameters
    ----------
    model : callable
        Maps images in [0, 1] to logits ``(n, k)``.
    x : Tensor
        Images ``(n, c, h, w)`` in [0, 1].
    goal : Tensor
        Classes to reach ``(n,)``.
    slack : float
        How far beyond the boundary is enough, as an l2 distance in units of the [0, 1] pixel range.
    confidence : float
        Least probability of the class that is asked for.

    Attributes
    ----------
    now : Tensor
        The constants ``(n,)`` to search with.
    slack : Tensor
        How far beyond the boundary is enough, in logits ``(n,)``.
    """

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        x: Tensor,
        goal: Tensor,
        slack: float,
        confidence: float = 0.0,
    ) -> None:
        z = x.detach().requires_grad_()
        with torch.enable_grad(), book_rows(torch.arange(len(x), device=x.device)):
            logits = model(z)
            gap = -margin(logits, goal)
            slope = autograd.grad(gap.sum(), z)[0].nan_to_num(0.0, 0.0, 0.0).flatten(1)
        size = slope.norm(dim=1)
        # a margin with which the class has that probability, however the others share the rest
        odds = (logits.shape[1] - 1) * confidence / (1 - confidence)
        self.slack = slack * size + math.log(max(odds, 1.0))
        far = (gap.detach() + self.slack).clamp_min(0)
        # the distance's slope there is 2 far / size, that of the class the constant times size
        first = 2 * far / size.square()
        usable = first.isfinite() & (first > 0)
        self.now = torch.where(usable, first, torch.ones_like(first))
        self.low, self.high = torch.zeros_like(first), torch.full_like(first, torch.inf)

    def weigh(self, logits: Tensor, goal: Tensor) -> Tensor:
        """What there is to lower until the class is reached ``(n,)``."""
        return self.now * torch.maximum(-margin(logits, goal), -self.slack)

    def halve(self, reached: Tensor) -> None:
        """Choose the next constants by whether the last have led there ``(n,)`` bool."""
        self.high = torch.where(reached, torch.minimum(self.high, self.now), self.high)
        self.low = torch.where(reached, self.low, torch.maximum(self.low, self.now))
        between = (self.low + self.high) / 2
        self.now = torch.where(self.high.isfinite(), between, RAISE * self.now)
