"""A report as one HTML file: offline, without scripts, for light and dark, screen and paper."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from robusteval.registry import REPORT_FORMATS
from robusteval.runs.folder import load_pictures
from robusteval.runs.statistics import wilson
from robusteval.runs.types import Picture, Run, visible

from . import (
    attack_tables,
    figures,
    formatting,
    gate_words,
    group_tables,
    image_list,
    maps,
    pictures,
    sentences,
    terms,
)
from .abridged import abridge
from .console import LISTED
from .corruptions import build_corruption_tables
from .curves import BUDGETS, build_curve_tables, name_curve
from .measures import RateRecord
from .models import build_models, build_models_table, name_models
from .record import CurveRecord, DetectedAttackRow, RunRecord
from .stages import build_stage_tables
from .transfer import build_transfer_table
from .transfer_matrix import build_matrix, build_matrix_tables, write_matrix_note
from .trend import build_trend_table, name_line

if TYPE_CHECKING:
    from jinja2 import Environment, Template

LIMIT = 2_900_000  # bytes of the file: 3 MB, less what is said of pictures that do not fit
PLACES = (
    "Of each attack, and of each kind of corruption at its middle severity, the easiest, a median"
    " and the hardest image: by the margin left within a radius, by distance without one. Changes"
    " are amplified around mid-grey. Maps, where interpreters were asked for, are for the class"
    " predicted, bright where high."
)


NO_BREAK = "&#160;%"


class Drawing(NamedTuple):
    """A chart with its numbers as a table."""

    title: str
    note: str
    chart: figures.Chart
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    @property
    def light(self) -> str:
        """The chart for light backgrounds, as a data URI."""
        return encode_svg(self.chart.svg)

    @property
    def dark(self) -> str:
        """The same for dark ones."""
        return encode_svg(self.chart.dark)

    @property
    def alt(self) -> str:
        """What it shows, in words."""
        return self.chart.alt


class Page(NamedTuple):
    """What the template lays out of one run."""

    record: RunRecord
    shown: RunRecord  # of which tables are made, see `abridged`
    title: str
    curves: Sequence[Drawing]
    rocs: Sequence[Drawing]
    reach: Sequence[pictures.GalleryCell]  # what may be changed, on one image: one cell or none
    gallery: Sequence[pictures.GalleryCell]
    fit: pictures.GalleryFit
    images: image_list.ImageList | None
    trend: Sequence[Drawing]  # one, where there is a history


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
    runs, several = [record.run for record in records], len(records) > 1
    names = name_models(runs) if several else [""]
    pages = list(map(build_page, records, names))
    template = compile_template()
    models = build_models_table(build_models(runs)) if several else None
    matrix = build_matrix(runs)
    known = {"models": models, "matrix": matrix}
    room = LIMIT - len(keep_percents(template.render(pages=pages, **known)).encode())
    shown = list(add_pictures(pages, room))
    return keep_percents(template.render(pages=shown, **known))


def keep_percents(page: str) -> str:
    """The page such that no line of its text ends between a number and its percent sign."""
    return re.sub(r"(?<=\d) %(?=[^<>]*<)", NO_BREAK, page)


def open_templates() -> Environment:
    """The templates of the package; whatever is put into one is escaped."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    return Environment(
        loader=FunctionLoader(read_template),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=spell_out_invisible,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def compile_template() -> Template:
    """The template of the report of runs."""
    environment = open_templates()
    environment.globals.update(
        attack_tables=attack_tables,
        build_stage_tables=build_stage_tables,
        build_corruption_tables=build_corruption_tables,
        build_transfer_table=build_transfer_table,
        build_matrix_tables=build_matrix_tables,
        write_matrix_note=write_matrix_note,
        draw_bar=draw_bar,
        formatting=formatting,
        gate_words=gate_words,
        group_tables=group_tables,
        image_list=image_list,
        is_doubtful=is_doubtful,
        list_sections=list_sections,
        most_listed=LISTED,
        maps=maps,
        places=PLACES,
        sentences=sentences,
        terms=terms,
    )
    environment.filters["sha256"] = lambda text: encode_base64(
        hashlib.sha256(text.encode()).digest()
    )
    return environment.get_template("report.html.jinja")


def read_template(name: str) -> str:
    """The text of a template of the package."""
    return resources.files("robusteval.reports").joinpath(name).read_text(encoding="utf-8")


