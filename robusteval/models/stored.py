"""What `torch.save` stored, with tensors that share the memory of the file's bytes.

torch's own reader copies every tensor, so that a file would be in memory twice. Its unpickler for
weights alone is the same here; only where it asks for numbers, it gets a view.
"""

from __future__ import annotations

import io
import sys
import warnings
import zipfile
from typing import Any

import torch

# what torch.load itself uses where weights alone are asked for
from torch._weights_only_unpickler import Unpickler

from robusteval.models.archive import LOCAL


def is_stored(raw: bytes | bytearray, archive: zipfile.ZipFile, folder: str) -> bool:
    """Whether all is stored as it is in memory here: not packed, in this machine's byte order."""
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
        return False
    order = f"{folder}/byteorder"
    if order not in archive.namelist():
        return sys.byteorder == "little"
    start, end = _locate(raw, archive.getinfo(order))
    return raw[start:end] == sys.byteorder.encode()


def unpickle_views(raw: bytes | bytearray, archive: zipfile.ZipFile, folder: str) -> Any:
    """What the pickle in an archive describes, as by `torch.load` with `weights_only`.

    Parameters
    ----------
    raw : bytes
        The file, which has passed `robusteval.models.archive.check_archive` and `check_storages`.
    archive : ZipFile
        The same, for which `is_stored` is true.
    folder : str
        The first part of its names.
    """
    views: dict[str, torch.Tensor] = {}

    def load_storage(asked: tuple[Any, ...]) -> Any:
        word, kind, key, _, count = asked
        if word != "storage":
            raise ValueError("it asks for something other than a storage")
        dtype = torch.uint8 if kind is torch.UntypedStorage else kind.dtype
        if key not in views:
            start, end = _locate(raw, archive.getinfo(f"{folder}/data/{key}"))
            if end - start != count * dtype.itemsize:
                raise ValueError("a storage is not as large as its tensor says")
            views[key] = _view(raw, end - start, start)
        untyped = views[key].untyped_storage()
        typed: Any = torch.storage.TypedStorage
        return typed(wrap_storage=untyped, dtype=dtype, _internal=True)

    start, end = _locate(raw, archive.getinfo(f"{folder}/data.pkl"))
    unpickler: Any = Unpickler(io.BytesIO(raw[start:end]), encoding="utf-8")
    unpickler.persistent_load = load_storage
    return unpickler.load()


def _locate(raw: bytes | bytearray, entry: zipfile.ZipInfo) -> tuple[int, int]:
    """Where the bytes of an entry that is not packed begin and end."""
    _, name, extra = LOCAL.unpack_from(raw, entry.header_offset)
    start = entry.header_offset + LOCAL.size + name + extra
    return start, start + entry.file_size


def _view(raw: bytes | bytearray, length: int, start: int) -> torch.Tensor:
    if not length:
        return torch.empty(0, dtype=torch.uint8)
    with warnings.catch_warnings(action="ignore"):  # that bytes cannot be written to
        return torch.frombuffer(raw, dtype=torch.uint8, count=length, offset=start)
