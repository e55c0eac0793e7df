"""The least change to a hyperplane: closed forms, then solvers of the same problem."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize
from torch import Tensor
from toys import draw_uniform

from robusteval.search.hyperplane import (
    PlaneNorm,
    measure_to_hyperplane,
    project_to_hyperplane,
)

ORDERS = {"linf": torch.inf, "l2": 2.0, "l1": 1.0}
DUALS = {"linf": 1.0, "l2": 2.0, "l1": torch.inf}
Values = np.ndarray[Any, Any]
NORMS: tuple[PlaneNorm, ...] = ("linf", "l2", "l1")


def draw_case(n: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images of which a third of the values are black or white, and normals."""
    x = (1.6 * draw_uniform(n, 2, 3, 2, seed=seed) - 0.3).clamp(0, 1)
    return x, 2 * draw_uniform(n, 2, 3, 2, seed=seed + 1) - 1


def measure_reach(x: Tensor, w: Tensor) -> Tensor:
    """The most that ``w · x`` can rise inside the box ``(n,)``."""
    return torch.where(w > 0, w * (1 - x), w * -x).flatten(1).sum(1)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("norm", NORMS)
def test_far_from_the_box_the_distance_is_the_gap_over_the_dual_norm(
    norm: PlaneNorm, sign: int
) -> None:
    """And the change reaches the hyperplane."""
    _, w = draw_case()
    x, gap = torch.full_like(w, 0.5), sign * torch.tensor([0.0, 0.01, 0.05, 0.1, 0.2, 0.3])

    change = project_to_hyperplane(x, w, gap, norm).flatten(1)

    expected = gap.abs() / w.flatten(1).norm(DUALS[norm], dim=1)
    torch.testing.assert_close(change.norm(ORDERS[norm], dim=1), expected)
    torch.testing.assert_close(measure_to_hyperplane(x, w, gap, norm), expected)
    torch.testing.assert_close((change * w.flatten(1)).sum(1), gap)


def test_a_value_at_its_end_leaves_the_rest_to_the_others() -> None:
    """By hand: two values of weights 3 and 4, the second 0.1 from white."""
    x, w = torch.tensor([0.0, 0.9]).view(1, 1, 1, 2), torch.tensor([3.0, 4.0]).view(1, 1, 1, 2)

    found = {n: project_to_hyperplane(x, w, torch.tensor([1.0]), n).flatten() for n in NORMS}

    # the second gives 0.4, the first has to give 0.6
    for change in found.values():
        torch.testing.assert_close(change, torch.tensor([0.2, 0.1]))
    small = {n: project_to_hyperplane(x, w, torch.tensor([0.35]), n).flatten() for n in NORMS}
    torch.testing.assert_close(small["linf"], torch.tensor([0.05, 0.05]))
    torch.testing.assert_close(small["l2"], torch.tensor([0.042, 0.056]))
    torch.testing.assert_close(small["l1"], torch.tensor([0.0, 0.0875]))


def solve_again(x: Values, w: Values, gap: float, norm: str) -> float:
    """The same least norm from SciPy's solvers."""
    d, bounds = len(x), list(zip(-x, 1 - x, strict=True))
    if norm == "l2":
        found = minimize(
            lambda z: z @ z,
            np.zeros(d),
            jac=lambda z: 2 * z,
            bounds=bounds,
            constraints={"type": "eq", "fun": lambda z: w @ z - gap, "jac": lambda _: w},
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 500},
        )
        assert found.success, found.message
        return float(np.sqrt(found.fun))
    # change and a bound of its size: one bound for all (linf) or each its own (l1)
    more = 1 if norm == "linf" else d
    size = np.ones((d, 1)) if norm == "linf" else np.eye(d)
    found = linprog(
        np.r_[np.zeros(d), np.ones(more)],
        A_ub=np.block([[np.eye(d), -size], [-np.eye(d), -size]]),
        b_ub=np.zeros(2 * d),
        A_eq=np.r_[w, np.zeros(more)][None],
        b_eq=[gap],
        bounds=bounds + [(0, None)] * more,
    )
    assert found.status == 0, found.message
    return float(found.fun)


