"""A defense as the evaluation sees it: another classifier, or the same one and a detector.

A registered defense is a function ``(model, *, parameters) -> Classifier`` that makes of a
classifier the defended one; a `WithDetector` one if it raises alarms instead of answering
otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from robusteval.errors import UsageError
from robusteval.evaluation.defense_files import public, read_defense
from robusteval.interpreters.explainer import Explainer
from robusteval.models.classifier import Classifier
from robusteval.models.masked import Masked
from robusteval.registry import DEFENSES
from robusteval.runs.types import Spec


class Detector(Protocol):
    """Says how suspicious an image is, by its explanations.

    Results for an image do not depend on the batch. All maps are scaled as they are compared.
    """

    @property
    def explainers(self) -> tuple[Explainer, ...]:
        """The interpreters whose maps it looks at."""
        ...

    @property
    def threshold(self) -> float:
        """An image is flagged if its score is above."""
        ...

    @property
    def seen(self) -> np.ndarray[Any, Any]:
        """Content ids uint64 of the images that it was fitted on."""
        ...

    @property
    def facts(self) -> dict[str, Any]:
        """JSON-able: threshold, the fpr it was set at, forwards per prediction, and more."""
        ...

    def features(self, model: Classifier, maps: list[Tensor], logits: Tensor) -> Tensor:
        """What it makes of maps ``(n, 1, h', w')`` of each interpreter: ``(n, d)``, on the graph.

        Equal features give equal scores.
        """
        ...

    def score(self, model: Classifier, x: Tensor, seeds: Tensor) -> Tensor:
        """Float64 ``(n,)``, higher is more suspicious, of images rounded to 8 bits; off the graph.

        Of the maps for the class predicted on each image; `seeds` ``(n,)`` are for interpreters
        that draw.
        """
        ...


class WithDetector(Classifier):
    """A classifier that answers as ever, and a detector that watches it.

    Parameters
    ----------
    classifier : Classifier
        Whose network is shared.
    detector : Detector
        Fitted on that network.
    """

    def __init__(self, classifier: Classifier, detector: Detector) -> None:
        super().__init__(
            classifier.network,
            mean=classifier.mean.flatten().tolist(),
            std=classifier.std.flatten().tolist(),
            num_classes=classifier.num_classes,
            input_shape=classifier.input_shape,
            identity=classifier.identity,
            block=classifier.block,
        )
        self.to(classifier.device)
        self.detector = detector


@dataclass(frozen=True)
class Defense:
    """A defense that is ready to be attacked."""

    spec: Spec  # as reports print it: of files the names alone
    model: Classifier
    identity: dict[str, Any]  # JSON-able: what decides its numbers

    @property
    def kind(self) -> str:
        """How `robusteval.runs.types.Defended` calls it."""
        return "detector" if isinstance(self.model, WithDetector) else "model"

    @property
    def facts(self) -> dict[str, Any]:
        """What reports say of it besides numbers that were measured."""
        if isinstance(self.model, WithDetector):
            return self.model.detector.facts
        known = self.model.identity
        passes = 2.0 if known.get("mask", {}).get("per_class") else 1.0
        kept: dict[str, Any] = {n: known[n] for n in ("sha256", "arch", "mask") if n in known}
        return {**kept, "forwards": passes}

    @property
    def seen(self) -> np.ndarray[Any, Any] | None:
        """Content ids uint64 of the images that it was made with; None if that is not known."""
        if isinstance(self.model, WithDetector):
            return self.model.detector.seen
        return self.model.network.seen if isinstance(self.model.network, Masked) else None

    @classmethod
    def made(cls, spec: str | Spec, classifier: Classifier) -> Defense:
        """That of a spec or of a file; UsageError if it is wrong or does not fit the classifier."""
        spec = DEFENSES.check(read_defense(spec) if isinstance(spec, str) else spec)
        entry = DEFENSES.entry(spec.name)
        with users_error(spec.name):
            model = partial(DEFENSES.load(spec.name), **spec.parameters)(classifier)
        if model.num_classes != classifier.num_classes:
            raise UsageError(
                f"{spec.name} answers with {model.num_classes} classes, the model itself with"
                f" {classifier.num_classes}: they cannot be compared"
            )
        shown = {key: public(value) for key, value in spec.parameters.items()}
        resolved = {key: public(value) for key, value in entry.resolve(spec).items()}
        facts = model.detector.facts if isinstance(model, WithDetector) else model.identity
        identity = {"name": spec.name, "parameters": resolved, "is": facts}
        return cls(Spec(spec.name, shown), model, identity)


@contextmanager
def users_error(name: str) -> Iterator[None]:
    """A parameter out of range as the mistake of a user."""
    try:
        yield
    except ValueError as error:
        raise UsageError(f"{name}: {error}") from None
