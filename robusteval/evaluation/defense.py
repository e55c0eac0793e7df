"""A defense as the evaluation sees it: another classifier, or the same one and a detector.

A registered defense is a function ``(model, *, parameters) -> Classifier`` that makes of a
classifier the defended one; a `WithDetector` one if it raises alarms instead of answering
otherwise. `ReadyDefense` says how it states what it costs and which images it has seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from robusteval.errors import UsageError
from robusteval.evaluation.defense_files import hide_folder, parse_defense
from robusteval.interpreters.explainer import Interpreter
from robusteval.models.classifier import Classifier, derive_identity
from robusteval.models.failures import raise_as_usage_error
from robusteval.registry import DEFENSES
from robusteval.runs.types import Spec


class Detector(Protocol):
    """Says how suspicious an image is, by its explanations.

    Results for an image do not depend on the batch. All maps are scaled as they are compared.
    """

    @property
    def explainers(self) -> tuple[Interpreter, ...]:
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
        """Features ``(n, d)`` of the maps ``(n, 1, h', w')`` of each interpreter, on the graph.

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
            identity=derive_identity(classifier, detector=detector.facts),
            block=classifier.block,
        )
        self.to(classifier.device)
        self.detector = detector
        self._answers = classifier.answers

    @property
    def answers(self) -> dict[str, Any]:
        """Identity of the classifier that is watched."""
        return self._answers

    @property
    def undefended(self) -> Classifier:
        """The classifier that is watched, without its detector."""
        return self.rebuild(self.network, self._answers).train(self.training)


@runtime_checkable
class Defense(Protocol):
    """A defense that is ready to be attacked, as the evaluation sees it.

    `prepare_defense` makes one of what is registered; anything of this form can be given to
    `robusteval.evaluation.evaluate.evaluate`.
    """

    @property
    def spec(self) -> Spec:
        """The defense as reports print it: of files the names alone."""
        ...

    @property
    def model(self) -> Classifier:
        """What is attacked: another network, or the same one where there is a detector."""
        ...

    @property
    def detector(self) -> Detector | None:
        """What raises alarms beside the model, which then answers like the undefended one."""
        ...

    @property
    def identity(self) -> dict[str, Any]:
        """JSON-able: all that decides its numbers."""
        ...

    @property
    def forwards(self) -> float:
        """The cost of a prediction, in forward passes of the network."""
        ...

    @property
    def seen(self) -> np.ndarray[Any, Any] | None:
        """Content ids uint64 of the images that it was made with; None if that is not known."""
        ...

    @property
    def facts(self) -> dict[str, Any]:
        """JSON-able: what reports say of it, `forwards` among it."""
        ...


@dataclass(frozen=True)
class ReadyDefense:
    """A `Defense` made of a classifier.

    What it costs and has seen its network may say by attributes `forwards` and `seen`; without
    them it takes one pass, and what it has seen is not known. Behind a detector, this one says it.
    """

    spec: Spec
    model: Classifier
    identity: dict[str, Any]

    @property
    def detector(self) -> Detector | None:
        """What raises alarms; None if the model answers otherwise instead."""
        return self.model.detector if isinstance(self.model, WithDetector) else None

    @property
    def forwards(self) -> float:
        """The cost of a prediction, in forward passes of the network."""
        if self.detector is not None:
            return float(self.detector.facts.get("forwards", 1.0))
        return float(getattr(self.model.network, "forwards", 1.0))

    @property
    def seen(self) -> np.ndarray[Any, Any] | None:
        """Content ids uint64 of the images that it was made with; None if that is not known."""
        if self.detector is not None:
            return self.detector.seen
        seen = getattr(self.model.network, "seen", None)
        return seen if isinstance(seen, np.ndarray) else None

    @property
    def facts(self) -> dict[str, Any]:
        """What reports say of it besides numbers that were measured."""
        if self.detector is not None:
            return self.detector.facts
        known = self.model.identity
        kept: dict[str, Any] = {n: known[n] for n in ("sha256", "arch", "mask") if n in known}
        return {**kept, "forwards": self.forwards}


def prepare_defense(spec: str | Spec, classifier: Classifier) -> ReadyDefense:
    """Build the defense of a spec or of a file.

    UsageError if it is wrong or does not fit the classifier.
    """
    spec = DEFENSES.check_spec(parse_defense(spec) if isinstance(spec, str) else spec)
    entry = DEFENSES.entry(spec.name)
    with raise_as_usage_error(spec.name):
        model = partial(DEFENSES.load(spec.name), **spec.parameters)(classifier)
    if model.num_classes != classifier.num_classes:
        raise UsageError(
            f"{spec.name} answers with {model.num_classes} classes, the model itself with"
            f" {classifier.num_classes}: they cannot be compared"
        )
    shown = {key: hide_folder(value) for key, value in spec.parameters.items()}
    resolved = {key: hide_folder(value) for key, value in entry.resolve(spec).items()}
    facts = model.detector.facts if isinstance(model, WithDetector) else model.identity
    identity = {"name": spec.name, "parameters": resolved, "is": facts}
    return ReadyDefense(Spec(spec.name, shown), model, identity)


def name_kind(defense: Defense) -> str:
    """Name the kind of a defense as `robusteval.runs.types.Defended` does."""
    return "model" if defense.detector is None else "detector"
