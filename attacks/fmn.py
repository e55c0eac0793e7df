"""The nearest success in l0, l1, l2 or linf, by projections onto a ball of adapted radius."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from robusteval.art.to_art import ArtAttack
from robusteval.models.steps import tell_step
from robusteval.registry import ATTACKS
from robusteval.search.descent import build_class_objective
from robusteval.search.nearest import (
    Images,
    Nearest,
    fall,
    measure_norm,
    measure_reach,
    scale_to_unit,
)

Shortest = Literal["linf", "l2", "l1", "l0"]
DUALS: dict[Shortest, Literal["l1", "l2", "linf"]]
DUALS = {"linf": "l1", "l2": "l2", "l1": "linf", "l0": "linf"}
# before the first success: where gradients are faint they foretell far too much
FIRST = {"linf": 0.05, "l2": 1.0, "l1": 5.0, "l0": 1.0}  # the radius that is always allowed
GROW = 1.2  # and how much larger than the change so far it may be from there on
BEYOND = 1.01  # of the distance foretold, so that the boundary is crossed
GLANCE = 10  # steps between two looks for images that are finished


@ATTACKS.add("fmn", norms=("linf", "l2", "l1", "l0"), knowledge="white-box")
def fmn(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    targeted: bool = False,
    seeds: Tensor | None = None,
    mask: Tensor | None = None,
    norm: Shortest = "linf",
    images: Images = "8bit",
    steps: int = 100,
    gamma: float = 0.05,
) -> Tensor:
    """The nearest success in a norm: gradient steps inside a ball whose radius follows success.

    Fast Minimum-norm Adversarial Attacks through Adaptive Norm Constraints, arXiv:2102.12827,
    algorithm 1. Departs from it, for linf and l2, in steps that are measured in radii and not in
    absolute length, for linf along the sign of the gradient: at equal passes both end nearer. And
    in a first radius a hundredth beyond what the gradient foretells, without which a linear model
    is met exactly at its boundary and never crossed; until the first success the radius grows by a
    fifth per step at most, since faint gradients foretell far too much. Images are rounded to 8
    bits where they are looked at, but the search goes on from what was rounded.

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
    norm : {"linf", "l2", "l1", "l0"}
        What should be small.
    images : {"8bit", "float"}
        The nearest of 8-bit images, whose success survives saving, or of all images.
    steps : int
        Gradient steps; one forward pass more judges the last iterate.
    gamma : float
        Share of the radius by which it changes per step at first; falls to a fiftieth.

    Returns
    -------
    Tensor
        Images ``(n, c, h, w)`` in [0, 1], for each the nearest success seen along the path; `x`
        itself where there was none. Distances are in units of the [0, 1] pixel range, of l0 in
        changed values.

    Raises
    ------
    ValueError
        If a parameter is out of range.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    if not 0 < gamma < 1:
        raise ValueError(f"gamma must be between 0 and 1, not {gamma:g}")
    objective = build_class_objective(model, y, targeted=targeted, loss="margin")
    kept = Nearest(x, norm, images)
    left = torch.arange(len(x), device=x.device)  # rows still searched
    origin, free = x, torch.ones_like(x) if mask is None else (mask != 0).to(x).expand_as(x)
    delta, most = torch.zeros_like(x), measure_reach(x, free, norm)
    eps = torch.ones_like(most) if norm == "l0" else most

    for i in range(steps + 1):
        if len(left) == 0:
            break
        tell_step(i, steps + 1)
        last = i == steps
        loss, is_adv, grad = kept.look(objective, left, origin + delta, last=last)
        if last:
            break
        grad, best = grad * free, kept.best_norm[left]

        # the radius: smaller if it fools, larger if it did once, else as far as the boundary seems
        pace = fall(gamma, gamma / 50, i / steps)
        less, more = eps * (1 - pace), eps * (1 + pace)
        if norm == "l0":
            less, more = torch.minimum(eps - 1, less.floor()), torch.maximum(eps + 1, more.floor())
            eps = torch.where(is_adv, torch.minimum(less, best), more).clamp_min(0)
        else:
            ahead = loss.abs() / measure_norm(grad, DUALS[norm]).clamp_min(1e-38)
            seems = BEYOND * (measure_norm(delta, norm) + ahead)
            seems = torch.minimum(seems, (GROW * measure_norm(delta, norm)).clamp_min(FIRST[norm]))
            more = torch.where(best.isfinite(), more, seems)
            eps = torch.where(is_adv, torch.minimum(less, best), more)
        eps = torch.minimum(eps, most)

        # a step, back into the ball and into the box
        length = fall(1.0, 0.01, i / steps)
        if norm == "linf":
            delta = delta - length * eps.view(-1, 1, 1, 1) * grad.sign()
        elif norm == "l2":
            delta = delta - length * eps.view(-1, 1, 1, 1) * scale_to_unit(grad)
        else:
            delta = delta - length * scale_to_unit(grad)
        delta = (origin + shrink_to_ball(delta, eps, norm)).clamp(0, 1) - origin

        if i % GLANCE == 0:
            going = kept.find_unfinished(left)
            left, origin, free, delta, most, eps = (
                column[going] for column in (left, origin, free, delta, most, eps)
            )
    return kept.best_adv


def shrink_to_ball(delta: Tensor, eps: Tensor, norm: Shortest) -> Tensor:
    """The changes ``(n, c, h, w)`` of norm `eps` ``(n,)`` at most that are nearest in l2."""
    radius = eps.view(-1, 1, 1, 1)
    if norm == "linf":
        return torch.minimum(torch.maximum(delta, -radius), radius)
    if norm == "l2":
        size = measure_norm(delta, "l2").clamp_min(1e-12).view(-1, 1, 1, 1)
        return delta * (radius / size).clamp_max(1)
    size = delta.abs().flatten(1)
    ranks = torch.arange(size.shape[1], device=size.device)
    if norm == "l0":
        order = size.argsort(dim=1, descending=True, stable=True)
        kept = torch.zeros_like(size).scatter(1, order, (ranks < eps.unsqueeze(1)).to(size))
        return delta * kept.view_as(delta)
    # l1: all values are shortened alike, those of no length left stay zero
    longest = size.sort(dim=1, descending=True).values
    cuts = (longest.cumsum(1) - eps.unsqueeze(1)) / (ranks + 1)
    at = ((longest > cuts).sum(1, keepdim=True) - 1).clamp_min(0)
    cut = cuts.gather(1, at).clamp_min(0).view(-1, 1, 1, 1)
    return delta.sign() * (delta.abs() - cut).clamp_min(0)


class FMN(ArtAttack):
    """`fmn` as an ART evasion attack."""

    perturb = staticmethod(fmn)
