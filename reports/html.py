"""A report as one HTML file: offline, without scripts, for light and dark, screen and paper."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from robusteval.registry import REPORT_FORMATS
from robusteval.runs.folder import load_pictures
from robusteval.runs.statistics import Rate, wilson
from robusteval.runs.types import Picture, Run, visible

from . import attack_tables, figures, formatting, gate_words, maps, pictures, sentences
from .measures import RateRecord
from .record import CurveRecord, DetectedAttackRow, RunRecord
from .stages import build_stage_tables

if TYPE_CHECKING:
    from jinja2 import Template

LIMIT = 2_900_000  # bytes of the file: 3 MB, less what is said of pictures that do not fit
SHOWN = (0.0, 0.25, 0.5, 0.75, 1.0)  # shares of the largest budget that are said of a curve
BUDGETS = {  # name and unit of what attacks may spend
    "linf": ("linf budget", "grey levels of 255"),
    "l2": ("l2 budget", "pixels in [0, 1]"),
    "l1": ("l1 budget", "pixels in [0, 1]"),
    "l0": ("l0 budget", "values changed"),
    "l0_pixels": ("l0 budget", "pixels changed"),
    "ssim": ("likeness lost", "1 - SSIM"),
}
PLACES = (
    "Of each attack the easiest, a median and the hardest image: by the margin that is left within"
    " a radius, by distance without one. Changes are amplified around mid-grey. Maps, where"
    " interpreters were asked for, are for the class predicted, bright where high."
)


NO_BREAK = "&#160;%"


class Drawing(NamedTuple):
    """A chart with its numbers as a table."""

    title: str
    note: str
    light: str  # data URIs
    dark: str
    alt: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


class Page(NamedTuple):
    """What the template lays out of one run."""

    record: RunRecord
    curves: Sequence[Drawing]
    rocs: Sequence[Drawing]
    gallery: Sequence[pictures.GalleryCell]
    fit: pictures.GalleryFit


@REPORT_FORMATS.add("html", suffix=(".html", ".htm"))
def to_html(records: Sequence[RunRecord]) -> str:
    """The report as one HTML document; text from outside cannot become markup.

    Parameters
    ----------
    records : sequence of RunRecord
        A chapter each. The pictures of their runs are read from their folders, and reduced or
        left out where the document would exceed 3 MB.

    Raises
    ------
    RunError
        If a picture is missing or was changed.
    """
    pages = [build_page(record) for record in records]
    template = compile_template()
    room = LIMIT - len(keep_percents(template.render(pages=pages)).encode())
    return keep_percents(template.render(pages=list(add_pictures(pages, room))))


def keep_percents(page: str) -> str:
    """The page such that no line of its text ends between a number and its percent sign."""
    return re.sub(r"(?<=\d) %(?=[^<>]*<)", NO_BREAK, page)


def compile_template() -> Template:
    """The template; whatever is put into it is escaped."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        finalize=spell_out_invisible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(
        attack_tables=attack_tables,
        build_stage_tables=build_stage_tables,
        draw_bar=draw_bar,
        formatting=formatting,
        gate_words=gate_words,
        is_doubtful=is_doubtful,
        list_sections=list_sections,
        maps=maps,
        places=PLACES,
        sentences=sentences,
        title_run=title_run,
    )
    environment.filters["sha256"] = lambda text: encode_base64(
        hashlib.sha256(text.encode()).digest()
    )
    source = resources.files("robusteval.reports").joinpath("report.html.jinja")
    return environment.from_string(source.read_text(encoding="utf-8"))


def spell_out_invisible(value: Any) -> Any:
    """Text with all that does not show spelled out; what the template itself made as it is."""
    if isinstance(value, str) and not hasattr(value, "__html__"):
        return visible(value)
    return value


def encode_base64(content: bytes) -> str:
    """Bytes in base 64."""
    return base64.b64encode(content).decode("ascii")


def build_page(record: RunRecord) -> Page:
    """Everything of a run but the bytes of its pictures."""
    stored = read_pictures(record.run)
    gallery = [
        pictures.build_cell(record, row, stored[row.outcome])
        for row in record.attacks
        if row.outcome in stored
    ]
    fit = pictures.GalleryFit(reduced=False, left_out=0)
    return Page(
        record, list(build_curve_drawings(record)), list(build_roc_drawings(record)), gallery, fit
    )


