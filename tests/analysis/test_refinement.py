"""What is left of a perturbation when only what matters is kept."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from toys import Affine, change_at_random, draw_uniform

from robusteval.models.classifier import Classifier, predict_classes
from robusteval.search.refinement import refine


def test_refinement_keeps_what_fools_and_only_that(bands: Classifier) -> None:
    """Verified anew, smaller in every norm, never outside of the original change."""
    x, x_adv, y = change_at_random(bands, 20)
    fooled = predict_classes(bands(x_adv)) != y
    assert int(fooled.sum()) > 5

    found = refine(bands, x, x_adv, y, (x_adv - x).abs().sum(1, keepdim=True))

    assert torch.equal(predict_classes(bands(found.x_adv)) != y, fooled)
    assert torch.equal(found.x_adv[~fooled], x_adv[~fooled])
    changed = found.x_adv != x
    assert bool(((found.x_adv == x_adv) | ~changed).all())
    assert bool((found.kept[fooled] < 1).any())
    for p in (1, 2, math.inf):
        before, after = ((z - x).flatten(1).norm(p=p, dim=1) for z in (x_adv, found.x_adv))
        assert bool((after <= before).all())


def test_refinement_finds_the_one_pixel_that_matters() -> None:
    """A linear model that looks at one place only."""
    weight = torch.zeros(2, 1, 8, 8)
    weight[1, 0, 3, 3] = 1
    model = Affine(weight)

    def biased(_module: nn.Module, _args: object, out: Tensor) -> Tensor:
        return out + torch.tensor([0.5, 0.0])

    model.register_forward_hook(biased)
    x = torch.zeros(1, 1, 8, 8)
    x_adv = draw_uniform(1, 1, 8, 8) * 0.1
    x_adv[0, 0, 3, 3] = 0.9

    found = refine(model, x, x_adv, torch.tensor([0]), weight[1:])

    assert (found.x_adv != 0).nonzero().tolist() == [[0, 0, 3, 3]]
    assert found.kept.item() == pytest.approx(1 / 64)
    aimed = refine(model, x, x_adv, torch.tensor([1]), weight[1:], targeted=True)
    assert torch.equal(aimed.x_adv, found.x_adv)
