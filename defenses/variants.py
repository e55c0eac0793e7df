"""Source images parted by content, and what becomes of them without any attack."""

from __future__ import annotations

import io
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from robusteval.models.seeds import Ids, per_image, sample_seeds
from robusteval.search.balls import quantise

Array = np.ndarray[Any, Any]

SHARES = (0.6, 0.2, 0.2)  # of the source images: to fit, to stop and set thresholds, to judge
FOLDS = 5
ALIKE = 0.01  # root mean squared difference of thumbnails of one photograph, in [0, 1]
THUMBNAIL = 8  # pixels a side
SPLIT = np.uint64(0x27D4EB2F)  # what is drawn for this, apart from all else for an image


class Variant(NamedTuple):
    """The source images in one form."""

    name: str
    rows: Array  # which of them
    images: Array  # (rows, c, h, w) uint8


class Sources(NamedTuple):
    """The images that everything is made of."""

    x: Tensor  # (n, c, h, w) of 8 bits, on the CPU
    labels: Tensor
    ids: Ids
    groups: Array  # (n,): alike ones share a number


class Parts(NamedTuple):
    """Numbers of the groups to fit on, to stop by and set thresholds, and to judge."""

    train: Array
    validation: Array
    test: Array
    folds: tuple[Array, ...]  # all groups once more, in as many parts


def parted(sources: Sources, seed: int) -> Parts:
    """Groups in an order that depends on the content of their first image."""
    _, first = np.unique(sources.groups, return_index=True)
    order = np.argsort(sample_seeds(seed, sources.ids[first] ^ SPLIT).numpy(), kind="stable")
    ends = (np.cumsum(SHARES[:2]) * len(order)).round().astype(int)
    train, validation, test = np.split(order, ends)
    return Parts(train, validation, test, tuple(np.array_split(order, FOLDS)))


def alike(x: Tensor, ids: Ids) -> Array:
    """A number for each image ``(n,)``, the same for copies and near copies."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    small = nn.functional.adaptive_avg_pool2d(x, THUMBNAIL).flatten(1)
    far = ALIKE * small.shape[1] ** 0.5
    pairs = [np.empty((2, 0), dtype=np.int64)]
    for start in range(0, len(small), 512):
        near = (torch.cdist(small[start : start + 512], small) < far).nonzero().t().numpy()
        pairs.append(near + np.array([[start], [0]]))
    one, other = np.concatenate(pairs, 1)
    _, copy = np.unique(ids, return_inverse=True)
    n = len(ids)
    first = np.zeros(copy.max() + 1, dtype=np.int64)
    first[copy[::-1]] = np.arange(n)[::-1]
    one, other = np.append(one, np.arange(n)), np.append(other, first[copy])
    graph = coo_matrix((np.ones(len(one)), (one, other)), shape=(n, n))
    return np.asarray(connected_components(graph, directed=False)[1])


def in_bytes(x: Tensor) -> Array:
    """Images in [0, 1] rounded to 8 bits, as uint8 of the same shape."""
    return np.asarray((quantise(x) * 255).round().to(torch.uint8).cpu().numpy())


def floats(images: Array) -> Tensor:
    """Images of 8 bits in [0, 1]."""
    return quantise(torch.from_numpy(np.ascontiguousarray(images)).float() / 255)


def jpegs(x: Tensor, quality: int = 75) -> Tensor:
    """Images ``(n, c, h, w)`` after JPEG; unless there are three channels, each by itself."""
    out = in_bytes(x).transpose(0, 2, 3, 1).copy()
    for image in out:
        planes = [image] if image.shape[2] == 3 else list(np.moveaxis(image, 2, 0))
        found = []
        for plane in planes:
            file = io.BytesIO()
            Image.fromarray(plane).save(file, "JPEG", quality=quality)
            with Image.open(file, formats=("JPEG",)) as jpeg:
                found.append(np.asarray(jpeg))
        image[...] = found[0] if image.shape[2] == 3 else np.stack(found, 2)
    return floats(out.transpose(0, 3, 1, 2))


def cropped(x: Tensor, seeds: Tensor, part: float = 7 / 8) -> Tensor:
    """A part of each image at a random place, brought to the size of the whole."""
    h, w = x.shape[2:]
    height, width = max(1, round(part * h)), max(1, round(part * w))
    places = per_image(seeds, torch.Size((2,)))
    out = torch.empty_like(x)
    for row, image, (down, across) in zip(out, x, places.tolist(), strict=True):
        top, left = int(down * (h - height + 1)), int(across * (w - width + 1))
        piece = image[None, :, top : top + height, left : left + width]
        row.copy_(nn.functional.interpolate(piece, (h, w), mode="bilinear")[0])
    return out.clamp(0, 1)
