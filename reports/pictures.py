"""Images of a run as people look at them: before, after, and what was changed, as PNG data URIs."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from robusteval.runs import metrics
from robusteval.runs.types import Outcome, Picture, Run

from . import formatting, sentences
from .measures import CORRUPTION
from .record import AttackRow, RunRecord

Array = np.ndarray[Any, Any]

EDGES = (224, 112, 75, 56)  # pixels a picture may measure: the first at which all of them fit
CHANGE = 75  # pixels a picture of a change may measure, so that single pixels are not lost
CRISP = 96  # pixels up to which a picture is enlarged as squares
COLOURED = 3  # channels


@dataclass(frozen=True)
class ShownPicture:
    """One picture: its pixels ``(h, w, c)`` uint8 and, once they fit, its data URI."""

    title: str
    caption: Sequence[str]  # lines
    alt: str
    pixels: Array
    change: bool = False  # what was changed, not a photo
    uri: str = ""

    @property
    def height(self) -> int:
        """Rows of pixels."""
        return int(self.pixels.shape[0])

    @property
    def width(self) -> int:
        """Columns of pixels."""
        return int(self.pixels.shape[1])

    @property
    def crisp(self) -> bool:
        """Whether its pixels are to be seen as such."""
        return self.change or max(self.height, self.width) <= CRISP


class Sample(NamedTuple):
    """An image before and after an attack, and what was changed."""

    title: str
    outcome: str
    pictures: Sequence[ShownPicture]


class GalleryCell(NamedTuple):
    """The samples of one attack."""

    title: str
    setting: str
    samples: Sequence[Sample]


class GalleryFit(NamedTuple):
    """How the pictures of a run were made to fit."""

    reduced: bool  # some are shown smaller than they are
    left_out: int  # samples


def choose_rows(record: RunRecord) -> list[AttackRow]:
    """The attacks of which images are shown: of each kind of corruption the middle severity.

    Corruptions come last, as the report is about attackers first.
    """
    kinds: dict[tuple[str, str | None], list[AttackRow]] = {}
    chosen: list[AttackRow] = []
    for row in record.attacks:
        if row.threat.norm == CORRUPTION:
            kind = str(record.run.outcomes[row.outcome].resolved.get("kind"))
            kinds.setdefault((kind, row.defense), []).append(row)
        else:
            chosen.append(row)
    for rows in kinds.values():
        rows.sort(key=lambda row: row.threat.eps or 0.0)
        chosen.append(rows[len(rows) // 2])
    return chosen


def build_cell(record: RunRecord, row: AttackRow, kept: Sequence[Picture]) -> GalleryCell:
    """The samples of one attack, `row` being what the record says of it."""
    place = formatting.format_place(row.threat, row.defense)
    setting = formatting.join_parts(place, *sentences.list_knowledge(record, row))
    outcome = record.run.outcomes[row.outcome]
    samples = [build_sample(record.run, outcome, picture) for picture in kept]
    return GalleryCell(row.spec, setting, samples)


def build_sample(run: Run, outcome: Outcome, kept: Picture) -> Sample:
    """An image with what the model made of it."""
    c, at = outcome.columns, kept.row
    number = f"image {int(c['index'][at]):,}"
    before = [name_class(run, c["label"][at]), format_confidence(read_confidence(run, outcome, at))]
    after = [name_class(run, c["pred_adv"][at]), format_confidence(float(c["confidence_adv"][at]))]
    size = float(metrics.perturbation_sizes(outcome)[at])
    far = [describe_size(outcome.threat.norm, size)]
    factor = choose_amplification(kept.delta)
    change = f"change {format_factor(factor)}"
    became = "corrupted" if outcome.threat.norm == CORRUPTION else "attacked"
    attacked, amplified = kept.clean / 255 + kept.delta, 0.5 + factor * kept.delta
    explained = [
        picture
        for name, (benign, changed) in kept.maps.items()
        for picture in build_map_pictures(outcome, at, number, name, benign, changed)
    ]
    return Sample(
        f"{kept.place}: {number}",
        describe_result(run, outcome, at),
        (
            build_picture(number, "clean", before, kept.clean / 255),
            build_picture(number, became, after, attacked),
            replace(build_picture(number, change, far, amplified), change=True),
            *explained,
        ),
    )


def build_reach(record: RunRecord, stored: Mapping[int, list[Picture]]) -> Sample | None:
    """What the attacker of the first screen may change, on one of the images; None without any.

    A success that was found within the radius; where there is none, every value changed by the
    radius up or down at random, which is as much as linf allows. Other threats have no such image.
    """
    for case in sentences.list_attacked_cases(record):
        kept = [
            (record.run.outcomes[row.outcome], picture)
            for row in record.attacks
            if (row.threat, row.defense) == (case.threat, case.defense)
            for picture in stored.get(row.outcome, ())
        ]
        made = [(outcome, each) for outcome, each in kept if outcome.success()[each.row]]
        if case.threat.eps is None or not (made or (kept and case.threat.norm == "linf")):
            continue
        outcome, picture = next(
            (pair for pair in made if pair[1].place == "median"), (made or kept)[0]
        )
        if not made:
            signs = np.random.default_rng(0).choice((-1.0, 1.0), picture.delta.shape)
            noisy = np.clip(picture.clean / 255 + case.threat.eps * signs, 0, 1)
            picture = picture._replace(delta=(noisy - picture.clean / 255).astype(np.float32))
        sample = build_sample(record.run, outcome, picture._replace(maps={}))
        clean, changed, change = sample.pictures
        if not made:
            what, far = "changed at random", "as far as is allowed"
            number = sample.title.partition(": ")[2]
            changed = replace(changed, title=what, caption=[far], alt=f"{number}, {what}, {far}")
            change = replace(change, caption=[], alt=f"{number}, {change.title}, at random")
        factor = change.title.removeprefix("change ")
        return Sample(
            f"{sample.title.partition(': ')[2]} at {formatting.format_threat(case.threat)}",
            sample.outcome if made else "",
            (clean, changed, replace(change, title=f"the change, magnified {factor}")),
        )
    return None


def build_picture(number: str, what: str, caption: Sequence[str], image: Array) -> ShownPicture:
    """A picture of an image ``(h, w, c)`` in [0, 1]."""
    return ShownPicture(
        what, caption, f"{number}, {what}: {formatting.join_parts(*caption)}", round_pixels(image)
    )


def build_map_pictures(
    outcome: Outcome, at: int, number: str, name: str, benign: Array, changed: Array
) -> Iterator[ShownPicture]:
    """The maps of an image before and after, and how far they are apart, bright where high."""
    from matplotlib import colormaps

    c = outcome.columns
    apart = f"distance {c[f'map_distance:{name}'][at]:.3f}"
    beside = f"noise {c[f'map_noise:{name}'][at]:.3f}"
    views: tuple[tuple[str, list[str], Array], ...] = (
        (f"{name}, clean", [], benign),
        (f"{name}, attacked", [], changed),
        (f"{name}, difference", [apart, beside], np.abs(changed - benign)),
    )
    for title, caption, values in views:
        known = np.nan_to_num(values.astype(np.float32)).clip(0, 1)
        yield build_picture(
            number, title, caption, np.asarray(colormaps["inferno"](known))[..., :3]
        )


def name_class(run: Run, index: Any) -> str:
    """The name of a class where the data has names, else its number."""
    names = run.data.get("class_names") or ()
    if index < 0:
        return "not finite"
    return str(names[index]) if index < len(names) else f"class {index}"


def read_confidence(run: Run, outcome: Outcome, at: int) -> float:
    """Softmax probability of the clean prediction of a row; nan where it is not known."""
    defended = (d.clean for d in run.defenses if d.spec == outcome.defense)
    clean = next(defended, run.clean) if outcome.defense else run.clean
    found = np.flatnonzero(clean["id"] == outcome.columns["id"][at])
    return float(clean["confidence_clean"][found[0]]) if len(found) else math.nan


def format_confidence(probability: float) -> str:
    """A probability, never rounded to all or nothing; empty if it is not known."""
    if not math.isfinite(probability):
        return ""
    text = formatting.format_share(probability)
    return {"100.0 %": "> 99.9 %", "0.0 %": "< 0.1 %"}.get(text, text)


def describe_size(norm: str, size: float) -> str:
    """How far an image went, with the name of the measure; empty if there is none."""
    if not math.isfinite(size):
        return ""
    return (
        f"SSIM {formatting.format_similarity(1 - size)}"
        if norm == "ssim"
        else f"{norm} {format_distance(norm, size)}"
    )


def format_distance(norm: str, size: float) -> str:
    """A distance in what its norm counts in."""
    return (
        f"{formatting.format_quantity(255 * size)}/255"
        if norm == "linf"
        else formatting.format_quantity(size)
    )


def describe_result(run: Run, outcome: Outcome, at: int) -> str:
    """What became of an image, with a mark that needs no colour."""
    c = outcome.columns
    if "flagged" in c and c["flagged"][at]:
        return "✓ flagged"
    fooled = outcome.success()[at]
    if outcome.threat.targeted:
        goal = name_class(run, c["target"][at])
        return f"✗ made {goal}" if fooled else f"✓ not made {goal}"
    if outcome.threat.norm == CORRUPTION:  # where nobody fools anybody
        return "✗ wrong" if fooled else "✓ right"
    return "✗ fooled" if fooled else "✓ withstood"


def choose_amplification(delta: Array) -> float:
    """The power of two by which the largest change just fits around mid-grey."""
    largest = float(np.abs(delta).max(initial=0))
    # a grey level over the edge is not seen, and 8/255 deserves its 16
    return 2.0 ** math.floor(math.log2((0.5 + 1 / 255) / largest)) if largest else 1.0


def format_factor(factor: float) -> str:
    """A factor, as ``×16`` or ``×1/2``."""
    return f"×{factor:.0f}" if factor >= 1 else f"×1/{1 / factor:.0f}"


def round_pixels(image: Array) -> Array:
    """Pixels ``(h, w, 1 or 3)`` uint8 of an image in [0, 1]; other channels are averaged."""
    if image.shape[2] not in (1, COLOURED):
        image = image.mean(axis=2, keepdims=True)
    rounded: Array = (image * 255).round().clip(0, 255).astype(np.uint8)
    return rounded


def fit_pictures(cells: Sequence[GalleryCell], room: int) -> tuple[list[GalleryCell], int]:
    """Cells with the data URIs of their pictures, in no more than `room` characters.

    Pictures are reduced as far as needed; if that is not enough, the largest samples go. Returns
    also to how many pixels they were reduced.
    """
    edge, whole = choose_size(cells, room)
    sizes = sorted(weigh_sample(sample) for sample in list_samples(whole))
    while sum(sizes) > room:
        sizes.pop()
    most = sizes[-1] if sizes else 0
    few = [
        cell._replace(samples=[s for s in cell.samples if weigh_sample(s) <= most])
        for cell in whole
    ]
    return few, edge


def describe_fit(
    before: Sequence[GalleryCell], after: Sequence[GalleryCell], edge: int
) -> GalleryFit:
    """What `fit_pictures` did to these cells: whether some are smaller, how many left out."""
    few = list(list_samples(after))
    return GalleryFit(
        reduced=any(choose_reduction(p, edge) > 1 for sample in few for p in sample.pictures),
        left_out=len(list(list_samples(before))) - len(few),
    )


def choose_size(cells: Sequence[GalleryCell], room: int) -> tuple[int, list[GalleryCell]]:
    """The largest size at which all pictures fit, the smallest if none; and the pictures so."""
    for edge in EDGES[:-1]:
        whole = embed_pictures(cells, edge, room)
        if whole is not None:
            return edge, whole
    edge = EDGES[-1]
    return edge, [
        cell._replace(samples=[embed_sample(s, edge) for s in cell.samples]) for cell in cells
    ]


def embed_pictures(cells: Sequence[GalleryCell], edge: int, room: int) -> list[GalleryCell] | None:
    """The cells with their pictures as data URIs; None as soon as they prove not to fit."""
    done = []
    for cell in cells:
        done.append(cell._replace(samples=[embed_sample(sample, edge) for sample in cell.samples]))
        room -= count_characters(done[-1:])
        if room < 0:
            return None
    return done


def embed_sample(sample: Sample, edge: int) -> Sample:
    """The sample with its pictures as data URIs, none of more than `edge` pixels."""
    return sample._replace(pictures=[replace(p, uri=encode_png(p, edge)) for p in sample.pictures])


def count_characters(cells: Sequence[GalleryCell]) -> int:
    """Characters of all data URIs."""
    return sum(weigh_sample(sample) for sample in list_samples(cells))


def weigh_sample(sample: Sample) -> int:
    """Characters of the data URIs of one sample."""
    return sum(len(picture.uri) for picture in sample.pictures)


def list_samples(cells: Sequence[GalleryCell]) -> Iterator[Sample]:
    """All samples of these cells."""
    return (sample for cell in cells for sample in cell.samples)


def encode_png(shown: ShownPicture, edge: int) -> str:
    """A picture as the data URI of a PNG file."""
    from PIL import Image

    pixels = reduce_picture(shown.pixels, choose_reduction(shown, edge), shown.change)
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def choose_reduction(shown: ShownPicture, edge: int) -> int:
    """The whole number by which the sides of a picture must be divided."""
    most = min(edge, CHANGE) if shown.change else edge
    return math.ceil(max(shown.height, shown.width) / most)


def reduce_picture(pixels: Array, by: int, change: bool) -> Array:
    """The picture with blocks of `by` times `by` pixels as one.

    Blocks of a photo are averaged. Of a change the largest is kept, as it would average away.
    """
    if by == 1:
        return pixels
    h, w, c = (pixels.shape[0] // by, pixels.shape[1] // by, pixels.shape[2])
    blocks = pixels[: h * by, : w * by].reshape(h, by, w, by, c).swapaxes(1, 2)
    blocks = blocks.reshape(h, w, by * by, c)
    if not change:
        averaged: Array = blocks.mean(axis=2).round().astype(np.uint8)
        return averaged
    # 127.5 is no change
    far = np.abs(blocks - 127.5).sum(axis=3)
    kept: Array = np.take_along_axis(blocks, far.argmax(axis=2)[..., None, None], axis=2)
    return kept.squeeze(2)
