"""Gates on one class or slice, and on the worst of several; none is green over nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robusteval.errors import UsageError
from robusteval.reports.baseline import Baseline, build_baseline
from robusteval.reports.gate import check
from robusteval.reports.gate_config import Rule, Settings, SliceName, read_settings
from robusteval.reports.record import GateRow
from robusteval.runs.slices import decode_slices, encode_slices
from robusteval.runs.types import Outcome, Run

MakeOutcome = Callable[..., Outcome]
MakeRun = Callable[..., Run]
N = 1000


def build_run(make_outcome: MakeOutcome, make_run: MakeRun, broken: Any) -> Run:
    """Ten classes; two cameras, of which `rear` has the odd classes, and `none` no image."""
    run = make_run(make_outcome(broken))
    cameras = [*("rear" if i % 2 else "front" for i in range(N)), "none"]
    config = {**run.config, "slices": encode_slices({"camera": cameras}, np.arange(N))}
    names = {**run.data, "class_names": [f"c{i}" for i in range(10)]}
    clean = {**run.clean, **decode_slices(config)}
    return replace(run, config=config, clean=clean, data=names)


@pytest.fixture
def run(make_outcome: MakeOutcome, make_run: MakeRun) -> Run:
    """Half of the images hold, of class 3 none."""
    rows = np.arange(N)
    return build_run(make_outcome, make_run, (rows // 10 % 2 == 0) | (rows % 10 == 3))


def gates_of(run: Run, baseline: Baseline | None = None, **rule: Any) -> list[GateRow]:
    """The rows of one gate, without that of the findings."""
    made = check(run, Settings(rules=(Rule(**rule),)), baseline)
    return [row for row in made.gates if row.kind != "findings"]


@pytest.mark.parametrize(
    ("wanted", "outcome", "value"),
    [
        ({"label": "c0"}, "passed", 0.5),
        ({"label": "0"}, "passed", 0.5),
        ({"label": "c3"}, "failed", 0.0),
        ({"slice": SliceName("camera", "front")}, "passed", 0.5),
        ({"slice": SliceName("camera", "rear")}, "passed", 0.4),
        ({"slice": SliceName("camera", "none")}, "inconclusive", None),
        ({"slice": SliceName("camera", "side")}, "failed", None),
        ({"slice": SliceName("light", "day")}, "failed", None),
        ({"label": "cat"}, "failed", None),
    ],
)
def test_a_floor_is_held_by_these_images_alone(
    wanted: dict[str, Any], outcome: str, value: float | None, run: Run
) -> None:
    (row,) = gates_of(run, floor=0.2, **wanted)

    assert (row.outcome, row.value) == (outcome, value)


def test_the_worst_class_decides(run: Run) -> None:
    (row,) = gates_of(run, floor=0.2, label="*")

    assert (row.outcome, row.value) == ("failed", 0.0)
    assert row.on == "worst case at linf eps 8/255, worst class: c3"
    assert row.reason.endswith("Of 10 classes 1 failed, 9 passed.")


def test_a_value_without_an_image_leaves_the_gate_open(run: Run) -> None:
    rows = gates_of(run, floor=0.2, slice=SliceName("camera", None))

    assert [row.outcome for row in rows] == ["passed", "inconclusive"]
    assert "no image of camera none" in rows[1].reason


def test_several_tests_are_corrected_together(run: Run) -> None:
    (alone,) = gates_of(run, floor=0.6, label="c0")
    both = check(run, Settings(rules=(Rule(floor=0.6, label="*"), Rule(floor=0.6, label="c0"))))

    assert alone.p is not None
    assert both.gates[1].p == pytest.approx(10 * alone.p, rel=0.2)


def test_a_drop_in_one_class_is_found_where_the_whole_hides_it(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    rows = np.arange(N)
    before = build_run(make_outcome, make_run, rows < 0)
    after = build_run(make_outcome, make_run, (rows % 10 == 3) & (rows < 300))
    baseline = build_baseline(before)
    rule = {"max_drop": 0.05, "detectable": 0.15}

    (whole,) = gates_of(after, baseline, **rule)
    (worst,) = gates_of(after, baseline, label="*", **rule)
    (good,) = gates_of(after, baseline, label="c4", **rule)

    assert [row.outcome for row in (whole, worst, good)] == ["passed", "failed", "passed"]
    assert worst.on.endswith("worst class: c3")
    assert {image.label for image in worst.flipped} == {3}
    assert (worst.lost, whole.lost, good.lost) == (30, 30, 0)


def test_an_empty_slice_has_lost_nothing_and_is_not_green(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    run = build_run(make_outcome, make_run, np.zeros(N, np.bool_))

    (row,) = gates_of(run, build_baseline(run), max_drop=0.01, slice=SliceName("camera", "none"))

    assert row.outcome == "inconclusive"


def test_a_class_that_held_nothing_before_is_not_green(run: Run) -> None:
    rule = {"max_drop": 0.05, "detectable": 0.5}

    (alone,) = gates_of(run, build_baseline(run), label="c3", **rule)
    (worst,) = gates_of(run, build_baseline(run), label="*", **rule)
    (other,) = gates_of(run, build_baseline(run), label="c4", **rule)

    assert [row.outcome for row in (alone, worst, other)] == [
        "inconclusive",
        "inconclusive",
        "passed",
    ]
    assert worst.on.endswith("worst class: c3")
    assert worst.reason.endswith("Of 10 classes 1 inconclusive, 9 passed.")


def test_another_sample_is_not_compared_slice_by_slice(
    make_outcome: MakeOutcome, make_run: MakeRun, run: Run
) -> None:
    other = make_run(make_outcome(np.zeros(N + 10, np.bool_)))
    other = replace(other, data={**other.data, "sha256": "0" * 64})

    (row,) = gates_of(run, build_baseline(other), max_drop=0.01, label="c1")

    assert row.outcome == "failed"
    assert "cannot be compared" in row.reason


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('class = "cat"\nslice = "camera"', "class and slice choose"),
        ("class = 3", "class must be a text"),
        ('slice = "=night"', "slice must be a column"),
    ],
)
def test_what_chooses_no_images_is_refused(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "robusteval.toml"
    path.write_text(f"[[gate]]\nfloor = 0.1\n{text}\n")

    with pytest.raises(UsageError, match=said):
        read_settings(path)


def test_slices_are_read(tmp_path: Path) -> None:
    path = tmp_path / "robusteval.toml"
    lines = ('slice = "camera"', 'slice = "camera=night"', 'slice = "camera="', 'class = "*"')
    path.write_text("".join(f"[[gate]]\nfloor = 0.1\n{line}\n" for line in lines))

    read = read_settings(path).rules

    assert [rule.slice for rule in read] == [
        SliceName("camera", None),
        SliceName("camera", "night"),
        SliceName("camera", "(empty)"),
        None,
    ]
    assert read[3].label == "*"
