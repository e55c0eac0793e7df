"""Corruptions by noise, blur, colour and compression, of one image at a time.

Images are ``(c, h, w)`` float32 in [0, 1] with any number of channels. What comes back may leave
[0, 1] and is not rounded yet. Kernels and borders are those of the programs that made ImageNet-C
(arXiv:1903.12261), where a sentence does not say otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from scipy import fft, ndimage

Pixels = np.ndarray[Any, Any]  # (c, h, w) float32
Levels = np.ndarray[Any, Any]  # the same in uint8, from 0 to 255
Constants = Mapping[str, float]
FEW = 64 * 64  # pixels below which numpy is faster than Pillow at putting three channels together
GREY = np.array((0.299, 0.587, 0.114), np.float32)


def add_gaussian_noise(x: Pixels, c: Constants, rng: np.random.Generator) -> Pixels:
    """Normal noise of the same strength everywhere."""
    return x + np.float32(c["scale"]) * draw_normal(x.shape, rng)


def add_speckle_noise(x: Pixels, c: Constants, rng: np.random.Generator) -> Pixels:
    """Normal noise that grows with brightness."""
    return x + x * (np.float32(c["scale"]) * draw_normal(x.shape, rng))


def draw_normal(shape: tuple[int, ...], rng: np.random.Generator) -> Pixels:
    """Standard normal values in float32: drawn by torch, a third of NumPy's time."""
    drawing = torch.Generator().manual_seed(int(rng.integers(1 << 63)))
    return torch.randn(shape, generator=drawing).numpy()


def add_shot_noise(x: Pixels, c: Constants, rng: np.random.Generator) -> Pixels:
    """Light as few photons: a Poisson number of them in each value."""
    return (rng.poisson(x * c["photons"]) / c["photons"]).astype(np.float32)


def add_impulse_noise(x: Pixels, c: Constants, rng: np.random.Generator) -> Pixels:
    """Some values at their limits, half of them at each."""
    drawn, half = rng.random(x.shape, np.float32), np.float32(c["share"] / 2)
    return np.where(drawn < half, np.float32(0), np.where(drawn >= 1 - half, np.float32(1), x))


def blur_gaussian(x: Pixels, c: Constants, rng: np.random.Generator) -> Pixels:
    """Normal weights, cut off at four standard deviations."""
    return smooth(x, c["sigma"])


def smooth(x: Pixels, sigma: float) -> Pixels:
    """The rows and columns of an image under normal weights, its border repeated outside."""
    weights, border = build_bell(sigma), cv2.BORDER_REPLICATE
    smoothed = np.empty_like(x)
    for plane, out in zip(x, smoothed, strict=True):
        cv2.sepFilter2D(plane, -1, weights, weights, out, borderType=border)
    return smoothed


@lru_cache(maxsize=16)
def build_bell(sigma: float) -> Pixels:
    """Normal weights that sum to one, cut off at four standard deviations."""
    reach = int(4 * sigma + 0.5)
    weights = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    return np.asarray(weights / weights.sum(), np.float32)


def blur_defocus(x: Pixels, c: Constants, rng: np.random.Generator) -> Pixels:
    """A disk, as of a lens out of focus."""
    return correlate(x, build_disk(c["radius"], c["soft"]))


def build_disk(radius: float, soft: float) -> Pixels:
    """A disk of pixels that sum to one, its edge softened by normal weights."""
    reach, far = (8, 1) if radius <= 8 else (int(radius), 2)
    away = np.arange(-reach, reach + 1)
    disk = (away[:, None] ** 2 + away**2 <= radius**2).astype(np.float64)
    weights = np.exp(-(np.arange(-far, far + 1) ** 2) / (2 * soft**2))
    for axis in (0, 1):
        disk = ndimage.correlate1d(disk, weights / weights.sum(), axis, mode="mirror")
    used = int(np.abs(away[disk.any(0)]).max())
    inner = slice(reach - used, reach + used + 1)
    return np.asarray(disk[inner, inner] / disk.sum(), np.float32)


