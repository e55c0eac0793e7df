"""A report as GitHub Markdown: for a pull request, a step summary, a wiki."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from robusteval.registry import REPORT_FORMATS
from robusteval.runs.types import visible

from . import attack_tables, formatting, gate_words, group_tables, maps, sentences, stages
from .abridged import abridge
from .console import LISTED
from .corruptions import build_corruption_tables
from .curves import BUDGETS, build_curve_tables
from .map_record import MapsRecord
from .measures import build_rate
from .models import build_models, build_models_table
from .record import RunRecord
from .transfer import build_transfer_table
from .transfer_matrix import (
    TransferMatrix,
    build_matrix,
    build_matrix_tables,
    write_matrix_note,
)
from .trend import build_trend_table

ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;", "|": "&#124;", "`": "&#96;", "\\": "&#92;"}
# an at sign that calls nobody
PROSE = ENTITIES | {"@": "&#64;&#8203;"} | {char: f"\\{char}" for char in "*_[]~#$"}


LEFT, RIGHT = ":--", "--:"
RULE = f"| {LEFT} |"  # how the second line of every table begins
CUT = "*Cut here: the whole report is too long for this place.*"


@REPORT_FORMATS.add("markdown", suffix=".md")
def render_markdown(records: Sequence[RunRecord]) -> str:
    """The reports as one Markdown document."""
    models = "\n".join([*list_models(records), ""]) if len(records) > 1 else ""
    return models + "\n".join(map(to_markdown, records))


def list_models(records: Sequence[RunRecord]) -> Iterator[str]:
    """Several runs as one table."""
    table = build_models_table(build_models([record.run for record in records]))
    yield from (f"### {escape_prose(table.title)}", "")
    for sentence in table.lead:
        yield from (escape_prose(sentence), "")
    yield render_markdown_row(["attack", *map(escape_prose, table.columns)])
    yield render_markdown_row([LEFT, *(LEFT for _ in table.columns)])
    for name, kind, cells in table.rows:
        title = escape_code(name) if kind == "attack" else escape_prose(name)
        yield render_markdown_row([title, *(escape_prose("; ".join(lines)) for lines in cells)])
    yield from ("", escape_prose(table.note), "")
    yield from list_transfer_matrix(build_matrix([record.run for record in records]))


def list_transfer_matrix(record: TransferMatrix | None) -> Iterator[str]:
    """Networks against networks; nothing where they do not judge each other's images."""
    if record is None:
        return
    for matrix in build_matrix_tables(record):
        yield from (f"### {escape_prose(matrix.title)}", "")
        yield render_markdown_row(["made on", *map(escape_prose, matrix.columns)])
        yield render_markdown_row([LEFT, *(RIGHT for _ in matrix.columns)])
        for row in matrix.rows:
            yield render_markdown_row(list(map(escape_prose, row)))
        yield ""
    yield from (escape_prose(write_matrix_note(record)), "")


def to_markdown(record: RunRecord, limit: int | None = None) -> str:
    """The report as a Markdown document; text from outside cannot become markup.

    With a `limit`, it has so many bytes at most: it ends between two of its lines, and says so.
    """
    lines = list(list_lines(record))
    return "\n".join(lines if limit is None else shorten_document(lines, limit)) + "\n"


def shorten_document(lines: Sequence[str], limit: int) -> list[str]:
    """The first lines of a document and a note that it goes on; all where there is room.

    What comes back has at most `limit` bytes, line ends included, of which the note needs some
    60. Lines are whole, and so are tables up to their last row.
    """
    sizes = [len(line.encode()) + 1 for line in lines]
    if sum(sizes) <= limit:
        return list(lines)
    room = limit - len(CUT.encode()) - 2  # an empty line before it, its own end
    kept = 0
    while kept < len(lines) and sizes[kept] <= room:
        room -= sizes[kept]
        kept += 1
    if kept < len(lines) and lines[kept].startswith(RULE):
        kept -= 1  # the head of a table without its rule is no table
    while kept and (not lines[kept - 1] or lines[kept - 1].startswith("#")):
        kept -= 1  # a heading of nothing
    return [*lines[:kept], "", CUT] if kept else [CUT]


