"""What a detector is worth, on images that had no say in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from robusteval.runs.detector_record import AtThreshold, Estimate, Proportion
from robusteval.runs.metrics import rate
from robusteval.runs.statistics import Rate, roc_auc

Array = np.ndarray[Any, Any]

RESAMPLES = 1000
PRIOR = 0.01  # share of attacked images that precision is reported for


class Scored(NamedTuple):
    """Scores of rows ``(m,)`` by one fit: of images as they are and of attacked ones."""

    score: Array
    label: Array  # 1 for attacked
    group: Array  # source image, alike ones together

    @property
    def area(self) -> float:
        """Area under the ROC curve; nan if one kind is missing."""
        return roc_auc(self.score[self.label == 0], self.score[self.label == 1])


class Resampling:
    """Draws of source images with replacement, the same ones for all that is compared."""

    def __init__(self, groups: int, seed: int) -> None:
        draws = np.random.Generator(np.random.PCG64(seed))
        drawn = draws.integers(0, groups, (RESAMPLES, groups))
        self.counts = np.zeros((RESAMPLES, groups), dtype=np.float32)
        for row, each in zip(self.counts, drawn, strict=True):
            np.add.at(row, each, 1)

    def resample_auc(self, folds: Sequence[Scored]) -> Array:
        """Resample the mean AUC of fits: in each draw ``(draws,)``, nan where it has none."""
        found = []
        for scored in folds:
            zero, one = scored.label == 0, scored.label == 1
            above = np.sign(scored.score[one][:, None] - scored.score[zero][None]) / 2 + 0.5
            positive = self.counts[:, scored.group[one]]  # (draws, attacked)
            negative = self.counts[:, scored.group[zero]]
            pairs = positive.sum(1) * negative.sum(1)
            with np.errstate(invalid="ignore", divide="ignore"):
                found.append(((positive @ above.astype(np.float32)) * negative).sum(1) / pairs)
        return np.asarray(np.mean(found, axis=0))

    def estimate_auc(self, folds: Sequence[Scored]) -> Estimate:
        """Estimate the mean AUC of some fits, with its 95 % interval."""
        value = float(np.mean([scored.area for scored in folds]))
        return Estimate(value, *take_middle(self.resample_auc(folds)))

    def resample_rate(self, right: Array, scored: Scored) -> Array:
        """Resample how often `right` ``(m,)`` holds, labels weighing the same, ``(draws,)``."""
        found = []
        for label in (0, 1):
            mine = scored.label == label
            drawn = self.counts[:, scored.group[mine]]  # (draws, rows)
            with np.errstate(invalid="ignore"):
                found.append(drawn @ right[mine].astype(np.float32) / drawn.sum(1))
        return np.asarray(np.mean(found, axis=0))

    def estimate_gain(self, one: Scored, other: Scored) -> Estimate:
        """Estimate the AUC of one fit minus that of another, with its 95 % interval."""
        drawn = self.resample_auc([one]) - self.resample_auc([other])
        return Estimate(one.area - other.area, *take_middle(drawn))


def take_middle(drawn: Array) -> tuple[float, float]:
    """Take the middle 95 % of draws."""
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def count_share(flags: Array) -> Proportion:
    """Count the share of images that are flagged, with its interval."""
    return encode_rate(rate(flags))


def encode_rate(found: Rate) -> Proportion:
    """Put a rate into a record."""
    low, high = found.interval
    return Proportion(found.k, found.n, low, high)


def compute_ratio(found: Proportion) -> float:
    """Compute a share from its record; nan of nothing."""
    return found.k / found.n if found.n else float("nan")


class JudgedScores(NamedTuple):
    """How well attacked rows are told from images as they are; by threshold in `at`."""

    auc: Estimate
    average_precision: float
    at: dict[str, AtThreshold]


def judge_scores(
    scored: Scored, thresholds: dict[str, float], resampling: Resampling
) -> JudgedScores:
    """Judge how well attacked rows are told from images as they are, both weighing the same."""
    from sklearn.metrics import average_precision_score

    score, attacked = scored.score, scored.label == 1
    weights = np.where(attacked, 0.5 / attacked.sum(), 0.5 / (~attacked).sum())
    at = {}
    for fpr, threshold in thresholds.items():
        caught, alarms = (
            count_share(score[attacked] > threshold),
            count_share(score[~attacked] > threshold),
        )
        true, false = PRIOR * compute_ratio(caught), (1 - PRIOR) * compute_ratio(alarms)
        # without a single false alarm it would be perfect, which no sample shows
        precision = true / (true + false) if false else None
        at[fpr] = AtThreshold(threshold, caught, alarms, precision)
    return JudgedScores(
        auc=resampling.estimate_auc([scored]),
        average_precision=float(average_precision_score(attacked, score, sample_weight=weights)),
        at=at,
    )


class Calibration(NamedTuple):
    """How well the scores of a detector serve as probabilities."""

    accuracy: float
    brier: float


def measure_calibration(scored: Scored) -> Calibration:
    """Measure scores as probabilities: accuracy at one half, Brier score, labels balanced."""
    score, attacked = scored.score, scored.label == 1
    squares = np.square(score - attacked)
    return Calibration(
        accuracy=float(((score[attacked] > 0.5).mean() + (score[~attacked] <= 0.5).mean()) / 2),
        brier=float((squares[attacked].mean() + squares[~attacked].mean()) / 2),
    )
