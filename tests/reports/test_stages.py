"""The table of an attack's stages: what each saw, whose success was kept, what it cost."""

from __future__ import annotations

import numpy as np

from robusteval.reports.stages import StageRow, build_stages
from robusteval.runs.types import Outcome, Spec, Threat


def build_outcome(**more: object) -> Outcome:
    """Four images of class 0, of which the last was wrong at first and the third holds."""
    columns = {
        "attacked": np.array([True, True, True, False]),
        "label": np.zeros(4, np.int64),
        "target": np.full(4, -1),
        "pred_adv": np.array([1, 1, 0, 1]),
        **{name: np.array(values) for name, values in more.items()},
    }
    return Outcome(Spec("standard", {}), Threat("linf", 0.1, False), "white-box", columns)


def test_a_fall_counts_for_the_stage_whose_success_was_kept() -> None:
    """Not for the last that an image was given to, which may have found nothing better."""
    outcome = build_outcome(
        **{
            "passes:first": [10.0, 20.0, 20.0, 0.0],
            "made:first": [True, False, False, False],
            "passes:second": [5.0, 5.0, 5.0, 0.0],
            "made:second": [False, True, False, False],
            "passes:third": [7.0, 7.0, 7.0, 0.0],
            "made:third": [False, False, False, False],
        }
    )

    assert build_stages(outcome) == (
        StageRow("first", 3, 1, 50.0),
        StageRow("second", 3, 1, 15.0),
        StageRow("third", 3, 0, 21.0),
    )


def test_a_success_that_does_not_hold_when_judged_is_nobodys() -> None:
    """The judge's word counts, not the attack's."""
    outcome = build_outcome(
        **{
            "passes:first": [1.0, 1.0, 1.0, 0.0],
            "made:first": [True, True, True, False],
        }
    )

    assert build_stages(outcome) == (StageRow("first", 3, 2, 3.0),)


def test_an_attack_without_stages_has_no_table() -> None:
    """Its outcome has no such columns."""
    assert build_stages(build_outcome()) == ()
