"""Classes and slices as tables and sentences: the weakest first, and what classes become.

Everything here is plain text and may hold names from outside; each format escapes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np

from robusteval.runs.slices import SLICE
from robusteval.runs.types import Run

from . import formatting
from .abridged import MOST_CASES
from .gate_tests import show_p
from .groups import GroupRow, GroupsRecord, TurnedRecord, count_by_class, is_below
from .measures import CORRUPTION, RateRecord
from .record import RunRecord
from .sentences import explain_missing_number, shorten_defense

BRIEF, MANY = 12, 40  # rows of a table in a terminal, and on a page
BRIEF_CASES = 3  # threats and defenses, of which 80 columns have room for as many
MATRIX = 20  # classes of which each is held against each
SHOWN_PAIRS = 20
NAMED = 5  # groups or pairs in a sentence
MEASURES = {"ssim": "1 - SSIM", "l0": "values", "l0_pixels": "pixels"}  # which are no distance
NOTE = (
    "Images that are right and stay so, with the Wilson 95 % interval; * marks what is below all"
    " other images, and not by chance (Fisher's exact test, corrected by Holm over the rows; of"
    " distances at the median of all)."
)


class GroupTable(NamedTuple):
    """The groups of one split as text: a row each, with a cell for each of the columns."""

    kind: str  # "class" or "slice"
    title: str
    lines: list[str]
    first: str
    columns: list[str]
    rows: list[tuple[str, list[str]]]
    bars: list[RateRecord]  # of each row, of the first threat
    left: str  # what is not shown, or not counted, in sentences; empty if all is


class TurnedTable(NamedTuple):
    """What one attack, or the nearest success of all, turns classes into."""

    title: str
    header: list[str]
    rows: list[tuple[str, list[str]]]
    shades: list[list[int]]  # 0 to 9, for each cell of a matrix; empty of a list of pairs
    note: str
    overall: bool  # of the nearest success of all attacks, or of the only one


def build_group_tables(record: RunRecord, *, brief: bool = False) -> Iterator[GroupTable]:
    """A table for the classes, then one for each slice; the lowest of the first threat first.

    A brief one has fewer rows, threats and sentences, for a terminal.
    """
    if explain_missing_number(record):
        return
    splits = dict.fromkeys((group.kind, group.by) for group in record.groups)
    for kind, by in splits:
        cases = [group for group in record.groups if (group.kind, group.by) == (kind, by)]
        yield build_group_table(record, cases, brief)


def build_group_table(record: RunRecord, cases: Sequence[GroupsRecord], brief: bool) -> GroupTable:
    """The groups of one split, a column for each threat and defense."""
    first, told = cases[0], list(cases)
    cases = cases[: BRIEF_CASES if brief else MOST_CASES]
    kind, by = first.kind, first.by
    known = [i for i, row in enumerate(first.rows) if row.robust_accuracy.n]
    order = sorted(known, key=lambda i: order_row(first.rows[i]))
    order += [i for i in range(len(first.rows)) if i not in set(known)]
    shown = order[: BRIEF if brief else MANY]
    columns = ["images", "clean", *(title_case(record, group) for group in cases)]
    becomes = find_commonest(record, first) if kind == "class" else {}
    if becomes:
        columns.insert(3, "mostly taken for")  # behind the threat that it is about
    rows = []
    for i in shown:
        row = first.rows[i]
        cells = [f"{row.clean.n:,}", formatting.format_percent(row.clean)]
        cells += [write_case(group, group.rows[i]) for group in cases]
        if becomes:
            cells.insert(3, becomes.get(row.label or 0, formatting.MISSING))
        rows.append((row.name, cells))
    plural = "classes" if kind == "class" else f"values of {by}"
    parts = []
    if len(order) > len(shown):
        parts.append(f"The {len(shown)} lowest of {len(order):,} {plural}; CSV and JSON have all.")
    if len(told) > len(cases):
        where = "HTML has all" if len(told) <= MOST_CASES else "JSON has all"
        parts.append(f"{len(cases)} of {len(told)} threats and defenses; {where}.")
    if kind == "slice" and (shared := count_shared(record.run, by)):
        count = "It counts" if shared == 1 else "Each counts"
        what = formatting.format_count(shared, "image")
        stands = "stands" if shared == 1 else "stand"
        parts.append(
            f"{what} {stands} in the data under several values of {by}. {count} once, under the"
            " value that comes first in the data."
        )
    return GroupTable(
        kind=kind,
        title="Classes" if kind == "class" else f"Slices by {by}",
        lines=list(
            write_brief(record, told)
            if brief
            else (line for group in told for line in write_worst(record, group))
        ),
        first=by,
        columns=columns,
        rows=rows,
        bars=[first.rows[i].robust_accuracy for i in shown],
        left=" ".join(parts),
    )


def count_shared(run: Run, by: str) -> int:
    """The different images that are in the data under several values of a slice."""
    ids, codes = run.clean["id"], run.clean[f"{SLICE}{by}"]
    order = np.lexsort((codes, ids))
    ids, codes = ids[order], codes[order]
    again = (ids[1:] == ids[:-1]) & (codes[1:] != codes[:-1])
    return len(np.unique(ids[1:][again]))


def order_row(row: GroupRow) -> tuple[float, float, int]:
    """The lowest first, of equal ones that which attacks reach soonest, then the larger."""
    far = row.distance if row.distance is not None else float("inf")
    return row.robust_accuracy.value or 0.0, far, -row.robust_accuracy.n


def count_known(group: GroupsRecord) -> int:
    """The groups that have images."""
    return sum(row.robust_accuracy.n > 0 for row in group.rows)


def name_case(record: RunRecord, case: GroupsRecord | TurnedRecord) -> str:
    """A threat, and the defense before the model as short as may be.

    Several corruptions are said to be meant together: most images may well hold at each.
    """
    defense = shorten_defense(record, case.defense) if case.defense else None
    place = formatting.format_place(case.threat, defense)
    single = isinstance(case, TurnedRecord) and case.attack
    if case.threat.norm != CORRUPTION or single:
        return place
    here = (case.threat, case.defense)
    count = sum((row.threat, row.defense) == here for row in record.attacks)
    return f"{place}, all {count} kinds together" if count > 1 else place


def title_case(record: RunRecord, group: GroupsRecord) -> str:
    """What stands in a column: what is left, or how near attacks without a radius got."""
    place = name_case(record, group)
    if not is_measured(group):
        return place
    return f"median {MEASURES.get(group.threat.norm, 'distance')}, {place}"


def is_measured(group: GroupsRecord) -> bool:
    """Whether a threat has no radius, so that what tells groups apart is how near attacks got."""
    return any(row.beyond is not None for row in group.rows)


def write_case(group: GroupsRecord, row: GroupRow) -> str:
    """What is left of a group; without a radius how near attacks got."""
    held, mark = row.robust_accuracy, " *" if is_below(row) else ""
    if not is_measured(group):
        return formatting.format_rate(held) + mark
    near = formatting.format_quantity(row.distance) + mark
    return f"{near}; {formatting.format_percent(held)} hold" if held.k else near


def write_worst(record: RunRecord, group: GroupsRecord) -> Iterator[str]:
    """The worst class or slice under a threat, held against the rest; nothing of one group."""
    count = count_known(group)
    noun = "class" if group.kind == "class" else f"value of {group.by}"
    plural = "classes" if group.kind == "class" else f"values of {group.by}"
    place = name_case(record, group)
    if count < 2:
        return
    if group.worst is None or group.rest is None:
        k = sum(row.robust_accuracy.k for row in group.rows)
        if not k and group.threat.eps is not None:
            yield f"No image of any of the {count:,} {plural} holds at {place}."
        return
    row = group.rows[group.worst]
    shown = f"{describe_row(row)}; of the others {formatting.format_percent(group.rest)}"
    test = f"{show_p(row.p_holm or 0.0)}, Holm over {count:,} {plural}"
    below = [other.name for other in group.rows if is_below(other) and other is not row]
    if is_below(row):
        others = f" Also below: {list_few(below)}." if below else ""
        yield f"Worst {noun} at {place}: {shown}, and not by chance: {test}.{others}"
        return
    alike = [each for each in group.rows if each.compared.n and each is not row]
    ties = sum(each.compared.value == row.compared.value for each in alike)
    also = f" ({ties:,} more {'is' if ties == 1 else 'are'} as low)" if ties else ""
    yield f"Lowest {noun} at {place}{also}: {shown}, which chance explains: {test}."


def write_brief(record: RunRecord, groups: Sequence[GroupsRecord]) -> Iterator[str]:
    """The worst class or slice where one is below the others; the rest for all threats at once."""
    plural = "classes" if groups[0].kind == "class" else f"values of {groups[0].by}"
    fallen, alike = [], []
    for group in groups:
        if group.worst is not None and is_below(group.rows[group.worst]):
            yield from write_worst(record, group)
        elif group.worst is not None:
            alike.append(name_case(record, group))
        elif list(write_worst(record, group)):
            fallen.append(name_case(record, group))
    count = f"{count_known(groups[0]):,} {plural}"
    if fallen:
        yield f"No image of any of the {count} holds at {'; '.join(fallen)}."
    if alike:
        yield (
            f"None of the {count} is below the others by more than chance explains (Holm) at"
            f" {'; '.join(alike)}."
        )


def describe_row(row: GroupRow) -> str:
    """A group with the share it is judged by."""
    rate = row.compared
    share = f"{formatting.format_rate(rate)} of {formatting.format_count(rate.n, 'image')}"
    if row.beyond is None:
        return f"{row.name}, {share}"
    near = formatting.format_quantity(row.distance)
    return f"{row.name}, median {near}, with {share} beyond the median of all"


def list_few(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def find_commonest(record: RunRecord, group: GroupsRecord) -> dict[int, str]:
    """For each class what it is taken for most often, by its number."""
    for turned in record.turned:
        if (turned.threat, turned.defense) == (group.threat, group.defense):
            found: dict[int, str] = {}
            for pair in turned.pairs:  # the most frequent first
                found.setdefault(pair.label, f"{pair.becomes_name} ({pair.k:,})")
            return found
    return {}


def write_turns(record: RunRecord) -> Iterator[str]:
    """What classes become most often under the first threat, in a sentence."""
    for turned in islice(list_overall(record), 1):
        if not turned.pairs:
            continue
        right = count_by_class(record.groups, turned)
        named = [
            f"{pair.name} for {pair.becomes_name} ({pair.k:,} of {right.get(pair.label, 0):,})"
            for pair in turned.pairs[:NAMED]
        ]
        more = len(turned.pairs) > NAMED or turned.left_out
        place = name_case(record, turned)
        yield f"Taken most often at {place}: {', '.join(named)}{', and others' if more else ''}."


def list_overall(record: RunRecord) -> Iterator[TurnedRecord]:
    """Of each threat and defense what all attacks together turn classes into."""
    met = set()
    for turned in record.turned:
        if (turned.threat, turned.defense) not in met:
            met.add((turned.threat, turned.defense))
            yield turned


def build_turned_tables(record: RunRecord) -> Iterator[TurnedTable]:
    """What attacks turn classes into: as a matrix where classes are few, else the pairs."""
    if explain_missing_number(record) or not any(g.kind == "class" for g in record.groups):
        return
    overall = list(list_overall(record))
    for turned in record.turned:
        if not turned.pairs:
            continue
        place = name_case(record, turned)
        knows = "" if turned.adaptive or turned.defense is None else ", oblivious"
        what = f"{turned.attack}{knows}" if turned.attack else "nearest success of all attacks"
        title = f"{what}, {place}"
        right = count_by_class(record.groups, turned)
        names = {row.label: row.name for row in turned.pairs}
        names |= {row.becomes: row.becomes_name for row in turned.pairs}
        for group in record.groups:
            if group.kind == "class":
                names |= {row.label: row.name for row in group.rows if row.label is not None}
                break
        first = any(turned is each for each in overall)
        if len(names) <= MATRIX and not turned.left_out:
            yield build_matrix(title, turned, dict(sorted(names.items())), right, first)
        else:
            yield build_pairs(title, turned, right, first)


def build_matrix(
    title: str, turned: TurnedRecord, names: dict[int, str], right: dict[int, int], overall: bool
) -> TurnedTable:
    """Each class against each: what images of the row become; on the diagonal those that hold."""
    counts = {(pair.label, pair.becomes): pair.k for pair in turned.pairs}
    # logits that are not finite are a column, and no class of images
    columns = sorted(names, key=lambda label: (label < 0, label))
    rows, shades = [], []
    for label in (label for label in columns if label in right):
        fooled = sum(k for (true, _), k in counts.items() if true == label)
        made = {**{(label, other): 0 for other in columns}, **counts}
        made[label, label] = right[label] - fooled
        cells = [made[label, other] for other in columns]
        rows.append((names[label], [f"{k:,}" if k else "·" for k in cells]))
        shades.append([min(9, 10 * k // max(right[label], 1)) for k in cells])
    return TurnedTable(
        title,
        ["", *(names[label] for label in columns)],
        rows,
        shades,
        "Images that were right, by their class (row) and what they are taken for (column); on"
        " the diagonal those that stay right.",
        overall,
    )


def build_pairs(
    title: str, turned: TurnedRecord, right: dict[int, int], overall: bool
) -> TurnedTable:
    """The most frequent pairs of classes."""
    rows = [
        (pair.name, [pair.becomes_name, f"{pair.k:,}", f"{right.get(pair.label, 0):,}"])
        for pair in turned.pairs[:SHOWN_PAIRS]
    ]
    left = turned.fooled - sum(pair.k for pair in turned.pairs[:SHOWN_PAIRS])
    rest = f" {left:,} more images became others." if left else ""
    return TurnedTable(
        title,
        ["class", "taken for", "images", "of those right"],
        rows,
        [],
        f"Pairs of classes, the most frequent first.{rest}",
        overall,
    )
