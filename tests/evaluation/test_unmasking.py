"""Networks that mislead attacks: they are found, and attacked by what is made for them."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from planted_defects import (
    BatchStatistics,
    Dropout,
    Function,
    Jpeg,
    KWinners,
    Noise,
    Planted,
    Rounding,
    Threshold,
    plant_inline,
)
from torch import Tensor, nn
from toys import Bands, synthetic

from robusteval.datasets.arrays import from_arrays
from robusteval.datasets.dataset import Data
from robusteval.evaluation.active_test import PLANTED
from robusteval.evaluation.company import choose_company
from robusteval.evaluation.defense import ReadyDefense
from robusteval.evaluation.evaluate import evaluate
from robusteval.evaluation.false_gradients import Suspects, find_false_gradients
from robusteval.evaluation.plan import prepare_attack
from robusteval.evaluation.unmasking import Examination, examine, list_unmaskings
from robusteval.evaluation.votes import SURVIVAL, VOTES, Voted
from robusteval.models.classifier import Classifier
from robusteval.models.masked import mask_units
from robusteval.reports.build import build_record
from robusteval.runs.metrics import worst_case
from robusteval.runs.types import Run, Spec
from robusteval.search.stand_ins import Accompanied, Straight, hides_ends, match_layers

ATTACK = "apgd:eps=18/255,steps=20"


@pytest.fixture(scope="module")
def data() -> Data:
    return from_arrays(*synthetic(8, seed=7))


@pytest.fixture
def x(data: Data) -> Tensor:
    return data.batch(np.arange(4)).x


class Scaled(nn.Module):
    """The network with its normalisation, which stands behind what is planted."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network((x - 0.5) / 0.25)
        return logits


def classify(network: nn.Module) -> Classifier:
    return Classifier(network, num_classes=3).eval()


@pytest.fixture(scope="module")
def scaled(trained_bands: Bands) -> Scaled:
    return Scaled(trained_bands)


@pytest.fixture(scope="module")
def sound(scaled: Scaled, data: Data) -> Run:
    return evaluate(classify(scaled), data, [ATTACK])


def codes(run: Run) -> set[str]:
    return {finding.code for finding in run.findings}


def left(run: Run) -> int:
    return worst_case(run.attacks).k


def left_of(run: Run, other: Run) -> int:
    """Of the images of another run."""
    fallen = np.logical_or.reduce([outcome.success() for outcome in run.attacks])
    return int((~fallen & np.isin(run.clean["id"], other.clean["id"])).sum())


def names(run: Run) -> list[str]:
    return [str(outcome.attack) for outcome in run.attacks]


@pytest.mark.parametrize(
    ("layer", "blind"),
    [
        (Rounding(8), True),
        (Threshold(0.4), True),
        (Jpeg(0.15), True),
        (Function(torch.sign), True),
        (Function(lambda x: x.detach() * 2), True),
        (KWinners(0.5), False),
        (nn.Hardshrink(0.4), False),
        (Function(lambda x: (1e5 * (x - 0.4)).sigmoid()), False),
    ],
    ids=["round", "threshold", "jpeg", "sign", "detached", "winners", "shrink", "steep"],
)
def test_layers_are_found_by_what_they_do(
    scaled: Scaled, x: Tensor, layer: nn.Module, blind: bool
) -> None:
    found = find_false_gradients(classify(Planted(scaled, front=layer)), x)

    assert [(each.name, each.blind) for each in found.layers] == [("front", blind)]
    assert found.layers[0].error > 0.4
    assert found.steps == ()


