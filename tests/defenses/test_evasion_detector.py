"""The detector as a defence of ART."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from art.defences.detector.evasion import EvasionDetector
from art.estimators.classification import PyTorchClassifier
from toys import Bands, synthetic

from robusteval.art.as_seen import AsSeen
from robusteval.attacks.pgd import pgd
from robusteval.defenses import boosting
from robusteval.defenses.evasion_detector import MapDetection
from robusteval.errors import UsageError
from robusteval.models.classifier import Classifier
from robusteval.search.balls import quantise

Array = np.ndarray[Any, Any]
INTERPRETERS = ("grad", "gradcam")


@pytest.fixture(scope="module")
def estimator(trained_bands: Bands) -> PyTorchClassifier:
    """The trained network as ART sees it."""
    return PyTorchClassifier(
        model=trained_bands,
        loss=torch.nn.CrossEntropyLoss(),
        input_shape=(3, 12, 12),
        nb_classes=3,
        clip_values=(0, 1),
        preprocessing=(0.5, 0.25),
        device_type="cpu",
    )


@pytest.fixture(scope="module")
def pairs(estimator: PyTorchClassifier) -> tuple[Array, Array]:
    """Images as they are, then the same ones attacked; and which is which."""
    images, labels = synthetic(70, seed=1)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float().div(255).contiguous()
    model = Classifier(AsSeen(estimator), num_classes=3).eval()
    x_adv = pgd(model, x, torch.from_numpy(labels), eps=24 / 255, steps=8)
    both = torch.cat([quantise(x), quantise(x_adv)]).detach().numpy()
    return both, np.repeat([0, 1], len(x))


def made(estimator: PyTorchClassifier, **given: Any) -> MapDetection:
    return MapDetection(estimator, interpreters=INTERPRETERS, extractor="raw", **given)


@pytest.fixture(scope="module")
def fitted(estimator: PyTorchClassifier, pairs: tuple[Array, Array]) -> MapDetection:
    detector = made(estimator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(boosting, "ROUNDS", 60)
        detector.fit(*pairs)
    return detector


def test_it_is_a_detector_of_art(fitted: MapDetection) -> None:
    assert isinstance(fitted, EvasionDetector)
    assert fitted.get_params() == {
        "interpreters": INTERPRETERS,
        "channels": None,
        "extractor": "raw",
        "confidence": False,
        "fpr": 0.05,
        "seed": 0,
    }


def test_report_and_alarms_belong_together(
    fitted: MapDetection, pairs: tuple[Array, Array]
) -> None:
    x, y = pairs

    report, flagged = fitted.detect(x)

    assert flagged.dtype == np.bool_
    assert flagged.shape == (len(x),)
    np.testing.assert_allclose(report["predictions"].sum(1), 1)
    np.testing.assert_array_equal(report["predictions"][:, 1], report["scores"])
    assert report["scores"][y == 1].mean() > report["scores"][y == 0].mean() + 0.1
    assert flagged[y == 1].mean() > flagged[y == 0].mean()


def test_result_does_not_depend_on_the_batch(
    fitted: MapDetection, pairs: tuple[Array, Array]
) -> None:
    x = pairs[0][:20]
    before = x.copy()

    whole, part = fitted.detect(x)[0]["scores"], fitted.detect(x, batch_size=3)[0]["scores"]

    np.testing.assert_array_equal(whole, part)
    np.testing.assert_array_equal(x, before)
    assert len(fitted.detect(x[:0])[1]) == 0


def test_model_comes_out_as_it_went_in(
    estimator: PyTorchClassifier, trained_bands: Bands, pairs: tuple[Array, Array]
) -> None:
    before = {name: value.clone() for name, value in trained_bands.state_dict().items()}
    mode, grads = trained_bands.training, [p.grad for p in trained_bands.parameters()]
    detector = made(estimator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(boosting, "ROUNDS", 3)
        detector.fit(*pairs, batch_size=32)

    assert trained_bands.training == mode
    assert all(p.grad is g for p, g in zip(trained_bands.parameters(), grads, strict=True))
    for name, value in trained_bands.state_dict().items():
        assert torch.equal(value, before[name])


def test_stricter_threshold_flags_less(fitted: MapDetection, pairs: tuple[Array, Array]) -> None:
    loose = fitted.detect(pairs[0])[1]
    fitted.set_params(fpr=0.01)
    strict = fitted.detect(pairs[0])[1]
    fitted.set_params(fpr=0.05)

    assert not (strict & ~loose).any()


def test_it_must_be_fitted_before_it_detects(
    estimator: PyTorchClassifier, pairs: tuple[Array, Array]
) -> None:
    with pytest.raises(ValueError, match="must be fitted"):
        made(estimator).detect(pairs[0])


@pytest.mark.parametrize(
    "given",
    [
        {"fpr": 0.2},
        {"extractor": "vgg16"},
        {"channels": "triple"},
        {"channels": "quartet"},
        {"interpreters": ("grad", "nothing")},
        {"interpreters": ("grad",)},
    ],
)
def test_parameters_out_of_range_are_refused(
    estimator: PyTorchClassifier, given: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=r"."):
        MapDetection(estimator, **{"interpreters": INTERPRETERS, **given})
    detector = made(estimator)
    before = detector.get_params()
    with pytest.raises(ValueError, match=r"."):
        detector.set_params(**given)
    assert detector.get_params() == before


def test_other_estimators_are_refused(trained_bands: Bands) -> None:
    module: Any = trained_bands
    with pytest.raises(TypeError, match="PyTorchClassifier"):
        MapDetection(module)
    with warnings.catch_warnings(action="ignore"):
        other = PyTorchClassifier(
            model=trained_bands,
            loss=torch.nn.CrossEntropyLoss(),
            input_shape=(3, 12, 12),
            nb_classes=3,
            clip_values=(0, 255),
            device_type="cpu",
        )
    with pytest.raises(ValueError, match="clip_values"):
        MapDetection(other)


def test_images_that_cannot_be_paired_are_refused(
    estimator: PyTorchClassifier, pairs: tuple[Array, Array]
) -> None:
    x, y = pairs
    detector = made(estimator)
    with pytest.raises(ValueError, match="as many attacked images as others"):
        detector.fit(x[:-1], y[:-1])
    with pytest.raises(ValueError, match="groups must name"):
        detector.fit(x, y, groups=np.zeros(3))
    with pytest.raises(ValueError, match="from 0 to 1"):
        detector.fit(x, 2 * y)
    with pytest.raises(TypeError, match="unknown arguments"):
        detector.fit(x, y, epochs=3)
    with pytest.raises(UsageError, match="attacked images of"):
        detector.fit(x[60:80], y[60:80])
