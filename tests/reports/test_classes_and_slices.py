"""What is left of classes and slices, which of them is the worst, and what classes become."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from reportable import (
    LINF,
    corrupted,
    defended,
    html_of,
    json_of,
    markdown_of,
    print_run,
    record_of,
)
from rich.console import Console

from robusteval.reports.group_tables import build_group_tables, build_turned_tables, write_worst
from robusteval.reports.groups import find_worst, list_splits
from robusteval.reports.rendering import render_runs
from robusteval.reports.sentences import write_meaning
from robusteval.runs.slices import SLICE, encode_slices
from robusteval.runs.statistics import fewer_test, holm
from robusteval.runs.types import Outcome, Run, Spec, Threat

MakeOutcome = Callable[..., Outcome]
MakeRun = Callable[..., Run]


def test_a_group_without_any_of_the_held_has_the_chance_of_that_draw() -> None:
    """Three of ten hold; that none of two drawn does has the chance 7/10 · 6/9."""
    assert fewer_test(0, 2, 3, 8 - 0) == pytest.approx(7 / 10 * 6 / 9)


@pytest.mark.parametrize(
    ("k", "n", "rest_k", "rest_n"), [(3, 50, 400, 950), (0, 1, 0, 9), (5, 5, 2, 9), (30, 90, 9, 40)]
)
def test_the_test_of_a_group_is_fishers(k: int, n: int, rest_k: int, rest_n: int) -> None:
    stats: Any = pytest.importorskip("scipy.stats")
    table = [[k, n - k], [rest_k, rest_n - rest_k]]

    assert fewer_test(k, n, rest_k, rest_n) == pytest.approx(
        stats.fisher_exact(table, alternative="less").pvalue, rel=1e-9
    )


@pytest.mark.parametrize(("k", "n", "rest_k", "rest_n"), [(0, 0, 3, 9), (3, 9, 0, 0), (9, 9, 9, 9)])
def test_nothing_to_compare_is_no_evidence(k: int, n: int, rest_k: int, rest_n: int) -> None:
    assert fewer_test(k, n, rest_k, rest_n) == pytest.approx(1)


@pytest.fixture
def weak(make_outcome: MakeOutcome, make_run: MakeRun) -> Run:
    """Ten classes of 50 images, of which every second holds; of class 3 none does."""
    rows = np.arange(500)
    broken = (rows // 10 % 2 == 0) | (rows % 10 == 3)
    outcome = make_outcome(broken, threat=LINF, linf=np.full(500, 0.01))
    columns = {**outcome.columns, "pred_adv": np.where(broken, 5, outcome.columns["label"])}
    columns["pred_adv"][rows % 10 == 5] = np.where(broken[rows % 10 == 5], 8, 5)
    names = {"class_names": [f"c{i}" for i in range(10)]}
    run = make_run(replace(outcome, columns=columns))
    return replace(run, data={**run.data, **names})


def sliced(run: Run, **columns: list[str]) -> Run:
    """The same run, its images divided by columns of the user's own."""
    from robusteval.runs.slices import decode_slices

    config = {**run.config, "slices": encode_slices(columns, np.arange(len(run.clean["id"])))}
    return replace(run, config=config, clean={**run.clean, **decode_slices(config)})


def test_the_worst_class_is_named_and_tested(weak: Run) -> None:
    record = record_of(weak)
    (group,) = record.groups

    assert group.worst == 3
    assert group.rows[3].robust_accuracy.k == 0
    assert (group.rest.k, group.rest.n) == (225, 450) if group.rest else False
    p = [
        fewer_test(row.robust_accuracy.k, 50, 225 - row.robust_accuracy.k, 450)
        for row in group.rows
    ]
    assert group.rows[3].p_holm == holm(p)[3] == pytest.approx(10 * p[3])
    (line,) = write_worst(record, group)
    assert line.startswith("Worst class at linf eps 8/255 (0.0314): c3, 0 % (0–7) of 50 images;")
    assert "and not by chance: p < 0.0001, Holm over 10 classes." in line


def test_the_first_screen_names_a_class_that_falls_more_easily(weak: Run) -> None:
    said = [line for line in write_meaning(record_of(weak)) if line.startswith("Not all alike")]

    assert said == [
        "Not all alike: of the class c3 0 % hold, of the other images 50.0 %, at linf eps 8/255"
        " (0.0314); more below."
    ]


