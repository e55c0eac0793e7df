"""Images that show a concept at known places: drawn ones, or a folder of the user's."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from robusteval.datasets.checks import raise_as_unreadable
from robusteval.datasets.image_files import InsideFolder
from robusteval.datasets.images import find_orientation, open_image, to_chw, to_hwc, turn_upright
from robusteval.errors import UsageError
from robusteval.runs.reading import MANIFEST, check_amount, read_bytes

Array = np.ndarray[Any, Any]

MOST_ROWS = 200_000  # of a table; Broden has 63,305 images
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")


class Concept(NamedTuple):
    """Something an image can show, in a category such as colour."""

    name: str
    category: str


class Probe(NamedTuple):
    """An image and where it shows what."""

    image: Tensor  # (c, h, w) in [0, 1]
    masks: dict[int, Tensor]  # concept -> (h, w) bool
    categories: frozenset[str]  # those somebody has looked for in this image


class Concepts(Protocol):
    """Probes for a set of concepts."""

    name: str
    concepts: tuple[Concept, ...]

    def __len__(self) -> int: ...

    def probe(self, index: int) -> Probe:
        """The probe at this position."""
        ...


class Generated:
    """Drawn colours, textures and shapes with exact masks: no data needed, and no photographs.

    Every image shows one shape, filled with one texture in one colour, on a background of grey
    noise. Parameters: shape ``(c, h, w)`` of an image, and how many.
    """

    name = "generated"
    colours: ClassVar[dict[str, tuple[float, float, float]]] = {
        "red": (0.85, 0.1, 0.1),
        "green": (0.1, 0.7, 0.15),
        "blue": (0.1, 0.2, 0.85),
        "yellow": (0.9, 0.85, 0.1),
        "white": (0.97, 0.97, 0.97),
        "black": (0.03, 0.03, 0.03),
    }
    textures = ("plain", "horizontal stripes", "vertical stripes", "checks", "dots")
    shapes = ("disc", "square", "triangle", "ring", "cross")

    def __init__(self, shape: tuple[int, int, int], count: int = 300, seed: int = 0) -> None:
        self.shape, self.count, self.seed = shape, count, seed
        # what a grey image cannot show is not asked of it
        shown = [name for name in self.colours if shape[0] == 3 or name in ("white", "black")]
        self.concepts = (
            *(Concept(name, "colour") for name in shown),
            *(Concept(name, "texture") for name in self.textures),
            *(Concept(name, "shape") for name in self.shapes),
        )
        self._shown = shown

    def __len__(self) -> int:
        return self.count

    def probe(self, index: int) -> Probe:
        """Drawn from the seed and the position alone."""
        channels, height, width = self.shape
        rng = np.random.default_rng((self.seed, index))
        colour = int(rng.integers(len(self._shown)))
        texture = int(rng.integers(len(self.textures)))
        form = int(rng.integers(len(self.shapes)))
        radius = min(height, width) * rng.uniform(0.2, 0.42)
        down, across = np.mgrid[:height, :width] + 0.5
        v = (down - rng.uniform(radius, height - radius)) / radius
        u = (across - rng.uniform(radius, width - radius)) / radius
        inside = draw_shape(self.shapes[form], u, v)
        period = max(2, round(radius / 2.5))
        bright = draw_texture(self.textures[texture], down, across, period)
        paint = np.asarray(self.colours[self._shown[colour]])[:, None, None]
        # a texture alternates between its colour and a shade of it
        painted = paint * bright + (0.75 * paint + 0.12) * (1 - bright)
        grey = rng.uniform(0.35, 0.65) + rng.normal(0, 0.05, (1, height, width))
        image = np.where(inside, painted, np.clip(grey, 0, 1))
        if channels == 1:
            image = image.mean(0, keepdims=True)
        mask = torch.from_numpy(inside)
        offset = len(self._shown)
        found = (colour, offset + texture, offset + len(self.textures) + form)
        categories = frozenset(concept.category for concept in self.concepts)
        return Probe(torch.from_numpy(image).float(), dict.fromkeys(found, mask), categories)


def draw_shape(form: str, u: Array, v: Array) -> Array:
    """Where a shape of radius one around the origin is."""
    reach = np.hypot(u, v)
    shapes: dict[str, Array] = {
        "disc": reach <= 1,
        "square": np.maximum(abs(u), abs(v)) <= 0.85,
        "triangle": (v <= 0.8) & (abs(u) <= 0.55 * (v + 1)),
        "ring": (reach <= 1) & (reach >= 0.6),
        "cross": (np.minimum(abs(u), abs(v)) <= 0.3) & (np.maximum(abs(u), abs(v)) <= 1),
    }
    return shapes[form]


def draw_texture(texture: str, down: Array, across: Array, period: int) -> Array:
    """Where a texture has its own colour, 0 or 1."""
    row, column = (np.floor(2 * along / period).astype(int) for along in (down, across))
    bright = {
        "plain": np.ones_like(row),
        "horizontal stripes": row % 2,
        "vertical stripes": column % 2,
        "checks": (row + column) % 2,
        "dots": (row % 2) * (column % 2),
    }[texture]
    return np.asarray(bright, dtype=np.float64)


class Folder:
    """Images with masks from a folder: ``images/NAME`` and ``masks/CONCEPT/NAME.png``.

    A mask is true where it is not black; an image without a mask of a concept does not show it.
    """

    def __init__(self, folder: Path, shape: tuple[int, int, int]) -> None:
        self.name, self.shape = folder.name, shape
        self._images = sorted(p for p in (folder / "images").iterdir() if is_image(p))
        masks = folder / "masks"
        names = sorted(p.name for p in masks.iterdir() if p.is_dir()) if masks.is_dir() else []
        if not self._images or not names:
            raise UsageError(
                f"{folder} holds no images with masks: images/NAME.png and masks/CONCEPT/NAME.png"
            )
        self.concepts = tuple(Concept(name, "concept") for name in names)
        self._masks = [masks / name for name in names]

    def __len__(self) -> int:
        return len(self._images)

    def probe(self, index: int) -> Probe:
        """The probe at a position, read from its files."""
        path = self._images[index]
        found = {
            k: read_labels(folder / f"{path.stem}.png", self.shape) > 0
            for k, folder in enumerate(self._masks)
            if (folder / f"{path.stem}.png").exists()
        }
        return Probe(read_image(path, self.shape), found, frozenset({"concept"}))


class Broden:
    """The data set of arXiv:1704.05796: ``index.csv``, ``label.csv`` and ``images/``.

    Per image and category either whole-image labels or pictures of labels, of which a pixel's
    number is red plus 256 times green; several are separated by semicolons.
    """

    def __init__(
        self, folder: Path, shape: tuple[int, int, int], *, allow_outside: bool = False
    ) -> None:
        self.name, self.shape, self._pictures = folder.name, shape, folder / "images"
        self._index = folder / "index.csv"
        self._inside = None if allow_outside else InsideFolder(folder)
        labels, rows = read_table(folder / "label.csv"), read_table(folder / "index.csv")
        try:
            self.concepts = tuple(
                # a category may stand with its count, as in color(12)
                Concept(row["name"], row["category"].partition("(")[0].partition(";")[0])
                for row in labels
            )
            self._number = {int(row["number"]): k for k, row in enumerate(labels)}
            self._rows = [(row["image"], row) for row in rows]
        except (KeyError, ValueError):
            raise UsageError(
                f"{folder}: label.csv must have number, name and category, index.csv image"
            ) from None
        columns = set(rows[0]) if rows else set()
        self._categories = sorted({concept.category for concept in self.concepts} & columns)
        if not self._rows or not self._categories:
            raise UsageError(f"{folder}: index.csv names no image, or no category of label.csv")

    def __len__(self) -> int:
        return len(self._rows)

    def probe(self, index: int) -> Probe:
        """The probe at a position, read from its files."""
        name, row = self._rows[index]
        found: dict[int, Tensor] = {}
        seen = [category for category in self._categories if row[category]]
        for category in seen:
            for item in row[category].split(";"):
                for number, mask in self._labels(item):
                    k = self._number.get(number)
                    if k is not None:
                        found[k] = found[k] | mask if k in found else mask
        return Probe(read_image(self._locate(name), self.shape), found, frozenset(seen))

    def _locate(self, name: str) -> Path:
        path = self._pictures / name
        if self._inside is not None:
            self._inside.check(path, str(self._index))
        return path

    def _labels(self, item: str) -> Iterator[tuple[int, Tensor]]:
        if item.isdecimal():
            yield int(item), torch.ones(self.shape[1:], dtype=torch.bool)
            return
        labels = read_labels(self._locate(item), self.shape)
        for number in np.unique(labels.numpy()).tolist():
            if number:
                yield number, labels == number


def open_concepts(
    folder: Path, shape: tuple[int, int, int], *, allow_outside: bool = False
) -> Concepts:
    """The images with masks in a folder, as images of `shape` ``(c, h, w)``.

    Paths in ``index.csv`` stay inside the folder unless `allow_outside`. UsageError if the folder
    has none of the known layouts.
    """
    if (folder / "index.csv").exists():
        return Broden(folder, shape, allow_outside=allow_outside)
    if (folder / "images").is_dir():
        return Folder(folder, shape)
    raise UsageError(
        f"{folder} is no folder of concepts: it needs images/ and masks/CONCEPT/, or the index.csv,"
        " label.csv and images/ of Broden"
    )


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file with a header."""
    with raise_as_unreadable(path, "save it as comma-separated text in UTF-8"):
        text = read_bytes(path, MANIFEST).decode("utf-8-sig")
        check_amount(str(path), text.count("\n"), MOST_ROWS, "rows")
        return list(csv.DictReader(io.StringIO(text, newline=""), restval=""))


