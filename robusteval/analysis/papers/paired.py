"""Figures that no run holds, compared image by image: of explanations, and of attacks on maps."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from robusteval.analysis.papers.declaration import Reading
from robusteval.analysis.papers.explained import find_explained
from robusteval.analysis.papers.measures import Summary
from robusteval.analysis.papers.on_maps import find_on_maps
from robusteval.analysis.papers.results import MissingError, Results
from robusteval.runs.statistics import Difference, count_pairs, paired_difference
from robusteval.runs.types import Values


class OfImages(NamedTuple):
    """A figure of each of some images, nan where it does not count, and what it is of."""

    name: str  # of the figure, where its attack is named apart
    attack: str
    ids: Values  # (n,) of the images' content
    values: Values  # (n,)
    summary: Summary


def compare_beside_runs(
    results: Results, more: Reading, than: Reading
) -> tuple[Difference, list[str]] | None:
    """By how much a figure is larger, on the images that both have, and what the two are of.

    None where the figures are those of a run; MissingError where one is missing.
    """
    read = find_reader(more.measure)
    if read is None:
        return None
    other = find_reader(than.measure)
    if other is None:
        raise MissingError(f"{than.measure} is not of the images that {more.measure} is of")
    return compare_images(read(results, more), other(results, than))


def compare_images(one: OfImages, other: OfImages) -> tuple[Difference, list[str]]:
    """The difference on the images that count in both, found by their content."""
    _, first, second = np.intersect1d(one.ids, other.ids, return_indices=True)
    if not len(first):
        raise MissingError("both were not measured on the same images")
    names = [" of ".join(filter(None, (each.name, each.attack))) for each in (one, other)]
    if one.attack == other.attack:
        names = [one.name, f"{other.name}, {other.attack}"]
    values, others = one.values[first], other.values[second]
    found = paired_difference(
        values.astype(np.float64), others.astype(np.float64), np.ones(len(values), dtype=np.bool_)
    )
    if one.summary == "share":
        both = ~np.isnan(values.astype(np.float64) + others)  # nan would be taken for true
        low, high = count_pairs(*(v[both].astype(np.bool_) for v in (values, others))).interval
        found = found._replace(low=low, high=high)
    return found, names


def find_reader(measure: str) -> Callable[[Results, Reading], OfImages] | None:
    """How a figure is read image by image; None if it is one of a run."""
    if find_explained(measure) is not None:
        return read_explained
    return None if find_on_maps(measure) is None else read_on_maps


def read_explained(results: Results, reading: Reading) -> OfImages:
    """A figure of an explanation; MissingError if it is not kept image by image."""
    explained = find_explained(reading.measure)
    assert explained is not None
    attack, _ = results.measure(reading)  # or why it is missing
    record = results.explanations[reading.attack]
    values = explained.read_images(record)
    if values is None:
        raise MissingError(f"{explained.title} is not known of single images")
    ids = np.array([int(image.id, 16) for image in record.images], dtype=np.uint64)
    return OfImages(explained.title, attack, ids, values, explained.summary)


def read_on_maps(results: Results, reading: Reading) -> OfImages:
    """A figure of an attack on maps; MissingError if there is none."""
    on_maps = find_on_maps(reading.measure)
    assert on_maps is not None
    attack, _ = results.measure(reading)
    led = results.choose_map_attack(reading)
    network = " on the hardened network" if reading.hardened else ""
    return OfImages("", f"{attack}{network}", led.ids, on_maps.read_images(led), on_maps.summary)
