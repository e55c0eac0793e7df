"""What `robusteval explain` found, in a terminal and as JSON.

Text from outside is shown, never interpreted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence

from rich.console import Console

from robusteval.runs.explanation_record import (
    ExplanationRecord,
    FocusFigures,
    MapHeight,
    MeanOfImages,
    RefinementFigures,
    RegionFigures,
    RegionResidual,
    SparseNoiseFigures,
    UnitFigures,
)
from robusteval.runs.types import spell_json

from . import formatting
from .console import (
    build_empty_table,
    make_printable,
    print_facts,
    print_heading,
    print_list,
    print_paragraph,
    print_trimmed,
)
from .measures import drop_not_finite, to_json_types

MEANS = {
    "suppression": "hold the true class down",
    "promotion": "push another class up",
    "balanced": "do both",
    "counter-productive": "work against the attack",
    "inactive": "do nothing",
}


def render_explanation_json(record: ExplanationRecord) -> str:
    """The record as JSON text, ASCII only; what is not finite is null."""
    return spell_json(json.dumps(to_json_types(record), indent=1, allow_nan=False)) + "\n"


def write_explanation_verdict(record: ExplanationRecord) -> str:
    """What was found, in one or two sentences."""
    counts, attack = record.samples, record.attack
    said = (
        f"{attack} fooled the network on {counts.fooled} of {counts.attacked} images that it"
        " had right."
    )
    types = record.regions.types
    if not counts.fooled:
        return said + " There is nothing to explain."
    down, up, both = (
        write_mean_share(types[name]) for name in ("suppression", "promotion", "balanced")
    )
    return (
        f"{said} Of the regions that matter {down} {MEANS['suppression']}, {up}"
        f" {MEANS['promotion']}, {both} both."
    )


def write_mean_share(mean: MeanOfImages) -> str:
    """A mean share with its interval."""
    if mean.n == 0:
        return formatting.MISSING
    return f"{100 * mean.value:.0f} % ({write_ends(mean, 100, 0)})"


def write_mean(mean: MeanOfImages) -> str:
    """A mean with its interval."""
    if mean.n == 0:
        return formatting.MISSING
    return f"{mean.value:.2f} ({write_ends(mean, 1, 2)})"


def write_ends(mean: MeanOfImages, unit: int, digits: int) -> str:
    """The interval of a mean, or why there is none."""
    if math.isfinite(mean.low) and math.isfinite(mean.high):
        return f"{unit * mean.low:.{digits}f}–{unit * mean.high:.{digits}f}"
    return "one image" if mean.n == 1 else f"all {mean.n} alike"


def print_explanation(record: ExplanationRecord, console: Console) -> None:
    """Print the summary: types, focus, refinement, units, and where it comes from."""
    print_paragraph(console, write_explanation_verdict(record), "bold")
    if record.samples.fooled:
        print_regions(console, record.regions)
        if record.focus:
            print_focus(console, record.focus)
            print_heights(console, record.heights)
        if record.noise:
            print_sparse_noise(console, record.noise)
        print_refinement(console, record.refinement)
        if record.units:
            print_units(console, record.units)
    print_list(console, "Remarks", [f"! {remark}" for remark in record.remarks])
    print_facts(console, describe_source(record))


def print_regions(console: Console, found: RegionFigures) -> None:
    """Types, and whether size tells effect."""
    print_heading(console, f"Regions ({found.count} of them; means over images, 95 %)")
    rows = [
        (name, write_mean_share(found.types[name]), f"{MEANS[name]}{of_what}")
        for name, of_what in (
            ("suppression", ""),
            ("balanced", ""),
            ("promotion", ""),
            ("counter-productive", ", of all regions"),
            ("inactive", ", of all regions"),
        )
    ]
    print_columns(console, ("type", "share", "regions that"), rows)
    console.print()
    with_size = found.with_size
    print_paragraph(
        console,
        f"Effect against size of change: Pearson {write_mean(with_size.pearson)}, Kendall"
        f" {write_mean(with_size.kendall)}. Against the first-order estimate: Spearman"
        f" {write_mean(found.with_gradient_mode)}.",
    )
    residual = found.residual
    print_paragraph(
        console,
        "Interaction: the scores of single regions miss the whole effect by"
        f" {write_whole_percent(residual.suppression)} (true class) and"
        f" {write_whole_percent(residual.promotion)} (other class),"
        f" median{warn_of_residual(residual)}.",
    )


def warn_of_residual(residual: RegionResidual) -> str:
    """What a large residual means."""
    both = (residual.suppression, residual.promotion)
    large = max((share for share in both if math.isfinite(share)), default=0.0) > 0.5
    return "; types of single regions are to be read with care" if large else ""


def write_whole_percent(number: float) -> str:
    """A share without interval."""
    return f"{100 * number:.0f} %" if math.isfinite(number) else formatting.MISSING


def print_focus(console: Console, rows: Sequence[FocusFigures]) -> None:
    """Interpretability scores beside what chance gives."""
    print_heading(
        console, "Does the perturbation sit where the network looks? (top 20 % of each map)"
    )
    print_columns(
        console,
        ("map", "of", "score", "others", "shifted", "focused"),
        [
            (
                row.map,
                "before" if row.view.startswith("clean") else "after",
                write_mean(row.score),
                write_two_digits(row.elsewhere.value),
                write_two_digits(row.shifted.value),
                f"{row.focused.k} of {row.focused.n}",
            )
            for row in rows
        ],
    )
    console.print()
    print_paragraph(
        console,
        "Score: norm inside over norm; noise scores the root of the area,"
        f" {write_two_digits(rows[0].chance.value)}. Before: map of the true class on the benign"
        " image; after: of the predicted class on the adversarial one. Others: against the maps of"
        " the other images. Shifted: 95 % of what the same perturbation scores elsewhere in the"
        " image. Focused: above all three.",
        "dim",
    )


def print_heights(console: Console, rows: Sequence[MapHeight]) -> None:
    """How high the maps of both classes rise before and after."""
    print_heading(console, "How high do the maps rise? (share of the highest of the four)")
    found: dict[str, dict[str, MeanOfImages]] = {}
    for row in rows:
        found.setdefault(row.map, {})[row.view] = row.height
    print_columns(
        console,
        ("map", "label, before", "after", "predicted, before", "after"),
        [
            (
                name,
                *(
                    write_mean(views[f"{image}, {shown}"])
                    for shown in ("label", "predicted")
                    for image in ("clean", "adversarial")
                ),
            )
            for name, views in found.items()
        ],
    )


def print_sparse_noise(console: Console, found: SparseNoiseFigures) -> None:
    """Whether sparse noise hides the true class or leads to another."""
    print_heading(console, f"Sparse noise (top {write_whole_percent(found.top)} of Grad-CAM)")
    print_columns(
        console,
        ("changed places", "share", "over chance"),
        [
            (what, write_mean_share(found.places[name].share), write_mean(found.places[name].lift))
            for name, what in (
                ("obscuring", "where the true class was seen"),
                ("leading", "where the other class is seen"),
                ("both", "in both"),
                ("neither", "in neither"),
            )
        ],
    )
    acting = found.roles
    console.print()
    print_paragraph(
        console,
        f"Put back place by place, {write_mean_share(acting.obscuring)} mostly obscure and"
        f" {write_mean_share(acting.leading)} mostly lead. In all the true logit falls by"
        f" {write_mean(acting.fall)} and the other rises by {write_mean(acting.rise)}.",
    )


def write_two_digits(number: float | None) -> str:
    """A number of two digits."""
    return formatting.MISSING if number is None or not math.isfinite(number) else f"{number:.2f}"


def print_refinement(console: Console, rows: Sequence[RefinementFigures]) -> None:
    """Ways to reduce the perturbation, at equal forward passes."""
    print_heading(console, "What is left when only what matters is kept (medians)")
    print_columns(
        console,
        ("way", "fooled", "l0", "l1", "l2", "linf", "passes"),
        [
            (
                row.way,
                f"{row.still_fooled.k} of {row.still_fooled.n}",
                *(
                    formatting.format_quantity(drop_not_finite(size))
                    for size in (row.l0, row.l1, row.l2, row.linf)
                ),
                f"{row.forwards:.0f} / {row.backwards:.0f}",
            )
            for row in rows
        ],
    )
    console.print()
    print_paragraph(console, judge_guidance(rows))


def judge_guidance(rows: Sequence[RefinementFigures]) -> str:
    """Whether a map helped, against the best way without one."""
    guided = [row for row in rows if row.way.startswith("where ")]
    free = [row for row in rows if row.way in ("by size of change", "pruned without a map")]
    if not guided or not free:
        return "The network has no maps to be guided by."
    best, rival = (min(group, key=lambda row: row.l0) for group in (guided, free))
    better = "is worth something" if best.l0 < rival.l0 else "adds nothing"
    left, others = formatting.format_quantity(best.l0), formatting.format_quantity(rival.l0)
    return (
        f"As a guide to a smaller perturbation the map {better}: {left} changed values are left,"
        f" {others} {rival.way}."
    )


def print_units(console: Console, units: UnitFigures) -> None:
    """Whether units that are moved are units that mean something."""
    print_heading(console, f"Units ({units.units}, {units.matched} with a concept)")
    interval = f"({write_two_digits(units.low)} to {write_two_digits(units.high)})"
    print_paragraph(
        console,
        f"Moved by the attack against overlap with a concept: Spearman"
        f" {write_two_digits(units.correlation)} {interval}; moved by noise of equal norm:"
        f" {write_two_digits(units.noise)}, less by {write_two_digits(units.gain)}"
        f" ({write_two_digits(units.gain_low)} to {write_two_digits(units.gain_high)})."
        f" Concepts: {units.concepts}, {units.probes:,} images.",
    )
    console.print()
    print_columns(
        console,
        ("most moved", "attack", "noise", "concept", "overlap"),
        [
            (
                f"unit {unit.unit}",
                f"{unit.attack:.2f}",
                f"{unit.noise:.2f}",
                unit.concept if unit.matched else formatting.MISSING,
                f"{unit.overlap:.3f}",
            )
            for unit in units.most_moved[:5]
        ],
    )


def print_columns(console: Console, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table; its first and any wordy column to the left."""
    shown = build_empty_table()
    for number, title in enumerate(header):
        wordy = number == 0 or title in ("regions that", "concept", "of")
        shown.add_column(title, justify="left" if wordy else "right", overflow="fold")
    for row in rows:
        shown.add_row(*(make_printable(console, cell) for cell in row))
    print_trimmed(console, shown)


def describe_source(record: ExplanationRecord) -> Iterator[tuple[str, str]]:
    """Where the numbers come from."""
    source = record.provenance
    model, data = source.model, source.data
    yield (
        "model",
        formatting.join_parts(
            formatting.name_file(model.get("file")),
            formatting.format_hash(model),
            model.get("arch"),
        ),
    )
    yield (
        "data",
        formatting.join_parts(
            formatting.name_file(data.name), f"{data.total:,} images", f"seed {source.seed}"
        ),
    )
    yield "made", formatting.join_parts(source.created, formatting.format_duration(source.seconds))
