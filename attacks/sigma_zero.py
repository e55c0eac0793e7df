"""The strongest published attack with few changes, and the yardstick for the others."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, autograd, nn

from robusteval.art.art_classes import make_art_class
from robusteval.models.steps import part, tell_step
from robusteval.registry import ATTACKS
from robusteval.search.descent import Count, build_class_objective, prune, round_changes
from robusteval.search.nearest import Nearest

SIGMA = 1e-3  # a change far above its root counts as one
DECAY = (0.9, 0.999)  # of Adam's two averages
PACE = 0.01  # of the threshold, per unit of learning rate


@ATTACKS.add("sigma_zero", norms=("l0", "l0_pixels"), knowledge="white-box")
def sigma_zero(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    targeted: bool = False,
    seeds: Tensor | None = None,
    mask: Tensor | None = None,
    norm: Count = "l0",
    steps: int = 300,
    rate: float = 1.0,
    threshold: float = 0.3,
    polish: int = 30,
) -> Tensor:
    """Few changed values by descent on a smooth count: the l0 attack to start with.

    sigma-zero: Gradient-based Optimization of l0-norm Adversarial Examples, arXiv:2402.01879,
    algorithm 1, with the settings of its authors' code. Departs from that code in moving each
    image's threshold, as the paper says; and from the paper in targets, in counting places instead
    of values, in searching among 8-bit values only and in pruning the result.

    Parameters
    ----------
    model : nn.Module
        Maps images in [0, 1] to logits ``(n, k)``.
    x : Tensor
        Images ``(n, c, h, w)`` in [0, 1].
    y : Tensor
        Labels ``(n,)`` int64, or the classes to reach when `targeted`.
    targeted : bool
        Reach class `y` instead of leaving it.
    seeds : Tensor, optional
        Not used: nothing is random.
    mask : Tensor, optional
        Broadcastable to `x`; zero where a pixel may not change.
    norm : {"l0", "l0_pixels"}
        What should be few: changed values, or places where any channel changed.
    steps : int
        Gradient steps; one forward pass more judges the last iterate.
    rate : float
        Learning rate of Adam at the start, in units of the [0, 1] pixel range; falls to a tenth.
    threshold : float
        Smaller changes are dropped, in units of the [0, 1] pixel range; rises from this value
        while an image fools and falls while it does not.
    polish : int
        Passes of pruning at the end, see `robusteval.search.descent.prune`.

    Returns
    -------
    Tensor
        Images ``(n, c, h, w)`` in [0, 1], for each the success with the fewest changes, all to
        8-bit values; `x` itself where there was none.

    Raises
    ------
    ValueError
        If a parameter is out of range.
    """
    if steps < 1 or polish < 0:
        raise ValueError(f"steps must be at least 1, polish 0, not {steps} and {polish}")
    if not 0 < rate <= 1 or not 0 <= threshold <= 1:
        raise ValueError(
            "rate and threshold must be from 0 to 1, in units of the [0, 1] pixel range, not"
            f" {rate:g} and {threshold:g}"
        )
    objective = build_class_objective(model, y, targeted=targeted, loss="margin")
    kept = Nearest(x, norm)
    left = torch.arange(len(x), device=x.device)  # rows still searched
    origin, free = x, torch.ones_like(x) if mask is None else (mask != 0).to(x).expand_as(x)
    delta, mean, square = (torch.zeros_like(x) for _ in range(3))
    least = torch.full((len(x), 1, 1, 1), threshold, device=x.device)

    passes = steps + 1 + polish  # at most
    for i in range(steps + 1):
        if len(left) == 0:
            break
        tell_step(i, passes)
        last = i == steps
        x_adv = round_changes(origin + delta, origin).requires_grad_(not last)
        with torch.set_grad_enabled(not last):
            loss, is_adv = objective(x_adv, left)
        kept.take(left, x_adv.detach(), is_adv)
        if last:
            break
        # nothing but the count pulls at a success
        grad = autograd.grad(loss.clamp_min(0).sum(), x_adv)[0].nan_to_num(0.0, 0.0, 0.0)
        grad = (grad + differentiate_count(delta, norm)) * free
        grad = grad / grad.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-12)

        # a step of Adam, back into the box
        pace = rate * (0.55 + 0.45 * math.cos(math.pi * i / steps))
        mean = DECAY[0] * mean + (1 - DECAY[0]) * grad
        square = DECAY[1] * square + (1 - DECAY[1]) * grad * grad
        size = square.sqrt() * (1 - DECAY[1] ** (i + 1)) ** -0.5 + 1e-8
        delta = delta - pace / (1 - DECAY[0] ** (i + 1)) * mean / size
        delta = (origin + delta).clamp(0, 1) - origin

        # drop what is small, the more the easier it is
        weight = delta.abs() if norm == "l0" else delta.abs().amax(1, keepdim=True)
        delta = delta * (weight >= least)
        least = least + torch.where(is_adv, pace, -pace).view(-1, 1, 1, 1) * PACE
        least = least.clamp(0, 1)

        # one change cannot become fewer
        going = kept.best_norm[left] > 1
        if not bool(going.all()):
            left, origin, free, delta, mean, square, least = (
                column[going] for column in (left, origin, free, delta, mean, square, least)
            )
    with part(steps + 1, passes, passes):
        return prune(model, x, kept.best_adv, y, targeted=targeted, rounds=polish, count=norm)


def differentiate_count(delta: Tensor, count: Count) -> Tensor:
    """Gradient ``(n, c, h, w)`` of the mean of ``d**2 / (d**2 + sigma)``, Eq. 5.

    Over all values d, or over all places with d the l2 norm of their channels.
    """
    square = delta * delta
    if count == "l0_pixels":
        square = square.sum(1, keepdim=True)  # (n, 1, h, w)
    return 2 * SIGMA / square.shape[1:].numel() * delta / (square + SIGMA).square()


def __getattr__(name: str) -> Any:
    """`SigmaZero`, an ART evasion attack."""
    return make_art_class(name, SigmaZero=sigma_zero)
