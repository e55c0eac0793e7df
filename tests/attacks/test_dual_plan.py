"""Settings of dual attacks: what the published code does, point by point, and C&W as it is."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from toys import Linear, late

from robusteval.attacks.dual_objective import DualObjective
from robusteval.attacks.dual_plan import DualPlan, choose_recipe
from robusteval.models.classifier import Classifier, predict_classes
from robusteval.search.balls import quantise
from robusteval.search.edges import sobel

if TYPE_CHECKING:
    from robusteval.attacks.advedge import advedge
else:
    advedge = late("robusteval.attacks.advedge", "advedge")

VARIANTS = ("adv2", "advedge", "advedge_plus")
SEEDS = torch.arange(8)


def images(n: int = 6) -> Tensor:
    return quantise(torch.rand(n, 3, 12, 12, generator=torch.Generator().manual_seed(0)))


def build(name: str, search: str, variant: str = "advedge", side: int = 224) -> DualPlan:
    return DualPlan.from_preset([name], "released", search, variant, "preset", side)


# what section 5 of the comparison of the notebooks says: the warm-up's loss, which image is
# kept, how often one is looked at, and with which probability
POINTS: dict[tuple[str, str], tuple[str, str, int, float]] = {
    ("pgd", "grad"): ("ce", "nearest", 10, 0.8),
    ("pgd", "cam"): ("logit", "last", 10, 0),
    ("pgd", "mask"): ("margin", "nearest", 50, 0),
    ("pgd", "rts"): ("logit", "last", 10, 0),
    ("cw", "grad"): ("faint", "nearest", 10, 0.75),
    ("cw", "cam"): ("faint", "missed", 10, 0),
    ("cw", "mask"): ("faint", "nearest", 50, 0),
    ("cw", "rts"): ("faint", "last", 10, 0),
    ("stadv", "grad"): ("ce", "nearest", 10, 0.75),
    ("stadv", "cam"): ("ce", "last", 10, 0),
    ("stadv", "mask"): ("ce", "nearest", 50, 0),
    ("stadv", "rts"): ("ce", "last", 10, 0),
}


@pytest.mark.parametrize("pair", POINTS, ids="-".join)
def test_released_pairs_differ_as_published(pair: tuple[str, str]) -> None:
    search, name = pair
    recipe = choose_recipe(name, "released", search, "advedge")

    assert (recipe.lead, recipe.keep, recipe.every, recipe.confidence) == POINTS[pair]
    for settings in ("fast", "paper"):  # and no other settings do
        plain = choose_recipe(name, settings, search, "advedge")
        assert (plain.lead, plain.keep, plain.push[1]) == ("ce", "nearest", 0)
        assert (plain.pace, plain.alpha) == (1, 0.1)


def test_adv2_by_pgd_is_that_of_its_own_authors() -> None:
    """Cross-entropy in both stages, the encoder's too, and a choice among every fiftieth image."""
    rts = choose_recipe("rts", "released", "pgd", "adv2")
    assert (rts.lead, rts.keep, rts.push, rts.every) == ("ce", "nearest", ("ce", 0.1), 50)
    assert (rts.smoothed, rts.warmup, rts.steps) == (False, 300, 1000)
    mask = build("mask", "pgd", "adv2")
    assert mask.explainers[0].spec.parameters["flavour"] == "v2"
    assert mask.mask_rate == 0.1
    assert build("mask", "pgd").explainers[0].spec.parameters["flavour"] == "v1"
    assert build("mask", "pgd").mask_rate == 0.001
    smoothing = [build("grad", "pgd", variant).smoothing for variant in VARIANTS]
    assert smoothing == ["fixed", "published", "published"]


def test_masks_are_made_in_as_many_iterations_as_are_asked_for() -> None:
    """Nothing else about them changes; without a mask the parameter would do nothing."""

    def make(names: list[str], iterations: int | None) -> DualPlan:
        return DualPlan.from_preset(names, "paper", "pgd", "adv2", "none", 32, iterations)

    plan, usual = (make(["grad", "mask"], iterations) for iterations in (7, None))

    own = plan.explainers[1].spec.parameters
    assert own == {**usual.explainers[1].spec.parameters, "iterations": 7}
    assert plan.explainers[0].spec == usual.explainers[0].spec
    with pytest.raises(ValueError, match="no interpreter is mask"):
        make(["grad"], 7)


