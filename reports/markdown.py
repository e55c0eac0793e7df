"""A report as GitHub Markdown: for a pull request, a step summary, a wiki."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from robusteval.records import Run, visible

from . import words
from .tables import as_dict

ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;", "|": "&#124;", "`": "&#96;", "\\": "&#92;"}
# an at sign that calls nobody
PROSE = ENTITIES | {"@": "&#64;&#8203;"} | {char: f"\\{char}" for char in "*_[]~#$"}


def to_markdown(run: Run) -> str:
    """The report as a Markdown document; text from outside cannot become markup."""
    record = as_dict(run)
    return "\n".join(document(record)) + "\n"


def document(record: words.Record) -> Iterator[str]:
    """The lines of the document."""
    yield f"**{prose(record['verdict'])}**"
    yield from listed("", words.meaning(record))
    yield from listed("Findings", map(words.finding, record["findings"]))
    if record["attacks"]:
        yield from table(record)
    yield from listed("Trust probes", words.probes(record))
    yield from listed("Without a result", words.absences(record))
    facts = (f"{label}: {text}" for label, text in words.provenance(record))
    yield from listed("Where this comes from", facts)
    command = record["provenance"]["command"]
    if command:
        yield from ("", "Reproduce with:", "", code(command))


def listed(title: str, items: Iterable[str]) -> Iterator[str]:
    """A heading and a list; nothing if there are no items."""
    marked = [f"- {prose(item)}" for item in items]
    if marked:
        yield from ("", f"### {title}", "") if title else ("",)
        yield from marked


def table(record: words.Record) -> Iterator[str]:
    """All attacks, a row each."""
    columns = (*words.strength(record), *words.COST)
    yield ""
    yield row(["attack", *(column.title for column in columns)])
    yield row([":--", *(":--" if column.left else "--:" for column in columns)])
    for line in words.lines(record):
        if line.kind == "threat":
            yield row([f"**{prose(line.title)}**", *([""] * len(columns))])
            continue
        title = code(line.title) if line.kind == "attack" else prose(line.title)
        yield row([title, *(prose(column.cell(line.numbers)) for column in columns)])
    yield from ("", prose(words.legend(record)))


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
