"""SBOMs and model cards: official schemas and readers take them, and no more is said than is so."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import reportable
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from spdx_python_model import v3_0_1 as spdx_model

from robusteval.errors import UsageError
from robusteval.reports.build import build_record
from robusteval.reports.cyclonedx import render_cyclonedx
from robusteval.reports.evidence import list_evidence, list_figures
from robusteval.reports.model_card import render_model_card
from robusteval.reports.record import RunRecord
from robusteval.reports.spdx import CONTEXT, render_spdx
from robusteval.runs.types import Finding, Outcome, Run, Spec, Threat

MakeOutcome = Callable[..., Outcome]
MakeRun = Callable[..., Run]
SHA = "ab" * 32
ALL = np.ones(40, bool)


@pytest.fixture(params=["attacked", "corrupted", "both"])
def run(make_outcome: MakeOutcome, make_run: MakeRun, request: pytest.FixtureRequest) -> Run:
    """A run with defenses, a detector among them; of corruptions alone; with both."""
    kinds = (("fog", 1, 3), ("fog", 2, 9), ("snow", 1, 0), ("snow", 2, 40))
    corruptions = tuple(reportable.corrupted(make_outcome, *each, n=40) for each in kinds)
    made = reportable.defended(make_outcome, make_run, n=40)
    if request.param == "corrupted":
        made = make_run(*corruptions)
    elif request.param == "both":
        made = replace(made, outcomes=(*made.outcomes, *corruptions))
    return replace(made, model={**made.model, "file": "net.pth", "sha256": SHA})


@pytest.fixture
def record(run: Run) -> RunRecord:
    """Its record."""
    return build_record(run)


def spoil(run: Run) -> RunRecord:
    """The record of the run, had its model not been fed as it was trained."""
    return build_record(replace(run, findings=(Finding("guessing", True, "It guesses."),)))


def resolve(whole: Any, pointer: str) -> Any:
    """What stands at a pointer (RFC 6901)."""
    for part in pointer.split("/")[1:]:
        whole = whole[int(part)] if isinstance(whole, list) else whole[part]
    return whole


def read_spdx(text: str) -> spdx_model.SHACLObjectSet:
    """The objects of an SPDX document, each checked against the model."""
    objects = spdx_model.SHACLObjectSet()
    spdx_model.JSONLDDeserializer().deserialize_data(json.loads(text), objects)
    return objects


def read_results(card: ModelCard) -> list[EvalResult]:
    """What the hub shows of a model card."""
    assert isinstance(card.data, ModelCardData)
    return card.data.eval_results or []


def test_each_figure_stands_in_the_report_where_it_points(run: Run, record: RunRecord) -> None:
    """In JSON, with the same counts and interval."""
    whole = json.loads(reportable.json_of(run))

    figures = list_figures(record)

    wanted = {"accuracy on images as they are"}
    if record.defenses:
        wanted |= {"robust accuracy", "true positive rate of the detector"}
    if record.corruptions:
        wanted |= {"mean accuracy under corruptions"}
    assert {figure.metric for figure in figures} >= wanted
    for figure in figures:
        found = resolve(whole, figure.pointer)
        assert (found["value"], found["n"]) == (figure.rate.value, figure.rate.n)
        assert (found["low"], found["high"]) == (figure.rate.low, figure.rate.high)


def test_cyclonedx_is_valid_by_its_schema_and_has_all_figures(record: RunRecord) -> None:
    """With intervals, in the model card of the component whose hash is the file's."""
    text = render_cyclonedx([record, record])

    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(render_cyclonedx([record])) is None
    model = json.loads(text)["components"][0]
    assert model["hashes"] == [{"alg": "SHA-256", "content": SHA}]
    metrics = model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    assert len(metrics) == len(list_figures(record))
    assert all(float(m["value"]) <= float(m["confidenceInterval"]["upperBound"]) for m in metrics)


def test_spdx_is_read_by_its_model_and_claims_no_compliance(record: RunRecord) -> None:
    """Figures are metrics; what they may be evidence for is said in annotations."""
    text = render_spdx([record])

    objects = read_spdx(text)
    package: Any = next(iter(objects.foreach_type("ai_AIPackage")))
    assert json.loads(text)["@context"] == CONTEXT
    assert len(package.ai_metric) == len(list_figures(record))
    assert not list(package.ai_standardCompliance)
    assert package.verifiedUsing[0].hashValue == SHA
    assert len(list(objects.foreach_type("Annotation"))) == len(list_evidence(record))
    assert not list(objects.missing_ids)


def test_the_reader_of_spdx_would_have_noticed(record: RunRecord) -> None:
    """A purpose that is none."""
    wrong = render_spdx([record]).replace(
        '"software_primaryPurpose": "model"', '"software_primaryPurpose": "mod"'
    )
    with pytest.raises(ValueError, match="mod"):
        read_spdx(wrong)


def test_the_hub_reads_the_results_of_a_model_card(record: RunRecord) -> None:
    """Each with its interval."""
    card = ModelCard(render_model_card([record]))

    results = read_results(card)
    assert len(results) == len(list_figures(record))
    for result, figure in zip(results, list_figures(record), strict=True):
        assert result.metric_value == figure.rate.value
        assert (result.metric_args or {})["low"] == figure.rate.low
    assert ("Article 15(5)" in card.text) == bool(record.defenses)
    assert ("Article 15(4)" in card.text) == bool(record.corruptions)


def test_numbers_that_are_not_to_be_used_are_not_handed_on(run: Run) -> None:
    """In any form; why stands among the limitations."""
    record = spoil(run)

    assert not list_figures(record)
    assert not list_evidence(record)
    model = json.loads(render_cyclonedx([record]))["components"][0]["modelCard"]
    assert model["quantitativeAnalysis"]["performanceMetrics"] == []
    assert "Not to be used" in " ".join(model["considerations"]["technicalLimitations"])
    assert "ai_metric" not in render_spdx([record])
    assert not read_results(ModelCard(render_model_card([record])))


def test_attacks_are_evidence_for_what_they_saw_alone(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    """White-box attacks say nothing of black-box optimization."""
    places = {
        knowledge: {
            each.reference.place
            for each in list_evidence(
                build_record(make_run(make_outcome(ALL, knowledge=knowledge)))
            )
        }
        for knowledge in ("white-box", "black-box", "none")
    }

    assert places["white-box"] - places["none"] == {"AML.T0043.000"}
    assert places["black-box"] - places["none"] == {"AML.T0043.001"}


def test_a_figure_is_evidence_for_its_own_attacks_alone(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    """A turn by a black box makes nothing black-box of the gradients beside it."""
    turned = make_outcome(
        ALL, spec=Spec("spatial", {}), threat=Threat("spatial", 30.0, False), knowledge="black-box"
    )
    record = build_record(make_run(make_outcome(ALL), turned))
    found = {each.reference.place: each.figures for each in list_evidence(record)}

    assert all("rotation" in each.about for each in found["AML.T0043.001"])
    assert all("linf" in each.about for each in found["AML.T0043.000"])


def test_the_same_run_gives_the_same_documents(run: Run) -> None:
    """Names and times are the run's; runs of two models make no one card."""
    other = build_record(replace(run, model={**run.model, "sha256": "cd" * 32}))

    for render in (render_cyclonedx, render_spdx, render_model_card):
        assert render([build_record(run)]) == render([build_record(run)])
    with pytest.raises(UsageError, match="one model"):
        render_model_card([build_record(run), other])
    assert "ai_AIPackage" in render_spdx([build_record(run), other])
