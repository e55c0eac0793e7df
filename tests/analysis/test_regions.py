"""Region scores against closed forms, a plain loop, and Captum."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from toys import Affine, change_at_random, draw_uniform

from robusteval.analysis.regions import (
    BALANCED,
    COUNTER,
    INACTIVE,
    PROMOTION,
    SUPPRESSION,
    Effects,
    Mode,
    build_grid,
    classify_regions,
    count_ratios,
    measure_effects,
    spread_over_pixels,
)
from robusteval.models.classifier import Classifier, predict_classes


@pytest.fixture
def affine() -> Affine:
    return Affine(draw_uniform(3, 2, 6, 6) - 0.5)


def test_a_grid_counts_row_by_row_and_its_edge_takes_the_rest() -> None:
    regions = build_grid(5, 7, 2)

    assert regions.shape == (5, 7)
    assert regions[0].tolist() == [0, 0, 1, 1, 2, 2, 2]
    assert regions[:, 0].tolist() == [0, 0, 3, 3, 3]
    assert int(build_grid(299, 299).max()) + 1 == 529
    assert int(build_grid(32, 32).max()) + 1 == 256
    for side in (0, 6):
        with pytest.raises(ValueError, match="from 1 to 5"):
            build_grid(5, 7, side)


@pytest.mark.parametrize("mode", ["removal", "insertion", "average", "gradient"])
def test_scores_of_a_linear_model_are_known(affine: Affine, mode: Mode) -> None:
    """Every mode agrees, and regions do not interact."""
    x, x_adv, y = (
        draw_uniform(4, 2, 6, 6),
        draw_uniform(4, 2, 6, 6, seed=1),
        torch.tensor([0, 1, 2, 0]),
    )
    regions = build_grid(6, 6, 2)

    found = measure_effects(affine, x, x_adv, y, regions, mode=mode)

    delta = (x_adv - x).double()
    for i in range(4):
        for g in range(9):
            part = delta[i] * (regions == g)
            own, other = affine.weight[y[i]].double(), affine.weight[found.other[i]].double()
            assert found.suppression[i, g].item() == pytest.approx(
                -(own * part).sum().item(), abs=2e-6
            )
            assert found.promotion[i, g].item() == pytest.approx(
                (other * part).sum().item(), abs=2e-6
            )
    assert found.residual.abs().max() < 1e-5


def test_ratios_are_counted_in_bands_that_part_where_the_types_do() -> None:
    """Exactly twice is balanced; an inactive region counts nowhere, an infinite one at the end."""
    down = torch.tensor([[0.0, 0.0, 1.0, 1.0, 1.0, 8.1, 1.0]], dtype=torch.float64)
    up = torch.tensor([[0.0, 1.0, 0.0, 2.0, 2.1, 1.0, 1.0]], dtype=torch.float64)
    kinds, ratio = classify_regions(down, up, torch.tensor([False]))

    found = [share.value for share in count_ratios(ratio.numpy())]

    assert found == pytest.approx([n / 6 for n in (1, 1, 0, 0, 2, 1, 0, 0, 1)])
    shares = [float((kinds == kind).sum() / 6) for kind in (SUPPRESSION, BALANCED, PROMOTION)]
    assert [sum(found[:4]), found[4], sum(found[5:])] == pytest.approx(shares)


def test_one_region_is_the_whole_perturbation(bands: Classifier) -> None:
    x, x_adv, y = change_at_random(bands)

    found = measure_effects(bands, x, x_adv, y, torch.zeros(12, 12, dtype=torch.int64))

    before, after = bands(x).double(), bands(x_adv).double()
    rise = (after - before).gather(1, found.other[:, None])
    fall = (before - after).gather(1, y[:, None])
    torch.testing.assert_close(found.promotion, rise.detach())
    torch.testing.assert_close(found.suppression, fall.detach())
    assert found.residual.abs().max() < 1e-9


def test_removal_equals_a_loop_to_the_bit_for_any_chunk(bands: Classifier) -> None:
    x, x_adv, y = change_at_random(bands)
    regions = build_grid(12, 12, 5)

    found = measure_effects(bands, x, x_adv, y, regions)

    after = bands(x_adv).double()
    for g in range(int(regions.max()) + 1):
        less = bands(torch.where(regions == g, x, x_adv)).double()
        change = (less - after).gather(1, y[:, None])[:, 0]
        assert torch.equal(found.suppression[:, g], change.detach())
    for chunk in (1, 7):
        assert torch.equal(
            found.promotion, measure_effects(bands, x, x_adv, y, regions, chunk=chunk).promotion
        )


def test_removal_equals_captum(bands: Classifier) -> None:
    captum = pytest.importorskip(
        "captum.attr", exc_type=ImportError, reason="captum is not installed"
    )
    x, x_adv, y = change_at_random(bands)
    regions = build_grid(12, 12, 4)

    found = measure_effects(bands, x, x_adv, y, regions)

    ablation = captum.FeatureAblation(bands)
    for target, scores, sign in ((y, found.suppression, -1), (found.other, found.promotion, 1)):
        theirs = ablation.attribute(
            x_adv, baselines=x, target=target, feature_mask=regions[None, None]
        )
        torch.testing.assert_close(
            spread_over_pixels(scores, regions)[:, 0].float(),
            sign * theirs[:, 0],
            atol=1e-5,
            rtol=0,
        )


def test_regions_without_a_change_cost_no_call(bands: Classifier) -> None:
    """A sparse perturbation is cheap."""
    x = draw_uniform(2, 3, 12, 12)
    x_adv = x.clone()
    x_adv[:, :, 0, 0] = 1 - x_adv[:, :, 0, 0]
    calls: list[int] = []
    handle = bands.register_forward_hook(lambda _m, args, _o: calls.append(len(args[0])))

    found = measure_effects(
        bands, x, x_adv, predict_classes(bands(x)).detach(), build_grid(12, 12, 2)
    )
    handle.remove()

    assert calls == [2, 2, 2, 2]  # ours, before, after, one region of each image
    assert bool((found.suppression[:, 1:] == 0).all())


def kinds_of(pairs: list[tuple[float, float]], failed: bool = False) -> tuple[list[int], Tensor]:
    scores = torch.tensor(pairs, dtype=torch.float64)
    kinds, ratio = classify_regions(scores[None, :, 0], scores[None, :, 1], torch.tensor([failed]))
    return kinds[0].tolist(), ratio[0]


def test_types_follow_the_ratio_and_its_edges() -> None:
    """Suppression first, promotion second; exactly twice as much is still balanced."""
    kinds, ratio = kinds_of(
        [(1, 0), (0, 1), (1, 1), (1, 2), (2, 1), (1, 2.01), (2.01, 1), (0, 0), (-1, 0), (-1, -2)]
    )

    assert kinds[:7] == [
        SUPPRESSION,
        PROMOTION,
        BALANCED,
        BALANCED,
        BALANCED,
        PROMOTION,
        SUPPRESSION,
    ]
    assert kinds[7:] == [INACTIVE, COUNTER, COUNTER]
    assert ratio[:5].tolist() == [-math.inf, math.inf, 0, 1, -1]
    assert bool(ratio[7:].isnan().all())


def test_negative_scores_count_as_none_beside_positive_ones() -> None:
    kinds, ratio = kinds_of([(3, -5), (-5, 3), (1, -1e-9)])

    assert kinds == [SUPPRESSION, PROMOTION, SUPPRESSION]
    assert ratio.tolist() == [-math.inf, math.inf, -math.inf]


def test_nothing_is_typed_where_the_attack_failed_or_changed_nothing(bands: Classifier) -> None:
    x = draw_uniform(3, 3, 12, 12)
    y = predict_classes(bands(x)).detach()

    found = measure_effects(bands, x, x.clone(), y, build_grid(12, 12))

    assert bool(found.failed.all())
    assert bool((found.kinds == INACTIVE).all())
    assert bool(found.ratio.isnan().all())
    assert bool((found.strength == 0).all())
    assert bool((found.other != y).all())
    assert kinds_of([(1, 3)], failed=True)[0] == [INACTIVE]


def test_permuting_images_and_regions_permutes_the_scores(bands: Classifier) -> None:
    x, x_adv, y = change_at_random(bands)
    regions, order = build_grid(12, 12, 4), torch.tensor([3, 0, 5, 1, 4, 2])
    shuffle = torch.tensor([4, 2, 7, 0, 8, 1, 3, 6, 5])

    found = measure_effects(bands, x, x_adv, y, regions)
    moved = measure_effects(bands, x[order], x_adv[order], y[order], shuffle[regions])

    assert torch.equal(moved.promotion[:, shuffle], found.promotion[order])


def test_unfitting_shapes_and_modes_are_refused(bands: Classifier) -> None:
    x, x_adv, y = change_at_random(bands)
    for bad in ((x, x_adv[:2], build_grid(12, 12)), (x, x_adv, build_grid(12, 11))):
        with pytest.raises(ValueError, match="do not fit together"):
            measure_effects(bands, bad[0], bad[1], y, bad[2])
    with pytest.raises(ValueError, match="mode must be"):
        measure_effects(bands, x, x_adv, y, build_grid(12, 12), mode="both")  # type: ignore[arg-type]


def test_gradient_mode_ranks_regions_like_removal(bands: Classifier) -> None:
    """To first order, for a small change."""
    x, _, y = change_at_random(bands)
    x_adv = (x + 0.02 * (draw_uniform(6, 3, 12, 12, seed=4) - 0.5)).clamp(0, 1)
    quick, slow = (
        measure_effects(bands, x, x_adv, y, build_grid(12, 12, 3), mode=mode) for mode in modes()
    )

    both = torch.stack([quick.promotion.flatten(), slow.promotion.flatten()])
    assert torch.corrcoef(both)[0, 1] > 0.95


def modes() -> tuple[Mode, Mode]:
    return "gradient", "removal"


def test_strength_adds_what_is_positive() -> None:
    one = torch.tensor([[1.0, -2.0]])
    found = Effects(one, -one, one, one.long(), one, one[0].long(), one[0] > 0)

    assert found.strength.tolist() == [[1.0, 2.0]]