def is_image(path: Path) -> bool:
    """Whether a path is an image, by its suffix."""
    return path.suffix.lower() in SUFFIXES


def read_image(path: Path, shape: tuple[int, int, int]) -> Tensor:
    """An image ``(c, h, w)`` in [0, 1]; UsageError if it cannot be read."""
    mode = "L" if shape[0] == 1 else "RGB"
    values = np.asarray(
        open_picture(path, mode, shape, Image.Resampling.BILINEAR), dtype=np.float32
    )
    return torch.from_numpy(values.reshape(*shape[1:], -1).transpose(2, 0, 1) / 255).contiguous()


def read_labels(path: Path, shape: tuple[int, int, int]) -> Tensor:
    """A picture of labels ``(h, w)`` int64: red plus 256 times green."""
    values = np.asarray(open_picture(path, "RGB", shape, Image.Resampling.NEAREST), dtype=np.int64)
    return torch.from_numpy(values[..., 0] + 256 * values[..., 1])


def open_picture(
    path: Path, mode: str, shape: tuple[int, int, int], how: Image.Resampling
) -> Image.Image:
    """A picture of one mode and size, upright."""
    with (
        raise_as_unreadable(path, "replace it or leave it out"),
        open_image(path) as image,
    ):
        pixels = to_chw(np.asarray(image.convert(mode)))
        upright = np.ascontiguousarray(turn_upright(pixels, find_orientation(image)))
        return Image.fromarray(to_hwc(upright)).resize((shape[2], shape[1]), how)
