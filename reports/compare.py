"""Two runs over the same images, compared image by image.

Rates of two runs over the same images rise and fall together, so that a difference is judged by
the images whose verdict changed: the exact McNemar test, and an interval for paired proportions.
What is not the same question in both runs is not compared but named.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from heapq import nsmallest
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from robusteval.errors import NothingEvaluated, RunError, UsageError
from robusteval.runs import metrics, statistics
from robusteval.runs.statistics import Interval, Pairs, Rate
from robusteval.runs.storage import digest
from robusteval.runs.types import Columns, Flags, Outcome, Run, Threat, format_value

from . import formatting
from .markdown import code, listed, prose
from .markdown import row as table_row
from .measures import build_rate, build_threat, to_json_types
from .terminal import Shown, facts, put_tables, say
from .terminal import listed as print_list
from .terminal import show as show_cell

SCHEMA = 1
LEVEL = 0.05  # of the family of all tests of a comparison
LISTED = 20  # flipped images that people are shown
TOLD = 3  # differences between two attacks that people are told
KINDS = {"clean": "clean", "attack": "attack", "worst case": "worst"}  # as tables style them
FLAGGED = -3  # in place of a prediction: the detector raised its alarm

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

    kind: str  # "clean", "attack", "worst case"
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
    def interval(self) -> Interval:
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


class Side(NamedTuple):
    """A run with its images in the shared order."""

    run: Run
    order: Rows


def compare(a: Run, b: Run) -> Comparison:
    """Compare run `b` with run `a`, the one before.

    RunError if one is incomplete, NothingEvaluated if there are no images, UsageError if they are
    not comparable: other images, labels, classes or seeds, or no attack that is the same in both.
    """
    refuse(a, b)
    before, after = Side(a, in_order(a.clean)), Side(b, in_order(b.clean))
    pairs = [*clean_pairs(before, after), *attack_pairs(before, after)]
    unpaired = [*lonely(a, b, "before", "after"), *lonely(b, a, "after", "before")]
    if not any(pair.kind == "attack" for pair in pairs):
        said = " ".join(unpaired[:TOLD]) or "Neither has any."
        raise UsageError(
            f"the runs share no attack with the same settings, so there is nothing to"
            f" compare. {said}"
        )
    pairs += worst_pairs(before, after)
    unpaired += other_worst(a, b)
    adjusted = statistics.holm([pair.p for pair in pairs])
    pairs = [replace(pair, p_holm=p) for pair, p in zip(pairs, adjusted, strict=True)]
    return Comparison(a, b, tuple(pairs), tuple(unpaired), tuple(remarks(a, b)))


def refuse(a: Run, b: Run) -> None:
    """Raise if the runs are not comparable as a whole."""
    for run, name in ((a, "before"), (b, "after")):
        if run.status != "complete":
            raise RunError(f"the run {name} ({title(run)}) is incomplete: finish it first")
        if not run.clean or not len(run.clean["id"]):
            raise NothingEvaluated(f"the run {name} ({title(run)}) looked at no image")
    first, second = (run.clean["id"][in_order(run.clean)] for run in (a, b))
    if not np.array_equal(first, second):
        shared = len(np.intersect1d(first, second))
        raise UsageError(
            f"the runs looked at different images: {shared:,} are in both, of {len(first):,} before"
            f" and {len(second):,} after; use the same data, --samples and --seed"
        )
    labels = [run.clean["label"][in_order(run.clean)] for run in (a, b)]
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
            raise UsageError(
                f"the models tell other {what} apart: {brief(before)} before, {brief(after)} after"
            )
    seeds = [run.config.get("seed") for run in (a, b)]
    if seeds[0] != seeds[1]:
        raise UsageError(
            f"the runs have other seeds, so that chance differs too: {seeds[0]} before,"
            f" {seeds[1]} after; use the same --seed"
        )


def in_order(clean: Columns) -> Rows:
    """The images by content, so that the same ones stand in the same places."""
    return np.lexsort((clean["index"], clean["label"], clean["id"]))


def clean_pairs(before: Side, after: Side) -> Iterator[Pair]:
    """Clean accuracy, undefended and behind each defense of both runs."""
    yield clean_pair(before, after, before.run.clean, after.run.clean, None)
    theirs = {str(defended.spec): defended for defended in after.run.defenses}
    for defended in before.run.defenses:
        name = str(defended.spec)
        if name in theirs:
            yield clean_pair(before, after, defended.clean, theirs[name].clean, name)


def clean_pair(before: Side, after: Side, a: Columns, b: Columns, defense: str | None) -> Pair:
    """Clean accuracy on both sides."""
    sides = [(metrics.find_right(clean), seen(clean, "pred_clean")) for clean in (a, b)]
    return pair(before, after, sides, "clean", (), None, defense)


def attack_pairs(before: Side, after: Side) -> Iterator[Pair]:
    """The cells that are the same in both runs."""
    theirs = {key(outcome): outcome for outcome in after.run.attacks}
    for outcome in before.run.attacks:
        other = theirs.get(key(outcome))
        if other is not None:
            yield attacks_pair(before, after, [outcome], [other], "attack")


def worst_pairs(before: Side, after: Side) -> Iterator[Pair]:
    """The worst cases that are made of the same attacks, if of more than one."""
    theirs = grouped(after.run)
    for group, outcomes in grouped(before.run).items():
        others = theirs.get(group, [])
        if len(outcomes) > 1 and set(map(key, outcomes)) == set(map(key, others)):
            yield attacks_pair(before, after, outcomes, others, "worst case")


def attacks_pair(
    before: Side, after: Side, a: Sequence[Outcome], b: Sequence[Outcome], kind: str
) -> Pair:
    """Robust accuracy against all of these attacks on both sides."""
    sides = [
        (group[0].attacked & ~metrics.find_breaks(group).any(0), reached(group)) for group in (a, b)
    ]
    specs = tuple(str(outcome.attack) for outcome in a)
    adaptive = any(outcome.adaptive for outcome in a)
    return pair(before, after, sides, kind, specs, a[0].threat, behind(a[0]), adaptive)


def pair(
    before: Side,
    after: Side,
    sides: Sequence[tuple[Flags, Predictions]],
    kind: str,
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
    p = mcnemar(change)
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


def seen(columns: Columns, pred: str) -> Predictions:
    """Predictions ``(n,)``, and where a detector raises its alarm, that."""
    made = columns[pred]
    return np.where(columns["flagged"], FLAGGED, made) if "flagged" in columns else made


def reached(group: Sequence[Outcome]) -> Predictions:
    """What became of each image ``(n,)``: of several attacks, what the first success made of it."""
    made: Predictions = seen(group[-1].columns, "pred_adv").copy()
    for outcome in reversed(group):
        won = outcome.success()
        made[won] = outcome.columns["pred_adv"][won]
    return made


def mcnemar(change: Pairs) -> float:
    """Exact McNemar test, two-sided: may the images that changed have fallen either way?"""
    fewer, more = sorted((change.lost, change.gained))
    return min(1.0, 2 * statistics.sign_test(more, fewer))


def key(outcome: Outcome) -> str:
    """The same for cells that ask the same question."""
    asked = (outcome.attack.name, parameters(outcome), outcome.threat, behind(outcome))
    return digest(to_json_types([*asked, outcome.adaptive]))


def parameters(outcome: Outcome) -> dict[str, Any]:
    """What an attack was given, defaults too where they are known."""
    return outcome.resolved or outcome.attack.parameters


def settings(outcome: Outcome) -> dict[str, Any]:
    """What may tell a cell from another of the same attack."""
    around = {"defense": behind(outcome), "adaptive": outcome.adaptive}
    return {**parameters(outcome), **outcome.threat._asdict(), **around}


def behind(outcome: Outcome) -> str | None:
    """The defense of a cell; None without one."""
    return None if outcome.defense is None else str(outcome.defense)


def grouped(run: Run) -> dict[tuple[Threat, str | None], list[Outcome]]:
    """The cells that make a worst case together."""
    found: dict[tuple[Threat, str | None], list[Outcome]] = {}
    for outcome in run.attacks:
        found.setdefault((outcome.threat, behind(outcome)), []).append(outcome)
    return found


def lonely(run: Run, other: Run, here: str, there: str) -> Iterator[str]:
    """The cells of one run that the other has not, with the nearest that it has."""
    theirs = {key(outcome): outcome for outcome in other.attacks}
    for outcome in run.attacks:
        if key(outcome) in theirs:
            continue
        said = f"Only {here}: {name(outcome)}"
        near = min(
            (o for o in other.attacks if o.attack.name == outcome.attack.name),
            key=lambda o: len(unequal(settings(outcome), settings(o))),
            default=None,
        )
        if near is None:
            yield f"{said}; nothing like it {there}."
            continue
        found = unequal(settings(outcome), settings(near))
        told = ", ".join(
            f"{what} {theirs} {there}, {ours} {here}" for what, ours, theirs in found[:TOLD]
        )
        more = f" and {len(found) - TOLD} more" if len(found) > TOLD else ""
        yield f"{said}; nearest {there}: {name(near)} ({told}{more})."


def unequal(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Settings that differ, as users write them."""
    return [
        (what, brief(ours.get(what)), brief(theirs.get(what)))
        for what in {**ours, **theirs}
        if ours.get(what) != theirs.get(what)
    ]


