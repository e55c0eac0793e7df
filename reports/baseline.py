"""A baseline: the verdicts of a run, image by image, in a small file for the repository.

It holds what a later run is compared with and what tells whether that is fair: ids of the images,
one bit per image and cell, settings, hashes. The text depends on the run alone.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from robusteval.errors import NothingEvaluated, RunError, UsageError
from robusteval.registry import parse, read_number
from robusteval.runs import metrics, statistics
from robusteval.runs.storage import differences, digest
from robusteval.runs.types import Defended, Flags, Outcome, Run, Spec, Threat, show

from .formatting import base, percent, plural

KIND = "robusteval baseline"
VERSION = 1

Ids = np.ndarray[Any, np.dtype[np.uint64]]


class Cell(NamedTuple):
    """What an attack left of each image."""

    attack: str  # as in the run
    resolved: dict[str, Any]  # its parameters with all defaults, in JSON types
    threat: Threat
    defense: str | None  # None: the model as it is
    adaptive: bool
    robust: Flags  # (n,): right at first and still after the attack

    @property
    def title(self) -> str:
        """The cell in words."""
        return self.attack + behind(self.defense) + ("" if self.adaptive else " (oblivious)")

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides the verdicts besides model, images and seed."""
        return {
            "attack": parse(self.attack).name,
            "threat": str(self.threat),
            "defense": self.defense and str(canonical(self.defense)),
            "adaptive": self.adaptive,
            **self.resolved,
        }


class Shield(NamedTuple):
    """What a defense makes of the images as they are."""

    defense: str
    fpr: float | None  # the rate of false alarms that a detector was set to
    clean: Flags  # (n,): right, and no alarm


@dataclass(frozen=True)
class Baseline:
    """The verdicts of a run over the same n images everywhere."""

    created: str  # when the run was made
    model: dict[str, Any]  # name, arch, sha256
    data: dict[str, Any]  # name, sha256
    seed: int | None
    versions: dict[str, str]
    ids: Ids  # (n,)
    clean: Flags  # (n,): right without attack and defense
    cells: tuple[Cell, ...]
    shields: tuple[Shield, ...]

    def shield(self, defense: str) -> Shield | None:
        """What is known of a defense."""
        return next((shield for shield in self.shields if shield.defense == defense), None)

    def clean_of(self, defense: str | None) -> Flags | None:
        """Clean verdicts ``(n,)`` behind a defense, or without one; None if there are none."""
        shield = self.shield(defense) if defense else None
        return self.clean if defense is None else shield and shield.clean


def canonical(text: str) -> Spec:
    """A spec such that two spellings of the same one are equal."""
    spec = parse(text)
    return Spec(spec.name, plain(spec.parameters))


def plain(parameters: dict[str, Any]) -> dict[str, Any]:
    """Parameters by name, numbers as floats whether read or still as text."""
    return {name: plain_value(parameters[name]) for name in sorted(parameters)}


def plain_value(value: Any) -> Any:
    """A number as a float, anything else as its text."""
    text = show(value)
    try:
        return read_number(text)
    except ValueError:
        return text


def behind(defense: str | None) -> str:
    """A defense as an addition to what stands before it; empty for none."""
    return f" behind {defense}" if defense else ""


def baseline_of(run: Run) -> Baseline:
    """The baseline that a run makes.

    RunError if the run is incomplete, NothingEvaluated if there is nothing in it, UsageError if
    its model is not fed as it was trained, so that its numbers mean nothing.
    """
    check_finished(run)
    misfed = [finding.message for finding in run.findings if finding.misfed]
    if misfed:
        raise UsageError(
            f"no baseline is made of numbers that are not to be used: {' '.join(misfed)}"
        )
    return verdicts_of(run)


def check_finished(run: Run) -> None:
    """RunError if the run has not all that was asked of it, NothingEvaluated if it has nothing."""
    if run.status != "complete" or run.failures:
        missing = "".join(f"; {attack}: {why}" for attack, why in run.failures.items())
        raise RunError(f"the run is not complete: give its command again to finish it{missing}")
    right = metrics.accuracy(run.clean)
    if not right.n:
        raise NothingEvaluated("nothing was evaluated: the run looked at no image")
    if not right.k:
        raise NothingEvaluated(
            f"nothing was evaluated: none of {plural(right.n, 'image')} was classified correctly to"
            " begin with"
        )


