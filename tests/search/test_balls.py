"""Distances, balls and the 8-bit lattice, against their definitions."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robusteval.search.balls import TOLERANCE, Ball, Norm, measure_distances, psnr, quantise, ssim

SEEDS = torch.arange(8)


def images(n: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, 7, 9, generator=torch.Generator().manual_seed(seed))


def test_distances_are_those_of_the_definition() -> None:
    """One image with two changed values in one pixel, and one unchanged image."""
    x = torch.zeros(2, 3, 4, 4)
    x_adv = x.clone()
    x_adv[0, 0, 1, 2], x_adv[0, 2, 1, 2] = 0.25, 0.5

    found = measure_distances(x_adv, x)

    assert [2, 0] == found["l0"].tolist()
    assert [1, 0] == found["l0_pixels"].tolist()
    assert [0.75, 0] == found["l1"].tolist()
    assert [math.hypot(0.25, 0.5), 0] == pytest.approx(found["l2"].tolist())
    assert [0.5, 0] == found["linf"].tolist()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@settings(max_examples=40)
@given(eps=st.floats(0, 1), seed=st.integers(0, 2**20))
def test_projection_never_leaves_ball_or_box(norm: Norm, eps: float, seed: int) -> None:
    """Measured in float64, with no tolerance beyond the last bit of the l2 sum."""
    x = images(4, seed)
    ball = Ball.around(x, norm, eps)

    z = ball.project(x + 3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))

    reach = measure_distances(z, x)[norm]
    assert bool((reach <= eps * (1 + 1e-9)).all())
    assert bool(((z >= 0) & (z <= 1)).all())


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_projection_leaves_inner_points_alone(norm: Norm) -> None:
    """A point well inside the ball is its own projection."""
    x = images()
    z = (x + 0.001).clamp(0, 1)

    projected = Ball.around(x, norm, 0.5 if norm != "l1" else 5.0).project(z)

    torch.testing.assert_close(projected, z, atol=1e-6, rtol=0)


def test_projection_on_the_cube_clips_each_value() -> None:
    """linf: the nearest point clips."""
    x = torch.full((1, 1, 1, 3), 0.5)

    z = Ball.around(x, "linf", 0.1).project(torch.tensor([0.0, 0.55, 2.0]).view(1, 1, 1, 3))

    torch.testing.assert_close(z.flatten(), torch.tensor([0.4, 0.55, 0.6]))


def test_masked_pixels_stay() -> None:
    """Zero in the mask: no projection, sample, step or rounding changes the pixel."""
    x = images()
    mask = torch.zeros(1, 1, 7, 9)
    mask[..., :4] = 1
    for norm in ("linf", "l2", "l1"):
        ball = Ball.around(x, norm, 0.3, mask)
        for z in (
            ball.project(1 - x),
            ball.sample(SEEDS),
            ball.quantise(ball.project(x + 0.2)),
        ):
            assert torch.equal(z[..., 4:], x[..., 4:])
            assert not torch.equal(z[..., :4], x[..., :4])


@settings(max_examples=40)
@given(eps=st.floats(0, 30), seed=st.integers(0, 2**20))
def test_projection_on_the_l1_ball_is_the_nearest_point(eps: float, seed: int) -> None:
    """Against the shrinking of all changes by halving an interval, with a third at 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(3, 1, 5, 4, generator=generator)
    x = torch.where(torch.rand(x.shape, generator=generator) < 1 / 3, x.round(), x)
    z = x + torch.randn(x.shape, generator=generator)
    v = (z - x).double()
    room = torch.where(v > 0, 1 - x.double(), x.double())
    low, high = torch.zeros(3, 1, 1, 1), torch.full((3, 1, 1, 1), 10.0)
    for _ in range(60):
        middle = (low + high) / 2
        over = torch.minimum((v.abs() - middle).clamp_min(0), room).flatten(1).sum(1) > eps
        over = over.view(-1, 1, 1, 1)
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    expected = x + v.sign() * torch.minimum((v.abs() - low).clamp_min(0), room)

    near = Ball.around(x, "l1", eps).project(z)

    torch.testing.assert_close(near.double(), expected, atol=1e-5, rtol=0)


