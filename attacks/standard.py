"""The reference attack and its short form: searches in stages, each on what those before left."""

from __future__ import annotations

import math
from typing import Any, Literal

from torch import Tensor, nn

from robusteval.art.art_classes import make_art_class
from robusteval.registry import ATTACKS
from robusteval.search.balls import Ball, Norm
from robusteval.search.descent import Count, Found
from robusteval.search.ensemble import Ensemble, Stage, Work

StandardNorm = Literal["linf", "l2", "l1", "l0", "l0_pixels"]

CUT = 0.1  # radii from success, up to which an image is near
ALIKE = 3  # times the spread of where restarts ended, up to which one more is worth its passes
PATIENCE = 300  # queries of random search without hope
# the dear stages in their order, on near images: restarts, which tell by where they end whether
# others would end elsewhere, and Square, which needs no gradient
FIRST = "restarts"
NEAR: dict[str, Work] = {
    FIRST: lambda stage: stage.descend("margin", 18, 8, odi=True),
    "square": lambda stage: stage.query(count_queries(stage), patience=PATIENCE),
}
# `thorough` ends no search early
WHOLE = NEAR | {"square": lambda stage: stage.query(count_queries(stage))}
# then on near images whose restarts did not all end alike: on from the best so far in long steps
# and shorter ones, more starts, longer searches, nearby classes, in the end for longer on a loss
# that weighs the other classes in; and from the best on in the shortest steps
OPEN: dict[str, Work] = {
    "onward": lambda stage: stage.descend("ce", 50, onward=2),
    "around": lambda stage: stage.descend("margin", 50, onward=1 / 2),
    "more restarts": lambda stage: stage.descend("margin", 18, 8, odi=True),
    "long": lambda stage: stage.descend("margin", 100, 2),
    "targets": lambda stage: stage.descend("margin", 30, targets=9),
    "probabilities": lambda stage: stage.descend("pm", 40),
    "ratios": lambda stage: stage.descend("dlr", 100, targets=3),
    "closer": lambda stage: stage.descend("margin", 50, onward=1 / 32),
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
    (arXiv:2407.02240); between them random search without gradients (arXiv:1912.00049). That effort
    is spent on the images nearest to success is the idea of arXiv:2203.05154; here an image counts
    as near by itself, not by its rank among others, so that its result depends on it alone. Of the
    near ones random search ends where it is behind the gradients and, at its pace so far, would
    not succeed; and those are left alone whose restarts ended alike, so that what is
    missing is many times what starts make a difference to. One in twenty of the images that are
    spared for either reason, drawn by its own seed, is searched like the others.

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
    return search_balls(model, x, y, targeted, seeds, mask, norm, eps, spare=True)


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
    return search_balls(model, x, y, targeted, seeds, mask, norm, eps, spare=False)


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


def count_queries(stage: Stage) -> int:
    """Those of random search: an image of few pixels needs few."""
    return min(3000, 4 * stage.count_pixels())


def search_balls(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    targeted: bool,
    seeds: Tensor | None,
    mask: Tensor | None,
    norm: Norm,
    eps: float,
    *,
    spare: bool,
) -> Tensor:
    """`standard` or, where it is not to `spare` images, `thorough`."""
    ball = Ball.around(x, norm, eps, mask)
    near = NEAR if spare else WHOLE
    if norm == "l1":
        near = {name: work for name, work in near.items() if name != "square"}
    ensemble = Ensemble(model, ball, y, seeds, targeted=targeted, stages=2 + len(near) + len(OPEN))
    if len(x) == 0 or eps == 0:
        return x.clone()
    ensemble.run("apgd", lambda stage: stage.descend("ce", 50))
    ensemble.run("diverse", lambda stage: stage.descend("margin", 18, 2, odi=True))
    rows, drawn = ensemble.choose_near(CUT if spare else math.inf)
    for name, work in near.items():
        ensemble.run(name, work, rows, drawn if spare else None)
    if spare:
        rows, drawn = ensemble.choose_open(rows, drawn, FIRST, ALIKE)
    for name, work in OPEN.items():
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


def __getattr__(name: str) -> Any:
    """`Standard`, `Thorough` and `Quick`, ART evasion attacks."""
    return make_art_class(name, Standard=standard, Thorough=thorough, Quick=quick)
