"""The report of a training, laid out from one record."""

from __future__ import annotations

from dataclasses import dataclass

from robusteval.runs.statistics import Rate
from robusteval.runs.types import format_number, spell_line

from .formatting import format_rate
from .measures import build_rate


@dataclass(frozen=True)
class TrainingRecord:
    """The epoch that was kept, judged on images held out."""

    file: str  # the checkpoint
    stem: str  # of its name, which history and curve share
    epoch: int
    epochs: int
    data: str
    clean: Rate
    robust: Rate  # under PGD
    steps: int  # of PGD
    eps: float  # radius in linf, of the [0, 1] pixel range
    bound_ratio: float | None  # median of how far maps moved over how far they must
    below_bound: int | None  # images whose maps moved less


def render_training(record: TrainingRecord) -> str:
    """What came of a training, in a line for each thing to know."""
    lines = [
        f"{record.file} holds epoch {record.epoch} of {record.epochs};"
        f" {record.stem}.history.json and {record.stem}.curve.png are beside it.",
        f"Of {record.clean.n} images held out of {record.data}: {write_held_out(record.clean)}"
        f" right, {write_held_out(record.robust)} under PGD with {record.steps} steps at eps"
        f" {format_number(record.eps)}.",
    ]
    if record.bound_ratio is not None:
        lines.append(
            f"Where PGD succeeded the maps moved {record.bound_ratio:.3g} times as far as they must"
            f" (median); {record.below_bound} moved less."
        )
    return "\n".join(map(spell_line, lines)) + "\n"


def write_held_out(rate: Rate) -> str:
    """A share of the images held out, with its interval."""
    return format_rate(build_rate(rate))
