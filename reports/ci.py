"""Reports for machines that run tests: JUnit XML, SARIF, GitHub, a badge.

All of them are laid out from the record of a run. What is not known to be good is
never shown as good: an inconclusive gate is a failure, a run without a result an error.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote
from xml.etree import ElementTree as ET

from robusteval import __version__
from robusteval.errors import UsageError
from robusteval.registry import REPORT_FORMATS
from robusteval.runs.types import visible

from . import formatting, gate_words, sentences
from .markdown import document
from .markdown import shortened as fitting
from .record import AttackRow, GateRow, RunRecord

JUDGED = {"failed": "error", "inconclusive": "warning"}  # outcomes of a gate worth a result
SARIF_SCHEMA = (
    "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
)
MOST_RESULTS = 5000  # GitHub shows no more of one file
MOST_ANNOTATIONS = 10  # GitHub shows no more of one kind in one step
LONGEST = 4000  # characters of one message
SUMMARY_LIMIT = 2**20  # bytes; GitHub drops a step summary that is longer
SMALLEST = 200  # bytes; in less there is no room for a note

RULES = {
    "gate-floor": "Robust accuracy is certain to be above a floor.",
    "gate-max_drop": "Robust accuracy has not dropped against the baseline.",
    "gate-max_clean_cost": "A defense costs little accuracy on clean images.",
    "gate-min_tpr": "A detector finds most of the attacked images.",
    "gate-findings": "The trust checks find nothing that is not allowed.",
    "no-result": "Every attack that was asked for has a result.",
}


class Problem(NamedTuple):
    """Something to show beside the line of a file."""

    rule: str  # "gate-floor", "finding-zero-gradient", "no-result"
    level: str  # "error" or "warning"
    title: str
    message: str
    file: str
    line: int


def problems(record: RunRecord) -> list[Problem]:
    """What is wrong with a run, worst first: gates, then what has no result, then findings."""
    file = config_of(record) or stored_in(record)
    found = [
        Problem(
            f"gate-{gate.kind}",
            JUDGED[gate.outcome],
            f"{gate.name}: {gate.outcome}",
            gate_words.write_gate(gate),
            file,
            max(gate.line or 1, 1),
        )
        for gate in gates(record)
        if gate.outcome in JUDGED
    ]
    if sentences.explain_missing_number(record) or not record.complete:
        said = record.verdict + "".join(
            f" {absence}." for absence in sentences.write_absences(record)
        )
        found.append(Problem("no-result", "error", "no result", said, file, 1))
    found += [
        Problem(
            f"finding-{finding.code}",
            "warning",
            f"finding: {finding.code}",
            sentences.write_finding(finding)[2:],
            file,
            1,
        )
        for finding in record.findings
        if finding.grave
    ]
    return sorted(found, key=lambda problem: problem.level != "error")


def gates(record: RunRecord) -> list[GateRow]:
    """The gates that were tested, if any."""
    return list(record.gates.gates) if record.gates else []


def config_of(record: RunRecord) -> str:
    """The file that names the gates; empty if there is none."""
    return str(record.gates.config or "") if record.gates else ""


def stored_in(record: RunRecord) -> str:
    """The file that the run is stored in."""
    folder = record.provenance.folder
    return f"{folder}/run.json" if folder else "run.json"


def inside(path: str) -> str:
    """A path below the folder of the project; of any other only the name of the file."""
    parts = [part for part in path.replace("\\", "/").split("/") if part != "."]
    outside = ".." in parts or parts[0] == "" or re.fullmatch("[A-Za-z]:", parts[0])
    return parts[-1] if outside else "/".join(part for part in parts if part)


def names(records: Sequence[RunRecord]) -> list[str]:
    """A short name for each run, no two the same."""
    found: list[str] = []
    for record in records:
        source = record.provenance
        name = (
            formatting.name_file(source.folder)
            or formatting.name_file(source.model.get("file"))
            or "run"
        )
        again = sum(other == name or other.startswith(f"{name} (") for other in found)
        found.append(f"{name} ({again + 1})" if again else name)
    return found


def cell(row: AttackRow) -> str:
    """A cell in words: the attack and what it was up against."""
    if row.defense is None:
        return str(row.spec)
    knows = "adaptive" if row.adaptive else "oblivious"
    return f"{row.spec} behind {row.defense}, {knows}"


@REPORT_FORMATS.add("junit", suffix=".xml")
def to_junit(records: Sequence[RunRecord]) -> str:
    """JUnit XML: a suite for each run, a case for each gate and each attack.

    An inconclusive gate is a failure of the type "inconclusive"; an attack fails on nothing, but
    is an error if it has no result.
    """
    root = ET.Element("testsuites", name="robusteval")
    for record, name in zip(records, names(records), strict=True):
        root.append(suite(record, visible(name)))
    for count in ("tests", "failures", "errors"):
        root.set(count, str(sum(int(each.get(count, 0)) for each in root)))
    root.set("time", clock(sum(float(each.get("time", 0)) for each in root)))
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def suite(record: RunRecord, name: str) -> ET.Element:
    """One run; its name is in the class names, because GitLab merges the suites of a job."""
    group = f"robusteval.{name.replace('.', '_')}"
    made = [gate_case(gate, f"{group}.gates") for gate in gates(record)]
    made += [attack_case(row, f"{group}.attacks") for row in record.attacks]
    absent = {**record.failures, **dict.fromkeys(record.not_run, "not finished")}
    for spec, reason in absent.items():
        made.append(case(spec, f"{group}.attacks"))
        blame(made[-1], "error", "no result", reason)
    if sentences.explain_missing_number(record):
        made.append(case("evaluation", group))
        blame(made[-1], "error", "nothing evaluated", record.verdict)
    element = ET.Element("testsuite", name=name, tests=str(len(made)))
    for count, tag in (("failures", "failure"), ("errors", "error")):
        element.set(count, str(sum(each.find(tag) is not None for each in made)))
    element.set("skipped", "0")
    element.set("time", clock(record.provenance.seconds))
    if record.provenance.created:
        element.set("timestamp", visible(record.provenance.created))
    element.extend(made)
    told(element, "\n".join(page(record)))
    return element


def case(name: str, group: str, seconds: float | None = None) -> ET.Element:
    """A test case without a verdict, which counts as passed."""
    return ET.Element("testcase", name=visible(name), classname=group, time=clock(seconds))


def clock(seconds: float | None) -> str:
    """Seconds to the millisecond, never in scientific notation."""
    return f"{seconds or 0.0:.3f}"


def gate_case(gate: GateRow, group: str) -> ET.Element:
    """A gate: passed, or failed."""
    element = case(gate.name, group)
    if gate.outcome != "passed":
        blame(element, "failure", gate.outcome, gate.reason)
    told(element, visible(gate_words.write_gate(gate)))
    return element


def attack_case(row: AttackRow, group: str) -> ET.Element:
    """An attack: an error if it had no image to work on."""
    element = case(cell(row), group, row.cost.seconds)
    if row.success_rate.float.n == 0:
        blame(element, "error", "nothing evaluated", "No image was left to attack.")
    told(element, visible(sentence(row)))
    return element


def blame(element: ET.Element, tag: str, kind: str, message: str) -> None:
    """Say what is wrong with a case, both ways in which it is read."""
    shown = visible(message)
    ET.SubElement(element, tag, type=kind, message=shown).text = shown


def told(element: ET.Element, text: str) -> None:
    """Text beside a case or a suite."""
    ET.SubElement(element, "system-out").text = text


def page(record: RunRecord) -> Iterator[str]:
    """A report in lines of plain text."""
    yield visible(record.verdict)
    yield from map(visible, sentences.write_meaning(record))
    yield from (visible(f"gate {gate_words.write_gate(gate)}") for gate in gates(record))
    yield from (visible(sentences.write_finding(finding)) for finding in record.findings)
    for row in record.attacks:
        yield visible(f"{cell(row)}: {sentence(row)}")
    yield from map(visible, sentences.write_absences(record))


def sentence(row: AttackRow) -> str:
    """The numbers of a cell in words."""
    robust, fooled = row.robust_accuracy, row.success_rate.float
    threat = formatting.format_threat(row.threat)
    return (
        f"robust accuracy {formatting.format_rate(robust.float)} under {threat},"
        f" {formatting.format_percent(robust.eight_bit)} after rounding to 8 bit;"
        f" fooled on {fooled.k:,} of {fooled.n:,} images,"
        f" median distance {formatting.format_quantity(row.distance.median)};"
        f" {formatting.format_passes(row.cost)} forward / backward passes per attacked image"
    )


@REPORT_FORMATS.add("sarif", suffix=".sarif")
def to_sarif(records: Sequence[RunRecord]) -> str:
    """SARIF 2.1.0: a result for each gate that is not passed, each grave finding, each absence.

    Gates point at their line in the file that names them, the others at its first line, or at
    ``run.json``. Worst first, at most 5,000; all runs are one run of the tool, because GitHub
    takes one of each tool from a file.
    """
    several = len(records) > 1
    found = [
        (problem, name if several else "")
        for record, name in zip(records, names(records), strict=True)
        for problem in problems(record)
    ]
    found.sort(key=lambda item: item[0].level != "error")
    kept, left = found[:MOST_RESULTS], found[MOST_RESULTS:]
    ids = sorted({rule_id(problem) for problem, _ in kept})
    invocation: dict[str, Any] = {"executionSuccessful": all(record.complete for record in records)}
    if left:
        note = f"{formatting.format_count(len(left), 'more result')} left out."
        invocation["toolExecutionNotifications"] = [{"message": {"text": note}}]
    driver = {"name": "robusteval", "version": __version__, "rules": [rule(id_) for id_ in ids]}
    run = {
        "tool": {"driver": driver},
        "invocations": [invocation],
        "columnKind": "utf16CodeUnits",
        "results": [result(problem, name, ids) for problem, name in kept],
    }
    return json.dumps({"$schema": SARIF_SCHEMA, "version": "2.1.0", "runs": [run]}, indent=1) + "\n"


def rule_id(problem: Problem) -> str:
    """The name of a rule as code scanning takes it."""
    return shortened(visible(problem.rule), 200)


def rule(id_: str) -> dict[str, Any]:
    """What a kind of result is about."""
    about = RULES.get(id_, "A trust check found a reason to doubt the numbers.")
    return {
        "id": id_,
        "shortDescription": {"text": about},
        "fullDescription": {"text": about},
        "help": {"text": f"{about} The report of the run says more."},
        "defaultConfiguration": {"level": "warning" if id_.startswith("finding-") else "error"},
    }


def result(problem: Problem, name: str, ids: Sequence[str]) -> dict[str, Any]:
    """A result; an inconclusive gate too is of the kind `fail`, others would not be shown."""
    text = f"{name}: {problem.message}" if name else problem.message
    identity = "\n".join((name, problem.rule, problem.title))
    digest = sha256(identity.encode("utf-8", "backslashreplace")).hexdigest()[:16]
    region = {"startLine": problem.line}
    artifact = {"uri": quote(visible(inside(problem.file)), safe="/")}
    return {
        "ruleId": rule_id(problem),
        "ruleIndex": ids.index(rule_id(problem)),
        "level": problem.level,
        "message": {"text": shortened(visible(text), LONGEST)},
        "locations": [{"physicalLocation": {"artifactLocation": artifact, "region": region}}],
        # so that the same problem is not reported anew when lines move
        "partialFingerprints": {"primaryLocationLineHash": f"{digest}:1"},
    }


def shortened(text: str, most: int) -> str:
    """The text, or its beginning."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def annotations(record: RunRecord) -> list[str]:
    """Workflow commands for GitHub, a line each: the ten worst problems of a run."""
    return list(map(annotation, problems(record)[:MOST_ANNOTATIONS]))


