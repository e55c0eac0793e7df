"""What a run says of itself as a whole while it is under way."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from toys import Bands

from robusteval.datasets.arrays import from_arrays
from robusteval.evaluation.evaluate import evaluate
from robusteval.models.classifier import Classifier
from robusteval.progress import Course, Silent


class Follower(Silent):
    """Follows a run by what it is told."""

    def __init__(self) -> None:
        self.course = Course()
        self.begun: list[str] = []
        self.counts: list[tuple[int, int]] = []

    def foresee(self, stages: Mapping[str, float | None]) -> None:
        self.course.foresee(stages)

    def begin(self, what: str, total: int) -> None:
        self.course.begin(what, total)
        self.begun.append(what)

    def advance(self, n: int) -> None:
        self.course.images += n

    def end(self) -> None:
        self.course.end()
        self.counts.append((self.course.done, len(self.course.coming)))


def test_all_that_is_foreseen_comes(trained_bands: Bands) -> None:
    """By the titles that stages have, trust checks included; nothing is left over at the end."""
    model = Classifier(
        trained_bands, mean=(0.5,), std=(0.25,), num_classes=3, identity={"sha256": "b"}
    )
    x = np.random.default_rng(0).random((12, 3, 12, 12), np.float32)
    data = from_arrays(x, model(torch.from_numpy(x)).argmax(1))
    follower = Follower()

    evaluate(model, data, ["pgd:eps=8/255,steps=20", "noise:tries=2"], progress=follower)

    assert {"Clean accuracy", "pgd:eps=8/255,steps=20", "noise:tries=2"} <= set(follower.begun)
    assert any(name.startswith("Trust check pgd") for name in follower.begun)
    assert not follower.course.coming
    assert [done for done, _ in follower.counts] == list(range(1, len(follower.counts) + 1))
