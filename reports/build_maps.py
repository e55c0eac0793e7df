"""What attacks do to the maps that explain a model: that part of the record, from a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from robusteval.runs import metrics, statistics
from robusteval.runs.types import Outcome, Run, Spec

from .map_record import (
    AreaRecord,
    InterpreterRow,
    MapAttackRow,
    MapPairRow,
    MapQualityRow,
    MapRow,
    MapsRecord,
    TransferRecord,
    TransferRow,
)
from .measures import (
    DifferenceRecord,
    MeanRecord,
    build_cost,
    build_difference,
    build_mean,
    build_rate,
    to_json_types,
)

EFFORT = ("warmup", "steps")  # parameters that say how long an attack goes on


def build_maps(run: Run) -> MapsRecord | None:
    """What was measured of maps; None if no interpreter was asked for."""
    config = run.config.get("maps")
    if not config:
        return None
    measured = [
        build_interpreter(facts, config["interpreters"]) for facts in config["interpreters"]
    ]
    specs = [interpreter.spec for interpreter in measured]
    places = {id(outcome): place for place, outcome in enumerate(run.outcomes)}
    # a cell that an earlier version left, or a plugin made, may lack them
    cells = [o for o in run.attacks if all(f"map_distance:{spec}" in o.columns for spec in specs)]
    return MapsRecord(
        top=config["top"],
        edge=config["edge"],
        measured=tuple(measured),
        quality=tuple(build_quality(run, s) for s in specs if f"insertion:{s}" in run.clean),
        attacks=tuple(build_map_attack(cell, measured, places[id(cell)]) for cell in cells),
        pairs=tuple(
            build_pair(cell, other, interpreter, places[id(cell)])
            for cell in cells
            for other in list_baselines(cell, cells)
            for interpreter in measured
        ),
        transfer=tuple(build_transfers(cells, measured)),
    )


def build_interpreter(
    facts: Mapping[str, Any], measured: Sequence[Mapping[str, Any]]
) -> InterpreterRow:
    """An interpreter of a run, by what the run says of all of them."""
    return InterpreterRow(
        spec=facts["spec"],
        name=facts["name"],
        parameters=to_json_types(facts["parameters"]),
        stretched=facts["stretched"],
        seeded=facts["seeded"],
        alike=tuple(list_alike(facts, measured)),
        layer=facts["layer"],
    )


def list_alike(facts: Mapping[str, Any], measured: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The other interpreters of a run that say the same.

    `cam` only runs on networks for which its list holds.
    """
    specs = [other["spec"] for other in measured]
    if "cam" in specs and facts["spec"] in ("cam", *facts["alike"]):
        yield from (spec for spec in specs if spec in facts["alike"])


def list_targets(outcome: Outcome) -> list[str]:
    """The names of the interpreters that an attack was made to fool."""
    given = outcome.resolved or outcome.attack.parameters
    names = given.get("interpreter")
    return names.split("+") if isinstance(names, str) and given.get("weight") != 0 else []


def list_baselines(outcome: Outcome, cells: Sequence[Outcome]) -> Iterator[Outcome]:
    """What an attack on maps is held against: targeted PGD of its radius, itself without maps."""
    if not list_targets(outcome):
        return
    same = [other for other in cells if other.defense == outcome.defense]
    reach = (outcome.threat.norm, outcome.threat.eps)
    for other in same:
        plain = other.attack.name == "pgd" and other.threat.targeted
        if plain and (other.threat.norm, other.threat.eps) == reach:
            yield other
            break
    for other in same:
        if other.attack.name == outcome.attack.name and not list_targets(other):
            if {**outcome.resolved, "weight": 0} == {**other.resolved, "weight": 0}:
                yield other


def build_map_attack(
    outcome: Outcome, measured: Sequence[InterpreterRow], place: int
) -> MapAttackRow:
    """What one attack did to the maps, on the images it succeeded on."""
    c, made = outcome.columns, outcome.success()

    def average(values: np.ndarray[Any, Any]) -> MeanRecord:
        return build_mean(statistics.mean_interval(values[made]))

    return MapAttackRow(
        outcome=place,
        spec=str(outcome.attack),
        defense=None if outcome.defense is None else str(outcome.defense),
        adaptive=outcome.adaptive,
        interpreters=tuple(list_targets(outcome)),
        success_rate=build_rate(metrics.success_rate(outcome)),
        confidence=average(c["confidence_adv"]),
        noise_rate=average(1 - c["ssim"]),
        edge_energy=average(c["edge_energy"]),
        edge_area=average(c["edge_area"]),
        cost=build_cost(metrics.sum_costs([outcome])),
        maps=tuple(build_map(outcome, interpreter) for interpreter in measured),
    )


