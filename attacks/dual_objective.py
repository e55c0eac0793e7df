"""What attacks on a classifier and on its explanations lower, and how long."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from functools import wraps
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robusteval.interpreters.explainer import (
    Interpreter,
    measure_mean_distance,
    measure_squared_distance,
)
from robusteval.interpreters.meaningful_perturbation import (
    Deletion,
    State,
    build_deletion,
    draw_offsets,
)
from robusteval.models.classifier import Classifier, block_size, predictions, rows
from robusteval.models.failures import is_out_of_memory
from robusteval.models.seeds import per_image, random_targets
from robusteval.search.balls import quantise
from robusteval.search.descent import Found, Stop, keep_best
from robusteval.search.losses import margin
from robusteval.search.moves import Neighbours

Settings = Literal["fast", "released", "paper"]
Smoothing = Literal["preset", "none", "uniform", "published"]
Target = Literal["runner_up", "random", "least_likely"]
Attack = TypeVar("Attack", bound=Callable[..., Tensor])


def in_parts(attack: Attack) -> Attack:
    """Decorator: attack a large batch part by part, and in halves where memory runs out.

    The derivative of a map keeps several times what one of the class does, for every image that is
    searched. A part is as large as the batches of an evaluation, four calls of the network, and
    never less than one call. As no result depends on the batch, nothing else changes.
    """

    @wraps(attack)
    def parts(
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        seeds: Tensor | None = None,
        mask: Tensor | None = None,
        **parameters: Any,
    ) -> Tensor:
        def some(index: Tensor) -> Tensor:
            with rows(index):
                return attack(
                    model,
                    x[index],
                    y[index],
                    seeds=None if seeds is None else seeds[index.to(seeds.device)],
                    mask=None if mask is None else mask.expand_as(x)[index],
                    **parameters,
                )

        inner = next((part for part in model.modules() if isinstance(part, Classifier)), None)
        least = (inner and inner.block) or block_size(x.shape[1:].numel(), x.device)
        size = 4 * least
        left = torch.arange(len(x), device=x.device)
        found: list[Tensor] = []
        while len(left) or not found:
            part = left[:size]
            try:
                found.append(some(part))
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                # blocks of a Classifier are never smaller, whatever it is given
                if len(part) <= (1 if inner is None else least) or not is_out_of_memory(error):
                    raise
                size = len(part) // 2
            else:
                left = left[size:]
        return torch.cat(found)

    return cast(Attack, parts)


class Recipe(NamedTuple):
    """How one search attacks the maps of one interpreter."""

    warmup: int  # steps towards the class alone
    phases: tuple[tuple[float, float, int], ...]  # weight of the map at start and end, steps
    price: float = 1.0  # of the classification term
    smoothed: bool = False  # whether its target is
    floor: float | None = None  # it is the logit margin, down to here, not the cross-entropy
    rate: float = 0.01  # of searches without a radius
    every: int = 10  # steps from one choice of the best to the next
    confidence: float = 0.0  # least probability of the class in a choice

    @property
    def steps(self) -> int:
        """Towards class and map."""
        return sum(steps for _, _, steps in self.phases)

    def weight(self, progress: float) -> tuple[float, int]:
        """Weight of the map after this part of all steps, and the number of the phase."""
        at = progress * self.steps
        for phase, (first, last, steps) in enumerate(self.phases):
            if at < steps or phase == len(self.phases) - 1:
                return first + (last - first) * at / steps, phase
            at -= steps
        raise AssertionError("a recipe has phases")


def _constant(weights: tuple[float, ...], steps: tuple[int, ...]) -> tuple[Any, ...]:
    return tuple((c, c, count) for c, count in zip(weights, steps, strict=True))


_FIVE = _constant((0.001, 0.004, 0.01, 0.05, 0.07), (301, 201, 101, 101, 50))
_FOUR = _constant((0.003, 0.01, 0.05, 0.2), (301, 201, 101, 101))

# Counts, weights and choices of the notebooks published with arXiv:2211.15926, all for 224x224
# pixels; of StAdv on RTS, which is not among them, those of ADV2 (arXiv:1812.00891).
RELEASED: dict[tuple[str, str], Recipe] = {
    ("pgd", "grad"): Recipe(300, _FIVE, smoothed=True, confidence=0.8),
    ("pgd", "cam"): Recipe(300, ((5, 10, 500),), smoothed=True),
    ("pgd", "mask"): Recipe(400, ((500, 500, 1000),), floor=-5, every=50),
    ("pgd", "rts"): Recipe(300, ((5, 10, 1000),), smoothed=True),
    ("cw", "grad"): Recipe(450, _FOUR, price=2, confidence=0.75),
    ("cw", "cam"): Recipe(300, ((5, 10, 1500),), price=2),
    ("cw", "mask"): Recipe(400, ((500, 500, 1000),), floor=-5, rate=0.005, every=50),
    ("cw", "rts"): Recipe(300, ((5, 10, 1000),), price=2, smoothed=True),
    ("stadv", "grad"): Recipe(450, _FOUR, confidence=0.75),
    ("stadv", "cam"): Recipe(200, ((5, 10, 600),), price=2),
    ("stadv", "mask"): Recipe(400, ((500, 500, 1000),), floor=-5, rate=0.005, every=50),
    ("stadv", "rts"): Recipe(200, ((5, 10, 600),)),
}
# Where the published budgets depend on the variant; those of ADV2 are its own authors'.
UNEQUAL: dict[tuple[str, str, str], dict[str, Any]] = {
    ("pgd", "grad", "adv2"): {"phases": _FIVE[:4]},
    ("pgd", "grad", "advedge_plus"): {
        "warmup": 200,
        "phases": (*_FIVE[:4], (0.07, 0.07, 101)),
        "every": 2,
    },
    ("pgd", "cam", "adv2"): {"warmup": 400, "phases": ((5, 10, 1200),), "smoothed": False},
    ("pgd", "cam", "advedge_plus"): {"phases": ((5, 10, 1000),)},
}


def recipe_for(interpreter: str, settings: Settings, search: str, variant: str) -> Recipe:
    """The recipe of a preset; interpreters other than the published four are taken like CAM."""
    kind = interpreter if ("pgd", interpreter) in RELEASED else "cam"
    recipe = RELEASED[search, kind]
    if settings == "released":
        return recipe._replace(**UNEQUAL.get((search, kind, variant), {}))
    if settings == "paper":
        return recipe
    first, last, rate = recipe.phases[0][0], recipe.phases[-1][1], recipe.rate
    if kind == "mask":
        # in few steps the published weight keeps images from reaching the class
        first, last, rate = 10, 10, 0.02 if search == "cw" else 0.03
    return recipe._replace(
        warmup=50, phases=((first, last, 150),), rate=rate, smoothed=False, confidence=0.0
    )


def map_settings(interpreter: str, settings: Settings, search: str, side: int) -> dict[str, Any]:
    """Parameters of an interpreter in a preset, for images of `side` pixels."""
    if settings == "fast":
        return {}
    if interpreter == "grad":
        pool = 4 if side >= 112 else 2 if side >= 24 else 1
        relu = "adv2" if settings == "released" else "smooth"
        return {"score": "logprob", "pool": pool, "relu": relu}
    if interpreter == "mask":
        return {"flavour": "v1" if search == "pgd" else "v2"}
    return {}


class Plan(NamedTuple):
    """How one run attacks the maps of one or more interpreters."""

    explainers: list[Interpreter]
    recipes: list[Recipe]
    warmup: int
    steps: int
    every: int
    confidence: float
    weight: float  # factor on those of the recipes
    smoothing: Smoothing
    price: float
    floor: float | None
    rate: float
    tau: float  # price of a flow
    neighbours: Neighbours
    mask_rate: float  # learning rate of a mask that is optimised along

    @classmethod
    def made(
        cls,
        names: list[str],
        settings: Settings,
        search: str,
        variant: str,
        smoothing: Smoothing,
        side: int,
    ) -> Plan:
        """That of a preset, for images of `side` pixels; ValueError for an impossible name."""
        if len(set(names)) < len(names):
            raise ValueError(f"interpreter must name each only once, not {'+'.join(names)}")
        recipes = [recipe_for(name, settings, search, variant) for name in names]
        if smoothing == "preset":
            published: Smoothing = "published" if settings == "released" else "uniform"
            smoothing = published if any(recipe.smoothed for recipe in recipes) else "none"
        # the classification term of most interpreters, unless all share another
        floors = [recipe.floor for recipe in recipes]
        floor = None if None in floors else floors[0]
        return cls(
            explainers=[
                Interpreter.build_differentiable(n, map_settings(n, settings, search, side))
                for n in names
            ],
            recipes=recipes,
            warmup=max(recipe.warmup for recipe in recipes),
            steps=max(recipe.steps for recipe in recipes),
            every=max(recipe.every for recipe in recipes),
            confidence=max(recipe.confidence for recipe in recipes),
            weight=1.0,
            smoothing=smoothing,
            price=max(recipe.price for recipe in recipes),
            floor=floor,
            rate=min(recipe.rate for recipe in recipes),
            tau=5e-4 if floor is None else 4e-3,
            neighbours="diagonal" if settings == "released" else "direct",
            mask_rate=0.1 if settings == "fast" else 0.001 if search == "pgd" else 0.01,
        )

    def changed(
        self,
        *,
        warmup: int | None,
        steps: int | None,
        every: int | None,
        confidence: float | None,
        weight: float,
    ) -> Plan:
        """With what a user gave; the warm-up shrinks with the steps. ValueError if out of range."""
        if warmup is None:
            warmup = self.warmup if steps is None else self.warmup * steps // self.steps
        steps = self.steps if steps is None else steps
        every = self.every if every is None else every
        confidence = self.confidence if confidence is None else confidence
        if steps < 1 or every < 1 or warmup < 0:
            raise ValueError(
                "steps and every must be at least 1 and warmup at least 0,"
                f" not {steps}, {every} and {warmup}"
            )
        if not (0 <= weight < math.inf and 0 <= confidence < 1):
            raise ValueError(
                "weight must be at least 0 and confidence from 0 to below 1,"
                f" not {weight:g} and {confidence:g}"
            )
        return self._replace(
            warmup=warmup, steps=steps, every=every, confidence=confidence, weight=weight
        )

    def weights(self, step: int) -> list[float]:
        """Weight of each map in a step, none below zero."""
        if step < 0:
            return [0.0] * len(self.recipes)
        return [self.weight * recipe.weight(step / self.steps)[0] for recipe in self.recipes]

    def begins(self, step: int) -> bool:
        """Whether a phase of constant weights, or the part after the warm-up, begins here."""
        if step <= 0:
            return step == 0
        now, before = step / self.steps, (step - 1) / self.steps
        return any(r.weight(now)[1] != r.weight(before)[1] for r in self.recipes)


class Chased:
    """A mask that is optimised along with the image whose explanation it is.

    The one-step surrogate of ADV2 (arXiv:1812.00891, Eq. 9): the distance is that of masks a few
    steps of Adam further, which depend on the image, from a mask that is taken as given.

    Parameters
    ----------
    deletion : Deletion
        What the mask lowers.
    x : Tensor
        Images ``(n, c, h, w)``.
    seeds : Tensor
        One seed per image ``(n,)`` for the jitter.
    steps : int
        How often the distance will be asked for.
    rate : float
        Learning rate of the mask.
    """

    BLIND, SEEN = 4, 4  # steps of the mask without and with a derivative
    REFRESH = 50  # steps of the image from one mask made from the start to the next

    def __init__(
        self, deletion: Deletion, x: Tensor, seeds: Tensor, steps: int, rate: float
    ) -> None:
        self.deletion, self.seeds, self.rate = deletion, seeds, rate
        self.state = deletion.start_mask(x)
        self.shifts = draw_offsets(seeds, steps * (self.BLIND + self.SEEN), deletion.jitter)
        self.count = 0

    @classmethod
    def made(
        cls, explainers: Sequence[Interpreter], x: Tensor, seeds: Tensor, steps: int, rate: float
    ) -> Chased | None:
        """That of the MASK among some interpreters, None if there is none."""
        for explainer in explainers:
            if explainer.spec.name == "mask":
                search = ("iterations", "rate", "unroll")
                game = {k: v for k, v in explainer.spec.parameters.items() if k not in search}
                deletion = build_deletion(x, **game)
                iterations = explainer.spec.parameters.get("iterations") or deletion.iterations
                return cls(replace(deletion, iterations=iterations), x, seeds, steps, rate)
        return None

    def distance(self, model: nn.Module, x_adv: Tensor, y: Tensor, benign: Tensor) -> Tensor:
        """Squared distance ``(n,)`` of the map for classes `y` from the benign one, summed."""
        total = x_adv.new_zeros(len(x_adv))
        for maps in self.maps(model, x_adv, y):
            total = total + measure_squared_distance("mask", maps, benign)
        return total / self.SEEN

    def maps(self, model: nn.Module, x_adv: Tensor, y: Tensor) -> list[Tensor]:
        """Maps ``(n, 1, grid, grid)`` for classes `y` of the steps that have a derivative."""
        if self.count % self.REFRESH == 0:
            self.refresh(model, x_adv.detach(), y)
        at = self.count * (self.BLIND + self.SEEN)
        self.count += 1
        state = self.state
        scene = self.deletion.compose_scene(x_adv)
        for i in range(at, at + self.BLIND):
            state = self.deletion.step_mask(
                model, scene.detach(), y, state, self.shifts[:, i], self.rate
            )
        found = []
        for i in range(at + self.BLIND, at + self.BLIND + self.SEEN):
            state = state._replace(mask=state.mask.detach())
            state = self.deletion.step_mask(model, scene, y, state, self.shifts[:, i], self.rate)
            found.append(1 - state.mask)
        self.state = state.detach()
        return found

    def of(self, index: Tensor) -> Chased:
        """The masks of some of the images."""
        part = copy(self)
        part.seeds, part.shifts = self.seeds[index.cpu()], self.shifts[index.to(self.shifts.device)]
        mask, mean, var, step = self.state
        part.state = State(mask[index], mean[index], var[index], step)
        return part

    def refresh(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        """Start from the mask of the image itself, with part of the momentum."""
        mask = self.deletion.optimise(model, quantise(x), y, self.seeds).mask
        self.state = State(mask, 0.5 * self.state.mean, 0.25 * self.state.var, 100)


class Dual:
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
    plan : Plan
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
        plan: Plan,
        seeds: Tensor | None,
    ) -> None:
        self.model, self.goal, self.plan = model, goal, plan
        self.seeds = torch.zeros(len(x), dtype=torch.int64) if seeds is None else seeds
        self.draws = per_image(self.seeds, torch.Size((plan.steps,))).to(x)  # (n, steps)
        with torch.no_grad():
            self.benign = [e.trace_maps(model, x, shown, self.seeds)[0] for e in plan.explainers]
        self.chased = Chased.made(plan.explainers, x, self.seeds, plan.steps, plan.mask_rate)

    def loss(self, x_adv: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Classification and map terms ``(n,)`` of images, and whether they reach the class.

        Eq. 7 of arXiv:2211.15926. A weight of zero spares the map.
        """
        logits: Tensor | None = None
        terms = []
        weights = self.plan.weights(step)
        for explainer, benign, weight in zip(
            self.plan.explainers, self.benign, weights, strict=True
        ):
            if not weight:
                continue
            if explainer.spec.name == "mask" and self.chased is not None:
                term = self.chased.distance(self.model, x_adv, self.goal, benign)
            else:
                maps, seen = explainer.trace_maps(self.model, x_adv, self.goal, self.seeds)
                logits = seen if seen is not None else logits
                term = measure_squared_distance(explainer.spec.name, maps, benign)
            terms.append(weight * term)
        own: Tensor = self.model(x_adv) if logits is None else logits
        loss = self.class_term(own, step)
        for term in terms:
            loss = loss + term
        return loss, predictions(own.detach()) == self.goal

    def class_term(self, logits: Tensor, step: int) -> Tensor:
        """What there is to lower until the class is predicted, ``(n,)``."""
        plan = self.plan
        if plan.floor is not None:
            return plan.price * (-margin(logits, self.goal)).clamp_min(plan.floor)
        if step < 0 or plan.smoothing == "none":
            return plan.price * F.cross_entropy(logits, self.goal, reduction="none")
        least = 0.95 + 0.04 * step / plan.steps
        probability = least + (1 - least) * self.draws[:, step]
        shares = 9 if plan.smoothing == "published" else logits.shape[1] - 1
        return plan.price * smoothed_cross_entropy(logits, self.goal, probability, shares)

    def judged(self, x_adv: Tensor, index: Tensor) -> Found:
        """Images for rows `index` ``(m,)`` with the distance of their maps from the benign ones.

        Measured on the network's own slopes. Finished: with the probability that is asked for.
        """
        goal, seeds = self.goal[index], self.seeds[index.cpu()]
        far = torch.zeros(len(index), dtype=x_adv.dtype, device=x_adv.device)
        with torch.no_grad(), rows(index):
            found, own = explained(self.plan.explainers, self.model, x_adv, goal, seeds)
        for maps, benign in zip(found, self.benign, strict=True):
            far = far + measure_mean_distance(maps, benign[index]) / len(self.benign)
        hit = predictions(own) == goal
        p = own.softmax(1).gather(1, goal.unsqueeze(1)).squeeze(1)
        return Found(x_adv, far, hit, hit & (p >= self.plan.confidence))


