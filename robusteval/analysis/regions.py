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

import torch
from torch import Tensor, autograd, nn

from robusteval.models.classifier import predictions, rows
from robusteval.search.balls import to_double

Mode = Literal["removal", "insertion", "average", "gradient"]

KINDS = ("inactive", "suppression", "balanced", "promotion", "counter-productive")
INACTIVE, SUPPRESSION, BALANCED, PROMOTION, COUNTER = range(len(KINDS))

# a clipped score below this share of the image's largest is none
NEGLIGIBLE = 1e-6
HALVINGS = 10


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


def grid(height: int, width: int, side: int | None = None) -> Tensor:
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
def effects(
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
        Integer map ``(h, w)`` from 0 to m - 1, see `grid`.
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
    failed = predictions(after) == y
    other = after.scatter(1, y[:, None], -torch.inf).argmax(1)
    classes = torch.stack([y, other], 1)  # (n, 2)
    if mode == "gradient":
        scores = gradients(model, x, x_adv, classes, regions)
    elif mode == "removal":
        scores = -ablated(model, x_adv, x, classes, regions, after, chunk)
    elif mode == "insertion":
        scores = ablated(model, x, x_adv, classes, regions, before, chunk)
    elif mode == "average":
        scores = ablated(model, x, x_adv, classes, regions, before, chunk)
        scores = (scores - ablated(model, x_adv, x, classes, regions, after, chunk)) / 2
    else:
        raise ValueError(f"mode must be removal, insertion, average or gradient, not {mode!r}")
    # from what a region adds to either logit to what it does for the attacker
    scores = scores * scores.new_tensor([-1.0, 1.0])  # (n, m, 2)
    whole = (after.double() - before.double()).gather(1, classes)
    kinds, ratio = typed(scores[..., 0], scores[..., 1], failed)
    return Effects(
        suppression=scores[..., 0],
        promotion=scores[..., 1],
        ratio=ratio,
        kinds=kinds,
        residual=scores.sum(1) - whole * scores.new_tensor([-1.0, 1.0]),
        other=other,
        failed=failed,
    )


def ablated(
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
        with rows(image):
            made = model(torch.where(inside, z[image], x[image]))
        scores[image, region] = made.double().gather(1, classes[image]) - base[image]
    return scores


def gradients(
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


def typed(suppression: Tensor, promotion: Tensor, failed: Tensor) -> tuple[Tensor, Tensor]:
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


def top(maps: Tensor, share: float) -> Tensor:
    """The most important `share` of each map ``(n, 1, h, w)``, bool; ties by position."""
    if not 0 <= share <= 1:
        raise ValueError(f"share must be from 0 to 1, not {share:g}")
    return ranks(maps) >= 1 - share


def ranks(maps: Tensor) -> Tensor:
    """Each pixel's rank in its map ``(n, 1, h, w)``, from 0 to just below 1.

    A pixel of rank q is among the top 1 - q of the map.
    """
    flat = maps.flatten(1)
    order = flat.argsort(dim=1, stable=True)
    place = torch.empty_like(order)
    place.scatter_(1, order, torch.arange(flat.shape[1], device=flat.device).expand_as(order))
    return (place / flat.shape[1]).view_as(maps)


class Focus(NamedTuple):
    """How much of a perturbation lies in the discriminative region, and what that is worth."""

    score: Tensor  # (n,), interpretability score: norm inside over norm; nan without a change
    area: Tensor  # (n,), share of the image the region covers
    chance: Tensor  # (n,), root of the area: what noise scores
    elsewhere: Tensor  # (n,), mean score against the regions of the other images
    shifted: Tensor  # (n,), 95 % of what the same perturbation scores elsewhere in the image

    @property
    def focused(self) -> Tensor:
        """Whether the score beats all three controls ``(n,)``."""
        beats = (self.score > self.chance) & (self.score > self.shifted)
        return beats & ((self.score > self.elsewhere) | self.elsewhere.isnan())


def focus(delta: Tensor, inside: Tensor) -> Focus:
    """The interpretability score of perturbations (arXiv:1904.02057), beside its controls.

    Parameters
    ----------
    delta : Tensor
        Perturbations ``(n, c, h, w)``.
    inside : Tensor
        Discriminative region of each image ``(n, 1, h, w)`` bool, see `top`.
    """
    n = len(delta)
    energy = to_double(delta).square().sum(1)  # (n, h, w)
    region = inside[:, 0].to(energy)
    total = energy.flatten(1).sum(1)
    # (n, n): of image i in the region of image j
    share = energy.flatten(1) @ region.flatten(1).T / total[:, None]
    off = 1 - torch.eye(n).to(share)
    elsewhere = (share.sqrt() * off).sum(1) / (n - 1) if n > 1 else total * torch.nan

    # the perturbation at every other place, around the edges: one correlation
    spectrum = torch.fft.rfft2(energy).conj() * torch.fft.rfft2(region)
    moved = torch.fft.irfft2(spectrum, s=energy.shape[1:]).clamp_min(0) / total[:, None, None]
    area = region.flatten(1).mean(1)
    return Focus(
        score=share.diagonal().sqrt(),
        area=area,
        chance=area.sqrt(),
        elsewhere=elsewhere,
        shifted=torch.quantile(moved.flatten(1).sqrt(), 0.95, dim=1),
    )


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
        made = predictions(model(z))
        return made == y if targeted else made != y

    rank, fooled = ranks(importance), fools(x_adv)
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


def by_region(scores: Tensor, regions: Tensor) -> Tensor:
    """Scores of regions ``(n, m)`` as maps ``(n, 1, h, w)``."""
    return scores[:, regions.to(scores.device).flatten()].view(len(scores), 1, *regions.shape)
