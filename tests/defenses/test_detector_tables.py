"""Detectors of all pairs and triples, in one pass over maps that are made once."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from toys import draw_uniform, synthetic, trained

from robusteval.datasets.arrays import from_arrays
from robusteval.datasets.dataset import Data
from robusteval.defenses import boosting, detector_fitting
from robusteval.defenses.detector_metrics import Resampling, Scored
from robusteval.defenses.detector_tables import WideView, combine, measure_combinations
from robusteval.defenses.detector_view import choose_view
from robusteval.defenses.image_variants import VariantMaker
from robusteval.errors import UsageError
from robusteval.evaluation.plan import prepare_attack
from robusteval.evaluation.work_cache import WorkCache
from robusteval.models.classifier import Classifier
from robusteval.runs.detector_record import Combination

SHAPE = (3, 12, 12)


@pytest.fixture
def wide() -> WideView:
    return WideView(("grad", "gradcam", "hirescam"), "triple", "raw", 32, False, SHAPE)


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("grad+hirescam", "pair"),
        ("gradcam+hirescam:product", "pair_product"),
        ("grad+gradcam+hirescam", "triple"),
    ],
)
def test_the_part_of_a_combination_is_what_its_own_detector_sees(
    wide: WideView, name: str, channels: str
) -> None:
    """Planes and statistics alike, to the bit."""
    maps = [draw_uniform(2, 1, 12, 12, seed=i) for i in range(3)]
    logits = torch.zeros(2, 3)
    stack, statistics = wide.measure_maps(maps, logits)

    combined = combine(name, wide)

    known = [spec.name for spec in wide.specs]
    own = choose_view(combined.members, channels, "raw", False, SHAPE)  # type: ignore[arg-type]
    expected = own.measure_maps([maps[known.index(each)] for each in combined.members], logits)
    assert torch.equal(stack[:, list(combined.planes)], expected[0])
    assert torch.equal(statistics[:, list(combined.columns)], expected[1])
    assert stack.shape[1] == wide.planes == 6


@pytest.mark.parametrize("name", ["grad", "grad+cam", "grad+grad", "grad+gradcam+hirescam:product"])
def test_combinations_that_are_none_are_named(wide: WideView, name: str) -> None:
    with pytest.raises(UsageError, match="is no detector of grad, gradcam, hirescam"):
        combine(name, wide)


def test_an_accuracy_weighs_both_labels_alike_in_every_draw() -> None:
    """Nine of ten clean rows and half of two attacked ones: .7, whatever their number."""
    label = np.repeat([0, 1], [10, 2])
    right = np.array([True] * 9 + [False] + [True, False])
    scored = Scored(np.zeros(12), label, np.arange(12))

    drawn = Resampling(12, 0).resample_rate(right, scored)

    assert float(np.nanmean(drawn)) == pytest.approx(0.7, abs=0.02)
    assert np.nanmax(drawn) <= 1


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(boosting, "ROUNDS", 20)
        yield


def measure(done: WorkCache) -> tuple[list[Combination], dict[str, str]]:
    """One attack that all fall for and one that never succeeds; a map that cannot be had."""
    model = Classifier(
        trained(), mean=(0.5,), std=(0.25,), num_classes=3, identity={"sha256": "bands"}
    ).eval()
    x, y = synthetic(60, 3)
    data: Data = from_arrays(x, y, name="bands")
    attacks = {
        "grad": prepare_attack("pgd:eps=24/255,steps=6", model, data.shape),
        "hirescam": prepare_attack("noise:eps=0.001,tries=1", model, data.shape),
    }
    names = ["grad+gradcam", "gradcam+hirescam", "grad+cam"]
    interpreters = ["grad", "gradcam", "hirescam", "cam"]
    return measure_combinations(model, data, names, interpreters, attacks, samples=60, done=done)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> WorkCache:
    return WorkCache(tmp_path_factory.mktemp("detectors"))


@pytest.fixture(scope="module")
def found(quick: None, cache: WorkCache) -> tuple[list[Combination], dict[str, str]]:
    return measure(cache)


def test_a_call_after_a_stop_attacks_and_fits_nothing_again(
    found: tuple[list[Combination], dict[str, str]],
    cache: WorkCache,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*given: object, **more: object) -> None:
        pytest.fail("it is done already")

    monkeypatch.setattr(VariantMaker, "perturb_rows", fail)
    monkeypatch.setattr(detector_fitting, "fit_task", fail)

    assert measure(cache) == found


def test_each_combination_has_figures_or_a_reason(
    found: tuple[list[Combination], dict[str, str]],
) -> None:
    combinations, missing = found

    (one,) = combinations
    assert (one.name, one.attacks) == ("grad+gradcam", ("pgd:eps=24/255,steps=6",))
    assert one.false_alarms.n == one.grouped.n == 12
    assert 0 < one.flagged.n <= 12
    for each in (one.as_published, one.grouped, one.auc, one.without_statistics):
        assert 0 <= each.low <= each.value <= each.high <= 1
    assert "succeeds on" in missing["gradcam+hirescam"]
    assert "cam: needs a network" in missing["grad+cam"]