def build_map(outcome: Outcome, interpreter: InterpreterRow) -> MapRow:
    """What one attack did to the maps of one interpreter, on the images it succeeded on."""
    c, made, spec = outcome.columns, outcome.success(), interpreter.spec
    far = c[f"map_distance:{spec}"]

    def average(what: str) -> MeanRecord:
        return build_mean(statistics.mean_interval(c[f"map_{what}:{spec}"][made]))

    def compare_with(what: str) -> DifferenceRecord:
        return build_difference(statistics.paired_difference(far, c[f"map_{what}:{spec}"], made))

    return MapRow(
        interpreter=spec,
        attacked=interpreter.name in list_targets(outcome),
        distance=average("distance"),
        iou=average("iou"),
        noise=average("noise"),
        floor=average("floor") if interpreter.seeded else None,
        beyond_noise=compare_with("noise"),
        beyond_floor=compare_with("floor") if f"map_floor:{spec}" in c else None,
    )


def build_pair(
    outcome: Outcome, other: Outcome, interpreter: InterpreterRow, place: int
) -> MapPairRow:
    """The distances of two attacks' maps, on the images both succeeded on."""
    gap = metrics.compare_column(outcome, other, f"map_distance:{interpreter.spec}")
    return MapPairRow(
        outcome=place,
        attack=str(outcome.attack),
        against=str(other.attack),
        defense=None if outcome.defense is None else str(outcome.defense),
        interpreter=interpreter.spec,
        attacked=interpreter.name in list_targets(outcome),
        difference=build_difference(gap),
    )


def build_transfers(
    cells: Sequence[Outcome], measured: Sequence[InterpreterRow]
) -> Iterator[TransferRecord]:
    """Where the same attack was made on several interpreters: attacked against measured.

    For another number of steps, too: what one of them costs depends on the interpreter.
    """
    found: dict[tuple[str, str | None], list[Outcome]] = {}
    for outcome in cells:
        if list_targets(outcome):
            defense = None if outcome.defense is None else str(outcome.defense)
            key = (str(drop_parameters(outcome.attack, "interpreter", *EFFORT)), defense)
            found.setdefault(key, []).append(outcome)
    for (_, defense), group in found.items():
        if len({tuple(list_targets(outcome)) for outcome in group}) < 2:
            continue
        own = [drop_parameters(outcome.attack, "interpreter") for outcome in group]
        differing = [k for k in EFFORT if len({spec.parameters.get(k) for spec in own}) > 1]
        yield TransferRecord(
            attack=str(drop_parameters(own[0], *differing)),
            defense=defense,
            measured=tuple(interpreter.spec for interpreter in measured),
            rows=tuple(
                TransferRow(
                    attacked="+".join(list_targets(outcome)),
                    effort=to_json_types(
                        {k: spec.parameters[k] for k in differing if k in spec.parameters}
                    ),
                    distances=tuple(measure_distance(outcome, each.spec) for each in measured),
                )
                for outcome, spec in zip(group, own, strict=True)
            ),
        )


def measure_distance(outcome: Outcome, interpreter: str) -> MeanRecord:
    """How far an attack leaves maps from the benign ones, on the images it succeeded on."""
    far = outcome.columns[f"map_distance:{interpreter}"]
    return build_mean(statistics.mean_interval(far[outcome.success()]))


def drop_parameters(spec: Spec, *names: str) -> Spec:
    """A spec less some of its parameters."""
    return Spec(spec.name, {k: v for k, v in spec.parameters.items() if k not in names})


def build_quality(run: Run, spec: str) -> MapQualityRow:
    """Whether maps of images as they are say anything about the network."""
    c = run.clean

    def hold_against_chance(what: str) -> AreaRecord:
        values, chance = c[f"{what}:{spec}"], c[f"chance_{what}:{spec}"]
        return AreaRecord(
            value=build_mean(statistics.mean_interval(values)),
            chance=build_mean(statistics.mean_interval(chance)),
            beyond_chance=build_difference(
                statistics.paired_difference(values, chance, np.isfinite(values))
            ),
        )

    return MapQualityRow(
        interpreter=spec,
        insertion=hold_against_chance("insertion"),
        deletion=hold_against_chance("deletion"),
        forgotten=build_mean(statistics.mean_interval(c[f"forgotten:{spec}"])),
    )
