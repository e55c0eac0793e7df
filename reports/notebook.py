"""A run as a notebook shows it: the first screen of the HTML report, as a fragment of a page."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from html import escape

from robusteval.runs.types import Run, visible

from . import attack_tables, formatting, sentences
from .build import build_record
from .html import is_doubtful, title_run
from .record import RunRecord

# notebooks have a style of their own, for light and dark: only what they lack is set
WORST = "font-weight:700"
LEFT = "text-align:left"
BOX = "border-left:.4em solid {};padding:.2em 1em;margin:.5em 0"


def render_fragment(run: Run) -> str:
    """The verdict, what it means, and the table of attacks as HTML.

    The fragment is whole in itself: no script, no style sheet, nothing loaded; text from outside
    cannot become markup.
    """
    return "\n".join(render_parts(run))


def render_parts(run: Run) -> Iterator[str]:
    """The pieces of the fragment, in their order."""
    record = build_record(run)
    yield f'<div class="robusteval"><p><small>{render_text(title_run(record))}</small></p>'
    colour = "#b7791f" if is_doubtful(record) else "#1f5fbf"
    yield f'<div style="{BOX.format(colour)}">'
    if is_doubtful(record):
        said = "! not to be used" if record.misfed else "! upper bounds only"
        yield f"<p><strong>{said}</strong></p>"
    yield f"<p><strong>{render_text(record.verdict)}</strong></p>"
    grave = [sentences.write_finding(each) for each in record.findings if each.grave]
    told = [*sentences.write_meaning(record), *grave]
    if told:
        items = "".join(f"<li>{render_text(sentence)}</li>" for sentence in told)
        yield f"<ul>{items}</ul>"
    yield "</div>"
    if record.defenses:
        yield from render_matrix(record)
    elif record.attacks:
        yield from render_attacks(record)
    yield "</div>"


def render_attacks(record: RunRecord) -> Iterator[str]:
    """A table of what each attack left of the model."""
    columns = attack_tables.choose_strength_columns(record)
    yield "<table><thead>"
    yield render_row(["attack", *(column.title for column in columns)], head=True)
    yield "</thead><tbody>"
    for line in attack_tables.list_attack_lines(record):
        cells = [column.write(line.numbers) for column in columns if line.numbers]
        yield render_row([line.title, *cells], style=WORST if line.kind == "worst" else "")
    yield "</tbody></table>"


def render_matrix(record: RunRecord) -> Iterator[str]:
    """A table of robust accuracy, behind nothing and behind each defense."""
    columns, rows = attack_tables.build_defense_matrix(record)
    yield "<table><thead>"
    yield render_row(["attack", *columns], head=True)
    yield "</thead><tbody>"
    for row in rows:
        cells = [
            ", ".join(f"{cell.number} {cell.note}".strip() for cell in cells) or formatting.MISSING
            for cells in row.cells
            if row.kind != "threat"
        ]
        yield render_row([row.title, *cells], style=WORST if row.kind == "worst" else "")
    yield "</tbody></table>"


def render_row(cells: Iterable[str], *, head: bool = False, style: str = "") -> str:
    """A row of a table; the first cell is its name."""
    tag = "th" if head else "td"
    first, *rest = map(render_text, cells)
    shown = "".join(f"<{tag}>{cell}</{tag}>" for cell in rest)
    attribute = f' style="{style}"' if style else ""
    return f'<tr{attribute}><{tag} style="{LEFT}">{first}</{tag}>{shown}</tr>'


def render_text(text: str) -> str:
    """Text that can be no markup, with all that does not show spelled out."""
    return escape(visible(text))