def smoothed_cross_entropy(
    logits: Tensor, goal: Tensor, probability: Tensor, shares: int
) -> Tensor:
    """Cross-entropy ``(n,)`` with target probability ``(n,)`` of class `goal` ``(n,)``.

    Each other class gets the rest divided by `shares`.
    """
    log_p = logits.log_softmax(1)
    own = log_p.gather(1, goal.unsqueeze(1)).squeeze(1)
    return -(probability * own + (1 - probability) / shares * (log_p.sum(1) - own))


class Best:
    """Of each original the best image among those that reach the class.

    Parameters
    ----------
    judged : callable
        ``(images (m, c, h, w), their rows (m,)) -> Found``, with a loss that is lower for a better
        image.
    settled : callable
        Of the same: the images rounded to 8 bits, and whether they are still allowed.
    x : Tensor
        Originals ``(n, c, h, w)``.
    stop : {"8bit", "float", "never"}
        Whether images are judged rounded, as they are, or not at all.
    """

    def __init__(
        self,
        judged: Callable[[Tensor, Tensor], Found],
        settled: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        x: Tensor,
        stop: Stop,
    ) -> None:
        self.judged, self.settled, self.stop = judged, settled, stop
        far = torch.full((len(x),), torch.inf, device=x.device)
        none = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self.found = Found(x.clone(), far, none, none.clone())

    def take(self, x_adv: Tensor, index: Tensor) -> None:
        """Compare images that as floats reach the class, of rows `index` ``(m,)``."""
        if self.stop == "never" or len(index) == 0:
            return
        if self.stop == "8bit":
            # the latest of those that rounding undoes is better than none
            one = torch.ones(len(index), dtype=torch.bool, device=x_adv.device)
            far = torch.full((len(index),), torch.inf, device=x_adv.device)
            keep_best(self.found, index, Found(x_adv, far, one, ~one))
            x_adv, allowed = self.settled(x_adv, index)
            index, x_adv = index[allowed], x_adv[allowed]
        if len(index):
            keep_best(self.found, index, self.judged(x_adv, index))

    def otherwise(self, x_adv: Tensor) -> Tensor:
        """The best images, `x_adv` where there is none."""
        return torch.where(self.found.success.view(-1, 1, 1, 1), self.found.x_adv, x_adv)


