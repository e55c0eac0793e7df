"""Dual attacks: what they equal in the limits, what they keep, and that maps stay near."""

from __future__ import annotations

import math
from itertools import product
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, autograd, nn
from torch.nn import functional as F
from toys import late

import robusteval.attacks.advedge as attack_module
from robusteval.attacks.dual_objective import choose_classes, smoothed_cross_entropy
from robusteval.attacks.dual_plan import RELEASED, choose_recipe
from robusteval.attacks.tracked_mask import TrackedMask
from robusteval.datasets.sources import open_data
from robusteval.interpreters.explainer import (
    Interpreter,
    measure_mean_distance,
    measure_squared_distance,
    record_logits,
    scale_maps,
)
from robusteval.interpreters.meaningful_perturbation import build_deletion
from robusteval.interpreters.rts_training import prepare_rts
from robusteval.models.checkpoint import load
from robusteval.models.classifier import Classifier, frozen, predict_classes
from robusteval.models.demo import demo
from robusteval.models.steps import count_passes
from robusteval.search.balls import Ball, quantise
from robusteval.search.edges import sobel, weigh_edges

if TYPE_CHECKING:
    from robusteval.attacks.advedge import advedge
    from robusteval.attacks.pgd import pgd
else:
    advedge = late("robusteval.attacks.advedge", "advedge")
    pgd = late("robusteval.attacks.pgd", "pgd")

SEARCHES = ("pgd", "cw", "stadv")
VARIANTS = ("adv2", "advedge", "advedge_plus")
INTERPRETERS = ("grad", "cam", "mask", "rts")
SEEDS = torch.arange(8) * 1000


def images(n: int = 8) -> Tensor:
    return quantise(torch.rand(n, 3, 12, 12, generator=torch.Generator().manual_seed(0)))


def goals(model: Classifier, x: Tensor) -> Tensor:
    return (classes_of(model, x) + 1) % 3


