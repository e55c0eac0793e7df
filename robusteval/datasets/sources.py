"""Batches of labelled images with stable ids, from every kind of data the suite reads.

Importing this module imports neither torch nor torchvision nor scikit-learn.
"""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from robusteval.datasets.checks import raise_as_unreadable, read_range
from robusteval.datasets.class_names import match_by_names
from robusteval.datasets.dataset import ArraySource, Data, Source, build_data, check_shape_options
from robusteval.errors import UsageError, check_argument
from robusteval.registry import DATA_SOURCES, Entry
from robusteval.runs.reading import ARRAYS, check_regular

SPLITS = ("test", "train")
# of the sources that come with the suite, in lists and messages
ORDER = (
    "digits",
    "mnist",
    "fashionmnist",
    "cifar10",
    "cifar100",
    "svhn",
    "imagenet",
    "arrow",
    "exported",
    "folder",
    "csv",
    "npz",
    "npy",
    "tensors",
    "parquet",
)


def open_data(
    spec: str | os.PathLike[str],
    *,
    split: str = "test",
    download: bool = False,
    channels: int | None = None,
    size: int | None = None,
    resize: int | None = None,
    interpolation: str = "bilinear",
    stretch: bool = False,
    classes: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    allow_outside: bool = False,
    value_range: Sequence[float] | None = None,
    slices: Sequence[str] = (),
) -> Data:
    """Open a data set without decoding more than its first image.

    Image files are read with Pillow as torchvision's loader reads them: alpha is dropped, of
    several frames the first is taken. Unlike there, photos are turned upright as their EXIF says,
    which a note tells. Grey of 16 bits is scaled, not clipped. Files become colour unless
    `channels` is 1.

    Parameters
    ----------
    spec : str or path
        One of the forms that `list_kinds` gives, such as ``digits`` or a file or folder.
    split : {"test", "train"}
        Part of a data set that has parts; ignored by those that have none.
    download : bool
        Whether torchvision may fetch a data set that is missing.
    channels : int, optional
        Channels that the model takes; image files have 1 or 3.
    size : int, optional
        Side in pixels that every image is brought to: images of that size stay untouched, of
        others the shorter side is resized (antialiased) and the centre cropped. Without it all
        images must have one shape.
    resize : int, optional
        Length of the shorter side before the crop, in pixels; `size` if not given.
    interpolation : str
        Filter for resizing: nearest, box, bilinear, hamming, bicubic or lanczos.
    stretch : bool
        Whether both sides get the length `resize`, as some networks are trained.
    classes : sequence of str, optional
        Names of the network's outputs in their order; a folder's images get the position of its
        name as their label. Without it folders are counted in sorted order.
    columns : sequence of str, optional
        The two columns of a CSV file that hold the path of the image and its label, ``file`` and
        ``label`` if not given.
    allow_outside : bool
        Whether paths in a CSV file may lead out of its folder.
    value_range : sequence of float, optional
        The values that stand for black and white in arrays and image files, such as
        ``(0, 65535)``, where they are not 0 and 255 of integers or 0 and 1 of floats.
    slices : sequence of str
        Other columns of a CSV file, such as ``["camera"]``, whose values divide the images into
        slices that reports tell of.

    Raises
    ------
    UsageError
        The data set is missing, malformed, or its values are not what they should be.
    RunError
        A download failed, or there is no room to unpack a large array.
    NothingEvaluated
        The data set has no images.
    """
    if split not in SPLITS:
        raise UsageError(f"there is no split '{split}': choose test or train")
    check_argument(
        "data",
        spec,
        (str, os.PathLike),
        "give a name or a path; what is in memory is opened by robusteval.from_arrays or, a torch"
        " data set, by robusteval.from_dataset",
    )
    check_shape_options(channels, size, resize, interpolation)
    options = {
        "split": split,
        "download": download,
        "channels": channels or 3,
        "columns": check_columns(columns),
        "allow_outside": allow_outside,
        "bands": channels,
        "span": read_range(value_range),
        "slices": check_slices(slices),
    }
    source = _open_source(os.fspath(spec), options)
    even = isinstance(source, ArraySource) and isinstance(source.images, np.ndarray)
    data = build_data(
        source,
        channels=channels,
        size=size,
        resize=resize,
        interpolation=interpolation,
        stretch=stretch,
        even=even,
    )
    return data if classes is None else match_by_names(data, list(classes), "the class names given")


