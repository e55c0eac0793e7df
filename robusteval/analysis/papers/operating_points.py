"""An attack at exactly a level, such as a mean SSIM: one of two neighbouring settings, by lot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from robusteval.analysis.papers.measures import Measure, Measured, find_measure
from robusteval.runs.statistics import Difference
from robusteval.runs.types import Flags, Outcome, Spec, Values

# shares of which an attacker wants more, so that he takes the stronger setting as often as he may
GAINS = ("fooled", "fooled_8bit", "fooled_all", "fooled_within")


class OperatingPoint(NamedTuple):
    """What a figure is read from: a setting, or two of which each image gets one by lot."""

    kept: Outcome  # that keeps the level
    beyond: Outcome | None = None  # the next stronger one, which does not
    share: float = 0.0  # the probability of an image to get the latter
    why: str = ""  # the first stands alone
    level: str = ""  # the measure whose mean of both decides that share

    def read(self, measure: Measure) -> tuple[Values, Flags]:
        """The expected value of each image ``(n,)``, and which images count."""
        values, counted = measure.read(self.kept).astype(np.float64), measure.among(self.kept)
        if self.beyond is None:
            return values, counted
        mixed = (1 - self.share) * values + self.share * measure.read(self.beyond)
        return mixed.clip(0, 1), counted & measure.among(self.beyond)

    def summarize(self, measure: Measure) -> Measured:
        """The figure with its interval."""
        values, counted = self.read(measure)
        return measure.summarize_values(values[counted], self.find_pull(measure, counted))

    def compare(self, measure: Measure, other: OperatingPoint) -> Difference:
        """How much larger the figure is on the same images than at `other`."""
        (first, mine), (second, theirs) = self.read(measure), other.read(measure)
        both = mine & theirs
        pull = self.find_pull(measure, both) - other.find_pull(measure, both)
        return measure.compare_values(first, second, both, pull)

    def find_pull(self, measure: Measure, counted: Flags) -> Values:
        """How far each image moves the figure of those counted through the share ``(k,)``.

        Other images would have other means of the level, and so another share: an image that loses
        more than most lowers it. To first order the figure moves by the mean of what is given here,
        which varies together with the values themselves; zeros of one setting.
        """
        pull = np.zeros(len(counted))
        if self.beyond is None or not counted.any():
            return pull[counted]
        level, means = find_measure(self.level), []
        for outcome, weight in ((self.kept, 1 - self.share), (self.beyond, self.share)):
            values = level.read(outcome)
            known = level.among(outcome) & np.isfinite(values)
            means.append(float(values[known].mean()))
            pull[known] += weight * (values[known] - means[-1]) * counted.sum() / known.sum()
        gained = measure.read(self.beyond).astype(np.float64) - measure.read(self.kept)
        slope = float(gained[counted].mean()) / (means[0] - means[1])
        return np.asarray(slope * pull[counted])

    def describe(self, at: Mapping[str, float]) -> str:
        """The settings, and what they keep of the levels `at`; of one alone why it is that.

        As "fgsm:eps=1/255 at a mean SSIM of 0.9987, on 18.3 % of the images by lot eps=2/255 at
        0.9946: 0.998 together".
        """
        text = str(self.kept.attack)
        means = [f"{level.upper()} of {find_mean(level, self.kept):.4g}" for level in at]
        if means:
            text += f" at a mean {' and '.join(means)}"
        if self.beyond is None:
            return f"{text} ({self.why})" if self.why else text
        ((level, least),) = at.items()
        return (
            f"{text}, on {100 * self.share:.3g} % of the images by lot"
            f" {name_difference(self.kept, self.beyond)} at {find_mean(level, self.beyond):.4g}:"
            f" {least:g} together"
        )


def find_mean(level: str, outcome: Outcome) -> float:
    """What a setting keeps of a level in the mean over the images that are attacked."""
    return find_measure(level).summarize(outcome).value


def find_point(
    outcomes: Sequence[Outcome], kept: Outcome, name: str, at: Mapping[str, float]
) -> OperatingPoint:
    """Where an attack keeps exactly a level, in the mean over images.

    Of two settings the stronger is taken with the probability at which the mean of both is the
    level: on average that is an attack as good as any other, as a point between two of a ROC curve
    is a test. Where the stronger gains nothing, or none was run, the setting that keeps the level
    stands alone, and with more than that.

    Parameters
    ----------
    outcomes : sequence of Outcome
        The settings of a sweep, on the same images.
    kept : Outcome
        The strongest that keeps the level.
    name : str
        The measure that is to be read: see `GAINS`, others are of `kept` alone.
    at : mapping
        The level as a measure and what it is to be in the mean; of several nothing is mixed.
    """
    if name.partition(":")[0] not in GAINS or len(at) != 1:
        return OperatingPoint(kept)
    ((level, least),) = at.items()
    mean = find_mean(level, kept)
    if mean == least:
        return OperatingPoint(kept)
    means = [find_mean(level, outcome) for outcome in outcomes]
    below = [(each, i) for i, each in enumerate(means) if each < least]
    if not below:
        return OperatingPoint(kept, why="no stronger setting was run")
    next_mean, i = max(below)
    measure = find_measure(name)
    if not measure.summarize(outcomes[i]).value > measure.summarize(kept).value:
        return OperatingPoint(kept, why="the next stronger setting gains nothing")
    share = (mean - least) / (mean - next_mean)
    return OperatingPoint(kept, outcomes[i], share, level=level)


def name_difference(one: Outcome, other: Outcome) -> str:
    """The parameters of `other` that differ from those of `one`; all of it where none does."""
    mine, theirs = one.attack, other.attack
    differing = {k: v for k, v in theirs.parameters.items() if mine.parameters.get(k) != v}
    if mine.name != theirs.name or not differing:
        return str(theirs)
    return str(Spec(theirs.name, differing)).partition(":")[2]