def other_worst(a: Run, b: Run) -> Iterator[str]:
    """The worst cases that are made of other attacks, and are not compared therefore."""
    theirs = grouped(b)
    for (threat, defense), outcomes in grouped(a).items():
        others = theirs.get((threat, defense), [])
        before, after = ({key(o): name(o) for o in group} for group in (outcomes, others))
        if not others or max(len(before), len(after)) < 2 or before.keys() == after.keys():
            continue
        sides = [
            f"only {when}: {', '.join(ours[k] for k in ours if k not in rest)}"
            for when, ours, rest in (("before", before, after), ("after", after, before))
            if ours.keys() - rest.keys()
        ]
        where = heading(threat, defense)
        yield f"The worst cases at {where} are made of other attacks ({'; '.join(sides)})."


def doubts(a: Run, b: Run) -> Iterator[str]:
    """Why the numbers of a side may not be what they seem."""
    for run, when in ((a, "before"), (b, "after")):
        if any(finding.misfed for finding in run.findings):
            yield f"Not to be used: the model {when} is probably not fed as it was trained."
        grave = sum(finding.grave and not finding.misfed for finding in run.findings)
        if grave:
            found = formatting.format_count(grave, "grave finding")
            yield f"The evaluation {when} is weak ({found}): its numbers are upper bounds."


