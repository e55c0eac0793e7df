"""Distances between images, balls around them, and the lattice of 8-bit images."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from robusteval.models.seeds import per_image

Norm = Literal["linf", "l2"]

# how far beyond eps a float32 image may seem to lie, in units of the [0, 1] pixel range and as
# a share of eps: the difference of two multiples of 1/255 is itself only known to 6e-8
TOLERANCE = 1e-6


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
        if norm not in ("linf", "l2"):
            raise ValueError(f"norm must be linf or l2, not {norm!r}")
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

    def holds(self, z: Tensor) -> Tensor:
        """Which images ``(n,)`` lie in the ball, up to `TOLERANCE`."""
        delta = (z - self.x).flatten(1)
        size = delta.abs().amax(1) if self.norm == "linf" else delta.norm(dim=1)
        return size <= self.eps * (1 + TOLERANCE) + TOLERANCE

    def project(self, z: Tensor) -> Tensor:
        """`z` brought into the ball, without exceeding `eps` by a rounding error."""
        if self.norm == "l2":
            delta = (z - self.x) * (self.upper > self.lower)
            size = _column(delta.flatten(1).norm(dim=1).clamp_min(1e-12))
            # room for the norm's rounding, and for that of each value of x + delta
            room = self.eps * TOLERANCE + 3e-8 * math.sqrt(self.x.shape[1:].numel())
            z = self.x + delta * (max(self.eps - room, 0.0) / size).clamp_max(1)
        return torch.minimum(torch.maximum(z, self.lower), self.upper)

    def quantise(self, z: Tensor) -> Tensor:
        """An 8-bit image near `z`, inside the ball if `x` is an 8-bit image itself.

        Rounds to the nearest and, where that would leave the ball, towards `x`.
        """
        if self.norm == "linf":
            levels = math.floor((self.eps + TOLERANCE) * 255) / 255
            z = torch.minimum(torch.maximum(z, self.x - levels), self.x + levels)
            near = quantise(z)
        else:
            near = quantise(z)
            towards = quantise(self.x + ((z - self.x) * 255).trunc() / 255)
            near = torch.where(_column(self.holds(near)), near, towards)
        return torch.where(self.upper > self.lower, near, self.x)

    def find_direction(self, grad: Tensor) -> Tensor:
        """The direction of unit length along which a function with this gradient rises most."""
        grad = grad.nan_to_num(0.0, 0.0, 0.0)
        if self.norm == "linf":
            return grad.sign()
        grad = grad * (self.upper > self.lower)
        # scaled by the largest entry first: squares of tiny gradients would underflow
        grad = grad / _column(grad.flatten(1).abs().amax(1).clamp_min(1e-38))
        return grad / _column(grad.flatten(1).norm(dim=1).clamp_min(1e-12))

    def sample(self, seeds: Tensor) -> Tensor:
        """One random point per image from its own seed ``(n,)``: uniform in the linf cube,
        uniform in direction on the rim of the l2 ball."""
        if self.norm == "linf":
            draw = per_image(seeds, self.x.shape[1:]).to(self.x)
            return self.project(self.x + self.eps * (2 * draw - 1))
        draw = per_image(seeds, self.x.shape[1:], normal=True).to(self.x)
        size = _column(draw.flatten(1).norm(dim=1).clamp_min(1e-12))
        return self.project(self.x + draw * self.eps / size)


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
        return F.conv2d(F.conv2d(z, column, groups=c), row, groups=c)

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
