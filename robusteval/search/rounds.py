"""How searches for the nearest success spend many steps: in rounds, from more than one start."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from robusteval.models.classifier import predict_classes
from robusteval.models.steps import book_rows
from robusteval.search.descent import Score
from robusteval.search.losses import aimed_loss, attacker_loss, soft_margin
from robusteval.search.nearest import Nearest, Radius

ROUND = 100  # steps
CLASSES = 5  # of which one round each begins anew
SOFT = 0.1  # temperature of the loss, in units of the margin


class NearObjective:
    """The objective of another prediction than `y`, or `targeted` of just that, softly.

    A `soft_margin` whose temperature is a share of each image's own margin: far from a boundary it
    follows all classes that are about as near, so that a search is less easily led astray, and at
    a boundary that class alone, so that it ends at the nearest point. The scale of the logits does
    not matter. The first call is to be with all images as they are: what the network says of them
    ranks the classes that `aim_at` chooses from.

    Parameters
    ----------
    model : nn.Module
        Maps images in [0, 1] to logits ``(n, k)``.
    y : Tensor
        Classes ``(n,)`` to leave or, `targeted`, to reach.
    targeted : bool
        Reach class `y` instead of leaving it.
    """

    def __init__(self, model: nn.Module, y: Tensor, *, targeted: bool) -> None:
        self.model, self.y, self.targeted = model, y, targeted
        self.others: Tensor | None = None  # (n, k - 1), the likeliest first
        self.rank: int | None = None

    def __call__(self, x_adv: Tensor, index: Tensor) -> Score:
        with book_rows(index):
            logits = self.model(x_adv)  # (m, k)
        y, plain = self.y[index], logits.detach()
        others = self.others
        if others is None:
            some = plain.scatter(1, y.unsqueeze(1), -torch.inf)
            others = self.others = some.argsort(dim=1, descending=True, stable=True)[:, :-1]
        if self.rank is None:
            gap = attacker_loss(plain, y, targeted=self.targeted, loss="margin").abs()
            value = soft_margin(logits.float(), y, (SOFT * gap).clamp_min(1e-30))
        else:
            value = aimed_loss(logits, y, others[index, self.rank], "margin")
        hit = predict_classes(plain) == y
        return Score(-value if self.targeted else value, hit if self.targeted else ~hit)

    def count_others(self) -> int:
        """The classes that can be aimed at: none where one is given."""
        return 0 if self.targeted or self.others is None else self.others.shape[1]

    def aim_at(self, rank: int | None) -> None:
        """Lower the gap to the class of this rank alone, from 0; with None to all, as before."""
        self.rank = rank


class Rounds:
    """Rounds of about `ROUND` steps, by turns on from the nearest success and anew.

    A longer round alone would search far out for longer, and not end nearer; and one that goes on
    from the nearest success stays with its class and on its side of it. So every second one begins
    at the image and makes for one class, the likeliest first, from a radius that is hardly larger
    than the least so far: what it finds is nearer, whatever class it is of. The last goes on.

    Parameters
    ----------
    steps : int
        Of all rounds.
    gamma : float
        See `Radius`.
    """

    def __init__(self, steps: int, gamma: float) -> None:
        self.count = max(round(steps / ROUND), 1)
        self.length = math.ceil(steps / self.count)
        self.gamma = gamma
        self.is_anew = False

    def share(self, step: int) -> float:
        """How far a step is in its round."""
        return step % self.length / self.length

    def enters(self, step: int, share: float) -> bool:
        """Whether a step is the first so far in a round that goes on from the nearest success."""
        return not self.is_anew and self.share(step - 1) < share <= self.share(step)

    def begin(
        self,
        step: int,
        objective: NearObjective,
        kept: Nearest,
        left: Tensor,
        point: Tensor,
        radius: Radius,
    ) -> tuple[Tensor, Radius]:
        """Where rows `left` ``(m,)`` go on from at the first step of a round, and how far.

        With one other class a round that begins anew would only repeat the first.
        """
        number, others = step // self.length, objective.count_others()
        self.is_anew = number % 2 == 1 and number < self.count - 1 and others > 1
        if not self.is_anew:
            objective.aim_at(None)
            return kept.go_back(left, point), radius
        objective.aim_at(number // 2 % min(CLASSES, others))
        had = kept.best_norm[left]
        size = torch.where(had.isfinite(), had, radius.size)
        pace, was_adv = torch.full_like(size, self.gamma), torch.ones_like(radius.was_adv)
        return kept.x[left], Radius(size, pace, was_adv)
