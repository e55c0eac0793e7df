"""What attacks on a classifier and on its explanations lower, and which image they keep."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from robusteval.interpreters.explainer import (
    Interpreter,
    measure_mean_distance,
    measure_squared_distance,
)
from robusteval.models.classifier import Classifier, choose_block_size, predict_classes
from robusteval.models.failures import run_in_parts
from robusteval.models.seeds import draw_targets, per_image
from robusteval.models.steps import book_rows
from robusteval.search.constants import Constants
from robusteval.search.descent import Found, Stop, keep_best
from robusteval.search.losses import cross_entropy, margin

from .dual_plan import DualPlan
from .tracked_mask import TrackedMask

Target = Literal["runner_up", "random", "least_likely"]
AttackFunction = TypeVar("AttackFunction", bound=Callable[..., Tensor])


def attack_in_parts(attack: AttackFunction) -> AttackFunction:
    """Decorator: attack a large batch part by part, and in halves where memory runs out.

    The derivative of a map keeps several times what one of the class does, for every image that is
    searched. A part is as large as the batches of an evaluation, four calls of the network, and
    never less than one call. As no result depends on the batch, nothing else changes.
    """

    @wraps(attack)
    def attack_all(
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        seeds: Tensor | None = None,
        mask: Tensor | None = None,
        **parameters: Any,
    ) -> Tensor:
        def attack_rows(index: Tensor) -> Tensor:
            with book_rows(index):
                return attack(
                    model,
                    x[index],
                    y[index],
                    seeds=None if seeds is None else seeds[index.to(seeds.device)],
                    mask=None if mask is None else mask.expand_as(x)[index],
                    **parameters,
                )

        inner = next((part for part in model.modules() if isinstance(part, Classifier)), None)
        least = (inner and inner.block) or choose_block_size(x.shape[1:].numel(), x.device)
        parts = run_in_parts(
            attack_rows,
            torch.arange(len(x), device=x.device),
            4 * least,
            least=1 if inner is None else least,  # a Classifier pads what is smaller to its block
        )
        return torch.cat([x_adv for _, x_adv in parts])

    return cast(AttackFunction, attack_all)


class DualObjective:
    """Class and maps of a batch.

    Parameters
    ----------
    model : nn.Module
        Maps images in [0, 1] to logits ``(n, k)``.
    x : Tensor
        Images ``(n, c, h, w)`` in [0, 1] whose maps are to be kept.
    goal : Tensor
        Classes to reach ``(n,)``; the maps of changed images are those for them.
    shown : Tensor
        Classes ``(n,)`` of the maps of `x`.
    plan : DualPlan
        Whose maps, and what they weigh.
    seeds : Tensor, optional
        One seed per image ``(n,)`` for what is drawn; zeros if not given.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        goal: Tensor,
        shown: Tensor,
        plan: DualPlan,
        seeds: Tensor | None,
    ) -> None:
        self.model, self.goal, self.plan = model, goal, plan
        self.seeds = torch.zeros(len(x), dtype=torch.int64) if seeds is None else seeds
        self.draws = per_image(self.seeds, torch.Size((plan.steps,))).to(x)  # (n, steps)
        with torch.no_grad():
            self.benign = [e.trace_maps(model, x, shown, self.seeds)[0] for e in plan.explainers]
        self.x = x
        self.constants: Constants | None = None  # of the class beside a distance, if searched
        self.begin()

    def begin(self) -> None:
        """Start a search of so many steps as the plan has."""
        self.tracked = TrackedMask.from_interpreters(
            self.plan.explainers, self.x, self.seeds, self.plan.steps, self.plan.mask_rate
        )

    def search_constants(self, slack: float, classes: int) -> None:
        """Give each image a constant of its own, see `Constants`.

        With a margin beyond the boundary with which the class has the probability that is asked
        for, however the others share the rest.
        """
        p = self.plan.confidence
        beyond = math.log(max((classes - 1) * p / (1 - p), 1.0))
        self.constants = Constants(self.measure_gap, self.x, slack, beyond)

    def measure_gap(self, x: Tensor) -> Tensor:
        """By how much images ``(n, c, h, w)`` miss their classes, in logits ``(n,)``."""
        with book_rows(torch.arange(len(x), device=x.device)):
            return -margin(self.model(x), self.goal)

    def measure_loss(self, x_adv: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Classification and map terms ``(n,)`` of images, and whether they reach the class.

        Eq. 7 of arXiv:2211.15926. A weight of zero spares the map.
        """
        logits: Tensor | None = None
        terms = []
        weights = self.plan.weigh_maps(step)
        for explainer, benign, weight in zip(
            self.plan.explainers, self.benign, weights, strict=True
        ):
            if not weight:
                continue
            if explainer.spec.name == "mask" and self.tracked is not None:
                term = self.tracked.measure_distance(self.model, x_adv, self.goal, benign)
            else:
                maps, seen = explainer.trace_maps(self.model, x_adv, self.goal, self.seeds)
                logits = seen if seen is not None else logits
                term = measure_squared_distance(explainer.spec.name, maps, benign)
            terms.append(weight * term)
        own: Tensor = self.model(x_adv) if logits is None else logits
        loss = self.compute_class_term(own, step)
        for term in terms:
            loss = loss + term
        return loss, predict_classes(own.detach()) == self.goal

    def compute_class_term(self, logits: Tensor, step: int) -> Tensor:
        """What there is to lower until the class is predicted, ``(n,)``."""
        plan = self.plan
        if self.constants is not None:
            return self.constants.weigh(-margin(logits, self.goal))
        if step < 0 and plan.lead != "ce":
            return self.compute_lead(logits)
        if plan.floor is not None:
            term = plan.price * (-margin(logits, self.goal)).clamp_min(plan.floor)
        elif step < 0 or plan.smoothing == "none":
            term = plan.price * cross_entropy(logits, self.goal)
        else:
            least = 0.95 + 0.04 * step / plan.steps
            probability = least + (1 - least) * self.draws[:, step]
            if plan.smoothing == "fixed":
                probability = torch.full_like(probability, 0.95)
            shares = 9 if plan.smoothing == "published" else logits.shape[1] - 1
            term = plan.price * smoothed_cross_entropy(logits, self.goal, probability, shares)
        loss, push = plan.push
        if step < 0 or not push:
            return term
        # the mask network has no encoder of its own: it reads features of the network explained
        own = cross_entropy(logits, self.goal) if loss == "ce" else -select(logits, self.goal)
        return term + push * own

    def compute_lead(self, logits: Tensor) -> Tensor:
        """What warm-ups of the published code lower ``(n,)``, where it is no cross-entropy."""
        if self.plan.lead == "logit":
            return -select(logits, self.goal)
        gap = -margin(logits, self.goal)
        return gap if self.plan.lead == "margin" else 1e-4 * gap.clamp_min(0)

    def judge_images(self, x_adv: Tensor, index: Tensor) -> Found:
        """Images for rows `index` ``(m,)`` with the distance of their maps from the benign ones.

        Measured on the network's own slopes. Of a search for C&W's constant the loss is what it
        lowers: the squared l2 distance, and that of maps by its weight. Finished: with the
        probability that is asked for.
        """
        plan, explainers = self.plan, self.plan.explainers
        goal, seeds = self.goal[index], self.seeds[index.cpu()]
        far = torch.zeros(len(index), dtype=x_adv.dtype, device=x_adv.device)
        weights = plan.weigh_maps(plan.steps)
        if plan.bisects:
            far = (x_adv - self.x[index]).square().flatten(1).sum(1)
            explainers = explainers if plan.weight else []
        with torch.no_grad(), book_rows(index):
            found, own = explain_images(
                explainers,
                self.model,
                x_adv,
                goal,
                seeds,
                remembered=None if self.tracked is None else (self.tracked, index),
            )
        for explainer, maps, all_benign, weight in zip(
            explainers, found, self.benign, weights, strict=False
        ):
            benign = all_benign[index]
            if plan.bisects:
                name = explainer.spec.name
                far = far + weight * measure_squared_distance(name, maps, benign)
            else:
                far = far + measure_mean_distance(maps, benign) / len(self.benign)
        is_adv = predict_classes(own) == goal
        p = own.softmax(1).gather(1, goal.unsqueeze(1)).squeeze(1)
        return Found(x_adv, far, is_adv, is_adv & (p >= self.plan.confidence))


def select(logits: Tensor, goal: Tensor) -> Tensor:
    """The logits ``(n,)`` of classes `goal` ``(n,)``."""
    return logits.gather(1, goal.unsqueeze(1)).squeeze(1)


def smoothed_cross_entropy(
    logits: Tensor, goal: Tensor, probability: Tensor, shares: int
) -> Tensor:
    """Cross-entropy ``(n,)`` with target probability ``(n,)`` of class `goal` ``(n,)``.

    Each other class gets the rest divided by `shares`.
    """
    log_p = logits.log_softmax(1)
    own = log_p.gather(1, goal.unsqueeze(1)).squeeze(1)
    return -(probability * own + (1 - probability) / shares * (log_p.sum(1) - own))


class BestImages:
    """Of each original the best image among those that reach the class.

    Parameters
    ----------
    judge : callable
        ``(images (m, c, h, w), their rows (m,)) -> Found``, with a loss that is lower for a better
        image.
    round_images : callable
        Of the same: the images rounded to 8 bits, and whether they are still allowed.
    x : Tensor
        Originals ``(n, c, h, w)``.
    stop : {"8bit", "float", "never"}
        Whether images are judged rounded, as they are, or not at all.
    """

    def __init__(
        self,
        judge: Callable[[Tensor, Tensor], Found],
        round_images: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        x: Tensor,
        stop: Stop,
    ) -> None:
        self.judge, self.round_images, self.stop = judge, round_images, stop
        far = torch.full((len(x),), torch.inf, device=x.device)
        none = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self.found = Found(x.clone(), far, none, none.clone())

    def take(self, x_adv: Tensor, index: Tensor) -> Tensor:
        """Compare images that as floats reach the class, of rows `index` ``(m,)``.

        Returns the rows of those that could be results: finished ones.
        """
        if self.stop == "never" or len(index) == 0:
            return index
        if self.stop == "8bit":
            # the latest of those that rounding undoes is better than none
            one = torch.ones(len(index), dtype=torch.bool, device=x_adv.device)
            far = torch.full((len(index),), torch.inf, device=x_adv.device)
            keep_best(self.found, index, Found(x_adv, far, one, ~one))
            x_adv, allowed = self.round_images(x_adv, index)
            index, x_adv = index[allowed], x_adv[allowed]
        if len(index) == 0:
            return index
        judged = self.judge(x_adv, index)
        keep_best(self.found, index, judged)
        return index[judged.finished]

    def fill_with(self, x_adv: Tensor) -> Tensor:
        """The best image of each original ``(n, c, h, w)``, that of `x_adv` where there is none."""
        return torch.where(self.found.is_adv.view(-1, 1, 1, 1), self.found.x_adv, x_adv)


def explain_images(
    explainers: Sequence[Interpreter],
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    seeds: Tensor | None,
    tracked: TrackedMask | None = None,
    remembered: tuple[TrackedMask, Tensor] | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Scaled maps of each interpreter for classes `y`, and the logits, in as few passes as can be.

    On the graph if `x` is. If given, `tracked` stands for a mask that is optimised from the start.
    One with the rows ``(n,)`` of these images is asked for masks that it has made already.
    """
    logits: Tensor | None = None
    found = []
    for explainer in explainers:
        if explainer.spec.name == "mask" and tracked is not None:
            found.append(torch.stack(tracked.make_maps(model, x, y)).mean(0))
            continue
        if explainer.spec.name == "mask" and remembered is not None:
            known, rows = remembered
            found.append(known.explain_images(explainer, model, x, y, rows))
            continue
        maps, seen = explainer.trace_maps(model, x, y, seeds)
        logits = seen if seen is not None else logits
        found.append(maps)
    own: Tensor = model(x) if logits is None else logits
    return found, own


def check_goals(y: Tensor, logits: Tensor) -> Tensor:
    """The classes to reach ``(n,)``; ValueError if one is none of those of logits ``(n, k)``."""
    if not 0 <= int(y.min()) <= int(y.max()) < logits.shape[1]:
        raise ValueError(f"targets must be classes from 0 to {logits.shape[1] - 1}")
    return y


def choose_classes(logits: Tensor, y: Tensor, target: Target, seeds: Tensor | None) -> Tensor:
    """A class other than `y` for each image ``(n,)``."""
    if logits.shape[1] < 2:
        raise ValueError("there is no class to reach: the model has only one")
    if target == "random":
        drawn = torch.zeros(len(y), dtype=torch.int64) if seeds is None else seeds
        return draw_targets(y, drawn, logits.shape[1])
    others = logits.scatter(1, y.unsqueeze(1), -torch.inf if target == "runner_up" else torch.inf)
    return others.argmax(1) if target == "runner_up" else others.argmin(1)
