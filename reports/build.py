"""The record of a report from a run and from what the gates said of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import cast, get_args

from robusteval.runs import metrics, statistics
from robusteval.runs.statistics import Rate
from robusteval.runs.types import TRANSFER, Defended, Flags, Outcome, Run, Threat

from .build_maps import build_maps
from .corruptions import build_corruptions
from .groups import build_groups, build_turned
from .measures import (
    build_cost,
    build_distance,
    build_distances,
    build_rate,
    build_rates,
    build_threat,
    drop_not_finite,
    to_json_types,
)
from .record import (
    SCHEMA,
    AttackRow,
    CleanCostRecord,
    CurveNorm,
    CurveRecord,
    DefeatRow,
    DefenseKind,
    DefenseRow,
    DetectedAttackRow,
    DetectionRecord,
    FaultsRecord,
    FindingRow,
    GatesRecord,
    MeasuredAttack,
    ProbeRow,
    Provenance,
    RunRecord,
    TestedRadius,
    WorstCaseRow,
)
from .sentences import write_verdict
from .stages import build_stages
from .transfer import build_received
from .trend_record import TrendRecord

# the norms in which curves are drawn; `ssim` stands for 1 - SSIM
CURVED: dict[str, CurveNorm] = {norm: norm for norm in get_args(CurveNorm)}

# the three ways to look at a result, and the column that judges each
PREDICTIONS = {"float": "pred_adv", "eight_bit": "pred_8bit", "png": "pred_png"}
Successes = Mapping[str, Flags]  # (attacks, n), by the way to look at results


def build_record(
    run: Run, gates: GatesRecord | None = None, trend: TrendRecord | None = None
) -> RunRecord:
    """The record of a run, with what the gates said of it, and what was before it.

    Rates come with the Wilson 95 % interval, over different images; no number is infinite or nan,
    but None.
    """
    whole, run = run, run.keep_different()
    groups = [
        (defense, threat, group)
        for defense, outcomes in group_by_defense(run.attacks).items()
        for threat, group in order_by_radius(metrics.group_by_threat(outcomes))
    ]
    position = {id(outcome): place for place, outcome in enumerate(run.outcomes)}
    judged = [judge(group) for _, _, group in groups]
    complete = run.finished
    record = RunRecord(
        schema=SCHEMA,
        verdict="",
        complete=complete,
        attacks_asked=max(len(run.list_asked()), len(run.attacks)),
        upper_bound=not complete or any(f.grave and not f.misfed for f in run.findings),
        misfed=any(finding.misfed for finding in run.findings),
        clean_accuracy=build_rate(metrics.accuracy(run.clean)),
        gates=gates,
        worst_cases=tuple(
            build_worst_case(*group, broken) for group, broken in zip(groups, judged, strict=True)
        ),
        attacks=tuple(
            row
            for (_, _, group), broken in zip(groups, judged, strict=True)
            for row in build_attacks(group, broken, position)
        ),
        defenses=tuple(build_defense(run, defended) for defended in run.defenses),
        curves=tuple(build_curves(run)),
        corruptions=tuple(build_corruptions(run)),
        groups=tuple(build_groups(run, groups)),
        turned=tuple(build_turned(run, groups)),
        trend=trend,
        interpreters=build_maps(run),
        received=build_received(run),
        probes=tuple(
            ProbeRow(
                probe=outcome.role, **vars(build_attack(outcome, judge([outcome]), 0, position))
            )
            for outcome in run.outcomes
            if outcome.role not in ("attack", TRANSFER)
        ),
        findings=tuple(
            FindingRow(finding.code, finding.grave, finding.message, finding.cell)
            for finding in sorted(run.findings, key=lambda f: not f.grave)
        ),
        failures=to_json_types(run.failures),
        not_run=tuple(run.list_unfinished()),
        provenance=build_provenance(run),
        run=whole,
    )
    return replace(record, verdict=write_verdict(record))


def build_provenance(run: Run) -> Provenance:
    """Where the numbers of a run come from, with what its folder says freely in JSON types."""
    config = to_json_types(run.config)
    return Provenance(
        created=run.created,
        seconds=run.seconds,
        folder=run.folder,
        model=to_json_types(run.model),
        data=to_json_types(run.data),
        environment=to_json_types(run.environment),
        config=config,
        seed=config.get("seed"),
        command=config.get("command"),
    )


def order_by_radius(groups: Mapping[Threat, list[Outcome]]) -> list[tuple[Threat, list[Outcome]]]:
    """Threats as they appear, but those of one norm and goal together, by rising radius.

    An attack without a radius, which goes as far as it needs, comes last.
    """
    places: dict[tuple[str, bool], int] = {}
    for norm, _, targeted in groups:
        places.setdefault((norm, targeted), len(places))

    def find_place(item: tuple[Threat, list[Outcome]]) -> tuple[int, float]:
        norm, eps, targeted = item[0]
        return places[norm, targeted], math.inf if eps is None else eps

    return sorted(groups.items(), key=find_place)


def group_by_defense(outcomes: Iterable[Outcome]) -> dict[str | None, list[Outcome]]:
    """Outcomes by what stood before the model: nothing first, then in order of appearance."""
    found: dict[str | None, list[Outcome]] = {None: []}
    for outcome in outcomes:
        found.setdefault(name_defense(outcome), []).append(outcome)
    return found


def name_defense(outcome: Outcome) -> str | None:
    """The defense of a cell; None without one."""
    return None if outcome.defense is None else str(outcome.defense)


def judge(group: Sequence[Outcome]) -> Successes:
    """The successes ``(attacks, n)`` of attacks under one threat, by the way to look at results."""
    return {way: metrics.find_breaks(group, pred) for way, pred in PREDICTIONS.items()}


def build_worst_case(
    defense: str | None, threat: Threat, group: Sequence[Outcome], broken: Successes
) -> WorstCaseRow:
    """What is left of a model when the attacker picks the best attack for each image."""
    attacked = group[0].attacked
    total = int(attacked.sum())
    robust = {way: metrics.rate(attacked & ~broken[way].any(0)) for way in choose_ways(group)}
    fooled = {way: Rate(total - rate.k, total) for way, rate in robust.items()}
    return WorstCaseRow(
        threat=build_threat(threat),
        defense=defense,
        adaptive=any(outcome.adaptive for outcome in group),
        attacks=tuple(str(outcome.attack) for outcome in group),
        robust_accuracy=build_rates(robust),
        success_rate=build_rates(fooled),
        distance=build_distance(metrics.nearest_distance(group)),
        distances=build_distances(metrics.summarize_distances(*group)),
        cost=build_cost(metrics.sum_costs(group)),
    )


def build_attacks(
    group: Sequence[Outcome], broken: Successes, position: Mapping[int, int]
) -> Iterator[AttackRow]:
    """The attacks under one threat."""
    for i, unique in enumerate(metrics.count_alone(broken["float"])):
        yield AttackRow(
            **vars(build_attack(group[i], broken, i, position)),
            unique_breaks=unique,
            stages=build_stages(group[i]),
        )


def build_attack(
    outcome: Outcome, broken: Successes, i: int, position: Mapping[int, int]
) -> MeasuredAttack:
    """One attack by itself, whose successes are the row `i` of `broken`.

    `position` tells where in the run it is.
    """
    attacked, made = outcome.attacked, broken["float"][i]
    ways = choose_ways([outcome])
    return MeasuredAttack(
        outcome=position[id(outcome)],
        spec=str(outcome.attack),
        name=outcome.attack.name,
        parameters=to_json_types(outcome.resolved or outcome.attack.parameters),
        threat=build_threat(outcome.threat),
        knowledge=outcome.knowledge,
        defense=name_defense(outcome),
        adaptive=outcome.adaptive,
        robust_accuracy=build_rates({w: metrics.rate(attacked & ~broken[w][i]) for w in ways}),
        success_rate=build_rates({w: metrics.rate(broken[w][i][attacked]) for w in ways}),
        distance=build_distance(metrics.average(metrics.perturbation_sizes(outcome)[made])),
        distances=build_distances(
            metrics.average_distances(lambda name: outcome.columns[name][made])
        ),
        cost=build_cost(metrics.sum_costs([outcome])),
        faults=FaultsRecord(*metrics.count_faults(outcome)),
        notes=outcome.notes,
    )


def build_defense(run: Run, defended: Defended) -> DefenseRow:
    """A defense: what it costs on clean images, and whether attacks that know it defeat it."""
    before, after = metrics.find_right(run.clean), metrics.find_right(defended.clean)
    lost, gained, n = int((before & ~after).sum()), int((after & ~before).sum()), len(after)
    against = group_by_defense(run.attacks).get(str(defended.spec), [])
    facts = to_json_types(defended.facts)
    return DefenseRow(
        spec=str(defended.spec),
        name=defended.spec.name,
        kind=cast(DefenseKind, defended.kind),
        clean_accuracy=build_rate(metrics.accuracy(defended.clean)),
        clean_cost=CleanCostRecord(lost, gained, n, (lost - gained) / n if n else None),
        forwards=facts.get("forwards"),
        facts=facts,
        defeated=tuple(list_defeats(run, against)),
        detector=build_detection(defended, against) if defended.kind == "detector" else None,
    )


def list_defeats(run: Run, against: Iterable[Outcome]) -> Iterator[DefeatRow]:
    """The threats under which a defense is no better than none to an attacker who knows it.

    No better: less robust, or by no more than what the intervals of both leave open.
    """
    undefended = metrics.group_by_threat(group_by_defense(run.attacks)[None])
    knowing = metrics.group_by_threat(outcome for outcome in against if outcome.adaptive)
    for threat, group in knowing.items():
        if threat not in undefended:
            continue
        with_it, without = metrics.worst_case(group), metrics.worst_case(undefended[threat])
        if with_it.interval.low <= without.interval.high:
            yield DefeatRow(
                threat=build_threat(threat),
                attacks=tuple(str(outcome.attack) for outcome in group),
                robust_accuracy=build_rate(with_it),
                undefended=build_rate(without),
            )


def build_detection(defended: Defended, against: Iterable[Outcome]) -> DetectionRecord:
    """What a detector tells apart, at its threshold and at any other."""
    facts = to_json_types(defended.facts)
    return DetectionRecord(
        threshold=facts.get("threshold"),
        fpr_asked=facts.get("fpr"),
        fpr=build_rate(metrics.false_alarm_rate(defended)),
        attacks=tuple(build_detected_attack(defended, outcome) for outcome in against),
    )


def build_detected_attack(defended: Defended, outcome: Outcome) -> DetectedAttackRow:
    """What a detector tells of the results of one attack that fool the model."""
    scores = (defended.clean["score"], outcome.columns["score"][metrics.find_fooled(outcome)])
    return DetectedAttackRow(
        attack=str(outcome.attack),
        threat=build_threat(outcome.threat),
        adaptive=outcome.adaptive,
        auc=drop_not_finite(statistics.roc_auc(*scores)),
        tpr=build_rate(metrics.detection_rate(outcome)),
        roc=tuple((false, true) for false, true in statistics.roc_curve(*scores).tolist()),
    )


def build_curves(run: Run) -> Iterator[CurveRecord]:
    """Robust images over the distance allowed, a curve for each norm, goal and defense."""
    found: dict[tuple[str, bool, str | None], list[Outcome]] = {}
    for outcome in run.attacks:
        key = (outcome.threat.norm, outcome.threat.targeted, name_defense(outcome))
        found.setdefault(key, []).append(outcome)
    for (norm, _, _), group in found.items():
        if norm not in CURVED:
            continue
        yield from build_curve(group, eight_bit=False)
        saved = [each for each in group if each.resolved.get("images") == "8bit"]
        if 0 < len(saved) < len(group):
            yield from build_curve(saved, eight_bit=True)


def build_curve(group: Sequence[Outcome], *, eight_bit: bool) -> Iterator[CurveRecord]:
    """The curve of outcomes of one norm, goal and defense; none without two budgets."""
    curve, threat = metrics.robustness_curve(group), group[0].threat
    if len(curve.budgets) < 2:
        return
    yield CurveRecord(
        norm=CURVED[threat.norm],
        targeted=threat.targeted,
        defense=name_defense(group[0]),
        attacks=tuple(dict.fromkeys(str(outcome.attack) for outcome in group)),
        budgets=tuple(curve.budgets.tolist()),
        robust=tuple(curve.robust.tolist()),
        n=len(group[0].attacked),
        nearest=any(outcome.threat.eps is None for outcome in group),
        eight_bit=eight_bit,
        tested=tuple(
            TestedRadius(threat.eps, build_rate(metrics.worst_case(same)))
            for threat, same in metrics.group_by_threat(group).items()
            if threat.eps is not None
        ),
    )


def choose_ways(group: Sequence[Outcome]) -> Sequence[str]:
    """The ways to look at results; without PNG where it cannot hold the images."""
    holds = all((outcome.columns["pred_png"][outcome.attacked] != -2).all() for outcome in group)
    return [way for way in PREDICTIONS if way != "png" or holds]
