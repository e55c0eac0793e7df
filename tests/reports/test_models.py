"""Several runs as one table: rates, paired differences, and when there are none."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from robusteval.reports.build import build_record
from robusteval.reports.compare import compare
from robusteval.reports.html import to_html
from robusteval.reports.markdown import render_markdown
from robusteval.reports.models import (
    build_models,
    build_models_table,
    name_models,
    write_differences,
)
from robusteval.reports.record import render_json
from robusteval.reports.terminal import render_table
from robusteval.runs.types import Outcome, Run

Make = Callable[..., Run]


def break_first(count: int, n: int = 200) -> np.ndarray:
    """A mask ``(n,)`` of which the first few are true."""
    return np.arange(n) < count


@pytest.fixture
def runs(make_run: Make, make_outcome: Callable[..., Outcome]) -> list[Run]:
    """Three runs over the same images, of which 40, 100 and 40 break."""
    made = []
    for name, count in (("a", 40), ("b", 100), ("c", 40)):
        run = make_run(make_outcome(break_first(count)))
        made.append(replace(run, model={**run.model, "file": f"{name}.pt"}, folder=f"runs/{name}"))
    return made


def test_differences_are_those_of_a_comparison_of_two(runs: list[Run]) -> None:
    """The same interval and test as `robusteval compare` gives, over one table."""
    record = build_models(runs)

    pair = compare(runs[0], runs[1]).pairs[1]
    clean, attack = record.rows
    assert (clean.kind, attack.kind) == ("clean", "attack")
    cell = attack.cells[1].paired
    assert cell is not None
    assert cell.difference == pair.difference == -0.3
    assert (cell.low, cell.high) == pytest.approx(tuple(pair.difference_interval))
    assert cell.p_holm == pytest.approx(4 * pair.p)  # the smallest of four tests
    assert attack.cells[0].paired is None
    same = attack.cells[2].paired
    assert same is not None
    assert (same.difference, same.p_holm) == (0.0, 1.0)


def test_runs_over_other_images_are_not_paired(
    runs: list[Run], make_run: Make, make_outcome: Callable[..., Outcome]
) -> None:
    """Their rates stand there, and why nothing is subtracted."""
    other = make_run(make_outcome(break_first(10, n=100)))
    record = build_models([runs[0], replace(other, model={**other.model, "file": "d.pt"})])

    assert all(row.cells[1].paired is None for row in record.rows)
    rate = record.rows[1].cells[1].accuracy
    assert rate is not None
    assert (rate.k, rate.n) == (90, 100)
    (reason,) = record.unpaired
    assert reason.startswith("d.pt is not compared with a.pt: the runs looked at different images")
    assert reason in build_models_table(record).note


def test_what_only_one_run_asked_has_a_row_with_gaps(
    runs: list[Run], make_outcome: Callable[..., Outcome]
) -> None:
    """Nothing is made up for the others."""
    one, two = runs[:2]
    weaker = make_outcome(break_first(5), spec=one.attacks[0].attack._replace(name="fgsm"))
    record = build_models([one, replace(two, outcomes=(*two.outcomes, weaker))])

    rows = {row.question: row for row in record.rows}
    assert [row.kind for row in record.rows] == ["clean", "attack", "attack", "worst case"]
    assert rows["fgsm:eps=8/255,steps=20"].cells[0].accuracy is None
    assert rows["fgsm:eps=8/255,steps=20"].cells[1].paired is None


def test_models_of_one_file_are_named_by_their_runs(runs: list[Run]) -> None:
    """No two columns have one name."""
    same = [replace(run, model=runs[0].model) for run in runs]

    assert name_models(runs) == ["a.pt", "b.pt", "c.pt"]
    assert name_models(same) == ["a.pt (a)", "a.pt (b)", "a.pt (c)"]
    assert name_models([same[0], same[0]]) == ["a.pt (a)", "a.pt (a) #2"]


def test_models_of_one_file_in_two_types_are_named_by_these(runs: list[Run]) -> None:
    half = replace(runs[0], model={**runs[0].model, "dtype": "bfloat16"})
    again = replace(runs[1], model=runs[0].model)

    assert name_models([half, runs[0]]) == ["a.pt in bfloat16", "a.pt in float32"]
    assert name_models([half, runs[0], again]) == ["a.pt in bfloat16", "a.pt (a)", "a.pt (b)"]


def test_long_names_are_shortened_where_they_stay_apart(runs: list[Run]) -> None:
    """As that of the demo network, which holds a hash."""

    def name(*files: str) -> list[str]:
        return name_models([replace(runs[0], model={"file": file}) for file in files])

    assert name("digits_cnn-3ebd6d6e5b5b8425.safetensors", "b.pth") == [
        "digits_cnn-3ebd6d…5b8425",
        "b.pth",
    ]
    assert name("a-network-of-last-week.safetensors") == ["a-network-of-last-week"]
    long = [f"digits_cnn-3ebd6d-{i}-6e5b5b8425.safetensors" for i in range(2)]
    assert name(*long) == long


def test_what_differs_beyond_chance_is_said_in_words(runs: list[Run]) -> None:
    """By the corrected test, with the widest difference; of others that nothing can be told."""
    worse, same = build_models_table(build_models(runs)).lead
    assert worse.startswith("Beside a.pt, b.pt keeps fewer images right in 1 of 2 rows (")
    assert "-30.0 points" in worse
    assert same.startswith("Beside a.pt, c.pt keeps as many images right in each of 2 rows")

    (better, _) = build_models_table(build_models([runs[1], runs[0], runs[1]])).lead
    assert "more images right in 1 of 2 rows" in better
    assert "+30.0 points" in better


def test_of_a_single_row_none_is_counted(runs: list[Run]) -> None:
    table = build_models(runs[::2])

    (same,) = write_differences(replace(table, rows=table.rows[:1]))

    assert same.endswith("keeps as many images right, as far as can be told.")


def test_models_without_a_pair_are_not_spoken_of(
    runs: list[Run], make_run: Make, make_outcome: Callable[..., Outcome]
) -> None:
    """Over other images there is no difference to tell."""
    other = make_run(make_outcome(break_first(10, n=100)))
    other = replace(other, model={**other.model, "file": "d.pt"})

    assert build_models_table(build_models([runs[0], other])).lead == []


def test_every_form_begins_with_the_table(runs: list[Run]) -> None:
    """One run has none."""
    records = [build_record(replace(run, folder=None)) for run in runs]
    title = "Models against attacks"

    for render in (render_table, render_markdown, to_html):
        page = re.sub("</?span[^>]*>", "", str(render(records)))  # intervals that stay on a line
        assert title in page
        assert page.index(title) < page.index("An attacker")
        assert "-30.0 (" in page
        assert "b.pt keeps fewer" in " ".join(page.split())
        assert title not in str(render(records[:1]))
    whole = json.loads(render_json(records))
    assert whole["models"]["models"] == ["a.pt", "b.pt", "c.pt"]
    assert whole["models"]["rows"][1]["cells"][1]["paired"]["difference"] == -0.3
