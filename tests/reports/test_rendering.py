"""Every registered format takes the records of runs and gives one report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from reportable import defended, record_of

from robusteval.registry import REPORT_FORMATS
from robusteval.reports.rendering import find_format, render_records
from robusteval.runs.types import Outcome, Run

MakeOutcome = Callable[..., Outcome]
MakeRun = Callable[..., Run]


@pytest.mark.parametrize("name", REPORT_FORMATS.entries)
def test_every_format_makes_a_report_of_a_record(
    name: str, make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    record = record_of(defended(make_outcome, make_run, n=40))

    made = render_records([record], name, page=True)

    assert len(made) > 50
    assert REPORT_FORMATS.entries[name].parameters.keys() <= {"records"}


def test_every_suffix_says_one_format() -> None:
    suffixes = [s for entry in REPORT_FORMATS.entries.values() for s in entry.suffixes]

    assert max(Counter(suffixes).values()) == 1
    assert all(find_format(Path(f"report{s.upper()}")) for s in suffixes)
    assert find_format(Path("report")) is None
    assert find_format(Path("report.unknown")) is None
