"""Attacks on a classifier together with the detector that watches it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, autograd, nn
from torch.nn.functional import softplus

from robusteval.art.art_classes import make_art_class
from robusteval.evaluation.defense import WithDetector
from robusteval.interpreters.explainer import measure_squared_distance
from robusteval.models.classifier import predict_classes
from robusteval.models.steps import book_rows, tell_step
from robusteval.registry import ATTACKS, DEFENSES, INTERPRETERS
from robusteval.search.balls import Ball
from robusteval.search.descent import Found, Stop
from robusteval.search.losses import attacker_loss, cross_entropy
from robusteval.search.moves import Signed

from .dual_objective import (
    BestImages,
    Target,
    attack_in_parts,
    check_goals,
    choose_classes,
    explain_images,
)
from .tracked_mask import TrackedMask

Along = Literal["maps", "features", "both", "score", "imitation"]
Choice = Literal["distance", "score"]

# by what is followed, what of a detector gives log odds of its features on the graph
STAND_INS: Mapping[str, str] = {"score": "smooth_odds", "imitation": "imitate_odds"}
# of the first search, the second, …; then from the beginning
WEIGHTS = (1.0, 0.1, 10.0, 0.01, 100.0)


@ATTACKS.add(
    "evade",
    norms=("linf",),
    knowledge="white-box",
    detector=True,
    files=("made_on",),
    needs={
        "target": {"targeted": (False,)},
        "choice": {"stop": ("8bit", "float")},
        "every": {"stop": ("8bit", "float")},
    },
)
@attack_in_parts
def evade(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    targeted: bool = False,
    seeds: Tensor | None = None,
    mask: Tensor | None = None,
    along: Along = "maps",
    choice: Choice = "score",
    eps: float = 8 / 255,
    step: float | None = None,
    warmup: int = 50,
    steps: int = 300,
    weight: float = 1.0,
    restarts: int = 1,
    target: Target = "runner_up",
    every: int = 2,
    stop: Stop = "8bit",
    made_on: str = "",
) -> Tensor:
    """Reach a class and leave the detector that watches the explanations nothing to see.

    An adaptive attack in the sense of Adversarial Examples Are Not Easily Detected,
    arXiv:1705.07263: the attacker knows the classifier, the detector and all interpreters that it
    looks at. Hardening Interpretable Deep Learning Systems, arXiv:2211.15926, proposes such
    detectors and names an attack on all their maps at once without running it (reconstructed).
    Signed steps in the linf ball, first towards the class alone, then along the cross-entropy
    plus `weight` times a sum of squared distances: of every map, or of the detector's features,
    from those of the original image. So that no term dominates, each is divided by what it is
    where the first warm-up ends, image by image: one is what an attack that minds no detector
    does to it.

    Parameters
    ----------
    model : nn.Module
        A `robusteval.evaluation.defense.WithDetector` classifier of images in [0, 1], or a module
        that holds one.
    x : Tensor
        Images ``(n, c, h, w)`` in [0, 1].
    y : Tensor
        Labels ``(n,)`` int64, or the classes to reach when `targeted`.
    targeted : bool
        Reach class `y`; otherwise the class that `target` picks for each image.
    seeds : Tensor, optional
        One seed per image ``(n,)`` for all that is drawn; zeros if not given. Not those with
        which the detector is asked in earnest.
    mask : Tensor, optional
        Broadcastable to `x`; zero where a pixel may not change.
    along : {"maps", "features", "both", "score", "imitation"}
        What is kept near the original's: the maps of all interpreters, or what the detector makes
        of them and of the logits, which decides its score. Two lower a stand-in of the score
        itself, for a detector that has one: `score` its trees with every split blurred,
        `imitation` a network that was fitted to imitate them.
    choice : {"distance", "score"}
        Which image that reaches the class is the result: that of the least distance of what is
        kept, or that of the detector's lowest score; an image below its threshold is finished.
    eps : float
        Radius of the ball, in units of the [0, 1] pixel range.
    step : float, optional
        Length of a step, in units of the [0, 1] pixel range; eps / 4 if not given. After the
        warm-up it falls to zero, evenly.
    warmup : int
        Steps towards the class alone, in each search.
    steps : int
        Steps towards class and distance, in each search.
    weight : float
        Of the distance; 0 leaves it out of the steps, not out of the choice of the result.
    restarts : int
        Searches, on the images that are not finished. From the second on they start at a random
        point of the ball, and multiply the weight by 0.1, 10, 0.01 and 100 in turn.
    target : {"runner_up", "random", "least_likely"}
        Without `targeted`, the class to reach: the most likely one besides the label, a random
        one besides it, or the least likely one.
    every : int
        Steps between one choice and the next. Each costs one more set of maps, which for MASK is
        hundreds of passes.
    stop : {"8bit", "float", "never"}
        What is chosen from: images rounded to 8 bits inside the ball, or as they are; `never`
        returns the last image of all steps.
    made_on : str
        File of another detector of the same classifier, such as an attacker can fit to images of
        his own: it is attacked in the place of the one that watches, of which nothing is asked.

    Returns
    -------
    Tensor
        Images ``(n, c, h, w)`` inside the ball and in [0, 1]; the last ones where the class was
        not reached.

    Raises
    ------
    ValueError
        If a parameter is out of range, the model has no detector or one with an interpreter that
        has no derivative, or a target is no class.
    UsageError
        If the file of another detector is none, or is of another classifier.
    """
    watched = find_detector(model)
    if made_on:
        other = find_detector(DEFENSES.load("detector")(watched.undefended, file=made_on))
        watched = copy.copy(watched)  # the same network, so that its passes are counted
        watched.detector = other.detector
    if along in STAND_INS:
        find_stand_in(watched, along)
    if min(steps, restarts, every) < 1 or warmup < 0:
        raise ValueError(
            "steps, restarts and every must be at least 1 and warmup at least 0,"
            f" not {steps}, {restarts}, {every} and {warmup}"
        )
    if step is not None and not 0 < step < math.inf:
        raise ValueError(f"step must be positive, not {step:g}")
    if not 0 <= weight < math.inf:
        raise ValueError(f"weight must be at least 0, not {weight:g}")
    ball = Ball.around(x, "linf", eps, mask)
    if len(x) == 0:
        for explainer in watched.detector.explainers:
            if explainer.spec.name != "mask":  # which is optimised on its own graph, at a cost
                explainer.check_derivative(watched, x.shape[1:])
        return x.clone()

    with torch.no_grad():
        logits = watched(x)
        if watched is not model and not torch.equal(logits, model(x)):
            raise ValueError("evade cannot see what is done to images before the detector's model")
    goal = check_goals(y, logits) if targeted else choose_classes(logits, y, target, seeds)
    suspicion = Suspicion(watched, x, goal, logits.argmax(1), seeds, along, choice)
    length = eps / 4 if step is None else step
    best = BestImages(suspicion.judge_images, Signed(ball, length).round_images, x, stop)
    ends = x.clone()
    searched = warmup + steps + 1  # steps of a search
    for restart in range(restarts):
        left = (~best.found.finished).nonzero().flatten()  # rows still searched
        if len(left) == 0:
            break
        here = ball.pick(left)
        x_adv = here.x if restart == 0 else here.sample(suspicion.seeds[left.cpu()] + restart)
        suspicion.begin(left, steps)
        factor = weight * WEIGHTS[restart % len(WEIGHTS)]
        for i in range(-warmup, steps + 1):  # below zero: towards the class alone
            tell_step(restart * searched + warmup + i, restarts * searched)
            last = i == steps
            if i == restart == 0:
                suspicion.set_scales(x_adv)
            x_adv = x_adv.detach().requires_grad_(not last)
            loss, is_adv = suspicion.measure_loss(x_adv, left, factor if 0 <= i < steps else 0.0)
            # rows that turn out finished waste this one backward pass
            grad = None if last else autograd.grad(loss.sum(), x_adv)[0]
            x_adv = x_adv.detach()
            ends[left] = x_adv
            if last or (i >= 0 and i % every == 0):
                best.take(x_adv[is_adv], left[is_adv])
            going = ~best.found.finished[left]
            if grad is None or not bool(going.any()):
                break
            if not bool(going.all()):
                left, x_adv, grad, here = left[going], x_adv[going], grad[going], here.pick(going)
                suspicion.keep(going)
            shrink = 1 - max(i, 0) / steps
            x_adv = here.project(x_adv - shrink * length * here.find_direction(grad))
    return ends if stop == "never" else best.fill_with(ends)


def find_detector(model: nn.Module) -> WithDetector:
    """The classifier with its detector; ValueError if it cannot be attacked."""
    found = [part for part in model.modules() if isinstance(part, WithDetector)]
    if len(found) != 1:
        raise ValueError("evade attacks a model behind a detector: give it one (--defense)")
    for explainer in found[0].detector.explainers:
        if not INTERPRETERS.entry(explainer.spec.name).differentiable:
            raise ValueError(
                f"the detector looks at maps of {explainer.spec.name}, which have no derivative,"
                " so evade has none to follow"
            )
    return found[0]


def find_stand_in(model: WithDetector, along: str) -> Callable[[Tensor], Tensor]:
    """What gives log odds ``(n,)`` of features ``(n, d)`` on the graph; ValueError if nothing."""
    found: Callable[[Tensor], Tensor] | None = getattr(model.detector, STAND_INS[along], None)
    if found is None:
        raise ValueError(f"the detector has no stand-in of its score for {along}: take along=both")
    return found


class Suspicion:
    """How far the maps of a batch, and what a detector makes of them, are from what they were.

    Parameters
    ----------
    model : WithDetector
        Classifier and detector.
    x : Tensor
        Images ``(n, c, h, w)`` in [0, 1].
    goal : Tensor
        Classes to reach ``(n,)``; the maps of changed images are those for them.
    shown : Tensor
        Classes ``(n,)`` of the maps of `x`.
    seeds : Tensor, optional
        One seed per image ``(n,)`` for interpreters that draw; zeros if not given.
    along : {"maps", "features", "both", "score", "imitation"}
        What is measured.
    choice : {"distance", "score"}
        What judges an image.
    """

    def __init__(
        self,
        model: WithDetector,
        x: Tensor,
        goal: Tensor,
        shown: Tensor,
        seeds: Tensor | None,
        along: Along,
        choice: Choice,
    ) -> None:
        self.model, self.x, self.goal, self.along, self.choice = model, x, goal, along, choice
        self.explainers = model.detector.explainers
        self.seeds = torch.zeros(len(x), dtype=torch.int64) if seeds is None else seeds
        with torch.no_grad():
            self.benign, logits = explain_images(self.explainers, model, x, shown, self.seeds)
            self.features = model.detector.features(model, self.benign, logits)
        self.scales: list[Tensor] = []  # by which distances are divided, once measured

    def set_scales(self, x_adv: Tensor) -> None:
        """Let the distances of these images ``(n, c, h, w)`` count one each."""
        everyone = torch.arange(len(x_adv), device=x_adv.device)
        with torch.no_grad(), book_rows(everyone):
            maps, logits = explain_images(self.explainers, self.model, x_adv, self.goal, self.seeds)
            # what hardly moves is not blown up
            far = [d.clamp_min(1e-6) for d in self.measure_terms(maps, logits, everyone)]
        self.scales = far

    def begin(self, left: Tensor, steps: int) -> None:
        """Start a search of so many steps on rows `left` ``(m,)``."""
        tracked = TrackedMask.from_interpreters(
            self.explainers, self.x, self.seeds, steps, rate=0.1
        )
        self.tracked = None if tracked is None else tracked.restrict(left)

    def keep(self, going: Tensor) -> None:
        """Drop what is remembered of images that are not searched on; `going` ``(m,)`` are."""
        self.tracked = None if self.tracked is None else self.tracked.restrict(going)

    def measure_loss(self, x_adv: Tensor, left: Tensor, weight: float) -> tuple[Tensor, Tensor]:
        """What the rows `left` ``(m,)`` lower ``(m,)``, and whether they reach the class.

        A weight of zero spares maps and features.
        """
        goal, terms = self.goal[left], []
        with book_rows(left):
            if weight:
                maps, logits = explain_images(
                    self.explainers, self.model, x_adv, goal, self.seeds[left.cpu()], self.tracked
                )
                terms = self.measure_terms(maps, logits, left)
            else:
                logits = self.model(x_adv)
        if not terms:
            loss = attacker_loss(logits, goal, targeted=True, loss="ce")
        else:
            loss = cross_entropy(logits, goal)
        for term in terms:
            loss = loss + weight * term
        return loss, predict_classes(logits.detach()) == goal

    def measure_terms(self, maps: list[Tensor], logits: Tensor, left: Tensor) -> list[Tensor]:
        """Squared distances ``(m,)`` of maps and features of rows `left` that are minded."""
        found = []
        if self.along in ("maps", "both"):
            for explainer, some, benign in zip(self.explainers, maps, self.benign, strict=True):
                found.append(measure_squared_distance(explainer.spec.name, some, benign[left]))
        if self.along != "maps":
            features = self.model.detector.features(self.model, maps, logits)
            if self.along in STAND_INS:
                odds = find_stand_in(self.model, self.along)(features)
                found.append(softplus(odds))  # -log(1 - score)
            else:
                found.append((features - self.features[left]).square().mean(1))
        scales = self.scales or [torch.ones_like(self.goal)] * len(found)
        return [d / scale[left] for d, scale in zip(found, scales, strict=True)]

    def judge_images(self, x_adv: Tensor, index: Tensor) -> Found:
        """Images for rows `index` ``(m,)`` with the detector's score, or the sum of distances.

        Finished: in the class and not flagged.
        """
        goal, seeds = self.goal[index], self.seeds[index.cpu()]
        with torch.no_grad(), book_rows(index):
            if self.choice == "score":
                detector = self.model.detector
                is_adv = predict_classes(self.model(x_adv)) == goal
                score = detector.score(self.model, x_adv, seeds).to(x_adv.device)
                return Found(x_adv, score.to(x_adv), is_adv, is_adv & (score <= detector.threshold))
            maps, logits = explain_images(self.explainers, self.model, x_adv, goal, seeds)
            far = torch.stack(self.measure_terms(maps, logits, index)).sum(0)
        is_adv = predict_classes(logits) == goal
        return Found(x_adv, far, is_adv, torch.zeros_like(is_adv))


def __getattr__(name: str) -> Any:
    """`Evade`, an ART evasion attack."""
    return make_art_class(name, Evade=evade)
