"""Square Attack: what random search alone finds, whatever the gradients say."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from robusteval.art.art_classes import make_art_class
from robusteval.registry import ATTACKS
from robusteval.search.balls import Ball
from robusteval.search.descent import Stop, build_class_objective
from robusteval.search.square import search_square


@ATTACKS.add("square", norms=("linf", "l2"), knowledge="black-box")
def square(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    targeted: bool = False,
    seeds: Tensor | None = None,
    mask: Tensor | None = None,
    norm: Literal["linf", "l2"] = "linf",
    eps: float = 8 / 255,
    queries: int = 5000,
    share: float = 0.8,
    rescale: bool = False,
    stop: Stop = "8bit",
) -> Tensor:
    """Random search by square windows, which needs no gradient.

    Square Attack: a query-efficient black-box adversarial attack via random search,
    arXiv:1912.00049. What is lowered is the logit margin. Departs from the released code, see
    `robusteval.search.square.search_square`: window and signs are each image's own, and the last
    row and column are covered.

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
        One seed per image ``(n,)`` for windows and signs; zeros if not given.
    mask : Tensor, optional
        Broadcastable to `x`; zero where a pixel may not change.
    norm : {"linf", "l2"}
        Norm of the ball. On linear models of 60 values a search comes within 5 % of the optimum in
        linf with 1,000 queries, within 0.2 % with `rescale`; in l2, whose bumps fit no weights,
        within 25 %, and not within 10 % with 5,000.
    eps : float
        Radius of the ball, in units of the [0, 1] pixel range.
    queries : int
        Forward passes per image that does not fall.
    share : float
        Of the pixels that the first windows cover, 0 to 1.
    rescale : bool
        Shrink windows as fast as `queries` asks for, instead of as for 10,000 as AutoAttack does.
    stop : {"8bit", "float", "never"}
        When an image is finished, see `robusteval.search.descent.descend`.

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
    if queries < 1:
        raise ValueError(f"queries must be at least 1, not {queries}")
    if not 0 < share <= 1:
        raise ValueError(f"share must be above 0 up to 1, not {share:g}")
    found = search_square(
        build_class_objective(model, y, targeted=targeted, loss="margin"),
        ball,
        seeds,
        queries=queries,
        share=share,
        rescale=rescale,
        stop=stop,
    )
    return found.x_adv


def __getattr__(name: str) -> Any:
    """`Square`, an ART evasion attack."""
    return make_art_class(name, Square=square)
