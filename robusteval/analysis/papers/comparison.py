"""Published beside measured: the tables of a paper filled from a run, and its claims tested."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

from robusteval.analysis.papers.declaration import Claim, Line, Paper, Reading, Table, read_row
from robusteval.analysis.papers.detected import find_detected
from robusteval.analysis.papers.explained import find_explained
from robusteval.analysis.papers.masked import find_masked
from robusteval.analysis.papers.measures import Measured, Summary, find_measure
from robusteval.analysis.papers.on_maps import find_on_maps
from robusteval.analysis.papers.operating_points import OperatingPoint
from robusteval.analysis.papers.over_seeds import find_over_seeds
from robusteval.analysis.papers.paired import compare_beside_runs
from robusteval.analysis.papers.results import MissingError, Results
from robusteval.runs.explanation_record import ExplanationComparison
from robusteval.runs.statistics import Difference
from robusteval.runs.types import Outcome, Run, format_value

Verdict = Literal["agrees", "differs", "not comparable", "nothing published", "not measured"]
Holding = Literal["holds", "does not hold", "not decided", "not measured"]

# words of a data set's name that leave it the one that was published for; train is none
PARTS = frozenset(("test", "val", "validation", "held", "out", "top", "images", "format"))
# intervals of fewer differences leave out their mean up to twice as often as they say
FEW = 20
LEVEL = 0.05  # of the sign test that must agree then


@dataclass(frozen=True)
class ComparedRow:
    """One figure: what was published, what was measured, and whether they say the same."""

    row: str
    column: str
    attack: str | None  # as it was run; None where nothing was
    measure: str  # in words
    summary: Summary
    published: float | None
    measured: Measured | None
    verdict: Verdict
    reason: str = ""
    # at exactly a level: the setting that each image gets by lot instead, with this probability
    beyond: str | None = None
    share: float = 0.0
    at: Mapping[str, float] = field(default_factory=dict)  # the level, as {"ssim": 0.998}
    line: str = ""  # of a sweep, without the setting


@dataclass(frozen=True)
class ComparedTable:
    """A table or figure of the paper."""

    name: str
    title: str
    note: str
    rows: tuple[ComparedRow, ...]
    sweep: bool = False  # a line for each setting of an attack, a column for each measure


@dataclass(frozen=True)
class ClaimVerdict:
    """A sentence of the paper, and whether it is found again on these images."""

    text: str
    where: str
    holding: Holding
    measured: Measured | None  # of a comparison the difference
    said: str


@dataclass(frozen=True)
class Reproduction:
    """Everything that is known of a paper on one network."""

    name: str
    title: str
    source: str
    setting: str
    size: str
    model: Mapping[str, Any]
    data: Mapping[str, Any]
    environment: Mapping[str, Any]
    images: int
    right: int
    seed: int
    tables: tuple[ComparedTable, ...]
    claims: tuple[ClaimVerdict, ...]
    remarks: tuple[str, ...]
    seconds: float
    command: str = ""
    explained: ExplanationComparison | None = None  # several attacks side by side, to be drawn


def compare_paper(
    paper: Paper,
    size: str,
    results: Results,
    *,
    remarks: tuple[str, ...] = (),
    explained: ExplanationComparison | None = None,
    more_seconds: float = 0.0,
) -> Reproduction:
    """Fill the tables of a paper and test its claims.

    Parameters
    ----------
    paper : Paper
        What was published.
    size : str
        What was run of it, "small" or "paper".
    results : Results
        What was measured; images that are there several times count once.
    remarks : tuple of str
        What else a reader must know, before what is known of the publication.
    explained : ExplanationComparison, optional
        The attacks that were explained, side by side.
    more_seconds : float
        What was spent beside the run: on explanations and detectors.
    """
    run = results.run.keep_different()
    other = results.hardened and results.hardened.keep_different()
    results = replace(results, run=run, hardened=other)
    # which attacks are weak is what papers compare
    found = [each for each in run.findings if each.grave and each.code != "weak-attacks"]
    grave = tuple(finding.message for finding in found)
    return Reproduction(
        name=paper.name,
        title=paper.title,
        source=paper.source,
        setting=paper.setting,
        size=size,
        model=run.model,
        data=run.data,
        environment=run.environment,
        images=len(run.clean["label"]),
        right=int((run.clean["pred_clean"] == run.clean["label"]).sum()),
        seed=int(run.config.get("seed", 0)),
        tables=tuple(
            ComparedTable(
                table.name,
                table.title,
                table.note,
                tuple(fill_table(paper, table, results)),
                table.sweep,
            )
            for table in paper.tables
        ),
        claims=tuple(check_claim(claim, results) for claim in paper.claims),
        remarks=(*grave, *remarks, *paper.remarks),
        seconds=run.seconds + more_seconds,
        command=str(run.config.get("command", "")),
        explained=explained,
    )


def fill_table(paper: Paper, table: Table, results: Results) -> Iterator[ComparedRow]:
    """The rows of a table, a figure each."""
    for line in table.rows:
        if table.sweep:
            yield from fill_sweep(table, line, results)
            continue
        readings = read_row(table, line)
        published = line.published or (None,) * len(readings)
        for column, reading, value in zip(table.columns, readings, published, strict=True):
            yield fill_row(paper, table, line, column, reading, value, results)


def fill_row(
    paper: Paper,
    table: Table,
    line: Line,
    column: str,
    reading: Reading,
    published: float | None,
    results: Results,
) -> ComparedRow:
    """One figure of a table."""
    measure = (
        find_explained(reading.measure)
        or find_detected(reading.measure)
        or find_on_maps(reading.measure)
        or find_masked(reading.measure)
        or find_over_seeds(reading.measure)
        or find_measure(reading.measure)
    )
    titles = (line.name, paper.label(column))
    needs = line.needs or table.needs
    try:
        if needs:
            raise MissingError(needs)
        attack, measured = results.measure(reading)
    except MissingError as error:
        return ComparedRow(
            *titles,
            attack=None,
            measure=measure.title,
            summary=measure.summary,
            published=published,
            measured=None,
            verdict="not measured",
            reason=str(error),
            at=reading.at,
        )
    beyond = None
    share = 0.0
    said = ""
    if reading.at or reading.smallest:
        point = results.choose_point(reading)
        said = f"{point.describe(reading.at)}; "
        if point.beyond is not None:
            measured = point.summarize(find_measure(reading.measure))
            beyond, share = str(point.beyond.attack), point.share
    verdict, reason = judge(published, measured, table, line, results.run)
    return ComparedRow(
        *titles,
        attack=attack,
        measure=measure.title,
        summary=measure.summary,
        published=published,
        measured=measured,
        verdict=verdict,
        reason=said + reason,
        beyond=beyond,
        share=share,
        at=reading.at,
    )


def judge(
    published: float | None, measured: Measured, table: Table, line: Line, run: Run
) -> tuple[Verdict, str]:
    """Whether a published figure lies in the measured interval, and if that cannot be said why."""
    if published is None:
        return "nothing published", table.unpublished
    theirs, ours = line.data or table.data, str(run.data.get("name", ""))
    if not theirs or not is_same_data(theirs.partition(",")[0], ours):
        return "not comparable", f"published for {theirs or 'another network'}; here {ours}"
    if not has_interval(measured):
        return "not comparable", f"published for {theirs}; no interval is known of what is measured"
    inside = measured.low <= published <= measured.high
    return ("agrees" if inside else "differs"), f"published for {theirs}"


def is_same_data(theirs: str, ours: str) -> bool:
    """Whether two names are of one data set: CIFAR-10 is cifar10 (test), and not cifar100."""
    name, words = "".join(split_words(theirs)), split_words(ours)
    same = (i for i in range(1, len(words) + 1) if "".join(words[:i]) == name)
    return any(PARTS.issuperset(words[i:]) for i in same)


def split_words(name: str) -> list[str]:
    """The words of a name in lower case, letters and digits alone."""
    return re.findall(r"[^\W_]+", name.lower())


def has_interval(found: Measured) -> bool:
    """Whether a figure has an interval: of what does not vary none is known."""
    return math.isfinite(found.low) and math.isfinite(found.high) and found.low < found.high


def fill_sweep(table: Table, line: Line, results: Results) -> Iterator[ComparedRow]:
    """The points of a figure: each setting of an attack, measure by measure."""
    outcomes: list[Outcome] = []
    reason = line.needs or table.needs
    try:
        outcomes = [] if reason else results.list_outcomes(line.attack, hardened=line.hardened)
    except MissingError as error:
        reason = str(error)
    for setting, outcome in name_settings(line.name, outcomes) or [(line.name, None)]:
        for name in table.columns:
            measure = find_measure(name)
            measured, verdict, why = None, "not measured", reason
            try:
                if outcome is not None:
                    measured = results.summarize(outcome, name)
                    verdict, why = "nothing published", table.unpublished
            except MissingError as error:
                why = str(error)
            yield ComparedRow(
                row=setting,
                line=line.name,
                column=measure.title,
                attack=None if outcome is None else str(outcome.attack),
                measure=measure.title,
                summary=measure.summary,
                published=None,
                measured=measured,
                verdict=cast(Verdict, verdict),
                reason=why,
            )


def name_settings(name: str, outcomes: Sequence[Outcome]) -> list[tuple[str, Outcome | None]]:
    """The settings of a sweep, each by those of its parameters in which they differ."""
    differing = [
        key
        for key in dict.fromkeys(key for o in outcomes for key in o.resolved)
        if len({repr(o.resolved.get(key)) for o in outcomes}) > 1
    ]
    return [
        (
            " ".join([name, *(f"{k}={format_value(o.resolved.get(k))}" for k in differing)]),
            o,
        )
        for o in outcomes
    ]


def check_claim(claim: Claim, results: Results) -> ClaimVerdict:
    """Whether a claim is found again, in words with the interval."""
    try:
        reading = claim.reaches or claim.above
        if reading is not None:
            _, found = results.measure(reading)
            holding: Holding = "holds" if is_reached(claim, found) else "not decided"
            if not has_interval(found):
                holding = "not decided"
            elif found.high < claim.value:
                holding = "does not hold"
            beside = "where" if claim.reaches else "to be above"
            published = " was published" if claim.reaches else ""
            explained = find_explained(reading.measure)
            counted = explained.counted if explained else "images"
            what = f"{explained.title}: " if claim.above and explained else ""
            said = f"{what}measured {spell(found, counted)}, {beside} {claim.value:g}{published}"
            if reading.at or reading.smallest:
                point = OperatingPoint(results.choose_outcome(reading))
                said += f": {describe_point(reading, point)}"
        else:
            assert claim.more is not None
            assert claim.than is not None
            difference, names = compare_readings(results, claim.more, claim.than)
            if not difference.n:
                raise MissingError("no image on which both could be measured")
            found = Measured(*difference[:4])
            holding, doubt = decide(difference)
            said = f"difference on the same images {spell(found)}, {' less '.join(names)}{doubt}"
    except MissingError as error:
        return ClaimVerdict(claim.text, claim.where, "not measured", None, str(error))
    return ClaimVerdict(claim.text, claim.where, holding, found, said)


def decide(difference: Difference) -> tuple[Holding, str]:
    """Whether the first number is the larger one, and in words why an interval was not believed.

    The interval must leave out zero and, where few images differ, the exact sign test agree.
    """
    if not (difference.low > 0 or difference.high < 0):
        return "not decided", ""
    differing = difference.less + difference.more
    if differing < FEW and difference.p >= LEVEL:
        return "not decided", (
            f"; they differ on {differing} images, too few without the exact sign test, which does"
            f" not agree (p {difference.p:.2g})"
        )
    return ("holds" if difference.low > 0 else "does not hold"), ""


def describe_point(reading: Reading, point: OperatingPoint) -> str:
    """What a figure is read from, what it keeps, and on which network."""
    network = " on the hardened network" if reading.hardened else ""
    return point.describe(reading.at) + network


def is_reached(claim: Claim, found: Measured) -> bool:
    """Whether a figure is at least what was published, or its interval above a value."""
    return found.value >= claim.value if claim.reaches else found.low > claim.value


def compare_readings(
    results: Results, more: Reading, than: Reading
) -> tuple[Difference, list[str]]:
    """By how much one figure is larger on the same images, and what the two were read from."""
    beside = compare_beside_runs(results, more, than)
    if beside is not None:
        return beside
    one, other = map(results.choose_point, (more, than))
    found = results.compare(find_measure(results.name_column(more.measure)), one, other)
    return found, [describe_point(more, one), describe_point(than, other)]


def spell(found: Measured, counted: str = "images") -> str:
    """A number with its interval, and what it is over."""
    ends = f"{found.low:.3g} to {found.high:.3g}" if has_interval(found) else "no interval"
    return f"{found.value:.3g} ({ends}; {found.n} {counted})"
