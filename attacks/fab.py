"""The nearest success by projections onto the linearised boundary of a class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from robusteval.art.art_classes import make_art_class
from robusteval.models.steps import part, tell_step
from robusteval.registry import ATTACKS
from robusteval.search.descent import (
    Objective,
    build_aimed_objective,
    build_class_objective,
)
from robusteval.search.hyperplane import PlaneNorm, project_to_hyperplane
from robusteval.search.nearest import Images, Nearest, measure_norm

PULL = 0.1  # the most that the image itself weighs in a step
BACK = 0.9  # of the way from the image to a success
BEYOND = 0.05  # of a step, to cross the boundary
HALF_LEVEL = 0.51 / 255
FINE = 5  # last steps, of which each goes a tenth as far beyond as the one before
GLANCE = 10  # steps between two looks for images that are finished


@ATTACKS.add(
    "fab",
    norms=("linf", "l2", "l1"),
    knowledge="white-box",
    needs={"targets": {"targeted": (False,)}},
)
def fab(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    targeted: bool = False,
    seeds: Tensor | None = None,
    mask: Tensor | None = None,
    norm: PlaneNorm = "linf",
    images: Images = "8bit",
    steps: int = 100,
    targets: int = 9,
) -> Tensor:
    """The nearest success in a norm: projections onto the boundary, class by class.

    Minimally distorted Adversarial Examples with a Fast Adaptive Boundary Attack,
    arXiv:1907.02044, algorithm 1, in its targeted form of arXiv:2003.01690: a search for each of
    the likeliest other classes. Departs from it in one forward pass per step instead of two, since
    the plane at a success serves for the step back from it as well; in last steps that only
    project the image itself, ever less beyond the plane, which on a linear model end at the
    optimum; and in no random restarts.

    Parameters
    ----------
    model : nn.Module
        Maps images in [0, 1] to logits ``(n, k)``.
    x : Tensor
        Images ``(n, c, h, w)`` in [0, 1].
    y : Tensor
        Labels ``(n,)`` int64, or the classes to reach when `targeted`.
    targeted : bool
        Reach class `y` instead of leaving it, in one search.
    seeds : Tensor, optional
        Not used: nothing is random.
    mask : Tensor, optional
        Broadcastable to `x`; zero where a pixel may not change.
    norm : {"linf", "l2", "l1"}
        What should be small.
    images : {"8bit", "float"}
        The nearest of 8-bit images, whose success survives saving, or of all images.
    steps : int
        Gradient steps per class; one forward pass more judges the last iterate.
    targets : int
        Classes that are searched for, by their logits at `x`; all others if there are fewer.

    Returns
    -------
    Tensor
        Images ``(n, c, h, w)`` in [0, 1], for each the nearest success seen along the path; `x`
        itself where there was none. Distances are in units of the [0, 1] pixel range.

    Raises
    ------
    ValueError
        If a parameter is out of range.
    """
    if steps < 1 or targets < 1:
        raise ValueError(f"steps and targets must be at least 1, not {steps} and {targets}")
    kept = Nearest(x, norm, images)
    free = torch.ones_like(x) if mask is None else (mask != 0).to(x).expand_as(x)
    if len(x) == 0:
        return kept.best_adv
    if targeted:
        objective = build_class_objective(model, y, targeted=True, loss="margin")
        search_boundary(objective, kept, free, norm=norm, steps=steps)
        return kept.best_adv
    with torch.no_grad():
        logits = model(x)  # (n, k)
    others = logits.scatter(1, y.unsqueeze(1), -torch.inf)
    others = others.argsort(dim=1, descending=True, stable=True)
    count = min(targets, logits.shape[1] - 1)
    for k, target in enumerate(others[:, :count].unbind(1)):
        objective = build_aimed_objective(model, y, target, "margin")
        with part(k, k + 1, count):
            search_boundary(objective, kept, free, norm=norm, steps=steps)
    return kept.best_adv


def search_boundary(
    objective: Objective, kept: Nearest, free: Tensor, *, norm: PlaneNorm, steps: int
) -> None:
    """Walk along the boundary of the objective's loss, nearer to each image; fills `kept`."""
    left = kept.find_unfinished(torch.arange(len(free), device=free.device)).nonzero().flatten()
    origin, free = kept.x[left], free[left]
    delta = torch.zeros_like(origin)  # a change of nothing stays one, where a blend would round
    for i in range(steps + 1):
        if len(left) == 0:
            break
        tell_step(i, steps + 1)
        last = i == steps
        image = kept.form(origin + delta, origin)
        loss, is_adv, grad = kept.look(objective, left, origin + delta, last=last)
        if last:
            break
        grad = grad * free

        # step back from a success, and on to the plane from there and from the image itself
        delta = torch.where(is_adv.view(-1, 1, 1, 1), BACK * delta, delta)
        ahead = loss + (grad * (origin + delta - image)).flatten(1).sum(1)
        whole = loss + (grad * (origin - image)).flatten(1).sum(1)
        near = project_to_hyperplane(origin + delta, grad, -ahead, norm)
        far = project_to_hyperplane(origin, grad, -whole, norm)
        fine = i + FINE - steps
        if fine < 0:
            sizes = measure_norm(near, norm), measure_norm(far, norm)
            weight = sizes[0] / (sizes[0] + sizes[1]).clamp_min(1e-38)
            weight = weight.clamp_max(PULL).view(-1, 1, 1, 1)
            delta = (1 - weight) * (delta + (1 + BEYOND) * near) + weight * (1 + BEYOND) * far
        else:
            delta = (1 + BEYOND * 10.0**-fine) * far
        if kept.images == "8bit":  # less than half a level would be rounded to nothing
            largest = delta.abs().amax((1, 2, 3), keepdim=True)
            delta = delta * (HALF_LEVEL / largest.clamp_min(1e-12)).clamp_min(1)
        delta = (origin + delta).clamp(0, 1) - origin

        if i % GLANCE == 0:
            going = kept.find_unfinished(left)
            left, origin, free, delta = (column[going] for column in (left, origin, free, delta))


def __getattr__(name: str) -> Any:
    """`FAB`, an ART evasion attack."""
    return make_art_class(name, FAB=fab)
