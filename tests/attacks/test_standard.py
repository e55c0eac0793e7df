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
    """Three dear stages, and short ones: who is given to them does not depend on their length."""
    from robusteval.attacks import standard as module

    near: dict[str, Work] = {
        "restarts": lambda stage: stage.descend("margin", 3, 3, odi=True),
        "square": lambda stage: stage.query(9),
    }
    late: dict[str, Work] = {"onward": lambda stage: stage.descend("ce", 3, onward=0.5)}
    for name, stages in (("NEAR", near), ("WHOLE", near), ("OPEN", late)):
        monkeypatch.setattr(module, name, stages)
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
    assert "drawn square" in spared
    assert "drawn square" not in everything


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


def test_images_are_left_alone_whose_restarts_end_alike(bands: Classifier) -> None:
    """What they are short of success, in units of the spread of the ends: 2, 4, and none at all."""
    x = images(4)[torch.zeros(4, dtype=torch.int64)]
    y = labels_of(bands, x)
    ensemble = Ensemble(bands, Ball.around(x, "linf", 0.01), y, torch.arange(4), targeted=False)
    ensemble.best = ensemble.best._replace(loss=torch.tensor([1.0, 1.0, 1.0, 0.5]))
    # medians of 1.5, 1.25 and 1, and the best margin may be of another stage
    ends = [[1.0, 1.5, 1.5], [1.0, 1.25, 9.0], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    ensemble.ends["restarts"] = torch.tensor(ends)
    rows, drawn = torch.arange(4), torch.tensor([False, False, False, True])

    chosen, were = ensemble.choose_open(rows, drawn, "restarts", 3)

    assert chosen.tolist() == [0, 3]
    assert were.tolist() == [False, True]


def test_a_share_of_the_images_that_end_alike_goes_on(bands: Classifier) -> None:
    """One in twenty, by their seeds, and told apart from the others as drawn."""
    n, seeds = 4000, torch.arange(4000) * 1_000_003
    x = images(1)[torch.zeros(n, dtype=torch.int64)]
    ensemble = Ensemble(
        bands,
        Ball.around(x, "linf", 0.01),
        labels_of(bands, x[:1]).expand(n),
        seeds,
        targeted=False,
    )
    ensemble.best = ensemble.best._replace(loss=torch.ones(n))
    ensemble.ends["restarts"] = torch.ones(n, 2)

    chosen, drawn = ensemble.choose_open(
        torch.arange(n), torch.zeros(n, dtype=torch.bool), "restarts", 3
    )

    assert 150 <= len(chosen) <= 250
    assert drawn.all()


def test_a_stage_tells_where_its_runs_ended(bands: Classifier) -> None:
    """As margins; not a number where an image was finished before, and none of them is lower."""
    x = images(8)
    y = labels_of(bands, x)
    ensemble = Ensemble(bands, Ball.around(x, "linf", 0.012), y, torch.arange(8), targeted=False)
    ensemble.run("runs", lambda stage: stage.descend("margin", 4, 3, odi=True))
    ends, held = ensemble.ends["runs"], ~ensemble.best.is_adv

    assert held.any()
    assert not held.all()
    assert ends.shape == (8, 3)
    torch.testing.assert_close(ends[held].min(1).values, ensemble.best.loss[held])
    assert ends[ensemble.best.finished].isnan().any()


@pytest.mark.usefixtures("few_steps")
def test_what_is_spared_does_not_depend_on_the_company(
    bands: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each image alone costs the same passes, stage by stage, and ends as the same image."""
    from robusteval.attacks import standard as module

    for name, value in (("CUT", 1.0), ("ALIKE", 2000)):
        monkeypatch.setattr(module, name, value)
    x = images(8)
    y, seeds = labels_of(bands, x), torch.arange(8) * 7
    together, costs, _ = watch(standard, bands, x, eps=0.006)
    given = torch.stack(list(costs.values())) > 0
    assert 0 < int(given[-2:].any(0).sum()) < int(given[2:4].any(0).sum()) < 8

    for i in range(8):
        with count_passes(bands, 1, x.device) as passes:
            alone = standard(bands, x[i : i + 1], y[i : i + 1], eps=0.006, seeds=seeds[i : i + 1])
        assert torch.equal(alone[0], together[i])
        for name, stage in passes.stages.items():
            assert float(stage.forwards + stage.backwards) == float(costs[name][i])


def test_what_a_stage_was_for_drawn_images_is_told_apart(bands: Classifier) -> None:
    """Images, passes and successes, with each image in one of the two."""
    x = images(6)
    y = labels_of(bands, x)
    ensemble = Ensemble(bands, Ball.around(x, "linf", 0.1), y, None, targeted=False)
    drawn = torch.tensor([True, False, False, True])
    with count_passes(bands, 6, x.device) as passes:
        ensemble.run("one", lambda stage: stage.query(3), torch.tensor([0, 2, 3, 5]), drawn)

    one, far = passes.stages["one"], passes.stages["drawn one"]
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


def test_a_search_goes_on_from_the_best_image_in_short_steps() -> None:
    """Of one that has come as near as the ball lets it, most of the first step would be wrong."""
    weight = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(0)).sign()
    model = Weighed(weight, bias=float(weight.sum()) * 0.5 - 7.0)
    x, y = torch.full((1, 1, 8, 8), 0.5), torch.ones(1, dtype=torch.int64)
    ball, seen = Ball.around(x, "linf", 0.1), []
    start = ball.project(x - 0.09 * weight)
    model.register_forward_hook(lambda _model, given, _logits: seen.append(given[0].detach()))
    stage = Stage(model, ball, y, torch.zeros(1), start, torch.ones(1), targeted=False)

    found = stage.descend("margin", 2, onward=1 / 32)

    torch.testing.assert_close(seen[0], start)
    torch.testing.assert_close(seen[1], start - 0.1 / 32 * weight)
    assert float(found.loss) < float(model(start)[0, 1] - model(start)[0, 0])


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
        *(
            f"{drawn}{name}"
            for drawn in ("", "drawn ")
            for name in ("restarts", "square", "onward")
        ),
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
