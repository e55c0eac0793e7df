"""What a record says of maps that explain a model: their worth, and what attacks did to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from .measures import (
    Behind,
    CostRecord,
    DifferenceRecord,
    Facts,
    MeanRecord,
    Place,
    RateRecord,
    Share,
)


@dataclass(frozen=True)
class InterpreterRow:
    """An interpreter whose maps were measured."""

    spec: str
    name: str
    parameters: Annotated[Facts, "with all defaults"]
    stretched: Annotated[bool, "its maps are stretched to [0, 1] before they are compared"]
    seeded: Annotated[bool, "another seed gives another map"]
    alike: Annotated[tuple[str, ...], "others here that say the same of this network"]
    layer: Annotated[str, "whose features its maps are made of; empty: of none"]


@dataclass(frozen=True)
class AreaRecord:
    """An area under a curve, held against random cells as coarse as the map's."""

    value: MeanRecord
    chance: MeanRecord
    beyond_chance: DifferenceRecord


@dataclass(frozen=True)
class MapQualityRow:
    """What maps of images as they are are worth."""

    interpreter: str
    insertion: Annotated[
        AreaRecord,
        "area under the class's probability while a blurred image is made sharp, highest of the"
        " map first",
    ]
    deletion: Annotated[AreaRecord, "while the image is made black"]
    forgotten: Annotated[
        MeanRecord, "rank correlation with the map of the network with shuffled parameters"
    ]


@dataclass(frozen=True)
class MapRow:
    """What an attack did to the maps of one interpreter."""

    interpreter: str
    attacked: Annotated[bool, "the attack was made on it"]
    distance: Annotated[MeanRecord, "mean absolute difference from the map of the image as it is"]
    iou: MeanRecord
    noise: Annotated[MeanRecord, "distance under Gaussian noise of the same l2 size"]
    floor: Annotated[MeanRecord | None, "distance between two seeds; null: nothing is drawn"]
    beyond_noise: DifferenceRecord
    beyond_floor: DifferenceRecord | None


@dataclass(frozen=True)
class MapAttackRow:
    """What an attack did to maps: means over the images on which it succeeds."""

    outcome: Place
    spec: str
    defense: Behind
    adaptive: bool
    interpreters: Annotated[tuple[str, ...], "names of those it was made to fool"]
    success_rate: RateRecord
    confidence: Annotated[MeanRecord, "probability of the class reached"]
    noise_rate: Annotated[MeanRecord, "1 - SSIM"]
    edge_energy: Annotated[MeanRecord, "share of the squared change on edges"]
    edge_area: Annotated[MeanRecord, "share of the pixels on edges"]
    cost: CostRecord
    maps: tuple[MapRow, ...]


@dataclass(frozen=True)
class MapPairRow:
    """An attack on maps against another attack, on the images where both succeed."""

    outcome: Place
    attack: str
    against: str
    defense: Behind
    interpreter: str
    attacked: bool
    difference: Annotated[DifferenceRecord, "of the distances from the benign map"]


@dataclass(frozen=True)
class TransferRow:
    """The distances of all maps after an attack on some of them."""

    attacked: str
    effort: Annotated[Facts, "steps and warmup that were given, where the rows differ in them"]
    distances: tuple[MeanRecord, ...]


@dataclass(frozen=True)
class TransferRecord:
    """The same attack on several interpreters: attacked against measured."""

    attack: Annotated[str, "without its interpreter"]
    defense: Behind
    measured: tuple[str, ...]
    rows: tuple[TransferRow, ...]


@dataclass(frozen=True)
class MapsRecord:
    """What became of the maps that explain a model."""

    top: Annotated[Share, "share of the highest cells that the intersection over union compares"]
    edge: Annotated[Share, "strength from which a pixel is on an edge"]
    measured: tuple[InterpreterRow, ...]
    quality: Annotated[tuple[MapQualityRow, ...], "empty: not measured"]
    attacks: tuple[MapAttackRow, ...]
    pairs: tuple[MapPairRow, ...]
    transfer: tuple[TransferRecord, ...]
