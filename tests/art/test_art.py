"""Attack functions as ART attacks, and ART attacks as attack functions."""

from __future__ import annotations

import copy
import inspect
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from art import config
from art.attacks.evasion import (
    BoundaryAttack,
    FastGradientMethod,
    HopSkipJump,
    ProjectedGradientDescentPyTorch,
)
from art.defences.preprocessor import FeatureSqueezing, SpatialSmoothing
from art.defences.preprocessor.preprocessor import PreprocessorPyTorch
from art.defences.trainer import AdversarialTrainer
from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing
from art.estimators.classification import BlackBoxClassifier, PyTorchClassifier
from art.exceptions import EstimatorError
from torch import Tensor, nn
from toys import Bands, Linear, asked, attackable, synthetic

from robusteval.art.as_seen import AsSeen
from robusteval.art.from_art import ArtFunction, from_art, list_art_attacks
from robusteval.art.to_art import Array, ArtAttack, Float32Classifier, as_estimator
from robusteval.attacks.advedge import AdvEdge
from robusteval.attacks.pgd import FGSM, PGD
from robusteval.datasets.dataset import image_id
from robusteval.defenses.evasion_detector import MapDetection
from robusteval.defenses.trainer import RobustTrainer
from robusteval.errors import RunError, UsageError
from robusteval.models.classifier import Classifier
from robusteval.models.seeds import sample_seeds
from robusteval.registry import ATTACKS
from robusteval.runs.types import Threat

NAMES = list(ATTACKS.entries)
EPS, STEPS = 0.06, 6
# for what ART's border does alike for all of them: a ball, a minimum norm, behind a detector
SOME = ("pgd", "sigma_zero", "evade")
BOUNDED = [name for name in NAMES if "eps" in asked(name, eps=EPS)]


def art_class(name: str) -> type[ArtAttack]:
    """The one ART class of a registered function."""
    function = ATTACKS.load(name)
    module = sys.modules[function.__module__]
    classes: list[type[ArtAttack]] = [getattr(module, each) for each in module.__art_classes__]
    (found,) = [c for c in classes if issubclass(c, ArtAttack) and c.perturb is function]
    return found


@pytest.fixture
def estimator(bands: Classifier, request: pytest.FixtureRequest) -> PyTorchClassifier:
    """The trained network as ART sees it, in the form that the attack of a test needs."""
    parameters = getattr(request.node, "callspec", None)
    name = parameters.params.get("name", "") if parameters else ""
    return as_estimator(attackable(name, bands), input_shape=(3, 12, 12))


@pytest.fixture
def images() -> Array:
    """Eight images ``(8, 3, 12, 12)`` that the trained network gets right."""
    return photos(8)


def photos(n: int) -> Array:
    x, _ = synthetic(n, seed=5)
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2)).astype(np.float32) / np.float32(255)


