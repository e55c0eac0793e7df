"""How long attacks on explanations search, and what the maps weigh in each step."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

from robusteval.interpreters.explainer import Interpreter
from robusteval.search.moves import Neighbours

Settings = Literal["fast", "released", "paper"]
Smoothing = Literal["preset", "none", "fixed", "uniform", "published"]
# what the warm-up lowers: cross-entropy, minus the logit, the margin, or that as a ten-thousandth
Lead = Literal["ce", "logit", "margin", "faint"]
# which image is the result: of the nearest map, the last, or of least l2 and not in the class
Keep = Literal["nearest", "last", "missed"]
# the map of the benign image: for the class that it is taken for, or for the class to reach
MapClass = Literal["preset", "predicted", "target"]


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
    rounds: int = 1  # searches, of C&W with another constant each
    # what no formula has, only the published code
    lead: Lead = "ce"
    keep: Keep = "nearest"
    push: tuple[Literal["logit", "ce"], float] = ("logit", 0.0)  # of the encoder's class
    pace: float = 1.0  # factor on steps of the warm-up
    alpha: float = 0.1  # least strength of an edge
    map_class: MapClass = "predicted"

    @property
    def steps(self) -> int:
        """Steps of all phases together, whether towards class or map."""
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
# What the published code does besides; no setting but `released` asks for it. The last image is
# kept of some pairs, and of C&W on CAM one that misses the class: the test is that of an attack
# without a target, given the target for a label, so that no result can be a success. RTS keeps
# the benign map of the class to reach, all others that of the class the image is taken for.
PECULIAR: dict[tuple[str, str], dict[str, Any]] = {
    ("pgd", "cam"): {"lead": "logit", "keep": "last"},
    ("pgd", "mask"): {"lead": "margin"},
    ("pgd", "rts"): {
        "lead": "logit",
        "keep": "last",
        "push": ("logit", 0.2),
        "map_class": "target",
    },
    ("cw", "grad"): {"lead": "faint"},
    ("cw", "cam"): {"lead": "faint", "keep": "missed"},
    ("cw", "mask"): {"lead": "faint"},
    ("cw", "rts"): {"lead": "faint", "keep": "last", "push": ("logit", 0.5), "map_class": "target"},
    ("stadv", "cam"): {"keep": "last"},
    ("stadv", "rts"): {"keep": "last", "push": ("ce", 0.1), "map_class": "target"},
}
# Where it depends on the variant; what ADV2's own authors have published of it is theirs: PGD.
UNEQUAL: dict[tuple[str, str, str], dict[str, Any]] = {
    ("pgd", "grad", "adv2"): {"phases": _FIVE[:4]},
    ("pgd", "grad", "advedge_plus"): {
        "warmup": 200,
        "phases": (*_FIVE[:4], (0.07, 0.07, 101)),
        "every": 2,
    },
    ("pgd", "cam", "adv2"): {
        "warmup": 400,
        "phases": ((5, 10, 1200),),
        "smoothed": False,
        "every": 50,
        "lead": "ce",
        "keep": "nearest",
    },
    ("pgd", "cam", "advedge_plus"): {"phases": ((5, 10, 1000),)},
    ("pgd", "mask", "adv2"): {"lead": "ce"},
    ("pgd", "rts", "adv2"): {
        "smoothed": False,
        "every": 50,
        "lead": "ce",
        "keep": "nearest",
        "push": ("ce", 0.1),
    },
    ("pgd", "rts", "advedge"): {"pace": 0.5},
    ("pgd", "rts", "advedge_plus"): {"alpha": 0.05},
}


def choose_recipe(interpreter: str, settings: Settings, search: str, variant: str) -> Recipe:
    """The recipe of a preset; interpreters other than the published four are taken like CAM."""
    kind = interpreter if ("pgd", interpreter) in RELEASED else "cam"
    recipe = RELEASED[search, kind]
    if settings == "released":
        # what is said of the four says nothing of others that are taken like one of them
        own = {} if kind != interpreter else PECULIAR.get((search, kind), {})
        return recipe._replace(**{**own, **UNEQUAL.get((search, kind, variant), {})})
    if search == "cw":
        recipe = recipe._replace(
            smoothed=False,
            price=1.0,
            floor=None,
            every=min(recipe.every, 5) if kind != "mask" else recipe.every,
            confidence=0.0,
            rounds=9,
        )
    if settings == "paper":
        return recipe
    first, last, rate = recipe.phases[0][0], recipe.phases[-1][1], recipe.rate
    if kind == "mask":
        # in few steps the published weight keeps images from reaching the class
        first, last, rate = 10, 10, 0.02 if search == "cw" else 0.03
    warmup, steps, rounds = (25, 75, 3) if search == "cw" else (50, 150, 1)
    return recipe._replace(
        warmup=warmup,
        phases=((first, last, steps),),
        rate=rate,
        smoothed=False,
        confidence=0.0,
        rounds=rounds,
    )


def choose_map_settings(
    interpreter: str, settings: Settings, search: str, variant: str, side: int
) -> dict[str, Any]:
    """Parameters of an interpreter in a preset, for images of `side` pixels."""
    if settings == "fast":
        # in full resolution the map of a large image hardly follows an attack of few steps
        return {"pool": 4} if interpreter == "grad" and side >= 112 else {}
    if interpreter == "grad":
        pool = 4 if side >= 112 else 2 if side >= 24 else 1
        relu = "adv2" if settings == "released" else "smooth"
        return {"score": "logprob", "pool": pool, "relu": relu}
    if interpreter == "mask":
        first = search == "pgd" and not (settings == "released" and variant == "adv2")
        return {"flavour": "v1" if first else "v2"}
    return {}


def choose_mask_rate(settings: Settings, search: str, variant: str) -> float:
    """The learning rate of a mask that is optimised along."""
    if settings == "fast" or (settings == "released" and search == "pgd" and variant == "adv2"):
        return 0.1
    return 0.001 if search == "pgd" else 0.01


class DualPlan(NamedTuple):
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
    bisects: bool  # whether the constant of C&W is searched, in so many
    rounds: int
    lead: Lead
    keep: Keep
    push: tuple[Literal["logit", "ce"], float]
    pace: float
    alpha: float
    map_class: MapClass

    @classmethod
    def from_preset(
        cls,
        names: list[str],
        settings: Settings,
        search: str,
        variant: str,
        smoothing: Smoothing,
        side: int,
        mask_iterations: int | None = None,
    ) -> DualPlan:
        """The plan of a preset, for images of `side` pixels; ValueError for an impossible name.

        Masks are searched in as many iterations as published, unless their number is given.
        """
        if len(set(names)) < len(names):
            raise ValueError(f"interpreter must name each only once, not {'+'.join(names)}")
        own: dict[str, dict[str, Any]] = {}
        if mask_iterations is not None:
            if "mask" not in names:
                raise ValueError("mask_iterations does nothing where no interpreter is mask")
            own["mask"] = {"iterations": mask_iterations}
        recipes = [choose_recipe(name, settings, search, variant) for name in names]
        # the classification term of most interpreters, unless all share another
        floors = [recipe.floor for recipe in recipes]
        floor = None if None in floors else floors[0]
        if smoothing == "preset":
            published: Smoothing = "published" if settings == "released" else "uniform"
            if published == "published" and variant == "adv2":
                published = "fixed"
            smoothing = published if any(recipe.smoothed for recipe in recipes) else "none"
        return cls(
            explainers=[
                Interpreter.build_differentiable(
                    name,
                    choose_map_settings(name, settings, search, variant, side) | own.get(name, {}),
                )
                for name in names
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
            mask_rate=choose_mask_rate(settings, search, variant),
            bisects=search == "cw" and settings != "released",
            rounds=max(recipe.rounds for recipe in recipes),
            # of several interpreters what all have
            lead=recipes[0].lead if len({recipe.lead for recipe in recipes}) == 1 else "ce",
            keep=recipes[0].keep if len({recipe.keep for recipe in recipes}) == 1 else "nearest",
            push=max((recipe.push for recipe in recipes), key=lambda push: push[1]),
            pace=min(recipe.pace for recipe in recipes),
            alpha=min(recipe.alpha for recipe in recipes),
            map_class="target" if all(r.map_class == "target" for r in recipes) else "predicted",
        )

    def override(
        self,
        *,
        warmup: int | None,
        steps: int | None,
        every: int | None,
        confidence: float | None,
        weight: float,
        rounds: int | None = None,
    ) -> DualPlan:
        """The plan with what a user gave; the warm-up shrinks with the steps, to one at least.

        ValueError if something is out of range.
        """
        if self.keep != "nearest" and not every is confidence is None:
            raise ValueError(
                "with these settings every and confidence do nothing: as in the published code, no"
                " image is chosen by its map"
            )
        rounds = self.rounds if rounds is None else rounds
        if rounds < 1:
            raise ValueError(f"rounds must be at least 1, not {rounds}")
        if warmup is None:
            # without one, edges would have nothing to act on
            warmup = self.warmup if steps is None else max(1, self.warmup * steps // self.steps)
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
            warmup=warmup,
            steps=steps,
            every=every,
            confidence=confidence,
            weight=weight,
            rounds=rounds,
        )

    def weigh_maps(self, step: int) -> list[float]:
        """Weight of each map in a step, none below zero."""
        if step < 0:
            return [0.0] * len(self.recipes)
        return [self.weight * recipe.weight(step / self.steps)[0] for recipe in self.recipes]

    def begins_phase(self, step: int) -> bool:
        """Whether a phase of constant weights, or the part after the warm-up, begins here."""
        if step <= 0:
            return step == 0
        now, before = step / self.steps, (step - 1) / self.steps
        return any(r.weight(now)[1] != r.weight(before)[1] for r in self.recipes)
