"""Whether a file of PyTorch is what it says, before torch opens it.

Python's `zipfile` looks for the directory of an archive directly before the end record, torch at
the place that the end record states. Only files in which both are the same place are let through:
what is checked here is then what torch reads. Torch takes the sizes of tensors and of their
storages from the pickle without comparing them with the file, hence `check_storages`.
"""

from __future__ import annotations

import copy
import io
import struct
import zipfile
from typing import Any

from robusteval.errors import Refused
from robusteval.models.pickles import build_damage, build_refusal, check_pickle
from robusteval.runs.archives import PACKING
from robusteval.runs.reading import check_amount

END = struct.Struct("<4s4H2LH")  # the record at the end of every zip file
END_64 = struct.Struct("<4sQ2H2L4Q")  # the same for large files; torch writes both
LOCATOR = struct.Struct("<4sLQL")  # says where the second one stands
LOCAL = struct.Struct("<4s22x2H")  # before each entry: signature, lengths of name and extra
DESCRIPTOR = 24  # bytes that may follow an entry: its sizes once more
MOST_ENTRIES = 50_000  # the largest networks have some thousand tensors


class Buffer(io.RawIOBase):
    """Bytes in memory as a file, without a copy."""

    def __init__(self, raw: bytes | bytearray) -> None:
        super().__init__()
        self.view = memoryview(raw)
        self.place = 0

    def readable(self) -> bool:
        """It can be read."""
        return True

    def seekable(self) -> bool:
        """It can be read from anywhere."""
        return True

    def tell(self) -> int:
        """Where it is read from next."""
        return self.place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: len(self.view)}[whence]
        self.place = max(0, start + offset)
        return self.place

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer as far as there are bytes."""
        part = self.view[self.place : self.place + len(buffer)]
        buffer[: len(part)] = part
        self.place += len(part)
        return len(part)


def check_archive(raw: bytes | bytearray, file: str) -> zipfile.ZipFile:
    """The zip file in `raw`, where every reader finds the same entries in it.

    Raises
    ------
    UsageError
        The file is cut short or damaged.
    Refused
        It can be read in two ways, or is many times its size when unpacked.
    """
    start = _find_directory(raw, file)
    try:
        archive = zipfile.ZipFile(Buffer(raw))
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OverflowError):
        raise build_damage(file) from None
    entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    if len({entry.filename.casefold() for entry in entries}) < len(entries):
        raise build_refusal(file, "two of its entries have one name")
    if any(entry.compress_type not in PACKING for entry in entries):
        raise build_refusal(file, "an entry is packed in a way")
    place = 0
    for entry in entries:
        begin = entry.header_offset
        # there is no room for anything else, such as a second directory, nor for shared bytes
        if not 0 <= begin - place <= (DESCRIPTOR if place else 0):
            raise build_refusal(file, "its entries overlap, or something stands between them")
        if begin + LOCAL.size > start:
            raise build_damage(file)
        _, name, extra = LOCAL.unpack_from(raw, begin)
        place = begin + LOCAL.size + name + extra + entry.compress_size
    if not 0 <= start - place <= DESCRIPTOR:
        raise build_refusal(file, "something stands between its entries and their directory")
    if sum(entry.file_size for entry in entries) > 4 * len(raw) + 2**20:
        raise Refused(f"{file} was not opened: unpacked it is many times its size (a zip bomb)")
    return archive


def _find_directory(raw: bytes | bytearray, file: str) -> int:
    """Where the directory of a zip file begins, by the records at its very end."""
    end = len(raw) - END.size
    found = raw.rfind(b"PK\x05\x06")
    if not 0 <= found <= end:
        raise build_damage(file)
    if found < end:
        raise build_refusal(file, "bytes stand behind its end")
    _, disk, first, here, count, size, offset, comment = END.unpack_from(raw, end)
    if comment or disk or first or here != count:
        raise build_refusal(file, "its end record is not as torch writes it")
    large = end - LOCATOR.size
    if large >= 0 and raw[large : large + 4] == b"PK\x06\x07":
        _, disk, stated, disks = LOCATOR.unpack_from(raw, large)
        end = large - END_64.size
        if stated != end or disk or disks != 1 or raw[end : end + 4] != b"PK\x06\x06":
            raise build_refusal(file, "its end records contradict each other")
        short = (count, size, offset)
        _, rest, _, _, disk, first, here, count, size, offset = END_64.unpack_from(raw, end)
        filled = (0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)
        pairs = zip(short, (count, size, offset), filled, strict=True)
        agree = all(a in (b, full) for a, b, full in pairs)
        if rest != END_64.size - 12 or disk or first or here != count or not agree:
            raise build_refusal(file, "its end records contradict each other")
    if offset + size != end:
        raise build_refusal(file, "its directory is not where its end record says")
    subject = f"{file} was not opened, as no network needs so many: it"
    check_amount(subject, count, MOST_ENTRIES, "entries", Refused)
    return int(offset)


def check_storages(archive: zipfile.ZipFile, pickled: str, file: str) -> None:
    """Refuse an archive whose pickle, the entry `pickled`, asks for more than its entries hold."""
    folder = pickled.removesuffix("data.pkl")
    sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
    entry = copy.copy(archive.getinfo(pickled))
    setattr(entry, "CRC", None)  # noqa: B010  (already looked at, where there is one)
    for storage in check_pickle(archive.read(entry), 0, file):
        if sizes.get(f"{folder}data/{storage.key}") != storage.numbers * storage.width:
            raise build_refusal(file, "a storage is not as large as its tensor says")


def check_legacy_storages(raw: bytes | bytearray, file: str) -> None:
    """Refuse a file from before torch 1.6 that asks for more numbers than it has bytes."""
    storages = {storage.key: storage for storage in check_pickle(raw, 3, file)}
    if sum(each.numbers * each.width for each in storages.values()) > len(raw):
        raise build_refusal(file, "a storage is not as large as its tensor says")
