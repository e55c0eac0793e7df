"""The constant of Carlini and Wagner: found for each image, wherever a network's scale lies."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from toys import Linear

from robusteval.search.constants import Constants
from robusteval.search.losses import margin


def miss(network: Callable[[Tensor], Tensor], goal: Tensor, x: Tensor) -> Tensor:
    return -margin(network(x), goal)


def scaled(network: Linear, scale: float, x: Tensor) -> Tensor:
    logits: Tensor = network(x)
    return scale * logits


def test_the_first_constant_is_the_least_one_of_a_linear_network() -> None:
    """There the slopes of the squared distance and of the weighed margin cancel each other."""
    network = Linear((3, 5, 4)).requires_grad_(False)
    x = 0.3 + 0.4 * torch.rand(6, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    goal = 1 - network(x).argmax(1)
    for scale in (1e-3, 1.0, 1e3):
        constants = Constants(partial(miss, partial(scaled, network, scale), goal), x, 0.0)
        # from x straight to the boundary, where 2 (x' - x) = constant * slope of the margin
        far, slope = network.distance(x, "l2"), 2 * scale * network.weight.norm()
        torch.testing.assert_close(constants.now, 2 * far / slope, rtol=1e-4, atol=0)


def test_halving_closes_in_from_both_sides() -> None:
    network = Linear((1, 2, 2)).requires_grad_(False)
    goal = torch.tensor([0, 1, 0])
    constants = Constants(partial(miss, network, goal), torch.full((3, 1, 2, 2), 0.5), 0.1)
    constants.now = torch.tensor([1.0, 1.0, 4.0])
    wanted = torch.tensor([0.3, 50.0, 3.0])

    seen = []
    for _ in range(12):
        seen.append(constants.now)
        constants.halve(constants.now >= wanted)

    assert torch.stack(seen)[:3, 1].tolist() == [1.0, 10.0, 100.0]
    assert torch.stack(seen)[:3, 0].tolist() == [1.0, 0.5, 0.25]
    torch.testing.assert_close(constants.high, wanted, rtol=0.01, atol=0)


def test_enough_is_enough() -> None:
    """Beyond the slack the goal pulls no more, before it by the constant."""
    goal = torch.tensor([0])
    constants = Constants(
        partial(miss, partial(torch.flatten, start_dim=1), goal),
        torch.eye(3)[1].view(1, 3, 1, 1),
        0.5,
        1.0,
    )
    constants.now = torch.tensor([7.0])

    assert float(constants.slack) == pytest.approx(0.5 * 2**0.5 + 1)
    gap = torch.tensor([-1.8]).requires_grad_()
    assert float(torch.autograd.grad(constants.weigh(gap).sum(), gap)[0]) == 0
    gap = torch.tensor([-1.6]).requires_grad_()
    assert float(torch.autograd.grad(constants.weigh(gap).sum(), gap)[0]) == 7


def test_a_flat_network_has_a_constant_too() -> None:
    constants = Constants(lambda z: 0 * z.flatten(1).sum(1), torch.rand(2, 1, 2, 2), 0.0)
    assert constants.now.tolist() == [1.0, 1.0]
