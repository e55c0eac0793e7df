"""Where noise lies and what it does, on images and networks with known answers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robusteval.analysis.regions import BALANCED, INACTIVE, PROMOTION, SUPPRESSION
from robusteval.analysis.sparse_noise import (
    REGIONS,
    calls_rectifiers,
    count_places,
    draw_portrait,
    measure_roles,
)
from robusteval.interpreters.cam import gradcam
from robusteval.interpreters.gradient import compute_guided_gradient
from robusteval.interpreters.scaling import resize
from robusteval.models.classifier import Classifier, predict_classes
from robusteval.models.steps import count_passes


class Corners(nn.Module):
    """Logits that are what three places of a 1x4x4 image say: true, wrong, both."""

    def forward(self, x: Tensor) -> Tensor:
        hidden, led, shared = x[:, 0, 0, 0], x[:, 0, 0, 3], x[:, 0, 3, 0]
        return torch.stack([4 - 8 * hidden - 2 * shared, 8 * led + 2 * shared], 1)


def corners() -> Classifier:
    return Classifier(Corners(), num_classes=2).eval()


def whiten_places(*changed: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A black 1x4x4 image, and the same with some places white."""
    x = torch.zeros(1, 1, 4, 4)
    x_adv = x.clone()
    for row, column in changed:
        x_adv[0, 0, row, column] = 1
    return x, x_adv


def halves() -> tuple[Tensor, Tensor]:
    """Maps of a 4x4 image whose upper, and whose left quarter of the places stands out."""
    upper, left = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)
    upper[:, :, 0], left[:, :, :, 0] = 1, 1
    return upper, left


def test_changed_places_are_counted_by_region_and_set_against_its_area() -> None:
    """One in the true class's region, one in the wrong one's, one in both, one in neither."""
    x, x_adv = whiten_places((0, 3), (3, 0), (0, 0), (3, 3))

    found = count_places(x, x_adv, *halves(), shares=(0.25,))

    assert REGIONS == ("obscuring", "leading", "both", "neither")
    assert found.share[0, 0].tolist() == [0.5, 0.5, 0.25, 0.25]
    assert found.area[0, 0].tolist() == [0.25, 0.25, 1 / 16, 9 / 16]
    assert found.lift[0, 0].tolist() == [2, 2, 4, 4 / 9]


def test_a_change_of_one_channel_is_a_changed_place() -> None:
    """As is one of all."""
    x = torch.zeros(1, 3, 4, 4)
    x_adv = x.clone()
    x_adv[0, 1, 0, 0] = 1
    x_adv[0, :, 3, 3] = 1

    assert count_places(x, x_adv, *halves(), shares=(0.25,)).share[0, 0].tolist() == [
        0.5,
        0.5,
        0.5,
        0.5,
    ]


def test_noise_everywhere_has_a_lift_of_one() -> None:
    """Of every region, wherever the line is drawn."""
    x = torch.zeros(2, 1, 8, 8)
    maps = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    found = count_places(x, x + 0.5, maps, maps.flip(3))

    torch.testing.assert_close(found.share, found.area)
    torch.testing.assert_close(found.lift[:, -1], torch.ones(2, 4).double())


def test_larger_regions_hold_more_and_areas_are_as_asked() -> None:
    """The sensitivity to where the line is drawn."""
    generator = torch.Generator().manual_seed(0)
    x = torch.zeros(3, 1, 10, 10)
    x_adv = (torch.rand(3, 1, 10, 10, generator=generator) < 0.2).float()
    maps = 0.1 + torch.rand(2, 3, 1, 10, 10, generator=generator)

    found = count_places(x, x_adv, *maps, shares=(0.05, 0.2, 0.5))

    torch.testing.assert_close(
        found.area[..., :2], torch.tensor([0.05, 0.2, 0.5]).double()[None, :, None].expand(3, 3, 2)
    )
    assert bool((found.share[..., :3].diff(dim=1) >= 0).all())
    assert bool((found.share[..., 3].diff(dim=1) <= 0).all())


def test_coarse_maps_are_brought_to_the_size_of_the_image() -> None:
    x, x_adv = whiten_places((0, 0))
    coarse = torch.tensor([[1.0, 0], [0, 0]]).view(1, 1, 2, 2)

    assert count_places(x, x_adv, coarse, coarse, shares=(0.25,)).share[0, 0, 2] == 1


def test_a_map_of_zeros_points_nowhere() -> None:
    """An empty region has no lift; and an image without a change no share."""
    x, x_adv = whiten_places((0, 0))
    zero = torch.zeros(1, 1, 4, 4)

    empty = count_places(x, x_adv, zero, zero, shares=(0.2,))
    unchanged = count_places(x, x, *halves(), shares=(0.2,))

    assert empty.area[0, 0].tolist() == [0, 0, 0, 1]
    assert bool(empty.lift[0, 0, :3].isnan().all())
    assert bool(unchanged.share.isnan().all())


