"""The record keeps what its JSON Schema promises."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from importlib import resources
from typing import Any

import numpy as np
import pytest
from reportable import JPEG, LINF, PGD, as_dict, check, defended, explained, json_of

from robusteval.reports.build import build_record
from robusteval.reports.measures import to_json_types
from robusteval.reports.schema import describe_type, to_text
from robusteval.runs.types import Outcome, Run, Threat

jsonschema = pytest.importorskip(
    "jsonschema", exc_type=ImportError, reason="jsonschema checks the record"
)

MakeOutcome = Callable[..., Outcome]
MakeRun = Callable[..., Run]


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    """The schema as it is shipped."""
    source = resources.files("robusteval.reports") / "report.schema.json"
    loaded: dict[str, Any] = json.loads(source.read_text(encoding="utf-8"))
    return loaded


@pytest.fixture(scope="module")
def validator(schema: dict[str, Any]) -> Any:
    """What finds faults in a record."""
    return jsonschema.Draft202012Validator(schema)


def nodes(value: Any) -> Iterator[dict[str, Any]]:
    """Every object in a JSON value."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from nodes(item)


def test_the_schema_is_one(schema: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator.check_schema(schema)


def test_the_schema_leaves_no_key_open(schema: dict[str, Any]) -> None:
    for node in nodes(schema):
        if isinstance(node.get("properties"), dict) and node.get("type") == "object":
            assert node["required"] == list(node["properties"])
            assert node["additionalProperties"] is False


def test_every_definition_is_used(schema: dict[str, Any]) -> None:
    used = {node["$ref"].rpartition("/")[2] for node in nodes(schema) if "$ref" in node}

    assert used == set(schema["$defs"])


@pytest.mark.parametrize("name", ["", "\x1b[31m\n]]>"])
def test_a_full_record_is_valid(
    name: str, validator: Any, make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    run = defended(make_outcome, make_run, n=60, name=name, failures={name: name})

    validator.validate(json.loads(json_of(run, [check(name)])))


def test_records_of_poor_runs_are_valid(
    validator: Any, make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    outcome = make_outcome([True, False])
    runs = (
        make_run(),
        make_run(make_outcome([])),
        make_run(make_outcome([False] * 3, right=[False] * 3)),
        make_run(clean={}, status="incomplete", config={}, model={}, data={}, environment={}),
        make_run(outcome, make_outcome([True], spec=PGD, role="probe:noise")),
        make_run(make_outcome([True], threat=Threat("none", None, True))),
        make_run(make_outcome([True], pred_png=np.full(1, -2), psnr=np.array([np.inf]))),
        make_run(outcome, folder=None),
        explained(make_outcome, make_run, n=3),
    )

    for run in runs:
        validator.validate(json.loads(json_of(run)))


@pytest.mark.parametrize("name", ["", "\x1b[31m\n]]>"])
def test_a_record_with_maps_is_valid(
    name: str, validator: Any, make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    record = as_dict(explained(make_outcome, make_run, name=name))

    validator.validate(record)
    assert record["interpreters"]["pairs"]
    assert record["interpreters"]["transfer"]


def test_several_runs_are_valid_together(
    validator: Any, make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    runs = [make_run(make_outcome([True])), defended(make_outcome, make_run, n=40)]

    whole = json.loads(json_of(runs, [None, check()]))

    validator.validate(whole)
    models = whole.pop("models")
    assert len(models["models"]) == 2
    assert whole == {
        "schema": 1,
        "transfer": None,
        "runs": [as_dict(runs[0]), as_dict(runs[1], check())],
    }
    assert json.loads(json_of(runs[:1])) == as_dict(runs[0])


def spoiled(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The record with one thing wrong, in many ways."""
    for key in record:
        yield {other: value for other, value in record.items() if other != key}
    yield {**record, "more": 1}
    yield {**record, "schema": 2}
    paths: list[tuple[Any, ...]] = [
        ("attacks", 0),
        ("worst_cases", 0, "cost"),
        ("defenses", 0, "clean_cost"),
        ("defenses", 2, "detector", "attacks", 0),
        ("curves", 0, "tested", 0),
        ("gates", "gates", 1, "flipped", 0),
        ("findings", 0),
        ("provenance",),
        ("clean_accuracy",),
    ]
    for path in paths:
        added, text = copy.deepcopy(record), copy.deepcopy(record)
        for broken in (added, text):
            node: Any = broken
            for step in path:
                node = node[step]
            if broken is added:
                node["more"] = None
            else:
                node[next(iter(node))] = {}
            yield broken


def test_what_is_not_promised_is_refused(
    validator: Any, make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    record = as_dict(defended(make_outcome, make_run, n=60), check())
    validator.validate(record)

    for broken in spoiled(record):
        assert not validator.is_valid(broken)


def test_the_fixture_has_what_the_schema_is_about(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    record = as_dict(defended(make_outcome, make_run), check())

    assert [defense["kind"] for defense in record["defenses"]] == ["model", "model", "detector"]
    assert [d["threat"]["norm"] for d in record["defenses"][0]["defeated"]] == [LINF.norm]
    assert record["worst_cases"][3]["defense"] == str(JPEG)


def test_the_shipped_schema_is_that_of_the_records() -> None:
    source = resources.files("robusteval.reports") / "report.schema.json"

    # python -m robusteval.reports.schema >reports/report.schema.json
    assert source.read_text(encoding="utf-8") == to_text()


def test_the_json_is_that_of_the_typed_record(make_outcome: MakeOutcome, make_run: MakeRun) -> None:
    run = defended(make_outcome, make_run, n=60)

    assert to_json_types(build_record(run)) == as_dict(run)


@pytest.mark.parametrize("kind", [complex, list[int], tuple[int, str]])
def test_a_type_that_json_does_not_know_has_no_schema(kind: Any) -> None:
    with pytest.raises(TypeError):
        describe_type(kind, {})
