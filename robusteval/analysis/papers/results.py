"""What was measured for a paper, found by the short names of its file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from robusteval.analysis.papers.declaration import Reading
from robusteval.analysis.papers.detected import find_detected
from robusteval.analysis.papers.explained import find_explained
from robusteval.analysis.papers.masked import MaskWorth, find_masked
from robusteval.analysis.papers.measures import Measure, Measured, find_measure
from robusteval.analysis.papers.on_maps import MapAttack, find_on_maps
from robusteval.analysis.papers.operating_points import OperatingPoint, find_point
from robusteval.analysis.papers.over_seeds import find_over_seeds, stack_changes
from robusteval.analysis.papers.smallest_settings import take_smallest
from robusteval.runs.detector_record import Combination
from robusteval.runs.explanation_record import ExplanationRecord
from robusteval.runs.metrics import find_right, rate
from robusteval.runs.statistics import Difference
from robusteval.runs.types import Outcome, Run

NO_HARDENED = "needs a network that was trained for it: name one by --hardened"


class MissingError(Exception):
    """A figure that a run does not give; the message says why."""


@dataclass(frozen=True)
class Results:
    """The run of a paper, and how its cells are found by their short names.

    Parameters
    ----------
    run : Run
        What was run.
    attacks : mapping
        For each short name the attacks as they are called in the run, several of a sweep.
    missing : mapping
        For each attack that has no result the reason.
    explanations : mapping
        Of attacks by short name what they do region by region.
    detectors : mapping
        Detectors of several interpreters by name.
    behind : mapping
        Attacks on a detector by short name.
    hardened : Run, optional
        The same attacks on a network that was trained as the paper proposes.
    again : mapping
        Of attacks as they are called in the run their results with other seeds.
    on_maps, on_hardened_maps : mapping
        Attacks on the maps of either network by short name.
    masked : mapping
        What masks of units are worth, by short name.
    """

    run: Run
    attacks: Mapping[str, tuple[str, ...]]
    missing: Mapping[str, str]
    explanations: Mapping[str, ExplanationRecord] = field(default_factory=dict)
    detectors: Mapping[str, Combination] = field(default_factory=dict)
    behind: Mapping[str, Outcome] = field(default_factory=dict)
    hardened: Run | None = None
    again: Mapping[str, Sequence[Outcome]] = field(default_factory=dict)
    on_maps: Mapping[str, MapAttack] = field(default_factory=dict)
    on_hardened_maps: Mapping[str, MapAttack] = field(default_factory=dict)
    masked: Mapping[str, MaskWorth] = field(default_factory=dict)

    def list_outcomes(self, name: str, *, hardened: bool = False) -> list[Outcome]:
        """The results of an attack in all its settings; MissingError if there is none."""
        if name not in self.attacks:
            raise MissingError("not run at this size")
        run = self.hardened if hardened else self.run
        if run is None:
            raise MissingError(NO_HARDENED)
        done = {str(o.attack): o for o in run.attacks if o.defense is None}
        found = [done[spec] for spec in self.attacks[name] if spec in done]
        if not found:
            reasons = [self.missing[spec] for spec in self.attacks[name] if spec in self.missing]
            raise MissingError(reasons[0] if reasons else "not finished")
        return found

    def choose_outcome(self, reading: Reading) -> Outcome:
        """The result that a figure is read from: of a sweep the strongest that `at` allows.

        MissingError if there is none.
        """
        if reading.measure.startswith("behind_"):
            if reading.attack not in self.behind:
                reason = self.missing.get(f"behind {reading.attack}", "not run at this size")
                raise MissingError(reason)
            return self.behind[reading.attack]
        found = self.list_outcomes(reading.attack, hardened=reading.hardened)
        if reading.smallest:
            try:
                found = [take_smallest(found, reading.smallest)]
            except ValueError as error:
                raise MissingError(str(error)) from None
        for measure, least in reading.at.items():
            means = [find_measure(measure).summarize(outcome).value for outcome in found]
            kept = [o for o, mean in zip(found, means, strict=True) if mean >= least]
            if not kept:
                nearest = max(means)
                raise MissingError(
                    f"no setting that was run keeps a mean {measure.upper()} of {least:g}"
                    f" (the highest is {nearest:.4g})"
                )
            found = [min(kept, key=lambda o: find_measure(measure).summarize(o).value)]
        return found[-1]

    def name_column(self, measure: str) -> str:
        """A measure of maps by the interpreter as it was run: with parameters, where it has any."""
        kind, _, interpreter = measure.partition(":")
        known = self.run.config.get("interpreters", ())
        same = [each for each in known if each.partition(":")[0] == interpreter]
        return f"{kind}:{same[0]}" if interpreter not in known and len(same) == 1 else measure

    def measure(self, reading: Reading) -> tuple[str, Measured]:
        """The attack that a figure is read from, and the figure; MissingError if there is none."""
        explained = find_explained(reading.measure)
        if explained is not None:
            record = self.explanations.get(reading.attack)
            if record is None:
                raise MissingError(self.missing.get(f"explain {reading.attack}", "not explained"))
            found = explained.read(record)
            if found is None:
                raise MissingError("no image, or no map of this network, to measure it on")
            return record.attack, found
        detected = find_detected(reading.measure)
        if detected is not None:
            detector = self.detectors.get(reading.attack)
            if detector is None:
                reason = self.missing.get(f"detect {reading.attack}", "not fitted at this size")
                raise MissingError(reason)
            known = detected.read(detector)
            if known is None:
                raise MissingError("too few images of the classes held out")
            return ", ".join(detector.attacks), known
        on_maps = find_on_maps(reading.measure)
        if on_maps is not None:
            led = self.choose_map_attack(reading)
            return led.name, check_found(on_maps.read(led))
        masked = find_masked(reading.measure)
        if masked is not None:
            worth = self.masked.get(reading.attack)
            if worth is None:
                reason = self.missing.get(f"mask {reading.attack}", "not run at this size")
                raise MissingError(reason)
            return worth.name, check_found(masked.read(worth))
        outcome = self.choose_outcome(reading)
        over_seeds = find_over_seeds(reading.measure)
        if over_seeds is not None:
            others = self.again.get(str(outcome.attack), ())
            if not others:
                raise MissingError("run with one seed alone")
            changes = stack_changes([outcome, *others])
            return str(outcome.attack), check_found(over_seeds.read(changes))
        if reading.measure == "transfer":
            return str(outcome.attack), self.measure_transfer(outcome)
        return str(outcome.attack), self.summarize(outcome, reading.measure)

    def choose_point(self, reading: Reading) -> OperatingPoint:
        """The same at exactly the level that is named: one of two settings, by lot.

        Only what an attacker wants is read so, see `find_point`.
        """
        kept = self.choose_outcome(reading)
        if reading.smallest or not reading.at:  # smallest settings are of all settings already
            return OperatingPoint(kept)
        settings = self.list_outcomes(reading.attack, hardened=reading.hardened)
        return find_point(settings, kept, reading.measure, reading.at)

    def choose_map_attack(self, reading: Reading) -> MapAttack:
        """The attack on maps that a figure is read from; MissingError if there is none."""
        if reading.hardened and self.hardened is None:
            raise MissingError(NO_HARDENED)
        of_maps = self.on_hardened_maps if reading.hardened else self.on_maps
        if reading.attack not in of_maps:
            raise MissingError(self.missing.get("maps", "not run at this size"))
        return of_maps[reading.attack]

    def compare(self, measure: Measure, one: OperatingPoint, other: OperatingPoint) -> Difference:
        """By how much a figure is larger on the same images; MissingError if these are others."""
        if not np.array_equal(one.kept.columns["id"], other.kept.columns["id"]):
            raise MissingError("both were not run on the same images")
        return one.compare(measure, other)

    def measure_transfer(self, outcome: Outcome) -> Measured:
        """On how many of the images that both have right the first target is fooled, too."""
        if not self.run.receivers:
            raise MissingError("needs the images on a second network: name one by --target")
        receiver = self.run.receivers[0]
        judged = [
            each
            for each in self.run.transfers
            if (str(each.attack), each.defense) == (str(outcome.attack), receiver.spec)
        ]
        right = find_right(self.run.clean) & find_right(receiver.clean)
        if not judged or not right.any():
            raise MissingError("no image that both networks have right")
        found = rate(judged[0].success()[right])
        return Measured(found.value, *found.interval, found.n)

    def summarize(self, outcome: Outcome, name: str) -> Measured:
        """A figure of one result; MissingError where it is not known."""
        name = self.name_column(name)
        measured = find_measure(name).summarize(outcome)
        if not measured.n or math.isnan(measured.value):
            _, _, interpreter = name.partition(":")
            known = self.run.config.get("interpreters", ())
            if interpreter and interpreter not in known:
                raise MissingError(self.missing.get(interpreter, f"no maps of {interpreter}"))
            raise MissingError("no image that it could be measured on")
        return check_found(measured)


def check_found(measured: Measured) -> Measured:
    """The figure, unless there was no image for it or it has no end: MissingError."""
    if not measured.n:
        raise MissingError("no image that it could be measured on")
    if math.isinf(measured.value):
        raise MissingError("half of the images are not fooled, or more: a median has no end")
    return measured
