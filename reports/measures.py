"""The measures that records are made of: rates, distances, costs, means, each with its type.

Numbers that do not exist, such as the distance of no success, are None.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Annotated, Any

from robusteval.runs.metrics import Cost, Distance, Distances
from robusteval.runs.statistics import Difference, Mean, Rate
from robusteval.runs.types import Threat, format_number

CORRUPTION = "corruption"  # the norm of the threats of corruptions, whose radius is a severity
# their radius is no brightness
COUNTED = ("l0", "l0_pixels", "ssim", "spatial", "patch", CORRUPTION)


class Limits:
    """What a JSON schema says of a value besides its type, such as ``minimum=0``."""

    def __init__(self, **keywords: Any) -> None:
        self.keywords = keywords


Facts = Mapping[str, Any]  # what a run folder says freely, such as `arch` of a model
Count = Annotated[int, Limits(minimum=0)]
Positive = Annotated[float, Limits(minimum=0)]
Share = Annotated[float, Limits(minimum=0, maximum=1)]
Specs = Annotated[tuple[str, ...], Limits(minItems=1)]  # one attack at least
Place = Annotated[Count, "position of the cell among those of the run"]
Behind = Annotated[str | None, "null: the model as it is"]


@dataclass(frozen=True)
class RateRecord:
    """`k` of `n` images, with the Wilson 95 % interval."""

    k: Count
    n: Count
    value: Annotated[Share | None, "k / n; null of nothing"]
    low: Share
    high: Share


@dataclass(frozen=True)
class RatesRecord:
    """A rate judged on images as returned, rounded to 8 bit, and read back from a PNG file."""

    float: RateRecord
    eight_bit: RateRecord
    png: Annotated[RateRecord | None, "null: a PNG file cannot hold the images"]


@dataclass(frozen=True)
class ThreatRecord:
    """What the attacker may do, with the radius on both scales."""

    norm: str
    eps: Annotated[float | None, "null: no radius"]
    targeted: bool
    eps_255: Annotated[str | None, "eps in grey levels, such as 8/255"]


@dataclass(frozen=True)
class DistanceRecord:
    """How far successes went in the norm of the threat; 1 - SSIM for ssim."""

    median: float | None
    mean: float | None


@dataclass(frozen=True)
class DistancesRecord:
    """How far successes went in every measure: medians of the norms, means of the similarities."""

    l0: Positive | None
    l0_pixels: Positive | None
    l1: Positive | None
    l2: Positive | None
    linf: Positive | None
    ssim: float | None
    psnr: float | None


@dataclass(frozen=True)
class CostRecord:
    """Passes through the network, and time."""

    forwards: Annotated[Positive | None, "per attacked image"]
    backwards: Annotated[Positive | None, "per attacked image"]
    seconds: Annotated[Positive, "altogether"]


@dataclass(frozen=True)
class MeanRecord:
    """A mean over images, with its 95 % interval by Student's t."""

    value: float | None
    low: float | None
    high: float | None
    n: Annotated[Count, "images"]


@dataclass(frozen=True)
class DifferenceRecord:
    """A mean difference of pairs, the first less the second, and a test of its sign."""

    value: float | None
    low: float | None
    high: float | None
    n: Count
    less: Annotated[Count, "images on which the first is below the second"]
    more: Count
    p: Annotated[Share, "exact two-sided sign test"]


def drop_not_finite(value: float) -> float | None:
    """A number as JSON has it: None for what is infinite or nan."""
    return value if math.isfinite(value) else None


def build_rate(rate: Rate) -> RateRecord:
    """A rate with its share and interval."""
    interval = rate.interval
    return RateRecord(rate.k, rate.n, drop_not_finite(rate.value), interval.low, interval.high)


def build_rates(rates: Mapping[str, Rate]) -> RatesRecord:
    """The rates by way of judging, "float", "eight_bit" and perhaps "png"."""
    png = build_rate(rates["png"]) if "png" in rates else None
    return RatesRecord(build_rate(rates["float"]), build_rate(rates["eight_bit"]), png)


def build_threat(threat: Threat) -> ThreatRecord:
    """A threat with its radius on both scales: of [0, 1] and in grey levels."""
    eps = threat.eps
    is_sum = threat.norm in (*COUNTED, "l1")  # over values, of which grey levels say nothing
    levels = None if eps is None or is_sum else f"{show_grey_levels(eps)}/255"
    known = None if eps is None else drop_not_finite(eps)
    return ThreatRecord(threat.norm, known, threat.targeted, levels)


def show_grey_levels(eps: float) -> str:
    """A radius in grey levels, as short as it is exact to nine digits."""
    return format_number(float(f"{eps * 255:.9g}")) if math.isfinite(eps) else str(eps)


def build_distance(distance: Distance) -> DistanceRecord:
    """How far successes went in the norm of their threat."""
    return DistanceRecord(drop_not_finite(distance.median), drop_not_finite(distance.mean))


def build_distances(distances: Distances) -> DistancesRecord:
    """How far successes went in every measure."""
    return DistancesRecord(
        l0=drop_not_finite(distances.l0),
        l0_pixels=drop_not_finite(distances.l0_pixels),
        l1=drop_not_finite(distances.l1),
        l2=drop_not_finite(distances.l2),
        linf=drop_not_finite(distances.linf),
        ssim=drop_not_finite(distances.ssim),
        psnr=drop_not_finite(distances.psnr),
    )


def build_cost(cost: Cost) -> CostRecord:
    """Passes per attacked image, and time."""
    return CostRecord(drop_not_finite(cost.forwards), drop_not_finite(cost.backwards), cost.seconds)


def build_mean(mean: Mean) -> MeanRecord:
    """A mean with its interval."""
    value, low, high = map(drop_not_finite, mean[:3])
    return MeanRecord(value, low, high, mean.n)


def build_difference(gap: Difference) -> DifferenceRecord:
    """A mean difference with its interval and test."""
    value, low, high = map(drop_not_finite, gap[:3])
    return DifferenceRecord(value, low, high, gap.n, gap.less, gap.more, gap.p)


def to_json_types(value: Any) -> Any:
    """A record, or a part of one, in JSON types: classes as dicts in the order of their fields.

    What is not finite becomes None, and what JSON does not know its text.
    """
    if is_dataclass(value):
        kind: Any = type(value)
        return {name: to_json_types(getattr(value, name)) for name in list_shown(kind)}
    if isinstance(value, Mapping):
        return {str(key): to_json_types(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json_types(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | None) else str(value)


@cache
def list_shown(record: Any) -> tuple[str, ...]:
    """The fields of a class of records that JSON has."""
    return tuple(each.name for each in fields(record) if each.metadata.get("json", True))


def spell_rows(record: Any) -> str:
    """A record as JSON with a line for each entry of its lists.

    For thousands of rows: to indent them takes Python minutes. ValueError if a number in it is not
    finite.
    """
    encode = json.JSONEncoder(default=show_one_level, allow_nan=False).encode
    parts = []
    for name, value in show_one_level(record).items():
        rows = value if isinstance(value, tuple) and value else None
        text = encode(value) if rows is None else "[\n" + ",\n".join(map(encode, rows)) + "\n]"
        parts.append(f"{encode(name)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}"


def show_one_level(value: Any) -> Any:
    """What an encoder of JSON does not know, in types of which it knows the outermost."""
    if is_dataclass(value):
        kind: Any = type(value)
        return {name: getattr(value, name) for name in list_shown(kind)}
    if isinstance(value, Mapping):
        return {str(key): item for key, item in value.items()}
    return str(value)
