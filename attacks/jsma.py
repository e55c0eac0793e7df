"""The attack by saliency maps of the Jacobian, with every class as a target and both directions."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, autograd, nn

from robusteval.art.art_classes import make_art_class
from robusteval.models.classifier import predict_classes
from robusteval.models.steps import book_rows, part, tell_step
from robusteval.registry import ATTACKS
from robusteval.search.descent import Found, count_changes, keep_best, prune

Direction = Literal["both", "up", "down"]
CANDIDATES = 64  # among which pairs are looked for, half of them for either slope


@ATTACKS.add(
    "jsma", norms=("l0",), knowledge="white-box", needs={"targets": {"targeted": (False,)}}
)
def jsma(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    targeted: bool = False,
    seeds: Tensor | None = None,
    mask: Tensor | None = None,
    targets: int = 9,
    direction: Direction = "both",
    values: Literal["pair", "one"] = "pair",
    steps: int = 50,
    polish: int = 30,
) -> Tensor:
    """Few values go to black or white: those that speak for a class and against all others.

    The Limitations of Deep Learning in Adversarial Settings, arXiv:1511.07528 (JSMA), Eq. 8 and 9,
    Algorithm 3, on logits. Each value is used once and goes all the way. Without `targeted` every
    class is aimed at in turn, and any other than the label counts; the result has the fewest
    changes. Departs from it in that, in taking the better direction at each step, in looking for
    pairs among the values of steepest slopes only, and in the pruning at the end. Costs a forward
    and two backward passes a step, for each class that is aimed at.

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
    targets : int
        How many classes to aim at, at most, the likeliest first.
    direction : {"both", "up", "down"}
        Whether values may be raised to 1, lowered to 0, the ends of the pixel range, or either, at
        each step as is better.
    values : {"pair", "one"}
        How many change in a step: two, as published, or one.
    steps : int
        Steps towards each class, at most.
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
    if steps < 1 or polish < 0 or targets < 1:
        raise ValueError(
            "steps and targets must be at least 1 and polish at least 0,"
            f" not {steps}, {targets} and {polish}"
        )
    best = Found.nothing(x)
    if len(x) == 0:
        return best.x_adv
    with torch.no_grad():
        logits = model(x)
    right = (predict_classes(logits) == y) != targeted
    others = logits.scatter(1, y.unsqueeze(1), -torch.inf).argsort(1, descending=True)[:, :-1]
    goals = y.unsqueeze(1) if targeted else others[:, :targets]  # (n, classes)
    free = torch.ones_like(x, dtype=torch.bool) if mask is None else (mask != 0).expand_as(x)
    number = goals.shape[1]
    passes = number * (steps + 1) + polish

    for turn in range(number):
        with part(turn * (steps + 1), (turn + 1) * (steps + 1), passes):
            left = right.nonzero().flatten()
            z, open_ = x[left].clone(), free[left].clone()
            for i in range(steps + 1):
                if len(left) == 0:
                    break
                tell_step(i, steps + 1)
                last, goal = i == steps, goals[left, turn]
                z = z.detach().requires_grad_(not last)
                with torch.set_grad_enabled(not last), book_rows(left):
                    logits = model(z)
                pred = predict_classes(logits.detach())
                is_adv = pred == goal if targeted else pred != y[left]
                count = count_changes(z.detach(), x[left], "l0").to(x)
                keep_best(best, left, Found(z.detach(), count, is_adv, is_adv))
                if last:
                    break
                own = logits.gather(1, goal.unsqueeze(1)).squeeze(1)
                rest = logits.sum(1) - own
                toward = autograd.grad(own.sum(), z, retain_graph=True)[0]
                away = autograd.grad(rest.sum(), z)[0]
                z = z.detach()
                chosen = choose_values(toward, away, z, open_, direction, pairs=values == "pair")

                # what has reached a class, or has as many changes as the best, is done
                fewer = ~best.is_adv[left] | (count + 1 < best.loss[left])
                going = ~is_adv & fewer & chosen.mask.flatten(1).any(1)
                z = torch.where(chosen.mask, chosen.bound.view(-1, 1, 1, 1), z)
                open_ = open_ & ~chosen.mask
                left, z, open_ = left[going], z[going], open_[going]

    x_adv = torch.where(best.is_adv.view(-1, 1, 1, 1), best.x_adv, x)
    if polish:
        with part(passes - polish, passes, passes):
            return prune(model, x, x_adv, y, targeted=targeted, rounds=polish)
    return x_adv


class Chosen(NamedTuple):
    """Which values change."""

    mask: Tensor  # (n, c, h, w) bool; none where no value speaks for the class
    bound: Tensor  # (n,) to what they go


def choose_values(
    toward: Tensor, away: Tensor, z: Tensor, free: Tensor, direction: Direction, *, pairs: bool
) -> Chosen:
    """The one or two values with the largest entry of the saliency map.

    Parameters
    ----------
    toward, away : Tensor
        Slopes ``(n, c, h, w)`` of the class to reach and of the sum of all others.
    z : Tensor
        Images ``(n, c, h, w)`` in [0, 1].
    free : Tensor
        ``(n, c, h, w)`` bool, what may still change.
    direction : {"both", "up", "down"}
        Where values may go.
    pairs : bool
        Whether two values are chosen together, by the sums of their slopes.
    """
    n = len(z)
    best = torch.zeros(n, device=z.device, dtype=z.dtype)
    mask, bound = torch.zeros_like(free).flatten(1), torch.zeros_like(best)
    for name, sign, end in (("up", 1, 1.0), ("down", -1, 0.0)):
        if direction not in ("both", name):
            continue
        usable = (free & (z != end)).flatten(1)
        gain = (sign * toward).flatten(1).masked_fill(~usable, 0)
        loss = (sign * away).flatten(1).masked_fill(~usable, 0)
        if not pairs:
            entry = torch.where((gain > 0) & (loss < 0), -gain * loss, 0.0)  # Eq. 8
            value, place = entry.max(1, keepdim=True)
            places, value = place, value.squeeze(1)
        else:
            half = min(CANDIDATES // 2, gain.shape[1])
            some = torch.cat([gain.topk(half).indices, (-loss).topk(half).indices], 1)
            a, b = gain.gather(1, some), loss.gather(1, some)
            alpha, beta = a.unsqueeze(2) + a.unsqueeze(1), b.unsqueeze(2) + b.unsqueeze(1)
            entry = torch.where((alpha > 0) & (beta < 0), -alpha * beta, 0.0)
            usable_pair = usable.gather(1, some)
            apart = some.unsqueeze(2) != some.unsqueeze(1)
            apart = apart & usable_pair.unsqueeze(2) & usable_pair.unsqueeze(1)
            value, place = entry.masked_fill(~apart, 0).flatten(1).max(1)
            places = torch.stack([place // some.shape[1], place % some.shape[1]], 1)
            places = some.gather(1, places)
        better = value > best
        found = torch.zeros_like(mask).scatter(1, places, better.unsqueeze(1).expand_as(places))
        mask = torch.where(better.unsqueeze(1), found, mask)
        best, bound = torch.where(better, value, best), torch.where(better, end, bound)
    return Chosen(mask.view_as(z), bound)


def __getattr__(name: str) -> Any:
    """`JSMA`, an ART evasion attack."""
    return make_art_class(name, JSMA=jsma)
