"""Objectives against their formulas, and training that can be stopped, repeated and trusted."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from filelock import FileLock
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from toys import Bands, synthetic

from robusteval.datasets.arrays import from_arrays
from robusteval.datasets.dataset import Data
from robusteval.defenses import training
from robusteval.defenses.held_out import hold_out_images
from robusteval.defenses.objectives import (
    NetworkOutput,
    compute_class_maps,
    compute_losses,
    compute_training_loss,
    find_worst_images,
    measure_discrepancy,
    measure_map_bound,
    run_network,
    step_from_noise,
    weigh_wrong_classes,
)
from robusteval.defenses.training import TrainingResult, train
from robusteval.defenses.training_loop import TrainingLoop, augment_images
from robusteval.defenses.training_settings import (
    OBJECTIVES,
    Augment,
    Schedule,
    TrainingSettings,
    Weighting,
    schedule_rate,
    warm_up_radius,
    weigh_terms,
)
from robusteval.defenses.training_start import (
    build_untrained,
    find_input_channels,
    replace_head,
)
from robusteval.defenses.weight_noise import WeightAverage, worst_weights
from robusteval.errors import Interrupted, RunError, UsageError
from robusteval.interpreters.heads import Head, observe_head
from robusteval.models import checkpoint
from robusteval.models.architecture import build_network
from robusteval.models.classifier import Classifier
from robusteval.models.identity import hash_model
from robusteval.models.networks import ARCHITECTURES
from robusteval.models.seeds import per_image

Made = np.ndarray[Any, Any]
WEIGHTINGS: tuple[Weighting, ...] = ("softmax", "runner_up")
QUICK = TrainingSettings(eps=0.05, steps=2, epochs=2, batch_size=16, held_out=8, rate=0.01)


class Pooled(nn.Module):
    """Signed feature maps, their means, a linear layer with a bias; batch norm and dropout."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, 2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 6, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(torch.relu(self.norm(self.conv(x))))
        logits: Tensor = self.linear(self.dropout(x.mean((2, 3))))
        return logits


def pooled(seed: int = 0, dropout: float = 0.0) -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = Pooled(dropout)
    # the name is for the header alone: nothing here loads it again
    return Classifier(network.eval(), num_classes=3, identity={"arch": "robusteval:digits_cnn"})


def grey(n: int, seed: int = 0) -> tuple[Made, Made]:
    x, y = synthetic(n, seed)
    return x.mean(3).astype(np.uint8)[:, None], y


def bands(n: int = 72, seed: int = 0) -> Data:
    return from_arrays(*grey(n, seed))


def batch(n: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    images = bands(max(n, 20)).batch(range(n))
    return images.x, images.y, torch.arange(n)


def random_pair(n: int = 12) -> tuple[Classifier, Tensor, Tensor, Tensor]:
    x, y, _ = batch(n)
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(3)) - 0.5
    return pooled(), x, (x + 0.3 * noise).clamp(0, 1), y


def test_sum_of_a_map_is_the_logit_without_its_bias() -> None:
    model, x, _, _ = random_pair()
    bias = model.network.get_parameter("linear.bias")

    found = observe_head(model, x)

    sums = compute_class_maps(found).sum((2, 3)) + bias
    torch.testing.assert_close(found.logits, sums, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_own_architectures_have_maps(name: str) -> None:
    """Of the usual sizes of images, and their sums are the logits up to the bias."""
    network = build_network(f"robusteval:{name}", 4, {}).network.eval()
    linear = [part for part in network.modules() if isinstance(part, nn.Linear)][-1]
    size = 28 if name == "small_cnn" else 32
    channels = find_input_channels(f"robusteval:{name}") or 0
    x = torch.rand(2, channels, size, size, generator=torch.Generator().manual_seed(0))

    with torch.no_grad():
        found = observe_head(network, x)
    sums = compute_class_maps(found).sum((2, 3)) + (0 if linear.bias is None else linear.bias)

    assert found.logits.shape == (2, 4)
    torch.testing.assert_close(found.logits, sums, rtol=0, atol=1e-4)
    if name.startswith("small_cnn"):
        assert (found.features < 0).any()
        assert found.features.shape[1:] == (100, size // 4, size // 4)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_nothing_differs_from_itself(weighting: Weighting) -> None:
    model, x, _, y = random_pair()
    found = observe_head(model, x)
    maps = compute_class_maps(found)

    assert torch.equal(
        torch.zeros(len(x)), measure_discrepancy(maps, maps, found.logits, y, weighting)
    )


def test_wrong_classes_share_a_weight_of_one() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 5.0, -1.0]])
    y = torch.tensor([0, 1])

    soft = weigh_wrong_classes(logits, y, "softmax")
    p = logits.softmax(1)

    torch.testing.assert_close(torch.ones(2), soft.sum(1))
    assert torch.equal(torch.zeros(2), soft.gather(1, y[:, None])[:, 0])
    torch.testing.assert_close(p[0, 1] / (p[0, 1] + p[0, 2]), soft[0, 1])
    assert weigh_wrong_classes(logits, y, "runner_up").tolist() == [[0, 1, 0], [1, 0, 0]]


