"""A report as GitHub Markdown: for a pull request, a step summary, a wiki."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from robusteval.registry import REPORT_FORMATS
from robusteval.runs.types import visible

from . import attack_tables, formatting, gate_words, maps, sentences
from .record import MapsRecord, RunRecord

ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;", "|": "&#124;", "`": "&#96;", "\\": "&#92;"}
# an at sign that calls nobody
PROSE = ENTITIES | {"@": "&#64;&#8203;"} | {char: f"\\{char}" for char in "*_[]~#$"}


LEFT, RIGHT = ":--", "--:"
RULE = f"| {LEFT} |"  # how the second line of every table begins
CUT = "*Cut here: the whole report is too long for this place.*"


@REPORT_FORMATS.add("markdown", suffix=".md")
def render_markdown(records: Sequence[RunRecord]) -> str:
    """The reports as one Markdown document."""
    return "\n".join(map(to_markdown, records))


def to_markdown(record: RunRecord, limit: int | None = None) -> str:
    """The report as a Markdown document; text from outside cannot become markup.

    With a `limit`, it has so many bytes at most: it ends between two of its lines, and says so.
    """
    lines = list(document(record))
    return "\n".join(lines if limit is None else shortened(lines, limit)) + "\n"


def shortened(lines: Sequence[str], limit: int) -> list[str]:
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


def document(record: RunRecord) -> Iterator[str]:
    """The lines of the document."""
    yield f"**{prose(record.verdict)}**"
    yield from listed("", sentences.write_meaning(record))
    yield from gates(record)
    if record.attacks:
        if record.defenses:
            yield from matrix(record)
        yield from table(record)
    if record.interpreters:
        yield from list_explanations(record.interpreters)
    yield from listed("Findings", map(sentences.write_finding, record.findings))
    yield from listed("Trust probes", sentences.write_probes(record))
    yield from listed("Without a result", sentences.write_absences(record))
    facts = (f"{label}: {text}" for label, text in sentences.list_provenance(record))
    yield from listed("Where this comes from", facts)
    command = record.provenance.command
    if command:
        yield from ("", "Reproduce with:", "", code(command))


def listed(title: str, items: Iterable[str]) -> Iterator[str]:
    """A heading and a list; nothing if there are no items."""
    marked = [f"- {prose(item)}" for item in items]
    if marked:
        yield from ("", f"### {title}", "") if title else ("",)
        yield from marked


def gates(record: RunRecord) -> Iterator[str]:
    """The gates, a row each; nothing if there were none."""
    check = record.gates
    if check is None:
        return
    yield from ("", f"### Gates: {prose(gate_words.summarise_gates(check))}", "")
    yield row(["outcome", "gate", "found", "asked", "margin", "why"])
    yield row([LEFT, LEFT, RIGHT, RIGHT, RIGHT, LEFT])
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
        yield row(list(map(prose, cells)))


def matrix(record: RunRecord) -> Iterator[str]:
    """Attacks against defenses, and what detectors tell apart."""
    titles, rows = attack_tables.build_defense_matrix(record)
    yield from ("", "### Robust accuracy, attacks against defenses", "")
    yield row(["attack", titles[0], *map(code, titles[1:])])
    yield row([LEFT, *(RIGHT for _ in titles)])
    for line in rows:
        cells = map(cell, line.cells) if line.cells else ("" for _ in titles)
        yield row([title_of(line), *cells])
    yield from listed("Detectors", sentences.write_detectors(record))


def cell(found: Sequence[attack_tables.MatrixCell]) -> str:
    """The numbers in one place of the matrix, with what must be known of each."""
    said = (f"{number}, {note}" if note else number for number, note in found)
    return prose("; ".join(said) or formatting.MISSING)


def table(record: RunRecord) -> Iterator[str]:
    """All attacks, a row each."""
    columns = (
        *attack_tables.choose_strength_columns(record),
        *attack_tables.choose_cost_columns(record),
    )
    yield from ("", "### Attacks", "")
    yield row(["attack", *(column.title for column in columns)])
    yield row([LEFT, *(LEFT if column.left else RIGHT for column in columns)])
    for line in attack_tables.list_attack_lines(record):
        cells = [prose(c.write(line.numbers)) if line.numbers else "" for c in columns]
        yield row([title_of(line), *cells])
    yield from ("", prose(attack_tables.write_legend(record)))


def list_explanations(record: MapsRecord) -> Iterator[str]:
    """What attacks did to maps."""
    yield from listed("Explanations", maps.write_sentences(record))
    for table in maps.build_tables(record):
        yield from ("", f"### {prose(table.title)}", "")
        yield row([table.kind, *map(code, table.columns)])
        yield row([LEFT, *(LEFT for _ in table.columns)])
        for name, cells in table.rows:
            yield row([code(name), *(prose("; ".join(lines)) for lines in cells)])
        yield from ("", prose(table.note))


def title_of(line: attack_tables.AttackLine | attack_tables.MatrixRow) -> str:
    """The name of a row as it is set."""
    if line.kind == "attack":
        note = line.note if isinstance(line, attack_tables.AttackLine) else ""
        return code(line.title) + (f" {prose(note)}" if note else "")
    return f"**{prose(line.title)}**" if line.kind == "threat" else prose(line.title)


def row(cells: list[str]) -> str:
    """One row of a table."""
    return f"| {' | '.join(cells)} |"


def prose(text: str) -> str:
    """Text that renders as itself."""
    return "".join(PROSE.get(char, char) for char in visible(text))


def code(text: str) -> str:
    """Text in typewriter face that renders as itself, also in a table."""
    shown = visible(text)
    if not ENTITIES.keys() & set(shown):
        return f"`{shown}`"
    return f"<code>{prose(text)}</code>"
