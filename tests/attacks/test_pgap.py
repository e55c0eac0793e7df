"""`pgap` and `fpgap`: their promises kept by the images they return."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from robusteval.models.classifier import Classifier, predict_classes
from robusteval.models.steps import count_passes
from robusteval.registry import ATTACKS
from robusteval.search.balls import quantise
from robusteval.search.ssim_ball import mean_distance, structure_distance

BOTH = pytest.mark.parametrize("name", ["pgap", "fpgap"])


def attack(name: str, model: torch.nn.Module, x: Tensor, y: Tensor, **options: Any) -> Tensor:
    found = ATTACKS.load(name)(model, x, y, **options)
    assert isinstance(found, Tensor)
    return found


def labels_of(model: Classifier, x: Tensor) -> Tensor:
    with torch.no_grad():
        return predict_classes(model(x))


@pytest.fixture
def images() -> Tensor:
    """Sixteen 8-bit 3x12x12 images, a third of their values black or white."""
    x = torch.rand(16, 3, 12, 12, generator=torch.Generator().manual_seed(5))
    return quantise((1.5 * x - 0.25).clamp(0, 1))


def s2(x: Tensor, x_adv: Tensor) -> Tensor:
    return structure_distance(x.flatten(1), x_adv.flatten(1))


def drift(x: Tensor, x_adv: Tensor) -> float:
    return float((x_adv - x).double().flatten(1).mean(1).abs().max())


@BOTH
@pytest.mark.parametrize("targeted", [False, True])
def test_every_image_is_fooled_within_fifty_steps(
    bands: Classifier, images: Tensor, name: str, targeted: bool
) -> None:
    """And is still after rounding to 8 bits."""
    y = labels_of(bands, images)
    goal = (y + 1) % 3 if targeted else y

    x_adv = attack(name, bands, images, goal, targeted=targeted, eps2=0.05)

    for z in (x_adv, quantise(x_adv)):
        assert bool((labels_of(bands, z) == goal).eq(targeted).all())
    assert bool(((x_adv >= 0) & (x_adv <= 1)).all())
    assert (x_adv.dtype, x_adv.shape) == (torch.float32, images.shape)


@pytest.mark.parametrize("stats", ["global", "channel"])
@pytest.mark.parametrize("eps2", [0.002, 0.05, 0.2])
def test_a_step_of_pgap_keeps_mean_ball_and_box(
    bands: Classifier, images: Tensor, eps2: float, stats: str
) -> None:
    """1e-5 of the mean, 1e-6 of S2, nothing of the box; per channel if so asked."""
    y = labels_of(bands, images)

    x_adv = attack("pgap", bands, images, y, eps2=eps2, steps=1, stats=stats, stop="never")

    a, b = (
        z.flatten(2).flatten(0, 1) if stats == "channel" else z.flatten(1) for z in (images, x_adv)
    )
    assert not torch.equal(x_adv, images)
    assert float((a.double().mean(1) - b.double().mean(1)).abs().max()) < 1e-5
    torch.testing.assert_close(
        1 - structure_distance(a, b).square(),
        torch.full((len(a),), 1 - eps2**2).double(),
        atol=1e-6,
        rtol=0,
    )
    assert bool(((x_adv >= 0) & (x_adv <= 1)).all())


def test_clipping_the_closed_form_does_not(bands: Classifier, images: Tensor) -> None:
    """Erratum: the published steps are clipped afterwards."""
    y = labels_of(bands, images)

    x_adv = attack("pgap", bands, images, y, eps2=0.3, steps=1, solver="closed", stop="never")

    assert drift(images, x_adv) > 1e-4


def test_the_fast_form_moves_the_mean_and_keeps_s2(bands: Classifier) -> None:
    """Erratum: the other way round than the paper has it."""
    x = 0.3 + 0.4 * torch.rand(8, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    y = labels_of(bands, x)

    x_adv = attack("fpgap", bands, x, y, eps2=0.05, steps=1, stop="never")

    assert bool((s2(x, x_adv) <= 0.05 + 1e-6).all())
    assert bool((mean_distance(x.flatten(1), x_adv.flatten(1)) > 1e-5).all())


@BOTH
def test_the_printed_constants_violate_s2(bands: Classifier, images: Tensor, name: str) -> None:
    """Erratum: S2 of 0.99997 was asked for."""
    y = labels_of(bands, images)

    x_adv = attack(name, bands, images, y, eps2=0.005, steps=1, printed_constants=True)

    assert bool((1 - s2(images, x_adv).square() < 0.9).all())


def test_from_the_original_the_result_itself_keeps_to_the_ball(
    bands: Classifier, images: Tensor
) -> None:
    """After any number of steps; from the iterate before, n steps lead n times as far."""
    y = labels_of(bands, images)
    options: dict[str, Any] = {"eps2": 0.02, "steps": 8, "stop": "never"}

    original = attack("pgap", bands, images, y, reference="original", **options)
    previous = attack("pgap", bands, images, y, **options)

    assert bool((s2(images, original) <= 0.02 + 1e-6).all())
    assert bool((s2(images, original) > 0.019).all())
    assert drift(images, original) < 1e-5
    assert bool((s2(images, previous) <= 8 * 0.02 + 1e-6).all())
    assert bool((s2(images, previous) > 0.1).all())


def test_the_fast_form_from_the_original_keeps_s2(bands: Classifier) -> None:
    """Away from black and white."""
    x = 0.3 + 0.4 * torch.rand(8, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    y = labels_of(bands, x)

    x_adv = attack("fpgap", bands, x, y, eps2=0.05, steps=8, reference="original", stop="never")

    assert bool((s2(x, x_adv) <= 0.05 + 1e-6).all())


def test_a_small_eps2_changes_little(bands: Classifier, images: Tensor) -> None:
    """Least of all beyond a grey level."""
    y = labels_of(bands, images)
    for name in ("pgap", "fpgap"):
        x_adv = attack(name, bands, images, y, eps2=1e-5, steps=3)
        assert float((x_adv - images).abs().max()) < 1e-3


def test_the_search_ends_at_the_first_label_change_if_asked(
    bands: Classifier, images: Tensor
) -> None:
    """As published; `8bit` goes on for those that rounding would undo."""
    y = labels_of(bands, images)
    survived, cost = {}, {}
    for stop in ("float", "8bit", "never"):
        with count_passes(bands, len(images), images.device) as passes:
            x_adv = attack("pgap", bands, images, y, eps2=0.003, stop=stop, steps=60)
        survived[stop] = int((labels_of(bands, quantise(x_adv)) != y).sum())
        cost[stop] = int(passes.backwards.sum())

    assert cost["float"] <= cost["8bit"] < cost["never"] == 60 * 16
    assert survived["float"] <= survived["8bit"] == 16


@BOTH
def test_finished_images_cost_no_pass(bands: Classifier, images: Tensor, name: str) -> None:
    """What is wrong from the start is returned, for one forward and one backward pass."""
    y = labels_of(bands, images[:4])
    wrong = torch.where(torch.arange(4) < 2, (y + 1) % 3, y)

    with count_passes(bands, 4, images.device) as passes:
        x_adv = attack(name, bands, images[:4], wrong, eps2=1e-5, steps=10, stop="float")

    assert torch.equal(x_adv[:2], images[:2])
    assert passes.backwards.tolist() == [1, 1, 10, 10]
    assert passes.forwards.tolist() == [1, 1, 11, 11]


@BOTH
@pytest.mark.parametrize("reference", ["previous", "original"])
@pytest.mark.parametrize("stats", ["global", "channel"])
def test_a_result_does_not_depend_on_the_batch(
    bands: Classifier, images: Tensor, name: str, reference: str, stats: str
) -> None:
    """Together, one by one, or in another order: the same bits."""
    y = labels_of(bands, images)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))

    def found(some: Tensor) -> Tensor:
        options: dict[str, Any] = {"reference": reference, "stats": stats, "steps": 8}
        return attack(name, bands, images[some], y[some], eps2=0.02, **options)

    together = found(torch.arange(16))

    assert torch.equal(torch.cat([found(torch.tensor([i])) for i in range(16)]), together)
    assert torch.equal(found(order), together[order])


@BOTH
@pytest.mark.parametrize("stats", ["global", "channel"])
def test_masked_pixels_stay(bands: Classifier, images: Tensor, name: str, stats: str) -> None:
    """To the bit, and one step of `pgap` still keeps the mean of the whole image."""
    y = labels_of(bands, images)
    mask = torch.ones(1, 1, 12, 12)
    mask[..., :6] = 0

    x_adv = attack(name, bands, images, y, mask=mask, eps2=0.05, steps=1, stats=stats, stop="never")

    assert torch.equal(x_adv[..., :6], images[..., :6])
    assert not torch.equal(x_adv[..., 6:], images[..., 6:])
    assert name == "fpgap" or drift(images, x_adv) < 1e-6


@BOTH
def test_a_model_without_gradient_leaves_the_images(images: Tensor, name: str) -> None:
    """Zero, or not a number: no direction, and no pixel that is not one."""

    class Flat(torch.nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.value = value

        def forward(self, x: Tensor) -> Tensor:
            logits = torch.tensor([1.0, 0.0, 0.0]).expand(len(x), 3)
            return logits + self.value * x.flatten(1).sum(1, keepdim=True)

    y = torch.zeros(16, dtype=torch.int64)
    for value in (0.0, math.nan):
        assert torch.equal(attack(name, Flat(value), images, y, steps=3), images)


def test_kappa_ends_the_gain(linear: Classifier, grey_images: Tensor) -> None:
    """Beyond this margin no step is taken any more."""
    y = labels_of(linear, grey_images)
    margins = {}
    for kappa in (0.0, 0.5, 50.0):
        x_adv = attack(
            "pgap", linear, grey_images, y, eps2=0.02, steps=50, kappa=kappa, stop="never"
        )
        with torch.no_grad():
            logits = linear(x_adv)
        margins[kappa] = (logits.gather(1, 1 - y[:, None]) - logits.gather(1, y[:, None])).min()

    assert 0 <= margins[0.0] < 0.5 <= margins[0.5] < margins[50.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps2": 0.0}, "eps2 must lie between 0 and 1"),
        ({"eps2": 1.0}, "eps2 must lie between 0 and 1"),
        ({"eps2": -0.1}, "eps2 must lie between 0 and 1"),
        ({"eps2": math.nan}, "eps2 must lie between 0 and 1"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"kappa": -1.0}, "kappa must be 0 or more"),
        ({"reference": "last"}, "reference must be one of previous, original"),
        ({"stats": "patch"}, "stats must be one of global, channel"),
        ({"stop": "early"}, "stop must be one of 8bit, float, never"),
        ({"solver": "qcqp"}, "solver must be one of box, closed"),
    ],
)
def test_parameters_out_of_range_are_refused_on_an_empty_batch(
    bands: Classifier, options: dict[str, Any], message: str
) -> None:
    """One sentence that names the parameter."""
    x, y = torch.empty(0, 3, 12, 12), torch.empty(0, dtype=torch.int64)
    for name in ("pgap",) if "solver" in options else ("pgap", "fpgap"):
        with pytest.raises(ValueError, match=message):
            attack(name, bands, x, y, **options)


@BOTH
def test_the_threat_is_ssim_without_a_radius(name: str) -> None:
    """Each image is taken as far as it needs."""
    from robusteval.registry import parse
    from robusteval.runs.types import Threat

    spec = ATTACKS.check_spec(parse(f"{name}:eps2=.01,reference=original,stats=channel"))

    assert ATTACKS.entry(name).threat(spec) == Threat("ssim", None, False)


@pytest.mark.parametrize("reference", ["previous", "original"])
def test_the_mean_moves_as_far_as_eps1_lets_it(
    bands: Classifier, images: Tensor, reference: str
) -> None:
    """One step, or all of them from the original: S1 and S2 both hold, and S1 is used."""
    y = labels_of(bands, images)
    given = {"eps2": 0.05, "reference": reference, "stop": "never"}
    given |= {"steps": 1 if reference == "previous" else 5}

    still, moved = (attack("pgap", bands, images, y, eps1=e, **given) for e in (0.0, 0.03))

    assert drift(images, still) < 1e-5
    s1 = mean_distance(images.flatten(1), moved.flatten(1))
    assert 0.02 < s1.max() <= 0.03 + 1e-5
    assert (s2(images, moved) <= 0.05 + 1e-5).all()
    with pytest.raises(ValueError, match="eps1 must be from 0 to below 1"):
        attack("pgap", bands, images[:0], y[:0], eps1=1.0)
