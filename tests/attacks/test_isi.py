"""The attack by input significance: closed forms, layer-wise relevance, and its errata."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from toys import Linear, late

from robusteval.models.classifier import Classifier, predict_classes
from robusteval.models.steps import count_passes
from robusteval.registry import ATTACKS, parse
from robusteval.search.balls import measure_distances, quantise
from robusteval.search.descent import count_changes

if TYPE_CHECKING:
    from robusteval.attacks.isi import isi, rank_values
else:
    isi = late("robusteval.attacks.isi", "isi")
    rank_values = late("robusteval.attacks.isi", "rank_values")

GREEDY: dict[str, Any] = {"values": 1, "undo": False, "prune": False}


class Affine(nn.Module):
    """Two logits, the first an affine function of two values, the second zero."""

    def __init__(self, weight: list[float], bias: float) -> None:
        super().__init__()
        self.weight = torch.tensor(weight)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        lead = (x.flatten(1) * self.weight).sum(1) + self.bias
        return torch.stack([lead, torch.zeros_like(lead)], 1)


class Valleys(nn.Module):
    """The lead of the first logit: a valley along the first value, a slope along the second.

    Seen from 0.5 the first promises more; at the bound it has gone up again.
    """

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.flatten(1).unbind(1)
        lead = 0.2 + 4 * (first - 0.6) ** 2 - 0.3 * second
        return torch.stack([lead, torch.zeros_like(lead)], 1)


class Deceptive(nn.Module):
    """No single value lowers the lead of the first logit, though the gradient says that all do."""

    def forward(self, x: Tensor) -> Tensor:
        lead = 1 + ((x - 0.6) ** 2).flatten(1).sum(1)
        return torch.stack([lead, torch.zeros_like(lead)], 1)


def two(first: float, second: float) -> Tensor:
    return torch.tensor([first, second]).view(1, 1, 1, 2)


def zeros(n: int = 1) -> Tensor:
    return torch.zeros(n, dtype=torch.int64)


def labels_of(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return predict_classes(model(x))


def images_of(bands: Classifier, count: int = 16) -> tuple[Tensor, Tensor]:
    x = quantise(torch.rand(count, 3, 12, 12, generator=torch.Generator().manual_seed(5)))
    return x, labels_of(bands, x)


def flips_needed(network: Linear, x: Tensor, y: Tensor) -> Tensor:
    """The least number of values ``(n,)`` to change: the most useful first, until it is enough."""
    weight, bias = network.weight.detach().double(), network.bias.detach().double()
    side = (x.double() * weight).flatten(1).sum(1) + bias  # positive for class 1
    down = torch.where(y == 1, 1.0, -1.0).view(-1, 1, 1, 1) * weight
    room = torch.where(down > 0, x.double(), 1 - x.double())
    gains = (down.abs() * room).flatten(1).sort(descending=True).values.cumsum(1)
    return (gains < side.abs().unsqueeze(1)).sum(1) + 1


@pytest.mark.parametrize("settings", [GREEDY, {"values": 1}, {}, {"values": 5}])
def test_a_linear_model_falls_to_the_least_number_of_changes(
    linear: Classifier, grey_images: Tensor, settings: dict[str, Any]
) -> None:
    """One by one without overshooting; more at a time and pruned."""
    network = linear.network
    assert isinstance(network, Linear)
    y = labels_of(linear, grey_images)

    x_adv = isi(linear, grey_images, y, **settings)

    assert labels_of(linear, x_adv).ne(y).all()
    needed = flips_needed(network, grey_images, y)
    assert count_changes(x_adv, grey_images, "l0").tolist() == needed.tolist()


def layers(bias: bool) -> list[tuple[Tensor, Tensor]]:
    """Weights and biases of a network of 8, 6 and 3 neurons, in float64."""
    draw = torch.Generator().manual_seed(3)
    shapes = [(6, 8), (6, 6), (3, 6)]
    return [
        (
            torch.randn(shape, generator=draw, dtype=torch.float64),
            torch.randn(shape[0], generator=draw, dtype=torch.float64) * bias,
        )
        for shape in shapes
    ]


def forward(network: list[tuple[Tensor, Tensor]], a: Tensor) -> list[Tensor]:
    """What enters each layer, and the logits."""
    states = [a]
    for i, (weight, bias) in enumerate(network):
        z = weight @ states[-1] + bias
        states.append(z if i == len(network) - 1 else z.relu())
    return states


def propagated(network: list[tuple[Tensor, Tensor]], a: Tensor, c: int) -> tuple[Tensor, float]:
    """Relevance of the inputs for logit c by the z-rule, neuron by neuron, and what biases took."""
    states = forward(network, a)
    upper = torch.zeros_like(states[-1])
    upper[c] = states[-1][c]
    absorbed = 0.0
    for (weight, bias), state in zip(reversed(network), reversed(states[:-1]), strict=True):
        lower = torch.zeros_like(state)
        for k in range(len(weight)):
            if upper[k] == 0:
                continue
            z = bias[k] + sum(state[j] * weight[k, j] for j in range(len(state)))
            for j in range(len(state)):
                lower[j] += state[j] * weight[k, j] * upper[k] / z
            absorbed += float(bias[k] * upper[k] / z)
        upper = lower
    return upper, absorbed


@pytest.mark.parametrize("bias", [True, False])
def test_relevance_is_layer_wise_propagation_on_a_relu_network(bias: bool) -> None:
    """LRP-0 by explicit loops; what it does not pass on, the biases have."""
    network, mean, std = layers(bias), 0.3, 0.2
    x = torch.rand(8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    z = x.clone().requires_grad_()
    output = forward(network, (z - mean) / std)[-1][1]
    grad, logit = torch.autograd.grad(output, z)[0], float(output.detach())

    found = rank_values("relevance", x, grad, x, mean)

    expected, absorbed = propagated(network, (x - mean) / std, 1)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)
    assert float(found.sum()) + absorbed == pytest.approx(logit, abs=1e-9)
    assert bias or absorbed == 0


def test_relevance_is_what_zennit_propagates() -> None:
    """Its epsilon rule with next to no epsilon, through convolution and max-pooling."""
    reason = "zennit is not installed"
    attribution = pytest.importorskip("zennit.attribution", reason=reason)
    composites = pytest.importorskip("zennit.composites", reason=reason)
    rules = pytest.importorskip("zennit.rules", reason=reason)
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3)
    ).double()
    x = torch.rand(2, 1, 8, 8, dtype=torch.float64) - 0.5
    chosen = torch.eye(3, dtype=torch.float64)[[2, 0]]
    rule = rules.Epsilon(1e-9)
    composite = composites.LayerMapComposite([(nn.Conv2d, rule), (nn.Linear, rule)])
    with attribution.Gradient(network, composite) as attributor:
        _, theirs = attributor(x, lambda logits: logits.detach() * chosen)
    z = x.clone().requires_grad_()
    grad = torch.autograd.grad((network(z) * chosen).sum(), z)[0]

    found = rank_values("relevance", x, grad, x, 0.0)

    torch.testing.assert_close(found, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("targeted", [False, True])
def test_linf_by_relevance_is_the_basic_iterative_method(bands: Classifier, targeted: bool) -> None:
    """On the logit, to the bit: the sign of gradient times input, times that of the input."""
    x, y = images_of(bands)
    y = (y + 1) % 3 if targeted else y
    expected = x.clone()
    for _ in range(4):
        z = expected.clone().requires_grad_()
        logits = bands(z)
        grad = torch.autograd.grad(logits.gather(1, y.unsqueeze(1)).sum(), z)[0]
        going = (predict_classes(logits.detach()) == y) != targeted
        moved = z.detach() + (0.01 if targeted else -0.01) * grad.sign()
        expected = torch.where(going.view(-1, 1, 1, 1), moved.clamp(0, 1), expected)

    x_adv = isi(bands, x, y, targeted=targeted, variant="paper", norm="linf", steps=4, step=0.01)

    assert torch.equal(x_adv, expected)
    assert not torch.equal(x_adv, x)


def test_a_value_at_zero_moves() -> None:
    """Erratum: the published flip, minus the sign of the value, leaves it at mid-grey."""
    model, x = Affine([1.0, 0.5], 0.1), two(0.5, 0.5)
    z = 2 * x - 1
    assert torch.equal(-z.sign(), z)  # the published update

    x_adv = isi(model, x, zeros(), variant="paper", steps=1)

    assert torch.equal(x_adv, two(0.0, 0.5))


@pytest.mark.parametrize("indicator", ["relevance", "sensitivity", "gain"])
def test_a_mid_grey_image_is_attacked_all_the_same(linear: Classifier, indicator: Any) -> None:
    """Nothing has any relevance at first."""
    network = linear.network
    assert isinstance(network, Linear)
    with torch.no_grad():
        network.bias.add_(1.0)  # or this image lies on the boundary
    x = torch.full((1, 1, 6, 5), 0.5)
    y = labels_of(linear, x)

    x_adv = isi(linear, x, y, variant="paper", indicator=indicator)

    assert labels_of(linear, x_adv).ne(y).all()


def test_sensitivity_wastes_steps_on_values_that_cannot_move() -> None:
    """Erratum: it does not ask how far there is to go; the gain does."""
    model, x = Affine([10.0, 1.0], 0.1), two(0.0, 0.8)  # the first is where it should be

    stuck = isi(model, x, zeros(), variant="paper", indicator="sensitivity", steps=1)
    moved = isi(model, x, zeros(), variant="paper", indicator="gain", steps=1)

    assert torch.equal(stuck, x)
    assert torch.equal(moved, two(0.0, 0.0))


def test_relevance_chooses_by_another_size_than_it_changes() -> None:
    """Erratum: by gradient times distance from grey, not times the way to the bound."""
    model, x = Affine([2.0, 1.0], 0.0), two(0.6, 0.9)  # relevance 0.2 and 0.4, gain 1.2 and 0.9

    by_relevance = isi(model, x, zeros(), variant="paper", steps=1)
    by_gain = isi(model, x, zeros(), variant="paper", indicator="gain", steps=1)

    assert torch.equal(by_relevance, two(0.6, 0.0))
    assert torch.equal(by_gain, two(0.0, 0.9))


def test_relevance_around_black_never_chooses_black(bands: Classifier) -> None:
    """Erratum: the published code needs data in [-1, 1] and does not say so."""
    x = torch.where(torch.arange(12) % 2 == 0, 0.0, 0.6).expand(4, 3, 12, 12).contiguous()
    y = labels_of(bands, x)
    settings: dict[str, Any] = {"variant": "paper", "steps": 10}

    around_black = isi(bands, x, y, centre="black", **settings)
    around_grey = isi(bands, x, y, **settings)

    assert torch.equal(around_black[x == 0], x[x == 0])
    assert not torch.equal(around_black, x)
    assert not torch.equal(around_grey[x == 0], x[x == 0])


def test_the_centre_of_a_model_is_its_mean(bands: Classifier) -> None:
    """Which is 0.5 here."""
    x, y = images_of(bands)

    found = [isi(bands, x, y, variant="paper", centre=c) for c in ("model", "grey", "black")]

    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_a_step_that_did_not_help_is_taken_back() -> None:
    """The published code keeps it, and here never succeeds."""
    model, x = Valleys(), two(0.5, 0.0)

    kept = isi(model, x, zeros(), variant="paper", indicator="gain", loss="margin")
    undone = isi(model, x, zeros(), steps=10, values=1, prune=False)

    assert torch.equal(kept, two(1.0, 1.0))
    assert labels_of(model, kept).tolist() == [0]
    assert torch.equal(undone, two(0.5, 1.0))
    assert labels_of(model, undone).tolist() == [1]


def test_after_some_steps_taken_back_one_stays() -> None:
    """Or the search would end in a dead end."""
    from robusteval.attacks.isi import PATIENCE

    x = torch.full((1, 1, 3, 4), 0.5)

    changed = [
        int(count_changes(isi(Deceptive(), x, zeros(), steps=steps, values=1), x, "l0"))
        for steps in (PATIENCE, PATIENCE + 1, PATIENCE + 2)
    ]

    assert changed == [0, 1, 1]


@pytest.mark.parametrize("norm", ["l0", "l0_pixels"])
@pytest.mark.parametrize("values", [1, 3])
@pytest.mark.parametrize("variant", ["paper", "improved"])
def test_few_values_change_and_go_to_a_bound(
    bands: Classifier, norm: Any, values: int, variant: Any
) -> None:
    """So an 8-bit image stays one."""
    x, y = images_of(bands)

    x_adv = isi(bands, x, y, variant=variant, norm=norm, values=values, steps=5)

    assert int(count_changes(x_adv, x, norm).max()) <= 5 * values
    changed = x_adv[x_adv != x]
    assert len(changed) > 0
    assert bool(((changed == 0) | (changed == 1)).all())
    assert torch.equal(quantise(x_adv), x_adv)


def test_all_channels_of_a_place_move_together(bands: Classifier) -> None:
    """Where they are not at their bound already."""
    x = torch.full((4, 3, 12, 12), 0.4)
    y = labels_of(bands, x)

    x_adv = isi(bands, x, y, norm="l0_pixels", steps=3, **GREEDY)

    assert torch.equal((x_adv != x).any(1), (x_adv != x).all(1))
    assert count_changes(x_adv, x, "l0_pixels").max() > 0


def test_under_l2_few_values_move_and_stay_in_the_box(bands: Classifier) -> None:
    """The published form leaves it."""
    x, y = images_of(bands)

    x_adv = isi(bands, x, y, norm="l2", values=7, steps=1, step=0.2, stop="float")

    assert int(count_changes(x_adv, x, "l0").max()) == 7
    assert bool(((x_adv >= 0) & (x_adv <= 1)).all())
    assert measure_distances(x_adv, x)["linf"].max() <= 0.2 + 1e-6


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("variant", ["paper", "improved"])
def test_a_radius_is_kept(bands: Classifier, norm: Any, variant: Any) -> None:
    """And binds: without it the images go further."""
    x, y = images_of(bands)
    target = (y + 1) % 3
    settings: dict[str, Any] = {"targeted": True, "variant": variant, "norm": norm}

    bounded = isi(bands, x, target, eps=0.05, **settings)
    unbounded = isi(bands, x, target, **settings)

    assert bool((measure_distances(bounded, x)[norm] <= 0.05).all())
    assert measure_distances(bounded, x)[norm].max() > 0.049
    assert measure_distances(unbounded, x)[norm].max() > 0.06


def test_the_threat_has_a_radius_only_if_one_was_given() -> None:
    """As published there is none."""
    entry = ATTACKS.entry("isi")
    threats = [
        entry.threat(ATTACKS.check_spec(parse(text)))
        for text in ("isi", "isi:norm=linf,variant=paper", "isi:norm=l2,eps=.5")
    ]

    assert [threat.norm for threat in threats] == ["l0", "linf", "l2"]
    assert [threat.eps for threat in threats] == [None, None, 0.5]


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_a_survivor_is_the_image_of_lowest_loss(norm: Any) -> None:
    """The published code returns the last, which may have overshot."""
    x = torch.full((1, 1, 3, 4), 0.5)
    settings: dict[str, Any] = {"norm": norm, "step": 0.3, "loss": "margin"}
    if norm == "l2":
        settings["values"] = 1

    paper = isi(Deceptive(), x, zeros(), variant="paper", steps=1, **settings)
    improved = isi(Deceptive(), x, zeros(), steps=1, **settings)

    assert not torch.equal(paper, x)
    assert torch.equal(improved, x)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_successes_are_8_bit_images(bands: Classifier, norm: Any) -> None:
    """Unless the published end is asked for, which comes no later."""
    x, y = images_of(bands, 32)

    with count_passes(bands, 32, x.device) as careful:
        x_adv = isi(bands, x, y, norm=norm)
    with count_passes(bands, 32, x.device) as quick:
        isi(bands, x, y, norm=norm, stop="float")

    fooled = labels_of(bands, x_adv) != y
    assert fooled.float().mean() > 0.9
    assert torch.equal(quantise(x_adv[fooled]), x_adv[fooled])
    assert bool((quick.backwards <= careful.backwards).all())


@pytest.mark.parametrize("norm", ["l0", "l0_pixels", "l2", "linf"])
def test_steps_cost_one_pass_each_and_one_more(bands: Classifier, norm: Any) -> None:
    """Forward; and no backward pass for the last. Images that were wrong cost no further."""
    x, y = images_of(bands, 4)
    wrong = torch.where(torch.arange(4) < 2, (y + 1) % 3, y)
    mask = torch.zeros(1, 1, 12, 12)
    mask[..., 0, 0] = 1  # too little to succeed with
    counted = norm in ("l0", "l0_pixels")
    settings: dict[str, Any] = {"prune": False} if counted else {"stop": "float"}

    with count_passes(bands, 4, x.device) as passes:
        x_adv = isi(bands, x, wrong, mask=mask, norm=norm, steps=6, **settings)

    assert passes.forwards.tolist() == [1, 1, 7, 7]
    assert passes.backwards.tolist() == [1, 1, 6, 6]
    assert torch.equal(x_adv[:2], x[:2])
    assert torch.equal(x_adv[..., 1:, :], x[..., 1:, :])


@pytest.mark.parametrize("norm", ["l0", "l0_pixels", "l2", "linf"])
def test_no_image_is_touched_after_its_first_success(bands: Classifier, norm: Any) -> None:
    """One step more changes only those that had none."""
    x, y = images_of(bands)
    target = (y + 1) % 3  # takes longer than any other class

    found = [
        isi(bands, x, target, targeted=True, variant="paper", norm=norm, steps=steps)
        for steps in range(1, 12)
    ]

    fooled = [labels_of(bands, x_adv) == target for x_adv in found]
    for i in range(len(found) - 1):
        moved = (found[i + 1] != found[i]).flatten(1).any(1)
        assert not bool((moved & fooled[i]).any())
        assert bool((moved | fooled[i]).all())
    assert any(0 < int(now.sum()) < len(x) for now in fooled)


@pytest.mark.parametrize("norm", ["l0", "l2", "linf"])
def test_images_that_have_the_target_come_back(bands: Classifier, norm: Any) -> None:
    """And so do those whose prediction is not their label, untargeted."""
    x, y = images_of(bands)

    settings: dict[str, Any] = {} if norm in ("l0", "l0_pixels") else {"stop": "float"}

    assert torch.equal(isi(bands, x, y, targeted=True, norm=norm, **settings), x)
    assert torch.equal(isi(bands, x, (y + 1) % 3, norm=norm, **settings), x)


@pytest.mark.parametrize(
    "settings",
    [
        {"norm": norm, "variant": variant}
        for norm in ("l0", "l0_pixels", "l2", "linf")
        for variant in ("paper", "improved")
        if (norm, variant) != ("l2", "paper")  # which can go no further than to grey
    ],
)
def test_every_image_reaches_its_own_target(bands: Classifier, settings: dict[str, Any]) -> None:
    """With steps enough."""
    x, y = images_of(bands, 12)
    target = (y + 1 + torch.arange(12) % 2) % 3

    x_adv = isi(bands, x, target, targeted=True, steps=150, **settings)

    assert labels_of(bands, x_adv).equal(target)


@pytest.mark.parametrize(
    "settings",
    [
        {"norm": "l0"},
        {"norm": "l0", "indicator": "sensitivity"},
        {"norm": "l0_pixels", "values": 3},
        {"norm": "l2"},
        {"norm": "linf", "eps": 0.1},
    ],
)
def test_published_results_do_not_depend_on_the_batch(
    bands: Classifier, settings: dict[str, Any]
) -> None:
    """One by one, in another order: the same bits."""
    x, y = images_of(bands, 8)
    order = torch.tensor([5, 0, 7, 2, 1, 6, 3, 4])

    together = isi(bands, x, y, variant="paper", **settings)
    alone = [isi(bands, x[i : i + 1], y[i : i + 1], variant="paper", **settings) for i in range(8)]

    assert torch.equal(torch.cat(alone), together)
    assert torch.equal(isi(bands, x[order], y[order], variant="paper", **settings), together[order])


def test_seeds_change_nothing(bands: Classifier) -> None:
    """There is no random number in it."""
    x, y = images_of(bands, 8)

    assert torch.equal(isi(bands, x, y, seeds=torch.arange(8)), isi(bands, x, y))


def test_the_improved_variant_needs_fewer_changes(bands: Classifier) -> None:
    """Of the images that both fool, and it fools no fewer."""
    x, y = images_of(bands, 64)

    paper, improved = isi(bands, x, y, variant="paper", steps=100), isi(bands, x, y)

    both = (labels_of(bands, paper) != y) & (labels_of(bands, improved) != y)
    count = [count_changes(x_adv, x, "l0")[both].double().mean() for x_adv in (paper, improved)]
    assert bool((labels_of(bands, improved) != y).all())
    assert count[1] < 0.9 * count[0]


def test_gradients_that_are_nan_do_no_harm() -> None:
    """Nor do logits."""

    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x.flatten(1)[:, :3] - 1).sqrt()

    x = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))

    for norm in ("l0", "l2", "linf"):
        x_adv = isi(Broken(), x, zeros(3), targeted=True, norm=norm, steps=3)
        assert bool(((x_adv >= 0) & (x_adv <= 1)).all())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "best"}, "variant must be one of improved, paper"),
        ({"norm": "l1"}, "norm must be one of l0, l0_pixels, l2, linf"),
        ({"indicator": "lrp"}, "indicator must be one of relevance, sensitivity, gain"),
        ({"loss": "ce"}, "loss must be one of logit, margin"),
        ({"centre": "white"}, "centre must be one of grey, black, model"),
        ({"indicator": "relevance", "centre": "model"}, "is for a Classifier"),
        ({"stop": "never"}, "stop must be one of 8bit, float"),
        ({"steps": 0}, "steps and values must be at least 1"),
        ({"values": 0}, "steps and values must be at least 1"),
        ({"norm": "l2", "step": 0.0}, "step must be above 0"),
        ({"norm": "linf", "step": 1.5}, "step must be above 0 and at most 1"),
        ({"norm": "linf", "eps": -0.1}, "eps must be from 0 to 1"),
        ({"norm": "l0", "eps": 3.0}, "eps does nothing unless norm=l2 or linf"),
        ({"norm": "l0_pixels", "step": 0.1}, "step does nothing unless norm=l2 or linf"),
        ({"norm": "l2", "prune": True}, "prune does nothing unless norm=l0 or l0_pixels"),
        ({"norm": "linf", "undo": True}, "undo does nothing unless norm=l0 or l0_pixels"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    """Before the first pass."""
    nothing = torch.empty(0, 1, 1, 2)

    with pytest.raises(ValueError, match=message):
        isi(Affine([1.0, 1.0], 0.0), nothing, zeros(0), **settings)