def test_size_of_the_maps_does_not_change_their_discrepancy() -> None:
    """The code of the paper does not divide by the positions: there it would be fourfold."""
    model, x, z, y = random_pair()
    before, after = observe_head(model, x), observe_head(model, z)
    value = measure_discrepancy(
        compute_class_maps(before), compute_class_maps(after), after.logits, y
    )

    def larger(found: Head) -> Tensor:
        features = found.features.repeat_interleave(2, 2).repeat_interleave(2, 3)
        return compute_class_maps(found._replace(features=features))

    again = measure_discrepancy(larger(before), larger(after), after.logits, y)

    assert value.min() > 0
    torch.testing.assert_close(value, again)


def test_gamma_of_the_papers_code_is_gamma_times_the_positions_here() -> None:
    model, x, z, y = random_pair()
    before, after = observe_head(model, x), observe_head(model, z)
    value = measure_discrepancy(
        compute_class_maps(before), compute_class_maps(after), after.logits, y
    )
    positions = before.features.shape[2] * before.features.shape[3]

    theirs = torch.zeros(len(x))
    for i in range(len(x)):
        p = after.logits[i].softmax(0)
        for c in range(3):
            moved = torch.tensordot(before.weight[c], before.features[i] - after.features[i], 1)
            share = 1.0 if c == y[i] else p[c] / (1 - p[y[i]])
            theirs[i] += share * moved.abs().sum()

    assert positions == 36
    torch.testing.assert_close(0.01 * theirs, 0.01 * positions * value, rtol=1e-4, atol=1e-5)


def test_maps_move_at_least_as_far_as_a_changed_prediction_demands() -> None:
    """On every successful adversarial example, of two attacks, in float64."""
    changed = 0
    for seed in range(4):
        model = pooled(seed)
        x, _, seeds = batch(20)
        with torch.no_grad():
            pred = model(x).argmax(1)
        attacked = [
            find_worst_images(model, x, pred, seeds, {term: 1.0}, eps=0.6, steps=5, step=0.2)
            for term in ("adversarial", "maps")
        ]
        model.double()
        for z in attacked:
            sides = measure_map_bound(model, x.double(), z.double())
            with torch.no_grad():
                differs = model(z.double()).argmax(1) != model(x.double()).argmax(1)
            changed += int(differs.sum())
            assert (sides.discrepancy >= sides.bound - 1e-6).all()
            assert (sides.bound[~differs] == 0).all()
    assert changed >= 20


