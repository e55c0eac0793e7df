"""What `robusteval explain` found: in a terminal, as JSON, and a picture of each image.

Everything comes from the record that the analysis made; text from outside is shown, never
interpreted.
"""

from __future__ import annotations

import io
import json
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from robusteval.runs.types import visible

from . import formatting
from .measures import to_json_types
from .terminal import facts, heading, listed, put, say, text

Record = dict[str, Any]
Array = np.ndarray[Any, Any]

# region types in the order of their numbers: what it is called, and a colour that differs from
# the others in brightness, too
TYPES = (
    ("inactive", "#e8e8e8"),
    ("suppression", "#14366b"),
    ("balanced", "#8a8a8a"),
    ("promotion", "#f0a500"),
    ("counter-productive", "#7fd6c2"),
)
MEANS = {
    "suppression": "hold the true class down",
    "promotion": "push another class up",
    "balanced": "do both",
    "counter-productive": "work against the attack",
    "inactive": "do nothing",
}
LONGEST = 20  # characters of a class in a picture
VIEWS = ("clean, label", "clean, predicted", "adversarial, label", "adversarial, predicted")


class Shown(Protocol):
    """One image as arrays: what `robusteval.analysis.explain.Panel` has."""

    @property
    def label(self) -> int: ...
    @property
    def predicted(self) -> int: ...
    @property
    def clean(self) -> Array: ...
    @property
    def adversarial(self) -> Array: ...
    @property
    def regions(self) -> Array: ...
    @property
    def kinds(self) -> Array: ...
    @property
    def strength(self) -> Array: ...
    @property
    def interpreter(self) -> str: ...
    @property
    def maps(self) -> dict[str, Array]: ...
    @property
    def portrait(self) -> dict[str, Array]: ...


def to_json(record: Record) -> str:
    """The record as JSON text, ASCII only; what is not finite is null."""
    return json.dumps(to_json_types(record), indent=1, allow_nan=False) + "\n"


def verdict(record: Record) -> str:
    """What was found, in one or two sentences."""
    counts, attack = record["samples"], record["attack"]
    said = (
        f"{attack} fooled the network on {counts['fooled']} of {counts['attacked']} images that it"
        " had right."
    )
    types = record["regions"]["types"]
    if not counts["fooled"]:
        return said + " There is nothing to explain."
    parts = (f"{share(types[name])} {MEANS[name]}" for name in ("suppression", "promotion"))
    return f"{said} Of the regions that matter {', '.join(parts)}, {share(types['balanced'])} both."


def share(mean: Record) -> str:
    """A mean share with its interval."""
    if mean["n"] == 0:
        return formatting.MISSING
    return f"{100 * mean['value']:.0f} % ({100 * mean['low']:.0f}–{100 * mean['high']:.0f})"


def value(mean: Record) -> str:
    """A mean with its interval."""
    if mean["n"] == 0:
        return formatting.MISSING
    return f"{mean['value']:.2f} ({mean['low']:.2f}–{mean['high']:.2f})"


def print_explanation(record: Record, console: Console) -> None:
    """Print the summary: types, focus, refinement, units, and where it comes from."""
    say(console, verdict(record), "bold")
    if record["samples"]["fooled"]:
        of_regions(console, record["regions"])
        if record["focus"]:
            of_focus(console, record["focus"])
        if record["noise"]:
            of_noise(console, record["noise"])
        of_refinement(console, record["refinement"])
        if record["units"]:
            of_units(console, record["units"])
    listed(console, "Remarks", [f"! {remark}" for remark in record["remarks"]])
    facts(console, provenance(record))


def of_regions(console: Console, found: Record) -> None:
    """Types, and whether size tells effect."""
    heading(console, f"Regions ({found['count']} of them; means over images, 95 %)")
    rows = [
        (name, share(found["types"][name]), f"{MEANS[name]}{of_what}")
        for name, of_what in (
            ("suppression", ""),
            ("balanced", ""),
            ("promotion", ""),
            ("counter-productive", ", of all regions"),
            ("inactive", ", of all regions"),
        )
    ]
    table(console, ("type", "share", "regions that"), rows)
    console.print()
    with_size = found["with_size"]
    say(
        console,
        f"Effect against size of change: Pearson {value(with_size['pearson'])}, Kendall"
        f" {value(with_size['kendall'])}. Against the first-order estimate: Spearman"
        f" {value(found['with_gradient_mode'])}.",
    )
    residual = found["residual"]
    say(
        console,
        "Interaction: the scores of single regions miss the whole effect by"
        f" {percent(residual['suppression'])} (true class) and {percent(residual['promotion'])}"
        f" (other class), median{caution(residual)}.",
    )


def caution(residual: Record) -> str:
    """What a large residual means."""
    large = max(value for value in residual.values() if math.isfinite(value)) > 0.5
    return "; types of single regions are to be read with care" if large else ""


