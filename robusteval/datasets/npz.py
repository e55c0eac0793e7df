"""NumPy archives with images and labels."""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import IO, Literal

import numpy as np

from robusteval.datasets.arrays import build_array_source
from robusteval.datasets.checks import CHUNK, Span, explain_cause, raise_as_unreadable
from robusteval.datasets.dataset import ArraySource
from robusteval.errors import RunError, UsageError
from robusteval.registry import DATA_SOURCES
from robusteval.runs.archives import (
    SUFFIX,
    Layout,
    locate_stored,
    open_archive,
    read_array,
    read_layout,
)
from robusteval.runs.reading import ARRAYS, open_regular

NPZ_KEYS = {
    "test": (("x_test", "y_test"), ("x", "y"), ("images", "labels")),
    "train": (("x_train", "y_train"), ("x", "y"), ("images", "labels")),
}
MOST_LISTED = 20  # arrays, in a message
MAX_IN_MEMORY = 256 * 2**20  # bytes; larger arrays are memory-mapped


@DATA_SOURCES.add("npz", suffix=".npz", written="FILE.npz")
def open_npz(
    path: Path, split: str, bands: int | None = None, span: Span | None = None
) -> ArraySource:
    """arrays x and y; NHWC, NCHW or NHW; uint8, floats in [0, 1], or with --range."""
    with (
        raise_as_unreadable(path, "write it again with numpy.savez, plain numbers only"),
        open_regular(path, ARRAYS) as file,
        open_archive(file, str(path)) as archive,
    ):
        entries = archive.namelist()
        keys = [entry.removesuffix(SUFFIX) for entry in entries if entry.endswith(SUFFIX)]
        pairs = [pair for pair in NPZ_KEYS[split] if set(pair) <= set(keys)]
        if not pairs:
            wanted = ", ".join("/".join(pair) for pair in NPZ_KEYS[split])
            more = [f"{len(keys) - MOST_LISTED} more"] if len(keys) > MOST_LISTED else []
            found = ", ".join(keys[:MOST_LISTED] + more) or "none"
            raise UsageError(f"{path} needs one of the pairs {wanted}; found {found}")
        x, y = pairs[0]
        images, labels = _read_member(archive, file, x), _read_member(archive, file, y)
    return build_array_source(f"{path.name} ({x})", images, labels, bands=bands, span=span)


def _read_member(archive: zipfile.ZipFile, file: IO[bytes], key: str) -> np.ndarray:
    """Load one array; a large one is mapped, from an unpacked copy without a name if need be."""
    layout = read_layout(archive, key, ARRAYS)
    info = archive.getinfo(key + SUFFIX)
    if info.file_size <= MAX_IN_MEMORY:
        return read_array(archive, key, ARRAYS)
    begin = locate_stored(file, info)
    if begin is not None and (begin + layout.begin) % layout.dtype.alignment == 0:
        with archive.open(info) as packed:
            while packed.read(CHUNK):  # to its end, where its checksum is compared
                pass
        with suppress(OSError):  # not every file system maps files
            return map_array(file, layout, begin)
    with archive.open(info) as packed, tempfile.TemporaryFile() as unpacked:
        _unpack(packed, unpacked, key)
        return map_array(unpacked, layout)


def _unpack(packed: IO[bytes], file: IO[bytes], key: str) -> None:
    try:
        shutil.copyfileobj(packed, file, CHUNK)
        file.flush()
    except OSError as error:
        raise RunError(
            f"no room to unpack the array {key} in {tempfile.gettempdir()}"
            f" ({explain_cause(error)}): set TMPDIR to a folder with more"
        ) from error


def map_array(file: IO[bytes], layout: Layout, begin: int = 0) -> np.ndarray:
    """Map an open .npy file, or one from a byte on; the mapping outlives the file."""
    order: Literal["F", "C"] = "F" if layout.fortran else "C"
    return np.memmap(file, layout.dtype, "r", begin + layout.begin, layout.shape, order)
