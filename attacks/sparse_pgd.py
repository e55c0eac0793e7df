"""A fixed number of changed values or pixels: what changes and how are searched together."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, autograd, nn

from robusteval.art.art_classes import make_art_class
from robusteval.models.seeds import per_image
from robusteval.models.steps import tell_step
from robusteval.registry import ATTACKS
from robusteval.search.balls import quantise
from robusteval.search.descent import Found, build_class_objective, keep_best

Count = Literal["l0", "l0_pixels"]
Slope = Literal["sparse", "full"]


@ATTACKS.add("sparse_pgd", norms=("l0_pixels", "l0"), knowledge="white-box")
def sparse_pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    targeted: bool = False,
    seeds: Tensor | None = None,
    mask: Tensor | None = None,
    norm: Count = "l0_pixels",
    eps: float = 20,
    steps: int = 100,
    step: float = 0.25,
    pace: float = 0.25,
    slope: Slope = "full",
    patience: int = 3,
) -> Tensor:
    """Change a given number of pixels or values, whichever and however is worst.

    Towards Efficient Training and Evaluation of Robust Models against l0 Bounded Adversarial
    Perturbations, arXiv:2405.05075 (sparse-PGD): the change is a magnitude within the pixel box
    times a mask, of which the `eps` highest places count. Signed steps move the magnitude, steps
    of unit length the mask's scores, whose sigmoid is what the mask is differentiated as; where
    the mask stands still for `patience` steps its scores are drawn anew. Departs from it in
    ending an image at its first success, and in the gradient of the logit margin.

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
        One seed per image ``(n,)`` for the first magnitudes and scores; zeros if not given.
    mask : Tensor, optional
        Broadcastable to `x`; zero where a pixel may not change.
    norm : {"l0_pixels", "l0"}
        What `eps` counts: places, all channels of which may change, as published, or values.
    eps : float
        How many may change, a whole number.
    steps : int
        Gradient steps, at most.
    step : float
        Length of a step of the magnitude, in units of the [0, 1] pixel range.
    pace : float
        Length of a step of the scores, times the root of their number.
    slope : {"sparse", "full"}
        Whether magnitudes move only where the mask lets them, or everywhere (the authors'
        unprojected gradient), so that places that are not chosen are ready to be.
    patience : int
        Steps without a change of the mask after which its scores are drawn anew.

    Returns
    -------
    Tensor
        Images ``(n, c, h, w)`` in [0, 1] with at most `eps` changes.

    Raises
    ------
    ValueError
        If a parameter is out of range.
    """
    if eps < 0 or eps != int(eps):
        raise ValueError(f"eps counts changes: a whole number from 0, not {eps:g}")
    if steps < 1 or patience < 1 or not (step > 0 and pace > 0):
        raise ValueError(
            "steps and patience must be at least 1, step and pace above 0,"
            f" not {steps}, {patience}, {step:g} and {pace:g}"
        )
    best = Found.nothing(x)
    if len(x) == 0 or eps == 0:
        return best.x_adv
    objective = build_class_objective(model, y, targeted=targeted, loss="margin")
    drawn = torch.zeros(len(x), dtype=torch.int64) if seeds is None else seeds
    free = torch.ones_like(x, dtype=torch.bool) if mask is None else (mask != 0).expand_as(x)
    places = free if norm == "l0" else free.any(1, keepdim=True)
    number = min(int(eps), places[0].numel())

    # within the pixel box, wherever the image is
    magnitude = per_image(drawn, x.shape[1:]).to(x) - x
    scores = per_image(drawn + 1, places.shape[1:], normal=True).to(x)
    still = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    before = torch.zeros_like(places)
    left = torch.arange(len(x), device=x.device)
    for i in range(steps + 1):
        if len(left) == 0:
            break
        tell_step(i, steps + 1)
        last = i == steps
        chosen = choose_top(scores, places[left], number)
        still = torch.where((chosen == before).flatten(1).all(1), still + 1, 0)
        before = chosen
        x_adv = quantise((x[left] + magnitude).clamp(0, 1))
        x_adv = torch.where(chosen & free[left], x_adv, x[left]).requires_grad_(not last)
        with torch.set_grad_enabled(not last):
            loss, is_adv = objective(x_adv, left)
        keep_best(best, left, Found(x_adv.detach(), loss.detach(), is_adv, is_adv))
        if last:
            break
        grad = autograd.grad(loss.sum(), x_adv)[0].nan_to_num(0.0, 0.0, 0.0)

        # the mask by its sigmoid, the magnitude by its sign
        soft = scores.sigmoid()
        slopes = (
            (grad * magnitude).sum(1, keepdim=True) if norm == "l0_pixels" else grad * magnitude
        )
        slopes = slopes * soft * (1 - soft)
        size = slopes.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
        scores = scores - pace * slopes[0].numel() ** 0.5 * slopes / size
        moved = grad if slope == "full" else grad * chosen
        magnitude = magnitude - step * moved.sign()
        magnitude = (x[left] + magnitude).clamp(0, 1) - x[left]

        # out of where nothing changes any more
        stuck = (still >= patience).view(-1, 1, 1, 1)
        if bool(stuck.any()):
            again = per_image(drawn[left.cpu()] + 2 + i, scores.shape[1:], normal=True).to(x)
            scores = torch.where(stuck, again, scores)
            still = torch.where(stuck.flatten(), 0, still)
        going = ~is_adv
        left, scores, magnitude = left[going], scores[going], magnitude[going]
        still, before = still[going], before[going]
    return torch.where((best.loss < torch.inf).view(-1, 1, 1, 1), best.x_adv, x)


def choose_top(scores: Tensor, places: Tensor, number: int) -> Tensor:
    """Where the highest scores are among the places that may change: bool, of their shape."""
    flat = scores.masked_fill(~places, -torch.inf).flatten(1)
    index = flat.topk(number, dim=1).indices
    return torch.zeros_like(flat, dtype=torch.bool).scatter(1, index, True).view_as(scores) & places


def __getattr__(name: str) -> Any:
    """`SparsePGD`, an ART evasion attack."""
    return make_art_class(name, SparsePGD=sparse_pgd)
