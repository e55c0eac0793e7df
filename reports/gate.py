"""The regression gate: whether a run keeps what `rules` demand, and what it could not tell.

Every gate has one of three outcomes. A gate has *failed* only if chance is no good explanation,
*passed* only if the sample was able to show otherwise, and is *inconclusive* in between; so that
neither noise turns it red nor a small sample green. What cannot be compared has failed, with a
reason: it is never skipped.

Verdicts are those on the images as attacks returned them, in float, of all images of the run; those
that were wrong to begin with are not robust. Runs are compared image by image, by content.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from robusteval.errors import UsageError
from robusteval.registry import ATTACKS, parse
from robusteval.runs import metrics, statistics
from robusteval.runs.types import Flags, Outcome, Run, Spec, show

from .baseline import (
    Baseline,
    Cell,
    all_robust,
    behind,
    canonical,
    check_finished,
    in_order,
    plain,
    same_images,
    verdicts_of,
)
from .gate_config import CLEAN, EXAMPLE, WORST, Rule, Settings, shown
from .gate_tests import Change, Evidence, Level, Said, Share, Unmet, show_share

SHOWN = 20  # flipped images
DEFAULT_DROP = 0.01  # of a gate that nobody configured
EXIT_CODES: dict[Said, int] = {"passed": 0, "failed": 1, "inconclusive": 5}


@dataclass(frozen=True)
class Gate:
    """What became of one gate; None where a number has no meaning for its kind."""

    name: str
    kind: str  # "floor", "max_drop", "max_clean_cost", "min_tpr", "findings"
    on: str  # what it looks at
    outcome: Said
    reason: str
    limit: float | None = None
    value: float | None = None  # the share, or the drop, that was seen
    low: float | None = None  # its 95 % interval: Wilson's, or Tango's of a drop
    high: float | None = None
    p: float | None = None  # corrected by Holm's method
    lost: int | None = None
    gained: int | None = None
    detectable: float | None = None  # the smallest drop this sample could have shown
    flipped: tuple[dict[str, Any], ...] = ()  # lost images: id, index, label
    line: int | None = None  # of the gate in its file


@dataclass(frozen=True)
class Check:
    """All gates of a run."""

    gates: tuple[Gate, ...]
    alpha: float
    config: str | None = None  # names of files
    baseline: str | None = None

    @property
    def outcome(self) -> Said:
        """The worst outcome of a gate: one that failed, else one that could not decide."""
        outcomes = {gate.outcome for gate in self.gates}
        if "failed" in outcomes:
            return "failed"
        return "inconclusive" if "inconclusive" in outcomes else "passed"

    @property
    def exit_code(self) -> int:
        """0 passed, 1 failed, 5 inconclusive."""
        return EXIT_CODES[self.outcome]

    def as_dict(self) -> dict[str, Any]:
        """The check as it stands in a report, JSON-able."""
        return {
            "outcome": self.outcome,
            "config": self.config,
            "baseline": self.baseline,
            "alpha": self.alpha,
            "gates": [{**asdict(gate), "flipped": list(gate.flipped)} for gate in self.gates],
        }


def check(run: Run, settings: Settings, baseline: Baseline | None = None) -> Check:
    """Whether a run keeps what the settings demand.

    A drop has failed if `drop_test` at its margin, corrected by Holm's method for all tests
    of the check, is below alpha; it is inconclusive if the drop seen exceeds the margin all the
    same, or if the smallest drop that this sample would have shown with 80 % power is larger than
    the gate's `detectable`. A floor (likewise `min_tpr`) has passed if the lower end of the Wilson
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
    scene = Scene(run, verdicts_of(run), baseline)
    rules = settings.rules or default_rules(scene)
    for rule in rules:
        check_rule(rule, settings, baseline)
    trials = [trial for rule in rules for trial in trials_of(rule, scene)]
    tests = [trial.evidence.p for trial in trials if trial.evidence.p is not None]
    level = Level(settings.alpha, settings.alpha / max(1, len(tests)))
    adjusted = iter(statistics.holm(tests))
    gates = [
        trial.judged(None if trial.evidence.p is None else next(adjusted), level)
        for trial in trials
    ]
    return Check(
        gates=(*gates, *findings_of(run, settings.allow)),
        alpha=settings.alpha,
        config=settings.file,
        baseline=shown(settings.baseline) if baseline and settings.baseline else None,
    )


