"""Corruptions that look like weather, of one image at a time: snow, frost, fog, spatter.

Images are ``(c, h, w)`` float32 in [0, 1]. Three channels are taken for red, green and blue; other
numbers get the grey of each colour.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageDraw

from .distortions import GREY, Constants, Pixels, drag, draw_normal, magnify, smooth

Layer = np.ndarray[Any, Any]  # (h, w)
WATER = (175, 238, 238)
MUD = (63, 42, 20)
# mean colour and standard deviation of the photographs of frost, one of which is there twice
PANES = (
    (78, 149, 166, 20),
    (201, 205, 214, 22),
    (201, 205, 214, 22),
    (138, 153, 165, 29),
    (112, 123, 135, 43),
)
FROZEN = 192  # pixels of frost on the shorter side: 224 on ImageNet-C's images, 160 on CIFAR-10-C's
FEATHER = 200  # pixels of frost for each feather
BARBS = 12  # on each side of a feather


def add_snow(x: Pixels, c: Constants, rng: np.random.Generator) -> Pixels:
    """A paler image, and flakes that fall within 45 degrees of straight down, twice."""
    drawn = np.float32(c["mean"]) + np.float32(c["scale"]) * draw_normal(x.shape[1:], rng)
    layer = magnify(drawn[None], max(c["flake"], 1.0))
    layer = np.where(layer < c["least"], np.float32(0), np.clip(layer, 0, 1))
    layer = np.floor(layer * 255) / np.float32(255)
    layer = drag(layer, c["radius"], c["sigma"], rng.uniform(-135, -45))
    layer = np.rint(layer * 255) / np.float32(255)
    pale = np.maximum(x, find_grey(x) * np.float32(1.5) + np.float32(0.5))
    kept = np.float32(c["kept"])
    return np.asarray(kept * x + (1 - kept) * pale + layer + layer[:, ::-1, ::-1])


def find_grey(x: Pixels) -> Pixels:
    """How bright an image looks ``(1, h, w)``; the mean of channels that are not three."""
    if len(x) != 3:
        return np.asarray(x.mean(0, keepdims=True))
    return np.asarray((x * GREY[:, None, None]).sum(0, keepdims=True))


def paint(colour: tuple[int, int, int], channels: int) -> Pixels:
    """A colour ``(c, 1, 1)``; its grey where channels are not three."""
    painted = np.asarray(colour, np.float32) / np.float32(255)
    if channels != 3:
        painted = np.full(channels, (painted * GREY).sum(), np.float32)
    return painted[:, None, None]


def add_fog(x: Pixels, c: Constants, rng: np.random.Generator) -> Pixels:
    """A cloud in front, and the image dimmed so that its brightest value is what it was."""
    cloud = draw_cloud(max(x.shape[1:]), c["decay"], rng)[: x.shape[1], : x.shape[2]]
    brightest, thick = x.max(), np.float32(c["thick"])
    return np.asarray((x + thick * cloud.astype(np.float32)) * (brightest / (brightest + thick)))


def draw_cloud(side: int, decay: float, rng: np.random.Generator) -> Layer:
    """Plasma by squares and diamonds, from 0 to 1, that repeats itself; at least `side` wide.

    Where the middle of four points is their mean and something random, which shrinks by the square
    of `decay` from one size of square to the next.
    """
    size = 1 << max(side - 1, 1).bit_length()
    cloud = np.zeros((size, size))
    step, strength = size, 1.0
    while step >= 2:
        half = step // 2

        def drift(sums: Layer, strength: float = strength) -> Layer:
            return sums / 4 + strength * rng.uniform(-1, 1, sums.shape)

        corners = cloud[::step, ::step]
        along = corners + np.roll(corners, -1, 0)
        cloud[half::step, half::step] = drift(along + np.roll(along, -1, 1))
        middles = cloud[half::step, half::step]
        beside = middles + np.roll(middles, 1, 0) + corners + np.roll(corners, -1, 1)
        cloud[::step, half::step] = drift(beside)
        above = middles + np.roll(middles, 1, 1) + corners + np.roll(corners, -1, 0)
        cloud[half::step, ::step] = drift(above)
        step, strength = half, strength / decay**2
    cloud -= cloud.min()
    return np.asarray(cloud / max(cloud.max(), 1e-12))


def add_spatter(x: Pixels, c: Constants, rng: np.random.Generator) -> Pixels:
    """Drops of water (severities 1 to 3), or of mud."""
    drawn = np.float32(c["mean"]) + np.float32(c["scale"]) * draw_normal(x.shape[1:], rng)
    liquid = smooth(drawn[None], c["smooth"])[0]
    wet = np.where(liquid >= np.float32(c["least"]), liquid, np.float32(0))
    if c["spread"] > 0:
        mud = smooth((wet > 0).astype(np.float32)[None], c["spread"])
        mud = np.where(mud < 0.8, np.float32(0), mud)
        return np.asarray(x * (1 - mud) + paint(MUD, len(x)) * mud)
    drops = (wet * 255).astype(np.uint8)
    shine: Layer = drops * shade_drops(drops)
    shine = shine * np.float32(c["strength"] / max(shine.max(), 1e-12))
    return np.asarray(x + paint(WATER, len(x)) * shine)


def shade_drops(drops: Layer) -> Layer:
    """How light falls on drops: by the distance from their rims, as if lit from one corner."""
    inside = 255 - cv2.Canny(drops, 50, 150)
    depth = np.minimum(cv2.distanceTransform(inside, cv2.DIST_L2, 5), 20)
    even = cv2.equalizeHist(cv2.blur(depth, (3, 3)).astype(np.uint8))
    light = np.array(((-2, -1, 0), (-1, 1, 1), (0, 1, 2)), np.float32)
    return np.asarray(cv2.blur(cv2.filter2D(even, cv2.CV_8U, light), (3, 3)), np.float32)


def add_frost(x: Pixels, c: Constants, rng: np.random.Generator) -> Pixels:
    """Ice on a pane in front of the image.

    The authors lay one of five photographs over the image. Ours is drawn: feathers of ice on a
    cloud, with the mean colour and the contrast of one of those photographs.
    """
    *colour, contrast = PANES[rng.integers(len(PANES))]
    ice = np.float32(contrast / 255) * draw_ice(x.shape[1], x.shape[2], rng)
    pane = np.clip(paint((colour[0], colour[1], colour[2]), len(x)) + ice, 0, 1)
    return np.float32(c["kept"]) * x + np.float32(c["frozen"]) * pane


def turn(angles: Layer) -> Layer:
    """Directions ``(n, 1, 2)`` of angles ``(n,)`` in radians."""
    return np.stack((np.cos(angles), np.sin(angles)), 1)[:, None]


def draw_ice(h: int, w: int, rng: np.random.Generator) -> Pixels:
    """Feathers of ice ``(h, w)``, with mean 0 and standard deviation 1 before they are resized.

    Drawn at one size and brought to that of the image, so that an image of any size sees them
    equally large.
    """
    scale = FROZEN / min(h, w)
    high, wide = (max(round(scale * size), 1) for size in (h, w))
    canvas = Image.new("F", (wide, high))
    pen = ImageDraw.Draw(canvas)
    count = max(high * wide // FEATHER, 1)
    starts = rng.uniform(0, (wide, high), (count, 2))
    angles, lengths = rng.uniform(0, 2 * np.pi, count), rng.uniform(8, 45, count)
    steps = np.linspace(0, 1, BARBS)[:, None]
    stems = starts[:, None] + lengths[:, None, None] * steps * turn(angles)  # (count, barbs, 2)
    # at each joint a barb to either side and back, shorter towards the tip
    barbs = lengths[:, None, None] / 3 * (1.1 - steps)
    sides = [stems + barbs * turn(angles + side * np.pi / 3) for side in (-1, 1)]
    lines = np.stack((stems, sides[0], stems, sides[1], stems), 2).reshape(count, -1)
    for line, shade in zip(lines.tolist(), rng.uniform(-0.6, 1, count).tolist(), strict=True):
        pen.line(line, fill=shade)
    ice = np.asarray(canvas) + draw_cloud(max(high, wide), 1.7, rng)[:high, :wide]
    ice = (ice - ice.mean()) / max(ice.std(), 1e-6)
    resized = Image.fromarray(ice.astype(np.float32)).resize((w, h), Image.Resampling.BILINEAR)
    return np.asarray(resized)