def spell_out_invisible(value: Any) -> Any:
    """Text with all that does not show spelled out; what the template itself made as it is."""
    if isinstance(value, str) and not hasattr(value, "__html__"):
        return visible(value)
    return value


def encode_base64(content: bytes) -> str:
    """Bytes in base 64."""
    return base64.b64encode(content).decode("ascii")


def build_page(record: RunRecord, name: str) -> Page:
    """Everything of a run but the bytes of its pictures; `name` tells it from others beside it."""
    stored, shown = read_pictures(record.run), abridge(record)
    gallery = [
        pictures.build_cell(record, row, stored[row.outcome])
        for row in pictures.choose_rows(shown)
        if row.outcome in stored
    ]
    fit = pictures.GalleryFit(reduced=False, left_out=0)
    reach = pictures.build_reach(record, stored)
    return Page(
        record,
        shown,
        title_run(record, name),
        list(build_curve_drawings(shown)),
        list(build_roc_drawings(record)),
        [pictures.GalleryCell("", "", [reach])] if reach else [],
        gallery,
        fit,
        image_list.build_image_list(record),
        list(build_trend_drawings(record)),
    )


def read_pictures(run: Run) -> dict[int, list[Picture]]:
    """The pictures in the folder of a run; none of a run that is in no folder."""
    stored = run.folder is not None and (Path(run.folder) / "run.json").exists()
    return load_pictures(run) if stored else {}


def add_pictures(pages: Sequence[Page], room: int) -> Iterator[Page]:
    """The pages with as much of their pictures as there is room for, in bytes."""
    cells, edge = pictures.fit_pictures(
        [cell for each in pages for cell in (*each.reach, *each.gallery)], room
    )
    rest = iter(cells)
    for each in pages:
        reach = [cell for cell in islice(rest, len(each.reach)) if cell.samples]
        gallery = list(islice(rest, len(each.gallery)))
        fit = pictures.describe_fit(each.gallery, gallery, edge)
        shown = [cell for cell in gallery if cell.samples]
        yield each._replace(reach=reach, gallery=shown, fit=fit)


def title_run(record: RunRecord, name: str = "") -> str:
    """What a run is about: the file of its model, or the name that it has beside others."""
    source = record.provenance
    model = name or formatting.name_file(source.model.get("file")) or "a model"
    return f"Robustness of {model} on {formatting.name_file(source.data.get('name')) or 'its data'}"


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
        "Classes": next(group_tables.build_group_tables(page.shown), None),
        "Over time": page.trend,
        "Transfer": record.received,
        "Explanations": record.interpreters,
        "Budgets": page.curves,
        "Gallery": page.gallery,
        "Images": page.images,
        "Detectors": any(defense.detector for defense in record.defenses),
        "Cost": next(attack_tables.list_attack_lines(page.shown), None),
        "Trust": record.attacks or record.findings,
        "Without a result": record.failures or record.not_run,
        "Terms": record.attacks,
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
    for table in build_curve_tables(record):
        budget, unit = BUDGETS[table.norm]
        header = ["", *table.budgets]
        rows = [[name, *map(formatting.format_percent, rates)] for name, rates in table.rows]
        chart = figures.draw_steps(
            [build_series(curve) for curve in table.group],
            xlabel=f"{budget}, {unit}",
            ylabel="robust accuracy, %",
            alt=write_alt(table.title, header, rows),
        )
        yield Drawing(table.title, table.note, chart, header, rows)


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


def build_trend_drawings(record: RunRecord) -> Iterator[Drawing]:
    """The network over time; nothing without a history."""
    if record.trend is None:
        return
    table = build_trend_table(record.trend)
    series = [
        figures.Series(
            name_line(line),
            [],
            [],
            points=[
                build_point(x, point.accuracy)
                for x, point in enumerate(line.points)
                if point.accuracy
            ],
        )
        for line in record.trend.lines
    ]
    times = [point.created[:10] for point in record.trend.lines[0].points]
    header = ["", *table.columns]
    rows = [[name, *cells] for name, cells in table.rows]
    about = "What was held, the earliest first"
    chart = figures.draw_trend(
        series, times, ylabel="accuracy, %", alt=write_alt(about, header, rows)
    )
    yield Drawing(about, " ".join(table.lines), chart, header, rows)


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
        yield Drawing(about, note, chart, header, rows)


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