def remarks(a: Run, b: Run) -> Iterator[str]:
    """What differs without forbidding to compare, and whether the model does."""
    weights = [run.model.get("sha256") for run in (a, b)]
    if None not in weights:
        same = weights[0] == weights[1]
        yield f"The weights are {'the same' if same else 'different'} (by SHA-256)."
    for what, before, after in unequal(circumstances(a), circumstances(b)):
        yield f"{what}: {before} before, {after} after."


def circumstances(run: Run) -> dict[str, Any]:
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


def brief(value: Any) -> str:
    """A setting as users write it, not at any length."""
    said = (
        ", ".join(map(format_value, value))
        if isinstance(value, list | tuple)
        else format_value(value)
    )
    return said if len(said) <= 80 else f"{said[:79]}…"


def name(outcome: Outcome) -> str:
    """A cell in words."""
    if outcome.defense is None:
        return str(outcome.attack)
    knows = "adaptive" if outcome.adaptive else "oblivious"
    return f"{outcome.attack} behind {outcome.defense}, {knows}"


def title(run: Run) -> str:
    """A run by the name of its folder."""
    return formatting.name_file(run.folder) or formatting.name_file(run.model.get("file")) or "run"


def heading(threat: Threat | None, defense: str | None) -> str:
    """What a group of pairs has in common."""
    said = "clean images" if threat is None else formatting.format_threat(build_threat(threat))
    return f"{said} behind {defense}" if defense else said


def as_dict(comparison: Comparison) -> dict[str, Any]:
    """The record of a comparison, JSON-able; rates as in the record of a report.

    Every flipped image is in it; predictions of -1 were not finite, of -3 stopped by a detector.
    """
    record: dict[str, Any] = to_json_types(
        {
            "schema": SCHEMA,
            "verdict": verdict(comparison),
            "images": len(comparison.before.clean["id"]),
            "before": side(comparison.before),
            "after": side(comparison.after),
            "pairs": [
                {
                    **{field: getattr(pair, field) for field in ("kind", "attacks", "defense")},
                    "adaptive": pair.adaptive,
                    "threat": pair.threat and build_threat(pair.threat),
                    "before": build_rate(pair.before),
                    "after": build_rate(pair.after),
                    "lost": pair.change.lost,
                    "gained": pair.change.gained,
                    "difference": pair.difference,
                    **pair.interval._asdict(),
                    "p": pair.p,
                    "p_holm": pair.p_holm,
                }
                for pair in comparison.pairs
            ],
            "unpaired": comparison.unpaired,
            "remarks": comparison.remarks,
        }
    )
    for row, pair in zip(record["pairs"], comparison.pairs, strict=True):
        row["flipped"] = [
            {"id": id_, "index": index, "label": label, "before": a, "after": b, "lost": lost}
            for id_, index, label, a, b, lost in pair.flips
        ]
    return record


