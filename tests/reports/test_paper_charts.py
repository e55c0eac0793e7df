"""Images fooled over likeness: points by hand, and what a reader gets of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from robusteval.analysis.papers.comparison import Reproduction, compare_paper
from robusteval.analysis.papers.declaration import build_paper
from robusteval.analysis.papers.results import Results
from robusteval.reports.figures import Measured
from robusteval.reports.paper import render_paper_html
from robusteval.reports.paper_charts import draw_curves, list_curves
from robusteval.runs.statistics import wilson
from robusteval.runs.types import Outcome, Run, Spec

MakeOutcome = Callable[..., Outcome]
MakeRun = Callable[..., Run]


@pytest.fixture
def reproduce(make_outcome: MakeOutcome, make_run: MakeRun) -> Callable[..., Reproduction]:
    """Two sweeps on ten images, one of them of a single setting; the table has these columns."""
    settings = {"a": [(8, 0.7, 20.0), (2, 0.95, 30.0)], "b": [(5, 0.999, 50.0)]}
    specs = {
        "a": [Spec("pgd", {"eps": 2.0}), Spec("pgd", {"eps": 1.0})],
        "b": [Spec("pgd", {"eps": 3.0})],
    }
    outcomes = [
        replace(
            make_outcome(
                (np.arange(10) < fooled).tolist(),
                spec=spec,
                ssim=np.full(10, likeness),
                psnr=np.full(10, decibels),
            ),
            resolved=spec.parameters,
        )
        for name, each in settings.items()
        for spec, (fooled, likeness, decibels) in zip(specs[name], each, strict=True)
    ]

    def build(*columns: str) -> Reproduction:
        sweep = {"name": "Figure 1", "title": "All", "sweep": True, "columns": list(columns)}
        level = {"name": "SSIM .9", "at": {"ssim": 0.9}}
        declared: dict[str, Any] = {
            "title": "On nothing",
            "source": "nowhere",
            "setting": "none",
            "small": {"samples": 4},
            "paper": {"samples": 100},
            "attacks": {name: [str(spec) for spec in each] for name, each in specs.items()},
            "tables": [
                {
                    "name": "Table I",
                    "title": "Fooled",
                    "measure": "fooled",
                    "columns": ["a"],
                    "rows": [level],
                },
                {
                    **sweep,
                    "rows": [
                        {"name": "A <b>", "attack": "a"},
                        {"name": "B", "attack": "b"},
                    ],
                },
            ],
        }
        paper = build_paper("mine", declared)
        return compare_paper(paper, "small", Results(make_run(*outcomes), paper.attacks, {}))

    return build


def test_a_line_has_a_point_for_each_setting(reproduce: Callable[..., Reproduction]) -> None:
    """From the least alike on, with the interval of the images fooled."""
    found = reproduce("fooled", "ssim")

    (first, second) = list_curves(found.tables[1], "ssim")

    assert (first.name, second.name) == ("A <b>", "B")
    assert first.points == [
        pytest.approx(Measured(0.7, 0.8, *wilson(8, 10))),
        pytest.approx(Measured(0.95, 0.2, *wilson(2, 10))),
    ]
    assert second.points == [pytest.approx(Measured(0.999, 0.5, *wilson(5, 10)))]


def test_both_charts_say_what_they_show(reproduce: Callable[..., Reproduction]) -> None:
    """Over SSIM with the level that a table compares at; over PSNR without any."""
    found = reproduce("fooled", "ssim", "psnr")

    likeness, decibels = (drawn for table in found.tables for drawn in draw_curves(found, table))

    assert likeness.chart.alt == (
        "Images fooled over mean SSIM, the ends of each sweep. A <b>: 20 % at 0.95, 80 % at 0.7;"
        " B: 50 % at 0.999. Marked: 0.9. All points stand in the table."
    )
    assert (likeness.tables, decibels.tables) == (["Table I"], [])
    assert "Marked" not in decibels.chart.alt
    assert "50 % at 50" in decibels.chart.alt
    # three points and two samples in the legend
    assert len(re.findall("<use ", likeness.chart.svg)) >= 5
    assert likeness.chart.dark != likeness.chart.svg


@pytest.mark.parametrize("columns", [("fooled",), ("ssim", "psnr"), ("fooled", "l2")])
def test_without_shares_and_likeness_nothing_is_drawn(
    reproduce: Callable[..., Reproduction], columns: tuple[str, ...]
) -> None:
    found = reproduce(*columns)

    assert not [drawn for table in found.tables for drawn in draw_curves(found, table)]
    assert "<figure>" not in render_paper_html(found)


def test_images_as_they_were_have_a_place(reproduce: Callable[..., Reproduction]) -> None:
    """An SSIM of 1, which a logarithm has none for."""
    found = reproduce("fooled", "ssim")
    rows = tuple(
        replace(row, measured=row.measured._replace(value=1.0))
        if row.measured and row.column == "mean SSIM"
        else row
        for row in found.tables[1].rows
    )

    (drawn,) = draw_curves(found, replace(found.tables[1], rows=rows))

    assert "at 1" in drawn.chart.alt
    assert "nan" not in drawn.chart.svg
    assert "inf" not in drawn.chart.svg


def test_the_report_has_them_in_light_and_dark(reproduce: Callable[..., Reproduction]) -> None:
    page = render_paper_html(reproduce("fooled", "ssim", "psnr"))

    assert page.count("<picture>") == page.count('media="(prefers-color-scheme:dark)"') == 2
    assert page.count("Dotted: the levels of Table I.") == 1
    assert "<b>" not in page


def test_an_interval_stands_below_its_figure(reproduce: Callable[..., Reproduction]) -> None:
    """On a line of the cell, where a line break in other people's text is spelled out."""
    page = render_paper_html(reproduce("fooled", "ssim", "psnr"))

    assert r"\n" not in page
    assert re.search(r"<td>[\d.]+<br>[\d.]+–[\d.]+</td>", page)
