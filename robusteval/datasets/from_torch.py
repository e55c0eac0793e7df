"""A data set of PyTorch as data: labels read once, images when they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image

from robusteval.datasets.checks import (
    arrange_nchw,
    check_values,
    convert_labels,
    convert_to_array,
    raise_as_unreadable,
)
from robusteval.datasets.dataset import ArraySource, Data, build_data, check_shape_options
from robusteval.datasets.images import read_pixels
from robusteval.errors import NothingEvaluated, UsageError

LOOKED_AT = 16  # images that are checked before any is used
MAX_KEPT = 256 * 2**20  # bytes of images kept, so that these are not decoded again


class MapDataset(Protocol):
    """What is asked of a `torch.utils.data.Dataset`: pairs of image and label by position."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def from_dataset(
    dataset: Any,
    *,
    name: str | None = None,
    class_names: Sequence[str] | None = None,
    channels: int | None = None,
    size: int | None = None,
    resize: int | None = None,
) -> Data:
    """A `torch.utils.data.Dataset` of pairs ``(image, label)`` as data.

    Images may be Pillow images, tensors or arrays. Leave a normalisation out of the data set's
    transform, it belongs to the model, and everything random, since images are read more than
    once where they take more than 256 MB.

    Labels come from the attribute `targets`, `labels` or `tensors` where the data set has one that
    agrees with its first items; otherwise every item is read once for its label.

    Parameters
    ----------
    dataset : torch.utils.data.Dataset
        With a length; of each item the first two parts are used. Images are ``(h, w)``,
        ``(c, h, w)`` or ``(h, w, c)``; uint8, or floats in [0, 1]. A label is a
        whole number from 0 up, or one-hot.
    name : str, optional
        What reports call it; the name of its class if not given.
    class_names : sequence of str, optional
        What classes are called; `dataset.classes` if not given and there are such.
    channels : int, optional
        Channels that the model takes. Pillow images are brought to it, where it is 1 or 3.
    size, resize : int, optional
        As in `robusteval.datasets.sources.open_data`, in pixels.

    Raises
    ------
    UsageError
        Items are no such pairs, or an item cannot be read.
    NothingEvaluated
        There are no images.
    """
    check_shape_options(channels, size, resize)
    name = name or type(dataset).__name__
    if hasattr(dataset, "batch_size") and hasattr(dataset, "dataset"):
        raise UsageError(f"{name} gives batches: pass the data set itself, {name}.dataset")
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise UsageError(
            f"{name} has no positions and no length: pass a data set with __getitem__ and __len__"
        )
    if class_names is None:
        known = getattr(dataset, "classes", None)
        class_names = known if isinstance(known, list | tuple) else None
    names = None if class_names is None else tuple(map(str, class_names))
    images = DatasetImages(dataset, name, channels)
    source = ArraySource(name, images, images.read_labels(), names)
    return build_data(source, channels=channels, size=size, resize=resize)


class DatasetImages:
    """The images of a data set of PyTorch as arrays; as many are kept as there is room for."""

    def __init__(self, dataset: MapDataset, name: str, channels: int | None) -> None:
        self.dataset, self.name, self.channels = dataset, name, channels
        self._kept: dict[int, np.ndarray] = {}
        self._room = MAX_KEPT
        with raise_as_unreadable(name, "its length must be a number"):
            self._length = len(dataset)
        if not self._length:
            raise NothingEvaluated(f"{name} holds no images: there is nothing to evaluate")

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int, /) -> np.ndarray:
        kept = self._kept.get(index)
        return self._read_pair(index)[0] if kept is None else kept

    def read_labels(self) -> np.ndarray:
        """Labels ``(n,)`` int64, as listed or of every item; the first items are checked."""
        first = range(min(LOOKED_AT, len(self)))
        pairs = [self._read_pair(index) for index in first]
        values = [pixels.ravel() for pixels, _ in pairs]
        if len({value.dtype for value in values}) == 1:
            check_values(self.name, np.concatenate(values)[None])
        found = [label for _, label in pairs]
        labels = self._stack_labels(found)
        listed = self._list_labels()
        if listed is not None and np.array_equal(listed[: len(labels)], labels):
            return listed
        found += [self._read_pair(index)[1] for index in range(len(first), len(self))]
        return self._stack_labels(found)

    def _list_labels(self) -> np.ndarray | None:
        """The labels that the data set lists; None if it lists none, or something else."""
        try:
            return convert_labels(self.name, find_labels(self.dataset), len(self))
        except Exception:  # an attribute by that name may hold anything
            return None

    def _stack_labels(self, labels: list[np.ndarray]) -> np.ndarray:
        if len({label.shape for label in labels}) > 1:
            raise UsageError(f"{self.name} has labels of several shapes: give one integer each")
        return convert_labels(self.name, np.stack(labels), len(labels))

    def _read_pair(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Image ``(c, h, w)`` and label of an item; the image is kept while there is room."""
        where = f"{self.name}, image {index}"
        with raise_as_unreadable(where, "mend the data set or its transform"):
            item = self.dataset[index]
        if not isinstance(item, tuple | list) or len(item) < 2:
            parts = type(item).__name__
            if isinstance(item, tuple | list):
                parts += f" of length {len(item)}"
            raise UsageError(
                f"{where} is {parts}, not a pair (image, label): give each image with its label, or"
                " all of them as robusteval.from_arrays(images, labels)"
            )
        with raise_as_unreadable(where, "give a Pillow image, a tensor or an array"):
            pixels = convert_image(where, item[0], self.channels)
        with raise_as_unreadable(where, "give a label that is a number"):
            label = convert_to_array(item[1])
        if pixels.nbytes <= self._room and index not in self._kept:
            self._room -= pixels.nbytes
            self._kept[index] = pixels
        return pixels, label


def convert_image(where: str, image: Any, channels: int | None) -> np.ndarray:
    """One image as an array ``(c, h, w)`` of the type it had; UsageError if it is none."""
    if isinstance(image, Image.Image):
        return np.ascontiguousarray(read_pixels(image, channels or count_channels(image)))
    pixels = convert_to_array(image)
    if pixels.ndim not in (2, 3):
        raise UsageError(f"{where} has the shape {pixels.shape}: give (c, h, w), (h, w, c), (h, w)")
    pixels = np.ascontiguousarray(arrange_nchw(where, pixels[None], channels)[0])
    check_values(where, pixels[None], part=True)
    return pixels


def count_channels(image: Image.Image) -> int:
    """Channels of a Pillow image as it is: 1 of grey and black and white, otherwise 3."""
    return 1 if image.mode in ("1", "L", "LA") or image.mode.startswith("I") else 3


def find_labels(dataset: Any) -> np.ndarray:
    """The labels that a data set lists, also below `torch.utils.data.Subset`.

    AttributeError if it lists none.
    """
    if hasattr(dataset, "indices") and hasattr(dataset, "dataset"):
        labels: np.ndarray = find_labels(dataset.dataset)[list(dataset.indices)]
        return labels
    if hasattr(dataset, "tensors"):
        return convert_to_array(dataset.tensors[1])
    listed = dataset.targets if hasattr(dataset, "targets") else dataset.labels
    return convert_to_array(listed)
