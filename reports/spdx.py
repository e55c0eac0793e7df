"""Reports as SPDX 3.0.1 with the classes of its AI profile (ISO/IEC 5962's successor)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
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

CONTEXT = "https://spdx.org/rdf/3.0.1/spdx-context.jsonld"
CREATION = "_:creation"  # of all elements


@REPORT_FORMATS.add("spdx")
def render_spdx(records: Sequence[RunRecord]) -> str:
    """SPDX 3.0.1 as JSON-LD: an AI package for each run, tested on a data set.

    Every share is a `metric` with its 95 % interval; what it may be evidence for is an annotation
    that points into the JSON report, and no `standardCompliance`. The document does not claim to
    conform to the AI profile, which asks for supplier, licenses and time of release: a run does
    not know them. A run whose numbers are not to be used has no metric.
    """
    names = [name_record(record) for record in records]
    base = name_document(names)
    agent = f"{base}:robusteval"
    elements: list[dict[str, Any]] = [
        build_element("SoftwareAgent", agent, f"robusteval {__version__}")
    ]
    roots = []
    for record, name in zip(records, names, strict=True):
        made = list(list_elements(record, f"urn:uuid:{name}"))
        roots.append(made[0]["spdxId"])
        elements += made
    document = {
        **build_element("SpdxDocument", base, "robustness evaluation"),
        "profileConformance": ["core", "software"],
        "rootElement": roots,
        "element": [element["spdxId"] for element in elements],
    }
    creation = {
        "type": "CreationInfo",
        "@id": CREATION,
        "specVersion": "3.0.1",
        "created": max(map(spell_time, records)),
        "createdBy": [agent],
    }
    whole = {"@context": CONTEXT, "@graph": [creation, document, *elements]}
    return spell_json(json.dumps(whole, indent=1)) + "\n"


def list_elements(record: RunRecord, base: str) -> Iterator[dict[str, Any]]:
    """The model, its data, that one was tested on the other, and what that is evidence for."""
    yield build_model(record, f"{base}:model")
    yield {
        **build_element("dataset_DatasetPackage", f"{base}:data", name_data(record)),
        "dataset_datasetType": ["image"],
        "software_primaryPurpose": "data",
    }
    yield {
        **build_element("Relationship", f"{base}:tested", ""),
        "from": f"{base}:model",
        "relationshipType": "testedOn",
        "to": [f"{base}:data"],
    }
    for i, each in enumerate(list_evidence(record)):
        yield {
            **build_element("Annotation", f"{base}:evidence-{i}", each.title),
            "annotationType": "other",
            "subject": f"{base}:model",
            "statement": visible(each.text),
        }


def build_model(record: RunRecord, id_: str) -> dict[str, Any]:
    """The model of a run as an AI package."""
    facts = record.provenance.model
    made = {
        **build_element("ai_AIPackage", id_, name_model(record)),
        "comment": visible(record.verdict),
        "software_primaryPurpose": "model",
        "ai_domain": ["image classification"],
        "ai_limitation": visible(" ".join(list_limitations(record))),
    }
    if facts.get("arch"):
        made["ai_typeOfModel"] = [visible(str(facts["arch"]))]
    if facts.get("file") and find_hash(facts):
        made["verifiedUsing"] = [
            {"type": "Hash", "algorithm": "sha256", "hashValue": find_hash(facts)}
        ]
    if figures := list_figures(record):
        made["ai_metric"] = [build_metric(figure) for figure in figures]
    return made


def build_metric(figure: Figure) -> dict[str, Any]:
    """A share with its interval, and the number of images."""
    rate = figure.rate
    low, high = write_share(rate.low), write_share(rate.high)
    return {
        "type": "DictionaryEntry",
        "key": visible(figure.title),
        "value": f"{write_share(rate.value)} (95 % interval {low} to {high}, {rate.n:,} images)",
    }


def build_element(kind: str, id_: str, name: str) -> dict[str, Any]:
    """What every element has."""
    made = {"type": kind, "spdxId": id_, "creationInfo": CREATION}
    return {**made, "name": visible(name)} if name else made