def classes_of(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return predict_classes(model(x))


def attack(model: nn.Module, x: Tensor, y: Tensor, **settings: Any) -> Tensor:
    return advedge(model, x, y, targeted=True, seeds=SEEDS[: len(x)], **settings)


def far(
    model: nn.Module, x: Tensor, x_adv: Tensor, goal: Tensor, name: str, seeds: Tensor | None = None
) -> Tensor:
    """Mean distance ``(n,)`` of the map for the class reached from that of the original."""
    explainer = Interpreter.build_differentiable(name, {})
    with torch.no_grad():
        benign = explainer.trace_maps(model, x, classes_of(model, x), seeds)[0]
        return measure_mean_distance(explainer.trace_maps(model, x_adv, goal, seeds)[0], benign)


def test_without_the_map_it_is_plain_targeted_pgd(bands: Classifier) -> None:
    """The same steps, to the bit: the last of them, and those of `pgd` where the last is best."""
    x = images()
    goal = goals(bands, x)
    given = {"variant": "adv2", "weight": 0.0, "eps": 0.1, "step": 0.005, "stop": "never"}

    expected, ball = x, Ball.around(x, "linf", 0.1)
    for _ in range(8):
        z = expected.clone().requires_grad_()
        loss = F.cross_entropy(bands(z).double(), goal, reduction="sum")
        grad = autograd.grad(loss, z)[0]
        expected = ball.project(expected - 0.005 * grad.sign())

    for warmup in (0, 3):
        assert torch.equal(
            expected, attack(bands, x, goal, warmup=warmup, steps=8 - warmup, **given)
        )
    plain = pgd(
        bands,
        x,
        goal,
        targeted=True,
        eps=0.1,
        step=0.005,
        steps=8,
        random_start=False,
        stop="never",
    )
    assert torch.equal(expected, plain)


@pytest.mark.parametrize("search", SEARCHES)
def test_edges_of_strength_one_everywhere_are_adv2(
    bands: Classifier, monkeypatch: pytest.MonkeyPatch, search: str
) -> None:
    """To the bit; so is a threshold that every pixel exceeds."""
    x = images()
    goal, given = goals(bands, x), {"search": search, "steps": 9}
    plain = attack(bands, x, goal, variant="adv2", **given)
    given["edge_stage"] = "all"

    assert torch.equal(plain, attack(bands, x, goal, variant="advedge_plus", alpha=0.0, **given))
    assert not torch.equal(plain, attack(bands, x, goal, variant="advedge", **given))
    monkeypatch.setattr(attack_module, "weigh_edges", lambda x, *_, **__: torch.ones_like(x[:, :1]))
    assert torch.equal(plain, attack(bands, x, goal, variant="advedge", **given))


@pytest.mark.parametrize("search", SEARCHES)
def test_nothing_changes_off_the_edges_with_edges_in_every_step(
    bands: Classifier, search: str
) -> None:
    """Exactly zero where the strength is at most alpha, rounded to 8 bits or not."""
    x = images()
    off = (sobel(x) <= 0.1).expand_as(x)
    goal, given = goals(bands, x), {"variant": "advedge_plus", "search": search, "steps": 12}

    for stop in ("8bit", "never"):
        x_adv = attack(bands, x, goal, edge_stage="all", stop=stop, **given)
        assert torch.equal(x_adv[off], x[off])
        assert not torch.equal(x_adv[~off], x[~off])
    assert torch.equal(x, attack(bands, x, goal, edge_stage="all", alpha=1.0, **given))


def test_edges_in_the_warmup_alone_do_not_restrict_the_result(bands: Classifier) -> None:
    """As in the published code, whose results are then not where its formulas put them."""
    x = images()
    off = (sobel(x) <= 0.1).expand_as(x)
    goal = goals(bands, x)

    for settings in ("fast", "released"):
        x_adv = attack(bands, x, goal, variant="advedge_plus", settings=settings, warmup=4, steps=4)
        assert (x_adv[off] != x[off]).float().mean() > 0.5


@pytest.mark.parametrize("edges", ["sobel", "random", "inverse"])
def test_no_pixel_goes_further_than_its_weight_lets_it(bands: Classifier, edges: Any) -> None:
    """Ten steps of the weight times their length; the controls run through the same code."""
    x = images()
    weight = weigh_edges(x, "advedge", edges=edges, seeds=SEEDS)

    x_adv = attack(
        bands,
        x,
        goals(bands, x),
        variant="advedge",
        edges=edges,
        edge_stage="all",
        warmup=4,
        steps=6,
        step=0.004,
        stop="never",
    )

    assert bool(((x_adv - x).abs() <= 10 * 0.004 * weight + 1e-6).all())
    assert (x_adv - x).abs().max() > 0.004 * weight.min()


@pytest.mark.parametrize("interpreter", ["grad", "gradcam"])
@pytest.mark.parametrize("search", SEARCHES)
def test_the_map_term_brings_maps_nearer(bands: Classifier, search: str, interpreter: str) -> None:
    """Than the same search without it, which chooses by the map as well; the class is reached."""
    x = images()
    y = classes_of(bands, x)
    given = {"search": search, "interpreter": interpreter, "steps": 40}
    given |= {"eps": 0.06} if search == "pgd" else {}

    found = [advedge(bands, x, y, seeds=SEEDS, weight=w, **given) for w in (0.0, 1.0)]  # type: ignore[arg-type]

    with torch.no_grad():
        goal = bands(x).scatter(1, y.unsqueeze(1), -torch.inf).argmax(1)
    assert all(torch.equal(classes_of(bands, x_adv), goal) for x_adv in found)
    before, after = (far(bands, x, x_adv, goal, interpreter).mean() for x_adv in found)
    assert after < 0.95 * before


def test_several_interpreters_are_fooled_at_once(bands: Classifier) -> None:
    """Each of them is further from its benign map where only the other was minded."""
    x = images()
    goal = goals(bands, x)
    given = {"steps": 60, "eps": 0.1}

    both, *single = (
        attack(bands, x, goal, interpreter=text, **given)
        for text in ("grad+gradcam", "grad", "gradcam")
    )

    for name, other in zip(("gradcam", "grad"), single, strict=True):
        assert far(bands, x, both, goal, name).mean() < far(bands, x, other, goal, name).mean()


@pytest.mark.parametrize("interpreter", ["grad", "gradcam", "gradcam+grad"])
@pytest.mark.parametrize("search", SEARCHES)
def test_a_result_does_not_depend_on_the_batch(
    bands: Classifier, search: str, interpreter: str
) -> None:
    """Together, in parts, or in another order: the same bits."""
    x = images(5)
    y, order = classes_of(bands, x), torch.tensor([4, 0, 2, 1, 3])

    def found(some: Tensor) -> Tensor:
        return advedge(
            bands,
            x[some],
            y[some],
            seeds=SEEDS[some],
            search=search,  # type: ignore[arg-type]
            interpreter=interpreter,
            settings="released",
            variant="advedge",
            warmup=3,
            steps=8,
        )

    together = found(torch.arange(5))

    assert torch.equal(found(order), together[order])
    parts = (torch.tensor([0]), torch.arange(1, 5))
    assert torch.equal(torch.cat([found(part) for part in parts]), together)


@pytest.mark.parametrize("search", SEARCHES)
def test_masked_pixels_are_not_touched(bands: Classifier, search: str) -> None:
    x, mask = images(4), torch.ones(12, 12)
    mask[:, :6] = 0

    x_adv = attack(bands, x, goals(bands, x), search=search, mask=mask, steps=8)

    assert torch.equal(x_adv[..., :6], x[..., :6])
    assert not torch.equal(x_adv[..., 6:], x[..., 6:])


def test_the_class_to_reach_is_chosen_for_each_image(bands: Classifier) -> None:
    """From the logits: the best besides the label, or the worst; or drawn."""
    logits = torch.tensor([[3.0, 2, 1, 0], [0, 1, 2, 3], [5, 5, 0, 9]])
    y = torch.tensor([0, 3, 0])

    def classes(target: Any) -> list[int]:
        found: list[int] = choose_classes(logits, y, target, SEEDS[:3] + 1).tolist()
        return found

    assert classes("runner_up") == [1, 2, 3]
    assert classes("least_likely") == [3, 0, 2]
    assert all(c != label for c, label in zip(classes("random"), y.tolist(), strict=True))
    x = images()
    y = classes_of(bands, x)
    with torch.no_grad():
        runner_up = bands(x).scatter(1, y.unsqueeze(1), -torch.inf).argmax(1)
    one = advedge(bands, x, y, seeds=SEEDS, steps=8)
    assert torch.equal(one, attack(bands, x, runner_up, steps=8))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"settings": "released", "interpreter": "rts"}, "target"),
        ({"settings": "released", "interpreter": "rts", "variant": "adv2"}, "target"),
        ({"settings": "released", "interpreter": "rts", "search": "cw"}, "target"),
        ({"settings": "released", "interpreter": "rts", "search": "stadv"}, "target"),
        ({"settings": "released", "interpreter": "rts", "map_class": "predicted"}, "predicted"),
        ({"settings": "released", "interpreter": "rts+grad"}, "predicted"),
        ({"settings": "released", "interpreter": "gradcam"}, "predicted"),
        ({"settings": "released", "interpreter": "grad", "map_class": "target"}, "target"),
        ({"settings": "paper", "interpreter": "rts"}, "predicted"),
        ({"settings": "fast", "interpreter": "rts"}, "predicted"),
    ],
)
def test_the_benign_map_is_of_the_class_of_the_settings(
    bands: Classifier, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], expected: str
) -> None:
    """In the published code the benign map of RTS, and no other, is that of the class to reach."""
    x, shown = images(), []

    def note(*given: Any) -> None:
        shown.append(given[3])
        raise InterruptedError

    monkeypatch.setattr(attack_module, "DualObjective", note)
    with pytest.raises(InterruptedError):
        attack(bands, x, goals(bands, x), **settings)

    classes = {"predicted": classes_of(bands, x), "target": goals(bands, x)}
    assert torch.equal(shown[0], classes[expected])


