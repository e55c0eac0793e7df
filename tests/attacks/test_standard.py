"""The staged attacks: who is given to which stage, each image by itself, and what is told of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn
from toys import Weighed, late

from robusteval.models.classifier import Classifier, predict_classes
from robusteval.models.steps import count_passes
from robusteval.search.balls import Ball, measure_distances, quantise
from robusteval.search.descent import Found
from robusteval.search.ensemble import Ensemble, Stage, Work

if TYPE_CHECKING:
    from robusteval.attacks.standard import StandardNorm, quick, standard, thorough
else:
    quick = late("robusteval.attacks.standard", "quick")
    standard = late("robusteval.attacks.standard", "standard")
    thorough = late("robusteval.attacks.standard", "thorough")


def labels_of(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return predict_classes(model(x))


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two dear stages, and short ones: who is given to them does not depend on their length."""
    from robusteval.attacks import standard as module

    dear: dict[str, Work] = {
        "restarts": lambda stage: stage.descend("margin", 3, 2, odi=True),
        "square": lambda stage: stage.query(9),
    }
    monkeypatch.setattr(module, "DEAR", dear)
    few = {"sigma_zero": {"steps": 60}, "sparse": {"steps": 9}}
    monkeypatch.setattr(module, "LONG", few)


def watch(
    attack: Callable[..., Tensor], model: nn.Module, x: Tensor, eps: float
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Results of an attack, what its stages cost each image, and all passes of each."""
    y, seeds = labels_of(model, x), torch.arange(len(x)) * 7
    with count_passes(model, len(x), x.device) as passes:
        x_adv = attack(model, x, y, eps=eps, seeds=seeds)
    costs = {name: stage.forwards + stage.backwards for name, stage in passes.stages.items()}
    return x_adv, costs, passes.forwards + passes.backwards


def images(n: int = 12) -> Tensor:
    return quantise(torch.rand(n, 3, 12, 12, generator=torch.Generator().manual_seed(0)))


@pytest.mark.usefixtures("few_steps")
def test_stages_add_up_and_stop_at_the_one_that_succeeds(bands: Classifier) -> None:
    """All passes but those that measure distances are some stage's."""
    x = images()
    x_adv, costs, passes = watch(standard, bands, x, eps=0.012)

    fallen = labels_of(bands, x_adv) != labels_of(bands, x)
    assert fallen.any()
    assert not fallen.all()
    total = torch.stack(list(costs.values())).sum(0)
    assert list(costs)[:3] == ["apgd", "diverse", "restarts"]
    assert (costs["apgd"] > 0).all()
    measured = costs["diverse"] > 0
    assert bool(((passes - total)[~measured] == 0).all())
    assert bool(((passes - total) <= 2).all())


@pytest.mark.usefixtures("few_steps")
def test_far_images_are_spared_the_dear_stages_but_not_by_thorough(bands: Classifier) -> None:
    """In a ball as small as this all are far."""
    x = images(6)
    _, spared, _ = watch(standard, bands, x, eps=0.001)
    _, everything, _ = watch(thorough, bands, x, eps=0.001)

    assert not spared["square"].any()
    assert (everything["square"] > 0).all()
    assert "far square" in spared
    assert "far square" not in everything


def test_a_share_of_the_far_images_is_drawn_by_their_seeds(bands: Classifier) -> None:
    """One in twenty, the same ones in any company."""
    x = images(4)[torch.zeros(4000, dtype=torch.int64)]
    y, seeds = labels_of(bands, x[:1]).expand(4000), torch.arange(4000) * 1_000_003
    ensemble = Ensemble(bands, Ball.around(x, "linf", 0.001), y, seeds, targeted=False)
    ensemble.measure_distances = lambda rows: torch.ones(len(rows))  # type: ignore[method-assign]

    far, drawn = ensemble.choose_near(0.5)
    some = Ensemble(bands, Ball.around(x[:9], "linf", 0.001), y[:9], seeds[far[:9]], targeted=False)
    some.measure_distances = lambda rows: torch.ones(len(rows))  # type: ignore[method-assign]

    assert drawn.all()
    assert 150 <= len(far) <= 250
    assert some.choose_near(0.5)[0].tolist() == list(range(9))


def test_what_a_stage_was_for_drawn_images_is_told_apart(bands: Classifier) -> None:
    """Images, passes and successes, with each image in one of the two."""
    x = images(6)
    y = labels_of(bands, x)
    ensemble = Ensemble(bands, Ball.around(x, "linf", 0.1), y, None, targeted=False)
    drawn = torch.tensor([True, False, False, True])
    with count_passes(bands, 6, x.device) as passes:
        ensemble.run("one", lambda stage: stage.query(3), torch.tensor([0, 2, 3, 5]), drawn)

    one, far = passes.stages["one"], passes.stages["far one"]
    assert one.seen.nonzero().flatten().tolist() == [2, 3]
    assert far.seen.nonzero().flatten().tolist() == [0, 5]
    assert torch.equal(one.forwards + far.forwards, passes.forwards)
    assert torch.equal(one.made | far.made, ensemble.best.is_adv)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_the_distance_is_exact_for_a_linear_network(norm: str) -> None:
    """Margin over the gradient's dual norm, in radii."""
    weight = torch.tensor([0.5, -1.0, 2.0, 0.25]).view(1, 2, 2)
    model = Weighed(weight, bias=0.4)
    x, y = torch.full((1, 1, 2, 2), 0.5), torch.ones(1, dtype=torch.int64)
    ensemble = Ensemble(model, Ball.around(x, norm, 0.01), y, None, targeted=False)  # type: ignore[arg-type]

    found = ensemble.measure_distances(torch.arange(1))

    dual = {"linf": weight.abs().sum(), "l2": weight.norm(), "l1": weight.abs().max()}[norm]
    side = float((x * weight).sum()) - 0.4
    assert float(found) == pytest.approx(side / float(dual) / 0.01, rel=1e-5)


def test_an_image_without_a_gradient_counts_as_near() -> None:
    """Its distance is unknown, and random search may be the only way."""
    model = Weighed(torch.ones(1, 2, 2), bias=1.0, levels=10)
    x, y = torch.full((1, 1, 2, 2), 0.5), torch.ones(1, dtype=torch.int64)
    ensemble = Ensemble(model, Ball.around(x, "linf", 0.01), y, None, targeted=False)

    assert not ensemble.choose_near(0.1)[1].any()


@pytest.mark.parametrize("attack", [quick, standard])
def test_rounding_of_the_input_does_not_help(attack: object) -> None:
    """Every gradient is zero; a search without gradients is among the stages."""
    weight = torch.randn(1, 12, 12, generator=torch.Generator().manual_seed(0)).sign()
    model = Weighed(weight, bias=float(weight.sum()) * 0.5 - 1.0, levels=20)
    x, y = quantise(torch.full((2, 1, 12, 12), 0.5)), torch.ones(2, dtype=torch.int64)

    x_adv = attack(model, x, y, eps=0.1, seeds=torch.arange(2))  # type: ignore[operator]

    assert labels_of(model, x_adv).ne(y).all()


def test_quick_keeps_to_its_passes(bands: Classifier) -> None:
    """180 at most, of an image that holds."""
    x = images(4)
    with count_passes(bands, 4, x.device) as passes:
        quick(bands, x, labels_of(bands, x), eps=0.001, seeds=torch.arange(4))

    assert 160 < float((passes.forwards + passes.backwards).max()) <= 180


def test_a_stage_sees_the_best_image_so_far(bands: Classifier) -> None:
    """And what it finds counts by its margin, whatever it lowered."""
    x = images(3)
    y = labels_of(bands, x)
    ensemble = Ensemble(bands, Ball.around(x, "linf", 0.01), y, None, targeted=False)
    seen: list[Tensor] = []

    def look(stage: Stage) -> Found:
        seen.append(stage.start)
        return Found.nothing(stage.ball.x)._replace(loss=torch.full((len(stage.y),), -1e9))

    ensemble.run("first", lambda stage: stage.descend("ce", 5))
    before = ensemble.best.loss.clone()
    ensemble.run("look", look)

    left = ensemble.list_survivors()
    assert torch.equal(seen[0], ensemble.best.x_adv[left]) or len(left) < 3
    assert torch.equal(ensemble.best.loss, before)


def test_fab_counts_where_its_nearest_success_lies_in_the_ball(bands: Classifier) -> None:
    """In the ball of twice the distance, not in that of half of it."""
    x = images(4)
    y = labels_of(bands, x)
    from robusteval.registry import ATTACKS

    nearest = ATTACKS.load("fab")(bands, x, y, norm="linf")
    size = float((nearest - x).abs().amax((1, 2, 3)).max())

    def approach(eps: float) -> Ensemble:
        ensemble = Ensemble(bands, Ball.around(x, "linf", eps), y, None, targeted=False)
        ensemble.run("fab", lambda stage: stage.approach("fab", "linf", eps))
        return ensemble

    wide, narrow = approach(2 * size), approach(size / 2)
    assert wide.best.finished.all()
    assert labels_of(bands, wide.best.x_adv).ne(y).all()
    assert wide.ball.holds(wide.best.x_adv).all()
    assert narrow.ball.holds(narrow.best.x_adv).all()
    assert not narrow.best.is_adv.all()


NORMS = ["linf", "l2", "l1", "l0", "l0_pixels"]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("attack", [standard, quick])
def test_without_images_or_radius_nothing_is_asked_of_the_network(
    bands: Classifier, attack: Callable[..., Tensor], norm: str
) -> None:
    """No pass: an empty batch and a radius of zero come back as they are."""
    x = images(2)
    y = labels_of(bands, x)
    with count_passes(bands, 2, x.device) as passes:
        still = attack(bands, x, y, norm=norm, eps=0)
        empty = attack(bands, x[:0], y[:0], norm=norm, eps=3 if "l0" in norm else 0.1)

    assert torch.equal(still, x)
    assert empty.shape == (0, 3, 12, 12)
    assert not passes.forwards.any()


@pytest.mark.usefixtures("few_steps")
def test_all_stages_but_the_first_may_be_left_without_images(bands: Classifier) -> None:
    """Where everything falls at once they are told all the same, so that parts fit together."""
    _, costs, _ = watch(standard, bands, images(3), eps=0.9)

    assert set(costs) == {
        *("apgd", "diverse"),
        *(f"{far}{name}" for far in ("", "far ") for name in ("restarts", "square")),
    }
    assert (costs["apgd"] > 0).all()
    assert not torch.stack(list(costs.values())[1:]).any()


@pytest.mark.parametrize("attack", [standard, quick])
def test_a_network_of_one_class_is_one_sentence(attack: Callable[..., Tensor]) -> None:
    """Nothing can be fooled where there is no other answer."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 1))
    x, y = torch.full((1, 1, 3, 3), 0.5), torch.zeros(1, dtype=torch.int64)

    with pytest.raises(ValueError, match="there is no other class: the model has only one"):
        attack(model, x, y, eps=0.1)


@pytest.mark.parametrize(("norm", "word"), [("l0", "values"), ("l0_pixels", "pixels")])
@pytest.mark.parametrize("eps", [0.5, -1.0, 8 / 255])
def test_changes_are_counted_in_whole_numbers(
    bands: Classifier, norm: StandardNorm, word: str, eps: float
) -> None:
    """A radius of grey levels is a mistake there."""
    x = images(1)

    with pytest.raises(ValueError, match=f"a whole number of changed {word} for {norm}, not"):
        standard(bands, x[:0], labels_of(bands, x)[:0], norm=norm, eps=eps)


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize("norm", ["l0", "l0_pixels"])
def test_a_success_of_few_changes_counts_only_within_the_radius(
    bands: Classifier, norm: StandardNorm
) -> None:
    """With one change less than the most that was needed, only images of so many may hold."""
    x = images(6)
    y = labels_of(bands, x)
    wide = standard(bands, x, y, norm=norm, eps=400)
    counts = measure_distances(wide, x)[norm]
    most = float(counts.max())
    narrow = standard(bands, x, y, norm=norm, eps=most - 1)

    assert labels_of(bands, wide).ne(y).all()
    held = labels_of(bands, narrow).eq(y)
    assert bool((measure_distances(narrow, x)[norm] < most).all())
    assert not bool((held & (counts < most)).any())
    assert torch.equal(narrow[held], x[held])
