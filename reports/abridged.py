"""What pages show of a run of very many attacks: the strongest, under threats at even distances.

Thousands of rows in a terminal or a page are read by nobody, and take minutes to lay out. CSV and
JSON have all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from .groups import GroupsRecord, TurnedRecord
from .measures import ThreatRecord
from .record import AttackRow, CurveRecord, RunRecord, WorstCaseRow

MOST_ATTACKS = 200  # of a table
MOST_CASES = 20  # threats and defenses of a table
QUOTED = 8  # of them in sentences
POINTS = 50  # radii that are drawn

Placed = TypeVar("Placed", WorstCaseRow, AttackRow, GroupsRecord, TurnedRecord)
T = TypeVar("T")
Place = tuple[ThreatRecord, str | None]  # a threat, and the defense that an attack is behind


def abridge(record: RunRecord) -> RunRecord:
    """The record with as many attacks and threats as a page has room for; itself if all have.

    Tables alone may be made of it: what counts or sums up must see all.
    """
    if len(record.attacks) <= MOST_ATTACKS and len(record.worst_cases) <= MOST_ATTACKS:
        return record
    cases = choose_cases(record.worst_cases, MOST_CASES)
    places: set[Place] = {(case.threat, case.defense) for case in cases}
    attacks = choose_strongest(select(record.attacks, places), MOST_ATTACKS // len(cases))
    specs = {None, *(row.spec for row in attacks)}
    threats = (
        f" under {len(cases)} of {len(record.worst_cases):,} threats and defenses"
        if len(cases) < len(record.worst_cases)
        else ""
    )
    return replace(
        record,
        worst_cases=tuple(cases),
        attacks=tuple(attacks),
        curves=tuple(abridge_curve(curve) for curve in record.curves),
        groups=tuple(select(record.groups, places)),
        turned=tuple(each for each in select(record.turned, places) if each.attack in specs),
        left_out=f"Shown are the strongest {len(attacks)} of {len(record.attacks):,} attacks"
        f"{threats}; CSV and JSON have all.",
    )


def select(rows: Sequence[Placed], places: set[Place]) -> list[Placed]:
    """Those under some threats and defenses."""
    return [row for row in rows if (row.threat, row.defense) in places]


def choose_strongest(rows: Sequence[AttackRow], each: int) -> list[AttackRow]:
    """Of each threat and defense so many attacks, those that leave least; in their order."""
    groups: dict[Place, list[int]] = {}
    for place, row in enumerate(rows):
        groups.setdefault((row.threat, row.defense), []).append(place)
    kept = [
        place
        for places in groups.values()
        for place in sorted(places, key=lambda i: rows[i].robust_accuracy.float.k)[:each]
    ]
    return [rows[place] for place in sorted(kept)]


def choose_cases(cases: Sequence[WorstCaseRow], most: int) -> list[WorstCaseRow]:
    """At most so many threats, but for two of each norm, goal and defense: the least, the largest.

    Those between are at even distances in their order.
    """
    if len(cases) <= most:
        return list(cases)
    families: dict[tuple[str, bool, str | None], list[WorstCaseRow]] = {}
    for case in cases:
        key = (case.threat.norm, case.threat.targeted, case.defense)
        families.setdefault(key, []).append(case)
    share = max(2, most // len(families))
    kept = {id(case) for family in families.values() for case in choose_evenly(family, share)}
    return [case for case in cases if id(case) in kept]


def choose_evenly(items: Sequence[T], most: int) -> list[T]:
    """At most so many, the first and the last among them, at even distances."""
    places = np.linspace(0, len(items) - 1, min(most, len(items))).round().astype(int)
    return [items[place] for place in places.tolist()]


def abridge_curve(curve: CurveRecord) -> CurveRecord:
    """A curve with as many tested radii as can be drawn."""
    return replace(curve, tested=tuple(choose_evenly(curve.tested, POINTS)))


def count_others(cases: Sequence[object], quoted: Sequence[object]) -> str:
    """What a sentence that quotes some of them adds; nothing if it quotes all."""
    others = len(cases) - len(quoted)
    return f", and {others:,} threats between" if others else ""