@pytest.mark.parametrize("share", [0.05, -0.4, 0.8, -0.99])
@pytest.mark.parametrize("norm", NORMS)
def test_general_solvers_find_no_smaller_change(norm: PlaneNorm, share: float) -> None:
    """Linear programs for linf and l1, sequential quadratic programming for l2."""
    x, w = draw_case(seed=7)
    gap = abs(share) * measure_reach(x, w if share > 0 else -w) * (1 if share > 0 else -1)

    change = project_to_hyperplane(x, w, gap, norm)

    assert bool(((x + change >= -1e-7) & (x + change <= 1 + 1e-7)).all())
    torch.testing.assert_close((change * w).flatten(1).sum(1), gap, atol=1e-5, rtol=1e-5)
    sizes = measure_to_hyperplane(x, w, gap, norm)
    for image, normal, wanted, size in zip(x, w, gap, sizes, strict=True):
        again = solve_again(
            image.flatten().double().numpy(), normal.flatten().double().numpy(), float(wanted), norm
        )
        assert float(size) == pytest.approx(again, rel=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_a_hyperplane_beyond_the_box_is_infinitely_far(norm: PlaneNorm) -> None:
    """All values go to their ends; a hair less can be reached."""
    x, w = draw_case(seed=3)
    reach = measure_reach(x, w)

    beyond = project_to_hyperplane(x, w, 1.01 * reach, norm)

    torch.testing.assert_close(x + beyond, torch.where(w > 0, 1.0, 0.0))
    assert bool(measure_to_hyperplane(x, w, 1.01 * reach, norm).isinf().all())
    assert bool(measure_to_hyperplane(x, w, 0.99 * reach, norm).isfinite().all())


@pytest.mark.parametrize("norm", NORMS)
def test_values_without_a_weight_stay(norm: PlaneNorm) -> None:
    """As with a mask, at the ends of the range, and where a gradient is no number."""
    x, w = draw_case(seed=5)
    w[:, 0], w[0, 1] = 0, torch.nan
    gap = 0.5 * measure_reach(x, w.nan_to_num(0))

    change = project_to_hyperplane(x, w, gap, norm)

    assert bool(change.isfinite().all())
    assert not bool(change[:, 0].any())
    assert not bool(change[0].any())
    assert bool(change[1:, 1].flatten(1).any(1).all())
    assert measure_to_hyperplane(x, torch.zeros_like(w), gap + 1, norm).isinf().all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_scale_of_a_hyperplane_does_not_matter(norm: PlaneNorm, scale: float) -> None:
    """Gradients of confident networks are tiny."""
    x, w = draw_case(seed=9)
    gap = 0.3 * measure_reach(x, w)

    change = project_to_hyperplane(x, scale * w, scale * gap, norm)

    torch.testing.assert_close(change, project_to_hyperplane(x, w, gap, norm), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_one_image_gives_the_same_bits_as_in_a_batch(norm: PlaneNorm) -> None:
    """No reduction runs over the batch; no images give no changes."""
    x, w = draw_case(n=64, seed=11)
    gap = 0.3 * measure_reach(x, w)

    together = project_to_hyperplane(x, w, gap, norm)

    for i in range(0, 64, 9):
        one = slice(i, i + 1)
        assert torch.equal(project_to_hyperplane(x[one], w[one], gap[one], norm), together[one])
    assert project_to_hyperplane(x[:0], w[:0], gap[:0], norm).shape == (0, 2, 3, 2)


def test_another_norm_is_refused() -> None:
    """In one sentence."""
    x, w = draw_case()

    with pytest.raises(ValueError, match="norm must be linf, l2 or l1, not 'l0'"):
        project_to_hyperplane(x, w, torch.ones(6), "l0")  # type: ignore[arg-type]