def read_pictures(run: Run) -> dict[int, list[Picture]]:
    """The pictures in the folder of a run; none of a run that is in no folder."""
    stored = run.folder is not None and (Path(run.folder) / "run.json").exists()
    return load_pictures(run) if stored else {}


def add_pictures(pages: Sequence[Page], room: int) -> Iterator[Page]:
    """The pages with as much of their pictures as there is room for, in bytes."""
    cells, edge = pictures.fit_pictures([cell for each in pages for cell in each.gallery], room)
    rest = iter(cells)
    for each in pages:
        gallery = list(islice(rest, len(each.gallery)))
        yield each._replace(gallery=gallery, fit=pictures.describe_fit(each.gallery, gallery, edge))


def title_run(record: RunRecord) -> str:
    """What a run is about."""
    source = record.provenance
    model, data = (
        formatting.name_file(source.model.get("file")),
        formatting.name_file(source.data.get("name")),
    )
    return f"Robustness of {model or 'a model'} on {data or 'its data'}"


def is_doubtful(record: RunRecord) -> bool:
    """Whether the numbers are not what they seem."""
    return record.upper_bound or record.misfed


def list_sections(page: Page) -> list[str]:
    """The sections that have something to say, in the order of every report."""
    record = page.record
    attacks = "Attacks and defenses" if record.defenses else "Attacks"
    sections = {
        "Gates": record.gates,
        attacks: record.attacks,
        "Explanations": record.interpreters,
        "Budgets": page.curves,
        "Gallery": page.gallery,
        "Detectors": any(defense.detector for defense in record.defenses),
        "Cost": record.attacks,
        "Trust": record.attacks or record.findings,
        "Without a result": record.failures or record.not_run,
        "Provenance": True,
    }
    return [section for section, there in sections.items() if there]


def draw_bar(rate: RateRecord) -> str:
    """A share and its interval between nothing and all, as a data URI; the number is beside it."""
    low, wide = 100 * rate.low, 100 * (rate.high - rate.low)
    interval = f'<path d="M{low:.2f} 0h{wide:.2f}v8h-{wide:.2f}z" fill-opacity=".45"/>'
    value = "" if rate.value is None else f'<path d="M{99 * rate.value:.2f} 0h1v8h-1z"/>'
    return encode_svg(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 100 8" preserveAspectRatio="none"'
        ' fill="#3f83d8"><path d="M0 0h100v8h-100z" fill="#8899aa" fill-opacity=".22"/>'
        f"{interval if rate.n else ''}{value}</svg>"
    )


def encode_svg(svg: str) -> str:
    """A drawing as a data URI."""
    return f"data:image/svg+xml;base64,{encode_base64(svg.encode())}"


def build_curve_drawings(record: RunRecord) -> Iterator[Drawing]:
    """Robust accuracy against the budget, a chart for each norm and goal."""
    found: dict[tuple[str, bool], list[CurveRecord]] = {}
    for curve in record.curves:
        # of a single radius the tables say all there is; nearer ones were not looked at
        if curve.nearest or len(curve.tested) > 1:
            found.setdefault((curve.norm, curve.targeted), []).append(curve)
    for (norm, targeted), group in found.items():
        sizes = list_radii(group)
        if any(curve.nearest for curve in group):
            sizes = choose_budgets(norm, max(curve.budgets[-1] for curve in group))
        header = ["", *(pictures.format_distance(norm, size) for size in sizes)]
        rows = [
            [
                name_curve(curve),
                *(formatting.format_percent(count_robust(curve, size)) for size in sizes),
            ]
            for curve in group
        ]
        budget, unit = BUDGETS[norm]
        about = f"Robust accuracy against {budget}" + (", targeted" if targeted else "")
        chart = figures.draw_steps(
            [build_series(curve) for curve in group],
            xlabel=f"{budget}, {unit}",
            ylabel="robust accuracy, %",
            alt=write_alt(about, header, rows),
        )
        attacks = dict.fromkeys(spec for curve in group for spec in curve.attacks)
        note = f"Images right and not fooled within the budget by {', '.join(attacks)}."
        if any(curve.tested for curve in group):
            note += " Nearer than the radius it was given an attack did not look: an upper bound."
        yield build_drawing(about, note, chart, header, rows)


