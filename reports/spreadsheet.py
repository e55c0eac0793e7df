"""Reports as CSV for a spreadsheet: a row for each number of robust or clean accuracy."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from typing import Any

from robusteval.registry import REPORT_FORMATS
from robusteval.runs.formulas import defuse_formula
from robusteval.runs.types import visible

from .map_record import MapAttackRow
from .measures import MeanRecord, RateRecord
from .problems import name_runs
from .record import AttackRow, RunRecord, WorstCaseRow

WAYS = ("", "_8bit", "_png")
MAPS = ("distance", "noise", "floor", "iou")
DISTANCES = ("l0", "l0_pixels", "l1", "l2", "linf", "ssim", "psnr")
COLUMNS = (
    *("run", "kind", "defense", "adaptive", "attack", "knowledge", "norm", "eps", "targeted"),
    *("n", "attacked"),
    *(f"accuracy{way}{part}" for way in WAYS for part in ("_k", "", "_low", "_high")),
    *("success_k", "success", "median_distance", "mean_distance", *DISTANCES),
    *("forwards", "backwards", "seconds", "unique_breaks"),
    *("confidence", "noise_rate", "edge_energy", "edge_area", "interpreter", "map_attacked"),
    *("slice", "group", "p_holm"),
    *(f"map_{what}{part}" for what in MAPS for part in ("", "_low", "_high")),
)


@REPORT_FORMATS.add("csv", suffix=".csv")
def to_csv(records: Sequence[RunRecord]) -> str:
    """The numbers of runs as CSV (RFC 4180), in full precision.

    The column `kind` says what a row is about: the accuracy of the images as they are ("clean"),
    after one attack ("attack"), after the best attack for each image ("worst case"), the same of
    the images of a class or slice alone ("class", "slice"), or what an attack did to the maps of
    one interpreter ("map"). Numbers that do not exist are empty; text
    that a spreadsheet would take for a formula begins with an apostrophe.
    """
    page = io.StringIO(newline="")
    writer = csv.DictWriter(page, COLUMNS, restval="", quoting=csv.QUOTE_NONNUMERIC)
    writer.writeheader()
    for record, name in zip(records, name_runs(records), strict=True):
        for row in list_rows(record):
            made = {"run": name, **row}
            writer.writerow({key: build_entry(value) for key, value in made.items()})
    return page.getvalue()


def list_rows(record: RunRecord) -> Iterator[dict[str, Any]]:
    """The rows of one run: clean accuracies, attacks, worst cases."""
    yield {"kind": "clean", **list_clean_accuracy(record.clean_accuracy)}
    for defense in record.defenses:
        known = {"kind": "clean", "defense": defense.spec}
        yield {**known, **list_clean_accuracy(defense.clean_accuracy)}
    for row in record.attacks:
        known = {"kind": "attack", "attack": row.spec, "knowledge": row.knowledge}
        yield {**known, "unique_breaks": row.unique_breaks, **list_numbers(row)}
    for case in record.worst_cases:
        yield {"kind": "worst case", "attack": "; ".join(case.attacks), **list_numbers(case)}
    yield from list_group_rows(record)
    if record.interpreters:
        for attack in record.interpreters.attacks:
            yield from list_map_rows(attack)


def list_group_rows(record: RunRecord) -> Iterator[dict[str, Any]]:
    """A row for each class and each value of a slice, under each threat."""
    for group in record.groups:
        for row in group.rows:
            yield {
                "kind": group.kind,
                "slice": group.by if group.kind == "slice" else None,
                "group": row.name,
                "defense": group.defense,
                "norm": group.threat.norm,
                "eps": group.threat.eps,
                "targeted": group.threat.targeted,
                "n": row.robust_accuracy.n,
                "attacked": row.clean.k,
                **list_accuracy("accuracy", row.robust_accuracy),
                "median_distance": row.distance,
                "p_holm": row.p_holm,
            }


def list_map_rows(row: MapAttackRow) -> Iterator[dict[str, Any]]:
    """A row for each interpreter: means over the images on which an attack succeeds."""
    known = {
        "kind": "map",
        "defense": row.defense,
        "adaptive": row.adaptive,
        "attack": row.spec,
        "attacked": row.success_rate.n,
        "success_k": row.success_rate.k,
        "success": row.success_rate.value,
        "confidence": row.confidence.value,
        "noise_rate": row.noise_rate.value,
        "edge_energy": row.edge_energy.value,
        "edge_area": row.edge_area.value,
    }
    for one in row.maps:
        yield {
            **known,
            "interpreter": one.interpreter,
            "map_attacked": one.attacked,
            **list_mean("map_distance", one.distance),
            **list_mean("map_noise", one.noise),
            **list_mean("map_floor", one.floor),
            **list_mean("map_iou", one.iou),
        }


def list_mean(name: str, mean: MeanRecord | None) -> dict[str, Any]:
    """A mean with its interval; nothing where there is none."""
    if mean is None:
        return {}
    return {name: mean.value, f"{name}_low": mean.low, f"{name}_high": mean.high}


def list_numbers(row: AttackRow | WorstCaseRow) -> dict[str, Any]:
    """What attacks and worst cases have in common."""
    threat, fooled, robust = row.threat, row.success_rate.float, row.robust_accuracy
    return {
        "defense": row.defense,
        "adaptive": row.adaptive,
        "norm": threat.norm,
        "eps": threat.eps,
        "targeted": threat.targeted,
        "n": robust.float.n,
        "attacked": fooled.n,
        **list_accuracy("accuracy", robust.float),
        **list_accuracy("accuracy_8bit", robust.eight_bit),
        **list_accuracy("accuracy_png", robust.png),
        "success_k": fooled.k,
        "success": fooled.value,
        "median_distance": row.distance.median,
        "mean_distance": row.distance.mean,
        **vars(row.distances),
        **vars(row.cost),
    }


def list_clean_accuracy(rate: RateRecord) -> dict[str, Any]:
    """The accuracy of images as they are, and how many they are."""
    return {"n": rate.n, **list_accuracy("accuracy", rate)}


def list_accuracy(name: str, rate: RateRecord | None) -> dict[str, Any]:
    """A rate with its interval; nothing where there is none."""
    if rate is None:
        return {}
    return {
        f"{name}_k": rate.k,
        name: rate.value,
        f"{name}_low": rate.low,
        f"{name}_high": rate.high,
    }


def build_entry(value: Any) -> Any:
    """A value as it stands in a cell."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return defuse_formula(visible(value)) if isinstance(value, str) else value
