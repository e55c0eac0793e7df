"""Published figures stand beside a run where everything matches, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from robusteval.reports import sentences
from robusteval.reports.build import build_record
from robusteval.reports.neighbours import find_neighbours, read_published
from robusteval.reports.record import RunRecord
from robusteval.runs.types import Finding, Outcome, Run, Spec, Threat

MakeOutcome = Callable[..., Outcome]
MakeRun = Callable[..., Run]
STANDARD = Spec("standard", {"norm": "linf", "eps": 8 / 255})


@pytest.fixture
def make(make_outcome: MakeOutcome, make_run: MakeRun) -> Callable[..., RunRecord]:
    """A record of 100 images, of which so many are robust."""

    def build(robust: int = 55, eps: float = 8 / 255, spec: Spec = STANDARD, **changed: Any) -> Any:
        outcome = make_outcome(np.arange(100) >= robust, spec=spec)
        run = make_run(replace(outcome, threat=Threat("linf", eps, False)))
        data = {**run.data, "name": "cifar10 (test)", "total": 10_000, **changed.pop("data", {})}
        return build_record(replace(run, data=data, **changed))

    return build


def names(record: RunRecord) -> list[str]:
    """The neighbours of its first case."""
    return [each.model for each in find_neighbours(record, record.worst_cases[0])]


def test_the_table_is_in_order_and_of_shares() -> None:
    table = read_published()

    for data, norm in {(each.data, each.norm) for each in table}:
        robust = [each.robust for each in table if (each.data, each.norm) == (data, norm)]
        assert robust == sorted(robust, reverse=True)
    assert all(0 <= each.robust <= each.clean <= 1 for each in table)


def test_the_next_above_and_below_are_named(make: Callable[..., RunRecord]) -> None:
    """One alone at the ends; what is said has the interval of the run."""
    assert names(make(55)) == ["Wu2020Adversarial", "Hendrycks2019Using"]
    assert names(make(99)) == ["Bartoldson2024Adversarial_WRN-94-16"]
    assert names(make(0)) == ["Standard"]
    (said,) = [s for s in sentences.write_meaning(make(55)) if s.startswith("Nearest published")]
    assert "56.17 %" in said
    assert "55 % (45–64) of 100" in said


@pytest.mark.parametrize(
    "changed",
    [
        {"eps": 4 / 255},
        {"eps": 0.031},
        {"spec": Spec("pgd", {"eps": 8 / 255})},
        {"data": {"name": "cifar10 (train)"}},
        {"data": {"total": 9_000}},
        {"data": {"name": "photos"}},
        {"findings": (Finding("zero-gradient", True, "Gradients vanish."),)},
        {"status": "incomplete"},
    ],
)
def test_whatever_differs_leaves_none(
    make: Callable[..., RunRecord], changed: dict[str, Any]
) -> None:
    assert not names(make(**changed))