def list_lines(record: RunRecord) -> Iterator[str]:
    """The lines of the document."""
    yield f"**{escape_prose(record.verdict)}**"
    yield from list_items("", sentences.write_meaning(record))
    yield from list_gates(record)
    shown = abridge(record)
    if record.attacks:
        if record.defenses:
            yield from list_matrix(shown)
        yield from list_attacks(shown)
    for means in build_corruption_tables(record.corruptions, record.run):
        yield from ("", f"### {escape_prose(means.title)}", "")
        yield render_markdown_row(list(means.columns))
        yield render_markdown_row([LEFT, *(RIGHT for _ in means.columns[1:])])
        yield from (render_markdown_row(list(map(escape_prose, row))) for row in means.rows)
    yield from list_groups(shown)
    yield from list_trend(record)
    yield from list_transfer(record)
    yield from list_curves(shown)
    if record.interpreters:
        yield from list_explanations(record.interpreters)
    yield from list_items("Findings", map(sentences.write_finding, record.findings))
    yield from list_items("Trust probes", sentences.write_probes(record))
    yield from list_items("Without a result", sentences.write_absences(record))
    facts = (f"{label}: {text}" for label, text in sentences.list_provenance(record))
    yield from list_items("Where this comes from", facts)
    command = record.provenance.command
    if command:
        yield from ("", "Reproduce with:", "", escape_code(command))


def list_items(title: str, items: Iterable[str]) -> Iterator[str]:
    """A heading and a list; nothing if there are no items."""
    every = list(items)
    marked = [f"- {escape_prose(item)}" for item in every[:LISTED]]
    if len(every) > LISTED:
        marked.append(f"- {len(every) - LISTED:,} more; JSON has all.")
    if marked:
        yield from ("", f"### {title}", "") if title else ("",)
        yield from marked


def list_gates(record: RunRecord) -> Iterator[str]:
    """The gates, a row each; nothing if there were none."""
    check = record.gates
    if check is None:
        return
    yield from ("", f"### Gates: {escape_prose(gate_words.summarise_gates(check))}", "")
    yield render_markdown_row(["outcome", "gate", "found", "asked", "margin", "why"])
    yield render_markdown_row([LEFT, LEFT, RIGHT, RIGHT, RIGHT, LEFT])
    for gate in check.gates:
        facts = " ".join(gate_words.explain_gate(gate))
        cells = (
            gate_words.OUTCOMES[gate.outcome],
            gate_words.name_gate(gate),
            gate_words.format_gate_value(gate),
            gate_words.format_gate_limit(gate),
            gate_words.format_gate_margin(gate),
            facts,
        )
        yield render_markdown_row(list(map(escape_prose, cells)))


def list_matrix(record: RunRecord) -> Iterator[str]:
    """Attacks against defenses, and what detectors tell apart."""
    titles, rows = attack_tables.build_defense_matrix(record)
    yield from ("", "### Robust accuracy, attacks against defenses", "")
    yield render_markdown_row(["attack", titles[0], *map(escape_code, titles[1:])])
    yield render_markdown_row([LEFT, *(RIGHT for _ in titles)])
    for line in rows:
        cells = map(render_markdown_cell, line.cells) if line.cells else ("" for _ in titles)
        yield render_markdown_row([render_row_title(line), *cells])
    yield from list_items("Detectors", sentences.write_detectors(record))


def render_markdown_cell(found: Sequence[attack_tables.MatrixCell]) -> str:
    """The numbers in one place of the matrix, with what must be known of each."""
    said = (f"{number}, {note}" if note else number for number, note in found)
    return escape_prose("; ".join(said) or formatting.MISSING)


def list_attacks(record: RunRecord) -> Iterator[str]:
    """All attacks, a row each."""
    columns = (
        *attack_tables.choose_strength_columns(record),
        *attack_tables.choose_cost_columns(record),
    )
    lines = list(attack_tables.list_attack_lines(record))
    if lines:
        yield from ("", "### Attacks", "")
        yield render_markdown_row(["attack", *(column.title for column in columns)])
        yield render_markdown_row([LEFT, *(LEFT if column.left else RIGHT for column in columns)])
    for line in lines:
        cells = [escape_prose(c.write(line.numbers)) if line.numbers else "" for c in columns]
        yield render_markdown_row([render_row_title(line), *cells])
    yield from ("", escape_prose(attack_tables.write_legend(record))) if lines else ()
    for table in stages.build_stage_tables(record.attacks):
        yield from ("", f"### {escape_prose(table.title)}", "")
        yield render_markdown_row(["stage", *table.columns])
        yield render_markdown_row([LEFT, *(RIGHT for _ in table.columns)])
        for row in table.rows:
            yield render_markdown_row(list(map(escape_prose, row)))
        if table.note:
            yield from ("", escape_prose(table.note))


