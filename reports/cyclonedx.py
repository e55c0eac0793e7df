"""Reports as CycloneDX 1.6, a machine-learning bill of materials (ECMA-424)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from robusteval import __version__
from robusteval.registry import REPORT_FORMATS
from robusteval.runs.types import spell_json, visible

from .evidence import (
    Figure,
    find_hash,
    list_evidence,
    list_figures,
    list_limitations,
    name_data,
    name_document,
    name_model,
    name_record,
    spell_time,
    write_share,
)
from .record import RunRecord


@REPORT_FORMATS.add("cyclonedx")
def render_cyclonedx(records: Sequence[RunRecord]) -> str:
    """CycloneDX 1.6 as JSON: a model and its data for each run, with a model card.

    Every share stands in `quantitativeAnalysis` with its 95 % interval. What it may be evidence
    for is a property of the model card that points into the JSON report; findings of the trust
    checks are technical limitations. A run whose numbers are not to be used has no metric.
    """
    names = [name_record(record) for record in records]
    whole = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": name_document(names),
        "version": 1,
        "metadata": {
            "timestamp": max(map(spell_time, records)),
            "tools": {
                "components": [
                    {"type": "application", "name": "robusteval", "version": __version__}
                ]
            },
        },
        "components": [
            component
            for record, name in zip(records, map(str, names), strict=True)
            for component in (build_model(record, name), build_data(record, name))
        ],
    }
    return spell_json(json.dumps(whole, indent=1)) + "\n"


def build_model(record: RunRecord, name: str) -> dict[str, Any]:
    """The model of a run as a component, with its model card."""
    facts = record.provenance.model
    parameters: dict[str, Any] = {
        "task": "image classification",
        "datasets": [{"ref": f"data-{name}"}],
    }
    if facts.get("arch"):
        parameters["modelArchitecture"] = visible(str(facts["arch"]))
    properties = [("robusteval:verdict", record.verdict)]
    properties += [(each.title, each.text) for each in list_evidence(record)]
    return {
        "type": "machine-learning-model",
        "bom-ref": f"model-{name}",
        "name": name_model(record),
        **build_hashes(find_hash(facts) if facts.get("file") else ""),
        "modelCard": {
            "modelParameters": parameters,
            "quantitativeAnalysis": {
                "performanceMetrics": [build_metric(each) for each in list_figures(record)]
            },
            "considerations": {
                "technicalLimitations": [visible(text) for text in list_limitations(record)]
            },
            "properties": [
                {"name": visible(key), "value": visible(text)} for key, text in properties
            ],
        },
    }


def build_metric(figure: Figure) -> dict[str, Any]:
    """A share with its interval, and the number of images."""
    rate = figure.rate
    about = f"{figure.about}, " if figure.about else ""
    return {
        "type": figure.metric,
        "value": write_share(rate.value),
        "slice": visible(f"{about}{rate.n:,} images"),
        "confidenceInterval": {
            "lowerBound": write_share(rate.low),
            "upperBound": write_share(rate.high),
        },
    }


def build_data(record: RunRecord, name: str) -> dict[str, Any]:
    """The images of a run as a component; the hash is of their content in the order drawn."""
    known = find_hash(record.provenance.data)
    return {
        "type": "data",
        "bom-ref": f"data-{name}",
        "name": name_data(record),
        "data": [
            {
                "type": "dataset",
                "name": name_data(record),
                **(
                    {"contents": {"properties": [{"name": "robusteval:sha256", "value": known}]}}
                    if known
                    else {}
                ),
            }
        ],
    }


def build_hashes(known: str) -> dict[str, Any]:
    """The hash of a component's file; nothing if it is not known."""
    return {"hashes": [{"alg": "SHA-256", "content": known}]} if known else {}
