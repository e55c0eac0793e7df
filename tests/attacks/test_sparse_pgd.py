"""`sparse_pgd`: never more changes than allowed, and as few as will do on a linear network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from toys import Linear, late

from robusteval.models.classifier import Classifier, predict_classes
from robusteval.search.balls import quantise
from robusteval.search.descent import count_changes

if TYPE_CHECKING:
    from robusteval.attacks.sparse_pgd import sparse_pgd
else:
    sparse_pgd = late("robusteval.attacks.sparse_pgd", "sparse_pgd")

SEEDS = torch.arange(8)


def images() -> Tensor:
    return quantise(torch.rand(8, 3, 12, 12, generator=torch.Generator().manual_seed(0)))


def classes_of(model: Classifier, x: Tensor) -> Tensor:
    with torch.no_grad():
        return predict_classes(model(x))


@pytest.mark.parametrize("slope", ["sparse", "full"])
@pytest.mark.parametrize("norm", ["l0", "l0_pixels"])
def test_more_changes_fool_more_and_none_has_too_many(
    bands: Classifier, norm: Any, slope: Any
) -> None:
    x = images()
    y = classes_of(bands, x)
    fooled = []
    for eps in (0, 2, 30):
        x_adv = sparse_pgd(bands, x, y, seeds=SEEDS, norm=norm, slope=slope, eps=eps, steps=30)
        assert (count_changes(x_adv, x, norm) <= eps).all()
        assert torch.equal(quantise(x_adv), x_adv)
        fooled.append(int((classes_of(bands, x_adv) != y).sum()))

    assert fooled[0] == 0
    assert fooled[1] <= fooled[2]
    assert fooled[2] >= 7


def test_on_a_linear_network_the_best_values_are_found() -> None:
    """As many as the optimum takes, or one in four more."""
    network = Linear((1, 6, 6), seed=1).requires_grad_(False)
    model = Classifier(network, num_classes=2).eval()
    x = quantise(0.3 + 0.4 * torch.rand(8, 1, 6, 6, generator=torch.Generator().manual_seed(1)))
    y = classes_of(model, x)
    side = (x * network.weight).flatten(1).sum(1) + network.bias
    weight = network.weight * side.sign().view(-1, 1, 1, 1)
    gains = torch.maximum(weight * x, weight * (x - 1)).flatten(1).sort(descending=True).values
    least = (gains.cumsum(1) <= side.abs().unsqueeze(1)).sum(1) + 1

    for i in range(8):
        eps = -(-5 * int(least[i]) // 4)
        made = sparse_pgd(model, x[i : i + 1], y[i : i + 1], norm="l0", eps=eps, steps=60)
        assert classes_of(model, made) != y[i]


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"eps": 1.5}, "whole number"), ({"steps": 0}, "at least 1"), ({"step": 0.0}, "above 0")],
)
def test_odd_settings_are_refused(bands: Classifier, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        sparse_pgd(bands, torch.empty(0, 3, 12, 12), torch.empty(0, dtype=torch.int64), **settings)
