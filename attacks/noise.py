"""Random noise: what an attack must beat before it counts as one."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from robusteval.art.art_classes import make_art_class
from robusteval.registry import ATTACKS
from robusteval.search.abreast import descend_from_starts
from robusteval.search.balls import Ball, Norm
from robusteval.search.descent import build_class_objective


@ATTACKS.add("noise", norms=("linf", "l2", "l1"), knowledge="none")
def noise(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    targeted: bool = False,
    seeds: Tensor | None = None,
    mask: Tensor | None = None,
    norm: Norm = "linf",
    eps: float = 8 / 255,
    tries: int = 10,
) -> Tensor:
    """Random points of the ball, the first that fools: the baseline below any attack.

    Uniform in the linf cube, uniform in direction on the rim of the l2 ball, uniform on that of the
    l1 ball. No paper: the control of arXiv:1902.06705, section 4.3.

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
        Norm of the ball.
    eps : float
        Radius of the ball, in units of the [0, 1] pixel range.
    tries : int
        Random points per image, at most.

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
    if tries < 1:
        raise ValueError(f"tries must be at least 1, not {tries}")
    found = descend_from_starts(
        build_class_objective(model, y, targeted=targeted, loss="margin"),
        ball,
        seeds,
        restarts=tries,
        random_start=True,
        step=0.0,
        steps=0,
        stop="8bit",
    )
    return found.x_adv


def __getattr__(name: str) -> Any:
    """`Noise`, an ART evasion attack."""
    return make_art_class(name, Noise=noise)
