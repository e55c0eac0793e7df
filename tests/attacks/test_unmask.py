"""Gradients in the place of those that rounding withholds."""

from __future__ import annotations

import pytest
import torch
from planted_defects import Jpeg
from torch import nn
from toys import draw_uniform

from robusteval.attacks.unmask import unmask
from robusteval.models.classifier import count_passes
from robusteval.search.balls import quantise
from robusteval.search.stand_ins import Straight, hold_far

EPS = 1 / 255


def build_linear(front: nn.Module) -> nn.Sequential:
    """Three classes, linear in what the front layer makes of 64 values."""
    head = nn.Linear(64, 3, bias=False)
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    head.weight = nn.Parameter(weight, requires_grad=False)
    return nn.Sequential(front, nn.Flatten(), head)


@pytest.mark.parametrize(
    ("name", "decimals", "near"),
    [
        ("round", 0, [0.45, 0.55, -0.5, 1.42]),
        ("round", 1, [0.045, 0.255]),
        ("floor", 0, [0.95, 1.0, 1.05, -0.03]),
        ("ceil", 0, [0.95, 1.0, 1.05, -0.03]),
    ],
)
def test_values_near_a_jump_are_followed(name: str, decimals: int, near: list[float]) -> None:
    """A tenth of a unit on either side; in the middle between two jumps nothing is."""
    far = {"round": [0.0, 0.3, 1.0], "floor": [0.5, 0.2], "ceil": [0.5, 0.2]}[name]
    far = [value / 10**decimals for value in far]
    x = torch.tensor(near + far, requires_grad=True)

    held = hold_far(name, x, decimals)
    (grad,) = torch.autograd.grad(held.sum(), x)

    assert torch.equal(held, x)
    assert grad.tolist() == [1.0] * len(near) + [0.0] * len(far)


def test_where_few_values_can_be_moved_across_a_jump_these_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """JPEG of coarse steps, in a small radius: no more images hold than without it."""
    x = quantise(0.2 + 0.6 * draw_uniform(64, 1, 8, 8, seed=0))
    coded, linear = build_linear(Jpeg(0.15)), build_linear(nn.Identity())

    def count_broken(network: nn.Module) -> int:
        y = network(x).argmax(1)
        return int((network(unmask(network, x, y, eps=EPS)).argmax(1) != y).sum())

    broken = count_broken(coded)
    monkeypatch.setattr("robusteval.search.stand_ins.NEAR", 1.0)  # all are near
    assert broken > count_broken(coded) >= count_broken(linear)


def test_a_network_that_rounds_nothing_is_spared_the_search_for_it() -> None:
    x, network = draw_uniform(4, 1, 8, 8, seed=0), build_linear(nn.Identity())
    y = network(x).argmax(1)

    with count_passes(network, len(x), x.device) as passes:
        unmask(network, x, y, eps=1e-6)
    guide = Straight(build_linear(Jpeg(0.15)), [], near=True)
    guide(x.requires_grad_())

    assert guide.met == {"round"}
    assert list(passes.stages) == ["straight apgd", "straight diverse", "straight targets"]
