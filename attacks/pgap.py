"""Gradient steps to the edge of what SSIM calls similar."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from robusteval.art.to_art import ArtAttack
from robusteval.registry import ATTACKS
from robusteval.search.balls import quantise
from robusteval.search.descent import Found, Stop, class_objective, keep_best
from robusteval.search.ssim_ball import StructureBall

# the signatures spell these out, as the catalogue of attacks is read from source
Solver = Literal["box", "closed"]
Reference = Literal["previous", "original"]
Stats = Literal["global", "channel"]


@ATTACKS.add("pgap", norms=("ssim",), knowledge="white-box")
def pgap(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    targeted: bool = False,
    seeds: Tensor | None = None,
    mask: Tensor | None = None,
    eps2: float = 0.005,
    steps: int = 50,
    solver: Literal["box", "closed"] = "box",
    reference: Literal["previous", "original"] = "previous",
    stats: Literal["global", "channel"] = "global",
    printed_constants: bool = False,
    kappa: float = 50.0,
    stop: Stop = "8bit",
) -> Tensor:
    """Steps to the edge of the SSIM ball at constant mean: small, and to the first label change.

    Perceptually guided adversarial perturbations: Can Perceptual Guidance Lead to Semantically
    Explainable Adversarial Perturbations?, arXiv:2106.12731, Algorithm 1. Each step solves Eq. 9
    exactly, for which the paper calls a solver of quadratic programmes: without the pixel box by
    the part of the gradient that is free of its mean, within it by two unknowns per image.
    Departs from the paper in the radius k21, which as printed lacks ``-|x - mean|**2``, and in
    going on after a label change that rounding to 8 bits would undo.

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
        Broadcastable to `x`; zero where a pixel may not change. The constraints stay those of
        the whole image.
    eps2 : float
        Distance sqrt(1 - S2) that a step may go, in (0, 1); S2 is the structural part of SSIM
        with the image as its one window. About sqrt(2) * eps2 * (standard deviation of the image)
        per pixel (root mean square), in units of the [0, 1] pixel range.
    steps : int
        Gradient steps, at most.
    solver : {"box", "closed"}
        `box`: each step solves the problem within [0, 1], so that mean and S2 are kept. `closed`:
        it is solved without and clipped, which saves little time and keeps neither where many
        pixels are black or white.
    reference : {"previous", "original"}
        What `eps2` is measured from. `previous`, as published: each step from the one before, so
        that n steps lead as far as n * eps2. `original`: all steps from `x`, projected, so that
        the result itself satisfies S2 >= 1 - eps2**2; 2.5 / steps of the radius each.
    stats : {"global", "channel"}
        One mean and one S2 for all channels, or for each its own.
    printed_constants : bool
        Use k21 as printed, which violates S2 >= 1 - eps2**2 grossly.
    kappa : float
        Margin beyond the goal, in logits, at which there is nothing more to gain.
    stop : {"8bit", "float", "never"}
        When an image is finished. `float`, as published: at the first success. `8bit`: at the
        first that is one after rounding to 8 bits, too. `never`: after the last step.

    Returns
    -------
    Tensor
        Images ``(n, c, h, w)`` in [0, 1]; not rounded, as that would move the mean.

    Raises
    ------
    ValueError
        If a parameter is out of range.
    """
    if solver not in get_args(Solver):
        raise ValueError(f"solver must be box or closed, not {solver!r}")
    return _search(
        model,
        x,
        y,
        targeted=targeted,
        mask=mask,
        eps2=eps2,
        steps=steps,
        keep_mean=True,
        exact=solver == "box",
        reference=reference,
        stats=stats,
        printed=printed_constants,
        kappa=kappa,
        stop=stop,
    )


@ATTACKS.add("fpgap", norms=("ssim",), knowledge="white-box")
def fpgap(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    targeted: bool = False,
    seeds: Tensor | None = None,
    mask: Tensor | None = None,
    eps2: float = 0.005,
    steps: int = 50,
    reference: Literal["previous", "original"] = "previous",
    stats: Literal["global", "channel"] = "global",
    printed_constants: bool = False,
    kappa: float = 50.0,
    stop: Stop = "8bit",
) -> Tensor:
    """The fast form of `pgap`: the plain gradient instead of its part that keeps the mean.

    Can Perceptual Guidance Lead to Semantically Explainable Adversarial Perturbations?,
    arXiv:2106.12731, Algorithm 2: Eq. 10, then clipped to [0, 1]. What it gives up of Eq. 9 is
    the mean; S2 >= 1 - eps2**2 holds, up to clipping. Departs from the paper as `pgap` does.

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
        Broadcastable to `x`; zero where a pixel may not change. The constraints stay those of
        the whole image.
    eps2 : float
        Distance sqrt(1 - S2) that a step may go, in (0, 1); S2 is the structural part of SSIM
        with the image as its one window. About sqrt(2) * eps2 * (standard deviation of the image)
        per pixel (root mean square), in units of the [0, 1] pixel range.
    steps : int
        Gradient steps, at most.
    reference : {"previous", "original"}
        What `eps2` is measured from: the iterate before, as published, or `x`.
    stats : {"global", "channel"}
        One S2 for all channels, or for each its own.
    printed_constants : bool
        Use k21 as printed, which violates S2 >= 1 - eps2**2 grossly.
    kappa : float
        Margin beyond the goal, in logits, at which there is nothing more to gain.
    stop : {"8bit", "float", "never"}
        When an image is finished. `float`, as published: at the first success. `8bit`: at the
        first that is one after rounding to 8 bits, too. `never`: after the last step.

    Returns
    -------
    Tensor
        Images ``(n, c, h, w)`` in [0, 1]; not rounded.

    Raises
    ------
    ValueError
        If a parameter is out of range.
    """
    return _search(
        model,
        x,
        y,
        targeted=targeted,
        mask=mask,
        eps2=eps2,
        steps=steps,
        keep_mean=False,
        exact=False,
        reference=reference,
        stats=stats,
        printed=printed_constants,
        kappa=kappa,
        stop=stop,
    )


def _search(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    targeted: bool,
    mask: Tensor | None,
    eps2: float,
    steps: int,
    keep_mean: bool,
    exact: bool,
    reference: str,
    stats: str,
    printed: bool,
    kappa: float,
    stop: str,
) -> Tensor:
    """Both algorithms: they differ in the ball, not in the search."""
    if not 0 < eps2 < 1:
        raise ValueError(f"eps2 must lie between 0 and 1, both excluded, not {eps2:g}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    if not kappa >= 0:
        raise ValueError(f"kappa must be 0 or more, not {kappa:g}")
    words = {"reference": Reference, "stats": Stats, "stop": Stop}
    for (name, kind), word in zip(words.items(), (reference, stats, stop), strict=True):
        if word not in get_args(kind):
            raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}, not {word!r}")

    n = len(x)
    free = None if mask is None else (mask != 0).expand_as(x)

    def windows(z: Tensor) -> Tensor:
        return z.flatten(2).flatten(0, 1) if stats == "channel" else z.flatten(1)

    def step(here: Tensor, index: Tensor, grad: Tensor) -> Tensor:
        """The next iterate of images `here` ``(m, c, h, w)``, rows `index` of the batch."""
        origin = here if reference == "previous" else x[index]
        ball = StructureBall.around(
            windows(origin),
            eps2,
            None if free is None else windows(free[index]),
            keep_mean=keep_mean,
            exact=exact,
            printed=printed,
        )
        rise = windows(-grad.nan_to_num(0.0, 0.0, 0.0))
        if reference == "previous":
            z = ball.top(rise)
        else:
            z = ball.nearest(windows(here) + 2.5 / steps * ball.radius * ball.step(rise))
        return z.to(x).view_as(here)

    objective = class_objective(model, y, targeted=targeted, loss="margin")
    none = torch.zeros(n, dtype=torch.bool, device=x.device)
    best = Found(x.clone(), torch.full((n,), torch.inf, device=x.device), none, none.clone())
    left, x_adv = torch.arange(n, device=x.device), x  # rows still searched
    for i in range(steps + 1):
        if len(left) == 0:
            break
        last = i == steps
        x_adv = x_adv.detach().requires_grad_(not last)
        with torch.set_grad_enabled(not last):
            score = objective(x_adv, left)
            loss = score.loss.clamp_min(-kappa)
        grad = None if last else torch.autograd.grad(loss.sum(), x_adv)[0]

        # keep the best, finish what can be finished
        x_adv, loss, success = x_adv.detach(), loss.detach(), score.success
        finished = success & (stop == "float")
        if stop == "8bit" and bool(success.any()):
            with torch.no_grad():
                rounded = objective(quantise(x_adv[success]), left[success])
            finished[success] = rounded.success
        keep_best(best, left, Found(x_adv, loss, success, finished))
        if grad is None:
            break

        # drop what is finished, step the rest
        going = ~finished
        if not bool(going.all()):
            left, x_adv, grad = left[going], x_adv[going], grad[going]
        x_adv = step(x_adv, left, grad)
    return best.x_adv


class PGAP(ArtAttack):
    """`pgap` as an ART evasion attack."""

    perturb = staticmethod(pgap)


class FPGAP(ArtAttack):
    """`fpgap` as an ART evasion attack."""

    perturb = staticmethod(fpgap)
