"""Attack functions as ART attacks, classifiers as ART estimators.

ART is the Adversarial Robustness Toolbox. Importing it takes seconds, so only those import this
module who want its classes or its attacks: see `robusteval.art.art_classes`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from copy import copy
from numbers import Integral, Real
from types import NoneType
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch
from art.attacks.attack import EvasionAttack
from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

from robusteval.art.as_seen import AsSeen
from robusteval.datasets.dataset import image_id
from robusteval.errors import UsageError, check_argument
from robusteval.models.classifier import Classifier, frozen, predict_classes
from robusteval.models.seeds import sample_seeds
from robusteval.registry import explain_unknown
from robusteval.registry.signatures import PROTOCOL
from robusteval.search.losses import CrossEntropy

Array = np.ndarray[Any, Any]


class ArtAttack(EvasionAttack):  # type: ignore[misc]
    """An attack function as an ART evasion attack.

    A subclass names the function, ``perturb = staticmethod(pgd)``; the function's parameters
    become those of the constructor and of `set_params`.

    Parameters
    ----------
    estimator : PyTorchClassifier
        The model, with whatever preprocessing it has; its `clip_values` must be (0, 1).
    batch_size : int
        Images per call of the function; the result does not depend on it.
    verbose : bool
        Show progress over the batches.
    seed : int
        With an image's content, decides all randomness that befalls this image.
    summary_writer : bool
        Must be False: there are no single steps to report.
    **parameters
        Those of the function.

    Raises
    ------
    EstimatorError
        If the estimator is not a PyTorchClassifier.
    TypeError
        For an unknown parameter, or one that should be a number and is not.
    ValueError
        For a parameter out of range, or an estimator that `check_estimator` refuses.
    """

    perturb: ClassVar[Callable[..., Tensor]]
    __signature__: ClassVar[inspect.Signature]

    attack_params: list[str]
    batch_size: int
    verbose: bool
    seed: int
    _estimator_requirements = (PyTorchClassifier,)
    _defaults: ClassVar[dict[str, Any]]  # of the function's own parameters
    _kinds: ClassVar[dict[str, Any]]  # annotation of every parameter

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        shell = inspect.signature(ArtAttack.__init__).parameters
        own = inspect.signature(cls.perturb).parameters.values()
        settings = [p for p in own if p.name not in PROTOCOL]
        always = [shell[name] for name in ("batch_size", "verbose", "seed")]
        cls._defaults = {p.name: p.default for p in settings}
        cls._kinds = {"batch_size": int, "verbose": bool, "seed": int}
        cls._kinds |= get_type_hints(cls.perturb)
        cls.attack_params = [p.name for p in (*settings, *always)]
        cls.__signature__ = inspect.Signature(
            [shell["estimator"], *settings, *always, shell["summary_writer"]]
        )

    def __init__(
        self,
        estimator: PyTorchClassifier,
        *,
        batch_size: int = 32,
        verbose: bool = True,
        seed: int = 0,
        summary_writer: bool = False,
        **parameters: Any,
    ) -> None:
        super().__init__(estimator=estimator)
        if summary_writer is not False:
            raise ValueError("summary_writer must be False: there are no single steps to report")
        for name in parameters:
            if name not in self._defaults:
                raise TypeError(explain_unknown("parameter", name, self.attack_params))
        given = {"batch_size": batch_size, "verbose": verbose, "seed": seed, **parameters}
        for name, value in (self._defaults | given).items():
            setattr(self, name, value)
        self._check_params()

    def set_params(self, **kwargs: Any) -> None:
        """Change parameters, all or none.

        ValueError or TypeError, as from the constructor, leaves everything as it was.
        """
        trial = copy(self)
        EvasionAttack.set_params(trial, **kwargs)
        for name, value in kwargs.items():
            setattr(self, name, value)

    def _check_params(self) -> None:
        super()._check_params()
        for name in self.attack_params:
            check_kind(name, getattr(self, name), self._kinds[name])
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {self.batch_size}")
        check_estimator(self.estimator)
        nothing = torch.zeros(0, *self.estimator.input_shape, device=self.estimator.device)
        with frozen(AsSeen(self.estimator)) as model:
            # the function knows the ranges of its parameters
            self._perturb(model, nothing, torch.zeros(0, dtype=torch.int64), {})
            if not self.estimator.all_framework_preprocessing:
                self._try_maps(model)

    def _try_maps(self, model: nn.Module) -> None:
        """ValueError if the attack follows a map that preprocessing in NumPy does not let it.

        One of few steps, on one image of nothing.
        """
        if "interpreter" not in self._defaults:
            return
        trial: Any = copy(self)
        trial.steps = 1
        x = torch.full((1, *self.estimator.input_shape), 0.5, device=self.estimator.device)
        with torch.no_grad():
            y = model(x).argmax(1).cpu()
        trial._perturb(model, x, y, {})

    def _perturb(self, model: nn.Module, x: Tensor, y: Tensor, given: dict[str, Any]) -> Tensor:
        settings = {name: getattr(self, name) for name in self._defaults}
        return type(self).perturb(model, x, y.to(x.device), **settings, **given)

    def generate(
        self, x: Array, y: Array | None = None, mask: Array | None = None, **kwargs: Any
    ) -> Array:
        """Adversarial images.

        Parameters
        ----------
        x : ndarray
            Images ``(n, c, h, w)`` in [0, 1]; not modified.
        y : ndarray, optional
            Labels, or targets of a targeted attack: indices ``(n,)`` or ``(n, 1)``, or one-hot
            ``(n, k)``. Without them an untargeted attack takes the model's own predictions.
        mask : ndarray, optional
            Float, not negative, or bool; broadcastable to `x`; zero where a pixel may not change.
        **kwargs
            `x_init` and `x_adv_init`, which some of ART's callers pass, are ignored.

        Returns
        -------
        ndarray
            Float32, like `x`. An untargeted attack returns images whose prediction is not `y` to
            begin with unchanged.

        Raises
        ------
        ValueError
            If images, labels or mask are not of this form, the labels a targeted attack needs are
            missing, the estimator answers otherwise than its network, or a derivative of a
            derivative is needed and it has a defence in NumPy.
        TypeError
            For an unknown argument.
        """
        for name in kwargs.keys() - {"x_init", "x_adv_init"}:
            raise TypeError(explain_unknown("argument of generate", name, ["x", "y", "mask"]))
        images = to_images(x)
        labels = None if y is None else to_class_indices(y, len(images), self.estimator.nb_classes)
        if labels is None and self.targeted:
            raise ValueError("a targeted attack needs the classes to reach: give y")
        masks = None if mask is None else to_mask(mask, images.shape)
        if masks is not None and "mask" not in inspect.signature(self.perturb).parameters:
            raise ValueError(f"{type(self).__name__} cannot keep to a mask")

        x_adv = images.copy()
        starts = range(0, len(images), self.batch_size)
        check_answers(self.estimator, images[: self.batch_size])
        with frozen(AsSeen(self.estimator)) as model:
            for start in tqdm(starts, disable=not self.verbose or len(starts) < 2):
                part = slice(start, start + self.batch_size)
                some_labels = None if labels is None else labels[part]
                some_masks = None if masks is None else masks[part]
                x_adv[part] = self._attack_batch(model, images[part], some_labels, some_masks)
        return x_adv

    def _attack_batch(
        self, model: nn.Module, images: Array, labels: Array | None, masks: Array | None
    ) -> Array:
        device = self.estimator.device
        x = torch.tensor(images, device=device)
        seeds = sample_seeds(self.seed, np.array([image_id(i) for i in images], dtype=np.uint64))
        given: dict[str, Any] = {}
        if self.targeted:
            y = torch.tensor(labels, device=device)
            rows = torch.arange(len(x))
        else:
            with torch.no_grad():
                pred = predict_classes(model(x))
            y = pred if labels is None else torch.tensor(labels, device=device)
            rows = ((pred == y) & (y >= 0)).nonzero().flatten()
        if masks is not None:
            given["mask"] = torch.tensor(masks[rows.cpu().numpy()], device=device)
        if len(rows):
            some = rows.to(device)
            given["seeds"] = seeds[rows.cpu()]
            x[some] = self._perturb(model, x[some], y[some], given).detach()
        return x.cpu().numpy()


def check_estimator(estimator: PyTorchClassifier) -> None:
    """Refuse an estimator that would be taken for another than it is.

    Parameters
    ----------
    estimator : PyTorchClassifier
        Of images ``(n, c, h, w)`` in [0, 1], which answers with its network's logits. One that
        overrides `predict` is asked for two images, and must give the same logits.

    Raises
    ------
    TypeError
        If it is another kind of estimator.
    ValueError
        If it is not like that.
    """
    if not isinstance(estimator, PyTorchClassifier):
        raise TypeError(f"a PyTorchClassifier is needed, not {type(estimator).__name__}")
    clip = estimator.clip_values
    if clip is None or np.any(clip[0] != 0) or np.any(clip[1] != 1):
        shown = "None" if clip is None else f"({np.min(clip[0]):g}, {np.max(clip[1]):g})"
        raise ValueError(
            f"the estimator's clip_values must be (0, 1), not {shown}: eps and all else is in"
            " units of the [0, 1] pixel range; put the scaling into the model"
        )
    shape = tuple(estimator.input_shape)
    if len(shape) != 3:
        raise ValueError(
            f"the estimator must take images (c, h, w), not input_shape {shape}: other data have no"
            " pixels to count and no neighbours"
        )
    if not estimator.channels_first:
        raise ValueError(
            "the estimator must have channels_first=True, with images (n, c, h, w): let the"
            " network begin with x.permute(0, 2, 3, 1) and give input_shape (c, h, w)"
        )
    check_answers(estimator, np.random.default_rng(0).random((2, *shape), dtype=np.float32))


# what decides the answer, and is passed by where a network is attacked
ANSWERS = ("predict", "_predict_framework")


def check_answers(estimator: PyTorchClassifier, x: Array) -> None:
    """ValueError if the estimator answers these images ``(n, c, h, w)`` otherwise than its network.

    One that answers in ART's own way is not asked.
    """
    own = [
        name
        for name in ANSWERS
        if getattr(getattr(estimator, name), "__func__", None)
        is not getattr(PyTorchClassifier, name)
    ]
    if not own or not len(x):
        return
    with frozen(AsSeen(estimator)) as model, torch.no_grad():
        logits = model(torch.tensor(x, device=estimator.device)).cpu().numpy()
        given = np.asarray(estimator.predict(x.copy()))
    slack = 1e-3 * float(np.abs(logits).max())
    if given.shape != logits.shape or not np.allclose(given, logits, rtol=0, atol=slack):
        raise ValueError(
            f"{type(estimator).__name__} answers through a {own[0]} of its own and not with the"
            " logits of its network, which alone would be attacked: write what it does as a torch"
            " module around the network and give that to a PyTorchClassifier"
        )


def check_kind(name: str, value: Any, kind: Any) -> None:
    """ValueError or, where a number is wanted, TypeError if the value is not of this annotation."""
    kinds = (kind,) if get_origin(kind) is Literal else get_args(kind) or (kind,)
    words = [word for k in kinds if get_origin(k) is Literal for word in get_args(k)]
    for k in kinds:
        if (k is NoneType and value is None) or (k is bool and isinstance(value, bool | np.bool_)):
            return
        if isinstance(value, bool | np.bool_):
            continue
        number = {int: Integral, float: Real}.get(k)
        if isinstance(value, number or (k if isinstance(k, type) else ())) or value in words:
            return
    wanted = ", ".join(words) or " or ".join(getattr(k, "__name__", str(k)) for k in kinds)
    wrong = TypeError if int in kinds or float in kinds else ValueError
    raise wrong(f"{name} must be {wanted}, not {value!r}")


def to_images(x: Array) -> Array:
    """Images ``(n, c, h, w)`` as float32, not a copy if they were; ValueError if not in [0, 1]."""
    x = np.asarray(x)
    if x.ndim != 4 or x.dtype.kind not in "fui":
        raise ValueError(f"x must be images (n, c, h, w), not {x.dtype} of shape {x.shape}")
    x = np.ascontiguousarray(x, dtype=np.float32)
    if x.size and not (x.min() >= 0 and x.max() <= 1):
        raise ValueError(f"images must lie in [0, 1], not [{x.min():g}, {x.max():g}]")
    return x


def to_class_indices(y: Array, n: int, classes: int) -> Array:
    """Indices ``(n,)`` int64 of labels ``(n,)``, ``(n, 1)`` or one-hot ``(n, classes)``."""
    y = np.asarray(y)
    if len(y) != n or y.shape[1:] not in ((), (1,), (classes,)):
        raise ValueError(
            f"labels must have the shape ({n},), ({n}, 1) or ({n}, {classes}), not {y.shape}"
        )
    if y.shape[1:] == (classes,):
        if not (y.max(1, initial=0) > 0).all():
            raise ValueError("every row of one-hot labels must name a class")
        return np.asarray(y.argmax(1), dtype=np.int64)
    index: Array = y.reshape(n).astype(np.int64)
    if not np.array_equal(index, y.reshape(n)) or np.any((index < 0) | (index >= classes)):
        raise ValueError(f"labels must be whole numbers from 0 to {classes - 1}")
    return index


def to_mask(mask: Array, shape: tuple[int, ...]) -> Array:
    """A mask of the images' shape; ValueError if it is none or cannot be made one."""
    mask = np.asarray(mask)
    if mask.dtype.kind not in "fb" or not np.all(mask >= 0):
        raise ValueError("a mask must be bool, or float and nowhere negative")
    try:
        return np.broadcast_to(mask, shape)
    except ValueError:
        raise ValueError(f"a mask of shape {mask.shape} does not fit images {shape}") from None