def verdicts_of(run: Run) -> Baseline:
    """What a baseline of this run holds, whether or not it should become one."""
    return Baseline(
        created=run.created,
        model={
            "name": base(run.model.get("file")) or None,
            "arch": run.model.get("arch"),
            "sha256": run.model.get("sha256"),
        },
        data={"name": base(run.data.get("name")) or None, "sha256": run.data.get("sha256")},
        seed=run.config.get("seed"),
        versions=dict(sorted(run.environment.items())),
        ids=run.clean["id"],
        clean=metrics.find_right(run.clean),
        cells=tuple(cell_of(outcome) for outcome in run.attacks),
        shields=tuple(shield_of(defended) for defended in run.defenses),
    )


def cell_of(outcome: Outcome) -> Cell:
    """The verdicts of one attack, on its images as returned, in float."""
    return Cell(
        attack=str(outcome.attack),
        # through JSON and back, so that it equals what was read from a file
        resolved=json.loads(json.dumps(outcome.resolved or outcome.attack.parameters)),
        threat=outcome.threat,
        defense=None if outcome.defense is None else str(outcome.defense),
        adaptive=outcome.adaptive,
        robust=outcome.attacked & ~outcome.success(),
    )


def shield_of(defended: Defended) -> Shield:
    """The clean verdicts of one defense."""
    fpr = defended.facts.get("fpr")
    return Shield(str(defended.spec), fpr, metrics.find_right(defended.clean))


def to_text(baseline: Baseline) -> str:
    """The baseline as JSON text: ASCII, the same for the same run, with a digest of itself."""
    record = {
        "kind": KIND,
        "version": VERSION,
        "created": baseline.created,
        "model": baseline.model,
        "data": baseline.data,
        "seed": baseline.seed,
        "versions": baseline.versions,
        "images": len(baseline.ids),
        "clean": as_text(baseline.clean),
        "cells": [
            {
                **cell._asdict(),
                "threat": cell.threat._asdict(),
                "robust": as_text(cell.robust),
            }
            for cell in baseline.cells
        ],
        "defenses": [
            {**shield._asdict(), "clean": as_text(shield.clean)} for shield in baseline.shields
        ],
        "ids": encoded(baseline.ids.astype("<u8").tobytes()),
    }
    return json.dumps({**record, "digest": digest(record)}, indent=1, allow_nan=False) + "\n"


def encoded(content: bytes) -> str:
    """Bytes as text."""
    return base64.b64encode(content).decode("ascii")


def as_text(bits: Flags) -> str:
    """A mask ``(n,)`` as text, eight images to a byte, the first in its highest bit."""
    return encoded(np.packbits(bits).tobytes())


def as_bits(text: str, n: int) -> Flags:
    """The reverse of `as_text`; ValueError if it is not of n images."""
    content = np.frombuffer(base64.b64decode(text, validate=True), dtype=np.uint8)
    if len(content) != (n + 7) // 8:
        raise ValueError(f"{len(content)} bytes for {n} images")
    bits: Flags = np.unpackbits(content, count=n).astype(np.bool_)
    return bits


def read_baseline(path: Path) -> Baseline:
    """The baseline in a file.

    UsageError if there is none, if it was written by a later version or changed by hand, or if it
    is damaged.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"cannot read the baseline {path} ({error.strerror or error}):"
            " make one with `robusteval baseline update RUN`"
        ) from None
    except (ValueError, RecursionError):
        raise UsageError(f"{path} is not a baseline, or it is damaged: it is no JSON") from None
    if not isinstance(record, dict) or record.get("kind") != KIND:
        raise UsageError(
            f"{path} is not a baseline: make one with `robusteval baseline update RUN`"
        )
    version = record.get("version")
    if isinstance(version, int) and version > VERSION:
        raise UsageError(
            f"{path} has version {version}, this version of robusteval reads {VERSION}: install a"
            " newer one, or make the baseline again"
        )
    said = record.pop("digest", None)
    if said is None or said != digest_of(record):
        raise UsageError(
            f"{path} was changed after it was made, or it is damaged: restore it, or make it again"
            " with `robusteval baseline update RUN`"
        )
    try:
        return decoded(record)
    except (AttributeError, KeyError, TypeError, ValueError, UsageError):
        raise UsageError(
            f"{path} is damaged: its parts do not fit together; make it again with"
            " `robusteval baseline update RUN`"
        ) from None


def digest_of(record: dict[str, Any]) -> str | None:
    """The digest of a record; None if there are values in it that no record can have."""
    try:
        return digest(record)
    except (ValueError, RecursionError):
        return None


def decoded(record: dict[str, Any]) -> Baseline:
    """The baseline in a record; some error of Python's if it does not fit together."""
    ids = np.frombuffer(base64.b64decode(record["ids"], validate=True), dtype="<u8")
    n = len(ids)
    if record["version"] != VERSION or record["images"] != n or n == 0:
        raise ValueError(f"{n} images")
    baseline = Baseline(
        created=str(record["created"]),
        model=dict(record["model"]),
        data=dict(record["data"]),
        seed=record["seed"],
        versions={str(name): str(version) for name, version in record["versions"].items()},
        ids=ids.astype(np.uint64),
        clean=as_bits(record["clean"], n),
        cells=tuple(
            Cell(
                **{
                    **cell,
                    "resolved": dict(cell["resolved"]),
                    "threat": Threat(**cell["threat"]),
                    "robust": as_bits(cell["robust"], n),
                }
            )
            for cell in record["cells"]
        ),
        shields=tuple(
            Shield(**{**shield, "clean": as_bits(shield["clean"], n)})
            for shield in record["defenses"]
        ),
    )
    for cell in baseline.cells:
        digest(cell.settings)  # its parts can be read
    return baseline


