"""MASK against closed forms, SciPy, torch's Adam and finite differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest
import small_architectures
import torch
from scipy import ndimage
from torch import Tensor, autograd, nn
from torch.nn import functional as F
from toys import Bands, synthetic

from robusteval.interpreters.explainer import measure_mean_distance
from robusteval.interpreters.meaningful_perturbation import (
    build_deletion,
    crop_windows,
    draw_offsets,
    mask,
    measure_variation,
    mix_images,
)
from robusteval.interpreters.resampling import blur, build_blur, build_enlargement, build_kernel
from robusteval.models.classifier import Classifier, frozen

FLAVOURS: tuple[Literal["v1", "v2"], ...] = ("v1", "v2")


class Smooth(nn.Module):
    """A smooth network of a few weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.linear = nn.Linear(3 * 8 * 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(torch.tanh(self.conv(x)).flatten(1))
        return logits


def bands_images(n: int, seed: int = 5) -> tuple[Tensor, Tensor]:
    x, y = synthetic(n, seed)
    return torch.from_numpy(x).permute(0, 3, 1, 2).float().div(255).contiguous(), torch.from_numpy(
        y
    )


class Unsure(nn.Module):
    """A network whose probabilities are not rounded to one."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = 0.1 * self.network(x)
        return logits


@pytest.fixture
def unsure(trained_bands: Bands) -> Classifier:
    """The trained network, less sure of itself, in blocks of four images."""
    network = Unsure(trained_bands)
    return Classifier(network, mean=(0.5,), std=(0.25,), num_classes=3, block=4).eval()


def smooth(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Smooth().double().eval().requires_grad_(False)


def probability(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    logits: Tensor = model(x)
    return logits.softmax(1).gather(1, y.unsqueeze(1)).squeeze(1)


# The parts


@pytest.mark.parametrize(("side", "sigma"), [(3, None), (5, None), (11, 10.0), (21, None)])
def test_blur_is_that_of_scipy(side: int, sigma: float | None) -> None:
    x = np.random.default_rng(0).random((9, 13))
    weights = build_kernel(side, sigma)
    theirs = x
    for axis in (0, 1):
        theirs = ndimage.correlate1d(theirs, weights.numpy(), axis, mode="mirror")

    ours = build_blur(9, weights) @ torch.from_numpy(x) @ build_blur(13, weights).t()

    assert np.abs(ours.numpy() - theirs).max() < 1e-12


def test_kernels_are_those_of_opencv() -> None:
    assert build_kernel(3).tolist() == [0.25, 0.5, 0.25]
    assert (16 * build_kernel(5)).tolist() == [1, 4, 6, 4, 1]
    ratio = build_kernel(21)
    assert float(ratio[11] / ratio[10]) == pytest.approx(np.exp(-1 / (2 * 3.5**2)))
    assert float(build_kernel(11)[6] / build_kernel(11)[5]) == pytest.approx(
        np.exp(-1 / (2 * 2.0**2))
    )


def test_an_even_image_stays_even_when_blurred() -> None:
    even = torch.full((2, 3, 9, 7), 0.25)

    torch.testing.assert_close(blur(even, 3.0), even)


def test_enlarging_is_bilinear() -> None:
    cells = torch.rand(1, 1, 5, 4, generator=torch.Generator().manual_seed(0)).double()

    ours = build_enlargement(5, 12) @ cells[0, 0] @ build_enlargement(4, 9).t()

    theirs = F.interpolate(cells, (12, 9), mode="bilinear", align_corners=False)[0, 0]
    torch.testing.assert_close(ours, theirs)


def test_variation_pairs_the_two_differences_of_a_cell() -> None:
    step = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
    step[0, 0, 0, 0] = 1.0  # one corner cell where both differences are one

    # the corner: length sqrt(2); the three others: nothing
    assert float(measure_variation(step)) == pytest.approx(2**1.5)
    step = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
    step[0, 0, 0, 1] = 1.0  # across at (0, 0) and (0, 1), down at (0, 1)
    assert float(measure_variation(step)) == pytest.approx(1 + 2**1.5)
    assert float(measure_variation(step, transposed=True)) == pytest.approx(2 * 1 + 1)


def test_jitter_crops_every_image_at_its_own_place() -> None:
    scene = torch.arange(2 * 1 * 5 * 5).float().view(2, 1, 5, 5)
    shift = torch.tensor([[0, 2], [1, 0]])

    windows = crop_windows(scene, shift, 3, 3)

    assert torch.equal(windows[0], scene[0, :, 0:3, 2:5])
    assert torch.equal(windows[1], scene[1, :, 1:4, 0:3])


def test_offsets_belong_to_the_image() -> None:
    seeds = torch.tensor([3, 4, 3])
    drawn = draw_offsets(seeds, 50, 4)

    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])
    assert set(drawn.flatten().tolist()) == {0, 1, 2, 3}
    assert int(draw_offsets(seeds, 50, 0).abs().sum()) == 0


def test_steps_are_those_of_adam(bands: Classifier) -> None:
    x, y = bands_images(3)
    game = build_deletion(x, flavour="v1")
    scene, state, still = (
        game.compose_scene(x),
        game.start_mask(x),
        torch.zeros(3, 2, dtype=torch.int64),
    )
    theirs = state.mask.clone().requires_grad_()
    adam = torch.optim.Adam([theirs], 0.1)

    for _ in range(12):
        state = game.step_mask(bands, scene, y, state, still)
        (theirs.grad,) = autograd.grad(
            game.compute_loss(bands, scene, y, theirs, still).sum(), theirs
        )
        adam.step()
        with torch.no_grad():
            theirs.clamp_(0, 1)

    torch.testing.assert_close(state.mask, theirs.detach(), atol=1e-5, rtol=0)


# The map


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_search_lowers_what_it_is_to_lower(
    flavour: Literal["v1", "v2"], unsure: Classifier
) -> None:
    x, y = bands_images(12)
    seeds = torch.arange(12)
    game = build_deletion(x, flavour=flavour, blur=23)
    maps = mask(unsure, x, y, seeds=seeds, flavour=flavour, iterations=60, blur=23)

    def mean_loss(kept: Tensor) -> Tensor:
        shifts = draw_offsets(seeds + 1, 8, game.jitter)
        losses = [
            game.compute_loss(unsure, game.compose_scene(x), y, kept, shifts[:, i])
            for i in range(8)
        ]
        return torch.stack(losses).mean(0)

    assert bool((mean_loss(1 - maps) <= mean_loss(game.start_mask(x).mask)).all())
    assert float(maps.min()) >= 0
    assert float(maps.max()) <= 1
    right = unsure(x).argmax(1) == y
    steady = build_deletion(x, flavour=flavour, blur=23, jitter=0)
    image, blurred = steady.compose_scene(x).chunk(2, 1)
    gone = probability(unsure, mix_images(image, blurred, steady.enlarge_mask(1 - maps)), y)
    assert bool((gone < probability(unsure, x, y))[right].all())


def test_the_map_shows_where_the_class_is(unsure: Classifier) -> None:
    x, y = bands_images(12)
    x, y = x[y == 2], y[y == 2]  # the others keep their class when all is blurred
    maps = mask(unsure, x, y, iterations=40, blur=23, sparsity=0.03)

    assert maps.mean((1, 2)).argmax(1).tolist() == [2] * 4  # columns of cells


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_map_does_not_depend_on_the_batch(
    flavour: Literal["v1", "v2"], unsure: Classifier
) -> None:
    x, y = bands_images(9)
    seeds, order = torch.arange(9) + 7, torch.tensor([3, 0, 6, 8, 1, 5, 7, 2, 4])
    options: dict[str, Any] = {"flavour": flavour, "iterations": 15}
    whole = mask(unsure, x, y, seeds=seeds, **options)

    mixed = mask(unsure, x[order], y[order], seeds=seeds[order], **options)
    single = mask(unsure, x[4:5], y[4:5], seeds=seeds[4:5], **options)
    twice = mask(unsure, x[[2, 2]], y[[2, 2]], seeds=seeds[[2, 2]], **options)

    assert torch.equal(mixed, whole[order])
    assert torch.equal(single, whole[4:5])
    assert torch.equal(twice, whole[[2, 2]])


def test_the_noise_floor_is_that_of_the_jitter(unsure: Classifier) -> None:
    x, y = bands_images(12)
    x, y = x[y == 2], y[y == 2]
    seeds = torch.arange(4)
    fixed: dict[str, Any] = {"iterations": 40, "blur": 23, "sparsity": 0.003, "smoothness": 0.0}

    def floor(jitter: int) -> Tensor:
        one, other = (
            mask(unsure, x, y, seeds=each, jitter=jitter, **fixed) for each in (seeds, seeds + 100)
        )
        return measure_mean_distance(one, other)

    assert float(floor(2).mean()) > 0.01
    assert bool((floor(0) == 0).all())


@pytest.mark.parametrize(("side", "cells"), [(8, 2), (12, 3), (28, 7), (32, 8), (224, 28)])
def test_the_grid_fits_the_image(side: int, cells: int) -> None:
    assert build_deletion(torch.zeros(1, 1, side, side)).grid == cells


def test_the_model_is_left_as_it_was() -> None:
    network = smooth()
    network.requires_grad_(True)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    x, y = torch.full((2, 2, 8, 8), 0.3).double(), torch.tensor([0, 1])

    with torch.no_grad():
        maps = mask(network, x, y, iterations=3)

    assert not maps.requires_grad
    assert all(p.grad is None and p.requires_grad for p in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


# On the graph


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_derivatives_of_the_unrolled_map_match_finite_differences(
    flavour: Literal["v1", "v2"],
) -> None:
    network = smooth()
    x = torch.rand(1, 2, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    y = torch.tensor([2])

    # small steps: no cell reaches the bounds, where a clamped map has a kink
    def unrolled(x: Tensor) -> Tensor:
        return mask(network, x, y, flavour=flavour, iterations=3, unroll=3, rate=0.01)

    assert autograd.gradcheck(unrolled, (x.requires_grad_(),), atol=1e-6)


def test_unrolled_maps_have_derivatives_through_attention() -> None:
    """Of the fused kernels of attention the second derivative is not there."""
    network = small_architectures.build("tv_vit").requires_grad_(False)
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    maps = mask(network, x, torch.tensor([1]), iterations=2, unroll=2)
    (slope,) = autograd.grad(maps.square().sum(), x)

    assert bool((slope != 0).any())


def test_an_unrolled_map_has_the_values_of_a_plain_one(unsure: Classifier) -> None:
    x, y = bands_images(4)
    with frozen(unsure):
        plain = mask(unsure, x, y, iterations=12)
        unrolled = mask(unsure, x.clone().requires_grad_(), y, iterations=12, unroll=5)

    assert unrolled.requires_grad
    assert torch.equal(unrolled.detach(), plain)


def test_a_state_carried_on_is_the_search_in_one_go(unsure: Classifier) -> None:
    x, y = bands_images(3)
    seeds = torch.arange(3)
    game = build_deletion(x)
    shift, scene, state = (
        draw_offsets(seeds, 10, game.jitter),
        game.compose_scene(x),
        game.start_mask(x),
    )

    for i in range(10):
        state = game.step_mask(unsure, scene, y, state.detach(), shift[:, i])

    assert torch.equal(state.mask, game.optimise(unsure, x, y, seeds, iterations=10).mask)


# Mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": 13}, "grid must have from 1 to 12 cells"),
        ({"grid": 0}, "grid"),
        ({"flavour": "v3"}, "flavour must be one of v1, v2"),
        ({"iterations": 0}, "iterations"),
        ({"unroll": 0}, "unroll"),
        ({"rate": 0.0}, "rate"),
        ({"blur": 4}, "odd"),
        ({"jitter": -1}, "jitter"),
        ({"sparsity": -1.0}, "sparsity"),
    ],
)
def test_a_parameter_out_of_range_is_refused(
    options: dict[str, Any], message: str, unsure: Classifier
) -> None:
    x, y = bands_images(0)
    explain: Callable[..., Tensor] = mask

    with pytest.raises(ValueError, match=message):
        explain(unsure, x, y, **options)


def test_a_class_that_does_not_exist_is_refused(unsure: Classifier) -> None:
    x, _ = bands_images(2)

    with pytest.raises(ValueError, match="classes must lie between 0 and 2"):
        mask(unsure, x, torch.tensor([0, 3]))


def test_an_empty_batch_has_no_maps(unsure: Classifier) -> None:
    x, y = bands_images(0)

    assert mask(unsure, x, y).shape == (0, 1, 3, 3)