def correlate(x: Pixels, kernel: Pixels) -> Pixels:
    """An image under the weights of a square kernel, mirrored at its border."""
    if len(kernel) <= 5:
        return np.asarray(ndimage.correlate(x, kernel[None], mode="mirror"))
    reach = len(kernel) // 2
    padded = np.pad(
        x,
        ((0, 0), (reach, reach), (reach, reach)),
        mode="reflect" if min(x.shape[1:]) > 1 else "edge",
    )
    size = [fft.next_fast_len(n, real=True) for n in padded.shape[1:]]
    turned = np.asarray(fft.rfft2(kernel[::-1, ::-1], size))
    whole = np.asarray(fft.irfft2(np.asarray(fft.rfft2(padded, size)) * turned, size))
    h, w = x.shape[1:]
    return np.ascontiguousarray(whole[:, 2 * reach : 2 * reach + h, 2 * reach : 2 * reach + w])


def blur_motion(x: Pixels, c: Constants, rng: np.random.Generator) -> Pixels:
    """A movement within 45 degrees of level, fading behind."""
    return drag(x, c["radius"], c["sigma"], rng.uniform(-45, 45))


def drag(x: Pixels, radius: float, sigma: float, angle: float) -> Pixels:
    """An image moved along an angle (degrees), pixel by pixel, with half a bell of weights.

    What comes in over the border repeats it.
    """
    count = 2 * max(round(radius), 1) + 1
    weights = np.exp(-(np.arange(count) ** 2) / (2 * sigma**2))
    weights /= weights.sum()
    down, right = np.sin(np.deg2rad(angle)), np.cos(np.deg2rad(angle))
    rows = -np.ceil(np.arange(count) * down - 0.5).astype(int)
    columns = -np.ceil(np.arange(count) * right - 0.5).astype(int)
    h, w = x.shape[1:]
    inside = (np.abs(rows) < h) & (np.abs(columns) < w)
    count = count if inside.all() else int(np.argmin(inside))
    reach = max(int(np.abs(rows[:count]).max()), int(np.abs(columns[:count]).max()))
    padded = np.pad(x, ((0, 0), (reach, reach), (reach, reach)), mode="edge")
    moved = np.zeros_like(x)
    for weight, row, column in zip(weights[:count], rows, columns, strict=False):
        top, left = reach - row, reach - column
        moved += np.float32(weight) * padded[:, top : top + h, left : left + w]
    return moved


def blur_zoom(x: Pixels, c: Constants, rng: np.random.Generator) -> Pixels:
    """The mean of an image and of itself seen ever nearer."""
    factors = np.linspace(1, c["last"], max(round(c["factors"]), 2))
    total = x.copy()
    for factor in factors:
        total += magnify(x, float(factor))
    return total / np.float32(len(factors) + 1)


def magnify(x: Pixels, factor: float) -> Pixels:
    """The middle of an image, seen larger, at its old size."""
    for axis in (1, 2):
        size = x.shape[axis]
        part = int(np.ceil(size / factor))
        first, larger = (size - part) // 2, round(part * factor)
        places = np.arange(size) + (larger - size) // 2
        places = first + places * ((part - 1) / max(larger - 1, 1))
        low = np.clip(places.astype(int), 0, size - 1)
        share = (places - low).astype(np.float32)
        share = share[:, None] if axis == 1 else share
        near, next_one = x.take(low, axis), x.take(np.minimum(low + 1, size - 1), axis)
        x = near + share * (next_one - near)
    return x


def blur_glass(x: Pixels, c: Constants, rng: np.random.Generator) -> Pixels:
    """Pixels moved about, between two blurs.

    The authors' program means to swap neighbours and copies one over the other, as its two
    names are views of one array. So do we: this is what their data show.
    """
    reach = max(round(c["reach"]), 1)
    x = np.floor(smooth(x, c["sigma"]) * 255) / np.float32(255)
    for _ in range(round(c["rounds"])):
        x = (
            x.reshape(len(x), -1)
            .take(draw_origins(x.shape[1:], reach, rng), axis=1)
            .reshape(x.shape)
        )
    return smooth(x, c["sigma"])


