"""The regression gate: whether a run keeps what `rules` demand, and what it could not tell.

Every gate has one of three outcomes. A gate has *failed* only if chance is no good explanation,
*passed* only if the sample was able to show otherwise, and is *inconclusive* in between; so that
neither noise turns it red nor a small sample green. What cannot be compared has failed, with a
reason: it is never skipped.

Verdicts are those on the images as attacks returned them, in float, of all images of the run; those
that were wrong to begin with are not robust. Runs are compared image by image, by content.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from robusteval.errors import UsageError
from robusteval.registry import parse
from robusteval.runs import statistics
from robusteval.runs.types import Run

from .baseline import Baseline, check_finished, collect_verdicts
from .gate_config import CLEAN, EXAMPLE, Rule, Settings, show_path
from .gate_groups import choose_worst, list_parts
from .gate_measures import (
    Measure,
    measure_clean_costs,
    measure_detections,
    measure_drops,
    measure_floors,
)
from .gate_scope import Scene, describe_scope, describe_subject
from .gate_tests import ChangeEvidence, Evidence, Level
from .record import FlippedImage, GateKind, GateOutcome, GateRow, GatesRecord

SHOWN = 20  # flipped images
DEFAULT_DROP = 0.01  # of a gate that nobody configured
EXIT_CODES: dict[GateOutcome, int] = {"passed": 0, "failed": 1, "inconclusive": 5}


@dataclass(frozen=True)
class Check:
    """All gates of a run."""

    gates: tuple[GateRow, ...]
    alpha: float
    config: str | None = None  # names of files
    baseline: str | None = None

    @property
    def outcome(self) -> GateOutcome:
        """The worst outcome of a gate: one that failed, else one that could not decide."""
        outcomes = {gate.outcome for gate in self.gates}
        if "failed" in outcomes:
            return "failed"
        return "inconclusive" if "inconclusive" in outcomes else "passed"

    @property
    def exit_code(self) -> int:
        """0 passed, 1 failed, 5 inconclusive."""
        return EXIT_CODES[self.outcome]

    def to_gates(self) -> GatesRecord:
        """The check as it stands in a report."""
        return GatesRecord(self.outcome, self.config, self.baseline, self.alpha, self.gates)


def check(run: Run, settings: Settings, baseline: Baseline | None = None) -> Check:
    """Whether a run keeps what the settings demand.

    A drop has failed if `drop_test` at its margin, corrected by Holm's method for all tests
    of the check, is below alpha; it is inconclusive if the drop seen exceeds the margin all the
    same, if the smallest drop that this sample would have shown with 80 % power is larger than
    the gate's `detectable`, or if so little held before that the loss of all would not have failed.
    A floor (likewise `min_tpr`) has passed if the lower end of the Wilson
    95 % interval is not below it, has failed if the exact one-sided test of "at least the floor",
    corrected, is below alpha, and is inconclusive otherwise.

    Holm's method limits the chance that *any* gate fails without a cause. Passing needs no
    correction: every gate must pass, so that more gates make it harder and never easier.

    Parameters
    ----------
    run : Run
        Complete, of any attacks and defenses.
    settings : Settings
        From `rules.read_settings`. Without a gate in them the default is that no worst case, with
        or without a defense, and no clean accuracy may drop by more than one point.
    baseline : Baseline, optional
        What drops are measured against.

    Raises
    ------
    RunError
        The run is incomplete or an attack in it has no result.
    NothingEvaluated
        It has no images, or none that was classified correctly.
    UsageError
        There is no gate, or one that needs a baseline and there is none.
    """
    check_finished(run)
    run = run.keep_different()
    scene = Scene(run, collect_verdicts(run), baseline)
    rules = settings.rules or build_default_rules(scene)
    for rule in rules:
        require_baseline(rule, settings, baseline)
    trials = [trial for rule in rules for trial in list_trials(rule, scene)]
    tests = [trial.evidence.p for trial in trials if trial.evidence.p is not None]
    least = max(settings.alpha / max(1, len(tests)), sys.float_info.min)
    level = Level(settings.alpha, least)
    adjusted = iter(statistics.holm(tests))
    decided = [
        trial.decide(None if trial.evidence.p is None else next(adjusted), level)
        for trial in trials
    ]
    gates = list(join_families(trials, decided))
    return Check(
        gates=(*gates, *list_finding_gates(run, settings.allow)),
        alpha=settings.alpha,
        config=settings.file,
        baseline=show_path(settings.baseline) if baseline and settings.baseline else None,
    )


class Trial(NamedTuple):
    """One thing one gate looks at."""

    rule: Rule
    kind: GateKind
    on: str
    limit: float
    evidence: Evidence
    scene: Scene
    part: str = ""  # the class or slice it looks at
    family: str = ""  # what the worst of several parts is chosen under; empty: it stands alone

    def decide(self, p: float | None, level: Level) -> GateRow:
        """Its outcome, given its corrected p-value."""
        said = self.evidence.conclude(p, level)
        lost = self.evidence.lost if isinstance(self.evidence, ChangeEvidence) else None
        return GateRow(
            name=self.rule.name or self.kind,
            kind=self.kind,
            on=f"{self.on}, {self.part}" if self.part else self.on,
            outcome=said.outcome,
            reason=said.reason,
            limit=self.limit,
            value=said.value,
            low=said.low,
            high=said.high,
            p=said.p,
            lost=said.lost,
            gained=said.gained,
            detectable=said.detectable,
            flipped=() if lost is None else tuple(self.list_images(lost)),
            line=self.rule.line,
        )

    def list_images(self, rows: np.ndarray[Any, Any]) -> Iterator[FlippedImage]:
        """The first few of these images, by their position in the data set."""
        clean = self.scene.run.clean
        for row in rows[np.argsort(clean["index"][rows], kind="stable")][:SHOWN]:
            yield FlippedImage(
                id=f"{int(clean['id'][row]):016x}",
                index=int(clean["index"][row]),
                label=int(clean["label"][row]),
            )


def build_default_rules(scene: Scene) -> tuple[Rule, ...]:
    """What a baseline demands that nobody has configured; UsageError without one."""
    if scene.then is None:
        raise UsageError(
            "there is nothing to check: give a baseline, or gates in robusteval.toml (in"
            " pyproject.toml as [[tool.robusteval.gate]]), for instance",
            ("", *EXAMPLE.split("\n")),
        )
    cells = (*scene.then.cells, *scene.here.cells)
    defenses = [cell.defense for cell in cells]
    defenses += [known.defense for side in (scene.then, scene.here) for known in side.defenses]
    rules = [Rule(on=CLEAN, max_drop=DEFAULT_DROP)]
    for defense in dict.fromkeys(defenses):
        rule = Rule(max_drop=DEFAULT_DROP, defense=parse(defense) if defense else None)
        rules += [rule, replace(rule, on=CLEAN)] if defense else [rule]
    return tuple(rules)


def require_baseline(rule: Rule, settings: Settings, baseline: Baseline | None) -> None:
    """UsageError if the gate needs a baseline and there is none."""
    needs = [
        key
        for key, limit in (
            ("max_drop", rule.max_drop),
            ("max_clean_cost", None if rule.defense else rule.max_clean_cost),
        )
        if limit is not None
    ]
    if baseline is None and needs:
        name = f" {rule.name}" if rule.name else ""
        line = f", line {rule.line}" if rule.line else ""
        place = f" ({settings.file}{line})" if settings.file else ""
        raise UsageError(
            f"the gate{name}{place} needs a baseline for {needs[0]}: give one with --baseline, or"
            " make it with `robusteval baseline update RUN`"
        )


def list_trials(rule: Rule, scene: Scene) -> Iterator[Trial]:
    """Everything a gate looks at."""
    makers: tuple[tuple[GateKind, float | None, Measure], ...] = (
        ("floor", rule.floor, measure_floors),
        ("max_drop", rule.max_drop, measure_drops),
        ("max_clean_cost", rule.max_clean_cost, measure_clean_costs),
        ("min_tpr", rule.min_tpr, measure_detections),
    )
    parts = list(list_parts(rule, scene))
    for kind, limit, made in makers:
        for part in parts if limit is not None else ():
            assert limit is not None, "was asked before"
            found: Iterator[tuple[str, Evidence]] = (
                made(rule, limit, part.scene)
                if part.lack is None
                else iter([(describe_subject(rule, describe_scope(rule)), part.lack)])
            )
            for on, evidence in found:
                family = on if len(parts) > 1 else ""
                yield Trial(rule, kind, on, limit, evidence, part.scene, part.name, family)


def join_families(trials: Sequence[Trial], rows: Sequence[GateRow]) -> Iterator[GateRow]:
    """A row for each gate: of one that looks at several classes or slices, the worst of them."""
    found: dict[tuple[int, str, str], list[int]] = {}
    for i, trial in enumerate(trials):
        # what stands alone is a family of its own
        key = (id(trial.rule), trial.kind, trial.family or f"{i}")
        found.setdefault(key, []).append(i)
    for places in found.values():
        trial = trials[places[0]]
        if not trial.family:
            yield rows[places[0]]
            continue
        noun = trial.rule.slice.column if trial.rule.slice else "class"
        parts = [trials[i].part.removeprefix(f"{noun} ") for i in places]
        yield choose_worst([rows[i] for i in places], parts, trial.family, noun)


def list_finding_gates(run: Run, allow: Sequence[str]) -> Iterator[GateRow]:
    """A gate for each kind of grave finding that is not allowed; else one that has passed."""
    grave = [finding for finding in run.findings if finding.grave or finding.misfed]
    refused = [finding for finding in grave if finding.code not in allow]
    for code in dict.fromkeys(finding.code for finding in refused):
        said = [finding for finding in refused if finding.code == code]
        reason = " ".join(dict.fromkeys(finding.message for finding in said))
        cells = ", ".join(dict.fromkeys(finding.cell for finding in said if finding.cell))
        on = f"trust checks of {cells}" if cells else "trust checks"
        yield GateRow(f"findings: {code}", "findings", on, "failed", reason)
    if not refused:
        codes = ", ".join(dict.fromkeys(finding.code for finding in grave))
        reason = f"Grave findings, all allowed: {codes}." if codes else "No grave finding."
        yield GateRow("findings", "findings", "trust checks", "passed", reason)
