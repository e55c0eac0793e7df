"""One image: decoding, resizing, and a PNG file in memory."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from robusteval.datasets.checks import Span, check_span, check_width, scale_to_span
from robusteval.errors import UsageError
from robusteval.runs.reading import PICTURE, VARIABLE, check_amount, open_regular, raise_limit

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif")
)
# Left to choose, Pillow would open PostScript under any name, and that starts another program.
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "PPM", "GIF")
PIXELS = 50_000_000  # of an image; decoded they take 12 bytes each, and some more at times
RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
ORIENTATION = 0x0112  # the tag of EXIF
EXIF_IN_PNG = (b"eXIf", b"Raw profile type")
# for each orientation: whether axes are exchanged, then the steps along rows and columns
TURNS = {
    1: (False, 1, 1),
    2: (False, 1, -1),
    3: (False, -1, -1),
    4: (False, -1, 1),
    5: (True, 1, 1),
    6: (True, 1, -1),
    7: (True, -1, -1),
    8: (True, -1, 1),
}


def png_round_trip(x: Tensor) -> Tensor | None:
    """Write each image to a PNG file in memory and read it back.

    Parameters
    ----------
    x : Tensor
        Images, `(n, c, h, w)`, float32 in [0, 1].

    Returns
    -------
    Tensor or None
        What the files hold, like `x`; None where c is neither 1 nor 3.
    """
    import torch

    if x.shape[1] not in (1, 3):
        return None
    levels = (x.detach() * 255).round().to(torch.uint8).cpu().numpy()
    read = np.empty_like(levels, order="C")
    for row, image in enumerate(levels):
        file = io.BytesIO()
        # PNG loses nothing at any compression level; the first is the quickest.
        Image.fromarray(to_hwc(image)).save(file, "PNG", compress_level=1)
        with Image.open(file, formats=("PNG",)) as png:
            read[row] = to_chw(np.asarray(png))
    return torch.from_numpy(read).to(x) / x.new_tensor(255.0)


def decode_image(path: Path, channels: int) -> np.ndarray:
    """Decode a file to ``(c, h, w)``, uint8 or float32 in [0, 1], upright as its EXIF says."""
    with open_image(path) as file:
        return turn_upright(read_pixels(file, channels), find_orientation(file))


def decode_values(path: Path, channels: int, span: Span) -> np.ndarray:
    """Decode a file to ``(c, h, w)``, float32 in [0, 1], of values in a span; ValueError if not.

    Values are those that the file holds, of whatever width.
    """
    with open_image(path) as file:
        grey = file.mode == "L" or file.mode.startswith(("I", "F"))
        picture = file if grey else file.convert("L" if channels == 1 else "RGB")
        values = to_chw(np.asarray(picture))
        check_width(str(path), values.dtype, span)  # of colour Pillow keeps 8 bits of 16
        if not np.isfinite(values).all():
            raise ValueError("it holds NaN or infinite values")
        check_span(str(path), float(values.min()), float(values.max()), span)
        scaled = scale_to_span(np.ascontiguousarray(values), span)
        scaled = np.repeat(scaled, channels, axis=0) if len(scaled) < channels else scaled
        return turn_upright(scaled, find_orientation(file))


def scale_levels(pixels: np.ndarray) -> np.ndarray:
    """An image, uint8 or float32 in [0, 1], as float32."""
    scaled = pixels.astype(np.float32, order="C")
    if pixels.dtype == np.uint8:
        scaled /= np.float32(255)
    return scaled


def decode_bytes(content: bytes, channels: int) -> np.ndarray:
    """Decode the bytes of a file as `decode_image` does."""
    check_amount("an encoded image", len(content), PICTURE, "bytes")
    with open_stream(io.BytesIO(content), "it") as file:
        return turn_upright(read_pixels(file, channels), find_orientation(file))


_aside: ContextVar[bool] = ContextVar("aside", default=False)  # of threads that read ahead


def begin_reading_aside() -> None:
    """Let this thread never change what is one for all threads: filters of warnings, a limit.

    What it then cannot decode may be decoded elsewhere; so the error it meets says nothing.
    """
    _aside.set(True)


@contextmanager
def ignore_remarks() -> Iterator[None]:
    """Ignore what Pillow thinks of metadata and palettes, which does not concern the pixels."""
    if _aside.get():
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """An image file of one of `FORMATS`, with its size checked and its pixels not yet decoded.

    UsageError if it has more pixels than are read; whatever Pillow raises on a damaged file.
    """
    with open_regular(path, PICTURE) as file, open_stream(file, str(path)) as image:
        yield image


@contextmanager
def open_stream(file: BinaryIO, name: str) -> Iterator[Image.Image]:
    """An image in an open file, as by `open_image`."""
    usual = Image.MAX_IMAGE_PIXELS
    most = raise_limit(PIXELS)
    raised = bool(usual) and most > PIXELS and not _aside.get()
    with ignore_remarks():
        try:
            if raised:
                Image.MAX_IMAGE_PIXELS = most
            image = Image.open(file, formats=FORMATS)
        except UnidentifiedImageError:
            raise ValueError(f"cannot identify image file as one of {', '.join(FORMATS)}") from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            factor = max(2, math.ceil(int(*re.findall(r"\d+", str(error))[:1]) / PIXELS))
            raise ValueError(
                f"{error} If that is meant, set {VARIABLE}={factor} in the environment"
            ) from None
        finally:
            if raised:
                Image.MAX_IMAGE_PIXELS = usual
        with image:
            check_amount(name, image.width * image.height, PIXELS, "pixels")
            yield image


def find_orientation(image: Image.Image) -> int:
    """How a camera was held, as EXIF numbers it: 1 is upright; so is what says nothing."""
    try:
        found = image.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged metadata is no reason to lose the pixels
        return 1
    return found if found in TURNS else 1


def read_orientation(content: bytes) -> int:
    """How a camera was held, by the bytes of a file, of which no pixel is decoded."""
    if content.startswith(b"\x89PNG") and not any(mark in content for mark in EXIF_IN_PNG):
        return 1  # Pillow would decode it all to find that there is none
    with ignore_remarks():
        try:
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                few = image.width * image.height <= raise_limit(PIXELS)
                return find_orientation(image) if few else 1
        except Exception:  # whatever is wrong is said when it is decoded
            return 1


def turn_upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """View pixels ``(c, h, w)``, stored as the camera was held, as they are to be looked at."""
    transpose, rows, columns = TURNS[orientation]
    turned = pixels.transpose(0, 2, 1) if transpose else pixels
    return turned[:, ::rows, ::columns]


def read_pixels(image: Image.Image, channels: int) -> np.ndarray:
    """A Pillow image as ``(c, h, w)``: uint8, or float32 in [0, 1] where it has 16 bits.

    ValueError if the range of its values is not known.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        grey = np.asarray(image).astype(np.float32) / np.float32(65535)
        return np.repeat(grey[None], channels, axis=0)
    if image.mode in ("I", "F"):
        raise ValueError("the range of its 32-bit pixels is not known, give --range LOW,HIGH")
    return to_chw(np.asarray(image.convert("L" if channels == 1 else "RGB")))


