"""What is done where an attack in stages has spared images that it should not have spared."""

from __future__ import annotations

import numpy as np

from robusteval.runs.types import STAGE, Finding, Outcome, Spec

DRAWN = f"{STAGE}drawn "  # begins the columns of stages on images drawn from those that are spared
THOROUGH = "thorough"  # the attack that spares none


def count_drawn_falls(outcome: Outcome) -> tuple[int, int]:
    """Of the images drawn from the spared ones, how many fell, and how many there are."""
    given = [column > 0 for name, column in outcome.columns.items() if name.startswith(DRAWN)]
    if not given:
        return 0, 0
    drawn = np.logical_or.reduce(given)
    return int((drawn & outcome.success()).sum()), int(drawn.sum())


def spare_none(outcome: Outcome) -> tuple[Spec, Finding] | None:
    """The attack that spares no image, where one that was drawn from the spared fell; else None.

    So what becomes of an image in a cell depends on the image alone: the cell that spared too much
    stays as it is, and another one is added.
    """
    fallen, drawn = count_drawn_falls(outcome)
    if not fallen:
        return None
    wider = Spec(THOROUGH, outcome.attack.parameters)
    message = (
        f"{fallen} of {drawn} images drawn from those that {outcome.attack} spares its dear stages"
        f" fell to them: it spared too many, so {wider} was run, which spares none."
    )
    return wider, Finding("spared-too-many", False, message, str(outcome.attack))
