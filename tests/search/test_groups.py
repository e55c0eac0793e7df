"""Squares of pixels: lengths, the group soft threshold, and the cheapest change in closed form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from robusteval.search.groups import Groups


def draw(n: int = 3) -> Tensor:
    return torch.randn(n, 3, 7, 5, generator=torch.Generator().manual_seed(0))


def test_lengths_are_those_of_squares_and_of_what_is_left_at_the_rim() -> None:
    delta, groups = draw(), Groups(3)

    length = groups.measure(delta)

    assert length.shape == (3, 1, 3, 2)
    for i, j in ((0, 0), (1, 1), (2, 1)):
        square = delta[:, :, 3 * i : 3 * i + 3, 3 * j : 3 * j + 3]
        torch.testing.assert_close(length[:, 0, i, j], square.flatten(1).norm(dim=1))
    torch.testing.assert_close(groups.spread(length, delta)[:, 0, 6, 4], length[:, 0, 2, 1])
    torch.testing.assert_close(
        groups.price(delta, 2.0, 0.5), delta.square().sum((1, 2, 3)) / 2 + 2 * length.sum((1, 2, 3))
    )


@pytest.mark.parametrize("side", [1, 2, 7, 20])
def test_the_soft_threshold_is_the_proximal_operator(side: int) -> None:
    """Shorter by the threshold or zero; no change near by has a lower price."""
    delta, groups, by = draw(), Groups(side), 1.2

    shrunk = groups.shrink(delta, by)

    torch.testing.assert_close(
        groups.measure(shrunk), (groups.measure(delta) - by).clamp_min(0), atol=1e-5, rtol=1e-5
    )

    def price(z: Tensor) -> Tensor:
        return groups.price(z, by, 0.0) + (z - delta).square().sum((1, 2, 3)) / 2

    for i in range(20):
        other = shrunk + 0.05 * torch.randn(delta.shape, generator=torch.Generator().manual_seed(i))
        assert (price(shrunk) <= price(other) + 1e-5).all()


@pytest.mark.parametrize("tau", [0.0, 0.3, 2.0])
def test_the_cheapest_change_of_a_linear_function(tau: float) -> None:
    """It falls by just the gap; any other change that lets it fall so far is dearer."""
    grad, groups, gamma = draw(), Groups(2), 0.7
    gap = torch.tensor([0.1, 1.0, 10.0])

    delta, multiplier = groups.solve_linear(grad, gap, tau, gamma)

    torch.testing.assert_close((grad * delta).sum((1, 2, 3)), -gap, rtol=1e-4, atol=1e-5)
    price = groups.price(delta, tau, gamma)
    for i in range(20):
        other = delta + 0.1 * torch.randn(grad.shape, generator=torch.Generator().manual_seed(i))
        lack = (grad * other).sum((1, 2, 3)) + gap
        other = other - (lack / grad.square().sum((1, 2, 3))).view(-1, 1, 1, 1) * grad
        assert (price <= groups.price(other, tau, gamma) + 1e-5).all()
    if tau == 0:  # one multiple of the gradient
        scale = gap / grad.square().sum((1, 2, 3))
        torch.testing.assert_close(delta, -scale.view(-1, 1, 1, 1) * grad)
        torch.testing.assert_close(multiplier, 2 * gamma * scale)
    nothing = groups.solve_linear(0 * grad, gap, tau, gamma)[1]
    assert not nothing.isfinite().any()


def test_a_side_is_a_pixel_or_more() -> None:
    with pytest.raises(ValueError, match="side must be at least 1"):
        Groups(0)