@pytest.mark.parametrize(
    "layer",
    [
        *(nn.ReLU(), nn.GELU(), nn.Sigmoid(), nn.Hardswish(), nn.Softmax(1), nn.Tanh()),
        *(nn.MaxPool2d(3, 1, 1), nn.Dropout(0.5), nn.LeakyReLU(), nn.InstanceNorm2d(3)),
        *(Function(lambda x: x.clamp(0.31, 0.61)), Function(torch.zeros_like)),
        nn.Sequential(Function(lambda x: 0.5 * x), nn.Softshrink(0.6)),  # which rests
        *(Noise(0.1), Dropout(0.3), Function(lambda x: 1e-4 * x + 1)),
        nn.Sequential(Function(lambda x: x - 1.1), nn.ReLU()),  # which rests
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_sound_layers_are_left_alone(scaled: Scaled, x: Tensor, layer: nn.Module) -> None:
    """Whatever they are; constant ones and random ones are none of these."""
    found = find_false_gradients(classify(Planted(scaled, front=layer)), x)

    assert found == ((), ())


def test_operations_in_the_code_of_a_layer_are_found(scaled: Scaled, x: Tensor) -> None:
    """Rounding, and comparisons once they are made numbers, but no masks of gates."""

    def look(function: Callable[[Tensor], Tensor]) -> tuple[str, ...]:
        return find_false_gradients(classify(plant_inline(scaled, function)), x).steps

    assert look(Rounding(8).forward) == ("round",)
    assert look(lambda z: (z > 0.4).float()) == ("comparison",)
    assert look(lambda z: torch.where(z > 0.4, z, 0.1 * z)) == ()


class Clamped(nn.Module):
    """A network that brings images back into their range first, which changes none of them."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x.clamp(0, 1))
        return logits


def test_pixels_at_the_ends_of_a_clamp_are_followed(scaled: Scaled, x: Tensor) -> None:
    """Of black and white images nothing would be left; inside its range a clamp is sound."""
    clamped, ends = Clamped(scaled), x.round()
    name = ("clamp at its limits",) if hides_ends() else ()

    def find_slope(network: nn.Module) -> Tensor:
        image = ends.clone().requires_grad_()
        return torch.autograd.grad(network(image)[:, 0].sum(), image)[0]

    assert find_false_gradients(Classifier(clamped, num_classes=3).eval(), ends).steps == name
    inside = 0.1 + 0.8 * x
    assert find_false_gradients(Classifier(clamped, num_classes=3).eval(), inside).steps == ()
    torch.testing.assert_close(find_slope(Straight(clamped, [])), find_slope(scaled))


def test_steps_in_place_and_behind_a_layer_that_hides_are_followed(
    scaled: Scaled, x: Tensor
) -> None:
    """What `round_` does to the tensor itself, and rounding behind another that was found."""
    in_place = plant_inline(scaled, lambda z: (z * 8).round_() / 8)
    image = x.clone().requires_grad_()

    def find_slope(network: nn.Module) -> Tensor:
        return torch.autograd.grad(network(image)[:, 0].sum(), image)[0]

    assert find_false_gradients(classify(in_place), x).steps == ("round",)
    straight = plant_inline(scaled, lambda z: (8 * z + ((8 * z).round() - 8 * z).detach()) / 8)
    torch.testing.assert_close(find_slope(Straight(in_place, [])), find_slope(straight))

    later = Planted(plant_inline(scaled, Rounding(8).forward), front=Function(torch.sign))
    found = find_false_gradients(classify(later), x)
    assert [each.name for each in found.layers] == ["front"]
    assert found.steps == ("round",)


def test_numpy_inside_a_layer_is_no_gradient_and_is_led_past(scaled: Scaled, x: Tensor) -> None:
    """It refuses tensors on a graph: it is found, and followed as if it did not."""
    network = Planted(
        scaled, front=Function(lambda z: torch.from_numpy(np.round(8 * z.numpy()) / 8))
    )
    image = x.clone().requires_grad_()

    found = find_false_gradients(classify(network), x)
    logits = Straight(network, [network.front])(image)
    (grad,) = torch.autograd.grad(logits[:, 0].sum(), image)

    assert [(each.name, each.blind) for each in found.layers] == [("front", True)]
    assert bool(grad.flatten(1).any(1).all())
    torch.testing.assert_close(logits.detach(), network(x))


def test_a_sound_network_pays_next_to_nothing(scaled: Scaled, sound: Run, x: Tensor) -> None:
    """No finding, no attack of ours; fewer passes than one image of one attack takes."""
    passes = 0

    def count(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal passes
        passes += len(args[0])

    model = classify(scaled)
    handle = scaled.register_forward_pre_hook(count)
    find_false_gradients(model, x)
    handle.remove()

    assert codes(sound) == set()
    assert names(sound) == [ATTACK]
    assert passes <= 2 * 32  # two calls of a block
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_a_mask_on_an_activation_is_no_second_run_of_it(x: Tensor) -> None:
    """Layers are tried without the hooks of the pass, which count how often these run."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
        ).eval()
    masks = torch.tensor([1.0, 0.0, 1.0, 1.0])
    masked = mask_units(Classifier(network, num_classes=3).eval(), "1", masks)
    before = masked(x)

    assert find_false_gradients(masked, x) == Suspects((), ())
    assert torch.equal(masked(x), before)


@pytest.mark.parametrize(
    ("layer", "named"),
    [
        pytest.param(Rounding(8), "Rounding", id="round"),
        pytest.param(KWinners(0.5), "KWinners", id="winners", marks=pytest.mark.slow),
        pytest.param(Threshold(0.42), "front", id="threshold", marks=pytest.mark.slow),
        pytest.param(Jpeg(0.15), "Jpeg", id="jpeg", marks=pytest.mark.slow),
    ],
)
def test_a_masked_network_is_named_and_broken(
    scaled: Scaled, data: Data, sound: Run, layer: nn.Module, named: str
) -> None:
    """As the network without the defect, by an attack that ran by itself and passes the active
    test, which the one that was asked for fails."""
    run = evaluate(classify(Planted(scaled, front=layer)), data, [ATTACK])

    assert "false-gradient" in codes(run)
    assert "attack-too-weak" not in codes(run)
    assert f"unmask:eps=18/255,layers={named}" in names(run)
    assert left(run) <= left(sound) + 1
    found = {o.attack.name: o.success().mean() for o in run.outcomes if o.role == PLANTED}
    if found:  # of a network without any gradient the attack that was asked for has no result
        assert found["unmask"] > 0.95
        assert found["apgd"] < 0.9
    row = build_record(run).attacks[-1]
    assert row.name == "unmask"
    assert [stage.name for stage in row.stages][:1] == ["straight apgd"]


def test_what_outputs_hide_is_seen_through(scaled: Scaled, data: Data, sound: Run) -> None:
    """Softmax of logits so large that it is zero or one, and logits that are nearly equal."""
    steep = Planted(Planted(scaled, behind=Function(lambda z: 1000 * z)), behind=nn.Softmax(1))
    flat = Planted(scaled, behind=Function(lambda z: z / 1000))

    one = evaluate(classify(steep), data, [ATTACK], samples=3)
    other = evaluate(classify(flat), data, [ATTACK], samples=3)

    assert {"probabilities", "false-gradient"} <= codes(one)
    assert names(one)[-1] == "unmask:eps=18/255,layers=behind,outputs=probabilities"
    assert left(one) <= left_of(sound, one)
    assert "flat-logits" in codes(other)
    assert left(other) <= left_of(sound, other)


def test_without_probes_findings_are_grave_and_nothing_is_added(scaled: Scaled, data: Data) -> None:
    run = evaluate(classify(Planted(scaled, front=Rounding(8))), data, [ATTACK], probes=False)

    assert names(run) == [ATTACK]
    assert [f.grave for f in run.findings if f.code == "false-gradient"] == [True]


def test_an_attack_that_was_asked_for_is_not_run_twice(scaled: Scaled, data: Data) -> None:
    asked = "unmask:eps=18/255,layers=Rounding"
    run = evaluate(classify(Planted(scaled, front=Rounding(8))), data, [asked], samples=2)

    assert names(run) == [asked]


def test_what_a_defense_hides_the_undefended_network_shows(
    scaled: Scaled, data: Data, sound: Run
) -> None:
    """Transfer: a defense without any gradient falls to that of the network without it."""
    hidden = classify(plant_inline(scaled, lambda x: x.detach() + 0))
    defense = ReadyDefense(Spec("hide", {}), hidden, {"is": "hide"})

    run = evaluate(classify(scaled), data, [ATTACK], defenses=[defense])

    (made,) = (o for o in run.attacks if o.attack.name == "unmask")
    assert str(made.attack) == "unmask:eps=18/255,other=undefended"
    assert made.defense == defense.spec
    assert (made.attacked & ~made.success()).sum() <= left(sound)


def test_random_answers_are_judged_by_most_of_them(scaled: Scaled, data: Data) -> None:
    """An image's votes are its own; what most say counts, and how many are right is told."""
    noisy = classify(Planted(scaled, front=Noise(0.6)))
    voted, images = Voted(noisy), data.batch(np.arange(8)).x
    with torch.no_grad():
        shares, alone = voted(images).exp(), voted(images[3:4]).exp()

    torch.testing.assert_close(shares[3:4], alone)
    assert ((shares * VOTES).round() / VOTES - shares).abs().max() < 1e-3
    assert bool(((shares.amax(1) < 1) & (shares.amax(1) > 0.5)).any())

    run = evaluate(noisy, data, ["pgd:eps=18/255,steps=10"], samples=4)

    assert {"non-deterministic", "random-answers"} <= codes(run)
    assert names(run)[-1] == "unmask:eps=18/255,draws=20"
    assert all(SURVIVAL in outcome.columns for outcome in run.attacks)


def test_images_that_change_each_other_are_judged_in_one_company(
    scaled: Scaled, data: Data, sound: Run
) -> None:
    """An image's answer is its own then, and what makes use of the company breaks it."""
    x = data.batch(np.arange(8)).x
    mixed = classify(Planted(scaled, front=BatchStatistics(float(x.mean()), float(x.std()))))
    beside = Accompanied(mixed, choose_company(data))
    with torch.no_grad():
        together, alone = beside(x), beside(x[3:4])

    torch.testing.assert_close(together[3:4], alone, rtol=0, atol=0)
    assert mixed.block is None

    run = evaluate(mixed, data, [ATTACK], samples=4)

    assert [f.code for f in run.findings if f.grave] == ["company"]
    assert names(run)[-1] == "unmask:eps=18/255,company=15"
    assert left(run) <= left_of(sound, run)


def test_activations_written_by_hand_are_sound(scaled: Scaled, x: Tensor) -> None:
    """Their comparisons are gates; so is one whose threshold goes by its name."""
    by_hand = Function(lambda z: (z - 0.4) * (z > 0.4).float())
    by_name = Function(lambda z: z * torch.gt(z - 0.4, other=0.0).float() - 0.4)

    assert find_false_gradients(classify(Planted(scaled, front=by_hand)), x) == ((), ())
    assert find_false_gradients(classify(Planted(scaled, front=by_name)), x).layers != ()


def test_votes_are_an_image_s_own_whoever_draws(scaled: Scaled, x: Tensor) -> None:
    """NumPy and Python as well as torch, whose states stay what they were."""

    def draw(z: Tensor) -> Tensor:
        return z + 0.5 * (np.random.rand() + random.random() - 1)  # noqa: NPY002

    voted = Voted(classify(plant_inline(scaled, draw)))
    np.random.seed(3)  # noqa: NPY002
    expected = np.random.rand()  # noqa: NPY002
    np.random.seed(3)  # noqa: NPY002
    with torch.no_grad():
        first, again = voted(x), voted(x)

    torch.testing.assert_close(again, first, rtol=0, atol=0)
    assert np.random.rand() == expected  # noqa: NPY002


def test_randomness_is_seen_where_gradients_cannot_be_tried(scaled: Scaled, data: Data) -> None:
    """NumPy inside takes no gradient, which breaks the trial and not the examination."""
    numpy = plant_inline(scaled, lambda z: torch.from_numpy(z.numpy() * 1))
    model = classify(Planted(numpy, front=Noise(0.6)))

    assert examine(model, data, np.arange(4)).is_random


def test_a_layer_s_place_means_that_place_alone(x: Tensor) -> None:
    """And not the same number further down; a class means all of its layers."""
    inner = nn.Sequential(nn.Identity(), nn.Tanh())
    network = nn.Sequential(inner, nn.Hardshrink(), nn.Tanh())

    assert match_layers(classify(network), ["1"]) == [network[1]]
    assert match_layers(network, ["0.1"]) == [inner[1]]
    assert match_layers(network, ["Tanh"]) == [inner[1], network[2]]
    with pytest.raises(ValueError, match="no layer '3'"):
        match_layers(network, ["3"])


def test_an_attack_with_another_goal_takes_no_place(scaled: Scaled, data: Data) -> None:
    """Of the same radius, but to leave the class where the other is to reach one."""
    model, shape = classify(scaled), data.shape
    found = Examination(Suspects((), ("round",)))
    attacks = [
        prepare_attack(text, model, shape)
        for text in ("unmask:eps=0.1", "apgd:eps=0.1", "apgd:eps=0.1,targeted=true")
    ]

    assert [str(spec) for spec in list_unmaskings(found, attacks)] == [
        "unmask:targeted=true,eps=0.1"
    ]
