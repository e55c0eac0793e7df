"""What is left of a perturbation when only what matters is kept."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from robusteval.analysis.case import Case
from robusteval.analysis.focus import rank_pixels
from robusteval.analysis.regions import (
    Effects,
    spread_over_pixels,
)
from robusteval.analysis.summaries import take_median
from robusteval.evaluation.plan import Attack
from robusteval.models.classifier import Classifier, predict_classes
from robusteval.models.steps import count_passes
from robusteval.runs.explanation_record import ImageCount, RefinementFigures
from robusteval.search.balls import measure_distances
from robusteval.search.descent import prune

ROUNDS = 11  # forward passes that every way of refining may spend
HALVINGS = 10  # of the share that is kept: one pass each, and one before


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
        made = predict_classes(model(z))
        return made == y if targeted else made != y

    rank, fooled = rank_pixels(importance), fools(x_adv)
    low = torch.zeros(len(x), device=x.device)  # a rank from which on it is known to fool
    high = torch.ones(len(x), device=x.device)
    best = x_adv.clone()
    whole = (x_adv != x).flatten(1).sum(1)
    fewest = whole.clone()
    for _ in range(steps):
        middle = (low + high) / 2
        z = torch.where(rank >= middle.view(-1, 1, 1, 1), x_adv, x)
        still, left = fools(z), (z != x).flatten(1).sum(1)
        better = fooled & still & (left < fewest)
        best[better], fewest[better] = z[better], left[better]
        low, high = torch.where(still, middle, low), torch.where(still, high, middle)
    return Refined(best, fewest / whole.clamp_min(1))


def measure_refinement(
    model: Classifier,
    case: Case,
    found: Effects,
    regions: Tensor,
    maps: dict[str, dict[str, Tensor]],
    attack: Attack,
    fooled: Tensor,
) -> tuple[RefinementFigures, ...]:
    """Measure what is left of the perturbations when only what matters is kept, in several ways.

    Each way may spend the same number of forward passes; pruning also goes backward.
    """
    targeted = attack.threat.targeted
    x, x_adv, goal = case.x[fooled], case.x_adv[fooled], case.goal[fooled]
    if not len(x):
        return ()

    def refine_by(importance: Tensor) -> Callable[[], Tensor]:
        return lambda: refine(model, x, x_adv, goal, importance, targeted=targeted).x_adv

    ways: dict[str, Callable[[], Tensor]] = {"as attacked": lambda: x_adv}
    for name in list(maps)[-1:]:  # the finest that the network has
        views = maps[name]
        union = torch.maximum(
            rank_pixels(views["clean, label"][fooled]),
            rank_pixels(views["adversarial, predicted"][fooled]),
        )
        ways[f"where {name} looks"] = refine_by(union)
    signed = found.suppression + found.promotion
    ways["by region score"] = refine_by(spread_over_pixels(signed[fooled], regions))
    ways["by size of change"] = refine_by((x_adv - x).abs().sum(1, keepdim=True))
    ways["pruned without a map"] = lambda: prune(
        model, x, x_adv, goal, targeted=targeted, rounds=ROUNDS
    )
    rows = []
    for name, way in ways.items():
        began = time.perf_counter()
        with count_passes(model, len(x), x.device) as passes:
            z = way()
        seconds = time.perf_counter() - began
        with torch.no_grad():
            made = predict_classes(model(z))
        still = made == goal if targeted else made != goal
        rows.append(
            RefinementFigures(
                way=name,
                still_fooled=ImageCount(int(still.sum()), len(x)),
                **{norm: take_median(sizes) for norm, sizes in measure_distances(z, x).items()},
                forwards=float(passes.forwards.mean()),
                backwards=float(passes.backwards.mean()),
                seconds=seconds,
            )
        )
    return tuple(rows)
