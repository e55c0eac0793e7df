"""The record of a long run is not written after every cell, and nothing is lost by that."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from toys import Bands

from robusteval.datasets.arrays import from_arrays
from robusteval.errors import Interrupted
from robusteval.evaluation import recording
from robusteval.evaluation.evaluate import execute
from robusteval.evaluation.plan import Plan, prepare_plan
from robusteval.models.classifier import Classifier
from robusteval.runs.folder import Store, load_run

ATTACKS = [f"noise:tries={n}" for n in (1, 2, 3)]


@pytest.fixture
def plan(trained_bands: Bands) -> Plan:
    model = Classifier(
        trained_bands, mean=(0.5,), std=(0.25,), num_classes=3, identity={"sha256": "b"}
    )
    x = np.random.default_rng(0).random((6, 3, 12, 12), np.float32)
    data = from_arrays(x, model(torch.from_numpy(x)).argmax(1))
    return prepare_plan(model, data, ATTACKS, probes=False)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many cells each record has that is written from now on, all of which take long."""
    counts: list[int] = []
    save = Store.save_record

    def count(store: Store, record: dict[str, object], keys: list[str]) -> None:
        save(store, record, keys)
        counts.append(len(json.loads((store.folder / "run.json").read_text())["cells"]))

    monkeypatch.setattr(Store, "save_record", count)
    monkeypatch.setattr(recording, "LONG", -1.0)
    monkeypatch.setattr(recording, "RESTING", 1e9)
    return counts


def test_a_record_that_takes_long_is_written_in_the_end(
    plan: Plan, written: list[int], tmp_path: Path
) -> None:
    execute(plan, tmp_path / "run")

    assert written == [0, 4]
    assert load_run(tmp_path / "run").finished


def test_a_stop_before_the_record_is_written_loses_nothing(
    plan: Plan, written: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the record does not name is taken from the parts."""
    expected = execute(plan, tmp_path / "other")
    calls: list[int] = []
    with pytest.raises(Interrupted):
        execute(plan, tmp_path / "run", stopping=lambda: len(calls.append(1) or calls) > 12)  # type: ignore[func-returns-value]
    assert written[-1] == 0
    found = execute(plan, tmp_path / "run")

    for one, other in zip(found.outcomes, expected.outcomes, strict=True):
        np.testing.assert_array_equal(one.columns["margin_adv"], other.columns["margin_adv"])
