"""Which images of a run share a value of a column of the user's own, such as the camera.

The settings of a run hold the values of each column and, for each image, the position of its value
among them: a byte each, in base 64. The name of the cell of clean images is a hash of it.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

SLICE = "slice:"  # begins the name of a column of clean images that holds positions of values
MOST_VALUES = 50


def encode_slices(columns: Mapping[str, Sequence[str]], index: Any) -> dict[str, Any]:
    """What the settings of a run say of its slices.

    Parameters
    ----------
    columns : mapping of str to sequence of str
        By name the value of each image of the data set.
    index : array of int
        Positions of the images of the run, ``(n,)``.
    """
    found = {}
    for by, values in columns.items():
        names, codes = np.unique(np.asarray(values, dtype=np.str_), return_inverse=True)
        rows = codes[np.asarray(index)].astype(np.uint8)
        text = base64.b64encode(rows.tobytes()).decode("ascii")
        found[by] = {"values": names.tolist(), "rows": text}
    return found


def decode_slices(config: Mapping[str, Any]) -> dict[str, Any]:
    """The columns ``slice:NAME`` of clean images, ``(n,)``; ValueError if they are none."""
    found: dict[str, Any] = {}
    for by, facts in (config.get("slices") or {}).items():
        codes = np.frombuffer(base64.b64decode(facts["rows"], validate=True), dtype=np.uint8)
        values = facts["values"]
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise ValueError(f"the slice {by} has values that are no texts")
        if len(codes) and codes.max() >= len(values):
            raise ValueError(f"the slice {by} has values that it does not name")
        found[f"{SLICE}{by}"] = codes.astype(np.int64)
    return found
