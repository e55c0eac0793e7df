"""How high maps rise, of maps that can be written down."""

from __future__ import annotations

import math

import torch

from robusteval.analysis.map_heights import compare_heights, measure_heights

FOOLED = torch.tensor([True, False, True])


def peak(*tops: float) -> torch.Tensor:
    """Maps ``(n, 1, 2, 2)`` that rise so high at one place, and are negative elsewhere."""
    maps = torch.full((len(tops), 1, 2, 2), -9.0)
    maps[:, 0, 1, 0] = torch.tensor(tops)
    return maps


def test_heights_are_shares_of_the_highest_of_their_image() -> None:
    """Whatever its scale; what is negative is no height, and an image without any has none."""
    found = compare_heights({"before": peak(4, 10, -1), "after": peak(1, 20, -2)})

    assert found["before"].tolist()[:2] == [1, 0.5]
    assert found["after"].tolist()[:2] == [0.25, 1]
    assert all(math.isnan(float(heights[2])) for heights in found.values())


def test_heights_are_averaged_over_the_images_that_are_fooled() -> None:
    """The others are nan, so that images are found again in their places."""
    maps = {"cam": {"clean, label": peak(4, 1, 2), "adversarial, label": peak(1, 1, 1)}}

    before, after = measure_heights(maps, FOOLED)

    assert (after.map, after.view, after.height.value) == ("cam", "adversarial, label", 0.375)
    assert (after.heights[0], after.heights[2]) == (0.25, 0.5)
    assert math.isnan(after.heights[1])
    assert (before.height.value, before.height.n) == (1, 2)
    assert list(measure_heights(maps, ~FOOLED & FOOLED)) == []
