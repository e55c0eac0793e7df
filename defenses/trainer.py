"""Robust training as an ART trainer.

Importing ART takes seconds, so nothing else imports this module.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from art.defences.trainer.trainer import Trainer
from art.estimators.classification import PyTorchClassifier
from tqdm import tqdm  # type: ignore[import-untyped]

from robusteval.art.to_art import (
    Array,
    AsSeen,
    check_estimator,
    to_class_indices,
    to_images,
)
from robusteval.datasets.arrays import from_arrays

from .training_loop import TrainingLoop
from .training_settings import TrainingSettings


class RobustTrainer(Trainer):  # type: ignore[misc]
    """The objectives of `robusteval.defenses.objectives` for an ART estimator.

    Trains on all images, without holding any out, and keeps the last epoch.

    Parameters
    ----------
    classifier : PyTorchClassifier
        Trained in place, with whatever preprocessing it has; its `clip_values` must be (0, 1).
        Its own loss and optimiser are not used.
    verbose : bool
        Show progress.
    **settings
        Those of `robusteval.defenses.training_settings.Settings`, such as
        ``objective="int_adv", eps=0.1``.

    Raises
    ------
    TypeError
        If it is another kind of estimator, or for an unknown setting.
    ValueError
        For an estimator that `robusteval.art.to_art.check_estimator` refuses.
    UsageError
        For a setting out of range.
    """

    _classifier: PyTorchClassifier

    def __init__(
        self, classifier: PyTorchClassifier, *, verbose: bool = True, **settings: Any
    ) -> None:
        check_estimator(classifier)
        super().__init__(classifier)
        self.verbose = verbose
        self.settings = TrainingSettings(**settings)

    def fit(self, x: Array, y: Array, **kwargs: Any) -> None:
        """Train the estimator on images.

        Parameters
        ----------
        x : ndarray
            Images ``(n, c, h, w)`` in [0, 1].
        y : ndarray
            Labels: indices ``(n,)`` or ``(n, 1)``, or one-hot ``(n, k)``.
        **kwargs
            `batch_size` and `nb_epochs`, instead of those given before, as ART's trainers take.

        Raises
        ------
        TypeError
            For another argument.
        ValueError
            If images or labels are not of this form, or the network lacks the maps of the
            objective.
        RunError
            The loss was not finite.
        """
        known = {"batch_size": "batch_size", "nb_epochs": "epochs"}
        for name in kwargs.keys() - known.keys():
            raise TypeError(f"unknown argument of fit {name!r}: known are {', '.join(known)}")
        changed = {known[name]: value for name, value in kwargs.items()}
        settings = replace(self.settings, **changed)
        images = to_images(x)
        labels = to_class_indices(y, len(images), self._classifier.nb_classes)
        data = from_arrays(images, labels)
        model = AsSeen(self._classifier)
        loop = TrainingLoop(model, data, np.arange(len(data)), settings, self._classifier.device)
        for number in tqdm(range(settings.epochs), disable=not self.verbose):
            loop.run_epoch(number, lambda _: None, lambda: False)
        model.eval()
