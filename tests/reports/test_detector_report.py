"""The report of a detector: one record, as tables and as JSON."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from robusteval.reports.detector import print_detector, render_detector_json
from robusteval.runs.detector_record import (
    AttackFigures,
    AtThreshold,
    DetectorCost,
    DetectorParts,
    DetectorRecord,
    DetectorRemark,
    Estimate,
    FalseAlarms,
    FewerChannels,
    Headline,
    ImageCounts,
    LeakChecks,
    LearntAttack,
    Proportion,
    SimplerRule,
    TransferFigures,
    TransferRow,
    TreeChoice,
    TriedTrees,
)
from robusteval.runs.plain import from_plain

AREA, GAIN = Estimate(0.9, 0.8, 1.0), Estimate(0.05, -0.01, 0.1)
HALF = Proportion(10, 20, 0.3, 0.7)


def record(attacks: int, precision: float | None = 0.1) -> DetectorRecord:
    """A detector fitted on so many attacks."""
    at = {fpr: AtThreshold(0.5, HALF, HALF, precision) for fpr in ("0.05", "0.01")}
    names = [f"attack{i}" for i in range(attacks)]
    cells = tuple(TransferFigures(AREA, HALF) for _ in names)
    return DetectorRecord(
        detector=DetectorParts(("grad", "cam"), "pair", "raw", False),
        model={"sha256": "0" * 64, "mean": None, "std": None},
        data="bands",
        seed=0,
        images=ImageCounts(100, 2, 60, 20, 20),
        attacks=tuple(LearntAttack(name, 10, 20, 0.3, 0.7) for name in names),
        features=146,
        cost=DetectorCost(5.0, 12.5),
        headline=Headline(AREA, 0.8, at, 0.75, 0.2),
        rounds=142,
        trees=TreeChoice(4, 0.05, 0.3, (TriedTrees(4, 0.05, 0.3, 0.9), TriedTrees(6, 0.1, 1, 0.8))),
        per_attack=tuple(AttackFigures(name, AREA, 0.8, at, HALF, HALF) for name in names),
        negatives=(FalseAlarms("clean", {"0.05": HALF, "0.01": HALF}),),
        baselines=(SimplerRule("logistic regression", AREA, 0.8, at, GAIN),),
        matrix=tuple(TransferRow(name, cells) for name in (*names, None)),
        simpler=(FewerChannels("grad", AREA, GAIN),),
        leaks=LeakChecks(AREA, AREA, AREA),
        imitation=0.8,
        remarks=(DetectorRemark(True, "It leaks."), DetectorRemark(False, "Few images.")),
        command=None,
    )


def printed(made: DetectorRecord) -> str:
    console = Console(file=io.StringIO(), width=80)
    print_detector(made, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_json_is_the_record() -> None:
    made = record(2)
    read = json.loads(render_detector_json(made))

    assert made == from_plain(DetectorRecord, read)
    assert read["headline"]["at"]["0.05"]["tpr"] == {"k": 10, "n": 20, "low": 0.3, "high": 0.7}
    assert read["command"] is None


@pytest.mark.parametrize(("attacks", "cell"), [(2, "0.900"), (5, "0.900")])
def test_every_part_is_printed_in_80_columns(attacks: int, cell: str) -> None:
    text = printed(record(attacks))

    assert max(map(len, text.splitlines())) <= 80
    assert cell in text
    for part in (
        "AUC 0.900 (0.800–1.000) on images that had no say: of 20 attacked ones",
        "Fitted on one attack, judged on another",
        "clean (20)",
        "the same on grad",
        "two copies of different noise",
        "10.0 % of the flagged, were 1 of 100 images attacked",
        "! It leaks.",
        "- Few images.",
    ):
        assert part in text


def test_one_attack_has_no_matrix_and_a_precision_may_be_unknown() -> None:
    text = printed(record(1, None))

    assert "judged on another" not in text
    assert "not known without a false alarm among 20 images" in text


def test_how_trees_grow_is_said_with_what_it_was_chosen_from() -> None:
    text = " ".join(printed(record(1)).split())

    assert "depth 4, rate 0.05, 30 % of the features each: best of 2" in text
    assert "(AUC 0.800 to 0.900)" in text
