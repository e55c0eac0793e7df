"""Two runs over the same images, compared image by image.

Rates of two runs over the same images rise and fall together, so that a difference is judged by
the images whose verdict changed: the exact McNemar test, and an interval for paired proportions.
What is not the same question in both runs is not compared but named.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from robusteval.errors import NothingEvaluated, RunError, UsageError
from robusteval.runs import metrics, statistics
from robusteval.runs.statistics import Interval, Pairs, Rate
from robusteval.runs.storage import digest
from robusteval.runs.types import Columns, Flags, Outcome, Run, Threat, format_value

from . import formatting
from .corruptions import describe_corruption_errors, describe_corruption_means
from .measures import CORRUPTION, build_threat, to_json_types

TOLD = 3  # differences between two attacks that people are told
FLAGGED = -3  # in place of a prediction: the detector raised its alarm

PairKind = Literal["clean", "attack", "worst case"]
Rows = np.ndarray[Any, np.dtype[np.intp]]
Predictions = np.ndarray[Any, np.dtype[np.int64]]


class Flip(NamedTuple):
    """An image whose verdict changed; predictions as in the columns of a run, or FLAGGED."""

    id: str  # 16 hexadecimal digits
    position: int  # in the data set of the run after
    label: int
    before: int
    after: int
    lost: bool  # right before and wrong after; else the reverse


@dataclass(frozen=True)
class Pair:
    """The same question to both runs: a rate before and after, over the same images."""

    kind: PairKind
    attacks: tuple[str, ...]
    threat: Threat | None
    defense: str | None
    adaptive: bool
    before: Rate
    after: Rate
    change: Pairs
    flips: tuple[Flip, ...]
    p: float  # exact two-sided McNemar
    p_holm: float  # the same, corrected for all pairs of the comparison

    @property
    def difference(self) -> float:
        """After minus before, in [-1, 1]."""
        return -self.change.drop

    @property
    def difference_interval(self) -> Interval:
        """Score interval of the difference at 95 % (Tango 1998)."""
        low, high = self.change.interval
        return Interval(-high, -low)


@dataclass(frozen=True)
class Comparison:
    """What two runs say of the same images."""

    before: Run
    after: Run
    pairs: tuple[Pair, ...]
    unpaired: tuple[str, ...]  # what only one of them did, in words
    remarks: tuple[str, ...]  # what else differs, or does not


class OrderedRun(NamedTuple):
    """A run with its images in the shared order."""

    run: Run
    order: Rows


def compare(a: Run, b: Run) -> Comparison:
    """Compare run `b` with run `a`, the one before.

    RunError if one is incomplete, NothingEvaluated if there are no images, UsageError if they are
    not comparable: other images, labels, classes or seeds, or no attack that is the same in both.
    """
    check_comparable(a, b)
    a, b = a.keep_different(), b.keep_different()
    before, after = OrderedRun(a, order_images(a.clean)), OrderedRun(b, order_images(b.clean))
    pairs = [*pair_clean(before, after), *pair_attacks(before, after)]
    unpaired = [*list_unpaired(a, b, "before", "after"), *list_unpaired(b, a, "after", "before")]
    if not any(pair.kind == "attack" for pair in pairs):
        said = " ".join(unpaired[:TOLD]) or "Neither has any."
        raise UsageError(
            f"the runs share no attack with the same settings, so there is nothing to"
            f" compare. {said}"
        )
    pairs += pair_worst_cases(before, after)
    unpaired += list_other_worst_cases(a, b)
    adjusted = statistics.holm([pair.p for pair in pairs])
    pairs = [replace(pair, p_holm=p) for pair, p in zip(pairs, adjusted, strict=True)]
    return Comparison(a, b, tuple(pairs), tuple(unpaired), tuple(list_remarks(a, b)))


def check_comparable(a: Run, b: Run) -> None:
    """Raise if the runs are not comparable as a whole."""
    for run, name in ((a, "before"), (b, "after")):
        if not run.finished:
            raise RunError(f"the run {name} ({name_run(run)}) is {run.explain_incompleteness()}")
        if not run.clean or not len(run.clean["id"]):
            raise NothingEvaluated(f"the run {name} ({name_run(run)}) looked at no image")
    first, second = (run.clean["id"][order_images(run.clean)] for run in (a, b))
    if not np.array_equal(first, second):
        shared = len(np.intersect1d(first, second))
        raise UsageError(
            f"the runs looked at different images: {shared:,} are in both, of {len(first):,} before"
            f" and {len(second):,} after; use the same data, --samples and --seed"
        )
    labels = [run.clean["label"][order_images(run.clean)] for run in (a, b)]
    if other := int((labels[0] != labels[1]).sum()):
        raise UsageError(
            f"the runs disagree on the class of {formatting.format_count(other, 'image')}: use the"
            " same labels"
        )
    for what, before, after in (
        ("classes", a.model.get("num_classes"), b.model.get("num_classes")),
        ("class names", a.data.get("class_names"), b.data.get("class_names")),
    ):
        if before is not None and after is not None and before != after:
            said = f"{shorten_setting(before)} before, {shorten_setting(after)} after"
            raise UsageError(f"the models tell other {what} apart: {said}")
    seeds = [run.config.get("seed") for run in (a, b)]
    if seeds[0] != seeds[1]:
        raise UsageError(
            f"the runs have other seeds, so that chance differs too: {seeds[0]} before,"
            f" {seeds[1]} after; use the same --seed"
        )


def order_images(clean: Columns) -> Rows:
    """The images by content, so that the same ones stand in the same places."""
    return np.lexsort((clean["index"], clean["label"], clean["id"]))


def pair_clean(before: OrderedRun, after: OrderedRun) -> Iterator[Pair]:
    """Clean accuracy, undefended and behind each defense of both runs."""
    yield pair_clean_accuracy(before, after, before.run.clean, after.run.clean, None)
    theirs = {str(defended.spec): defended for defended in after.run.defenses}
    for defended in before.run.defenses:
        name = str(defended.spec)
        if name in theirs:
            yield pair_clean_accuracy(before, after, defended.clean, theirs[name].clean, name)


def pair_clean_accuracy(
    before: OrderedRun, after: OrderedRun, a: Columns, b: Columns, defense: str | None
) -> Pair:
    """Clean accuracy on both sides."""
    sides = [(metrics.find_right(clean), read_predictions(clean, "pred_clean")) for clean in (a, b)]
    return join_sides(before, after, sides, "clean", (), None, defense)


def pair_attacks(before: OrderedRun, after: OrderedRun) -> Iterator[Pair]:
    """The cells that are the same in both runs."""
    theirs = {identify_question(outcome): outcome for outcome in after.run.attacks}
    for outcome in before.run.attacks:
        other = theirs.get(identify_question(outcome))
        if other is not None:
            yield pair_outcomes(before, after, [outcome], [other], "attack")


def pair_worst_cases(before: OrderedRun, after: OrderedRun) -> Iterator[Pair]:
    """The worst cases that are made of the same attacks, if of more than one.

    Nobody chooses the worst corruption: `list_remarks` has the means over them.
    """
    theirs = group_outcomes(after.run)
    for group, outcomes in group_outcomes(before.run).items():
        if group[0].norm == CORRUPTION:
            continue
        others = theirs.get(group, [])
        if len(outcomes) > 1 and set(map(identify_question, outcomes)) == set(
            map(identify_question, others)
        ):
            yield pair_outcomes(before, after, outcomes, others, "worst case")


def pair_outcomes(
    before: OrderedRun,
    after: OrderedRun,
    a: Sequence[Outcome],
    b: Sequence[Outcome],
    kind: PairKind,
) -> Pair:
    """Robust accuracy against all of these attacks on both sides."""
    sides = [
        (group[0].attacked & ~metrics.find_breaks(group).any(0), combine_predictions(group))
        for group in (a, b)
    ]
    specs = tuple(str(outcome.attack) for outcome in a)
    adaptive = any(outcome.adaptive for outcome in a)
    return join_sides(before, after, sides, kind, specs, a[0].threat, read_defense(a[0]), adaptive)


def join_sides(
    before: OrderedRun,
    after: OrderedRun,
    sides: Sequence[tuple[Flags, Predictions]],
    kind: PairKind,
    attacks: tuple[str, ...],
    threat: Threat | None,
    defense: str | None,
    adaptive: bool = True,
) -> Pair:
    """Both sides ``(right, predictions)`` with what follows from the images that changed."""
    (right_a, seen_a), (right_b, seen_b) = sides
    right_a, seen_a = right_a[before.order], seen_a[before.order]
    right_b, seen_b = right_b[after.order], seen_b[after.order]
    rows = np.flatnonzero(right_a != right_b)
    clean = {name: after.run.clean[name][after.order][rows] for name in ("id", "index", "label")}
    flips = tuple(
        Flip(f"{id_:016x}", *facts)
        for id_, *facts in zip(
            clean["id"].tolist(),
            clean["index"].tolist(),
            clean["label"].tolist(),
            seen_a[rows].tolist(),
            seen_b[rows].tolist(),
            right_a[rows].tolist(),
            strict=True,
        )
    )
    change = statistics.count_pairs(right_a, right_b)
    p = compute_p(change)
    return Pair(
        kind=kind,
        attacks=attacks,
        threat=threat,
        defense=defense,
        adaptive=adaptive,
        before=metrics.rate(right_a),
        after=metrics.rate(right_b),
        change=change,
        flips=flips,
        p=p,
        p_holm=p,
    )


def read_predictions(columns: Columns, pred: str) -> Predictions:
    """Predictions ``(n,)``, and where a detector raises its alarm, that."""
    made = columns[pred]
    return np.where(columns["flagged"], FLAGGED, made) if "flagged" in columns else made


def combine_predictions(group: Sequence[Outcome]) -> Predictions:
    """What became of each image ``(n,)``: of several attacks, what the first success made of it."""
    made: Predictions = read_predictions(group[-1].columns, "pred_adv").copy()
    for outcome in reversed(group):
        won = outcome.success()
        made[won] = outcome.columns["pred_adv"][won]
    return made


def compute_p(change: Pairs) -> float:
    """Exact McNemar test, two-sided: may the images that changed have fallen either way?"""
    fewer, more = sorted((change.lost, change.gained))
    return min(1.0, 2 * statistics.sign_test(more, fewer))


def identify_question(outcome: Outcome) -> str:
    """A text that is equal for cells of the same attack, threat and defense, and for no others."""
    asked = (outcome.attack.name, read_parameters(outcome), outcome.threat, read_defense(outcome))
    return digest(to_json_types([*asked, outcome.adaptive]))


def read_parameters(outcome: Outcome) -> dict[str, Any]:
    """What an attack was given, defaults too where they are known."""
    return outcome.resolved or outcome.attack.parameters


def list_settings(outcome: Outcome) -> dict[str, Any]:
    """What may tell a cell from another of the same attack."""
    around = {"defense": read_defense(outcome), "adaptive": outcome.adaptive}
    return {**read_parameters(outcome), **outcome.threat._asdict(), **around}


def read_defense(outcome: Outcome) -> str | None:
    """The defense of a cell; None without one."""
    return None if outcome.defense is None else str(outcome.defense)


def group_outcomes(run: Run) -> dict[tuple[Threat, str | None], list[Outcome]]:
    """The cells that make a worst case together."""
    found: dict[tuple[Threat, str | None], list[Outcome]] = {}
    for outcome in run.attacks:
        found.setdefault((outcome.threat, read_defense(outcome)), []).append(outcome)
    return found


def list_unpaired(run: Run, other: Run, here: str, there: str) -> Iterator[str]:
    """The cells of one run that the other has not, with the nearest that it has."""
    theirs = {identify_question(outcome): outcome for outcome in other.attacks}
    for outcome in run.attacks:
        if identify_question(outcome) in theirs:
            continue
        said = f"Only {here}: {describe_cell(outcome)}"
        near = min(
            (o for o in other.attacks if o.attack.name == outcome.attack.name),
            key=lambda o: len(list_unequal_settings(list_settings(outcome), list_settings(o))),
            default=None,
        )
        if near is None:
            yield f"{said}; nothing like it {there}."
            continue
        found = list_unequal_settings(list_settings(outcome), list_settings(near))
        told = ", ".join(
            f"{what} {theirs} {there}, {ours} {here}" for what, ours, theirs in found[:TOLD]
        )
        more = f" and {len(found) - TOLD} more" if len(found) > TOLD else ""
        yield f"{said}; nearest {there}: {describe_cell(near)} ({told}{more})."


def list_unequal_settings(
    ours: Mapping[str, Any], theirs: Mapping[str, Any]
) -> list[tuple[str, str, str]]:
    """Settings that differ, as users write them."""
    return [
        (what, shorten_setting(ours.get(what)), shorten_setting(theirs.get(what)))
        for what in {**ours, **theirs}
        if ours.get(what) != theirs.get(what)
    ]


def list_other_worst_cases(a: Run, b: Run) -> Iterator[str]:
    """The worst cases that are made of other attacks, and are not compared therefore."""
    theirs = group_outcomes(b)
    for (threat, defense), outcomes in group_outcomes(a).items():
        others = theirs.get((threat, defense), [])
        before, after = (
            {identify_question(o): describe_cell(o) for o in group} for group in (outcomes, others)
        )
        if not others or max(len(before), len(after)) < 2 or before.keys() == after.keys():
            continue
        if threat.norm == CORRUPTION:
            continue
        sides = [
            f"only {when}: {', '.join(ours[k] for k in ours if k not in rest)}"
            for when, ours, rest in (("before", before, after), ("after", after, before))
            if ours.keys() - rest.keys()
        ]
        where = formatting.format_threat(build_threat(threat))
        where += f" behind {defense}" if defense else ""
        yield f"The worst cases at {where} are made of other attacks ({'; '.join(sides)})."


def list_remarks(a: Run, b: Run) -> Iterator[str]:
    """What differs without forbidding to compare, and whether the model does."""
    weights = [run.model.get("sha256") for run in (a, b)]
    if None not in weights:
        same = weights[0] == weights[1]
        yield f"The weights are {'the same' if same else 'different'} (by SHA-256)."
    yield from describe_corruption_means(a, b)
    yield from describe_corruption_errors(a, b)
    for what, before, after in list_unequal_settings(list_circumstances(a), list_circumstances(b)):
        yield f"{what}: {before} before, {after} after."


def list_circumstances(run: Run) -> dict[str, Any]:
    """What may change a verdict without being the question."""
    model = ("arch", "arch_sha256", "mean", "std", "size", "resize")
    clean = {name: run.model.get(name) for name in model}
    data = {
        "data": formatting.name_file(run.data.get("name")),
        "transform": run.data.get("transform"),
    }
    facts = {
        f"{defended.spec} {name}": value
        for defended in run.defenses
        for name, value in defended.facts.items()
    }
    return {**clean, **data, **facts, **run.environment}


def shorten_setting(value: Any) -> str:
    """A setting as users write it, not at any length."""
    said = (
        ", ".join(map(format_value, value))
        if isinstance(value, list | tuple)
        else format_value(value)
    )
    return said if len(said) <= 80 else f"{said[:79]}…"


def describe_cell(outcome: Outcome) -> str:
    """A cell in words."""
    if outcome.defense is None:
        return str(outcome.attack)
    knows = "adaptive" if outcome.adaptive else "oblivious"
    return f"{outcome.attack} behind {outcome.defense}, {knows}"


def name_run(run: Run) -> str:
    """A run by the name of its folder."""
    return formatting.name_file(run.folder) or formatting.name_file(run.model.get("file")) or "run"
