"""What ART hands over, and what it asks for: refused where it begins, or answered as ART would."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from art.data_generators import NumpyDataGenerator
from art.defences.preprocessor import JpegCompression, SpatialSmoothing
from art.estimators.classification import PyTorchClassifier
from art.metrics import adversarial_accuracy, empirical_robustness
from torch import Tensor, nn
from toys import Bands, synthetic

from robusteval.art.metrics import ORDERS, register_attacks
from robusteval.art.to_art import Array, as_estimator
from robusteval.attacks.advedge import AdvEdge
from robusteval.attacks.pgd import PGD
from robusteval.defenses.evasion_detector import MapDetection
from robusteval.defenses.trainer import RobustTrainer
from robusteval.models.classifier import Classifier
from robusteval.registry import ATTACKS, INTERPRETERS


def draw(n: int, seed: int = 5) -> tuple[Array, Array]:
    x, y = synthetic(n, seed=seed)
    images = np.ascontiguousarray(x.transpose(0, 3, 1, 2)).astype(np.float32) / np.float32(255)
    return images, y


def build(network: nn.Module, **options: Any) -> PyTorchClassifier:
    settings: dict[str, Any] = {
        "loss": nn.CrossEntropyLoss(),
        "input_shape": (3, 12, 12),
        "nb_classes": 3,
        "clip_values": (0.0, 1.0),
        "device_type": "cpu",
    }
    return PyTorchClassifier(model=network, **(settings | options))


@pytest.fixture
def estimator(bands: Classifier) -> PyTorchClassifier:
    return as_estimator(bands, input_shape=(3, 12, 12))


@pytest.mark.parametrize("shape", [(5, 12), (5, 12, 12), (5, 1, 3, 12, 12)])
@pytest.mark.parametrize("kind", [ATTACKS, INTERPRETERS], ids=["attacks", "interpreters"])
def test_data_that_are_no_images_are_refused_where_a_function_begins(
    bands: Classifier, kind: Any, shape: tuple[int, ...]
) -> None:
    """By every attack and interpreter, also where the network would take them."""
    x, y = torch.zeros(shape), torch.zeros(5, dtype=torch.int64)

    for name in kind.entries:
        with pytest.raises(ValueError, match=r"x must be images \(n, c, h, w\)"):
            kind.load(name)(bands, x, y)


@pytest.mark.parametrize(
    ("defence", "named"),
    [
        (JpegCompression(clip_values=(0, 1), quality=60, channels_first=True), "has none in torch"),
        (SpatialSmoothing(window_size=4, channels_first=True), "use SpatialSmoothingPyTorch"),
    ],
    ids=["JPEG", "smoothing"],
)
def test_maps_that_numpy_would_have_to_derive_are_refused_at_construction(
    trained_bands: Bands, defence: Any, named: str
) -> None:
    """The twin in torch is named; a map that needs one derivative is followed."""
    estimator = build(trained_bands, preprocessing_defences=[defence])

    with pytest.raises(ValueError, match=named):
        AdvEdge(estimator, interpreter="grad", warmup=7, verbose=False)
    PGD(estimator, steps=2, verbose=False)


class Writing(nn.Module):
    """Normalises where the images lie, and answers in half precision."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Any:
        return self.network(x.sub_(0.5).div_(0.25)).half()


def test_networks_that_write_to_their_input_are_attacked(trained_bands: Bands) -> None:
    images, y = draw(12)
    before = images.copy()

    # half precision cannot hold the slope of cross-entropy where the model is sure
    settings: dict[str, Any] = {"eps": 32 / 255, "steps": 20, "loss": "margin", "verbose": False}
    x_adv = PGD(build(Writing(trained_bands)), **settings).generate(images, y)

    assert np.array_equal(images, before)
    with torch.no_grad():
        pred = trained_bands((torch.from_numpy(x_adv) - 0.5) / 0.25).argmax(1).numpy()
    assert (pred == y).mean() < 0.5


@pytest.mark.parametrize("pack", [lambda z: (z, z), lambda z: {"out": z}], ids=["tuple", "dict"])
def test_networks_that_return_several_things_are_named(trained_bands: Bands, pack: Any) -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = trained_bands

        def forward(self, x: Tensor) -> Any:
            return pack(self.network(x))

    images, y = draw(4)
    with pytest.raises(ValueError, match="one tensor of logits"):
        PGD(build(Several()), verbose=False).generate(images, y)