def test_chance_is_called_chance(make_outcome: MakeOutcome, make_run: MakeRun) -> None:
    broken = np.arange(40) % 10 == 3
    broken[[4, 15, 26]] = True
    broken[33] = False
    record = record_of(make_run(make_outcome(broken)))

    (line,) = write_worst(record, record.groups[0])

    assert line.startswith("Lowest class at linf eps 8/255 (0.0314): class 3, 25 %")
    assert "which chance explains" in line


def test_without_a_radius_distances_are_held_against_each_other(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    """All fall; those of class 0 within the median of all, of the others four in nine do."""
    rows = np.arange(100)
    far = np.where(rows % 10 == 0, 0.1, 0.2 + rows / 1000)
    outcome = make_outcome([True] * 100, threat=Threat("l2", None, False), l2=far)
    record = record_of(make_run(outcome))
    (group,) = record.groups

    assert group.worst == 0
    assert sum(row.beyond.k for row in group.rows if row.beyond) == 50
    assert group.rows[0].p_holm == pytest.approx(10 * fewer_test(0, 10, 50, 90))
    (line,) = write_worst(record, group)
    assert line.startswith(
        "Worst class at l2 minimum norm: class 0, median 0.1, with 0 % (0–28) of 10 images beyond"
        " the median of all; of the others 56 %, and not by chance: p = 0.00"
    )


@pytest.mark.parametrize("held", [True, False])
def test_where_all_are_alike_none_is_the_worst(
    held: bool, make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    record = record_of(make_run(make_outcome(np.full(40, not held))))

    said = list(write_worst(record, record.groups[0]))

    assert record.groups[0].worst is None
    assert said == (
        [] if held else ["No image of any of the 10 classes holds at linf eps 8/255 (0.0314)."]
    )


def test_classes_become_what_the_nearest_success_makes_of_them(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    """Of two attacks on one image the nearer counts, of each by itself its own."""
    threat = Threat("l2", 1.0, False)
    near, far = (
        make_outcome([True, True], spec=Spec(name, {}), threat=threat, l2=np.array(sizes))
        for name, sizes in (("pgd", [0.2, 0.9]), ("apgd", [0.5, 0.3]))
    )
    near = replace(near, columns={**near.columns, "pred_adv": np.array([7, 7])})
    far = replace(far, columns={**far.columns, "pred_adv": np.array([8, -1])})
    worst, first, second = record_of(make_run(near, far)).turned

    assert [(row.label, row.becomes) for row in worst.pairs] == [(0, 7), (1, -1)]
    assert worst.pairs[1].becomes_name == "not finite"
    assert [row.becomes for row in first.pairs] == [7, 7]
    assert [row.becomes for row in second.pairs] == [8, -1]
    assert (worst.attack, first.attack, second.attack) == (None, "pgd", "apgd")


def test_the_matrix_has_those_that_hold_on_its_diagonal(weak: Run) -> None:
    (table,) = build_turned_tables(record_of(weak))
    cells = dict(table.rows)

    assert table.header[1:] == [f"c{i}" for i in range(10)]
    assert (cells["c0"][0], cells["c0"][5]) == ("25", "25")
    assert (cells["c3"][3], cells["c3"][5]) == ("·", "50")
    assert sum(int(cell) for row in cells.values() for cell in row if cell != "·") == 500


def test_a_slice_is_told_like_a_class(weak: Run) -> None:
    by_row = ["rear" if i % 10 == 3 else "front" for i in range(500)]
    record = record_of(sliced(weak, camera=by_row))
    group = record.groups[1]

    assert [row.name for row in group.rows] == ["front", "rear"]
    assert group.worst == 1
    assert next(write_worst(record, group)).startswith("Worst value of camera at linf")
    assert json.loads(json_of(sliced(weak, camera=by_row)))["groups"][1]["by"] == "camera"


def test_images_that_are_there_twice_are_in_a_slice_once(weak: Run) -> None:
    run = sliced(weak, camera=["a", "b"] * 250)
    twice = replace(run, clean={**run.clean, "id": run.clean["id"] // np.uint64(2)}, outcomes=())

    by_class, by_camera = list_splits(twice.keep_different())

    assert len(by_class.codes) == len(by_camera.codes) == 250


@pytest.mark.parametrize(("camera", "said"), [("rear", "1 image stands"), ("front", "")])
def test_an_image_under_two_values_of_a_slice_is_said(weak: Run, camera: str, said: str) -> None:
    """It counts once, so that the second value has an image less."""
    run = sliced(weak, camera=["front", camera, *["side"] * 498])
    ids = run.clean["id"].copy()
    ids[1] = ids[0]
    (outcome,) = run.outcomes
    outcome = replace(outcome, columns={**outcome.columns, "id": ids})
    run = replace(run, clean={**run.clean, "id": ids}, outcomes=(outcome,))

    table = list(build_group_tables(record_of(run)))[-1]

    assert table.title == "Slices by camera"
    assert table.left.startswith(said)
    assert bool(table.left) == bool(said)


def test_of_rows_below_the_others_the_lowest_is_the_worst(weak: Run) -> None:
    """A single image that falls is lower, and shows nothing."""
    (group,) = record_of(weak).groups
    alone = replace(group.rows[0].robust_accuracy, k=0, n=1, value=0.0)
    row = replace(group.rows[0], name="alone", robust_accuracy=alone, p_holm=1.0)
    low = replace(group.rows[3].robust_accuracy, k=2, n=50, value=0.04)

    assert find_worst([row, *group.rows[:3], replace(group.rows[3], robust_accuracy=low)]) == 4


def test_of_a_thousand_classes_the_lowest_are_shown(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    rows = np.arange(2000)
    outcome = make_outcome(rows % 7 == 0)
    columns = {**outcome.columns, "label": rows % 1000, "pred_clean": rows % 1000}
    run = make_run(replace(outcome, columns=columns))
    clean = {**run.clean, "label": rows % 1000, "pred_clean": rows % 1000}
    run = replace(run, clean=clean, model={**run.model, "num_classes": 1000})
    page = Console(width=80, no_color=True, force_terminal=False)
    with page.capture() as text:
        print_run(run, page)

    assert "The 12 lowest of 1,000 classes; CSV and JSON have all." in text.get().replace("\n", " ")
    assert max(map(len, text.get().split("\n"))) <= 80
    assert len(record_of(run).groups[0].rows) == 1000
    assert len(html_of([run])) < 500_000


@pytest.mark.parametrize("form", ["table", "markdown", "html", "json", "csv"])
def test_every_form_has_classes_and_slices(form: str, weak: Run) -> None:
    text = str(render_runs([sliced(weak, camera=["a", "b"] * 250)], form, [None], page=True))

    assert "camera" in text
    assert "c3" in text


def test_strange_names_stay_text(make_outcome: MakeOutcome, make_run: MakeRun) -> None:
    evil = "<script>alert(1)</script>|`$x\x1b[31m{{ 7*7 }}"
    run = defended(make_outcome, make_run, n=60)
    run = sliced(
        replace(run, data={**run.data, "class_names": [evil] * 10}), **{evil: [evil, ""] * 30}
    )

    for text in (html_of([run]), markdown_of(run)):
        assert "<script>" not in text
        assert "\x1b" not in text


def test_nothing_is_said_of_classes_where_nothing_was_attacked(make_run: MakeRun) -> None:
    record = record_of(make_run(n=20))

    assert not list(build_group_tables(record))
    assert not list(build_turned_tables(record))


def test_corruptions_beside_attacks_have_no_table(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    fog = make_outcome(
        [True] * 20, spec=Spec("corruption", {}), threat=Threat("corruption", 3.0, False)
    )
    fog = replace(fog, resolved={"kind": "fog", "severity": 3})
    with_attack = record_of(make_run(make_outcome([True] * 20), fog))
    alone = record_of(make_run(fog))

    assert {group.threat.norm for group in with_attack.groups} == {"linf"}
    assert {group.threat.norm for group in alone.groups} == {"corruption"}


def test_several_corruptions_are_said_to_be_meant_together(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    """No image holds under both, though half of them hold under each."""
    fog = corrupted(make_outcome, "fog", 2, 10, 20)
    others = make_outcome(np.arange(20) >= 10)
    snow = replace(corrupted(make_outcome, "snow", 2, 0, 20), columns=others.columns)
    text = markdown_of(make_run(fog, snow, corrupted(make_outcome, "fog", 3, 20, 20)))

    assert "holds at corruption of severity 2, all 2 kinds together." in text
    assert "holds at corruption of severity 3." in text


def test_values_come_back_from_the_settings() -> None:
    from robusteval.runs.slices import decode_slices

    made: dict[str, Any] = {"slices": encode_slices({"camera": ["b", "a", "", "b"]}, [3, 2, 1])}

    assert made["slices"]["camera"]["values"] == ["", "a", "b"]
    assert decode_slices(made)[f"{SLICE}camera"].tolist() == [2, 0, 1]
    made["slices"]["camera"]["values"].pop()
    with pytest.raises(ValueError, match="does not name"):
        decode_slices(made)
