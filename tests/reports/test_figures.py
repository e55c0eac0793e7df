"""Charts: the same bytes for the same numbers, in the right places, whatever they are named."""

from __future__ import annotations

import re
import subprocess
import sys
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest

from robusteval.reports import figures
from robusteval.reports.figures import Chart, Measured, Series

SVG = "{http://www.w3.org/2000/svg}"
FALLING = Series(
    "undefended",
    [0.0, 2.0, 4.0, 8.0],
    [1.0, 0.75, 0.5, 0.25],
    [0.9, 0.65, 0.4, 0.2],
    [1.0, 0.85, 0.6, 0.3],
    [Measured(8.0, 0.25, 0.2, 0.3)],
)


def stairs(*series: Series) -> Chart:
    """A chart of these."""
    return figures.draw_steps(
        series or [FALLING], xlabel="budget", ylabel="accuracy, %", alt="words"
    )


def texts(chart: Chart) -> dict[str, float]:
    """What is written in a chart, and how far down."""
    found = {}
    for text in ElementTree.fromstring(chart.svg).iter(f"{SVG}text"):
        numbers = re.findall(r"-?[\d.]+", text.attrib.get("transform", "0 0"))
        found[(text.text or "").strip()] = float(
            text.attrib["y"] if "y" in text.attrib else numbers[1]
        )
    return found


def ticks(chart: Chart, axis: str) -> dict[str, float]:
    """Where the labelled values of the axis ``x`` or ``y`` are."""
    found = {}
    for group in ElementTree.fromstring(chart.svg).iter(f"{SVG}g"):
        if group.attrib.get("id", "").startswith(f"{axis}tick_"):
            (use,), (text,) = group.iter(f"{SVG}use"), group.iter(f"{SVG}text")
            found[text.text or ""] = float(use.attrib[axis])
    return found


def marked(chart: Chart) -> set[tuple[float, float]]:
    """Where points are marked."""
    root = ElementTree.fromstring(chart.svg)
    groups = [g for g in root.iter(f"{SVG}g") if "tick_" in g.attrib.get("id", "")]
    of_ticks = {use for group in groups for use in group.iter(f"{SVG}use")}
    return {
        (float(use.attrib["x"]), float(use.attrib["y"]))
        for use in root.iter(f"{SVG}use")
        if use not in of_ticks
    }


def test_the_same_numbers_give_the_same_bytes_without_a_date() -> None:
    first, second = stairs(), stairs()

    assert first == second
    assert "dc:date" not in first.svg


def test_settings_of_the_user_change_nothing_and_are_left_alone() -> None:
    expected = stairs()
    with mpl.rc_context({"font.size": 40, "axes.facecolor": "red", "svg.fonttype": "path"}):
        actual = stairs()

        assert mpl.rcParams["font.size"] == 40

    assert actual == expected


def test_the_dark_chart_is_the_light_one_in_other_colours() -> None:
    chart = stairs(FALLING, FALLING._replace(name="other"))
    blank = re.compile("#[0-9a-f]{6}")

    assert blank.sub("", chart.dark) == blank.sub("", chart.svg)
    assert not set(figures.DARK) & set(blank.findall(chart.dark))


def test_a_measured_point_lies_where_the_axes_say() -> None:
    chart = stairs(FALLING._replace(points=[Measured(4.0, 0.6, 0.5, 0.7)]))

    expected = (ticks(chart, "x")["4"], ticks(chart, "y")["60"])

    assert any(place == pytest.approx(expected, abs=0.02) for place in marked(chart))


def test_a_stair_falls_where_its_budget_is() -> None:
    chart = stairs(Series("one", [0.0, 2.0, 4.0], [1.0, 0.4, 0.2]))
    x, y = ticks(chart, "x"), ticks(chart, "y")

    (path,) = re.findall(
        rf'd="([^"]*)"[^>]*stroke: {figures.HUES[0]}; stroke-width: 1.6', chart.svg
    )
    corners = np.array(re.findall(r"[\d.]+", path), dtype=float).reshape(-1, 2)

    expected = [(0, 100), (2, 100), (2, 40), (4, 40), (4, 20)]
    places = [(x[f"{right}"], y[f"{up}"]) for right, up in expected]
    np.testing.assert_allclose(corners, places, atol=0.02)


def test_the_operating_point_lies_where_the_axes_say() -> None:
    line = Series("pgd", [0.0, 0.4, 1.0], [0.0, 0.6, 1.0], points=[Measured(0.4, 0.6, 0.5, 0.7)])
    chart = figures.draw_roc([line], alt="words")

    expected = (ticks(chart, "x")["40"], ticks(chart, "y")["60"])

    assert any(place == pytest.approx(expected, abs=0.02) for place in marked(chart))
    assert "chance" in texts(chart)


def test_lines_differ_by_more_than_colour() -> None:
    styles = [figures.choose_style(i)[1:] for i in range(35)]

    assert len({str(style) for style in styles}) == 35


@pytest.mark.parametrize("name", ["$x^2$ $", "<b>&amp;", "日本語", "_hidden", r"\frac"])
def test_names_are_text(name: str) -> None:
    series = FALLING._replace(name=name)

    assert name in texts(stairs(series))
    assert name in texts(figures.draw_roc([series], alt=""))


def test_small_values_on_an_axis_keep_their_digits() -> None:
    chart = stairs(Series("one", [0.0, 0.0015], [1.0, 0.5]))

    labels = list(ticks(chart, "x"))
    assert len(set(labels)) == len(labels) > 3
    assert "0.0005" in labels


def test_a_long_name_is_shortened() -> None:
    (shown,) = (text for text in texts(stairs(FALLING._replace(name="x" * 60))) if "x" in text)

    assert shown == "x" * (figures.NAME - 1) + "…"


def test_names_of_lines_that_end_together_do_not_overlap() -> None:
    lines = [FALLING._replace(name=f"line {i}") for i in range(12)]

    heights = sorted(y for name, y in texts(stairs(*lines)).items() if "line" in name)

    assert min(np.diff(heights)) >= 72 * figures.LINE - 0.1


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], []),
        ([5.0], [5.0]),
        ([0.0, 0.0, 0.0], [0.0, 1.0, 2.0]),
        ([10.0, 10.0], [9.0, 10.0]),
        ([1.0, 5.0, 5.5], [1.0, 5.0, 6.0]),
    ],
)
def test_places_are_apart_and_inside(values: list[float], expected: list[float]) -> None:
    assert figures.spread_values(values, 1.0, 0.0, 10.0) == expected


def test_a_line_of_many_points_stays_small() -> None:
    x = np.linspace(0, 8, 10_000)
    y = np.exp(-x / 4)

    chart = stairs(Series("long", x.tolist(), y.tolist(), (y / 2).tolist(), y.tolist()))

    assert len(chart.svg) < 60_000


def test_no_state_of_pyplot_is_touched() -> None:
    code = (
        "import sys; from robusteval.reports import figures as f;"
        "assert 'matplotlib' not in sys.modules;"
        "f.draw_steps([f.Series('a', [0, 1], [1, 0])], xlabel='', ylabel='', alt='');"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )

    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)
