"""Images in one file each: folders of classes, ImageNet, and lists in CSV files."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from robusteval.datasets.checks import Span, raise_as_unreadable
from robusteval.datasets.images import (
    SUFFIXES,
    decode_image,
    decode_values,
    read_orientation,
    scale_levels,
)
from robusteval.datasets.wordnet import read_wordnet_ids
from robusteval.errors import UsageError
from robusteval.registry import DATA_SOURCES, explain_unknown
from robusteval.runs.reading import MANIFEST, PICTURE, check_amount, read_bytes
from robusteval.runs.slices import MOST_VALUES

MOST_ROWS = 2_000_000  # of a list; ImageNet has 1,281,167 images to train on
COLUMNS = ("file", "label")
LOOKED_AT = 32  # images, for a remark
SPLIT_FOLDERS = frozenset(("train", "test", "val", "valid", "validation"))


@dataclass(frozen=True, eq=False)
class FileSource:
    """Images in one file each.

    `folders` are the names of class folders in the order that labels count them, `order` the
    `notes` on that order, and `matching` says how names decided on the labels instead, where they
    did.
    """

    name: str
    files: tuple[Path, ...]
    labels: np.ndarray
    channels: int
    class_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    order: tuple[str, ...] = ()
    matching: str | None = None
    span: Span | None = None
    slices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # by column, of each image
    orientations: dict[int, int] = field(default_factory=dict)  # by position, of those looked at
    noun = "class folders"  # what `folders` are
    in_threads = True

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise UsageError(
                f"the model takes {self.channels} channels, image files have 1 or 3: give the"
                " images as arrays in FILE.npz"
            )

    @property
    def positions(self) -> np.ndarray:
        """Of each image the position of its folder in `folders`, `(n,)`, int64."""
        if self.matching is None:
            return self.labels
        raise UsageError(f"the labels of {self.name} are matched by name already")

    def __len__(self) -> int:
        return len(self.files)

    def where(self, index: int) -> str:
        """Path of the image at a position, for error messages."""
        return str(self.files[index])

    def raw(self, index: int) -> bytes:
        """Read the file as it is."""
        with raise_as_unreadable(self.files[index], "replace it or leave it out"):
            content = read_bytes(self.files[index], PICTURE)
        self.orientations[index] = read_orientation(content)
        # the pixels are others than where EXIF is ignored
        return content if self.orientations[index] == 1 else content + b"upright"

    def count_turned(self, index: Sequence[int] | np.ndarray) -> int:
        """How many of the images at these positions are turned upright, as their EXIF says."""
        positions = [int(position) for position in index]
        for position in positions:
            if position not in self.orientations:
                self.raw(position)
        return sum(self.orientations[position] != 1 for position in positions)

    def image(self, index: int) -> np.ndarray:
        """Decode the file to `(c, h, w)`, float32 in [0, 1]."""
        return scale_levels(self.decode(index))

    def decode(self, index: int) -> np.ndarray:
        """Decode the file to `(c, h, w)` as it is stored: uint8, or float32 in [0, 1]."""
        with raise_as_unreadable(self.files[index], "replace it or leave it out"):
            if self.span is not None:
                return decode_values(self.files[index], self.channels, self.span)
            return decode_image(self.files[index], self.channels)


@DATA_SOURCES.add("imagenet", written="imagenet:DIR")
def open_imagenet(
    root: Path, split: str, download: bool, channels: int, span: Span | None = None
) -> FileSource:
    """ImageNet validation images, DIR/val with one folder per WordNet id, all or some."""
    # Not through torchvision, which would unpack whatever archives it finds in the folder.
    part = root / ("val" if split == "test" else "train")
    advice = f"put its images into {part}, one sub-folder per WordNet id (n01440764 and so on)"
    if not os.path.isdir(part):
        reason = "cannot be downloaded" if download else f"is not below {root}"
        raise UsageError(f"imagenet {reason}: {advice}")
    source = build_folder_source(part, f"imagenet ({part.name})", channels, span)
    known = read_wordnet_ids()
    other = next((name for name in source.folders if name not in known), None)
    if other is not None:
        raise UsageError(f"{part} has a folder {other!r}, which is no class of ImageNet: {advice}")
    return source


def is_folder(path: Path) -> bool:
    """Whether a path is a folder of whatever kind."""
    return path.is_dir()


@DATA_SOURCES.add("folder", written="FOLDER", recognises="is_folder")
def open_folder(path: Path, channels: int, span: Span | None = None) -> FileSource:
    """image files, one sub-folder per class, classes in sorted order."""
    return build_folder_source(path, path.resolve().name, channels, span)


def build_folder_source(
    path: Path, name: str, channels: int, span: Span | None = None
) -> FileSource:
    """Images of a folder of classes; UsageError if it is none."""
    # Hidden entries are skipped: .ipynb_checkpoints as a class would shift every label.
    with raise_as_unreadable(path, "check its permissions"):
        classes = sorted(entry.name for entry in _list_visible(path) if entry.is_dir())
        found = [list(_list_entries(path / name)) for name in classes]
        by_class = [[entry for entry in entries if _is_image_file(entry)] for entries in found]
    if not any(by_class):
        # such as the images that a run keeps below adversarial/
        listed = [*sorted(path.glob("*.csv")), *sorted(path.glob("*.npz"))]
        kind = "list" if listed and listed[0].suffix == ".csv" else "arrays"
        hint = f"; or name its {kind}, {listed[0]}" if listed else ""
        raise UsageError(f"{path} needs one sub-folder of images per class and has none{hint}")
    if SPLIT_FOLDERS.issuperset(classes):
        raise UsageError(
            f"{path} holds splits, not classes: name one of them, {path / classes[-1]}"
        )
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), [len(files) for files in by_class])
    files = tuple(file for files in by_class for file in files)
    order = _note_order(classes, by_class)
    left_out = [entry for entries in found for entry in entries if not _is_image_file(entry)]
    notes = (*order, *_note_left_out(left_out, path), *note_turned(files))
    names = tuple(classes)
    return FileSource(name, files, labels, channels, names, notes, names, order, span=span)


def _list_visible(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _list_entries(folder: Path) -> Iterator[Path]:
    """All below a class folder that is no folder; links to folders as they are."""
    for entry in _list_visible(folder):
        if entry.is_dir() and not entry.is_symlink():  # a link may lead back up
            yield from _list_entries(entry)
        else:
            yield entry


def _is_image_file(path: Path) -> bool:
    """Whether a path is an image by its name; UsageError if that is then no file."""
    if path.suffix.lower() not in SUFFIXES or path.is_dir():
        return False
    if path.is_file():
        return True
    reason = "a link that leads nowhere" if path.is_symlink() else "no ordinary file"
    raise UsageError(f"{path} is {reason}: put the image there, or take the name away")


def _note_left_out(entries: Sequence[Path], folder: Path) -> tuple[str, ...]:
    """A sentence on what stands among the images of a folder and is not read."""
    if not entries:
        return ()
    first, more = entries[0].relative_to(folder), len(entries) > 1
    return (
        f"{len(entries)} entr{'ies' if more else 'y'} in class folders {'are' if more else 'is'}"
        f" left out, {'the first ' if more else ''}{first}: images are files that end in"
        f" {', '.join(sorted(SUFFIXES))}",
    )


def _note_order(classes: list[str], by_class: list[list[Path]]) -> tuple[str, ...]:
    """Sentences on labels that count folders."""
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


def note_turned(files: Sequence[Path]) -> tuple[str, ...]:
    """A sentence if some of the images, of which a few are looked at, are turned upright."""
    for path in files[:: max(1, len(files) // LOOKED_AT)]:
        with suppress(OSError, UsageError):
            if read_orientation(read_bytes(path, PICTURE)) != 1:
                return (
                    f"images are turned upright as their EXIF says, such as {path.name}; a training"
                    " that read them as they are stored (torchvision's loader does) saw them lying",
                )
    return ()


@DATA_SOURCES.add("csv", suffix=".csv", written="FILE.csv")
def open_manifest(
    path: Path,
    channels: int,
    columns: tuple[str, str] | None = None,
    allow_outside: bool = False,
    span: Span | None = None,
    slices: tuple[str, ...] = (),
) -> FileSource:
    """image files listed with the columns file,label; paths relative to the CSV."""
    names = columns or COLUMNS
    with raise_as_unreadable(path, "save it as comma-separated text in UTF-8"):
        text = read_bytes(path, MANIFEST).decode("utf-8-sig")
        check_amount(str(path), text.count("\n"), MOST_ROWS, "rows")
        rows = csv.DictReader(io.StringIO(text, newline=""))
        header = [column.strip() for column in rows.fieldnames or ()]
        if not set(names).issubset(header):
            found = ", ".join(header) or "nothing"
            raise UsageError(
                f"{path} needs a first line with the columns {','.join(names)}; found {found}:"
                " name those of the image and of the label with --columns, as in --columns"
                " image,label"
            )
        check_slice_columns(path, slices, header)
        twice = [name for name in (*names, *slices) if header.count(name) > 1]
        if twice:
            raise UsageError(f"{path} has two columns {twice[0]}: rename one of them")
        rows.fieldnames = header
        inside = None if allow_outside else InsideFolder(path.parent)
        files, labels = [], []
        groups: dict[str, list[str]] = {name: [] for name in slices}
        for row in rows:
            where = f"{path}, line {rows.line_num}"
            file = path.parent / (row[names[0]] or "")
            if inside is not None:
                inside.check(file, where)
            if not os.path.isfile(file):
                raise UsageError(f"{where}: there is no file {file}; paths are relative to the CSV")
            files.append(file)
            labels.append(((row[names[1]] or "").strip(), where))
            for name, values in groups.items():
                values.append((row[name] or "").strip())
    notes = note_turned(files)
    numbers, classes = number_texts(labels)
    for name, values in groups.items():
        check_slice_values(path, name, values)
    return FileSource(
        path.name,
        tuple(files),
        numbers,
        channels,
        classes or None,
        notes,
        classes,
        span=span,
        slices={name: tuple(values) for name, values in groups.items()},
    )


def check_slice_columns(path: Path, slices: Sequence[str], header: Sequence[str]) -> None:
    """Refuse slices that are no columns of a table."""
    for name in slices:
        if name not in header:
            said = explain_unknown("column", name, list(header))
            raise UsageError(f"{path}, --slice: {said}")


def check_slice_values(path: Path, name: str, values: Sequence[str]) -> None:
    """Refuse a column that divides images into too many slices, or into single images."""
    different, n = len(set(values)), len(values)
    if different > MOST_VALUES or different == n > 1:
        raise UsageError(
            f"the column {name} of {path} has {different:,} values in {n:,} rows, which are no"
            f" slices: --slice takes a column with at most {MOST_VALUES} values that images share"
        )


def number_texts(labels: Sequence[tuple[str, str]]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels in a table, each with where it stands, as int64, and their names if they are names.

    They are names where none of them is a number.
    """
    if not labels or any(re.match(r"[-+.]?[0-9]|nan$|inf$|$", text) for text, _ in labels):
        return np.array([read_label(*label) for label in labels], dtype=np.int64), ()
    names = sorted({text for text, _ in labels})
    places = {name: place for place, name in enumerate(names)}
    return np.array([places[text] for text, _ in labels], dtype=np.int64), tuple(names)


