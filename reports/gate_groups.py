"""Gates on the images of one class or one slice, or on the worst of several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from robusteval.registry import explain_unknown
from robusteval.runs.types import Columns, Flags, Run

from .baseline import Baseline
from .gate_config import EVERY, Rule
from .gate_scope import Scene
from .gate_tests import Undecided, Unmet
from .groups import Split, list_splits
from .record import GateOutcome, GateRow

SEVERITY: tuple[GateOutcome, ...] = ("failed", "inconclusive", "passed")
NAMED = 5


class Part(NamedTuple):
    """Images that a gate looks at by themselves."""

    name: str  # as in "class cat"; empty: all images
    scene: Scene
    lack: Unmet | Undecided | None = None  # why there is nothing to look at


def list_parts(rule: Rule, scene: Scene) -> Iterator[Part]:
    """The parts of the images that a gate is about: all, or those of classes or slices."""
    if rule.slice is None and rule.label is None:
        yield Part("", scene)
        return
    noun = "class" if rule.slice is None else rule.slice.column
    kind = "class" if rule.slice is None else "slice"
    splits = [split for split in list_splits(scene.run) if split.kind == kind]
    split = next((each for each in splits if each.by == noun), None)
    if split is None:
        known = ", ".join(each.by for each in splits) or "none"
        lack = (
            "The images of the run are all of one class."
            if kind == "class"
            else f"The run has no slice {noun}; it has {known}: `evaluate` divides images by"
            f" --slice {noun}."
        )
        yield Part(noun, scene, Unmet(lack))
        return
    value = rule.label if rule.slice is None else rule.slice.value
    places = find_places(split, value)
    if not places:
        lack = explain_unknown(noun, str(value), list(split.names))
        yield Part(f"{noun} {value}", scene, Unmet(f"{lack[0].upper()}{lack[1:]}."))
    for place in places:
        yield build_part(rule, scene, split, place)


def find_places(split: Split, value: str | None) -> list[int]:
    """The groups that a gate names: all, one by its name, or a class by its number."""
    if named := [i for i, name in enumerate(split.names) if name == value]:
        return named
    if value in (None, EVERY):
        return list(range(len(split.names)))
    return [i for i, label in enumerate(split.labels) if label is not None and str(label) == value]


def build_part(rule: Rule, scene: Scene, split: Split, place: int) -> Part:
    """One group with what the run and the baseline say of its images."""
    rows: Flags = split.codes == place
    name = f"{split.by} {split.names[place]}"
    if not rows.any():
        return Part(name, scene, Undecided(f"The run has no image of {name}."))
    run = select_images(scene.run, rows, outcomes=rule.min_tpr is not None)
    then = scene.then
    if then is not None:
        then = select_verdicts(then, np.isin(then.ids, scene.here.ids[rows]))
    return Part(name, Scene(run, select_verdicts(scene.here, rows), then))


def select_images(run: Run, rows: Flags, *, outcomes: bool) -> Run:
    """A run with these images alone ``(n,)``; of attacks only where that is asked for."""

    def select(columns: Columns) -> Columns:
        return {name: values[rows] for name, values in columns.items()}

    attacks = run.attacks if outcomes else ()
    return replace(
        run,
        clean=select(run.clean),
        outcomes=tuple(replace(each, columns=select(each.columns)) for each in attacks),
    )


def select_verdicts(side: Baseline, rows: Flags) -> Baseline:
    """Verdicts on these images alone ``(n,)``."""
    return replace(
        side,
        ids=side.ids[rows],
        clean=side.clean[rows],
        cells=tuple(cell._replace(robust=cell.robust[rows]) for cell in side.cells),
        defenses=tuple(each._replace(clean=each.clean[rows]) for each in side.defenses),
    )


def choose_worst(rows: Sequence[GateRow], parts: Sequence[str], on: str, noun: str) -> GateRow:
    """Of one gate on several groups the row that decides, with what became of the others."""
    worst = min(rows, key=order_gate)
    counts = {outcome: sum(row.outcome == outcome for row in rows) for outcome in SEVERITY}
    counted = [f"{count:,} {outcome}" for outcome, count in counts.items() if count]
    named = [
        part
        for row, part in zip(rows, parts, strict=True)
        if row.outcome == worst.outcome and row is not worst
    ]
    others = ""
    if named and worst.outcome != "passed":
        more = f" and {len(named) - NAMED:,} more" if len(named) > NAMED else ""
        others = f" Likewise {', '.join(named[:NAMED])}{more}."
    total = f"{len(rows):,} {'classes' if noun == 'class' else f'values of {noun}'}"
    part = parts[rows.index(worst)]
    return replace(
        worst,
        on=f"{on}, worst {noun}: {part}",
        reason=f"{worst.reason} Of {total} {', '.join(counted)}.{others}",
    )


def order_gate(row: GateRow) -> tuple[int, float, float]:
    """The worst first: by outcome, then by the room that is left, then by p."""
    room = -np.inf
    if row.value is not None and row.limit is not None:
        rises = row.kind in ("floor", "min_tpr")
        low = row.value if row.low is None else row.low
        room = low - row.limit if rises else row.limit - row.value
    return SEVERITY.index(row.outcome), room, row.p if row.p is not None else 1.0
