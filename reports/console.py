"""Tables, lists and paragraphs on a console: at 80 columns, without colour, and when piped."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from rich import box
from rich.align import VerticalAlignMethod
from rich.console import Console, RenderableType
from rich.segment import Segment, Segments
from rich.table import Table
from rich.text import Text

from robusteval.runs.types import spell_line

NARROWEST = 16  # a spec may become
ROOM = 20  # for the names of rows, rather than one more column
GAP = 2  # between columns
LISTED = 100  # items below a heading
SHORT = 12  # a line of the title of a column
STYLES = {"clean": "", "threat": "italic", "attack": "", "worst": "bold"}
MARKS = {"✗": "red", "!": "yellow", "?": "yellow", "✓": "", "-": ""}
GLUE = "\ue000"  # for private use: a blank at which rich breaks no line, until it is printed
PLAIN = str.maketrans({"–": "-", "✗": "x", "✓": "+", "×": "x", "“": '"', "”": '"'})


class TableColumn(NamedTuple):
    """A column of a table, cell by cell; a cell may have several lines."""

    title: str
    cells: list[str]
    left: bool = False

    @property
    def width(self) -> int:
        """Characters that the column needs so that no line in it is broken."""
        parts = (*self.title.split("\n"), *(part for c in self.cells for part in c.split("\n")))
        return max(map(len, parts)) + GAP


def make_printable(console: Console, content: str, style: str = "") -> Text:
    """Text as it is, in what the stream can carry."""
    return Text(encode_for_stream(console, spell_line(content)), style)


def build_empty_table() -> Table:
    """An empty table as all reports have them: a line below the header, no frame."""
    return Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, GAP - 1, 0, 0),
        header_style="bold",
    )


def encode_for_stream(console: Console, shown: str) -> str:
    """Text in characters that the stream can carry."""
    try:
        shown.encode(console.encoding)
    except UnicodeEncodeError:
        encoded = shown.translate(PLAIN).encode(console.encoding, "backslashreplace")
        return encoded.decode(console.encoding)
    return shown


def keep_percents(text: Text) -> Text:
    """The text such that no line ends between a number and its percent sign."""
    kept = text.copy()
    kept.plain = re.sub(r"(?<=\d) (?=%)", GLUE, text.plain)  # as long, so styles stay in place
    return kept


def print_trimmed(console: Console, item: RenderableType) -> None:
    """Print without the blanks at the ends of lines that layout leaves behind."""
    for printed in console.render_lines(item, pad=False):
        line = [Segment(part.text.replace(GLUE, " "), part.style) for part in printed]
        while line and not line[-1].text.strip():
            line.pop()
        if line:
            line[-1] = Segment(line[-1].text.rstrip(), line[-1].style)
        console.print(Segments([*line, Segment.line()]), end="")


def print_paragraph(console: Console, content: str, style: str = "") -> None:
    """A paragraph."""
    print_trimmed(console, keep_percents(make_printable(console, content, style)))


def print_heading(console: Console, title: str) -> None:
    """The title of a section, after an empty line."""
    console.print()
    print_paragraph(console, title, "bold")


def print_list(console: Console, title: str, items: Sequence[str]) -> None:
    """A heading and its marked items, indented where they wrap; nothing if there are none."""
    if not items:
        return
    if len(items) > LISTED:
        items = [*items[:LISTED], f"- {len(items) - LISTED:,} more; JSON has all."]
    print_heading(console, title)
    grid = Table.grid(padding=(0, 1))
    grid.add_column()
    grid.add_column(overflow="fold")
    for item in items:
        mark, _, rest = item.partition(" ")
        said = keep_percents(make_printable(console, rest, MARKS[mark]))
        grid.add_row(make_printable(console, mark, MARKS[mark]), said)
    print_trimmed(console, grid)


def print_facts(console: Console, pairs: Iterable[tuple[str, str]]) -> None:
    """Names and what they are, side by side."""
    console.print()
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column(overflow="fold")
    for name, value in pairs:
        grid.add_row(make_printable(console, name), make_printable(console, value))
    print_trimmed(console, grid)


def render_cell(console: Console, content: str) -> str:
    """The text of a cell as it will be printed, so that its width is known."""
    return encode_for_stream(console, spell_line(content))


def print_tables(
    console: Console,
    names: Sequence[tuple[str, str]],
    sides: Sequence[list[TableColumn]],
    first: str = "attack",
) -> None:
    """One table with the columns of all sides, or tables of as many as there is room for.

    `first` is the title of the names.
    """
    whole = [column for side in sides for column in side]
    parts = [part for side in sides for part in split_columns(console, side)]
    for columns in [whole] if has_room(console, whole) else parts:
        console.print()
        print_trimmed(console, build_table(console, names, columns, first))


def has_room(console: Console, columns: Sequence[TableColumn]) -> bool:
    """Whether there is room for these columns beside the names of the rows."""
    return sum(column.width for column in columns) + ROOM <= console.width


def split_columns(console: Console, columns: Sequence[TableColumn]) -> Iterator[list[TableColumn]]:
    """The columns in groups that fit, in order; one that never fits is alone."""
    group: list[TableColumn] = []
    for column in columns:
        if group and not has_room(console, [*group, column]):
            yield group
            group = []
        group.append(column)
    yield group


def build_table(
    console: Console, names: Sequence[tuple[str, str]], columns: Sequence[TableColumn], first: str
) -> Table:
    """A row for each name with its cells; `first` is the title of the names."""
    room = max(console.width - sum(column.width for column in columns), NARROWEST)
    shown = build_empty_table()
    # a number stands at the end of a long name; several of them below each other begin beside it
    stacked = any("\n" in cell for column in columns for cell in column.cells)
    vertical: VerticalAlignMethod = "top" if stacked else "bottom"
    shown.add_column(first, overflow="fold", vertical=vertical)
    for column in columns:
        shown.add_column(
            Text(column.title),
            justify="left" if column.left else "right",
            overflow="fold",
            vertical=vertical,
        )
    for i in list_filled_rows(names, columns):
        title, kind = names[i]
        name = fold_name(render_cell(console, title), room)
        cells = (Text(column.cells[i]) for column in columns)
        shown.add_row(Text(name), *cells, style=STYLES[kind])
    return shown


def list_filled_rows(
    names: Sequence[tuple[str, str]], columns: Sequence[TableColumn]
) -> Iterator[int]:
    """The rows that say something in these columns, under their threats."""
    threat = None
    for i, (_, kind) in enumerate(names):
        if kind == "threat":
            threat = i
        elif any(column.cells[i] for column in columns):
            if threat is not None:
                yield threat
                threat = None
            yield i


def fold_name(spec: str, room: int) -> str:
    """A spec on as many lines as it needs, broken between its parameters where possible."""
    lines = [""]
    for piece in re.split(r"(?<=[,: ])", spec):
        if lines[-1] and len(lines[-1]) + len(piece) > room:
            lines.append("  ")
        lines[-1] += piece
    return "\n".join(line.rstrip() for line in lines)
