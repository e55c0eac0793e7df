"""Projected gradient descent and its single step."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from robusteval.art.art_classes import make_art_class
from robusteval.registry import ATTACKS
from robusteval.search.abreast import descend_from_starts
from robusteval.search.balls import Ball
from robusteval.search.descent import Stop, build_class_objective
from robusteval.search.losses import Loss, attacker_loss


@ATTACKS.add("pgd", norms=("linf", "l2"), knowledge="white-box")
def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    targeted: bool = False,
    seeds: Tensor | None = None,
    mask: Tensor | None = None,
    norm: Literal["linf", "l2"] = "linf",
    eps: float = 8 / 255,
    steps: int = 40,
    step: float | None = None,
    restarts: int = 1,
    random_start: bool = True,
    loss: Loss = "ce",
    stop: Stop = "8bit",
) -> Tensor:
    """Projected gradient descent, restarted on the survivors.

    Towards Deep Learning Models Resistant to Adversarial Attacks, arXiv:1706.06083, section 2.1.
    Departs from it where an image is finished: the search for it ends at the first success that
    survives rounding to 8 bits, which is then the result.

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
        One seed per image ``(n,)`` for the random starts; zeros if not given.
    mask : Tensor, optional
        Broadcastable to `x`; zero where a pixel may not change.
    norm : {"linf", "l2"}
        Norm of the ball. In l2 the steps of a search from a random start end within 2 % of a
        linear model's optimum, from the image within 0.2 %.
    eps : float
        Radius of the ball, in units of the [0, 1] pixel range.
    steps : int
        Gradient steps per restart.
    step : float, optional
        Length of a step in the norm, in units of the [0, 1] pixel range; 2.5 * eps / steps if
        not given, so that the ball can be crossed.
    restarts : int
        Searches, each from its own random start, on the images that are not finished: one, then
        two side by side, then four, until one of them finishes the image.
    random_start : bool
        Start the first search at a random point of the ball instead of at `x`.
    loss : {"ce", "margin", "pm", "dlr"}
        What is lowered: cross-entropy in the form that keeps its direction however sure the model
        is, logit margin, probability margin, or difference of logits ratio; see
        `robusteval.search.losses.attacker_loss`.
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
    if steps < 1 or restarts < 1:
        raise ValueError(f"steps and restarts must be at least 1, not {steps} and {restarts}")
    if step is not None and not step > 0:
        raise ValueError(f"step must be positive, not {step:g}")
    found = descend_from_starts(
        build_class_objective(model, y, targeted=targeted, loss=loss),
        ball,
        seeds,
        restarts=restarts,
        random_start=random_start,
        step=2.5 * eps / steps if step is None else step,
        steps=steps,
        stop=stop,
    )
    return found.x_adv


@ATTACKS.add("fgsm", norms=("linf", "l2"), knowledge="white-box")
def fgsm(
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
    """One gradient step to the edge of the ball: quick, and no evidence of robustness.

    Explaining and Harnessing Adversarial Examples, arXiv:1412.6572, section 4 (the l2 form after
    arXiv:1706.06083).

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
        Not used: nothing is random.
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
    if len(x) == 0:
        return x.clone()
    z = x.detach().requires_grad_()
    loss = attacker_loss(model(z), y, targeted=targeted, loss="ce")
    grad = torch.autograd.grad(loss.sum(), z)[0]
    return ball.project(x - eps * ball.find_direction(grad))


def __getattr__(name: str) -> Any:
    """`PGD` and `FGSM`, ART evasion attacks."""
    return make_art_class(name, PGD=pgd, FGSM=fgsm)
