"""What the passes of an attack say of it: a success that was not returned, an end too early."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from toys import Linear, draw_uniform

from robusteval.evaluation.loss_curves import (
    LATE,
    PASSED,
    check_curves,
    watch_losses,
)
from robusteval.models.classifier import Classifier, predict_classes
from robusteval.models.steps import book_rows
from robusteval.runs.types import Columns, Outcome, Threat

SHAPE = (1, 4, 4)


@pytest.fixture(scope="module")
def model() -> Classifier:
    return Classifier(Linear(SHAPE), num_classes=2).eval()


def follow(
    model: Classifier,
    points: Callable[[Tensor, Tensor], list[Tensor]],
    eps: float,
    norm: str = "linf",
) -> tuple[Columns, Tensor]:
    """What is kept of an attack that calls the network at some points, and where it is right."""
    x = draw_uniform(4, *SHAPE, seed=5)
    with torch.no_grad():
        y = predict_classes(model(x))
        network = model.network
        assert isinstance(network, Linear)
        way = network.weight.sign() * (1 - 2 * y.float()).view(-1, 1, 1, 1)
        with watch_losses(model, x, y, Threat(norm, eps, False)) as curves:
            for z in points(x, way):
                model(z)
        nothing = np.zeros(4, np.bool_)
        return curves.measure(model, nothing), y


def test_a_success_that_is_not_returned_is_noticed(model: Classifier) -> None:
    """Inside the ball, of those images alone that had one."""
    columns, _ = follow(model, lambda x, way: [x, x + 0.9 * way, x], eps=1.0)
    outside, _ = follow(model, lambda x, way: [x, x + 0.9 * way, x], eps=0.5)

    assert columns[PASSED].all()
    assert not outside[PASSED].any()


def test_several_passes_of_one_image_in_one_call_are_all_seen(model: Classifier) -> None:
    """As of answers at random: the least margin of them, wherever it stands."""
    x = draw_uniform(4, *SHAPE, seed=5)
    with torch.no_grad():
        y = predict_classes(model(x))
        with watch_losses(model, x, y, Threat("l2", None, False)) as curves:
            with book_rows(torch.tensor([2, 2, 2])):
                logits = model(torch.stack([x[2], x[1], x[0]]))
    own, other = logits.gather(1, y[2].expand(3, 1)), logits.gather(1, 1 - y[2].expand(3, 1))

    assert curves.best[2] == (own - other).min()


def test_what_is_kept_does_not_depend_on_where_calls_are_cut(model: Classifier) -> None:
    """Passes of one image in one call are seen as if each had a call of its own."""
    x = draw_uniform(4, *SHAPE, seed=5)
    points = draw_uniform(40, *SHAPE, seed=6)
    rows = torch.arange(40) % 2 + 1
    with torch.no_grad():
        y = predict_classes(model(x))
        kept = []
        for sizes in ([40], [1] * 40, [3, 30, 7]):
            with watch_losses(model, x, y, Threat("l2", None, False)) as curves:
                for index, some in zip(
                    torch.split(rows, sizes), torch.split(points, sizes), strict=True
                ):
                    with book_rows(index):
                        model(some)
            kept.append((curves.measure(model, np.zeros(4, np.bool_)), curves.successes))

    assert np.isfinite(kept[0][0][LATE][1:3]).all()
    for columns, successes in kept[1:]:
        np.testing.assert_array_equal(columns[LATE], kept[0][0][LATE])
        assert torch.equal(successes, kept[0][1])


def test_questions_about_one_image_are_not_taken_for_one_of_each(model: Classifier) -> None:
    """As a search without gradients asks them, by chance as many as there are images."""
    x = draw_uniform(4, *SHAPE, seed=5)
    with torch.no_grad():
        y = predict_classes(model(x))
        found = []
        for whole in (True, False):
            with watch_losses(model, x, y, Threat("l2", None, False), whole=whole) as curves:
                model(x[(y == y[0]).nonzero()[0]].expand_as(x))
            found.append(curves.measure(model, np.zeros(4, np.bool_))[PASSED])

    np.testing.assert_array_equal(found[0], (y != y[0]).numpy())
    assert found[0].any()
    assert not found[1].any()


@pytest.mark.parametrize(("most", "noticed"), [(15, False), (16, True)])
def test_of_few_changes_those_are_inside_that_are_few_enough(
    model: Classifier, most: int, noticed: bool
) -> None:
    """All sixteen values change."""
    columns, _ = follow(model, lambda x, way: [x, x + 0.9 * way], eps=most, norm="l0")

    assert columns[PASSED].any() == noticed


def test_the_share_of_the_way_made_at_the_end(model: Classifier) -> None:
    """Of steady steps it is theirs, of a search that stands still nothing."""
    steady, _ = follow(model, lambda x, w: [x + 1e-3 * i * w for i in range(21)], eps=1.0)
    early, _ = follow(model, lambda x, w: [x + 1e-3 * min(i, 5) * w for i in range(21)], eps=1.0)
    few, _ = follow(model, lambda x, w: [x + 1e-3 * i * w for i in range(5)], eps=1.0)

    np.testing.assert_allclose(steady[LATE], 0.1, atol=1e-3)
    np.testing.assert_array_equal(early[LATE], 0)
    assert np.isnan(few[LATE]).all()


def test_passes_count_for_the_images_that_they_are_booked_to(model: Classifier) -> None:
    """And for none where nobody knows whose they are."""
    x = draw_uniform(4, *SHAPE, seed=5)
    with torch.no_grad():
        y = predict_classes(model(x))
        with watch_losses(model, x, y, Threat("linf", 1.0, False)) as curves:
            with book_rows(torch.tensor([2])):
                model(1 - x[2:3])
            model(x[:3])

    assert curves.count.tolist() == [0, 0, 1, 0]
    assert not model._forward_hooks


def test_they_become_findings_where_they_are_many(
    make_outcome: Callable[..., Outcome],
) -> None:
    held = [False] * 8

    def look(late: float, passed: int, knowledge: str = "white-box") -> list[str]:
        columns = {LATE: np.full(8, late), PASSED: np.arange(8) < passed}
        return [f.code for f in check_curves([make_outcome(held, knowledge=knowledge, **columns)])]

    assert look(0.01, 0) == []
    assert look(0.2, 0) == ["incomplete"]
    assert look(0.2, 0, "black-box") == []
    assert look(np.nan, 1) == ["silent-success"]
