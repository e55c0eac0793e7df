"""What searches for the nearest success keep of each image, and the sizes they measure."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, autograd

from robusteval.search.descent import Count, Objective, count_changes, round_changes

Images = Literal["8bit", "float"]
Distance = Count | Literal["l1", "l2", "linf"]

ORDERS = {"l1": 1.0, "l2": 2.0, "linf": torch.inf}
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

    def find_unfinished(self, index: Tensor) -> Tensor:
        """Which of rows `index` ``(m,)`` may still find something nearer ``(m,)``."""
        return self.best_norm[index] > self.least


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
