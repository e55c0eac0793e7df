"""Eq. 8 of PGAP: the mean may move within S1, the rest within S2, all of it in the pixel box."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from robusteval.search.mean_interval import MeanInterval, move_mean
from robusteval.search.ssim_ball import C1, StructureBall, mean_distance, structure_distance


def draw(n: int = 8, size: int = 40, *, spread: float = 0.4) -> tuple[Tensor, Tensor]:
    """Rows in [0, 1], of a wide spread many of them black or white, and gradients with a mean."""
    generator = torch.Generator().manual_seed(1)
    x = 0.5 + spread * (torch.rand(n, size, generator=generator) - 0.5)
    grad = torch.randn(n, size, generator=generator) + torch.randn(n, 1, generator=generator)
    return x.clamp(0, 1).double(), grad.double()


@pytest.mark.parametrize("eps1", [0.005, 0.05, 0.3])
def test_the_ends_of_the_interval_are_as_far_as_s1_lets_them(eps1: float) -> None:
    x, _ = draw()
    ball = StructureBall.around(x, 0.1)
    means = MeanInterval.around(ball, eps1)

    for end in (means.low, means.high):
        at_end = torch.full_like(x, 1.0) * end
        torch.testing.assert_close(mean_distance(x, at_end), torch.full((8,), eps1).double())


def test_far_from_the_box_mean_and_rest_are_moved_each_for_itself() -> None:
    """``eta1 * mean + sign * radius`` and Eq. 9 around it: both constraints to their ends."""
    x, grad = draw()
    eps1, eps2 = 0.02, 0.05
    ball = StructureBall.around(x, eps2)

    y = MeanInterval.around(ball, eps1).maximise(ball, grad, eps2)

    mean, eta = x.mean(1), 1 / (1 - eps1**2)
    radius = ((eta**2 - 1) * mean.square() + C1 * eta * eps1**2).sqrt()
    torch.testing.assert_close(y.mean(1), eta * mean + grad.sum(1).sign() * radius)
    rest = ball.maximise(grad) - mean.unsqueeze(1)
    torch.testing.assert_close(y - y.mean(1, keepdim=True), rest)
    torch.testing.assert_close(structure_distance(x, y), torch.full((8,), eps2).double())


@pytest.mark.parametrize("spread", [0.4, 1.5])
def test_the_optimum_is_that_of_a_solver(spread: float) -> None:
    """cvxpy, within the box; it is never worse than at a mean that stays."""
    cvxpy = pytest.importorskip("cvxpy", reason="the second opinion is cvxpy's")
    x, grad = draw(4, spread=spread)
    for eps1, eps2 in ((0.05, 0.11), (0.2, 0.05)):
        ball = StructureBall.around(x, eps2)
        means = MeanInterval.around(ball, eps1)

        y = means.maximise(ball, grad, eps2)

        assert (y >= 0).all()
        assert (y <= 1).all()
        gain = (grad * (y - x)).sum(1)
        assert (gain >= (grad * (ball.maximise(grad) - x)).sum(1)).all()
        for i in range(len(x)):
            z = cvxpy.Variable(40)
            rest = z - cvxpy.sum(z) / 40 - (ball.centre[i] - x[i].mean()).numpy()
            problem = cvxpy.Problem(
                cvxpy.Maximize(grad[i].numpy() @ (z - x[i].numpy())),
                [
                    z >= 0,
                    z <= 1,
                    cvxpy.norm(rest) <= float(ball.radius[i]),
                    cvxpy.sum(z) / 40 >= float(means.low[i]),
                    cvxpy.sum(z) / 40 <= float(means.high[i]),
                ],
            )
            problem.solve(solver="CLARABEL")
            assert float(gain[i]) == pytest.approx(problem.value, rel=1e-6)


def test_as_the_interval_shrinks_the_mean_stays() -> None:
    x, grad = draw(spread=1.5)
    ball = StructureBall.around(x, 0.05)

    y = MeanInterval.around(ball, 1e-9).maximise(ball, grad, 0.05)

    torch.testing.assert_close(y, ball.maximise(grad), atol=1e-6, rtol=0)


def test_a_constant_gradient_moves_the_mean_alone_and_none_nothing() -> None:
    x, _ = draw()
    ball = StructureBall.around(x, 0.05)
    means = MeanInterval.around(ball, 0.05)

    torch.testing.assert_close(means.maximise(ball, torch.zeros_like(x), 0.05), x)
    y = means.maximise(ball, torch.ones_like(x), 0.05)

    torch.testing.assert_close(y - x, (means.high - means.mean).expand_as(x))


@pytest.mark.parametrize("spread", [0.4, 1.5])
def test_what_may_not_change_stays_and_both_constraints_hold(spread: float) -> None:
    x, grad = draw(spread=spread)
    free = torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) > 0.4
    ball = StructureBall.around(x, 0.1, free)
    means = MeanInterval.around(ball, 0.05)

    for y in (means.maximise(ball, grad, 0.1), means.project(ball, x + grad, 0.1)):
        assert torch.equal(y[~free], x[~free])
        assert (mean_distance(x, y) <= 0.05 + 1e-6).all()
        assert (structure_distance(x, y) <= 0.1 + 1e-6).all()


def test_a_row_does_not_depend_on_its_company() -> None:
    x, grad = draw(spread=1.5)

    def solve(some: list[int]) -> Tensor:
        ball = StructureBall.around(x[some], 0.05)
        return MeanInterval.around(ball, 0.1).maximise(ball, grad[some], 0.05)

    assert torch.equal(torch.cat([solve([0]), solve([1])]), solve([0, 1]))


def test_the_ball_around_another_mean_is_the_same_ball() -> None:
    x, grad = draw()
    ball = StructureBall.around(x, 0.05)
    moved = move_mean(ball, torch.full((8, 1), 0.01).double())
    torch.testing.assert_close(moved.maximise(grad), ball.maximise(grad) + 0.01)
