"""Whether what was read from a run folder is a run: types, lengths, ids and ranges.

A hash only tells that a file is the one that the record names; whoever writes the record writes the
hash. Everything here raises ValueError with what is wrong, in a few words.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from robusteval.runs.facts import (
    CONFIG,
    DATA,
    DEFENSE,
    MODEL,
    check_facts,
    check_maps,
    is_flag,
    is_number,
    is_plain,
    is_text,
    is_time,
)
from robusteval.runs.metrics import find_right
from robusteval.runs.types import (
    MADE,
    STAGE,
    TRANSFER,
    Columns,
    Defended,
    Outcome,
    Run,
    Threat,
    Values,
)

IMAGES = ("index", "id", "label")
CLEAN = (*IMAGES, "pred_clean", "margin_clean", "confidence_clean")
WATCHED = ("score", "flagged")  # what a detector says
ATTACKED = (
    *(
        *IMAGES,
        "pred_clean",
        "margin_clean",
        "attacked",
        "target",
        "pred_adv",
        "pred_8bit",
        "pred_png",
    ),
    *("l0", "l0_pixels", "l1", "l2", "linf", "ssim", "psnr"),
    *("margin_adv", "confidence_adv", "forwards", "backwards", "seconds", "fault"),
)
DISTANCES = ("l0", "l0_pixels", "l1", "l2", "linf")
WHOLE = ("index", "label", "target", "pred_clean", "pred_adv", "pred_8bit", "pred_png", "fault")
# the least that a column may hold; nan is no number and passes
LEAST = {
    **dict.fromkeys(("index", "label", "fault", "forwards", "backwards", "seconds"), 0),
    **dict.fromkeys(DISTANCES, 0),
    **dict.fromkeys(("confidence_clean", "confidence_adv"), 0),
    **dict.fromkeys(("target", "pred_clean"), -1),
    **dict.fromkeys(("pred_adv", "pred_8bit", "pred_png"), -2),
}
EDGES = ("edge_energy", "edge_area")  # of the change, whatever the interpreter
CHANGES = ("map_distance", "map_iou", "map_noise", *EDGES)  # of maps by an attack
WORTH = ("insertion", "chance_insertion", "deletion", "chance_deletion", "forgotten")  # of maps
SLACK = 1e-4  # of a radius: distances are measured in float64, images are float32
HASH = re.compile(r"[0-9a-f]{64}")


def check_entries(cells: Iterable[Any]) -> None:
    """Whether each cell of a record names a file and its hash, and the file lies in the folder."""
    for cell in cells:
        if not isinstance(cell, dict):
            raise ValueError("a cell is no table")
        key = cell.get("key")
        if not isinstance(key, str) or not HASH.fullmatch(key):
            raise ValueError("a cell has no key of 64 hex digits")
        more = [cell[name] for name in ("pictures", "images") if name in cell]
        hashes = [cell.get("sha256"), *more]
        if not all(isinstance(found, str) and HASH.fullmatch(found) for found in hashes):
            raise ValueError(f"the cell {key} has no hash of 64 hex digits")


def check_run(run: Run) -> None:
    """Whether the parts of a run are of the right types and about the same images."""
    check_circumstances(run)
    if run.clean:
        check_clean(run.clean)
        check_map_columns(run.clean, WORTH, "the clean images")
    clean: dict[str | None, Columns] = {None: run.clean}
    receiving: dict[str | None, Columns] = {}
    for defended in (*run.defenses, *run.receivers):
        check_defended(defended, run.clean)
        known = receiving if defended.kind == "receiver" else clean
        known[str(defended.spec)] = defended.clean
    for outcome in run.outcomes:
        defense = None if outcome.defense is None else str(outcome.defense)
        known = receiving if outcome.role == TRANSFER else clean
        if defense not in known:
            raise ValueError(f"the cell {outcome.attack} is behind a defense that is not there")
        check_outcome(outcome, known[defense])


def check_clean(clean: Columns, kind: str | None = None, index: Values | None = None) -> None:
    """Whether columns are those of clean images, at these positions in the data if they are named.

    `kind` is that of the defense, if any.
    """
    title = "the clean images" if kind is None else "the clean images behind a defense"
    check_columns(clean, (*CLEAN, *(WATCHED if kind == "detector" else ())), title)
    ordered = np.sort(clean["index"])
    if (ordered[1:] == ordered[:-1]).any():
        raise ValueError(f"{title} have a position twice")
    if index is not None and not np.array_equal(clean["index"], index):
        raise ValueError(f"{title} are others than were asked for")


def check_circumstances(run: Run) -> None:
    """Types of what the record says besides its cells."""
    check_facts(run.model, MODEL, "the model")
    check_facts(run.data, DATA, "the data")
    check_facts(run.config, CONFIG, "the settings")
    check_maps(run.config.get("maps"))
    if not all(map(is_text, run.environment.values())):
        raise ValueError("the environment is no list of texts")
    if not all(map(is_text, run.failures.values())):
        raise ValueError("a failure has no reason")
    if not is_time(run.seconds):
        raise ValueError("the seconds are no time")
    for finding in run.findings:
        texts = (finding.code, finding.message, finding.cell or "")
        if not all(map(is_text, texts)) or not is_flag(finding.grave):
            raise ValueError("a finding is none")


def check_defended(defended: Defended, clean: Columns) -> None:
    """Whether the clean images behind a defense are those of the run."""
    title = "the clean images behind a defense"
    check_spec(defended.spec, title)
    if defended.kind not in ("model", "detector", "receiver") or not isinstance(
        defended.facts, dict
    ):
        raise ValueError(f"{title} are of no kind")
    check_facts(defended.facts, DEFENSE, "a defense")
    check_clean(defended.clean, defended.kind)
    check_same_images(defended.clean, clean, title)


def check_outcome(outcome: Outcome, clean: Columns) -> None:
    """Whether a cell is an attack on the images of the run, inside its ball."""
    check_spec(outcome.attack, "an attack")
    title = f"the cell {outcome.attack}"
    if outcome.defense is not None:
        check_spec(outcome.defense, title)
    check_threat(outcome.threat, title)
    texts = (outcome.knowledge, outcome.role, *outcome.notes)
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{title} says of itself what is no text")
    if not isinstance(outcome.resolved, dict) or not isinstance(outcome.adaptive, bool):
        raise ValueError(f"{title} has no parameters")
    c = outcome.columns
    stages = [name.removeprefix(STAGE) for name in c if name.startswith(STAGE)]
    made = [f"{MADE}{name}" for name in stages]
    check_columns(c, (*ATTACKED, *(WATCHED if "flagged" in clean else ()), *made), title)
    check_map_columns(c, CHANGES, title)
    check_same_images(c, clean, title, whole=outcome.role in ("attack", TRANSFER))
    norm, eps, _ = outcome.threat
    far = measure_radius(c, norm)
    if eps is not None and far is not None and (far > eps * (1 + SLACK) + 1e-6).any():
        raise ValueError(f"{title} has images outside the ball of its threat")


def check_threat(threat: Threat, title: str) -> None:
    """Whether norm, radius and goal are some."""
    norm, eps, targeted = threat
    if not isinstance(norm, str) or not isinstance(targeted, bool):
        raise ValueError(f"{title} has no threat")
    if eps is not None and not (is_number(eps) and eps >= 0):
        raise ValueError(f"{title} has a radius that is no number from 0 up")


def measure_radius(columns: Columns, norm: str) -> Values | None:
    """How far images ``(n,)`` went in a norm; None where nothing is known of it."""
    if norm == "ssim":
        return np.asarray(1 - columns["ssim"])
    return columns[norm] if norm in DISTANCES else None


def check_spec(spec: Any, title: str) -> None:
    """Whether name and parameters are some."""
    if not isinstance(spec.name, str) or not isinstance(spec.parameters, dict):
        raise ValueError(f"{title} has no name or no parameters")
    if not all(value is None or is_plain(value) for value in spec.parameters.values()):
        raise ValueError(f"{title} has a parameter that nobody could write")


def check_columns(columns: Mapping[str, Values], needed: Iterable[str], title: str) -> None:
    """Whether all columns are ``(n,)`` of one length, of their types, and in their ranges."""
    for name in needed:
        if name not in columns:
            raise ValueError(f"{title} lack the column {name}")
    lengths = {values.shape for values in columns.values()}
    if len(lengths) > 1 or any(len(shape) != 1 for shape in lengths):
        raise ValueError(f"{title} have columns of several lengths")
    for name, values in columns.items():
        if values.dtype.kind not in list_kinds(name):
            raise ValueError(f"{title} have a column {name} of type {values.dtype}")
        if name in DISTANCES and not np.isfinite(values).all():
            raise ValueError(f"{title} have a column {name} with values that are no numbers")
        if name in LEAST and (values < LEAST[name]).any():
            raise ValueError(f"{title} have a column {name} with values below {LEAST[name]}")
        if name.startswith(("confidence", "ssim")) and (values > 1 + SLACK).any():
            raise ValueError(f"{title} have a column {name} with values above 1")


def check_map_columns(columns: Columns, needed: tuple[str, ...], title: str) -> None:
    """Whether what the columns say of the maps of an interpreter is all there."""
    first, *others = needed
    for name in columns:
        what, _, interpreter = name.partition(":")
        for other in others if what == first else ():
            column = f"{other}:{interpreter}" if other not in EDGES else other
            if column not in columns:
                raise ValueError(f"{title} lack the column {column}")


def list_kinds(name: str) -> str:
    """The kinds of NumPy types that a column may have."""
    if name == "id":
        return "u"
    if name in ("attacked", "flagged"):
        return "b"
    return "iu" if name in WHOLE else "fiub"


def check_same_images(columns: Columns, clean: Columns, title: str, *, whole: bool = True) -> None:
    """Whether the rows are the images of the run, or some of them, in their order.

    Of a cell also whether the model said of them what it says there.
    """
    if any(name not in clean for name in IMAGES):
        raise ValueError(f"{title} are about images that the run does not have")
    rows = slice(None) if whole else np.isin(clean["index"], columns["index"])
    known = {name: values[rows] for name, values in clean.items()}
    if "attacked" in columns:
        known["attacked"] = find_right(known)
    for name in IMAGES:
        if not np.array_equal(columns[name], known[name]):
            raise ValueError(f"{title} are not about the images of the run: {name} differs")
    for name in ("pred_clean", "attacked") if "attacked" in columns else ():
        if not np.array_equal(columns[name], known[name]):
            raise ValueError(f"{title} is of another model: {name} differs")
