"""Distances between images, balls around them, and the lattice of 8-bit images."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from robusteval.models.seeds import per_image

Norm = Literal["linf", "l2", "l1"]

# how far beyond eps a float32 image may seem to lie, in units of the [0, 1] pixel range and as
# a share of eps: the difference of two multiples of 1/255 is itself only known to 6e-8
TOLERANCE = 1e-6
PASSES = 24  # of the search for what changes shrink by under l1, at most: four are usual


def measure_distances(x_adv: Tensor, x: Tensor) -> dict[str, Tensor]:
    """Distances of each image ``(n, c, h, w)`` from its original, float64 ``(n,)``.

    `l0` counts values, `l0_pixels` places where any channel changed; l1, l2 and linf are in
    units of the [0, 1] pixel range.
    """
    delta = to_double(x_adv) - to_double(x)
    flat = delta.flatten(1)
    return {
        "l0": flat.ne(0).sum(1).double(),
        "l0_pixels": delta.ne(0).any(1).flatten(1).sum(1).double(),
        "l1": flat.abs().sum(1),
        "l2": flat.square().sum(1).sqrt(),
        "linf": flat.abs().amax(1) if flat.numel() else flat.new_zeros(len(flat)),
    }


def measure_box(norm: str, shape: tuple[int, int, int]) -> float | None:
    """Distance of a black image ``(c, h, w)`` from a white one: a larger radius is no limit.

    None for what is no norm with a radius in units of the [0, 1] pixel range.
    """
    values = math.prod(shape)
    return {"linf": 1.0, "l2": math.sqrt(values), "l1": float(values)}.get(norm)


def to_double(x: Tensor) -> Tensor:
    """The tensor in float64, on the CPU where the device has no such type."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def quantise(x: Tensor) -> Tensor:
    """The nearest 8-bit image: every value the float32 nearest to a multiple of 1/255."""
    # CUDA divides by a Python number through its reciprocal, which misses the last bit
    return x.mul(255).round().clamp(0, 255) / x.new_tensor(255.0)