def test_the_trainer_is_one_of_art(trained_bands: Bands) -> None:
    """It predicts, follows a generator, and measures on images that it does not train on."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        trainer, twin = (
            RobustTrainer(build(Bands()), verbose=False, epochs=4, batch_size=20, rate=0.01)
            for _ in range(2)
        )
        networks: list[Any] = [each.get_classifier().model for each in (trainer, twin)]
        networks[1].load_state_dict(networks[0].state_dict())
    x, y = draw(60)
    held_out = draw(21, seed=9)

    trainer.fit(x, np.eye(3)[y], validation_data=held_out)
    twin.fit_generator(NumpyDataGenerator(x, y, batch_size=20, shuffle=False), nb_epochs=4)

    assert len(trainer.validation_accuracy) == 4
    right = (trainer.predict(held_out[0], batch_size=5).argmax(1) == held_out[1]).mean()
    assert trainer.validation_accuracy[-1] == pytest.approx(right)
    assert twin.validation_accuracy == []
    assert np.array_equal(trainer.predict(x), twin.predict(x))
    with pytest.raises(ValueError, match=r"images \(n, c, h, w\)"):
        trainer.fit(x.reshape(60, -1), y)
    with pytest.raises(ValueError, match=r"takes images \(3, 12, 12\)"):
        trainer.fit(x.transpose(0, 2, 3, 1), y)


@pytest.mark.parametrize("form", ["one-hot", "column", "plain"])
def test_a_detector_takes_labels_as_art_does(estimator: PyTorchClassifier, form: str) -> None:
    """All forms give the same detector; what names no class is refused."""
    x, _ = draw(40)
    x_adv = np.clip(x + np.float32(0.2) * np.sign(x - 0.4), 0, 1)
    everything, y = np.concatenate([x, x_adv]), np.repeat([0, 1], 40)
    forms = {"one-hot": np.eye(2)[y], "column": y[:, None], "plain": y}
    found = []
    for labels in (y, forms[form]):
        detector = MapDetection(estimator, interpreters=("grad", "input_x_gradient"))
        detector.set_params(extractor="raw")
        detector.fit(everything, labels)
        found.append(detector.detect(everything)[0]["scores"])

    assert np.array_equal(found[0], found[1])
    with pytest.raises(ValueError, match="labels must"):
        detector.fit(everything, np.eye(3)[y])


def test_metrics_of_art_know_our_attacks_by_name(
    estimator: PyTorchClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once they are asked to; names of ART's own stay what they are."""
    metrics = sys.modules["art.metrics.metrics"]
    before = dict(metrics.SUPPORTED_METHODS)
    monkeypatch.setattr(metrics, "SUPPORTED_METHODS", dict(before))
    x, y = draw(16)
    settings = {"norm": np.inf, "eps": 12 / 255, "steps": 20}

    names = register_attacks()
    share = adversarial_accuracy(estimator, x, y, "robusteval:pgd", settings)
    size = empirical_robustness(estimator, x, "robusteval:pgd", settings)

    assert {"robusteval:pgd", "robusteval:sigma_zero", "robusteval:fgsm"} <= set(names)
    known = metrics.SUPPORTED_METHODS
    assert {name: known[name] for name in before} == before
    x_adv = PGD(estimator, eps=12 / 255, steps=20, verbose=False).generate(x)
    pred, pred_adv = (estimator.predict(each).argmax(1) for each in (x, x_adv))
    assert share == pytest.approx(((pred_adv == pred) & (pred == y)).sum() / (pred == y).sum())
    changed = pred_adv != pred
    reach, all_of_it = (np.abs(each).max((1, 2, 3))[changed] for each in (x_adv - x, x))
    assert size == pytest.approx((reach / all_of_it).mean(), rel=1e-4)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("sigma_zero", {"norm": 0, "steps": 30}), ("sigma_zero", {"norm": "l0_pixels", "steps": 30})],
)
def test_metrics_count_in_the_norm_of_the_attack(
    estimator: PyTorchClassifier,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    settings: dict[str, Any],
) -> None:
    """By l2, as ART does, where NumPy has no such norm."""
    metrics = sys.modules["art.metrics.metrics"]
    monkeypatch.setattr(metrics, "SUPPORTED_METHODS", {})
    register_attacks()

    size = empirical_robustness(estimator, draw(6)[0], f"robusteval:{name}", settings)

    assert 0 < size < 1
    assert set(ORDERS) == {"linf", "l2", "l1", "l0"}
