"""The reference attack and its short form: searches in stages, each on what those before left."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor, nn

from robusteval.art.to_art import ArtAttack
from robusteval.registry import ATTACKS
from robusteval.search.balls import Ball, Norm
from robusteval.search.descent import Count, Found
from robusteval.search.ensemble import Ensemble, Stage, Work

StandardNorm = Literal["linf", "l2", "l1", "l0", "l0_pixels"]

CUT = 0.1  # radii from success, up to which an image is near
# the dear stages in their order: Square needs no gradient, and what it has found is a new start;
# the last one aims longer, on a loss that weighs the other classes in
DEAR: dict[str, Work] = {
    "restarts": lambda stage: stage.descend("margin", 18, 16, odi=True),
    "long": lambda stage: stage.descend("margin", 100, 2),
    "targets": lambda stage: stage.descend("margin", 30, targets=9),
    "probabilities": lambda stage: stage.descend("pm", 40),
    "square": lambda stage: stage.query(min(3000, 4 * stage.count_pixels())),
    "onward": lambda stage: stage.descend("ce", 50, onward=True),
    "ratios": lambda stage: stage.descend("dlr", 100, targets=3),
}
# of few changes: attacks, and how long they search
LONG = {"sigma_zero": {"steps": 300}, "sparse": {"steps": 200}}
SHORT = {"sigma_zero": {"steps": 70, "polish": 15}}


@ATTACKS.add("standard", norms=("linf", "l2", "l1", "l0", "l0_pixels"), knowledge="white-box")
def standard(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    targeted: bool = False,
    seeds: Tensor | None = None,
    mask: Tensor | None = None,
    norm: StandardNorm = "linf",
    eps: float = 8 / 255,
) -> Tensor:
    """The reference attack: searches in stages, the dear ones where success is near.

    Auto-PGD on several losses (arXiv:2003.01690, under l1 arXiv:2103.01208), from starts that
    differ in what the network answers (arXiv:2003.06878), aimed at the nearest classes
    (arXiv:2407.02240); then random search without gradients (arXiv:1912.00049). That effort is
    spent on the images nearest to success is the idea of arXiv:2203.05154; here an image counts as
    near by itself, not by its rank among others, so that its result depends on it alone, and one
    in twenty of the others, drawn by its own seed, is searched like the near ones.

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
        One seed per image ``(n,)``; zeros if not given.
    mask : Tensor, optional
        Broadcastable to `x`; zero where a pixel may not change.
    norm : {"linf", "l2", "l1", "l0", "l0_pixels"}
        Norm of the ball. Under l1 there is no random search. `l0` counts changed values, each
        channel of a pixel by itself, `l0_pixels` places where any channel changed: of both the
        success with the fewest changes is looked for, by sigma-zero (arXiv:2402.01879), then by
        sparse noise (arXiv:2506.17250), and counts if these are no more than `eps`.
    eps : float
        Radius of the ball, in units of the [0, 1] pixel range; of l0 a whole number of changes.

    Returns
    -------
    Tensor
        Images ``(n, c, h, w)`` inside the ball and in [0, 1].

    Raises
    ------
    ValueError
        If a parameter is out of range.
    """
    if norm == "l0" or norm == "l0_pixels":
        return change_few(model, x, y, targeted, seeds, mask, norm, eps, LONG)
    return search_balls(model, x, y, targeted, seeds, mask, norm, eps, CUT)


@ATTACKS.add("thorough", norms=("linf", "l2", "l1"), knowledge="white-box")
def thorough(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    targeted: bool = False,
    seeds: Tensor | None = None,
    mask: Tensor | None = None,
    norm: Norm = "linf",
    eps: float = 8 / 255,
) -> Tensor:
    """`standard` that spares no image: the dear stages wherever the cheap ones found nothing.

    Run by itself where an image falls that `standard` drew from those it spares. The searches are
    the same: Auto-PGD (arXiv:2003.01690, under l1 arXiv:2103.01208) from several starts
    (arXiv:2003.06878), at several classes (arXiv:2407.02240), and Square (arXiv:1912.00049).

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
        One seed per image ``(n,)``; zeros if not given.
    mask : Tensor, optional
        Broadcastable to `x`; zero where a pixel may not change.
    norm : {"linf", "l2", "l1"}
        Norm of the ball. Under l1 there is no random search.
    eps : float
        Radius of the ball, in units of the [0, 1] pixel range.

    Returns
    -------
    Tensor
        Images ``(n, c, h, w)`` inside the ball and in [0, 1].

    Raises
    ------
    ValueError
        If a parameter is out of range.
    """
    return search_balls(model, x, y, targeted, seeds, mask, norm, eps, math.inf)


@ATTACKS.add("quick", norms=("linf", "l2", "l1", "l0", "l0_pixels"), knowledge="white-box")
def quick(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    targeted: bool = False,
    seeds: Tensor | None = None,
    mask: Tensor | None = None,
    norm: StandardNorm = "linf",
    eps: float = 8 / 255,
) -> Tensor:
    """The short form of `standard`, for every commit: the same kinds of search in 170 passes.

    Auto-PGD (arXiv:2003.01690, under l1 arXiv:2103.01208), once more from a start where the
    network answers otherwise (arXiv:2003.06878), and random search (arXiv:1912.00049).

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
        One seed per image ``(n,)``; zeros if not given.
    mask : Tensor, optional
        Broadcastable to `x`; zero where a pixel may not change.
    norm : {"linf", "l2", "l1", "l0", "l0_pixels"}
        Norm of the ball, see `standard`. Under l1 there is no random search; under l0 there is
        a short search by sigma-zero (arXiv:2402.01879) alone.
    eps : float
        Radius of the ball, in units of the [0, 1] pixel range; of l0 a whole number of changes.

    Returns
    -------
    Tensor
        Images ``(n, c, h, w)`` inside the ball and in [0, 1].

    Raises
    ------
    ValueError
        If a parameter is out of range.
    """
    if norm == "l0" or norm == "l0_pixels":
        return change_few(model, x, y, targeted, seeds, mask, norm, eps, SHORT)
    ball, stages = Ball.around(x, norm, eps, mask), 2 + (norm != "l1")
    ensemble = Ensemble(model, ball, y, seeds, targeted=targeted, stages=stages)
    if len(x) == 0 or eps == 0:
        return x.clone()
    ensemble.run("apgd", lambda stage: stage.descend("ce", 20))
    ensemble.run("diverse", lambda stage: stage.descend("margin", 10, odi=True))
    if norm != "l1":
        ensemble.run("square", lambda stage: stage.query(100, rescale=True))
    return ensemble.best.x_adv


def search_balls(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    targeted: bool,
    seeds: Tensor | None,
    mask: Tensor | None,
    norm: Norm,
    eps: float,
    cut: float,
) -> Tensor:
    """`standard` with its dear stages on images up to `cut` radii from success."""
    ball = Ball.around(x, norm, eps, mask)
    dear = {name: work for name, work in DEAR.items() if name != "square" or norm != "l1"}
    ensemble = Ensemble(model, ball, y, seeds, targeted=targeted, stages=2 + len(dear))
    if len(x) == 0 or eps == 0:
        return x.clone()
    ensemble.run("apgd", lambda stage: stage.descend("ce", 50))
    ensemble.run("diverse", lambda stage: stage.descend("margin", 18, 2, odi=True))
    spare = math.isfinite(cut)
    rows, drawn = ensemble.choose_near(cut)
    for name, work in dear.items():
        ensemble.run(name, work, rows, drawn if spare else None)
    return ensemble.best.x_adv


def change_few(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    targeted: bool,
    seeds: Tensor | None,
    mask: Tensor | None,
    count: Count,
    eps: float,
    searches: dict[str, dict[str, int]],
) -> Tensor:
    """Searches for few changes one after the other, judged by whether there are `eps` at most."""
    if eps < 0 or eps != int(eps):
        what = "values" if count == "l0" else "pixels"
        raise ValueError(f"eps must be a whole number of changed {what} for {count}, not {eps:g}")
    box = Ball.around(x, "linf", 1.0, mask)
    ensemble = Ensemble(model, box, y, seeds, targeted=targeted, stages=len(searches))
    if len(x) == 0 or eps == 0:
        return x.clone()
    for name, given in searches.items():

        def search(stage: Stage, name: str = name, given: dict[str, int] = given) -> Found:
            return stage.approach(name, count, eps, **given)

        ensemble.run(name, search)
    return ensemble.best.x_adv


class Standard(ArtAttack):
    """`standard` as an ART evasion attack."""

    perturb = staticmethod(standard)


class Thorough(ArtAttack):
    """`thorough` as an ART evasion attack."""

    perturb = staticmethod(thorough)


class Quick(ArtAttack):
    """`quick` as an ART evasion attack."""

    perturb = staticmethod(quick)