class Ball(NamedTuple):
    """The images in [0, 1] within `eps` of `x`, a norm ball cut by the pixel box."""

    x: Tensor  # (n, c, h, w)
    norm: Norm
    eps: float
    lower: Tensor  # (n, c, h, w), bounds of each value; equal where a mask forbids a change
    upper: Tensor

    @classmethod
    def around(cls, x: Tensor, norm: Norm, eps: float, mask: Tensor | None = None) -> Ball:
        """The ball of radius `eps`, in units of the [0, 1] pixel range.

        `mask`, broadcastable to `x`, is zero where a pixel may not change. ValueError for a norm
        or radius that makes no sense.
        """
        if norm not in get_args(Norm):
            raise ValueError(f"norm must be linf, l2 or l1, not {norm!r}")
        if not 0 <= eps < math.inf or (norm == "linf" and eps > 1):
            most = "from 0 to 1" if norm == "linf" else "0 or more"
            raise ValueError(
                f"eps must be {most} for {norm}, in units of the [0, 1] pixel range"
                f" (8/255 is eight grey levels), not {eps:g}"
            )
        if norm == "linf":
            # x + eps in float32 can lie a last bit beyond eps: round the bounds towards x
            exact, lower, upper = to_double(x), to_double(x) - eps, to_double(x) + eps
            lower, upper = lower.to(x), upper.to(x)
            far = (to_double(upper) - exact > eps).to(x.device)
            upper = torch.where(far, torch.nextafter(upper, x), upper)
            far = (exact - to_double(lower) > eps).to(x.device)
            lower = torch.where(far, torch.nextafter(lower, x), lower)
            lower, upper = lower.clamp(0, 1), upper.clamp(0, 1)
        else:
            lower, upper = torch.zeros_like(x), torch.ones_like(x)
        if mask is not None:
            lower, upper = torch.where(mask != 0, lower, x), torch.where(mask != 0, upper, x)
        return cls(x, norm, eps, lower, upper)

    def pick(self, index: Tensor) -> Ball:
        """The balls around some of the images."""
        lower, upper = self.lower[index], self.upper[index]
        return self._replace(x=self.x[index], lower=lower, upper=upper)

    def holds_a_level(self) -> bool:
        """Whether `eps` is enough to change a single value by one of 255 grey levels."""
        return self.eps * (1 + TOLERANCE) + TOLERANCE >= 1 / 255

    def holds(self, z: Tensor) -> Tensor:
        """Which images ``(n,)`` lie in the ball, up to `TOLERANCE`."""
        size = measure_distances(z, self.x)[self.norm].to(z.device)
        return size <= self.eps * (1 + TOLERANCE) + TOLERANCE

    def project(self, z: Tensor) -> Tensor:
        """`z` brought into the ball, without exceeding `eps` by a rounding error.

        linf and l1: the nearest point. l2: into the ball first, then into the box.
        """
        if self.norm == "l1":
            z = project_l1(z, self.x, self.lower, self.upper, self.eps)
        if self.norm == "l2":
            delta = (z - self.x) * (self.upper > self.lower)
            size = _column(delta.flatten(1).norm(dim=1).clamp_min(1e-12))
            # room for the norm's rounding, and for that of each value of x + delta
            room = self.eps * TOLERANCE + 3e-8 * math.sqrt(self.x.shape[1:].numel())
            z = self.x + delta * (max(self.eps - room, 0.0) / size).clamp_max(1)
        return z.clamp(self.lower, self.upper)

    def quantise(self, z: Tensor) -> Tensor:
        """An 8-bit image near `z`, inside the ball if `x` is an 8-bit image itself.

        Rounds to the nearest where that stays inside. Else, under linf, towards `x`; under l2 and
        l1 towards `x` first, then up again where most of a level is missing, as far as `eps` goes.
        """
        if self.norm == "linf":
            levels = math.floor((self.eps + TOLERANCE) * 255) / 255
            z = torch.minimum(torch.maximum(z, self.x - levels), self.x + levels)
            near = quantise(z)
        else:
            near = quantise(z)
            for second in (_round_within(z, self), _round_towards(z, self.x)):
                near = torch.where(_column(self.holds(near)), near, second)
        return torch.where(self.upper > self.lower, near, self.x)

    def find_direction(self, grad: Tensor) -> Tensor:
        """The direction of unit length along which a function with this gradient rises most.

        Under l1 that is the one value whose entry is largest; `find_sparse_direction` has more.
        """
        if self.norm == "l1":
            return self.find_sparse_direction(grad, torch.ones(len(grad), device=grad.device))
        grad = grad.nan_to_num(0.0, 0.0, 0.0)
        if self.norm == "linf":
            return grad.sign_()
        grad = grad * (self.upper > self.lower)
        # scaled by the largest entry first: squares of tiny gradients would underflow
        grad = grad / _column(grad.flatten(1).abs().amax(1).clamp_min(1e-38))
        return grad / _column(grad.flatten(1).norm(dim=1).clamp_min(1e-12))

    def find_sparse_direction(
        self, grad: Tensor, width: Tensor, stuck: Tensor | None = None
    ) -> Tensor:
        """Signs of the `width` ``(n,)`` largest entries of a gradient, of l1 length one together.

        arXiv:2103.01208, section 3.2. Entries as large as the last one taken are taken too. Departs
        from the paper where values are `stuck` ``(n, c, h, w)``, at their bound: as long as there
        are others, one of those is taken, so that the step leads somewhere.
        """
        grad = grad.nan_to_num(0.0, 0.0, 0.0) * (self.upper > self.lower)
        size = grad.abs()
        free = size if stuck is None else size.masked_fill(stuck, 0.0)
        nth = width.long().clamp(1, size[0].numel())
        least = find_nth_largest(size.flatten(1), nth)
        most = free.flatten(1).amax(1)
        least = torch.where(most > 0, torch.minimum(least, most), least)
        taken = size >= _column(least)
        length = (taken & (free > 0)).flatten(1).sum(1).clamp_min(1)
        return grad.sign() * taken / _column(length)

    def sample(self, seeds: Tensor) -> Tensor:
        """One random point per image from its own seed ``(n,)``: uniform in the linf cube,
        uniform in direction on the rim of the l2 ball, uniform on the rim of the l1 ball."""
        if self.norm == "linf":
            draw = per_image(seeds, self.x.shape[1:]).to(self.x)
            return self.project(self.x + self.eps * (2 * draw - 1))
        if self.norm == "l1":
            draw = 2 * per_image(seeds, self.x.shape[1:]).to(self.x) - 1
            draw = draw.sign() * -torch.log1p(-draw.abs())  # Laplace: exponential with a sign
            size = _column(draw.flatten(1).abs().sum(1).clamp_min(1e-12))
            return self.project(self.x + draw * self.eps / size)
        draw = per_image(seeds, self.x.shape[1:], normal=True).to(self.x)
        size = _column(draw.flatten(1).norm(dim=1).clamp_min(1e-12))
        return self.project(self.x + draw * self.eps / size)


