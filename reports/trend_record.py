"""What a record says of one network over time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from .measures import Behind, RateRecord, ThreatRecord


@dataclass(frozen=True)
class TrendPoint:
    """What one baseline or run says."""

    name: Annotated[str, "file of a baseline or folder of a run"]
    created: str
    model: Annotated[str | None, "SHA-256 of the weights"]
    accuracy: Annotated[RateRecord | None, "null: it did not ask that"]
    same_images: Annotated[bool, "of the images of this run"]


@dataclass(frozen=True)
class TrendChange:
    """From the first point on the images of this run to the last, image by image."""

    since: Annotated[str, "name of the first point"]
    difference: float
    low: Annotated[float, "of the score interval at 95 % (Tango)"]
    high: float
    p_holm: Annotated[float, "exact McNemar test, corrected over the lines"]


@dataclass(frozen=True)
class TrendLine:
    """One question over time."""

    threat: Annotated[ThreatRecord | None, "null: clean accuracy"]
    defense: Behind
    points: tuple[TrendPoint, ...]
    change: Annotated[TrendChange | None, "null: nothing to pair"]


@dataclass(frozen=True)
class TrendRecord:
    """One network over time, the earliest first."""

    lines: tuple[TrendLine, ...]
    notes: Annotated[tuple[str, ...], "why points are missing, or not paired"]
