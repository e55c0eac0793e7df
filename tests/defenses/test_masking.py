"""Units whose rank is known, masks that do what they say, verdicts on figures made up."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toys import Bands

from robusteval.datasets.arrays import from_arrays
from robusteval.datasets.dataset import Batch, Data
from robusteval.defenses import mask_judgement, masking
from robusteval.defenses.mask_judgement import BothAttacks, explain_mask_verdict, judge_masks
from robusteval.defenses.masking import ChosenMasks, choose_masks, draw_random_masks, mask_lowest
from robusteval.defenses.unit_ranking import (
    find_penultimate_layer,
    list_layers,
    measure_importance,
    measure_sensitivity,
)
from robusteval.errors import NothingEvaluated, UsageError
from robusteval.evaluation.evaluate import evaluate
from robusteval.models.classifier import Classifier
from robusteval.models.masked import Masked, mask_units, measure_activations
from robusteval.progress import Silent
from robusteval.runs.types import Outcome

PGD = "pgd:eps=0.05,steps=4"
QUADRANTS = 4
SIDE = 8


class Quadrants(nn.Module):
    """Twelve units for four classes: unit k is the mean brightness of the k-th twelfth of rows.

    Three units for each class, of which the later ones count less.
    """

    def __init__(self) -> None:
        super().__init__()
        self.look = nn.Conv2d(1, 12, 1, bias=False)
        self.where = Where()
        self.act = nn.ReLU()
        self.head = nn.Linear(12, QUADRANTS, bias=False)
        with torch.no_grad():
            self.look.weight.fill_(1.0)
            self.head.weight.zero_()
            for unit in range(12):
                self.head.weight[unit // 3, unit] = (40.0, 10.0, 1.0)[unit % 3]

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.where(self.look(x)))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


class Where(nn.Module):
    """Keeps of channel k only the k-th row."""

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.eye(12).view(1, 12, 12, 1)
        return x * rows


def pictures(n: int, seed: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Grey images 12x8 of which three rows are brighter, which is the class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % QUADRANTS
    images = rng.integers(80, 120, (n, 1, 12, SIDE))
    for image, label in zip(images, labels, strict=True):
        image[:, 3 * label : 3 * label + 3] += rng.integers(5, 30)
    return images.astype(np.uint8), labels


@pytest.fixture
def data() -> Data:
    return from_arrays(*pictures(80, 0), name="rows")


@pytest.fixture
def model() -> Classifier:
    return Classifier(Quadrants(), num_classes=QUADRANTS, block=8).eval().requires_grad_(False)


def drawn(data: Data, n: int = 20) -> tuple[Tensor, Tensor]:
    batch = data.batch(range(n))
    return batch.x, batch.y


def test_penultimate_units_are_those_that_are_pooled(model: Classifier, data: Data) -> None:
    assert find_penultimate_layer(model, drawn(data)[0]) == "act"
    assert list(list_layers(model, drawn(data)[0])) == ["look", "where", "act"]


class Functional(nn.Module):
    """No module gives what is pooled, but the one before gives what is the same when masked."""

    def __init__(self, *, residual: bool) -> None:
        super().__init__()
        self.early = nn.Conv2d(1, 6, 3)
        self.late = nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 3)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        early = self.early(x)
        late = self.late(F.relu(early)) + (early if self.residual else 0)
        logits: Tensor = self.head(F.relu(late).mean((2, 3)))
        return logits


def test_units_before_a_functional_activation_are_found() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Functional(residual=False).eval()
    model = Classifier(network, num_classes=3)

    assert find_penultimate_layer(model.eval(), torch.rand(2, 1, 9, 9)) == "late"


def test_units_that_no_module_gives_are_asked_for() -> None:
    """Masking the last module would leave the shortcut."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Functional(residual=True).eval()
    with pytest.raises(UsageError, match=r"--layer; .*early \(6 units\), late \(6 units\)"):
        find_penultimate_layer(Classifier(network, num_classes=3).eval(), torch.rand(2, 1, 9, 9))


def test_networks_without_pooling_say_which_layers_there_are() -> None:
    bands = Classifier(Bands(), num_classes=3).eval()
    with pytest.raises(UsageError, match=r"conv1 \(6 units\), conv2 \(6 units\)$"):
        find_penultimate_layer(bands, torch.rand(2, 3, 12, 12))


