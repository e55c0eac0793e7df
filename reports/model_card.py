"""Reports as a Hugging Face model card: metadata that the hub shows, and text for readers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from textwrap import indent
from typing import Any

from robusteval.errors import UsageError
from robusteval.registry import REPORT_FORMATS
from robusteval.runs.types import visible

from .evidence import (
    Figure,
    find_hash,
    list_evidence,
    list_figures,
    list_limitations,
    name_data,
    name_model,
    spell_time,
)
from .markdown import escape_code, escape_prose
from .problems import name_runs
from .record import RunRecord

TAGS = ["image-classification", "adversarial-robustness", "robusteval"]


@REPORT_FORMATS.add("model-card")
def render_model_card(records: Sequence[RunRecord]) -> str:
    """A README.md with a `model-index` in its YAML head, of one model's runs.

    UsageError for runs of several models.
    """
    if len({str(record.provenance.model.get("sha256")) for record in records}) > 1:
        raise UsageError("a model card is for the runs of one model")
    index = [{"name": name_model(records[0]), "results": list(list_results(records))}]
    head = {"pipeline_tag": "image-classification", "tags": TAGS, "model-index": index}
    lines = ["---", *(f"{key}:\n{write_yaml(value)}" for key, value in head.items()), "---", ""]
    for record, name in zip(records, name_runs(records), strict=True):
        lines += list_lines(record, f", {name}" if len(records) > 1 else "")
    return "\n".join(lines)


def write_yaml(value: Any) -> str:
    """A value as YAML reads it too: JSON is part of it, but for halves of characters."""
    return indent(json.dumps(value, ensure_ascii=False, indent=1), "  ")


def list_results(records: Sequence[RunRecord]) -> Iterator[dict[str, Any]]:
    """What the hub shows: a result for each threat and defense of each run."""
    for record in records:
        data = {"name": name_data(record), "type": "image"}
        known = find_hash(record.provenance.data)
        if known:
            data["revision"] = known
        yield from (
            {
                "task": {"type": "image-classification", "name": "Image classification"},
                "dataset": data,
                "metrics": [build_metric(figure)],
            }
            for figure in list_figures(record)
        )


def build_metric(figure: Figure) -> dict[str, Any]:
    """A share, with its interval and number of images in the arguments."""
    rate = figure.rate
    return {
        "type": "accuracy" if "accuracy" in figure.metric else "recall",
        "name": visible(figure.title),
        "value": rate.value,
        "args": {"low": rate.low, "high": rate.high, "confidence": 0.95, "images": rate.n},
    }


def list_lines(record: RunRecord, run: str) -> Iterator[str]:
    """The text of the card for one run, whose name follows the model's."""
    yield f"# Robustness of {escape_prose(name_model(record) + run)}"
    yield from ("", f"**{escape_prose(record.verdict)}**", "")
    figures = list_figures(record)
    if figures:
        yield from ("| measured | share (95 % interval) | images |", "| :-- | --: | --: |")
    for each in figures:
        yield f"| {escape_prose(each.title)} | {each.text} | {each.rate.n:,} |"
    yield from ("", "## What has to be known beside it", "")
    yield from (f"- {escape_prose(text)}" for text in list_limitations(record))
    evidence = list_evidence(record)
    if evidence:
        yield from ("", "## What it may be evidence for", "")
        yield from (
            "A measurement is evidence that a requirement is looked at, not that it is met.",
            "",
            "| document | place | what is asked | figures in the JSON report |",
            "| :-- | :-- | :-- | :-- |",
        )
    for item in evidence:
        place = item.reference
        found = ", ".join(escape_code(figure.pointer) for figure in item.figures)
        yield (
            f"| {escape_prose(place.document)} | {escape_prose(place.place)}"
            f" | {escape_prose(place.wants)} | {found} |"
        )
    yield from ("", "## Where it comes from", "")
    yield f"Measured {spell_time(record)} on {escape_prose(name_data(record))}."
    if record.provenance.command:
        yield from ("", escape_code(record.provenance.command))
    yield ""