@pytest.mark.parametrize("search", SEARCHES)
def test_the_result_is_the_nearest_map_among_8_bit_successes(
    bands: Classifier, search: str
) -> None:
    """Never further than that of any shorter choice."""
    x = images()
    goal = goals(bands, x)
    given = {"search": search, "interpreter": "gradcam", "steps": 40}
    given |= {"eps": 0.1} if search == "pgd" else {}

    often, seldom = (attack(bands, x, goal, every=every, **given) for every in (5, 20))

    reached = classes_of(bands, seldom) == goal
    assert reached.all()
    assert torch.equal(classes_of(bands, often), goal)
    assert torch.equal(quantise(often), often)
    near = far(bands, x, often, goal, "gradcam"), far(bands, x, seldom, goal, "gradcam")
    assert bool((near[0] <= near[1] + 1e-6).all())


def test_a_choice_can_ask_for_confidence(bands: Classifier) -> None:
    x = images()
    goal = goals(bands, x)

    x_adv = attack(bands, x, goal, eps=0.2, confidence=0.9, steps=60, interpreter="gradcam")

    with torch.no_grad():
        p = bands(x_adv).softmax(1).gather(1, goal.unsqueeze(1))
    assert (p >= 0.9).all()


def test_images_that_never_reach_the_class_are_the_last_ones(bands: Classifier) -> None:
    x = images()
    goal, given = goals(bands, x), {"eps": 1e-3, "steps": 6}

    x_adv, last = (attack(bands, x, goal, stop=stop, **given) for stop in ("8bit", "never"))

    missed = classes_of(bands, last) != goal
    assert missed.any()
    assert torch.equal(x_adv[missed], last[missed])