def test_large_maps_of_grad_are_pooled_in_every_setting() -> None:
    """By four, as published; `fast` leaves small ones as they are."""
    for settings, small in (("fast", None), ("paper", 2), ("released", 2)):
        pools = []
        for side in (224, 32):
            plan = DualPlan.from_preset(["grad"], settings, "pgd", "adv2", "preset", side)  # type: ignore[arg-type]
            pools.append(plan.explainers[0].spec.parameters.get("pool"))
        assert pools == [4, small]


def test_pgd_on_rts_halves_a_step_and_has_more_edges() -> None:
    recipes = [choose_recipe("rts", "released", "pgd", variant) for variant in VARIANTS]
    assert [recipe.pace for recipe in recipes] == [1, 0.5, 1]
    assert [recipe.alpha for recipe in recipes] == [0.1, 0.1, 0.05]


@pytest.fixture
def dual(bands: Classifier) -> DualObjective:
    x = images(2)
    plan = DualPlan.from_preset(["grad"], "fast", "pgd", "adv2", "preset", 12)
    goal = torch.tensor([1, 2])
    return DualObjective(bands, x, goal, goal, plan, None)


LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.0, 1.0, 3.0]])  # classes 1 and 2 are the goals


@pytest.mark.parametrize(
    ("plan", "step", "expected"),
    [
        ({"lead": "logit"}, -1, [1.0, -3.0]),
        ({"lead": "margin"}, -1, [3.0, -2.0]),
        ({"lead": "faint"}, -1, [3e-4, 0.0]),
        ({"lead": "faint", "floor": -1.0}, 0, [3.0, -1.0]),
        ({"floor": -1.0, "push": ("logit", 0.2)}, 0, [3.2, -1.6]),
        ({"floor": -1.0, "push": ("logit", 0.2)}, -1, [3.0, -1.0]),
    ],
)
def test_losses_of_the_published_code(
    dual: DualObjective, plan: dict[str, Any], step: int, expected: list[float]
) -> None:
    dual.plan = dual.plan._replace(**plan)
    torch.testing.assert_close(dual.compute_class_term(LOGITS, step), torch.tensor(expected))


def test_fixed_smoothing_and_the_push_of_cross_entropy(dual: DualObjective) -> None:
    dual.plan = dual.plan._replace(smoothing="fixed", push=("ce", 0.1))
    target = torch.full((2, 3), 0.025).scatter(1, dual.goal.unsqueeze(1), 0.95)
    expected = nn.functional.cross_entropy(LOGITS, target, reduction="none")
    expected += 0.1 * nn.functional.cross_entropy(LOGITS, dual.goal, reduction="none")

    torch.testing.assert_close(dual.compute_class_term(LOGITS, 3), expected)


