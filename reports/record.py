"""The record of a report: every number and sentence that any format shows, with its type.

A record is built once from a run (`robusteval.reports.build`). JSON is this record; every other
format lays it out, so that formats cannot disagree, and a misspelt name is an error of types.
`report.schema.json` is generated from these classes (`robusteval.reports.schema`): the first line
of a docstring, and a text beside a type, are descriptions in it.

A number that does not exist, such as the distance of no success, is None. Shares are of 1; radii
and distances in units of the [0, 1] pixel range, l0 in values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

from robusteval.registry import REPORT_FORMATS
from robusteval.runs.types import Run, spell_json

from .corruptions import CorruptionsRecord
from .groups import GroupsRecord, TurnedRecord
from .map_record import MapsRecord
from .measures import (
    Behind,
    CostRecord,
    Count,
    DistanceRecord,
    DistancesRecord,
    Facts,
    Limits,
    Place,
    Positive,
    RateRecord,
    RatesRecord,
    Share,
    Specs,
    ThreatRecord,
    spell_rows,
    to_json_types,
)
from .models import ModelsRecord, build_models
from .stages import StageRow
from .transfer import ReceivedRecord
from .transfer_matrix import TransferMatrix, build_matrix
from .trend_record import TrendRecord

SCHEMA: Literal[1] = 1
MANY = 500  # attacks, from which on JSON has a line for each
GateKind = Literal["floor", "max_drop", "max_clean_cost", "min_tpr", "findings"]
GateOutcome = Literal["passed", "failed", "inconclusive"]
DefenseKind = Literal["model", "detector"]
CurveNorm = Literal["linf", "l2", "l1", "l0", "l0_pixels", "ssim"]


@dataclass(frozen=True)
class FaultsRecord:
    """Images on which an attack broke its promise; repaired before judging."""

    left_box: Count
    left_ball: Count
    not_finite: Count
    logits_not_finite: Count


@dataclass(frozen=True)
class MeasuredAttack:
    """What one attack did, whether it was asked for or is a probe."""

    outcome: Place
    spec: Annotated[str, "as it is asked for, such as pgd:eps=8/255,steps=20"]
    name: str
    parameters: Annotated[Facts, "with all defaults"]
    threat: ThreatRecord
    knowledge: Annotated[str, "what the attack sees of the model"]
    defense: Behind
    adaptive: Annotated[bool, "the attack knew the defense"]
    robust_accuracy: RatesRecord
    success_rate: RatesRecord
    distance: DistanceRecord
    distances: DistancesRecord
    cost: CostRecord
    faults: FaultsRecord
    notes: tuple[str, ...]


@dataclass(frozen=True)
class AttackRow(MeasuredAttack):
    """An attack that was asked for."""

    unique_breaks: Annotated[Count, "images that no other attack of the same threat fools"]
    stages: Annotated[tuple[StageRow, ...], "of an attack that has several parts, in their order"]


@dataclass(frozen=True)
class ProbePurpose:
    """The part of a probe that stands before what it measured."""

    probe: Annotated[str, "what it is for"]


@dataclass(frozen=True)
class ProbeRow(MeasuredAttack, ProbePurpose):
    """An extra attack of the trust checks."""


@dataclass(frozen=True)
class WorstCaseRow:
    """What is left when the attacker picks the best attack for each image."""

    threat: ThreatRecord
    defense: str | None
    adaptive: Annotated[bool, "at least one of the attacks knew the defense"]
    attacks: Specs
    robust_accuracy: RatesRecord
    success_rate: RatesRecord
    distance: DistanceRecord
    distances: DistancesRecord
    cost: CostRecord


@dataclass(frozen=True)
class CleanCostRecord:
    """What a defense costs on images as they are, against the model without it."""

    lost: Count
    gained: Count
    n: Count
    value: Annotated[float | None, Limits(minimum=-1, maximum=1), "(lost - gained) / n"]


@dataclass(frozen=True)
class DefeatRow:
    """A threat under which attacks that know a defense leave it no better than none."""

    threat: ThreatRecord
    attacks: Specs
    robust_accuracy: RateRecord
    undefended: RateRecord


@dataclass(frozen=True)
class DetectedAttackRow:
    """What a detector tells of the results of one attack."""

    attack: str
    threat: ThreatRecord
    adaptive: bool
    auc: Share | None
    tpr: Annotated[
        RateRecord, "flagged, of the results that reach the goal when alarms are left aside"
    ]
    roc: Annotated[
        tuple[tuple[Share, Share], ...],
        Limits(maxItems=100),
        "false and true positive rates, from (0, 0) to (1, 1)",
    ]


@dataclass(frozen=True)
class DetectionRecord:
    """What a detector tells apart, at its threshold and at any other."""

    threshold: float | None
    fpr_asked: Annotated[Share | None, "what the threshold was set for"]
    fpr: Annotated[RateRecord, "flagged, of the images as they are"]
    attacks: tuple[DetectedAttackRow, ...]


@dataclass(frozen=True)
class DefenseRow:
    """A defense: what it costs on clean images, and whether attacks that know it defeat it."""

    spec: str
    name: str
    kind: DefenseKind
    clean_accuracy: Annotated[RateRecord, "right and not flagged"]
    clean_cost: CleanCostRecord
    forwards: Annotated[Positive | None, "passes per prediction"]
    facts: Facts
    defeated: tuple[DefeatRow, ...]
    detector: DetectionRecord | None


@dataclass(frozen=True)
class TestedRadius:
    """A radius that attacks were given, and what it left."""

    __test__ = False  # of pytest, which takes the name for its own

    eps: float
    robust_accuracy: RateRecord


@dataclass(frozen=True)
class CurveRecord:
    """Images without a success within each budget: an upper bound, of unknown end."""

    norm: CurveNorm
    targeted: bool
    defense: str | None
    attacks: Specs
    budgets: Annotated[tuple[Positive, ...], Limits(minItems=2, maxItems=200)]
    robust: Annotated[tuple[Count, ...], Limits(minItems=2, maxItems=200)]
    n: Count
    nearest: Annotated[
        bool, "some attack looked for the nearest success, not for any within a radius"
    ]
    eight_bit: Annotated[
        bool, "of attacks that looked among 8-bit images, beside a curve of all attacks"
    ]
    tested: tuple[TestedRadius, ...]


@dataclass(frozen=True)
class FindingRow:
    """Something a reader must know before believing a number."""

    code: str
    grave: bool
    message: str
    cell: str | None


@dataclass(frozen=True)
class FlippedImage:
    """An image that was lost against the baseline."""

    id: Annotated[str, Limits(pattern="^[0-9a-f]{16}$")]
    index: Count
    label: int


@dataclass(frozen=True)
class GateRow:
    """What became of one gate; null where a number has no meaning for its kind."""

    name: str
    kind: GateKind
    on: Annotated[str, "what it looks at"]
    outcome: GateOutcome
    reason: str
    limit: float | None = None
    value: float | None = None
    low: float | None = None
    high: float | None = None
    p: Annotated[Share | None, "after Holm's correction"] = None
    lost: Count | None = None
    gained: Count | None = None
    detectable: Annotated[Share | None, "the smallest drop this sample could have shown"] = None
    flipped: Annotated[tuple[FlippedImage, ...], Limits(maxItems=20), "lost images"] = ()
    line: Annotated[int | None, Limits(minimum=1), "in the configuration file"] = None


@dataclass(frozen=True)
class GatesRecord:
    """What the gates said of a run."""

    outcome: GateOutcome
    config: str | None
    baseline: str | None
    alpha: Share
    gates: tuple[GateRow, ...]


@dataclass(frozen=True)
class Provenance:
    """Where the numbers come from."""

    created: str
    seconds: Positive
    folder: str | None
    model: Facts
    data: Facts
    environment: Facts
    config: Facts
    seed: int | None
    command: str | None


@dataclass(frozen=True)
class RunRecord:
    """The record of one run."""

    schema: Literal[1]
    verdict: Annotated[str, "one sentence"]
    complete: bool
    attacks_asked: Annotated[Count, "cells that were asked for"]
    upper_bound: Annotated[bool, "the model may be less robust than the numbers say"]
    misfed: Annotated[
        bool, "the model is probably not fed as it was trained: no number is to be used"
    ]
    clean_accuracy: Annotated[RateRecord, "of the model without a defense"]
    gates: Annotated[GatesRecord | None, "null: none were asked for"]
    worst_cases: tuple[WorstCaseRow, ...]
    attacks: tuple[AttackRow, ...]
    defenses: tuple[DefenseRow, ...]
    curves: tuple[CurveRecord, ...]
    corruptions: Annotated[tuple[CorruptionsRecord, ...], "empty: none were run"]
    groups: Annotated[tuple[GroupsRecord, ...], "by class and by slice, for each worst case"]
    turned: Annotated[
        tuple[TurnedRecord, ...],
        "which class becomes which; of more than 500 attacks under all of a threat together alone",
    ]
    trend: Annotated[TrendRecord | None, "null: no history was given"]
    interpreters: Annotated[MapsRecord | None, "null: no interpreter was asked for"]
    received: Annotated[ReceivedRecord | None, "null: no target was named"]
    probes: tuple[ProbeRow, ...]
    findings: Annotated[tuple[FindingRow, ...], "grave ones first"]
    failures: Annotated[Mapping[str, str], "attack: why it has no result"]
    not_run: Annotated[tuple[str, ...], "attacks that were not finished"]
    provenance: Provenance
    # for formats that show images: the run itself, which is not part of the JSON
    run: Run = field(repr=False, compare=False, metadata={"json": False})
    # of a page that shows some of very many attacks, what it leaves out: see `abridged`
    left_out: str = field(default="", metadata={"json": False})


@dataclass(frozen=True)
class RunRecords:
    """The records of several runs."""

    schema: Literal[1]
    models: ModelsRecord
    transfer: Annotated[TransferMatrix | None, "null: they do not judge each other's images"]
    runs: tuple[RunRecord, ...]


@REPORT_FORMATS.add("json", suffix=".json")
def render_json(records: Sequence[RunRecord]) -> str:
    """The records as JSON, as `report.schema.json` describes it."""
    return to_json(records) + "\n"


def to_json(records: RunRecord | Sequence[RunRecord]) -> str:
    """Records as JSON text, ASCII only; several of them as one object with all."""
    runs = (records,) if isinstance(records, RunRecord) else tuple(records)
    whole: RunRecord | RunRecords = runs[0]
    if len(runs) > 1:
        several = [record.run for record in runs]
        whole = RunRecords(SCHEMA, build_models(several), build_matrix(several), runs)
    if sum(len(run.attacks) for run in runs) > MANY:
        return spell_json(spell_rows(whole))
    return spell_json(json.dumps(to_json_types(whole), indent=2, allow_nan=False))
