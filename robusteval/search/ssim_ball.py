"""SSIM with a whole image as its one window: its two distances, and the ball of the second.

Brunet, Vrscay and Wang, On the mathematical properties of the structural similarity index, IEEE
TIP 21(4), 2012: the two factors of SSIM are one minus a squared metric each, S1 of the means and
S2 of what remains. Everything here is about rows ``(n, N)``, each a window in units of the [0, 1]
pixel range: an image, or one channel of it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from robusteval.search.balls import sum_rows, to_double

C1, C2 = 0.01**2, 0.03**2  # stabilisers of means and of variances

# of the search between bounds: 2 to 5 passes are usual, where the ball holds most of the box a
# few hundred
PASSES = 2000
JOINT = 8  # passes in which both unknowns may move at once
MEAN_TOLERANCE = 1e-10  # in units of the [0, 1] pixel range
RADIUS_TOLERANCE = 1e-9  # of the squared radius, as a share of it
LONGEST = 1e6  # pixel ranges along a direction: beyond this the ball is not what stops


def mean_distance(x: Tensor, y: Tensor) -> Tensor:
    """The metric sqrt(1 - S1) between rows ``(n, N)``, float64 ``(n,)``."""
    mx, my = to_double(x).mean(1), to_double(y).mean(1)
    return (mx - my).abs() / (mx.square() + my.square() + C1).sqrt()


def structure_distance(x: Tensor, y: Tensor) -> Tensor:
    """The metric sqrt(1 - S2) between rows ``(n, N)``, float64 ``(n,)``."""
    x, y = to_double(x), to_double(y)
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    # the stabiliser of a variance, once per value as these are sums
    scale = x.square().sum(1) + y.square().sum(1) + x.shape[1] * C2
    return ((x - y).square().sum(1) / scale).sqrt()


class StructureBall(NamedTuple):
    """The rows in [0, 1] that share the mean of `x` and lie within `eps2` of it.

    Of rows with that mean, ``structure_distance(x, y) <= eps2`` are those with
    ``|y - centre| <= radius``.
    """

    x: Tensor  # (n, N) float64
    centre: Tensor  # (n, N)
    radius: Tensor  # (n, 1)
    free: Tensor | None  # (n, N) bool, what may change; None: everything
    keep_mean: bool  # if not, the mean may move; rows are still within eps2
    exact: bool  # if not, rows are clipped last, which can move the mean and leave the ball

    @classmethod
    def around(
        cls,
        x: Tensor,
        eps2: float,
        free: Tensor | None = None,
        *,
        keep_mean: bool = True,
        exact: bool = True,
        printed: bool = False,
    ) -> StructureBall:
        """The balls around rows ``(n, N)``: arXiv:2106.12731, Eq. 9 and 13.

        `printed` takes the radius as it stands there, whose square is too large by
        ``|x - mean|**2``. To be `exact` takes `keep_mean`.
        """
        x = to_double(x)
        mean = sum_rows(x) / x.shape[1]
        rest = x - mean
        power = sum_rows(rest.square())
        eta = 1 / (1 - eps2**2)
        square = (eta**2 - 1) * power + x.shape[1] * C2 * eta * eps2**2
        if printed:
            square = square + power
        centre = rest.mul_(eta).add_(mean)
        return cls(x, centre, square.sqrt(), free, keep_mean, exact and keep_mean)

    def find_direction(self, grad: Tensor) -> Tensor:
        """The direction of unit length ``(n, N)`` along which the function rises most."""
        w = self._allowed(grad)
        return w / sum_rows(w.square()).sqrt().clamp_min(1e-300)

    def maximise(self, grad: Tensor) -> Tensor:
        """Where a linear function of this gradient ``(n, N)`` is largest; `x` if it is constant.

        arXiv:2106.12731, Eq. 9 solved in closed form or, exact, within [0, 1]; Eq. 10 without
        `keep_mean`.
        """
        return self._along(self._allowed(grad), math.inf)

    def project(self, z: Tensor) -> Tensor:
        """The nearest row to `z` ``(n, N)``."""
        return self._along(self._allowed(to_double(z) - self.centre), 1.0)

    def _allowed(self, w: Tensor) -> Tensor:
        """The part of a direction ``(n, N)`` that may be taken."""
        w = to_double(w)
        if self.free is None:
            return w - sum_rows(w) / w.shape[1] if self.keep_mean else w
        w = w * self.free
        return (w - sum_rows(w) / self._count()) * self.free if self.keep_mean else w

    def _count(self) -> Tensor:
        """Values that may change ``(n, 1)``, one at least."""
        assert self.free is not None
        return sum_rows(self.free).clamp_min(1)

    def _along(self, w: Tensor, most: float) -> Tensor:
        """The point furthest along `w`, `most` lengths of it at most from the centre."""
        square = self.radius.square()
        shift = torch.zeros_like(square)
        lower, upper = shift, shift + 1
        if self.free is not None:
            # what may not change stays at x and uses up some of the radius
            lower, upper = (torch.where(self.free, bound, self.x) for bound in (lower, upper))
            apart = self.x - self.centre
            square = square - sum_rows(apart.square() * ~self.free)
            if self.keep_mean:
                shift = sum_rows(apart * self.free) / self._count()
                square = square - self._count() * shift.square()
        size = sum_rows(w.square()).sqrt()
        t = (square.sqrt() / size).clamp_max(most)
        if self.exact:
            y = self._between(lower, upper, w, most, t, -shift)
        else:
            y = torch.addcmul(self.centre + shift, w, t)
        return torch.where(size > 0, y.clamp(lower, upper), self.x)

    def _between(
        self, lower: Tensor, upper: Tensor, w: Tensor, most: float, t: Tensor, s: Tensor
    ) -> Tensor:
        """``clip(centre + t * w - s)`` with the mean of `x` and the largest t in the ball.

        The conditions of optimality leave these two unknowns per row, of which `t` and `s`
        ``(n, 1)`` are guesses. For a given t the sum falls with s; at the s that keeps the mean,
        the distance to the centre rises with t. So there is a bracket for each, and inside the
        brackets Newton's method for both.
        """
        below, above = lower - self.centre, upper - self.centre  # bounds of y - centre
        total, square = sum_rows(self.x - self.centre), self.radius.square()
        least, largest = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
        lowest, highest = below.amin(1, keepdim=True), above.amax(1, keepdim=True)
        reach = torch.maximum(-least, largest)
        longest = (LONGEST / reach.clamp_min(1e-300)).clamp_max(most)
        # with every value at a bound, or no direction, there is but x
        stuck = (sum_rows(self.x - lower) == 0) | (sum_rows(upper - self.x) == 0) | (reach == 0)
        done = stuck
        t = torch.minimum(t.nan_to_num(0.0), longest)
        t_low, t_high = torch.zeros_like(t), torch.full_like(t, math.inf)
        s_low, s_high = t * least - highest, t * largest - lowest
        z, d, inside = (torch.empty_like(w) for _ in range(3))  # new ones would cost page faults
        for i in range(PASSES):
            torch.mul(w, t, out=z).sub_(s)
            torch.clamp(z, below, above, out=d)
            torch.eq(d, z, out=inside)
            excess, over = sum_rows(d) - total, sum_rows(torch.mul(d, d, out=z)) - square

            # brackets
            s_low, s_high = torch.where(excess > 0, s, s_low), torch.where(excess < 0, s, s_high)
            kept = excess.abs() <= MEAN_TOLERANCE * w.shape[1]
            kept |= s_high - s_low <= 1e-15 * s.abs()
            t_low = torch.where(kept & (over <= 0), t, t_low)
            t_high = torch.where(kept & (over > 0), t, t_high)
            at_rim = (over.abs() <= RADIUS_TOLERANCE * square) | ((over <= 0) & (t >= longest))
            done = done | (kept & (at_rim | (t_high - t_low <= 1e-15 * t_high)))
            if bool(done.all()):
                break

            # Newton: the solution if no other values than these lie between their bounds
            count, first = sum_rows(inside), sum_rows(inside.mul_(w))
            slope = first / count
            spread = sum_rows(inside.mul_(w)) - first * slope
            rise = excess / count
            ahead = over - 2 * rise * (t * first - s * count) + excess * rise
            t_new = torch.minimum((t.square() - ahead / spread).sqrt(), longest)
            halfway = torch.where(t_high < math.inf, (t_low + t_high) / 2, 4 * t)
            halfway = torch.where(kept, torch.minimum(halfway, longest), t)
            t_new = torch.where((t_new > t_low) & (t_new < t_high), t_new, halfway)
            move = ~done & (kept | (i < JOINT)) & (t_new != t)
            t_new = torch.where(move, t_new, t)
            s_low = torch.where(move, t_new * least - highest, s_low)
            s_high = torch.where(move, t_new * largest - lowest, s_high)
            s_new = s + rise + (t_new - t) * slope
            s_new = torch.where((s_new > s_low) & (s_new < s_high), s_new, (s_low + s_high) / 2)
            t, s = t_new, torch.where(done, s, s_new)
        return torch.where(done & ~stuck, self.centre + d, self.x)
