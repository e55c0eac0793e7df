"""Which parts of a perturbation hold the true class down, and which push the wrong one up.

Promotion-suppression analysis after Interpreting Adversarial Examples by Activation Promotion
and Suppression, arXiv:1904.02057. The paper's symbols, its thresholds of -1 and +1 and its figures
were at hand, its equations were not: the removal form of the scores, their clipping at zero and the
logarithm to base 2 are reconstructed.

Scores are differences of logits. Probabilities would couple the classes: whatever suppresses one
would seem to promote all others.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor, autograd, nn

from robusteval.analysis.case import Case, Work
from robusteval.analysis.summaries import (
    OF_CORRELATIONS,
    OF_SHARES,
    Values,
    average_images,
    correlate_columns,
    take_median,
)
from robusteval.datasets.dataset import Positions
from robusteval.evaluation.batches import split_rows
from robusteval.evaluation.work_cache import hash_inputs
from robusteval.models.classifier import Classifier, predict_classes
from robusteval.models.steps import book_rows
from robusteval.runs.explanation_record import (
    RATIO_BANDS,
    MeanOfImages,
    RegionFigures,
    RegionResidual,
    SizeCorrelations,
)
from robusteval.runs.types import Columns

Mode = Literal["removal", "insertion", "average", "gradient"]

KINDS = ("inactive", "suppression", "balanced", "promotion", "counter-productive")
INACTIVE, SUPPRESSION, BALANCED, PROMOTION, COUNTER = range(len(KINDS))

SCORED = 4  # images at a time
# a clipped score below this share of the image's largest is none
NEGLIGIBLE = 1e-6


class Effects(NamedTuple):
    """What each of m regions of a perturbation does; one row per image."""

    suppression: Tensor  # (n, m) float64, how far the region holds the true logit down
    promotion: Tensor  # (n, m) float64, how far it holds the other logit up
    ratio: Tensor  # (n, m) log2 of promotion over suppression; nan where inactive, may be infinite
    kinds: Tensor  # (n, m) int64, index into KINDS
    residual: Tensor  # (n, 2), sums of both scores minus what the whole perturbation does
    other: Tensor  # (n,) the class that is promoted
    failed: Tensor  # (n,) bool, the true class is still predicted: there are no types

    @property
    def strength(self) -> Tensor:
        """Both scores together, each at least zero ``(n, m)``."""
        return self.suppression.clamp_min(0) + self.promotion.clamp_min(0)


def build_grid(height: int, width: int, side: int | None = None) -> Tensor:
    """Square regions as an integer map ``(height, width)``, counted from zero row by row.

    `side` pixels each, about a twenty-third of the height but at least 2 if not given (529 regions
    at 299 pixels, as in arXiv:1808.01664 by the same authors); the last row and column take what
    remains. ValueError for a side that does not fit.
    """
    side = max(2, round(height / 23)) if side is None else side
    if not 1 <= side <= min(height, width):
        raise ValueError(
            f"a region's side must be from 1 to {min(height, width)} pixels, not {side}"
        )
    down, across = height // side, width // side
    row = (torch.arange(height) // side).clamp_max(down - 1)
    column = (torch.arange(width) // side).clamp_max(across - 1)
    return row[:, None] * across + column[None, :]


@torch.no_grad()
def measure_effects(
    model: nn.Module,
    x: Tensor,
    x_adv: Tensor,
    y: Tensor,
    regions: Tensor,
    *,
    mode: Mode = "removal",
    chunk: int = 128,
) -> Effects:
    """Score every region of the perturbations by what the logits do without it.

    Parameters
    ----------
    model : nn.Module
        Maps images in [0, 1] to logits ``(n, k)``, in eval mode.
    x, x_adv : Tensor
        Images ``(n, c, h, w)`` in [0, 1] before and after the attack.
    y : Tensor
        True classes ``(n,)``.
    regions : Tensor
        Integer map ``(h, w)`` from 0 to m - 1, see `build_grid`.
    mode : {"removal", "insertion", "average", "gradient"}
        `removal`: the region is put back to the original. `insertion`: it alone is changed.
        `average`: the mean of both. `gradient`: to first order, two backward passes for all
        regions, a quick look and not a measurement.
    chunk : int
        Images per call of the model. Regions without a change cost no call.

    Returns
    -------
    Effects
        Where an attack failed, the scores are for the strongest other class.

    Raises
    ------
    ValueError
        If shapes do not fit together, or `mode` is unknown.
    """
    if x.shape != x_adv.shape or regions.shape != x.shape[2:]:
        raise ValueError(
            f"images {tuple(x.shape)} and {tuple(x_adv.shape)} and regions {tuple(regions.shape)}"
            " do not fit together"
        )
    regions = regions.to(x.device)
    before, after = model(x), model(x_adv)
    failed = predict_classes(after) == y
    other = after.scatter(1, y[:, None], -torch.inf).argmax(1)
    classes = torch.stack([y, other], 1)  # (n, 2)
    if mode == "gradient":
        scores = score_by_gradient(model, x, x_adv, classes, regions)
    elif mode == "removal":
        scores = -score_by_ablation(model, x_adv, x, classes, regions, after, chunk)
    elif mode == "insertion":
        scores = score_by_ablation(model, x, x_adv, classes, regions, before, chunk)
    elif mode == "average":
        scores = score_by_ablation(model, x, x_adv, classes, regions, before, chunk)
        scores = (scores - score_by_ablation(model, x_adv, x, classes, regions, after, chunk)) / 2
    else:
        raise ValueError(f"mode must be removal, insertion, average or gradient, not {mode!r}")
    # from what a region adds to either logit to what it does for the attacker
    scores = scores * scores.new_tensor([-1.0, 1.0])  # (n, m, 2)
    whole = (after.double() - before.double()).gather(1, classes)
    kinds, ratio = classify_regions(scores[..., 0], scores[..., 1], failed)
    return Effects(
        suppression=scores[..., 0],
        promotion=scores[..., 1],
        ratio=ratio,
        kinds=kinds,
        residual=scores.sum(1) - whole * scores.new_tensor([-1.0, 1.0]),
        other=other,
        failed=failed,
    )


def score_by_ablation(
    model: nn.Module,
    x: Tensor,
    z: Tensor,
    classes: Tensor,
    regions: Tensor,
    logits: Tensor,
    chunk: int,
) -> Tensor:
    """Change of two logits when one region of `x` becomes that of `z`, float64 ``(n, m, 2)``."""
    m = int(regions.max()) + 1
    scores = torch.zeros(len(x), m, 2, dtype=torch.float64, device=x.device)
    differs = (x != z).any(1).flatten(1).long()  # (n, h*w)
    changed = torch.zeros(len(x), m, dtype=torch.int64, device=x.device)
    jobs = changed.index_add_(1, regions.flatten(), differs).nonzero()  # (jobs, 2): image, region
    base = logits.double().gather(1, classes)  # (n, 2)
    for part in torch.split(jobs, chunk):
        image, region = part.unbind(1)
        inside = (regions == region[:, None, None])[:, None]  # (j, 1, h, w)
        with book_rows(image):
            made = model(torch.where(inside, z[image], x[image]))
        scores[image, region] = made.double().gather(1, classes[image]) - base[image]
    return scores


def score_by_gradient(
    model: nn.Module, x: Tensor, x_adv: Tensor, classes: Tensor, regions: Tensor
) -> Tensor:
    """What each region adds to two logits to first order, float64 ``(n, m, 2)``."""
    m = int(regions.max()) + 1
    delta = (x_adv - x).double()
    scores = torch.zeros(len(x), m, 2, dtype=torch.float64, device=x.device)
    with torch.enable_grad():
        z = x_adv.detach().requires_grad_()
        chosen = model(z).gather(1, classes)  # (n, 2)
        for which in range(2):
            grad = autograd.grad(chosen[:, which].sum(), z, retain_graph=which == 0)[0]
            share = (grad.double() * delta).sum(1).flatten(1)  # (n, h*w)
            scores[..., which].index_add_(1, regions.flatten(), share)
    return scores


def classify_regions(
    suppression: Tensor, promotion: Tensor, failed: Tensor
) -> tuple[Tensor, Tensor]:
    """Index into `KINDS` and log2 ratio of every region ``(n, m)``.

    Dominated by one side where it is more than twice the other: beyond -1 or +1.
    """
    down, up = suppression.clamp_min(0), promotion.clamp_min(0)
    floor = NEGLIGIBLE * (down + up).amax(1, keepdim=True)
    quiet = (down <= floor) & (up <= floor)
    ratio = torch.where(down > floor, up, 1.0) / torch.where(down > floor, down, 1.0)
    ratio = torch.where(up > floor, ratio, 0.0).log2()
    ratio = torch.where((down <= floor) & (up > floor), torch.inf, ratio)
    ratio = torch.where(quiet | failed[:, None], torch.nan, ratio)
    lowest = torch.minimum(suppression, promotion)
    against = quiet & (lowest < -floor) & (lowest < 0)
    kinds = torch.full_like(ratio, BALANCED, dtype=torch.int64)
    kinds[ratio < -1] = SUPPRESSION
    kinds[ratio > 1] = PROMOTION
    kinds[quiet] = INACTIVE
    kinds[against] = COUNTER
    kinds[failed] = INACTIVE
    return kinds, ratio


def spread_over_pixels(scores: Tensor, regions: Tensor) -> Tensor:
    """Scores of regions ``(n, m)`` as maps ``(n, 1, h, w)``."""
    return scores[:, regions.to(scores.device).flatten()].view(len(scores), 1, *regions.shape)


def score_regions(model: Classifier, case: Case, regions: Tensor, work: Work) -> Effects:
    """Score the regions ``(h, w)`` of every image, a few images at a time."""

    def score_rows(positions: Positions) -> Columns:
        some = torch.from_numpy(positions).to(case.x.device)
        found = measure_effects(model, case.x[some], case.x_adv[some], case.y[some], regions)
        return {name: column.cpu().numpy() for name, column in found._asdict().items()}

    x, x_adv, y = (each.cpu().numpy() for each in (case.x, case.x_adv, case.y))
    columns = work.map(
        "Scoring regions",
        ["regions", hash_inputs([], (regions.numpy(),))],
        (x, x_adv, y),
        case.ids,
        split_rows(np.arange(len(x)), SCORED),
        score_rows,
    )
    return Effects(**{k: torch.from_numpy(v).to(case.x.device) for k, v in columns.items()})


def measure_regions(
    model: Classifier, case: Case, found: Effects, regions: Tensor, fooled: Tensor
) -> RegionFigures:
    """Measure what kinds of regions there are, and whether their size tells what they do."""
    kinds = found.kinds[fooled].cpu().numpy()  # (n, m)
    active = (kinds != INACTIVE) & (kinds != COUNTER)
    m = kinds.shape[1]
    shares = {}
    for kind in (SUPPRESSION, BALANCED, PROMOTION):
        each = (kinds == kind).sum(1) / np.where(active.sum(1), active.sum(1), np.nan)
        shares[KINDS[kind]] = average_images(each, OF_SHARES)
    for kind in (INACTIVE, COUNTER):
        shares[KINDS[kind]] = average_images((kinds == kind).mean(1), OF_SHARES)

    quick = measure_effects(model, case.x, case.x_adv, case.y, regions, mode="gradient").strength
    size = measure_region_norms(case.x_adv - case.x, regions)
    pearson, kendall, order = [], [], []
    for row in torch.nonzero(fooled).flatten().tolist():
        moved = (size[row] > 0).cpu().numpy()
        strength, norm, fast = (
            column[row].double().cpu().numpy()[moved] for column in (found.strength, size, quick)
        )
        pearson.append(correlate_columns(stats.pearsonr, strength, norm))
        kendall.append(correlate_columns(stats.kendalltau, strength, norm))
        order.append(correlate_columns(stats.spearmanr, strength, fast))
    whole = (found.suppression.sum(1) - found.residual[:, 0]).abs()
    rest = found.residual.abs() / torch.stack(
        [whole, (found.promotion.sum(1) - found.residual[:, 1]).abs()], 1
    )
    return RegionFigures(
        count=m,
        types=shares,
        ratios=count_ratios(found.ratio[fooled].cpu().numpy()),
        with_size=SizeCorrelations(
            pearson=average_images(np.array(pearson), OF_CORRELATIONS),
            kendall=average_images(np.array(kendall), OF_CORRELATIONS),
        ),
        with_gradient_mode=average_images(np.array(order), OF_CORRELATIONS),
        residual=RegionResidual(
            suppression=take_median(rest[fooled, 0]), promotion=take_median(rest[fooled, 1])
        ),
    )


def count_ratios(ratio: Values) -> tuple[MeanOfImages, ...]:
    """The shares of regions by their log2 ratio ``(n, m)``, in `RATIO_BANDS`; nan counts nowhere.

    An end of a band that is nearer to zero is not in it, so that the middle one is of those that
    `classify_regions` calls balanced.
    """
    steps = np.clip(np.ceil(np.abs(ratio)) - 1, 0, len(RATIO_BANDS) // 2)
    band = np.sign(ratio) * steps + len(RATIO_BANDS) // 2  # (n, m), nan where inactive
    active = np.isfinite(band).sum(1)
    every = np.where(active, active, np.nan)
    return tuple(
        average_images((band == place).sum(1) / every, OF_SHARES)
        for place in range(len(RATIO_BANDS))
    )


def measure_region_norms(delta: Tensor, regions: Tensor) -> Tensor:
    """l2 norm of each region of perturbations ``(n, c, h, w)``, ``(n, m)``."""
    flat = delta.double().square().sum(1).flatten(1).cpu()
    norms = torch.zeros(len(delta), int(regions.max()) + 1, dtype=torch.float64)
    return norms.index_add_(1, regions.flatten(), flat).sqrt().to(delta.device)
