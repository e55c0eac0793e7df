"""Charts that read in light and dark, in grey and aloud; matplotlib, imported when one is drawn.

A chart is SVG text, the same bytes for the same numbers. Lines differ by colour, dash and marker,
and carry their names, so that nothing has to be matched by hue alone.
"""

from __future__ import annotations

import io
import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from robusteval.runs.types import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#1c2128", "#5b6470", "#d8dde4"
HUES = ("#1f5fbf", "#c2410c", "#0b7a55", "#8a3ea8", "#8a6100", "#0a7185", "#b0266b", "#525a66")
PALE = ("#79b0ff", "#ff9b6b", "#4fd1a1", "#d59bf0", "#e3b341", "#5cc8de", "#ff8fc0", "#b7c0cc")
DARK = {INK: "#e6e9ee", MUTED: "#a3adba", GRID: "#3a424d"} | dict(zip(HUES, PALE, strict=True))
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1)), (0, (7, 2, 1, 2)), (0, (3, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DOTTED: dict[str, Any] = {"color": MUTED, "linewidth": 0.8, "linestyle": (0, (2, 2))}

WIDTH, HEIGHT = 5.4, 3.3  # inches: 389 points, which still reads at the width of a telephone
LINE = 0.17  # inches from one name to the next below it
NAME = 20  # characters of a name that fit beside the axes
DATES = 4  # below an axis
VERTICES = 150  # of a line: as many as its width can show
FONT, READERS = "'DejaVu Sans', sans-serif", "system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif"


class Measured(NamedTuple):
    """A share found at one budget, with its interval."""

    x: float
    y: float
    low: float
    high: float


class Series(NamedTuple):
    """A line over rising `x`: `y` in [0, 1], perhaps with an interval, and marked points."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    points: Sequence[Measured] = ()


class Chart(NamedTuple):
    """A drawing for light backgrounds as SVG text, and what it shows in words."""

    svg: str
    alt: str

    @property
    def dark(self) -> str:
        """The same drawing for dark backgrounds."""
        return re.sub("|".join(DARK), lambda found: DARK[found[0]], self.svg)


def draw_steps(series: Sequence[Series], *, xlabel: str, ylabel: str, alt: str) -> Chart:
    """Shares that fall with a budget: a stair each, its name where it ends.

    Parameters
    ----------
    series : sequence of Series
        At ``x[i]`` exactly ``y[i]``, until the next `x`. `points` are drawn with their interval.
    xlabel, ylabel : str
        What the axes are, with units; shares are shown in percent.
    alt : str
        The chart in words, with its numbers.
    """
    with open_figure() as figure:
        axes = build_axes(figure, xlabel, ylabel, names=len(series))
        right = max((x for line in series for x in line.x), default=0.0)
        axes.set_xlim(0, right or 1)
        axes.set_ylim(-3, 103)
        axes.locator_params(axis="x", nbins=5)
        for i, line in enumerate(series):
            draw_stair(axes, line, i)
        named = [(line.name, line.x[-1], 100 * line.y[-1]) for line in series]
        name_ends(axes, named)
        return Chart(render_svg(figure), alt)


def draw_trend(series: Sequence[Series], times: Sequence[str], *, ylabel: str, alt: str) -> Chart:
    """Shares at one moment after the other, each with its interval, joined where they are known.

    Parameters
    ----------
    series : sequence of Series
        Marked `points`, whose `x` is the position of the moment.
    times : sequence of str
        What the moments are called; as many of them are written as there is room for.
    ylabel : str
        What the axis is.
    alt : str
        The chart in words, with its numbers.
    """
    with open_figure() as figure:
        axes = build_axes(figure, "", ylabel, names=len(series))
        axes.set_xlim(-0.3, max(len(times) - 0.7, 0.3))
        axes.set_ylim(-3, 103)
        shown = np.unique(np.linspace(0, len(times) - 1, min(len(times), DATES)).round())
        axes.set_xticks(shown, [visible(times[int(place)]) for place in shown], parse_math=False)
        for i, line in enumerate(series):
            hue, dash, marker = choose_style(i)
            x, y = [point.x for point in line.points], [100 * point.y for point in line.points]
            axes.plot(x, y, color=hue, linestyle=dash, linewidth=1.2)
            draw_points(axes, line.points, hue, marker)
        named = [(s.name, s.points[-1].x, 100 * s.points[-1].y) for s in series if s.points]
        name_ends(axes, named)
        return Chart(render_svg(figure), alt)


def draw_roc(series: Sequence[Series], *, alt: str) -> Chart:
    """True against false positives, with chance, and the operating point of each line.

    Parameters
    ----------
    series : sequence of Series
        False positive rates as `x`, true positive rates as `y`; the operating point in `points`.
    alt : str
        The chart in words, with its numbers.
    """
    with open_figure() as figure:
        sides = "clean images flagged, %", "attacked images flagged, %"
        axes = build_axes(figure, *sides, 2 * len(series))  # of two lines each
        axes.set_xlim(-3, 103)
        axes.set_ylim(-3, 103)
        axes.plot([0, 100], [0, 100], **DOTTED)
        axes.text(60, 55, "chance", color=MUTED, va="top")
        for i, line in enumerate(series):
            hue, dash, marker = choose_style(i)
            x, y = (100 * np.asarray(side) for side in (line.x, line.y))
            axes.plot(x, y, color=hue, linestyle=dash, linewidth=1.6)
            points = [point._replace(x=100 * point.x) for point in line.points]
            draw_points(axes, points, hue, marker)
        draw_legend(axes, [line.name for line in series])
        return Chart(render_svg(figure), alt)


@contextmanager
def open_figure() -> Iterator[Figure]:
    """An empty figure, whatever the user's own settings of matplotlib are."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(), warnings.catch_warnings():
        # a name may be in a script that the layout font lacks: the reader's own font has it
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        matplotlib.rcdefaults()
        matplotlib.rcParams["svg.fonttype"] = "none"
        matplotlib.rcParams["svg.hashsalt"] = "robusteval"
        matplotlib.rcParams["font.sans-serif"] = ["DejaVu Sans"]
        matplotlib.rcParams["font.size"] = 9
        yield Figure(figsize=(WIDTH, HEIGHT))


def build_axes(figure: Figure, xlabel: str, ylabel: str, names: int) -> Axes:
    """Axes with room at their right for so many names, one below the other."""
    height = max(HEIGHT, LINE * names + 0.8)
    figure.set_size_inches(WIDTH, height)
    axes = figure.add_axes((0.105, 0.46 / height, 0.55, 1 - 0.56 / height))
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(MUTED)
    axes.tick_params(colors=MUTED, length=3)
    axes.set_xlabel(xlabel, color=INK, parse_math=False)
    axes.set_ylabel(ylabel, color=INK, parse_math=False)
    return axes


def choose_style(i: int) -> tuple[str, Any, str]:
    """Colour, dash and marker of a line; no two of the first 35 share both of the latter."""
    return HUES[i % len(HUES)], DASHES[i % len(DASHES)], MARKERS[i % len(MARKERS)]


def draw_stair(axes: Axes, line: Series, i: int) -> None:
    """A stair with its interval as a band."""
    hue, dash, marker = choose_style(i)
    keep = np.unique(np.linspace(0, len(line.x) - 1, min(len(line.x), VERTICES)).astype(int))
    x, y = np.asarray(line.x)[keep], 100 * np.asarray(line.y)[keep]
    axes.plot(x, y, color=hue, linestyle=dash, linewidth=1.6, drawstyle="steps-post")
    if line.low:
        low, high = (100 * np.asarray(side)[keep] for side in (line.low, line.high))
        axes.fill_between(x, low, high, step="post", color=hue, alpha=0.12, linewidth=0)
    draw_points(axes, line.points, hue, marker)


def draw_points(axes: Axes, points: Sequence[Measured], hue: str, marker: str) -> None:
    """Marked points with their intervals as upright bars."""
    for point in points:
        x, y, low, high = point.x, 100 * point.y, 100 * point.low, 100 * point.high
        axes.plot([x, x], [low, high], color=hue, linewidth=1.4, clip_on=False)
        axes.plot([x], [y], marker, color=hue, markersize=6, clip_on=False, zorder=5)


def name_ends(axes: Axes, ends: Sequence[tuple[str, float, float]]) -> None:
    """Names at the right of the axes, each led to its place, apart where they would overlap."""
    order = sorted(range(len(ends)), key=lambda i: ends[i][2])
    bottom, top = axes.get_ylim()
    figure = axes.get_figure(root=True)
    assert figure is not None
    gap = LINE * (top - bottom) / (axes.get_position().height * figure.get_size_inches()[1])
    places = spread_values([ends[i][2] for i in order], gap, bottom, top)
    left, right = axes.get_xlim()
    for i, place in zip(order, places, strict=True):
        name, x, y = ends[i]
        hue = choose_style(i)[0]
        out = right + 0.1 * (right - left)
        axes.plot([x, right, out], [y, y, place], color=hue, linewidth=0.6, clip_on=False)
        axes.text(out, place, f" {clip_name(name)}", color=hue, va="center", parse_math=False)


def draw_legend(axes: Axes, names: Sequence[str]) -> None:
    """Names at the right of the axes, each with a sample of its line."""
    from matplotlib.lines import Line2D

    styles = [choose_style(i) for i in range(len(names))]
    samples = [
        Line2D([], [], color=hue, linestyle=dash, marker=marker) for hue, dash, marker in styles
    ]
    legend = axes.legend(
        samples,
        ["name"] * len(names),
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        handlelength=2.8,
        frameon=False,
    )
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_parse_math(False)  # a dollar sign is one
        text.set_text(fold_line_name(name))
        text.set_color(INK)


def spread_values(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Ascending places near these ascending values, `gap` apart; below `high`, and above `low`
    if there is room."""
    places: list[float] = []
    for value in values:
        places.append(max(value, places[-1] + gap if places else low))
    limit = high
    for i in reversed(range(len(places))):
        places[i] = min(places[i], limit)
        limit = places[i] - gap
    return places


def clip_name(name: str) -> str:
    """A name, all of it visible, shortened where it is long."""
    name = visible(name)
    return name if len(name) <= NAME else f"{name[: NAME - 1]}…"


def fold_line_name(name: str) -> str:
    """A name in two lines at most, where a sample of its line stands before it."""
    width = NAME - 4
    first, *more = textwrap.wrap(visible(name), width, break_on_hyphens=False) or [""]
    if not more:
        return first
    rest = " ".join(more)
    return f"{first}\n{rest if len(rest) <= width else rest[: width - 1] + '…'}"


def render_svg(figure: Figure) -> str:
    """The figure as SVG text, without a date, in the reader's own font, on no background."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue().replace(FONT, READERS)
    return re.sub("<[^>]*>", round_coordinates, text)


def round_coordinates(tag: re.Match[str]) -> str:
    """A tag with its coordinates to a hundredth of a point."""
    return re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0])
