"""The l0 attacks: known optima, a second implementation of each, and every published defect."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
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
    from robusteval.attacks.sigma_zero import differentiate_count, sigma_zero
    from robusteval.attacks.sparse import sparse
else:
    differentiate_count = late("robusteval.attacks.sigma_zero", "differentiate_count")
    sigma_zero = late("robusteval.attacks.sigma_zero", "sigma_zero")
    sparse = late("robusteval.attacks.sparse", "sparse")

SPECS = ("sigma_zero", "sparse", "sparse:variant=paper")
UNIT, TAU, STEP = 6 / 255, 0.45, 1000.0  # as published


class Side(nn.Module):
    """Two logits from given weights: an image is class 1 where their sum exceeds the bias."""

    def __init__(self, weight: Tensor, bias: float, scale: float = 1.0) -> None:
        super().__init__()
        self.weight, self.bias, self.scale = weight, bias, scale

    def forward(self, x: Tensor) -> Tensor:
        side = self.scale * ((x * self.weight).flatten(1).sum(1) - self.bias)
        return torch.stack([-side, side], 1)


def labels_of(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return predict_classes(model(x))


def run(text: str, model: nn.Module, x: Tensor, y: Tensor, **more: Any) -> Tensor:
    spec = ATTACKS.check_spec(parse(text))
    found = ATTACKS.load(spec.name)(model, x, y, **spec.parameters, **more)
    assert isinstance(found, Tensor)
    return found


def images_of(bands: Classifier, count: int = 8, seed: int = 5) -> tuple[Tensor, Tensor]:
    x = quantise(torch.rand(count, 3, 12, 12, generator=torch.Generator().manual_seed(seed)))
    return x, labels_of(bands, x)


def count_of(values: Tensor) -> int:
    return int(values.count_nonzero())


def fewest(linear: Linear, x: Tensor) -> int:
    """How many values of one image must change to cross the hyperplane, the box respected."""
    weight = linear.weight.detach()
    side = float((x * weight).sum() + linear.bias.detach())
    towards = -side * weight
    gain = (weight.abs() * torch.where(towards > 0, 1 - x, x)).flatten().sort(descending=True)
    return int((gain.values.cumsum(0) <= abs(side)).sum()) + 1


@pytest.mark.parametrize("text", ["sigma_zero", "sparse"])
def test_of_a_linear_model_the_fewest_possible_values_change(
    linear: Classifier, grey_images: Tensor, text: str
) -> None:
    """Those of largest weight times room."""
    y = labels_of(linear, grey_images)
    assert isinstance(linear.network, Linear)

    x_adv = run(text, linear, grey_images, y)

    assert labels_of(linear, x_adv).ne(y).all()
    optimum = [fewest(linear.network, x) for x in grey_images]
    assert count_changes(x_adv, grey_images, "l0").tolist() == optimum


@pytest.mark.parametrize("text", SPECS)
def test_a_single_value_that_suffices_is_found(text: str) -> None:
    """Whichever it is; one change cannot become fewer, so that image is done."""
    weight = torch.full((1, 4, 4), 0.1)
    x = torch.full((3, 1, 4, 4), 0.5)
    for place in (0, 6, 15):
        one = weight.clone()
        one.flatten()[place] = 20.0
        model = Classifier(Side(one, 11.0, 0.3), num_classes=2).eval()
        y = labels_of(model, x)

        with count_passes(model, 3, x.device) as passes:
            x_adv = run(text, model, x, y)

        assert labels_of(model, x_adv).ne(y).all()
        assert (x_adv != x)[:, 0].flatten(1).nonzero()[:, 1].tolist() == [place] * 3
        assert passes.backwards.max() < 150


@pytest.mark.parametrize("text", ["sigma_zero", "sparse"])
def test_places_instead_of_values_may_be_counted(text: str) -> None:
    """One place of three weak channels, or two strong values at two places."""
    weight = torch.full((3, 4, 4), 0.02)
    weight[:, 1, 2] = 1.0
    weight[0, 0, 0] = weight[1, 3, 3] = 1.4
    x = torch.zeros(1, 3, 4, 4)
    model = Classifier(Side(weight, 2.5), num_classes=2).eval()
    y = labels_of(model, x)

    by_value, by_place = (run(text, model, x, y, norm=norm) for norm in ("l0", "l0_pixels"))

    assert [count_changes(by_value, x, c).item() for c in ("l0", "l0_pixels")] == [2, 2]
    assert [count_changes(by_place, x, c).item() for c in ("l0", "l0_pixels")] == [3, 1]


@pytest.mark.parametrize("text", SPECS)
def test_counts_are_those_of_the_result(bands: Classifier, text: str) -> None:
    """Not of some weights: no more places than values, no more values than channels allow."""
    x, y = images_of(bands)

    measured = measure_distances(run(text, bands, x, y, steps=60), x)

    values, places = measured["l0"], measured["l0_pixels"]
    assert bool(((places <= values) & (values <= 3 * places)).all())
    assert values.max() < 0.5 * 432


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("text", SPECS)
def test_a_result_succeeds_or_is_the_original(bands: Classifier, text: str, targeted: bool) -> None:
    """Never the dense start; and most succeed."""
    x, y = images_of(bands)
    y = (y + 1) % 3 if targeted else y

    x_adv = run(text, bands, x, y, targeted=targeted)

    success = (labels_of(bands, x_adv) == y) == targeted
    unchanged = (x_adv == x).flatten(1).all(1)
    assert torch.equal(success, ~unchanged)
    # the published search has little room: half the range, one direction
    assert success.sum() >= (8 if "paper" not in text else 2)


@pytest.mark.parametrize("text", SPECS)
def test_changed_values_are_8_bit_and_the_others_stay_to_the_bit(
    bands: Classifier, text: str
) -> None:
    """Also of images that lie between the grey levels."""
    x = torch.rand(8, 3, 12, 12, generator=torch.Generator().manual_seed(5))

    x_adv = run(text, bands, x, labels_of(bands, x), steps=60)

    changed = x_adv != x
    assert changed.any()
    assert torch.equal(quantise(x_adv)[changed], x_adv[changed])


@pytest.mark.parametrize("text", SPECS)
def test_images_that_are_wrong_already_come_back_after_one_pass(
    bands: Classifier, text: str
) -> None:
    """The authors' search accepts every iterate of them and ends with an almost empty change."""
    x, y = images_of(bands, 4)
    wrong = torch.where(torch.arange(4) < 2, (y + 1) % 3, y)

    with count_passes(bands, 4, x.device) as passes:
        x_adv = run(text, bands, x, wrong, steps=5, polish=0)

    assert torch.equal(x_adv[:2], x[:2])
    assert passes.forwards[:2].tolist() == [1, 1]
    assert passes.backwards[:2].tolist() == [1, 1]


