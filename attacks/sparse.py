"""Sparse noise by re-parameterised weights, as published and made portable."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, autograd, nn

from robusteval.art.art_classes import make_art_class
from robusteval.models.classifier import predict_classes
from robusteval.models.seeds import per_image
from robusteval.models.steps import book_rows, part, tell_step
from robusteval.registry import ATTACKS
from robusteval.search.descent import Count, build_class_objective, prune, round_changes
from robusteval.search.losses import cross_entropy
from robusteval.search.nearest import Nearest

Variant = Literal["scaled", "paper"]

PACE = 1.1  # of the portable threshold, per step


@ATTACKS.add(
    "sparse",
    norms=("l0", "l0_pixels"),
    knowledge="white-box",
    needs={"rounds": {"variant": ("paper",)}},
)
def sparse(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    targeted: bool = False,
    seeds: Tensor | None = None,
    mask: Tensor | None = None,
    norm: Count = "l0",
    variant: Variant = "scaled",
    steps: int = 200,
    tau: float = 0.45,
    unit: float = 6 / 255,
    step: float | None = None,
    rounds: int = 10,
    polish: int | None = None,
) -> Tensor:
    """Few changed values by a soft threshold on re-parameterised noise (WI-FGSM).

    Towards Interpretable Adversarial Examples via Sparse Adversarial Attack, arXiv:2506.17250.
    `paper` does what its authors' code does, but in eval mode, inside [0, 1], image by image, and
    returns the original instead of the dense start where nothing sparse fools. `scaled` is ours:
    gradients are divided by their largest entry, which makes `tau` mean the same for every model;
    the margin is what is lowered, changes may go in either direction and to the end of the pixel
    range, each image's threshold rises while it fools and falls while it does not, and the result
    is pruned.

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
        One seed per image ``(n,)`` for the first weights of `paper`, zeros if not given; in
        `scaled` nothing is random.
    mask : Tensor, optional
        Broadcastable to `x`; zero where a pixel may not change.
    norm : {"l0", "l0_pixels"}
        What should be few: changed values, or places where any channel changed. `scaled` also
        thresholds the channels of a place together.
    variant : {"scaled", "paper"}
        The portable form, or the published one.
    steps : int
        Gradient steps; one forward pass more judges the last iterate.
    tau : float
        Soft threshold, in units of the [0, 1] pixel range; in `scaled` where it starts.
    unit : float
        In `paper` the radius of the dense start, in both the width of the bend towards the end of
        a value's range; in units of the [0, 1] pixel range.
    step : float, optional
        Of `paper`: step size on the weights, 1000 if not given (the product of its authors'
        learning rate and loss factors). Of `scaled`: step at the largest gradient, in units of
        the [0, 1] pixel range, 1 if not given.
    rounds : int
        Gradients summed for the dense start of `paper`; not used by `scaled`.
    polish : int, optional
        Passes of pruning at the end, see `robusteval.search.descent.prune`; 30 for `scaled`, 0 for
        `paper` if not given.

    Returns
    -------
    Tensor
        Images ``(n, c, h, w)`` in [0, 1], for each the success with the fewest changes; `x` itself
        where there was none. Changes are to 8-bit values, in `paper` where that still fools.

    Raises
    ------
    ValueError
        If a parameter is out of range.
    """
    if steps < 1 or rounds < 1:
        raise ValueError(f"steps and rounds must be at least 1, not {steps} and {rounds}")
    if not 0 <= tau <= 1 or not 0 < unit <= 1:
        raise ValueError(
            "tau must be from 0 to 1, unit above 0 up to 1, in units of the [0, 1] pixel range,"
            f" not {tau:g} and {unit:g}"
        )
    if step is not None and not step > 0:
        raise ValueError(f"step must be positive, not {step:g}")
    if polish is not None and polish < 0:
        raise ValueError(f"polish must be 0 or more, not {polish}")
    free = torch.ones_like(x) if mask is None else (mask != 0).to(x).expand_as(x)
    kept = Nearest(x, norm)
    if polish is None:
        polish = 0 if variant == "paper" else 30
    longest = steps + (rounds if variant == "paper" else 0)
    with part(0, longest, longest + polish):
        if variant == "paper":
            if seeds is None:
                seeds = torch.zeros(len(x), dtype=torch.int64)
            step = 1000.0 if step is None else step
            search_as_published(
                model,
                y,
                kept,
                free,
                targeted=targeted,
                seeds=seeds,
                steps=steps,
                tau=tau,
                unit=unit,
                step=step,
                rounds=rounds,
            )
        else:
            step = 1.0 if step is None else step
            search_at_any_scale(
                model, y, kept, free, targeted=targeted, steps=steps, tau=tau, unit=unit, step=step
            )
    with part(longest, longest + polish, longest + polish):
        return prune(model, x, kept.best_adv, y, targeted=targeted, rounds=polish, count=norm)


def search_as_published(
    model: nn.Module,
    y: Tensor,
    kept: Nearest,
    free: Tensor,
    *,
    targeted: bool,
    seeds: Tensor,
    steps: int,
    tau: float,
    unit: float,
    step: float,
    rounds: int,
) -> None:
    """The search of the authors' code; fills `kept`."""
    left, origin = torch.arange(len(y), device=y.device), kept.x

    def judge(x_adv: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``(m, k)`` of images for rows `index`, and which of them succeed ``(m,)``."""
        with book_rows(index):
            logits: Tensor = model(x_adv)
        return logits, (predict_classes(logits.detach()) == y[index]) == targeted

    # dense start: always a whole step from x, along the sign of all gradients so far
    total, x_adv = torch.zeros_like(origin), origin
    for i in range(rounds):
        if len(left) == 0:
            return
        tell_step(i, rounds + steps)
        x_adv = x_adv.detach().requires_grad_()
        logits, is_adv = judge(x_adv, left)
        loss = cross_entropy(logits, y[left]) * (1 if targeted else -1)
        total = total + autograd.grad(loss.sum(), x_adv)[0].nan_to_num(0.0, 0.0, 0.0)
        if i == 0:  # what succeeds unchanged is done
            kept.take(left, x_adv.detach(), is_adv)
            left, origin, total, free = (column[~is_adv] for column in (left, origin, total, free))
        x_adv = origin + ((origin - unit * total.sign()).clamp(0, 1) - origin) * free
    dense, target = x_adv - origin, y[left]
    if not targeted:
        # its class is the goal from here on, be it the label
        with torch.no_grad():
            target = predict_classes(judge(x_adv, left)[0]).clamp_min(0)

    # weights of the dense start; above 1 they go beyond it
    weight = per_image(seeds[left.cpu()], origin.shape[1:], normal=True).to(origin)
    room = torch.minimum(origin, 1 - origin) / unit
    for i in range(steps + 1):
        if len(left) == 0:
            break
        tell_step(rounds + i, rounds + steps)
        last = i == steps
        x_adv = (origin + weight * dense).clamp(0, 1).requires_grad_(not last)
        with torch.set_grad_enabled(not last):
            logits, is_adv = judge(x_adv, left)
        if i > 0:  # the random weights change everything, and against the sign
            kept.take(left, x_adv.detach(), is_adv)
        if last:
            break
        loss = cross_entropy(logits, target)
        grad = autograd.grad(loss.sum(), x_adv)[0].nan_to_num(0.0, 0.0, 0.0)
        # the published count of weights has no gradient
        weight = weight - step * grad * dense
        weight = room * torch.tanh((weight - tau / unit).clamp_min(0))

        going = kept.best_norm[left] > 1
        if not bool(going.all()):
            left, origin, dense, target, weight, room = (
                column[going] for column in (left, origin, dense, target, weight, room)
            )

    found = ((kept.best_norm > 0) & kept.best_norm.isfinite()).nonzero().flatten()
    if len(found):
        rounded = round_changes(kept.best_adv[found], kept.x[found])
        with torch.no_grad():
            is_adv = judge(rounded, found)[1]
        kept.best_adv[found[is_adv]] = rounded[is_adv]


def search_at_any_scale(
    model: nn.Module,
    y: Tensor,
    kept: Nearest,
    free: Tensor,
    *,
    targeted: bool,
    steps: int,
    tau: float,
    unit: float,
    step: float,
) -> None:
    """The search with a threshold that fits every model; fills `kept`."""
    objective = build_class_objective(model, y, targeted=targeted, loss="margin")
    left, origin = torch.arange(len(y), device=y.device), kept.x
    delta = torch.zeros_like(origin)
    least = torch.full((len(y), 1, 1, 1), tau, device=y.device)

    for i in range(steps + 1):
        if len(left) == 0:
            break
        tell_step(i, steps)
        last = i == steps
        x_adv = round_changes(origin + delta, origin).requires_grad_(not last)
        with torch.set_grad_enabled(not last):
            loss, is_adv = objective(x_adv, left)
        kept.take(left, x_adv.detach(), is_adv)
        if last:
            break
        grad = autograd.grad(loss.sum(), x_adv)[0].nan_to_num(0.0, 0.0, 0.0) * free
        grad = grad / grad.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-12)
        if kept.norm == "l0_pixels":  # only now, as squares of tiny gradients would underflow
            grad = grad / measure_places(grad).amax((1, 2, 3), keepdim=True).clamp_min(1e-12)

        least = least * torch.where(is_adv, PACE, 1 / PACE).view(-1, 1, 1, 1)
        least = least.clamp_max(1)
        weight = delta - step * grad
        above = shrink_values(weight, least, "l0_pixels" if kept.norm == "l0_pixels" else "l0")
        delta = torch.where(weight > 0, 1 - origin, -origin) * torch.tanh(above / unit)

        going = kept.best_norm[left] > 1
        if not bool(going.all()):
            left, origin, free, delta, least = (
                column[going] for column in (left, origin, free, delta, least)
            )


def shrink_values(weight: Tensor, least: Tensor, count: Count) -> Tensor:
    """Sizes of values beyond a soft threshold, or of places, shared out among the channels."""
    size = weight.abs()
    if count == "l0":
        return (size - least).clamp_min(0)
    return size * (1 - least / measure_places(weight).clamp_min(1e-12)).clamp_min(0)


def measure_places(weight: Tensor) -> Tensor:
    """Norm of each place's channels ``(n, 1, h, w)``."""
    return weight.square().sum(1, keepdim=True).sqrt()


def __getattr__(name: str) -> Any:
    """`Sparse`, an ART evasion attack."""
    return make_art_class(name, Sparse=sparse)
