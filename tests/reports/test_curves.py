"""Robust accuracy against the radius, in numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from reportable import as_dict, record_of

from robusteval.reports.curves import NEAREST, SAVED, build_curve_tables, choose_budgets
from robusteval.reports.markdown import to_markdown
from robusteval.runs.types import Outcome, Run, Spec, Threat

MakeOutcome = Callable[..., Outcome]
MakeRun = Callable[..., Run]
NEAREST_L2 = Threat("l2", None, False)


def make_both(make_outcome: MakeOutcome, make_run: MakeRun) -> Run:
    """An attack among all images and one among 8-bit images, which finds each farther away."""
    broken, far = np.arange(500) < 400, np.linspace(0.1, 2, 500)
    free, saved = Spec("ddn", {"images": "float"}), Spec("ddn", {})
    among_saved = make_outcome(broken, spec=saved, threat=NEAREST_L2, l2=2 * far)
    return make_run(
        make_outcome(broken, spec=free, threat=NEAREST_L2, l2=far),
        replace(among_saved, resolved={"images": "8bit"}),
        folder=None,
    )


def test_8_bit_images_have_a_curve_of_their_own(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    """Never below the curve of all images, which 8-bit images are among."""
    run = make_both(make_outcome, make_run)

    every, saved = as_dict(run)["curves"]

    assert [every["eight_bit"], saved["eight_bit"]] == [False, True]
    assert every["attacks"] == ["ddn:images=float", "ddn"]
    assert saved["attacks"] == ["ddn"]
    for curve in (every, saved):
        assert curve["robust"] == sorted(curve["robust"], reverse=True)
    at = [np.interp(1.0, curve["budgets"], curve["robust"]) for curve in (every, saved)]
    assert at[0] < at[1]


def test_attacks_that_know_no_8_bit_images_have_no_such_curve(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    """Whether their successes survive saving is not known from how they searched."""
    broken = np.arange(500) < 400
    free, other = Spec("ddn", {"images": "float"}), Spec("art:DeepFool", {})
    outcomes = [make_outcome(broken, spec=each, threat=NEAREST_L2) for each in (free, other)]

    assert [curve["eight_bit"] for curve in as_dict(make_run(*outcomes))["curves"]] == [False]


def test_a_curve_of_nearest_successes_calls_itself_an_upper_bound(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    """In every form, beside the attacks it is of."""
    (table,) = build_curve_tables(record_of(make_both(make_outcome, make_run)))

    assert [name for name, _ in table.rows] == ["undefended", "8-bit images"]
    assert NEAREST in table.note
    assert SAVED in table.note
    assert "ddn:images=float, ddn" in table.note


def test_markdown_has_the_numbers_with_their_intervals(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    """At the largest budget 100 of 500 images are left."""
    text = to_markdown(record_of(make_both(make_outcome, make_run)))

    section = text.split("### Robust accuracy against l2 budget")[1].split("###")[0]
    (row,) = [line for line in section.splitlines() if line.startswith("| undefended |")]
    assert row.endswith("20.0 % (16.7–23.7) |")
    assert "upper bound" in section


def test_counted_budgets_are_whole() -> None:
    """Each said once."""
    assert choose_budgets("l0", 3.0) == [0.0, 1.0, 2.0, 3.0]
    assert choose_budgets("l2", 2.0) == [0.0, 0.5, 1.0, 1.5, 2.0]
