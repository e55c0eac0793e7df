"""Where searches begin and what they head for, on linear models where both are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from toys import Affine, draw_uniform

from robusteval.models.classifier import Classifier
from robusteval.models.seeds import per_image
from robusteval.models.steps import count_passes
from robusteval.search.balls import Ball, Norm, measure_distances
from robusteval.search.hyperplane import measure_to_hyperplane
from robusteval.search.starts import diversify_start, order_targets

SEEDS = torch.arange(4) * 1000


def linear_model(classes: int, seed: int = 0) -> Affine:
    weight = torch.randn(classes, 1, 6, 5, generator=torch.Generator().manual_seed(seed))
    return Affine(weight).requires_grad_(False).eval()


def at_the_edges(n: int) -> Tensor:
    """Images with two thirds of the values at 0 or 1."""
    x = draw_uniform(n, 1, 6, 5, seed=1)
    return torch.where(draw_uniform(n, 1, 6, 5, seed=2) < 2 / 3, x.round(), x)


def test_a_diverse_start_is_the_corner_that_its_weights_point_to() -> None:
    """Of a linear model the gradient is known: the weights times the rows."""
    network, x = linear_model(5), draw_uniform(4, 1, 6, 5, seed=1)
    ball = Ball.around(x, "linf", 0.1)
    weights = 2 * per_image(SEEDS, torch.Size((5,))) - 1
    expected = x + 0.1 * torch.einsum("nk,kchw->nchw", weights, network.weight).sign()

    start = diversify_start(network, ball, SEEDS)

    torch.testing.assert_close(start, expected.clamp(0, 1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_diverse_start_lies_in_its_ball_and_depends_on_its_seed(norm: Norm) -> None:
    """Images of one seed and in any company are the same, of two seeds are not."""
    network, x = linear_model(5), draw_uniform(1, 1, 6, 5, seed=1).expand(4, -1, -1, -1)
    ball = Ball.around(x, norm, 0.1)

    start = diversify_start(network, ball, SEEDS)

    assert bool((measure_distances(start, x)[norm] <= 0.1).all())
    assert len({tuple(row.flatten().tolist()) for row in start}) == 4
    alone = diversify_start(network, ball.pick(torch.tensor([2])), SEEDS[2:3])
    assert torch.equal(alone, start[2:3])


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_targets_come_in_the_order_of_their_exact_distance(norm: Norm) -> None:
    """Of a linear model nothing is nearer than what the order says, the box included."""
    network, x = linear_model(10), at_the_edges(6)
    logits = network(x)
    y = logits.argmax(1)
    expected = []
    for i in range(6):
        distance = {
            k: float(
                measure_to_hyperplane(
                    x[i : i + 1],
                    (network.weight[k] - network.weight[y[i]])[None],
                    logits[i, y[i]][None] - logits[i, k][None],
                    norm,
                )
            )
            for k in range(10)
            if k != y[i]
        }
        likely = sorted(distance, key=lambda k: -float(logits[i, k]))
        expected.append(sorted(likely, key=distance.__getitem__))

    order = order_targets(network, Ball.around(x, norm, 0.1), y, count=9)

    assert order.tolist() == expected


# class 1 is near by the first and the third value, class 2 by the second one
PULLS = torch.tensor([[0.0, 1.0, 0.0], [-1.0, 1.01, -1.0], [0.0, 0.6, 0.1]]).view(3, 1, 1, 3)


@pytest.mark.parametrize(
    ("values", "mask", "expected"),
    [
        ([0.2, 0.5, 0.2], None, [1, 2]),  # 0.197 and 0.36 away
        ([0.0, 0.5, 0.45], None, [2, 1]),  # 0.31 and, as the first value cannot fall, 0.44 not 0.22
        ([0.2, 0.5, 0.2], [0.0, 1.0, 0.0], [2, 1]),  # 0.45 and out of reach
    ],
)
def test_box_and_mask_change_the_order(
    values: list[float], mask: list[float] | None, expected: list[int]
) -> None:
    """What may not move, or not that way, brings no class nearer."""
    x = torch.tensor(values).view(1, 1, 1, 3)
    network = Affine(PULLS.clone()).requires_grad_(False)
    y = torch.zeros(1, dtype=torch.int64)
    ball = Ball.around(x, "linf", 0.1, None if mask is None else torch.tensor(mask))

    assert order_targets(network, ball, y, count=2).tolist() == [expected]


def test_candidates_are_those_of_the_largest_logits() -> None:
    """By distance no more than the candidates are measured; by logits none is."""
    network = Classifier(linear_model(10), num_classes=10).eval()
    x = draw_uniform(3, 1, 6, 5, seed=1)
    logits = network(x)
    y = logits.argmax(1)
    ball = Ball.around(x, "linf", 0.1)

    by_logits = order_targets(network, ball, y, count=4, by="logits")
    with count_passes(network, 3, x.device) as passes:
        some = order_targets(network, ball, y, count=4, candidates=3)

    assert by_logits.tolist() == logits.argsort(1, descending=True)[:, 1:5].tolist()
    assert passes.backwards.tolist() == [3, 3, 3]
    assert passes.forwards.tolist() == [1, 1, 1]
    assert [set(row) for row in some.tolist()] == [set(row) for row in by_logits[:, :3].tolist()]


def test_an_unknown_order_is_refused() -> None:
    """With the known ones."""
    with pytest.raises(ValueError, match="distance or logits"):
        order_targets(
            linear_model(3),
            Ball.around(draw_uniform(1, 1, 6, 5), "linf", 0.1),
            torch.zeros(1, dtype=torch.int64),
            count=1,
            by="size",  # type: ignore[arg-type]
        )