def test_what_moves_the_true_logit_obscures_and_what_moves_the_other_leads() -> None:
    """Each place alone; one that does both in equal parts is neither."""
    x, x_adv = whiten_places((0, 0), (0, 3), (3, 0), (2, 2))

    found = measure_roles(corners(), x, x_adv, torch.tensor([0]))

    expected = torch.full((4, 4), INACTIVE)
    expected[0, 0], expected[0, 3], expected[3, 0] = SUPPRESSION, PROMOTION, BALANCED
    assert torch.equal(found.kinds[0], expected)
    assert found.suppression[0, 0, 0] == 8
    assert found.promotion[0, 0, 3] == 8
    assert (found.fall.item(), found.rise.item()) == (10, 10)
    assert (found.obscuring.item(), found.leading.item()) == (0.25, 0.25)
    assert found.side.item() == 1


def test_more_changes_than_groups_are_put_back_in_squares() -> None:
    """Three changed places in two corners: two squares of two pixels."""
    x, x_adv = whiten_places((0, 0), (1, 1), (0, 3))
    model = corners()

    with count_passes(model, 1, x.device) as passes:
        found = measure_roles(model, x, x_adv, torch.tensor([0]), groups=2)

    assert found.side.item() == 2
    assert found.kinds[0].flatten().nonzero().flatten().tolist() == [0, 3, 5]
    assert found.suppression[0, 1, 1] == 8
    assert found.suppression[0, 1, 0] == 0
    assert found.obscuring.item() == pytest.approx(2 / 3)
    assert passes.forwards.item() == 4


def test_where_the_attack_failed_nothing_obscures_or_leads() -> None:
    """And that is said."""
    x, x_adv = whiten_places((3, 0))

    found = measure_roles(corners(), x, x_adv * 0.5, torch.tensor([0]))

    assert found.failed.tolist() == [True]
    assert (found.obscuring.item(), found.leading.item()) == (0, 0)
    assert found.suppression[0, 3, 0] == 1


def test_roles_do_not_depend_on_the_batch(bands: Classifier) -> None:
    """Though images need squares of different sizes."""
    x = torch.rand(3, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    x_adv = x.clone()
    x_adv[0] = x[0].flip(-1)
    x_adv[1, :, :2, :2] = 0
    y = predict_classes(bands(x)).detach()

    together = measure_roles(bands, x, x_adv, y, groups=10)

    assert together.side.tolist() == [4, 1, 1]
    assert together.leading[2].isnan()
    for i in range(3):
        alone = measure_roles(bands, x[i : i + 1], x_adv[i : i + 1], y[i : i + 1], groups=10)
        for one, all_of_them in zip(alone, together, strict=True):
            torch.testing.assert_close(one[0], all_of_them[i], rtol=0, atol=0, equal_nan=True)


def test_groups_must_be_some() -> None:
    x, x_adv = whiten_places((0, 0))

    with pytest.raises(ValueError, match="groups must be at least 1"):
        measure_roles(corners(), x, x_adv, torch.tensor([0]), groups=0)


def test_the_picture_is_that_of_the_authors(bands: Classifier) -> None:
    """Clean for the label, adversarial for the prediction, guided each for its prediction."""
    x = torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    x_adv = x.flip(-1)
    seen, fooled = (predict_classes(bands(each)).detach() for each in (x, x_adv))
    y = (seen + 1) % 3

    found = draw_portrait(bands, x, x_adv, y)

    clean = resize(gradcam(bands, x, y), (12, 12))
    adversarial = resize(gradcam(bands, x_adv, fooled), (12, 12))
    torch.testing.assert_close(found.clean, clean)
    torch.testing.assert_close(found.adversarial, adversarial)
    torch.testing.assert_close(found.clean_guided, clean * compute_guided_gradient(bands, x, seen))
    torch.testing.assert_close(
        found.adversarial_guided, adversarial * compute_guided_gradient(bands, x_adv, fooled)
    )
    assert found.clean_guided.shape == x.shape
    assert not any(each.requires_grad for each in found)


def test_a_network_without_rectifiers_has_no_portraits() -> None:
    """As most transformers: there is nothing to guide, and explaining goes on without."""
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    x = torch.rand(1, 3, 6, 6)
    for activation, met in ((nn.GELU(), False), (nn.ReLU(), True)):
        model = Classifier(nn.Sequential(nn.Conv2d(3, 4, 3), activation, *head), num_classes=3)
        assert calls_rectifiers(model.eval(), x) == met
