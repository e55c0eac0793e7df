"""What is left of each class and of each slice of the images, and what classes are turned into.

A slice is the images that share a value of a column of the user's own. Each group is held against
all other images by Fisher's exact test, corrected by Holm's method over the groups, so that the
lowest of many numbers is not taken for a weakness that is chance.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np

from robusteval.runs import metrics, statistics
from robusteval.runs.slices import SLICE
from robusteval.runs.statistics import Rate
from robusteval.runs.types import Columns, Outcome, Run, Threat, Values

from .measures import (
    CORRUPTION,
    Behind,
    Count,
    Limits,
    Place,
    RateRecord,
    Share,
    ThreatRecord,
    build_rate,
    build_threat,
    drop_not_finite,
)

LEVEL = 0.05  # of a corrected p-value, below which a group is below the others
MOST_TURNS = 400  # pairs of classes of one attack; all there can be of twenty classes
LOWEST = -2  # of what stands in the place of a class, see `Outcome`
MOST_TURNED = 500  # attacks of which each has a record of its own
NOT_FINITE = "not finite"  # in place of a class, where logits were not

GroupKind = Literal["class", "slice"]
Case = tuple[str | None, Threat, Sequence[Outcome]]


@dataclass(frozen=True)
class GroupRow:
    """The images of one class, or of one value of a slice."""

    name: str
    label: Annotated[int | None, "number of the class; null: a slice"]
    clean: Annotated[RateRecord, "right before the attack"]
    robust_accuracy: RateRecord
    distance: Annotated[float | None, "median of the nearest successes, in the norm of the threat"]
    beyond: Annotated[
        RateRecord | None,
        "of a threat without a radius: of the images that were right those not fooled within the"
        " median distance of all; null: there is a radius",
    ]
    p_holm: Annotated[
        Share | None,
        "Fisher's exact test that it is not below the other images, in `beyond` where that is"
        " known, corrected over the groups; null: nothing to compare",
    ]

    @property
    def compared(self) -> RateRecord:
        """The share in which groups are held against each other."""
        return self.robust_accuracy if self.beyond is None else self.beyond


@dataclass(frozen=True)
class GroupsRecord:
    """All classes, or all values of a slice, under one threat."""

    kind: GroupKind
    by: Annotated[str, "class, or the name of the column"]
    threat: ThreatRecord
    defense: Behind
    rows: tuple[GroupRow, ...]
    worst: Annotated[
        Place | None,
        "row of the lowest robust accuracy, or `beyond`, among those that are below the others if"
        " some are; null: there is one group alone, or all are alike",
    ]
    rest: Annotated[RateRecord | None, "the same of all other images than those of worst"]


@dataclass(frozen=True)
class TurnedRow:
    """Images of one class that are taken for another."""

    label: int
    name: str
    becomes: Annotated[int, "-1: the logits are not finite"]
    becomes_name: str
    k: Annotated[Count, "images"]


@dataclass(frozen=True)
class TurnedRecord:
    """Which class an attack turns into which: its successes, the most frequent pairs first."""

    attack: Annotated[str | None, "null: of all attacks the success that is nearest"]
    adaptive: bool
    threat: ThreatRecord
    defense: Behind
    fooled: Annotated[Count, "images"]
    pairs: Annotated[tuple[TurnedRow, ...], Limits(maxItems=MOST_TURNS)]
    left_out: Annotated[Count, "images of rarer pairs, which are not listed"]


class Split(NamedTuple):
    """A way to divide the images of a run."""

    kind: GroupKind
    by: str
    names: Sequence[str]
    labels: Sequence[int | None]
    codes: Values  # (n,): positions in names


def name_label(run: Run, label: int) -> str:
    """The name of a class where the run has names, else its number."""
    names = run.data.get("class_names") or ()
    if label < 0:
        return NOT_FINITE
    return str(names[label]) if label < len(names) else f"class {label}"


def list_splits(run: Run) -> Iterator[Split]:
    """By class, where there are several, and by each slice."""
    if not run.clean or not len(run.clean["label"]):
        return
    labels, codes = np.unique(run.clean["label"], return_inverse=True)
    if len(labels) > 1:
        numbers = [int(label) for label in labels]
        names = [name_label(run, number) for number in numbers]
        yield Split("class", "class", names, numbers, codes)
    for by, names in list_slices(run).items():
        yield Split("slice", by, names, [None] * len(names), run.clean[f"{SLICE}{by}"])


def list_slices(run: Run) -> dict[str, list[str]]:
    """The values of each slice of a run, in the order of their codes."""
    known = run.config.get("slices") or {}
    return {
        by: [name or "(empty)" for name in facts["values"]]
        for by, facts in known.items()
        if f"{SLICE}{by}" in run.clean
    }


def choose_cases(cases: Sequence[Case]) -> list[Case]:
    """Of the threats of a run those of attackers; of corruptions alone, all."""
    attacked = [case for case in cases if case[1].norm != CORRUPTION]
    return attacked or list(cases)


def build_groups(run: Run, cases: Sequence[Case]) -> Iterator[GroupsRecord]:
    """Every class and every slice under every threat of an attacker, behind every defense."""
    for split in list_splits(run):
        for defense, threat, outcomes in choose_cases(cases):
            yield build_group(split, defense, threat, outcomes)


def build_group(
    split: Split, defense: str | None, threat: Threat, outcomes: Sequence[Outcome]
) -> GroupsRecord:
    """The groups of one split under one threat."""
    attacked, broken = outcomes[0].attacked, metrics.find_breaks(outcomes)
    held = attacked & ~broken.any(0)
    far = metrics.find_nearest(outcomes)
    robust = count_groups(split, held)
    compared = robust
    beyond: list[Rate | None] = [None] * len(robust)
    if threat.eps is None and np.isfinite(far).any():
        # Mood's median test, one-sided; what is not fooled is farther than any success
        far = np.where(np.isnan(far), np.inf, far)
        right = Split(split.kind, split.by, split.names, split.labels, split.codes[attacked])
        middle = min(statistics.median(far[attacked]), far[np.isfinite(far)].max())
        compared = count_groups(right, far[attacked] > middle)
        beyond = list(compared)
    p = compare_groups(compared)
    rows = tuple(
        GroupRow(
            name=split.names[i],
            label=split.labels[i],
            clean=build_rate(clean),
            robust_accuracy=build_rate(robust[i]),
            distance=drop_not_finite(statistics.median(far[(split.codes == i) & np.isfinite(far)])),
            beyond=None if past is None else build_rate(past),
            p_holm=p.get(i),
        )
        for i, (clean, past) in enumerate(zip(count_groups(split, attacked), beyond, strict=True))
    )
    worst = find_worst(rows)
    rest = None if worst is None else build_rate(sum_others(compared, worst))
    return GroupsRecord(split.kind, split.by, build_threat(threat), defense, rows, worst, rest)


def compare_groups(rates: Sequence[Rate]) -> dict[int, float]:
    """For each group with images the corrected p-value of being below all others; none of one."""
    tested = [i for i, rate in enumerate(rates) if rate.n]
    if len(tested) < 2:
        return {}
    p = [statistics.fewer_test(*rates[i], *sum_others(rates, i)) for i in tested]
    return dict(zip(tested, statistics.holm(p), strict=True))


def sum_others(rates: Sequence[Rate], place: int) -> Rate:
    """What the groups but one are together."""
    k, n = (sum(side) for side in zip(*rates, strict=True))
    return Rate(k - rates[place].k, n - rates[place].n)


def count_groups(split: Split, held: Values) -> list[Rate]:
    """How many images of each group are among these ``(n,)``."""
    size = len(split.names)
    k = np.bincount(split.codes[held], minlength=size)
    n = np.bincount(split.codes, minlength=size)
    return [Rate(int(some), int(all_)) for some, all_ in zip(k, n, strict=True)]


def find_worst(rows: Sequence[GroupRow]) -> int | None:
    """The row with the lowest share, the one with more images first.

    Among those that are below the others by more than chance, if there are some; None where all
    rows with images have the same share, or there is only one.
    """
    known = [i for i, row in enumerate(rows) if row.compared.n]
    if len({rows[i].compared.value for i in known}) < 2:
        return None
    below = [i for i in known if is_below(rows[i])]

    def order(i: int) -> tuple[float, int, int]:
        rate = rows[i].compared
        return rate.value or 0.0, -rate.n, i

    return min(below or known, key=order)


def is_below(row: GroupRow) -> bool:
    """Whether a group is less robust than the other images, and not by chance."""
    return row.p_holm is not None and row.p_holm < LEVEL


def build_turned(run: Run, cases: Sequence[Case]) -> Iterator[TurnedRecord]:
    """What attacks turn classes into: of each threat the nearest successes, then each attack.

    Of very many attacks the former alone.
    """
    chosen = choose_cases(cases)
    alone = sum(len(outcomes) for *_, outcomes in chosen) <= MOST_TURNED
    for defense, threat, outcomes in chosen:
        made = TurnedRecord(None, True, build_threat(threat), defense, 0, (), 0)
        if len(outcomes) > 1:
            made = replace(made, adaptive=any(outcome.adaptive for outcome in outcomes))
            yield count_turned(run, made, outcomes)
        for outcome in outcomes if alone or len(outcomes) == 1 else ():
            one = replace(made, attack=str(outcome.attack), adaptive=outcome.adaptive)
            yield count_turned(run, one, [outcome])


def count_turned(run: Run, empty: TurnedRecord, outcomes: Sequence[Outcome]) -> TurnedRecord:
    """A record with the pairs of classes that these attacks lead from one to the other."""
    fooled, label, becomes = find_turned(outcomes)
    label, becomes = label[fooled], becomes[fooled]
    # a number for each pair: pairs as rows take numpy ten times as long to count
    span = int(becomes.max(initial=0)) + 1 - LOWEST
    codes, counts = np.unique(label * span + (becomes - LOWEST), return_counts=True)
    pairs = np.stack([codes // span, codes % span + LOWEST])
    order = np.argsort(-counts, kind="stable")  # of equal counts by the classes
    rows = tuple(
        TurnedRow(
            label=int(pairs[0, i]),
            name=name_label(run, int(pairs[0, i])),
            becomes=int(pairs[1, i]),
            becomes_name=name_label(run, int(pairs[1, i])),
            k=int(counts[i]),
        )
        for i in order[:MOST_TURNS]
    )
    total = int(fooled.sum())
    left_out = total - sum(row.k for row in rows)
    return replace(empty, fooled=total, pairs=rows, left_out=left_out)


def find_turned(outcomes: Sequence[Outcome]) -> tuple[Values, Values, Values]:
    """The images ``(n,)`` that are fooled, their classes, and what the nearest success becomes."""
    broken = metrics.find_breaks(outcomes)
    columns: Columns = outcomes[0].columns
    if len(outcomes) == 1:
        return broken[0], columns["label"], columns["pred_adv"]
    best = metrics.find_nearest_attack(outcomes)
    becomes = np.stack([outcome.columns["pred_adv"] for outcome in outcomes])
    return np.asarray(broken.any(0)), columns["label"], becomes[best, np.arange(len(best))]


def count_by_class(groups: Sequence[GroupsRecord], turned: TurnedRecord) -> dict[int, Any]:
    """Of each class the images that were right before these attacks, by its number."""
    for group in groups:
        same = (group.threat, group.defense) == (turned.threat, turned.defense)
        if same and group.kind == "class":
            return {row.label: row.clean.k for row in group.rows if row.label is not None}
    return {}
