"""Figures over images: means with intervals, medians, correlations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from robusteval.runs.explanation_record import MeanOfImages

RESAMPLED = 1000  # times, for an interval

Values = np.ndarray[Any, Any]


def correlate_columns(measure: Callable[..., Any], one: Values, other: Values) -> float:
    """Correlate columns ``(n,)`` by a test of SciPy; nan for fewer than three or constant ones."""
    if len(one) < 3 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return math.nan
    return float(measure(one, other).statistic)


def average_images(values: Values, seed: int) -> MeanOfImages:
    """The mean of values ``(n,)`` with its 95 % interval: images are resampled, not their parts."""
    values = np.asarray(values, dtype=np.float64)
    values = values[np.isfinite(values)]
    n = len(values)
    if n == 0:
        return MeanOfImages(math.nan, math.nan, math.nan, 0)
    means = np.random.default_rng(seed).choice(values, (RESAMPLED, n)).mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return MeanOfImages(float(values.mean()), float(low), float(high), n)


def take_median(values: Tensor) -> float:
    """The median of the finite among some values; nan if there is none."""
    finite = values[values.isfinite()].double().cpu().numpy()
    return float(np.median(finite)) if len(finite) else math.nan
