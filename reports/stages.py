"""What the stages of an attack saw, broke and cost: a small table under that of all attacks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from robusteval.runs.types import MADE, STAGE, Outcome

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

    An image fell to the stage that made what was judged: a success that rounding to 8 bit undoes
    is searched on, and a later stage may find a better one.
    """
    costs = {
        name.removeprefix(STAGE): column[outcome.attacked]
        for name, column in outcome.columns.items()
        if name.startswith(STAGE)
    }
    fallen = outcome.success()[outcome.attacked]
    return tuple(
        StageRow(
            name,
            int((cost > 0).sum()),
            int((fallen & outcome.columns[f"{MADE}{name}"][outcome.attacked]).sum()),
            float(cost.sum()),
        )
        for name, cost in costs.items()
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
    " ones. The dear stages are given the images near to success and, as a check, 5 % of those far"
    " from it, drawn at random. If one of these falls, an attack that spares none is run as well."
)
