"""Tables of encoded images: Parquet files, and folders that the package `datasets` has saved."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from robusteval.datasets.arrays import build_array_source
from robusteval.datasets.checks import Span, number_labels, raise_as_unreadable
from robusteval.datasets.dataset import ArraySource
from robusteval.datasets.images import decode_bytes
from robusteval.errors import NothingEvaluated, UsageError
from robusteval.registry import DATA_SOURCES
from robusteval.runs.reading import ARRAYS, NAMES, check_amount, check_regular, read_text

IMAGES = ("image", "img", "images", "x", "pixel_values", "file")
LABELS = ("label", "labels", "fine_label", "y", "target", "class")
MOST_ROWS = 2_000_000
TEXTS = ("string", "large_string", "string_view")  # types of paths
PIECE = 256 * 10**6  # bytes that are unpacked at a time


class EncodedImages:
    """Images of a table, each decoded when it is asked for, as ``(c, h, w)``."""

    in_threads = True

    def __init__(self, name: str, contents: Sequence[bytes], channels: int) -> None:
        self.name, self.contents, self.channels = name, contents, channels

    def __len__(self) -> int:
        return len(self.contents)

    def __getitem__(self, index: int, /) -> np.ndarray:
        with raise_as_unreadable(f"{self.name}, image {index}", "mend the table"):
            return np.ascontiguousarray(decode_bytes(self.contents[index], self.channels))


@DATA_SOURCES.add("parquet", suffix=".parquet", written="FILE.parquet")
def open_parquet(
    path: Path,
    channels: int,
    columns: tuple[str, str] | None = None,
    bands: int | None = None,
    span: Span | None = None,
) -> ArraySource:
    """a table with columns image and label; images encoded as PNG, JPEG and so on."""
    parquet = import_module("pyarrow.parquet")
    check_regular(path, ARRAYS)
    with raise_as_unreadable(path, "write it again with pyarrow or datasets"):
        file = parquet.ParquetFile(path)
        check_amount(str(path), file.metadata.num_rows, MOST_ROWS, "rows")
        names = _choose_columns(file.schema_arrow, columns, path.name)
        batches = file.iter_batches(batch_size=_count_rows_of_piece(file), columns=list(names))
        table = unpack_table(batches, file.schema_arrow, names, str(path))
    return build_table_source(table, names, path.name, channels, bands, span)


def is_saved_dataset(path: Path) -> bool:
    """Whether a path is a folder that `datasets.save_to_disk` has written."""
    return any(os.path.isfile(path / name) for name in ("state.json", "dataset_dict.json"))


@DATA_SOURCES.add("arrow", written="SAVED_DATASET", recognises="is_saved_dataset")
def open_saved_dataset(
    path: Path,
    split: str,
    channels: int,
    columns: tuple[str, str] | None = None,
    bands: int | None = None,
    span: Span | None = None,
) -> ArraySource:
    """a folder that datasets.save_to_disk wrote, with columns image and label."""
    pyarrow = import_module("pyarrow")
    folder = path
    if os.path.isfile(path / "dataset_dict.json"):
        folder = _choose_split(path, split)
    with raise_as_unreadable(folder, "save it again with save_to_disk"):
        state = json.loads(read_text(folder / "state.json", NAMES))
        files = [str(entry["filename"]) for entry in state["_data_files"]]
    if not files or any(Path(name).name != name for name in files):
        raise UsageError(f"{folder / 'state.json'} names files elsewhere: save it again")
    parts: list[Any] = []
    names = ("", "")
    for name in files:
        check_regular(folder / name, ARRAYS)
        with raise_as_unreadable(folder / name, "save it again with save_to_disk"):
            with pyarrow.memory_map(str(folder / name)) as source:
                stream = pyarrow.ipc.open_stream(source)
                names = _choose_columns(stream.schema, columns, path.name)
                parts.append(unpack_table(stream, stream.schema, names, str(folder / name)))
    table = pyarrow.concat_tables(parts)
    check_amount(str(folder), table.num_rows, MOST_ROWS, "rows")
    check_amount(f"{folder}, unpacked,", table.nbytes, ARRAYS, "bytes")
    title = f"{path.resolve().name} ({folder.name})" if folder != path else folder.resolve().name
    return build_table_source(table, names, title, channels, bands, span)


def _choose_split(path: Path, split: str) -> Path:
    with raise_as_unreadable(path / "dataset_dict.json", "save it again with save_to_disk"):
        known = list(json.loads(read_text(path / "dataset_dict.json", NAMES))["splits"])
    wanted = ("test", "validation", "val") if split == "test" else ("train",)
    found = next((name for name in wanted if name in known and (path / name).is_dir()), None)
    if found is None:
        listed = ", ".join(map(str, known))
        raise UsageError(f"{path} has no split {split} but {listed}: name one, {path}/NAME")
    return path / found


def _choose_columns(schema: Any, given: tuple[str, str] | None, name: str) -> tuple[str, str]:
    """Columns of image and label: as named, else the only ones of the usual names."""
    found = schema.names
    if given is not None and set(given) <= set(found):
        return given
    images = [column for column in IMAGES if column in found]
    if len(images) > 1:  # beside images may stand their paths
        images = [c for c in images if str(schema.field(c).type) not in TEXTS] or images
    labels = [column for column in LABELS if column in found]
    if given is not None or len(images) != 1 or len(labels) != 1:
        raise UsageError(
            f"{name} has the columns {', '.join(map(str, found))}: name those of image and label"
            " with --columns IMAGE,LABEL"
        )
    return images[0], labels[0]


def _count_rows_of_piece(file: Any) -> int:
    """How many rows can be unpacked at once, however large the largest value is."""
    facts = file.metadata
    sizes: list[int] = [facts.row_group(i).total_byte_size for i in range(facts.num_row_groups)]
    return max(1, min(1024, PIECE // max(1, *sizes, 1)))


def unpack_table(batches: Iterable[Any], schema: Any, names: Sequence[str], title: str) -> Any:
    """Some columns as a table of pyarrow in which each value has its own bytes.

    Where many rows share one value, as in a dictionary, a small file can hold more than the memory
    does: few rows are unpacked at a time, and counted.

    Raises
    ------
    UsageError
        They take more memory than any file of arrays may.
    ValueError
        Of pyarrow: the file is damaged.
    """
    pyarrow = import_module("pyarrow")
    parts, size, rows = [], 0, 0
    fields = [pyarrow.field(name, _own_type(schema.field(name).type)) for name in names]
    made = pyarrow.schema(fields, metadata=schema.metadata)
    for batch in batches:
        batch.validate(full=True)
        shared = batch.schema.field(names[0]).type != made.types[0]
        step = max(1, PIECE // max(1, batch.nbytes)) if shared else max(1, batch.num_rows)
        for start in range(0, batch.num_rows, step):
            piece = batch.slice(start, step)
            columns = [
                _own_values(piece.column(name), field.type)
                for name, field in zip(names, made, strict=True)
            ]
            parts.append(pyarrow.RecordBatch.from_arrays(columns, schema=made))
            size, rows = size + parts[-1].nbytes, rows + len(piece)
            check_amount(f"{title}, unpacked,", size, ARRAYS, "bytes")
        check_amount(title, rows, MOST_ROWS, "rows")
    return pyarrow.Table.from_batches(parts, schema=made)


def _own_type(kind: Any) -> Any:
    """A type of pyarrow without dictionaries and views, also inside a struct or list."""
    pyarrow = import_module("pyarrow")
    if isinstance(kind, pyarrow.DictionaryType | pyarrow.RunEndEncodedType):
        return _own_type(kind.value_type)
    if isinstance(kind, pyarrow.StructType):
        return pyarrow.struct([(field.name, _own_type(field.type)) for field in kind])
    if isinstance(kind, pyarrow.BaseExtensionType):
        return _own_type(kind.storage_type)
    if str(kind) in ("binary_view", "string_view"):
        return pyarrow.large_binary() if str(kind) == "binary_view" else pyarrow.large_string()
    views = pyarrow.ListViewType | pyarrow.LargeListViewType
    if isinstance(kind, pyarrow.ListType | pyarrow.LargeListType | views):
        inner = _own_type(kind.value_type)
        if isinstance(kind, views) or inner != kind.value_type:
            return pyarrow.large_list(inner)
    return kind


def _own_values(array: Any, kind: Any) -> Any:
    pyarrow = import_module("pyarrow")
    if isinstance(array, pyarrow.ExtensionArray):
        array = array.storage
    if isinstance(array.type, pyarrow.StructType):
        children = [_own_values(a, f.type) for a, f in zip(array.flatten(), kind, strict=True)]
        return pyarrow.StructArray.from_arrays(children, fields=list(kind), mask=array.is_null())
    if isinstance(array, pyarrow.DictionaryArray):
        array = array.dictionary_decode()
    return array if array.type == kind else array.cast(kind)


def build_table_source(
    table: Any,
    columns: tuple[str, str],
    name: str,
    channels: int,
    bands: int | None,
    span: Span | None,
) -> ArraySource:
    """A table of pyarrow as a source: images are bytes of files, or lists of numbers."""
    if not table.num_rows:
        raise NothingEvaluated(f"{name} holds no images: there is nothing to evaluate")
    labels = table.column(columns[1]).to_pylist()
    if any(label is None for label in labels):
        raise UsageError(f"{name} has images without a label: leave them out")
    classes = _read_class_names(table.schema, columns[1])
    with raise_as_unreadable(name, "give one label for each image"):
        listed = np.asarray(labels)
    values = table.column(columns[0]).to_pylist()
    empty = [row for row, value in enumerate(values) if is_empty(value)]
    if empty:
        many = f" and {len(empty) - 1:,} more" if len(empty) > 1 else ""
        raise UsageError(
            f"{name} has no image in row {empty[0]}{many}, counted from 0: leave such rows out"
        )
    first = values[0].get("bytes") if isinstance(values[0], Mapping) else values[0]
    if isinstance(first, bytes):
        found = [v.get("bytes") if isinstance(v, Mapping) else v for v in values]
        contents = [content for content in found if isinstance(content, bytes)]
        if len(contents) < len(found):
            raise UsageError(f"{name} has images that are not in the table: embed their bytes")
        if span is not None:
            raise UsageError("--range is for arrays and image files, not for encoded images")
        images = EncodedImages(name, contents, channels)
        numbers, names = number_labels(name, listed, len(labels))
        made = ArraySource(name, images, numbers, names, folders=names or ())
        return _name_classes(made, classes)
    if isinstance(values[0], str | None | Mapping):
        raise UsageError(
            f"{name} names its images by path: embed their bytes, or give a FILE.csv of paths"
        )
    with raise_as_unreadable(name, "give images of one shape"):
        arrays = np.asarray(values)
    return _name_classes(build_array_source(name, arrays, listed, bands=bands, span=span), classes)


def is_empty(value: Any) -> bool:
    """Whether a cell holds no image: nothing, or neither bytes nor a path."""
    fields = value.values() if isinstance(value, Mapping) else (value,)
    return all(each is None for each in fields)


def _name_classes(source: ArraySource, classes: tuple[str, ...] | None) -> ArraySource:
    """The same images, with the names of their numbered classes, by which they are matched."""
    if source.folders or not classes or source.labels.max() >= len(classes):
        return source
    return replace(source, class_names=classes, folders=classes)


def _read_class_names(schema: Any, column: str) -> tuple[str, ...] | None:
    """Names of classes that `datasets` keeps in the metadata of a table, if they are there."""
    try:
        facts = json.loads((schema.metadata or {})[b"huggingface"])
        names = facts["info"]["features"][column]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    known = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return tuple(names) if known and names else None