@pytest.mark.parametrize("text", SPECS)
def test_a_model_without_a_gradient_gets_its_images_back(text: str) -> None:
    """There is nothing to follow and nothing to divide by."""
    model = Classifier(Side(torch.zeros(1, 4, 4), 1.0), num_classes=2).eval()
    x = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))

    assert torch.equal(run(text, model, x, labels_of(model, x)), x)


@pytest.mark.parametrize("text", SPECS)
def test_passes_are_one_forward_and_one_backward_a_step(bands: Classifier, text: str) -> None:
    """Two hundred steps and thirty passes of pruning; one forward pass ends either stage."""
    x, y = images_of(bands)
    most = {
        "sigma_zero": (301 + 30, 300 + 29),
        "sparse": (201 + 30, 200 + 29),
        "sparse:variant=paper": (10 + 1 + 201 + 1, 10 + 200),
    }

    with count_passes(bands, len(x), x.device) as passes:
        run(text, bands, x, y)

    forwards, backwards = most[text]
    assert passes.forwards.max() <= forwards
    assert passes.backwards.max() <= backwards


@pytest.mark.parametrize("text", ["sparse:polish=0", "sparse:variant=paper"])
def test_longer_searches_never_end_with_more_changes(bands: Classifier, text: str) -> None:
    """The sparsest success so far is kept."""
    x, y = images_of(bands)
    before = torch.full((8,), torch.inf)

    for steps in (10, 40, 160):
        size = count_changes(run(text, bands, x, y, steps=steps), x, "l0").float()
        size = size.masked_fill(size == 0, torch.inf)
        assert bool((size <= before).all())
        before = size


