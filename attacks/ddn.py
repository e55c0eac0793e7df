"""The nearest success in l2, direction and distance apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from robusteval.art.art_classes import make_art_class
from robusteval.models.steps import tell_step
from robusteval.registry import ATTACKS
from robusteval.search.nearest import (
    GLANCE,
    Images,
    Nearest,
    Radius,
    Searched,
    drop_blocked,
    fall,
    scale_to_unit,
)
from robusteval.search.rounds import NearObjective, Rounds


@ATTACKS.add("ddn", norms=("l2",), knowledge="white-box")
def ddn(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    targeted: bool = False,
    seeds: Tensor | None = None,
    mask: Tensor | None = None,
    images: Images = "8bit",
    steps: int = 100,
    gamma: float = 0.05,
) -> Tensor:
    """The nearest success in l2: a radius that shrinks while it fools and grows while it does not.

    Decoupling Direction and Norm for Efficient Gradient-Based L2 Adversarial Attacks and Defenses,
    arXiv:1811.09600, algorithm 1. Departs from it in starting at twice the distance to the class
    boundary that the first gradient foretells, if that is below 1; in steps that are measured in
    radii and not in absolute length, and spend none of it on values at the end of their range; in
    a change of the radius that becomes finer where it crosses the boundary and coarser where it
    does not, image by image; and in lowering a soft margin that becomes the margin near the
    boundary, where cross-entropy would not end at the nearest point. Many steps are spent in rounds
    of about a hundred, by turns on from the nearest success and from the image anew, at one of the
    likeliest classes. Images are rounded to 8 bits where they are looked at, but the search goes on
    from what was rounded.

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
    images : {"8bit", "float"}
        The nearest of 8-bit images, whose success survives saving, or of all images.
    steps : int
        Gradient steps; one forward pass more judges the last iterate.
    gamma : float
        Share of the radius by which it changes per step at first, below 0.5; later from a fiftieth
        to the double of it.

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
    searched = Searched.begin(x, mask, "l2", steps=steps, gamma=gamma)
    objective = NearObjective(model, y, targeted=targeted)
    kept, rounds = Nearest(x, "l2", images), Rounds(steps, gamma)
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
            delta = point - origin
        loss, is_adv, grad = kept.look(objective, left, point, last=last)
        if last:
            break
        grad = drop_blocked(grad * free, point)

        # shrink what fools, grow what does not
        if radius is None:
            radius = Radius.begin(loss, grad, "l2", gamma)
        else:
            radius = radius.follow(is_adv, gamma)
        radius = radius._replace(size=torch.minimum(radius.size, most))

        # turn, then back to the sphere and into the box
        eps = radius.size.view(-1, 1, 1, 1)
        delta = delta - fall(1.0, 0.01, share) * eps * scale_to_unit(grad)
        delta = (origin + eps * scale_to_unit(delta)).clamp(0, 1) - origin
        searched = searched._replace(delta=delta)

        if i % GLANCE == 0:
            going = kept.find_unfinished(left)
            radius, searched = radius.select(going), searched.select(going)
    return kept.best_adv


def __getattr__(name: str) -> Any:
    """`DDN`, an ART evasion attack."""
    return make_art_class(name, DDN=ddn)