def plain_estimator(**options: Any) -> PyTorchClassifier:
    """An untrained network in ART's own class."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Bands().eval()
    settings: dict[str, Any] = {
        "loss": nn.CrossEntropyLoss(),
        "input_shape": (3, 12, 12),
        "nb_classes": 3,
        "clip_values": (0.0, 1.0),
        "device_type": "cpu",
    }
    made = options.pop("made", PyTorchClassifier)
    return made(model=options.pop("model", network), **(settings | options))


def predicted(estimator: PyTorchClassifier, x: Array) -> Array:
    with torch.no_grad():
        return np.asarray(AsSeen(estimator)(torch.from_numpy(x)).argmax(1).numpy())


@pytest.mark.parametrize("name", NAMES)
def test_the_class_gives_what_the_function_gives(
    bands: Classifier, estimator: PyTorchClassifier, images: Array, name: str
) -> None:
    y = predicted(estimator, images)
    ids = np.array([image_id(image) for image in images], dtype=np.uint64)
    x = torch.from_numpy(images)

    settings = asked(name, eps=EPS, steps=STEPS)
    expected = ATTACKS.load(name)(
        attackable(name, bands), x, torch.from_numpy(y), seeds=sample_seeds(3, ids), **settings
    )

    actual = art_class(name)(estimator, **settings, seed=3, verbose=False).generate(images, y)
    assert np.array_equal(expected.numpy(), actual)


@pytest.mark.parametrize("name", SOME)
def test_labels_in_every_format_give_the_same(
    estimator: PyTorchClassifier, images: Array, name: str
) -> None:
    attack, y = (
        art_class(name)(estimator, **asked(name, eps=EPS, steps=STEPS), verbose=False),
        predicted(estimator, images),
    )

    expected = attack.generate(images, y)

    for labels in (y[:, None], np.eye(3, dtype=np.float32)[y], y.astype(np.float64), None):
        assert np.array_equal(expected, attack.generate(images, labels))


@pytest.mark.parametrize(
    ("name", "dtype"), [(name, np.float32) for name in NAMES] + [("pgd", np.float64)]
)
def test_results_are_float32_in_box_and_ball_and_the_input_stays(
    estimator: PyTorchClassifier, images: Array, name: str, dtype: type
) -> None:
    given: Array = images.astype(dtype)
    kept = given.copy()

    x_adv = art_class(name)(estimator, **asked(name, eps=EPS, steps=STEPS), verbose=False).generate(
        given
    )

    assert np.array_equal(kept, given)
    assert (x_adv.dtype, x_adv.shape) == (np.float32, given.shape)
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    if name in BOUNDED and ATTACKS.entry(name).norms[0] == "linf":
        assert np.abs(x_adv.astype(np.float64) - images).max() <= EPS


@pytest.mark.parametrize("name", BOUNDED)
def test_a_radius_of_zero_returns_the_input(
    estimator: PyTorchClassifier, images: Array, name: str
) -> None:
    attack = art_class(name)(estimator, **asked(name, eps=0.0, steps=STEPS), verbose=False)

    assert np.array_equal(images, attack.generate(images))


@pytest.mark.parametrize("name", NAMES)
def test_the_batch_size_does_not_matter(
    estimator: PyTorchClassifier, images: Array, name: str
) -> None:
    """Bit for bit, as a Classifier calls its network with blocks of one size; order included."""
    attack = art_class(name)(
        estimator, **asked(name, eps=EPS, steps=STEPS), batch_size=8, verbose=False
    )
    images = images[:5]

    expected = attack.generate(images)

    for batch_size in (1, 3):
        attack.set_params(batch_size=batch_size)
        assert np.array_equal(expected, attack.generate(images))
    assert np.array_equal(expected[::-1], attack.generate(images[::-1]))


# a detector watches nothing but a Classifier
@pytest.mark.parametrize("name", [name for name in NAMES if name != "evade"])
def test_the_batch_size_hardly_matters_to_any_other_module(images: Array, name: str) -> None:
    """Kernels depend on the batch, and the sign of a tiny gradient on the kernel."""
    attack = art_class(name)(plain_estimator(), **asked(name, eps=EPS, steps=5), verbose=False)

    whole = attack.generate(images)
    attack.set_params(batch_size=1)

    assert np.isclose(whole, attack.generate(images), atol=1e-5).mean() > 0.98


@pytest.mark.parametrize("name", NAMES)
def test_empty_and_single_batches_work(
    estimator: PyTorchClassifier, images: Array, name: str
) -> None:
    attack = art_class(name)(estimator, **asked(name, eps=EPS, steps=STEPS), verbose=False)

    assert attack.generate(images[:0], np.zeros(0, dtype=np.int64)).shape == (0, 3, 12, 12)
    assert np.array_equal(attack.generate(images)[:1], attack.generate(images[:1]))


class Bent(Linear):
    """The same answers by logits that are not linear: its maps change with the image."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits * (1 + logits.square())


@pytest.mark.parametrize("name", NAMES)
def test_two_classes_one_channel_and_an_oblong_work(grey_images: Tensor, name: str) -> None:
    bent = Classifier(Bent((1, 6, 5)), num_classes=2).eval()
    estimator = as_estimator(attackable(name, bent), input_shape=(1, 6, 5))
    x, y = grey_images.numpy(), predicted(estimator, grey_images.numpy())

    x_adv = art_class(name)(estimator, **asked(name, eps=0.3), verbose=False).generate(
        x, np.eye(2)[y]
    )

    assert x_adv.shape == x.shape
    if ATTACKS.entries[name].knowledge == "white-box":
        assert (predicted(estimator, x_adv) != y).all()


@pytest.mark.parametrize("name", ["pgd", "noise"])
def test_the_seed_decides_what_is_random(
    estimator: PyTorchClassifier, images: Array, name: str
) -> None:
    make, state = art_class(name), torch.get_rng_state()
    short: dict[str, Any] = (
        {"step": 1e-5, "steps": 2} if name == "pgd" else {}
    )  # not as far as a corner

    first, same, other = (
        make(estimator, eps=1e-4, **short, seed=seed, verbose=False).generate(images)
        for seed in (0, 0, 1)
    )

    assert np.array_equal(first, same)
    assert not np.array_equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, bool) for name in NAMES] + [("pgd", np.float32), ("pgd", np.float64)],
)
def test_masked_values_stay(
    estimator: PyTorchClassifier, images: Array, name: str, kind: type
) -> None:
    mask: Array = np.zeros((12, 12), dtype=kind)
    mask[:6] = 1

    x_adv = art_class(name)(
        estimator, **asked(name, eps=EPS, steps=2 * STEPS), batch_size=3, verbose=False
    ).generate(images, mask=mask)

    assert np.array_equal(images[:, :, 6:], x_adv[:, :, 6:])
    assert not np.array_equal(images, x_adv)