def read_label(text: str, where: str) -> int:
    """A label in a table, such as 3 or 3.0; UsageError if it is none."""
    match = re.fullmatch(r"([0-9]{1,18})(?:\.0*)?", text.strip())
    if match is None:
        raise UsageError(
            f"{where}: the label '{text.strip()}' is not a non-negative integer; "
            "give class indices from 0 up, in the order of the model's outputs"
        )
    return int(match[1])


class InsideFolder:
    """Refuses paths that a table names and that lead out of its folder, by links as well."""

    def __init__(self, folder: Path) -> None:
        self.folder = os.path.realpath(folder)
        self.known: dict[str, str] = {}  # folders of files and where they really are

    def check(self, file: Path, where: str) -> None:
        """UsageError if a path leads out; a path to nothing passes."""
        parent, name = os.path.split(file)
        if parent not in self.known:
            self.known[parent] = os.path.realpath(parent)
        found = os.path.join(self.known[parent], name)
        if name in ("", os.curdir, os.pardir) or os.path.islink(found):
            found = os.path.realpath(found)
        if os.path.commonpath((self.folder, found)) != self.folder:
            raise UsageError(
                f"{where}: {file} is not in the folder of the table: put it there, or pass"
                " --allow-outside (in Python: allow_outside=True)"
            )