class Float32Classifier(PyTorchClassifier):  # type: ignore[misc]
    """A PyTorchClassifier that also takes float64.

    Under NumPy 2 the scalars of ART's attacks and defences promote images to float64, which a
    float32 network refuses.
    """

    def _apply_preprocessing(
        self, x: Any, y: Any, fit: bool = False, no_grad: bool = True
    ) -> tuple[Any, Any]:
        x, y = super()._apply_preprocessing(x, y, fit=fit, no_grad=no_grad)
        return (x.float() if isinstance(x, Tensor) else x.astype(np.float32, copy=False)), y


def as_estimator(classifier: Classifier, *, input_shape: tuple[int, int, int]) -> PyTorchClassifier:
    """The classifier for handing to ART; shares its network.

    UsageError if it is no classifier, or on a device that ART does not know.
    """
    check_argument(
        "the classifier",
        classifier,
        Classifier,
        "load it with robusteval.load, or make it one of your module with"
        " robusteval.Classifier(module, num_classes=10)",
    )
    if classifier.device.type not in ("cpu", "cuda"):
        raise UsageError(f"ART runs on cpu and cuda only, not on {classifier.device.type}")
    with select_device(classifier.device):
        return Float32Classifier(
            model=classifier,
            loss=CrossEntropy(),
            input_shape=input_shape,
            nb_classes=classifier.num_classes,
            clip_values=(0.0, 1.0),
            preprocessing=None,
            device_type="cpu" if classifier.device.type == "cpu" else "gpu",
        )


def select_device(device: torch.device) -> Any:
    """Context in which ART's "gpu" means this device and not just any."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
