"""Where a perturbation lies: counts that can be made by hand, a second SSIM map, the controls."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate1d
from torch import Tensor

from robusteval.errors import UsageError
from robusteval.evaluation.localisation import (
    Window,
    average_known,
    map_noise,
    measure_energy,
    measure_overlap,
    measure_overlap_at,
)
from robusteval.search.noise import add_equal_noise


def images(n: int = 2, size: int = 20, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("window", ["gaussian", "block"])
def test_the_noise_map_is_that_of_a_second_implementation(window: Window) -> None:
    """By SciPy's filters, which mirror the image in the same way."""
    x, x_adv = images(seed=0), images(seed=1)
    if window == "gaussian":
        weights = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    else:
        weights = np.ones(8)
    weights /= weights.sum()

    def mean(z: Any) -> Any:
        return correlate1d(correlate1d(z, weights, 2, mode="mirror"), weights, 3, mode="mirror")

    a, b = x.double().numpy(), x_adv.double().numpy()
    ma, mb = mean(a), mean(b)
    va, vb, vab = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    ssim = (2 * ma * mb + 1e-4) * (2 * vab + 9e-4)
    ssim /= (ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4)

    found = map_noise(x_adv, x, window)

    assert found.shape == (2, 1, 20, 20)
    np.testing.assert_allclose(found, 1 - ssim.mean(1, keepdims=True), atol=1e-4)


def test_equal_images_have_no_noise() -> None:
    """To the bit, so that no pixel is marked by rounding."""
    assert not bool(map_noise(images(), images()).any())


@pytest.mark.parametrize(("window", "size"), [("gaussian", 10), ("block", 7)])
def test_images_smaller_than_the_window_are_refused(window: Window, size: int) -> None:
    """The message names both sizes."""
    x = images(size=size)

    with pytest.raises(UsageError, match=f"images of {size}x{size} pixels are smaller than"):
        map_noise(x, x, window)


def test_an_unknown_window_is_refused() -> None:
    """The message names the known ones."""
    with pytest.raises(ValueError, match="gaussian or block"):
        map_noise(images(), images(), "hann")  # type: ignore[arg-type]


def maps(*rows: list[float]) -> Tensor:
    return torch.tensor(rows).view(len(rows), 1, 1, -1)


def test_overlap_counts_pixels() -> None:
    """Five pixels: two hits, one false alarm, one miss, one neither."""
    noise, relevance = maps([0.2, 0.3, 0.2, 0.1, 0.0]), maps([0.8, 1.0, 0.7, 0.9, 0.1])

    found = measure_overlap(noise, relevance)

    expected = {"precision": 2 / 3, "perturbed": 3 / 5, "recall": 2 / 3, "iou": 2 / 4}
    expected["iou_outside"] = 1 / 4
    assert expected == {name: pytest.approx(v.item()) for name, v in found._asdict().items()}


def test_thresholds_are_those_asked_for() -> None:
    """Larger than, not equal to."""
    noise, relevance = maps([0.5, 0.6]), maps([0.5, 0.6])

    found = measure_overlap(noise, relevance, changed=0.5, relevant=0.5)

    assert found.perturbed.item() == 0.5
    assert found.iou.item() == 1


def test_empty_maps_have_no_precision_and_are_counted() -> None:
    """They would be nought divided by nought."""
    noise, relevance = (
        maps([0.0, 0.0], [0.2, 0.0], [0.2, 0.2]),
        maps([1.0, 0.0], [1.0, 0.0], [0.0, 0.0]),
    )

    found = measure_overlap(noise, relevance)

    precision, recall = average_known(found.precision), average_known(found.recall)
    assert (precision.value, precision.empty) == (0.5, 1)
    assert (recall.value, recall.empty) == (0.5, 1)
    assert math.isnan(average_known(found.precision[:1]).value)


@pytest.mark.parametrize("share", [0.02, 0.05, 0.2, 1.0])
def test_at_equal_area_the_share_of_marked_pixels_is_the_same(share: float) -> None:
    """Whatever the scale of the noise, and among equal values too."""
    noise = torch.rand(3, 1, 10, 10, generator=torch.Generator().manual_seed(0))
    noise[1] *= 1e-6
    noise[2] = (noise[2] > 0.5).float()

    found = measure_overlap_at(noise, torch.ones_like(noise), share)

    assert [pytest.approx(share)] * 3 == found.perturbed.tolist()


def test_at_equal_area_the_largest_noise_is_marked() -> None:
    """An image without noise has no pixel marked."""
    noise, relevance = (
        maps([0.1, 0.3, 0.2, 0.0], [0.0, 0.0, 0.0, 0.0]),
        maps(*[[0.0, 1.0, 0.0, 1.0]] * 2),
    )

    found = measure_overlap_at(noise, relevance, 0.5)

    assert found.precision[0].item() == 0.5
    assert found.perturbed.tolist() == [0.5, 0]
    assert math.isnan(found.precision[1])


@pytest.mark.parametrize("share", [0.0, 1.1, math.nan])
def test_a_share_that_makes_no_sense_is_refused(share: float) -> None:
    """It is a share of the pixels."""
    with pytest.raises(ValueError, match="share must be above 0"):
        measure_overlap_at(maps([0.1]), maps([1.0]), share)


def test_energy_is_the_share_of_the_squared_change() -> None:
    """Nine tenths on a quarter of the image is a ratio of 3.6; channels are added."""
    x, relevance = torch.zeros(1, 3, 2, 2), torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    x_adv = x.clone()
    x_adv[0, 1, 0, 0] = 0.3
    x_adv[0, 2, 1, 1] = 0.1

    found = measure_energy(x_adv, x, relevance)

    assert [found.inside.item(), found.area.item(), found.ratio.item()] == pytest.approx(
        [0.9, 0.25, 3.6]
    )


def test_energy_of_nothing_has_no_value() -> None:
    """Neither without a change nor without a relevant pixel."""
    x, relevance = torch.zeros(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)
    x_adv = x.clone()
    relevance[0, 0, 0, 0] = 1
    x_adv[1] += 0.1

    found = measure_energy(x_adv, x, relevance)

    assert bool(found.ratio.isnan().all())


def test_the_control_has_the_length_of_the_perturbation_and_no_aim() -> None:
    """Its energy ratio is 1 up to chance; each image's draw is its own."""
    x, seeds = images(8, 64), torch.arange(8)
    x_adv = x + 0.01 * images(8, 64, seed=3)
    relevance = torch.zeros(8, 1, 64, 64)
    relevance[..., :20, :20] = 1

    control = add_equal_noise(x_adv, x, seeds)

    lengths = [(z - x).flatten(1).norm(dim=1) for z in (control, x_adv)]
    torch.testing.assert_close(*lengths)
    assert average_known(measure_energy(control, x, relevance).ratio).value == pytest.approx(
        1, abs=0.1
    )
    alone = add_equal_noise(x_adv[3:4], x[3:4], seeds[3:4])
    torch.testing.assert_close(alone, control[3:4])


def test_noise_looks_as_if_it_avoided_what_is_textured() -> None:
    """Why the control is needed: local SSIM falls where the image is flat."""
    x = torch.full((1, 1, 32, 32), 0.5)
    x[..., 16:] = images(1, 32)[:, :1, :, 16:]
    x_adv = add_equal_noise(x + 0.02, x, torch.zeros(1, dtype=torch.int64))
    relevance = torch.zeros_like(x)
    relevance[..., 16:] = 1

    found = measure_overlap_at(map_noise(x_adv, x), relevance, 0.2)

    assert found.precision.item() < 0.1 < measure_energy(x_adv, x, relevance).area.item()
