"""CSV: every number as the record has it, and no formula."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from reportable import as_dict, record_of

from robusteval.reports.spreadsheet import COLUMNS, DISTANCES, to_csv
from robusteval.runs.formulas import defuse_formula
from robusteval.runs.types import Defended, Outcome, Run, Spec, Threat

MakeOutcome = Callable[..., Outcome]
MakeRun = Callable[..., Run]


def read(text: str) -> list[dict[str, Any]]:
    """The rows as a spreadsheet reads them: what is quoted is text, the rest numbers."""
    return list(csv.DictReader(io.StringIO(text, newline=""), quoting=csv.QUOTE_NONNUMERIC))


@pytest.fixture
def run(make_outcome: MakeOutcome, make_run: MakeRun) -> Run:
    """Two attacks on 300 images, one of them also behind a defense."""
    n = np.arange(300)
    jpeg = Spec("jpeg", {"quality": 75})
    first = make_outcome(n < 101, right=n < 263)
    second = make_outcome(
        n > 130, right=n < 263, spec=Spec("art:Square", {"eps": 8 / 255}), knowledge="black-box"
    )
    run = make_run(first, second)
    clean = {**run.clean, "pred_clean": np.where(n < 7, -1, run.clean["pred_clean"])}
    behind = Outcome(
        attack=first.attack,
        threat=first.threat,
        knowledge=first.knowledge,
        columns={**first.columns, "pred_png": np.full(300, -2)},
        defense=jpeg,
        adaptive=False,
    )
    defended = Defended(jpeg, "model", clean, {"forwards": 1.0})
    return make_run(first, second, behind, defenses=(defended,))


def split_rows(run: Run) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of whole runs, and those of classes."""
    rows = read(to_csv([record_of(run)]))
    return [row for row in rows if not row["group"]], [row for row in rows if row["group"]]


def test_there_is_a_row_for_each_number(run: Run) -> None:
    rows, groups = split_rows(run)

    assert [(row["kind"], row["slice"], row["group"]) for row in groups] == [
        ("class", "", f"class {i}") for i in (*range(10), *range(10))
    ]
    assert [row["defense"] for row in groups[9:11]] == ["", "jpeg:quality=75"]
    assert groups[0]["p_holm"] == as_dict(run)["groups"][0]["rows"][0]["p_holm"]
    assert [(row["kind"], row["defense"], row["attack"]) for row in rows] == [
        ("clean", "", ""),
        ("clean", "jpeg:quality=75", ""),
        ("attack", "", "pgd:eps=8/255,steps=20"),
        ("attack", "", "art:Square:eps=8/255"),
        ("attack", "jpeg:quality=75", "pgd:eps=8/255,steps=20"),
        ("worst case", "", "pgd:eps=8/255,steps=20; art:Square:eps=8/255"),
        ("worst case", "jpeg:quality=75", "pgd:eps=8/255,steps=20"),
    ]
    assert {row["run"] for row in rows} == {"one"}
    assert [row["adaptive"] for row in rows] == ["", "", "true", "true", "false", "true", "false"]


def test_numbers_have_all_their_digits(run: Run) -> None:
    record = as_dict(run)

    rows, _ = split_rows(run)

    for source, row in zip([*record["attacks"], *record["worst_cases"]], rows[2:], strict=True):
        for way, suffix in (("float", ""), ("eight_bit", "_8bit"), ("png", "_png")):
            rate = source["robust_accuracy"][way]
            expected = (
                ["", "", "", ""]
                if rate is None
                else [rate[name] for name in ("k", "value", "low", "high")]
            )
            found = [row[f"accuracy{suffix}{part}"] for part in ("_k", "", "_low", "_high")]
            assert found == expected
        fooled = source["success_rate"]["float"]
        assert [row["attacked"], row["success_k"], row["success"]] == [
            fooled["n"],
            fooled["k"],
            fooled["value"],
        ]
        assert row["n"] == source["robust_accuracy"]["float"]["n"]
        assert row["eps"] == source["threat"]["eps"] == 8 / 255
        assert row["median_distance"] == source["distance"]["median"]
        assert row["mean_distance"] == source["distance"]["mean"]
        assert [row[name] for name in DISTANCES] == [source["distances"][n] for n in DISTANCES]
        assert [row[name] for name in source["cost"]] == list(source["cost"].values())
        assert row["unique_breaks"] == source.get("unique_breaks", "")
    for source, row in zip((record, record["defenses"][0]), rows, strict=False):
        clean = source["clean_accuracy"]
        assert [row["n"], row["accuracy_k"], row["accuracy"]] == [
            clean["n"],
            clean["k"],
            clean["value"],
        ]
        assert (row["accuracy_low"], row["accuracy_high"]) == (clean["low"], clean["high"])


def test_what_does_not_exist_is_empty(make_outcome: MakeOutcome, make_run: MakeRun) -> None:
    outcome = make_outcome([False], threat=Threat("l2", None, True))

    row = read(to_csv([record_of(make_run(outcome))]))[1]

    assert (row["eps"], row["median_distance"], row["l2"], row["targeted"]) == ("", "", "", "true")


def test_every_line_has_every_column(run: Run) -> None:
    lines = list(csv.reader(io.StringIO(to_csv([record_of(run)] * 2), newline="")))

    assert lines[0] == list(COLUMNS)
    assert {len(line) for line in lines} == {len(COLUMNS)}
    assert [line[0] for line in lines[1:]] == ["one"] * 27 + ["one (2)"] * 27


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", " =", "＝"])
def test_text_that_looks_like_a_formula_gets_an_apostrophe(start: str) -> None:
    assert defuse_formula(f"{start}cmd()") == f"'{start}cmd()"


def test_numbers_and_other_text_get_none(make_outcome: MakeOutcome, make_run: MakeRun) -> None:
    outcome = make_outcome([True, True], psnr=np.array([-3.0, -4.0]))

    text = to_csv([record_of(make_run(outcome))])

    assert ",-3.5," in text
    assert "'" not in text