def draw_origins(
    shape: tuple[int, ...], reach: int, rng: np.random.Generator
) -> np.ndarray[Any, Any]:
    """Where each pixel ``(h * w,)`` of a shuffled image comes from.

    From the last to the first, a pixel is overwritten by a neighbour, which may have been
    overwritten before. Instead of one after the other, each is given its neighbour's origin until
    all are known.
    """
    h, w = shape
    places = np.arange(h * w).reshape(h, w)
    origins = np.arange(2 * h * w)  # those past `last` stand for pixels before they are overwritten
    last = h * w
    rows, columns = slice(reach + 1, h - reach + 1), slice(reach + 1, w - reach + 1)
    mine = places[rows, columns]
    if mine.size == 0:
        return places.ravel()
    away = rng.integers(-reach, reach, (2, *mine.shape))
    theirs = mine + away[0] * w + away[1]
    written = np.zeros(last, bool)
    written[mine] = True
    origins[:last] += last
    origins[mine] = np.where((theirs > mine) & written[theirs], theirs, theirs + last)
    while True:
        further = origins[origins]
        if np.array_equal(further, origins):
            return further[:last] - last
        origins = further


def brighten(x: Pixels, c: Constants, rng: np.random.Generator) -> Pixels:
    """The brightest channel of each pixel raised, the others in proportion.

    With three channels the value of HSV, hue and saturation kept.
    """
    x = np.clip(x, np.float32(1e-20), np.float32(1))  # black is the faintest grey
    value = x.max(0)
    return np.asarray(x * (np.clip(value + np.float32(c["added"]), 0, 1) / value))


def saturate(x: Pixels, c: Constants, rng: np.random.Generator) -> Pixels:
    """Colours paler (severities 1, 2) or stronger. Grey images, of one channel, stay as they are.

    With three channels the saturation of HSV, where grey has the hue of the first channel.
    """
    value = x.max(0)
    spread = value - x.min(0)
    grey = spread == 0
    with np.errstate(divide="ignore", invalid="ignore"):
        before = spread / value
        after = np.clip(before * np.float32(c["factor"]) + np.float32(c["added"]), 0, 1)
        factor = np.where(grey, np.float32(0), after / before)
    coloured = value - (value - x) * factor
    if c["added"] and len(x) > 1:
        coloured[1:, grey] = value[grey] * np.float32(1 - c["added"])
    return np.asarray(coloured)


def lower_contrast(x: Pixels, c: Constants, rng: np.random.Generator) -> Pixels:
    """Each channel nearer to its mean."""
    mean = x.mean((1, 2), keepdims=True)
    return np.asarray((x - mean) * np.float32(c["kept"]) + mean)


def compress(x: Pixels, c: Constants, rng: np.random.Generator) -> Levels:
    """Written as a JPEG file and read back; one file for three channels, else one for each."""
    levels = round_to_levels(x)
    if len(levels) != 3:
        return np.stack([write_and_read(level, round(c["quality"])) for level in levels])
    # blue stands first in OpenCV
    read = write_and_read(cv2.merge([levels[2], levels[1], levels[0]]), round(c["quality"]))
    for channel, out in enumerate(levels):
        cv2.extractChannel(read, 2 - channel, out)
    return levels


def write_and_read(picture: Levels, quality: int) -> Levels:
    """A picture ``(h, w)`` or ``(h, w, 3)`` as it comes back from a JPEG file."""
    _, file = cv2.imencode(".jpg", picture, (cv2.IMWRITE_JPEG_QUALITY, quality))
    read = cv2.imdecode(file, cv2.IMREAD_GRAYSCALE if picture.ndim == 2 else cv2.IMREAD_COLOR)
    assert read is not None  # what was just written
    return read


def pixelate(x: Pixels, c: Constants, rng: np.random.Generator) -> Levels:
    """Averaged over fewer, larger pixels."""
    high, wide = (max(int(size * c["share"]), 1) for size in x.shape[1:])
    levels, box = round_to_levels(x), Image.Resampling.BOX
    if len(levels) == 3:
        small = np.asarray(build_picture(levels).resize((wide, high), box)).transpose(2, 0, 1)
    else:
        grey = [Image.fromarray(level).resize((wide, high), box) for level in levels]
        small = np.stack([np.asarray(picture) for picture in grey])
    # back by the same weights, of which one is 1 and the others 0
    back = small.take(repeat_places(wide, x.shape[2]), 2).take(repeat_places(high, x.shape[1]), 1)
    return np.asarray(back)


