"""Changes that come in squares of neighbouring pixels: few squares, and little in each."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, autograd, nn

from robusteval.art.art_classes import make_art_class
from robusteval.models.steps import book_rows, tell_step
from robusteval.registry import ATTACKS
from robusteval.search.balls import quantise
from robusteval.search.constants import Constants
from robusteval.search.descent import Found, build_class_objective, keep_best
from robusteval.search.groups import Groups
from robusteval.search.losses import attacker_loss


@ATTACKS.add("strattack", norms=(), knowledge="white-box", needs={"side": {"tau": {"not": (0,)}}})
def strattack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    targeted: bool = False,
    seeds: Tensor | None = None,
    mask: Tensor | None = None,
    side: int | None = None,
    tau: float = 2.0,
    gamma: float = 1.0,
    limit: float = 1.0,
    rho: float = 1.0,
    alpha: float = 5.0,
    steps: int = 100,
    rounds: int = 5,
    images: Literal["8bit", "float"] = "8bit",
) -> Tensor:
    """Few squares of pixels change, each as little as possible: group-sparse Carlini and Wagner.

    Structured Adversarial Attack: Towards General Implementation and Better Interpretability,
    arXiv:1808.01664 (StrAttack): a constant times the hinge of the margin, plus `gamma` times the
    squared l2 length of the change, plus `tau` times the sum of its lengths in the squares, all
    within the pixel box and `limit`, by the alternating directions (ADMM) of its section 3; the
    settings of rho and alpha are those of adv-lib. Departs from it in the first constant, with
    which the attack would just succeed on a linear network of the slope at `x`, where the paper
    has one for all images; and in what is the result: of all successes that the search has met
    the one of the least price.

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
    side : int, optional
        Of a square, in pixels; squares do not overlap. As published 2 of images up to 32 pixels
        wide or high, else 13. Not beside `tau=0`.
    tau : float
        Price of a square's l2 length; 0 gives the attack of Carlini and Wagner.
    gamma : float
        Price of the squared l2 length of the whole change.
    limit : float
        Most that a value may change, in units of the [0, 1] pixel range.
    rho : float
        How strongly the four copies of the change are tied to each other.
    alpha : float
        How slowly the gradient is followed: its weight falls as ``1 / (alpha * sqrt(step))``.
    steps : int
        Steps of a search, each one pass with a gradient and one without.
    rounds : int
        Searches from the start, each with another constant, halved between those that lead to the
        class and those that do not.
    images : {"8bit", "float"}
        Which images are results: those that survive saving, or all.

    Returns
    -------
    Tensor
        Images ``(n, c, h, w)`` in [0, 1]; `x` where no success was found.

    Raises
    ------
    ValueError
        If a parameter is out of range.
    """
    small = min(x.shape[2:]) <= 32
    if side is not None and side > max(x.shape[2:]):
        raise ValueError(f"side must be at most {max(x.shape[2:])}, of these images, not {side}")
    groups = Groups((2 if small else 13) if side is None else side)
    if min(steps, rounds) < 1:
        raise ValueError(f"steps and rounds must be at least 1, not {steps} and {rounds}")
    if not (0 <= tau < math.inf and min(gamma, rho, alpha) > 0 and 0 < limit <= 1):
        raise ValueError(
            "tau must be at least 0, gamma, rho and alpha above 0, limit above 0 and at most 1,"
            f" not {tau:g}, {gamma:g}, {rho:g}, {alpha:g} and {limit:g}"
        )
    objective = build_class_objective(model, y, targeted=targeted, loss="margin")
    best = Found.nothing(x)
    if len(x) == 0:
        return best.x_adv
    with torch.no_grad():
        left = (~objective(x, torch.arange(len(x), device=x.device)).is_adv).nonzero().flatten()
    if len(left) == 0:
        return best.x_adv

    def measure_gap(z: Tensor) -> Tensor:
        with book_rows(left):
            logits = model(z)
        return attacker_loss(logits, y[left], targeted=targeted, loss="margin")

    # the box of the change
    origin = x[left]
    most = math.floor(limit * 255 + 1e-4) / 255 if images == "8bit" else limit
    free = 1.0 if mask is None else (mask != 0).expand_as(x)[left].to(x)
    lower, upper = (-origin).clamp_min(-most) * free, (1 - origin).clamp_max(most) * free

    # what 8 bits would undo is not enough
    constants = Constants(measure_gap, origin, 1 / 255 if images == "8bit" else 0.0)
    _, multiplier = groups.solve_linear(constants.slope * free, constants.far, tau, gamma)
    constants.now = torch.where(multiplier.isfinite(), multiplier, constants.now)

    for turn in range(rounds):
        reached = torch.zeros(len(left), dtype=torch.bool, device=x.device)
        z = torch.zeros_like(origin)
        u, v, s = torch.zeros_like(z), torch.zeros_like(z), torch.zeros_like(z)  # dual variables
        for k in range(1, steps + 1):
            tell_step(turn * steps + k - 1, rounds * steps)
            # Proposition 1: short, within the box, and in few squares
            short = (rho * z - u) / (rho + 2 * gamma)
            inside = torch.minimum(torch.maximum(z - s / rho, lower), upper)
            grouped = groups.shrink(z - v / rho, tau / rho)

            # what has few squares is the image
            delta = torch.minimum(torch.maximum(grouped, lower), upper)
            x_adv = torch.where(delta != 0, origin + delta, origin).clamp(0, 1)
            if images == "8bit":
                x_adv = torch.where(delta != 0, quantise(x_adv), origin)
            with torch.no_grad():
                is_adv = objective(x_adv, left).is_adv
            price = groups.price(x_adv - origin, tau, gamma)
            keep_best(best, left, Found(x_adv, price, is_adv, is_adv))
            reached |= is_adv

            # Proposition 2: along the gradient, near the others
            point = (origin + z).detach().requires_grad_()
            loss = constants.weigh(measure_gap(point))
            grad = autograd.grad(loss.sum(), point)[0].nan_to_num(0.0, 0.0, 0.0)
            slowness = alpha * math.sqrt(k)
            others = rho * (short + inside + grouped) + u + s + v
            z = (slowness * z + others - grad) / (slowness + 3 * rho)
            u, s, v = u + rho * (short - z), s + rho * (inside - z), v + rho * (grouped - z)
        constants.halve(reached)
    return torch.where(best.is_adv.view(-1, 1, 1, 1), best.x_adv, x)


def __getattr__(name: str) -> Any:
    """`StrAttack`, an ART evasion attack."""
    return make_art_class(name, StrAttack=strattack)
