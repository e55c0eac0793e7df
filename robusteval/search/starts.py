"""Where searches begin, and which class each of them heads for."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, autograd, nn

from robusteval.models.seeds import per_image
from robusteval.models.steps import stop_if_asked
from robusteval.search.balls import Ball
from robusteval.search.hyperplane import measure_to_hyperplane

Order = Literal["distance", "logits"]


def diversify_start(model: nn.Module, ball: Ball, seeds: Tensor, *, steps: int = 2) -> Tensor:
    """Images of a ball far apart in what the network answers: a start for each search.

    Output Diversified Sampling for Effective Black- and White-box Attacks, arXiv:2003.06878,
    section 3.1: steps of the length of the radius along the gradient of a random combination of
    the logits; under l1 in a fifth of the values.

    Parameters
    ----------
    model : nn.Module
        Maps images in [0, 1] to logits ``(n, k)``.
    ball : Ball
        The balls around images ``(n, c, h, w)``.
    seeds : Tensor
        One per image ``(n,)``, for the weights of its logits.
    steps : int
        Forward and backward passes.

    Returns
    -------
    Tensor
        Images ``(n, c, h, w)`` in the ball.
    """
    x, weights, fifth = ball.x, None, ball.x[0].numel() / 5
    for _ in range(steps):
        stop_if_asked()
        x = x.detach().requires_grad_()
        logits = model(x).float()  # (n, k)
        if weights is None:
            weights = 2 * per_image(seeds, logits.shape[1:]).to(logits) - 1
        grad = autograd.grad((weights * logits).sum(), x)[0]
        if ball.norm == "l1":
            direction = ball.find_sparse_direction(grad, torch.full_like(weights[:, 0], fifth))
        else:
            direction = ball.find_direction(grad)
        x = ball.project(x.detach() + ball.eps * direction)
    return x


def order_targets(
    model: nn.Module,
    ball: Ball,
    y: Tensor,
    *,
    count: int,
    by: Order = "distance",
    candidates: int = 100,
) -> Tensor:
    """The classes that each image is most easily turned into, the easiest first.

    MALT Powers Up Adversarial Attacks, arXiv:2407.02240, section 3: by the distance at which the
    network, taken to be linear, changes its answer. Departs from it in keeping to the pixel box,
    which a pixel at 0 or 1 makes a difference to, and in one forward pass for all classes.

    Parameters
    ----------
    model : nn.Module
        Maps images in [0, 1] to logits ``(n, k)``.
    ball : Ball
        The balls around images ``(n, c, h, w)``: their norm, and which pixels may change.
    y : Tensor
        Classes to leave ``(n,)``.
    count : int
        Classes wanted; there are k - 1 at most.
    by : {"distance", "logits"}
        As above, for one backward pass per candidate; or by the logits alone, for none.
    candidates : int
        Classes of the largest logits whose distance is measured.

    Returns
    -------
    Tensor
        ``(n, min(count, candidates, k - 1))`` int64.

    Raises
    ------
    ValueError
        If there is no other class.
    """
    if by not in get_args(Order):
        raise ValueError(f"by must be distance or logits, not {by!r}")
    z = ball.x.detach().requires_grad_(by == "distance")
    logits = model(z).float()  # (n, k)
    classes = logits.shape[1]
    if classes < 2:
        raise ValueError("there is no class to aim at: the model has only one")
    others = logits.detach().scatter(1, y.unsqueeze(1), -torch.inf)
    likely = others.argsort(dim=1, descending=True, stable=True)[:, : min(candidates, classes - 1)]
    if by == "logits":
        first: Tensor = likely[:, :count]
        return first

    gaps = logits.gather(1, y.unsqueeze(1)) - logits.gather(1, likely)  # (n, candidates)
    free = ball.upper > ball.lower
    distances = []
    for gap in gaps.unbind(1):
        grad = autograd.grad(gap.sum(), z, retain_graph=True)[0]
        grad = grad.nan_to_num(0.0, 0.0, 0.0) * free
        distances.append(measure_to_hyperplane(z.detach(), grad, -gap.detach(), ball.norm))
    nearest = torch.stack(distances, 1).argsort(dim=1, stable=True)
    ordered: Tensor = likely.gather(1, nearest)[:, :count]
    return ordered