def percent(number: float) -> str:
    """A share without interval."""
    return f"{100 * number:.0f} %" if math.isfinite(number) else formatting.MISSING


def of_focus(console: Console, rows: Sequence[Record]) -> None:
    """Interpretability scores beside what chance gives."""
    heading(console, "Does the perturbation sit where the network looks? (top 20 % of each map)")
    table(
        console,
        ("map", "of", "score", "others", "shifted", "focused"),
        [
            (
                row["map"],
                "before" if row["view"].startswith("clean") else "after",
                value(row["score"]),
                *(plain(row[name]["value"]) for name in ("elsewhere", "shifted")),
                f"{row['focused']['k']} of {row['focused']['n']}",
            )
            for row in rows
        ],
    )
    console.print()
    say(
        console,
        "Score: norm inside over norm; noise scores the root of the area,"
        f" {plain(rows[0]['chance']['value'])}. Before: map of the true class on the benign image;"
        " after: of the predicted class on the adversarial one. Others: against the maps of the"
        " other images. Shifted: 95 % of what the same perturbation scores elsewhere in the image."
        " Focused: above all three.",
        "dim",
    )


def of_noise(console: Console, found: Record) -> None:
    """Whether sparse noise hides the true class or leads to another."""
    heading(console, f"Sparse noise (top {percent(found['top'])} of Grad-CAM)")
    table(
        console,
        ("changed places", "share", "over chance"),
        [
            (what, share(found["places"][name]["share"]), value(found["places"][name]["lift"]))
            for name, what in (
                ("obscuring", "where the true class was seen"),
                ("leading", "where the other class is seen"),
                ("both", "in both"),
                ("neither", "in neither"),
            )
        ],
    )
    acting = found["roles"]
    console.print()
    say(
        console,
        f"Put back place by place, {share(acting['obscuring'])} mostly obscure and"
        f" {share(acting['leading'])} mostly lead. In all the true logit falls by"
        f" {value(acting['fall'])} and the other rises by {value(acting['rise'])}.",
    )


def plain(number: float | None) -> str:
    """A number of two digits."""
    return formatting.MISSING if number is None or not math.isfinite(number) else f"{number:.2f}"


def of_refinement(console: Console, rows: Sequence[Record]) -> None:
    """Ways to reduce the perturbation, at equal forward passes."""
    heading(console, "What is left when only what matters is kept (medians)")
    table(
        console,
        ("way", "fooled", "l0", "l1", "l2", "linf", "passes"),
        [
            (
                row["way"],
                f"{row['still_fooled']['k']} of {row['still_fooled']['n']}",
                *(
                    formatting.format_quantity(finite(row[norm]))
                    for norm in ("l0", "l1", "l2", "linf")
                ),
                f"{row['forwards']:.0f} / {row['backwards']:.0f}",
            )
            for row in rows
        ],
    )
    console.print()
    say(console, worth(rows))


def worth(rows: Sequence[Record]) -> str:
    """Whether a map helped, against the best way without one."""
    guided = [row for row in rows if row["way"].startswith("where ")]
    free = [row for row in rows if row["way"] in ("by size of change", "pruned without a map")]
    if not guided or not free:
        return "The network has no maps to be guided by."
    best, rival = (min(group, key=lambda row: row["l0"]) for group in (guided, free))
    better = "is worth something" if best["l0"] < rival["l0"] else "adds nothing"
    return (
        f"As a guide to a smaller perturbation the map {better}:"
        f" {formatting.format_quantity(best['l0'])} changed values are left,"
        f" {formatting.format_quantity(rival['l0'])} {rival['way']}."
    )


def finite(number: float) -> float | None:
    """The number, None if it is none."""
    return number if math.isfinite(number) else None


def of_units(console: Console, units: Record) -> None:
    """Whether units that are moved are units that mean something."""
    heading(console, f"Units ({units['units']}, {units['matched']} with a concept)")
    interval = f"({plain(units['low'])} to {plain(units['high'])})"
    say(
        console,
        f"Moved by the attack against overlap with a concept: Spearman"
        f" {plain(units['correlation'])} {interval}; moved by noise of equal norm:"
        f" {plain(units['noise'])}. Concepts: {units['concepts']}, {units['probes']:,} images.",
    )
    console.print()
    table(
        console,
        ("most moved", "attack", "noise", "concept", "overlap"),
        [
            (
                f"unit {unit['unit']}",
                f"{unit['attack']:.2f}",
                f"{unit['noise']:.2f}",
                unit["concept"] if unit["matched"] else formatting.MISSING,
                f"{unit['overlap']:.3f}",
            )
            for unit in units["most_moved"][:5]
        ],
    )


