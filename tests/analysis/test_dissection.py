"""Units with known concepts and known sensitivity."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from robusteval.analysis.dissection import (
    Dissection,
    Sensitivity,
    choose_thresholds,
    compute_unit_maps,
    correlate_concepts,
    dissect,
    measure_sensitivity,
)
from robusteval.datasets.concepts import Concept, Generated, Probe
from robusteval.models.classifier import Classifier


class Colours(nn.Module):
    """Three units that are the channels of the image, then pooling and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.channels = nn.Conv2d(3, 3, 1, bias=False)
        self.head = nn.Linear(3, 3)
        with torch.no_grad():
            self.channels.weight.copy_(torch.eye(3).view(3, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.channels(x))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


class Corners:
    """Images whose first channel is bright in one corner, which is the concept."""

    name = "corners"
    concepts: tuple[Concept, ...] = (
        Concept("corner", "place"),
        Concept("other", "place"),
        Concept("blue", "colour"),
    )

    def __len__(self) -> int:
        return 10

    def probe(self, index: int) -> Probe:
        mask = torch.zeros(8, 8, dtype=torch.bool)
        mask[:1, :1] = True
        image = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(index)) * 0.1
        image[0, mask] = 1.0
        return Probe(image, {0: mask, 1: ~mask}, frozenset({"place"}))


@pytest.fixture
def colours() -> Classifier:
    return Classifier(Colours(), num_classes=3, block=4).eval()


def test_a_unit_that_is_its_concept_overlaps_with_it_entirely(colours: Classifier) -> None:
    """Ten places of 640 show it, all alike; the unit fires at these and nowhere else."""
    found = dissect(colours, Corners(), layer="channels")

    assert found.overlap[0].tolist() == [1, 0, 0]
    assert (int(found.best[0]), float(found.score[0])) == (0, 1)


def test_units_of_drawn_concepts_are_found(colours: Classifier) -> None:
    """The red channel minus nothing fires for white; a red detector for red."""
    weight = torch.tensor([[1.0, -1.0, -1.0], [-1.0, 1.0, -1.0], [-1.0, -1.0, 1.0]])
    with torch.no_grad():
        network = colours.network
        assert isinstance(network, Colours)
        network.channels.weight.copy_(weight.view(3, 3, 1, 1))
    concepts = Generated((3, 24, 24), count=120)

    found = dissect(colours, concepts, batch=17)

    assert [concepts.concepts[int(k)].name for k in found.best] == ["red", "green", "blue"]
    assert bool(found.matched.all())
    other = dissect(colours, concepts, batch=50)
    assert torch.equal(found.overlap, other.overlap)


def test_overlap_is_counted_only_where_somebody_looked(colours: Classifier) -> None:
    """No image is annotated for colour, so no firing counts against it."""
    found = dissect(colours, Corners(), layer="channels")

    assert bool((found.overlap[:, 2] == 0).all())


def test_a_limit_draws_some_probes(colours: Classifier) -> None:
    done: list[int] = []

    dissect(colours, Generated((3, 16, 16), count=30), limit=10, progress=done.append)

    assert sum(done) == 20


def test_thresholds_are_exceeded_by_half_a_percent() -> None:
    places = torch.arange(1000.0).flip(0)[None]

    assert choose_thresholds(places).tolist() == [995]
    assert choose_thresholds(torch.ones(1, 1000)).tolist() == [math.inf]


def test_a_network_without_feature_maps_is_refused() -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).eval()

    with pytest.raises(ValueError, match="name a layer"):
        compute_unit_maps(flat, torch.rand(1, 3, 2, 2))


def test_sensitivity_counts_natural_deviations(colours: Classifier) -> None:
    """One channel is moved by a tenth, the others are left alone."""
    x = torch.rand(6, 3, 10, 10, generator=torch.Generator().manual_seed(0)) * 0.5
    x_adv = x.clone()
    x_adv[:, 1] += 0.1

    found = measure_sensitivity(colours, x, x_adv, torch.arange(6))

    deviation = x.double().mean((2, 3)).std(0)
    assert found.attack.tolist() == pytest.approx([0, 0.1 / deviation[1].item(), 0], rel=1e-5)
    assert bool((found.noise > 0).all())
    assert bool((found.noise < found.attack[1]).all())


def test_a_unit_that_never_moves_is_not_sensitive(colours: Classifier) -> None:
    x = torch.zeros(3, 3, 4, 4)

    found = measure_sensitivity(colours, x, x + 0.1, torch.arange(3))

    assert found.attack.tolist() == [0, 0, 0]


def test_the_link_is_the_correlation_of_ranks() -> None:
    score = torch.tensor([0.0, 0.01, 0.05, 0.2, 0.3])
    concepts = Dissection(score[:, None], torch.zeros(5).long(), score)
    up = Sensitivity(torch.tensor([1.0, 2, 3, 4, 9]), torch.tensor([5.0, 4, 3, 2, 1]))

    found = correlate_concepts(up, concepts)

    assert [found.correlation, found.noise] == pytest.approx([1, -1])
    assert (found.matched, found.units) == (3, 5)
    mixed = correlate_concepts(Sensitivity(torch.tensor([2.0, 1, 3, 5, 4]), up.noise), concepts)
    assert mixed.low < mixed.correlation < mixed.high
    flat = correlate_concepts(Sensitivity(torch.ones(5), up.noise), concepts)
    assert math.isnan(flat.correlation)
    assert math.isnan(flat.gain_low)


def test_the_gain_over_noise_is_over_units_drawn_anew() -> None:
    """Of the same correlations none, whatever is drawn; of opposite ones nearly two."""
    n = 40
    score = torch.linspace(0, 1, n)
    concepts = Dissection(score[:, None], torch.zeros(n).long(), score)
    even, order = torch.arange(n) % 2, torch.arange(n).double()

    same = correlate_concepts(Sensitivity(order, 3 * order + 1), concepts)
    assert (same.gain, same.gain_low, same.gain_high) == pytest.approx((0, 0, 0))
    apart = correlate_concepts(Sensitivity(order, -order), concepts)
    assert (apart.gain, apart.gain_low, apart.gain_high) == pytest.approx((2, 2, 2))
    some = correlate_concepts(Sensitivity(order + 9 * even, order * even), concepts)
    assert some.gain_low < some.gain < some.gain_high
    assert some.gain == pytest.approx(some.correlation - some.noise)
