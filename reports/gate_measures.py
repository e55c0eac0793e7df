"""What each kind of gate measures, and on what: shares, changes on pairs, or that it is missing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from robusteval.runs import metrics, statistics
from robusteval.runs.types import Flags, Threat, format_value

from .baseline import Baseline, BaselineCell, find_robust, has_same_images, order_by_id, say_behind
from .gate_config import CLEAN, WORST, Rule
from .gate_scope import (
    Scene,
    describe_scope,
    describe_subject,
    explain_lack,
    find_clean_verdicts,
    find_defense,
    group_cells,
    is_in_scope,
)
from .gate_tests import ChangeEvidence, Evidence, ShareEvidence, Unmet, show_share
from .measures import CORRUPTION

Found = Iterator[tuple[str, Evidence]]
Measure = Callable[[Rule, float, Scene], Found]


def measure_floors(rule: Rule, floor: float, scene: Scene) -> Found:
    """Accuracy against a floor.

    Of worst cases without a radius and of corruptions only those that the gate names: an attack
    that may go as far as it needs leaves nothing robust, and a corruption is no attacker.
    """
    side = scene.here
    if rule.on == CLEAN:
        clean = find_clean_verdicts(rule, side)
        on = describe_subject(rule, "clean images")
        if clean is None:
            yield on, Unmet(explain_lack(rule, side))
        else:
            yield on, ShareEvidence(metrics.rate(clean), floor, "image", "Clean accuracy")
        return
    found = {
        on: cells
        for on, cells in group_cells(rule, side).items()
        if rule.on != WORST or rule.threat is not None or is_held_to_floors(cells[0].threat)
    }
    for on, cells in found.items():
        held = metrics.rate(find_robust(cells))
        yield (
            describe_subject(rule, on),
            ShareEvidence(held, floor, "image", "Robust accuracy, in float,"),
        )
    if not found:
        yield describe_subject(rule, describe_scope(rule)), Unmet(explain_lack(rule, side))


def is_held_to_floors(threat: Threat) -> bool:
    """Whether a gate that names no threat is about this one: of attackers with a radius."""
    return threat.eps is not None and threat.norm != CORRUPTION


def is_bounded(threat: Threat) -> bool:
    """Whether attacks may leave something: they have a radius, or are corruptions."""
    return threat.eps is not None or threat.norm == CORRUPTION


def measure_drops(rule: Rule, margin: float, scene: Scene) -> Found:
    """Verdicts against those of the baseline.

    Of worst cases without a radius only those that the gate names, where there are others: they
    leave nothing that could be lost.
    """
    here, then = scene.here, scene.then
    assert then is not None, "was asked for before"
    if rule.on == CLEAN:
        before, after = (find_clean_verdicts(rule, side) for side in (then, here))
        on = describe_subject(rule, "clean images")
        yield on, compare_with_baseline(rule, margin, scene, before, after)
        return
    there, found = group_cells(rule, then), group_cells(rule, here)
    known = {on: cells[0].threat for on, cells in {**there, **found}.items()}
    if rule.on == WORST and rule.threat is None:
        known = {on: each for on, each in known.items() if is_bounded(each)} or known
    for on in known:
        yield (
            describe_subject(rule, on),
            compare_cells(rule, margin, scene, there.get(on), found.get(on)),
        )
    if not there and not found:
        yield describe_subject(rule, describe_scope(rule)), Unmet(explain_lack(rule, here))


def compare_cells(
    rule: Rule,
    margin: float,
    scene: Scene,
    before: Sequence[BaselineCell] | None,
    after: Sequence[BaselineCell] | None,
) -> Unmet | ChangeEvidence:
    """The same attacks in the baseline and in the run."""
    if not after:
        return Unmet(explain_lack(rule, scene.here))
    if not before:
        return Unmet(
            "The baseline has nothing to compare it with: bring it up to date with"
            " `robusteval baseline update RUN`."
        )
    left, same = list(after), []
    for cell in before:
        twin = next((other for other in left if other.settings == cell.settings), None)
        if twin is None:
            return Unmet(explain_other_settings(cell, after))
        left = [other for other in left if other is not twin]
        same.append(twin)
    remark = ""
    if left:
        remark = f" Not in the baseline, and left out: {', '.join(cell.title for cell in left)}."
    return compare_with_baseline(
        rule, margin, scene, find_robust(before), find_robust(same), remark
    )


def explain_other_settings(cell: BaselineCell, others: Sequence[BaselineCell]) -> str:
    """Why a cell of the baseline is not in the run."""
    there = cell.settings
    near = [other.settings for other in others if other.settings["attack"] == there["attack"]]
    if not near:
        return f"The run lacks {cell.title}, which is in the baseline."
    here = min(near, key=lambda other: len(list_unequal_keys(there, other)))
    found = "; ".join(
        f"{key} {format_value(there.get(key))} in the baseline,"
        f" {format_value(here.get(key))} in the run"
        for key in list_unequal_keys(there, here)
    )
    return f"{cell.title} was run with other settings: {found}."


def list_unequal_keys(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """The keys at which two settings differ."""
    return [key for key in {**a, **b} if a.get(key) != b.get(key)]


def compare_with_baseline(
    rule: Rule,
    margin: float,
    scene: Scene,
    before: Flags | None,
    after: Flags | None,
    remark: str = "",
) -> Unmet | ChangeEvidence:
    """Verdicts of the baseline against those of the run, if they are about the same question."""
    here, then = scene.here, scene.then
    assert then is not None, "was asked for before"
    if after is None:
        return Unmet(explain_lack(rule, here))
    if before is None:
        return Unmet(
            f"The baseline knows nothing{say_behind(find_defense(rule, here))}: bring it up to date"
            " with `robusteval baseline update RUN`."
        )
    reasons = list(list_obstacles(rule, here, then))
    if reasons:
        return Unmet(f"The run cannot be compared with the baseline: {'; '.join(reasons)}.")
    there, order = order_by_id(then.ids), order_by_id(here.ids)
    return build_change(
        rule, margin, before[there], after[order], order, remark + remark_on_versions(here, then)
    )


def build_change(
    rule: Rule,
    margin: float,
    before: Flags,
    after: Flags,
    rows: np.ndarray[Any, Any],
    remark: str = "",
) -> ChangeEvidence:
    """The pairs of two masks ``(n,)`` about the same images, which are these rows of the run."""
    pairs = statistics.count_pairs(before, after)
    held = int(before.sum())
    return ChangeEvidence(pairs, held, rows[before & ~after], margin, rule.detectable, remark)


def list_obstacles(rule: Rule, here: Baseline, then: Baseline) -> Iterator[str]:
    """Why verdicts of these two do not answer the same question."""
    if here.seed != then.seed:
        seeds = format_value(then.seed), format_value(here.seed)
        yield f"seed {seeds[0]} in the baseline, {seeds[1]} in the run"
    if not has_same_images(here, then):
        shared = len(np.intersect1d(here.ids, then.ids))
        yield (
            f"other images ({shared:,} are in both, of {len(then.ids):,} in the baseline and"
            f" {len(here.ids):,} in the run)"
        )
    elif here.data.sha256 != then.data.sha256:
        yield "the same images, but other labels, another order or other files"
    mine, theirs = (side.find_defense(find_defense(rule, side) or "") for side in (here, then))
    if mine and theirs and mine.fpr != theirs.fpr:
        rates = f"{format_value(theirs.fpr)} in the baseline, {format_value(mine.fpr)} in the run"
        yield f"the detector is set to another rate of false alarms, {rates}"


def remark_on_versions(here: Baseline, then: Baseline) -> str:
    """A remark on what differs and may matter."""
    found = ", ".join(
        f"{name} {then.versions.get(name, 'none')} there and {here.versions.get(name, 'none')} here"
        for name in list_unequal_keys(then.versions, here.versions)
    )
    return f" Not made alike: {found}." if found else ""


def measure_clean_costs(rule: Rule, limit: float, scene: Scene) -> Found:
    """Clean accuracy of a defense against none in the same run, or of the run against before."""
    here = scene.here
    if rule.defense is None:
        on = "clean images, against the baseline"
        before = scene.then.clean if scene.then else None
        yield on, compare_with_baseline(rule, limit, scene, before, here.clean)
        return
    defended = find_clean_verdicts(rule, here)
    on = describe_subject(rule, "clean images") + ", against the model as it is"
    if defended is None:
        yield on, Unmet(explain_lack(rule, here))
    else:
        yield on, build_change(rule, limit, here.clean, defended, np.arange(len(here.ids)))


def measure_detections(rule: Rule, limit: float, scene: Scene) -> Found:
    """Successful attacks that a detector flags, attack by attack."""
    here = scene.here
    detectors = [str(d.spec) for d in scene.run.defenses if d.kind == "detector"]
    name = find_defense(rule, here) if rule.defense else next(iter(detectors), None)
    on = (
        describe_subject(rule, describe_scope(rule))
        if rule.defense
        else f"{describe_scope(rule)}{say_behind(name)}"
    )
    if rule.defense is None and len(detectors) > 1:
        every = ", ".join(detectors)
        yield on, Unmet(f"The run has several detectors; choose one with `defense`: {every}.")
        return
    known = here.find_defense(name) if name else None
    if known is None or name not in detectors:
        yield on, Unmet(explain_lack(rule, here) if rule.defense else "The run has no detector.")
        return
    if known.fpr is None or not math.isclose(known.fpr, rule.fpr or 0.0):
        rate = "no stated rate" if known.fpr is None else f"a rate of {show_share(known.fpr)}"
        asked_for = show_share(rule.fpr or 0.0)
        yield (
            on,
            Unmet(
                f"The detector is set to {rate} of false alarms, and the gate asks for {asked_for}."
            ),
        )
        return
    outcomes = [outcome for outcome in scene.run.attacks if str(outcome.defense) == name]
    found = [outcome for outcome in outcomes if is_in_scope(rule, outcome)]
    for outcome in found:
        knows = "" if outcome.adaptive else " (oblivious)"
        caught = metrics.detection_rate(outcome)
        found_on = f"{outcome.attack} behind {name}{knows}"
        yield found_on, ShareEvidence(caught, limit, "successful attack", "Flagged are")
    if not found:
        yield on, Unmet(f"The run has no such attack behind {name}.")
