"""The attack by input significance: change what matters most to the network."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, autograd, nn

from robusteval.art.art_classes import make_art_class
from robusteval.models.classifier import Classifier, predict_classes
from robusteval.models.steps import book_rows, tell_step
from robusteval.registry import ATTACKS
from robusteval.search import descent
from robusteval.search.balls import Ball

Variant = Literal["improved", "paper"]
Measure = Literal["l0", "l0_pixels", "l2", "linf"]
Indicator = Literal["relevance", "sensitivity", "gain"]
Lowered = Literal["logit", "margin"]
Centre = Literal["grey", "black", "model"]
FirstSuccess = Literal["8bit", "float"]

STEP = {"l2": 0.05, "linf": 0.03}  # as published, where the data lie in [-1, 1]: .1 and .06
PATIENCE = 4  # steps in a row that are taken back


@ATTACKS.add(
    "isi",
    norms=("l0", "l0_pixels", "l2", "linf"),
    knowledge="white-box",
    needs={
        "eps": {"norm": ("l2", "linf")},
        "step": {"norm": ("l2", "linf")},
        "indicator": {"norm": ("l0", "l0_pixels", "l2")},
        "values": {"norm": ("l0", "l0_pixels", "l2")},
        "centre": (
            {"norm": ("l0", "l0_pixels", "l2"), "indicator": ("relevance",)},
            {"norm": ("l0", "l0_pixels", "l2"), "indicator": (None,), "variant": ("paper",)},
        ),
        "undo": {"norm": ("l0", "l0_pixels")},
        "prune": {"norm": ("l0", "l0_pixels")},
        "stop": {"norm": ("l2", "linf")},
    },
)
def isi(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    targeted: bool = False,
    seeds: Tensor | None = None,
    mask: Tensor | None = None,
    variant: Variant = "improved",
    norm: Measure = "l0",
    eps: float | None = None,
    indicator: Indicator | None = None,
    loss: Lowered | None = None,
    steps: int | None = None,
    step: float | None = None,
    values: int | None = None,
    centre: Centre = "grey",
    undo: bool | None = None,
    prune: bool | None = None,
    stop: FirstSuccess | None = None,
) -> Tensor:
    """Change the most significant values, a few per gradient, until the class changes.

    Generating Adversarial Examples with Input Significance Indicator, Neurocomputing 2020,
    doi:10.1016/j.neucom.2020.01.040; reconstructed from its authors' code. `variant=paper` is
    that code, but for three points. It assumes data in [-1, 1] silently; here `centre` says
    where zero is. A value at zero stays there and wastes a step; here it goes where the gradient
    promises more. Its l2 form leaves the pixel box; here the box is kept. `variant=improved`
    ranks by what a change is worth to first order, lowers the margin, takes back what did not
    help, and prunes.

    Relevance is gradient times input. On networks of ReLU and max-pooling that is layer-wise
    relevance propagation by the z-rule, LRP-0 (arXiv:1711.06104), where `centre` is the zero of
    the network's own input. With a smooth activation it is no more than gradient times input.

    Parameters
    ----------
    model : nn.Module
        Maps images in [0, 1] to logits ``(n, k)``.
    x : Tensor
        Images ``(n, c, h, w)`` in [0, 1].
    y : Tensor
        Labels ``(n,)`` int64, or the classes to reach when `targeted`. An image whose prediction
        is not its label comes back as it is; the authors attack it too: hand in predictions.
    targeted : bool
        Reach class `y` instead of leaving it.
    seeds : Tensor, optional
        Not used: nothing is random.
    mask : Tensor, optional
        Broadcastable to `x`; zero where a pixel may not change.
    variant : {"improved", "paper"}
        Decides the parameters that are None.
    norm : {"l0", "l0_pixels", "l2", "linf"}
        What a step does. l0: a few values, each at most once, go to a bound of the box;
        l0_pixels: so do all channels of a few places. l2: a few values move by `step`. linf: all
        values move by `step`; within 1 % of a linear model's optimum, where l2 comes within 25 %.
    eps : float, optional
        Radius of the ball for l2 and linf, in units of the [0, 1] pixel range. None: no limit but
        `steps`, as published. Not for l0, where `steps` times `values` is the limit.
    indicator : {"relevance", "sensitivity", "gain"}, optional
        Ranks values: gradient times input, size of the gradient, or size of the gradient times
        the way the value would go. By relevance, values under l0 and l2 move across the centre,
        whatever the gradient says; all others move against the gradient. None: gain, or
        relevance as published.
    loss : {"logit", "margin"}, optional
        What is lowered: the logit of class `y`, or its lead over the best other; raised when
        `targeted`. None: margin, or logit as published.
    steps : int, optional
        Steps at most. None: 100, or 30 as published.
    step : float, optional
        How far a value moves in a step, in units of the [0, 1] pixel range; not for l0. None: as
        published, 0.05 under l2 and 0.03 under linf.
    values : int, optional
        Values, or places, that change in a step; not for linf, where all do. None: 20 under l2;
        under l0 2, or 1 as published.
    centre : {"grey", "black", "model"}
        Where relevance is zero: 0.5, as published; 0; or the mean of the model's normalisation.
        A value there is not chosen as long as any other speaks for the class.
    undo : bool, optional
        Take a step back that did not lower the loss, and leave its values alone from then on;
        after four in a row one stays, to get out of a dead end. l0 only. None: yes, or no as
        published.
    prune : bool, optional
        Put values back that a success does not need, see `robusteval.search.descent.prune`; l0
        only.
        None: yes, or no as published.
    stop : {"8bit", "float"}, optional
        An image is finished at its first success: at any, or under l2 and linf only at one that
        is still one as an 8-bit image, which is then the result. Under l0 an 8-bit image stays
        one anyway. None: 8bit, or float as published.

    Returns
    -------
    Tensor
        Images ``(n, c, h, w)`` in [0, 1]. Where there was no success, the image that
        the search had reached; for the improved variant without `undo`, that of lowest loss.

    Raises
    ------
    ValueError
        If a parameter is out of range, or does nothing under this norm.
    """
    improved = variant == "improved"
    indicator = indicator or ("gain" if improved else "relevance")
    loss = loss or ("margin" if improved else "logit")
    stop = stop or ("8bit" if improved else "float")
    steps = (100 if improved else 30) if steps is None else steps
    if norm == "l0" or norm == "l0_pixels":
        values = (2 if improved else 1) if values is None else values
        undo, prune = (improved if wish is None else wish for wish in (undo, prune))
        step = 1.0  # across the whole box
        ball = Ball.around(x, "linf", 1.0, mask)  # the box
    else:
        step = STEP[norm] if step is None else step
        values = 20 if values is None else values
        ball = Ball.around(x, *(("linf", 1.0) if eps is None else (norm, eps)), mask)
    if steps < 1 or values < 1:
        raise ValueError(f"steps and values must be at least 1, not {steps} and {values}")
    if not 0 < step <= 1:
        raise ValueError(f"step must be above 0 and at most 1, not {step:g}")
    zero = find_zero(model, centre)
    objective = (
        descent.build_class_objective(model, y, targeted=targeted, loss="margin")
        if loss == "margin"
        else build_logit_objective(model, y, targeted=targeted)
    )

    best_adv = x.detach().clone()
    best_loss = torch.full((len(x),), torch.inf, device=x.device)  # of best_adv
    adv_found = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    undone = torch.zeros(len(x), dtype=torch.int64, device=x.device)  # steps in a row
    left, here, z = torch.arange(len(x), device=x.device), ball, best_adv
    slope = torch.zeros_like(x)  # gradient at best_adv of the rows that are left
    free = ball.upper > ball.lower  # values that may still change
    for i in range(steps + 1):
        if len(left) == 0:
            break
        tell_step(i, steps + 1)
        last = i == steps
        z = z.detach().requires_grad_(not last)
        with torch.set_grad_enabled(not last):
            value, is_adv = objective(z, left)
        # rows that turn out finished waste this one backward pass; to drop them first would
        # take a second forward pass of all others
        grad = slope if last else autograd.grad(value.sum(), z)[0].nan_to_num(0.0, 0.0, 0.0)
        z, value = z.detach(), value.detach()

        # take over what serves
        if undo:
            is_kept = is_adv | (value < best_loss[left]) | (undone[left] == PATIENCE)
            undone[left] = torch.where(is_kept, 0, undone[left] + 1)
        else:
            is_smaller = value < best_loss[left] if improved else torch.ones_like(is_adv)
            is_kept = is_adv | (is_smaller & ~adv_found[left])
        best_adv[left[is_kept]], best_loss[left[is_kept]] = z[is_kept], value[is_kept]
        adv_found[left[is_adv]] = True
        if undo:
            worse = ~is_kept.view(-1, 1, 1, 1)
            z, grad = torch.where(worse, best_adv[left], z), torch.where(worse, slope, grad)

        # finish what can be finished
        finished = is_adv
        if stop == "8bit" and norm in STEP and bool(is_adv.any()):
            hit = left[is_adv]
            found = descent.round_successes(objective, here.pick(is_adv), hit, z[is_adv])
            best_adv[hit[found.is_adv]] = found.x_adv[found.is_adv]
            finished = is_adv.index_put((is_adv,), found.is_adv)
        if last:
            break
        if bool(finished.any()):
            left, here, free = left[~finished], here.pick(~finished), free[~finished]
            z, grad = z[~finished], grad[~finished]

        # change the most significant values
        across = zero if indicator == "relevance" and norm != "linf" else None
        goal = find_goals(z, grad, here, step, across)
        if norm == "linf":
            z = goal
        else:
            rank = rank_values(indicator, z, grad, goal, zero)
            chosen = choose_highest(rank, free, values, together=norm == "l0_pixels")
            z = torch.where(chosen, goal, z)
            if norm == "l2":
                z = here.project(z)
            else:
                free = free & ~chosen
        slope = grad

    if prune and (norm == "l0" or norm == "l0_pixels"):
        return descent.prune(model, x, best_adv, y, targeted=targeted, count=norm)
    return best_adv


def find_goals(
    z: Tensor, grad: Tensor, ball: Ball, step: float, across: Tensor | float | None
) -> Tensor:
    """Where each value would go: against the gradient or, if given, `across` a centre."""
    way = -grad.sign()
    if across is not None:
        side = (z - across).sign()
        way = torch.where(side == 0, way, -side)  # the published code stays at zero
    return torch.clamp(z + step * way, ball.lower, ball.upper)


def rank_values(
    indicator: Indicator, z: Tensor, grad: Tensor, goal: Tensor, zero: Tensor | float
) -> Tensor:
    """How much each value ``(n, c, h, w)`` speaks for what has this gradient."""
    if indicator == "relevance":
        return grad * (z - zero)
    if indicator == "sensitivity":
        return grad.abs()
    return grad.abs() * (goal - z).abs()


def choose_highest(rank: Tensor, free: Tensor, number: int, *, together: bool) -> Tensor:
    """Where the highest ranks are among the free values: ``(n, c, h, w)`` bool.

    With `together` the channels of a place share one rank, ``(n, 1, h, w)``.
    """
    if together:
        rank = torch.where(free, rank, 0.0).sum(1, keepdim=True)  # (n, 1, h, w)
        free = free.any(1, keepdim=True)
    flat = rank.masked_fill(~free, -torch.inf).flatten(1)
    if number == 1:
        highest, index = flat.max(1, keepdim=True)  # several times as fast
    else:
        highest, index = flat.topk(min(number, flat.shape[1]), dim=1)
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    return chosen.scatter(1, index, highest > -torch.inf).view_as(rank)


def build_logit_objective(model: nn.Module, y: Tensor, *, targeted: bool) -> descent.Objective:
    """Lower the logit of class `y` ``(n,)`` or, `targeted`, raise it."""

    def objective(x_adv: Tensor, index: Tensor) -> descent.Score:
        with book_rows(index):
            logits = model(x_adv)  # (m, k)
        own = logits.gather(1, y[index].unsqueeze(1)).squeeze(1)
        hit = predict_classes(logits.detach()) == y[index]
        return descent.Score(-own, hit) if targeted else descent.Score(own, ~hit)

    return objective


def find_zero(model: nn.Module, centre: Centre) -> Tensor | float:
    """The value without relevance, in units of the [0, 1] pixel range."""
    if centre != "model":
        return 0.5 if centre == "grey" else 0.0
    if not isinstance(model, Classifier):
        raise ValueError("centre=model is for a Classifier: other models hide their normalisation")
    return model.mean


def __getattr__(name: str) -> Any:
    """`ISI`, an ART evasion attack."""
    return make_art_class(name, ISI=isi)
