"""The one record of a report: every number and sentence that any format shows.

Built once from a run. JSON is this record; the other formats only lay it out, so that they cannot
disagree.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from robusteval import metrics
from robusteval.metrics import Rate
from robusteval.records import Outcome, Run, Threat, show_number

from .words import verdict

SCHEMA = 1

# the three ways to look at a result, and the column that judges each
JUDGED = {"float": "pred_adv", "eight_bit": "pred_8bit", "png": "pred_png"}


def as_dict(run: Run) -> dict[str, Any]:
    """The record of a report, JSON-able: no number in it is infinite or nan, but null.

    Rates are ``{k, n, value, low, high}`` with the Wilson 95 % interval.
    """
    attacks = run.attacks
    grouped = metrics.groups(attacks)
    asked = [str(spec) for spec in run.config.get("attacks") or ()]
    done = {str(outcome.attack) for outcome in attacks}
    complete = run.status == "complete"
    record = {
        "complete": complete,
        "attacks_asked": max(len(asked), len(attacks)),
        "upper_bound": not complete or any(f.grave and not f.misfed for f in run.findings),
        "misfed": any(finding.misfed for finding in run.findings),
        "clean_accuracy": rate_of(metrics.accuracy(run.clean)),
        "worst_cases": [worst_of(threat, group) for threat, group in grouped.items()],
        "attacks": [
            {**attack_of(outcome), "unique_breaks": unique}
            for group in grouped.values()
            for outcome, unique in zip(group, metrics.unique_breaks(group), strict=True)
        ],
        "probes": [
            {"probe": outcome.role, **attack_of(outcome)}
            for outcome in run.outcomes
            if outcome.role != "attack"
        ],
        "findings": [
            finding._asdict() for finding in sorted(run.findings, key=lambda f: not f.grave)
        ],
        "failures": dict(run.failures),
        "not_run": [spec for spec in asked if spec not in done | run.failures.keys()],
        "provenance": {
            "created": run.created,
            "seconds": run.seconds,
            "folder": run.folder,
            "model": run.model,
            "data": run.data,
            "environment": run.environment,
            "config": run.config,
            "seed": run.config.get("seed"),
            "command": run.config.get("command"),
        },
    }
    plain: dict[str, Any] = jsonable(record)
    return {"schema": SCHEMA, "verdict": verdict(plain), **plain}


def to_json(run: Run) -> str:
    """The record as JSON text, ASCII only."""
    return json.dumps(as_dict(run), indent=2, allow_nan=False)


def worst_of(threat: Threat, group: Sequence[Outcome]) -> dict[str, Any]:
    """What is left of a model when the attacker picks the best attack for each image."""
    attacked = int(group[0].attacked.sum())
    robust = {way: metrics.worst_case(group, pred) for way, pred in ways(group).items()}
    fooled = {way: Rate(attacked - rate.k, attacked) for way, rate in robust.items()}
    return {
        "threat": threat_of(threat),
        "attacks": [str(outcome.attack) for outcome in group],
        "robust_accuracy": rates_of(robust),
        "success_rate": rates_of(fooled),
        "distance": metrics.nearest(group)._asdict(),
        "cost": metrics.cost(group)._asdict(),
    }


def attack_of(outcome: Outcome) -> dict[str, Any]:
    """One attack by itself."""
    judged = ways([outcome])
    return {
        "spec": str(outcome.attack),
        "name": outcome.attack.name,
        "parameters": outcome.resolved or outcome.attack.parameters,
        "threat": threat_of(outcome.threat),
        "knowledge": outcome.knowledge,
        "robust_accuracy": rates_of(
            {way: metrics.robust_accuracy(outcome, pred) for way, pred in judged.items()}
        ),
        "success_rate": rates_of(
            {way: metrics.success_rate(outcome, pred) for way, pred in judged.items()}
        ),
        "distance": metrics.nearest([outcome])._asdict(),
        "distances": metrics.distances(outcome)._asdict(),
        "cost": metrics.cost([outcome])._asdict(),
        "faults": metrics.faults(outcome)._asdict(),
        "notes": list(outcome.notes),
    }


def ways(group: Sequence[Outcome]) -> dict[str, str]:
    """The columns to judge by; without PNG where it cannot hold the images."""
    holds = all((outcome.columns["pred_png"][outcome.attacked] != -2).all() for outcome in group)
    return {way: pred for way, pred in JUDGED.items() if way != "png" or holds}


def threat_of(threat: Threat) -> dict[str, Any]:
    """A threat with its radius on both scales: of [0, 1] and in grey levels."""
    eps = threat.eps
    levels = None if eps is None or threat.norm.startswith("l0") else f"{grey(eps)}/255"
    return {**threat._asdict(), "eps_255": levels}


def grey(eps: float) -> str:
    """A radius in grey levels, as short as it is exact to nine digits."""
    return show_number(float(f"{eps * 255:.9g}")) if math.isfinite(eps) else str(eps)


def rate_of(rate: Rate) -> dict[str, Any]:
    """A rate with everything that is shown of it."""
    return {**rate._asdict(), "value": rate.value, **rate.interval._asdict()}


def rates_of(rates: Mapping[str, Rate]) -> dict[str, Any]:
    """A rate for each way of looking; null where there is none."""
    return {way: rate_of(rates[way]) if way in rates else None for way in JUDGED}


def jsonable(value: Any) -> Any:
    """The same in plain JSON types; what is not finite becomes null, what is unknown its text."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | None) else str(value)
