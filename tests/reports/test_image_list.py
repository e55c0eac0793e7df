"""Single images: every one in CSV, those worth looking at on the page."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from reportable import PGD, defended, html_of, record_of

from robusteval.reports.image_list import KINDS, build_image_list, render_images
from robusteval.runs.slices import decode_slices, encode_slices
from robusteval.runs.types import Outcome, Run, Spec, Threat

MakeOutcome = Callable[..., Outcome]
MakeRun = Callable[..., Run]
L2 = Threat("l2", None, False)


def read(text: str) -> list[dict[str, Any]]:
    """The rows of a CSV text."""
    return list(csv.DictReader(io.StringIO(text, newline=""), quoting=csv.QUOTE_NONNUMERIC))


@pytest.fixture
def run(make_outcome: MakeOutcome, make_run: MakeRun) -> Run:
    """Four images: fooled by both attacks, by one, by none, and one that was wrong."""
    right = [True, True, True, False]
    first = make_outcome([True, False, False, False], right=right, linf=np.full(4, 0.01))
    second = make_outcome(
        [True, True, False, False],
        right=right,
        spec=Spec("fmn", {"norm": "l2"}),
        threat=L2,
        l2=np.array([0.5, 0.25, 0.0, 0.0]),
    )
    run = make_run(first, second)
    config = {**run.config, "slices": encode_slices({"=light": list("abba")}, np.arange(4))}
    names = {**run.data, "class_names": ["ape", "bee", "cat", "dog"]}
    return replace(run, config=config, clean={**run.clean, **decode_slices(config)}, data=names)


def test_the_table_has_a_row_for_each_image(run: Run) -> None:
    rows = read(render_images([record_of(run)]))

    assert [row["index"] for row in rows] == run.clean["index"].tolist()
    assert [row["class"] for row in rows] == ["ape", "bee", "cat", "dog"]
    assert [row["slice =light"] for row in rows] == list("abba")
    assert [row[f"{PGD}: fooled"] for row in rows] == ["true", "false", "false", ""]
    assert [row["fmn:norm=l2: distance"] for row in rows] == [0.5, 0.25, "", ""]
    assert [row["right"] for row in rows] == ["true"] * 3 + ["false"]


def test_distances_are_ordered_norm_by_norm(make_outcome: MakeOutcome, make_run: MakeRun) -> None:
    """What is nearest in l2 does not stand between those in linf."""
    size = np.array([0.03, 0.01, 0.02, 0.0])
    linf = make_outcome([True, True, False, False], linf=size)
    l2 = make_outcome([False, False, True, False], spec=Spec("fmn", {}), threat=L2, l2=size)
    listed = build_image_list(record_of(make_run(linf, l2)))

    assert listed is not None
    rows = dict(listed.orders)["distance"]
    assert [row.distance for row in rows][:3] == [
        (False, "l2", 0.02),
        (False, "linf", 0.01),
        (False, "linf", 0.03),
    ]
    assert rows[3].distance[0]


def test_several_runs_share_one_table(run: Run, make_run: MakeRun) -> None:
    rows = read(render_images([record_of(run), record_of(make_run(n=2))]))

    assert len(rows) == 6
    assert rows[5][f"{PGD}: fooled"] == ""
    assert render_images([record_of(replace(run, clean={}, outcomes=()))])


def test_the_list_tells_what_became_of_an_image(run: Run) -> None:
    found = build_image_list(record_of(run))

    assert found is not None
    shown = found.orders[0][1]
    assert [row.kind for row in shown] == [KINDS[0], KINDS[0], KINDS[1], KINDS[2]]
    assert [row.cells[5] for row in shown] == ["2 of 2", "1 of 2", "0 of 2", "–"]
    assert [row.cells[4] for row in shown] == ["0.01 linf", "0.25 l2", "–", "–"]
    assert shown[0].cells[6] == "a"
    assert found.note.startswith("2 of 2 fooled; 1 of 1 withstands; 1 of 1 wrong at first, ")


def test_a_page_stays_small_with_many_images(make_outcome: MakeOutcome, make_run: MakeRun) -> None:
    n = 10_000
    record = record_of(make_run(make_outcome(np.arange(n) % 3 == 0, right=np.arange(n) % 7 > 0)))
    found = build_image_list(record)

    assert found is not None
    assert [len(rows) for _, rows in found.orders] == [100] * 4
    assert sorted(row.position for row in found.orders[0][1]) == [
        row.position for row in found.orders[3][1]
    ]


def test_the_page_has_every_order_once(run: Run) -> None:
    page = html_of([run, run])

    for number in (1, 2):
        assert page.count(f'name="run-{number}-order"') == 4
        assert page.count(f'id="run-{number}-kind-3"') == 1
    assert "<script" not in page


def test_there_is_no_list_without_attacks_on_the_model_itself(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    run = defended(make_outcome, make_run, n=20)
    behind = replace(run, outcomes=tuple(o for o in run.outcomes if o.defense))

    assert build_image_list(record_of(behind)) is None
    assert "oblivious" in render_images([record_of(behind)])
