"""What `robusteval explain` has measured: the one record of its report.

``explanation.json`` is this record, key by key. Numbers that do not exist, such as the mean of
nothing, are nan here and null there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

Values = np.ndarray[Any, Any]

# of log2 of promotion over suppression: the types of regions part at the middle band
RATIO_BANDS = (
    *("below -4", "-4 to -3", "-3 to -2", "-2 to -1", "-1 to 1"),
    *("1 to 2", "2 to 3", "3 to 4", "above 4"),
)


@dataclass(frozen=True)
class MeanOfImages:
    """A mean over `n` images with its 95 % interval (Student's t); nan where there is none."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class ExplainedThreat:
    """What the attacker may do; `eps` in units of the [0, 1] pixel range."""

    norm: str
    eps: float | None
    targeted: bool


@dataclass(frozen=True)
class ExplainedSamples:
    """Images that were asked for, attacked, and fooled."""

    asked: int
    attacked: int
    fooled: int


@dataclass(frozen=True)
class SizeCorrelations:
    """Whether the size of a change tells its effect."""

    pearson: MeanOfImages
    kendall: MeanOfImages


@dataclass(frozen=True)
class RegionResidual:
    """How far scores of single regions miss the whole effect, as a share of it; medians."""

    suppression: float
    promotion: float


@dataclass(frozen=True)
class RegionFigures:
    """What kinds of regions there are."""

    count: int
    types: dict[str, MeanOfImages]  # shares by type of region
    ratios: tuple[MeanOfImages, ...]  # shares of those that matter, by `RATIO_BANDS`
    with_size: SizeCorrelations
    with_gradient_mode: MeanOfImages  # Spearman, of effects and their first-order estimate
    residual: RegionResidual


@dataclass(frozen=True)
class ImageCount:
    """`k` of `n` images."""

    k: int
    n: int


@dataclass(frozen=True)
class FocusFigures:
    """How much of the perturbations lies where one map of one image is highest."""

    map: str
    view: str
    score: MeanOfImages
    area: MeanOfImages
    chance: MeanOfImages
    elsewhere: MeanOfImages
    shifted: MeanOfImages
    focused: ImageCount  # above all three controls
    # of each image, nan where it was not fooled: its score, and those of the controls
    scores: tuple[float, ...]
    chances: tuple[float, ...]
    elsewheres: tuple[float, ...]
    shifts: tuple[float, ...]


@dataclass(frozen=True)
class MapHeight:
    """How high one map of one image rises for one class.

    As a share of the highest of the four: of both images for the label and the class predicted.
    """

    map: str
    view: str
    height: MeanOfImages
    heights: tuple[float, ...]  # of each image, nan where it was not fooled


@dataclass(frozen=True)
class PlaceFigures:
    """Changed places in one kind of region."""

    share: MeanOfImages
    lift: MeanOfImages  # over chance


@dataclass(frozen=True)
class PlaceRoles:
    """What changed places do, put back one by one; the last two in logits."""

    obscuring: MeanOfImages
    leading: MeanOfImages
    fall: MeanOfImages
    rise: MeanOfImages


@dataclass(frozen=True)
class SparseNoiseFigures:
    """Whether sparse noise hides the true class or leads to another."""

    top: float  # share of a map that counts as a region
    places: dict[str, PlaceFigures]
    roles: PlaceRoles


@dataclass(frozen=True)
class RefinementFigures:
    """What one way of reducing the perturbations leaves: medians of sizes, and its cost."""

    way: str
    still_fooled: ImageCount
    l0: float
    l0_pixels: float
    l1: float
    l2: float
    linf: float
    forwards: float
    backwards: float
    seconds: float


@dataclass(frozen=True)
class MovedUnit:
    """A unit that the attack moves, and the concept that it matches best."""

    unit: int
    attack: float
    noise: float  # moved by noise of equal norm
    concept: str
    category: str
    overlap: float
    matched: bool


@dataclass(frozen=True)
class UnitFigures:
    """Whether units that are moved are units that stand for something."""

    layer: str | None
    concepts: str
    probes: int
    correlation: float
    low: float
    high: float
    noise: float
    gain: float  # of the correlation over that of noise, with its 95 % interval
    gain_low: float
    gain_high: float
    matched: int
    units: int
    most_moved: tuple[MovedUnit, ...]


@dataclass(frozen=True)
class ExplainedImage:
    """One image in figures; effects in logits, sizes of the perturbation by norm."""

    index: int
    id: str
    label: int
    label_name: str | None
    predicted: int
    predicted_name: str | None
    fooled: bool
    types: dict[str, int]  # regions by type
    suppression: tuple[float, ...]  # region by region
    promotion: tuple[float, ...]
    residual: tuple[float, ...]
    l0: float
    l0_pixels: float
    l1: float
    l2: float
    linf: float


@dataclass(frozen=True)
class ExplainedData:
    """Where the images come from."""

    name: str
    total: int
    shape: tuple[int, ...]  # of one image: channels, height, width


@dataclass(frozen=True)
class ExplanationSource:
    """Where the numbers come from."""

    model: dict[str, Any]
    data: ExplainedData
    environment: dict[str, Any]
    resolved: dict[str, Any]  # parameters of the attack with all defaults
    seed: int
    side: int | None  # pixels along a region
    layer: str | None
    created: str
    seconds: float
    command: str | None


@dataclass(frozen=True)
class ExplanationRecord:
    """Everything that is known of an attack on some images."""

    schema: int
    attack: str
    threat: ExplainedThreat
    samples: ExplainedSamples
    regions: RegionFigures
    focus: tuple[FocusFigures, ...]
    heights: tuple[MapHeight, ...]
    noise: SparseNoiseFigures | None
    refinement: tuple[RefinementFigures, ...]
    units: UnitFigures | None
    images: tuple[ExplainedImage, ...]
    remarks: tuple[str, ...]
    provenance: ExplanationSource


@dataclass(frozen=True)
class FocusBox:
    """The scores of one attack on one map, as a box plot has them: quartiles and the ends."""

    attack: str
    map: str
    view: str
    n: int
    least: float
    lower: float
    median: float
    upper: float
    most: float


@dataclass(frozen=True)
class FocusGain:
    """By how much one attack scores above the first, on the images that both fool."""

    attack: str
    map: str
    view: str
    difference: MeanOfImages


@dataclass(frozen=True)
class ExplanationComparison:
    """Several attacks on the same images, side by side."""

    schema: int
    attacks: tuple[ExplanationRecord, ...]
    boxes: tuple[FocusBox, ...]
    gains: tuple[FocusGain, ...]
    remarks: tuple[str, ...]


class ExplainedPanel(NamedTuple):
    """One explained image as arrays; the maps share one scale."""

    position: int  # in the data set
    label: int
    predicted: int
    clean: Values  # (h, w, c) in [0, 1]
    adversarial: Values  # (h, w, c) in [0, 1]
    regions: Values  # (h, w) region of each pixel
    kinds: Values  # (m,) type of each region, as numbered by the analysis
    strength: Values  # (m,) what the region does for the attacker, in logits
    interpreter: str  # whose maps they are; empty where the network has none
    maps: dict[str, Values]  # "clean, label" -> (h, w)
    portrait: dict[str, Values]  # Grad-CAM (h, w) and Guided Grad-CAM (h, w, c) before and after