class Scene(NamedTuple):
    """Everything gates look at."""

    run: Run
    here: Baseline  # the run's own verdicts
    then: Baseline | None


class Trial(NamedTuple):
    """One thing one gate looks at."""

    rule: Rule
    kind: str
    on: str
    limit: float
    evidence: Evidence
    scene: Scene

    def judged(self, p: float | None, level: Level) -> Gate:
        """Its outcome, given its corrected p-value."""
        flipped: tuple[dict[str, Any], ...] = ()
        if isinstance(self.evidence, Change):
            flipped = tuple(self.images(self.evidence.lost))
        return Gate(
            name=self.rule.name or self.kind,
            kind=self.kind,
            on=self.on,
            limit=self.limit,
            line=self.rule.line,
            flipped=flipped,
            **self.evidence.verdict(p, level),
        )

    def images(self, rows: np.ndarray[Any, Any]) -> Iterator[dict[str, Any]]:
        """The first few of these images, by their position in the data set."""
        clean = self.scene.run.clean
        for row in rows[np.argsort(clean["index"][rows], kind="stable")][:SHOWN]:
            yield {
                "id": f"{int(clean['id'][row]):016x}",
                "index": int(clean["index"][row]),
                "label": int(clean["label"][row]),
            }


def default_rules(scene: Scene) -> tuple[Rule, ...]:
    """What a baseline demands that nobody has configured; UsageError without one."""
    if scene.then is None:
        raise UsageError(
            "there is nothing to check: give a baseline, or gates in robusteval.toml (in"
            f" pyproject.toml as [[tool.robusteval.gate]]), for instance\n\n{EXAMPLE}"
        )
    cells = (*scene.then.cells, *scene.here.cells)
    defenses = [cell.defense for cell in cells]
    defenses += [shield.defense for side in (scene.then, scene.here) for shield in side.shields]
    rules = [Rule(on=CLEAN, max_drop=DEFAULT_DROP)]
    for defense in dict.fromkeys(defenses):
        rule = Rule(max_drop=DEFAULT_DROP, defense=parse(defense) if defense else None)
        rules += [rule, replace(rule, on=CLEAN)] if defense else [rule]
    return tuple(rules)


def check_rule(rule: Rule, settings: Settings, baseline: Baseline | None) -> None:
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


def trials_of(rule: Rule, scene: Scene) -> Iterator[Trial]:
    """Everything a gate looks at."""
    makers = (
        ("floor", rule.floor, floors),
        ("max_drop", rule.max_drop, drops),
        ("max_clean_cost", rule.max_clean_cost, clean_costs),
        ("min_tpr", rule.min_tpr, detections),
    )
    for kind, limit, made in makers:
        if limit is not None:
            for on, evidence in made(rule, limit, scene):
                yield Trial(rule, kind, on, limit, evidence, scene)


Found = Iterator[tuple[str, Evidence]]


def floors(rule: Rule, floor: float, scene: Scene) -> Found:
    """Accuracy against a floor.

    Of worst cases without a radius only those that the gate names: an attack that may go as far as
    it needs leaves nothing robust.
    """
    side = scene.here
    if rule.on == CLEAN:
        clean = clean_verdicts(rule, side)
        on = subject(rule, "clean images")
        if clean is None:
            yield on, Unmet(lacking(rule, side))
        else:
            yield on, Share(metrics.rate(clean), floor, "image", "Clean accuracy")
        return
    found = {
        on: cells
        for on, cells in places(rule, side).items()
        if rule.on != WORST or rule.threat is not None or cells[0].threat.eps is not None
    }
    for on, cells in found.items():
        held = metrics.rate(all_robust(cells))
        yield subject(rule, on), Share(held, floor, "image", "Robust accuracy, in float,")
    if not found:
        yield subject(rule, asked(rule)), Unmet(lacking(rule, side))


