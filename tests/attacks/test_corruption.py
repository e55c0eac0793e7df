"""Corruptions: the published constants, what each kind is known to do, and what all keep."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor, nn
from toys import draw_uniform

from robusteval.attacks import distortions, weather
from robusteval.attacks.corruption import CORRUPTIONS, corruption
from robusteval.attacks.severities import KINDS, PUBLISHED, Kind, find_constants
from robusteval.attacks.weather import draw_cloud
from robusteval.search.balls import measure_distances, quantise

SEEDS = torch.arange(3) * 77 + 5
IDLE = nn.Identity()
# those whose published constants are not in order, see attacks/README.md
UNORDERED = ("elastic_transform", "glass_blur", "frost", "saturate", "spatter")


def corrupt(x: Tensor, **settings: Any) -> Tensor:
    return corruption(IDLE, x, torch.zeros(len(x), dtype=torch.int64), seeds=SEEDS, **settings)


def draw_scene(side: int = 32, channels: int = 3) -> Tensor:
    """Three clouds with an edge in each channel: rough at every size, as photographs are."""
    rng = np.random.default_rng(1)
    clouds = [[draw_cloud(side, 1.05, rng)[:side, :side] for _ in range(channels)] for _ in SEEDS]
    x = torch.from_numpy(np.array(clouds)).float() * 0.6 + 0.1
    x[:, :, side // 4 : side // 2, side // 3 :] += 0.25
    return quantise(x)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_an_8_bit_image_of_its_own_seed(kind: Kind) -> None:
    """Alone and in any batch the same bits; another seed changes what is drawn."""
    x = draw_scene()

    together = corrupt(x, kind=kind, severity=4)
    alone = corruption(IDLE, x[1:2], SEEDS[:1], seeds=SEEDS[1:2], kind=kind, severity=4)

    assert torch.equal(together[1:2], alone)
    assert torch.equal(quantise(together), together)
    assert not torch.equal(together, x)
    assert together.min() >= 0
    assert together.max() <= 1


@pytest.mark.parametrize("shape", [(1, 12, 12), (3, 9, 40), (5, 33, 20), (2, 1, 1), (4, 3, 2)])
@pytest.mark.parametrize("severity", [1, 5])
def test_any_shape_is_corrupted(shape: tuple[int, int, int], severity: int) -> None:
    """Also a single pixel, and more channels than there are colours."""
    x = draw_uniform(3, *shape)

    for kind in KINDS:
        found = corrupt(x, kind=kind, severity=severity)
        assert found.shape == x.shape
        assert bool(found.isfinite().all())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in UNORDERED])
def test_severities_go_ever_farther(kind: Kind) -> None:
    """In the mean l2 distance from the image, at 32 and at 64 pixels.

    Of three images 32 pixels are too few for `pixelate`, whose boxes may meet an edge or not.
    """
    for side in (64,) if kind == "pixelate" else (32, 64):
        x = draw_scene(side)
        far = [
            float(measure_distances(corrupt(x, kind=kind, severity=s), x)["l2"].mean())
            for s in range(1, 6)
        ]

        assert far == sorted(far), (side, far)


def test_constants_are_those_published_at_both_sizes() -> None:
    """And between them in between, by equal factors."""
    assert find_constants("gaussian_noise", 1, 32) == {"scale": 0.04}
    assert find_constants("gaussian_noise", 5, 224) == {"scale": 0.38}
    middle = find_constants("gaussian_noise", 1, round((32 * 224) ** 0.5))["scale"]
    assert middle == pytest.approx((0.04 * 0.08) ** 0.5, rel=0.01)


def test_factors_of_zoom_blur_are_those_of_the_programs() -> None:
    """Which are given there by an end and a step, rounded as NumPy does."""
    ends = {
        32: [(1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)],
        224: [(1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)],
    }
    for side, steps in ends.items():
        for severity, (end, step) in enumerate(steps, 1):
            published = np.arange(1, end, step)
            found = find_constants("zoom_blur", severity, side)

            assert found["factors"] == len(published)
            assert found["last"] == pytest.approx(published[-1])


def test_lengths_grow_with_the_image_and_strengths_do_not() -> None:
    """Beyond what was published a blur covers the same share of the image."""
    assert find_constants("gaussian_blur", 2, 448) == {"sigma": 4.0}
    assert find_constants("gaussian_blur", 5, 16) == {"sigma": 0.5}
    assert find_constants("impulse_noise", 2, 448) == find_constants("impulse_noise", 2, 224)
    assert find_constants("jpeg_compression", 3, 10)["quality"] == 58


def test_every_kind_has_a_function_and_ten_constants_of_each_name() -> None:
    """Fifteen that are counted, four extra."""
    assert len(KINDS) == 19
    assert list(CORRUPTIONS) == list(PUBLISHED) == list(KINDS)
    for constants in PUBLISHED.values():
        assert all(len(side) == 5 for both in constants.values() for side in both)


def test_noise_has_the_strength_that_is_said() -> None:
    """Normal noise its standard deviation, impulses their share, photons their variance."""
    grey = torch.full((3, 3, 64, 64), 0.5)
    at = {s: corrupt(grey, kind="gaussian_noise", severity=s) for s in (1, 3)}
    for severity, found in at.items():
        scale = find_constants("gaussian_noise", severity, 64)["scale"]
        assert float(found.std()) == pytest.approx(scale, rel=0.03)
    hit = corrupt(grey, kind="impulse_noise", severity=5)
    share = find_constants("impulse_noise", 5, 64)["share"]
    assert float(((hit == 0) | (hit == 1)).float().mean()) == pytest.approx(share, rel=0.05)
    photons = find_constants("shot_noise", 1, 64)["photons"]
    shot = corrupt(grey, kind="shot_noise", severity=1)
    assert float(shot.var()) == pytest.approx(0.5 / photons, rel=0.05)


def test_blurs_keep_what_is_even() -> None:
    """The weights of every kernel sum to one, at the border too."""
    grey = torch.full((3, 3, 48, 40), 0.4)
    for kind in ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "elastic_transform"):
        found = corrupt(grey, kind=kind, severity=5)
        assert float((found - grey).abs().max()) <= 1 / 255 + 1e-6, kind


def test_a_blur_is_the_gaussian_filter() -> None:
    """SciPy's in float64, cut off at four standard deviations, the border repeated."""
    x = draw_scene(40)[0].numpy()
    for sigma in (0.05, 0.7, 3.0, 20.0):
        expected = ndimage.gaussian_filter(x.astype(np.float64), (0, sigma, sigma), mode="nearest")

        np.testing.assert_allclose(distortions.smooth(x, sigma), expected, atol=1e-6)


