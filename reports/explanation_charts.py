"""What attacks do to an image, drawn: scores as box plots, and regions by their ratio."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from robusteval.runs.explanation_record import (
    RATIO_BANDS,
    ExplanationComparison,
    FocusBox,
    MeanOfImages,
)

from .figures import (
    DOTTED,
    INK,
    Chart,
    build_axes,
    choose_style,
    draw_legend,
    open_figure,
    render_svg,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOM = 0.8  # of the place of a map, that its boxes take
SHORT = {"gradcam_plus_plus": "Grad-\nCAM++", "gradcam": "Grad-\nCAM", "cam": "CAM"}


def draw_comparison(comparison: ExplanationComparison) -> Iterator[tuple[str, Chart]]:
    """The figures by name, as far as there is anything to draw."""
    for name, chart in (("focus", draw_focus(comparison)), ("ratios", draw_ratios(comparison))):
        if chart is not None:
            yield name, chart


def draw_focus(comparison: ExplanationComparison) -> Chart | None:
    """Interpretability scores, attacks against maps, as box plots; None without any map."""
    attacks = [record.attack for record in comparison.attacks]
    places = list(dict.fromkeys((box.map, box.view) for box in comparison.boxes))
    if not places:
        return None
    chance = [row.chance.value for record in comparison.attacks for row in record.focus]
    with open_figure() as figure:
        axes = build_axes(figure, "", "interpretability score", 2 * len(attacks))
        axes.grid(axis="x", visible=False)
        axes.axhline(float(np.nanmean(chance)), **DOTTED)
        width = ROOM / len(attacks)
        for box in comparison.boxes:
            i = attacks.index(box.attack)
            middle = places.index((box.map, box.view)) + (i - (len(attacks) - 1) / 2) * width
            draw_box(axes, box, middle, width, i)
        axes.set_ylim(0, 1)
        axes.set_xticks(range(len(places)), [name_place(*place) for place in places], fontsize=7)
        draw_legend(axes, attacks)
        axes.set_position((0.105, 0.2, 0.55, 0.76))
        return Chart(render_svg(figure), describe_boxes(comparison.boxes))


def draw_box(axes: Axes, box: FocusBox, middle: float, width: float, i: int) -> None:
    """Whiskers to the ends, a box over the quartiles, and the median with the attack's marker."""
    hue, dash, marker = choose_style(i)
    half = 0.4 * width
    axes.plot([middle, middle], [box.least, box.lower], color=hue, linewidth=1, linestyle=dash)
    axes.plot([middle, middle], [box.upper, box.most], color=hue, linewidth=1, linestyle=dash)
    left, right = middle - half, middle + half
    axes.fill_between([left, right], box.lower, box.upper, color=hue, alpha=0.2, linewidth=0)
    sides = [left, right, right, left, left]
    axes.plot(sides, [box.lower, box.lower, box.upper, box.upper, box.lower], color=hue)
    axes.plot([left, right], [box.median] * 2, color=hue, linewidth=1.8)
    axes.plot([middle], [box.median], marker, color=hue, markersize=4)


def name_place(name: str, view: str) -> str:
    """A map and which image it is of, in lines."""
    return f"{SHORT.get(name, name)}\n{'before' if view.startswith('clean') else 'after'}"


def describe_boxes(boxes: Sequence[FocusBox]) -> str:
    """The boxes in words."""
    said = [
        f"{box.attack} on {name_place(box.map, box.view)}: median {box.median:.2f}, quartiles"
        f" {box.lower:.2f} and {box.upper:.2f}"
        for box in boxes
    ]
    return " ".join("; ".join(said).split()) + "."


def draw_ratios(comparison: ExplanationComparison) -> Chart | None:
    """Regions by their promotion-suppression ratio, a line for each attack; None without any."""
    lines = [(record.attack, record.regions.ratios) for record in comparison.attacks]
    lines = [(name, ratios) for name, ratios in lines if ratios[0].n]
    if not lines:
        return None
    x = np.arange(len(RATIO_BANDS))
    with open_figure() as figure:
        sides = "log2 of promotion over suppression", "regions that matter, %"
        axes = build_axes(figure, *sides, 2 * len(lines))
        for border in (3.5, 4.5):  # where the types part
            axes.axvline(border, **DOTTED)
        for i, (_, ratios) in enumerate(lines):
            hue, dash, marker = choose_style(i)
            shares = [100 * share.value for share in ratios]
            axes.plot(x, shares, marker=marker, color=hue, linestyle=dash, linewidth=1.6)
            draw_intervals(axes, ratios, hue)
        axes.set_ylim(bottom=0)
        axes.set_xticks(x, [name.replace(" ", "\n", 1) for name in RATIO_BANDS], fontsize=6)
        axes.tick_params(axis="x", colors=INK)
        draw_legend(axes, [name for name, _ in lines])
        axes.set_position((0.105, 0.24, 0.55, 0.72))
        return Chart(render_svg(figure), describe_ratios(lines))


def draw_intervals(axes: Axes, ratios: Sequence[MeanOfImages], hue: str) -> None:
    """The 95 % interval of each share, upright."""
    for place, share in enumerate(ratios):
        axes.plot([place, place], [100 * share.low, 100 * share.high], color=hue, linewidth=1)


def describe_ratios(lines: Sequence[tuple[str, Sequence[MeanOfImages]]]) -> str:
    """The shares in words."""
    said = []
    for name, ratios in lines:
        shares = (
            f"{band} {100 * share.value:.0f} %"
            for band, share in zip(RATIO_BANDS, ratios, strict=True)
        )
        said.append(f"{name}: {', '.join(shares)}")
    return "; ".join(said) + "."