def drops(rule: Rule, margin: float, scene: Scene) -> Found:
    """Verdicts against those of the baseline."""
    here, then = scene.here, scene.then
    assert then is not None, "was asked for before"
    if rule.on == CLEAN:
        before, after = (clean_verdicts(rule, side) for side in (then, here))
        on = subject(rule, "clean images")
        yield on, against(rule, margin, scene, before, after)
        return
    there, found = places(rule, then), places(rule, here)
    for on in {**there, **found}:
        yield subject(rule, on), fallen(rule, margin, scene, there.get(on), found.get(on))
    if not there and not found:
        yield subject(rule, asked(rule)), Unmet(lacking(rule, here))


def fallen(
    rule: Rule,
    margin: float,
    scene: Scene,
    before: Sequence[Cell] | None,
    after: Sequence[Cell] | None,
) -> Unmet | Change:
    """The same attacks in the baseline and in the run."""
    if not after:
        return Unmet(lacking(rule, scene.here))
    if not before:
        return Unmet(
            "The baseline has nothing to compare it with: bring it up to date with"
            " `robusteval baseline update RUN`."
        )
    left, same = list(after), []
    for cell in before:
        twin = next((other for other in left if other.settings == cell.settings), None)
        if twin is None:
            return Unmet(unlike(cell, after))
        left = [other for other in left if other is not twin]
        same.append(twin)
    remark = ""
    if left:
        remark = f" Not in the baseline, and left out: {', '.join(cell.title for cell in left)}."
    return against(rule, margin, scene, all_robust(before), all_robust(same), remark)


def unlike(cell: Cell, others: Sequence[Cell]) -> str:
    """Why a cell of the baseline is not in the run."""
    there = cell.settings
    near = [other.settings for other in others if other.settings["attack"] == there["attack"]]
    if not near:
        return f"The run lacks {cell.title}, which is in the baseline."
    here = min(near, key=lambda other: len(unequal(there, other)))
    found = "; ".join(
        f"{key} {show(there.get(key))} in the baseline, {show(here.get(key))} in the run"
        for key in unequal(there, here)
    )
    return f"{cell.title} was run with other settings: {found}."