@pytest.mark.parametrize(
    "mask",
    [
        np.ones((12, 12), dtype=np.int64),
        np.ones((5, 12), dtype=np.float32),
        np.ones((2, 8, 3, 12, 12), dtype=np.float32),
        np.full((12, 12), -1.0),
        np.full((12, 12), np.nan),
    ],
    ids=["int", "shape", "dimensions", "negative", "nan"],
)
def test_odd_masks_are_refused(estimator: PyTorchClassifier, images: Array, mask: Array) -> None:
    with pytest.raises(ValueError, match="mask"):
        PGD(estimator).generate(images, mask=mask)


def shifted(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    seeds: Tensor | None = None,
    shift: float = 0.1,
) -> Tensor:
    """An attack without goal and mask."""
    return (x + shift).clamp(0, 1)


class Shifted(ArtAttack):
    """The same for ART."""

    perturb = staticmethod(shifted)


def test_an_attack_that_cannot_keep_to_a_mask_says_so(
    estimator: PyTorchClassifier, images: Array
) -> None:
    attack = Shifted(estimator, verbose=False)

    assert attack.attack_params == ["shift", "batch_size", "verbose", "seed"]
    assert np.array_equal(np.clip(images + np.float32(0.1), 0, 1), attack.generate(images))
    with pytest.raises(ValueError, match="Shifted cannot keep to a mask"):
        attack.generate(images, mask=np.ones((12, 12), dtype=np.bool_))


def test_images_that_are_wrong_already_are_returned_unchanged(
    estimator: PyTorchClassifier, images: Array
) -> None:
    y = predicted(estimator, images)
    y[:4] = (y[:4] + 1) % 3

    x_adv = PGD(estimator, eps=EPS, verbose=False).generate(images, y)

    changed = (x_adv != images).any((1, 2, 3))
    assert changed.tolist() == [False] * 4 + [True] * 4


