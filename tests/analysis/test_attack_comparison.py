"""Several attacks side by side, on records of known scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from robusteval.analysis.attack_comparison import compare_explanations
from robusteval.analysis.explain import explain
from robusteval.datasets.concepts import Generated
from robusteval.datasets.sources import open_data
from robusteval.models.classifier import Classifier
from robusteval.reports.explained_attacks import render_attacks_html, render_comparison_of_attacks
from robusteval.runs.explanation_record import ExplanationComparison, ExplanationRecord


@pytest.fixture
def record(bands: Classifier, npz: Path) -> ExplanationRecord:
    few = Generated((3, 12, 12), count=12)
    return explain(bands, open_data(str(npz)), "fgsm:eps=.1", samples=4, concepts=few).record


def scored(record: ExplanationRecord, name: str, scores: Sequence[float]) -> ExplanationRecord:
    """The record of another attack, with these scores on its first map."""
    return replace(record, attack=name, focus=(replace(record.focus[0], scores=tuple(scores)),))


@pytest.fixture
def comparison(record: ExplanationRecord) -> ExplanationComparison:
    nan = math.nan
    return compare_explanations(
        [scored(record, "a", [0.1, 0.2, 0.4, nan]), scored(record, "<b>", [0.2, 0.3, nan, 0.9])]
    )


def test_boxes_are_quartiles_of_images_that_are_fooled(comparison: ExplanationComparison) -> None:
    first, second = comparison.boxes

    ends = (first.least, first.lower, first.median, first.upper, first.most)
    assert ends == tuple(np.quantile([0.1, 0.2, 0.4], (0, 0.25, 0.5, 0.75, 1)))
    assert (first.n, second.n, second.median) == (3, 3, 0.3)


def test_a_gain_is_over_the_images_that_both_fool(comparison: ExplanationComparison) -> None:
    (gain,) = comparison.gains

    assert (gain.attack, gain.difference.n) == ("<b>", 2)
    assert gain.difference.value == pytest.approx(0.1)


def test_a_page_shows_names_as_text_and_the_same_bytes(comparison: ExplanationComparison) -> None:
    page = render_attacks_html(comparison, ["1-a", "2-b"])

    assert page == render_attacks_html(comparison, ["1-a", "2-b"])
    assert "<b>" not in page
    assert "&lt;b&gt;" in page
    assert "NaN" not in render_comparison_of_attacks(comparison)