def test_projection_on_the_l1_ball_stops_at_a_mask() -> None:
    """What may not change takes no part of the radius."""
    x, mask = torch.full((1, 1, 1, 3), 0.5), torch.tensor([0.0, 1.0, 1.0])

    z = Ball.around(x, "l1", 0.3, mask).project(torch.tensor([9.0, 0.9, 0.2]).view(1, 1, 1, 3))

    torch.testing.assert_close(z.flatten(), torch.tensor([0.5, 0.7, 0.4]))


def test_rounding_spends_what_the_radius_allows() -> None:
    """Where rounding to the nearest would leave the ball, those that miss least are rounded up."""
    x = torch.zeros(1, 1, 1, 4)
    changes = torch.tensor([1.6, 2.9, 0.7, 1.2]).view(1, 1, 1, 4) / 255
    for norm, eps, expected in (
        ("l1", 6.4, [1, 3, 1, 1]),
        ("l1", 7.0, [2, 3, 1, 1]),
        ("l2", 15**0.5, [2, 3, 1, 1]),
        ("l2", 14**0.5, [1, 3, 1, 1]),
    ):
        ball = Ball.around(x, norm, eps / 255)  # type: ignore[arg-type]
        levels = ball.quantise(x + changes) * 255
        assert levels.flatten().tolist() == pytest.approx(expected, abs=1e-3)


def test_sparse_steps_move_the_largest_entries() -> None:
    """As many as asked for; where all of them are stuck, the next one as well."""
    grad = torch.tensor([[4.0, -3.0, 2.0, 0.5], [4.0, -3.0, 2.0, 0.5]]).view(2, 1, 1, 4)
    ball = Ball.around(torch.full((2, 1, 1, 4), 0.5), "l1", 1.0)
    stuck = torch.tensor([False, False, False, False, True, True, False, False]).view(2, 1, 1, 4)

    step = ball.find_sparse_direction(grad, torch.tensor([2.0, 2.0]), stuck)

    assert step.flatten(1).tolist() == [[0.5, -0.5, 0, 0], [1, -1, 1, 0]]
    assert ball.find_direction(grad).flatten(1).tolist() == [[1, 0, 0, 0], [1, 0, 0, 0]]


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_rounded_images_are_8_bit_and_inside_if_the_original_is_8_bit(norm: Norm) -> None:
    """Also for radii between two grey levels."""
    x = quantise(images())
    for eps in (0.0, 0.004, 8 / 255, 0.05, 0.1):
        ball = Ball.around(x, norm, eps)

        z = ball.quantise(ball.sample(SEEDS))

        levels = z.double() * 255
        torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)
        assert bool(ball.holds(z).all())


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_samples_depend_on_their_seed_alone(norm: Norm) -> None:
    """The same image and seed give the same point in any batch."""
    x = images()

    together = Ball.around(x, norm, 0.1).sample(SEEDS)
    alone = [Ball.around(x[i : i + 1], norm, 0.1).sample(SEEDS[i : i + 1]) for i in range(8)]

    assert torch.equal(torch.cat(alone), together)
    assert len({tuple(row.flatten().tolist()) for row in together - x}) == 8


def test_steps_have_unit_length_and_rise_most() -> None:
    """linf: signs. l2: the normalised gradient, also where squares would underflow."""
    x = images()
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))

    sign = Ball.around(x, "linf", 0.1).find_direction(grad)
    unit = Ball.around(x, "l2", 0.1).find_direction(grad * 1e-30)

    assert torch.equal(sign, grad.sign())
    torch.testing.assert_close(unit, grad / grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1))


def test_a_gradient_that_is_not_finite_gives_no_direction() -> None:
    """NaN must not spread into the image."""
    x = images(1)
    for norm in ("linf", "l2", "l1"):
        step = Ball.around(x, norm, 0.1).find_direction(torch.full_like(x, torch.nan))
        assert torch.equal(step, torch.zeros_like(x))