def test_targets_are_reached_and_cannot_be_guessed(
    estimator: PyTorchClassifier, images: Array
) -> None:
    attack = PGD(estimator, targeted=True, eps=0.3, verbose=False)
    goal = (predicted(estimator, images) + 1) % 3

    assert attack.targeted
    assert np.array_equal(goal, predicted(estimator, attack.generate(images, goal)))
    with pytest.raises(ValueError, match="give y"):
        attack.generate(images)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (photos(2) * 2 - 1, None, r"must lie in \[0, 1\], not \[-0"),
        ((photos(2) * 255).astype(np.uint8), None, r"not \[\d+, \d+\]"),
        (np.full((2, 3, 12, 12), np.nan), None, "nan"),
        (photos(2)[0], None, r"\(n, c, h, w\)"),
        (photos(2), np.array([0, 3]), "from 0 to 2"),
        (photos(2), np.array([-1, 0]), "from 0 to 2"),
        (photos(2), np.array([0.5, 1.0]), "whole numbers"),
        (photos(2), np.array([0]), "shape"),
        (photos(2), np.eye(2), "shape"),
        (photos(2), np.zeros((2, 3)), "name a class"),
    ],
)
def test_odd_images_and_labels_are_refused(
    estimator: PyTorchClassifier, x: Array, y: Array | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        FGSM(estimator).generate(x, y)


def test_starting_points_are_ignored_and_other_arguments_refused(
    estimator: PyTorchClassifier, images: Array
) -> None:
    attack = FGSM(estimator)

    assert np.array_equal(attack.generate(images), attack.generate(images, x_adv_init=images))
    with pytest.raises(TypeError, match="unknown argument of generate 'maks'"):
        attack.generate(images, maks=images)


@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        ({"eps": -0.1}, ValueError, "eps must be from 0 to 1"),
        ({"eps": "0.1"}, TypeError, "eps must be float"),
        ({"eps": True}, TypeError, "eps must be float"),
        ({"steps": 2.5}, TypeError, "steps must be int"),
        ({"steps": 0}, ValueError, "steps"),
        ({"step": "big"}, TypeError, "step must be float or None"),
        ({"norm": "l7"}, ValueError, "norm must be linf, l2"),
        ({"stop": "soon"}, ValueError, "stop must be 8bit, float, never"),
        ({"targeted": "yes"}, ValueError, "targeted must be bool"),
        ({"random_start": 1}, ValueError, "random_start must be bool"),
        ({"verbose": 1}, ValueError, "verbose must be bool"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"seed": 0.5}, TypeError, "seed must be int"),
        ({"summary_writer": True}, ValueError, "summary_writer"),
        ({"step_size": 0.1}, TypeError, "'step_size'.*known are targeted, norm, eps"),
    ],
)
def test_bad_parameters_are_refused(
    estimator: PyTorchClassifier, parameters: dict[str, Any], error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        PGD(estimator, **parameters)


def test_parameters_of_numpy_are_as_good_as_any(estimator: PyTorchClassifier) -> None:
    attack = PGD(estimator, eps=np.float64(0.1), steps=np.int64(3), random_start=np.bool_(False))

    assert vars(attack)["eps"] == 0.1


def test_set_params_changes_all_or_nothing(estimator: PyTorchClassifier) -> None:
    attack = PGD(estimator)
    attack.set_params(eps=0.01, targeted=True, verbose=False)
    before = {name: getattr(attack, name) for name in attack.attack_params}

    with pytest.raises(ValueError, match="steps"):
        attack.set_params(eps=0.5, steps=0)
    with pytest.raises(ValueError, match="max_iter"):
        attack.set_params(eps=0.5, max_iter=3)

    assert (before["eps"], before["targeted"], before["verbose"]) == (0.01, True, False)
    assert before == {name: getattr(attack, name) for name in attack.attack_params}
    assert attack.targeted is True


def test_help_and_repr_show_the_parameters(estimator: PyTorchClassifier) -> None:
    signature = inspect.signature(PGD)

    assert list(signature.parameters)[:4] == ["estimator", "targeted", "norm", "eps"]
    assert list(signature.parameters)[-4:] == ["batch_size", "verbose", "seed", "summary_writer"]
    assert signature.parameters["steps"].default == 40
    assert "norm=linf, eps=0.25, steps=40" in repr(PGD(estimator, eps=0.25))


def test_a_deep_copy_attacks_alike(
    estimator: PyTorchClassifier,
    images: Array,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(config, "ART_DATA_PATH", str(tmp_path))  # ART copies weights through files
    attack = PGD(estimator, eps=EPS, verbose=False)

    twin = copy.deepcopy(attack)
    twin.set_params(steps=1)

    assert vars(attack)["steps"] == 40
    twin.set_params(steps=40)
    assert np.array_equal(attack.generate(images), twin.generate(images))


def test_progress_is_shown_over_several_batches_if_asked(
    estimator: PyTorchClassifier, images: Array, capsys: pytest.CaptureFixture[str]
) -> None:
    FGSM(estimator, batch_size=8).generate(images)
    FGSM(estimator, batch_size=2, verbose=False).generate(images)
    assert capsys.readouterr() == ("", "")

    FGSM(estimator, batch_size=2).generate(images)
    assert "4/4" in capsys.readouterr().err


def test_estimators_of_other_kinds_are_refused() -> None:
    other = BlackBoxClassifier(lambda x: np.ones((len(x), 3)), (3, 12, 12), 3, clip_values=(0, 1))

    wrongs: list[Any] = [other, object(), None]
    for wrong in wrongs:
        with pytest.raises(EstimatorError):
            PGD(wrong)


@pytest.mark.parametrize("clip", [None, (0.0, 255.0), (-1.0, 1.0)])
def test_other_units_are_refused(clip: tuple[float, float] | None) -> None:
    with pytest.raises(ValueError, match=r"clip_values must be \(0, 1\)"):
        PGD(plain_estimator(clip_values=clip))


CLASSES = [PGD, MapDetection, RobustTrainer]


@pytest.mark.parametrize("made", CLASSES)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels_first": False, "input_shape": (12, 12, 3)}, "channels_first=True"),
        ({"input_shape": (36,)}, r"images \(c, h, w\)"),
        ({"input_shape": (1, 3, 12, 12)}, r"images \(c, h, w\)"),
        ({"clip_values": (0.0, 255.0)}, "clip_values"),
    ],
)
def test_estimators_of_other_data_are_refused_by_every_class(
    made: Callable[..., Any], options: dict[str, Any], message: str
) -> None:
    """Where channels stand last, pixels would be counted over the wrong axis."""
    with pytest.raises(ValueError, match=message):
        made(plain_estimator(**options))


class Certain(PyTorchClassifier):  # type: ignore[misc]
    """Answers with the classes of its network, hard."""

    def predict(
        self, x: Array, batch_size: int = 128, training_mode: bool = False, **kwargs: Any
    ) -> Array:
        logits = super().predict(x, batch_size, training_mode, **kwargs)
        return np.asarray(np.eye(3, dtype=np.float32)[logits.argmax(1)])


class Told(PyTorchClassifier):  # type: ignore[misc]
    """Answers with its network, and counts."""

    asked = 0

    def predict(
        self, x: Array, batch_size: int = 128, training_mode: bool = False, **kwargs: Any
    ) -> Array:
        self.asked += 1
        return np.asarray(super().predict(x, batch_size, training_mode, **kwargs))


class Unlike(Told):
    """Answers otherwise where an image is dark."""

    def predict(
        self, x: Array, batch_size: int = 128, training_mode: bool = False, **kwargs: Any
    ) -> Array:
        logits = super().predict(x, batch_size, training_mode, **kwargs)
        return np.asarray(logits * np.where(x.mean((1, 2, 3)) < 0.1, -1, 1)[:, None])


@pytest.mark.parametrize("made", CLASSES)
def test_estimators_that_answer_otherwise_than_their_network_are_refused(
    made: Callable[..., Any],
) -> None:
    """Smoothing by noise is one; else the network inside would be attacked for it."""
    smoothed = plain_estimator(
        made=PyTorchRandomizedSmoothing, sample_size=8, scale=0.3, alpha=0.01
    )
    for estimator in (smoothed, plain_estimator(made=Certain)):
        with pytest.raises(ValueError, match=f"{type(estimator).__name__} answers through a"):
            made(estimator)
    made(plain_estimator(made=Told))


