"""Several runs as one table: models against attacks, with what differs from the first model.

Differences are paired, image by image, so they are given only where two runs looked at the same
images in the same way; where they did not, the reason stands in their place. p-values are those
of McNemar's exact test, corrected by Holm's method over the whole table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Annotated, NamedTuple

from robusteval.errors import NothingEvaluated, RunError, UsageError
from robusteval.runs import metrics, statistics
from robusteval.runs.storage import digest
from robusteval.runs.types import Flags, Run, name_cell

from . import formatting
from .compare import check_comparable, compute_p, group_outcomes, identify_question, order_images
from .corruptions import compare_corruption_means
from .formatting import format_threat
from .measures import CORRUPTION, RateRecord, build_rate, build_threat

LONGEST, TAIL = 24, 6  # characters of a model's name, and those behind an ellipsis
SINGLE = " Single corruptions, to which Holm's method applies too, stand below and in JSON."
LEVEL = 0.05  # of a corrected p-value, below which a difference is marked


@dataclass(frozen=True)
class PairedRecord:
    """By how much a rate differs from that of the first model, on the same images."""

    difference: float
    low: Annotated[float, "of the score interval at 95 % (Tango)"]
    high: float
    p_holm: Annotated[float, "exact McNemar test, corrected over the table"]


@dataclass(frozen=True)
class ModelCell:
    """What is left of one model."""

    accuracy: Annotated[RateRecord | None, "null: this run did not ask that"]
    paired: Annotated[PairedRecord | None, "null: the first model, or not comparable"]


@dataclass(frozen=True)
class QuestionRow:
    """One attack, or none, on all models."""

    question: str
    kind: Annotated[str, "clean, attack, corruption (one of several) or worst case"]
    cells: tuple[ModelCell, ...]


@dataclass(frozen=True)
class ModelsRecord:
    """Models against attacks; differences are from the first."""

    models: tuple[str, ...]
    rows: tuple[QuestionRow, ...]
    corruptions: Annotated[tuple[str, ...], "mean accuracy under corruptions, beside the first"]
    unpaired: Annotated[tuple[str, ...], "why a model is not compared with the first"]


class Question(NamedTuple):
    """What a run answers for each image: whether it is right, or stays so."""

    text: str
    kind: str
    right: Flags  # (n,), in the order of the images' content


class ModelsTable(NamedTuple):
    """The table as text: of each row its name, its kind, and a cell of lines for each model."""

    title: str
    lead: list[str]
    columns: tuple[str, ...]
    rows: list[tuple[str, str, list[tuple[str, ...]]]]
    note: str


def build_models(runs: Sequence[Run]) -> ModelsRecord:
    """The record of several runs, the first of which is what the others are held against."""
    runs = [run.keep_different() for run in runs]
    names = name_models(runs)
    asked = [list_questions(run) for run in runs]
    reasons = [None, *(find_obstacle(runs[0], run) for run in runs[1:])]
    keys = list(dict.fromkeys(key for questions in asked for key in questions))
    made = {
        (key, i): build_cell(asked[0].get(key), questions.get(key), i > 0 and reasons[i] is None)
        for i, questions in enumerate(asked)
        for key in keys
    }
    paired = [place for place, cell in made.items() if cell.paired is not None]
    known = [cell.paired for cell in made.values() if cell.paired is not None]
    corrected = statistics.holm([each.p_holm for each in known])
    for place, each, p in zip(paired, known, corrected, strict=True):
        made[place] = replace(made[place], paired=replace(each, p_holm=p))
    first = {key: question for questions in reversed(asked) for key, question in questions.items()}
    rows = tuple(
        QuestionRow(first[key].text, first[key].kind, tuple(made[key, i] for i in range(len(runs))))
        for key in keys
    )
    unpaired = tuple(
        f"{name} is not compared with {names[0]}: {reason}."
        for name, reason in zip(names, reasons, strict=True)
        if reason is not None
    )
    means = tuple(
        f"{change.name}: {names[0]} {100 * change.old:.1f} %, {name} {100 * change.new:.1f} %,"
        f" {change.text}."
        for name, run, reason in zip(names[1:], runs[1:], reasons[1:], strict=True)
        if reason is None
        for change in compare_corruption_means(runs[0], run)
        if change.cells > 1
    )
    return ModelsRecord(tuple(names), rows, means, unpaired)


def name_models(runs: Sequence[Run]) -> list[str]:
    """A name for each model, no two the same: its file, with type or folder of its run if need be.

    Columns are as wide as names, so long ones are shortened, unless two would look the same then.
    """
    whole = [
        formatting.name_file(run.model.get("file")) or str(run.model.get("arch") or "model")
        for run in runs
    ]
    files = [shorten_name(name) for name in whole]
    if len(set(files)) < len(set(whole)):
        files = whole
    types = [f"{file} in {find_type(run)}" for file, run in zip(files, runs, strict=True)]
    names: list[str] = []
    for run, file, typed in zip(runs, files, types, strict=True):
        folder = formatting.name_file(run.folder)
        name = f"{file} ({folder})" if folder else file
        if files.count(file) == 1:
            name = file
        elif types.count(typed) == 1:
            name = typed
        again = sum(other == name or other.startswith(f"{name} #") for other in names)
        names.append(f"{name} #{again + 1}" if again else name)
    return names


def find_type(run: Run) -> str:
    """What the network of a run computes in."""
    return str(run.model.get("dtype") or "float32")


def shorten_name(name: str) -> str:
    """A file's name that is long, without its suffix and what then is still too much inside."""
    if len(name) <= LONGEST:
        return name
    stem = PurePath(name).stem
    if len(stem) <= LONGEST:
        return stem
    return f"{stem[: LONGEST - TAIL - 1]}…{stem[-TAIL:]}"


