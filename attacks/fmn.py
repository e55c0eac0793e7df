"""The nearest success in l0, l1, l2 or linf, by projections onto a ball of adapted radius."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from robusteval.art.art_classes import make_art_class
from robusteval.models.steps import tell_step
from robusteval.registry import ATTACKS
from robusteval.search.balls import Ball, project_l1
from robusteval.search.descent import count_changes
from robusteval.search.nearest import (
    END,
    GLANCE,
    Images,
    Nearest,
    Radius,
    Searched,
    drop_blocked,
    fall,
    measure_norm,
    scale_to_unit,
)
from robusteval.search.rounds import NearObjective, Rounds

Shortest = Literal["linf", "l2", "l1", "l0"]
WIDTH = 0.2  # share of the values that the first step moves in l1
NARROWER = 1.5  # by which the number of changed values is divided for that of a step
FINAL = 0.8  # share of a round in l1 after which values are moved one by one


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
    algorithm 1. Departs from it in steps that are measured in radii and not in absolute length, for
    linf along the gradient's sign, for l1 along the signs of its largest entries, about as many as
    arXiv:2103.01208 takes, for l0 as long as a change of that many values by the whole pixel range;
    but for l0 in a first radius of twice the distance that the gradient foretells, within limits,
    as faint gradients foretell far too much, and in a change of the radius that becomes finer where
    it crosses the boundary and coarser where it does not, image by image; and for l1 in a
    projection that knows the pixel range, and in last steps of one value each from the nearest
    success. In all norms values at the end of their range take no part in a step that would push
    them further, and what is lowered is a soft margin that becomes the margin near the boundary.
    Many steps are spent in rounds of about a hundred, by turns on from the nearest success and from
    the image anew, at one of the likeliest classes. Images are rounded to 8 bits where they are
    looked at, but the search goes on from what was rounded.

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
        Share of the radius by which it changes per step at first, below 0.5; later from a fiftieth
        to the double of it, in l0 falling to a fiftieth.

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
    searched = Searched.begin(x, mask, norm, steps=steps, gamma=gamma)
    objective = NearObjective(model, y, targeted=targeted)
    kept, rounds = Nearest(x, norm, images), Rounds(steps, gamma)
    ball = Ball.around(x, "l1", 0.0, searched.free)  # for its bounds alone
    radius = None

    for i in range(steps + 1):
        left, origin, free, delta, most = searched
        if len(left) == 0:
            break
        tell_step(i, steps + 1)
        last = i == steps
        share, point = rounds.share(i), origin + delta
        if radius is not None and share == 0 and not last:
            point, radius = rounds.begin(i, objective, kept, left, point, radius)
        elif norm == "l1" and rounds.enters(i, FINAL) and not last:  # one by one from here
            point = kept.go_back(left, point)
        delta = point - origin
        loss, is_adv, grad = kept.look(objective, left, point, last=last)
        if last:
            break
        grad = drop_blocked(grad * free, point)

        # the radius: smaller if it fools, larger if not
        if norm == "l0":
            count = torch.zeros_like(most) if radius is None else radius.size
            pace = torch.full_like(count, fall(gamma, gamma / 50, share))
            less = torch.minimum(count - 1, (count * (1 - pace)).floor())
            less = torch.minimum(less, kept.best_norm[left]).clamp_min(0)
            more = torch.maximum(count + 1, (count * (1 + pace)).floor())
            radius = Radius(torch.where(is_adv, less, more), pace, is_adv)
        elif radius is None:
            radius = Radius.begin(loss, grad, norm, gamma)
        else:
            radius = radius.follow(is_adv, gamma)
        radius = radius._replace(size=torch.minimum(radius.size, most))

        # a step, back into the ball and into the box
        length, eps = fall(1.0, 0.01, share), radius.size.view(-1, 1, 1, 1)
        if norm == "linf":
            delta = delta - length * eps * grad.sign()
        elif norm == "l2":
            delta = delta - length * eps * scale_to_unit(grad)
        elif norm == "l1":
            width = choose_width(origin, point, kept.best_adv[left])
            if share >= FINAL:  # one value at a time
                width = torch.ones_like(width)
            delta = delta - length * eps * ball.find_sparse_direction(grad, width)
        else:  # long enough for as many values to cross the whole pixel range
            delta = delta - length * eps.clamp_min(1.0).sqrt() * scale_to_unit(grad)
        if norm == "l1":
            delta = project_l1(origin + delta, origin, ball.lower, ball.upper, radius.size) - origin
        else:
            delta = (origin + shrink_to_ball(delta, radius.size, norm)).clamp(0, 1) - origin
        searched = searched._replace(delta=delta)

        if i % GLANCE == 0:
            going = kept.find_unfinished(left)
            radius, searched = radius.select(going), searched.select(going)
            ball = ball.pick(going)
    return kept.best_adv


def choose_width(origin: Tensor, point: Tensor, nearest: Tensor) -> Tensor:
    """How many values a step in l1 moves ``(m,)``: fewer than in the nearest success could move.

    Those at an end of their range do not count, so that steps end in the few that share what is
    left. Before there is a success, fewer than are changed now.
    """
    inside = (nearest != origin) & (nearest > END) & (nearest < 1 - END)
    now = count_changes(point, origin, "l0")
    changed = torch.where((nearest != origin).flatten(1).any(1), inside.flatten(1).sum(1), now)
    first = torch.full_like(changed, int(WIDTH * origin[0].numel()))
    narrower = (changed / NARROWER).round().long()
    return torch.where(now > 0, narrower, first).clamp_min(1)


def shrink_to_ball(delta: Tensor, eps: Tensor, norm: Shortest) -> Tensor:
    """The changes ``(n, c, h, w)`` of norm `eps` ``(n,)`` at most that are nearest in l2.

    In linf, l2 and l0; ties in l0 fall to the first.
    """
    radius = eps.view(-1, 1, 1, 1)
    if norm == "linf":
        return torch.minimum(torch.maximum(delta, -radius), radius)
    if norm == "l2":
        size = measure_norm(delta, "l2").clamp_min(1e-12).view(-1, 1, 1, 1)
        return delta * (radius / size).clamp_max(1)
    size = delta.abs().flatten(1)
    ranks = torch.arange(size.shape[1], device=size.device)
    order = size.argsort(dim=1, descending=True, stable=True)
    kept = torch.zeros_like(size).scatter(1, order, (ranks < eps.unsqueeze(1)).to(size))
    return delta * kept.view_as(delta)


def __getattr__(name: str) -> Any:
    """`FMN`, an ART evasion attack."""
    return make_art_class(name, FMN=fmn)
