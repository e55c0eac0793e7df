"""Batches of labelled images with stable ids, from every kind of data the suite reads.

Importing this module imports neither torch nor torchvision nor scikit-learn.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import math
import os
import re
import shutil
import struct
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from robusteval.errors import NothingEvaluated, RobustevalError, RunError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

# (class in torchvision.datasets, where it keeps its files below the root)
TORCHVISION = {
    "mnist": ("MNIST", "MNIST/raw"),
    "fashionmnist": ("FashionMNIST", "FashionMNIST/raw"),
    "cifar10": ("CIFAR10", "cifar-10-batches-py"),
    "cifar100": ("CIFAR100", "cifar-100-python"),
    "svhn": ("SVHN", "{split}_32x32.mat"),
}
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
SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif")
)
# Left to choose, Pillow would open PostScript under any name, and that starts another program.
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "PPM", "GIF")
SPLIT_FOLDERS = frozenset(("train", "test", "val", "valid", "validation"))
NPZ_KEYS = {
    "test": (("x_test", "y_test"), ("x", "y"), ("images", "labels")),
    "train": (("x_train", "y_train"), ("x", "y"), ("images", "labels")),
}
MAX_IN_MEMORY = 256 * 2**20  # bytes; larger arrays are memory-mapped
CHUNK = 16 * 2**20  # bytes looked at or copied at a time

Positions = np.ndarray[Any, np.dtype[np.int64]]


class Batch(NamedTuple):
    """Images of one data set, in the order they were asked for.

    Attributes
    ----------
    x : Tensor
        Images, `(n, c, h, w)`, float32 in [0, 1], contiguous.
    y : Tensor
        Labels, `(n,)`, int64.
    ids : ndarray
        What `image_id` says of each image, `(n,)`, uint64.
    index : ndarray
        Positions in the data set, `(n,)`, int64.
    """

    x: Tensor
    y: Tensor
    ids: np.ndarray
    index: np.ndarray  # type: ignore[assignment]  # hides the method that every tuple has


class Source(Protocol):
    """What a kind of data must offer.

    Attributes
    ----------
    name : str
        What to call the data set.
    class_names : tuple of str or None
        Names in label order, where the data set has them.
    labels : ndarray
        `(n,)`, int64, known without decoding an image.
    notes : tuple of str
        Sentences about the data set that its user should read.
    """

    @property
    def name(self) -> str: ...
    @property
    def class_names(self) -> tuple[str, ...] | None: ...
    @property
    def labels(self) -> np.ndarray: ...
    @property
    def notes(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def where(self, index: int) -> str:
        """Give what to call one image in a message."""
        ...

    def raw(self, index: int) -> bytes:
        """Give the bytes that stand for one image in a fingerprint, undecoded."""
        ...

    def image(self, index: int) -> np.ndarray:
        """Give one image, `(c, h, w)`, float32 in [0, 1]."""
        ...


@dataclass(frozen=True, eq=False)
class Data:
    """A source and how its images are brought to one shape.

    Attributes
    ----------
    source : Source
        Where the images come from.
    shape : tuple of int
        `(c, h, w)` of every image in a batch.
    size : int or None
        Side of the centre crop in pixels; None leaves images as stored.
    resize : int or None
        Length in pixels that the shorter side gets before the crop; None without a crop.
    """

    source: Source
    shape: tuple[int, int, int]
    size: int | None = None
    resize: int | None = None

    def __len__(self) -> int:
        return len(self.source)

    @property
    def name(self) -> str:
        """What to call the data set."""
        return self.source.name

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names in label order, where the data set has them."""
        return self.source.class_names

    @property
    def labels(self) -> np.ndarray:
        """`(n,)`, int64."""
        return self.source.labels

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about the data set that its user should read."""
        return self.source.notes

    @property
    def transform(self) -> str:
        """How images are brought to one shape, in words."""
        if self.size is None:
            return "as stored"
        kept = f"(unless already {self.size}x{self.size})"
        return f"shorter side to {self.resize}, centre crop {self.size} {kept}"

    def batch(self, index: Sequence[int] | np.ndarray) -> Batch:
        """Read the images at these positions.

        Raises
        ------
        UsageError
            A file cannot be decoded, or is not of the shape of the others.
        """
        import torch

        positions = np.array(index, dtype=np.int64)
        x = np.empty((len(positions), *self.shape), dtype=np.float32)
        for row, position in enumerate(positions.tolist()):
            x[row] = self._image(position)
        ids = np.array([image_id(image) for image in x], dtype=np.uint64)
        y = torch.from_numpy(self.labels[positions])
        return Batch(torch.from_numpy(x), y, ids, positions)

    def fingerprint(
        self,
        index: Sequence[int] | np.ndarray,
        progress: Callable[[int], object] | None = None,
    ) -> str:
        """SHA-256, in hexadecimal, of these images and labels in this order.

        It covers the undecoded bytes, the transform and the shape, so it says what was put in.
        The ids of a batch say what came out of the decoder.

        Parameters
        ----------
        index : sequence of int
            Positions in the data set.
        progress : callable, optional
            Called with 1 after each image.
        """
        digest = hashlib.sha256(f"{self.transform} {self.shape}".encode())
        positions = np.array(index, dtype=np.int64).tolist()
        for position in positions:
            raw = self.source.raw(position)
            digest.update(struct.pack("<qq", len(raw), self.labels[position]))
            digest.update(raw)
            if progress is not None:
                progress(1)
        return digest.hexdigest()

    def _image(self, position: int) -> np.ndarray:
        image = self.source.image(position)
        if self.size is not None and self.resize is not None:
            image = _resized(image, self.size, self.resize, self.source.where(position))
        if image.shape != self.shape:
            _, h, w = image.shape
            raise UsageError(
                f"{self.source.where(position)} is {w}x{h} pixels, the first image is "
                f"{self.shape[2]}x{self.shape[1]}: pass --size to bring all to one shape"
            )
        return image


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


def from_arrays(
    images: np.ndarray,
    labels: np.ndarray,
    *,
    name: str = "arrays",
    class_names: tuple[str, ...] | None = None,
) -> Data:
    """Images and labels in memory as data, checked as those of a file are.

    Parameters
    ----------
    images : ndarray
        ``(n, c, h, w)``, ``(n, h, w, c)`` or ``(n, h, w)``; uint8, or floats in [0, 1].
    labels : ndarray
        ``(n,)`` whole numbers from 0 up.
    name : str
        What reports call it.
    class_names : tuple of str, optional
        What classes are called.

    Raises
    ------
    UsageError
        Shapes, values or labels are not of this form.
    NothingEvaluated
        There are no images.
    """
    source = _arrays(name, images, labels, class_names)
    c, h, w = source.image(0).shape
    return Data(source, (c, h, w))


def draw(n: int, samples: int | None, seed: int) -> np.ndarray:
    """Choose the images of a run: the start of a seeded permutation.

    A smaller draw with the same seed is the start of a larger one.

    Parameters
    ----------
    n : int
        Images in the data set.
    samples : int or None
        How many to choose; all if None or more than there are.
    seed : int
        Not negative.

    Returns
    -------
    ndarray
        Positions, `(min(n, samples),)`, int64, none twice.
    """
    if samples is not None and samples < 1:
        raise UsageError(f"--samples must be at least 1, not {samples}")
    # The raw bits are all that NumPy promises never to change; Generator.permutation may.
    keys = np.random.PCG64(seed).random_raw(n)
    return np.argsort(keys).astype(np.int64)[:samples]


def image_id(x: np.ndarray) -> int:
    """Name an image by its content.

    Parameters
    ----------
    x : ndarray
        Image, `(c, h, w)`, values in [0, 1].

    Returns
    -------
    int
        The first eight bytes of the SHA-256 of its shape and its float32 values.
    """
    digest = hashlib.sha256(str(x.shape).encode())
    digest.update(x.astype("<f4").tobytes())
    return int.from_bytes(digest.digest()[:8], "big")


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
        Image.fromarray(_hwc(image)).save(file, "PNG", compress_level=1)
        with Image.open(file, formats=("PNG",)) as png:
            read[row] = _chw(np.asarray(png))
    return torch.from_numpy(read).to(x) / x.new_tensor(255.0)


def list_kinds() -> list[tuple[str, str]]:
    """Every kind of data: the form of its spec, and one line on it."""
    return list(KINDS)


@dataclass(frozen=True, eq=False)
class ArraySource:
    """Images in one array, `(n, c, h, w)`: integers from 0 to 255 or floats in [0, 1]."""

    name: str
    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def where(self, index: int) -> str:
        """Name the data set and the position."""
        return f"{self.name}, image {index}"

    def raw(self, index: int) -> bytes:
        """Give the stored values with their type, whatever the layout they were stored in."""
        return self.images.dtype.str.encode() + np.ascontiguousarray(self.images[index]).tobytes()

    def image(self, index: int) -> np.ndarray:
        """Scale one image, `(c, h, w)`, to float32 in [0, 1]."""
        pixels = np.array(self.images[index], dtype=np.float32, order="C")
        return pixels / np.float32(255) if self.images.dtype.kind in "iu" else pixels


@dataclass(frozen=True, eq=False)
class FileSource:
    """Images in one file each."""

    name: str
    files: tuple[Path, ...]
    labels: np.ndarray
    channels: int
    class_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.files)

    def where(self, index: int) -> str:
        """Name the file."""
        return str(self.files[index])

    def raw(self, index: int) -> bytes:
        """Read the file as it is."""
        with _reading(self.files[index], "replace it or leave it out"):
            return self.files[index].read_bytes()

    def image(self, index: int) -> np.ndarray:
        """Decode the file to `(c, h, w)`, float32 in [0, 1]."""
        with _reading(self.files[index], "replace it or leave it out"):
            return _decoded(self.files[index], self.channels)


def _source(spec: str, split: str, download: bool, channels: int) -> Source:
    kind, colon, root = spec.partition(":")
    if spec == "digits":
        return _digits(split)
    if kind in TORCHVISION or kind == "imagenet":
        if not root:
            raise UsageError(f"{kind} needs the folder it is kept in: {kind}:DIR")
        folder = Path(os.path.expanduser(root))
        if kind == "imagenet":
            return _imagenet(folder, split, download, channels)
        return _torchvision(kind, folder, split, download)
    path = Path(os.path.expanduser(spec))
    if spec and os.path.isdir(path):
        return _folder(path, path.resolve().name, channels)
    if os.path.isfile(path):
        if path.suffix.lower() == ".csv":
            return _manifest(path, channels)
        if path.suffix.lower() == ".npz":
            return _npz(path, split)
        raise UsageError(
            f"{path} is neither a folder nor a .csv or .npz file, the forms understood"
        )
    if not colon and (path.suffix or len(path.parts) > 1):
        raise UsageError(f"there is no file or folder {path}: check the path")
    near = difflib.get_close_matches(kind.lower(), ("digits", *TORCHVISION, "imagenet"), n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    forms = ", ".join(form for form, _ in KINDS)
    raise UsageError(f"'{spec}' is neither a data set nor a path{hint}; known are {forms}")


def _digits(split: str) -> ArraySource:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=500, stratify=labels, random_state=0
    )
    chosen = np.sort(test if split == "test" else train)
    levels = np.rint(pixels[chosen].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    images = np.stack([_plane_resized(plane, 32, 32) for plane in levels])
    name = "digits (held out)" if split == "test" else "digits (train)"
    return ArraySource(name, images[:, None], labels[chosen].astype(np.int64), tuple("0123456789"))


def _torchvision(kind: str, root: Path, split: str, download: bool) -> ArraySource:
    class_name, place = TORCHVISION[kind]
    part: dict[str, Any] = {"split": split} if kind == "svhn" else {"train": split == "train"}
    constructor = getattr(_torchvision_datasets(), class_name)
    # The constructor compares the MD5 sums of CIFAR's and SVHN's files with the published ones
    # before it opens them, so no other pickle than CIFAR's own is ever unpickled. MNIST's
    # unpacked files have no published sums; they are parsed as plain numbers.
    try:
        dataset = constructor(root, download=download, **part)
    except Exception as error:
        if download:
            raise RunError(f"{kind} could not be fetched into {root}: {_cause(error)}") from error
        expected = root / place.format(split=split)
        raise UsageError(
            f"no complete {kind} below {root}: {expected} is missing or damaged; "
            "name the folder that holds it, or pass --download to fetch it"
        ) from error
    labels = dataset.labels if kind == "svhn" else dataset.targets
    names = tuple(getattr(dataset, "classes", "0123456789"))
    return _arrays(f"{kind} ({split})", np.asarray(dataset.data), np.asarray(labels), names)


def _torchvision_datasets() -> Any:
    try:
        from torchvision import datasets
    except Exception as error:  # a build for another torch fails with whatever it meets first
        raise UsageError(
            f"torchvision cannot be imported ({_cause(error)}): "
            "install the version that belongs to the installed torch"
        ) from error
    return datasets


def _imagenet(root: Path, split: str, download: bool, channels: int) -> FileSource:
    # Not through torchvision, which would unpack whatever archives it finds in the folder.
    part = root / ("val" if split == "test" else "train")
    advice = f"put its images into {part}, one sub-folder per WordNet id (n01440764 and so on)"
    if not os.path.isdir(part):
        reason = "cannot be downloaded" if download else f"is not below {root}"
        raise UsageError(f"imagenet {reason}: {advice}")
    source = _folder(part, f"imagenet ({part.name})", channels)
    classes = len(source.class_names or ())
    if classes != 1000:
        raise UsageError(f"{part} has {classes} classes, imagenet has 1000: {advice}")
    return source


def _folder(path: Path, name: str, channels: int) -> FileSource:
    # Hidden entries are skipped: .ipynb_checkpoints as a class would shift every label.
    with _reading(path, "check its permissions"):
        classes = sorted(entry.name for entry in _visible(path) if entry.is_dir())
        by_class = [list(_image_files(path / name)) for name in classes]
    if not any(by_class):
        listed = next(iter(sorted(path.glob("*.csv"))), None)
        hint = f"; or name its list, {listed}" if listed else ""
        raise UsageError(f"{path} needs one sub-folder of images per class and has none{hint}")
    if SPLIT_FOLDERS.issuperset(classes):
        raise UsageError(
            f"{path} holds splits, not classes: name one of them, {path / classes[-1]}"
        )
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), [len(files) for files in by_class])
    files = tuple(file for files in by_class for file in files)
    return FileSource(name, files, labels, channels, tuple(classes), _notes(classes, by_class))


def _visible(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _image_files(folder: Path) -> Iterator[Path]:
    for entry in _visible(folder):
        if entry.is_dir() and not entry.is_symlink():  # a link may lead back up
            yield from _image_files(entry)
        elif entry.is_file() and entry.suffix.lower() in SUFFIXES:
            yield entry


def _notes(classes: list[str], by_class: list[list[Path]]) -> tuple[str, ...]:
    notes = []
    if all(name.isdecimal() for name in classes):
        moved = [(name, label) for label, name in enumerate(classes) if int(name) != label]
        if moved:
            notes.append(
                "class folders are numbered, but labels count them in the order of their names "
                f"as text, as torchvision does: folder {moved[0][0]} is label {moved[0][1]}"
            )
    empty = [name for name, files in zip(classes, by_class, strict=True) if not files]
    if empty:
        notes.append(f"{len(empty)} class folders hold no images, the first is {empty[0]}")
    return tuple(notes)


def _manifest(path: Path, channels: int) -> FileSource:
    files, labels = [], []
    with (
        _reading(path, "save it as comma-separated text in UTF-8"),
        path.open(newline="", encoding="utf-8-sig") as text,
    ):
        rows = csv.DictReader(text)
        columns = [column.strip() for column in rows.fieldnames or ()]
        if not {"file", "label"}.issubset(columns):
            found = ", ".join(columns) or "nothing"
            raise UsageError(
                f"{path} needs a first line with the columns file,label; found {found}"
            )
        rows.fieldnames = columns
        for row in rows:
            where = f"{path}, line {rows.line_num}"
            file, label = path.parent / (row["file"] or ""), (row["label"] or "").strip()
            if not os.path.isfile(file):
                raise UsageError(f"{where}: there is no file {file}; paths are relative to the CSV")
            if not re.fullmatch("[0-9]{1,18}", label):
                raise UsageError(
                    f"{where}: the label '{label}' is not a non-negative integer; "
                    "give class indices from 0 up, in the order of the model's outputs"
                )
            files.append(file)
            labels.append(int(label))
    return FileSource(path.name, tuple(files), np.array(labels, dtype=np.int64), channels)


def _npz(path: Path, split: str) -> ArraySource:
    with (
        _reading(path, "write it again with numpy.savez, plain numbers only"),
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
        images, labels = _member(archive, x), _member(archive, y)
    return _arrays(f"{path.name} ({x})", images, labels)


def _member(archive: zipfile.ZipFile, key: str) -> np.ndarray:
    """Load one array; a large one is mapped from an unpacked copy without a name."""
    entry = archive.getinfo(f"{key}.npy")
    with archive.open(entry) as packed:
        if entry.file_size <= MAX_IN_MEMORY:
            array: np.ndarray = np.lib.format.read_array(packed, allow_pickle=False)
            return array
        with tempfile.TemporaryFile() as file:
            _unpack(packed, file, key)
            return _mapped(file)


def _unpack(packed: IO[bytes], file: IO[bytes], key: str) -> None:
    try:
        shutil.copyfileobj(packed, file, CHUNK)
        file.seek(0)
    except OSError as error:
        raise RunError(
            f"no room to unpack the array {key} in {tempfile.gettempdir()} ({_cause(error)}): "
            "set TMPDIR to a folder with more"
        ) from error


def _mapped(file: IO[bytes]) -> np.ndarray:
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


def _arrays(
    name: str, images: np.ndarray, labels: np.ndarray, class_names: tuple[str, ...] | None = None
) -> ArraySource:
    images = _as_nchw(name, images)
    if len(images) == 0:
        raise NothingEvaluated(f"{name} holds no images: there is nothing to evaluate")
    _check_values(name, images)
    return ArraySource(name, images, _as_indices(name, labels, len(images)), class_names)


def _as_nchw(name: str, images: np.ndarray) -> np.ndarray:
    shape = images.shape
    if images.ndim == 3 and min(shape[1:]) > 0:
        return images[:, None]
    if images.ndim == 4 and min(shape[1:]) > 0:
        first, last = shape[1] in (1, 3), shape[3] in (1, 3)
        if first and last:
            raise UsageError(
                f"{name} has the shape {shape}, which can be read as NCHW and as NHWC: "
                "drop the axis that is not the channels (x.squeeze), or make the images larger"
            )
        if first:
            return images
        if last:
            return images.transpose(0, 3, 1, 2)
    raise UsageError(
        f"{name} has the shape {shape}: reshape it to (n, h, w), (n, h, w, c) or (n, c, h, w), "
        "where c is 1 or 3"
    )


def _check_values(name: str, images: np.ndarray) -> None:
    if images.dtype.kind not in "iuf":
        raise UsageError(
            f"{name} holds {images.dtype}: convert it to uint8, or to floats in [0, 1]"
        )
    rows = max(1, CHUNK // images[0].nbytes)
    parts = [images[start : start + rows] for start in range(0, len(images), rows)]
    low = float(np.min([part.min() for part in parts]))
    high = float(np.max([part.max() for part in parts]))
    if images.dtype.kind in "iu":
        _check_integers(name, low, high)
    else:
        _check_floats(name, low, high)


def _check_integers(name: str, low: float, high: float) -> None:
    if low < 0 or high > 255:
        raise UsageError(
            f"{name} holds integers from {low:g} to {high:g}, not 0 to 255: convert it to uint8"
        )
    if high <= 1:
        raise UsageError(
            f"{name} holds integers no larger than {high:g}, which is black: "
            "if 1 means white, convert it to floats"
        )


def _check_floats(name: str, low: float, high: float) -> None:
    if not np.isfinite([low, high]).all():
        raise UsageError(f"{name} holds NaN or infinite values: remove those images")
    if low < 0:
        raise UsageError(
            f"{name} looks normalised (min {low:g}, max {high:g}): give raw pixels in [0, 1] and "
            "pass mean and deviation to the model with --mean and --std"
        )
    if high > 255:
        raise UsageError(f"{name} holds floats up to {high:g}: scale them to [0, 1]")
    if high > 2:
        raise UsageError(
            f"{name} looks like 0..255 stored as float (max {high:g}): "
            "convert to uint8 or divide by 255"
        )
    if high > 1:
        raise UsageError(f"{name} holds floats up to {high:.9g}: clip them to [0, 1]")
    if high < 1.5 / 255:
        raise UsageError(
            f"{name} holds nothing brighter than {high:g}, which is black: "
            "was it divided by 255 twice?"
        )


def _as_indices(name: str, labels: np.ndarray, n: int) -> np.ndarray:
    if labels.shape[:1] != (n,):
        raise UsageError(f"{name} has {n} images but labels of shape {labels.shape}: give one each")
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim > 2 or labels.dtype.kind not in "biuf":
        raise UsageError(
            f"{name} has labels of shape {labels.shape} and type {labels.dtype}: "
            "give one integer per image"
        )
    if labels.ndim == 2:
        if not (np.isin(labels, (0, 1)).all() and (labels.sum(axis=1) == 1).all()):
            raise UsageError(f"{name} has labels that are not one-hot: give one integer per image")
        return np.nonzero(labels)[1]
    with np.errstate(invalid="ignore"):  # NaN turns into some integer, and so differs below
        indices = labels.astype(np.int64)
    if not np.array_equal(indices, labels) or indices.min() < 0:
        raise UsageError(f"{name} has labels that are not whole numbers from 0 up: mend them")
    return indices


def _decoded(path: Path, channels: int) -> np.ndarray:
    with warnings.catch_warnings():
        # What Pillow thinks of metadata and palettes does not concern the pixels.
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path, formats=FORMATS) as file:
            if file.mode.startswith("I;16") or (file.mode == "I" and file.format == "PPM"):
                grey = np.asarray(file).astype(np.float32) / np.float32(65535)
                return np.repeat(grey[None], channels, axis=0)
            if file.mode in ("I", "F"):
                raise ValueError("the range of its 32-bit pixels is not known")
            levels = np.asarray(file.convert("L" if channels == 1 else "RGB"))
    return _chw(levels).astype(np.float32, order="C") / np.float32(255)


def _resized(image: np.ndarray, size: int, resize: int, where: str) -> np.ndarray:
    """Bring `(c, h, w)` to `(c, size, size)`: shorter side to `resize`, then the centre.

    Values on the 8-bit lattice are resized as 8-bit files are, so the result is that of
    torchvision's `Resize` and `CenterCrop` on the file, whatever type the image was stored in.
    """
    _, h, w = image.shape
    if (h, w) == (size, size):
        return image
    h, w = (resize, int(resize * w / h)) if h <= w else (int(resize * h / w), resize)
    if h * w > (Image.MAX_IMAGE_PIXELS or np.inf):
        raise UsageError(f"{where} is too long and narrow to be resized: leave it out")
    levels = np.rint(image * 255)
    eight_bit = np.array_equal(levels / np.float32(255), image)
    planes = levels.astype(np.uint8) if eight_bit else image
    resized = np.stack([_plane_resized(plane, h, w) for plane in planes]).astype(np.float32)
    top, left = round((h - size) / 2), round((w - size) / 2)
    centre = resized[:, top : top + size, left : left + size]
    return centre / np.float32(255) if eight_bit else centre


def _plane_resized(plane: np.ndarray, h: int, w: int) -> np.ndarray:
    return np.asarray(Image.fromarray(plane).resize((w, h), Image.Resampling.BILINEAR))


def _chw(levels: np.ndarray) -> np.ndarray:
    return levels[None] if levels.ndim == 2 else levels.transpose(2, 0, 1)


def _hwc(levels: np.ndarray) -> np.ndarray:
    return levels[0] if len(levels) == 1 else levels.transpose(1, 2, 0)


@contextmanager
def _reading(path: Path, advice: str) -> Iterator[None]:
    """Turn what a decoder raises on a damaged file into a sentence that names the file."""
    try:
        yield
    except RobustevalError:
        raise
    except Exception as error:  # damaged bytes make decoders raise nearly anything
        raise UsageError(f"{path} cannot be read ({_cause(error)}): {advice}") from error


def _cause(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