@pytest.mark.parametrize(
    ("norm", "eps"), [("linf", -0.1), ("linf", 8.0), ("linf", math.nan), ("l2", math.inf)]
)
def test_radii_that_make_no_sense_are_refused(norm: Norm, eps: float) -> None:
    """An eps of 8 was meant to be 8/255."""
    with pytest.raises(ValueError, match="eps must be"):
        Ball.around(images(), norm, eps)


def test_an_unknown_norm_is_refused() -> None:
    """The message names the known ones."""
    with pytest.raises(ValueError, match="linf, l2 or l1"):
        Ball.around(images(), "l7", 0.1)  # type: ignore[arg-type]


@settings(max_examples=50)
@given(st.floats(0, 1, width=32))
def test_rounding_is_to_the_nearest_level_and_idempotent(value: float) -> None:
    """Never further than half a level."""
    once = quantise(torch.tensor(value))

    assert abs(once.item() - value) <= 1 / 510 + 1e-7
    assert torch.equal(quantise(once), once)


def naive_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """SSIM of one channel, window by window, as the paper writes it."""
    at = np.arange(11) - 5
    bell = np.exp(-(at**2) / (2 * 1.5**2))
    window = np.outer(bell, bell) / np.outer(bell, bell).sum()
    values = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            ma, mb = (window * a).sum(), (window * b).sum()
            va, vb = (window * (a - ma) ** 2).sum(), (window * (b - mb) ** 2).sum()
            vab = (window * (a - ma) * (b - mb)).sum()
            values.append(
                (2 * ma * mb + 1e-4)
                * (2 * vab + 9e-4)
                / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))
            )
    return float(np.mean(values))


def test_ssim_is_that_of_the_paper() -> None:
    """Against a second, naive implementation."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 16, 14, generator=generator)
    y = (x + 0.1 * torch.randn(x.shape, generator=generator)).clamp(0, 1)

    expected = [
        np.mean(
            [naive_ssim(a.double().numpy(), b.double().numpy()) for a, b in zip(p, q, strict=True)]
        )
        for p, q in zip(x, y, strict=True)
    ]

    assert expected == pytest.approx(ssim(x, y).tolist(), abs=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [4, 28, 32])
def test_ssim_of_an_image_has_the_same_bits_alone_and_among_others(
    channels: int, size: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(9, channels, size, size, generator=generator)
    y = (x + torch.randn(x.shape, generator=generator) / 9).clamp(0, 1)
    together = ssim(x, y)

    for n in (1, 2, 7):
        pairs = zip(x.split(n), y.split(n), strict=True)  # type: ignore[no-untyped-call]
        assert torch.equal(torch.cat([ssim(*pair) for pair in pairs]), together)


def test_ssim_of_equal_images_is_one_at_any_size() -> None:
    """Images smaller than the window get a smaller window."""
    for size in (1, 2, 5, 11, 20):
        x = torch.rand(1, 1, size, size)
        assert ssim(x, x).item() == pytest.approx(1)


def test_psnr_is_that_of_the_definition() -> None:
    """A constant error of 0.1 is 20 dB, none is infinite."""
    x = torch.full((2, 1, 4, 4), 0.5)
    x_adv = x.clone()
    x_adv[0] += 0.1

    assert [pytest.approx(20, abs=1e-5), math.inf] == psnr(x_adv, x).tolist()


def test_tolerance_is_far_below_a_grey_level() -> None:
    """What counts as inside must not be visible in an 8-bit image."""
    assert TOLERANCE < 0.001 / 255


@pytest.mark.parametrize("shape", [(1, 28, 28), (1, 32, 32), (3, 32, 32), (1, 9, 14)])
def test_the_likeness_of_an_image_has_the_same_bits_in_any_batch(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(14, *shape, generator=generator)
    y = (x + 0.01 * torch.randn(x.shape, generator=generator)).clamp(0, 1)

    together = ssim(x, y)
    for size in (1, 2, 3, 7):
        starts = range(0, len(x), size)
        parts = [ssim(x[at : at + size], y[at : at + size]) for at in starts]
        assert torch.equal(torch.cat(parts), together), size
