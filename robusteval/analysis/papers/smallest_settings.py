"""Each image at the smallest setting that fools it: attacks compared at equal success."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from robusteval.runs.types import Outcome, Spec

SMALLEST = "smallest"  # the column of the setting that was taken, infinite where none fools


def take_smallest(outcomes: Sequence[Outcome], keys: Sequence[str]) -> Outcome:
    """Of each image what its smallest setting that fools it makes of it.

    Parameters
    ----------
    outcomes : sequence of Outcome
        Settings of one or more attacks, on the same images in the same order.
    keys : sequence of str
        The parameter whose size counts, as "eps": the first of these that all settings have. Of
        equal ones that result is taken which is most like the original by SSIM.

    Returns
    -------
    Outcome
        Columns of the settings, image by image; an image that none of them fools is left as by the
        largest. The column "smallest" holds the parameter, infinite where none fools.

    Raises
    ------
    ValueError
        If the settings share no such parameter, or were run on different images.
    """
    first = outcomes[0]
    key = next((k for k in keys if all(k in outcome.resolved for outcome in outcomes)), None)
    if key is None:
        raise ValueError(f"not all settings have {' or '.join(keys)}")
    if any(not np.array_equal(o.columns["id"], first.columns["id"]) for o in outcomes):
        raise ValueError("settings were not run on the same images")
    sizes = np.array([float(outcome.resolved[key]) for outcome in outcomes])
    fooled = np.stack([outcome.success() for outcome in outcomes])  # (m, n)
    size = np.where(fooled, sizes[:, None], np.inf)
    smallest = size.min(0)
    likeness = np.stack([outcome.columns["ssim"] for outcome in outcomes])
    likeness = np.where(fooled & (size == smallest), likeness, -np.inf)
    likeness[sizes.argmax(), ~fooled.any(0)] = 0
    chosen, rows = likeness.argmax(0), np.arange(len(smallest))
    shared = [name for name in first.columns if all(name in o.columns for o in outcomes)]
    columns = {name: np.stack([o.columns[name] for o in outcomes])[chosen, rows] for name in shared}
    names = " and ".join(dict.fromkeys(outcome.attack.name for outcome in outcomes))
    span = f"{sizes.min():g} to {sizes.max():.3g}"
    return replace(
        first,
        attack=Spec(f"the smallest {key} of {len(outcomes)} settings of {names}, {span}", {}),
        columns={**columns, SMALLEST: smallest},
        resolved={},
    )
