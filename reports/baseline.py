"""A baseline: the verdicts of a run, image by image.

It holds what a later run is compared with and what tells whether that is fair: ids of the images,
one bit per image and cell, settings, hashes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from robusteval.errors import NothingEvaluated, RunError, UsageError
from robusteval.registry import parse
from robusteval.registry.signatures import read_number
from robusteval.runs import metrics, statistics
from robusteval.runs.plain import to_plain
from robusteval.runs.storage import differences
from robusteval.runs.types import Defended, Flags, Outcome, Run, Spec, Threat, format_value

from .formatting import format_count, format_percent, name_file

Ids = np.ndarray[Any, np.dtype[np.uint64]]


@dataclass(frozen=True)
class ModelIdentity:
    """What tells one model from another."""

    name: str | None  # of its file
    arch: str | None
    sha256: str | None


@dataclass(frozen=True)
class DataIdentity:
    """What tells one data set from another."""

    name: str | None
    sha256: str | None


class BaselineCell(NamedTuple):
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
        return self.attack + say_behind(self.defense) + ("" if self.adaptive else " (oblivious)")

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides the verdicts besides model, images and seed."""
        return {
            "attack": parse(self.attack).name,
            "threat": str(self.threat),
            "defense": self.defense and str(canonicalize(self.defense)),
            "adaptive": self.adaptive,
            **self.resolved,
        }


class BaselineDefense(NamedTuple):
    """What a defense makes of the images as they are."""

    defense: str
    fpr: float | None  # the rate of false alarms that a detector was set to
    clean: Flags  # (n,): right, and no alarm


@dataclass(frozen=True)
class Baseline:
    """The verdicts of a run over the same n images everywhere."""

    created: str  # when the run was made
    model: ModelIdentity
    data: DataIdentity
    seed: int | None
    versions: dict[str, str]
    ids: Ids  # (n,)
    clean: Flags  # (n,): right without attack and defense
    cells: tuple[BaselineCell, ...]
    defenses: tuple[BaselineDefense, ...]

    def find_defense(self, defense: str) -> BaselineDefense | None:
        """What is known of a defense."""
        return next((known for known in self.defenses if known.defense == defense), None)

    def clean_behind(self, defense: str | None) -> Flags | None:
        """Clean verdicts ``(n,)`` behind a defense, or without one; None if there are none."""
        if defense is None:
            return self.clean
        known = self.find_defense(defense)
        return known and known.clean


def canonicalize(text: str) -> Spec:
    """A spec such that two spellings of the same one are equal."""
    spec = parse(text)
    return Spec(spec.name, normalize_parameters(spec.parameters))


def normalize_parameters(parameters: dict[str, Any]) -> dict[str, Any]:
    """Parameters by name, numbers as floats whether read or still as text."""
    return {name: normalize_value(parameters[name]) for name in sorted(parameters)}


def normalize_value(value: Any) -> Any:
    """A number as a float, anything else as its text."""
    text = format_value(value)
    try:
        return read_number(text)
    except ValueError:
        return text


def say_behind(defense: str | None) -> str:
    """A defense as an addition to what stands before it; empty for none."""
    return f" behind {defense}" if defense else ""


def build_baseline(run: Run) -> Baseline:
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
    return collect_verdicts(run)


def check_finished(run: Run) -> None:
    """RunError if the run has not all that was asked of it, NothingEvaluated if it has nothing."""
    if not run.finished:
        raise RunError(f"the run is {run.explain_incompleteness()}")
    right = metrics.accuracy(run.clean)
    if not right.n:
        raise NothingEvaluated("nothing was evaluated: the run looked at no image")
    if not right.k:
        raise NothingEvaluated(
            f"nothing was evaluated: none of {format_count(right.n, 'image')} was classified"
            " correctly to begin with"
        )


def collect_verdicts(run: Run) -> Baseline:
    """What a baseline of this run holds, whether or not it should become one.

    An image that is in the data several times is in it once.
    """
    run = run.keep_different()
    return Baseline(
        created=run.created,
        model=ModelIdentity(
            name=name_file(run.model.get("file")) or None,
            arch=run.model.get("arch"),
            sha256=run.model.get("sha256"),
        ),
        data=DataIdentity(name_file(run.data.get("name")) or None, run.data.get("sha256")),
        seed=run.config.get("seed"),
        versions=dict(sorted(run.environment.items())),
        ids=run.clean["id"],
        clean=metrics.find_right(run.clean),
        cells=tuple(build_cell(outcome) for outcome in run.attacks),
        defenses=tuple(build_clean_verdicts(defended) for defended in run.defenses),
    )


