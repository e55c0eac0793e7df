"""What a report says of corruptions, alone and beside attacks."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
from reportable import corrupted, record_of

from robusteval.evaluation.strength import check_strength
from robusteval.reports.attack_tables import list_attack_lines
from robusteval.reports.badge import build_badge
from robusteval.reports.compare import compare
from robusteval.reports.corruptions import build_corruption_tables, describe_corruption_errors
from robusteval.reports.cyclonedx import render_cyclonedx
from robusteval.reports.evidence import list_figures
from robusteval.reports.formatting import format_threat
from robusteval.reports.html import to_html
from robusteval.reports.markdown import to_markdown
from robusteval.reports.meaning import describe_reach
from robusteval.reports.measures import ThreatRecord
from robusteval.reports.model_card import render_model_card
from robusteval.reports.models import build_models, build_models_table
from robusteval.reports.pictures import choose_rows, describe_result
from robusteval.reports.record import to_json
from robusteval.reports.rendering import render_console
from robusteval.reports.sentences import write_meaning
from robusteval.reports.terminal import print_table
from robusteval.runs.types import Outcome, Run

MakeOutcome = Callable[..., Outcome]
MakeRun = Callable[..., Run]
N = 500


def make_corrupted_run(make: MakeOutcome, build: MakeRun, factor: int = 1) -> Run:
    cells = (("fog", 1, 50), ("fog", 2, 100), ("snow", 1, 0), ("snow", 2, 200))
    return build(*(corrupted(make, k, s, lost * factor, N) for k, s, lost in cells), folder=None)


def test_a_run_of_corruptions_alone_gives_their_mean(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    """And does not call it robust, nor the least of them a worst case."""
    record = record_of(make_corrupted_run(make_outcome, make_run))

    (found,) = record.corruptions
    assert found.accuracy.value == pytest.approx(1 - (50 + 100 + 0 + 200) / 4 / N)
    assert [kind.accuracy.value for kind in found.kinds] == pytest.approx([0.85, 0.8])
    assert [each.accuracy.value for each in found.severities] == pytest.approx([0.95, 0.7])
    assert record.verdict.startswith("Accuracy 82.5 % (")
    assert "2 kinds of corruption, 2 severities, n = 500" in record.verdict
    said = " ".join([record.verdict, *write_meaning(record)])
    assert "obust" not in said
    assert "Hardest corruption: snow" in said
    assert "No attacker was tried" in said
    assert "Next:" not in said
    assert list(list_attack_lines(record)) == []  # they have a table of their own


def test_beside_attacks_corruptions_are_told_apart(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    """The robust accuracy is that of the attack alone."""
    attack = make_outcome(np.arange(N) < 300)
    corruptions = make_corrupted_run(make_outcome, make_run).outcomes
    record = record_of(make_run(attack, *corruptions, folder=None))

    assert record.verdict.startswith("Robust accuracy 40.0 % (35.8–44.4), n = 500, linf eps 8/255")
    assert "; 82.5 % (" in record.verdict
    said = list(write_meaning(record))
    assert sum("An attacker" in line for line in said) == 1
    assert not any("No attacker" in line for line in said)
    assert "40.0 %" in json.loads(build_badge(record))["message"]


def test_patches_and_moves_are_said_in_plain_words() -> None:
    """By the share that is covered, and by angles."""
    patch = ThreatRecord("patch", 0.05, targeted=False, eps_255=None)
    moved = ThreatRecord("spatial", 30, targeted=False, eps_255=None)

    assert describe_reach(patch) == "a square of 5 % of an image at will"
    assert "turns of up to 30 degrees" in describe_reach(moved)
    assert format_threat(patch) == "patch of 5 % of the image"
    assert format_threat(moved) == "rotation up to 30 degrees with shifts"
    assert format_threat(moved, 0.1) == "rotation up to 30 degrees with shifts up to 10 %"
    assert "by shifts of up to 10 % of the side," in describe_reach(moved, 0.1)


def test_every_form_has_the_means(make_outcome: MakeOutcome, make_run: MakeRun) -> None:
    """By severity, by kind, and of all."""
    record = record_of(make_corrupted_run(make_outcome, make_run))

    (table,) = build_corruption_tables(record.corruptions, record.run)
    assert table.columns == ("corruption", "1", "2", "mean")
    assert [row[:3] for row in table.rows] == [
        ("fog", "90.0 %", "80.0 %"),
        ("snow", "100.0 %", "60.0 %"),
        ("mean", "95.0 %", "70.0 %"),
        ("right under all", "90.0 %", "60.0 %"),
    ]
    assert table.rows[2][3].startswith("82.5 % (")
    printed = render_console(lambda console: print_table(record, console), page=True)
    for text in (to_markdown(record), to_html([record]), printed):
        assert "Accuracy under corruptions" in text
        assert "right under all" in text
        assert "obust accuracy" not in text
    badge = json.loads(build_badge(record))
    assert badge["label"] == "accuracy"
    assert "2 kinds of corruption" in badge["message"]


def test_a_mean_without_spread_keeps_an_interval(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    """Of images that are all right, as a rate has one."""
    run = make_run(corrupted(make_outcome, "fog", 1, 0, N), folder=None)

    accuracy = record_of(run).corruptions[0].accuracy

    assert accuracy.value == 1
    assert accuracy.low == pytest.approx(0.9924, abs=1e-3)


def test_two_runs_give_the_mean_corruption_error(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    """Errors of each kind over those of the reference, then averaged over kinds."""
    reference = make_corrupted_run(make_outcome, make_run)
    twice = make_corrupted_run(make_outcome, make_run, factor=2)

    (said,) = describe_corruption_errors(reference, twice)

    assert said.startswith(
        "Mean corruption error over 2 kinds with the run before as the reference"
    )
    assert ": 200.0 % (" in said
    assert said in compare(reference, twice).remarks
    other = make_run(corrupted(make_outcome, "fog", 1, 3, N), folder=None)
    assert list(describe_corruption_errors(reference, other)) == []


def test_corruptions_are_no_weak_attacks(make_outcome: MakeOutcome, make_run: MakeRun) -> None:
    """They look for nothing, so that nothing is asked of them."""
    assert list(check_strength(make_corrupted_run(make_outcome, make_run).outcomes)) == []


def test_kinds_at_other_severities_have_no_hardest(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    """Fog of severity 5 and noise of severity 1 do not say which is harder."""
    cells = corrupted(make_outcome, "fog", 5, 400, N), corrupted(make_outcome, "snow", 1, 10, N)
    record = record_of(make_run(*cells, folder=None))

    assert not any("Hardest" in line for line in write_meaning(record))


def test_models_beside_each_other_have_no_worst_corruption(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    """A row for each severity and the mean; of single corruptions JSON has rows."""
    runs = [make_corrupted_run(make_outcome, make_run, factor) for factor in (1, 2)]
    record = build_models(runs)
    table = build_models_table(record)

    assert [row[0] for row in table.rows] == [
        "images as they are",
        "right under all of 2, corruption of severity 1",
        "right under all of 2, corruption of severity 2",
    ]
    assert [row.kind for row in record.rows].count("corruption") == 4
    assert "82.5 %, " in table.note
    assert " 65.0 %, -17.5 points (" in table.note
    assert not any("-0.0 (" in line for *_, cells in table.rows for cell in cells for line in cell)


def test_pictures_are_of_attackers_first_and_of_middle_severities(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    """Five severities of fifteen kinds would fill the page."""
    cells = [corrupted(make_outcome, k, s, 9, N) for k in ("fog", "snow") for s in (1, 2, 3)]
    record = record_of(make_run(*cells, make_outcome(np.arange(N) < 300), folder=None))

    assert [row.spec for row in choose_rows(record)] == [
        "pgd:eps=8/255,steps=20",
        "corruption:kind=fog,severity=2",
        "corruption:kind=snow,severity=2",
    ]


def test_comparisons_have_means_and_no_worst_corruption(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    """The difference of means over the corruptions that both ran, image by image."""
    runs = [make_corrupted_run(make_outcome, make_run, factor) for factor in (1, 2)]

    found = compare(*runs)

    assert {pair.kind for pair in found.pairs} == {"clean", "attack"}
    assert any(
        said.startswith("Mean accuracy under 4 corruptions: 82.5 % before, 65.0 % after, -17.5")
        for said in found.remarks
    )


def test_a_corrupted_image_is_not_fooled(make_outcome: MakeOutcome, make_run: MakeRun) -> None:
    run = make_run(corrupted(make_outcome, "fog", 1, 1, N), folder=None)

    said = [describe_result(run, run.outcomes[0], at) for at in (0, 1)]

    assert said == ["✗ wrong", "✓ right"]


def test_exports_carry_the_means(make_outcome: MakeOutcome, make_run: MakeRun) -> None:
    """Over all corruptions and of each severity, where the JSON report has them."""
    record = record_of(make_corrupted_run(make_outcome, make_run))
    whole = json.loads(to_json(record))

    found = [each for each in list_figures(record) if "corruptions" in each.metric]

    assert [each.title for each in found] == [
        "mean accuracy under corruptions, 4 corruptions",
        "mean accuracy under corruptions, severity 1",
        "mean accuracy under corruptions, severity 2",
    ]
    for figure in found:
        there = whole
        for part in figure.pointer.split("/")[1:]:
            there = there[int(part)] if isinstance(there, list) else there[part]
        assert there["value"] == figure.rate.value
    assert "82.5 % (" in render_model_card([record])
    assert "Article 15(4)" in render_cyclonedx([record])
