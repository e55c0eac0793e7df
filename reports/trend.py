"""One network over time: what stored baselines and earlier runs held, beside this run.

A line is of one question: clean accuracy, or the worst case of the same attacks with the same
settings. What was asked otherwise has no point, and the reason is said. From the first point to
the last the change is tested on pairs, where both are of the same images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from robusteval.errors import RobustevalError, UsageError
from robusteval.runs import metrics, statistics
from robusteval.runs.folder import load_run
from robusteval.runs.reading import check_amount
from robusteval.runs.types import Flags, Run, Threat

from . import formatting
from .baseline import (
    Baseline,
    BaselineCell,
    build_baseline,
    collect_verdicts,
    find_robust,
    has_same_images,
    order_by_id,
)
from .baseline_file import read_baseline
from .compare import compute_p
from .gate_measures import is_held_to_floors
from .gate_tests import show_p, show_points
from .measures import build_rate, build_threat
from .trend_record import TrendChange, TrendLine, TrendPoint, TrendRecord

MOST = 200  # points of a line
HERE = "this run"
LEVEL = 0.05  # of a corrected p-value, below which a change is not by chance


class Moment(NamedTuple):
    """Verdicts, and what they are called."""

    name: str
    verdicts: Baseline


class TrendTable(NamedTuple):
    """A row for each moment, a column for each line, as text."""

    columns: list[str]
    rows: list[tuple[str, list[str]]]
    lines: list[str]


def read_history(places: Sequence[Path], here: Path | None = None) -> list[Moment]:
    """The baselines and runs in these files and folders but `here`, the folder of the run itself.

    An error if one is neither, or cannot be used; its message begins with the name.
    """
    found: list[Moment] = []
    for place in places:
        if place.is_dir() and not (place / "run.json").exists():
            inner = sorted(
                each
                for each in place.iterdir()
                if each.suffix == ".json" or (each / "run.json").exists()
                if not is_place(each, here)
            )
            if not inner:
                raise UsageError(
                    f"{place} holds neither baselines nor other runs: give files that `robusteval"
                    " baseline update` wrote, run folders, or a folder of them"
                )
            check_amount(str(place), len(inner), MOST, "baselines and runs")
            found += map(read_moment, inner)
        else:
            found.append(read_moment(place))
    check_amount("--history", len(found), MOST, "baselines and runs")
    return found


def is_place(place: Path, here: Path | None) -> bool:
    """Whether both are the same folder; a folder of runs may hold the one that is reported."""
    return here is not None and place.resolve() == here.resolve()


def read_moment(place: Path) -> Moment:
    """One baseline or run; an error if the run is not finished, or not to be used."""
    if not place.is_dir():
        return Moment(place.name, read_baseline(place))
    run = load_run(place)
    try:
        return Moment(place.resolve().name, build_baseline(run))
    except RobustevalError as error:
        raise type(error)(f"{place}: {error}") from error


def build_trend(run: Run, history: Sequence[Moment]) -> TrendRecord | None:
    """What was held over time; None without a history."""
    if not history or not run.clean:
        return None
    here = Moment(HERE, collect_verdicts(run))
    moments = sorted([*history, here], key=lambda moment: moment.verdicts.created)
    lines = [build_line(None, None, moments, here)]
    for threat, defense in list_cases(here.verdicts):
        lines.append(build_line(threat, defense, moments, here))
    known = [line.change for line in lines if line.change is not None]
    corrected = iter(statistics.holm([change.p_holm for change in known]))
    lines = [
        replace(line, change=replace(line.change, p_holm=next(corrected))) if line.change else line
        for line in lines
    ]
    return TrendRecord(tuple(lines), tuple(list_notes(lines, moments, here)))


def list_cases(here: Baseline) -> list[tuple[Threat, str | None]]:
    """The worst cases of a run within a radius: an attack without one leaves nothing to follow."""
    cases = ((cell.threat, cell.defense) for cell in here.cells if is_held_to_floors(cell.threat))
    return list(dict.fromkeys(cases))


def build_line(
    threat: Threat | None, defense: str | None, moments: Sequence[Moment], here: Moment
) -> TrendLine:
    """One question over time."""
    points, held = [], []
    for moment in moments:
        verdicts = find_verdicts(threat, defense, moment.verdicts, here.verdicts)
        same = is_of_same_data(moment.verdicts, here.verdicts)
        points.append(
            TrendPoint(
                moment.name,
                moment.verdicts.created,
                moment.verdicts.model.sha256,
                None if verdicts is None else build_rate(metrics.rate(verdicts)),
                same,
            )
        )
        if verdicts is not None and same:
            held.append((moment.name, verdicts[order_by_id(moment.verdicts.ids)]))
    change = None
    if len(held) > 1:
        pairs = statistics.count_pairs(held[0][1], held[-1][1])
        low, high = pairs.interval
        change = TrendChange(held[0][0], 0 - pairs.drop, 0 - high, 0 - low, compute_p(pairs))
    shown = None if threat is None else build_threat(threat)
    return TrendLine(shown, defense, tuple(points), change)


def is_of_same_data(there: Baseline, here: Baseline) -> bool:
    """Whether both are of the same images with the same labels."""
    return has_same_images(there, here) and there.data.sha256 == here.data.sha256


def find_verdicts(
    threat: Threat | None, defense: str | None, there: Baseline, here: Baseline
) -> Flags | None:
    """The verdicts ``(n,)`` on a question of this run; None if it was not asked in this way."""
    if threat is None:
        return there.clean
    wanted = [cell for cell in here.cells if (cell.threat, cell.defense) == (threat, defense)]
    found = [find_twin(cell, there) for cell in wanted]
    known = [cell for cell in found if cell is not None]
    return find_robust(known) if len(known) == len(wanted) else None


def find_twin(cell: BaselineCell, there: Baseline) -> BaselineCell | None:
    """The same attack with the same settings."""
    return next((other for other in there.cells if other.settings == cell.settings), None)


def list_notes(
    lines: Sequence[TrendLine], moments: Sequence[Moment], here: Moment
) -> Iterator[str]:
    """What stands in the way of a point, or of a pair."""
    for i, moment in enumerate(moments):
        lacking = [name_line(line) for line in lines if line.points[i].accuracy is None]
        if lacking:
            yield f"{moment.name} has not the same attacks for {', '.join(lacking)}."
        if not lines[0].points[i].same_images:
            yield f"{moment.name} is of other images: its points stand, and are not paired."
        theirs, ours = moment.verdicts.model.arch, here.verdicts.model.arch
        if theirs != ours:
            yield f"{moment.name} is of another architecture, {theirs}."


def name_line(line: TrendLine) -> str:
    """What a line is of."""
    if line.threat is None:
        return "clean accuracy"
    return formatting.format_place(line.threat, line.defense)


def build_trend_table(trend: TrendRecord) -> TrendTable:
    """The trend as text."""
    rows = []
    for i, point in enumerate(trend.lines[0].points):
        rates = (line.points[i].accuracy for line in trend.lines)
        model = (point.model or "")[:12] or formatting.MISSING
        cells = [formatting.format_rate(rate) if rate else formatting.MISSING for rate in rates]
        rows.append((f"{point.created[:10]} {point.name}".strip(), [model, *cells]))
    return TrendTable(
        ["weights", *map(name_line, trend.lines)],
        rows,
        [*filter(None, map(write_change, trend.lines)), *trend.notes],
    )


def write_change(line: TrendLine) -> str:
    """By how much a line rose or fell, in a sentence; empty where nothing can be paired."""
    change = line.change
    if change is None:
        return ""
    about = name_line(line) if line.threat is None else f"robust accuracy at {name_line(line)}"
    if not change.difference:
        return f"Since {change.since} {about} is where it was."
    moved = (
        f"{'rose' if change.difference > 0 else 'fell'} by {show_points(abs(change.difference))}"
    )
    ends = formatting.format_ends(change.low, change.high)
    said = "not by chance" if change.p_holm < LEVEL else "which chance explains"
    return (
        f"Since {change.since} {about} {moved} ({ends}), {said}: {show_p(change.p_holm)},"
        " McNemar's test on the same images."
    )
