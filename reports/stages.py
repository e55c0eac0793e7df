"""What the stages of an attack saw, broke and cost: a small table under that of all attacks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from robusteval.runs.types import STAGE, Outcome

from .formatting import format_quantity
from .measures import Count, Positive, RatesRecord


@dataclass(frozen=True)
class StageRow:
    """A stage of an attack that has several, on what those before it left."""

    name: str
    seen: Count
    broken: Count
    passes: Positive


class StageTable(NamedTuple):
    """The stages of one attack as they are set: a title for each column, a row for each stage."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    note: str


COLUMNS = ("images", "fooled", "passes each", "passes per image")


def build_stages(outcome: Outcome) -> tuple[StageRow, ...]:
    """The stages of an attack, in their order; none of one that has none.

    An image fell in the last stage that it was given to.
    """
    costs = {
        name.removeprefix(STAGE): column[outcome.attacked]
        for name, column in outcome.columns.items()
        if name.startswith(STAGE)
    }
    if not costs:
        return ()
    table = np.stack(list(costs.values()))  # (stages, images)
    fallen = outcome.success()[outcome.attacked]
    last = len(table) - 1 - (table > 0)[::-1].argmax(0)
    return tuple(
        StageRow(
            name,
            int((table[i] > 0).sum()),
            int((fallen & (last == i)).sum()),
            float(table[i].sum()),
        )
        for i, name in enumerate(costs)
    )


class StagedAttack(Protocol):
    """A row of an attack, as far as its stages go."""

    @property
    def spec(self) -> str:
        """How it is asked for."""
        ...

    @property
    def success_rate(self) -> RatesRecord:
        """Of as many images as were attacked."""
        ...

    @property
    def stages(self) -> tuple[StageRow, ...]:
        """In their order."""
        ...


def build_stage_tables(rows: Sequence[StagedAttack]) -> Iterator[StageTable]:
    """A table for each attack that has stages, of those that saw images; the note with the last."""
    staged = [row for row in rows if row.stages]
    for row in staged:
        attacked = row.success_rate.float.n
        noted = row is staged[-1] and any(is_far(stage.name) for stage in row.stages)
        yield StageTable(
            f"Stages of {row.spec}",
            COLUMNS,
            [(stage.name, *list_cells(stage, attacked)) for stage in row.stages if stage.seen],
            NOTE if noted else "",
        )


def list_cells(stage: StageRow, attacked: int) -> Iterator[str]:
    """What a stage saw, broke and cost, as text."""
    yield f"{stage.seen:,}"
    yield f"{stage.broken:,}"
    yield format_quantity(stage.passes / stage.seen)
    yield format_quantity(stage.passes / attacked)


def is_far(name: str) -> bool:
    """Whether a stage is one on images drawn from those far from success."""
    return name.startswith("far ")


NOTE = (
    "Passes, forward and backward: of each image the stage was given, and shared among all attacked"
    " ones. Images beyond the cut are far from success; the dear stages get 5 % of them, drawn at"
    " random. If one of these falls, the attack is run again with the cut doubled."
)
