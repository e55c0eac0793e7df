"""The source images of a detector, split by content into parts that share no photograph."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from robusteval.datasets.dataset import Data, draw
from robusteval.errors import UsageError
from robusteval.evaluation.batches import split_evenly
from robusteval.models.admission import check_images, check_labels
from robusteval.models.classifier import Classifier
from robusteval.models.seeds import Ids, sample_seeds
from robusteval.progress import Progress
from robusteval.search.balls import quantise

Array = np.ndarray[Any, Any]

LEAST = (20, 5, 5)  # images on which an attack succeeds, in each part
SHARES = (0.6, 0.2, 0.2)  # of the source images: to fit, to stop and set thresholds, to judge
FOLDS = 5
ALIKE = 0.01  # root mean squared difference of thumbnails of one photograph, in [0, 1]
THUMBNAIL = 8  # pixels a side
SPLIT = np.uint64(0x27D4EB2F)  # what is drawn for this, apart from all else for an image


class Sources(NamedTuple):
    """The source images, of which all variants are made."""

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


def split_groups(sources: Sources, seed: int) -> Parts:
    """Split groups in an order that depends on the content of their first image."""
    _, first = np.unique(sources.groups, return_index=True)
    order = np.argsort(sample_seeds(seed, sources.ids[first] ^ SPLIT).numpy(), kind="stable")
    ends = (np.cumsum(SHARES[:2]) * len(order)).round().astype(int)
    train, validation, test = np.split(order, ends)
    return Parts(train, validation, test, tuple(np.array_split(order, FOLDS)))


def group_alike(x: Tensor, ids: Ids) -> Array:
    """Number each image ``(n,)``, copies and near copies alike."""
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


def count_least() -> int:
    """The fewest images that can be parted."""
    return math.ceil(max(n / part for n, part in zip(LEAST, SHARES, strict=True)))


def read_sources(
    model: Classifier,
    data: Data,
    samples: int | None,
    seed: int,
    size: int,
    progress: Progress,
) -> Sources:
    """Read images drawn at random, rounded to 8 bits, `size` at a time.

    UsageError if they are too few or of one class, or the classifier cannot take them.
    """
    index = draw(len(data), samples, seed)
    least = count_least()
    if len(index) < least:
        raise UsageError(
            f"{len(index)} images cannot be parted into those to fit, to set thresholds and to"
            f" judge: give at least {least}"
        )
    check_labels(data, index, model)
    check_images(data, index, model)
    progress.begin("Reading images", len(index))
    found = []
    for places in split_evenly(len(index), size):
        found.append(data.batch(index[places]))
        progress.advance(len(places))
    progress.end()
    labels = torch.cat([batch.y for batch in found])
    if len(np.unique(labels.numpy())) < 2:
        raise UsageError(
            f"all images of {data.name} are of one class: an attack on them, and what it does to"
            " maps, would always be the same; give images of several classes"
        )
    x = quantise(torch.cat([batch.x for batch in found]))
    ids = np.concatenate([batch.ids for batch in found])
    return Sources(x, labels, ids, group_alike(x, ids))
