"""What can be read for a table of a paper from a network whose units were masked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from robusteval.analysis.papers.measures import Measured, Summary
from robusteval.runs.statistics import Rate


class MaskWorth(NamedTuple):
    """What masked units are worth, beside none and beside as many random ones."""

    name: str  # which units were masked, and by which attack it was judged
    rates: Mapping[str, Rate]  # images right, by the names of `MASKED`
    verdict: str  # in words


class MaskedUnits(NamedTuple):
    """A figure of masked units."""

    title: str
    summary: Summary
    read: Callable[[MaskWorth], Measured]


MASKED = {
    "none_clean": "images right, no unit masked",
    "none_attacked": "images right under attack, no unit masked",
    "mask_clean": "images right, units masked",
    "mask_static": "the same under an attack made for the unmasked network",
    "mask_adaptive": "the same under an attack that knows the mask",
    "random_clean": "images right, random units masked",
    "random_static": "the same under an attack made for the unmasked network",
    "random_adaptive": "the same under an attack that knows the mask",
}


def find_masked(name: str) -> MaskedUnits | None:
    """A figure of masked units by name, as ``units:mask_clean``; None if there is none."""
    kind, _, which = name.partition(":")
    if kind != "units" or which not in MASKED:
        return None

    def read(worth: MaskWorth) -> Measured:
        rate = worth.rates[which]
        return Measured(rate.value, *rate.interval, rate.n)

    return MaskedUnits(MASKED[which], "share", read)
