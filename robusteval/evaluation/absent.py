"""What stands for the network and the images of a run where they are not there.

A run whose rows were all computed elsewhere goes the usual way of an evaluation without asking
either of them; whoever does ask is refused, see `robusteval.evaluation.merging`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn, cast

from torch import Tensor, nn

from robusteval.datasets.dataset import Batch, Data
from robusteval.errors import RobustevalError, UsageError
from robusteval.evaluation.plan import Plan, prepare_attack
from robusteval.models.classifier import Classifier
from robusteval.registry import parse
from robusteval.runs.types import Columns, Finding


class Absent(RobustevalError):
    """Something was asked of a network or of data that are not there."""


class AbsentClassifier(Classifier):
    """Stands for a network that is not there: it knows how many classes there are.

    Parameters
    ----------
    num_classes : int
        Number of logits.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__(nn.Identity(), num_classes=num_classes)
        self.eval()
        self.asked: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        """Logits of no images; `Absent` for any image."""
        if not len(x):
            return x.new_zeros(0, self.num_classes)
        self.refuse("the network")

    def refuse(self, what: str) -> NoReturn:
        """Note what was asked for, and raise `Absent`."""
        self.asked.append(what)
        raise Absent(f"it was not computed by any shard, and {what} is not here")


class AbsentData:
    """What a record says of images that are not there, in the place of `Data`.

    Parameters
    ----------
    told : mapping
        The record's `data`.
    classifier : AbsentClassifier
        Notes whether images are asked for.
    """

    def __init__(self, told: Mapping[str, Any], classifier: AbsentClassifier) -> None:
        self.told = dict(told)
        self.classifier = classifier
        self.name = told["name"]
        self.shape = tuple(told["shape"])
        self.transform = told["transform"]
        self.class_names = told["class_names"] and tuple(told["class_names"])
        self.matching = told.get("labels")
        self.source = self

    def __len__(self) -> int:
        return int(self.told["total"])

    def count_turned(self, index: object) -> int:
        """How many of the images are turned upright."""
        return int(self.told.get("turned", 0))

    def expect(self, index: object) -> None:
        """Nothing can be read ahead."""

    def batch(self, index: object) -> Batch:
        """Raise `Absent`."""
        self.classifier.refuse("an image")


def prepare_absent(
    record: Mapping[str, Any],
    config: dict[str, Any],
    clean: Columns,
    answers: Mapping[str, Any],
) -> tuple[Plan, AbsentClassifier]:
    """The plan of a run whose network and images are not there, and what stands for the network."""
    try:
        classifier = AbsentClassifier(int(answers["classes"]))
        data = AbsentData(record["data"], classifier)
        shape = cast(tuple[int, int, int], data.shape)
        attacks = tuple(
            prepare_attack(parse(text), classifier, shape, data=cast(Data, data))
            for text in config["attacks"]
        )
        findings = tuple(Finding(**finding) for finding in answers["plan"])
        seed, probes = int(config["seed"]), bool(config["probes"])
    except (KeyError, TypeError, ValueError):
        raise UsageError("the record of the shards is damaged: give their commands again") from None
    plan = Plan(
        classifier,
        cast(Data, data),
        clean["index"],
        attacks,
        seed,
        probes,
        config,
        findings=findings,
    )
    return plan, classifier
