"""A picture of each image that was explained: before and after, by type of region, and maps."""

from __future__ import annotations

import io
import textwrap
import warnings
from typing import Any

import numpy as np

from robusteval.runs.explanation_record import ExplainedImage, ExplainedPanel
from robusteval.runs.types import visible

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
WIDEST = 30  # characters of a line above a picture
LONGEST = 20  # characters of a class in a picture
VIEWS = ("clean, label", "clean, predicted", "adversarial, label", "adversarial, predicted")


def render_explained_image(panel: ExplainedPanel, attack: str, image: ExplainedImage) -> bytes:
    """One image before and after, its perturbation by type, and the maps of both classes.

    `image` has the figures of the image in the panel.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows = 1 + bool(panel.maps) + bool(panel.portrait)
    figure = Figure(figsize=(10, 2.9 * rows + 0.5), dpi=110, layout="constrained")
    axes = figure.subplots(rows, 4, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    label = shorten_class(image.label_name, panel.label)
    predicted = shorten_class(image.predicted_name, panel.predicted)
    draw_image(axes[0, 0], panel.clean, f"benign: {label}")
    draw_image(axes[0, 1], panel.adversarial, f"adversarial: {predicted}")
    draw_image(axes[0, 2], colour_by_type(panel), "change by type of region")
    counts = image.types
    patches = [
        Patch(facecolor=colour, edgecolor="#333333", label=f"{name}: {counts[name]}")
        for name, colour in TYPES
    ]
    axes[0, 3].legend(handles=patches, loc="center left", frameon=False, fontsize=9)
    if panel.maps:
        names = {"label": label, "predicted": predicted}
        for ax, view in zip(axes[1], VIEWS, strict=True):
            which, _, whose = view.partition(", ")
            draw_image(
                ax, overlay_map(panel, view), f"{which}: {panel.interpreter} of {names[whose]}"
            )
    for ax, (name, pixels) in zip(axes[-1], panel.portrait.items(), strict=False):
        draw_portrait(ax, panel, name, pixels)
    figure.suptitle(visible(f"{attack}, image {image.index}"), fontsize=10, parse_math=False)
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a class name in letters that the font does not have
        FigureCanvasAgg(figure)
        figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def draw_portrait(ax: Any, panel: ExplainedPanel, name: str, pixels: Array) -> None:
    """Grad-CAM or Guided Grad-CAM of the image before or after."""
    which = name.removesuffix("_guided")
    if name.endswith("_guided"):
        draw_image(ax, np.clip(0.5 + 0.5 * pixels, 0, 1), f"{which}: Guided Grad-CAM")
        return
    image = panel.clean if which == "clean" else panel.adversarial
    draw_image(ax, warm_image(image, pixels[..., 0]), f"{which}: Grad-CAM")


def shorten_class(name: str | None, number: int) -> str:
    """A class by name, or by number; at most so long as a picture is wide."""
    shown = visible(name) if name else f"class {number}"
    return shown if len(shown) <= LONGEST else f"{shown[: LONGEST - 1]}…"


def draw_image(ax: Any, pixels: Array, title: str) -> None:
    """An image with its title."""
    grey = pixels.ndim == 3 and pixels.shape[2] == 1
    ax.imshow(pixels[..., 0] if grey else pixels, cmap="gray", vmin=0, vmax=1)
    ax.set_title(fold_title(title), fontsize=9, parse_math=False)


def fold_title(title: str) -> str:
    """A title in lines that are no wider than the picture below, so that neighbours stay apart."""
    return "\n".join(textwrap.wrap(title, WIDEST))


def colour_by_type(panel: ExplainedPanel) -> Array:
    """The regions in the colours of their types, paler where they do less, ``(h, w, 3)``."""
    colours = np.array([[int(hue[i : i + 2], 16) / 255 for i in (1, 3, 5)] for _, hue in TYPES])
    strongest = float(panel.strength.max()) or 1.0
    weight = 0.35 + 0.65 * np.clip(panel.strength / strongest, 0, 1) ** 0.5
    weight = np.where(np.isin(panel.kinds, (1, 2, 3)), weight, 1.0)[:, None]
    region = colours[panel.kinds] * weight + (1 - weight)
    changed = (panel.clean != panel.adversarial).any(2, keepdims=True)
    return np.asarray(np.where(changed, region[panel.regions], 1.0))


def overlay_map(panel: ExplainedPanel, view: str) -> Array:
    """A map over the grey image it was drawn for, ``(h, w, 3)``."""
    image = panel.clean if view.startswith("clean") else panel.adversarial
    return warm_image(image, panel.maps[view])


def warm_image(image: Array, heat: Array) -> Array:
    """An image ``(h, w, c)`` in grey, hot where the map ``(h, w)`` is high."""
    from matplotlib import colormaps

    heat = np.clip(heat, 0, 1)
    hot = np.asarray(colormaps["inferno"](heat))[..., :3]
    grey, heat = image.mean(2, keepdims=True) * 0.5, heat[..., None]
    return np.asarray(np.clip(grey * (1 - heat) + hot * np.maximum(heat, 0.25), 0, 1))
