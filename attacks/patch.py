"""A square anywhere on the image, with any content: what a sticker can do."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from robusteval.art.art_classes import make_art_class
from robusteval.models.seeds import per_image
from robusteval.registry import ATTACKS
from robusteval.search.balls import Ball
from robusteval.search.descent import (
    BallMoves,
    Found,
    Objective,
    build_class_objective,
    descend,
    differentiate,
    repeat_search,
    restrict_objective,
)
from robusteval.search.losses import Loss


@ATTACKS.add("patch", norms=("patch",), knowledge="white-box", radius="share")
def patch(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    targeted: bool = False,
    seeds: Tensor | None = None,
    mask: Tensor | None = None,
    share: float = 0.05,
    steps: int = 50,
    step: float = 0.1,
    places: int = 5,
    loss: Loss = "ce",
) -> Tensor:
    """A square of the image replaced, its content found along the gradient.

    Threat of Adversarial Patch, arXiv:1712.09665, where one patch is made for all images. Here each
    image has its own content and place, which is the stronger attacker. The first place is the
    square on which the gradient is largest in sum, the others are drawn.

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
        One seed per image ``(n,)`` for places and starts; zeros if not given.
    mask : Tensor, optional
        Broadcastable to `x`; zero where a pixel may not change.
    share : float
        Of the pixels that the square may cover, above 0 up to 1: the radius of the threat.
    steps : int
        Gradient steps at each place.
    step : float
        Length of a step in each value, in units of the [0, 1] pixel range.
    places : int
        Squares that are tried, one after the other, on the images that are not finished.
    loss : {"ce", "margin", "pm", "dlr"}
        What is lowered, see `robusteval.search.losses.attacker_loss`.

    Returns
    -------
    Tensor
        Images ``(n, c, h, w)`` in [0, 1].

    Raises
    ------
    ValueError
        If a parameter is out of range, or `share` less than a pixel.
    """
    if not 0 < share <= 1 or not step > 0:
        raise ValueError(
            f"share must be above 0 up to 1 and step positive, not {share:g} and {step:g}"
        )
    if steps < 1 or places < 1:
        raise ValueError(f"steps and places must be at least 1, not {steps} and {places}")
    if share * x.shape[2] * x.shape[3] < 1:
        raise ValueError(
            f"share={share:g} of {x.shape[2]} x {x.shape[3]} pixels is less than one of them"
        )
    if len(x) == 0:
        return x.clone()
    seeds = torch.zeros(len(x), dtype=torch.int64) if seeds is None else seeds.cpu()
    side = min(int(math.sqrt(share * x.shape[2] * x.shape[3])), *x.shape[2:])
    objective = build_class_objective(model, y, targeted=targeted, loss=loss)
    free = torch.ones_like(x) if mask is None else (mask.to(x.device) != 0).to(x).expand_as(x)

    def search(left: Tensor, run: int) -> Found:
        some, mine = restrict_objective(objective, left), seeds[left.cpu()] + 7919 * run
        if run == 0:
            window = find_window(some, x[left], free[left], side)
        else:
            window = draw_window(mine, x[left], side)
        here = Ball.around(x[left], "linf", 1.0, window * free[left])
        moves = BallMoves(here, step)
        return descend(some, moves, here.sample(mine), steps=steps, stop="8bit")

    return repeat_search(search, x.detach(), places).x_adv


def find_window(objective: Objective, x: Tensor, free: Tensor, side: int) -> Tensor:
    """One in the square on which the gradient is largest in sum, else zero ``(n, 1, h, w)``."""
    index = torch.arange(len(x), device=x.device)
    grad = differentiate(objective, x, index, last=False)[1]
    assert grad is not None
    size = (grad * free).abs().double().sum(1, keepdim=True)  # (n, 1, h, w)
    sums = size.cumsum(2).cumsum(3)
    sums = nn.functional.pad(sums, (1, 0, 1, 0))
    inside = sums[..., side:, side:] - sums[..., :-side, side:] - sums[..., side:, :-side]
    inside = inside + sums[..., :-side, :-side]  # (n, 1, h - side + 1, w - side + 1)
    best = inside.flatten(1).argmax(1)
    return mark(best // inside.shape[3], best % inside.shape[3], side, x)


def draw_window(seeds: Tensor, x: Tensor, side: int) -> Tensor:
    """One in a square drawn from each image's own seed ``(n,)``, else zero ``(n, 1, h, w)``."""
    drawn = per_image(seeds, torch.Size((2,))).to(x.device)
    rows, columns = ((drawn[:, i] * (x.shape[2 + i] - side + 1)).long() for i in (0, 1))
    return mark(rows, columns, side, x)


def mark(top: Tensor, start: Tensor, side: int, x: Tensor) -> Tensor:
    """One in squares with these first rows and columns ``(n,)``, else zero ``(n, 1, h, w)``."""
    rows, columns = (torch.arange(size, device=x.device) for size in x.shape[2:])
    upright = (rows >= top[:, None]) & (rows < top[:, None] + side)
    across = (columns >= start[:, None]) & (columns < start[:, None] + side)
    return (upright[:, None, :, None] & across[:, None, None, :]).to(x)


def __getattr__(name: str) -> Any:
    """`Patch`, an ART evasion attack."""
    return make_art_class(name, Patch=patch)