class Fit(NamedTuple):
    """How an image is brought to one shape.

    Attributes
    ----------
    size : int
        Side of the centre that is cut out, in pixels.
    resize : int
        Length in pixels that the shorter side gets before.
    interpolation : str
        One of `RESAMPLING`; antialiased, as Pillow does it.
    stretch : bool
        Whether both sides get the length `resize`, whatever shape the image had.
    crop : {"rounded", "floored", "padded"}
        Which pixel a crop begins at that cannot be in the middle: the nearest even one, as in
        torchvision and timm, or the one before, as in transformers. Or the longer side gets the
        length `resize`, and what is missing of the shorter one is filled.
    fill : tuple of int
        Grey levels of what is filled, one for each channel or one for all.
    """

    size: int
    resize: int
    interpolation: str = "bilinear"
    stretch: bool = False
    crop: Literal["rounded", "floored", "padded"] = "rounded"
    fill: tuple[int, ...] = ()

    def find_sides(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that an image is resized to."""
        resize = self.resize
        if self.stretch:
            return resize, resize
        if self.crop == "padded":
            longer = max(height, width)
            return max(1, round(height * resize / longer)), max(1, round(width * resize / longer))
        if height <= width:
            return resize, int(resize * width / height)
        return int(resize * height / width), resize

    def find_start(self, side: int) -> int:
        """The first pixel of a side that is cut out; below 0 if that many are filled before."""
        spare = side - self.size
        if spare < 0:
            return -(-spare // 2)
        return spare // 2 if self.crop == "floored" else round(spare / 2)

    def describe(self) -> str:
        """The transform in words."""
        padded = self.crop == "padded" and not self.stretch
        sides = "both sides" if self.stretch else "longer side" if padded else "shorter side"
        way = self.interpolation + ("" if self.interpolation == "nearest" else ", antialiased")
        kept = f"(unless already {self.size}x{self.size})"
        rest = f", the rest filled with {'/'.join(map(str, self.fill))}" if padded else ""
        return f"{sides} to {self.resize} ({way}), centre crop {self.size}{rest} {kept}"


def resize_image(image: np.ndarray, fit: Fit, where: str) -> np.ndarray:
    """Bring `(c, h, w)`, uint8 or floats, to `(c, size, size)` as float32 in [0, 1].

    Values on the 8-bit lattice are resized as 8-bit files are, so the result is that of
    torchvision's `Resize` and `CenterCrop` on the file, whatever type the image was stored in.
    """
    _, h, w = image.shape
    size = fit.size
    if (h, w) == (size, size):
        return scale_levels(image)
    h, w = fit.find_sides(h, w)
    if h * w > min(raise_limit(PIXELS), Image.MAX_IMAGE_PIXELS or np.inf):
        raise UsageError(f"{where} is too long and narrow to be resized: leave it out")
    stored = image.dtype == np.uint8
    eight_bit = stored or all(
        np.array_equal(_round_levels(each) / np.float32(255), each) for each in image
    )
    top, left = fit.find_start(h), fit.find_start(w)
    centre = np.empty((len(image), size, size), dtype=np.float32)
    inside = (slice(max(0, -top), max(0, -top) + h), slice(max(0, -left), max(0, -left) + w))
    rows, columns = slice(max(0, top), max(0, top) + size), slice(max(0, left), max(0, left) + size)
    fill = fit.fill or (0,)
    for i, (plane, part) in enumerate(zip(image, centre, strict=True)):  # photos are large
        rounded = eight_bit and not stored
        levels = _round_levels(plane).astype(np.uint8) if rounded else plane
        resized = resize_plane(levels, h, w, fit.interpolation)
        part[:] = fill[i % len(fill)] / (1 if eight_bit else 255)
        part[inside] = resized[rows, columns]
    # cubic and Lanczos filters overshoot, which 8-bit files cut off
    return centre / np.float32(255) if eight_bit else centre.clip(0, 1)


def _round_levels(plane: np.ndarray) -> np.ndarray:
    """The nearest of 256 levels to each value in [0, 1], as floats."""
    levels: np.ndarray = np.rint(plane * 255)
    return levels


def resize_plane(plane: np.ndarray, h: int, w: int, interpolation: str = "bilinear") -> np.ndarray:
    """Resize one channel to ``(h, w)`` pixels, antialiased."""
    return np.asarray(Image.fromarray(plane).resize((w, h), RESAMPLING[interpolation]))


def choose_shown(x: Tensor) -> Tensor:
    """The channels of images ``(n, c, h, w)`` that a picture can show: of many the first three."""
    return x if x.shape[1] in (1, 3) else x[:, :3] if x.shape[1] > 3 else x[:, :1]


def to_chw(levels: np.ndarray) -> np.ndarray:
    """View an image ``(h, w)`` or ``(h, w, c)`` as ``(c, h, w)``."""
    return levels[None] if levels.ndim == 2 else levels.transpose(2, 0, 1)


def to_hwc(levels: np.ndarray) -> np.ndarray:
    """View an image ``(c, h, w)`` as ``(h, w)`` or ``(h, w, c)``, which Pillow takes."""
    return levels[0] if len(levels) == 1 else levels.transpose(1, 2, 0)
