"""What is wrong with a run, for machines that run tests, and how its parts are called there.

What is not known to be good is never shown as good: an inconclusive gate is a failure, a run
without a result an error.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from . import formatting, gate_words, sentences
from .corruptions import write_corruption_numbers
from .measures import CORRUPTION
from .record import AttackRow, GateRow, RunRecord, WorstCaseRow

LEVELS = {"failed": "error", "inconclusive": "warning"}  # of outcomes of a gate worth a result
LONGEST = 4000  # characters of one message


class Problem(NamedTuple):
    """Something to show beside the line of a file."""

    rule: str  # "gate-floor", "finding-zero-gradient", "no-result"
    level: str  # "error", "warning" or "note"
    title: str
    message: str
    file: str
    line: int


def list_run_problems(record: RunRecord) -> list[Problem]:
    """What is wrong with a run, worst first: gates, then what has no result, then findings."""
    file = find_config(record) or find_run_file(record)
    found = [
        Problem(
            f"gate-{gate.kind}",
            LEVELS[gate.outcome],
            f"{gate.name}: {gate.outcome}",
            gate_words.write_gate(gate),
            file,
            max(gate.line or 1, 1),
        )
        for gate in list_gates(record)
        if gate.outcome in LEVELS
    ]
    if sentences.explain_missing_number(record) or not record.complete:
        said = record.verdict + "".join(
            f" {absence}." for absence in sentences.write_absences(record)
        )
        found.append(Problem("no-result", "error", "no result", said, file, 1))
    found += [
        Problem(
            "nothing-robust",
            "warning",
            f"nothing robust: {formatting.format_place(case.threat, case.defense)}",
            write_defeat(case),
            file,
            1,
        )
        for case in record.worst_cases
        if is_all_fooled(case) and record.complete and not record.misfed
    ]
    if (
        record.complete
        and not record.misfed
        and all(case.threat.norm == CORRUPTION for case in record.worst_cases)
    ):
        found += [
            Problem(
                "corruptions",
                "note",
                f"corruptions behind {means.defense}" if means.defense else "corruptions",
                f"Accuracy {write_corruption_numbers(means)}; clean"
                f" {formatting.format_percent(record.clean_accuracy)}.",
                file,
                1,
            )
            for means in record.corruptions
        ]
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


def is_all_fooled(case: WorstCaseRow) -> bool:
    """Whether attackers within a radius fool every image that was right."""
    within = case.threat.eps is not None and case.threat.norm != CORRUPTION
    return within and case.success_rate.float.n > 0 and case.robust_accuracy.float.k == 0


def write_defeat(case: WorstCaseRow) -> str:
    """That no image withstands, with what the sample can tell of others."""
    robust, fooled = case.robust_accuracy.float, case.success_rate.float
    return (
        f"No image withstands {formatting.format_place(case.threat, case.defense)}: robust accuracy"
        f" {formatting.format_rate(robust)} of {formatting.format_count(robust.n, 'image')}, fooled"
        f" on all {fooled.n:,} it had right."
    )


def list_gates(record: RunRecord) -> list[GateRow]:
    """The gates that were tested, if any."""
    return list(record.gates.gates) if record.gates else []


def find_config(record: RunRecord) -> str:
    """The file that names the gates; empty if there is none."""
    return str(record.gates.config or "") if record.gates else ""


def find_run_file(record: RunRecord) -> str:
    """The file that the run is stored in."""
    folder = record.provenance.folder
    return f"{folder}/run.json" if folder else "run.json"


def clip_path(path: str) -> str:
    """A path below the folder of the project; of any other only the name of the file."""
    parts = [part for part in path.replace("\\", "/").split("/") if part != "."]
    outside = ".." in parts or parts[0] == "" or re.fullmatch("[A-Za-z]:", parts[0])
    return parts[-1] if outside else "/".join(part for part in parts if part)


def name_runs(records: Sequence[RunRecord]) -> list[str]:
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


def describe_attack(row: AttackRow) -> str:
    """A cell in words: the attack and what it was up against."""
    if row.defense is None:
        return str(row.spec)
    knows = "adaptive" if row.adaptive else "oblivious"
    return f"{row.spec} behind {row.defense}, {knows}"


def shorten(text: str, most: int) -> str:
    """The text, or its beginning."""
    return text if len(text) <= most else f"{text[: most - 1]}…"