@pytest.mark.parametrize(("interpreter", "forwards"), [("gradcam", 1), ("grad", 2)])
def test_one_pass_gives_class_and_map_unless_slopes_differ(
    bands: Classifier, interpreter: str, forwards: int
) -> None:
    """A step of a map by smooth slopes needs a pass of the true network beside it."""
    x = images(4)
    goal, count = goals(bands, x), {}
    for steps in (5, 15):
        with count_passes(bands, 4, x.device) as passes:
            given = {"interpreter": interpreter, "warmup": 0, "steps": steps}
            attack(bands, x, goal, variant="adv2", stop="never", **given)
        count[steps] = passes.forwards

    assert (count[15] - count[5]).tolist() == [10 * forwards] * 4


def test_smoothed_targets_sum_to_one_and_the_published_do_not() -> None:
    """A ninth for each of 999 other classes: the loss is least at a probability of 0.26."""
    classes, probability = 1000, torch.tensor([0.975])
    goal = torch.tensor([3])
    for shares, least in ((999, 0.975), (9, 0.975 / (0.975 + 111 * 0.025))):
        logits = torch.full((1, classes), (1 - least) / 999).log()
        logits[0, 3] = math.log(least)
        logits.requires_grad_()

        loss = smoothed_cross_entropy(logits, goal, probability, shares)

        assert autograd.grad(loss.sum(), logits)[0].abs().max() < 1e-5
    assert least == pytest.approx(0.26, abs=0.005)
    mixture = torch.full((1, classes), 0.025 / 999)
    mixture[0, 3] = 0.975
    some = torch.randn(1, classes, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        smoothed_cross_entropy(some, goal, probability, 999),
        F.cross_entropy(some, mixture, reduction="none"),
    )


def test_recipes_count_as_published() -> None:
    """Three searches by four interpreters; budgets that depend on the variant as published."""
    assert set(RELEASED) == set(product(SEARCHES, INTERPRETERS))
    budgets = {v: choose_recipe("grad", "released", "pgd", v) for v in VARIANTS}
    counts = {variant: (recipe.warmup, recipe.steps) for variant, recipe in budgets.items()}
    assert counts == {"adv2": (300, 704), "advedge": (300, 754), "advedge_plus": (200, 805)}
    assert len({choose_recipe("cam", "paper", "pgd", variant) for variant in VARIANTS}) == 1
    rising = choose_recipe("cam", "released", "cw", "advedge")
    assert [rising.weight(p)[0] for p in (0, 0.5, 1)] == [5, 7.5, 10]
    phases = choose_recipe("grad", "released", "cw", "advedge")
    assert [phases.weight(p) for p in (0, 0.5, 0.99)] == [(0.003, 0), (0.01, 1), (0.2, 3)]
    assert choose_recipe("smoothgrad", "fast", "pgd", "adv2") == choose_recipe(
        "cam", "fast", "pgd", "adv2"
    )


