"""What corruptions leave of a model: means over kinds and severities, and beside another model.

A corruption is no attack: it looks for nothing, and a worst case over corruptions would be a
number that nobody asks for. What is told is the mean, as in arXiv:1903.12261.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, NamedTuple

import numpy as np

from robusteval.runs import metrics, statistics
from robusteval.runs.types import Outcome, Run

from . import formatting
from .measures import CORRUPTION, Behind, Count, MeanRecord, build_mean

COUNTED_KINDS = 15  # of ImageNet-C, over which published means go
DRAWS = 1000  # samples of the images, for the interval of a quotient
RESULT = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class SeverityRecord:
    """The corruptions of one severity."""

    severity: float
    accuracy: Annotated[MeanRecord, "mean over images of the share of kinds they are right under"]


@dataclass(frozen=True)
class KindRecord:
    """A corruption at all severities that were run."""

    kind: str
    accuracy: Annotated[MeanRecord, "mean over images of the share of severities"]


@dataclass(frozen=True)
class CorruptionsRecord:
    """Accuracy under corruptions: right as the image is, and right when it is corrupted."""

    defense: Behind
    cells: Annotated[Count, "corruptions that were run: kinds times severities, if all were"]
    accuracy: Annotated[MeanRecord, "mean over images of the share of cells they are right under"]
    severities: tuple[SeverityRecord, ...]
    kinds: tuple[KindRecord, ...]


class CorruptionTable(NamedTuple):
    """Accuracy as text: a row for each kind, a column for each severity, and the means."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


def is_corruption(outcome: Outcome) -> bool:
    """Whether a cell is a corruption."""
    return outcome.threat.norm == CORRUPTION


def build_corruptions(run: Run) -> Iterator[CorruptionsRecord]:
    """The means of the corruptions of a run, behind nothing and behind each defense."""
    found: dict[str | None, list[Outcome]] = {}
    for outcome in filter(is_corruption, run.attacks):
        behind = None if outcome.defense is None else str(outcome.defense)
        found.setdefault(behind, []).append(outcome)
    for behind, group in found.items():
        severities = group_by(group, "severity")
        yield CorruptionsRecord(
            defense=behind,
            cells=len(group),
            accuracy=average(group),
            severities=tuple(
                SeverityRecord(severity, average(severities[severity]))
                for severity in sorted(severities)
            ),
            kinds=tuple(
                KindRecord(kind, average(g)) for kind, g in group_by(group, "kind").items()
            ),
        )


def group_by(group: Sequence[Outcome], parameter: str) -> dict[Any, list[Outcome]]:
    """Corruptions by kind or severity, in order of appearance."""
    found: dict[Any, list[Outcome]] = {}
    for outcome in group:
        found.setdefault(outcome.resolved.get(parameter), []).append(outcome)
    return found


def average(group: Sequence[Outcome]) -> MeanRecord:
    """The mean over images of the share of these cells that they are right under.

    Student's interval of shares near their limits may leave [0, 1] and is cut off there.
    """
    shares = find_right_shares(group)
    n, held = len(shares), int(shares.sum())
    if n and np.ptp(shares) == 0 and shares[0] in (0, 1):  # where Student's interval has no width
        interval = statistics.wilson(held, n)
        return MeanRecord(held / n, interval.low, interval.high, n)
    mean = build_mean(statistics.mean_interval(shares))
    if mean.low is None or mean.high is None:
        return mean
    return replace(mean, low=max(mean.low, 0.0), high=min(mean.high, 1.0))


def find_right_shares(group: Sequence[Outcome]) -> RESULT:
    """The share of cells ``(n,)`` under which each image is right."""
    held = group[0].attacked & ~metrics.find_breaks(group)
    shares: RESULT = held.mean(0)
    return shares


