"""The tables of attacks: an attack a row, and attacks against defenses.

Everything here is plain text and may hold names from outside; each format escapes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from .corruptions import has_table
from .formatting import (
    format_decibels,
    format_duration,
    format_passes,
    format_percent,
    format_points,
    format_quantity,
    format_rate,
    format_similarity,
    format_threat,
)
from .measures import CORRUPTION, RateRecord
from .record import AttackRow, DefenseRow, RunRecord, WorstCaseRow
from .sentences import format_short_place, list_knowledge, name_worst

Measured = AttackRow | WorstCaseRow


class AttackColumn(NamedTuple):
    """A column of the table of attacks."""

    title: str
    write: Callable[[Measured], str]
    left: bool = False


class AttackLine(NamedTuple):
    """A row: an attack, the worst case of several, or (without numbers) a threat."""

    title: str
    kind: str  # "threat", "attack", "worst"
    numbers: Measured | None
    note: str = ""


class MatrixCell(NamedTuple):
    """A number of the matrix, and what must be known of it."""

    number: str
    note: str = ""


class MatrixRow(NamedTuple):
    """A row of the matrix: for each of its columns the cells that stand there."""

    title: str
    kind: str  # "clean", "threat", "attack", "worst"
    cells: list[list[MatrixCell]]


def list_told_cases(record: RunRecord) -> list[WorstCaseRow]:
    """The threats of these tables: all but corruptions that have a table of their own."""
    apart = {found.defense for found in record.corruptions if has_table(found)}
    return [
        case
        for case in record.worst_cases
        if case.threat.norm != CORRUPTION or case.defense not in apart
    ]


def list_attack_lines(record: RunRecord) -> Iterator[AttackLine]:
    """The rows of the table of attacks, threat by threat."""
    for case in list_told_cases(record):
        yield AttackLine(format_short_place(record, case), "threat", None)
        for row in record.attacks:
            if (row.threat, row.defense) == (case.threat, case.defense):
                note = "" if row.adaptive else "oblivious"
                yield AttackLine(row.spec, "attack", row, note)
        if len(case.attacks) > 1:
            yield AttackLine(name_worst(case), "worst", case)


def build_defense_matrix(record: RunRecord) -> tuple[list[str], list[MatrixRow]]:
    """Attacks against defenses: the titles of the columns, and the rows."""
    defenses: dict[str | None, DefenseRow] = {d.spec: d for d in record.defenses}
    columns = list(dict.fromkeys([None, *defenses, *(c.defense for c in record.worst_cases)]))
    clean: list[RateRecord | None] = [
        defenses[c].clean_accuracy if c in defenses else None for c in columns
    ]
    clean[0] = record.clean_accuracy
    rows = [
        MatrixRow(
            "clean accuracy",
            "clean",
            [[MatrixCell(format_rate(rate))] if rate else [] for rate in clean],
        ),
        MatrixRow("clean cost", "clean", [build_cost_cells(defenses.get(c)) for c in columns]),
    ]
    told = list_told_cases(record)
    for at in dict.fromkeys(case.threat for case in told):
        rows.append(MatrixRow(format_threat(at), "threat", []))
        here = [row for row in record.attacks if row.threat == at]
        for spec in dict.fromkeys(row.spec for row in here):
            same = [row for row in here if row.spec == spec]
            rows.append(
                MatrixRow(spec, "attack", [build_accuracy_cells(record, same, c) for c in columns])
            )
        worst = [case for case in told if case.threat == at]
        if any(len(case.attacks) > 1 for case in worst):
            rows.append(
                MatrixRow(
                    name_worst(worst[0]),
                    "worst",
                    [build_accuracy_cells(record, worst, c) for c in columns],
                )
            )
    return [column or "undefended" for column in columns], rows


def build_cost_cells(defense: DefenseRow | None) -> list[MatrixCell]:
    """What a defense costs on clean images."""
    if defense is None:
        return []
    paid = defense.clean_cost
    return [MatrixCell(format_points(paid.value), f"{paid.lost:,} lost, {paid.gained:,} gained")]


def build_accuracy_cells(
    record: RunRecord, rows: Sequence[AttackRow | WorstCaseRow], defense: str | None
) -> list[MatrixCell]:
    """Robust accuracy behind one defense, and what the attacks knew."""
    return [
        MatrixCell(
            format_rate(row.robust_accuracy.float),
            ", ".join(list_knowledge(record, row)) or show_knowledge(row),
        )
        for row in rows
        if row.defense == defense
    ]


def choose_strength_columns(record: RunRecord) -> tuple[AttackColumn, ...]:
    """The columns that tell how strong attacks were; marginal gain only beside another.

    Where there is a matrix, it has the first two.
    """
    attacked = [case for case in record.worst_cases if case.threat.norm != CORRUPTION]
    several = any(len(case.attacks) > 1 for case in attacked)
    columns: tuple[AttackColumn, ...] = STRENGTH if several else STRENGTH[:-1]
    if not attacked:  # where nobody attacks nothing is robust
        columns = tuple(each._replace(title=each.title.removeprefix("robust ")) for each in columns)
    return columns[2:] if record.defenses else columns


def choose_cost_columns(record: RunRecord) -> tuple[AttackColumn, ...]:
    """The columns that tell what attacks changed and took, as their threats measure it."""
    norms = {case.threat.norm for case in list_told_cases(record)}
    counted = VALUES if norms & COUNTED else ()
    if any(row.spec.partition(":")[0] in SPARING for row in record.attacks):
        counted = COUNTS  # beside those that change everything
    return (
        SUCCESS._replace(title="made wrong") if norms == {CORRUPTION} else SUCCESS,
        *(DISTANCE if norms - COUNTED - ALIKE else ()),
        *counted,
        *(SIMILARITY if norms & ALIKE else ()),
        *PRICE,
    )


def build_norm_column(
    title: str, norms: frozenset[str], write: Callable[[Measured], str]
) -> AttackColumn:
    """A column that is empty but for threats of these norms."""
    return AttackColumn(title, lambda row: write(row) if row.threat.norm in norms else "")


def show_knowledge(row: Measured) -> str:
    """What an attack sees of the model; nothing of several attacks."""
    return row.knowledge if isinstance(row, AttackRow) else ""


def show_unique_breaks(row: Measured) -> str:
    """The images that only this attack fools; nothing of several attacks."""
    if not isinstance(row, AttackRow) or row.threat.norm == CORRUPTION:
        return ""
    return f"{row.unique_breaks:,}"


# norms that count, and threats whose attacks are told by likeness
COUNTED = frozenset(("l0", "l0_pixels"))
ALIKE = frozenset(("ssim", "none", "spatial", "patch", CORRUPTION))
STRENGTH = (
    AttackColumn("knowledge", show_knowledge, left=True),
    AttackColumn("robust accuracy", lambda row: format_rate(row.robust_accuracy.float)),
    AttackColumn("after 8 bit", lambda row: format_percent(row.robust_accuracy.eight_bit)),
    AttackColumn("only this", show_unique_breaks),
)
SUCCESS = AttackColumn("success", lambda row: format_percent(row.success_rate.float))
DISTANCE = (
    AttackColumn(
        "median distance",
        lambda row: (
            "" if row.threat.norm in COUNTED | ALIKE else format_quantity(row.distance.median)
        ),
    ),
)
# attacks that are to change little of an image, though their threat does not count it
SPARING = ("refine", "strattack")
COUNTS = (
    AttackColumn("median values", lambda row: format_quantity(row.distances.l0)),
    AttackColumn("median pixels", lambda row: format_quantity(row.distances.l0_pixels)),
)
VALUES = tuple(build_norm_column(each.title, COUNTED, each.write) for each in COUNTS)
SIMILARITY = (
    build_norm_column("mean SSIM", ALIKE, lambda row: format_similarity(row.distances.ssim)),
    build_norm_column("mean PSNR", ALIKE, lambda row: format_decibels(row.distances.psnr)),
)
PRICE = (
    AttackColumn("forward / back", lambda row: format_passes(row.cost)),
    AttackColumn("time", lambda row: format_duration(row.cost.seconds)),
)


def write_legend(record: RunRecord) -> str:
    """What the columns mean."""
    alone = any(column.title == "only this" for column in choose_strength_columns(record))
    kinds = {defense.kind for defense in record.defenses}
    said = (
        record.left_out,
        "Intervals: Wilson, 95 %.",
        "“Only this”: images that no other attack of the same threat fools." if alone else "",
        KNOWN if kinds else "",
        ALARMS if "detector" in kinds else "",
        "Distances and likeness: of successes, pixels in [0, 1]. Passes: per attacked image.",
    )
    return " ".join(filter(None, said))


KNOWN = (
    "Adaptive: the attack knew the defense; oblivious: it did not. Clean cost: accuracy lost on"
    " images as they are, against undefended."
)
ALARMS = (
    "Behind a detector, an attacked image that raises an alarm is robust, an image as it is that"
    " raises one is wrong. An attack that asks the detector goes no further than below its"
    " threshold: its AUC is no worst case."
)