def list_questions(run: Run) -> dict[str, Question]:
    """What a run says of its images, by what was asked; nothing of a run without images."""
    if not run.clean or not len(run.clean["id"]):
        return {}
    order = order_images(run.clean)
    right = metrics.find_right(run.clean)
    found = {"clean": Question("images as they are", "clean", right[order])}
    groups = sorted(group_outcomes(run).items(), key=lambda each: each[0][0].norm == CORRUPTION)
    for (threat, defense), group in groups:
        keys = [identify_question(outcome) for outcome in group]
        kind = "corruption" if threat.norm == CORRUPTION and len(group) > 1 else "attack"
        for key, outcome in zip(keys, group, strict=True):
            text = name_cell(outcome.attack, outcome.defense, outcome.adaptive)
            held = outcome.attacked & ~outcome.success()
            found[key] = Question(text, kind, held[order])
        if len(group) > 1:
            behind = "" if defense is None else f" behind {defense}"
            held = group[0].attacked & ~metrics.find_breaks(group).any(0)
            which = "right under all" if threat.norm == CORRUPTION else "worst case"
            text = f"{which} of {len(group)}, {format_threat(build_threat(threat))}{behind}"
            found[digest(sorted(keys))] = Question(text, "worst case", held[order])
    return found


def find_obstacle(first: Run, other: Run) -> str | None:
    """Why two runs cannot be compared image by image; None if they can."""
    try:
        check_comparable(first, other)
    except (UsageError, RunError, NothingEvaluated) as error:
        return error.message.rstrip(".")
    return None


def build_cell(first: Question | None, mine: Question | None, pairs: bool) -> ModelCell:
    """What is left of a model, held against the first where that is possible."""
    if mine is None:
        return ModelCell(None, None)
    accuracy = build_rate(metrics.rate(mine.right))
    if first is None or not pairs:
        return ModelCell(accuracy, None)
    change = statistics.count_pairs(first.right, mine.right)
    low, high = change.interval
    return ModelCell(accuracy, PairedRecord(0 - change.drop, 0 - high, 0 - low, compute_p(change)))


def build_models_table(record: ModelsRecord) -> ModelsTable:
    """Models against attacks as text."""
    first = record.models[0]
    apart = any(row.kind == "corruption" for row in record.rows)
    return ModelsTable(
        title="Models against attacks, images that stay right",
        lead=list(write_differences(record)),
        columns=record.models,
        rows=[
            (row.question, row.kind, [write_cell(cell) for cell in row.cells])
            for row in record.rows
            if row.kind != "corruption"
        ],
        note=(
            "With the Wilson 95 % interval; below it by how many points it differs from"
            f" {first} on the same images (Tango's 95 % interval for pairs), marked * where"
            " McNemar's test, corrected by Holm over the table, is below 5 %."
            + "".join(f" {sentence}" for sentence in (*record.corruptions, *record.unpaired))
            + (SINGLE if apart else "")
        ),
    )


def write_differences(record: ModelsRecord) -> Iterator[str]:
    """Of each other model where it keeps more, or fewer, images right than the first, in words."""
    shown = [row for row in record.rows if row.kind != "corruption"]
    for i, name in enumerate(record.models[1:], start=1):
        known = [(row, cell) for row in shown if (cell := row.cells[i].paired) is not None]
        if not known:
            continue
        sure = [(row, cell) for row, cell in known if cell.p_holm < LEVEL]
        more = [each for each in sure if each[1].difference > 0]
        fewer = [each for each in sure if each[1].difference < 0]
        said = [
            f"{word} in {len(rows)} of {len(known)} rows ({write_widest(rows)})"
            for word, rows in (("more images right", more), ("fewer images right", fewer))
            if rows
        ]
        if not said:
            where = f" in each of {len(known)} rows" if len(known) > 1 else ""
            said = [f"as many images right{where}, as far as can be told"]
        yield f"Beside {record.models[0]}, {name} keeps {', '.join(said)}."


def write_widest(rows: Sequence[tuple[QuestionRow, PairedRecord]]) -> str:
    """The row in which two models differ most."""
    row, cell = max(rows, key=lambda each: abs(each[1].difference))
    most = "most: " if len(rows) > 1 else ""
    ends = formatting.format_ends(cell.low, cell.high)
    return f"{most}{row.question}, {100 * cell.difference:+.1f} points, {ends}"


def write_cell(cell: ModelCell) -> tuple[str, ...]:
    """The lines of a cell: a rate, and what differs."""
    if cell.accuracy is None:
        return (formatting.MISSING,)
    rate, paired = formatting.format_rate(cell.accuracy), cell.paired
    if paired is None:
        return (rate,)
    ends = formatting.format_ends(paired.low, paired.high)
    mark = " *" if paired.p_holm < LEVEL else ""
    return (rate, f"{100 * paired.difference:+.1f} ({ends}){mark}")
