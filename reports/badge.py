"""A report as the JSON of a badge."""

from __future__ import annotations

import json
from collections.abc import Sequence

from robusteval.errors import UsageError
from robusteval.registry import REPORT_FORMATS
from robusteval.runs.types import visible

from . import corruptions, formatting, sentences
from .problems import is_all_fooled, shorten
from .record import RunRecord


@REPORT_FORMATS.add("badge")
def render_badge(records: Sequence[RunRecord]) -> str:
    """The badge of one run as a line of JSON.

    UsageError for several runs.
    """
    if len(records) != 1:
        raise UsageError("a badge is for one run")
    return build_badge(records[0]) + "\n"


def build_badge(record: RunRecord) -> str:
    """The JSON of a shields.io endpoint badge: the weakest robust accuracy, with its interval.

    Green only for passed gates on a complete run without a grave finding, red also where attackers
    within a radius fool all images.
    """
    shown = {"schemaVersion": 1, "label": "robust accuracy", **write_label_and_message(record)}
    return json.dumps({**shown, "color": choose_colour(record)})


def write_label_and_message(record: RunRecord) -> dict[str, str]:
    """Both halves of a badge."""
    if sentences.explain_missing_number(record):
        return {"message": "nothing evaluated"}
    cases = sentences.list_attacked_cases(record)
    if not cases:
        found = corruptions.write_corruption_numbers(record.corruptions[0])
        doubt = "not to be used: " if record.misfed else ""
        return {"label": "accuracy", "message": shorten(visible(doubt + found), 80)}
    bounded = [case for case in cases if case.threat.eps is not None]
    doubt = "not to be used: " if record.misfed else "at most " if record.upper_bound else ""
    if not bounded:
        case = min(cases, key=lambda case: case.robust_accuracy.float.value or 0.0)
        n = case.success_rate.float.n
        distance = f"{doubt}{formatting.format_quantity(case.distance.median)}, n = {n:,}"
        label = f"median {case.threat.norm} distance"
        return {"label": shorten(visible(label), 60), "message": distance}
    case = min(bounded, key=lambda case: case.robust_accuracy.float.value or 0.0)
    rate = case.robust_accuracy.float
    label = f"robust accuracy {formatting.format_threat(case.threat)}"
    fooled = ", all fooled" if is_all_fooled(case) else ""
    message = f"{doubt}{formatting.format_rate(rate)}, n = {rate.n:,}{fooled}"
    return {"label": shorten(visible(label), 60), "message": message}


def choose_colour(record: RunRecord) -> str:
    """What a badge says at a glance."""
    outcome = record.gates.outcome if record.gates else None
    if outcome == "failed" or record.misfed:
        return "red"
    if any(map(is_all_fooled, sentences.list_attacked_cases(record))) and record.complete:
        return "red"
    if sentences.explain_missing_number(record) or not record.complete:
        return "lightgrey"
    if record.upper_bound or outcome == "inconclusive":
        return "orange"
    return "brightgreen" if outcome == "passed" else "blue"