def annotation(problem: Problem) -> str:
    """A problem as a workflow command."""
    facts = {
        "file": inside(problem.file),
        "line": str(problem.line),
        "title": f"robusteval: {problem.title}",
    }
    properties = ",".join(f"{key}={as_property(value)}" for key, value in facts.items())
    return f"::{problem.level} {properties}::{as_data(problem.message)}"


def as_data(text: str) -> str:
    """Text behind a workflow command."""
    shown = shortened(visible(text), LONGEST)
    return shown.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def as_property(text: str) -> str:
    """Text between the commas of a workflow command."""
    return as_data(text).replace(":", "%3A").replace(",", "%2C")


def step_summary(records: Sequence[RunRecord], limit: int = SUMMARY_LIMIT) -> str:
    """The reports as Markdown of at most `limit` bytes, cut between lines with a note."""
    lines = [line for record in records for line in (*document(record), "")]
    return "\n".join(fitting(lines, limit)) + "\n"


def write_github(records: Sequence[RunRecord], environ: Mapping[str, str]) -> list[str]:
    """Inside a GitHub workflow, append to the step summary and return annotations to print.

    Elsewhere nothing is written and nothing returned. At most ten annotations, worst first.
    """
    if environ.get("GITHUB_ACTIONS") != "true":
        return []
    found = [problem for record in records for problem in problems(record)]
    found.sort(key=lambda problem: problem.level != "error")
    made = list(map(annotation, found[:MOST_ANNOTATIONS]))
    if environ.get("GITHUB_STEP_SUMMARY"):
        path = Path(environ["GITHUB_STEP_SUMMARY"])
        try:
            room = SUMMARY_LIMIT - (path.stat().st_size if path.exists() else 0)
            if room >= SMALLEST:
                with path.open("a", encoding="utf-8", newline="\n") as file:
                    file.write(step_summary(records, room))
        except OSError as error:
            # a summary is no reason to change the verdict of a check
            reason = f"the step summary could not be written: {error.strerror or error}"
            made.append(f"::warning title=robusteval::{as_data(reason)}")
    return made


