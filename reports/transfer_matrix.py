"""Several networks that are attacked and judge each other's images: sources against targets.

Only images count that all of these networks have right, so that every cell of a table is over the
same images. On the diagonal stands what an attack does to the network that it was made on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np

from robusteval.runs import metrics
from robusteval.runs.storage import digest
from robusteval.runs.types import Columns, Flags, Run

from . import formatting
from .compare import order_images
from .measures import Count, RateRecord, build_rate
from .models import name_models
from .rejudged import identify
from .transfer import format_share

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class SourceRow:
    """What images made on one network do to all."""

    source: str
    targets: Annotated[tuple[RateRecord | None, ...], "fooled; null: not judged there"]


@dataclass(frozen=True)
class AttackMatrix:
    """One attack: a row for each network that it was made on."""

    attack: str
    rows: tuple[SourceRow, ...]


@dataclass(frozen=True)
class TransferMatrix:
    """Networks against networks, attack by attack."""

    networks: tuple[str, ...]
    shared: Annotated[Count, "images that all networks have right"]
    attacks: tuple[AttackMatrix, ...]


class MatrixTable(NamedTuple):
    """A matrix as text: the first column names the source."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


def build_matrix(runs: Sequence[Run]) -> TransferMatrix | None:
    """What runs that name each other's networks as targets say together.

    None where fewer than two networks are attacked and judged, or on different images.
    """
    runs = [run.keep_different() for run in runs if run.receivers]
    sources: dict[str, list[Run]] = {}
    for run in runs:  # several of one network are one row
        sources.setdefault(identify_network(run.model), []).append(run)
    if len(sources) < 2 or not share_images(runs):
        return None
    names = name_sources([some[0] for some in sources.values()], runs)
    clean = {identify_network(run.model): sort_columns(run.clean, run.clean) for run in runs}
    for run in runs:
        for each in run.receivers:
            clean.setdefault(
                identify_network(each.facts, str(each.spec)), sort_columns(each.clean, run.clean)
            )
    shared: Flags = np.logical_and.reduce(
        [metrics.find_right(columns) for columns in clean.values()]
    )
    attacks: dict[str, str] = {}
    for run in runs:
        attacks |= {identify(o): str(o.attack) for o in run.attacks if o.defense is None}
    return TransferMatrix(
        networks=tuple(names[key] for key in clean),
        shared=int(shared.sum()),
        attacks=tuple(
            AttackMatrix(
                title,
                tuple(build_source(some, key, names, clean, shared) for some in sources.values()),
            )
            for key, title in attacks.items()
        ),
    )


def share_images(runs: Sequence[Run]) -> bool:
    """Whether all runs are of the same images with the same labels."""
    looked = [sort_columns(run.clean, run.clean) for run in runs]
    first = looked[0]
    return all(
        np.array_equal(each["id"], first["id"]) and np.array_equal(each["label"], first["label"])
        for each in looked[1:]
    )


def sort_columns(columns: Columns, clean: Columns) -> Columns:
    """Columns in the order of the images' content."""
    order = order_images(clean)
    return {name: column[order] for name, column in columns.items()}


def identify_network(facts: Any, name: str = "") -> str:
    """A text that is equal for the same network, read in the same way."""
    known = [facts.get(key) for key in ("sha256", "arch", "mean", "std", "dtype")]
    return digest([*known, name if known[0] is None else ""])


def name_sources(attacked: Sequence[Run], runs: Iterable[Run]) -> dict[str, str]:
    """A name for each network, those that are attacked first: one of the `runs` of each."""
    names = {
        identify_network(run.model): name
        for run, name in zip(attacked, name_models(attacked), strict=True)
    }
    for run in runs:
        for each in run.receivers:
            names.setdefault(identify_network(each.facts, str(each.spec)), str(each.spec))
    return names


def build_source(
    runs: Sequence[Run],
    attack: str,
    names: Mapping[str, str],
    networks: Iterable[str],
    shared: Flags,
) -> SourceRow:
    """On how many of the images ``(n,)`` that count each network is fooled by one attack.

    `runs` are those of one network that is attacked; of an attack that several hold the first
    counts.
    """
    own = identify_network(runs[0].model)
    found: dict[str, Flags] = {}
    for run in runs:
        order = order_images(run.clean)
        keys = {str(e.spec): identify_network(e.facts, str(e.spec)) for e in run.receivers}
        made = [(own, o) for o in run.attacks if o.defense is None]
        for key, outcome in (*made, *((keys[str(o.defense)], o) for o in run.transfers)):
            if identify(outcome) == attack:
                found.setdefault(key, outcome.success()[order][shared])
    rates = (build_rate(metrics.rate(found[key])) if key in found else None for key in networks)
    return SourceRow(names[own], tuple(rates))


def build_matrix_tables(record: TransferMatrix) -> list[MatrixTable]:
    """A table for each attack."""
    return [
        MatrixTable(
            f"Transfer of {matrix.attack}: made on (rows), shown to (columns)",
            record.networks,
            [(row.source, *map(format_share, row.targets)) for row in matrix.rows],
        )
        for matrix in record.attacks
    ]


def write_matrix_note(record: TransferMatrix) -> str:
    """What the numbers of the tables are."""
    return (
        f"Images fooled, of the {formatting.format_count(record.shared, 'image')} that all of these"
        f" {len(record.networks)} networks have right, with the Wilson 95 % interval. A network"
        " that withstands images made for another has shown no robustness of its own."
    )


def print_matrix(console: Console, runs: Sequence[Run]) -> None:
    """Print networks against networks; nothing where they do not judge each other's images."""
    from .console import ROOM, TableColumn, fold_name, print_paragraph, print_tables, render_cell

    record = build_matrix(runs)
    if record is None:
        return
    for table in build_matrix_tables(record):
        console.print()
        print_paragraph(console, table.title, "bold")
        columns = [
            TableColumn(
                fold_name(render_cell(console, title), ROOM),
                [render_cell(console, row[i + 1]) for row in table.rows],
                left=True,
            )
            for i, title in enumerate(table.columns)
        ]
        print_tables(console, [(row[0], "attack") for row in table.rows], [columns], "made on")
    console.print()
    print_paragraph(console, write_matrix_note(record), "dim")