@lru_cache(maxsize=16)
def repeat_places(few: int, size: int) -> np.ndarray[Any, Any]:
    """For each of more pixels ``(size,)`` the one of a few that it lies in."""
    return np.asarray(((np.arange(size) + 0.5) * (few / size)).astype(int))


def build_picture(levels: Levels) -> Image.Image:
    """Three channels as one picture."""
    if levels[0].size < FEW:
        return Image.fromarray(np.ascontiguousarray(levels.transpose(1, 2, 0)))
    return Image.merge("RGB", [Image.fromarray(level) for level in levels])


def round_to_levels(x: Pixels | Levels) -> Levels:
    """The nearest of 256 grey levels; what is 8 bit already stays."""
    if x.dtype == np.uint8:
        return x
    # a half is added and the rest cut off, in one buffer: several times as fast as np.rint
    scaled = np.multiply(x, np.float32(255), dtype=np.float32)
    scaled += np.float32(0.5)
    np.clip(scaled, 0, 255.5, out=scaled)
    return scaled.astype(np.uint8)


def bend(x: Pixels, c: Constants, rng: np.random.Generator) -> Pixels:
    """Three points moved, all else with them, and then every pixel by a smooth field."""
    h, w = x.shape[1:]
    middle, third = np.array((h // 2, w // 2)), min(h, w) // 3
    corners = middle + third * np.array(((1, 1), (-1, 1), (-1, -1)))  # rows and columns
    drawn = rng.uniform(-1, 1, (3, 2))
    grid = np.stack(np.meshgrid(np.arange(h), np.arange(w), indexing="ij"))
    if third:
        moved = np.c_[corners + c["shift"] * drawn, np.ones(3)]
        back = np.linalg.solve(moved, corners.astype(np.float64))  # from where it goes to whence
        places = back[0, :, None, None] * grid[0] + back[1, :, None, None] * grid[1]
        x = sample(x, places + back[2, :, None, None], repeated=False)
    field = c["bend"] * smooth_field(rng.uniform(-1, 1, (2, h, w)), c["smooth"])
    return sample(x, grid + field, repeated=True)


def smooth_field(field: np.ndarray[Any, Any], sigma: float) -> np.ndarray[Any, Any]:
    """Two fields ``(2, h, w)`` under normal weights up to three standard deviations, mirrored.

    By cosine transforms, as weights may reach farther than the image does.
    """
    reach = int(3 * sigma + 0.5)
    if reach < 1:
        return field
    weights = np.exp(-(np.arange(1, reach + 1) ** 2) / (2 * sigma**2))
    whole = 1 + 2 * weights.sum()
    spectrum = np.asarray(fft.dctn(field, axes=(1, 2)))
    for axis in (1, 2):
        waves = np.arange(field.shape[axis]) * (np.pi / field.shape[axis])
        # summed here and not by a matrix product, whose last bits depend on threads
        passed = 1 + 2 * (np.cos(np.outer(waves, np.arange(1, reach + 1))) * weights).sum(1)
        passed /= whole
        spectrum *= passed[:, None] if axis == 1 else passed
    return np.asarray(fft.idctn(spectrum, axes=(1, 2)))


def sample(x: Pixels, places: np.ndarray[Any, Any], *, repeated: bool) -> Pixels:
    """An image at rows and columns ``(2, h, w)`` between its pixels, by the four nearest.

    Mirrored outside, its border pixels twice where `repeated`.
    """
    first, share = np.floor(places), places - np.floor(places)
    first = first.astype(int)
    rows, columns = (
        [fold(first[axis] + step, x.shape[1 + axis], repeated) for step in (0, 1)]
        for axis in (0, 1)
    )
    down, right = share.astype(np.float32)
    flat, w = x.reshape(len(x), -1), x.shape[2]
    lines = []
    for row in rows:
        left, other = (flat.take(row * w + column, axis=1) for column in columns)
        lines.append(left + right * (other - left))
    return np.asarray(lines[0] + down * (lines[1] - lines[0]))


def fold(places: np.ndarray[Any, Any], size: int, repeated: bool) -> np.ndarray[Any, Any]:
    """Places on a line, mirrored into ``0 … size - 1``."""
    if size == 1:
        return np.zeros_like(places)
    period = 2 * size if repeated else 2 * size - 2
    places = places % period
    end = period - 1 if repeated else period
    return np.asarray(np.minimum(places, end - places))
