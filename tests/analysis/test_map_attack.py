"""The attack on interpretations alone, on a network whose map can be written down."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robusteval.analysis.map_attack import attack_maps, lower_highest_cells
from robusteval.datasets.arrays import from_arrays
from robusteval.errors import UsageError
from robusteval.interpreters.cam import cam
from robusteval.models.classifier import Classifier

WEIGHT = torch.tensor([[0.5, -1.0, 2.0], [1.0, 1.0, -1.0]])  # (k, c)


def mean_colour() -> Classifier:
    """The map of a class is its weights times the image, pixel by pixel."""
    features, scores = nn.Conv2d(3, 3, 1, bias=False), nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        features.weight.copy_(torch.eye(3)[:, :, None, None])
        scores.weight.copy_(WEIGHT)
    network = nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), scores)
    return Classifier(network, num_classes=2).eval()


def images(n: int = 3) -> Tensor:
    drawn = torch.rand(n, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    return 0.2 + 0.6 * drawn


def test_the_eight_highest_cells_fall_as_far_as_the_ball_allows() -> None:
    """Each by eps times the sum of its weights' sizes; other cells stay where they began."""
    model, x, y, eps = mean_colour(), images(), torch.tensor([0, 1, 0]), 0.04
    seeds = torch.arange(3)

    x_adv = lower_highest_cells(model, x, y, eps=eps, steps=9, seeds=seeds)
    start = lower_highest_cells(model, x, y, eps=eps, steps=0, seeds=seeds)

    before, after = (cam(model, z, y).flatten(1) for z in (x, x_adv))
    highest = before >= before.topk(8, 1).values[:, -1:]
    fall = (eps * WEIGHT[y].abs().sum(1))[:, None].expand_as(before)
    assert torch.allclose((before - after)[highest], fall[highest], atol=1e-5)
    assert torch.equal(still(x_adv, highest), still(start, highest))
    assert bool(((x_adv - x).abs() <= eps + 1e-6).all())


def still(z: Tensor, highest: Tensor) -> Tensor:
    """The values of cells that nobody lowers."""
    return z.flatten(2)[(~highest)[:, None].expand(-1, 3, -1)]


def test_one_image_has_the_same_bits_alone() -> None:
    model, x, y = mean_colour(), images(), torch.tensor([0, 1, 0])
    whole = lower_highest_cells(model, x, y, eps=0.1, steps=3, seeds=torch.arange(3))
    alone = lower_highest_cells(model, x[1:2], y[1:2], eps=0.1, steps=3, seeds=torch.arange(1, 2))

    assert torch.equal(whole[1:2], alone)


def test_only_images_that_are_right_count_and_order_is_kept_without_a_radius() -> None:
    model, x = mean_colour(), images(6)
    pred = model(x).argmax(1)
    labels = pred.clone()
    labels[2] = 1 - labels[2]
    data = from_arrays(x.permute(0, 2, 3, 1).numpy(), labels.numpy())

    ids, tau, kept = attack_maps(model, data, np.arange(6), eps=0.0, steps=2, seed=0)

    assert len(ids) == 5
    assert tau == pytest.approx(np.ones(5))
    assert kept.all()
    _, moved, _ = attack_maps(model, data, np.arange(6), eps=0.3, steps=60, seed=0)
    assert (moved < 0.5).all()


def test_a_network_without_such_maps_is_refused() -> None:
    model = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(108, 2)), num_classes=2).eval()
    x = images(4)
    labels = model(x).argmax(1).numpy()  # none but images that are right is attacked
    data = from_arrays(x.permute(0, 2, 3, 1).numpy(), labels)
    with pytest.raises(UsageError, match="cam"):
        attack_maps(model, data, np.arange(4), eps=0.1, steps=1, seed=0)