def build_cell(outcome: Outcome) -> BaselineCell:
    """The verdicts of one attack, on its images as returned, in float."""
    return BaselineCell(
        attack=str(outcome.attack),
        # through JSON and back, so that it equals what was read from a file
        resolved=json.loads(json.dumps(outcome.resolved or outcome.attack.parameters)),
        threat=outcome.threat,
        defense=None if outcome.defense is None else str(outcome.defense),
        adaptive=outcome.adaptive,
        robust=outcome.attacked & ~outcome.success(),
    )


def build_clean_verdicts(defended: Defended) -> BaselineDefense:
    """The clean verdicts of one defense."""
    fpr = defended.facts.get("fpr")
    return BaselineDefense(str(defended.spec), fpr, metrics.find_right(defended.clean))


def list_changes(old: Baseline | None, new: Baseline) -> list[str]:
    """What an update changes, a line each; nothing if it changes nothing but the date."""
    if old is None:
        first = f"new: {format_count(len(new.ids), 'image')} of {new.data.name}, seed {new.seed}"
        return [first, *(f"{name}: {rate}" for name, rate in write_rates(new).items())]
    return [*list_changed_circumstances(old, new), *list_changed_results(old, new)]


def list_changed_circumstances(old: Baseline, new: Baseline) -> Iterator[str]:
    """What the numbers stand on, where it differs."""
    for what, before, after in (
        ("model", old.model, new.model),
        ("data", old.data, new.data),
        ("seed", old.seed, new.seed),
        ("versions", old.versions, new.versions),
    ):
        for line in differences(to_plain(before), to_plain(after), what):
            yield line.replace(" there, ", " -> ").removesuffix(" here")
    if not has_same_images(old, new):
        shared = len(np.intersect1d(old.ids, new.ids))
        yield f"images: {len(old.ids):,} -> {len(new.ids):,}, of which {shared:,} are in both"


def list_changed_results(old: Baseline, new: Baseline) -> Iterator[str]:
    """Accuracies before and after, and cells that come, go or are made otherwise."""
    before, after = write_rates(old), write_rates(new)
    flips = count_flips(old, new) if has_same_images(old, new) else {}
    for name in {**before, **after}:
        if name not in after:
            yield f"{name}: {before[name]} -> gone"
        elif name not in before:
            yield f"{name}: new, {after[name]}"
        elif before[name] != after[name] or any(flips.get(name, ())):
            said = "{} lost, {} gained".format(*flips[name]) if name in flips else "other images"
            yield f"{name}: {before[name]} -> {after[name]} ({said})"
    for known in new.defenses:
        there = old.find_defense(known.defense)
        if there is not None and there.fpr != known.fpr:
            yield f"{known.defense}.fpr: {there.fpr} -> {known.fpr}"
    cells = {cell.title: cell for cell in old.cells}
    for cell in new.cells:
        if cell.title in cells:
            before_it = cells[cell.title].settings
            for line in differences(before_it, cell.settings, cell.title):
                yield line.replace(" there, ", " -> ").removesuffix(" here")


def collect_bits(baseline: Baseline) -> dict[str, Flags]:
    """Everything there is a verdict on, by its name."""
    return {
        "clean": baseline.clean,
        **{f"clean{say_behind(known.defense)}": known.clean for known in baseline.defenses},
        **{cell.title: cell.robust for cell in baseline.cells},
    }


def write_rates(baseline: Baseline) -> dict[str, str]:
    """The accuracies in words, by what they are of."""
    return {
        name: format_percent(metrics.rate(bits)) for name, bits in collect_bits(baseline).items()
    }


def count_flips(old: Baseline, new: Baseline) -> dict[str, tuple[int, int]]:
    """How many images changed either way, by what they were judged by; for the same images."""
    before, after = collect_bits(old), collect_bits(new)
    there, here = order_by_id(old.ids), order_by_id(new.ids)
    found = {}
    for name in before.keys() & after.keys():
        pairs = statistics.count_pairs(before[name][there], after[name][here])
        found[name] = (pairs.lost, pairs.gained)
    return found


def has_same_images(old: Baseline, new: Baseline) -> bool:
    """Whether both are about the same images, in whatever order."""
    return np.array_equal(np.sort(old.ids), np.sort(new.ids))


def order_by_id(ids: Ids) -> np.ndarray[Any, np.dtype[np.intp]]:
    """Positions by id, so that the same images stand in the same places."""
    return np.argsort(ids, kind="stable")


def find_robust(cells: Sequence[BaselineCell]) -> Flags:
    """The images ``(n,)`` that hold out against every one of these attacks."""
    held: Flags = np.logical_and.reduce([cell.robust for cell in cells])
    return held
