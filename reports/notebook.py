"""A run as a notebook shows it: fragments of a page, each whole in itself.

No script, no style sheet, nothing loaded; text from outside cannot become markup.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from html import escape

from robusteval.errors import UsageError
from robusteval.runs.showing import View
from robusteval.runs.types import Run, visible

from . import attack_tables, formatting, pictures, sentences, spreadsheet
from .build import build_record
from .corruptions import build_corruption_tables
from .html import (
    Drawing,
    build_curve_drawings,
    build_roc_drawings,
    is_doubtful,
    read_pictures,
    title_run,
)
from .record import RunRecord
from .rendering import render_console
from .terminal import print_attack_tables

# notebooks have a style of their own, for light and dark: only what they lack is set
WORST = "font-weight:700"
LEFT = "text-align:left"
BOX = "border-left:.4em solid {};padding:.2em 1em;margin:.5em 0"
CHART = "max-width:36rem;width:100%;background:#fff"  # charts are drawn in dark ink
ROW = "display:flex;flex-wrap:wrap;gap:1em;margin:.5em 0"
PICTURE = "width:9em;image-rendering:{};border:1px solid #888"

# the sorts of charts, and what a run has to have for one
FIGURES: dict[str, tuple[Callable[[RunRecord], Iterator[Drawing]], str]] = {
    "curve": (
        build_curve_drawings,
        "No curve: no attack looked for the nearest success or was run at several radii."
        " fmn:norm=linf does the first, and several pgd with other eps the second.",
    ),
    "roc": (build_roc_drawings, "No ROC: no detector had an attacked image to flag."),
}
ROOM = 2_000_000  # characters of all pictures: notebooks are saved with what they show
UNKEPT = "No pictures: they are kept in the folder of a run, so give evaluate one with out=."


def render_fragment(run: Run) -> str:
    """The verdict, what it means, and the table of attacks as HTML."""
    return "\n".join(render_parts(run))


def show_table(run: Run) -> View:
    """The table of attacks; its items are rows as in the CSV report."""
    record = build_record(run)
    rows = list(spreadsheet.list_rows(record))
    if not record.attacks:
        return View(rows, *say("No attack has a result."))
    render = render_matrix if record.defenses else render_attacks
    text = render_console(lambda console: print_attack_tables(console, record), page=True)
    doubt = describe_doubt(record)
    html = f"<p><strong>{render_text(doubt)}</strong></p>" if doubt else ""
    return View(rows, html + "\n".join(render(record)), f"{doubt}\n{text}" if doubt else text)


def describe_doubt(record: RunRecord) -> str:
    """What must stand beside any number of a run that is not what it seems; else empty."""
    if record.misfed:
        return "! not to be used"
    return "! upper bounds only" if is_doubtful(record) else ""


def show_figures(run: Run, name: str) -> View:
    """The charts of one sort, as SVG text; UsageError if there is no such sort."""
    if name not in FIGURES:
        raise UsageError(f"no figure is called {name!r}: there are {', '.join(FIGURES)}")
    draw, why = FIGURES[name]
    drawings = list(draw(build_record(run)))
    if not drawings:
        return View((), *say(why))
    html = "\n".join(map(render_drawing, drawings))
    return View(
        [each.chart.svg for each in drawings], html, "\n".join(each.alt for each in drawings)
    )


def show_images(run: Run, attack: str) -> View:
    """The pictures of the attacks that begin so; UsageError if none does."""
    record = build_record(run)
    rows = [row for row in record.attacks if row.spec.startswith(attack)]
    if not rows and record.attacks:
        known = ", ".join(row.spec for row in record.attacks)
        raise UsageError(f"no attack begins with {attack!r}: there are {known}")
    stored = read_pictures(run)
    rows = [row for row in rows if row.outcome in stored]
    if not rows:
        return View((), *say(UNKEPT))
    cells, _ = pictures.fit_pictures(
        [pictures.build_cell(record, row, stored[row.outcome]) for row in rows], ROOM
    )
    lines = [
        f"{cell.title}: {sample.title}, {sample.outcome}"
        for cell in cells
        for sample in cell.samples
    ]
    html = "\n".join(part for cell in cells for part in render_cell(cell))
    return View([each for row in rows for each in stored[row.outcome]], html, "\n".join(lines))


def say(sentence: str) -> tuple[str, str]:
    """A sentence as HTML and as text."""
    return f"<p>{render_text(sentence)}</p>", sentence


def render_drawing(drawing: Drawing) -> str:
    """A chart with what it is about; its numbers are in the text beside it."""
    return (
        f"<p><strong>{render_text(drawing.title)}</strong><br>"
        f"<small>{render_text(drawing.note)}</small></p>"
        f'<img style="{CHART}" src="{drawing.light}" alt="{render_text(drawing.alt)}">'
    )


def render_cell(cell: pictures.GalleryCell) -> Iterator[str]:
    """The images of one attack, a row of pictures each."""
    yield f"<p><code>{render_text(cell.title)}</code><br>"
    yield f"<small>{render_text(cell.setting)}</small></p>"
    for sample in cell.samples:
        yield f"<p>{render_text(sample.title)}: {render_text(sample.outcome)}</p>"
        yield f'<div style="{ROW}">'
        for shown in sample.pictures:
            style = PICTURE.format("pixelated" if shown.crisp else "auto")
            caption = "<br>".join(map(render_text, filter(None, (shown.title, *shown.caption))))
            yield f'<div><img style="{style}" src="{shown.uri}" alt="{render_text(shown.alt)}">'
            yield f"<br><small>{caption}</small></div>"
        yield "</div>"


def render_parts(run: Run) -> Iterator[str]:
    """The pieces of the fragment, in their order."""
    record = build_record(run)
    yield f'<div class="robusteval"><p><small>{render_text(title_run(record))}</small></p>'
    colour = "#b7791f" if is_doubtful(record) else "#1f5fbf"
    yield f'<div style="{BOX.format(colour)}">'
    if doubt := describe_doubt(record):
        yield f"<p><strong>{doubt}</strong></p>"
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
    yield from render_corruptions(record)
    yield "</div>"


def render_attacks(record: RunRecord) -> Iterator[str]:
    """A table of what each attack left of the model; nothing where none was tried."""
    lines = list(attack_tables.list_attack_lines(record))
    if not lines:
        return
    columns = attack_tables.choose_strength_columns(record)
    yield "<table><thead>"
    yield render_row(["attack", *(column.title for column in columns)], head=True)
    yield "</thead><tbody>"
    for line in lines:
        cells = [column.write(line.numbers) for column in columns if line.numbers]
        yield render_row([line.title, *cells], style=WORST if line.kind == "worst" else "")
    yield "</tbody></table>"


def render_corruptions(record: RunRecord) -> Iterator[str]:
    """A table of kinds against severities, behind nothing and behind each defense."""
    for means in build_corruption_tables(record.corruptions, record.run):
        yield "<table><thead>"
        yield render_row(list(means.columns), head=True)
        yield "</thead><tbody>"
        yield from (render_row(list(row)) for row in means.rows)
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
