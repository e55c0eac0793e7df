"""Edge weights by hand, against scikit-image, and the two controls."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from robusteval.search.edges import sobel, weigh_edges

SEEDS = torch.arange(4) * 7


def images(n: int = 4) -> Tensor:
    return torch.rand(n, 3, 9, 11, generator=torch.Generator().manual_seed(0))


def step_edge() -> Tensor:
    """Black on the left, white on the right."""
    x = torch.zeros(1, 3, 6, 8)
    x[..., 4:] = 1
    return x


def test_a_constant_image_has_no_edges() -> None:
    assert torch.equal(torch.zeros(2, 1, 5, 7), sobel(torch.full((2, 3, 5, 7), 0.3)))


@pytest.mark.parametrize("transposed", [False, True])
def test_a_step_from_black_to_white_has_the_known_strength(transposed: bool) -> None:
    """On both sides of it, at the border of the image as well, and nowhere else."""
    x = step_edge()
    expected = torch.zeros(1, 1, 6, 8)
    expected[..., 3:5] = 1 / math.sqrt(2)
    if transposed:
        x, expected = x.transpose(2, 3), expected.transpose(2, 3)

    torch.testing.assert_close(sobel(x), expected)


def test_a_corner_from_black_to_white_has_the_known_strength() -> None:
    """Three quarters, from both directions together."""
    x = torch.zeros(1, 1, 6, 6)
    x[..., 3:, 3:] = 1

    strength = sobel(x)

    # 3/4 of the kernel's mass across and along: sqrt((.75**2 + .75**2) / 2)
    assert strength[0, 0, 3, 3].item() == pytest.approx(0.75)
    assert strength.max().item() == pytest.approx(0.75)


def test_channels_count_alike() -> None:
    """Grey is the plain mean, not the brightness that an eye sees."""
    first, last = torch.zeros(1, 3, 6, 8), torch.zeros(1, 3, 6, 8)
    first[:, 0, :, 4:], last[:, 2, :, 4:] = 1, 1

    assert torch.equal(sobel(first), sobel(last))
    torch.testing.assert_close(3 * sobel(first), sobel(step_edge()))


def test_edges_are_those_of_scikit_image() -> None:
    """To 1e-6, border included."""
    filters = pytest.importorskip("skimage.filters", reason="the second implementation")
    x = images()

    for image, strength in zip(x, sobel(x), strict=True):
        expected = torch.from_numpy(filters.sobel(image.mean(0).double().numpy())).float()
        torch.testing.assert_close(strength[0], expected, atol=1e-6, rtol=0)


def test_an_edge_does_not_depend_on_the_batch() -> None:
    x = images()

    assert torch.equal(sobel(x), torch.cat([sobel(x[i : i + 1]) for i in range(4)]))


def test_the_variants_are_one_the_strength_and_a_threshold() -> None:
    x = images()
    strength = sobel(x)

    assert torch.equal(weigh_edges(x, "adv2"), torch.ones(4, 1, 9, 11))
    assert torch.equal(weigh_edges(x, "advedge"), strength)
    assert torch.equal(weigh_edges(x, "advedge_plus"), (strength > 0.1).float())
    assert torch.equal(weigh_edges(x, "advedge_plus", alpha=0.2), (strength > 0.2).float())


def test_normalised_edges_reach_one() -> None:
    x = images()

    weights = weigh_edges(x, "advedge", normalise=True)

    torch.testing.assert_close(weights.amax((1, 2, 3)), torch.ones(4))
    flat = torch.full((1, 3, 5, 5), 0.5)
    assert not weigh_edges(flat, "advedge", normalise=True).any()


@pytest.mark.parametrize("variant", ["advedge", "advedge_plus"])
def test_random_weights_are_the_same_ones_elsewhere(variant: Any) -> None:
    """Equal density exactly, places from each image's own seed."""
    x = images()
    plain = weigh_edges(x, variant)

    drawn = weigh_edges(x, variant, edges="random", seeds=SEEDS)

    assert torch.equal(plain.flatten(1).sort(1).values, drawn.flatten(1).sort(1).values)
    assert not torch.equal(plain, drawn)
    alone = [
        weigh_edges(x[i : i + 1], variant, edges="random", seeds=SEEDS[i : i + 1]) for i in range(4)
    ]
    assert torch.equal(torch.cat(alone), drawn)
    other = weigh_edges(x, variant, edges="random", seeds=SEEDS + 1)
    assert not torch.equal(other, drawn)


def test_inverse_weights_lie_where_there_are_no_edges() -> None:
    x = images()

    plus = weigh_edges(x, "advedge_plus"), weigh_edges(x, "advedge_plus", edges="inverse")
    soft = weigh_edges(x, "advedge"), weigh_edges(x, "advedge", edges="inverse")

    assert torch.equal(plus[0] + plus[1], torch.ones(4, 1, 9, 11))
    torch.testing.assert_close(
        soft[0] + soft[1], soft[0].amax((1, 2, 3), keepdim=True).expand_as(soft[0])
    )


@pytest.mark.parametrize(
    ("variant", "settings", "message"),
    [
        ("adv3", {}, "variant must be adv2, advedge or advedge_plus"),
        ("advedge", {"edges": "canny"}, "edges must be sobel, random or inverse"),
        ("advedge_plus", {"alpha": -0.1}, "alpha must be from 0 to 1"),
        ("advedge_plus", {"alpha": math.nan}, "alpha must be from 0 to 1"),
    ],
)
def test_odd_settings_are_refused(variant: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weigh_edges(images(), variant, **settings)