def write_corruption_numbers(found: CorruptionsRecord) -> str:
    """The mean with what it is over: ``61.2 % (58.9–63.5) over 15 kinds at 5 severities``."""
    kinds, severities = len(found.kinds), len(found.severities)
    over = formatting.format_count(found.cells, "corruption")
    if found.cells == kinds * severities > 1:
        steps = (
            formatting.format_count(severities, "severity").replace("severitys", "severities")
            if severities > 1
            else f"severity {found.severities[0].severity:g}"
        )
        over = f"{formatting.format_count(kinds, 'kind')} of corruption, {steps}"
    elif found.cells == 1:
        over = f"{found.kinds[0].kind} of severity {found.severities[0].severity:g}"
    behind = f" behind {found.defense}" if found.defense else ""
    return f"{format_mean(found.accuracy)} under {over}{behind}"


def format_mean(mean: MeanRecord) -> str:
    """A mean share with its interval, as ``61.2 % (58.9–63.5)``."""
    if mean.value is None:
        return formatting.MISSING
    d = formatting.choose_decimals(mean.n)
    if mean.low is None or mean.high is None:
        return f"{100 * mean.value:.{d}f} %"
    return f"{100 * mean.value:.{d}f} % ({100 * mean.low:.{d}f}–{100 * mean.high:.{d}f})"


def write_corruption_notes(found: Sequence[CorruptionsRecord], attacked: bool) -> Iterator[str]:
    """What must be known beside the mean: the hardest kind, and what it says nothing of."""
    for record in found:
        # at other severities one kind is not harder than another
        if record.cells == len(record.kinds) * len(record.severities) and len(record.kinds) > 1:
            worst = min(record.kinds, key=lambda kind: kind.accuracy.value or 0.0)
            behind = f" behind {record.defense}" if record.defense else ""
            mean = format_mean(worst.accuracy)
            yield f"Hardest corruption{behind}: {worst.kind}, {mean} on average."
    if found and not attacked:
        yield (
            "No attacker was tried: corruptions look for no error, and say nothing of one who does;"
            " add --preset quick."
        )


def has_table(found: CorruptionsRecord) -> bool:
    """Whether corruptions behind a defense have a table of their own: of one there is no mean."""
    return found.cells > 1


def build_corruption_tables(
    found: Sequence[CorruptionsRecord], run: Run
) -> Iterator[CorruptionTable]:
    """Accuracy by kind and severity with the means, a table for each defense."""
    for record in filter(has_table, found):
        group = [
            outcome
            for outcome in filter(is_corruption, run.attacks)
            if (None if outcome.defense is None else str(outcome.defense)) == record.defense
        ]
        behind = f" behind {record.defense}" if record.defense else ""
        steps = [each.severity for each in record.severities]
        cells = {
            (outcome.resolved.get("kind"), outcome.resolved.get("severity")): average([outcome])
            for outcome in group
        }
        rows = [
            (
                kind.kind,
                *(write_share(cells.get((kind.kind, step))) for step in steps),
                format_mean(kind.accuracy),
            )
            for kind in record.kinds
        ]
        together = group_by(group, "severity")
        rows += [
            (
                "mean",
                *(write_share(each.accuracy) for each in record.severities),
                format_mean(record.accuracy),
            ),
            (
                "right under all",
                *(write_share(build_all(together[step])) for step in steps),
                format_mean(build_all(group)),
            ),
        ]
        yield CorruptionTable(
            f"Accuracy under corruptions{behind}, by severity",
            ("corruption", *(f"{step:g}" for step in steps), "mean"),
            rows,
        )


def build_all(group: Sequence[Outcome]) -> MeanRecord:
    """The share of images that are right under all of these cells."""
    held = find_right_shares(group) == 1
    interval = statistics.wilson(int(held.sum()), len(held))
    return MeanRecord(float(held.mean()), interval.low, interval.high, len(held))


def write_share(mean: MeanRecord | None) -> str:
    """A share without its interval; empty for what was not run."""
    if mean is None:
        return ""
    return format_mean(replace(mean, low=None, high=None))


class MeanChange(NamedTuple):
    """Mean accuracy under the corruptions that two runs have in common."""

    behind: str  # " behind " and the defense, or nothing
    cells: int
    old: float
    new: float
    gap: statistics.Difference

    @property
    def text(self) -> str:
        """By how many points it differs, with the interval."""
        ends = formatting.format_ends(self.gap.low, self.gap.high)
        return f"{100 * self.gap.value:+.1f} points ({ends})"

    @property
    def name(self) -> str:
        """What it is the mean of."""
        count = formatting.format_count(self.cells, "corruption")
        return f"Mean accuracy under {count}{self.behind}"