def test_bound_is_met_exactly_where_one_feature_decides() -> None:
    """One position, two classes: l1 of the maps is the distance of the logits."""
    network = nn.Sequential(
        nn.Conv2d(1, 1, 1, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(1, 2, bias=False),
    )
    network.load_state_dict(
        {"0.weight": torch.ones(1, 1, 1, 1), "3.weight": torch.tensor([[1.0], [-1.0]])}
    )
    x = torch.full((1, 1, 2, 2), 0.5)

    sides = measure_map_bound(network, x, -1e-6 * x)

    torch.testing.assert_close(torch.tensor([0.5]), sides.bound)
    torch.testing.assert_close(torch.tensor([0.5]), sides.discrepancy)


EXPECTED: dict[str, Callable[..., Any]] = {
    "standard": lambda ce, ce_adv, kl, own, full, mart: ce,
    "adv": lambda ce, ce_adv, kl, own, full, mart: ce_adv,
    "trades": lambda ce, ce_adv, kl, own, full, mart: ce + 6 * kl,
    "mart": lambda ce, ce_adv, kl, own, full, mart: ce_adv + mart,
    "int": lambda ce, ce_adv, kl, own, full, mart: ce + 0.7 * full,
    "int2": lambda ce, ce_adv, kl, own, full, mart: ce + 0.7 * full,
    "int_adv": lambda ce, ce_adv, kl, own, full, mart: ce_adv + 0.7 * full,
    "int2_adv": lambda ce, ce_adv, kl, own, full, mart: ce_adv + 0.7 * full,
    "one_class": lambda ce, ce_adv, kl, own, full, mart: ce + 0.7 * own,
}


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_is_what_its_formula_says(objective: str, weighting: Weighting) -> None:
    model, x, z, y = random_pair()
    weights, _ = weigh_terms(objective, gamma=0.7, beta=6.0)
    value = compute_training_loss(model, x, z, y, weights, weighting)

    before, after = observe_head(model, x), observe_head(model, z)
    p, q = before.logits.softmax(1), after.logits.softmax(1)
    rows = torch.arange(len(x))
    moved = (compute_class_maps(before) - compute_class_maps(after)).abs().sum((2, 3))
    own, others = moved[rows, y], q.clone()
    others[rows, y] = 0
    if weighting == "runner_up":
        others = F.one_hot(others.argmax(1), 3).float()
    full = own + (others / others.sum(1, keepdim=True) * moved).sum(1)
    kl = (p * (p / q).log()).sum(1)
    rival = torch.tensor([max(row[row != row[c]].tolist()) for row, c in zip(q, y, strict=True)])
    mart = -(1 - rival).log() + 6 * kl * (1 - p[rows, y])
    terms = -p[rows, y].log(), -q[rows, y].log(), kl, own, full, mart

    torch.testing.assert_close(EXPECTED[objective](*terms), value, rtol=1e-4, atol=1e-5)
    assert (own <= full).all()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_search_raises_its_terms_inside_the_ball_and_leaves_the_model(objective: str) -> None:
    model = pooled(dropout=0.5).train()
    x, y, seeds = batch()
    _, raised = weigh_terms(objective, gamma=0.5, beta=6.0)
    state = {name: value.clone() for name, value in model.state_dict().items()}

    def searched(eps: float, rows: slice = slice(None)) -> Tensor:
        return find_worst_images(
            model, x[rows], y[rows], seeds[rows], raised, eps=eps, steps=4, step=0.03
        )

    z = searched(0.05)

    assert z.shape == x.shape
    assert not z.requires_grad
    assert z.min() >= 0
    assert z.max() <= 1
    assert (z - x).abs().max() <= 0.05 + 1e-6
    assert torch.equal(z, searched(0.05))
    assert torch.equal(z[3:7], searched(0.05, slice(3, 7)))
    assert torch.equal(x, searched(0.0))
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    if not raised:
        assert torch.equal(x, z)
        return
    model.eval()
    start = x + 0.0  # where no term is but the cross-entropy
    clean, after, there = (run_network(model, images, raised) for images in (x, z, start))
    low = compute_losses(raised, clean, there, y, "softmax")
    assert (compute_losses(raised, clean, after, y, "softmax") > low).all()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_searches_for_large_images_go_a_few_at_a_time(
    objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More images than are differentiated together end where they end in one go."""
    model = pooled()
    x, y, seeds = batch()
    _, raised = weigh_terms(objective, gamma=0.5, beta=6.0)
    whole = find_worst_images(model, x, y, seeds, raised, eps=0.05, steps=4, step=0.03)

    monkeypatch.setattr("robusteval.search.descent.choose_graph_size", lambda *_: 5)
    parts = find_worst_images(model, x, y, seeds, raised, eps=0.05, steps=4, step=0.03)
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("objective", "changed", "same"),
    [
        ("int", {"gamma": 0.0}, "standard"),
        ("one_class", {"gamma": 0.0}, "standard"),
        ("int_adv", {"gamma": 0.0}, "adv"),
        ("int2_adv", {"gamma": 0.0}, "adv"),
        ("trades", {"beta": 0.0}, "standard"),
        ("adv", {"eps": 0.0}, "standard"),
    ],
)
def test_objective_without_its_term_is_the_simpler_one(
    objective: str, changed: dict[str, Any], same: str
) -> None:
    """Bit for bit, from the same seed."""

    def weights(settings: TrainingSettings) -> list[Tensor]:
        model = pooled()
        loop = TrainingLoop(model, bands(40), np.arange(40), settings, torch.device("cpu"))
        loop.run_epoch(0, lambda _: None, lambda: False)
        return list(model.state_dict().values())

    one = weights(replace(QUICK, objective=objective, **changed))
    other = weights(replace(QUICK, objective=same))

    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_noisy_step_on_a_linear_model_is_known() -> None:
    """Noise of twice the radius, a step against the weights, and no way back into the ball."""
    weight = torch.tensor([1.0, -1.0, 0.5, -2.0]).view(1, 2, 2)
    x, seeds = torch.full((3, 1, 2, 2), 0.5), torch.arange(3)

    found = step_from_noise(lambda z: (z * weight).sum((1, 2, 3)), x, seeds, eps=0.1, step=0.15)

    noise = (2 * per_image(seeds, x.shape[1:]) - 1) * 0.2
    torch.testing.assert_close(found, (x + noise).clamp(0, 1) + 0.15 * weight.sign())
    assert float((found - x).abs().max()) > 0.2
    full = step_from_noise(lambda z: z.sum((1, 2, 3)), x, seeds, eps=0.1, step=2.0)
    assert torch.equal(full, torch.ones_like(x))


def test_an_average_of_weights_is_the_weighted_sum_of_all_of_them() -> None:
    """Early steps by (1 + t) / (10 + t), later ones by the decay; whole numbers are the last."""
    model = pooled()
    average = WeightAverage(model, 0.25)
    weight, norm = model.network.get_parameter("linear.weight"), "network.norm.num_batches_tracked"
    expected = weight.detach().clone()
    for step in range(4):
        with torch.no_grad():
            weight.add_(1.0)
            model.network.get_buffer("norm.num_batches_tracked").add_(1)
        keep = min(0.25, (1 + step) / (10 + step))
        expected = keep * expected + (1 - keep) * weight.detach()
        average.update(step)

    assert average.state[norm] == 4
    now = weight.detach().clone()
    with average.applied():
        torch.testing.assert_close(weight.detach(), expected)
    assert torch.equal(weight.detach(), now)


def test_worst_weights_are_a_share_of_their_norm_uphill_and_are_put_back() -> None:
    """On a loss that is linear in the weights; biases and running statistics stay."""
    model = pooled().train()
    weight, slope = model.network.get_parameter("linear.weight"), draw_slope()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    x, _, _ = batch()

    def loss() -> Tensor:
        total: Tensor = (weight * slope).sum() + 0 * model(x).sum()
        return total

    with worst_weights(model, loss, 0.01):
        moved = weight.detach() - state["network.linear.weight"]
        expected = slope * 0.01 * state["network.linear.weight"].norm() / slope.norm()
        torch.testing.assert_close(moved, expected)
        assert torch.equal(model.network.get_parameter("linear.bias"), state["network.linear.bias"])
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    with worst_weights(model, loss, 0.0):
        assert torch.equal(weight, state["network.linear.weight"])


def draw_slope() -> Tensor:
    return torch.randn(3, 6, generator=torch.Generator().manual_seed(4))


def test_more_images_are_trained_on_and_none_of_them_is_held_out(tmp_path: Path) -> None:
    """In one order with the others; another form or other classes are refused."""
    data, extra = bands(40), from_arrays(*grey(24, seed=5), name="more")
    loop = TrainingLoop(pooled(), data, np.arange(30), QUICK, torch.device("cpu"), extra)
    index = np.array([41, 2, 63, 0])

    x, y = loop.read_images(index)

    assert len(loop.positions) == 54
    expected = [extra.batch([1]), data.batch([2]), extra.batch([23]), data.batch([0])]
    assert torch.equal(x, torch.cat([each.x for each in expected]))
    assert torch.equal(y, torch.cat([each.y for each in expected]))
    found = train(pooled(), data, tmp_path / "net.safetensors", QUICK, extra=extra)
    assert found.best.held_out == 8
    x_small, y_small = grey(24)
    small = from_arrays(x_small[:, :, :10], y_small, name="small")
    with pytest.raises(UsageError, match="--extra-data small has images of"):
        train(pooled(), data, tmp_path / "other.safetensors", QUICK, extra=small)
    with pytest.raises(UsageError, match="has 8 of the images that are held out of"):
        train(pooled(), data, tmp_path / "other.safetensors", QUICK, extra=data)


def test_a_new_head_keeps_everything_before_it(tmp_path: Path) -> None:
    """Three classes after ten, with the old normalisation; ten after ten is another ten."""
    settings = replace(QUICK, objective="standard", epochs=1)
    ten = build_untrained("robusteval:digits_cnn", bands(), settings, num_classes=10)
    ten.identity["sha256"] = "ten"

    three = replace_head(ten, bands(), settings, None)

    old, new = ten.network.state_dict(), three.network.state_dict()
    changed = [name for name in new if new[name].shape != old[name].shape]
    assert {name.rpartition(".")[0] for name in changed} == {changed[0].rpartition(".")[0]}
    assert all(torch.equal(new[name], old[name]) for name in new if name not in changed)
    assert (three.num_classes, three.mean.tolist()) == (3, ten.mean.tolist())
    other = replace_head(ten, bands(), replace(settings, seed=5), 10).network.state_dict()
    assert changed == [name for name in other if not torch.equal(other[name], old[name])]
    found = train(three, bands(), tmp_path / "net.safetensors", settings)
    assert checkpoint.load(found.path).num_classes == 3


def test_batch_norm_sees_clean_and_attacked_images_together() -> None:
    model, x, z, y = random_pair()
    norm = model.network.get_submodule("norm")
    norm.momentum = 1.0  # type: ignore[assignment]
    weights, _ = weigh_terms("int", gamma=0.5, beta=0.0)

    compute_training_loss(model.train(), x, z, y, weights)

    both = model.network.get_submodule("conv")(torch.cat([x, z]))
    torch.testing.assert_close(norm.get_buffer("running_mean"), both.mean((0, 2, 3)))


@pytest.mark.parametrize(("objective", "drops"), [("adv", True), ("int", False)])
def test_dropout_rests_where_maps_are_compared(objective: str, drops: bool) -> None:
    model = pooled(dropout=0.5)
    settings = replace(QUICK, objective=objective)
    loop = TrainingLoop(model, bands(), np.arange(72), settings, torch.device("cpu"))

    loop.set_train_mode()

    assert model.network.get_submodule("norm").training
    assert drops is model.network.get_submodule("dropout").training


def test_half_precision_leaves_float32_weights_near_those_of_full_precision() -> None:
    """On the CPU here; by itself only on CUDA, and not where maps are compared."""

    def weights(mixed: bool) -> dict[str, Tensor]:
        model = pooled()
        settings = replace(QUICK, warmup=(0.0, 0.0))
        loop = TrainingLoop(model, bands(40), np.arange(40), settings, torch.device("cpu"))
        assert not loop.mixed
        loop.mixed = mixed
        loop.run_epoch(0, lambda _: None, lambda: False)
        return model.state_dict()

    full, half = weights(False), weights(True)

    assert all(value.dtype == full[name].dtype for name, value in half.items())
    assert not torch.equal(full["network.last.weight"], half["network.last.weight"])
    torch.testing.assert_close(
        full["network.last.weight"], half["network.last.weight"], rtol=0, atol=0.05
    )


def test_radius_grows_between_its_break_points() -> None:
    steps = (0, 2000, 6000, 10_000, 50_000)

    assert [0, 0, 0.15, 0.3, 0.3] == [warm_up_radius(0.3, step, 2000, 10_000) for step in steps]
    assert warm_up_radius(0.3, 0, 0, 0) == 0.3


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [("cosine", [1.0, 0.5, 0.0]), ("step", [1.0, 1.0, 0.01])],
)
def test_rate_falls_as_scheduled(schedule: Schedule, rates: list[float]) -> None:
    assert rates == pytest.approx([schedule_rate(1.0, done, schedule) for done in (0, 0.5, 1)])
    assert schedule_rate(1.0, 0.6, "step") == pytest.approx(0.1)


def test_split_is_fixed_by_the_seed() -> None:
    data = bands(100)
    trained, kept = hold_out_images(data, None, 0)

    assert sorted([*trained, *kept]) == list(range(100))
    assert len(kept) == 20
    assert np.array_equal(kept, hold_out_images(data, None, 0)[1])
    assert not np.array_equal(kept, hold_out_images(data, None, 1)[1])
    assert (
        len(hold_out_images(from_arrays(*[a.repeat(150, 0) for a in grey(20)]), None, 0)[1]) == 300
    )


@pytest.mark.parametrize(("augment", "channels"), [("auto", 1), ("none", 3)])
def test_images_stay_as_they_are_where_asked(augment: Augment, channels: int) -> None:
    x = torch.rand(4, channels, 8, 8)

    assert augment_images(x, augment, torch.Generator()) is x


@pytest.mark.parametrize("augment", ["auto", "crop", "crop+flip"])
def test_images_are_shifted_and_mirrored(augment: Augment) -> None:
    """Each result is a window of the padded image or of its mirror image."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(40, 3, 16, 16, generator=generator)
    found = augment_images(x, augment, generator)
    mirrored = 0
    for before, after in zip(x, found, strict=True):
        wide = F.pad(before, [2, 2, 2, 2])
        windows = [wide[:, i : i + 16, j : j + 16] for i in range(5) for j in range(5)]
        plain = any(torch.equal(w, after) for w in windows)
        flipped = any(torch.equal(w.flip(2), after) for w in windows)
        assert plain or flipped
        mirrored += flipped

    assert found.is_contiguous()
    assert (mirrored == 0) if augment == "crop" else (5 < mirrored < 35)


def run(
    out: Path, settings: TrainingSettings, *, model: Classifier | None = None, **options: Any
) -> TrainingResult:
    data = bands()
    classifier = model or build_untrained("robusteval:digits_cnn", data, settings)
    return train(classifier, data, out, settings, **options)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_training_ends_in_a_checkpoint_that_needs_no_options(
    objective: str, tmp_path: Path
) -> None:
    settings = replace(QUICK, objective=objective, epochs=1)
    found = run(tmp_path / "net.safetensors", settings)
    again = run(tmp_path / "again.safetensors", settings)
    loaded = checkpoint.load(found.path)

    assert loaded.num_classes == 3
    assert loaded.input_shape == (1, 12, 12)
    assert loaded.identity["normalisation"] == "from the file"
    assert found.path.read_bytes() == again.path.read_bytes()
    assert {p.name for p in tmp_path.glob("net.*")} == {
        "net.safetensors",
        "net.history.json",
        "net.curve.png",
    }
    record = json.loads((tmp_path / "net.history.json").read_text())
    assert [line["epoch"] for line in record["epochs"]] == [1]
    assert record["settings"]["objective"] == objective
    assert (tmp_path / "net.curve.png").read_bytes().startswith(b"\x89PNG")
    assert (found.best.below_bound is None) == (not settings.has_maps)
    assert not found.best.below_bound
    images = bands().batch(hold_out_images(bands(), 8, 0)[1])
    assert found.best.clean == int((loaded(images.x).argmax(1) == images.y).sum())


def test_the_checkpoint_of_a_training_names_its_classes(tmp_path: Path) -> None:
    """Of the data, if it has a name for every output; folders are matched by them later."""
    settings = replace(QUICK, objective="standard", epochs=1)
    for names, known in ((("left", "middle", "right"), True), (("a", "b", "c", "d"), False)):
        data = from_arrays(*grey(72), class_names=names)
        classifier = build_untrained("robusteval:digits_cnn", bands(), settings)
        found = train(classifier, data, tmp_path / f"{known}.safetensors", settings)

        assert checkpoint.load(found.path).class_names == (names if known else None)


@pytest.mark.parametrize("after", [0, 3, 4, 9])
def test_stopped_training_ends_as_if_it_had_not_been(after: int, tmp_path: Path) -> None:
    """After so many of the four batches of each of three epochs; dropout and average included."""
    settings = replace(QUICK, objective="adv", epochs=3, augment="crop+flip")
    settings = replace(settings, average=0.9, awp=0.01, search="nfgsm")
    whole = run(tmp_path / "whole.safetensors", settings, model=pooled(dropout=0.5))
    out, asked = tmp_path / "net.safetensors", 0

    def stopping() -> bool:
        nonlocal asked
        asked += 1
        return asked > after

    with pytest.raises(Interrupted):
        run(out, settings, model=pooled(dropout=0.5), stopping=stopping)
    torch.manual_seed(99)  # which must not matter
    found = run(out, settings, model=pooled(dropout=0.5))

    assert whole.path.read_bytes() == out.read_bytes()
    assert [line[:8] for line in whole.history] == [line[:8] for line in found.history]
    assert not list(tmp_path.glob("net.state*"))


def test_best_epoch_is_the_one_most_often_right_under_attack(tmp_path: Path) -> None:
    found = run(tmp_path / "net.safetensors", replace(QUICK, epochs=4))

    assert found.best.robust == max(line.robust for line in found.history)
    with open(found.path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        notes = json.loads(file.read(length))["__metadata__"]
    assert json.loads(notes["training"])["epoch"] == found.best.epoch
    assert json.loads(notes["validation"]) == {
        "images": 8,
        "clean": found.best.clean,
        "robust": found.best.robust,
    }


def test_training_on_attacked_images_pays(tmp_path: Path) -> None:
    """A plain network finds bright bands, and is fooled by less than they are bright by."""
    data = bands(240)
    settings = TrainingSettings(eps=0.06, steps=3, epochs=8, batch_size=32, rate=0.03, held_out=80)
    robust = {}
    for objective in ("standard", "adv", "int_adv"):
        chosen = replace(settings, objective=objective)
        best = train(pooled(), data, tmp_path / f"{objective}.safetensors", chosen).best
        robust[objective] = best.robust
    assert min(robust["adv"], robust["int_adv"]) >= robust["standard"] + 16


def test_training_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    settings = replace(QUICK, epochs=6)
    first = run(tmp_path / "first.safetensors", replace(settings, objective="standard"))
    start = checkpoint.load(first.path)
    gentle = replace(settings, epochs=1, rate=1e-6)

    second = run(tmp_path / "second.safetensors", gentle, model=start)

    assert abs(second.best.clean - first.best.clean) <= 1
    assert checkpoint.load(second.path).identity["mean"] == start.identity["mean"]


@pytest.mark.parametrize("after", [None, 3])
def test_trained_classifier_does_not_pass_for_the_file_it_came_from(
    after: int | None, tmp_path: Path
) -> None:
    origin = run(tmp_path / "first.safetensors", replace(QUICK, epochs=1)).path
    trained = checkpoint.load(origin)
    steps = iter(range(1000))

    with nullcontext() if after is None else pytest.raises(Interrupted):
        run(
            tmp_path / "second.safetensors",
            replace(QUICK, epochs=1, seed=1),
            model=trained,
            stopping=lambda: next(steps) == after,
        )

    assert "sha256" not in trained.identity
    assert hash_model(trained) != hash_model(checkpoint.load(origin))
    if after is None:
        with safe_open(tmp_path / "second.safetensors", "pt") as file:
            training = json.loads(file.metadata()["training"])
        assert training["from"] == checkpoint.load(origin).identity["sha256"]


def test_divergence_keeps_the_best_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    update = TrainingLoop.update_weights

    def astray(self: TrainingLoop, step: int, *rest: Any) -> float:
        return update(self, step, *rest) if step < 6 else float("nan")

    monkeypatch.setattr(TrainingLoop, "update_weights", astray)
    out = tmp_path / "net.safetensors"

    with pytest.raises(RunError, match=r"the loss is nan in epoch 2: .*net.safetensors holds the"):
        run(out, QUICK)

    assert checkpoint.load(out).num_classes == 3
    monkeypatch.undo()
    run(tmp_path / "whole.safetensors", QUICK)
    run(out, QUICK)
    assert (tmp_path / "whole.safetensors").read_bytes() == out.read_bytes()


def test_rate_without_reason_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="in epoch 1: nothing was kept; train with a lower --rate"):
        run(tmp_path / "net.safetensors", replace(QUICK, rate=1e30))


def test_memory_that_runs_out_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(TrainingLoop, "update_weights", full)

    with pytest.raises(RunError, match="smaller --batch-size"):
        run(tmp_path / "net.safetensors", QUICK)


def test_finished_training_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "net.safetensors"
    run(out, replace(QUICK, epochs=1))
    before = out.read_bytes()

    with pytest.raises(UsageError, match="--fresh"):
        run(out, replace(QUICK, epochs=1))
    assert before == out.read_bytes()
    run(out, replace(QUICK, epochs=1, seed=1), fresh=True)
    assert before != out.read_bytes()


def test_unfinished_training_of_another_kind_is_not_continued(tmp_path: Path) -> None:
    out = tmp_path / "net.safetensors"
    with pytest.raises(Interrupted):
        run(out, QUICK, stopping=lambda: True)

    with pytest.raises(UsageError, match=r"settings.rate: 0.01 there, 0.25 here"):
        run(out, replace(QUICK, rate=0.25))
    state = tmp_path / "net.state.safetensors"
    raw = state.read_bytes()
    for place in (30, len(raw) // 2, len(raw) - 1):  # in the notes and in the weights
        state.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
        with pytest.raises(UsageError, match="damaged"):
            run(out, QUICK)
    state.write_bytes(b"torn")
    with pytest.raises(UsageError, match="damaged"):
        run(out, QUICK)
    run(out, QUICK, fresh=True)


def test_history_is_whole_where_a_kill_came_before_it_was_written(tmp_path: Path) -> None:
    """Of the last epoch, after which no other writes it."""
    out = tmp_path / "net.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "draw_curve", None)  # broken once all epochs are done
        with pytest.raises(TypeError):
            run(out, QUICK)
    history = tmp_path / "net.history.json"
    whole = history.read_bytes()
    history.unlink()

    run(out, QUICK)

    assert history.read_bytes() == whole


def test_two_processes_do_not_train_one_file(tmp_path: Path) -> None:
    with (
        FileLock(tmp_path / ".net.safetensors.lock"),
        pytest.raises(RunError, match="another process"),
    ):
        run(tmp_path / "net.safetensors", QUICK)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"objective": "advv"}, "unknown objective 'advv' .did you mean 'adv'"),
        ({"eps": 8.0}, "--eps must be from 0 to 1"),
        ({"eps": float("nan")}, "--eps"),
        ({"steps": 0}, "--steps must be at least 1"),
        ({"epochs": 0}, "--epochs"),
        ({"batch_size": 1}, "--batch-size must be at least 2"),
        ({"rate": 0.0}, "--rate must be positive"),
        ({"step": -1.0}, "--step must be positive"),
        ({"gamma": -1.0}, "--gamma must be 0 or more"),
        ({"beta": float("inf")}, "--beta"),
        ({"warmup": (3.0, 1.0)}, "--warmup"),
        ({"weighting": "all"}, "--weighting must be one of softmax, runner_up"),
        ({"schedule": "linear"}, "--schedule"),
        ({"augment": "cutout"}, "--augment"),
        ({"search": "cw"}, "--search must be one of pgd, nfgsm"),
        ({"search": "nfgsm", "objective": "standard"}, "--search does nothing with --objective"),
        ({"beta": 3.0, "objective": "adv"}, "--beta does nothing with --objective adv"),
        ({"gamma": 0.1, "objective": "trades"}, "--gamma does nothing with --objective trades"),
        ({"average": 1.0}, "--average must be from 0 to below 1"),
        ({"awp": -0.1}, "--awp must be from 0"),
    ],
)
def test_setting_out_of_range_is_one_sentence(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        replace(QUICK, **changed)


def test_data_that_cannot_be_trained_on_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "net.safetensors"
    x, y = grey(40)

    def attempt(model: Classifier, data: Data, **changed: Any) -> None:
        train(model, data, out, replace(QUICK, **changed))

    with pytest.raises(UsageError, match="has 12 images: training needs at least 20"):
        attempt(pooled(), bands(12))
    with pytest.raises(UsageError, match="all of one class"):
        attempt(pooled(), from_arrays(x, 0 * y))
    with pytest.raises(UsageError, match="labels up to 5, robusteval:digits_cnn has 3 outputs"):
        attempt(pooled(), from_arrays(x, y + 3))
    wide = pooled()
    wide.num_classes = 4
    with pytest.raises(UsageError, match="has 3 outputs, not 4: give --num-classes 3"):
        attempt(wide, from_arrays(x, y))
    with pytest.raises(UsageError, match="--held-out must be from 1 to 20"):
        attempt(pooled(), from_arrays(x, y), held_out=30)
    with pytest.raises(UsageError, match=r"cannot take the images of arrays \(3x12x12\)"):
        attempt(pooled(), from_arrays(*synthetic(40, 0)))
    with pytest.raises(UsageError, match=r"must end in \.safetensors"):
        train(pooled(), bands(), tmp_path / "net.pt", QUICK)
    assert not list(tmp_path.iterdir())


def test_objective_with_maps_needs_a_network_that_has_them(tmp_path: Path) -> None:
    images = from_arrays(*synthetic(40, 0))
    model = Classifier(Bands(), num_classes=3, identity={"arch": "mine.py:bands"})

    for objective in ("int", "int2", "int_adv", "int2_adv", "one_class"):
        with pytest.raises(UsageError, match=r"mine\.py:bands does not: use adv or trades"):
            train(model, images, tmp_path / "a.safetensors", replace(QUICK, objective=objective))
    without = replace(QUICK, objective="int", gamma=0.0, epochs=1)
    train(model, images, tmp_path / "b.safetensors", without)


def test_random_weights_come_with_the_datas_normalisation() -> None:
    data = bands(60)
    model = build_untrained("robusteval:digits_cnn", data, QUICK)
    x = data.batch(hold_out_images(data, QUICK.held_out, QUICK.seed)[0]).x

    assert model.num_classes == 3
    assert model.identity["mean"] == pytest.approx([float(x.mean())], abs=1e-4)
    assert model.identity["std"] == pytest.approx([float(x.std())], abs=1e-4)
    assert find_input_channels("robusteval:digits_cnn") == 1
    assert find_input_channels("robusteval:resnet20") == 3
    with pytest.raises(UsageError, match="both --mean and --std"):
        build_untrained("robusteval:digits_cnn", data, QUICK, mean=[0.5])


def test_sides_that_no_term_needs_are_not_looked_at() -> None:
    logits, y = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    expected = torch.full((2,), float(np.log(3)))

    torch.testing.assert_close(
        expected, compute_losses({"clean": 1.0}, NetworkOutput(logits, None), None, y, "softmax")
    )
    torch.testing.assert_close(
        expected,
        compute_losses({"adversarial": 1.0}, None, NetworkOutput(logits, None), y, "softmax"),
    )


def estimator() -> Any:
    art = pytest.importorskip("art.estimators.classification")
    return art.PyTorchClassifier(
        model=pooled().network,
        loss=nn.CrossEntropyLoss(),
        input_shape=(1, 12, 12),
        nb_classes=3,
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )


def test_art_trainer_trains_an_estimator() -> None:
    from robusteval.defenses.trainer import RobustTrainer

    x, y = grey(60)
    images, one_hot = x.astype(np.float32) / 255, np.eye(3)[y]

    def trained() -> Made:
        trainer = RobustTrainer(
            estimator(), verbose=False, objective="int", eps=0.02, steps=2, rate=0.02
        )
        trainer.fit(images, one_hot, nb_epochs=10, batch_size=20)
        logits: Made = trainer.get_classifier().predict(images)
        return logits

    first = trained()

    assert (first.argmax(1) == y).mean() > 0.8
    assert np.array_equal(first, trained())


def test_art_trainer_says_what_is_wrong() -> None:
    from robusteval.defenses.trainer import RobustTrainer

    with pytest.raises(TypeError, match="PyTorchClassifier"):
        RobustTrainer(cast(Any, pooled()))
    with pytest.raises(TypeError, match="nb_epoch'"):
        RobustTrainer(estimator(), verbose=False).fit(np.zeros(1), np.zeros(1), nb_epoch=1)
    with pytest.raises(UsageError, match="objective"):
        RobustTrainer(estimator(), objective="sgd")