def test_distances_are_summed_or_averaged_as_published() -> None:
    one, other = torch.zeros(2, 1, 3, 5), torch.full((2, 1, 3, 5), 0.5)

    assert measure_squared_distance("grad", one, other).tolist() == [15 / 4] * 2
    assert measure_squared_distance("mask", one, other).tolist() == [15 / 4] * 2
    assert measure_squared_distance("cam", one, other).tolist() == [1 / 4] * 2
    assert measure_squared_distance("rts", one, other).tolist() == [1 / 4] * 2
    assert measure_mean_distance(one, other).tolist() == [0.5] * 2
    other[0, 0, 0, 0] = 3
    assert torch.equal(scale_maps("mask", other), other)
    assert scale_maps("cam", other)[0].sum() == 1


def test_an_interpreter_that_breaks_leaves_no_hook(bands: Classifier) -> None:
    with pytest.raises(ZeroDivisionError), record_logits(bands, images()):
        raise ZeroDivisionError
    assert not bands._forward_hooks


def test_a_mask_is_followed_along(bands: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    """The distance has a derivative, the state carries none, and is made anew now and then."""
    monkeypatch.setattr(TrackedMask, "REFRESH", 3)
    x = images(2).requires_grad_()
    deletion = build_deletion(x)
    tracked = TrackedMask(deletion, x.detach(), SEEDS[:2], 4, 0.1)
    goal = goals(bands, x.detach())
    benign = torch.zeros(2, 1, deletion.grid, deletion.grid)

    distance = tracked.measure_distance(bands, x, goal, benign)
    (grad,) = autograd.grad(distance.sum(), x)

    assert grad.abs().sum() > 0
    assert not tracked.state.mask.requires_grad
    steps = [tracked.state.step]
    for _ in range(3):
        tracked.measure_distance(bands, x, goal, benign)
        steps.append(tracked.state.step)
    assert steps == [108, 116, 124, 108]


def run_on_nothing(model: nn.Module, **settings: Any) -> Tensor:
    x, y = torch.empty(0, 3, 12, 12), torch.empty(0, dtype=torch.int64)
    return advedge(model, x, y, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "adv3"}, "variant must be one of adv2, advedge, advedge_plus"),
        ({"search": "fab"}, "search must be one of pgd, cw, stadv"),
        ({"interpreter": "gradcan"}, "unknown interpreter 'gradcan' .did you mean 'gradcam'"),
        ({"interpreter": "guided_backprop"}, "have no derivative.* those that do are .*grad"),
        ({"interpreter": "grad+grad"}, "name each only once"),
        ({"interpreter": "cam"}, "use gradcam"),
        ({"settings": "slow"}, "settings must be one of fast, released, paper"),
        ({"edge_stage": "never"}, "edge_stage must be one of preset, warmup, all"),
        ({"variant": "advedge_plus", "alpha": 1.5}, "alpha must be from 0 to 1"),
        ({"edges": "canny"}, "edges must be one of sobel, random, inverse"),
        ({"smoothing": "some"}, "smoothing must be one of"),
        ({"target": "any"}, "target must be one of runner_up, random, least_likely"),
        ({"map_class": "label"}, "map_class must be one of preset, predicted, target"),
        ({"stop": "now"}, "stop must be one of 8bit, float, never"),
        ({"eps": -1.0}, "eps must be from 0 to 1"),
        ({"step": 0.0}, "step must be positive"),
        ({"steps": 0}, "steps and every must be at least 1"),
        ({"every": 0}, "steps and every must be at least 1"),
        ({"warmup": -1}, "warmup at least 0"),
        ({"weight": -1.0}, "weight must be at least 0"),
        ({"confidence": 1.0}, "confidence from 0 to below 1"),
        (
            {"interpreter": "mask", "smoothing": "fixed"},
            "smoothing does nothing unless interpreter is not mask",
        ),
        (
            {"interpreter": "mask", "smoothing": "none", "search": "cw", "settings": "released"},
            "smoothing does nothing unless interpreter is not mask",
        ),
        (
            {"warmup": 0},
            "variant=advedge does nothing unless edge_stage=all or settings=paper or warmup is"
            " not 0",
        ),
        (
            {"warmup": 0, "variant": "advedge_plus", "alpha": 0.2},
            "variant=advedge_plus does nothing unless",
        ),
        ({"warmup": 0, "edge_stage": "warmup"}, "settings=paper and edge_stage=preset or warmup"),
        (
            {"warmup": 0, "settings": "released", "edges": "inverse"},
            "variant=advedge does nothing unless",
        ),
        (
            {"warmup": 0, "settings": "paper", "edge_stage": "warmup"},
            "variant=advedge does nothing unless edge_stage=all or edge_stage=preset or",
        ),
        (
            {"variant": "adv2", "edge_stage": "all"},
            "edge_stage does nothing unless variant=advedge or advedge_plus",
        ),
    ],
)
def test_odd_settings_are_refused_on_an_empty_batch(
    bands: Classifier, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        run_on_nothing(bands, **settings)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"interpreter": "mask+grad", "smoothing": "fixed"},
        {"warmup": 0, "edges": "random", "edge_stage": "all"},
        {"warmup": 0, "edges": "random", "settings": "paper"},
        {"warmup": 0, "variant": "adv2"},
        {"steps": 2, "edges": "random"},
        {"warmup": 1, "edges": "random", "edge_stage": "warmup"},
    ],
)
def test_what_does_something_is_not_refused(bands: Classifier, settings: dict[str, Any]) -> None:
    assert run_on_nothing(bands, **settings).shape == (0, 3, 12, 12)


