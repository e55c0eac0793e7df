"""What searches for the nearest success keep of each image, and the sizes they measure."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, autograd

from robusteval.search.descent import (
    Count,
    Objective,
    count_changes,
    round_changes,
)

Images = Literal["8bit", "float"]
Distance = Count | Literal["l1", "l2", "linf"]

ORDERS = {"l1": 1.0, "l2": 2.0, "linf": torch.inf}
DUALS: dict[str, Distance] = {"l1": "linf", "l2": "l2", "linf": "l1"}
# the first radius at most: where gradients are faint they foretell far too much
FAR = {"l1": 5.0, "l2": 1.0, "linf": 0.05}
BEYOND = 2.0  # times the distance foretold, so that the boundary is crossed
END = 1e-6  # so near to an end of the pixel range a value stands at it: sums round
COARSER, FINER = 1.2, 0.5  # times the pace, when a step ends where the last one did, or beyond
GLANCE = 10  # steps between two looks for images that are finished
GREY = 1.001 / 255  # one grey level, with room for rounding


class Nearest:
    """The nearest success of each image seen so far, the image itself until there is one.

    Parameters
    ----------
    x : Tensor
        Images ``(n, c, h, w)`` in [0, 1].
    norm : {"l0", "l0_pixels", "l1", "l2", "linf"}
        In which distances are measured.
    images : {"8bit", "float"}
        What is looked at: images whose changed values are 8-bit values, or any image in [0, 1].
    """

    def __init__(self, x: Tensor, norm: Distance, images: Images = "8bit") -> None:
        self.x = x
        self.norm: Distance = norm
        self.images: Images = images
        self.best_adv = x.clone()
        # infinite as long as there is no success
        self.best_norm = x.new_full((len(x),), torch.inf)
        # nothing is nearer than one value, or one grey level
        grey = GREY if images == "8bit" else 0.0
        self.least = 1.0 if norm in ("l0", "l0_pixels") else grey

    def form(self, point: Tensor, origin: Tensor) -> Tensor:
        """The images that points ``(m, c, h, w)`` stand for, near their originals."""
        return round_changes(point, origin) if self.images == "8bit" else point

    def look(
        self, objective: Objective, index: Tensor, point: Tensor, *, last: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Judge the images of points ``(m, c, h, w)`` for rows `index` ``(m,)``.

        What is nearer is kept. Their loss ``(m,)``, which of them succeed ``(m,)``, and the
        gradient of the loss's sum there ``(m, c, h, w)``, zero if this look is the `last`.
        """
        x_adv = self.form(point, self.x[index]).detach().requires_grad_(not last)
        with torch.set_grad_enabled(not last):
            loss, is_adv = objective(x_adv, index)
        grad = torch.zeros_like(x_adv) if last else autograd.grad(loss.sum(), x_adv)[0]
        self.take(index, x_adv.detach(), is_adv)
        return loss.detach().nan_to_num(0.0), is_adv, grad.nan_to_num(0.0, 0.0, 0.0)

    def take(self, index: Tensor, x_adv: Tensor, is_adv: Tensor) -> None:
        """Take over images ``(m, c, h, w)`` for rows `index` where they succeed with less."""
        norm, had = measure_norm(x_adv - self.x[index], self.norm), self.best_norm[index]
        is_both = is_adv & (norm < had)
        before = self.best_adv[index]
        self.best_adv[index] = torch.where(is_both.view(-1, 1, 1, 1), x_adv, before)
        self.best_norm[index] = torch.where(is_both, norm, had)

    def go_back(self, index: Tensor, point: Tensor) -> Tensor:
        """The nearest successes of rows `index` ``(m,)``, their points where there is none."""
        found = self.best_norm[index].isfinite().view(-1, 1, 1, 1)
        return torch.where(found, self.best_adv[index], point)

    def find_unfinished(self, index: Tensor) -> Tensor:
        """Which of rows `index` ``(m,)`` may still find something nearer ``(m,)``."""
        return self.best_norm[index] > self.least