@REPORT_FORMATS.add("badge")
def to_badge(records: Sequence[RunRecord]) -> str:
    """The badge of one run as a line of JSON; UsageError for several."""
    if len(records) != 1:
        raise UsageError("a badge is for one run")
    return badge(records[0]) + "\n"


def badge(record: RunRecord) -> str:
    """The JSON of a shields.io endpoint badge: the weakest robust accuracy, with its interval.

    Green only for passed gates on a complete run without a grave finding.
    """
    shown = {"schemaVersion": 1, "label": "robust accuracy", **label_and_message(record)}
    return json.dumps({**shown, "color": colour(record)})


def label_and_message(record: RunRecord) -> dict[str, str]:
    """Both halves of a badge."""
    if sentences.explain_missing_number(record):
        return {"message": "nothing evaluated"}
    cases = sentences.select_undefended(record.worst_cases)
    bounded = [case for case in cases if case.threat.eps is not None]
    doubt = "not to be used: " if record.misfed else "at most " if record.upper_bound else ""
    if not bounded:
        case = min(cases, key=lambda case: case.robust_accuracy.float.value or 0.0)
        n = case.success_rate.float.n
        distance = f"{doubt}{formatting.format_quantity(case.distance.median)}, n = {n:,}"
        label = f"median {case.threat.norm} distance"
        return {"label": shortened(visible(label), 60), "message": distance}
    case = min(bounded, key=lambda case: case.robust_accuracy.float.value or 0.0)
    rate = case.robust_accuracy.float
    label = f"robust accuracy {formatting.format_threat(case.threat)}"
    message = f"{doubt}{formatting.format_rate(rate)}, n = {rate.n:,}"
    return {"label": shortened(visible(label), 60), "message": message}


def colour(record: RunRecord) -> str:
    """What a badge says at a glance."""
    outcome = record.gates.outcome if record.gates else None
    if outcome == "failed" or record.misfed:
        return "red"
    if sentences.explain_missing_number(record) or not record.complete:
        return "lightgrey"
    if record.upper_bound or outcome == "inconclusive":
        return "orange"
    return "brightgreen" if outcome == "passed" else "blue"
