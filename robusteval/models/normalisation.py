"""Mean and deviation per channel: from the user, the file or the publisher."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from robusteval.errors import UsageError
from robusteval.models.preparation import Preprocessing

MOST = 2.0  # a mean of pixels in [0, 1]


class Normalisation(NamedTuple):
    """Mean and deviation per channel, in units of the [0, 1] pixel range, and who said so."""

    mean: list[float] | None
    std: list[float] | None
    origin: str


def choose_normalisation(
    given: tuple[Sequence[float] | None, Sequence[float] | None],
    inside: tuple[list[float], list[float]] | None,
    notes: Mapping[str, Any],
    preset: Preprocessing | None,
    channels: int | None,
) -> Normalisation:
    """What the user gives, else what a layer in the file holds, else metadata, else the preset."""
    if given != (None, None):
        return _check_normalisation(*given, "given", channels)
    if inside is not None:
        return _check_normalisation(*inside, "from a layer in the file", channels)
    if "mean" in notes or "std" in notes:
        mean, std = notes.get("mean"), notes.get("std")
        if mean is None and std is None:
            return Normalisation(None, None, "none, from the file")
        return _check_normalisation(mean, std, "from the file", channels)
    if preset:
        found = _check_normalisation(preset.mean, preset.std, f"from {preset.origin}", channels)
        return found._replace(origin=preset.origin)
    return Normalisation(None, None, "none")


def _check_normalisation(mean: Any, std: Any, origin: str, channels: int | None) -> Normalisation:
    if mean is None or std is None:
        raise UsageError(f"the normalisation {origin} has only one of mean and std: give both")
    pair = []
    for key, values in (("mean", mean), ("std", std)):
        if not isinstance(values, Sequence) or not all(map(_is_number, values)):
            raise UsageError(f"the {key} {origin} must be numbers, one for each channel")
        values = [float(value) for value in values]
        if channels and len(values) == 1:
            values *= channels
        if not values or len(values) != (channels or len(values)):
            raise UsageError(
                f"the {key} {origin} has {len(values)} numbers for {channels} channels"
            )
        pair.append(values)
    if len(pair[0]) != len(pair[1]):
        raise UsageError(f"mean and std {origin} differ in length: {len(pair[0])}, {len(pair[1])}")
    if max(map(abs, pair[0])) > MOST:
        raise UsageError(
            f"the mean {origin} is {max(pair[0], key=abs):g}, which looks like grey levels: give"
            " mean and std in units of the [0, 1] pixel range, divided by 255"
        )
    if min(pair[1]) <= 0:
        raise UsageError(f"the std {origin} must be positive in every channel")
    return Normalisation(pair[0], pair[1], origin)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and math.isfinite(value)