def list_radii(group: Sequence[CurveRecord]) -> list[float]:
    """Nothing, and every radius that was tried."""
    return sorted({0.0, *(point.eps for curve in group for point in curve.tested)})


def choose_budgets(norm: str, largest: float) -> list[float]:
    """The budgets at which a curve is put into words; whole where values are counted."""
    budgets = [part * largest for part in SHOWN]
    if norm.startswith("l0"):
        budgets = [float(math.floor(budget)) for budget in budgets]
    return list(dict.fromkeys(budgets))


def name_curve(curve: CurveRecord) -> str:
    """What a curve is of."""
    return curve.defense or "undefended"


def count_robust(curve: CurveRecord, budget: float) -> Rate:
    """The images a curve leaves at a budget, of none where nothing is known."""
    at = bisect_right(curve.budgets, budget) - 1
    known = budget <= curve.budgets[-1]
    return Rate(curve.robust[at], curve.n if known else 0)


def build_series(curve: CurveRecord) -> figures.Series:
    """A curve as it is drawn, with the budgets that attacks were given."""
    n, scale = curve.n, 255 if curve.norm == "linf" else 1
    intervals = [wilson(k, n) for k in curve.robust]
    tested = [build_point(scale * point.eps, point.robust_accuracy) for point in curve.tested]
    return figures.Series(
        name_curve(curve),
        [scale * budget for budget in curve.budgets],
        [k / n for k in curve.robust],
        [interval.low for interval in intervals],
        [interval.high for interval in intervals],
        tested,
    )


def build_roc_drawings(record: RunRecord) -> Iterator[Drawing]:
    """What each detector tells apart, a line for each attack that gave it something to flag."""
    for defense in record.defenses:
        detector = defense.detector
        if detector is None:
            continue
        found = [row for row in detector.attacks if row.auc is not None]
        if not found:
            continue
        alarms = detector.fpr
        names = [f"{row.attack} ({name_awareness(row)})" for row in found]
        header = ["", "AUC", "clean images flagged", "attacked images flagged"]
        rows = [
            [
                spec,
                f"{row.auc:.3f}",
                formatting.format_rate(alarms),
                formatting.format_rate(row.tpr),
            ]
            for spec, row in zip(names, found, strict=True)
        ]
        lines = [
            figures.Series(
                spec,
                [x for x, _ in row.roc],
                [y for _, y in row.roc],
                points=[build_point(alarms.value, row.tpr)],
            )
            for spec, row in zip(names, found, strict=True)
        ]
        about = f"What {defense.spec} tells apart"
        note = (
            "Attacked images: those that reach the goal of the attack when alarms are left aside."
            " Marked: the threshold in use."
        )
        chart = figures.draw_roc(lines, alt=write_alt(about, header, rows))
        yield build_drawing(about, note, chart, header, rows)


def name_awareness(row: DetectedAttackRow) -> str:
    """Whether an attack knew the detector."""
    return "adaptive" if row.adaptive else "oblivious"


def build_point(x: float | None, rate: RateRecord) -> figures.Measured:
    """A rate at one place of the horizontal axis; nan where it is of no images."""
    known, value = (math.nan if number is None else number for number in (x, rate.value))
    return figures.Measured(known, value, rate.low, rate.high)


def write_alt(about: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as sentences."""
    said = (
        f"{first}: "
        + ", ".join(f"{head} {cell}" for head, cell in zip(header[1:], rest, strict=True))
        for first, *rest in rows
    )
    return f"{about}. {'; '.join(said)}."


def build_drawing(
    about: str,
    note: str,
    chart: figures.Chart,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
) -> Drawing:
    """A chart as it is put into the page."""
    return Drawing(
        about, note, encode_svg(chart.svg), encode_svg(chart.dark), chart.alt, header, rows
    )
