"""Figures over images: means with intervals, medians, correlations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from robusteval.runs.explanation_record import MeanOfImages
from robusteval.runs.statistics import bounded_mean

OF_SHARES = 0.0, 1.0  # where shares lie, and sizes relative to a whole
OF_CORRELATIONS = -1.0, 1.0  # and differences of shares
ANYWHERE = -math.inf, math.inf

Values = np.ndarray[Any, Any]


def correlate_columns(measure: Callable[..., Any], one: Values, other: Values) -> float:
    """Correlate columns ``(n,)`` by a test of SciPy; nan for fewer than three or constant ones."""
    if len(one) < 3 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return math.nan
    return float(measure(one, other).statistic)


def average_images(values: Values, within: tuple[float, float]) -> MeanOfImages:
    """The mean of the finite ones of values ``(n,)`` with its 95 % interval (Student's t).

    The interval ends where values lie at most. One image has none, nor have images that are all
    alike, which says nothing of others.
    """
    return MeanOfImages(*bounded_mean(np.asarray(values, dtype=np.float64), within))


def take_median(values: Tensor) -> float:
    """The median of the finite among some values; nan if there is none."""
    finite = values[values.isfinite()].double().cpu().numpy()
    return float(np.median(finite)) if len(finite) else math.nan
