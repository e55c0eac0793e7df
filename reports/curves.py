"""Robust accuracy against the radius as numbers at a few radii, for charts and tables."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from robusteval.runs.statistics import Rate

from .abridged import choose_evenly
from .pictures import format_distance
from .record import CurveRecord, RunRecord

MOST_RADII = 25  # columns
MOST_NAMED = 20  # attacks in a sentence
SHOWN = (0.0, 0.25, 0.5, 0.75, 1.0)  # shares of the largest budget that are said of a curve
BUDGETS = {  # name and unit of what attacks may spend
    "linf": ("linf budget", "grey levels of 255"),
    "l2": ("l2 budget", "pixels in [0, 1]"),
    "l1": ("l1 budget", "pixels in [0, 1]"),
    "l0": ("l0 budget", "values changed"),
    "l0_pixels": ("l0 budget", "pixels changed"),
    "ssim": ("likeness lost", "1 - SSIM"),
}
NEAREST = (
    "An upper bound: these are the nearest successes that were found, and a nearer one may exist."
)
WITHIN = "Nearer than the radius it was given an attack did not look: an upper bound."
SAVED = "The curve of 8-bit images is of those attacks whose successes survive saving."


class CurveTable(NamedTuple):
    """The curves of one norm and goal: a column for each budget, a row for each defense."""

    title: str
    note: str
    norm: str
    group: list[CurveRecord]
    budgets: list[str]
    rows: list[tuple[str, list[Rate]]]


def build_curve_tables(record: RunRecord) -> Iterator[CurveTable]:
    """Robust accuracy at a few budgets, a table for each norm and goal."""
    found: dict[tuple[str, bool], list[CurveRecord]] = {}
    for curve in record.curves:
        # of a single radius the tables say all there is; nearer ones were not looked at
        if curve.nearest or len(curve.tested) > 1:
            found.setdefault((curve.norm, curve.targeted), []).append(curve)
    for (norm, targeted), group in found.items():
        sizes = list_radii(group)
        if any(curve.nearest for curve in group):
            sizes = choose_budgets(norm, max(curve.budgets[-1] for curve in group))
        title = f"Robust accuracy against {BUDGETS[norm][0]}"
        yield CurveTable(
            title + (", targeted" if targeted else ""),
            write_note(group),
            norm,
            group,
            [format_distance(norm, size) for size in sizes],
            [(name_curve(curve), [count_robust(curve, size) for size in sizes]) for curve in group],
        )


def write_note(group: Sequence[CurveRecord]) -> str:
    """What was counted, against which attacks, and what the curves do not say."""
    attacks = dict.fromkeys(spec for curve in group for spec in curve.attacks)
    named = list(attacks)[:MOST_NAMED]
    more = f" and {len(attacks) - len(named):,} more" if len(attacks) > len(named) else ""
    note = f"Images right and not fooled within the budget by {', '.join(named)}{more}."
    if any(curve.nearest for curve in group):
        note += f" {NEAREST}"
    if any(curve.tested for curve in group):
        note += f" {WITHIN}"
    if any(curve.eight_bit for curve in group):
        note += f" {SAVED}"
    return note


def list_radii(group: Sequence[CurveRecord]) -> list[float]:
    """Nothing, and every radius that was tried."""
    radii = sorted({0.0, *(point.eps for curve in group for point in curve.tested)})
    return choose_evenly(radii, MOST_RADII)


def choose_budgets(norm: str, largest: float) -> list[float]:
    """The budgets at which a curve is put into words; whole where values are counted."""
    budgets = [part * largest for part in SHOWN]
    if norm.startswith("l0"):
        budgets = [float(math.floor(budget)) for budget in budgets]
    return list(dict.fromkeys(budgets))


def name_curve(curve: CurveRecord) -> str:
    """What a curve is of."""
    if curve.eight_bit:
        return f"{curve.defense}, 8-bit" if curve.defense else "8-bit images"
    return curve.defense or "undefended"


def count_robust(curve: CurveRecord, budget: float) -> Rate:
    """The images a curve leaves at a budget, of none where nothing is known.

    Beyond its end that is known where no image was left.
    """
    at = bisect_right(curve.budgets, budget) - 1
    known = budget <= curve.budgets[-1] or curve.robust[-1] == 0
    return Rate(curve.robust[at], curve.n) if known else Rate(0, 0)
