"""Where perturbations lie, against closed forms and chance."""

from __future__ import annotations

import math

import pytest
import torch
from toys import draw_uniform

from robusteval.analysis.focus import choose_top, remark_same_maps, score_focus
from robusteval.search.refinement import rank_pixels


def test_ranks_and_tops_do_not_depend_on_scale() -> None:
    maps = draw_uniform(2, 1, 10, 10)

    assert rank_pixels(maps).amax() < 1
    assert torch.equal(rank_pixels(maps), rank_pixels(5 * maps - 3))
    for share in (0.0, 0.2, 1.0):
        assert choose_top(maps, share).flatten(1).sum(1).tolist() == [100 * share] * 2
    with pytest.raises(ValueError, match="from 0 to 1"):
        choose_top(maps, 1.1)


def test_focus_of_whole_no_and_half_regions_is_known() -> None:
    delta = draw_uniform(2, 3, 8, 8) - 0.5
    full = torch.ones(2, 1, 8, 8, dtype=torch.bool)

    assert score_focus(delta, full).score.tolist() == pytest.approx([1, 1])
    assert score_focus(delta, ~full).score.tolist() == [0, 0]
    half = full.clone()
    half[..., :4] = False
    found = score_focus(delta, half)
    expected = delta[..., 4:].flatten(1).norm(dim=1) / delta.flatten(1).norm(dim=1)
    torch.testing.assert_close(found.score, expected.double())
    torch.testing.assert_close(score_focus(7 * delta, half).score, found.score)
    assert found.area.tolist() == [0.5, 0.5]


def test_noise_scores_the_root_of_the_area_and_is_not_focused() -> None:
    n = 40
    delta = torch.randn(n, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    inside = choose_top(draw_uniform(n, 1, 24, 24), 0.2)

    found = score_focus(delta, inside)

    assert found.chance[0] == pytest.approx(math.sqrt(0.2), abs=2e-3)
    assert float(found.score.mean()) == pytest.approx(math.sqrt(0.2), abs=0.01)
    assert float(found.focused.double().mean()) < 0.2


def test_a_perturbation_inside_its_own_region_is_focused() -> None:
    n = 4
    inside = torch.zeros(n, 1, 12, 12, dtype=torch.bool)
    for i in range(n):
        inside[i, :, 3 * i : 3 * i + 3, 4:7] = True
    delta = draw_uniform(n, 3, 12, 12) * inside

    found = score_focus(delta, inside)

    assert found.score.tolist() == pytest.approx([1] * n)
    assert found.elsewhere.tolist() == [0] * n
    assert bool(found.focused.all())


def test_focus_of_no_change_is_undefined_without_a_warning() -> None:
    nothing = torch.zeros(1, 3, 8, 8)

    found = score_focus(nothing, choose_top(draw_uniform(1, 1, 8, 8), 0.2))

    assert bool(found.score.isnan().all())
    assert not bool(found.focused.any())
    assert bool(found.elsewhere.isnan().all())


def test_maps_that_differ_by_scale_and_sign_alone_count_as_one() -> None:
    """A rectified map on another scale is the same; one that differs in one image is not."""
    one = draw_uniform(3, 1, 4, 4) - 0.5
    rectified, other = 7 * one.clamp_min(0), one.clone()
    other[2, 0, 1, 1] = 2

    (remark,) = remark_same_maps({"a": {"v": one}, "b": {"v": rectified}, "c": {"v": other}})

    assert remark.startswith("a and b are the same map")