@pytest.mark.parametrize("text", SPECS)
def test_a_batch_as_large_as_an_image_is_high_is_no_special_case(
    bands: Classifier, text: str
) -> None:
    """The authors' code broadcasts rows of pixels against images there, and fails elsewhere."""
    x, y = images_of(bands, 12)
    seeds = torch.arange(12) * 1000

    together = run(text, bands, x, y, seeds=seeds, steps=20, polish=5)

    for i in range(0, 12, 4):
        part = slice(i, i + 1)
        alone = run(text, bands, x[part], y[part], seeds=seeds[part], steps=20, polish=5)
        assert torch.equal(alone, together[part])


@pytest.mark.parametrize("text", SPECS)
def test_memory_format_does_not_matter(bands: Classifier, text: str) -> None:
    """A widely used library's l0 attack goes wrong on channels-last images."""
    x, y = images_of(bands, 4)

    expected = run(text, bands, x, y, steps=30)

    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(run(text, bands, last, y, steps=30), expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sigma_zero:steps=0", "steps must be at least 1"),
        ("sigma_zero:polish=-1", "polish"),
        ("sigma_zero:rate=0", "rate and threshold must be from 0 to 1"),
        ("sigma_zero:threshold=2", "rate and threshold must be from 0 to 1"),
        ("sparse:steps=0", "steps and rounds must be at least 1"),
        ("sparse:variant=paper,rounds=0", "steps and rounds must be at least 1"),
        ("sparse:tau=1.5", "tau must be from 0 to 1"),
        ("sparse:unit=0", "unit above 0"),
        ("sparse:step=0", "step must be positive"),
        ("sparse:polish=-1", "polish must be 0 or more"),
    ],
)
def test_settings_out_of_range_are_refused_before_there_is_an_image(
    bands: Classifier, text: str, message: str
) -> None:
    nothing = torch.empty(0, 3, 12, 12)

    with pytest.raises(ValueError, match=message):
        run(text, bands, nothing, torch.empty(0, dtype=torch.int64))


@pytest.mark.parametrize("name", ["sigma_zero", "sparse"])
def test_words_that_mean_nothing_are_refused(bands: Classifier, name: str) -> None:
    nothing, none = torch.empty(0, 3, 12, 12), torch.empty(0, dtype=torch.int64)

    with pytest.raises(ValueError, match="norm must be one of l0, l0_pixels"):
        ATTACKS.load(name)(bands, nothing, none, norm="l2")
    if name == "sparse":
        with pytest.raises(ValueError, match="variant must be one of scaled, paper"):
            sparse(bands, nothing, none, variant="better")  # type: ignore[arg-type]


def test_minimum_distance_attacks_have_no_radius() -> None:
    """Though the published method has an epsilon: it is a unit, not a budget."""
    for text in SPECS:
        spec = ATTACKS.check_spec(parse(text))
        assert ATTACKS.entry(spec.name).threat(spec) == ("l0", None, False)


# sigma-zero


def test_the_gradient_of_the_smooth_count_is_that_of_its_formula() -> None:
    """Mean of d2 / (d2 + sigma) over the values, or over the places."""
    delta = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()

    square = delta.square()
    for count, size in (("l0", square), ("l0_pixels", square.sum(1))):
        smooth = (size / (size + 1e-3)).flatten(1).mean(1)
        expected = torch.autograd.grad(smooth.sum(), delta, retain_graph=True)[0]
        actual = differentiate_count(delta.detach(), count)  # type: ignore[arg-type]
        torch.testing.assert_close(actual, expected)


