"""A report in a terminal, readable at 80 columns, without colour, and when piped."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from robusteval.registry import REPORT_FORMATS

from . import attack_tables, formatting, gate_words, group_tables, maps, sentences, stages
from .abridged import abridge
from .console import (
    GAP,
    MARKS,
    NARROWEST,
    ROOM,
    SHORT,
    TableColumn,
    fold_name,
    keep_percents,
    make_printable,
    print_facts,
    print_heading,
    print_list,
    print_paragraph,
    print_tables,
    print_trimmed,
    render_cell,
)
from .corruptions import build_corruption_tables
from .map_record import MapsRecord
from .models import ModelsRecord, build_models, build_models_table
from .record import RunRecord
from .transfer import ReceivedRecord, build_transfer_table
from .transfer_matrix import print_matrix
from .trend import build_trend_table


@REPORT_FORMATS.add("table", suffix=".txt")
def render_table(records: Sequence[RunRecord]) -> str:
    """The reports as they stand in a terminal of 100 columns, without colour."""
    console = Console(width=100, no_color=True, force_terminal=False, force_jupyter=False)
    with console.capture() as page:
        print_reports(records, console)
    return page.get()


def print_reports(records: Sequence[RunRecord], console: Console) -> None:
    """Print the reports one below the other, with a rule between two of them."""
    if len(records) > 1:
        runs = [record.run for record in records]
        print_models(console, build_models(runs))
        print_matrix(console, runs)
    for number, record in enumerate(records):
        if number or len(records) > 1:
            console.print()
            console.rule()
            console.print()
        print_table(record, console)


def print_models(console: Console, record: ModelsRecord) -> None:
    """Several runs as one table."""
    table = build_models_table(record)
    print_paragraph(console, table.title, "bold")
    for sentence in table.lead:
        print_paragraph(console, sentence)
    console.print()
    columns = [
        TableColumn(
            fold_name(render_cell(console, title), ROOM),
            [
                "\n".join(render_cell(console, line) for line in cells[i])
                for *_, cells in table.rows
            ],
            left=True,
        )
        for i, title in enumerate(table.columns)
    ]
    print_tables(
        console, [(name, kind.partition(" ")[0]) for name, kind, _ in table.rows], [columns]
    )
    console.print()
    print_paragraph(console, table.note, "dim")


def print_table(record: RunRecord, console: Console) -> None:
    """Print the report; text from outside is shown, never interpreted."""
    doubtful = record.upper_bound or record.misfed
    print_paragraph(console, record.verdict, "bold red" if doubtful else "bold")
    console.print()
    for sentence in sentences.write_meaning(record):
        print_paragraph(console, sentence)
    print_gates(console, record)
    shown = abridge(record)
    if record.attacks:
        print_attack_tables(console, shown)
    print_groups(console, shown)
    print_trend(console, record)
    if record.received:
        print_transfer(console, record.received)
    if record.interpreters:
        print_explanations(console, record.interpreters)
    print_list(
        console, "Findings", [sentences.write_finding(finding) for finding in record.findings]
    )
    print_list(console, "Trust probes", [f"- {probe}" for probe in sentences.write_probes(record)])
    print_list(
        console,
        "Without a result",
        [f"✗ {absence}" for absence in sentences.write_absences(record)],
    )
    print_facts(console, sentences.list_provenance(record))
    command = record.provenance.command
    if command:
        # not wrapped, so that it can be copied
        console.print()
        print_paragraph(console, "reproduce with:", "dim")
        console.print(make_printable(console, command), soft_wrap=True)


def print_gates(console: Console, record: RunRecord) -> None:
    """The gates, worst news first to see: outcome, margin, and why."""
    check = record.gates
    if check is None:
        return
    print_heading(console, f"Gates: {gate_words.summarise_gates(check)}")
    grid = Table.grid(padding=(0, 2))
    grid.add_column()
    grid.add_column(overflow="fold")
    for gate in check.gates:
        outcome = gate_words.OUTCOMES[gate.outcome]
        mark = MARKS[outcome[0]]
        grid.add_row(
            make_printable(console, outcome, mark),
            make_printable(console, gate_words.name_gate(gate), mark),
        )
        for fact in filter(
            None, (gate_words.write_gate_numbers(gate), *gate_words.explain_gate(gate))
        ):
            grid.add_row("", keep_percents(make_printable(console, fact)))
    print_trimmed(console, grid)


def print_attack_tables(console: Console, record: RunRecord) -> None:
    """The attacks, in as many tables as the width asks for."""
    lines = list(attack_tables.list_attack_lines(record))
    names = [(f"{line.title} {line.note}".rstrip(), line.kind) for line in lines]
    strength, cost = (
        [
            TableColumn(
                title=column.title.replace(" ", "\n", 1),
                cells=[
                    render_cell(console, column.write(n.numbers) if n.numbers else "")
                    for n in lines
                ],
                left=column.left,
            )
            for column in columns
        ]
        for columns in (
            attack_tables.choose_strength_columns(record),
            attack_tables.choose_cost_columns(record),
        )
    )
    if record.defenses:
        titles, rows = attack_tables.build_defense_matrix(record)
        columns = [
            TableColumn(title, [render_matrix_cell(console, row, i) for row in rows], left=True)
            for i, title in enumerate(titles)
        ]
        kinds = [(row.title, row.kind) for row in rows]
        print_heading(console, "Robust accuracy, attacks against defenses")
        print_tables(console, kinds, [[wrap_title(console, column) for column in columns]])
        print_list(
            console, "Detectors", [f"- {line}" for line in sentences.write_detectors(record)]
        )
    # the matrix has taken from the first side what set it apart
    if lines:
        print_tables(console, names, [strength + cost] if record.defenses else [strength, cost])
        console.print()
        print_paragraph(console, attack_tables.write_legend(record), "dim")
    for means in build_corruption_tables(record.corruptions, record.run):
        print_heading(console, means.title)
        columns = [
            TableColumn(title, [cells[i + 1] for cells in means.rows])
            for i, title in enumerate(means.columns[1:])
        ]
        kinds = [(row[0], "worst" if row in means.rows[-2:] else "attack") for row in means.rows]
        print_tables(console, kinds, [columns], means.columns[0])
    for table in stages.build_stage_tables(record.attacks):
        print_heading(console, table.title)
        columns = [
            TableColumn(title.replace(" ", "\n", 1), [cells[i + 1] for cells in table.rows])
            for i, title in enumerate(table.columns)
        ]
        print_tables(console, [(cells[0], "attack") for cells in table.rows], [columns], "stage")
        if table.note:
            console.print()
            print_paragraph(console, table.note, "dim")


def print_groups(console: Console, record: RunRecord) -> None:
    """Classes and slices: which is the worst, the lowest of them, and what classes become."""
    for table in group_tables.build_group_tables(record, brief=True):
        print_heading(console, table.title)
        for line in table.lines:
            print_paragraph(console, line)
        columns = [
            TableColumn(
                fold_name(render_cell(console, title), SHORT),
                [render_cell(console, cells[i]) for _, cells in table.rows],
                left=i > 1,
            )
            for i, title in enumerate(table.columns)
        ]
        names = [(name, "attack") for name, _ in table.rows]
        print_tables(console, names, [columns], render_cell(console, table.first))
        turns = list(group_tables.write_turns(record)) if table.kind == "class" else []
        note = group_tables.NOTE if table.first == record.groups[-1].by else ""
        if below := [*turns, *filter(None, [table.left, note])]:
            console.print()
        for line in below:
            print_paragraph(console, line, "" if line in turns else "dim")


def print_trend(console: Console, record: RunRecord) -> None:
    """The network over time."""
    if record.trend is None:
        return
    table = build_trend_table(record.trend)
    print_heading(console, "Over time")
    columns = [
        TableColumn(
            fold_name(render_cell(console, title), SHORT),
            [render_cell(console, cells[i]) for _, cells in table.rows],
            left=True,
        )
        for i, title in enumerate(table.columns)
    ]
    names = [(name, "attack") for name, _ in table.rows]
    print_tables(console, names, [columns], "when")
    console.print()
    for line in table.lines:
        print_paragraph(console, line)


def print_transfer(console: Console, record: ReceivedRecord) -> None:
    """What images made on the network do to others."""
    table = build_transfer_table(record)
    print_heading(console, table.title)
    columns = [
        TableColumn(
            fold_name(render_cell(console, title), SHORT), [row[i + 1] for row in table.rows]
        )
        for i, title in enumerate(table.columns)
    ]
    print_tables(console, [(row[0], "attack") for row in table.rows], [columns])
    console.print()
    for line in table.lines:
        print_paragraph(console, line)
    print_paragraph(console, table.note, "dim")


def print_explanations(console: Console, record: MapsRecord) -> None:
    """What attacks did to maps: a table after the other, then what follows."""
    for table in maps.build_tables(record, brief=True):
        print_heading(console, table.title)
        columns = [
            TableColumn(
                fold_name(render_cell(console, title), SHORT),
                [
                    "\n".join(render_cell(console, line) for line in cells[i])
                    for _, cells in table.rows
                ],
                left=True,
            )
            for i, title in enumerate(table.columns)
        ]
        names = [(name, "attack") for name, _ in table.rows]
        print_tables(console, names, [columns], table.kind)
        console.print()
        print_paragraph(console, table.note, "dim")
    print_list(console, "Explanations", [f"- {line}" for line in maps.write_sentences(record)])


def render_matrix_cell(console: Console, row: attack_tables.MatrixRow, i: int) -> str:
    """What stands in one column of a row of the matrix, a line for each number and note."""
    if not row.cells:
        return ""
    lines = [part for found in row.cells[i] for part in (found.number, found.note) if part]
    return "\n".join(render_cell(console, line) for line in lines) or render_cell(
        console, formatting.MISSING
    )


def wrap_title(console: Console, column: TableColumn) -> TableColumn:
    """A column with its title on as many lines as its cells are narrow."""
    narrow = max(column._replace(title="").width - GAP, NARROWEST)
    return column._replace(title=fold_name(render_cell(console, column.title), narrow))