def test_compression_is_that_of_pillow() -> None:
    """Of colours and of grey, to one level, as decoders differ in rounding."""
    x, rng = draw_scene(40)[0].numpy(), np.random.default_rng(0)
    levels = distortions.round_to_levels(x)
    for part in (levels, levels[:1]):
        file = io.BytesIO()
        picture = np.ascontiguousarray(part.transpose(1, 2, 0)) if len(part) == 3 else part[0]
        Image.fromarray(picture).save(file, "JPEG", quality=15)
        expected = np.atleast_3d(np.asarray(Image.open(file))).transpose(2, 0, 1).astype(int)

        found = distortions.compress(part / np.float32(255), {"quality": 15}, rng)

        assert np.abs(found - expected).max() <= 1


def test_drops_are_drawn_once_and_shine_as_strongly_as_is_said() -> None:
    """Water adds its colour, strongest where drops are brightest; a dry image stays."""
    x = np.zeros((3, 64, 64), np.float32)
    wet = {**find_constants("spatter", 1, 224), "smooth": 2.0}

    found = weather.add_spatter(x, wet, np.random.default_rng(0))
    dry = weather.add_spatter(x, {**wet, "least": 9.0}, np.random.default_rng(0))

    water = np.array(weather.WATER) / 255 * wet["strength"]
    np.testing.assert_allclose(found.max((1, 2)), water, rtol=1e-5)
    np.testing.assert_array_equal(dry, x)


def test_a_disk_by_transform_is_the_disk_by_sums() -> None:
    """The second implementation is a plain correlation."""
    x = draw_scene(40)[0].numpy()
    kernel = distortions.build_disk(6, 0.5)

    expected = ndimage.correlate(x.astype(np.float64), kernel[None], mode="mirror")

    np.testing.assert_allclose(distortions.correlate(x, kernel), expected, atol=1e-5)


def test_a_smooth_field_is_the_gaussian_filter() -> None:
    """Where its weights fit into the image, and where they reach far beyond it."""
    field = draw_uniform(2, 24, 30).numpy().astype(np.float64)
    for sigma in (1.3, 20.0):
        expected = ndimage.gaussian_filter(field, (0, sigma, sigma), mode="reflect", truncate=3)

        np.testing.assert_allclose(distortions.smooth_field(field, sigma), expected, atol=1e-10)


def test_shuffled_pixels_are_those_of_one_copy_after_the_other() -> None:
    """Against the loop that the kind is defined by."""
    h, w, reach = 13, 17, 2
    origins = distortions.draw_origins((h, w), reach, np.random.default_rng(3))
    away = np.random.default_rng(3).integers(-reach, reach, (2, h - 2 * reach, w - 2 * reach))
    expected = np.arange(h * w).reshape(h, w)
    for row in range(h - reach, reach, -1):
        for column in range(w - reach, reach, -1):
            down, right = away[:, row - reach - 1, column - reach - 1]
            expected[row, column] = expected[row + down, column + right]

    np.testing.assert_array_equal(origins.reshape(h, w), expected)


def test_brightness_and_saturation_are_those_of_hsv() -> None:
    """Against scikit-image."""
    colour: Any = pytest.importorskip("skimage.color")
    x, rng = draw_uniform(3, 20, 20).numpy(), np.random.default_rng(0)
    hsv = colour.rgb2hsv(x.transpose(1, 2, 0))
    brighter, stronger = hsv.copy(), hsv.copy()
    brighter[..., 2] = np.clip(hsv[..., 2] + 0.3, 0, 1)
    stronger[..., 1] = np.clip(hsv[..., 1] * 5 + 0.1, 0, 1)

    brightened = distortions.brighten(x, find_constants("brightness", 3, 224), rng)
    saturated = distortions.saturate(x, find_constants("saturate", 4, 224), rng)

    for found, expected in ((brightened, brighter), (saturated, stronger)):
        np.testing.assert_allclose(found.transpose(1, 2, 0), colour.hsv2rgb(expected), atol=1e-5)


def test_masked_pixels_stay() -> None:
    """To the bit, as under any attack."""
    x, mask = draw_uniform(3, 3, 16, 16), torch.ones(1, 1, 16, 16)
    mask[..., :8] = 0

    found = corrupt(x, kind="fog", severity=5, mask=mask)

    assert torch.equal(found[..., :8], x[..., :8])
    assert not torch.equal(found[..., 8:], x[..., 8:])


@pytest.mark.parametrize("severity", [0, 6, -1])
def test_another_severity_is_refused(severity: int) -> None:
    """Before there is anything to corrupt."""
    with pytest.raises(ValueError, match="severity must be from 1 to 5"):
        corrupt(draw_uniform(0, 3, 8, 8), severity=severity)