class Pooled(nn.Module):
    """The network with a name that CAM knows: a convolution, its mean, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).relu().mean((2, 3)))  # type: ignore[no-any-return]


def test_the_result_is_the_last_image_or_one_that_misses() -> None:
    """Of C&W on CAM none can be a success, by construction; of PGD the last is kept."""
    model = Classifier(Pooled(), num_classes=3).eval()
    x = images()
    given: dict[str, Any] = {"interpreter": "cam", "settings": "released", "seeds": SEEDS[:6]}
    with torch.no_grad():
        goal = (predict_classes(model(x)) + 1) % 3
    given |= {"targeted": True, "warmup": 4, "steps": 6}

    missed = advedge(model, x, goal, search="cw", **given)
    last, stopped = (
        advedge(model, x, goal, search="pgd", stop=stop, **given) for stop in ("8bit", "never")
    )

    with torch.no_grad():
        assert (predict_classes(model(missed)) != goal).all()
    assert not torch.equal(missed, x)
    assert torch.equal(last, stopped)
    with pytest.raises(ValueError, match="every and confidence do nothing"):
        advedge(model, x, goal, search="pgd", every=3, **given)


def test_the_least_strength_of_an_edge_can_be_given(bands: Classifier) -> None:
    """None is 0.1; a value goes before that of the settings."""
    x = images()
    given: dict[str, Any] = {"variant": "advedge_plus", "edge_stage": "all", "steps": 4}
    y = torch.zeros(6, dtype=torch.int64)
    usual, wide = (advedge(bands, x, y, alpha=a, **given) for a in (None, 0.02))
    for x_adv, alpha in ((usual, 0.1), (wide, 0.02)):
        off = (sobel(x) <= alpha).expand_as(x)
        assert torch.equal(x_adv[off], x[off])
    assert not torch.equal(usual, wide)


class Brightness(nn.Module):
    """Two classes by the mean of all pixels, whose slope is faint."""

    def forward(self, x: Tensor) -> Tensor:
        side = x.flatten(1).mean(1) - 0.5
        return torch.stack([-side, side], 1)


@pytest.mark.parametrize("seed", [0, 1])
def test_cw_finds_the_nearest_image_of_a_linear_network(seed: int) -> None:
    """Within 2 % of the optimum, each of ten images."""
    network = Linear((3, 5, 4), seed=seed).requires_grad_(False)
    model = Classifier(network, num_classes=2).eval()
    x = 0.3 + 0.4 * torch.rand(10, 3, 5, 4, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        y = predict_classes(model(x))

    x_adv = advedge(model, x, y, search="cw", variant="adv2", weight=0.0, every=1, steps=100,
                    rounds=5, stop="float")  # fmt: skip

    with torch.no_grad():
        assert (predict_classes(model(x_adv)) != y).all()
    far = (x_adv - x).flatten(1).norm(dim=1) / network.distance(x, "l2")
    assert far.max() < 1.02
    assert far.median() < 1.005


@pytest.mark.parametrize(("stop", "further"), [("float", 0.001), ("8bit", 0.04)])
def test_cw_fools_a_network_of_faint_slopes(stop: Any, further: float) -> None:
    """A fixed weight of the class fools one of eight images here."""
    model = Classifier(Brightness(), num_classes=2).eval()
    x = quantise(torch.rand(8, 3, 12, 12, generator=torch.Generator().manual_seed(3)) * 0.8 + 0.1)
    with torch.no_grad():
        side = x.flatten(1).mean(1) - 0.5
        y = predict_classes(model(x))

    x_adv = advedge(model, x, y, search="cw", variant="adv2", weight=0.0, every=1, stop=stop)

    with torch.no_grad():
        assert (predict_classes(model(x_adv)) != y).all()
    optimum = side.abs() * x[0].numel() ** 0.5
    assert ((x_adv - x).flatten(1).norm(dim=1) <= 1.01 * optimum + further).all()


def test_cw_weighs_distance_and_map_by_what_it_lowers(bands: Classifier) -> None:
    """A larger weight of the map buys a nearer map with a larger distance."""
    x = images()
    with torch.no_grad():
        y = predict_classes(bands(x))
    given: dict[str, Any] = {
        "search": "cw",
        "interpreter": "gradcam",
        "variant": "adv2",
        "stop": "float",
        "steps": 20,
    }
    near, far = (advedge(bands, x, y, seeds=SEEDS[:6], weight=w, **given) for w in (0.0, 1.0))

    with torch.no_grad():
        for x_adv in (near, far):
            assert (predict_classes(bands(x_adv)) != y).all()
    sizes = [(x_adv - x).flatten(1).norm(dim=1) for x_adv in (near, far)]
    assert sizes[0].mean() < sizes[1].mean()


def test_every_pair_has_a_plan() -> None:
    for search, name, variant, settings in product(
        ("pgd", "cw", "stadv"),
        ("grad", "cam", "mask", "rts"),
        VARIANTS,
        ("fast", "released", "paper"),
    ):
        plan = DualPlan.from_preset([name], settings, search, variant, "preset", 32)  # type: ignore[arg-type]
        assert plan.bisects == (search == "cw" and settings != "released")
        assert plan.rounds == (1 if not plan.bisects else 3 if settings == "fast" else 9)