def side(run: Run) -> dict[str, Any]:
    """Where the numbers of one side come from."""
    source = {name: getattr(run, name) for name in ("created", "model", "environment")}
    return {"name": title(run), **source}


def to_json(comparison: Comparison) -> str:
    """The record as JSON text in one line, because there may be many images; ASCII only."""
    return json.dumps(as_dict(comparison), allow_nan=False)


def verdict(comparison: Comparison) -> str:
    """What changed beyond chance, if anything, behind what must be known of either side."""
    doubt = "".join(f"{sentence} " for sentence in doubts(comparison.before, comparison.after))
    return doubt + judgement(comparison)


def judgement(comparison: Comparison) -> str:
    """One sentence on all pairs."""
    pairs, n = comparison.pairs, len(comparison.before.clean["id"])
    images = formatting.format_count(n, "image")
    over = f"{formatting.format_count(len(pairs), 'comparison')} over {images}"
    if not any(pair.flips for pair in pairs):
        return f"Nothing changed: no image flipped in {over}."
    changed = [pair for pair in pairs if pair.p_holm < LEVEL]
    if not changed:
        widest = max(pairs, key=lambda pair: abs(pair.difference))
        return f"No change beyond chance in {over}; the largest is {about(widest)}."
    fallen = sum(pair.difference < 0 for pair in changed)
    counts = [f"{fallen} fell"] * (fallen > 0) + [f"{len(changed) - fallen} rose"] * (
        fallen < len(changed)
    )
    largest = max(changed, key=lambda pair: abs(pair.difference))
    return (
        f"Changed beyond chance: {len(changed)} of {over} ({', '.join(counts)});"
        f" the largest is {about(largest)}."
    )


def about(pair: Pair) -> str:
    """A pair in one clause."""
    where = heading(pair.threat, pair.defense)
    if pair.kind == "clean":
        return f"clean accuracy, {points(pair)}" + (f", {where}" if pair.defense else "")
    return f"{called(pair)} at {where}, {points(pair)}"


def called(pair: Pair) -> str:
    """A pair below the heading of its group."""
    if pair.kind != "attack":
        return "clean accuracy" if pair.kind == "clean" else "worst case"
    return pair.attacks[0] + ("" if pair.adaptive else ", oblivious")


def points(pair: Pair) -> str:
    """A difference with its interval, as ``-4.0 points (-6.2 to -1.9)``."""
    return f"{signed(pair.difference)} points ({span(pair)})"


def signed(share: float) -> str:
    """A difference in points; no minus before nothing."""
    return f"{100 * share:+.1f}" if round(100 * share, 1) else "0.0"


def span(pair: Pair) -> str:
    """The interval of a difference in points."""
    return f"{signed(pair.interval.low)} to {signed(pair.interval.high)}"


def probability(p: float) -> str:
    """A p-value to two digits."""
    return "< 0.0001" if p < 0.0001 else f"{p:.2g}"


class Column(NamedTuple):
    """A column of the table of pairs."""

    title: str
    cell: Callable[[Pair], str]


RATES = (
    Column("before", lambda pair: formatting.format_rate(build_rate(pair.before))),
    Column("after", lambda pair: formatting.format_rate(build_rate(pair.after))),
)
CHANGES = (
    Column("points", lambda pair: signed(pair.difference)),
    Column("95 %", span),
    Column("lost", lambda pair: f"{pair.change.lost:,}"),
    Column("gained", lambda pair: f"{pair.change.gained:,}"),
    Column("p", lambda pair: probability(pair.p)),
    Column("Holm", lambda pair: probability(pair.p_holm)),
)
LEGEND = (
    "Accuracy and robust accuracy with Wilson intervals, points with paired intervals (Tango),"
    " 95 %. Lost: right before, wrong after. p: exact McNemar test of each line by itself; Holm:"
    " the same, corrected for all lines."
)


