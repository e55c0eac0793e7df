"""What a gate saw, and what follows from it: a share, a change on pairs, or that it saw nothing."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from robusteval.runs import statistics
from robusteval.runs.statistics import Pairs, Rate

from .formatting import format_count, format_rate
from .measures import build_rate
from .record import GateOutcome

# where what held before is too little for its loss to be told
NO_GUARD = "the gate guards nothing; a smaller radius, or more images, give it something to lose"


class Level(NamedTuple):
    """The level of all tests together, and the strictest that one of them may have to meet."""

    alpha: float
    least: float


class Conclusion(NamedTuple):
    """What a gate says; None where a number has no meaning for its kind."""

    outcome: GateOutcome
    reason: str
    value: float | None = None  # the share, or the drop, that was seen
    low: float | None = None  # its 95 % interval: Wilson's, or Tango's of a drop
    high: float | None = None
    p: float | None = None
    lost: int | None = None
    gained: int | None = None
    detectable: float | None = None  # the smallest drop this sample could have shown


class Unmet(NamedTuple):
    """Something is missing or cannot be compared: the gate has failed."""

    reason: str
    p: float | None = None

    def conclude(self, p: float | None, level: Level) -> Conclusion:
        """What follows, given the corrected p-value."""
        return Conclusion("failed", self.reason)


class Undecided(NamedTuple):
    """There is no image to look at: the gate says nothing."""

    reason: str
    p: float | None = None

    def conclude(self, p: float | None, level: Level) -> Conclusion:
        """What follows, given the corrected p-value."""
        return Conclusion("inconclusive", self.reason)


class ShareEvidence(NamedTuple):
    """A share that must not be below a floor."""

    rate: Rate
    floor: float
    noun: str  # what it is a share of
    what: str  # what to call the share

    @property
    def p(self) -> float | None:
        """Exact one-sided test that the true share is at least the floor."""
        rate = self.rate
        return statistics.at_most(rate.k, rate.n, self.floor) if rate.n else None

    def conclude(self, p: float | None, level: Level) -> Conclusion:
        """What follows, given the corrected p-value."""
        rate, floor = self.rate, show_share(self.floor)
        if p is None:
            reason = f"There is no {self.noun} to measure it on."
            return Conclusion("inconclusive", reason)
        shown = format_rate(build_rate(rate))
        seen = f"{self.what} {shown} of {rate.n:,}"
        numbers = (rate.value, rate.interval.low, rate.interval.high, p)
        if rate.interval.low >= self.floor:
            reason = f"{seen}: the interval lies at or above {floor}."
            return Conclusion("passed", reason, *numbers)
        if p < level.alpha:
            reason = f"{seen}: below {floor}, and not by chance ({show_p(p)})."
            return Conclusion("failed", reason, *numbers)
        more = self.say_how_many_decide(level)
        reason = f"{seen}: chance leaves open whether it is at least {floor}; {more}."
        return Conclusion("inconclusive", reason, *numbers)

    def say_how_many_decide(self, level: Level) -> str:
        """About how large a sample would decide, if the share stays as it is."""
        away = self.rate.value - self.floor
        if abs(away) < 1e-9:
            return "no sample decides a share exactly at its floor"
        z = -NormalDist().inv_cdf(0.025 if away > 0 else level.least)
        needed = math.ceil(z * z * self.floor * (1 - self.floor) / away**2)
        needed = max(needed, self.rate.n + 1)
        rounded = math.ceil(needed / (unit := 10 ** max(0, len(str(needed)) - 2))) * unit
        return f"about {format_count(rounded, self.noun)} would decide"


class ChangeEvidence(NamedTuple):
    """Verdicts on the same images whose share must not drop by more than a margin."""

    pairs: Pairs
    held: int  # images that could be lost
    lost: np.ndarray[Any, Any]  # rows of the run
    margin: float
    detectable: float
    remark: str

    @property
    def p(self) -> float | None:
        """Test of a drop beyond the margin; none where nothing can drop."""
        return statistics.drop_test(self.pairs, self.margin) if self.held else None

    def find_detectable(self, level: Level) -> float:
        """The smallest drop that would have been found, noise being the flips that cancel out."""
        lost, gained, n = self.pairs
        noise = 2 * min(lost, gained) / n
        return statistics.detectable_drop(n, noise, alpha=level.least, margin=self.margin)

    def is_guarding(self, level: Level) -> bool:
        """Whether the loss of every image that could be lost would have failed."""
        everything = Pairs(self.held, 0, self.pairs.n)
        return statistics.drop_test(everything, self.margin) < level.least

    def conclude(self, p: float | None, level: Level) -> Conclusion:
        """What follows, given the corrected p-value."""
        pairs, shows = self.pairs, math.inf
        outcome: GateOutcome = "inconclusive"
        reason = f"No image held before, so that none could be lost: {NO_GUARD}"
        if p is not None:
            shows = self.find_detectable(level)
            outcome, reason = self.choose_outcome(p, level, shows)
        return Conclusion(
            outcome,
            f"{reason}.{self.remark}",
            pairs.drop,
            *pairs.interval,
            p,
            pairs.lost,
            pairs.gained,
            shows if math.isfinite(shows) else None,
        )

    def choose_outcome(self, p: float, level: Level, shows: float) -> tuple[GateOutcome, str]:
        """Outcome and reason."""
        lost, gained, n = self.pairs
        drop = self.pairs.drop
        seen = f"{format_count(lost, 'image')} lost and {gained:,} gained of {n:,}, "
        seen += f"a drop of {show_points(drop)}" if drop > 0 else "no drop"
        allowed = f"{show_points(self.margin)} allowed"
        if p < level.alpha:
            return "failed", f"{seen}: more than the {allowed}, and not by chance ({show_p(p)})"
        able = (
            f"this sample shows drops from {show_points(round(shows, 3))} up"
            if math.isfinite(shows)
            else "this sample cannot show any drop"
        )
        if lost - gained > self.margin * n + 1e-9:
            return "inconclusive", (
                f"{seen}: more than the {allowed}, but perhaps by chance ({show_p(p)}); {able}"
            )
        if shows > self.detectable:
            return "inconclusive", (
                f"{seen}, but {able}, and drops from {show_points(self.detectable)} up must be"
                " visible: evaluate more images, or raise `detectable`"
            )
        if not self.is_guarding(level):
            held = format_count(self.held, "image")
            return "inconclusive", (
                f"{seen}, but {held} held before, and the loss of all would not fail: {NO_GUARD}"
            )
        return "passed", f"{seen}, {allowed}; {able}"


Evidence = Unmet | Undecided | ShareEvidence | ChangeEvidence


def show_share(share: float) -> str:
    """A share as a percentage, as exact as it was given."""
    return f"{100 * share:.6g} %"


def show_p(p: float) -> str:
    """A p-value to two digits, never as nothing."""
    return f"p = {p:.2g}" if p >= 1e-4 else "p < 0.0001"


def show_points(drop: float) -> str:
    """A difference of shares, to a hundredth."""
    number = f"{round(100 * drop, 2):g}"
    return f"{number} {'point' if number == '1' else 'points'}"
