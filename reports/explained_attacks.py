"""What several attacks do to the same images, side by side: in a terminal, as JSON and HTML.

Text from outside is shown, never interpreted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from rich.console import Console

from robusteval.runs.explanation_record import ExplanationComparison, ExplanationRecord
from robusteval.runs.types import spell_json

from . import formatting
from .console import print_facts, print_heading, print_list, print_paragraph
from .explanation import (
    MEANS,
    describe_source,
    print_columns,
    write_mean,
    write_mean_share,
    write_two_digits,
)
from .explanation_charts import draw_comparison
from .measures import to_json_types

TYPES = ("suppression", "balanced", "promotion")


class ComparedRows(NamedTuple):
    """A table of attacks: what it is about, the heads of its columns, a row for each, a note."""

    title: str
    heads: tuple[str, ...]
    rows: list[tuple[str, ...]]
    note: str


def render_comparison_of_attacks(comparison: ExplanationComparison) -> str:
    """The record as JSON text, ASCII only; what is not finite is null."""
    return spell_json(json.dumps(to_json_types(comparison), indent=1, allow_nan=False)) + "\n"


def write_attacks_verdict(comparison: ExplanationComparison) -> str:
    """How many images each attack has fooled, in one sentence."""
    images = formatting.format_count(len(comparison.attacks[0].images), "image")
    fooled = ", ".join(str(record.samples.fooled) for record in comparison.attacks)
    count = formatting.format_count(len(comparison.attacks), "attack")
    return f"{count} on the same {images} that the network had right: {fooled} fooled."


def list_attack_lines(comparison: ExplanationComparison) -> list[str]:
    """The attacks with the numbers that tables call them by."""
    return [f"{i}  {record.attack}" for i, record in enumerate(comparison.attacks, 1)]


def build_region_rows(comparison: ExplanationComparison) -> ComparedRows:
    """The types of regions, attack by attack."""
    rows: list[tuple[str, ...]] = [
        (str(i), *(write_mean_share(record.regions.types[name]) for name in TYPES))
        for i, record in enumerate(comparison.attacks, 1)
    ]
    told = "; ".join(f"{name}: regions that {MEANS[name]}" for name in TYPES)
    note = (
        f"Means over images with 95 % intervals, of the regions that matter. {told}."
        " The log2 ratio of promotion over suppression parts them at -1 and 1."
    )
    return ComparedRows("Types of regions (Figure 2)", ("attack", *TYPES), rows, note)


def build_focus_rows(comparison: ExplanationComparison) -> ComparedRows | None:
    """Interpretability scores, map by map and attack by attack; None without any map."""
    boxes = {(box.attack, box.map, box.view): box for box in comparison.boxes}
    gains = {(gain.attack, gain.map, gain.view): gain for gain in comparison.gains}
    places = dict.fromkeys((box.map, box.view) for box in comparison.boxes)
    if not places:
        return None
    rows: list[tuple[str, ...]] = []
    for name, view in places:
        shown = f"{name}, {'before' if view.startswith('clean') else 'after'}"
        for i, record in enumerate(comparison.attacks, 1):
            box = boxes.get((record.attack, name, view))
            if box is None:
                continue
            gain = gains.get((record.attack, name, view))
            median = write_two_digits(box.median)
            rows.append(
                (
                    shown,
                    str(i),
                    f"{median} ({write_two_digits(box.lower)}–{write_two_digits(box.upper)})",
                    count_focused(record, name, view),
                    formatting.MISSING if gain is None else write_mean(gain.difference),
                )
            )
            shown = ""
    chance = comparison.attacks[0].focus[0].chance.value
    note = (
        "The score is the norm of the change on the highest fifth of the map over the norm of all"
        f" of it; noise scores {write_two_digits(chance)}. Before: the map of the true class on the"
        " benign image; after: of the predicted class on the adversarial one. The last column is"
        " the mean difference on the images that both fool, with its 95 % interval."
    )
    heads = ("map", "attack", "median (quartiles)", "focused", "more than 1")
    return ComparedRows("Interpretability scores (Figure 5)", heads, rows, note)


def count_focused(record: ExplanationRecord, name: str, view: str) -> str:
    """On how many images a change is above all controls of one map."""
    for row in record.focus:
        if (row.map, row.view) == (name, view):
            return f"{row.focused.k} of {row.focused.n}"
    return formatting.MISSING


def build_compared_tables(comparison: ExplanationComparison) -> list[ComparedRows]:
    """All tables that have rows."""
    tables = (build_region_rows(comparison), build_focus_rows(comparison))
    return [table for table in tables if table is not None]


def print_explained_attacks(comparison: ExplanationComparison, console: Console) -> None:
    """Print what sets the attacks apart, for 80 columns."""
    print_paragraph(console, write_attacks_verdict(comparison), "bold")
    print_heading(console, "Attacks")
    for line in list_attack_lines(comparison):
        print_paragraph(console, line)
    for table in build_compared_tables(comparison):
        print_heading(console, table.title)
        print_columns(console, table.heads, table.rows)
        console.print()
        print_paragraph(console, table.note, "dim")
    print_list(console, "Remarks", [f"! {remark}" for remark in comparison.remarks])
    print_facts(console, describe_comparison(comparison))


def describe_comparison(comparison: ExplanationComparison) -> Iterator[tuple[str, str]]:
    """Where the numbers come from; the time is that of all attacks."""
    first = comparison.attacks[0]
    seconds = sum(record.provenance.seconds for record in comparison.attacks)
    return describe_source(replace(first, provenance=replace(first.provenance, seconds=seconds)))


def render_attacks_html(comparison: ExplanationComparison, folders: Sequence[str]) -> str:
    """The comparison as one HTML document without scripts; text cannot become markup.

    `folders` are those of the single attacks, beside the document.
    """
    from .html import encode_svg, open_templates

    return (
        open_templates()
        .get_template("explained_attacks.html.jinja")
        .render(
            verdict=write_attacks_verdict(comparison),
            attacks=list(zip(comparison.attacks, folders, strict=True)),
            tables=build_compared_tables(comparison),
            charts=[
                (chart.alt, encode_svg(chart.svg), encode_svg(chart.dark))
                for _, chart in draw_comparison(comparison)
            ],
            remarks=comparison.remarks,
            facts=list(describe_comparison(comparison)),
        )
    )
