"""A report in a terminal, readable at 80 columns, without colour, and when piped."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from robusteval.records import Run, visible

from . import words
from .tables import as_dict

WIDE = 120  # columns from which one table shows everything
NARROWEST = 16  # a spec may become
STYLES = {"threat": "italic", "attack": "", "worst": "bold"}
MARKS = {"✗": "red", "!": "yellow", "-": ""}
PLAIN = str.maketrans({"–": "-", "✗": "x", "×": "x", "“": '"', "”": '"'})


def print_table(run: Run, console: Console) -> None:
    """Print the report; text from outside is shown, never interpreted."""
    record = as_dict(run)
    doubtful = record["upper_bound"] or record["misfed"]
    say(console, record["verdict"], "bold red" if doubtful else "bold")
    console.print()
    for sentence in words.meaning(record):
        say(console, sentence)
    findings = [words.finding(finding) for finding in record["findings"]]
    listed(console, "Findings", findings)
    if record["attacks"]:
        tables(console, record)
    listed(console, "Trust probes", [f"- {probe}" for probe in words.probes(record)])
    listed(console, "Without a result", [f"✗ {absence}" for absence in words.absences(record)])
    facts(console, words.provenance(record))
    command = record["provenance"]["command"]
    if command:
        # not wrapped, so that it can be copied
        say(console, "reproduce with:", "dim")
        console.print(text(console, command), soft_wrap=True)


def text(console: Console, content: str, style: str = "") -> Text:
    """Text as it is, in what the stream can carry."""
    shown = visible(content)
    try:
        shown.encode(console.encoding)
    except UnicodeEncodeError:
        encoded = shown.translate(PLAIN).encode(console.encoding, "backslashreplace")
        shown = encoded.decode(console.encoding)
    return Text(shown, style)


def say(console: Console, content: str, style: str = "") -> None:
    """A paragraph."""
    console.print(text(console, content, style))


def listed(console: Console, title: str, items: Sequence[str]) -> None:
    """A heading and its marked items, indented where they wrap; nothing if there are none."""
    if not items:
        return
    console.print()
    say(console, title, "bold")
    grid = Table.grid(padding=(0, 1))
    grid.add_column()
    grid.add_column(overflow="fold")
    for item in items:
        mark, _, rest = item.partition(" ")
        grid.add_row(text(console, mark, MARKS[mark]), text(console, rest, MARKS[mark]))
    console.print(grid)


def facts(console: Console, pairs: Iterable[tuple[str, str]]) -> None:
    """Names and what they are, side by side."""
    console.print()
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column(overflow="fold")
    for name, value in pairs:
        grid.add_row(text(console, name), text(console, value))
    console.print(grid)


def tables(console: Console, record: words.Record) -> None:
    """The attacks, in as many tables as the width asks for."""
    strength = words.strength(record)
    sides = [strength, words.COST]
    if console.width >= WIDE:
        sides = [strength + words.COST]
    for columns in sides:
        console.print()
        console.print(table(console, record, columns))
    console.print()
    say(console, words.legend(record), "dim")


def table(console: Console, record: words.Record, columns: Sequence[words.Column]) -> Table:
    """The attacks, a row each, with these columns."""
    rows = [
        (line, [column.cell(line.numbers) for column in columns] if line.numbers else [])
        for line in words.lines(record)
    ]
    titles = [column.title.replace(" ", "\n", 1) for column in columns]
    wide = [
        max(len(part) for part in (*title.split("\n"), *(cells[i] for _, cells in rows if cells)))
        for i, title in enumerate(titles)
    ]
    room = max(console.width - sum(wide) - 3 * len(wide), NARROWEST)

    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    shown.add_column("attack", overflow="fold", vertical="bottom")
    for column, title in zip(columns, titles, strict=True):
        shown.add_column(
            title,
            justify="left" if column.left else "right",
            overflow="fold",
            vertical="bottom",
        )
    for line, cells in rows:
        style = STYLES[line.kind]
        name = Text(folded(text(console, line.title).plain, room), style)
        shown.add_row(name, *(text(console, cell, style) for cell in cells))
    return shown


def folded(spec: str, room: int) -> str:
    """A spec on as many lines as it needs, broken between its parameters where possible."""
    lines = [""]
    for piece in re.split(r"(?<=[,:])", spec):
        if lines[-1] and len(lines[-1]) + len(piece) > room:
            lines.append("  ")
        lines[-1] += piece
    return "\n".join(lines)
