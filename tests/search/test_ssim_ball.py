"""The distances of SSIM's parts, and the ball of the second: definitions, optima, errata."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from robusteval.search.ssim_ball import C1, C2, StructureBall, mean_distance, structure_distance

EPS2 = 0.05


def rows(n: int = 6, size: int = 60, *, saturated: bool = False, seed: int = 0) -> Tensor:
    """Random windows ``(n, size)``; `saturated`: two thirds of the values are 0 or 1."""
    x = torch.rand(n, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (3 * x - 1).clamp(0, 1) if saturated else 0.3 + 0.4 * x


def gradients(x: Tensor, seed: int = 1) -> Tensor:
    """Random gradients with a mean of their own."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(x.shape, generator=generator, dtype=x.dtype) + 0.7


def mean_drift(x: Tensor, y: Tensor) -> float:
    return float((y.double().mean(1) - x.double().mean(1)).abs().max())


def gain(grad: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return ((y - x) * grad).sum(1)


def test_distances_are_those_of_the_covariance_formula() -> None:
    """S1 and S2 as Wang et al. write them, with covariances of all N values."""
    x, y = rows(seed=0).numpy(), rows(seed=3).numpy()
    s1, s2 = [], []
    for a, b in zip(x, y, strict=True):
        covariance = np.cov(a, b, bias=True)
        s1.append((2 * a.mean() * b.mean() + C1) / (a.mean() ** 2 + b.mean() ** 2 + C1))
        s2.append((2 * covariance[0, 1] + C2) / (covariance.trace() + C2))

    d1, d2 = (
        f(torch.from_numpy(x), torch.from_numpy(y)) for f in (mean_distance, structure_distance)
    )

    np.testing.assert_allclose(1 - d1.square(), s1, atol=1e-12)
    np.testing.assert_allclose(1 - d2.square(), s2, atol=1e-12)


def test_distances_obey_the_triangle_inequality() -> None:
    """They are metrics."""
    x, y, z = (rows(2000, 8, seed=seed) for seed in range(3))
    for distance in (mean_distance, structure_distance):
        assert bool((distance(x, z) <= distance(x, y) + distance(y, z) + 1e-12).all())


@pytest.mark.parametrize("eps2", [0.002, 0.05, 0.3])
def test_the_top_lies_on_the_rim_at_the_same_mean(eps2: float) -> None:
    """In closed form: equality in both constraints."""
    x = rows()

    y = StructureBall.around(x, eps2, exact=False).maximise(1e-3 * gradients(x))

    torch.testing.assert_close(structure_distance(x, y), torch.full((6,), eps2).double())
    assert mean_drift(x, y) < 1e-12


@pytest.mark.parametrize("exact", [False, True])
def test_no_feasible_point_lies_above_the_top(exact: bool) -> None:
    """Against a thousand random points of the same mean on the rim, within [0, 1]."""
    x = rows(1)
    grad = gradients(x)
    ball = StructureBall.around(x, EPS2, exact=exact)
    best = gain(grad, x, ball.maximise(grad))
    z = torch.randn(1000, 60, generator=torch.Generator().manual_seed(2)).double()
    z = z - z.mean(1, keepdim=True)
    points = ball.centre + ball.radius * z / z.norm(dim=1, keepdim=True)

    points = points[((points >= 0) & (points <= 1)).all(1)]

    assert len(points) > 900
    assert bool((structure_distance(x.expand_as(points), points) <= EPS2 + 1e-9).all())
    assert bool((gain(grad, x, points) <= best).all())


@pytest.mark.parametrize("eps2", [0.01, 0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("size", [20, 300])
def test_within_the_box_mean_ball_and_box_are_kept(eps2: float, size: int) -> None:
    """Also for radii that hold most of the box, and many values at its faces."""
    x = rows(20, size, saturated=True)
    grad = gradients(x)

    y = StructureBall.around(x, eps2).maximise(grad)

    assert bool(((y >= 0) & (y <= 1)).all())
    assert mean_drift(x, y) < 1e-9
    assert bool((structure_distance(x, y) <= eps2 + 1e-9).all())
    assert bool((gain(grad, x, y) > 0).all())


def test_within_the_box_the_optimum_is_that_of_nested_bisection() -> None:
    """The same two unknowns, found the slow way."""
    x = rows(20, 50, saturated=True)
    grad = gradients(x)
    ball = StructureBall.around(x, 0.1)

    y = ball.maximise(grad)

    torch.testing.assert_close(y, bisected(ball, grad), atol=1e-7, rtol=0)


def bisected(ball: StructureBall, grad: Tensor) -> Tensor:
    total = ball.x.sum(1, keepdim=True)

    def point(t: Tensor) -> Tensor:
        low, high = (torch.full_like(t, sign * 1e6) for sign in (-1, 1))
        for _ in range(100):
            s = (low + high) / 2
            much = (ball.centre + t * grad - s).clamp(0, 1).sum(1, keepdim=True) > total
            low, high = torch.where(much, s, low), torch.where(much, high, s)
        return (ball.centre + t * grad - low).clamp(0, 1)

    low, high = torch.zeros_like(total), torch.full_like(total, 1e3)
    for _ in range(100):
        t = (low + high) / 2
        far = (point(t) - ball.centre).norm(dim=1, keepdim=True) > ball.radius
        low, high = torch.where(far, low, t), torch.where(far, t, high)
    return point(low)


@pytest.mark.parametrize("saturated", [False, True])
def test_the_optimum_is_that_of_a_solver_of_convex_programmes(saturated: bool) -> None:
    """cvxpy, as in the paper."""
    cvxpy = pytest.importorskip("cvxpy", reason="the second opinion is cvxpy's")
    x = rows(5, 40, saturated=saturated)
    grad = gradients(x)
    ball = StructureBall.around(x, 0.1, exact=saturated)
    expected = []
    for i in range(5):
        y = cvxpy.Variable(40)
        constraints = [
            cvxpy.sum(y) == float(x[i].sum()),
            cvxpy.norm(y - ball.centre[i].numpy()) <= float(ball.radius[i]),
        ]
        constraints += [y >= 0, y <= 1] if saturated else []
        cvxpy.Problem(cvxpy.Maximize(grad[i].numpy() @ y), constraints).solve(solver="CLARABEL")
        expected.append(torch.from_numpy(y.value))

    found = ball.maximise(grad)

    torch.testing.assert_close(found, torch.stack(expected), atol=1e-4, rtol=0)
    torch.testing.assert_close(
        gain(grad, x, found), gain(grad, x, torch.stack(expected)), atol=1e-6, rtol=1e-6
    )


def test_away_from_the_box_both_solutions_are_the_same() -> None:
    """No value is clipped."""
    x = rows()
    grad = gradients(x)

    inside, closed = (StructureBall.around(x, 0.01, exact=e).maximise(grad) for e in (True, False))

    torch.testing.assert_close(inside, closed, atol=1e-12, rtol=0)


def test_clipping_the_closed_form_moves_the_mean_and_leaves_the_ball() -> None:
    """Why the box has to be in the problem. Here the attacker lowers the contrast."""
    x = rows(40, saturated=True)
    grad = (gradients(x) - 0.7 - 2 * (x - x.mean(1, keepdim=True))) * ((x > 0) & (x < 1))

    clipped, solved = (StructureBall.around(x, 0.3, exact=e).maximise(grad) for e in (False, True))

    assert mean_drift(x, clipped) > 0.01
    assert float(structure_distance(x, clipped).square().max()) > 0.3**2 + 1e-3
    assert mean_drift(x, solved) < 1e-9
    assert float(structure_distance(x, solved).square().max()) < 0.3**2 + 1e-9


def test_the_radius_as_printed_leaves_the_ball() -> None:
    """Erratum: k21 in the paper lacks a term, and is not nought for eps2 of nought."""
    x = rows()
    ball = StructureBall.around(x, 0.01, exact=False, printed=True)

    s2 = 1 - structure_distance(x, ball.maximise(gradients(x))).square()

    assert bool((s2 < 0.9).all())  # 0.9999 was asked for
    assert bool((ball.radius.squeeze(1) > (x - x.mean(1, keepdim=True)).norm(dim=1)).all())


def test_the_plain_gradient_moves_the_mean_and_not_s2() -> None:
    """Erratum: what the fast form gives up is the mean, by what Eq. 10 says."""
    x = rows()
    grad = gradients(x)
    ball = StructureBall.around(x, EPS2, keep_mean=False)

    y = ball.maximise(grad)

    expected = ball.radius.squeeze(1) * grad.sum(1) / (60 * grad.norm(dim=1))
    torch.testing.assert_close(y.mean(1) - x.mean(1), expected)
    assert mean_drift(x, y) > 0.005
    assert bool((structure_distance(x, y) < EPS2).all())


def test_a_gradient_without_a_mean_makes_both_forms_equal() -> None:
    """There is nothing to remove."""
    x = rows()
    grad = gradients(x)
    grad = grad - grad.mean(1, keepdim=True)

    exact, fast = (
        StructureBall.around(x, EPS2, keep_mean=keep, exact=False).maximise(grad)
        for keep in (True, False)
    )

    torch.testing.assert_close(exact, fast, atol=1e-12, rtol=0)


@pytest.mark.parametrize("exact", [False, True])
def test_a_constant_gradient_changes_nothing(exact: bool) -> None:
    """Every feasible point is as good as `x`."""
    x = rows()
    ball = StructureBall.around(x, EPS2, exact=exact)
    for value in (0.0, 0.3):
        assert torch.equal(ball.maximise(torch.full_like(x, value)), x)


@pytest.mark.parametrize("exact", [False, True])
def test_a_small_radius_changes_little(exact: bool) -> None:
    """To first order sqrt(2) eps2 times the length of what is not mean, and stabiliser."""
    x = rows()
    y = StructureBall.around(x, 1e-6, exact=exact).maximise(gradients(x))
    length = ((x - x.mean(1, keepdim=True)).square().sum(1) + 60 * C2 / 2).sqrt()

    torch.testing.assert_close((y - x).norm(dim=1), math.sqrt(2) * 1e-6 * length, rtol=1e-4, atol=0)


@pytest.mark.parametrize("exact", [False, True])
def test_flat_rows_move_by_the_stabiliser_alone(exact: bool) -> None:
    """eps2 sqrt(N C2 eta); black rows cannot move at a constant mean."""
    x = torch.full((2, 50), 0.5, dtype=torch.float64)
    x[1] = 0
    expected = math.sqrt(50 * C2 * EPS2**2 / (1 - EPS2**2))

    y = StructureBall.around(x, EPS2, exact=exact).maximise(gradients(x))

    assert float((y - x)[0].norm()) == pytest.approx(expected)
    assert not exact or torch.equal(y[1], x[1])
    assert bool(y.isfinite().all())


@pytest.mark.parametrize(("keep_mean", "exact"), [(True, True), (True, False), (False, False)])
def test_what_may_not_change_stays_and_the_constraints_hold(keep_mean: bool, exact: bool) -> None:
    """Of the whole row."""
    x = rows()
    free = torch.arange(60).expand(6, -1) % 3 > 0
    ball = StructureBall.around(x, 0.1, free, keep_mean=keep_mean, exact=exact)
    grad = gradients(x)

    y = ball.maximise(grad)

    assert torch.equal(y[~free], x[~free])
    assert bool((structure_distance(x, y) <= 0.1 + 1e-9).all())
    if keep_mean:
        assert mean_drift(x, y) < 1e-9
        torch.testing.assert_close(structure_distance(x, y), torch.full((6,), 0.1).double())
    assert bool((gain(grad, x, y) > 0).all())


def test_rows_without_anything_free_stay() -> None:
    """To the bit."""
    x = rows(saturated=True)
    for exact in (True, False):
        ball = StructureBall.around(x, 0.1, torch.zeros_like(x, dtype=torch.bool), exact=exact)
        assert torch.equal(ball.maximise(gradients(x)), x)
        assert torch.equal(ball.project(gradients(x)), x)


@pytest.mark.parametrize("exact", [False, True])
def test_the_nearest_point_is_a_projection(exact: bool) -> None:
    """Inner points stay; for others the way there makes an obtuse angle with every way on."""
    x = rows(saturated=exact)
    ball = StructureBall.around(x, EPS2, exact=exact)
    other = ball.maximise(gradients(x, seed=5))
    z = (x + 0.2 * gradients(x, seed=7)).clamp(0, 1)

    near, inner = ball.project(z), ball.project((x + other) / 2)

    torch.testing.assert_close(inner, (x + other) / 2, atol=1e-9, rtol=0)
    assert bool((structure_distance(x, near) <= EPS2 + 1e-9).all())
    assert mean_drift(x, near) < 1e-9
    for y in (x, other):
        assert bool((((z - near) * (y - near)).sum(1) <= 1e-8).all())


def test_steps_are_unit_vectors_that_keep_the_mean() -> None:
    """Zero for a constant gradient."""
    x = rows()
    ball = StructureBall.around(x, EPS2)

    step = ball.find_direction(1e-30 * gradients(x))

    torch.testing.assert_close(step.norm(dim=1), torch.ones(6).double())
    assert float(step.mean(1).abs().max()) < 1e-12
    assert not bool(ball.find_direction(torch.ones_like(x)).any())


@pytest.mark.parametrize("size", [60, 50_000])
def test_a_row_does_not_depend_on_its_company(size: int) -> None:
    """To the bit, also where a sum over one row would be split among threads."""
    x = rows(3, size, saturated=True)
    grad = gradients(x)

    together = StructureBall.around(x, EPS2).maximise(grad)

    alone = [StructureBall.around(x[i : i + 1], EPS2).maximise(grad[i : i + 1]) for i in range(3)]
    assert torch.equal(torch.cat(alone), together)


def test_no_rows_are_no_problem() -> None:
    """Which is how an attack ends."""
    x = torch.empty(0, 10)
    ball = StructureBall.around(x, EPS2)

    assert ball.maximise(x).shape == ball.project(x).shape == x.shape