def explained(
    explainers: Sequence[Interpreter],
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    seeds: Tensor | None,
    chased: Chased | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Scaled maps of each interpreter for classes `y`, and the logits, in as few passes as can be.

    On the graph if `x` is. If given, `chased` stands for a mask that is optimised from the start.
    """
    logits: Tensor | None = None
    found = []
    for explainer in explainers:
        if explainer.spec.name == "mask" and chased is not None:
            found.append(torch.stack(chased.maps(model, x, y)).mean(0))
            continue
        maps, seen = explainer.trace_maps(model, x, y, seeds)
        logits = seen if seen is not None else logits
        found.append(maps)
    own: Tensor = model(x) if logits is None else logits
    return found, own


def checked(y: Tensor, logits: Tensor) -> Tensor:
    """The classes to reach ``(n,)``; ValueError if one is none of those of logits ``(n, k)``."""
    if not 0 <= int(y.min()) <= int(y.max()) < logits.shape[1]:
        raise ValueError(f"targets must be classes from 0 to {logits.shape[1] - 1}")
    return y


def chosen(logits: Tensor, y: Tensor, target: Target, seeds: Tensor | None) -> Tensor:
    """A class other than `y` for each image ``(n,)``."""
    if logits.shape[1] < 2:
        raise ValueError("there is no class to reach: the model has only one")
    if target == "random":
        drawn = torch.zeros(len(y), dtype=torch.int64) if seeds is None else seeds
        return random_targets(y, drawn, logits.shape[1])
    others = logits.scatter(1, y.unsqueeze(1), -torch.inf if target == "runner_up" else torch.inf)
    return others.argmax(1) if target == "runner_up" else others.argmin(1)
