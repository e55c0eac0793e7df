"""A paper reproduced: published beside measured, in a terminal, as Markdown, JSON and HTML.

Text from outside is shown, never interpreted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

from rich.console import Console
from rich.text import Text

from robusteval.analysis.papers.comparison import ComparedRow, ComparedTable, Reproduction
from robusteval.analysis.papers.measures import Measured
from robusteval.runs.types import spell_json

from . import formatting
from .console import (
    build_empty_table,
    make_printable,
    print_facts,
    print_heading,
    print_list,
    print_paragraph,
    print_trimmed,
)
from .markdown import escape_prose, list_items, render_markdown_row
from .measures import to_json_types

HEADER = ("", "published", "measured (95 %)", "n", "verdict")
MARKS = {"holds": "-", "does not hold": "!", "not decided": "-", "not measured": "-"}


class PaperLine(NamedTuple):
    """A line of a table as every format shows it."""

    cells: tuple[str, ...]  # the first its name; a number and its interval on two lines of a cell
    kind: str = ""  # the verdict, where the line has one


def render_paper_json(found: Reproduction) -> str:
    """The record as JSON text, ASCII only; what is not finite is null."""
    return spell_json(json.dumps(to_json_types(found), indent=1, allow_nan=False)) + "\n"


def format_figure(value: float, *, fine: bool = True) -> str:
    """A figure of a table to three or four digits, a small one to two of its own if `fine`."""
    if not math.isfinite(value):
        return formatting.MISSING
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if value and abs(value) < 0.0005:
        return f"{value:.1e}"
    if fine and value and abs(value) < 0.01:
        return f"{value:.2g}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.4g}"


def format_measured(found: Measured | None, *, fine: bool = True) -> str:
    """A figure with its interval, in more digits where the figure is small and `fine`."""
    if found is None or not math.isfinite(found.value):
        return formatting.MISSING
    if not (math.isfinite(found.low) and math.isfinite(found.high)):
        return f"{format_figure(found.value, fine=fine)} (no interval)"
    fine = fine and abs(found.value) < 0.01
    value, low, high = (format_figure(each, fine=fine) for each in found[:3])
    return f"{value} ({low}–{high})"


def list_reasons(table: ComparedTable) -> list[str]:
    """What the verdicts of a table rest on, each once, in order of appearance."""
    return list(dict.fromkeys(row.reason for row in table.rows if row.reason))


def list_titles(table: ComparedTable) -> tuple[str, ...]:
    """The titles of a table's columns."""
    if not table.sweep:
        return HEADER
    return ("", *dict.fromkeys(row.column for row in table.rows), "n")


def list_paper_lines(table: ComparedTable) -> Iterator[PaperLine]:
    """The lines of a table: one for each figure, or for each setting of a sweep."""
    reasons = list_reasons(table)

    def number(row: ComparedRow) -> str:
        return f" [{reasons.index(row.reason) + 1}]" if row.reason else ""

    if table.sweep:
        for name, rows in groupby(table.rows, lambda row: row.row):
            some = list(rows)
            cells = [
                # without the room of more digits in as many columns
                "\n".join(format_measured(row.measured, fine=False).rstrip(")").split(" ("))
                + (number(row) if row.measured is None else "")
                for row in some
            ]
            yield PaperLine((name, *cells, format_images(some[0])))
        return
    for row in table.rows:
        published = formatting.MISSING if row.published is None else f"{row.published:.6g}"
        cells = [published, format_measured(row.measured), format_images(row)]
        title = f"{row.row}: {row.column}"
        yield PaperLine((title, *cells, row.verdict + number(row)), row.verdict)


def format_images(row: ComparedRow) -> str:
    """How many images a figure is over."""
    return formatting.MISSING if row.measured is None else f"{row.measured.n:,}"


def summarize_paper(found: Reproduction) -> str:
    """How many figures and claims were found again, in one or two sentences."""
    rows = [row for table in found.tables for row in table.rows]
    kinds = [row.verdict for row in rows]
    compared = kinds.count("agrees") + kinds.count("differs")
    said = (
        f"{len(rows)} figures in {formatting.format_count(len(found.tables), 'table')}:"
        f" {sum(row.measured is not None for row in rows)} measured"
    )
    if compared:
        said += f", {kinds.count('agrees')} of {compared} that can be compared agree"
    else:
        said += ", none comparable with a published one"
    holds = [claim.holding for claim in found.claims]
    if holds:
        said += (
            f". Of {formatting.format_count(len(holds), 'claim')} here:"
            f" {holds.count('holds')} held, {holds.count('does not hold')} not held,"
            f" {holds.count('not decided')} not decided, {holds.count('not measured')} not measured"
        )
    tested = len(holds) - holds.count("not measured")
    if tested > 1:
        said += (
            f". Each is tested by itself at 5 %: of {tested} without any effect behind them up to"
            f" {0.05 * tested:.2g} would be decided on average"
        )
    return said + "."


