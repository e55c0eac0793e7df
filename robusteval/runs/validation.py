"""Whether what was read from a run folder is a run: types, lengths, ids and ranges.

A hash only tells that a file is the one that the record names; whoever writes the record writes the
hash. Everything here raises ValueError with what is wrong, in a few words.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from robusteval.runs.types import Columns, Defended, Outcome, Run, Values

IMAGES = ("index", "id", "label")
CLEAN = (*IMAGES, "pred_clean")
ATTACKED = (
    *(*CLEAN, "attacked", "target", "pred_adv", "pred_8bit", "pred_png"),
    *("l0", "l0_pixels", "l1", "l2", "linf", "ssim", "psnr"),
    *("margin_adv", "confidence_adv", "forwards", "backwards", "seconds", "fault"),
)
WHOLE = ("index", "label", "target", "pred_clean", "pred_adv", "pred_8bit", "pred_png", "fault")
# the least that a column may hold; nan is no number and passes
LEAST = {
    **dict.fromkeys(("index", "label", "fault", "forwards", "backwards", "seconds"), 0),
    **dict.fromkeys(("l0", "l0_pixels", "l1", "l2", "linf"), 0),
    **dict.fromkeys(("confidence_clean", "confidence_adv"), 0),
    **dict.fromkeys(("target", "pred_clean"), -1),
    **dict.fromkeys(("pred_adv", "pred_8bit", "pred_png"), -2),
}
SLACK = 1e-4  # of a radius: distances are measured in float64, images are float32
NAME = re.compile(r"[0-9A-Za-z_]{1,64}")  # of a file; a key that we write is 64 hex digits
HASH = re.compile(r"[0-9a-f]{64}")


def check_entries(cells: Iterable[Any]) -> None:
    """Whether each cell of a record names a file and its hash, and the file lies in the folder."""
    for cell in cells:
        if not isinstance(cell, dict):
            raise ValueError("a cell is no table")
        key = cell.get("key")
        if not isinstance(key, str) or not NAME.fullmatch(key):
            raise ValueError("a cell has no key of letters and digits")
        hashes = [cell.get("sha256")] + [cell[name] for name in ("pictures",) if name in cell]
        if not all(isinstance(found, str) and HASH.fullmatch(found) for found in hashes):
            raise ValueError(f"the cell {key} has no hash of 64 hex digits")


def check_run(run: Run) -> None:
    """Whether the parts of a run are of the right types and about the same images."""
    check_facts(run)
    check_columns(run.clean, CLEAN if run.clean else (), "the clean images")
    if run.clean and len(np.unique(run.clean["index"])) < len(run.clean["index"]):
        raise ValueError("the clean images have a position twice")
    clean: dict[str | None, Columns] = {None: run.clean}
    for defended in run.defenses:
        check_defended(defended, run.clean)
        clean[str(defended.spec)] = defended.clean
    for outcome in run.outcomes:
        defense = None if outcome.defense is None else str(outcome.defense)
        check_outcome(outcome, clean.get(defense, run.clean))


def check_facts(run: Run) -> None:
    """Types of what the record says besides its cells."""
    for name in ("attacks", "cells", "defenses"):
        asked = run.config.get(name) or []
        if not isinstance(asked, list) or not all(isinstance(each, str) for each in asked):
            raise ValueError(f"{name} is no list of names")
    if not all(isinstance(reason, str) for reason in run.failures.values()):
        raise ValueError("a failure has no reason")
    if not math.isfinite(run.seconds) or run.seconds < 0:
        raise ValueError("the seconds are no time")
    for finding in run.findings:
        texts = (finding.code, finding.message, finding.cell or "")
        if not all(isinstance(text, str) for text in texts) or not isinstance(finding.grave, bool):
            raise ValueError("a finding is none")


def check_defended(defended: Defended, clean: Columns) -> None:
    """Whether the clean images behind a defense are those of the run."""
    title = "the clean images behind a defense"
    check_spec(defended.spec, title)
    if defended.kind not in ("model", "detector") or not isinstance(defended.facts, dict):
        raise ValueError(f"{title} are of no kind")
    needed = ("score", "flagged") if defended.kind == "detector" else ()
    check_columns(defended.clean, (*CLEAN, *needed), title)
    check_same_images(defended.clean, clean, title)


def check_outcome(outcome: Outcome, clean: Columns) -> None:
    """Whether a cell is an attack on the images of the run, inside its ball."""
    check_spec(outcome.attack, "an attack")
    title = f"the cell {outcome.attack}"
    if outcome.defense is not None:
        check_spec(outcome.defense, title)
    norm, eps, targeted = outcome.threat
    if not isinstance(norm, str) or not isinstance(targeted, bool):
        raise ValueError(f"{title} has no threat")
    if eps is not None and (type(eps) not in (int, float) or not eps >= 0):
        raise ValueError(f"{title} has a radius that is no number from 0 up")
    texts = (outcome.knowledge, outcome.role, *outcome.notes)
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{title} says of itself what is no text")
    if not isinstance(outcome.resolved, dict) or not isinstance(outcome.adaptive, bool):
        raise ValueError(f"{title} has no parameters")
    c = outcome.columns
    check_columns(c, ATTACKED, title)
    if outcome.role == "attack":
        check_same_images(c, clean, title)
    elif clean and not np.isin(c["id"], clean["id"]).all():
        raise ValueError(f"{title} is about other images")
    if eps is not None and norm in ("l1", "l2", "linf"):
        far = c[norm][c["attacked"]]
        if (far > eps * (1 + SLACK) + 1e-6).any():
            raise ValueError(f"{title} has images outside the ball of its threat")


def check_spec(spec: Any, title: str) -> None:
    """Whether name and parameters are some."""
    if not isinstance(spec.name, str) or not isinstance(spec.parameters, dict):
        raise ValueError(f"{title} has no name or no parameters")


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
        if name in LEAST and (values < LEAST[name]).any():
            raise ValueError(f"{title} have a column {name} with values below {LEAST[name]}")
        if name.startswith("confidence") and (values > 1 + SLACK).any():
            raise ValueError(f"{title} have a column {name} with values above 1")


def list_kinds(name: str) -> str:
    """The kinds of NumPy types that a column may have."""
    if name == "id":
        return "u"
    if name in ("attacked", "flagged"):
        return "b"
    return "iu" if name in WHOLE else "fiub"


def check_same_images(columns: Columns, clean: Columns, title: str) -> None:
    """Whether the rows are the images of the run, in their order."""
    for name in IMAGES:
        if name not in clean or not np.array_equal(columns[name], clean[name]):
            raise ValueError(f"{title} are not about the images of the run: {name} differs")