def unequal(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """The keys at which two settings differ."""
    return [key for key in {**a, **b} if a.get(key) != b.get(key)]


def against(
    rule: Rule,
    margin: float,
    scene: Scene,
    before: Flags | None,
    after: Flags | None,
    remark: str = "",
) -> Unmet | Change:
    """Verdicts of the baseline against those of the run, if they are about the same question."""
    here, then = scene.here, scene.then
    assert then is not None, "was asked for before"
    if after is None:
        return Unmet(lacking(rule, here))
    if before is None:
        return Unmet(
            f"The baseline knows nothing{behind(named(rule, here))}: bring it up to date with"
            " `robusteval baseline update RUN`."
        )
    reasons = list(incomparable(rule, here, then))
    if reasons:
        return Unmet(f"The run cannot be compared with the baseline: {'; '.join(reasons)}.")
    there, order = in_order(then.ids), in_order(here.ids)
    return change(rule, margin, before[there], after[order], order, remark + versions(here, then))


def change(
    rule: Rule,
    margin: float,
    before: Flags,
    after: Flags,
    rows: np.ndarray[Any, Any],
    remark: str = "",
) -> Change:
    """The pairs of two masks ``(n,)`` about the same images, which are these rows of the run."""
    pairs = statistics.count_pairs(before, after)
    held = int(before.sum())
    return Change(pairs, held, rows[before & ~after], margin, rule.detectable, remark)


def incomparable(rule: Rule, here: Baseline, then: Baseline) -> Iterator[str]:
    """Why verdicts of these two do not answer the same question."""
    if here.seed != then.seed:
        yield f"seed {show(then.seed)} in the baseline, {show(here.seed)} in the run"
    if not same_images(here, then):
        shared = len(np.intersect1d(here.ids, then.ids))
        yield (
            f"other images ({shared:,} are in both, of {len(then.ids):,} in the baseline and"
            f" {len(here.ids):,} in the run)"
        )
    elif here.data["sha256"] != then.data["sha256"]:
        yield "the same images, but other labels, another order or other files"
    mine, theirs = (side.shield(named(rule, side) or "") for side in (here, then))
    if mine and theirs and mine.fpr != theirs.fpr:
        rates = f"{show(theirs.fpr)} in the baseline, {show(mine.fpr)} in the run"
        yield f"the detector is set to another rate of false alarms, {rates}"


def versions(here: Baseline, then: Baseline) -> str:
    """A remark on what differs and may matter."""
    found = ", ".join(
        f"{name} {then.versions.get(name, 'none')} there and {here.versions.get(name, 'none')} here"
        for name in unequal(then.versions, here.versions)
    )
    return f" Not made alike: {found}." if found else ""


def clean_costs(rule: Rule, limit: float, scene: Scene) -> Found:
    """Clean accuracy of a defense against none in the same run, or of the run against before."""
    here = scene.here
    if rule.defense is None:
        on = "clean images, against the baseline"
        before = scene.then.clean if scene.then else None
        yield on, against(rule, limit, scene, before, here.clean)
        return
    defended = clean_verdicts(rule, here)
    on = subject(rule, "clean images") + ", against the model as it is"
    if defended is None:
        yield on, Unmet(lacking(rule, here))
    else:
        yield on, change(rule, limit, here.clean, defended, np.arange(len(here.ids)))


def detections(rule: Rule, limit: float, scene: Scene) -> Found:
    """Successful attacks that a detector flags, attack by attack."""
    here = scene.here
    detectors = [str(d.spec) for d in scene.run.defenses if d.kind == "detector"]
    name = named(rule, here) if rule.defense else next(iter(detectors), None)
    on = subject(rule, asked(rule)) if rule.defense else f"{asked(rule)}{behind(name)}"
    if rule.defense is None and len(detectors) > 1:
        every = ", ".join(detectors)
        yield on, Unmet(f"The run has several detectors; choose one with `defense`: {every}.")
        return
    shield = here.shield(name) if name else None
    if shield is None or name not in detectors:
        yield on, Unmet(lacking(rule, here) if rule.defense else "The run has no detector.")
        return
    if shield.fpr is None or not math.isclose(shield.fpr, rule.fpr or 0.0):
        rate = "no stated rate" if shield.fpr is None else f"a rate of {show_share(shield.fpr)}"
        asked_for = show_share(rule.fpr or 0.0)
        yield (
            on,
            Unmet(
                f"The detector is set to {rate} of false alarms, and the gate asks for {asked_for}."
            ),
        )
        return
    outcomes = [outcome for outcome in scene.run.attacks if str(outcome.defense) == name]
    found = [outcome for outcome in outcomes if looked_at(rule, outcome)]
    for outcome in found:
        knows = "" if outcome.adaptive else " (oblivious)"
        caught = metrics.detection_rate(outcome)
        found_on = f"{outcome.attack} behind {name}{knows}"
        yield found_on, Share(caught, limit, "successful attack", "Flagged are")
    if not found:
        yield on, Unmet(f"The run has no such attack behind {name}.")


def looked_at(rule: Rule, outcome: Outcome) -> bool:
    """Whether a gate is about this cell."""
    if isinstance(rule.on, Spec):
        return is_meant(rule.on, str(outcome.attack), outcome.resolved)
    return rule.threat is None or rule.threat.includes(outcome.threat)


def places(rule: Rule, side: Baseline) -> dict[str, list[Cell]]:
    """The cells a gate looks at, together where one worst case is made of them."""
    name = named(rule, side)
    if rule.defense is not None and name is None:
        return {}
    found: dict[str, list[Cell]] = {}
    for cell in side.cells:
        if cell.defense != name:
            continue
        if isinstance(rule.on, Spec):
            if is_meant(rule.on, cell.attack, cell.resolved):
                knows = "" if cell.adaptive else " (oblivious)"
                found.setdefault(f"{rule.on}{knows}", []).append(cell)
        elif rule.threat is None or rule.threat.includes(cell.threat):
            found.setdefault(f"worst case at {cell.threat}", []).append(cell)
    return found


def is_meant(spec: Spec, attack: str, resolved: dict[str, Any]) -> bool:
    """Whether a gate's attack is this one of a run: with the same parameters, however written."""
    if canonical(str(spec)) == canonical(attack):
        return True
    entry = ATTACKS.entries.get(spec.name)
    if entry is None or parse(attack).name != spec.name:
        return False
    return plain(entry.resolve(spec)) == plain(resolved)


def named(rule: Rule, side: Baseline) -> str | None:
    """The gate's defense as this side calls it; None if it has none such, or none is asked for."""
    if rule.defense is None:
        return None
    wanted = canonical(str(rule.defense))
    known = [cell.defense for cell in side.cells if cell.defense]
    known += [shield.defense for shield in side.shields]
    return next((name for name in known if canonical(name) == wanted), None)


def clean_verdicts(rule: Rule, side: Baseline) -> Flags | None:
    """Clean verdicts ``(n,)``, behind the defense that the gate names; None if there are none."""
    name = named(rule, side)
    return None if rule.defense is not None and name is None else side.clean_of(name)


def asked(rule: Rule) -> str:
    """What a gate looks at, if there is nothing of it."""
    if isinstance(rule.on, Spec) or rule.on == CLEAN:
        return str(rule.on)
    if rule.threat is None:
        return "worst case"
    return f"worst case at {rule.threat}"


def subject(rule: Rule, on: str) -> str:
    """What a gate looks at, with the defense it names."""
    return on + behind(str(rule.defense) if rule.defense else None)


def lacking(rule: Rule, side: Baseline) -> str:
    """That the run has not what a gate is about, and what it has."""
    if rule.defense is not None and named(rule, side) is None:
        known = ", ".join(shield.defense for shield in side.shields) or "none"
        return f"The run has no defense {rule.defense}; it has {known}."
    name = named(rule, side)
    cells = [cell for cell in side.cells if cell.defense == name]
    if isinstance(rule.on, Spec):
        known = ", ".join(cell.attack for cell in cells) or "none"
        return f"The run has no attack {subject(rule, str(rule.on))}; it has {known}."
    if rule.on == CLEAN:
        return f"The run has no verdicts on {subject(rule, 'clean images')}."
    known = ", ".join(dict.fromkeys(str(cell.threat) for cell in cells)) or "none"
    return f"The run has no attack for the {subject(rule, asked(rule))}; it has {known}."


def findings_of(run: Run, allow: Sequence[str]) -> Iterator[Gate]:
    """A gate for each kind of grave finding that is not allowed; else one that has passed."""
    grave = [finding for finding in run.findings if finding.grave or finding.misfed]
    refused = [finding for finding in grave if finding.code not in allow]
    for code in dict.fromkeys(finding.code for finding in refused):
        said = [finding for finding in refused if finding.code == code]
        reason = " ".join(dict.fromkeys(finding.message for finding in said))
        cells = ", ".join(dict.fromkeys(finding.cell for finding in said if finding.cell))
        on = f"trust checks of {cells}" if cells else "trust checks"
        yield Gate(f"findings: {code}", "findings", on, "failed", reason)
    if not refused:
        codes = ", ".join(dict.fromkeys(finding.code for finding in grave))
        reason = f"Grave findings, all allowed: {codes}." if codes else "No grave finding."
        yield Gate("findings", "findings", "trust checks", "passed", reason)
