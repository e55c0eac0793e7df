"""Reports as CSV for a spreadsheet: a row for each number of robust or clean accuracy."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from robusteval.runs.types import visible

from . import formatting
from .ci import names

# what a spreadsheet takes for a formula, also as a full-width character; tab and carriage
# return hide one
ACTIVE = ("=", "+", "-", "@", "\t", "\r", "＝", "＋", "－", "＠")
WAYS = {"float": "", "eight_bit": "_8bit", "png": "_png"}
MAPS = ("distance", "noise", "floor", "iou")
DISTANCES = ("l0", "l0_pixels", "l1", "l2", "linf", "ssim", "psnr")
COLUMNS = (
    *("run", "kind", "defense", "adaptive", "attack", "knowledge", "norm", "eps", "targeted"),
    *("n", "attacked"),
    *(f"accuracy{way}{part}" for way in WAYS.values() for part in ("_k", "", "_low", "_high")),
    *("success_k", "success", "median_distance", "mean_distance", *DISTANCES),
    *("forwards", "backwards", "seconds", "unique_breaks"),
    *("confidence", "noise_rate", "edge_energy", "edge_area", "interpreter", "map_attacked"),
    *(f"map_{what}{part}" for what in MAPS for part in ("", "_low", "_high")),
)


def to_csv(records: Sequence[formatting.Record]) -> str:
    """The numbers of runs as CSV (RFC 4180), in full precision.

    The column `kind` says what a row is about: the accuracy of the images as they are ("clean"),
    after one attack ("attack"), after the best attack for each image ("worst case"), or what an
    attack did to the maps of one interpreter ("map"). Numbers that do not exist are empty; text
    that a spreadsheet would take for a formula begins with an apostrophe.
    """
    page = io.StringIO(newline="")
    writer = csv.DictWriter(page, COLUMNS, restval="", quoting=csv.QUOTE_NONNUMERIC)
    writer.writeheader()
    for record, name in zip(records, names(records), strict=True):
        for row in rows(record):
            made = {"run": name, **row}
            writer.writerow({key: entry(value) for key, value in made.items()})
    return page.getvalue()


def rows(record: formatting.Record) -> Iterator[dict[str, Any]]:
    """The rows of one run: clean accuracies, attacks, worst cases."""
    clean = {"float": record["clean_accuracy"]}
    yield {"kind": "clean", "n": record["clean_accuracy"]["n"], **accuracies(clean)}
    for defense in record["defenses"]:
        clean = {"float": defense["clean_accuracy"]}
        named = {"kind": "clean", "defense": defense["spec"]}
        yield {**named, "n": defense["clean_accuracy"]["n"], **accuracies(clean)}
    for row in record["attacks"]:
        known = {"knowledge": row["knowledge"], "unique_breaks": row["unique_breaks"]}
        yield {"kind": "attack", "attack": row["spec"], **known, **numbers(row)}
    for case in record["worst_cases"]:
        yield {"kind": "worst case", "attack": listed(case["attacks"]), **numbers(case)}
    if record["interpreters"]:
        for row in record["interpreters"]["attacks"]:
            yield from map_rows(row)


def map_rows(row: formatting.Record) -> Iterator[dict[str, Any]]:
    """A row for each interpreter: means over the images on which an attack succeeds."""
    means = ("confidence", "noise_rate", "edge_energy", "edge_area")
    known = {
        "kind": "map",
        **{key: row[key] for key in ("defense", "adaptive")},
        "attack": row["spec"],
        "attacked": row["success_rate"]["n"],
        "success_k": row["success_rate"]["k"],
        "success": row["success_rate"]["value"],
        **{name: row[name]["value"] for name in means},
    }
    for one in row["maps"]:
        made = {"interpreter": one["interpreter"], "map_attacked": one["attacked"]}
        for what in MAPS:
            mean = one[what] or {}
            made[f"map_{what}"] = mean.get("value")
            made |= {f"map_{what}_{end}": mean.get(end) for end in ("low", "high")}
        yield known | made


def listed(specs: Iterable[str]) -> str:
    """Several attacks in one cell."""
    return "; ".join(specs)


def numbers(row: formatting.Record) -> dict[str, Any]:
    """What attacks and worst cases have in common."""
    threat, fooled = row["threat"], row["success_rate"]["float"]
    return {
        "defense": row["defense"],
        "adaptive": row["adaptive"],
        **{key: threat[key] for key in ("norm", "eps", "targeted")},
        "n": row["robust_accuracy"]["float"]["n"],
        "attacked": fooled["n"],
        **accuracies(row["robust_accuracy"]),
        "success_k": fooled["k"],
        "success": fooled["value"],
        "median_distance": row["distance"]["median"],
        "mean_distance": row["distance"]["mean"],
        **{name: row["distances"][name] for name in DISTANCES},
        **row["cost"],
    }


def accuracies(rates: formatting.Record) -> dict[str, Any]:
    """Rates with their intervals, for each way of looking at a result that there is."""
    made: dict[str, Any] = {}
    for way, rate in rates.items():
        if rate is not None:
            name = f"accuracy{WAYS[way]}"
            made |= {f"{name}_k": rate["k"], name: rate["value"]}
            made |= {f"{name}_low": rate["low"], f"{name}_high": rate["high"]}
    return made


def entry(value: Any) -> Any:
    """A value as it stands in a cell."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return defused(visible(value)) if isinstance(value, str) else value


def defused(text: str) -> str:
    """Text that a spreadsheet does not calculate."""
    return f"'{text}" if text.lstrip(" ").startswith(ACTIVE) else text
