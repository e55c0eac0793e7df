"""What became of each image: all of them as CSV, and those worth looking at for a page."""

from __future__ import annotations

import csv
import io
import shlex
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from robusteval.registry import REPORT_FORMATS
from robusteval.runs import metrics
from robusteval.runs.slices import SLICE
from robusteval.runs.types import Outcome, Run, Values, name_cell

from . import formatting
from .groups import find_turned, list_slices, name_label
from .measures import CORRUPTION
from .problems import name_runs
from .record import RunRecord
from .spreadsheet import build_entry

FOOLED, HELD, WRONG = 60, 20, 20  # images of each kind on a page
KINDS = ("fooled", "withstands", "wrong at first")


class ListedImage(NamedTuple):
    """A row of the list on a page."""

    kind: str  # one of KINDS
    cells: list[str]
    label: str
    position: int
    distance: tuple[bool, str, float]  # none, its norm, its size: norms have no common measure


class ImageList(NamedTuple):
    """Images as text, the same rows in several orders."""

    note: str
    command: str  # what writes all of them
    columns: list[str]
    orders: list[tuple[str, list[ListedImage]]]  # what it is sorted by, and the rows


@REPORT_FORMATS.add("images")
def render_images(records: Sequence[RunRecord]) -> str:
    """CSV with a row for each image and columns for each attack: what it is taken for, how near.

    Of an image that was wrong at first the columns of attacks are empty, of one that withstands
    the distances. Text that a spreadsheet would take for a formula begins with an apostrophe.
    """
    rows = [
        {"run": name, **row}
        for record, name in zip(records, name_runs(records), strict=True)
        for row in list_rows(record.run)
    ]
    columns = list(dict.fromkeys(key for row in rows for key in row)) or ["run", "index", "id"]
    page = io.StringIO(newline="")
    writer = csv.writer(page, quoting=csv.QUOTE_NONNUMERIC)
    writer.writerow([build_entry(column) for column in columns])
    for row in rows:
        writer.writerow([build_entry(row.get(column)) for column in columns])
    return page.getvalue()


def list_rows(run: Run) -> Iterator[dict[str, Any]]:
    """What is known of each image of a run, in its order."""
    if not run.clean:
        return
    clean = run.clean
    columns: dict[str, list[Any]] = {
        "index": clean["index"].tolist(),
        "id": [f"{int(each):016x}" for each in clean["id"]],
        "label": clean["label"].tolist(),
        "class": name_all(run, clean["label"]),
    }
    for by, names in list_slices(run).items():
        columns[f"slice {by}"] = [names[code] for code in clean[f"{SLICE}{by}"]]
    columns["prediction"] = clean["pred_clean"].tolist()
    columns["predicted class"] = name_all(run, clean["pred_clean"])
    columns["right"] = metrics.find_right(clean).tolist()
    columns["confidence"] = list_numbers(clean["confidence_clean"])
    for outcome in run.attacks:
        title = name_cell(outcome.attack, outcome.defense, outcome.adaptive)
        columns |= {f"{title}: {what}": made for what, made in list_cells(run, outcome).items()}
    for row in zip(*columns.values(), strict=True):
        yield dict(zip(columns, row, strict=True))


def list_cells(run: Run, outcome: Outcome) -> dict[str, list[Any]]:
    """What an attack did to each image."""
    attacked, fooled, c = outcome.attacked, outcome.success(), outcome.columns
    made = name_all(run, c["pred_adv"])
    far = metrics.perturbation_sizes(outcome)
    return {
        "fooled": keep(fooled.tolist(), attacked),
        "predicted class": keep(made, attacked),
        "confidence": keep(list_numbers(c["confidence_adv"]), attacked),
        "distance": keep(list_numbers(far), fooled),
    }


def keep(values: Sequence[Any], where: Values) -> list[Any]:
    """These values where they mean something, else None."""
    return [value if there else None for value, there in zip(values, where.tolist(), strict=True)]


def list_numbers(values: Values) -> list[float | None]:
    """Numbers, None for what is none."""
    return [value if np.isfinite(value) else None for value in values.astype(float).tolist()]