def project_l1(z: Tensor, x: Tensor, lower: Tensor, upper: Tensor, eps: float | Tensor) -> Tensor:
    """The nearest image to `z` within `lower`, `upper` and l1 distance `eps` of `x`.

    Mind the box! l1-APGD for sparse adversarial attacks on image classifiers, arXiv:2103.01208,
    Prop. 2.1: each change shrinks by the same lambda and stops at its bound. Departs from it in
    finding lambda by Newton's method in a bracket, where the paper sorts: the sum of changes falls
    with lambda in straight pieces, of which few are left after a few passes, and sorting would take
    most of the time of a step besides the network. All images are ``(n, c, h, w)``, and `eps`
    one number or ``(n,)``; in float64, and no image leaves the ball by a rounding error.
    """
    exact = to_double(x).flatten(1)
    v = to_double(z).flatten(1) - exact  # (n, d)
    up, down = to_double(upper).flatten(1) - exact, exact - to_double(lower).flatten(1)
    room, size = torch.where(v > 0, up, down), v.abs()
    if isinstance(eps, Tensor):
        eps = to_double(eps).unsqueeze(1)  # (n, 1)
    goal, slack = eps * (1 - 1e-10), eps * 1e-10

    # at `low` the sum is above eps, at `high` it is not; at zero it may not be either
    low, high = size.new_zeros(len(size), 1), size.amax(1, keepdim=True)
    guess, done = low, torch.zeros_like(low, dtype=torch.bool)
    rest, change, falls = (torch.empty_like(size) for _ in range(3))  # new ones cost page faults
    for i in range(PASSES):
        torch.sub(size, guess, out=rest)
        torch.minimum(torch.clamp(rest, min=0, out=change), room, out=change)
        torch.eq(change, rest, out=falls)
        over = sum_rows(change) - goal
        fits = over <= slack
        # an image that is done stays as it is, whatever the others still take
        low, high = torch.where(fits, low, guess), torch.where(fits & ~done, guess, high)
        done = done | (over.abs() <= slack) | (fits & (guess == 0))
        if z.device.type == "cpu" and bool(done.all()):  # elsewhere the host would wait
            break
        guess = guess + over / sum_rows(falls)
        # out of the bracket, or not a number where nothing falls: halve it, and now and then anyway
        halve = (i % 4 == 3) | ~((guess > low) & (guess < high))
        guess = torch.where(halve, (low + high) / 2, guess)
    delta = v.sign() * torch.minimum((size - high).clamp_min(0), room)

    near = (exact + delta).to(x)
    # a value of float32 can lie a last bit beyond: round towards x
    far = ((to_double(near) - exact).abs() > delta.abs()).to(near.device)
    return torch.where(far, torch.nextafter(near, x.flatten(1)), near).view_as(z)


def _round_towards(z: Tensor, x: Tensor) -> Tensor:
    """`z` with each change as whole levels, rounded towards `x`."""
    return quantise(x + ((z - x) * 255).trunc() / 255)


