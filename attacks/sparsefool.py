"""Few values change: the boundary is taken for a plane, which is reached in l1."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, autograd, nn

from robusteval.art.art_classes import make_art_class
from robusteval.models.classifier import predict_classes
from robusteval.models.steps import book_rows, part, tell_step
from robusteval.registry import ATTACKS
from robusteval.search.descent import Found, count_changes, keep_best, prune, round_changes
from robusteval.search.hyperplane import project_to_hyperplane

OVERSHOOT = 0.02  # of DeepFool, beyond its own plane


@ATTACKS.add("sparsefool", norms=("l0",), knowledge="white-box")
def sparsefool(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    targeted: bool = False,
    seeds: Tensor | None = None,
    mask: Tensor | None = None,
    stretch: float = 3.0,
    steps: int = 20,
    boundary_steps: int = 10,
    targets: int = 3,
    polish: int = 30,
) -> Tensor:
    """Step after step to a plane at the nearest boundary, along as few values as reach it.

    SparseFool: a few pixels make a big difference, arXiv:1811.02248, Algorithm 2: DeepFool
    (arXiv:1511.04599) finds the nearest point of the boundary, the boundary is taken for the plane
    there, `stretch` times as far away, and the plane is reached by values that go to the ends of
    the pixel range, the steepest first. Departs from it in rounding to 8 bits, in the number of
    classes that DeepFool looks at, and in the pruning at the end.

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
    stretch : float
        By what the way to the boundary is multiplied: the lambda of the paper, at least 1. More
        needs fewer steps and changes more values.
    steps : int
        Planes, at most.
    boundary_steps : int
        Steps of DeepFool to each of them, at most.
    targets : int
        Likeliest other classes that DeepFool looks at, a backward pass each; 10 as published.
        `targeted`, one.
    polish : int
        Passes of pruning at the end, see `robusteval.search.descent.prune`; 0 as published.

    Returns
    -------
    Tensor
        Images ``(n, c, h, w)`` in [0, 1]; `x` where no success was found.

    Raises
    ------
    ValueError
        If a parameter is out of range.
    """
    if min(steps, boundary_steps, targets) < 1 or polish < 0 or not 1 <= stretch < math.inf:
        raise ValueError(
            "steps, boundary_steps, targets and stretch must be at least 1 and polish at least 0,"
            f" not {steps}, {boundary_steps}, {targets}, {stretch:g} and {polish}"
        )
    best = Found.nothing(x)
    if len(x) == 0:
        return best.x_adv
    free = torch.ones_like(x) if mask is None else (mask != 0).expand_as(x).to(x)

    def measure_gaps(z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """How far each class looked at is from success ``(m, classes)``, and success ``(m,)``."""
        with book_rows(rows):
            logits = model(z)
        own = logits.gather(1, y[rows].unsqueeze(1))
        others = logits.scatter(1, y[rows].unsqueeze(1), -torch.inf)
        hit = predict_classes(logits.detach()) == y[rows]
        if targeted:
            return others.amax(1, keepdim=True) - own, hit
        return own - others.topk(min(targets, logits.shape[1] - 1), 1).values, ~hit

    def find_plane(z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest plane at `z`: its slope ``(m, c, h, w)``, and how far the gap has to fall."""
        z = z.detach().requires_grad_()
        with torch.enable_grad():
            gaps, _ = measure_gaps(z, rows)
        slopes = [
            autograd.grad(gap.sum(), z, retain_graph=True)[0].nan_to_num(0.0, 0.0, 0.0)
            for gap in gaps.unbind(1)
        ]
        slope = torch.stack(slopes, 1) * free[rows].unsqueeze(1)  # (m, classes, c, h, w)
        size = slope.flatten(2).norm(dim=2).clamp_min(1e-12)
        nearest = (gaps.detach().abs() / size).argmin(1)
        every = torch.arange(len(z), device=z.device)
        return slope[every, nearest], gaps.detach()[every, nearest]

    left, z = torch.arange(len(x), device=x.device), x
    passes = steps + 1 + polish
    for i in range(steps + 1):
        tell_step(i, passes)
        with torch.no_grad():
            _, is_adv = measure_gaps(z, left)
        count = count_changes(z, x[left], "l0").to(x)
        keep_best(best, left, Found(z, count, is_adv, is_adv))
        left, z = left[~is_adv], z[~is_adv]
        if i == steps or len(left) == 0:
            break

        # DeepFool: the nearest point of the boundary in l2, whatever the pixel range
        point, looking = z.clone(), torch.arange(len(z), device=x.device)
        for _ in range(boundary_steps):
            slope, gap = find_plane(point[looking], left[looking])
            power = slope.square().flatten(1).sum(1).clamp_min(1e-24)
            way = ((gap + 1e-4) / power).view(-1, 1, 1, 1) * slope
            point[looking] = point[looking] - (1 + OVERSHOOT) * way
            with torch.no_grad():
                _, beyond = measure_gaps(point[looking], left[looking])
            looking = looking[~beyond]
            if len(looking) == 0:
                break

        # the plane there, and the fewest values that reach it
        slope, _ = find_plane(point, left)
        fall = (slope * (stretch * (point - z))).flatten(1).sum(1)
        z = z + project_to_hyperplane(z, slope, fall, "l1")
        z = round_changes(z.clamp(0, 1), x[left])

    x_adv = torch.where(best.is_adv.view(-1, 1, 1, 1), best.x_adv, x)
    if polish:
        with part(steps + 1, passes, passes):
            return prune(model, x, x_adv, y, targeted=targeted, rounds=polish)
    return x_adv


def __getattr__(name: str) -> Any:
    """`SparseFool`, an ART evasion attack."""
    return make_art_class(name, SparseFool=sparsefool)