def changes(old: Baseline | None, new: Baseline) -> list[str]:
    """What an update changes, a line each; nothing if it changes nothing but the date."""
    if old is None:
        first = f"new: {plural(len(new.ids), 'image')} of {new.data['name']}, seed {new.seed}"
        return [first, *(f"{name}: {rate}" for name, rate in rates(new).items())]
    return [*circumstances(old, new), *results(old, new)]


def circumstances(old: Baseline, new: Baseline) -> Iterator[str]:
    """What the numbers stand on, where it differs."""
    for what, before, after in (
        ("model", old.model, new.model),
        ("data", old.data, new.data),
        ("seed", old.seed, new.seed),
        ("versions", old.versions, new.versions),
    ):
        for line in differences(before, after, what):
            yield line.replace(" there, ", " -> ").removesuffix(" here")
    if not same_images(old, new):
        shared = len(np.intersect1d(old.ids, new.ids))
        yield f"images: {len(old.ids):,} -> {len(new.ids):,}, of which {shared:,} are in both"


def results(old: Baseline, new: Baseline) -> Iterator[str]:
    """Accuracies before and after, and cells that come, go or are made otherwise."""
    before, after = rates(old), rates(new)
    flips = lost_and_gained(old, new) if same_images(old, new) else {}
    for name in {**before, **after}:
        if name not in after:
            yield f"{name}: {before[name]} -> gone"
        elif name not in before:
            yield f"{name}: new, {after[name]}"
        elif before[name] != after[name] or any(flips.get(name, ())):
            said = "{} lost, {} gained".format(*flips[name]) if name in flips else "other images"
            yield f"{name}: {before[name]} -> {after[name]} ({said})"
    cells = {cell.title: cell for cell in old.cells}
    for cell in new.cells:
        if cell.title in cells:
            there = cells[cell.title].settings
            for line in differences(there, cell.settings, cell.title):
                yield line.replace(" there, ", " -> ").removesuffix(" here")


def verdicts(baseline: Baseline) -> dict[str, Flags]:
    """Everything there is a verdict on, by its name."""
    return {
        "clean": baseline.clean,
        **{f"clean{behind(shield.defense)}": shield.clean for shield in baseline.shields},
        **{cell.title: cell.robust for cell in baseline.cells},
    }


def rates(baseline: Baseline) -> dict[str, str]:
    """The accuracies in words, by what they are of."""
    return {
        name: percent(metrics.rate(bits)._asdict()) for name, bits in verdicts(baseline).items()
    }


def lost_and_gained(old: Baseline, new: Baseline) -> dict[str, tuple[int, int]]:
    """How many images changed either way, by what they were judged by; for the same images."""
    before, after = verdicts(old), verdicts(new)
    there, here = in_order(old.ids), in_order(new.ids)
    found = {}
    for name in before.keys() & after.keys():
        pairs = statistics.count_pairs(before[name][there], after[name][here])
        found[name] = (pairs.lost, pairs.gained)
    return found


def same_images(old: Baseline, new: Baseline) -> bool:
    """Whether both are about the same images, in whatever order."""
    return np.array_equal(np.sort(old.ids), np.sort(new.ids))


def in_order(ids: Ids) -> np.ndarray[Any, np.dtype[np.intp]]:
    """Positions by id, so that the same images stand in the same places."""
    return np.argsort(ids, kind="stable")


def all_robust(cells: Sequence[Cell]) -> Flags:
    """The images ``(n,)`` that hold out against every one of these attacks."""
    held: Flags = np.logical_and.reduce([cell.robust for cell in cells])
    return held
