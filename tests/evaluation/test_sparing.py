"""Where an image falls that the reference attack drew from those it spares, it spares none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robusteval.datasets.sources import open_data
from robusteval.evaluation.evaluate import evaluate
from robusteval.evaluation.sparing import spare_none
from robusteval.models.classifier import Classifier
from robusteval.registry import ATTACKS
from robusteval.runs.types import Outcome, Spec, Threat


def build_outcome(pred: list[int], drawn: list[float]) -> Outcome:
    """Images of class 0 that were given to a stage on spared ones, or not."""
    columns = {
        "attacked": np.ones(len(pred), bool),
        "label": np.zeros(len(pred), int),
        "pred_adv": np.array(pred),
        "passes:drawn square": np.array(drawn),
    }
    spec, threat = Spec("standard", {"eps": 0.1}), Threat("linf", 0.1, False)
    return Outcome(spec, threat, "white-box", columns, resolved={"eps": 0.1})


def test_only_a_spared_image_that_fell_asks_for_more() -> None:
    """With the same parameters, and one sentence on why."""
    assert spare_none(build_outcome([0, 1], [9.0, 0.0])) is None
    wider = spare_none(build_outcome([0, 1], [9.0, 9.0]))

    assert wider is not None
    assert str(wider[0]) == "thorough:eps=0.1"
    assert wider[1].message.startswith("1 of 2 images")


def test_the_attack_that_spares_none_is_a_row_of_its_own(
    bands: Classifier, npz: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the cheap searches find nothing, all images are far from success, and all are drawn."""
    ATTACKS.load("standard")
    from robusteval.attacks import standard as module
    from robusteval.search import ensemble
    from robusteval.search.descent import Found

    run = ensemble.Ensemble.run

    def weaken(self: Any, name: str, work: Any, *args: Any) -> None:
        cheap = name in ("apgd", "diverse")
        run(self, name, (lambda stage: Found.nothing(stage.ball.x)) if cheap else work, *args)

    monkeypatch.setattr(ensemble.Ensemble, "run", weaken)
    monkeypatch.setattr(ensemble, "SHARE", 1.0)
    monkeypatch.setattr(module, "CUT", -1.0)
    for name in ("NEAR", "WHOLE", "OPEN"):
        monkeypatch.setattr(module, name, {"long": lambda stage: stage.descend("ce", 9)})

    found = evaluate(bands, open_data(str(npz)), ["standard:eps=0.2"], samples=8, probes=False)

    assert [outcome.attack.name for outcome in found.attacks] == ["standard", "thorough"]
    assert "spared-too-many" in {finding.code for finding in found.findings}
    assert found.attacks[0].success().tolist() == found.attacks[1].success().tolist()

    both = ["standard:eps=0.2", "thorough:eps=0.2"]
    asked = evaluate(bands, open_data(str(npz)), both, samples=8, probes=False)
    assert [outcome.attack.name for outcome in asked.attacks] == ["standard", "thorough"]
