"""The ball of the other part of SSIM: means that S1 calls similar, beside the ball of S2.

arXiv:2106.12731, Eq. 8 and 12. For a given mean what is left is the ball of S2 around it, so the
mean is one unknown more: at the end of its interval where the pixel box does not matter, otherwise
found by a search, as what can be gained is concave in it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from robusteval.search.balls import sum_rows, to_double
from robusteval.search.ssim_ball import C1, StructureBall, structure_distance

GOLDEN = (5**0.5 - 1) / 2
SECTIONS = 26  # of the interval of means, down to 4e-6 of it
HALVINGS = 40
INSIDE = 1 + 1e-6  # of eps2, what rounding leaves


class MeanInterval(NamedTuple):
    """The means from which S1 to that of a row is at least ``1 - eps1**2``: ``(n, 1)`` float64."""

    mean: Tensor  # of the row itself
    low: Tensor
    high: Tensor

    @classmethod
    def around(cls, ball: StructureBall, eps1: float, *, printed: bool = False) -> MeanInterval:
        """The interval of the rows of a ball, as far as values in [0, 1] have such means.

        `printed` takes its radius as it stands in the paper, whose square is too large by that of
        the mean.
        """
        n = ball.x.shape[1]
        mean = sum_rows(ball.x) / n
        eta = 1 / (1 - eps1**2)
        square = (eta**2 - 1) * mean.square() + C1 * eta * eps1**2
        radius = (square + mean.square() if printed else square).sqrt()
        ends = [torch.zeros_like(ball.x), torch.ones_like(ball.x)]
        if ball.free is not None:
            ends = [torch.where(ball.free, end, ball.x) for end in ends]
        least, most = (sum_rows(end) / n for end in ends)
        # the mean itself is always in
        low = torch.minimum((eta * mean - radius).clamp_min(least), mean)
        high = torch.maximum(torch.minimum(eta * mean + radius, most), mean)
        return cls(mean, low, high)

    def maximise(self, ball: StructureBall, grad: Tensor, eps2: float) -> Tensor:
        """Where a linear function of this gradient ``(n, N)`` is largest: Eq. 8.

        Exactly in the box if the ball is exact; `x` if the function is constant.
        """
        grad = to_double(grad)
        end = self.mean + self.find_direction(ball, grad)
        moved = move_mean(ball, end - self.mean)
        # without a gradient, and along a constant one, the ball gives what it is around
        flat = (ball.find_direction(grad) == 0).all(1, keepdim=True)
        best = torch.where(flat, moved.x.clamp(0, 1), moved.maximise(grad))
        if not ball.exact:
            return best
        # the end is right where no value is at a bound
        settled = ((best > 0) & (best < 1)).all(1, keepdim=True) & self._lies_inside(
            ball, best, eps2
        )
        value = torch.where(settled, torch.inf, -torch.inf)

        def try_mean(mean: Tensor) -> Tensor:
            nonlocal best, value
            # where there is none the solver would go on looking for long
            far = measure_nearest(move_mean(ball, mean - self.mean)) > ball.radius
            y = move_mean(ball, torch.where(far, 0.0, mean - self.mean)).maximise(grad)
            worth = sum_rows(grad * (y - ball.x))
            inside = ~far & self._lies_inside(ball, y, eps2)
            # no image has this mean and lies in ball and box: the nearer to that of x, the better
            worth = torch.where(inside, worth, -1e30 * (1 + (mean - self.mean).abs()))
            better = inside & (worth > value)
            best, value = torch.where(better, y, best), torch.where(better, worth, value)
            return worth

        if bool(settled.all()):
            return best
        for mean in (self.mean, end):
            try_mean(mean)
        low, high = self.low, self.high
        one, other = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
        worth_one, worth_other = try_mean(one), try_mean(other)
        for _ in range(SECTIONS):
            left = worth_one > worth_other  # the top is left of `other`
            low, high = torch.where(left, low, one), torch.where(left, other, high)
            new = torch.where(left, high - GOLDEN * (high - low), low + GOLDEN * (high - low))
            worth = try_mean(new)
            one, other = torch.where(left, new, other), torch.where(left, one, new)
            worth_one, worth_other = (
                torch.where(left, worth, worth_other),
                torch.where(left, worth_one, worth),
            )
        return torch.where(value > -1e29, best, ball.x)

    def find_direction(self, ball: StructureBall, grad: Tensor) -> Tensor:
        """How far the mean can go where a function of this gradient rises: ``(n, 1)``, signed."""
        allowed = grad if ball.free is None else grad * ball.free
        slope = sum_rows(to_double(allowed))
        way = torch.where(slope > 0, self.high, self.low) - self.mean
        return torch.where(slope == 0, torch.zeros_like(way), way)

    def project(self, ball: StructureBall, z: Tensor, eps2: float) -> Tensor:
        """A row near `z` ``(n, N)`` with a mean of the interval, in the ball around that mean."""
        mean = (sum_rows(to_double(z)) / z.shape[1]).clamp(self.low, self.high)
        y = move_mean(ball, mean - self.mean).project(z)
        return torch.where(self._lies_inside(ball, y, eps2), y, ball.project(z))

    def _lies_inside(self, ball: StructureBall, y: Tensor, eps2: float) -> Tensor:
        """Whether rows are within `eps2` and of a mean of the interval ``(n, 1)``."""
        near = structure_distance(ball.x, y) <= eps2 * INSIDE
        mean, slack = sum_rows(y) / y.shape[1], 1e-8
        return near.unsqueeze(1) & (mean >= self.low - slack) & (mean <= self.high + slack)


def measure_nearest(ball: StructureBall) -> Tensor:
    """How near rows in the box with the mean of a ball come to its centre: ``(n, 1)``.

    The nearest is the centre less one number, clipped; the number is found by halving.
    """
    lower, upper = torch.zeros_like(ball.x), torch.ones_like(ball.x)
    if ball.free is not None:
        lower, upper = (torch.where(ball.free, bound, ball.x) for bound in (lower, upper))
    total = sum_rows(ball.x)
    low, high = ((ball.centre - bound).aminmax(dim=1, keepdim=True) for bound in (upper, lower))
    less, more = low.min, high.max
    y = ball.centre
    for _ in range(HALVINGS):
        middle = (less + more) / 2
        y = (ball.centre - middle).clamp(lower, upper)
        above = sum_rows(y) > total
        less, more = torch.where(above, middle, less), torch.where(above, more, middle)
    return sum_rows((y - ball.centre).square()).sqrt()


def move_mean(ball: StructureBall, by: Tensor) -> StructureBall:
    """The ball of rows whose mean is larger by ``(n, 1)``."""
    free = torch.ones_like(ball.x) if ball.free is None else ball.free.to(ball.x)
    share = ball.x.shape[1] / sum_rows(free).clamp_min(1)
    return ball._replace(x=ball.x + by * share * free, centre=ball.centre + by)