def test_importance_is_the_share_of_the_logit(model: Classifier, data: Data) -> None:
    x, y = drawn(data)
    means = x.mean((1, 3)) / 12  # of one row among twelve
    expected = (means * model.network.get_submodule("head").weight[y]).abs()  # type: ignore[index]

    shares = measure_importance(model, x, y, "act", Silent())
    torch.testing.assert_close(shares, expected.double())
    # the same layer by another name: leaving out units one by one
    tried = measure_importance(model, x, y, "where", Silent())
    torch.testing.assert_close(tried, expected.double(), rtol=1e-4, atol=1e-6)


def test_least_important_units_of_each_class_are_masked(model: Classifier, data: Data) -> None:
    """Each class needs its own three units, the first most of all."""
    chosen = choose_masks(model, data, rank="importance", units=11, per_class=True, samples=60)

    assert chosen.layer == "act"
    assert torch.equal(torch.eye(12)[::3], chosen.masks)
    assert (chosen.masked, chosen.ranked) == (11, 30)
    assert (chosen.control == 0).sum(1).tolist() == [11] * 4


def test_most_moved_units_are_masked(data: Data, model: Classifier) -> None:
    """Written out; an attack that raises the fourth to sixth row of everything."""
    x, _ = drawn(data)
    x_adv = x.clone()
    x_adv[:, :, 3:6] += 0.1
    scores = measure_sensitivity(model, x, x_adv, "act")
    units = x.mean((1, 3)).double() / 12
    expected = torch.zeros(20, 12, dtype=torch.float64)
    expected[:, 3:6] = 0.1 / 12
    torch.testing.assert_close(scores, expected / units.std(0), rtol=1e-4, atol=1e-4)

    masks = mask_lowest(-scores.mean(0), 3)
    assert torch.nonzero(masks == 0).flatten().tolist() == [3, 4, 5]


def test_a_unit_that_never_moves_by_itself_is_left_alone(model: Classifier, data: Data) -> None:
    x, _ = drawn(data)
    x[:, :, 2] = 0.5
    x_adv = x.clone()
    x_adv[:, :, 2] += 0.3

    assert bool((measure_sensitivity(model, x, x_adv, "act")[:, 2] == 0).all())


def test_equal_scores_are_taken_in_their_order() -> None:
    assert mask_lowest(torch.zeros(2, 4), 2).tolist() == [[0, 0, 1, 1]] * 2


def test_random_masks_are_of_the_size_and_repeat() -> None:
    masks = draw_random_masks((5, 40), 12, 3, 0)

    assert (masks == 0).sum(1).tolist() == [12] * 5
    assert torch.equal(masks, draw_random_masks((5, 40), 12, 3, 0))
    assert not torch.equal(masks, draw_random_masks((5, 40), 12, 3, 1))
    assert not torch.equal(masks[0], masks[1])


@pytest.mark.parametrize("rank", ["sensitivity", "importance", "random"])
@pytest.mark.parametrize("units", [3, Fraction("0.25")])
def test_as_many_units_are_masked_as_asked(
    model: Classifier, data: Data, rank: masking.Rank, units: int | Fraction
) -> None:
    chosen = choose_masks(model, data, rank=rank, units=units, attack=PGD, samples=60)

    assert chosen.masks.shape == chosen.control.shape == (12,)
    assert chosen.masked == int((chosen.control == 0).sum()) == 3
    assert not set(chosen.ranking.ids.tolist()) & set(chosen.judging.ids.tolist())
    assert (len(chosen.ranking.ids), len(chosen.judging.ids)) == (30, 30)


@pytest.mark.parametrize("rank", ["sensitivity", "importance"])
@pytest.mark.parametrize("per_class", [False, True])
def test_choice_does_not_depend_on_batches(
    model: Classifier,
    data: Data,
    monkeypatch: pytest.MonkeyPatch,
    rank: masking.Rank,
    per_class: bool,
) -> None:
    asked: dict[str, Any] = {"units": 4, "attack": PGD, "samples": 60, "per_class": per_class}
    one = choose_masks(model, data, rank=rank, **asked)
    monkeypatch.setattr(
        "robusteval.defenses.unit_ranking.choose_block_size", lambda values, device: 1
    )
    other = choose_masks(model, data, rank=rank, **asked)

    assert torch.equal(one.masks, other.masks)
    assert torch.equal(one.control, other.control)


