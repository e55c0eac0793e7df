"""The one record of a report: every number and sentence that any format shows.

Built once from a run. JSON is this record, as `report.schema.json` describes it; the other formats
only lay it out, so that they cannot disagree.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from robusteval.runs import metrics
from robusteval.runs.metrics import Rate
from robusteval.runs.types import Defended, Outcome, Run, Threat, cell_name, show_number

from .formatting import verdict
from .maps import maps_of

SCHEMA = 1

# the three ways to look at a result, and the column that judges each
JUDGED = {"float": "pred_adv", "eight_bit": "pred_8bit", "png": "pred_png"}


# the norms in which curves are drawn; `ssim` stands for 1 - SSIM
CURVED = ("linf", "l2", "l1", "l0", "l0_pixels", "ssim")


# their radius is no brightness
COUNTED = ("l0", "l0_pixels", "ssim")


class Checked(Protocol):
    """What the gates said of a run."""

    def as_dict(self) -> dict[str, Any]:
        """Their outcome, and each gate with its numbers."""
        ...


def as_dict(run: Run, check: Checked | None = None) -> dict[str, Any]:
    """The record of a report, JSON-able: no number in it is infinite or nan, but null.

    Rates are ``{k, n, value, low, high}`` with the Wilson 95 % interval.
    """
    groups = [
        (defense, threat, group)
        for defense, outcomes in by_defense(run.attacks).items()
        for threat, group in metrics.groups(outcomes).items()
    ]
    position = {id(outcome): place for place, outcome in enumerate(run.outcomes)}
    cells = run.config.get("cells") or run.config.get("attacks") or ()
    complete = run.status == "complete"
    record = {
        "complete": complete,
        "attacks_asked": max(len(cells), len(run.attacks)),
        "upper_bound": not complete or any(f.grave and not f.misfed for f in run.findings),
        "misfed": any(finding.misfed for finding in run.findings),
        "clean_accuracy": rate_of(metrics.accuracy(run.clean)),
        "gates": check and check.as_dict(),
        "worst_cases": [worst_of(*group) for group in groups],
        "attacks": [
            {**attack_of(outcome, position), "unique_breaks": unique}
            for _, _, group in groups
            for outcome, unique in zip(group, metrics.unique_breaks(group), strict=True)
        ],
        "defenses": [defense_of(run, defended) for defended in run.defenses],
        "curves": list(curves_of(run)),
        "interpreters": maps_of(run),
        "probes": [
            {"probe": outcome.role, **attack_of(outcome, position)}
            for outcome in run.outcomes
            if outcome.role != "attack"
        ],
        "findings": [
            finding._asdict() for finding in sorted(run.findings, key=lambda f: not f.grave)
        ],
        "failures": dict(run.failures),
        "not_run": list(missing(run, cells)),
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


def to_json(runs: Run | Sequence[Run], checks: Sequence[Checked | None] = ()) -> str:
    """The record as JSON text, ASCII only; of several runs an object with all of them.

    `checks` tells what the gates said of each run; empty: nothing.
    """
    every = [runs] if isinstance(runs, Run) else list(runs)
    gates = checks or [None] * len(every)
    records = [as_dict(run, check) for run, check in zip(every, gates, strict=True)]
    whole = records[0] if len(records) == 1 else {"schema": SCHEMA, "runs": records}
    return json.dumps(whole, indent=2, allow_nan=False)


def by_defense(outcomes: Iterable[Outcome]) -> dict[str | None, list[Outcome]]:
    """Outcomes by what stood before the model: nothing first, then in order of appearance."""
    found: dict[str | None, list[Outcome]] = {None: []}
    for outcome in outcomes:
        found.setdefault(name_of(outcome), []).append(outcome)
    return found


def name_of(outcome: Outcome) -> str | None:
    """The defense of a cell; None without one."""
    return None if outcome.defense is None else str(outcome.defense)


def missing(run: Run, cells: Iterable[object]) -> Iterator[str]:
    """What was asked for, and has neither a result nor a reason for it."""
    done = {cell_name(o.attack, o.defense, o.adaptive) for o in run.attacks}
    yield from (str(cell) for cell in cells if str(cell) not in {*done, *run.failures})


def worst_of(defense: str | None, threat: Threat, group: Sequence[Outcome]) -> dict[str, Any]:
    """What is left of a model when the attacker picks the best attack for each image."""
    attacked = int(group[0].attacked.sum())
    robust = {way: metrics.worst_case(group, pred) for way, pred in ways(group).items()}
    fooled = {way: Rate(attacked - rate.k, attacked) for way, rate in robust.items()}
    return {
        "threat": threat_of(threat),
        "defense": defense,
        "adaptive": any(outcome.adaptive for outcome in group),
        "attacks": [str(outcome.attack) for outcome in group],
        "robust_accuracy": rates_of(robust),
        "success_rate": rates_of(fooled),
        "distance": metrics.nearest(group)._asdict(),
        "distances": metrics.distances(*group)._asdict(),
        "cost": metrics.cost(group)._asdict(),
    }


def attack_of(outcome: Outcome, position: Mapping[int, int]) -> dict[str, Any]:
    """One attack by itself; `position` tells where in the run it is."""
    judged = ways([outcome])
    return {
        "outcome": position[id(outcome)],
        "spec": str(outcome.attack),
        "name": outcome.attack.name,
        "parameters": outcome.resolved or outcome.attack.parameters,
        "threat": threat_of(outcome.threat),
        "knowledge": outcome.knowledge,
        "defense": name_of(outcome),
        "adaptive": outcome.adaptive,
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


def defense_of(run: Run, defended: Defended) -> dict[str, Any]:
    """A defense: what it costs on clean images, and whether attacks that know it defeat it."""
    before, after = metrics.right(run.clean), metrics.right(defended.clean)
    lost, gained, n = int((before & ~after).sum()), int((after & ~before).sum()), len(after)
    against = by_defense(run.attacks).get(str(defended.spec), [])
    return {
        "spec": str(defended.spec),
        "name": defended.spec.name,
        "kind": defended.kind,
        "clean_accuracy": rate_of(metrics.accuracy(defended.clean)),
        "clean_cost": {
            "lost": lost,
            "gained": gained,
            "n": n,
            "value": (lost - gained) / n if n else None,
        },
        "forwards": defended.facts.get("forwards"),
        "facts": defended.facts,
        "defeated": list(defeats(run, against)),
        "detector": detector_of(defended, against) if defended.kind == "detector" else None,
    }


def defeats(run: Run, against: Iterable[Outcome]) -> Iterator[dict[str, Any]]:
    """The threats under which a defense is no better than none to an attacker who knows it.

    No better: less robust, or by no more than what the intervals of both leave open.
    """
    undefended = metrics.groups(by_defense(run.attacks)[None])
    knowing = metrics.groups(outcome for outcome in against if outcome.adaptive)
    for threat, group in knowing.items():
        if threat not in undefended:
            continue
        with_it, without = metrics.worst_case(group), metrics.worst_case(undefended[threat])
        if with_it.interval.low <= without.interval.high:
            yield {
                "threat": threat_of(threat),
                "attacks": [str(outcome.attack) for outcome in group],
                "robust_accuracy": rate_of(with_it),
                "undefended": rate_of(without),
            }


def detector_of(defended: Defended, against: Iterable[Outcome]) -> dict[str, Any]:
    """What a detector tells apart, at its threshold and at any other."""
    scores = defended.clean["score"]
    return {
        "threshold": defended.facts.get("threshold"),
        "fpr_asked": defended.facts.get("fpr"),
        "fpr": rate_of(metrics.false_alarms(defended)),
        "attacks": [
            {
                "attack": str(outcome.attack),
                "threat": threat_of(outcome.threat),
                "adaptive": outcome.adaptive,
                "auc": metrics.auc(scores, outcome.columns["score"][metrics.fooled(outcome)]),
                "tpr": rate_of(metrics.detected(outcome)),
                "roc": metrics.roc(
                    scores, outcome.columns["score"][metrics.fooled(outcome)]
                ).tolist(),
            }
            for outcome in against
        ],
    }


def curves_of(run: Run) -> Iterator[dict[str, Any]]:
    """Robust images over the distance allowed, a curve for each norm, goal and defense."""
    found: dict[tuple[str, bool, str | None], list[Outcome]] = {}
    for outcome in run.attacks:
        key = (outcome.threat.norm, outcome.threat.targeted, name_of(outcome))
        found.setdefault(key, []).append(outcome)
    for (norm, targeted, defense), group in found.items():
        if norm not in CURVED:
            continue
        curve = metrics.curve(group)
        if len(curve.budgets) < 2:
            continue
        yield {
            "norm": norm,
            "targeted": targeted,
            "defense": defense,
            "attacks": list(dict.fromkeys(str(outcome.attack) for outcome in group)),
            "budgets": curve.budgets.tolist(),
            "robust": curve.robust.tolist(),
            "n": len(group[0].attacked),
            "nearest": any(outcome.threat.eps is None for outcome in group),
            "tested": [
                {"eps": threat.eps, "robust_accuracy": rate_of(metrics.worst_case(same))}
                for threat, same in metrics.groups(group).items()
                if threat.eps is not None
            ],
        }


def ways(group: Sequence[Outcome]) -> dict[str, str]:
    """The columns to judge by; without PNG where it cannot hold the images."""
    holds = all((outcome.columns["pred_png"][outcome.attacked] != -2).all() for outcome in group)
    return {way: pred for way, pred in JUDGED.items() if way != "png" or holds}


def threat_of(threat: Threat) -> dict[str, Any]:
    """A threat with its radius on both scales: of [0, 1] and in grey levels."""
    eps = threat.eps
    levels = None if eps is None or threat.norm in COUNTED else f"{grey(eps)}/255"
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
