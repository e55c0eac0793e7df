"""Runs and gates made of numbers alone, with everything a report can show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from rich.console import Console

from robusteval.reports.build import build_record
from robusteval.reports.html import to_html
from robusteval.reports.markdown import to_markdown
from robusteval.reports.measures import to_json_types
from robusteval.reports.record import (
    FlippedImage,
    GateOutcome,
    GateRow,
    GatesRecord,
    RunRecord,
    to_json,
)
from robusteval.reports.terminal import print_table
from robusteval.runs.types import Defended, Finding, Outcome, Run, Spec, Threat

MakeOutcome = Callable[..., Outcome]
MakeRun = Callable[..., Run]

LINF = Threat("linf", 8 / 255, False)
PGD = Spec("pgd", {"eps": 8 / 255, "steps": 20})
APGD = Spec("apgd", {"eps": 8 / 255, "steps": 100, "restarts": 5})
PGAP = Spec("pgap", {"eps2": 0.01})
SPARSE = Spec("sigma_zero", {"steps": 300})
JPEG = Spec("jpeg", {"quality": 75})
TRADES = Spec("trades", {"eps": 8 / 255, "beta": 6.0})
DETECTOR = Spec("detector", {"interpreters": "cam+grad", "fpr": 0.05})


@dataclass(frozen=True)
class Check:
    """What gates said, as a report takes it."""

    gates: GatesRecord

    def to_gates(self) -> GatesRecord:
        """The record."""
        return self.gates


def gate(outcome: GateOutcome, **changed: Any) -> GateRow:
    """A gate on robust accuracy with this outcome."""
    row = GateRow(
        name="worst-linf",
        kind="floor",
        on="robust accuracy at linf eps 8/255, worst case",
        outcome=outcome,
        reason="The lower end of the interval is below the limit.",
        limit=0.3,
        value=0.124,
        low=0.098,
        high=0.156,
        line=3,
    )
    return replace(row, **changed)


def check(name: str = "drop") -> Check:
    """Gates of all outcomes; `name` stands wherever a name can."""
    flipped = tuple(FlippedImage(f"{i:016x}", 7 * i, i % 10) for i in range(20))
    gates = (
        gate("failed"),
        gate(
            "failed",
            name=name,
            kind="max_drop",
            on=name,
            limit=0.01,
            value=0.042,
            low=0.028,
            high=0.056,
            p=0.00012,
            lost=24,
            gained=3,
            detectable=0.008,
            reason=f"It lost 4.2 points against {name}.",
            flipped=flipped,
        ),
        gate(
            "inconclusive",
            name="clean-cost",
            kind="max_clean_cost",
            on="clean accuracy behind jpeg",
            limit=0.02,
            value=0.018,
            low=None,
            high=None,
            p=0.4,
            lost=9,
            gained=0,
            detectable=0.034,
            reason="",
            line=None,
        ),
        gate("passed", name="tpr", kind="min_tpr", on="detector", limit=0.05),
        gate("passed", name="findings", kind="findings", on="", limit=1, value=0, low=None),
        gate("inconclusive", name="absent", value=None, low=None, high=None, limit=None),
    )
    return Check(GatesRecord("failed", name, name, 0.05, gates))


def corrupted(make: MakeOutcome, kind: str, severity: int, lost: int, n: int) -> Outcome:
    """A corruption of `n` images under which the first are wrong."""
    parameters = {"kind": kind, "severity": severity}
    made = make(
        np.arange(n) < lost,
        spec=Spec("corruption", parameters),
        threat=Threat("corruption", severity, False),
        knowledge="none",
    )
    return replace(made, resolved=parameters)


def as_dict(run: Run, checked: Check | None = None) -> dict[str, Any]:
    """The record of a run as JSON has it."""
    record: dict[str, Any] = to_json_types(record_of(run, checked))
    return record


def json_of(runs: Run | Sequence[Run], checks: Sequence[Check | None] = ()) -> str:
    """The JSON report of one run or of several."""
    every = [runs] if isinstance(runs, Run) else list(runs)
    return to_json(list(map(record_of, every, checks or [None] * len(every))))


def markdown_of(run: Run, checked: Check | None = None, limit: int | None = None) -> str:
    """The Markdown report of a run."""
    return to_markdown(record_of(run, checked), limit)


def html_of(runs: Sequence[Run], checks: Sequence[Check | None] = ()) -> str:
    """The HTML report of some runs."""
    return to_html(list(map(record_of, runs, checks or [None] * len(runs))))


def print_run(run: Run, console: Console, checked: Check | None = None) -> None:
    """Print the report of a run."""
    print_table(record_of(run, checked), console)


def record_of(run: Run, checked: Check | None = None) -> RunRecord:
    """The record of a run, with what gates said of it."""
    return build_record(run, None if checked is None else checked.to_gates())


def behind(outcome: Outcome, defense: Spec, *, adaptive: bool, **columns: Any) -> Outcome:
    """The same cell, behind a defense."""
    return replace(
        outcome, defense=defense, adaptive=adaptive, columns={**outcome.columns, **columns}
    )


def defended(
    make_outcome: MakeOutcome, make_run: MakeRun, *, n: int = 500, name: str = "", **changed: Any
) -> Run:
    """Attacks of several norms against nothing, two models and a detector.

    `name` is put into the name of every defense.
    """
    rng = np.random.default_rng(0)
    right = np.arange(n) < 0.95 * n
    jpeg, trades, detector = (
        Spec(spec.name + name, spec.parameters) for spec in (JPEG, TRADES, DETECTOR)
    )

    def attack(spec: Spec, threat: Threat, share: float, first: Any = right) -> Outcome:
        broken = rng.random(n) < share
        far = rng.uniform(0.2, 1.0, n) * (threat.eps or 1.0)
        sizes: dict[str, Any] = {threat.norm: np.where(broken & first, far, 0.0)}
        if threat.norm == "ssim":
            sizes["ssim"] = np.where(broken & first, 1 - 0.004 * far, 1.0)
        if threat.norm == "l0":
            sizes = {"l0": np.ceil(30 * far), "l0_pixels": np.ceil(12 * far)}
        return make_outcome(broken, right=first, spec=spec, threat=threat, **sizes)

    through_jpeg, through_trades = right & (rng.random(n) < 0.98), right & (rng.random(n) < 0.9)
    score = rng.normal(0.0, 1.0, n)
    alarm = score > 1.645
    quiet = right & ~alarm
    caught, missed = rng.normal(2.0, 1.0, n), rng.normal(0.3, 1.0, n)
    seen = {"pred_clean": np.arange(n) % 10 + ~right}  # an alarm changes no prediction
    outcomes = (
        attack(PGD, LINF, 0.97),
        attack(APGD, LINF, 0.99),
        attack(PGAP, Threat("ssim", None, False), 0.9),
        attack(SPARSE, Threat("l0", None, False), 0.95),
        behind(attack(PGD, LINF, 0.3, through_jpeg), jpeg, adaptive=False),
        behind(attack(PGD, LINF, 0.985, through_jpeg), jpeg, adaptive=True),
        behind(attack(APGD, LINF, 0.985, through_jpeg), jpeg, adaptive=True),
        behind(attack(PGD, LINF, 0.45, through_trades), trades, adaptive=True),
        behind(attack(APGD, LINF, 0.5, through_trades), trades, adaptive=True),
        behind(
            attack(PGD, LINF, 0.97, quiet),
            detector,
            adaptive=False,
            score=caught,
            flagged=caught > 1.645,
            **seen,
        ),
        behind(
            attack(SPARSE, Threat("l0", None, False), 0.95, quiet),
            detector,
            adaptive=True,
            score=missed,
            flagged=missed > 1.645,
            **seen,
        ),
    )
    run = make_run(*outcomes, **changed)

    def clean(first: Any) -> dict[str, Any]:
        label = run.clean["label"]
        return {**run.clean, "pred_clean": np.where(first, label, label + 1)}

    facts = {"threshold": 1.645, "fpr": 0.05, "forwards": 3.0}
    defenses = (
        Defended(jpeg, "model", clean(through_jpeg), {"forwards": 1.0}),
        Defended(trades, "model", clean(through_trades), {}),
        Defended(detector, "detector", {**clean(right), "score": score, "flagged": alarm}, facts),
    )
    findings = (
        Finding("clipped", False, "Two images are in the data twice."),
        Finding("zero-gradient", True, "The gradient is zero on 12 images.", str(PGD)),
    )
    return replace(run, **{"defenses": defenses, "findings": findings, **changed})


def explained(make_outcome: MakeOutcome, make_run: MakeRun, *, n: int = 100, name: str = "") -> Run:
    """Plain targeted PGD and attacks on maps, measured by three interpreters.

    `name` is put into the name of one of them.
    """
    rng = np.random.default_rng(0)
    right = np.arange(n) < 0.9 * n
    threat = Threat("linf", 8 / 255, True)
    interpreters = ("cam", "gradcam", f"mask{name}")

    def attack(spec: Spec, share: float, near: dict[str, float]) -> Outcome:
        made = np.arange(n) % 100 < 100 * share
        columns: dict[str, Any] = {
            "target": (np.arange(n) + 1) % 10,
            "edge_energy": rng.uniform(0.3, 0.6, n),
            "edge_area": rng.uniform(0.1, 0.3, n),
        }
        for each in interpreters:
            spread = rng.normal(0, 0.01, n)
            columns |= {
                f"map_distance:{each}": np.where(right, near.get(each, 0.3) + spread, np.nan),
                f"map_iou:{each}": np.where(right, 0.5, np.nan),
                f"map_noise:{each}": np.where(right, 0.1 + spread, np.nan),
            }
        columns[f"map_floor:mask{name}"] = np.where(right, 0.31 + rng.normal(0, 0.01, n), np.nan)
        outcome = make_outcome(made, right=right, spec=spec, threat=threat, **columns)
        columns["pred_adv"] = np.where(made & right, columns["target"], outcome.columns["label"])
        return replace(
            outcome, columns={**outcome.columns, **columns}, resolved={"weight": 1.0, **spec[1]}
        )

    outcomes = (
        attack(Spec("pgd", {"eps": 8 / 255, "targeted": True}), 0.95, {}),
        attack(Spec("advedge", {"interpreter": "cam"}), 0.9, {"cam": 0.08, "gradcam": 0.1}),
        attack(Spec("advedge", {"interpreter": "cam+mask"}), 0.8, {"cam": 0.15}),
        attack(Spec("advedge", {"interpreter": "cam", "weight": 0}), 0.97, {"cam": 0.28}),
    )
    run = make_run(*outcomes)
    clean = dict(run.clean)
    for each in interpreters:
        # of cam they say something, of gradcam nothing, of mask nothing about the network
        gain = {"cam": 0.2, "gradcam": 0.0}.get(each, 0.1)
        known = right & (np.arange(n) < 32)
        chance = np.where(known, 0.4 + rng.uniform(0, 0.1, n), np.nan)
        clean |= {
            f"insertion:{each}": chance + gain + rng.normal(0, 0.01, n),
            f"chance_insertion:{each}": chance,
            f"deletion:{each}": chance - gain + rng.normal(0, 0.01, n),
            f"chance_deletion:{each}": chance,
            f"forgotten:{each}": np.where(known, 0.1 if each == "cam" else 0.9, np.nan),
        }
    facts: list[dict[str, Any]] = [
        {
            "spec": each,
            "name": each.removesuffix(name) if name else each,
            "parameters": {},
            "stretched": not each.startswith("mask"),
            "seeded": each.startswith("mask"),
            "alike": {"cam": ["gradcam"], "gradcam": ["cam"]}.get(each, []),
            "layer": "layer4" if "cam" in each else "",
        }
        for each in interpreters
    ]
    maps = {"top": 0.2, "edge": 0.1, "interpreters": facts}
    config = {**run.config, "interpreters": list(interpreters), "maps": maps}
    return replace(run, clean=clean, config=config)
