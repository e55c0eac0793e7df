"""What is left of a perturbation when only what matters is kept."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from robusteval.analysis.case import Case
from robusteval.analysis.regions import Effects, spread_over_pixels
from robusteval.analysis.summaries import take_median
from robusteval.evaluation.plan import Attack
from robusteval.models.classifier import Classifier, predict_classes
from robusteval.models.steps import count_passes
from robusteval.runs.explanation_record import ImageCount, RefinementFigures
from robusteval.search.balls import measure_distances
from robusteval.search.descent import prune
from robusteval.search.refinement import rank_pixels, refine

ROUNDS = 11  # forward passes that every way of refining may spend


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
