"""Robust training as an ART trainer.

Importing ART takes seconds, so nothing else imports this module.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from art.data_generators import DataGenerator
from art.defences.trainer.trainer import Trainer
from art.estimators.classification import PyTorchClassifier
from tqdm import tqdm  # type: ignore[import-untyped]

from robusteval.art.as_seen import AsSeen
from robusteval.art.to_art import (
    Array,
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
        self.validation_accuracy: list[float] = []  # after each epoch of the last fit

    def fit(
        self,
        x: Array,
        y: Array,
        validation_data: tuple[Array, Array] | None = None,
        **kwargs: Any,
    ) -> None:
        """Train the estimator on images.

        Parameters
        ----------
        x : ndarray
            Images ``(n, c, h, w)`` in [0, 1].
        y : ndarray
            Labels: indices ``(n,)`` or ``(n, 1)``, or one-hot ``(n, k)``.
        validation_data : tuple, optional
            Images and labels of the same form. The share of them that is right after each epoch is
            shown and kept in `validation_accuracy`; it decides nothing.
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
            names = ", ".join((*known, "validation_data"))
            raise TypeError(f"unknown argument of fit {name!r}: known are {names}")
        changed = {known[name]: value for name, value in kwargs.items()}
        settings = replace(self.settings, **changed)
        data = from_arrays(*self._check_form(x, y))
        held_out = None if validation_data is None else self._check_form(*validation_data)
        model = AsSeen(self._classifier)
        loop = TrainingLoop(model, data, np.arange(len(data)), settings, self._classifier.device)
        self.validation_accuracy = []
        with tqdm(total=settings.epochs, disable=not self.verbose) as bar:
            for number in range(settings.epochs):
                loop.run_epoch(number, lambda _: None, lambda: False)
                if held_out is not None:
                    right = self.predict(held_out[0]).argmax(1) == held_out[1]
                    self.validation_accuracy.append(float(right.mean()))
                    bar.set_postfix(right=f"{right.mean():.1%}")
                    model.train()
                bar.update()
        if loop.average is not None:
            model.load_state_dict(loop.average.state)
        model.eval()

    def fit_generator(
        self, generator: DataGenerator, nb_epochs: int | None = None, **kwargs: Any
    ) -> None:
        """Train the estimator on the images of a generator, which are read once and kept.

        Parameters
        ----------
        generator : DataGenerator
            Of a known `size`; gives images and labels as for `fit`.
        nb_epochs : int, optional
            Instead of the number given before.
        **kwargs
            As for `fit`; the batch size is the generator's.

        Raises
        ------
        ValueError
            The size is not known, or as from `fit`.
        """
        if generator.size is None:
            raise ValueError("the generator must have a size: give it the number of its images")
        batches: list[tuple[Array, Array]] = []
        while sum(len(images) for images, _ in batches) < generator.size:
            batches.append(generator.get_batch())
        x = np.concatenate([images for images, _ in batches])
        y = np.concatenate([labels for _, labels in batches])
        asked = {"batch_size": generator.batch_size, **kwargs}
        if nb_epochs is not None:
            asked["nb_epochs"] = nb_epochs
        self.fit(x[: generator.size], y[: generator.size], **asked)

    def predict(self, x: Array, **kwargs: Any) -> Array:
        """Logits ``(n, k)`` of images ``(n, c, h, w)``, as the estimator gives them.

        Parameters
        ----------
        x : ndarray
            Images in [0, 1].
        **kwargs
            For the `predict` of the estimator, such as `batch_size`.
        """
        return np.asarray(self._classifier.predict(to_images(x), **kwargs))

    def _check_form(self, x: Array, y: Array) -> tuple[Array, Array]:
        """Images and class indices; ValueError if they are of another form."""
        images = to_images(x)
        if images.shape[1:] != tuple(self._classifier.input_shape):
            raise ValueError(
                f"the estimator takes images {tuple(self._classifier.input_shape)}, not"
                f" {images.shape[1:]}"
            )
        return images, to_class_indices(y, len(images), self._classifier.nb_classes)
