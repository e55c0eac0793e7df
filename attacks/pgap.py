"""Gradient steps to the edge of what SSIM calls similar."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from robusteval.art.art_classes import make_art_class
from robusteval.registry import ATTACKS
from robusteval.search.balls import quantise
from robusteval.search.descent import Found, Objective, Score, Stop, build_class_objective, descend
from robusteval.search.mean_interval import MeanInterval
from robusteval.search.ssim_ball import StructureBall

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
    eps1: float = 0.0,
    steps: int = 50,
    solver: Solver = "box",
    reference: Reference = "previous",
    stats: Stats = "global",
    printed_constants: bool = False,
    kappa: float = 50.0,
    stop: Stop = "8bit",
) -> Tensor:
    """Steps to the edge of the SSIM ball, usually at constant mean, to the first label change.

    Perceptually guided adversarial perturbations: Can Perceptual Guidance Lead to Semantically
    Explainable Adversarial Perturbations?, arXiv:2106.12731, Algorithm 1. Each step solves Eq. 9
    exactly, for which the paper calls a solver of quadratic programmes: without the pixel box by
    the part of the gradient that is free of its mean, within it by two unknowns per image. With
    `eps1` it is Eq. 8, where the mean may move: to the end of its interval or, where pixels are
    black or white, to a place that is found by sections. Departs from the paper in the radius k21,
    which as printed lacks ``-|x - mean|**2``, and in going on after a label change that rounding
    to 8 bits would undo.

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
    eps1 : float
        Distance sqrt(1 - S1) that the mean may go in a step, from 0 (as published for all but one
        example: it stays) to below 1; S1 is the part of SSIM that compares means. From a mean m
        that is about sqrt(2) * eps1 * m, in units of the [0, 1] pixel range.
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
    return search(
        model,
        x,
        y,
        targeted=targeted,
        mask=mask,
        eps2=eps2,
        eps1=eps1,
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
    reference: Reference = "previous",
    stats: Stats = "global",
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
    return search(
        model,
        x,
        y,
        targeted=targeted,
        mask=mask,
        eps2=eps2,
        eps1=0.0,
        steps=steps,
        keep_mean=False,
        exact=False,
        reference=reference,
        stats=stats,
        printed=printed_constants,
        kappa=kappa,
        stop=stop,
    )


def search(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    targeted: bool,
    mask: Tensor | None,
    eps2: float,
    eps1: float,
    steps: int,
    keep_mean: bool,
    exact: bool,
    reference: Reference,
    stats: Stats,
    printed: bool,
    kappa: float,
    stop: Stop,
) -> Tensor:
    """Both algorithms: they differ in the ball, not in the search."""
    if not 0 < eps2 < 1:
        raise ValueError(f"eps2 must lie between 0 and 1, both excluded, not {eps2:g}")
    if not 0 <= eps1 < 1:
        raise ValueError(f"eps1 must be from 0 to below 1, not {eps1:g}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    if not kappa >= 0:
        raise ValueError(f"kappa must be 0 or more, not {kappa:g}")
    objective = build_class_objective(model, y, targeted=targeted, loss="margin")

    def score_bounded(x_adv: Tensor, index: Tensor) -> Score:
        score = objective(x_adv, index)
        return score._replace(loss=score.loss.clamp_min(-kappa))

    free = None if mask is None else (mask != 0).expand_as(x)
    moves = StructureMoves(
        None if reference == "previous" else x,
        free,
        eps2,
        eps1,
        steps,
        keep_mean,
        exact,
        stats,
        printed,
    )
    return descend(score_bounded, moves, x, steps=steps, stop=stop).x_adv


class StructureMoves(NamedTuple):
    """Steps to the edge of what SSIM calls similar to an image: Eq. 8 to 10."""

    origin: Tensor | None  # (n, c, h, w), from which steps are measured; None: the iterate before
    free: Tensor | None  # (n, c, h, w) bool, what may change; None: everything
    eps2: float
    eps1: float
    steps: int
    keep_mean: bool
    exact: bool
    stats: Stats
    printed: bool

    def select(self, index: Tensor) -> StructureMoves:
        """Steps of some of the images."""
        origin, free = (None if z is None else z[index] for z in (self.origin, self.free))
        return self._replace(origin=origin, free=free)

    def move(self, x_adv: Tensor, grad: Tensor) -> Tensor:
        """The image of the ball that the gradient favours, or a step projected to the ball."""
        ball = StructureBall.around(
            self.to_windows(x_adv if self.origin is None else self.origin),
            self.eps2,
            None if self.free is None else self.to_windows(self.free),
            keep_mean=self.keep_mean,
            exact=self.exact,
            printed=self.printed,
        )
        rise = self.to_windows(-grad.nan_to_num(0.0, 0.0, 0.0))
        means = None
        if self.eps1:
            means = MeanInterval.around(ball, self.eps1, printed=self.printed)
        if self.origin is None:
            z = ball.maximise(rise) if means is None else means.maximise(ball, rise, self.eps2)
        else:
            share = 2.5 / self.steps
            z = self.to_windows(x_adv) + share * ball.radius * ball.find_direction(rise)
            if means is None:
                z = ball.project(z)
            else:
                z = z + share * means.find_direction(ball, rise)
                z = means.project(ball, z, self.eps2)
        return z.to(x_adv).view_as(x_adv)

    def settle(self, objective: Objective, index: Tensor, x_adv: Tensor, loss: Tensor) -> Found:
        """The images themselves, as rounding moves the mean; finished where it undoes nothing."""
        with torch.no_grad():
            finished = objective(quantise(x_adv), index).is_adv
        return Found(x_adv, loss, torch.ones_like(finished), finished)

    def to_windows(self, z: Tensor) -> Tensor:
        """Images, or their channels, as the rows ``(windows, values)`` that SSIM compares."""
        return z.flatten(2).flatten(0, 1) if self.stats == "channel" else z.flatten(1)


def __getattr__(name: str) -> Any:
    """`PGAP` and `FPGAP`, ART evasion attacks."""
    return make_art_class(name, PGAP=pgap, FPGAP=fpgap)