def table(console: Console, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table; its first and any wordy column to the left."""
    shown = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        header_style="bold",
    )
    for number, title in enumerate(header):
        wordy = number == 0 or title in ("regions that", "concept", "of")
        shown.add_column(title, justify="left" if wordy else "right", overflow="fold")
    for row in rows:
        shown.add_row(*(text(console, cell) for cell in row))
    put(console, shown)


def provenance(record: Record) -> Iterator[tuple[str, str]]:
    """Where the numbers come from."""
    source = record["provenance"]
    model, data = source["model"], source["data"]
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
            formatting.name_file(data["name"]),
            f"{data['total']:,} images",
            f"seed {source['seed']}",
        ),
    )
    yield (
        "made",
        formatting.join_parts(source["created"], formatting.format_duration(source["seconds"])),
    )


def to_png(panel: Shown, record: Record, image: Record) -> bytes:
    """One image before and after, its perturbation by type, and the maps of both classes.

    `image` is the entry of `record["images"]` that belongs to the panel.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows = 1 + bool(panel.maps) + bool(panel.portrait)
    figure = Figure(figsize=(10, 2.9 * rows + 0.5), dpi=110, layout="constrained")
    axes = figure.subplots(rows, 4, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    label = called(image["label_name"], panel.label)
    predicted = called(image["predicted_name"], panel.predicted)
    draw(axes[0, 0], panel.clean, f"benign: {label}")
    draw(axes[0, 1], panel.adversarial, f"adversarial: {predicted}")
    draw(axes[0, 2], by_type(panel), "change by type of region")
    counts = image["types"]
    patches = [
        Patch(facecolor=colour, edgecolor="#333333", label=f"{name}: {counts[name]}")
        for name, colour in TYPES
    ]
    axes[0, 3].legend(handles=patches, loc="center left", frameon=False, fontsize=9)
    if panel.maps:
        names = {"label": label, "predicted": predicted}
        for ax, view in zip(axes[1], VIEWS, strict=True):
            which, _, whose = view.partition(", ")
            draw(ax, overlaid(panel, view), f"{which}: {panel.interpreter} of {names[whose]}")
    for ax, (name, pixels) in zip(axes[-1], panel.portrait.items(), strict=False):
        portrayed(ax, panel, name, pixels)
    figure.suptitle(
        visible(f"{record['attack']}, image {image['index']}"), fontsize=10, parse_math=False
    )
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a class name in letters that the font does not have
        FigureCanvasAgg(figure)
        figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def portrayed(ax: Any, panel: Shown, name: str, pixels: Array) -> None:
    """Grad-CAM or Guided Grad-CAM of the image before or after."""
    which = name.removesuffix("_guided")
    if name.endswith("_guided"):
        draw(ax, np.clip(0.5 + 0.5 * pixels, 0, 1), f"{which}: Guided Grad-CAM")
        return
    image = panel.clean if which == "clean" else panel.adversarial
    draw(ax, warmed(image, pixels[..., 0]), f"{which}: Grad-CAM")


def called(name: str | None, number: int) -> str:
    """A class by name, or by number; at most so long as a picture is wide."""
    shown = visible(name) if name else f"class {number}"
    return shown if len(shown) <= LONGEST else f"{shown[: LONGEST - 1]}…"


def draw(ax: Any, pixels: Array, title: str) -> None:
    """An image with its title."""
    grey = pixels.ndim == 3 and pixels.shape[2] == 1
    ax.imshow(pixels[..., 0] if grey else pixels, cmap="gray", vmin=0, vmax=1)
    ax.set_title(title, fontsize=9, parse_math=False)


def by_type(panel: Shown) -> Array:
    """The regions in the colours of their types, paler where they do less, ``(h, w, 3)``."""
    colours = np.array([[int(hue[i : i + 2], 16) / 255 for i in (1, 3, 5)] for _, hue in TYPES])
    strongest = float(panel.strength.max()) or 1.0
    weight = 0.35 + 0.65 * np.clip(panel.strength / strongest, 0, 1) ** 0.5
    weight = np.where(np.isin(panel.kinds, (1, 2, 3)), weight, 1.0)[:, None]
    region = colours[panel.kinds] * weight + (1 - weight)
    changed = (panel.clean != panel.adversarial).any(2, keepdims=True)
    return np.asarray(np.where(changed, region[panel.regions], 1.0))


def overlaid(panel: Shown, view: str) -> Array:
    """A map over the grey image it was drawn for, ``(h, w, 3)``."""
    image = panel.clean if view.startswith("clean") else panel.adversarial
    return warmed(image, panel.maps[view])


def warmed(image: Array, heat: Array) -> Array:
    """An image ``(h, w, c)`` in grey, hot where the map ``(h, w)`` is high."""
    from matplotlib import colormaps

    heat = np.clip(heat, 0, 1)
    hot = np.asarray(colormaps["inferno"](heat))[..., :3]
    grey, heat = image.mean(2, keepdims=True) * 0.5, heat[..., None]
    return np.asarray(np.clip(grey * (1 - heat) + hot * np.maximum(heat, 0.25), 0, 1))