def name_all(run: Run, labels: Values) -> list[str]:
    """The names of classes ``(n,)``."""
    names = {label: name_label(run, label) for label in np.unique(labels).tolist()}
    return [names[label] for label in labels.tolist()]


def build_image_list(record: RunRecord) -> ImageList | None:
    """The images that fall most easily, hold most narrowly, or were wrong; None without attacks.

    Of attacks on the model as it is, under all threats. What is shown of an image is its nearest
    success under the first of them that has one.
    """
    run = record.run
    attacks = [o for o in run.attacks if o.defense is None and o.threat.norm != CORRUPTION]
    if not attacks or not run.clean:
        return None
    right, times = metrics.find_right(run.clean), count_successes(attacks)
    margin = np.min([outcome.columns["margin_adv"] for outcome in attacks], axis=0)
    # by attacks that fool it, then by what is left of the margin
    order = np.lexsort((np.nan_to_num(margin, nan=-np.inf), -times))
    of_kind = (right & (times > 0), right & (times == 0), ~right)
    kept = [
        order[mask[order]][:most] for mask, most in zip(of_kind, (FOOLED, HELD, WRONG), strict=True)
    ]
    said = "; ".join(
        f"{len(rows):,} of {int(mask.sum()):,} {kind}"
        for kind, rows, mask in zip(KINDS, kept, of_kind, strict=True)
        if len(rows)
    )
    shown = list(list_images(run, attacks, times, np.concatenate(kept)))
    folder = shlex.quote(run.folder) if run.folder else "RUN"
    return ImageList(
        note=f"{said}, those first that fall most easily. All images, with every attack:",
        command=f"robusteval report {folder} --format images --out images.csv",
        columns=[
            *("class", "outcome", "taken for", "confidence", "distance", "attacks that fool it"),
            *list_slices(run),
        ],
        orders=[
            ("how easily it falls", shown),
            ("class", sorted(shown, key=lambda row: row.label)),
            ("distance", sorted(shown, key=lambda row: row.distance)),
            ("position", sorted(shown, key=lambda row: row.position)),
        ],
    )


def count_successes(attacks: Sequence[Outcome]) -> Values:
    """How many of these attacks fool each image ``(n,)``."""
    return np.asarray(np.stack([outcome.success() for outcome in attacks]).sum(0))


def list_images(
    run: Run, attacks: Sequence[Outcome], times: Values, rows: Values
) -> Iterator[ListedImage]:
    """What became of the images in these rows; `times` ``(n,)`` is how many attacks fool each."""
    clean, right = run.clean, metrics.find_right(run.clean)
    n = len(right)
    becomes, far = clean["pred_clean"].copy(), np.full(n, np.inf)
    sure, norms = clean["confidence_clean"].astype(float), np.full(n, "", dtype=object)
    left = np.ones(n, np.bool_)  # no success under an earlier threat
    for threat, group in metrics.group_by_threat(attacks).items():
        fooled, _, made = find_turned(group)
        best = metrics.find_nearest_attack(group)
        confidence = np.stack([outcome.columns["confidence_adv"] for outcome in group])
        here = fooled & left
        becomes[here], norms[here] = made[here], threat.norm
        far[here] = metrics.find_nearest(group)[here]
        sure[here] = confidence[best, np.arange(n)][here]
        left &= ~fooled
    slices = list_slices(run)
    for i in rows.tolist():
        kind = KINDS[2] if not right[i] else KINDS[0] if times[i] else KINDS[1]
        near = f"{formatting.format_quantity(float(far[i]))} {norms[i]}"
        label = name_label(run, int(clean["label"][i]))
        yield ListedImage(
            kind,
            [
                label,
                kind,
                formatting.MISSING if kind == KINDS[1] else name_label(run, int(becomes[i])),
                formatting.format_share(float(sure[i])) if np.isfinite(sure[i]) else "",
                near if np.isfinite(far[i]) else formatting.MISSING,
                f"{times[i]} of {len(attacks)}" if right[i] else formatting.MISSING,
                *(names[clean[f"{SLICE}{by}"][i]] for by, names in slices.items()),
            ],
            label,
            int(clean["index"][i]),
            (not np.isfinite(far[i]), str(norms[i]), float(far[i])),
        )
