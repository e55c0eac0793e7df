"""Hashes of values, arrays as bytes, and parts of work that is not finished."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from robusteval.errors import RunError, UsageError
from robusteval.runs.archives import SUFFIX, open_archive, read_array, read_plain
from robusteval.runs.reading import ARRAYS, COLUMNS, WEIGHTS, check_amount, open_regular, read_bytes
from robusteval.runs.seals import check_seal, seal
from robusteval.runs.types import Columns
from robusteval.runs.writing import write_atomically

LONGEST_VALUE = 1000  # characters of a value that is shown whole


def digest(value: Any) -> str:
    """SHA-256 of a JSON-able value, the same for equal values."""
    text = json.dumps(value, sort_keys=True, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def hash_file(path: Path) -> str:
    """Hash the content of a file by SHA-256."""
    with open_regular(path, WEIGHTS) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pack(columns: Mapping[str, np.ndarray[Any, Any]], key: str | None = None) -> bytes:
    """Columns as the bytes of an ``.npz`` file, sealed under a key if there is one."""
    buffer = io.BytesIO()
    named: dict[str, Any] = {name: columns[name] for name in sorted(columns)}
    np.savez_compressed(buffer, **named)
    if key is not None:
        seal(buffer, key)
    return buffer.getvalue()


def unpack(content: bytes, usual: int = COLUMNS) -> Columns:
    """Columns of an ``.npz`` file of at most so many bytes; ValueError if it is none."""
    try:
        plain = read_plain(content, usual)
        if plain is not None:
            return plain
        with open_archive(io.BytesIO(content), "the archive") as archive:
            total = sum(entry.file_size for entry in archive.infolist())
            check_amount("the archive, unpacked,", total, usual, "bytes")
            names = [name.removesuffix(SUFFIX) for name in archive.namelist()]
            return {name: read_array(archive, name, usual) for name in names}
    except Exception as error:  # damaged bytes make zipfile, zlib and NumPy raise nearly anything
        raise ValueError(str(error)) from None


def differences(old: Any, new: Any, at: str = "") -> Iterator[str]:
    """Where two JSON values differ, a line each."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from differences(old.get(key), new.get(key), f"{at}.{key}" if at else str(key))
        return
    if isinstance(old, list) and isinstance(new, list):
        # of long lists what they do not share
        mine, theirs = [v for v in old if v not in new], [v for v in new if v not in old]
        old, new = (mine, theirs) if mine or theirs else (old, new)
    if old != new:
        there, here = (spell_short(json.dumps(value)) for value in (old, new))
        yield f"{at}: {there} there, {here} here"


def spell_short(text: str) -> str:
    """A value in a line that people read: of a long one its beginning and its end."""
    return text if len(text) <= LONGEST_VALUE else f"{text[:200]}...{text[-40:]}"


def read_columns(path: Path, sha256: str, key: str) -> Columns:
    """The columns in a file of this hash that was sealed under this key, if it was.

    RunError if it is gone, changed, of another cell, or lies elsewhere.
    """
    if path.is_symlink() or path.parent.is_symlink():
        raise RunError(
            f"{path} is a link: a run is read from its own folder alone, so copy it there"
        )
    try:
        content = read_bytes(path, COLUMNS)
    except OSError:
        raise RunError(f"{path} is missing: run the evaluation again to restore it") from None
    except UsageError as error:
        raise RunError(error.message) from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise RunError(f"{path} was changed after the run: run the evaluation again to restore it")
    try:
        check_seal(content, key, needed=False)
    except ValueError:
        raise RunError(
            f"{path} is of another cell: run the evaluation again to restore it"
        ) from None
    try:
        return unpack(content)
    except ValueError as error:
        raise RunError(f"{path} is no archive of arrays ({error})") from None


def unpack_part(content: bytes, key: str) -> Columns:
    """Some rows of a key, the column ``row`` says which; ValueError if they are none."""
    check_seal(content, key)
    columns = unpack(content, ARRAYS)
    rows = columns.get("row")
    if rows is None or rows.ndim != 1 or rows.dtype.kind not in "iu":
        raise ValueError("no rows")
    if any(values.shape[:1] != rows.shape for values in columns.values()):
        raise ValueError("columns of several lengths")
    return columns


def remove_entry(path: Path) -> None:
    """Remove a file, or a folder or link that stands where one should be."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


class PartFolder:
    """A folder of finished rows, of work by work that is not finished.

    Parameters
    ----------
    folder : Path, optional
        Where they are kept; nothing is if not given.
    say : callable, optional
        Told in a sentence what is damaged and will be computed again.
    """

    SUFFIX = ".parts"

    def __init__(
        self, folder: Path | None, say: Callable[[str], object] = lambda text: None
    ) -> None:
        self.folder = folder
        self.say = say

    def locate(self, key: str) -> Path:
        """Where the parts of a key are kept; ValueError if nothing is."""
        if self.folder is None:
            raise ValueError("these parts are not kept")
        return self.folder / f"{key}{self.SUFFIX}"

    def read_parts(self, key: str) -> Iterator[Columns]:
        """Read the parts that were kept under a key, in any order; damaged ones are removed."""
        if self.folder is None:
            return
        if self.locate(key).is_symlink():
            remove_entry(self.locate(key))  # what is kept goes nowhere else
        for path in sorted(self.locate(key).glob("*.npz")):
            try:
                columns = unpack_part(read_bytes(path, ARRAYS), key)
            except (OSError, ValueError, UsageError):
                self.say(f"{path} is damaged: what it held is computed again.")
                remove_entry(path)
                continue
            yield columns

    def save_part(self, key: str, columns: Columns) -> None:
        """Keep some rows; the column ``row`` says which."""
        if self.folder is None:
            return
        content = pack(columns, key)
        name = hashlib.sha256(content).hexdigest()[:16]
        write_atomically(self.locate(key) / f"{name}.npz", content)

    def remove_parts(self, key: str) -> None:
        """Throw away the parts of a key."""
        if self.folder is not None:
            shutil.rmtree(self.locate(key), ignore_errors=True)

    def remove_all_parts(self) -> None:
        """Throw away the parts of all keys, also those that nothing asks for any more."""
        for path in self.folder.glob(f"*{self.SUFFIX}/") if self.folder is not None else ():
            shutil.rmtree(path, ignore_errors=True)
