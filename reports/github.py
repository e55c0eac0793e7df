"""What GitHub shows of a check: annotations, and the summary of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from robusteval.runs.types import visible

from .markdown import list_lines, shorten_document
from .problems import LONGEST, Problem, clip_path, list_run_problems, shorten
from .record import RunRecord

MOST_ANNOTATIONS = 10  # GitHub shows no more of one kind in one step
SUMMARY_LIMIT = 2**20  # bytes; GitHub drops a step summary that is longer
SMALLEST = 200  # bytes; in less there is no room for a note


def list_annotations(record: RunRecord) -> list[str]:
    """Workflow commands for GitHub, a line each: the ten worst problems of a run."""
    return list(map(write_annotation, list_run_problems(record)[:MOST_ANNOTATIONS]))


def write_annotation(problem: Problem) -> str:
    """A problem as a workflow command."""
    facts = {
        "file": clip_path(problem.file),
        "line": str(problem.line),
        "title": f"robusteval: {problem.title}",
    }
    properties = ",".join(f"{key}={escape_property(value)}" for key, value in facts.items())
    level = "notice" if problem.level == "note" else problem.level
    return f"::{level} {properties}::{escape_data(problem.message)}"


def escape_data(text: str) -> str:
    """Text behind a workflow command."""
    shown = shorten(visible(text), LONGEST)
    return shown.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def escape_property(text: str) -> str:
    """Text between the commas of a workflow command."""
    return escape_data(text).replace(":", "%3A").replace(",", "%2C")


def write_step_summary(records: Sequence[RunRecord], limit: int = SUMMARY_LIMIT) -> str:
    """The reports as Markdown of at most `limit` bytes, cut between lines with a note."""
    lines = [line for record in records for line in (*list_lines(record), "")]
    return "\n".join(shorten_document(lines, limit)) + "\n"


def write_github(records: Sequence[RunRecord], environ: Mapping[str, str]) -> list[str]:
    """Inside a GitHub workflow, append to the step summary and return annotations to print.

    Elsewhere nothing is written and nothing returned. At most ten annotations, worst first.
    """
    if environ.get("GITHUB_ACTIONS") != "true":
        return []
    found = [problem for record in records for problem in list_run_problems(record)]
    found.sort(key=lambda problem: problem.level != "error")
    made = list(map(write_annotation, found[:MOST_ANNOTATIONS]))
    if environ.get("GITHUB_STEP_SUMMARY"):
        path = Path(environ["GITHUB_STEP_SUMMARY"])
        try:
            room = SUMMARY_LIMIT - (path.stat().st_size if path.exists() else 0)
            if room >= SMALLEST:
                with path.open("a", encoding="utf-8", newline="\n") as file:
                    file.write(write_step_summary(records, room))
        except OSError as error:
            # a summary is no reason to change the verdict of a check
            reason = f"the step summary could not be written: {error.strerror or error}"
            made.append(f"::warning title=robusteval::{escape_data(reason)}")
    return made
