"""Channels, statistics and extractors of maps."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

from robusteval.defenses.map_features import (
    Channels,
    Examples,
    Extractor,
    adapt_convolution,
    build_extractor,
    build_vgg16,
    choose_channels,
    choose_side,
    compute_statistics,
    count_features,
    list_statistics,
    measure_channels,
    rank_values,
    resize_maps,
    stack_maps,
    train_extractor,
)


def drawn(n: int, side: int, seed: int) -> Tensor:
    """Maps with some cells at exactly zero."""
    maps = torch.rand(n, 1, side, side, generator=torch.Generator().manual_seed(seed))
    return torch.where(maps < 0.2, 0.0, maps)


def measured(maps: list[Tensor], side: int = 8) -> dict[str, Tensor]:
    """Statistics by name."""
    names = list_statistics(list("abc")[: len(maps)], confidence=False)
    stack = stack_maps(maps, "pair" if len(maps) == 2 else "triple", side)
    return dict(zip(names, compute_statistics(stack, len(maps), None).t(), strict=True))


def test_channels_follow_from_the_number_of_maps() -> None:
    assert choose_channels(2, None) == "pair"
    assert choose_channels(3, None) == "triple"
    assert choose_channels(2, "pair_product") == "pair_product"


@pytest.mark.parametrize(
    ("maps", "channels"), [(1, None), (4, None), (3, "pair"), (2, "triple"), (2, "quartet")]
)
def test_channels_that_do_not_go_with_the_maps_are_refused(
    maps: int, channels: Channels | None
) -> None:
    with pytest.raises(ValueError, match=r"channels|interpreters"):
        choose_channels(maps, channels)


def test_maps_of_small_images_are_not_blown_up() -> None:
    assert choose_side("raw", (1, 32, 32)) == 32
    assert choose_side("small_cnn", (3, 12, 12)) == 32
    assert choose_side("small_cnn", (3, 224, 224)) == 64
    assert choose_side("vgg16", (3, 32, 32)) == 224


def test_larger_maps_are_bilinear() -> None:
    maps = drawn(3, 4, 0)

    expected = F.interpolate(maps, (9, 9), mode="bilinear", align_corners=False)

    torch.testing.assert_close(resize_maps(maps, 9), expected)


def test_smaller_maps_are_means() -> None:
    maps = drawn(3, 12, 0)

    torch.testing.assert_close(resize_maps(maps, 4), F.avg_pool2d(maps, 3))


def test_product_is_that_of_the_resized_maps() -> None:
    maps = [drawn(3, 4, 0), drawn(3, 8, 1)]

    stack = stack_maps(maps, "pair_product", 8)

    torch.testing.assert_close(stack[:, 0:1], resize_maps(maps[0], 8))
    assert torch.equal(stack[:, 2], stack[:, 0] * stack[:, 1])


def test_stack_of_an_image_does_not_depend_on_the_batch() -> None:
    maps = [drawn(9, 7, 0), drawn(9, 16, 1)]

    whole = stack_maps(maps, "pair_product", 13)

    for i in range(9):
        assert torch.equal(
            stack_maps([m[i : i + 1] for m in maps], "pair_product", 13)[0], whole[i]
        )


def test_equal_maps_agree_in_everything() -> None:
    maps = drawn(4, 8, 0)

    found = measured([maps, maps])

    torch.testing.assert_close(found["l1 of a and b"], torch.zeros(4))
    torch.testing.assert_close(found["cosine of a and b"], torch.ones(4))
    torch.testing.assert_close(found["spearman of a and b"], torch.ones(4))
    assert torch.equal(found["overlap of a and b"], torch.ones(4))
    torch.testing.assert_close(found["divergence of a and b"], torch.zeros(4))


def test_maps_that_share_nothing_are_as_far_apart_as_can_be() -> None:
    one, other = torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)
    one[..., :1, :4], other[..., 7:, :4] = 1, 1

    found = measured([one, other])

    torch.testing.assert_close(found["l1 of a and b"], torch.tensor([8 / 64]))
    torch.testing.assert_close(found["cosine of a and b"], torch.zeros(1), atol=1e-6, rtol=0)
    assert found["overlap of a and b"].item() == 0
    torch.testing.assert_close(
        found["divergence of a and b"], torch.tensor([math.log(2)]), atol=1e-5, rtol=0
    )


def test_one_bright_corner_has_known_numbers() -> None:
    corner = torch.zeros(1, 1, 8, 8)
    corner[..., 0, 7] = 1

    found = measured([corner, torch.ones(1, 1, 8, 8)])

    assert found["entropy of a"].item() == pytest.approx(0, abs=1e-4)
    assert found["gini of a"].item() == pytest.approx(1 - 1 / 64, abs=1e-4)
    assert found["row of a"].item() == pytest.approx(0, abs=1e-4)
    assert found["column of a"].item() == pytest.approx(1, abs=1e-4)
    assert found["above half of a"].item() == 1 / 64
    assert found["variation of a"].item() == pytest.approx(2 / 56)
    assert found["entropy of b"].item() == pytest.approx(1, abs=1e-5)
    assert found["gini of b"].item() == pytest.approx(0, abs=1e-5)
    assert found["row of b"].item() == pytest.approx(0.5, abs=1e-5)
    assert found["above half of b"].item() == 1


def test_rank_correlation_is_that_of_scipy() -> None:
    one, other = drawn(5, 8, 0), drawn(5, 8, 1)

    found = measured([one, other])["spearman of a and b"]

    for i in range(5):
        expected, _ = spearmanr(one[i].flatten(), other[i].flatten())
        assert found[i].item() == pytest.approx(expected, abs=1e-5)


def test_equal_values_share_a_rank() -> None:
    assert rank_values(torch.tensor([[3.0, 1, 3, 2]])).tolist() == [[1, -1.5, 1, -0.5]]


def test_statistics_do_not_depend_on_the_batch_and_have_finite_slopes() -> None:
    maps = [drawn(7, 8, 0), torch.zeros(7, 1, 8, 8), drawn(7, 8, 2)]
    logits = torch.randn(7, 4, generator=torch.Generator().manual_seed(3))
    stack = stack_maps(maps, "triple", 8).requires_grad_()

    whole = compute_statistics(stack, 3, logits)
    (grad,) = torch.autograd.grad(whole.sum(), stack)

    assert whole.shape == (7, len(list_statistics(list("abc"), confidence=True)))
    assert bool(whole.isfinite().all())
    assert bool(grad.isfinite().all())
    for i in range(7):
        alone = compute_statistics(stack[i : i + 1].detach(), 3, logits[i : i + 1])
        assert torch.equal(alone[0], whole[i])


def test_no_images_have_no_statistics() -> None:
    assert compute_statistics(torch.zeros(0, 2, 8, 8), 2, None).shape == (0, 18)


def test_adapted_convolution_answers_grey_as_the_one_for_colours_did() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first = nn.Conv2d(3, 4, 3, padding=1)
    grey = torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(1))

    for channels in (1, 2, 3):
        changed = adapt_convolution(first, channels)
        torch.testing.assert_close(
            changed(grey.expand(-1, channels, -1, -1)), first(grey.expand(-1, 3, -1, -1))
        )
    assert torch.equal(adapt_convolution(first, 3).weight, first.weight)


def test_vgg_takes_as_many_channels_as_asked_for() -> None:
    features = build_vgg16(2)

    first, *_, last = (each for each in features if isinstance(each, nn.Conv2d))
    assert first.weight.shape == (64, 2, 3, 3)
    assert last.out_channels * 2 == count_features("vgg16", 2)


def examples(n: int, planes: int) -> Examples:
    """Stacks of which every second is brighter on the left."""
    stacks = np.random.default_rng(0).random((n, planes, 32, 32), dtype=np.float32)
    labels = np.arange(n) % 2
    stacks[labels == 1, :, 8:24, 12:20] += 0.3
    order = np.arange(n)
    return Examples(stacks, labels, np.ones(n), order[: n // 2], order[n // 2 :])


@pytest.mark.parametrize("kind", ["raw", "small_cnn"])
def test_extractor_is_the_same_for_the_same_seed_and_in_every_batch(kind: Extractor) -> None:
    given = examples(80, 2)
    stacks = torch.from_numpy(given.stacks)

    made = [
        train_extractor(kind, given, seed=0, device=torch.device("cpu"), epochs=2) for _ in range(2)
    ]

    features = made[0](stacks)
    assert features.shape == (80, count_features(kind, 2))
    assert torch.equal(features, made[1](stacks))
    assert torch.equal(features[7], made[0](stacks[7:8])[0])
    assert not made[0].training


def test_small_network_learns_what_there_is_to_learn() -> None:
    given = examples(160, 2)
    told: list[int] = []

    extractor = train_extractor(
        "small_cnn", given, seed=0, device=torch.device("cpu"), epochs=4, advance=told.append
    )

    features = extractor(torch.from_numpy(given.stacks)).numpy()
    far = features[given.labels == 1].mean(0) - features[given.labels == 0].mean(0)
    assert np.abs(far).max() > 2 * features[given.labels == 0].std(0)[np.abs(far).argmax()]
    assert sum(told) == 4


def test_vgg_learns_with_its_first_and_last_layer_alone() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        before = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 3)
        network = nn.Module()
        network.classifier = nn.Sequential(nn.Linear(20, 6), nn.Linear(6, 10))
    network.features = nn.Sequential(*before)
    network.avgpool = nn.AdaptiveAvgPool2d(2)

    made = train_extractor(
        "vgg16", examples(40, 2), seed=0, device=torch.device("cpu"), start=network, epochs=1
    )

    features = made.network.features
    assert isinstance(features, nn.Sequential)
    first, second = features
    assert isinstance(first, nn.Conv2d)
    assert isinstance(second, nn.Conv2d)
    assert not torch.equal(first.weight, adapt_convolution(before[0], 2).weight)
    assert torch.equal(second.weight, before[1].weight)


def test_structure_of_every_extractor_takes_its_weights() -> None:
    made = train_extractor(
        "small_cnn", examples(40, 3), seed=0, device=torch.device("cpu"), epochs=1
    )

    build_extractor("small_cnn", 3).load_state_dict(made.network.state_dict())


def test_channels_are_standardised_by_the_training_rows_alone() -> None:
    given = examples(80, 2)

    mean, std = measure_channels(given.stacks, given.train)

    np.testing.assert_allclose(mean, given.stacks[:40].mean((0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(std, given.stacks[:40].std((0, 2, 3)), rtol=1e-4)