def list_claims(found: Reproduction) -> list[str]:
    """The claims with what became of them, marked by it."""
    return [
        f"{MARKS[claim.holding]} {claim.text} ({claim.where}) {claim.holding.capitalize()}:"
        f" {claim.said}."
        for claim in found.claims
    ]


def list_paper_facts(found: Reproduction) -> Iterator[tuple[str, str]]:
    """Where the numbers come from."""
    model = formatting.join_parts(
        found.model.get("arch"),
        formatting.name_file(found.model.get("file")),
        formatting.format_hash(found.model),
    )
    yield "published", f"{found.source}; {found.setting}"
    yield "measured on", model
    yield (
        "images",
        f"{found.data.get('name')}, {found.images:,} drawn, {found.right:,} right;"
        f" size {found.size}, seed {found.seed}",
    )
    yield "time", formatting.format_duration(found.seconds)
    if found.command:
        yield "command", found.command


def print_paper(found: Reproduction, console: Console) -> None:
    """Print all tables, the claims and where it comes from, for 80 columns."""
    print_paragraph(console, f"{found.name}: {found.title}", "bold")
    print_paragraph(console, summarize_paper(found))
    print_list(console, "Claims", list_claims(found))
    for table in found.tables:
        print_heading(console, f"{table.name}: {table.title}")
        shown = build_empty_table()
        for title in list_titles(table):
            left = title in (HEADER[0], HEADER[-1])
            shown.add_column(title, justify="left" if left else "right", overflow="fold")
        for line in list_paper_lines(table):
            shown.add_row(*(print_cell(console, cell) for cell in line.cells))
        print_trimmed(console, shown)
        for number, reason in enumerate(list_reasons(table), 1):
            print_paragraph(console, f"[{number}] {reason}", "dim")
        if table.note:
            print_paragraph(console, table.note, "dim")
    print_list(console, "Remarks", [f"! {remark}" for remark in found.remarks])
    print_facts(console, list_paper_facts(found))


def print_cell(console: Console, cell: str) -> Text:
    """A cell, a line of it below the other."""
    return Text("\n").join(make_printable(console, line) for line in cell.split("\n"))


def render_paper_markdown(found: Reproduction) -> str:
    """The reproduction as a Markdown document."""
    return "\n".join(list_paper_markdown(found)) + "\n"


def list_paper_markdown(found: Reproduction) -> Iterator[str]:
    """Its lines."""
    yield f"## {escape_prose(found.name)}: {escape_prose(found.title)}"
    yield from ("", escape_prose(summarize_paper(found)))
    yield from list_items("Claims", (claim[2:] for claim in list_claims(found)))
    for table in found.tables:
        yield from ("", f"### {escape_prose(table.name)}: {escape_prose(table.title)}", "")
        titles = list_titles(table)
        yield render_markdown_row([escape_prose(title) for title in titles])
        yield render_markdown_row(
            ["---" if t in (HEADER[0], HEADER[-1]) else "---:" for t in titles]
        )
        for line in list_paper_lines(table):
            cells = [cell.replace("\n", ", ") for cell in line.cells]
            yield render_markdown_row([escape_prose(cell) for cell in cells])
        for number, reason in enumerate(list_reasons(table), 1):
            yield from ("", escape_prose(f"[{number}] {reason}"))
        if table.note:
            yield from ("", escape_prose(table.note))
    yield from list_items("Remarks", found.remarks)
    yield ""
    for name, value in list_paper_facts(found):
        yield f"- {name}: {escape_prose(value)}"


def render_paper_html(found: Reproduction) -> str:
    """The reproduction as one HTML document without scripts; text cannot become markup."""
    from .explanation_charts import draw_comparison
    from .html import encode_svg, open_templates
    from .paper_charts import draw_curves

    def draw_below(table: ComparedTable) -> list[tuple[str, str, str, str]]:
        return [
            (chart.alt, encode_svg(chart.svg), encode_svg(chart.dark), " and ".join(tables))
            for chart, tables in draw_curves(found, table)
        ]

    return (
        open_templates()
        .get_template("paper.html.jinja")
        .render(
            found=found,
            list_titles=list_titles,
            summary=summarize_paper(found),
            list_lines=list_paper_lines,
            list_reasons=list_reasons,
            draw_below=draw_below,
            facts=list(list_paper_facts(found)),
            charts=[
                (chart.alt, encode_svg(chart.svg), encode_svg(chart.dark))
                for _, chart in (draw_comparison(found.explained) if found.explained else ())
            ],
        )
    )
