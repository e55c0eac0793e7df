"""Figures about maps, against closed forms and SciPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from robusteval.interpreters.gradient import grad
from robusteval.interpreters.quality import (
    correlate_ranks,
    measure_deletion,
    measure_insertion,
    shuffle_parameters,
)
from robusteval.models.classifier import Classifier


class Brightness(nn.Module):
    """The probability of class 1 is the sum of the pixels times their weights."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        share = (x * self.weight).flatten(1).sum(1).clamp(1e-6, 1 - 1e-6)
        return torch.stack([(1 - share).log(), share.log()], 1)


def corner() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A model that looks at the top left quarter, white images, classes, the true map."""
    weight = torch.zeros(1, 1, 4, 4)
    weight[..., :2, :2] = 0.25
    return Brightness(weight), torch.ones(3, 1, 4, 4), torch.ones(3, dtype=torch.int64), weight


def test_insertion_and_deletion_of_a_known_model_are_known() -> None:
    model, x, y, weight = corner()
    maps = weight.expand(3, -1, -1, -1)

    # probability rises in four equal steps of sixteen, and stays: 4 / 32 short of one
    up = measure_insertion(model, x, y, maps, steps=16, start="black")
    down = measure_deletion(model, x, y, maps, steps=16)
    torch.testing.assert_close(up, torch.full((3,), 1 - 2 / 16), atol=1e-5, rtol=0)
    torch.testing.assert_close(down, torch.full((3,), 2 / 16), atol=1e-5, rtol=0)


def test_the_worst_map_is_the_best_one_upside_down() -> None:
    model, x, y, weight = corner()
    best, worst = (sign * weight.expand(3, -1, -1, -1) for sign in (1, -1))

    deleted = [measure_deletion(model, x, y, maps, steps=8) for maps in (best, worst)]
    assert bool((deleted[0] < deleted[1]).all())
    inserted = [
        measure_insertion(model, x, y, maps, steps=8, start="black") for maps in (best, worst)
    ]
    assert bool((inserted[0] > inserted[1]).all())


def test_coarse_maps_are_resized() -> None:
    model, x, y, _ = corner()
    coarse = torch.tensor([[1.0, 0.0], [0.0, 0.0]]).view(1, 1, 2, 2).expand(3, -1, -1, -1)

    assert float(measure_deletion(model, x, y, coarse, steps=16).mean()) < 0.3


@pytest.mark.parametrize("steps", [0, 17])
def test_steps_out_of_range_are_refused(steps: int) -> None:
    model, x, y, weight = corner()

    with pytest.raises(ValueError, match="steps must be between 1 and the 16 pixels"):
        measure_deletion(model, x, y, weight.expand(3, -1, -1, -1), steps=steps)


def test_rank_correlation_is_that_of_scipy() -> None:
    draws = torch.Generator().manual_seed(0)
    one = torch.rand(4, 1, 5, 6, generator=draws)
    other = (one + torch.rand(4, 1, 5, 6, generator=draws)).mul(4).round()  # with ties

    pairs = zip(one.flatten(1).numpy(), other.flatten(1).numpy(), strict=True)
    ranked = [[stats.rankdata(maps) for maps in pair] for pair in pairs]
    theirs = [float(np.corrcoef(a, b)[0, 1]) for a, b in ranked]

    assert correlate_ranks(one, other).tolist() == pytest.approx(theirs)


def test_rank_correlation_of_a_constant_map_is_zero() -> None:
    one = torch.rand(1, 1, 3, 3, generator=torch.Generator().manual_seed(0))

    assert correlate_ranks(one, torch.ones(1, 1, 3, 3)).tolist() == [0.0]
    assert correlate_ranks(one, -one).tolist() == pytest.approx([-1.0])


def test_maps_of_a_network_that_forgot_are_others(bands: Classifier) -> None:
    x = torch.rand(6, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    y = torch.arange(6) % 3

    forgetful = shuffle_parameters(bands, 0)

    assert float(correlate_ranks(grad(bands, x, y), grad(forgetful, x, y)).mean()) < 0.5
    image = x.mean(1, keepdim=True)  # an interpreter that does not look at the network
    assert correlate_ranks(image, image).tolist() == pytest.approx([1.0] * 6)


def test_shuffling_keeps_every_entry_and_the_model(bands: Classifier) -> None:
    before = {name: value.clone() for name, value in bands.state_dict().items()}
    other = shuffle_parameters(bands, 0)

    for (name, one), two in zip(bands.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(one, before[name])
        assert torch.equal(one.flatten().sort().values, two.flatten().sort().values)
    assert not torch.equal(
        other.state_dict()["network.conv1.weight"], before["network.conv1.weight"]
    )
