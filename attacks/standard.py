"""The reference attack and its short form: searches in stages, each on what those before left."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from robusteval.art.to_art import ArtAttack
from robusteval.registry import ATTACKS
from robusteval.search.balls import Ball
from robusteval.search.ensemble import Ensemble, Work

BallNorm = Literal["linf", "l2", "l1"]

# the dear stages in their order: Square needs no gradient, and what it has found is a new start
DEAR: dict[str, Work] = {
    "targets": lambda stage: stage.descend("margin", 30, targets=9),
    "restarts": lambda stage: stage.descend("ce", 100, 4),
    "probabilities": lambda stage: stage.descend("pm", 40),
    "square": lambda stage: stage.query(min(3000, 4 * stage.count_pixels())),
    "onward": lambda stage: stage.descend("ce", 50, onward=True),
}


@ATTACKS.add("standard", norms=("linf", "l2", "l1"), knowledge="white-box")
def standard(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    targeted: bool = False,
    seeds: Tensor | None = None,
    mask: Tensor | None = None,
    norm: BallNorm = "linf",
    eps: float = 8 / 255,
    cut: float = 0.1,
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
    norm : {"linf", "l2", "l1"}
        Norm of the ball. Under l1 there is no random search.
    eps : float
        Radius of the ball, in units of the [0, 1] pixel range.
    cut : float
        Distance to success from the best image so far, if the network were linear there, up to
        which an image counts as near, in units of `eps`.

    Returns
    -------
    Tensor
        Images ``(n, c, h, w)`` inside the ball and in [0, 1].

    Raises
    ------
    ValueError
        If a parameter is out of range.
    """
    if not cut >= 0:
        raise ValueError(f"cut must be 0 or more, in units of eps, not {cut:g}")
    ball = Ball.around(x, norm, eps, mask)
    dear = {name: work for name, work in DEAR.items() if name != "square" or norm != "l1"}
    ensemble = Ensemble(model, ball, y, seeds, targeted=targeted, stages=2 + 2 * len(dear))
    if len(x) == 0:
        return x.clone()
    ensemble.run("apgd", lambda stage: stage.descend("ce", 50))
    ensemble.run("diverse", lambda stage: stage.descend("margin", 18, 2, odi=True))
    near, far = ensemble.choose_near(cut)
    for name, work in dear.items():
        ensemble.run(name, work, near)
        ensemble.run(f"far {name}", work, far)
    return ensemble.best.x_adv


@ATTACKS.add("quick", norms=("linf", "l2", "l1"), knowledge="white-box")
def quick(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    targeted: bool = False,
    seeds: Tensor | None = None,
    mask: Tensor | None = None,
    norm: BallNorm = "linf",
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
    ball, stages = Ball.around(x, norm, eps, mask), 2 + (norm != "l1")
    ensemble = Ensemble(model, ball, y, seeds, targeted=targeted, stages=stages)
    if len(x) == 0:
        return x.clone()
    ensemble.run("apgd", lambda stage: stage.descend("ce", 20))
    ensemble.run("diverse", lambda stage: stage.descend("margin", 10, odi=True))
    if norm != "l1":
        ensemble.run("square", lambda stage: stage.query(100, rescale=True))
    return ensemble.best.x_adv


class Standard(ArtAttack):
    """`standard` as an ART evasion attack."""

    perturb = staticmethod(standard)


class Quick(ArtAttack):
    """`quick` as an ART evasion attack."""

    perturb = staticmethod(quick)