def test_answers_are_compared_on_the_images_themselves(images: Array) -> None:
    attack = FGSM(plain_estimator(made=Unlike))

    attack.generate(images)
    with pytest.raises(ValueError, match="Unlike answers through a predict of its own"):
        attack.generate(images * np.float32(0.1))


def test_a_network_that_returns_no_logits_is_named(images: Array) -> None:
    class Dictionary(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": x.mean((2, 3))}

    with pytest.raises(ValueError, match="one tensor of logits"):
        PGD(plain_estimator(model=Dictionary())).generate(images)


MEAN_STD = (np.array([0.4, 0.5, 0.6]).reshape(3, 1, 1), np.array([0.2, 0.3, 0.4]).reshape(3, 1, 1))


class Smoothing(PreprocessorPyTorch):  # type: ignore[misc]
    """Each value becomes the mean of its neighbourhood."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return nn.functional.avg_pool2d(x, 3, stride=1, padding=1), y


def torch_smoothing() -> Smoothing:
    return Smoothing(device_type="cpu")


def squeezing() -> FeatureSqueezing:
    return FeatureSqueezing(clip_values=(0.0, 1.0), bit_depth=3)


PREPROCESSING: dict[str, Callable[[], dict[str, Any]]] = {
    "mean and std": lambda: {"preprocessing": MEAN_STD},
    "torch defence": lambda: {"preprocessing_defences": torch_smoothing()},
    "torch defence, mean and std": lambda: {
        "preprocessing_defences": torch_smoothing(),
        "preprocessing": MEAN_STD,
    },
    "NumPy squeezing": lambda: {"preprocessing_defences": squeezing()},
    "NumPy squeezing, mean and std": lambda: {
        "preprocessing_defences": squeezing(),
        "preprocessing": MEAN_STD,
    },
    "NumPy smoothing": lambda: {
        "preprocessing_defences": SpatialSmoothing(window_size=3, channels_first=True)
    },
}


@pytest.mark.parametrize("kind", PREPROCESSING)
def test_attacks_see_the_preprocessing(images: Array, kind: str) -> None:
    """Logits and gradients are those of the estimator, whose gradient is of the batch's mean."""
    estimator = plain_estimator(made=Float32Classifier, **PREPROCESSING[kind]())
    model, x = AsSeen(estimator), torch.from_numpy(images).requires_grad_()
    y = predicted(estimator, images)

    logits = model(x)
    loss = nn.functional.cross_entropy(logits, torch.from_numpy(y))
    (grad,) = torch.autograd.grad(loss, x)

    bare = estimator.model(torch.from_numpy(images))
    assert not torch.allclose(bare, logits, atol=1e-3)
    assert np.allclose(estimator.predict(images), logits.detach().numpy(), atol=1e-6)
    assert np.allclose(estimator.loss_gradient(images, np.eye(3)[y]), grad.numpy(), atol=1e-6)
    assert grad.abs().sum() > 0


@pytest.mark.parametrize("kind", PREPROCESSING)
def test_attacks_break_the_model_with_its_preprocessing(images: Array, kind: str) -> None:
    estimator = plain_estimator(made=Float32Classifier, **PREPROCESSING[kind]())
    y = predicted(estimator, images)

    x_adv = PGD(estimator, eps=0.4, verbose=False).generate(images, y)

    assert (estimator.predict(x_adv).argmax(1) != y).all()


@pytest.mark.parametrize(
    ("defence", "named"),
    [
        (SpatialSmoothing(window_size=3, channels_first=True), "use SpatialSmoothingPyTorch"),
        (squeezing(), "FeatureSqueezing .ART has none in torch"),
    ],
)
def test_maps_behind_a_defence_in_numpy_are_refused_with_its_twin(
    images: Array, defence: Any, named: str
) -> None:
    """Their derivative is only an estimate, which has none itself."""
    estimator = plain_estimator(made=Float32Classifier, preprocessing_defences=defence)
    with pytest.raises(ValueError, match=named):
        AdvEdge(estimator, interpreter="grad", verbose=False).generate(images[:2])

    twin = Smoothing(device_type="cpu")
    AdvEdge(plain_estimator(preprocessing_defences=twin), steps=2, verbose=False).generate(
        images[:2]
    )


def broken(model: nn.Module, x: Tensor, y: Tensor, *, seeds: Tensor | None = None) -> Tensor:
    """An attack that switches the model about, then fails."""
    if len(x):
        model.train()
        model.requires_grad_(True)
        raise RuntimeError("out of ideas")
    return x


class Broken(ArtAttack):
    """The same for ART."""

    perturb = staticmethod(broken)


@pytest.mark.parametrize("attack", [PGD, FGSM, Broken])
def test_the_model_is_left_as_it_was(images: Array, attack: type[ArtAttack]) -> None:
    """Modes of each module, flags and gradients of each parameter, hooks; also after a failure."""
    inner = Bands()
    network = nn.Sequential(inner, nn.BatchNorm1d(3).eval(), nn.Dropout())
    inner.conv1.weight.requires_grad_(False)
    grad = torch.ones_like(inner.conv2.weight)
    inner.conv2.weight.grad = grad
    estimator = plain_estimator(model=network)

    def state() -> list[Any]:
        return [
            [(m.training, len(m._forward_hooks)) for m in estimator._model.modules()],
            [(p.requires_grad, p.grad) for p in network.parameters()],
        ]

    before = state()
    values = {name: value.clone() for name, value in network.state_dict().items()}

    if attack is Broken:
        with pytest.raises(RuntimeError, match="out of ideas"):
            attack(estimator).generate(images)
    else:
        attack(estimator, eps=EPS).generate(images)

    assert before == state()
    assert inner.conv2.weight.grad is grad
    assert torch.equal(grad, torch.ones_like(grad))
    assert all(torch.equal(values[name], value) for name, value in network.state_dict().items())


def test_pgd_is_that_of_art(linear: Classifier, grey_images: Tensor) -> None:
    """On a linear model each step raises the loss, so the last iterate is the best.

    Up to 1e-6: ART's projection computes x + (x_adv - x), which can round to a neighbour of x_adv.
    """
    estimator = as_estimator(linear, input_shape=(1, 6, 5))
    x, eps, step = grey_images.numpy(), 8 / 255, 3 / 255
    y = predicted(estimator, x)

    expected = ProjectedGradientDescentPyTorch(
        estimator, eps=eps, eps_step=step, max_iter=5, verbose=False
    ).generate(x, np.eye(2, dtype=np.float32)[y])

    actual = PGD(
        estimator, eps=eps, step=step, steps=5, random_start=False, stop="never", verbose=False
    ).generate(x, y)
    assert np.abs(expected - actual).max() <= 1e-6
    assert np.abs(actual - x).max() > 0.9 * eps


def test_the_trainer_of_art_takes_our_pgd(images: Array) -> None:
    estimator = plain_estimator()
    estimator.set_params(optimizer=torch.optim.SGD(estimator.model.parameters(), lr=0.1))
    attack = PGD(estimator, eps=EPS, steps=3)
    weight = estimator.model.state_dict()["linear.weight"]
    before = weight.clone()

    AdversarialTrainer(estimator, attacks=attack, ratio=0.5).fit(
        images, np.eye(3)[np.arange(8) % 3], batch_size=4, nb_epochs=1
    )

    assert attack.verbose is False
    assert weight.isfinite().all()
    assert not torch.equal(before, weight)


@pytest.mark.parametrize(
    "make",
    [
        lambda e: HopSkipJump(e, max_iter=1, max_eval=10, init_eval=5, verbose=False),
        lambda e: BoundaryAttack(e, targeted=False, max_iter=2, verbose=False),
        lambda e: FastGradientMethod(e, eps=0.1),
    ],
    ids=["HopSkipJump", "BoundaryAttack", "FastGradientMethod"],
)
@pytest.mark.parametrize("defended", [False, True])
def test_attacks_of_art_run_on_our_estimator(
    images: Array, make: Callable[[Any], Any], defended: bool
) -> None:
    """They and FeatureSqueezing promote images to float64 under NumPy 2."""
    defences = {"preprocessing_defences": squeezing()} if defended else {}
    estimator = plain_estimator(made=Float32Classifier, **defences)

    x_adv = make(estimator).generate(images[:2].astype(np.float64))

    assert x_adv.shape == (2, 3, 12, 12)


def test_our_estimator_takes_float64_in_every_call(
    estimator: PyTorchClassifier, images: Array
) -> None:
    double, y = images.astype(np.float64), np.eye(3)[predicted(estimator, images)]

    assert np.array_equal(estimator.predict(images), estimator.predict(double))
    for single, promoted in (
        (estimator.loss_gradient(images, y), estimator.loss_gradient(double, y)),
        (estimator.class_gradient(images), estimator.class_gradient(double)),
    ):
        assert np.allclose(single, promoted, atol=1e-6)


def test_devices_that_art_does_not_know_are_refused() -> None:
    elsewhere = Classifier(nn.Flatten(), num_classes=2).to("meta")

    with pytest.raises(UsageError, match="ART runs on cpu and cuda only, not on meta"):
        as_estimator(elsewhere, input_shape=(1, 2, 1))


# --attack art:NAME:…, threat, knowledge
THEIRS = [
    ("FastGradientMethod", {"eps": "0.1"}, "linf eps 0.1", "white-box"),
    ("ProjectedGradientDescent", {"max_iter": "3", "norm": "2"}, "l2 eps 0.3", "white-box"),
    ("BasicIterativeMethod", {"max_iter": "3"}, "linf eps 0.3", "white-box"),
    ("SquareAttack", {"eps": "8/255", "max_iter": "5"}, "linf eps 8/255", "black-box"),
    (
        "AutoProjectedGradientDescent",
        {"loss_type": "cross_entropy", "max_iter": "3", "norm": "l1"},
        "l1 eps 0.3",
        "white-box",
    ),
    (
        "AutoProjectedGradientDescent",
        {"loss_type": "difference_logits_ratio", "max_iter": "3", "norm": "linf"},
        "linf eps 0.3",
        "white-box",
    ),
    (
        "HopSkipJump",
        {"max_iter": "1", "max_eval": "10", "init_eval": "5"},
        "l2 minimum",
        "black-box",
    ),
    ("BoundaryAttack", {"max_iter": "2"}, "l2 minimum", "black-box"),
    (
        "CarliniL2Method",
        {"max_iter": "3", "binary_search_steps": "2"},
        "l2 minimum",
        "white-box",
    ),
    ("DeepFool", {"max_iter": "3"}, "l2 minimum", "white-box"),
    ("ShadowAttack", {"nb_steps": "2"}, "none minimum", "white-box"),
    ("SaliencyMapMethod", {"theta": "0.5"}, "none minimum targeted", "white-box"),
    ("UniversalPerturbation", {"max_iter": "1", "eps": "0.1"}, "linf eps 0.1", "white-box"),
]


@pytest.mark.parametrize(("name", "parameters", "threat", "knowledge"), THEIRS)
def test_attacks_of_art_are_called_like_ours(
    bands: Classifier,
    images: Array,
    capfd: pytest.CaptureFixture[str],
    name: str,
    parameters: dict[str, Any],
    threat: str,
    knowledge: str,
) -> None:
    """Same seeds, same result; nothing printed; no trace in global random state or the model."""
    x, state = torch.from_numpy(images[:3]), all_random_state()
    y = bands(x).argmax(1)
    bands.train()

    attack = from_art(name, parameters)
    attack.validate(bands, (3, 12, 12))
    goal = (y + 1) % 3 if attack.threat.targeted else y
    first, again = (attack(bands, x.clone(), goal, seeds=torch.arange(3)) for _ in range(2))

    assert (str(attack.threat), attack.knowledge) == (threat, knowledge)
    assert attack.summary
    assert json.loads(json.dumps(attack.resolved, allow_nan=False)) == attack.resolved
    assert (first.shape, first.dtype) == (x.shape, torch.float32)
    assert bool(((first >= 0) & (first <= 1)).all())
    assert torch.equal(first, again)
    assert state == all_random_state()
    assert bands.training
    assert capfd.readouterr() == ("", "")


def all_random_state() -> str:
    """All that global random state consists of."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    return str((random.getstate(), kind, keys, rest, torch.get_rng_state()))


def test_attacks_of_art_find_what_there_is_to_find(bands: Classifier, images: Array) -> None:
    x = torch.from_numpy(images)
    y = bands(x).argmax(1)

    for goal, targeted in ((y, False), ((y + 1) % 3, True)):
        attack = from_art("ProjectedGradientDescent", {"max_iter": 20, "eps_step": 0.05})
        reached = bands(attack(bands, x, goal, targeted=targeted)).argmax(1) == goal
        assert reached.tolist() == [targeted] * 8


def test_other_seeds_make_another_start(bands: Classifier, images: Array) -> None:
    options = {"eps": 0.1, "eps_step": 1e-3, "num_random_init": 1, "max_iter": 1}
    attack = from_art("ProjectedGradientDescent", options)
    x = torch.from_numpy(images)
    y = bands(x).argmax(1)

    one, other = (attack(bands, x, y, seeds=torch.arange(8) + k) for k in (0, 1))

    assert not torch.equal(one, other)


def test_parameters_are_read_as_the_constructor_says() -> None:
    text = {"eps": "8/255", "eps_step": "0.01", "max_iter": "7", "decay": "none", "norm": "linf"}

    resolved = from_art("ProjectedGradientDescent", text | {"random_eps": "True"}).resolved

    assert resolved == {
        "norm": "inf",
        "eps": 8 / 255,
        "eps_step": 0.01,
        "decay": None,
        "max_iter": 7,
        "targeted": False,
        "num_random_init": 0,
        "random_eps": True,
    }
    values = {"eps": 8 / 255, "eps_step": 0.01, "max_iter": 7, "norm": np.inf, "random_eps": True}
    assert from_art("ProjectedGradientDescent", values).resolved == resolved
    assert from_art("ElasticNet", {"decision_rule": "L1"}).resolved["decision_rule"] == "L1"
    words = from_art("Wasserstein", {"ball": "wasserstein", "norm": "linf"}).resolved
    assert (words["ball"], words["norm"]) == ("wasserstein", "inf")


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("HopSkipJmp", {}, "unknown ART attack 'HopSkipJmp' .did you mean 'HopSkipJump'"),
        ("EvasionAttack", {}, "unknown ART attack"),
        ("AdversarialPatch", {}, "art:AdversarialPatch makes one patch"),
        ("DPatch", {}, "not for image classifiers"),
        ("FeatureAdversariesPyTorch", {}, "needs delta"),
        ("SimBA", {}, "probabilities"),
        ("AutoConjugateGradient", {}, "hardly moves"),
        ("SquareAttack", {"steps": "3"}, "unknown parameter of art:SquareAttack 'steps'.*max_iter"),
        ("SquareAttack", {"batch_size": "3"}, "unknown parameter"),
        ("SquareAttack", {"max_iter": "3.5"}, "max_iter must be a whole number, not '3.5'"),
        ("SquareAttack", {"eps": "big"}, "eps must be a number or a fraction such as 8/255"),
        ("SquareAttack", {"loss": "ce"}, "loss must be left out"),
        ("SquareAttack", {"loss": len}, "loss must be a number, a word"),
        ("SquareAttack", {"eps": "-0.1"}, "art:SquareAttack: .*eps"),
        ("SquareAttack", {"norm": "l7"}, "art:SquareAttack: .*orm"),
        ("HopSkipJump", {"targeted": "maybe"}, "targeted must be true or false"),
        ("SignOPTAttack", {"targeted": "true"}, "untargeted runs only"),
        ("ElasticNet", {"decision_rule": "L7"}, "art:ElasticNet: .*ecision rule"),
    ],
)
def test_what_art_cannot_do_is_refused(name: str, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        from_art(name, parameters)
    assert "\n" not in str(raised.value)


def test_a_loss_for_three_classes_is_refused_with_two(linear: Classifier) -> None:
    name, loss = "AutoProjectedGradientDescent", "difference_logits_ratio"

    from_art(name, {"loss_type": "cross_entropy"}).validate(linear, (1, 6, 5))
    with pytest.raises(UsageError, match="needs at least 3 classes"):
        from_art(name, {"loss_type": loss}).validate(linear, (1, 6, 5))


def test_goals_and_masks_that_an_attack_does_not_know_are_refused(
    bands: Classifier, images: Array
) -> None:
    x = torch.from_numpy(images)
    y = bands(x).argmax(1)

    with pytest.raises(UsageError, match="untargeted runs only"):
        from_art("SquareAttack", {})(bands, x, y, targeted=True)
    with pytest.raises(UsageError, match="cannot keep to a mask"):
        from_art("SquareAttack", {})(bands, x, y, mask=torch.ones(12, 12))


def test_attacks_of_art_keep_to_a_mask(bands: Classifier, images: Array) -> None:
    x, mask = torch.from_numpy(images), torch.zeros(12, 12, dtype=torch.bool)
    mask[:6] = True

    x_adv = from_art("FastGradientMethod", {})(bands, x, bands(x).argmax(1), mask=mask)

    changed = (x_adv != x).flatten(0, 1).any(0)
    assert changed[:6].any()
    assert not changed[6:].any()


def test_an_empty_batch_is_not_shown_to_art(bands: Classifier) -> None:
    nothing = torch.zeros(0, 3, 12, 12)

    x_adv = from_art("SquareAttack", {})(bands, nothing, torch.zeros(0, dtype=torch.int64))

    assert x_adv.shape == nothing.shape


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (ValueError("too\nbad"), RunError, "art:SquareAttack failed: too$"),
        (IndexError("3"), RunError, "art:SquareAttack failed: IndexError: 3"),
        (KeyError(), RunError, "art:SquareAttack failed: KeyError$"),
        (torch.OutOfMemoryError("out of memory"), torch.OutOfMemoryError, "memory"),
    ],
)
def test_what_breaks_inside_art_becomes_one_sentence(
    bands: Classifier,
    images: Array,
    monkeypatch: pytest.MonkeyPatch,
    raised: Exception,
    expected: type[Exception],
    message: str,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise raised

    attack, x = from_art("SquareAttack", {}), torch.from_numpy(images)
    monkeypatch.setattr("art.attacks.evasion.SquareAttack.generate", fail)

    with pytest.raises(expected, match=message):
        attack(bands, x, bands(x).argmax(1))


def test_the_list_holds_what_can_be_run() -> None:
    listed = dict(list_art_attacks())

    assert {"HopSkipJump", "SquareAttack", "DeepFool"} <= listed.keys()
    assert not {"AdversarialPatch", "EvasionAttack", "CarliniWagnerASR"} & listed.keys()
    assert listed["BoundaryAttack"] == (
        "Implementation of the boundary attack from Brendel et al. (2018)."
    )
    assert all("\n" not in summary and summary for summary in listed.values())


def test_the_threat_is_known_before_there_is_a_model() -> None:
    attack = from_art("HopSkipJump", {"targeted": "true", "norm": "inf"})

    assert isinstance(attack, ArtFunction)
    assert attack.threat == Threat("linf", None, True)
    assert attack.resolved["targeted"] is True