def describe_corruption_means(before: Run, after: Run) -> Iterator[str]:
    """By how much the mean accuracy under corruptions differs, in a sentence for each defense."""
    for change in compare_corruption_means(before, after):
        old, new = f"{100 * change.old:.1f} %", f"{100 * change.new:.1f} %"
        yield f"{change.name}: {old} before, {new} after, {change.text}."


def compare_corruption_means(before: Run, after: Run) -> Iterator[MeanChange]:
    """By how much the mean accuracy under corruptions differs, behind nothing and each defense.

    Over the corruptions that both ran, of the same images; none where there are none.
    """
    sides = [
        {
            (None if o.defense is None else str(o.defense), str(o.attack), str(o.threat)): o
            for o in filter(is_corruption, run.attacks)
        }
        for run in (before, after)
    ]
    shared = [key for key in sides[0] if key in sides[1]]
    for behind in dict.fromkeys(key[0] for key in shared):
        groups = [[side[key] for key in shared if key[0] == behind] for side in sides]
        old, new = (
            find_right_shares(group)[np.argsort(group[0].columns["id"], kind="stable")]
            for group in groups
        )
        gap = statistics.paired_difference(new, old, np.ones(len(new), np.bool_))
        where = f" behind {behind}" if behind else ""
        yield MeanChange(where, len(groups[0]), float(old.mean()), float(new.mean()), gap)


def describe_corruption_errors(reference: Run, run: Run) -> Iterator[str]:
    """The mean corruption error of a run, with another as the reference, in a sentence.

    For each kind the errors summed over severities are divided by the reference's, and the
    quotients averaged: mCE of arXiv:1903.12261, section 4. Nothing where corruptions are not the
    same in both or the reference makes no error in a kind. The runs are of the same images.
    """
    sides = [find_errors(side) for side in (reference, run)]
    if not sides[0] or sides[0].keys() != sides[1].keys():
        return
    theirs, ours = (np.stack([side[kind] for kind in sides[0]]) for side in sides)
    if not (theirs.mean(1) > 0).all():
        return
    value = float((ours.mean(1) / theirs.mean(1)).mean())
    rng, n = np.random.default_rng(0), ours.shape[1]
    drawn = []
    for _ in range(DRAWS):
        rows = rng.integers(0, n, n)
        below = theirs[:, rows].mean(1)
        if (below > 0).all():
            drawn.append(float((ours[:, rows].mean(1) / below).mean()))
    interval = ""
    if drawn:
        low, high = np.quantile(drawn, (0.025, 0.975))
        interval = f" ({100 * low:.1f}–{100 * high:.1f}, bootstrap over images)"
    kinds = len(sides[0])
    name = "mCE" if kinds == COUNTED_KINDS else f"Mean corruption error over {kinds} kinds"
    yield (
        f"{name} with the run before as the reference: {100 * value:.1f} %{interval}; below 100 %"
        " the run after makes fewer errors under corruptions."
    )


def find_errors(run: Run) -> Mapping[str, RESULT]:
    """For each kind of corruption the errors ``(n,)`` summed over its severities, in id order.

    The four extra kinds count only where they are all there is. Empty without corruptions, or
    where kinds were run at different severities.
    """
    group = [o for o in run.attacks if is_corruption(o) and o.defense is None]
    kinds = group_by(group, "kind")
    steps = {frozenset(str(o.resolved.get("severity")) for o in same) for same in kinds.values()}
    if len(steps) != 1:
        return {}
    counted = {kind: same for kind, same in kinds.items() if kind not in EXTRA} or kinds
    severities = "+".join(sorted(next(iter(steps))))
    return {
        f"{kind} {severities}": (1 - find_right_shares(same))[np.argsort(same[0].columns["id"])]
        for kind, same in sorted(counted.items())
    }


EXTRA = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
