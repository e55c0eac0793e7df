"""Batches of labelled images with stable ids, from every kind of data the suite reads.

Importing this module imports neither torch nor torchvision nor scikit-learn.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from robusteval.datasets.arrays import ArraySource
from robusteval.datasets.dataset import Data, Source
from robusteval.datasets.digits import open_digits
from robusteval.datasets.image_files import build_folder_source, open_imagenet, open_manifest
from robusteval.datasets.npz import NPZ_KEYS, open_npz
from robusteval.datasets.torchvision_sets import TORCHVISION, read_torchvision_set
from robusteval.errors import NothingEvaluated, UsageError

KINDS = (
    ("digits", "scikit-learn's handwritten digits, 32x32 grey, 500 held out; needs no files"),
    ("mnist:DIR", "MNIST, 28x28 grey, in torchvision's layout below DIR"),
    ("fashionmnist:DIR", "FashionMNIST, 28x28 grey, in torchvision's layout below DIR"),
    ("cifar10:DIR", "CIFAR-10, 32x32 colour, in torchvision's layout below DIR"),
    ("cifar100:DIR", "CIFAR-100, 32x32 colour, in torchvision's layout below DIR"),
    ("svhn:DIR", "SVHN, 32x32 colour, in torchvision's layout below DIR"),
    ("imagenet:DIR", "ImageNet validation images, DIR/val with one folder per WordNet id"),
    ("FOLDER", "image files, one sub-folder per class, classes in sorted order"),
    ("FILE.csv", "image files listed with the columns file,label; paths relative to the CSV"),
    ("FILE.npz", "arrays x and y; NHWC, NCHW or NHW; uint8, or floats in [0, 1]"),
)


def open_data(
    spec: str,
    *,
    split: str = "test",
    download: bool = False,
    channels: int | None = None,
    size: int | None = None,
    resize: int | None = None,
) -> Data:
    """Open a data set without decoding more than its first image.

    Image files are read with Pillow as torchvision's loader reads them: alpha is dropped, EXIF
    orientation is ignored, of several frames the first is taken. Grey of 16 bits is scaled, not
    clipped. Files become colour unless `channels` is 1.

    Parameters
    ----------
    spec : str
        One of the forms that `list_kinds` gives.
    split : {"test", "train"}
        Part of a data set that has parts; ignored by those that have none.
    download : bool
        Whether torchvision may fetch a data set that is missing.
    channels : int, optional
        Channels that the model takes, 1 or 3.
    size : int, optional
        Side in pixels that every image is brought to: images of that size stay untouched, of
        others the shorter side is resized (bilinear, antialiased) and the centre cropped.
        Without it all images must have one shape.
    resize : int, optional
        Length of the shorter side before the crop, in pixels; `size` if not given.

    Raises
    ------
    UsageError
        The data set is missing, malformed, or its values are not what they should be.
    RunError
        A download failed, or there is no room to unpack a large array.
    NothingEvaluated
        The data set has no images.
    """
    if split not in NPZ_KEYS:
        raise UsageError(f"there is no split '{split}': choose test or train")
    if channels not in (None, 1, 3):
        raise UsageError(f"the model takes {channels} channels: only images of 1 or 3 can be read")
    if size is not None and size < 1:
        raise UsageError(f"--size must be at least 1 pixel, not {size}")
    if resize is not None and (size is None or resize < size):
        raise UsageError("--resize needs --size, and cannot be smaller than it")
    source = _source(spec, split, download, channels or 3)
    if len(source) == 0:
        raise NothingEvaluated(f"{source.name} holds no images: there is nothing to evaluate")
    c, h, w = source.image(0).shape
    if channels not in (None, c):
        raise UsageError(
            f"the model takes {channels} channels, the images of {source.name} have {c}: "
            "convert the images, or wrap the model so that it takes them"
        )
    if size is None or (isinstance(source, ArraySource) and (h, w) == (size, size)):
        return Data(source, (c, h, w))
    return Data(source, (c, size, size), size, resize or size)


def list_kinds() -> list[tuple[str, str]]:
    """Every kind of data: the form of its spec, and one line on it."""
    return list(KINDS)


def _source(spec: str, split: str, download: bool, channels: int) -> Source:
    kind, colon, root = spec.partition(":")
    if spec == "digits":
        return open_digits(split)
    if kind in TORCHVISION or kind == "imagenet":
        if not root:
            raise UsageError(f"{kind} needs the folder it is kept in: {kind}:DIR")
        folder = Path(os.path.expanduser(root))
        if kind == "imagenet":
            return open_imagenet(folder, split, download, channels)
        return read_torchvision_set(kind, folder, split, download)
    path = Path(os.path.expanduser(spec))
    if spec and os.path.isdir(path):
        return build_folder_source(path, path.resolve().name, channels)
    if os.path.isfile(path):
        if path.suffix.lower() == ".csv":
            return open_manifest(path, channels)
        if path.suffix.lower() == ".npz":
            return open_npz(path, split)
        raise UsageError(
            f"{path} is neither a folder nor a .csv or .npz file, the forms understood"
        )
    if not colon and (path.suffix or len(path.parts) > 1):
        raise UsageError(f"there is no file or folder {path}: check the path")
    near = difflib.get_close_matches(kind.lower(), ("digits", *TORCHVISION, "imagenet"), n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    forms = ", ".join(form for form, _ in KINDS)
    raise UsageError(f"'{spec}' is neither a data set nor a path{hint}; known are {forms}")