def plain_sigma_zero(model: nn.Module, x: Tensor, label: int, steps: int) -> Tensor:
    """The published algorithm for one image, with torch's own Adam and cosine."""
    delta = torch.zeros_like(x, requires_grad=True)
    optimiser = torch.optim.Adam([delta], lr=1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps, eta_min=0.1)
    threshold, best, fewest_yet = 0.3, x, float("inf")
    for i in range(steps + 1):
        near = x + delta
        rounded = torch.where(near == x, x, quantise(near.detach()))
        logits = model(near + (rounded - near).detach())[0]
        fooled = int(logits.argmax()) != label
        size = count_of(rounded != x)
        if fooled and size < fewest_yet:
            best, fewest_yet = rounded.detach(), size
        if i == steps:
            break
        others = torch.cat([logits[:label], logits[label + 1 :]])
        hinge = torch.relu(logits[label] - others.max())
        count = (delta.square() / (delta.square() + 1e-3)).mean()
        optimiser.zero_grad()
        (hinge + count).backward()  # type: ignore[no-untyped-call]
        assert delta.grad is not None
        delta.grad /= delta.grad.abs().max()
        pace = optimiser.param_groups[0]["lr"]
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            delta.copy_((x + delta).clamp(0, 1) - x)
            delta[delta.abs() < threshold] = 0
        threshold = min(max(threshold + (0.01 if fooled else -0.01) * pace, 0), 1)
    return best


def test_sigma_zero_equals_a_plain_loop_over_images(bands: Classifier) -> None:
    """Up to a rare grey level that the last bit of a sum decides."""
    x, y = images_of(bands)

    x_adv = sigma_zero(bands, x, y, steps=10, polish=0)

    plain = torch.cat([plain_sigma_zero(bands, x[i : i + 1], int(y[i]), 10) for i in range(8)])
    assert ((x_adv != x) == (plain != x)).float().mean() > 0.995
    assert (x_adv - plain).abs().le(1.01 / 255).float().mean() > 0.995
    assert (x_adv != x).flatten(1).any(1).all()


def test_the_threshold_has_to_move(monkeypatch: pytest.MonkeyPatch) -> None:
    """The authors' code updates a copy of it: changes below the first 0.3 are then impossible.

    Here no value can be raised by more than 0.1, and lowering does not help.
    """
    model = Classifier(Side(torch.ones(1, 4, 4), 14.9), num_classes=2).eval()
    x = torch.full((1, 1, 4, 4), 0.9)
    y = labels_of(model, x)

    moving = sigma_zero(model, x, y)
    monkeypatch.setattr("robusteval.attacks.sigma_zero.PACE", 0.0)
    frozen = sigma_zero(model, x, y)

    assert labels_of(model, moving).ne(y).all()
    assert count_changes(moving, x, "l0").item() == 6
    assert torch.equal(frozen, x)


def test_polishing_only_helps(bands: Classifier) -> None:
    """And costs at most its passes."""
    x, y = images_of(bands)

    rough, polished = (sigma_zero(bands, x, y, steps=40, polish=p) for p in (0, 30))

    assert labels_of(bands, polished).ne(y).all()
    assert bool((count_changes(polished, x, "l0") <= count_changes(rough, x, "l0")).all())
    assert count_changes(polished, x, "l0").sum() < count_changes(rough, x, "l0").sum()


# the published sparse attack