def check_columns(columns: Sequence[str] | None) -> tuple[str, str] | None:
    """The columns of image and label; UsageError if they are not two."""
    if columns is None:
        return None
    names = [name.strip() for name in columns if isinstance(name, str)]
    if isinstance(columns, str) or len(names) != 2 or not all(names) or names[0] == names[1]:
        raise UsageError(
            "--columns takes two names, those of image and label: --columns image,label"
        )
    return names[0], names[1]


def check_slices(slices: Sequence[str]) -> tuple[str, ...]:
    """The columns that divide the images; UsageError if they are none, or one is there twice."""
    names = () if isinstance(slices, str) else tuple(slices)
    if isinstance(slices, str) or not all(isinstance(name, str) and name for name in names):
        raise UsageError('slices takes a list of columns, such as ["camera"]')
    if len(set(names)) < len(names):
        raise UsageError(f"--slice names a column twice: {', '.join(names)}")
    return tuple(name.strip() for name in names)


def list_kinds() -> list[tuple[str, str]]:
    """Every kind of data: the form of its spec, and one line on it."""
    return [(_write_form(entry), entry.summary.removesuffix(".")) for entry in _list_entries()]


def _write_form(entry: Entry) -> str:
    """How a user names this kind: as its author says, else by the suffix, else by its name."""
    return entry.written or (f"FILE{entry.suffixes[0]}" if entry.suffixes else entry.name)


def _list_entries() -> list[Entry]:
    """The data sources, ours in their usual order, then those of other packages by name."""
    entries = DATA_SOURCES.entries.values()
    return sorted(entries, key=lambda e: ORDER.index(e.name) if e.name in ORDER else len(ORDER))


def _open_source(spec: str, options: dict[str, Any]) -> Source:
    kind, colon, root = spec.partition(":")
    entries = _list_entries()
    forms = {entry.name: _write_form(entry) for entry in entries}
    named = [name for name, form in forms.items() if form.partition(":")[0] == name]
    if spec in named and forms[spec] == spec:
        return _call_source(spec, None, options)
    if kind in named and forms[kind] != kind:
        if not root:
            raise UsageError(f"{kind} needs the folder it is kept in: {kind}:DIR")
        return _call_source(kind, Path(os.path.expanduser(root)), options)
    path = Path(os.path.expanduser(spec))
    if spec and os.path.exists(path):
        if not os.path.isdir(path):
            check_regular(path, ARRAYS)
        entry = _find_entry(path, entries)
        if entry is not None:
            return _call_source(entry.name, path, options)
        *some, last = [suffix for entry in entries for suffix in entry.suffixes]
        raise UsageError(
            f"{path} is neither a folder nor a {', '.join(some)} or {last} file, the forms"
            " understood"
        )
    if not colon and (path.suffix or len(path.parts) > 1):
        raise UsageError(f"there is no file or folder {path}: check the path")
    near = difflib.get_close_matches(kind.lower(), named, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    known = ", ".join(forms.values())
    raise UsageError(f"'{spec}' is neither a data set nor a path{hint}; known are {known}")


def _find_entry(path: Path, entries: Sequence[Entry]) -> Entry | None:
    """The source that reads a path: by its suffix, then by what sources recognise, ours last."""
    if os.path.isfile(path) and (entry := DATA_SOURCES.find_suffix(path.suffix)):
        return entry
    for entry in sorted(entries, key=lambda e: e.name in ORDER):
        if entry.recognises:
            recognises = getattr(import_module(entry.module), entry.recognises)
            if recognises(path):
                return entry
    return None


def _call_source(name: str, path: Path | None, options: dict[str, Any]) -> Source:
    """What a registered function makes of a path, given the options that it has parameters for."""
    function = DATA_SOURCES.load(name)
    wanted = inspect.signature(function).parameters
    known = {key: value for key, value in options.items() if key in wanted}
    if options["span"] is not None and "span" not in wanted:
        raise UsageError(f"--range is for arrays and image files, not for {name}: leave it out")
    if options["slices"] and "slices" not in wanted:
        raise UsageError(
            f"--slice names columns of a table FILE.csv, and {path or name} has none: list the"
            " images in such a file, with the columns file,label and those of the slices"
        )
    places = () if path is None else (path,)
    if name in ORDER:
        opened = function(*places, **known)
    else:
        with raise_as_unreadable(path or name, f"the data source {name} broke"):
            opened = function(*places, **known)
    return opened.source if isinstance(opened, Data) else opened