@pytest.mark.parametrize("target", [3, -1])
def test_a_target_outside_the_classes_is_refused(bands: Classifier, target: int) -> None:
    with pytest.raises(ValueError, match="targets must be classes from 0 to 2"):
        attack(bands, images(2), torch.tensor([0, target]), steps=1)


class Digits:
    """The demo network with sixteen digits that it gets right, and plain targeted PGD on them."""

    EPS = 32 / 255

    def __init__(self) -> None:
        self.model = load(str(demo()))
        data = open_data("digits", channels=1)
        batch = data.batch(range(40))
        right = classes_of(self.model, batch.x) == batch.y
        self.x, self.y = batch.x[right][:16], batch.y[right][:16]
        with torch.no_grad():
            others = self.model(self.x).scatter(1, self.y.unsqueeze(1), -torch.inf)
        self.goal = others.argmax(1)
        prepare_rts(self.model, open_data("digits", split="train", channels=1))
        self.plain = pgd(
            self.model,
            self.x,
            self.goal,
            targeted=True,
            eps=self.EPS,
            step=self.EPS / 8,
            steps=200,
            random_start=False,
            stop="never",
        )

    def far(self, x_adv: Tensor, interpreter: str) -> Tensor:
        return far(self.model, self.x, x_adv, self.goal, interpreter, torch.arange(16))


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits()


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("interpreter", INTERPRETERS)
@pytest.mark.parametrize("search", SEARCHES)
def test_every_combination_fools_both_on_digits(
    digits: Digits, search: Any, interpreter: str, variant: Any
) -> None:
    """Maps end up nearer than those of plain targeted PGD with as many steps."""
    radius: dict[str, Any] = {"eps": digits.EPS} if search == "pgd" else {}
    with frozen(digits.model):
        x_adv = advedge(
            digits.model,
            digits.x,
            digits.goal,
            targeted=True,
            seeds=torch.arange(16),
            variant=variant,
            search=search,
            interpreter=interpreter,
            steps=45 if interpreter == "mask" else None,  # each of them costs eight of the mask's
            **radius,
        )
        reached = (classes_of(digits.model, quantise(x_adv)) == digits.goal).float().mean()
        gap = digits.far(x_adv, interpreter) - digits.far(digits.plain, interpreter)

    assert reached >= (0.95 if search == "pgd" else 0.9)
    assert gap.mean() + gap.std() / 4 * 1.96 < 0  # paired, sixteen images
