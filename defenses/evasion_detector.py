"""The detector of attacked images by their maps, as a defence of ART."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from art.defences.detector.evasion import EvasionDetector
from art.estimators.classification import PyTorchClassifier

from robusteval.art.as_seen import AsSeen
from robusteval.art.to_art import check_estimator, to_class_indices, to_images
from robusteval.datasets.dataset import image_id
from robusteval.errors import UsageError
from robusteval.evaluation.batches import split_evenly
from robusteval.models.classifier import Classifier, frozen
from robusteval.models.seeds import sample_seeds
from robusteval.search.balls import quantise

from .boosting import FPRS, check_both_labels, choose_threshold
from .detector import Fit, MapDetector, identify_classifier
from .detector_fitting import EPOCHS, Task, fit_task, weigh_rows
from .detector_view import View, choose_view, count_forwards, hash_mask_network
from .map_rows import Rows
from .splits import Sources, split_groups
from .transforms import Array

NAMES = ("clean", "attacked")
PARAMETERS = ("interpreters", "channels", "extractor", "confidence", "fpr", "seed")


class MapDetection(EvasionDetector):  # type: ignore[misc]
    """Flags images whose explanations are not like those of images as they are.

    See `robusteval.defenses.detector`. It learns from images of both kinds that are given to it;
    `robusteval defend detector` makes them itself, with changes that are no attack, and says what
    the result is worth.

    Parameters
    ----------
    classifier : PyTorchClassifier
        What is attacked, with whatever preprocessing it has; its `clip_values` must be (0, 1).
    interpreters : sequence of str
        Two or three, such as ``"grad"`` or ``"mask:blur=15"``.
    channels : {"pair", "pair_product", "triple"}, optional
        By the number of interpreters if not given.
    extractor : {"raw", "small_cnn"}
        What makes features of maps, besides the statistics of how they agree.
    confidence : bool
        Let it also look at how sure the classifier is.
    fpr : float
        Share of images as they are that may be flagged, 0.05 or 0.01.
    seed : int
        Decides everything that is drawn.

    Raises
    ------
    TypeError
        If `classifier` is another kind of estimator.
    ValueError
        For an estimator that `robusteval.art.to_art.check_estimator` refuses, or a parameter out
        of range.
    """

    def __init__(
        self,
        classifier: PyTorchClassifier,
        *,
        interpreters: tuple[str, ...] = ("grad", "cam"),
        channels: Any = None,
        extractor: Any = "small_cnn",
        confidence: bool = False,
        fpr: float = FPRS[0],
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.defence_params = list(PARAMETERS)
        check_estimator(classifier)
        self.classifier = classifier
        self.model = Classifier(AsSeen(classifier), num_classes=classifier.nb_classes)
        self.model.to(classifier.device)
        self.detector: MapDetector | None = None
        self.interpreters, self.channels, self.extractor = interpreters, channels, extractor
        self.confidence, self.fpr, self.seed = confidence, fpr, seed
        self._check_params()

    def _check_params(self) -> None:
        """ValueError if a parameter is out of range."""
        if self.fpr not in FPRS:
            raise ValueError(f"fpr must be one of {', '.join(map(str, FPRS))}, not {self.fpr!r}")
        if self.extractor not in ("raw", "small_cnn"):
            raise ValueError(f"extractor must be raw or small_cnn, not {self.extractor!r}")
        try:
            self.choose_view((1, 32, 32))
        except UsageError as error:
            raise ValueError(str(error)) from None

    def set_params(self, **kwargs: Any) -> None:
        """Change parameters; ValueError, and nothing changed, if one is out of range."""
        before = self.get_params()
        try:
            super().set_params(**kwargs)  # which checks them
        except ValueError:
            super().set_params(**before)
            raise

    def choose_view(self, shape: tuple[int, int, int]) -> View:
        """Choose what it looks at, of images of this shape."""
        return choose_view(self.interpreters, self.channels, self.extractor, self.confidence, shape)

    def fit(
        self,
        x: Array,
        y: Array,
        batch_size: int = 128,
        nb_epochs: int = EPOCHS,
        *,
        groups: Array | None = None,
        **kwargs: Any,
    ) -> None:
        """Learn to tell attacked images from others.

        Parameters
        ----------
        x : ndarray
            Images ``(n, c, h, w)`` in [0, 1]; they are rounded to 8 bits.
        y : ndarray
            0 as they are, 1 attacked: ``(n,)`` or ``(n, 1)``, or one-hot ``(n, 2)``.
        batch_size : int
            Images explained at a time.
        nb_epochs : int
            Of a trained extractor, at most.
        groups : ndarray, optional
            ``(n,)``, the source image of each. If not given, the first attacked image is the twin
            of the first that is as it is, and so on.
        **kwargs
            Nothing else is known.

        Raises
        ------
        TypeError
            For another argument.
        ValueError
            If images or labels are not of this form, or the network cannot have the maps.
        UsageError
            If there are too few images of either kind.
        """
        if kwargs:
            raise TypeError(f"unknown arguments of fit: {', '.join(kwargs)}")
        images = to_images(x)
        label = to_class_indices(y, len(images), len(NAMES))
        sources = group_images(images, label, groups)
        view = self.choose_view((images.shape[1], images.shape[2], images.shape[3]))
        view.check_network(self.model)
        with frozen(self.model):
            self.detector = fit_images(
                self.model, view, sources, label, self.seed, batch_size, nb_epochs
            )

    def detect(
        self, x: Array, batch_size: int = 128, **kwargs: Any
    ) -> tuple[dict[str, Array], Array]:
        """Say which images are attacked ones.

        Parameters
        ----------
        x : ndarray
            Images ``(n, c, h, w)`` in [0, 1].
        batch_size : int
            Images explained at a time; changes no result.
        **kwargs
            Nothing else is known.

        Returns
        -------
        tuple
            A report with `predictions` ``(n, 2)``, probabilities to be as they are and to be
            attacked, and `scores` ``(n,)``, the latter; and bool ``(n,)``, whether the score is
            above the threshold.

        Raises
        ------
        TypeError
            For another argument.
        ValueError
            If it was not fitted before, or images are not of this form.
        """
        if kwargs:
            raise TypeError(f"unknown arguments of detect: {', '.join(kwargs)}")
        if self.detector is None:
            raise ValueError("the detector must be fitted before it can detect")
        images = to_images(x)
        found = [np.empty(0)]
        with frozen(self.model):
            for start in range(0, len(images), batch_size):
                part = quantise(torch.from_numpy(images[start : start + batch_size]))
                ids = np.array([image_id(each) for each in part.numpy()], dtype=np.uint64)
                there = part.to(self.model.device)
                score = self.detector.score(self.model, there, sample_seeds(self.seed, ids))
                found.append(score.cpu().numpy())
        scores = np.concatenate(found)
        report = {"predictions": np.stack([1 - scores, scores], 1), "scores": scores}
        return report, scores > self.detector.fit.thresholds[f"{self.fpr:g}"]


def fit_images(
    model: Classifier,
    view: View,
    sources: Sources,
    label: Array,
    seed: int,
    batch_size: int,
    epochs: int,
) -> MapDetector:
    """Fit a detector to images with labels ``(n,)``, 1 for attacked ones.

    UsageError if there are too few images of either kind.
    """
    parts = split_groups(sources, seed)
    rows = make_labelled_rows(model, view, sources, label, seed, batch_size)
    everything = np.arange(len(label))
    train, validation = (
        everything[np.isin(sources.groups, np.concatenate(part))]
        for part in ((parts.train,), (parts.validation, parts.test))
    )
    check_both_labels(label, train, "the fit", 10)
    check_both_labels(label, validation, "the threshold", 5)
    weight = np.zeros(len(label))
    for part in (train, validation):
        zero, one = part[label[part] == 0], part[label[part] == 1]
        weight[part] = weigh_rows(rows, zero, one)[part]
    planes, columns = tuple(range(view.planes)), tuple(range(len(view.statistic_names)))
    task = Task(label.astype(np.int64), weight, train, validation, planes, columns)
    made = fit_task(rows, task, view.extractor, seed, model.device, epochs=epochs)
    scores = made.predict_scores(rows, validation[label[validation] == 0])
    few = quantise(sources.x[:batch_size]).to(model.device)
    fit = Fit(
        model=identify_classifier(model),
        rts=hash_mask_network(view, model),
        thresholds={f"{fpr:g}": choose_threshold(scores, fpr) for fpr in FPRS},
        forwards=count_forwards(view, model, few, sample_seeds(seed, sources.ids[: len(few)])),
        attacks=(),
        data="arrays",
        train=len(np.unique(sources.groups[train])),
        validation=len(np.unique(sources.groups[validation])),
        rounds=made.rounds,
        seed=seed,
    )
    return MapDetector(
        view,
        fit,
        made.extractor,
        made.center,
        made.spread,
        made.booster,
        np.unique(sources.ids),
    )


def make_labelled_rows(
    model: Classifier, view: View, sources: Sources, label: Array, seed: int, batch_size: int
) -> Rows:
    """Make the rows of images as a detector sees them, of which `label` ``(n,)`` says the kind."""
    found = []
    for part in split_evenly(len(label), batch_size):
        x = sources.x[part].to(model.device)
        maps, logits = view.compute_maps(model, x, sample_seeds(seed, sources.ids[part]))
        with torch.no_grad():
            found.append([each.cpu().numpy() for each in view.measure_maps(maps, logits)])
    stacks, statistics = (np.concatenate(each) for each in zip(*found, strict=True))
    n = len(label)
    return Rows(
        stacks,
        statistics,
        probability=np.zeros(n),
        variant=label.astype(np.int64),
        image=np.arange(n),
        group=sources.groups,
        right=np.ones(n, dtype=bool),
        fooled=label == 1,
        names=NAMES,
    )


def group_images(images: Array, label: Array, groups: Array | None) -> Sources:
    """Number the source of each image; ValueError if it is not clear which those are."""
    if groups is None:
        if 2 * label.sum() != len(label):
            raise ValueError(
                "there must be as many attacked images as others, twins in the same order, or"
                " `groups` must say which belong together"
            )
        groups = np.where(label == 1, np.cumsum(label == 1), np.cumsum(label == 0))
    if np.shape(groups) != label.shape:
        raise ValueError(f"groups must name a source for each of the {len(label)} images")
    x = quantise(torch.from_numpy(images))
    ids = np.array([image_id(each) for each in x.numpy()], dtype=np.uint64)
    numbers = np.unique(groups, return_inverse=True)[1]
    return Sources(x, torch.zeros(len(x), dtype=torch.int64), ids, numbers)
