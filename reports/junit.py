"""Reports as JUnit XML."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from xml.etree import ElementTree as ET

from robusteval.registry import REPORT_FORMATS
from robusteval.runs.types import visible

from . import formatting, gate_words, group_tables, sentences
from .measures import CORRUPTION
from .problems import describe_attack, list_gates, name_runs
from .record import AttackRow, GateRow, RunRecord


@REPORT_FORMATS.add("junit", suffix=".xml")
def render_junit(records: Sequence[RunRecord]) -> str:
    """JUnit XML: a suite for each run, a case for each gate and each attack.

    An inconclusive gate is a failure of the type "inconclusive"; an attack fails on nothing, but
    is an error if it has no result. Class name and name together are unique in the file: of cases
    that share both, GitLab shows the first alone.
    """
    root = ET.Element("testsuites", name="robusteval")
    for record, name in zip(records, name_runs(records), strict=True):
        root.append(build_suite(record, visible(name)))
    number_equal_cases(root)
    for count in ("tests", "failures", "errors"):
        root.set(count, str(sum(int(each.get(count, 0)) for each in root)))
    root.set("time", write_seconds(sum(float(each.get("time", 0)) for each in root)))
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def build_suite(record: RunRecord, name: str) -> ET.Element:
    """One run; its name is in the class names, because GitLab merges the suites of a job."""
    group = f"robusteval.{name.replace('.', '_')}"
    gates = list_gates(record)
    shared = Counter(gate.name for gate in gates)
    made = [build_gate_case(gate, f"{group}.gates", shared[gate.name] > 1) for gate in gates]
    made += [build_attack_case(row, f"{group}.attacks") for row in record.attacks]
    absent = {**record.failures, **dict.fromkeys(record.not_run, "not finished")}
    for spec, reason in absent.items():
        made.append(build_case(spec, f"{group}.attacks"))
        add_blame(made[-1], "error", "no result", reason)
    if sentences.explain_missing_number(record):
        made.append(build_case("evaluation", group))
        add_blame(made[-1], "error", "nothing evaluated", record.verdict)
    element = ET.Element("testsuite", name=name, tests=str(len(made)))
    for count, tag in (("failures", "failure"), ("errors", "error")):
        element.set(count, str(sum(each.find(tag) is not None for each in made)))
    element.set("skipped", "0")
    element.set("time", write_seconds(record.provenance.seconds))
    if record.provenance.created:
        element.set("timestamp", visible(record.provenance.created))
    element.extend(made)
    add_output(element, "\n".join(list_plain_lines(record)))
    return element


def build_case(name: str, group: str, seconds: float | None = None) -> ET.Element:
    """A test case without a verdict, which counts as passed."""
    return ET.Element("testcase", name=visible(name), classname=group, time=write_seconds(seconds))


def number_equal_cases(root: ET.Element) -> None:
    """Give the cases that share class name and name a number behind the name, from the second."""
    cases = list(root.iter("testcase"))
    taken = {(case.get("classname"), case.get("name")) for case in cases}
    met: Counter[tuple[str | None, str | None]] = Counter()
    for case in cases:
        group, name = case.get("classname"), case.get("name")
        met[group, name] += 1
        if met[group, name] == 1:
            continue
        while (group, f"{name} ({met[group, name]})") in taken:
            met[group, name] += 1
        case.set("name", f"{name} ({met[group, name]})")
        taken.add((group, case.get("name")))


def write_seconds(seconds: float | None) -> str:
    """Seconds to the millisecond, never in scientific notation."""
    return f"{seconds or 0.0:.3f}"


def build_gate_case(gate: GateRow, group: str, shared: bool) -> ET.Element:
    """A gate: passed, or failed; called by what it looks at too where its name is `shared`."""
    element = build_case(gate_words.name_gate(gate) if shared else gate.name, group)
    if gate.outcome != "passed":
        add_blame(element, "failure", gate.outcome, gate.reason)
    add_output(element, visible(gate_words.write_gate(gate)))
    return element


def build_attack_case(row: AttackRow, group: str) -> ET.Element:
    """An attack: an error if it had no image to work on."""
    element = build_case(describe_attack(row), group, row.cost.seconds)
    if row.success_rate.float.n == 0:
        add_blame(element, "error", "nothing evaluated", "No image was left to attack.")
    add_output(element, visible(write_attack_numbers(row)))
    return element


def add_blame(element: ET.Element, tag: str, kind: str, message: str) -> None:
    """Say what is wrong with a case, both ways in which it is read."""
    shown = visible(message)
    ET.SubElement(element, tag, type=kind, message=shown).text = shown


def add_output(element: ET.Element, text: str) -> None:
    """Text beside a case or a suite."""
    ET.SubElement(element, "system-out").text = text


def list_plain_lines(record: RunRecord) -> Iterator[str]:
    """A report in lines of plain text."""
    yield visible(record.verdict)
    yield from map(visible, sentences.write_meaning(record))
    yield from (visible(f"gate {gate_words.write_gate(gate)}") for gate in list_gates(record))
    yield from (visible(sentences.write_finding(finding)) for finding in record.findings)
    for row in record.attacks:
        yield visible(f"{describe_attack(row)}: {write_attack_numbers(row)}")
    for table in group_tables.build_group_tables(record):
        yield from map(visible, table.lines)
    yield from map(visible, sentences.write_absences(record))


def write_attack_numbers(row: AttackRow) -> str:
    """The numbers of a cell in words."""
    robust, fooled = row.robust_accuracy, row.success_rate.float
    threat = formatting.format_threat(row.threat)
    robustness = "accuracy" if row.threat.norm == CORRUPTION else "robust accuracy"
    return (
        f"{robustness} {formatting.format_rate(robust.float)} under {threat},"
        f" {formatting.format_percent(robust.eight_bit)} after rounding to 8 bit;"
        f" fooled on {fooled.k:,} of {fooled.n:,} images,"
        f" median distance {formatting.format_quantity(row.distance.median)};"
        f" {formatting.format_passes(row.cost)} forward / backward passes per attacked image"
    )
