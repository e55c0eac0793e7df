"""Reports of very many attacks show the strongest, say so, and leave out no number of the JSON."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
from reportable import record_of
from rich.console import Console

from robusteval.reports import abridged, curves, record
from robusteval.reports.abridged import abridge, choose_cases, choose_evenly
from robusteval.reports.build import build_record
from robusteval.reports.html import to_html
from robusteval.reports.markdown import to_markdown
from robusteval.reports.record import RunRecord, to_json
from robusteval.reports.terminal import print_table
from robusteval.runs.types import Outcome, Run, Spec, Threat

MakeOutcome = Callable[..., Outcome]
MakeRun = Callable[..., Run]
N = 40
RADII, STEPS = 5, 4


@pytest.fixture
def whole(make_outcome: MakeOutcome, make_run: MakeRun) -> Run:
    """Under each radius attacks of rising strength, but the first is the strongest."""
    cells = []
    for radius in range(1, RADII + 1):
        for steps in range(STEPS):
            eps = radius / 255
            fooled = radius * 5 + (4 if steps == 0 else steps)
            spec = Spec("pgd", {"eps": eps, "steps": steps + 1})
            threat = Threat("linf", eps, False)
            cells.append(make_outcome(np.arange(N) < fooled, spec=spec, threat=threat))
    return make_run(*cells, folder=None)


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(abridged, "MOST_ATTACKS", 6)
    monkeypatch.setattr(abridged, "MOST_CASES", 3)
    monkeypatch.setattr(curves, "MOST_NAMED", 1)


def test_items_are_chosen_at_even_distances() -> None:
    assert choose_evenly(range(11), 3) == [0, 5, 10]
    assert choose_evenly(range(2), 3) == [0, 1]
    assert choose_evenly([7], 5) == [7]


def test_the_least_and_the_largest_radius_of_each_norm_are_among_the_chosen(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    threats = [Threat(norm, (i + 1) / 255, False) for norm in ("linf", "l2") for i in range(9)]
    cells = [
        make_outcome(np.arange(N) < i, spec=Spec("pgd", {"eps": i / 255, "norm": t.norm}), threat=t)
        for i, t in enumerate(threats)
    ]

    chosen = choose_cases(record_of(make_run(*cells)).worst_cases, 6)

    assert [(case.threat.norm, round(255 * (case.threat.eps or 0))) for case in chosen] == [
        *(("linf", 1), ("linf", 5), ("linf", 9)),
        *(("l2", 1), ("l2", 5), ("l2", 9)),
    ]


def test_a_run_of_few_attacks_is_shown_whole(whole: Run) -> None:
    made = build_record(whole)

    assert abridge(made) is made


@pytest.mark.usefixtures("small_pages")
def test_the_strongest_attacks_of_each_chosen_threat_are_shown(whole: Run) -> None:
    made = build_record(whole)

    shown = abridge(made)

    assert [case.threat.eps for case in shown.worst_cases] == [1 / 255, 3 / 255, 5 / 255]
    assert [row.spec for row in shown.attacks] == [
        f"pgd:eps={radius}/255,steps={steps}" for radius in (1, 3, 5) for steps in (1, 4)
    ]
    assert {group.threat.eps for group in shown.groups} == {1 / 255, 3 / 255, 5 / 255}
    assert shown.left_out.startswith("Shown are the strongest 6 of 20 attacks under 3 of 5 threats")
    assert len(shown.worst_cases[0].attacks) == STEPS  # the worst case is that of all


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize("form", ["terminal", "markdown", "html"])
def test_every_page_says_that_it_leaves_attacks_out(whole: Run, form: str) -> None:
    made = build_record(whole)

    text = " ".join(show(made, form).split())

    assert "strongest 6 of 20 attacks" in text
    assert "steps=3" not in text
    assert "Cost:" in text
    assert "Robust accuracy, n = 40" in text


def show(made: RunRecord, form: str) -> str:
    """A page as text."""
    if form == "markdown":
        return to_markdown(made)
    if form == "html":
        return to_html([made])
    console = Console(width=300, force_terminal=False, force_jupyter=False)
    with console.capture() as text:
        print_table(made, console)
    return text.get()


def test_sentences_quote_a_few_threats_and_count_the_others(
    whole: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("robusteval.reports.sentences.QUOTED", 2)

    made = build_record(whole)

    assert "; 28 % (16–43) at linf eps 5/255" in made.verdict
    assert "worst case of 4 attacks, and 3 threats between" in made.verdict
    assert "eps 3/255" not in made.verdict


def test_json_of_many_attacks_has_a_line_for_each_and_the_same_content(
    whole: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = build_record(whole)
    indented = to_json(made)
    monkeypatch.setattr(record, "MANY", 3)

    rows, several = to_json(made), to_json([made, made])

    assert json.loads(rows) == json.loads(indented)
    assert sum("pgd:eps=2/255,steps=3" in line for line in rows.split("\n")) < 8
    assert json.loads(several)["runs"] == [json.loads(indented)] * 2


def test_of_very_many_attacks_turns_are_told_of_all_of_a_threat_alone(
    whole: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("robusteval.reports.groups.MOST_TURNED", 3)

    assert [each.attack for each in build_record(whole).turned] == [None] * RADII
