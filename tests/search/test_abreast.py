"""Searches side by side find what those one after the other find, in less sequence."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from toys import draw_uniform

from robusteval.models.classifier import Classifier, count_passes, predict_classes
from robusteval.models.steps import book_rows
from robusteval.search.abreast import search_abreast
from robusteval.search.apgd import search_apgd
from robusteval.search.balls import Ball
from robusteval.search.descent import (
    BallMoves,
    Found,
    Objective,
    Score,
    build_class_objective,
    descend,
    repeat_search,
)

EPS, STEPS, TIMES = 0.012, 5, 4


def give(x: Tensor, losses: dict[tuple[int, int], float], done: set[tuple[int, int]]) -> Found:
    """What was found, run by run of each image."""
    rows = sorted(losses)
    finished = torch.tensor([key in done for key in rows])
    made = torch.stack([x[row] + run for row, run in rows])
    return Found(made, torch.tensor([losses[key] for key in rows]), finished, finished)


def test_each_image_keeps_the_best_of_its_searches() -> None:
    """A finished one before any other, else the one of lowest loss."""
    x = torch.arange(3.0).view(3, 1, 1, 1) * 10
    losses = {(i, run): float((run - i) ** 2) for i in range(3) for run in range(4)}

    best = search_abreast(lambda rows, run, width: give(x, losses, {(2, 0), (2, 3)}), x, 4, first=4)

    assert best.x_adv.flatten().tolist() == [0, 11, 23]
    assert best.finished.tolist() == [False, False, True]


def test_what_falls_to_the_first_search_costs_no_other() -> None:
    """Only the images that are left are searched again: twice, then for the rest."""
    x = torch.zeros(3, 1, 1, 1)
    asked: list[tuple[list[int], list[int], int]] = []

    def search(rows: Tensor, run: Tensor, width: int) -> Found:
        asked.append((rows.tolist(), run.tolist(), width))
        found = Found.nothing(x[rows])
        won = (run == 0) & (rows != 1)
        return found._replace(is_adv=won, finished=won)

    search_abreast(search, x, 4)

    assert asked == [([0, 1, 2], [0, 0, 0], 1), ([1, 1], [1, 2], 2), ([1], [3], 1)]


def find_by_descent(objective: Objective, ball: Ball) -> Found:
    """Two searches of one image by steps of one length."""
    moves = BallMoves(ball, 0.01)
    return descend(objective, moves, ball.x, steps=STEPS, stop="8bit", abreast=2)


def find_by_apgd(objective: Objective, ball: Ball) -> Found:
    """Two searches of one image by Auto-PGD."""
    return search_apgd(objective, ball, ball.x, steps=STEPS, stop="8bit", abreast=2)


@pytest.mark.parametrize("find", [find_by_descent, find_by_apgd])
def test_a_search_that_finishes_an_image_ends_its_others(
    find: Callable[[Objective, Ball], Found],
) -> None:
    """The second of four rows succeeds at once: so ends the first, and not those of another."""
    asked: list[list[int]] = []

    def objective(x: Tensor, index: Tensor) -> Score:
        asked.append(index.tolist())
        return Score(x.flatten(1).mean(1), index == 1)

    found = find(objective, Ball.around(torch.full((4, 1, 2, 2), 0.5), "linf", 0.1))

    assert found.finished.tolist() == [False, True, False, False]
    assert asked[:3] == [[0, 1, 2, 3], [1], [2, 3]]  # the middle one as an 8-bit image
    assert not any(0 in index for index in asked[1:])


def search_images(model: Classifier, x: Tensor, seeds: Tensor) -> tuple[Found, Tensor]:
    """Restarts of Auto-PGD side by side, and the passes of each image."""
    ball, y = Ball.around(x, "linf", EPS), label(model, x)

    def search(rows: Tensor, run: Tensor, width: int) -> Found:
        here = ball.pick(rows)
        objective = build_class_objective(model, y[rows], targeted=False, loss="margin")
        start = here.sample(seeds[rows] + run)
        with book_rows(rows):
            return search_apgd(objective, here, start, steps=STEPS, stop="8bit", abreast=width)

    with count_passes(model, len(x), x.device) as passes:
        found = search_abreast(search, x, TIMES)
    return found, passes.forwards + passes.backwards


def label(model: Classifier, x: Tensor) -> Tensor:
    """What the network says of images."""
    with torch.no_grad():
        return predict_classes(model(x))


def test_side_by_side_as_many_fall_as_one_after_the_other(bands: Classifier) -> None:
    """And what does not fall ends at the same image: the best of the same searches."""
    x, seeds = draw_uniform(24, 3, 12, 12, seed=3), torch.arange(24) * 1000
    ball, y = Ball.around(x, "linf", EPS), label(bands, x)

    def search(left: Tensor, run: int) -> Found:
        here = ball.pick(left)
        objective = build_class_objective(bands, y[left], targeted=False, loss="margin")
        start = here.sample(seeds[left] + run)
        return search_apgd(objective, here, start, steps=STEPS, stop="8bit")

    apart, (found, _) = repeat_search(search, x, TIMES), search_images(bands, x, seeds)
    held = ~apart.is_adv

    assert 3 < held.sum() < 21
    assert torch.equal(found.finished, apart.finished)
    assert torch.equal(found.x_adv[held], apart.x_adv[held])


def test_an_image_has_the_same_searches_in_any_company(bands: Classifier) -> None:
    """The same result, for the same passes."""
    x, seeds = draw_uniform(24, 3, 12, 12, seed=3), torch.arange(24) * 1000
    together, cost = search_images(bands, x, seeds)

    for i in (0, 5, 23):
        alone, spent = search_images(bands, x[i : i + 1], seeds[i : i + 1])
        assert torch.equal(alone.x_adv[0], together.x_adv[i])
        assert spent[0] == cost[i]