def _round_within(z: Tensor, ball: Ball) -> Tensor:
    """The same, then up where less than half a level is missing, least first, as eps allows."""
    power = 2 if ball.norm == "l2" else 1
    delta = to_double(z - ball.x).flatten(1) * 255  # (n, d), in levels
    whole = delta.abs().floor()
    missing, order = (whole + 1 - delta.abs()).sort(dim=1, stable=True)
    price = ((whole + 1) ** power - whole**power).gather(1, order)
    budget = (ball.eps * (1 + TOLERANCE) * 255) ** power - (whole**power).sum(1, keepdim=True)
    paid = (price.cumsum(1) <= budget) & (missing <= 0.5)  # whole numbers: exact in any order
    levels = whole + torch.zeros_like(whole).scatter(1, order, paid.to(whole))
    change = (delta.sign() * levels / 255).to(ball.x).view_as(z)
    return quantise(ball.x + change)


def sum_rows(values: Tensor) -> Tensor:
    """Row sums ``(n, 1)`` in float64 of ``(n, d)``, the same bits in any company.

    A single long row would be summed in as many parts as there are threads.
    """
    rows = values.expand(2, -1) if len(values) == 1 else values
    return rows.sum(1, keepdim=True, dtype=torch.float64)[: len(values)]


def find_nth_largest(values: Tensor, nth: Tensor) -> Tensor:
    """The `nth` ``(n,)`` largest, counted from 1, of each row ``(n, d)`` of numbers from 0 up.

    Exact, by halving and not by sorting: the bits of such float32 numbers are in the order of the
    numbers.
    """
    bits = values.float().contiguous().view(torch.int32)
    low, high = torch.zeros_like(bits[:, :1]), bits.amax(1, keepdim=True) + 1
    above = torch.empty_like(values, dtype=torch.float32)
    for _ in range(31):
        middle = low + (high - low) // 2
        torch.ge(bits, middle, out=above)
        enough = above.sum(1, keepdim=True) >= nth.unsqueeze(1)  # whole numbers: exact
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return low.view(torch.float32).squeeze(1)


def _column(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity of each pair of images ``(n, c, h, w)`` in [0, 1], ``(n,)``.

    Wang et al., Image quality assessment: from error visibility to structural similarity,
    IEEE TIP 13(4), 2004: Gaussian window of 11 pixels and deviation 1.5, K = (0.01, 0.03), mean
    over windows that lie inside the image and over channels. An image smaller than the window
    gets the largest odd window that fits.
    """
    size = min(11, *(edge - 1 + edge % 2 for edge in x.shape[2:]))
    return ssim_map(x, y, bell(size, x)).flatten(1).mean(1)


def bell(size: int, like: Tensor) -> Tensor:
    """The weights of a Gaussian window of deviation 1.5 pixels along one edge ``(size,)``.

    With dtype and device of `like`.
    """
    at = torch.arange(size, dtype=like.dtype, device=like.device) - size // 2
    weights = torch.exp(-at.square() / (2 * 1.5**2))
    return weights / weights.sum()


def ssim_map(x: Tensor, y: Tensor, window: Tensor) -> Tensor:
    """Structural similarity ``(n, c, h - k + 1, w - k + 1)`` in every window inside the images.

    `window` ``(k,)`` holds the weights along one edge, which sum to one.
    """
    c = x.shape[1]
    column = window.view(1, 1, -1, 1).expand(c, 1, -1, 1)
    row = window.view(1, 1, 1, -1).expand(c, 1, 1, -1)

    def mean(z: Tensor) -> Tensor:
        # one image of one channel goes through another kernel, which sums in another order
        pair = torch.cat([z, z]) if len(z) == 1 else z
        return F.conv2d(F.conv2d(pair, column, groups=c), row, groups=c)[: len(z)]

    mx, my = mean(x), mean(y)
    vx, vy, vxy = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mx * my + c1) / (mx * mx + my * my + c1)
    structure = (2 * vxy + c2) / (vx + vy + c2)
    return luminance * structure


def psnr(x_adv: Tensor, x: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in decibels ``(n,)``, infinite for equal images."""
    error = (to_double(x_adv) - to_double(x)).flatten(1).square().mean(1)
    return -10 * error.log10()