def test_an_image_that_is_there_twice_is_not_judged_on() -> None:
    images, labels = pictures(40, 0)
    twice = from_arrays(np.concatenate([images] * 2), np.concatenate([labels] * 2))
    ranking, judging = masking.split_for_ranking(twice, np.arange(60), Silent())

    assert len(ranking.y) == 30
    assert len(judging.y) == 10
    assert not set(ranking.ids.tolist()) & set(judging.ids.tolist())


def test_classifier_comes_out_as_it_went_in(data: Data) -> None:
    model = Classifier(Quadrants(), num_classes=QUADRANTS, block=8).train()
    choose_masks(model, data, units=3, attack=PGD, samples=40)

    assert model.training
    assert model.network.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"units": 12}, "12 for the number .* means all of the 12 of layer act"),
        ({"units": 13}, "all of the 12"),
        ({"units": 0}, "none of the 12"),
        ({"units": Fraction(1, 100)}, r"0\.01 for the number of masked units means none"),
        ({"units": Fraction(1)}, "all of the 12"),
        ({"units": 3, "samples": 19}, "19 images of rows are too few"),
        ({"units": 3, "layer": "hed"}, "did you mean 'head'"),
        ({"units": 1, "layer": "head"}, "gives the classes themselves.*such as look, where, act"),
        ({"units": 3, "per_class": True, "rank": "random"}, "random units know of no class"),
        ({"units": 3, "attack": "pgd:eps=-1"}, "pgd: "),
        ({"units": 3, "attack": "pdg"}, "pgd"),
    ],
)
def test_mistakes_are_sentences(
    model: Classifier, data: Data, asked: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        choose_masks(model, data, **{"attack": PGD, "samples": 40, **asked})


def test_a_layer_that_does_not_run_is_no_output(data: Data) -> None:
    network = Quadrants()
    network.add_module("spare", nn.Linear(12, QUADRANTS))
    model = Classifier(network, num_classes=QUADRANTS).eval()

    with pytest.raises(UsageError, match="'spare' does not run in a forward pass"):
        choose_masks(model, data, units=1, layer="spare", attack=PGD, samples=40)


def test_one_class_is_an_error(model: Classifier) -> None:
    images, _ = pictures(40, 0)
    with pytest.raises(UsageError, match="are all of class 2"):
        choose_masks(model, from_arrays(images, np.full(40, 2)), units=3)


def test_classes_without_images_are_an_error(model: Classifier, data: Data) -> None:
    images, labels = pictures(80, 0)
    kept = labels != 1
    some = from_arrays(images[kept], labels[kept])
    for rank in ("importance", "sensitivity"):
        with pytest.raises(UsageError, match=r"is of class 1 \(or none"):
            choose_masks(model, some, units=3, per_class=True, rank=rank, attack=PGD)


def test_network_that_is_never_right_is_an_error(model: Classifier) -> None:
    images, labels = pictures(40, 0)
    with pytest.raises(NothingEvaluated, match="none of 20 images"):
        choose_masks(model, from_arrays(images, (labels + 1) % 4), units=3, attack=PGD)


def test_masks_on_masks_are_an_error(model: Classifier, data: Data) -> None:
    with pytest.raises(UsageError, match="has masks already"):
        choose_masks(mask_units(model, "act", torch.ones(12)), data, units=3)


def test_figures_are_those_of_an_evaluation(model: Classifier, data: Data) -> None:
    """The mask alone, and on the same images."""
    chosen = choose_masks(model, data, rank="random", units=3, samples=60, seed=4)
    found = judge_masks(model, data, chosen, attack=PGD, seed=4)

    images = from_arrays(chosen.judging.x.numpy(), chosen.judging.y.numpy())
    alone = evaluate(
        mask_units(model, chosen.layer, chosen.masks), images, [PGD], seed=4, probes=False
    )
    held = mask_judgement.find_robust(alone.attacks[0])
    assert (found.masked.adaptive.k, found.masked.adaptive.n) == (int(held.sum()), 30)
    assert found.masked.clean.k == int((alone.clean["pred_clean"] == alone.clean["label"]).sum())
    assert found.plain.static == found.plain.adaptive


def test_chance_may_choose_the_same_units(model: Classifier, data: Data) -> None:
    """Then both masks are worth the same."""
    chosen = choose_masks(model, data, rank="random", units=3, samples=60, seed=4)

    found = judge_masks(model, data, chosen._replace(control=chosen.masks), attack=PGD, seed=4)

    assert found.control == found.masked


def test_an_attack_that_does_not_know_the_mask_moves_what_is_masked() -> None:
    """A network that looks at two things: the masked attack goes for what is left."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.units = nn.Conv2d(3, 2, 1, bias=False)
            self.units.weight = nn.Parameter(torch.eye(3)[:2].view(2, 3, 1, 1))
            self.head = nn.Linear(2, 2, bias=False)
            # the first channel counts ten times as much as the second
            self.head.weight = nn.Parameter(torch.tensor([[-10.0, -1.0], [10.0, 1.0]]))

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(self.units(x).mean((2, 3)))
            return logits

    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    bright = np.where(labels, 0.03, -0.03)[:, None, None, None]
    x = (0.5 + bright + 0.002 * rng.standard_normal((60, 3, 4, 4))).astype(np.float32)
    model = Classifier(Two(), mean=(0.5,), num_classes=2, block=8).eval().requires_grad_(False)
    images = from_arrays(x, labels)
    masks = torch.tensor([0.0, 1.0])
    parts = masking.split_for_ranking(images, np.arange(60), Silent())
    chosen = ChosenMasks("units", masks, 1 - masks, 30, *parts)

    found = judge_masks(model, images, chosen, attack="fgsm:norm=l2,eps=0.2")

    # all of the step goes to the first channel, ten to one: the second crosses only if aimed at
    assert found.plain.static.k == 0
    assert found.masked.static.k == 30
    assert found.masked.adaptive.k == 0
    assert found.verdict == (
        "The gain disappears under an attack that knows the mask: this is no robustness. Clean"
        " accuracy stays as it is."
    )


def holding(make: Callable[..., Outcome], *counts: int) -> list[Outcome]:
    """Cells of 100 images of which the first so many hold."""
    return [make(np.arange(100) >= k) for k in counts]


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ((10, 40, 11, 10), "The gain disappears under an attack that knows the mask"),
        ((10, 40, 5, 10), "The gain disappears under an attack that knows the mask"),
        ((10, 40, 20, 10), "Of a gain of 30.0 points 10.0 remain under an attack that knows the"),
        ((10, 40, 39, 10), "A gain of 29.0 points remains under an attack that knows the mask, mo"),
        ((10, 40, 20, 18), "mask, which is no more than what a random mask gives: it does not"),
        ((10, 12, 11, 10), "The mask gains nothing that could be told from chance"),
        ((10, 10, 30, 10), "The mask gains nothing that could be told from chance"),
        ((10, 10, 30, 10), "The attack made for the masked network does less than the other one"),
        ((10, 20, 40, 10), "A gain of 10.0 points remains"),
    ],
)
def test_verdict_says_what_the_figures_mean(
    make_outcome: Callable[..., Outcome], held: tuple[int, int, int, int], said: str
) -> None:
    plain, static, adaptive, control = holding(make_outcome, *held)

    found = explain_mask_verdict(
        plain, BothAttacks(static, adaptive), BothAttacks(make_outcome([False] * 100), control)
    )
    assert said in found
    assert ("hinders" in found) == (held[2] - held[1] > 4)


@pytest.mark.parametrize(
    ("after", "said"),
    [
        (90, "Clean accuracy stays as it is."),
        (88, "changes by -2.0 points, which can be chance"),
        (91, "changes by +1.0 points, which can be chance"),
        (80, "It costs 10.0 points of clean accuracy."),
    ],
)
def test_cost_is_told(after: int, said: str) -> None:
    assert said in mask_judgement.explain_clean_cost(np.arange(100) < 90, np.arange(100) < after)


def test_activations_follow_from_the_rows(model: Classifier, data: Data) -> None:
    x, _ = drawn(data)

    torch.testing.assert_close(measure_activations(model, x, "act"), x.mean((1, 3)) / 12)
    assert isinstance(mask_units(model, "act", torch.ones(12)).network, Masked)
    assert isinstance(data.batch([0]), Batch)
