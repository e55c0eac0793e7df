"""What is left of a change when it is kept only where a map says that it matters."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from robusteval.models.classifier import predict_classes
from robusteval.models.steps import book_rows, tell_step
from robusteval.search.descent import count_changes

HALVINGS = 10  # of the share that is kept: one pass each, and one before


def rank_pixels(maps: Tensor) -> Tensor:
    """Each pixel's rank in its map ``(n, 1, h, w)``, from 0 to just below 1.

    A pixel of rank q is among the top 1 - q of the map.
    """
    flat = maps.flatten(1)
    order = flat.argsort(dim=1, stable=True)
    place = torch.empty_like(order)
    place.scatter_(1, order, torch.arange(flat.shape[1], device=flat.device).expand_as(order))
    return (place / flat.shape[1]).view_as(maps)


class Refined(NamedTuple):
    """A perturbation reduced to where it counts."""

    x_adv: Tensor  # (n, c, h, w), as given where nothing smaller fools
    kept: Tensor  # (n,), share of the changed values that is left


@torch.no_grad()
def refine(
    model: nn.Module,
    x: Tensor,
    x_adv: Tensor,
    y: Tensor,
    importance: Tensor,
    *,
    targeted: bool = False,
    steps: int = HALVINGS,
) -> Refined:
    """Keep a perturbation only where a map says it matters, as little as still fools.

    Bisects on the share of the map that is kept, one forward pass per step and one before. Success
    need not be monotone in it, so the smallest result that was seen to fool is returned. The idea
    is that of arXiv:1904.02057; the procedure is ours, as its details could not be checked.

    Parameters
    ----------
    model : nn.Module
        Maps images in [0, 1] to logits ``(n, k)``.
    x, x_adv : Tensor
        Images ``(n, c, h, w)`` before and after an attack; where it failed, nothing is refined.
    y : Tensor
        True classes ``(n,)``, or the classes reached when `targeted`.
    importance : Tensor
        Maps ``(n, 1, h, w)``; only the order of their values counts.
    targeted : bool
        Keep class `y` instead of keeping away from it.
    steps : int
        Halvings of the share.
    """

    def fools(z: Tensor) -> Tensor:
        with book_rows(rows):
            made = predict_classes(model(z))
        return made == y if targeted else made != y

    rows = torch.arange(len(x), device=x.device)
    rank, fooled = rank_pixels(importance), fools(x_adv)
    low = torch.zeros(len(x), device=x.device)  # a rank from which on it is known to fool
    high = torch.ones(len(x), device=x.device)
    best = x_adv.clone()
    whole = count_changes(x_adv, x, "l0")
    fewest = whole.clone()
    for i in range(steps):
        tell_step(i, steps)
        middle = (low + high) / 2
        z = torch.where(rank >= middle.view(-1, 1, 1, 1), x_adv, x)
        still, left = fools(z), count_changes(z, x, "l0")
        better = fooled & still & (left < fewest)
        best[better], fewest[better] = z[better], left[better]
        low, high = torch.where(still, middle, low), torch.where(still, high, middle)
    return Refined(best, fewest / whole.clamp_min(1))