def list_groups(record: RunRecord) -> Iterator[str]:
    """Classes and slices, and what classes become under all attacks together."""
    for table in group_tables.build_group_tables(record):
        yield from ("", f"### {escape_prose(table.title)}", "")
        yield from (f"- {escape_prose(line)}" for line in table.lines)
        yield from ("",) if table.lines else ()
        yield render_markdown_row([escape_prose(table.first), *map(escape_prose, table.columns)])
        yield render_markdown_row([LEFT, *(RIGHT for _ in table.columns)])
        for name, cells in table.rows:
            yield render_markdown_row([escape_prose(name), *map(escape_prose, cells)])
        yield from ("", escape_prose(f"{table.left} {group_tables.NOTE}".strip()))
    for turned in group_tables.build_turned_tables(record):
        if not turned.overall:
            continue  # of each attack, JSON and HTML have it
        yield from ("", f"### What classes become: {escape_prose(turned.title)}", "")
        yield render_markdown_row(list(map(escape_prose, turned.header)))
        yield render_markdown_row([LEFT, *(RIGHT for _ in turned.header[1:])])
        for name, cells in turned.rows:
            yield render_markdown_row([escape_prose(name), *map(escape_prose, cells)])
        yield from ("", escape_prose(turned.note))


def list_trend(record: RunRecord) -> Iterator[str]:
    """The network over time; nothing without a history."""
    if record.trend is None:
        return
    table = build_trend_table(record.trend)
    yield from ("", "### Over time", "")
    yield render_markdown_row(["when", *map(escape_prose, table.columns)])
    yield render_markdown_row([LEFT, *(RIGHT for _ in table.columns)])
    for name, cells in table.rows:
        yield render_markdown_row([escape_prose(name), *map(escape_prose, cells)])
    yield from list_items("", table.lines)


def list_transfer(record: RunRecord) -> Iterator[str]:
    """What images made on the network do to others; nothing where there are none."""
    if record.received is None:
        return
    table = build_transfer_table(record.received)
    yield from ("", f"### {escape_prose(table.title)}", "")
    yield render_markdown_row(["attack", *map(escape_prose, table.columns)])
    yield render_markdown_row([LEFT, *(RIGHT for _ in table.columns)])
    for name, *cells in table.rows:
        yield render_markdown_row([escape_code(name), *map(escape_prose, cells)])
    yield from list_items("", table.lines)
    yield from ("", escape_prose(table.note))


def list_curves(record: RunRecord) -> Iterator[str]:
    """Robust accuracy against the radius, at a few radii."""
    for table in build_curve_tables(record):
        yield from ("", f"### {escape_prose(table.title)}, {BUDGETS[table.norm][1]}", "")
        yield render_markdown_row(["", *map(escape_prose, table.budgets)])
        yield render_markdown_row([LEFT, *(RIGHT for _ in table.budgets)])
        for name, rates in table.rows:
            cells = [escape_prose(formatting.format_rate(build_rate(rate))) for rate in rates]
            yield render_markdown_row([escape_prose(name), *cells])
        yield from ("", escape_prose(table.note))


def list_explanations(record: MapsRecord) -> Iterator[str]:
    """What attacks did to maps."""
    yield from list_items("Explanations", maps.write_sentences(record))
    for table in maps.build_tables(record):
        yield from ("", f"### {escape_prose(table.title)}", "")
        yield render_markdown_row([table.kind, *map(escape_code, table.columns)])
        yield render_markdown_row([LEFT, *(LEFT for _ in table.columns)])
        for name, cells in table.rows:
            yield render_markdown_row(
                [escape_code(name), *(escape_prose("; ".join(lines)) for lines in cells)]
            )
        yield from ("", escape_prose(table.note))


def render_row_title(line: attack_tables.AttackLine | attack_tables.MatrixRow) -> str:
    """The name of a row as it is set."""
    if line.kind == "attack":
        note = line.note if isinstance(line, attack_tables.AttackLine) else ""
        return escape_code(line.title) + (f" {escape_prose(note)}" if note else "")
    return f"**{escape_prose(line.title)}**" if line.kind == "threat" else escape_prose(line.title)


def render_markdown_row(cells: list[str]) -> str:
    """One row of a table."""
    return f"| {' | '.join(cells)} |"


def escape_prose(text: str) -> str:
    """Text that renders as itself."""
    return "".join(PROSE.get(char, char) for char in visible(text))


def escape_code(text: str) -> str:
    """Text in typewriter face that renders as itself, also in a table."""
    shown = visible(text)
    if not ENTITIES.keys() & set(shown):
        return f"`{shown}`"
    return f"<code>{escape_prose(text)}</code>"
