"""Images fooled over how like the original they stay, a line for each sweep of a paper."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from robusteval.analysis.papers.comparison import ComparedRow, ComparedTable, Reproduction
from robusteval.analysis.papers.measures import find_measure

from .figures import (
    DOTTED,
    MUTED,
    Chart,
    Measured,
    build_axes,
    choose_style,
    draw_legend,
    open_figure,
    render_svg,
)

LIKENESSES = {"ssim": "mean SSIM, most alike at the right", "psnr": "mean PSNR, dB"}
TICKS = (0.0, 0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999)  # of SSIM
NEAREST = 1e-6  # to an SSIM of 1, which a logarithm has no place for


class Curve(NamedTuple):
    """A sweep: at each setting the images fooled, with the interval, over what it keeps."""

    name: str
    points: list[Measured]


class CurveChart(NamedTuple):
    """A drawing below a table, and from where the upright lines in it are."""

    chart: Chart
    tables: list[str]


def draw_curves(found: Reproduction, table: ComparedTable) -> Iterator[CurveChart]:
    """Images fooled over SSIM and over PSNR, as far as a sweep has measured both."""
    for name in LIKENESSES if table.sweep else ():
        curves = list(list_curves(table, name))
        if curves:
            marked = [t for t in found.tables if any(name in row.at for row in t.rows)]
            levels = sorted({row.at[name] for t in marked for row in t.rows if name in row.at})
            yield CurveChart(draw_curve(name, curves, levels), [t.name for t in marked])


def list_curves(table: ComparedTable, name: str) -> Iterator[Curve]:
    """The sweeps of a table over a measure of likeness, from the least alike on."""
    fooled, likeness = (find_measure(each).title for each in ("fooled", name))
    for line, rows in groupby(table.rows, lambda row: row.line):
        points = []
        for _, setting in groupby(rows, lambda row: row.row):
            cells: dict[str, ComparedRow] = {row.column: row for row in setting}
            if fooled not in cells or likeness not in cells:
                continue
            share, kept = cells[fooled].measured, cells[likeness].measured
            if share is not None and kept is not None and math.isfinite(kept.value):
                points.append(Measured(kept.value, share.value, share.low, share.high))
        if points:
            yield Curve(line, sorted(points))


def draw_curve(name: str, curves: Sequence[Curve], levels: Sequence[float]) -> Chart:
    """One chart; levels at which tables compare are upright lines with their values above."""

    def place(value: float) -> float:
        return -math.log10(max(1 - value, NEAREST)) if name == "ssim" else value

    known = [place(x) for x in (*levels, *(point.x for curve in curves for point in curve.points))]
    left, right = min(known), max(known)
    room = 0.04 * (right - left) or 1
    with open_figure() as figure:
        axes = build_axes(figure, LIKENESSES[name], "images fooled, %", 2 * len(curves))
        axes.set_xlim(left - room, right + room)
        axes.set_ylim(-3, 103)
        if name == "ssim":
            ticks = [tick for tick in TICKS if left - room <= place(tick) <= right + room]
            axes.set_xticks([place(tick) for tick in ticks], [f"{tick:g}" for tick in ticks])
        for level in levels:
            axes.axvline(place(level), **DOTTED)
            above = axes.text(place(level), 103.5, f"{level:g}", fontsize=7, color=MUTED)
            above.set(ha="center", va="bottom")
        for i, curve in enumerate(curves):
            hue, dash, marker = choose_style(i)
            x, y = [place(p.x) for p in curve.points], [100 * p.y for p in curve.points]
            for at, point in zip(x, curve.points, strict=True):
                ends = [100 * point.low, 100 * point.high]
                axes.plot([at, at], ends, color=hue, linewidth=0.8, alpha=0.5)
            axes.plot(x, y, color=hue, linestyle=dash, linewidth=1.3, marker=marker, markersize=3.5)
        draw_legend(axes, [curve.name for curve in curves])
        height = figure.get_size_inches()[1]
        axes.set_position((0.105, 0.46 / height, 0.55, 1 - 0.72 / height))  # values above
        return Chart(render_svg(figure), describe_curves(name, curves, levels))


def describe_curves(name: str, curves: Sequence[Curve], levels: Sequence[float]) -> str:
    """The ends of the lines in words."""
    said = []
    for curve in curves:
        first, last = curve.points[-1], curve.points[0]
        text = f"{curve.name}: {100 * first.y:.0f} % at {first.x:.4g}"
        if len(curve.points) > 1:
            text += f", {100 * last.y:.0f} % at {last.x:.4g}"
        said.append(text)
    marked = f" Marked: {', '.join(f'{level:g}' for level in levels)}." if levels else ""
    unit = " in dB" if name == "psnr" else ""
    return (
        f"Images fooled over mean {name.upper()}{unit}, the ends of each sweep."
        f" {'; '.join(said)}.{marked} All points stand in the table."
    )
