"""One network over time: what was held, what has no point and why, and what changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robusteval.errors import RunError, UsageError
from robusteval.reports import trend
from robusteval.reports.baseline import build_baseline
from robusteval.reports.baseline_file import render_baseline
from robusteval.reports.rendering import render_runs
from robusteval.reports.trend import Moment, build_trend, build_trend_table, read_history
from robusteval.reports.trend_record import TrendRecord
from robusteval.runs import statistics
from robusteval.runs.types import Outcome, Run, Spec

MakeOutcome = Callable[..., Outcome]
MakeRun = Callable[..., Run]
N = 200


@pytest.fixture
def make(make_outcome: MakeOutcome, make_run: MakeRun) -> Callable[..., Run]:
    """A run made in a month, with so many images broken."""

    def build(month: int, broken: int, **changed: Any) -> Run:
        rows = np.arange(changed.pop("n", N))
        outcome = make_outcome(rows < broken, **changed)
        return make_run(outcome, created=f"2026-{month:02d}-01T00:00:00+00:00")

    return build


def follow(run: Run, *before: Run) -> TrendRecord:
    """The trend of a run after others."""
    moments = [Moment(f"b{i}", build_baseline(each)) for i, each in enumerate(before)]
    made = build_trend(run, moments)
    assert made is not None
    return made


def test_points_stand_in_the_order_of_time(make: Callable[..., Run]) -> None:
    _, line = follow(make(3, 120), make(2, 80), make(1, 40)).lines

    assert [point.name for point in line.points] == ["b1", "b0", "this run"]
    assert [point.accuracy.k for point in line.points if point.accuracy] == [160, 120, 80]


def test_the_change_is_tested_on_pairs(make: Callable[..., Run]) -> None:
    clean, line = follow(make(2, 60), make(1, 40)).lines

    assert line.change is not None
    assert clean.change is not None
    assert line.change.difference == pytest.approx(-0.1)
    # 20 images lost and none gained: 2 / 2^20, of two lines
    assert line.change.p_holm == pytest.approx(2 * 2 / 2**20)
    low, high = statistics.Pairs(20, 0, N).interval
    assert (line.change.low, line.change.high) == pytest.approx((-high, -low))
    assert clean.change.difference == 0


def test_what_was_asked_otherwise_has_no_point(make: Callable[..., Run]) -> None:
    other = make(1, 40, spec=Spec("pgd", {"eps": 8 / 255, "steps": 7}))
    trend = follow(make(2, 60), other)

    assert trend.lines[1].points[0].accuracy is None
    assert trend.lines[1].change is None
    assert trend.notes == ("b0 has not the same attacks for linf eps 8/255 (0.0314).",)


def test_other_images_are_not_paired(make: Callable[..., Run]) -> None:
    trend = follow(make(2, 60), make(1, 40, n=N + 10))

    assert trend.lines[1].points[0].accuracy is not None
    assert [line.change for line in trend.lines] == [None, None]
    assert trend.notes == ("b0 is of other images: its points stand, and are not paired.",)


@pytest.mark.parametrize("form", ["table", "markdown", "html", "json"])
def test_every_form_has_the_trend(form: str, make: Callable[..., Run]) -> None:
    run = make(2, 60)
    text = str(render_runs([run], form, [None], page=True, trend=follow(run, make(1, 40))))

    assert "b0" in text
    assert ("fell by 10 points" in " ".join(text.split())) == (form != "json")


def test_a_history_is_read_from_files_and_folders(make: Callable[..., Run], tmp_path: Path) -> None:
    for month in (1, 2):
        text = render_baseline(build_baseline(make(month, 40)))
        (tmp_path / f"{month}.json").write_text(text)

    assert [moment.name for moment in read_history([tmp_path])] == ["1.json", "2.json"]
    assert [moment.name for moment in read_history([tmp_path / "2.json"])] == ["2.json"]


def test_a_folder_of_nothing_and_a_damaged_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.json").write_text("{}")

    with pytest.raises(UsageError, match="neither baselines nor other runs"):
        read_history([tmp_path / "empty"])
    with pytest.raises(UsageError, match="is not a baseline"):
        read_history([tmp_path / "a.json"])


def test_a_folder_of_runs_may_hold_the_run_itself(
    make: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is no moment before itself; a run that cannot be used is named."""
    runs = {"old": make(1, 40), "here": make(2, 60), "part": replace(make(3, 60), status="running")}
    monkeypatch.setattr(trend, "load_run", lambda place: runs[place.name])
    for name in ("old", "here"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text("{}")

    (moment,) = read_history([tmp_path], tmp_path / "here")
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "run.json").write_text("{}")

    assert moment.name == "old"
    with pytest.raises(RunError, match=r"part: the run is not complete"):
        read_history([tmp_path], tmp_path / "here")


def test_without_a_history_there_is_no_trend(make: Callable[..., Run]) -> None:
    assert build_trend(make(1, 3), []) is None


def test_strange_names_of_files_stay_text(make: Callable[..., Run]) -> None:
    run = make(2, 60)
    moment = Moment("<script>$x|`.json", build_baseline(make(1, 40)))
    trend = build_trend(run, [moment])

    assert trend is not None
    for form in ("html", "markdown"):
        assert "<script>" not in str(render_runs([run], form, [None], page=True, trend=trend))


def test_the_table_has_a_row_for_each_moment(make: Callable[..., Run]) -> None:
    run = replace(make(2, 60), folder=None)
    table = build_trend_table(follow(run, make(1, 40)))

    assert [name for name, _ in table.rows] == ["2026-01-01 b0", "2026-02-01 this run"]
    assert table.columns == ["weights", "clean accuracy", "linf eps 8/255 (0.0314)"]