class Searched(NamedTuple):
    """The images that are still searched, a row for each."""

    left: Tensor  # (m,), their rows in the batch
    origin: Tensor  # (m, c, h, w)
    free: Tensor  # (m, c, h, w), one where a value may change
    delta: Tensor  # (m, c, h, w), the changes of the iterate
    most: Tensor  # (m,), the largest radius: the whole pixel range

    @classmethod
    def begin(
        cls, x: Tensor, mask: Tensor | None, norm: Distance, *, steps: int, gamma: float
    ) -> Searched:
        """All images ``(n, c, h, w)``, unchanged; ValueError if a parameter is out of range."""
        if steps < 1:
            raise ValueError(f"steps must be at least 1, not {steps}")
        if not 0 < gamma < 0.5:
            raise ValueError(f"gamma must be between 0 and 0.5, not {gamma:g}")
        free = torch.ones_like(x) if mask is None else (mask != 0).to(x).expand_as(x)
        rows = torch.arange(len(x), device=x.device)
        return cls(rows, x, free, torch.zeros_like(x), measure_reach(x, free, norm))

    def select(self, rows: Tensor) -> Searched:
        """Some of the images."""
        return Searched(*(column[rows] for column in self))


class Radius(NamedTuple):
    """How far each image may change for now, a row for each that is searched."""

    size: Tensor  # (m,), in the norm
    pace: Tensor  # (m,), the share by which it changes per step
    was_adv: Tensor  # (m,) bool, the last iterate succeeded

    @classmethod
    def begin(cls, loss: Tensor, grad: Tensor, norm: Distance, gamma: float) -> Radius:
        """Twice what margins ``(m,)`` and their gradients ``(m, c, h, w)`` foretell, or less."""
        ahead = BEYOND * loss.abs() / measure_norm(grad, DUALS[norm]).clamp_min(1e-38)
        size = ahead.clamp(1e-4 * FAR[norm], FAR[norm])
        return cls(size, torch.full_like(size, gamma), torch.zeros_like(size, dtype=torch.bool))

    def select(self, rows: Tensor) -> Radius:
        """Of some of the images."""
        return Radius(*(column[rows] for column in self))

    def follow(self, is_adv: Tensor, gamma: float) -> Radius:
        """Smaller after a success ``(m,)``, larger after a failure.

        The pace halves when the two take turns and rises by a fifth when they do not, from a
        fiftieth of `gamma` to its double. So a radius comes to rest as soon as it has found the
        boundary, and comes back from far as long as it has not.
        """
        same = is_adv == self.was_adv
        pace = (self.pace * torch.where(same, COARSER, FINER)).clamp(gamma / 50, 2 * gamma)
        return Radius(self.size * torch.where(is_adv, 1 - pace, 1 + pace), pace, is_adv)


def drop_blocked(grad: Tensor, point: Tensor) -> Tensor:
    """Gradients ``(m, c, h, w)`` without values that a step down could not move further.

    Those at an end of the pixel range, which would only take their share of the step's length.
    """
    return grad * ~(((point <= END) & (grad > 0)) | ((point >= 1 - END) & (grad < 0)))


def measure_norm(delta: Tensor, norm: Distance) -> Tensor:
    """The norm ``(n,)`` of changes ``(n, c, h, w)``."""
    if norm == "l0" or norm == "l0_pixels":
        return count_changes(delta, torch.zeros_like(delta), norm).to(delta)
    size: Tensor = torch.linalg.vector_norm(delta.flatten(1), ORDERS[norm], dim=1)
    return size


def measure_reach(x: Tensor, free: Tensor, norm: Distance) -> Tensor:
    """The most that images ``(n, c, h, w)`` can change in [0, 1] where `free` is one: ``(n,)``."""
    return measure_norm(torch.maximum(x, 1 - x) * free, norm)


def scale_to_unit(delta: Tensor) -> Tensor:
    """Changes ``(n, c, h, w)`` of l2 norm 1 along those given; zero stays zero."""
    # by the largest entry first: squares of tiny gradients would underflow
    delta = delta / delta.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-38)
    size = torch.linalg.vector_norm(delta.flatten(1), dim=1).clamp_min(1e-12)
    unit: Tensor = delta / size.view(-1, 1, 1, 1)
    return unit


def fall(begin: float, end: float, share: float) -> float:
    """From `begin` to `end` along half a wave of the cosine, at a share of the way."""
    return end + (begin - end) * (1 + math.cos(math.pi * share)) / 2
