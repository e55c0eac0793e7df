"""Attacks on a watched classifier: what the detector still sees, what it costs, what is refused."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from itertools import product
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from toys import Watcher, attackable, late, synthetic

from robusteval.evaluation.defense import WithDetector
from robusteval.interpreters.explainer import Interpreter
from robusteval.models.classifier import Classifier, predict_classes
from robusteval.models.steps import count_passes
from robusteval.runs.types import Spec
from robusteval.search.balls import measure_distances, quantise

if TYPE_CHECKING:
    from robusteval.attacks.evade import evade
    from robusteval.attacks.pgd import pgd
else:
    evade = late("robusteval.attacks.evade", "evade")
    pgd = late("robusteval.attacks.pgd", "pgd")

EPS = 0.12
SEEDS = torch.arange(24) * 1000
WATCHED = ("grad", "gradcam")
DRAW = 8  # of patterns of signs: some, such as those of 3 and 6, by chance hardly see an attack
CASES = list(product(("maps", "features", "both"), ("distance", "score")))


def photos(n: int, seed: int) -> Tensor:
    x, _ = synthetic(n, seed)
    images: Tensor = torch.from_numpy(x).permute(0, 3, 1, 2).float().div(255).contiguous()
    return images


def classes_of(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return predict_classes(model(x))


def runner_up(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(x)
    return logits.scatter(1, logits.argmax(1, keepdim=True), -torch.inf).argmax(1)


def plain(model: nn.Module, x: Tensor, steps: int = 60) -> Tensor:
    """Targeted PGD that minds no detector."""
    return pgd(
        model,
        x,
        runner_up(model, x),
        targeted=True,
        eps=EPS,
        step=EPS / 8,
        steps=steps,
        random_start=False,
        stop="never",
    )


def scores(model: WithDetector, x: Tensor) -> Tensor:
    return model.detector.score(model, x, SEEDS[: len(x)])


def flagged(model: WithDetector, x: Tensor) -> float:
    return (scores(model, x) > model.detector.threshold).float().mean().item()


def fitted(classifier: Classifier) -> WithDetector:
    """Behind the linear discriminant of features of images as they are and attacked ones."""
    x = photos(200, seed=7)
    watcher = Watcher(interpreters=WATCHED, draw=DRAW)

    def features(images: Tensor) -> Tensor:
        y = classes_of(classifier, images)
        with torch.no_grad():
            maps = [e.trace_maps(classifier, images, y, None)[0] for e in watcher.explainers]
            return watcher.features(classifier, maps, classifier(images))

    one, other = features(x), features(plain(classifier, x))
    spread = torch.cat([one - one.mean(0), other - other.mean(0)]).T.cov()
    slope = torch.linalg.solve(spread, other.mean(0) - one.mean(0))
    model = WithDetector(classifier, Watcher(0.5, slope, WATCHED, DRAW))
    scored = model.detector.score(model, x, torch.zeros(200))
    return WithDetector(classifier, Watcher(scored.quantile(0.95).item(), slope, WATCHED, DRAW))


@pytest.fixture(scope="module")
def watched(trained_bands: nn.Module) -> WithDetector:
    classifier = Classifier(trained_bands, mean=(0.5,), std=(0.25,), num_classes=3)
    return fitted(classifier.eval())


@pytest.mark.parametrize("along", ["maps", "features", "both"])
def test_detectors_of_plain_attacks_miss_those_that_know_them(
    watched: WithDetector, along: Any
) -> None:
    """Every image is still misclassified; a choice by the true score is not flagged more often."""
    x = photos(24, seed=9)
    y = classes_of(watched, x)

    given: dict[str, Any] = {"along": along, "eps": EPS, "steps": 60, "warmup": 20}
    found = [evade(watched, x, y, seeds=SEEDS, choice=c, **given) for c in ("distance", "score")]

    assert flagged(watched, x) < 0.2
    assert flagged(watched, plain(watched, x)) > 0.7
    assert all(classes_of(watched, x_adv).ne(y).all() for x_adv in found)
    near, low = (flagged(watched, x_adv) for x_adv in found)
    assert low <= near < 0.5


def test_without_the_distance_it_is_plain_targeted_pgd(watched: WithDetector) -> None:
    """To the bit, as long as steps have one length."""
    x = photos(8, seed=9)

    x_adv = evade(
        watched,
        x,
        runner_up(watched, x),
        targeted=True,
        eps=EPS,
        step=EPS / 8,
        warmup=11,
        steps=1,
        weight=0.0,
        stop="never",
    )

    assert torch.equal(x_adv, plain(watched, x, steps=12))


@pytest.mark.parametrize(("along", "choice"), CASES)
def test_a_result_does_not_depend_on_the_batch(
    watched: WithDetector, along: Any, choice: Any
) -> None:
    """Together, in parts, or in another order: the same bits, though images finish early."""
    x = photos(5, seed=9)
    y, order = classes_of(watched, x), torch.tensor([4, 0, 2, 1, 3])

    def found(some: Tensor) -> Tensor:
        given: dict[str, Any] = {"along": along, "choice": choice, "restarts": 2, "every": 3}
        return evade(
            watched, x[some], y[some], seeds=SEEDS[some], eps=EPS, warmup=6, steps=9, **given
        )

    together = found(torch.arange(5))

    assert torch.equal(found(order), together[order])
    parts = (torch.tensor([0]), torch.arange(1, 5))
    assert torch.equal(torch.cat([found(part) for part in parts]), together)


@pytest.mark.parametrize("choice", ["distance", "score"])
def test_the_result_is_the_best_of_what_was_looked_at(watched: WithDetector, choice: Any) -> None:
    """Looking more often finds no worse an 8-bit image of the class inside the ball."""
    x = photos(8, seed=9)
    y = classes_of(watched, x)
    watcher = watched.detector
    assert isinstance(watcher, Watcher)
    assert watcher.slope is not None
    # a score that can be told from one in float32
    model = WithDetector(watched, Watcher(0.0, watcher.slope / 50, WATCHED, DRAW))
    given: dict[str, Any] = {"eps": EPS, "steps": 40, "warmup": 20, "choice": choice}

    often, seldom = (
        evade(model, x, y, along="features", every=every, **given) for every in (5, 20)
    )

    for x_adv in (often, seldom):
        assert classes_of(model, x_adv).ne(y).all()
        assert torch.equal(quantise(x_adv), x_adv)
        assert (measure_distances(x_adv, x)["linf"] <= EPS + 1e-6).all()
    if choice == "score":
        assert (scores(model, often) <= scores(model, seldom)).all()
        assert (scores(model, often) < scores(model, seldom)).any()
    else:
        one, other = (features_gap(model, x, x_adv) for x_adv in (often, seldom))
        assert (one <= other + 1e-9).all()


def features_gap(model: WithDetector, x: Tensor, x_adv: Tensor) -> Tensor:
    found = []
    for images in (x, x_adv):
        y = classes_of(model, images)
        with torch.no_grad():
            maps = [e.trace_maps(model, images, y, None)[0] for e in model.detector.explainers]
            found.append(model.detector.features(model, maps, model(images)))
    return (found[0] - found[1]).square().mean(1)


def test_restarts_only_help(watched: WithDetector) -> None:
    """By the true score, image by image; of searches so short that one does not find it all."""
    x = photos(24, seed=9)
    y = classes_of(watched, x)

    once, thrice = (
        evade(watched, x, y, seeds=SEEDS, eps=EPS, warmup=12, steps=8, restarts=r) for r in (1, 3)
    )

    assert (scores(watched, thrice) <= scores(watched, once)).all()
    assert flagged(watched, thrice) < flagged(watched, once)


def test_images_that_are_not_flagged_cost_no_more_passes(bands: Classifier) -> None:
    """The first look ends the search where the detector never objects, however many steps."""
    x = photos(4, seed=9)
    y = classes_of(bands, x)

    def cost(threshold: float, steps: int) -> list[float]:
        model = WithDetector(bands, Watcher(threshold))
        with count_passes(model, 4, x.device) as passes:
            evade(model, x, y, eps=0.3, warmup=12, steps=steps)
        booked: list[float] = (passes.forwards + passes.backwards).tolist()
        return booked

    assert cost(1.0, 40) == cost(1.0, 8)
    assert all(more > less for more, less in zip(cost(-1.0, 8), cost(1.0, 8), strict=True))


def test_finished_images_leave_the_batch(watched: WithDetector) -> None:
    """Each pays for its own passes, and as many as if it were alone."""
    x = photos(8, seed=9)
    y = classes_of(watched, x)

    def cost(some: Tensor) -> list[float]:
        with count_passes(watched, len(some), x.device) as passes:
            evade(watched, x[some], y[some], seeds=SEEDS[some], eps=EPS, warmup=10, steps=20)
        booked: list[float] = passes.backwards.tolist()
        return booked

    together = cost(torch.arange(8))

    assert together[:4] == [cost(torch.tensor([i]))[0] for i in range(4)]
    assert len(set(together)) > 1


def test_the_class_to_reach_is_chosen_like_that_of_dual_attacks(watched: WithDetector) -> None:
    x = photos(4, seed=9)
    y = classes_of(watched, x)
    given: dict[str, Any] = {"eps": EPS, "steps": 5, "warmup": 5}

    free = evade(watched, x, y, **given)

    assert torch.equal(free, evade(watched, x, runner_up(watched, x), targeted=True, **given))
    other = evade(watched, x, y, target="least_likely", stop="never", **given)
    assert not torch.equal(free, other)


def test_images_that_never_reach_the_class_are_the_last_ones(watched: WithDetector) -> None:
    x = photos(4, seed=9)
    y = classes_of(watched, x)

    given: dict[str, Any] = {"eps": 1e-3, "warmup": 3, "steps": 3}
    x_adv, last = evade(watched, x, y, **given), evade(watched, x, y, stop="never", **given)

    assert torch.equal(classes_of(watched, last), y)
    assert torch.equal(x_adv, last)
    assert not torch.equal(x_adv, x)


def test_a_mask_is_followed_along_and_left_with_finished_images(bands: Classifier) -> None:
    """Its map is made of states that travel with their images: no batch changes a bit."""
    watcher = Watcher(interpreters=("mask", "gradcam"))
    quick = Interpreter.build_differentiable("mask", {"iterations": 3})
    watcher.explainers = (quick, watcher.explainers[1])
    x = photos(4, seed=9)
    y = classes_of(bands, x)
    watcher.threshold = scores(WithDetector(bands, watcher), plain(bands, x)).median().item()
    model = WithDetector(bands, watcher)

    def found(some: Tensor) -> Tensor:
        given: dict[str, Any] = {"eps": EPS, "warmup": 8, "steps": 4, "every": 2, "restarts": 2}
        return evade(model, x[some], y[some], seeds=SEEDS[some], **given)

    together = found(torch.arange(4))

    assert torch.equal(torch.cat([found(torch.tensor([i])) for i in range(4)]), together)
    assert classes_of(model, together).ne(y).any()


def run_on_nothing(model: nn.Module, **settings: Any) -> Tensor:
    x, y = torch.empty(0, 3, 12, 12), torch.empty(0, dtype=torch.int64)
    return evade(model, x, y, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"along": "logits"}, "along must be one of maps, features, both"),
        ({"choice": "best"}, "choice must be one of distance, score"),
        ({"target": "any"}, "target must be one of runner_up, random, least_likely"),
        ({"stop": "now"}, "stop must be one of 8bit, float, never"),
        ({"eps": -1.0}, "eps must be from 0 to 1"),
        ({"step": 0.0}, "step must be positive"),
        ({"steps": 0}, "steps, restarts and every must be at least 1"),
        ({"restarts": 0}, "steps, restarts and every must be at least 1"),
        ({"every": 0}, "steps, restarts and every must be at least 1"),
        ({"warmup": -1}, "warmup at least 0"),
        ({"weight": -1.0}, "weight must be at least 0"),
    ],
)
def test_odd_settings_are_refused_on_an_empty_batch(
    bands: Classifier, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        run_on_nothing(attackable("evade", bands), **settings)
    assert "\n" not in str(raised.value)


def test_a_model_without_a_detector_is_refused(bands: Classifier) -> None:
    with pytest.raises(ValueError, match="evade attacks a model behind a detector: give it one"):
        run_on_nothing(bands)


def test_a_detector_without_a_derivative_is_refused(bands: Classifier) -> None:
    watcher = Watcher()
    kept = Interpreter.build_differentiable("grad", {})
    watcher.explainers = (kept, replace(kept, spec=Spec("guided_backprop", {})))

    with pytest.raises(ValueError, match="looks at maps of guided_backprop, which have no deriv"):
        run_on_nothing(WithDetector(bands, watcher))


def test_a_target_outside_the_classes_is_refused(watched: WithDetector) -> None:
    x = photos(2, seed=9)

    with pytest.raises(ValueError, match="targets must be classes from 0 to 2"):
        evade(watched, x, torch.tensor([0, 3]), targeted=True)


def test_what_is_done_to_images_before_the_detector_is_refused(watched: WithDetector) -> None:
    """It would look at other images than those that are judged."""
    x = photos(2, seed=9)

    class Dark(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = watched

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.inner(x / 2)
            return logits

    with pytest.raises(ValueError, match="done to images before"):
        evade(Dark(), x, torch.tensor([0, 1]))
    module = import_module("robusteval.attacks.evade")
    assert module.Evade.perturb is module.evade


@pytest.mark.parametrize(
    ("along", "stand_in"), [("score", "smooth_odds"), ("imitation", "imitate_odds")]
)
def test_the_score_itself_is_lowered_where_a_detector_has_a_stand_in(
    watched: WithDetector, monkeypatch: pytest.MonkeyPatch, along: Any, stand_in: str
) -> None:
    """The linear score of the watcher is its own; a detector without one is refused."""
    x = photos(8, seed=9)
    y = classes_of(watched, x)
    given: dict[str, Any] = {"eps": EPS, "steps": 30, "warmup": 10, "choice": "distance"}
    with pytest.raises(ValueError, match=f"has no stand-in of its score for {along}"):
        evade(watched, x, y, seeds=SEEDS[:8], along=along, **given)

    detector = watched.detector
    assert isinstance(detector, Watcher)
    slope = detector.slope
    monkeypatch.setattr(Watcher, stand_in, lambda self, f: f @ slope, raising=False)
    found = evade(watched, x, y, seeds=SEEDS[:8], along=along, **given)

    plain_scores = scores(watched, plain(watched, x))
    assert bool((classes_of(watched, found) != y).all())
    assert float(scores(watched, found).mean()) < float(plain_scores.mean())
