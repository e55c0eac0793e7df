"""Three ways of moving images along a gradient: in a ball, by a change of variable, by a flow.

Each holds what is searched, `point`, makes images of it, and takes a step down a gradient. What
for, and how often, is the caller's.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from robusteval.models.seeds import per_image
from robusteval.search.balls import Ball, quantise

Base = Literal["pgd", "cw", "stadv"]
Neighbours = Literal["direct", "diagonal"]


class Search(Protocol):
    """What searches have in common; `weight` ``(n, 1, h, w)`` or None scales each pixel's move."""

    point: Tensor  # what is searched

    def make_images(self, point: Tensor, weight: Tensor | None) -> Tensor:
        """Images ``(n, c, h, w)`` in [0, 1] of a point; differentiable."""
        ...

    def price_change(self, point: Tensor, x_adv: Tensor) -> Tensor | None:
        """What a change costs by itself ``(n,)``, None if nothing."""
        ...

    def step(self, grad: Tensor, weight: Tensor | None) -> None:
        """Move `point` down the gradient of the loss's sum."""
        ...

    def round_images(self, x_adv: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Images for rows `index` ``(m,)`` as 8-bit images, and whether those are allowed."""
        ...

    def restart(self) -> None:
        """Forget the past of the gradient, keep `point`."""
        ...


class Signed:
    """Steps along the gradient's sign in a ball.

    Parameters
    ----------
    ball : Ball
        Where to search; the search starts at its centre.
    length : float
        Length of a step in the ball's norm, in units of the [0, 1] pixel range.
    """

    def __init__(self, ball: Ball, length: float) -> None:
        self.ball, self.length = ball, length
        self.point = ball.x.clone()

    def make_images(self, point: Tensor, weight: Tensor | None) -> Tensor:
        """Images of points: here a point is an image itself, whatever the weights."""
        return point

    def price_change(self, point: Tensor, x_adv: Tensor) -> None:
        """Nothing: the ball bounds the change."""

    def step(self, grad: Tensor, weight: Tensor | None) -> None:
        """Move by `length` times the weight, then back into the ball."""
        direction = self.ball.find_direction(grad)
        if weight is not None:
            direction = weight * direction
        self.point = self.ball.project(self.point.detach() - self.length * direction)

    def round_images(self, x_adv: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """8-bit images near the ball, and which of them are inside."""
        ball = self.ball.pick(index)
        rounded = ball.quantise(x_adv)
        return rounded, ball.holds(rounded)

    def restart(self) -> None:
        """There is nothing to forget."""


class Adaptive:
    """Adam with the largest second moment so far (AMSGrad), image by image.

    Parameters
    ----------
    x : Tensor
        Images ``(n, c, h, w)`` in [0, 1].
    start : Tensor
        First point.
    free : Tensor
        ``(n, c, h, w)`` bool, False where a value may not change.
    rate : float
        Learning rate, in units of the point.
    """

    def __init__(self, x: Tensor, start: Tensor, free: Tensor, rate: float) -> None:
        self.x, self.free, self.rate = x, free, rate
        self.point = start
        self.restart()

    def restart(self) -> None:
        """A new optimiser from the same point."""
        self.optimiser = torch.optim.Adam([self.point], self.rate, amsgrad=True, foreach=False)

    def slow_down(self, share: float) -> None:
        """Let the learning rate be this share of what it was at first."""
        self.optimiser.param_groups[0]["lr"] = share * self.rate

    def step(self, grad: Tensor, weight: Tensor | None) -> None:
        """One step of the optimiser; weights act where images are made."""
        self.point.grad = grad.nan_to_num(0.0, 0.0, 0.0)
        self.optimiser.step()
        self.point.grad = None

    def round_images(self, x_adv: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest 8-bit images, all of them allowed."""
        rounded = torch.where(self.free[index], quantise(x_adv), self.x[index])
        return rounded, torch.ones(len(index), dtype=torch.bool, device=x_adv.device)

    def blend(self, moved: Tensor, weight: Tensor | None) -> Tensor:
        """Part of the way from `x` to `moved`."""
        if weight is not None:
            moved = self.x + weight * (moved - self.x)
        return torch.where(self.free, moved, self.x)


class Tanh(Adaptive):
    """Images ``(tanh(w) + 1) / 2`` at a cost of their squared distance.

    Towards Evaluating the Robustness of Neural Networks, arXiv:1608.04644, section V. Starts at
    `x`; black and white are pulled in by 1e-6, where w is finite and can move.
    """

    def __init__(self, x: Tensor, free: Tensor, rate: float) -> None:
        super().__init__(x, torch.atanh(2 * x.clamp(1e-6, 1 - 1e-6) - 1), free, rate)

    def make_images(self, point: Tensor, weight: Tensor | None) -> Tensor:
        """AdvEdge, arXiv:2211.15926, Eq. 14 with weights."""
        return self.blend((torch.tanh(point) + 1) / 2, weight)

    def price_change(self, point: Tensor, x_adv: Tensor) -> Tensor:
        """Price of a change: its squared l2 length ``(n,)``."""
        return (x_adv - self.x).square().flatten(1).sum(1)


class Flow(Adaptive):
    """Images whose pixels are moved, at a cost of what neighbours move differently.

    Spatially Transformed Adversarial Examples, arXiv:1801.02612, Eq. 2 and 4.

    Parameters
    ----------
    x : Tensor
        Images ``(n, c, h, w)`` in [0, 1].
    free : Tensor
        ``(n, c, h, w)`` bool, False where a value may not change.
    rate : float
        Learning rate, in pixels.
    seeds : Tensor, optional
        One seed per image ``(n,)`` for the first flow, uniform on ±0.1 pixels; zeros if not given.
    tau : float
        Price of the flow.
    neighbours : {"direct", "diagonal"}
        Whose flows are compared: the four next to each other, as in the paper, or the four over
        the corners, as in the code of ADV2 and AdvEdge.
    """

    def __init__(
        self,
        x: Tensor,
        free: Tensor,
        rate: float,
        seeds: Tensor | None,
        *,
        tau: float,
        neighbours: Neighbours,
    ) -> None:
        drawn = torch.zeros(len(x), dtype=torch.int64) if seeds is None else seeds
        start = per_image(drawn, torch.Size((2, *x.shape[2:]))).to(x)
        super().__init__(x, 0.2 * start - 0.1, free, rate)
        self.tau = tau
        self.neighbours: Neighbours = neighbours

    def make_images(self, point: Tensor, weight: Tensor | None) -> Tensor:
        """AdvEdge, arXiv:2211.15926, Eq. 15 with weights."""
        return self.blend(warp(self.x, point), weight)

    def price_change(self, point: Tensor, x_adv: Tensor) -> Tensor:
        """`tau` times `measure_roughness`."""
        return self.tau * measure_roughness(point, self.neighbours)


def warp(x: Tensor, flow: Tensor) -> Tensor:
    """Images whose pixel at (row, column) is taken from there plus the flow, bilinear.

    arXiv:1801.02612, Eq. 2. Places outside the image are those at its border. A flow of zero
    gives `x` to the bit. On the graph of `flow`.

    Parameters
    ----------
    x : Tensor
        Images ``(n, c, h, w)``.
    flow : Tensor
        ``(n, 2, h, w)``, down and right, in pixels.

    Returns
    -------
    Tensor
        ``(n, c, h, w)``, between the least and the greatest value of each image.
    """
    n, c, h, w = x.shape
    rows = torch.arange(h, dtype=flow.dtype, device=flow.device).view(1, h, 1)
    columns = torch.arange(w, dtype=flow.dtype, device=flow.device)
    row = (flow[:, 0] + rows).clamp(0, h - 1)  # (n, h, w)
    column = (flow[:, 1] + columns).clamp(0, w - 1)
    top, left = row.detach().floor(), column.detach().floor()
    down, right = (row - top).unsqueeze(1), (column - left).unsqueeze(1)
    top, left = top.long(), left.long()
    below, beside = (top + 1).clamp_max(h - 1), (left + 1).clamp_max(w - 1)
    pixels = x.flatten(2)

    def read_pixels(row: Tensor, column: Tensor) -> Tensor:
        place = (row * w + column).view(n, 1, h * w).expand(n, c, h * w)
        return pixels.gather(2, place).view(n, c, h, w)

    upper = read_pixels(top, left) * (1 - right) + read_pixels(top, beside) * right
    lower = read_pixels(below, left) * (1 - right) + read_pixels(below, beside) * right
    return (upper * (1 - down) + lower * down).clamp(0, 1)


def measure_roughness(flow: Tensor, neighbours: Neighbours = "direct") -> Tensor:
    """How differently neighbouring pixels move ``(n,)``, summed over all pixels.

    arXiv:1801.02612, Eq. 4: zero for a constant flow. Borders are repeated.

    Parameters
    ----------
    flow : Tensor
        ``(n, 2, h, w)``, in pixels.
    neighbours : {"direct", "diagonal"}
        See `Flow`.

    Returns
    -------
    Tensor
        ``(n,)``, in pixels.
    """
    h, w = flow.shape[2:]
    straight = ((0, 1), (2, 1), (1, 0), (1, 2))
    shifts = straight if neighbours == "direct" else ((0, 0), (0, 2), (2, 0), (2, 2))
    around = F.pad(flow, (1, 1, 1, 1), mode="replicate")
    total = flow.new_zeros(len(flow))
    for down, right in shifts:
        gap = flow - around[:, :, down : down + h, right : right + w]
        # a root has no derivative at zero
        size = (gap.square().sum(1) + 1e-8).sqrt() - 1e-4
        total = total + size.flatten(1).sum(1)
    return total
