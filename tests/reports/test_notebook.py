"""What a run shows in a notebook, and the notebook that shows it."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robusteval.errors import UsageError
from robusteval.runs.showing import View
from robusteval.runs.types import Outcome, Run, Spec, Threat

MakeOutcome = Callable[..., Outcome]
MakeRun = Callable[..., Run]
EXAMPLE = Path(__file__).parents[2] / "reports" / "example.ipynb"


def run_cell(source: str, names: dict[str, Any]) -> Any:
    """What a cell shows: the value of the expression that it ends with."""
    *body, last = ast.parse(source).body
    if not isinstance(last, ast.Expr):
        body.append(last)
    exec(compile(ast.Module(body, []), "cell", "exec"), names)
    if not isinstance(last, ast.Expr):
        return None
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names)


def test_the_example_runs_cell_by_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And each cell that ends with something of the run shows it."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    notebook = json.loads(EXAMPLE.read_text(encoding="utf-8"))

    shown = [
        run_cell("".join(cell["source"]), names)
        for cell in notebook["cells"]
        if cell["cell_type"] == "code"
    ]

    run, table, rates, figure, images, picture, _ = shown[1:]
    assert "Robust accuracy" in run._repr_html_()
    assert "<table>" in table._repr_html_()
    assert [low <= rate <= high for _, rate, low, high in rates] == [True] * 2
    assert "<svg" in figure[0]
    assert images._repr_html_().count("data:image/png") == 9
    assert picture[1] == pytest.approx(4, abs=0.01)
    assert (tmp_path / "report.html").exists()
    assert all(not cell.get("outputs") for cell in notebook["cells"])


@pytest.fixture
def plain(make_outcome: MakeOutcome, make_run: MakeRun) -> Run:
    """A run of one attack, in no folder."""
    return make_run(make_outcome(np.arange(500) < 300), folder=None)


@pytest.mark.parametrize(
    ("show", "said"),
    [
        (lambda run: run.figure("curve"), "No curve"),
        (lambda run: run.figure("roc"), "No ROC"),
        (lambda run: run.images("pgd"), "No pictures"),
    ],
)
def test_what_is_not_there_is_a_sentence(
    plain: Run, show: Callable[[Run], View], said: str
) -> None:
    view = show(plain)

    assert not view
    assert said in repr(view)
    assert said in view._repr_html_()


def test_names_that_are_none_are_told_those_that_are(plain: Run) -> None:
    with pytest.raises(UsageError, match="there are curve, roc"):
        plain.figure("bars")
    with pytest.raises(UsageError, match="there are pgd:eps="):
        plain.images("fgsm")


def test_a_table_is_rows_in_full_precision_and_text(plain: Run) -> None:
    table = plain.table()

    kinds = [row["kind"] for row in table]
    assert kinds == ["clean", "attack", "worst case", *["class"] * 10]
    assert table[1]["accuracy"] == plain.attacks[0].attacked.mean() - 300 / 500
    assert table[:1] == (table[0],)
    assert "robust" in repr(table)
    assert "\x1b" not in repr(table)


def test_doubt_stands_beside_the_table(make_outcome: MakeOutcome, make_run: MakeRun) -> None:
    run = make_run(make_outcome(np.arange(500) < 300), status="incomplete", folder=None)

    assert "upper bounds only" in run.table()._repr_html_()
    assert "upper bounds only" in repr(run.table())


def test_corruptions_are_no_attacks_of_the_line_for_people(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    """A network that a corruption brings down is not said to be brought down by attackers."""
    fog = make_outcome(
        np.ones(500, bool),
        spec=Spec("corruption", {"kind": "fog"}),
        threat=Threat("corruption", 3, False),
    )

    assert "after 1 attack" in repr(make_run(fog, make_outcome(np.arange(500) < 300)))
