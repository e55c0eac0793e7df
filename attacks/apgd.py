"""Auto-PGD: the first attack of every strong ensemble."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from robusteval.art.art_classes import make_art_class
from robusteval.models.steps import book_rows
from robusteval.registry import ATTACKS
from robusteval.search.abreast import search_abreast
from robusteval.search.apgd import choose, search_apgd
from robusteval.search.balls import Ball, Norm
from robusteval.search.descent import (
    Found,
    Objective,
    Stop,
    build_aimed_objective,
    build_class_objective,
)
from robusteval.search.losses import Loss
from robusteval.search.starts import Order, diversify_start, order_targets

Start = Literal["uniform", "odi", "image"]


@ATTACKS.add(
    "apgd",
    norms=("linf", "l2", "l1"),
    knowledge="white-box",
    needs={
        "odi_steps": {"start": ("odi",)},
        "by": {"targets": 1},
        "candidates": {"targets": 1, "by": ("distance",)},
    },
)
def apgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    targeted: bool = False,
    seeds: Tensor | None = None,
    mask: Tensor | None = None,
    norm: Norm = "linf",
    eps: float = 8 / 255,
    steps: int = 100,
    loss: Loss = "ce",
    restarts: int = 1,
    start: Start = "uniform",
    odi_steps: int = 2,
    targets: int = 0,
    by: Order = "distance",
    candidates: int = 100,
    stop: Stop = "8bit",
) -> Tensor:
    """Descent without a step size to choose, restarted and aimed at classes on the survivors.

    Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
    attacks, arXiv:2003.01690, algorithm 1; l1: arXiv:2103.01208. Departs from the authors' code
    in counting a hit of any class where it aims at one, in drawing an image's starts from its own
    seed, and in ending the search for an image at its first success that survives 8 bits.

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
        One seed per image ``(n,)`` for the starts; zeros if not given.
    mask : Tensor, optional
        Broadcastable to `x`; zero where a pixel may not change.
    norm : {"linf", "l2", "l1"}
        Norm of the ball.
    eps : float
        Radius of the ball, in units of the [0, 1] pixel range.
    steps : int
        Gradient steps of one search.
    loss : {"ce", "margin", "pm", "dlr"}
        What is lowered: cross-entropy, logit margin, probability margin, or difference of logits
        ratio; with `targets` each with the one class in the place of the best other.
    restarts : int
        Searches, or rounds of one search per target, on the images that are not finished: one, then
        two side by side, then four, until one of them finishes the image.
    start : {"uniform", "odi", "image"}
        Where a search begins: at a random point of the ball, where the network answers otherwise
        (output diversified initialisation, arXiv:2003.06878), or at `x`, restarts at random.
    odi_steps : int
        Steps of `odi`, each of one more forward and backward pass.
    targets : int
        Aim at so many other classes of each image, the most promising first, one search for each;
        any class but `y` is a success. 0: no aim. Of k classes k - 1 at most.
    by : {"distance", "logits"}
        What makes a target promising: the distance to it in the linearised network (MALT,
        arXiv:2407.02240), for a backward pass per candidate, or its logit.
    candidates : int
        Classes whose distance is measured, those of the largest logits.
    stop : {"8bit", "float", "never"}
        When an image is finished, see `robusteval.search.apgd.search_apgd`.

    Returns
    -------
    Tensor
        Images ``(n, c, h, w)`` inside the ball and in [0, 1].

    Raises
    ------
    ValueError
        If a parameter is out of range, or the model has no more classes than `targets`.
    """
    ball = Ball.around(x, norm, eps, mask)
    least = {"steps": steps, "restarts": restarts, "odi_steps": odi_steps, "candidates": candidates}
    for name, value in least.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    if targets < 0 or (targets and targeted):
        raise ValueError("targets must be 0 or more, and 0 with targeted, which has its own")
    if targets and len(x) == 0:
        check_targets(targets, model(x).shape[1])
    if len(x) == 0 or eps == 0:
        return x.clone()
    given = torch.zeros(len(x), dtype=torch.int64) if seeds is None else seeds
    aims: Tensor | None = None
    if targets:
        aims = order_targets(model, ball, y, count=targets, by=by, candidates=candidates)
        check_targets(min(targets, candidates), aims.shape[1] + 1)

    def search(rows: Tensor, run: Tensor, abreast: int) -> Found:
        some, here, own = given[rows.cpu()] + run.cpu(), ball.pick(rows), y[rows]
        objective: Objective
        if aims is None:
            objective = build_class_objective(model, own, targeted=targeted, loss=loss)
        else:
            aim = aims[rows, run % aims.shape[1]]
            objective = build_aimed_objective(model, own, aim, loss)
        with book_rows(rows):
            if start == "odi":
                x_adv = diversify_start(model, here, some, steps=odi_steps)
            else:
                x_adv = here.sample(some)
            if start == "image":
                x_adv = choose(run == 0, here.x, x_adv)
            return search_apgd(objective, here, x_adv, steps=steps, stop=stop, abreast=abreast)

    times = restarts * (1 if aims is None else aims.shape[1])
    return search_abreast(search, x, times).x_adv


def check_targets(targets: int, classes: int) -> None:
    """ValueError if more classes are to be aimed at than there are besides an image's own."""
    if classes < 2:
        raise ValueError("there is no class to aim at: the model has only one")
    if targets > classes - 1:
        raise ValueError(
            f"targets must be at most {classes - 1}, not {targets}: the model has {classes} classes"
        )


def __getattr__(name: str) -> Any:
    """`APGD`, an ART evasion attack."""
    return make_art_class(name, APGD=apgd)
