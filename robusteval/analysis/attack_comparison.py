"""Several attacks explained on the same images, side by side (arXiv:1904.02057, Figure 5)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from robusteval.analysis.explain import SCHEMA, Explanation, explain
from robusteval.analysis.summaries import OF_CORRELATIONS, average_images
from robusteval.datasets.dataset import Data
from robusteval.errors import UsageError
from robusteval.evaluation.plan import prepare_attack
from robusteval.models.admission import wrap_module
from robusteval.models.classifier import Classifier
from robusteval.runs.explanation_record import (
    ExplanationComparison,
    ExplanationRecord,
    FocusBox,
    FocusFigures,
    FocusGain,
)
from robusteval.runs.types import Spec


class ExplainedAttacks(NamedTuple):
    """An explanation of each attack, and what sets them apart."""

    explanations: tuple[Explanation, ...]
    comparison: ExplanationComparison


def explain_attacks(
    classifier: nn.Module, data: Data, attacks: Sequence[str | Spec], **options: Any
) -> ExplainedAttacks:
    """Explain several attacks on the same images.

    Parameters
    ----------
    classifier, data
        As for `robusteval.analysis.explain.explain`.
    attacks : sequence of str or Spec
        Different ones; the first is what the others are held against.
    **options
        Those of `explain`. What a stop leaves in a `cache` is taken up attack by attack.

    Raises
    ------
    UsageError
        For a mistake in any of them, before the first is run, or one that is there twice.
    """
    if not isinstance(classifier, Classifier):
        classifier = wrap_module(classifier, data)
    named = [str(prepare_attack(each, classifier, data.shape).spec) for each in attacks]
    if len(set(named)) < len(named):
        raise UsageError(f"the same attack is asked for twice: {', '.join(named)}")
    found = tuple(explain(classifier, data, each, **options) for each in attacks)
    return ExplainedAttacks(found, compare_explanations([each.record for each in found]))


def compare_explanations(records: Sequence[ExplanationRecord]) -> ExplanationComparison:
    """Set explanations of different attacks on the same images side by side."""
    remarks = dict.fromkeys(remark for record in records for remark in record.remarks)
    return ExplanationComparison(
        schema=SCHEMA,
        attacks=tuple(records),
        boxes=tuple(box for record in records for box in build_boxes(record)),
        gains=tuple(gain for other in records[1:] for gain in measure_gains(records[0], other)),
        remarks=tuple(remarks),
    )


def build_boxes(record: ExplanationRecord) -> Iterator[FocusBox]:
    """The scores of an attack as boxes, one for each map and view."""
    for row in record.focus:
        scores = np.array(row.scores)
        scores = scores[np.isfinite(scores)]
        if len(scores):
            ends = map(float, np.quantile(scores, (0, 0.25, 0.5, 0.75, 1)))
            yield FocusBox(record.attack, row.map, row.view, len(scores), *ends)


def measure_gains(first: ExplanationRecord, other: ExplanationRecord) -> Iterator[FocusGain]:
    """By how much the scores of one attack exceed those of another, image by image."""
    theirs: dict[tuple[str, str], FocusFigures] = {(r.map, r.view): r for r in first.focus}
    for row in other.focus:
        if (row.map, row.view) in theirs:
            pairs = np.array(row.scores) - np.array(theirs[row.map, row.view].scores)
            yield FocusGain(other.attack, row.map, row.view, average_images(pairs, OF_CORRELATIONS))
