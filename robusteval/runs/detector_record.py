"""What fitting a detector of attacked images has shown: the one record of its report.

The file beside a detector is this record as JSON, key by key. Thresholds are named by the rate of
false alarms that they were set to, ``"0.05"`` and ``"0.01"``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Proportion:
    """A share of images, `k` of `n`, with its 95 % interval."""

    k: int
    n: int
    low: float
    high: float


@dataclass(frozen=True)
class Estimate:
    """An area under the ROC curve, or a difference of two, with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class DetectorParts:
    """What the detector looks at."""

    interpreters: tuple[str, ...]
    channels: str
    extractor: str
    confidence: bool


@dataclass(frozen=True)
class ImageCounts:
    """Source images, and how many are in each part."""

    total: int
    alike: int  # that are much like another one
    train: int
    validation: int
    test: int


@dataclass(frozen=True)
class LearntAttack:
    """An attack that the detector has learnt from, and on how many images it succeeds."""

    attack: str
    k: int
    n: int
    low: float
    high: float


@dataclass(frozen=True)
class DetectorCost:
    """What a score costs."""

    forwards: float  # forward passes per image, the prediction itself included
    times: float  # duration as a multiple of that of a prediction


@dataclass(frozen=True)
class AtThreshold:
    """What is flagged at one threshold."""

    threshold: float
    tpr: Proportion  # of attacked images
    fpr: Proportion  # of images as they are
    precision: float | None  # were 1 of 100 images attacked; None without a false alarm


@dataclass(frozen=True)
class Headline:
    """How well attacked images are told from images as they are, both weighing the same."""

    auc: Estimate
    average_precision: float
    at: dict[str, AtThreshold]
    accuracy: float  # at one half
    brier: float


@dataclass(frozen=True)
class TriedTrees:
    """One way for trees to grow, and the AUC of a cross-validation in which images stay whole."""

    depth: int
    rate: float
    columns: float  # share of the features that a tree may look at
    auc: float


@dataclass(frozen=True)
class TreeChoice:
    """How the trees grow, and what it was chosen from; nothing where it was not."""

    depth: int
    rate: float
    columns: float
    tried: tuple[TriedTrees, ...]


@dataclass(frozen=True)
class AttackFigures:
    """How well the results of one attack are found."""

    attack: str
    auc: Estimate
    average_precision: float
    at: dict[str, AtThreshold]
    failures_flagged: Proportion  # of results that fool nobody
    undetected: Proportion  # results that succeed and are not flagged, of all


@dataclass(frozen=True)
class FalseAlarms:
    """How often images of one kind without any attack are flagged, by threshold."""

    kind: str
    flagged: dict[str, Proportion]


@dataclass(frozen=True)
class SimplerRule:
    """A rule without trees, on the same images."""

    name: str
    auc: Estimate
    average_precision: float
    at: dict[str, AtThreshold]
    gain: Estimate  # AUC of the detector less that of the rule


@dataclass(frozen=True)
class TransferFigures:
    """How one fit finds the results of one attack."""

    auc: Estimate
    tpr: Proportion


@dataclass(frozen=True)
class TransferRow:
    """A fit on one attack, or on all of them (None), judged on each."""

    fitted_on: str | None
    judged_on: tuple[TransferFigures, ...]


@dataclass(frozen=True)
class FewerChannels:
    """A detector that was fitted like the reported one, to fewer channels."""

    name: str
    auc: Estimate
    gain: Estimate


@dataclass(frozen=True)
class LeakChecks:
    """AUC where there is nothing to find, and where rows are parted wrongly."""

    shuffled: Estimate  # labels exchanged within each image
    benign: Estimate  # two copies of different noise
    row_wise: Estimate  # parted by row instead of by image


@dataclass(frozen=True)
class EstimateOfImages:
    """An accuracy or an area with its 95 % interval, over `n` source images."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Combination:
    """A detector of some interpreters by several protocols, on images that had no say."""

    name: str  # "grad+cam", "grad+cam:product"
    attacks: tuple[str, ...]  # that it has learnt from
    as_published: (
        EstimateOfImages  # accuracy: images as they are alone, features alone, parted by row
    )
    grouped: EstimateOfImages  # accuracy at one half, parted by image
    auc: EstimateOfImages
    flagged: Proportion  # of attacked images, at the threshold for 5 % false alarms
    false_alarms: Proportion  # of images as they are, at the same
    without_statistics: EstimateOfImages  # AUC of the features alone
    unseen_classes: EstimateOfImages | None  # AUC on classes that had no say


@dataclass(frozen=True)
class DetectorRemark:
    """A sentence that a reader must not miss; `grave` if it speaks against the detector."""

    grave: bool
    text: str


@dataclass(frozen=True)
class DetectorRecord:
    """Everything that is known of a fitted detector."""

    detector: DetectorParts
    model: dict[str, Any]  # what identifies the classifier
    data: str
    seed: int
    images: ImageCounts
    attacks: tuple[LearntAttack, ...]
    features: int
    cost: DetectorCost
    headline: Headline
    rounds: int  # trees
    trees: TreeChoice
    per_attack: tuple[AttackFigures, ...]
    negatives: tuple[FalseAlarms, ...]
    baselines: tuple[SimplerRule, ...]
    matrix: tuple[TransferRow, ...]
    simpler: tuple[FewerChannels, ...]
    leaks: LeakChecks
    # rank correlation of the score and the network that imitates it, which `evade:along=imitation`
    # follows, on images that had no say; None where either is constant
    imitation: float | None
    remarks: tuple[DetectorRemark, ...]
    command: str | None  # that fitted it
