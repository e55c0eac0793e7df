"""Reports as SARIF, which code scanning shows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256
from typing import Any
from urllib.parse import quote

from robusteval import __version__
from robusteval.registry import REPORT_FORMATS
from robusteval.runs.types import spell_json, visible

from . import formatting
from .problems import LONGEST, Problem, clip_path, list_run_problems, name_runs, shorten
from .record import RunRecord

SARIF_SCHEMA = (
    "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
)
MOST_RESULTS = 5000  # GitHub shows no more of one file

RULES = {
    "gate-floor": "Robust accuracy is certain to be above a floor.",
    "gate-max_drop": "Robust accuracy has not dropped against the baseline.",
    "gate-max_clean_cost": "A defense costs little accuracy on clean images.",
    "gate-min_tpr": "A detector finds most of the attacked images.",
    "gate-findings": "The trust checks find nothing that is not allowed.",
    "corruptions": "What is left of accuracy under corruptions.",
    "nothing-robust": "Some images withstand every attack that was tried.",
    "no-result": "Every attack that was asked for has a result.",
}


@REPORT_FORMATS.add("sarif", suffix=".sarif")
def render_sarif(records: Sequence[RunRecord]) -> str:
    """SARIF 2.1.0: a result for each gate that is not passed, each threat that no image withstands,
    each grave finding and each absence; where nobody attacked, what corruptions leave, as a note.

    Gates point at their line in the file that names them, the others at its first line, or at
    ``run.json``. Worst first, at most 5,000; all runs are one run of the tool, because GitHub
    takes one of each tool from a file.
    """
    several = len(records) > 1
    found = [
        (problem, name if several else "")
        for record, name in zip(records, name_runs(records), strict=True)
        for problem in list_run_problems(record)
    ]
    found.sort(key=lambda item: item[0].level != "error")
    kept, left = found[:MOST_RESULTS], found[MOST_RESULTS:]
    ids = sorted({name_rule(problem) for problem, _ in kept})
    invocation: dict[str, Any] = {"executionSuccessful": all(record.complete for record in records)}
    if left:
        note = f"{formatting.format_count(len(left), 'more result')} left out."
        invocation["toolExecutionNotifications"] = [{"message": {"text": note}}]
    driver = {
        "name": "robusteval",
        "version": __version__,
        "rules": [build_rule(id_) for id_ in ids],
    }
    run = {
        "tool": {"driver": driver},
        "invocations": [invocation],
        "columnKind": "utf16CodeUnits",
        "results": [build_result(problem, name, ids) for problem, name in kept],
    }
    whole = {"$schema": SARIF_SCHEMA, "version": "2.1.0", "runs": [run]}
    return spell_json(json.dumps(whole, indent=1)) + "\n"


def name_rule(problem: Problem) -> str:
    """The name of a rule as code scanning takes it."""
    return shorten(visible(problem.rule), 200)


def build_rule(id_: str) -> dict[str, Any]:
    """What a kind of result is about."""
    about = RULES.get(id_, "A trust check found a reason to doubt the numbers.")
    return {
        "id": id_,
        "shortDescription": {"text": about},
        "fullDescription": {"text": about},
        "help": {"text": f"{about} The report of the run says more."},
        "defaultConfiguration": {
            "level": "note"
            if id_ == "corruptions"
            else "warning"
            if id_.startswith(("finding-", "nothing-"))
            else "error"
        },
    }


def build_result(problem: Problem, name: str, ids: Sequence[str]) -> dict[str, Any]:
    """A result; an inconclusive gate too is of the kind `fail`, others would not be shown."""
    text = f"{name}: {problem.message}" if name else problem.message
    identity = "\n".join((name, problem.rule, problem.title))
    digest = sha256(identity.encode("utf-8", "backslashreplace")).hexdigest()[:16]
    region = {"startLine": problem.line}
    artifact = {"uri": quote(visible(clip_path(problem.file)), safe="/")}
    return {
        "ruleId": name_rule(problem),
        "ruleIndex": ids.index(name_rule(problem)),
        "level": problem.level,
        "message": {"text": shorten(visible(text), LONGEST)},
        "locations": [{"physicalLocation": {"artifactLocation": artifact, "region": region}}],
        # so that the same problem is not reported anew when lines move
        "partialFingerprints": {"primaryLocationLineHash": f"{digest}:1"},
    }
