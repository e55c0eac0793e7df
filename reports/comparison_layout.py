"""A comparison of two runs for people: in a terminal, and as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from heapq import nsmallest
from typing import NamedTuple

from rich.console import Console

from . import formatting
from .compare import FLAGGED, PairKind, shorten_setting
from .comparison import ComparisonRecord, FlipRow, PairRow, write_points, write_span
from .console import (
    TableColumn,
    print_facts,
    print_list,
    print_paragraph,
    print_tables,
    render_cell,
)
from .markdown import escape_code, escape_prose, list_items, render_markdown_row

LISTED = 20  # flipped images that people are shown
# as tables style them
STYLES: dict[PairKind, str] = {"clean": "clean", "attack": "attack", "worst case": "worst"}


class PairColumn(NamedTuple):
    """A column of the table of pairs."""

    title: str
    write: Callable[[PairRow], str]


RATES = (
    PairColumn("before", lambda pair: formatting.format_rate(pair.before)),
    PairColumn("after", lambda pair: formatting.format_rate(pair.after)),
)
CHANGES = (
    PairColumn("points", lambda pair: write_points(pair.difference)),
    PairColumn("95 %", write_span),
    PairColumn("lost", lambda pair: f"{pair.lost:,}"),
    PairColumn("gained", lambda pair: f"{pair.gained:,}"),
    PairColumn("p", lambda pair: write_probability(pair.p)),
    PairColumn("Holm", lambda pair: write_probability(pair.p_holm)),
)
LEGEND = (
    "Accuracy and robust accuracy with Wilson intervals, points with paired intervals (Tango),"
    " 95 %. Lost: right before, wrong after. p: exact McNemar test of each line by itself; Holm:"
    " the same, corrected for all lines."
)


def write_probability(p: float) -> str:
    """A p-value to two digits."""
    return "< 0.0001" if p < 0.0001 else f"{p:.2g}"


def group_pairs(record: ComparisonRecord) -> dict[str, list[PairRow]]:
    """The pairs below their headings: clean images, then threat by threat and defense."""
    found: dict[str, list[PairRow]] = {}
    for pair in record.pairs:
        found.setdefault(pair.group, []).append(pair)
    return found


def describe_flips(record: ComparisonRecord) -> list[str]:
    """Each image that flipped, in words: lost ones first, those that flipped most often first."""
    times: dict[tuple[bool, str, int], list[tuple[PairRow, FlipRow]]] = {}
    for pair in record.pairs:
        for flip in pair.flipped:
            times.setdefault((not flip.lost, flip.id, flip.index), []).append((pair, flip))
    first = nsmallest(LISTED, times, key=lambda which: (which[0], -len(times[which]), which))
    said = [describe_flip(times[which], record.class_names) for which in first]
    left = len(times) - len(said)
    if left:
        said.append(f"and {formatting.format_count(left, 'more image')}: all are in the JSON form")
    return said


def describe_flip(
    found: Sequence[tuple[PairRow, FlipRow]], class_names: Sequence[str] | None
) -> str:
    """An image and what became of it."""
    pair, flip = found[0]
    more = f", and in {len(found) - 1} more" if len(found) > 1 else ""
    where = pair.caption if pair.defense is None else f"{pair.caption} behind {pair.defense}"
    label, before, after = (
        name_class(number, class_names) for number in (flip.label, flip.before, flip.after)
    )
    return (
        f"{'lost' if flip.lost else 'gained'}: image {flip.index} ({flip.id}), class {label}:"
        f" {before} before, {after} after; {where}{more}"
    )


def name_class(label: int, class_names: Sequence[str] | None) -> str:
    """A class with its name, if that says more than its number."""
    if label < 0:
        return "alarm" if label == FLAGGED else "not finite"
    known = class_names[label] if class_names and label < len(class_names) else str(label)
    return str(label) if known == str(label) else f"{label} ({shorten_setting(known)})"


def describe_sides(record: ComparisonRecord) -> Iterator[tuple[str, str]]:
    """Both sides in words."""
    for when, side in (("before", record.before), ("after", record.after)):
        file, arch = formatting.name_file(side.model.get("file")), side.model.get("arch")
        yield (
            when,
            formatting.join_parts(
                side.name, file, formatting.format_hash(side.model), arch, side.created
            ),
        )


def print_comparison(record: ComparisonRecord, console: Console) -> None:
    """Print the comparison; text from outside is shown, never interpreted."""
    print_paragraph(console, record.verdict, "bold red" if record.doubtful else "bold")
    names: list[tuple[str, str]] = []
    pairs: list[PairRow | None] = []
    for common, below in group_pairs(record).items():
        names.append((common, "threat"))
        names += [(pair.caption, STYLES[pair.kind]) for pair in below]
        pairs += [None, *below]
    sides = [
        [
            TableColumn(
                column.title,
                [render_cell(console, column.write(pair) if pair else "") for pair in pairs],
            )
            for column in columns
        ]
        for columns in (RATES, CHANGES)
    ]
    print_tables(console, names, sides)
    console.print()
    print_paragraph(console, LEGEND, "dim")
    print_list(console, "Flipped images", [f"- {line}" for line in describe_flips(record)])
    print_list(console, "Not compared", [f"- {line}" for line in record.unpaired])
    print_list(console, "Remarks", [f"- {line}" for line in record.remarks])
    print_facts(console, describe_sides(record))


def render_comparison_markdown(record: ComparisonRecord) -> str:
    """The comparison as a Markdown document; text from outside cannot become markup."""
    return "\n".join(list_markdown_lines(record)) + "\n"


def list_markdown_lines(record: ComparisonRecord) -> Iterator[str]:
    """The lines of the document."""
    columns = RATES + CHANGES
    yield f"**{escape_prose(record.verdict)}**"
    yield ""
    yield render_markdown_row(["", *(escape_prose(column.title) for column in columns)])
    yield render_markdown_row([":--", *(["--:"] * len(columns))])
    for common, pairs in group_pairs(record).items():
        yield render_markdown_row([f"**{escape_prose(common)}**", *([""] * len(columns))])
        for pair in pairs:
            name = (
                escape_code(pair.caption) if pair.kind == "attack" else escape_prose(pair.caption)
            )
            yield render_markdown_row(
                [name, *(escape_prose(column.write(pair)) for column in columns)]
            )
    yield from ("", escape_prose(LEGEND))
    yield from list_items("Flipped images", describe_flips(record))
    yield from list_items("Not compared", record.unpaired)
    yield from list_items("Remarks", record.remarks)
    yield from list_items(
        "Where this comes from", (f"{when}: {said}" for when, said in describe_sides(record))
    )
