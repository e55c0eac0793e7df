"""The record of a comparison of two runs: every number and sentence that any format shows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

from robusteval.runs.types import Run, spell_json

from . import formatting
from .compare import Comparison, Flip, Pair, PairKind, name_run
from .measures import (
    Count,
    Facts,
    RateRecord,
    Share,
    ThreatRecord,
    build_rate,
    build_threat,
    to_json_types,
)

SCHEMA: Literal[1] = 1
LEVEL = 0.05  # of the family of all tests of a comparison


@dataclass(frozen=True)
class FlipRow:
    """An image whose verdict changed.

    Predictions of -1 were not finite, of -3 stopped by a detector.
    """

    id: str
    index: Annotated[Count, "in the data set of the run after"]
    label: int
    before: int
    after: int
    lost: Annotated[bool, "right before and wrong after; else the reverse"]


@dataclass(frozen=True)
class PairRow:
    """The same question to both runs."""

    kind: PairKind
    attacks: tuple[str, ...]
    defense: str | None
    adaptive: bool
    threat: ThreatRecord | None
    before: RateRecord
    after: RateRecord
    lost: Count
    gained: Count
    difference: Annotated[float, "after minus before"]
    low: Annotated[float, "score interval of the difference at 95 % (Tango 1998)"]
    high: float
    p: Annotated[Share, "exact two-sided McNemar"]
    p_holm: Annotated[Share, "corrected for all pairs of the comparison"]
    flipped: tuple[FlipRow, ...]

    @property
    def group(self) -> str:
        """What a pair has in common with others: threat and defense."""
        said = "clean images"
        if self.threat is not None:
            said = formatting.format_threat(self.threat)
        return f"{said} behind {self.defense}" if self.defense else said

    @property
    def caption(self) -> str:
        """What to call a pair below the heading of its group."""
        if self.kind != "attack":
            return "clean accuracy" if self.kind == "clean" else "worst case"
        return self.attacks[0] + ("" if self.adaptive else ", oblivious")


@dataclass(frozen=True)
class RunSide:
    """Where the numbers of one side come from."""

    name: str
    created: str
    model: Facts
    environment: Facts


@dataclass(frozen=True)
class ComparisonRecord:
    """Two runs over the same images."""

    schema: Literal[1]
    verdict: str
    images: Count
    before: RunSide
    after: RunSide
    pairs: tuple[PairRow, ...]
    unpaired: tuple[str, ...]
    remarks: tuple[str, ...]
    # for formats that people read, not part of the JSON
    doubtful: bool = field(metadata={"json": False})
    class_names: Sequence[str] | None = field(metadata={"json": False})


def build_comparison(comparison: Comparison) -> ComparisonRecord:
    """The record of a comparison; every flipped image is in it."""
    before, after = comparison.before, comparison.after
    pairs = tuple(build_pair(pair) for pair in comparison.pairs)
    images = len(before.clean["id"])
    doubts = list(list_doubts(before, after))
    return ComparisonRecord(
        schema=SCHEMA,
        verdict=" ".join((*doubts, write_judgement(pairs, images))),
        images=images,
        before=build_side(before),
        after=build_side(after),
        pairs=pairs,
        unpaired=comparison.unpaired,
        remarks=comparison.remarks,
        doubtful=bool(doubts),
        class_names=after.data.get("class_names"),
    )


def build_pair(pair: Pair) -> PairRow:
    """A pair with its numbers."""
    return PairRow(
        kind=pair.kind,
        attacks=pair.attacks,
        defense=pair.defense,
        adaptive=pair.adaptive,
        threat=pair.threat and build_threat(pair.threat),
        before=build_rate(pair.before),
        after=build_rate(pair.after),
        lost=pair.change.lost,
        gained=pair.change.gained,
        difference=pair.difference,
        low=pair.difference_interval.low,
        high=pair.difference_interval.high,
        p=pair.p,
        p_holm=pair.p_holm,
        flipped=tuple(build_flip(flip) for flip in pair.flips),
    )


def build_flip(flip: Flip) -> FlipRow:
    """A flipped image."""
    return FlipRow(flip.id, flip.position, flip.label, flip.before, flip.after, flip.lost)


def build_side(run: Run) -> RunSide:
    """Where the numbers of one side come from."""
    model, environment = to_json_types(run.model), to_json_types(run.environment)
    return RunSide(name_run(run), run.created, model, environment)


def render_comparison_json(record: ComparisonRecord) -> str:
    """The record as JSON text in one line, because there may be many images; ASCII only."""
    return spell_json(json.dumps(to_json_types(record), allow_nan=False))


def list_doubts(before: Run, after: Run) -> Iterator[str]:
    """Why the numbers of a side may not be what they seem."""
    for run, when in ((before, "before"), (after, "after")):
        if any(finding.misfed for finding in run.findings):
            yield f"Not to be used: the model {when} is probably not fed as it was trained."
        grave = sum(finding.grave and not finding.misfed for finding in run.findings)
        if grave:
            found = formatting.format_count(grave, "grave finding")
            yield f"The evaluation {when} is weak ({found}): its numbers are upper bounds."


def write_judgement(pairs: Sequence[PairRow], images: int) -> str:
    """One sentence on all pairs: what changed beyond chance, if anything."""
    count = formatting.format_count(len(pairs), "comparison")
    over = f"{count} over {formatting.format_count(images, 'image')}"
    if not any(pair.flipped for pair in pairs):
        return f"Nothing changed: no image flipped in {over}."
    changed = [pair for pair in pairs if pair.p_holm < LEVEL]
    if not changed:
        widest = max(pairs, key=lambda pair: abs(pair.difference))
        return f"No change beyond chance in {over}; the largest is {write_change(widest)}."
    fallen = sum(pair.difference < 0 for pair in changed)
    counts = [f"{fallen} fell"] * (fallen > 0) + [f"{len(changed) - fallen} rose"] * (
        fallen < len(changed)
    )
    largest = max(changed, key=lambda pair: abs(pair.difference))
    return (
        f"Changed beyond chance: {len(changed)} of {over} ({', '.join(counts)});"
        f" the largest is {write_change(largest)}."
    )


def write_change(pair: PairRow) -> str:
    """A pair in one clause."""
    points = f"{write_points(pair.difference)} points ({write_span(pair)})"
    if pair.kind == "clean":
        return f"clean accuracy, {points}" + (f", {pair.group}" if pair.defense else "")
    return f"{pair.caption} at {pair.group}, {points}"


def write_points(share: float) -> str:
    """A difference in points; no minus before nothing."""
    return f"{100 * share:+.1f}" if round(100 * share, 1) else "0.0"


def write_span(pair: PairRow) -> str:
    """The interval of a difference in points."""
    return f"{write_points(pair.low)} to {write_points(pair.high)}"
