"""Attacks that look for the nearest success, on linear models whose optimum is known exactly."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from toys import asked, draw_uniform

from robusteval.models.classifier import Classifier, count_passes, predict_classes
from robusteval.registry import ATTACKS, parse
from robusteval.search.balls import quantise
from robusteval.search.hyperplane import PlaneNorm, measure_to_hyperplane
from robusteval.search.nearest import (
    Distance,
    Nearest,
    Radius,
    drop_blocked,
    fall,
    measure_norm,
    scale_to_unit,
)
from robusteval.search.rounds import NearObjective, Rounds

NAMES = ("ddn", "fmn", "fab")
# how far beyond the optimum an attack may end: 1 % of those that feel their way, none of the other
CASES: list[tuple[str, PlaneNorm, float]] = [
    ("ddn", "l2", 1e-2),
    ("fmn", "linf", 1e-2),
    ("fmn", "l2", 1e-2),
    ("fmn", "l1", 1e-2),
    ("fab", "linf", 1e-5),
    ("fab", "l2", 1e-5),
    ("fab", "l1", 1e-5),
]


class Planes(torch.nn.Module):
    """Logits that are linear in the pixels, the grey image in the middle of all."""

    def __init__(self, k: int, scale: float = 1.0) -> None:
        super().__init__()
        weight = scale * torch.randn(k, 60, generator=torch.Generator().manual_seed(k))
        self.weight = torch.nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) - 0.5) @ self.weight.t()


def draw_images(*, box: bool) -> Tensor:
    """Eight images ``(8, 3, 4, 5)``: grey, or half of their values black or white."""
    x = draw_uniform(8, 3, 4, 5, seed=2)
    return (2.4 * x - 0.7).clamp(0, 1) if box else 0.3 + 0.4 * x


def list_optima(model: Planes, x: Tensor, norm: PlaneNorm) -> Tensor:
    """The least norm to each class ``(n, k)`` inside the box, infinite for the predicted one."""
    logits = model(x)
    y = logits.argmax(1)
    each = []
    for target in range(logits.shape[1]):
        normal = (model.weight[target] - model.weight[y]).view_as(x)
        gap = (logits.gather(1, y.unsqueeze(1)).squeeze(1) - logits[:, target]).clone()
        each.append(measure_to_hyperplane(x, normal, gap, norm).masked_fill(y == target, math.inf))
    return torch.stack(each, 1)


def attack(name: str, model: Any, x: Tensor, y: Tensor, **settings: Any) -> Tensor:
    """The attack with those of the settings that it has."""
    found = ATTACKS.load(name)(model, x, y, **asked(name, **settings))
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize("k", [2, 3, 10])
@pytest.mark.parametrize("box", [False, True])
@pytest.mark.parametrize(("name", "norm", "slack"), CASES)
def test_the_optimum_is_found_in_a_hundred_steps(
    name: str, norm: PlaneNorm, slack: float, box: bool, k: int
) -> None:
    """Whether or not pixels run into the ends of their range, with two, three and more classes."""
    # in float32 the optimum itself is only known to 1e-4: of logits that cancel
    kind = torch.float64 if name == "fab" else torch.float32
    model, x = Planes(k).to(kind), draw_images(box=box).to(kind)
    y = model(x).argmax(1)

    steps = 30 if name == "fab" else 100
    x_adv = attack(name, model, x, y, norm=norm, images="float", steps=steps)

    assert x_adv.dtype == kind
    assert bool(model(x_adv).argmax(1).ne(y).all())
    size, optima = measure_norm(x_adv - x, norm), list_optima(model, x, norm)
    nearest = optima.amin(1)
    assert bool((size >= nearest * (1 - 1e-5)).all())
    # what follows one gradient at a time may settle for another class than the nearest
    reached = optima.gather(1, model(x_adv).argmax(1, keepdim=True)).squeeze(1)
    assert bool((size <= reached * (1 + slack)).all()), (size / reached - 1).max()
    enough = 8 if name == "fab" or k == 2 else 6
    assert int((size <= nearest * (1 + slack)).sum()) >= enough


@pytest.mark.parametrize("box", [False, True])
@pytest.mark.parametrize(("name", "norm", "slack"), [case for case in CASES if case[0] != "fab"])
def test_many_steps_find_the_nearest_class(
    name: str, norm: PlaneNorm, slack: float, box: bool
) -> None:
    """Every second round makes for one class alone, where one gradient settles for another."""
    model, x = Planes(3), draw_images(box=box)
    y = model(x).argmax(1)

    x_adv = attack(name, model, x, y, norm=norm, images="float", steps=500)

    assert bool(model(x_adv).argmax(1).ne(y).all())
    size, nearest = measure_norm(x_adv - x, norm), list_optima(model, x, norm).amin(1)
    assert bool((size <= nearest * (1 + slack)).all()), (size / nearest - 1).max()


def test_rounds_begin_anew_at_one_class_after_the_other() -> None:
    """But the first and the last, and none where only one class is left to aim at."""
    x = draw_images(box=False)
    for k, aims in ((2, [None] * 7), (3, [None, 0, None, 1, None, 0, None])):
        model, seen = Planes(k), []
        y = model(x).argmax(1)
        objective, kept = NearObjective(model, y, targeted=False), Nearest(x, "l2", "float")
        rounds, left = Rounds(700, 0.05), torch.arange(len(x))
        radius = Radius(torch.ones(len(x)), torch.full((len(x),), 0.01), torch.zeros(len(x)).bool())
        kept.look(objective, left, x, last=True)
        kept.take(left, 1 - x, torch.ones(len(x)).bool())
        for start in range(0, 700, 100):
            if start:
                point, size = rounds.begin(start, objective, kept, left, x + 0.1, radius)
                anew = objective.rank is not None
                assert torch.equal(point, x if anew else 1 - x)
                assert torch.equal(size.size, kept.best_norm if anew else radius.size)
            seen.append(objective.rank)
        assert seen == aims


def test_few_values_are_enough_in_l0() -> None:
    """Against the count in closed form: the values that gain most, one after the other."""
    model, x = Planes(2), draw_images(box=False)
    logits = model(x)
    y = logits.argmax(1)
    normal = (model.weight[1 - y] - model.weight[y]).view_as(x)
    gain = torch.where(normal > 0, normal * (1 - x), -normal * x).flatten(1)
    gap = (logits.gather(1, y.unsqueeze(1)) - logits.gather(1, 1 - y.unsqueeze(1))).flatten()
    optimum = (gain.sort(descending=True).values.cumsum(1) <= gap.unsqueeze(1)).sum(1) + 1

    x_adv = attack("fmn", model, x, y, norm="l0", images="float")

    assert bool(model(x_adv).argmax(1).ne(y).all())
    size = measure_norm(x_adv - x, "l0")
    assert bool((size >= optimum).all())
    assert bool((size <= optimum + 1).all()), (size - optimum).max()


@pytest.mark.parametrize("scale", [20.0, 1000.0])
@pytest.mark.parametrize(("name", "norm", "slack"), CASES)
def test_the_scale_of_the_logits_does_not_matter(
    name: str, norm: PlaneNorm, slack: float, scale: float
) -> None:
    """A confident model is no more robust."""
    x = draw_images(box=True).double()
    y = Planes(3).double()(x).argmax(1)
    steps = 30 if name == "fab" else 100

    once, scaled = (
        measure_norm(attack(name, model, x, y, norm=norm, images="float", steps=steps) - x, norm)
        for model in (Planes(3).double(), Planes(3, scale).double())
    )

    torch.testing.assert_close(scaled, once, rtol=slack, atol=0)


@pytest.mark.parametrize(("name", "norm", "slack"), CASES)
def test_targets_are_reached_by_the_shortest_way(name: str, norm: PlaneNorm, slack: float) -> None:
    """With two classes the distance is that of leaving the other."""
    model, x = Planes(2).double(), draw_images(box=True).double()
    y = model(x).argmax(1)

    x_adv = attack(name, model, x, 1 - y, targeted=True, norm=norm, images="float")

    assert torch.equal(model(x_adv).argmax(1), 1 - y)
    size = measure_norm(x_adv - x, norm)
    assert bool((size <= list_optima(model, x, norm).amin(1) * (1 + slack)).all())


@pytest.mark.parametrize("name", NAMES)
def test_results_are_8_bit_images_unless_asked_otherwise(bands: Classifier, name: str) -> None:
    """Their success survives saving; among all images a nearer one is found."""
    x = quantise(draw_uniform(8, 3, 12, 12, seed=5))
    y = predict_classes(bands(x)).detach()

    saved, free = (
        attack(name, bands, x, y, norm="l2", images=i, targets=1) for i in ("8bit", "float")
    )

    for found in (saved, free):
        assert bool(predict_classes(bands(found)).ne(y).all())
    torch.testing.assert_close(quantise(saved), saved, atol=0, rtol=0)
    assert not torch.equal(quantise(free), free)
    assert float(measure_norm(free - x, "l2").mean()) < float(measure_norm(saved - x, "l2").mean())


@pytest.mark.parametrize(("name", "norm"), [*(case[:2] for case in CASES), ("fmn", "l0")])
def test_a_longer_search_is_no_worse(bands: Classifier, name: str, norm: Distance) -> None:
    """The nearest success of the whole path is kept, not the last."""
    x = quantise(draw_uniform(8, 3, 12, 12, seed=5))
    y = predict_classes(bands(x)).detach()

    means = []
    for steps in (10, 100):
        x_adv = attack(name, bands, x, y, norm=norm, steps=steps, targets=1)
        won = predict_classes(bands(x_adv)) != y
        size = measure_norm(x_adv - x, norm).where(won, 100.0)  # farther than any success
        means.append(float(size.mean()))

    assert means[1] <= means[0] < 100


@pytest.mark.parametrize("name", NAMES)
def test_what_is_wrong_already_costs_one_step(bands: Classifier, name: str) -> None:
    """And stays as it is; the others take all their steps."""
    x = quantise(draw_uniform(4, 3, 12, 12, seed=5))
    y = predict_classes(bands(x)).detach()
    wrong = torch.where(torch.arange(4) < 2, (y + 1) % 3, y)

    with count_passes(bands, 4, x.device) as passes:
        x_adv = attack(name, bands, x, wrong, norm="l2", images="float", steps=10, targets=1)

    assert torch.equal(x_adv[:2], x[:2])
    first = 1 if name == "fab" else 0  # its classes are ranked by a pass of their own
    assert passes.forwards.tolist() == [1 + first, 1 + first, 11 + first, 11 + first]
    assert passes.backwards.tolist() == [1, 1, 10, 10]


def test_fab_searches_as_many_classes_as_there_are(bands: Classifier) -> None:
    """Of three classes two, whatever was asked for."""
    x = quantise(draw_uniform(2, 3, 12, 12, seed=5))
    y = predict_classes(bands(x)).detach()

    with count_passes(bands, 2, x.device) as passes:
        attack("fab", bands, x, y, images="float", steps=4, targets=9)

    assert passes.forwards.tolist() == [1 + 2 * 5] * 2


@pytest.mark.parametrize("name", NAMES)
def test_a_constant_model_is_left_alone(name: str) -> None:
    """No gradient, no success: the image itself, without a value that is no number."""
    x = draw_uniform(2, 3, 4, 5)

    for value in (0.0, math.nan):
        x_adv = attack(
            name, lambda z, v=value: 0 * z.flatten(1)[:, :3] + v, x, torch.zeros(2).long()
        )

        assert torch.equal(x_adv, x)


def test_faint_gradients_do_not_lead_past_the_success() -> None:
    """They foretell a boundary far away; at the ends of the range the class is the first again."""

    def bump(x: Tensor) -> Tensor:
        mean = x.flatten(1).mean(1)
        other = torch.exp(-((mean - 0.6) / 0.03).square()) - 0.5
        return torch.stack([torch.zeros_like(mean), other], 1)

    x, y = torch.full((2, 3, 4, 5), 0.5), torch.zeros(2).long()

    x_adv = attack("fmn", bump, x, y, norm="linf", images="float")

    assert bool(bump(x_adv).argmax(1).eq(1).all())
    optimum = 0.1 - 0.03 * math.sqrt(math.log(2))
    assert bool((measure_norm(x_adv - x, "linf") <= 1.01 * optimum).all())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ddn:steps=0", "steps must be at least 1"),
        ("ddn:gamma=0.5", "gamma must be between 0 and 0.5"),
        ("fmn:steps=0", "steps must be at least 1"),
        ("fmn:gamma=0", "gamma must be between 0 and 0.5"),
        ("fab:steps=0", "steps and targets must be at least 1"),
        ("fab:targets=0", "steps and targets must be at least 1"),
    ],
)
def test_parameters_out_of_range_are_refused(bands: Classifier, text: str, message: str) -> None:
    """On no images, too."""
    spec = ATTACKS.check_spec(parse(text))
    x, y = torch.empty(0, 3, 12, 12), torch.empty(0, dtype=torch.int64)

    with pytest.raises(ValueError, match=message):
        ATTACKS.load(spec.name)(bands, x, y, **spec.parameters)


def test_a_radius_comes_to_rest_at_the_boundary_and_comes_back_from_far() -> None:
    """A crossing halves the pace, anything else raises it, within a fiftieth and twice `gamma`."""
    radius = Radius(torch.tensor([1.0, 8.0]), torch.full((2,), 0.05), torch.tensor([False, True]))
    boundary, crossed = 1.3, []

    for _ in range(60):
        is_adv = radius.size > boundary
        crossed.append(is_adv)
        radius = radius.follow(is_adv, 0.05)

    torch.testing.assert_close(radius.size, torch.full((2,), boundary), rtol=5e-3, atol=0)
    assert bool((radius.pace >= 0.001).all())
    assert [bool(row.any()) for row in torch.stack(crossed).T] == [True, True]


def test_many_steps_are_spent_in_rounds() -> None:
    """Of equal length, about a hundred steps each; up to 149 there is one."""
    rounds = Rounds(300, 0.05)
    shares = [rounds.share(i) for i in range(300)]

    assert [i for i, share in enumerate(shares) if share == 0] == [0, 100, 200]
    assert [i for i in range(1, 300) if rounds.enters(i, 0.8)] == [80, 180, 280]
    assert Rounds(149, 0.05).share(140) == pytest.approx(140 / 149)
    assert Rounds(10, 0.05).share(5) == 0.5


@pytest.mark.parametrize(("name", "norm"), [("ddn", "l2"), ("fmn", "linf"), ("fmn", "l1")])
def test_the_last_pass_judges_a_new_image(name: str, norm: Distance) -> None:
    """And not once more the nearest success, from which only a next round would go on."""
    model, x = Planes(3), draw_images(box=False)
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda _model, args: seen.append(args[0].detach().clone()))
    y = Planes(3)(x).argmax(1)

    attack(name, model, x, y, norm=norm, images="float", steps=12)

    *before, last = seen
    assert len(before) == 12
    assert not any(bool((last == each).flatten(1).all(1).any()) for each in before)


def test_values_at_the_end_of_their_range_take_no_part_in_a_step() -> None:
    """Down from black and up from white; the other way they may move."""
    point = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.5]).view(1, 1, 1, 5)
    grad = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0]).view(1, 1, 1, 5)

    assert drop_blocked(grad, point).flatten().tolist() == [0.0, -1.0, 1.0, 0.0, 1.0]


@pytest.mark.parametrize("targeted", [False, True])
def test_the_soft_margin_is_the_margin_at_the_boundary(targeted: bool) -> None:
    """And never above it by more than its temperature allows; its scale is that of the logits."""
    logits = torch.tensor([[3.0, 3.0 - 1e-4, 0.0], [9.0, 1.0, 2.0]])
    y = torch.tensor([1, 2]) if targeted else torch.tensor([0, 0])
    images = torch.zeros(2, 1, 1, 1)

    (loss, is_adv), (ten, _) = (
        NearObjective(lambda _, s=s: s * logits, y, targeted=targeted)(  # type: ignore[arg-type]
            images, torch.arange(2)
        )
        for s in (1.0, 10.0)
    )

    assert is_adv.tolist() == [False, False]
    exact = torch.tensor([1e-4, 7.0])
    torch.testing.assert_close(loss, exact, rtol=0.15, atol=1e-5)
    torch.testing.assert_close(ten, 10 * loss, rtol=1e-2, atol=1e-5)


def test_the_nearest_success_is_kept() -> None:
    """Successes only, nearer ones only, for the rows that are meant."""
    x = torch.zeros(3, 1, 1, 2)
    kept = Nearest(x, "l2", "float")

    kept.take(torch.tensor([2, 0]), torch.full((2, 1, 1, 2), 0.5), torch.tensor([True, False]))
    kept.take(torch.tensor([2]), torch.full((1, 1, 1, 2), 0.7), torch.tensor([True]))

    assert kept.best_adv[:, 0, 0, 0].tolist() == [0.0, 0.0, 0.5]
    assert kept.best_norm.tolist() == pytest.approx([math.inf, math.inf, 0.5 * math.sqrt(2)])
    assert kept.find_unfinished(torch.arange(3)).tolist() == [True] * 3


def test_directions_have_length_one_whatever_their_scale() -> None:
    """Squares of what float32 can hold may not fit into it."""
    delta = draw_uniform(3, 1, 2, 2) * torch.tensor([1e-30, 1.0, 1e30]).view(3, 1, 1, 1)

    sizes = measure_norm(scale_to_unit(delta), "l2")

    torch.testing.assert_close(sizes, torch.ones(3))
    assert not bool(scale_to_unit(torch.zeros(1, 1, 2, 2)).any())
    assert [round(fall(1.0, 0.0, share), 6) for share in (0, 0.5, 1)] == [1.0, 0.5, 0.0]
