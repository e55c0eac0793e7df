"""The stages of AutoAttack, for those who must quote its number."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from robusteval.art.art_classes import make_art_class
from robusteval.registry import ATTACKS
from robusteval.search.balls import Ball
from robusteval.search.ensemble import Ensemble


@ATTACKS.add("autoattack", norms=("linf", "l2"), knowledge="white-box")
def autoattack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    targeted: bool = False,
    seeds: Tensor | None = None,
    mask: Tensor | None = None,
    norm: Literal["linf", "l2"] = "linf",
    eps: float = 8 / 255,
) -> Tensor:
    """AutoAttack's four attacks, each on what those before have left.

    Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
    attacks, arXiv:2003.01690, section 6: Auto-PGD on cross-entropy and, aimed at the nine likeliest
    classes, on the difference of logits ratio; FAB likewise (arXiv:1907.02044); Square
    (arXiv:1912.00049). Steps and queries are those of its version `standard`. Departs from it in
    that the attacks are those here, with what they depart in, and end at a success.

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
    norm : {"linf", "l2"}
        Norm of the ball.
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
    ball = Ball.around(x, norm, eps, mask)
    ensemble = Ensemble(model, ball, y, seeds, targeted=targeted, stages=4)
    if len(x) == 0 or eps == 0:
        return x.clone()
    ensemble.run("apgd", lambda stage: stage.descend("ce", 100))
    ensemble.run("targets", lambda stage: stage.descend("dlr", 100, targets=9, by="logits"))
    ensemble.run("fab", lambda stage: stage.approach("fab", norm, eps))
    ensemble.run("square", lambda stage: stage.query(5000))
    return ensemble.best.x_adv


def __getattr__(name: str) -> Any:
    """`AutoAttack`, an ART evasion attack."""
    return make_art_class(name, AutoAttack=autoattack)
