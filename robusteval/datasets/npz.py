"""NumPy archives with images and labels."""

from __future__ import annotations

import math
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import IO

import numpy as np

from robusteval.datasets.arrays import build_array_source
from robusteval.datasets.checks import (
    CHUNK,
    explain_cause,
    raise_as_unreadable,
)
from robusteval.datasets.dataset import ArraySource
from robusteval.errors import RunError, UsageError
from robusteval.registry import DATA_SOURCES

NPZ_KEYS = {
    "test": (("x_test", "y_test"), ("x", "y"), ("images", "labels")),
    "train": (("x_train", "y_train"), ("x", "y"), ("images", "labels")),
}
MAX_IN_MEMORY = 256 * 2**20  # bytes; larger arrays are memory-mapped


@DATA_SOURCES.add("npz", suffix=".npz", written="FILE.npz")
def open_npz(path: Path, split: str) -> ArraySource:
    """arrays x and y; NHWC, NCHW or NHW; uint8, or floats in [0, 1]."""
    with (
        raise_as_unreadable(path, "write it again with numpy.savez, plain numbers only"),
        zipfile.ZipFile(path) as archive,
    ):
        entries = archive.namelist()
        keys = [entry.removesuffix(".npy") for entry in entries if entry.endswith(".npy")]
        pairs = [pair for pair in NPZ_KEYS[split] if set(pair) <= set(keys)]
        if not pairs:
            wanted = ", ".join("/".join(pair) for pair in NPZ_KEYS[split])
            found = ", ".join(keys) or "none"
            raise UsageError(f"{path} needs one of the pairs {wanted}; found {found}")
        x, y = pairs[0]
        images, labels = _read_member(archive, x), _read_member(archive, y)
    return build_array_source(f"{path.name} ({x})", images, labels)


def _read_member(archive: zipfile.ZipFile, key: str) -> np.ndarray:
    """Load one array; a large one is mapped from an unpacked copy without a name."""
    entry = archive.getinfo(f"{key}.npy")
    with archive.open(entry) as packed:
        if entry.file_size <= MAX_IN_MEMORY:
            array: np.ndarray = np.lib.format.read_array(packed, allow_pickle=False)
            return array
        with tempfile.TemporaryFile() as file:
            _unpack(packed, file, key)
            return _map_array(file)


def _unpack(packed: IO[bytes], file: IO[bytes], key: str) -> None:
    try:
        shutil.copyfileobj(packed, file, CHUNK)
        file.seek(0)
    except OSError as error:
        raise RunError(
            f"no room to unpack the array {key} in {tempfile.gettempdir()}"
            f" ({explain_cause(error)}): set TMPDIR to a folder with more"
        ) from error


def _map_array(file: IO[bytes]) -> np.ndarray:
    """Map an open .npy file; the mapping outlives the file, and the system frees both."""
    header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }[np.lib.format.read_magic(file)]
    shape, fortran, dtype = header(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    flat: np.ndarray = np.memmap(file, dtype, "r", offset=file.tell(), shape=math.prod(shape))
    return flat.reshape(shape, order="F" if fortran else "C")
