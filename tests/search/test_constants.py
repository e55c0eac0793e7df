"""The constant of Carlini and Wagner: found for each image, wherever a network's scale lies."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from toys import Linear

from robusteval.search.constants import Constants
from robusteval.search.losses import margin


def scaled(network: Linear, scale: float, x: Tensor) -> Tensor:
    logits: Tensor = network(x)
    return scale * logits


def test_the_first_constant_is_the_least_one_of_a_linear_network() -> None:
    """There the slopes of the squared distance and of the weighed margin cancel each other."""
    network = Linear((3, 5, 4)).requires_grad_(False)
    x = 0.3 + 0.4 * torch.rand(6, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    goal = 1 - network(x).argmax(1)
    for scale in (1e-3, 1.0, 1e3):
        constants = Constants(partial(scaled, network, scale), x, goal, 0.0)
        # from x straight to the boundary, where 2 (x' - x) = constant * slope of the margin
        far, slope = network.distance(x, "l2"), 2 * scale * network.weight.norm()
        torch.testing.assert_close(constants.now, 2 * far / slope, rtol=1e-4, atol=0)


def test_halving_closes_in_from_both_sides() -> None:
    network = Linear((1, 2, 2)).requires_grad_(False)
    constants = Constants(network, torch.full((3, 1, 2, 2), 0.5), torch.tensor([0, 1, 0]), 0.1)
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
    """Beyond the slack the class pulls no more; there it has the probability asked for."""
    logits = torch.tensor([[4.0, 0.0, 0.0]]).requires_grad_()
    goal = torch.tensor([0])
    constants = Constants(lambda z: z.flatten(1), torch.zeros(1, 3, 1, 1), goal, 0.0, 0.9)

    slack = float(constants.slack)
    grad = torch.autograd.grad(constants.weigh(logits, goal).sum(), logits)[0]

    assert float(grad.abs().sum()) == 0
    assert float(margin(logits.detach(), goal)) > slack
    assert torch.tensor([slack, 0.0, 0.0]).softmax(0)[0] >= 0.9 - 1e-6


def test_a_flat_network_has_a_constant_too() -> None:
    constants = Constants(
        lambda z: 0 * z.flatten(1)[:, :2], torch.rand(2, 1, 2, 2), torch.tensor([0, 1]), 0.0
    )
    assert constants.now.tolist() == [1.0, 1.0]