def dense_sign(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The published dense start, and the sign of the gradients it sums."""
    total, a = torch.zeros_like(x), x
    for _ in range(10):
        a = a.detach().requires_grad_()
        loss = nn.functional.cross_entropy(model(a), y, reduction="sum")
        total = total + torch.autograd.grad(loss, a)[0]
        a = (x + UNIT * total.sign()).clamp(0, 1)
    return a.detach(), total.sign()


def plain_sparse(model: nn.Module, x: Tensor, label: int, seed: int, steps: int) -> Tensor:
    """The authors' search for one image, its term for the count included."""
    y = torch.tensor([label])
    a, _ = dense_sign(model, x, y)
    target, noise = labels_of(model, a), x - a
    weight = torch.empty(1, *x.shape[1:])
    weight[0].normal_(generator=torch.Generator().manual_seed(seed))
    room = torch.minimum(x, 1 - x) / UNIT
    best, fewest_yet = x, x.numel()
    for i in range(steps + 1):
        weight = weight.detach().requires_grad_()
        made = x - weight * noise
        made = made + (made.clamp(0, 1) - made).detach()
        logits = model(made)
        size = count_of(made != x)
        if i > 0 and int(logits.argmax()) != label and size < fewest_yet:
            best, fewest_yet = made.detach(), size
        loss = 1e3 * nn.functional.cross_entropy(logits, target) + torch.norm(weight, p=0)
        grad = torch.autograd.grad(1e2 * loss, weight)[0]
        weight = weight - 1e-2 * grad
        weight = room * torch.tanh(torch.relu(weight - TAU / UNIT))
    return best


def test_the_published_search_equals_a_plain_loop_over_images(bands: Classifier) -> None:
    """Up to the final rounding to grey levels."""
    x, y = images_of(bands)
    seeds = torch.arange(8) + 7

    x_adv = sparse(bands, x, y, variant="paper", steps=25, seeds=seeds)

    for i in range(8):
        plain = plain_sparse(bands, x[i : i + 1], int(y[i]), int(seeds[i]), 25)
        assert torch.equal(x_adv[i : i + 1] != x[i : i + 1], plain != x[i : i + 1])
        assert (x_adv[i : i + 1] - plain).abs().max() <= 0.5 / 255 + 1e-6
    assert (x_adv != x).flatten(1).any(1).sum() >= 3


def test_the_published_count_of_weights_has_no_gradient() -> None:
    """So leaving it out of the loss changes nothing: the soft threshold alone makes it sparse."""
    weight = torch.tensor([0.0, 0.5, -2.0], requires_grad=True)

    (grad,) = torch.autograd.grad(
        torch.norm(weight, p=0) + 0 * weight.sum(), weight, allow_unused=True
    )

    assert grad.tolist() == [0, 0, 0]


def test_published_changes_keep_to_half_the_range_and_to_one_sign(bands: Classifier) -> None:
    """At most to twice the value or its distance from white; black and white never move."""
    x, y = images_of(bands, 16)
    x[:, :, ::3] = x[:, :, ::3].round()
    y = labels_of(bands, x)

    x_adv = sparse(bands, x, y, variant="paper")

    delta = x_adv - x
    assert delta.ne(0).flatten(1).any(1).sum() >= 3
    assert bool((delta.abs() <= torch.minimum(x, 1 - x) + 1e-6).all())
    assert not bool(delta[(x == 0) | (x == 1)].any())
    sign = dense_sign(bands, x, y)[1]
    assert bool((delta * sign >= 0).all())


def test_black_and_white_images_leave_the_published_search_no_room(bands: Classifier) -> None:
    """The portable one may go to the other end."""
    x, _ = images_of(bands)
    x = x.round()
    y = labels_of(bands, x)

    published, portable = (sparse(bands, x, y, variant=v, steps=50) for v in ("paper", "scaled"))

    assert torch.equal(published, x)
    assert labels_of(bands, portable).ne(y).all()


def test_an_image_whose_dense_start_keeps_the_label_cannot_succeed_as_published() -> None:
    """The class it then aims at is the label itself."""
    x = torch.full((1, 1, 4, 4), 0.5)
    weight = torch.full((1, 4, 4), 0.1)
    weight[0, 0, 0] = 3.0
    model = Classifier(Side(weight, float(weight.sum() * 0.5) + 0.5), num_classes=2).eval()
    y = labels_of(model, x)
    assert torch.equal(labels_of(model, dense_sign(model, x, y)[0]), y)

    published, portable = (sparse(model, x, y, variant=v) for v in ("paper", "scaled"))

    assert torch.equal(published, x)
    assert count_changes(portable, x, "l0").item() == 1


def test_the_dense_start_is_never_returned() -> None:
    """The authors' code returns it without a word where nothing sparse fools.

    Many weak weights: the dense start fools, but no single gradient reaches the threshold.
    """
    weight = torch.full((1, 12, 12), 0.05)
    model = Classifier(Side(weight, float(weight.sum() * 0.5) + 0.05), num_classes=2).eval()
    x = torch.full((1, 1, 12, 12), 0.5)
    y = labels_of(model, x)
    assert labels_of(model, dense_sign(model, x, y)[0]).ne(y).all()

    assert torch.equal(sparse(model, x, y, variant="paper", tau=0.6), x)


@pytest.mark.parametrize(("factor", "alive"), [(1.05, True), (0.95, False)])
def test_a_weight_comes_alive_at_the_known_gradient(factor: float, alive: bool) -> None:
    """tau / (step * unit ** 2), which is 0.813: the published threshold is one on gradients.

    The black corner decides the class of the dense start and of the random first weights, with
    which all gradients vanish; after that it cannot move, and the other corner sees the gradient
    of a goal far away: twice its weight.
    """
    weight = torch.zeros(1, 2, 2)
    weight[0, 0, 0] = factor * TAU / (STEP * UNIT**2) / 2
    weight[0, 1, 1] = 3000.0
    model = Classifier(Side(weight, 20.0), num_classes=2).eval()
    x = torch.full((1, 1, 2, 2), 0.3)
    x[0, 0, 1, 1] = 0
    draws = [
        torch.empty(1, 2, 2).normal_(generator=torch.Generator().manual_seed(seed))
        for seed in range(50)
    ]
    seed = next(seed for seed, draw in enumerate(draws) if draw[0, 1, 1] > 1)
    judged: list[Tensor] = []
    handle = model.register_forward_pre_hook(lambda _m, args: judged.append(args[0].detach()))
    sparse(model, x, labels_of(model, x), variant="paper", steps=2, seeds=torch.tensor([seed]))
    handle.remove()

    assert bool((judged[-1] != x)[0, 0, 0, 0]) == alive


@pytest.mark.parametrize("scale", [2.0**-8, 2.0**8])
def test_the_portable_threshold_does_not_care_for_the_scale_of_the_logits(
    linear: Classifier, grey_images: Tensor, scale: float
) -> None:
    """To the bit; the published one does nothing at all where logits are small."""

    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = scale * linear.network(x)
            return logits

    scaled, y = Classifier(Scaled(), num_classes=2).eval(), labels_of(linear, grey_images)

    expected = sparse(linear, grey_images, y)
    assert torch.equal(sparse(scaled, grey_images, y), expected)
    if scale < 1:
        assert torch.equal(sparse(scaled, grey_images, y, variant="paper"), grey_images)


def test_a_low_threshold_is_dense_and_a_high_one_changes_nothing(bands: Classifier) -> None:
    """Sparsity is set by tau alone."""
    x, y = images_of(bands)

    def sizes(tau: float) -> Tensor:
        found = sparse(bands, x, y, variant="paper", tau=tau, steps=40)
        return count_changes(found, x, "l0").float()

    dense, usual = sizes(0.0), sizes(TAU)
    both = (dense > 0) & (usual > 0)
    assert both.sum() >= 3
    assert bool((dense[both] > 100).all())
    assert bool((dense[both] > 3 * usual[both]).all())
    assert torch.equal(sparse(bands, x * 0.2 + 0.4, y, variant="paper", step=1e-6), x * 0.2 + 0.4)


def test_the_published_search_depends_on_the_seed(bands: Classifier) -> None:
    """Same seed, same result; the portable search and sigma-zero have no randomness."""
    x, y = images_of(bands, 16)

    def found(text: str, seed: int) -> Tensor:
        return run(text, bands, x, y, steps=20, seeds=torch.arange(16) + seed)

    paper = "sparse:variant=paper"
    assert torch.equal(found(paper, 0), found(paper, 0))
    assert not torch.equal(found(paper, 0), found(paper, 100))
    for text in ("sparse", "sigma_zero"):
        assert torch.equal(found(text, 0), found(text, 100))


def test_dropout_is_off_while_the_attack_searches(bands: Classifier) -> None:
    """The authors' demonstration leaves it on, so a success may be one of a single draw."""
    from art.estimators.classification import PyTorchClassifier

    from robusteval.art.as_seen import AsSeen
    from robusteval.attacks.sparse import Sparse

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(copy.deepcopy(bands), nn.Dropout(0.5)).train()
    estimator = PyTorchClassifier(
        model=network,
        loss=nn.CrossEntropyLoss(),
        input_shape=(3, 12, 12),
        nb_classes=3,
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )
    images = images_of(bands)[0].numpy()
    results = []
    for seed in (0, 1):
        network.train()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            attack = Sparse(estimator, variant="paper", steps=50, verbose=False)
            results.append(attack.generate(images))
        assert network.training

    assert np.array_equal(results[0], results[1])
    network.eval()
    seen, fooled = (
        labels_of(AsSeen(estimator), torch.from_numpy(each)) for each in (images, results[0])
    )
    changed = (results[0] != images).any((1, 2, 3))
    assert changed.sum() >= 3
    assert np.array_equal((seen != fooled).numpy(), changed)
