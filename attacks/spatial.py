"""Images turned and shifted: what a network makes of another view of the same."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from robusteval.art.art_classes import make_art_class
from robusteval.models.steps import tell_step
from robusteval.registry import ATTACKS
from robusteval.search.balls import quantise
from robusteval.search.descent import build_class_objective


@ATTACKS.add("spatial", norms=("spatial",), knowledge="black-box", radius="degrees")
def spatial(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    targeted: bool = False,
    seeds: Tensor | None = None,
    mask: Tensor | None = None,
    degrees: float = 30.0,
    shift: float = 0.1,
    angles: int = 31,
    places: int = 5,
) -> Tensor:
    """The worst of a grid of rotations and shifts.

    Exploring the Landscape of Spatial Robustness, arXiv:1712.02779, section 3: the grid finds more
    than gradients do. What comes in over the border is black. Departs from it in that images are
    rounded to 8 bits, the grid is searched from small moves to large ones, and an image is finished
    at its first success.

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
    degrees : float
        Largest angle to either side, up to 180: the radius of the threat, not in units of the
        [0, 1] pixel range.
    shift : float
        Largest shift up, down and to either side, as a share of the side, up to 1.
    angles : int
        Angles of the grid.
    places : int
        Shifts of the grid in each of both directions.

    Returns
    -------
    Tensor
        Images ``(n, c, h, w)`` in [0, 1]: a success if there is one, else that of lowest margin.

    Raises
    ------
    ValueError
        If a parameter is out of range.
    """
    if not 0 <= degrees <= 180 or not 0 <= shift <= 1:
        raise ValueError(
            f"degrees must be from 0 to 180 and shift from 0 to 1, not {degrees:g} and {shift:g}"
        )
    if angles < 1 or places < 1:
        raise ValueError(f"angles and places must be at least 1, not {angles} and {places}")
    if len(x) == 0:
        return x.clone()
    x = x.detach()
    objective = build_class_objective(model, y, targeted=targeted, loss="margin")
    with torch.no_grad():
        left = torch.arange(len(x), device=x.device)
        score = objective(x, left)
        best, loss, is_adv = x.clone(), score.loss.clone(), score.is_adv.clone()
        moves = list_moves(degrees, shift, angles, places)
        for i, (turned, down, right) in enumerate(moves):
            tell_step(i, len(moves))
            left = left[~is_adv[left]]
            if len(left) == 0:
                break
            z = quantise(move(x[left], turned, down, right))
            if mask is not None:
                here = mask.to(x.device).expand_as(x)[left]
                z = torch.where(here != 0, z, x[left])
            score = objective(z, left)
            is_better = score.is_adv | (score.loss < loss[left])
            best[left[is_better]] = z[is_better]
            loss[left[is_better]] = score.loss[is_better]
            is_adv[left] = score.is_adv
        tell_step(len(moves), len(moves))
    return best


def list_moves(
    degrees: float, shift: float, angles: int, places: int
) -> list[tuple[float, float, float]]:
    """Angles in degrees and shifts in shares of the side, from small moves to large ones."""

    def spread(most: float, count: int) -> list[float]:
        return [most * (2 * i / (count - 1) - 1) for i in range(count)] if count > 1 else [0.0]

    def measure(step: tuple[float, float, float]) -> float:
        turned, down, right = step
        return (turned / max(degrees, 1e-9)) ** 2 + (down**2 + right**2) / max(shift, 1e-9) ** 2

    moves = [
        (turned, down, right)
        for turned in spread(degrees, angles)
        for down in spread(shift, places)
        for right in spread(shift, places)
    ]
    return sorted(dict.fromkeys(moves), key=lambda step: (measure(step), step))


def move(x: Tensor, turned: float, down: float, right: float) -> Tensor:
    """Images ``(n, c, h, w)`` turned about their middle by degrees, then shifted; black outside."""
    if turned == down == right == 0:
        return x
    n, _, h, w = x.shape
    rows = torch.arange(h, dtype=torch.float64)[:, None] - (h - 1) / 2 - down * h
    columns = torch.arange(w, dtype=torch.float64) - (w - 1) / 2 - right * w
    sine, cosine = math.sin(math.radians(turned)), math.cos(math.radians(turned))
    # where each pixel comes from, in halves of the image from its middle
    across = 2 * (cosine * columns + sine * rows) / w  # (h, w)
    upright = 2 * (cosine * rows - sine * columns) / h
    grid = torch.stack([across, upright], 2).to(x).expand(n, h, w, 2)
    return nn.functional.grid_sample(x, grid, align_corners=False)


def __getattr__(name: str) -> Any:
    """`Spatial`, an ART evasion attack."""
    return make_art_class(name, Spatial=spatial)