def sections(comparison: Comparison) -> dict[str, list[Pair]]:
    """The pairs below their headings: clean images, then threat by threat and defense."""
    found: dict[str, list[Pair]] = {}
    for pair in comparison.pairs:
        found.setdefault(heading(pair.threat, pair.defense), []).append(pair)
    return found


def flipped(comparison: Comparison) -> list[str]:
    """Each image that flipped, in words: lost ones first, those that flipped most often first."""
    times: dict[tuple[bool, str, int], list[tuple[Pair, Flip]]] = {}
    for pair in comparison.pairs:
        for flip in pair.flips:
            times.setdefault((not flip.lost, flip.id, flip.position), []).append((pair, flip))
    names = comparison.after.data.get("class_names")
    first = nsmallest(LISTED, times, key=lambda which: (which[0], -len(times[which]), which))
    said = [one_flip(times[which], names) for which in first]
    left = len(times) - len(said)
    if left:
        said.append(f"and {formatting.format_count(left, 'more image')}: all are in the JSON form")
    return said


def one_flip(found: Sequence[tuple[Pair, Flip]], names: Sequence[str] | None) -> str:
    """An image and what became of it."""
    pair, flip = found[0]
    more = f", and in {len(found) - 1} more" if len(found) > 1 else ""
    where = called(pair) if pair.defense is None else f"{called(pair)} behind {pair.defense}"
    return (
        f"{'lost' if flip.lost else 'gained'}: image {flip.position} ({flip.id}),"
        f" class {named(flip.label, names)}: {named(flip.before, names)} before,"
        f" {named(flip.after, names)} after; {where}{more}"
    )


def named(label: int, names: Sequence[str] | None) -> str:
    """A class with its name, if that says more than its number."""
    if label < 0:
        return "alarm" if label == FLAGGED else "not finite"
    known = names[label] if names and label < len(names) else str(label)
    return str(label) if known == str(label) else f"{label} ({brief(known)})"


def provenance(comparison: Comparison) -> Iterator[tuple[str, str]]:
    """Both sides in words."""
    for when, run in (("before", comparison.before), ("after", comparison.after)):
        file, arch = formatting.name_file(run.model.get("file")), run.model.get("arch")
        yield (
            when,
            formatting.join_parts(
                title(run), file, formatting.format_hash(run.model), arch, run.created
            ),
        )


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print the comparison; text from outside is shown, never interpreted."""
    doubtful = any(doubts(comparison.before, comparison.after))
    say(console, verdict(comparison), "bold red" if doubtful else "bold")
    names, pairs = [], []
    for common, below in sections(comparison).items():
        names.append((common, "threat"))
        names += [(called(pair), KINDS[pair.kind]) for pair in below]
        pairs += [None, *below]
    sides = [
        [
            Shown(
                column.title,
                [show_cell(console, column.cell(pair) if pair else "") for pair in pairs],
            )
            for column in columns
        ]
        for columns in (RATES, CHANGES)
    ]
    put_tables(console, names, sides)
    console.print()
    say(console, LEGEND, "dim")
    print_list(console, "Flipped images", [f"- {line}" for line in flipped(comparison)])
    print_list(console, "Not compared", [f"- {line}" for line in comparison.unpaired])
    print_list(console, "Remarks", [f"- {line}" for line in comparison.remarks])
    facts(console, provenance(comparison))


def to_markdown(comparison: Comparison) -> str:
    """The comparison as a Markdown document; text from outside cannot become markup."""
    return "\n".join(document(comparison)) + "\n"


def document(comparison: Comparison) -> Iterator[str]:
    """The lines of the document."""
    columns = RATES + CHANGES
    yield f"**{prose(verdict(comparison))}**"
    yield ""
    yield table_row(["", *(prose(column.title) for column in columns)])
    yield table_row([":--", *(["--:"] * len(columns))])
    for common, pairs in sections(comparison).items():
        yield table_row([f"**{prose(common)}**", *([""] * len(columns))])
        for pair in pairs:
            name = code(called(pair)) if pair.kind == "attack" else prose(called(pair))
            yield table_row([name, *(prose(column.cell(pair)) for column in columns)])
    yield from ("", prose(LEGEND))
    yield from listed("Flipped images", flipped(comparison))
    yield from listed("Not compared", comparison.unpaired)
    yield from listed("Remarks", comparison.remarks)
    yield from listed(
        "Where this comes from", (f"{when}: {said}" for when, said in provenance(comparison))
    )
