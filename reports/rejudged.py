"""The verdict of the same weights in another arithmetic, on the images made in the run's own.

Nothing was attacked anew, so that it says how much of a number rounding decides, and of the other
arithmetic at most how robust it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np

from robusteval.runs import metrics
from robusteval.runs.storage import digest
from robusteval.runs.types import Defended, Flags, Outcome, Run

from . import formatting
from .measures import Count, RateRecord, ThreatRecord, build_rate, build_threat

SAME = ("sha256", "arch", "mean", "std")  # of two networks that differ in their arithmetic alone


@dataclass(frozen=True)
class RejudgedRow:
    """The attacks of one threat."""

    threat: ThreatRecord
    attacks: tuple[str, ...]
    own: Annotated[RateRecord, "robust accuracy as the network attacked has it"]
    robust: Annotated[RateRecord, "as the other has it; what either has wrong at first is lost"]
    alone: Annotated[Count, "images that fall in the run's own arithmetic alone"]
    spared: Annotated[Count, "images that fall in the other alone"]


@dataclass(frozen=True)
class RejudgedRecord:
    """Other arithmetic, the same weights, normalisation and images."""

    name: str
    own: Annotated[str, "type that the network attacked computes in"]
    dtype: str
    differing: Annotated[RateRecord, "of the images as they are, named otherwise"]
    cases: tuple[RejudgedRow, ...]


def build_rejudged(run: Run) -> Iterator[RejudgedRecord]:
    """What receivers of the same weights say of a run of different images."""
    for receiver in run.receivers:
        if not has_same_weights(run.model, receiver.facts):
            continue
        moved = run.clean["pred_clean"] != receiver.clean["pred_clean"]
        yield RejudgedRecord(
            str(receiver.spec),
            name_type(run.model),
            name_type(receiver.facts),
            build_rate(metrics.rate(moved)),
            tuple(build_cases(run, receiver)),
        )


def build_cases(run: Run, receiver: Defended) -> Iterator[RejudgedRow]:
    """A row for each threat of which the receiver has judged every attack."""
    found = {identify(o): o for o in run.transfers if str(o.defense) == str(receiver.spec)}
    plain = [outcome for outcome in run.attacks if outcome.defense is None]
    right = metrics.find_right(run.clean)
    both: Flags = right & metrics.find_right(receiver.clean)
    for threat, group in metrics.group_by_threat(plain).items():
        judged = [found.get(identify(outcome)) for outcome in group]
        again = [outcome for outcome in judged if outcome is not None]
        if len(again) < len(group):
            continue
        ours: Flags = right & ~np.logical_or.reduce([outcome.success() for outcome in group])
        theirs: Flags = both & ~np.logical_or.reduce([outcome.success() for outcome in again])
        yield RejudgedRow(
            build_threat(threat),
            tuple(str(outcome.attack) for outcome in group),
            build_rate(metrics.rate(ours)),
            build_rate(metrics.rate(theirs)),
            int((theirs & ~ours).sum()),
            int((ours & ~theirs).sum()),
        )


def identify(outcome: Outcome) -> str:
    """A text that is equal for cells of one attack."""
    return digest([str(outcome.attack), outcome.resolved])


def has_same_weights(model: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two networks are the same but for the type that they compute in."""
    same = all(model.get(name) == other.get(name) for name in SAME)
    return bool(model.get("sha256")) and same and name_type(model) != name_type(other)


def name_type(facts: Mapping[str, Any]) -> str:
    """The type that a network computes in."""
    return str(facts.get("dtype") or "float32")


def write_rejudged(record: RejudgedRecord) -> Iterator[str]:
    """How far the two agree, in sentences."""
    moved = record.differing
    yield (
        f"Judged again in {record.dtype}: {formatting.format_count(moved.k, 'image')} of"
        f" {moved.n:,} as they are get another class than in {record.own}."
    )
    for row in record.cases:
        yield (
            f"{formatting.format_threat(row.threat)}: robust accuracy at most"
            f" {formatting.format_rate(row.robust)} in {record.dtype},"
            f" {formatting.format_percent(row.own)} in {record.own};"
            f" {formatting.format_count(row.alone, 'image')} lost in {record.own} alone,"
            f" {row.spared:,} in {record.dtype} alone."
        )
