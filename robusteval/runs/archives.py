"""Archives of NumPy arrays, of which nothing is unpacked before its size is known and right."""

from __future__ import annotations

import io
import math
import struct
import zipfile
import zlib
from functools import lru_cache
from typing import IO, Any, BinaryIO, Literal, NamedTuple

import numpy as np

from robusteval.runs.reading import check_amount

DIRECTORY = 10**6  # bytes of the list of members; one takes 46 and its name
END = struct.Struct("<4s4H2LH")
END_64 = struct.Struct("<4sQ2H2L4Q")
LOCATOR = struct.Struct("<4sLQL")
MEMBER = struct.Struct("<4s6H3L5H2L")  # an entry of the list of members, without its name
LOCAL = struct.Struct("<4s5H3L2H")  # what stands before a member
COMMENT = 2**16  # bytes that may follow the end record
HEADER = 10_000  # characters that describe an array
PACKING = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # of others a few bytes can fill the memory
SUFFIX = ".npy"
SMALL = 10**6  # bytes up to which an array is unpacked before its header is looked at
LARGE = 64 * 10**6  # bytes from which on an array may not be a bomb,
RATIO = 200  # which unpacked is so many times its size


class Layout(NamedTuple):
    """What the beginning of an array's file says of it, and how long that is in bytes."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]
    begin: int


def open_archive(file: BinaryIO, name: str) -> zipfile.ZipFile:
    """The zip archive in an open file.

    UsageError if its list of members is long; what `zipfile` raises if it is none.
    """
    check_amount(f"the list of members of {name}", _measure_directory(file), DIRECTORY, "bytes")
    return zipfile.ZipFile(file)


def _measure_directory(file: BinaryIO) -> int:
    """Bytes that the end of a zip file states for its directory, 0 where it states none."""
    end = file.seek(0, io.SEEK_END)
    start = max(0, end - COMMENT - END.size - LOCATOR.size - END_64.size)
    file.seek(start)
    tail = file.read()
    file.seek(0)
    sizes = [0]
    # all that can be taken for an end record: readers differ in which they take
    place = tail.rfind(b"PK\x05\x06")
    while place >= 0:
        if place + END.size <= len(tail):
            sizes.append(END.unpack_from(tail, place)[5])
        place = tail.rfind(b"PK\x05\x06", 0, place)
    large = tail.rfind(b"PK\x06\x06")
    while large >= 0:
        if large + END_64.size <= len(tail):
            sizes.append(END_64.unpack_from(tail, large)[8])
        large = tail.rfind(b"PK\x06\x06", 0, large)
    return max(size for size in sizes if size != 0xFFFFFFFF)


def read_layout(archive: zipfile.ZipFile, key: str, usual: int) -> Layout:
    """What an array in an archive is, by its first bytes.

    Parameters
    ----------
    archive : ZipFile
        As `open_archive` gives it.
    key : str
        Name of the array.
    usual : int
        Limit of its size in bytes.

    Raises
    ------
    UsageError
        It is larger.
    ValueError
        It is not packed as NumPy packs, no array of plain numbers, or not as long as it says.
    """
    entry = _check_member(archive, key, usual)
    with archive.open(entry) as packed:
        return _read_checked_header(packed, key, entry)


def _check_member(archive: zipfile.ZipFile, key: str, usual: int) -> zipfile.ZipInfo:
    """An array's entry in the list of members; see `read_layout`."""
    entry = archive.getinfo(key + SUFFIX)
    check_amount(f"the array {key}", entry.file_size, usual, "bytes")
    if entry.file_size > LARGE:
        ratio = entry.file_size // max(1, entry.compress_size)
        check_amount(f"the array {key}", ratio, RATIO, "times the bytes that it is packed in")
    if entry.compress_type not in PACKING or entry.flag_bits & 1:
        raise ValueError(f"the array {key} is not packed as numpy.savez does it")
    return entry


def _read_checked_header(packed: IO[bytes], key: str, entry: zipfile.ZipInfo) -> Layout:
    """What an array is by its first bytes; see `read_layout`."""
    layout = _read_header(packed, key)
    if layout.begin + math.prod(layout.shape) * layout.dtype.itemsize != entry.file_size:
        raise ValueError(f"the array {key} is not as long as its shape says")
    return layout


def read_file_layout(file: BinaryIO, name: str) -> Layout:
    """What the array in an open .npy file is; ValueError if it is none or not as long."""
    layout = _read_header(file, name)
    if layout.begin + math.prod(layout.shape) * layout.dtype.itemsize != file.seek(0, io.SEEK_END):
        raise ValueError(f"the array {name} is not as long as its shape says")
    return layout


def _read_header(packed: IO[bytes], key: str) -> Layout:
    start = packed.read(8)
    if len(start) < 8 or start[:6] != np.lib.format.MAGIC_PREFIX or start[6:] not in WIDTHS:
        raise ValueError(f"the array {key} is no .npy file")
    width = WIDTHS[start[6:]]
    counted = packed.read(width)
    length = int.from_bytes(counted, "little")
    if length > HEADER:
        raise ValueError(f"the array {key} has a header of {length} bytes")
    shape, fortran, dtype = _parse_header(counted + packed.read(length), width)
    if dtype.hasobject:
        raise ValueError(f"the array {key} is no plain one, it holds Python objects")
    if min(shape, default=0) < 0 or not dtype.itemsize:
        raise ValueError(f"the array {key} has the shape {shape} and type {dtype}")
    return Layout(shape, fortran, dtype, 8 + width + length)


@lru_cache(1000)  # of a run with thousands of cells all have the same few
def _parse_header(header: bytes, width: int) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, order and type; ValueError if it says none."""
    parse = (
        np.lib.format.read_array_header_1_0 if width == 2 else np.lib.format.read_array_header_2_0
    )
    shape, fortran, dtype = parse(io.BytesIO(header))
    return shape, fortran, dtype


WIDTHS = {b"\x01\x00": 2, b"\x02\x00": 4, b"\x03\x00": 4}  # bytes of a header's length, by version


def read_array(archive: zipfile.ZipFile, key: str, usual: int) -> np.ndarray[Any, Any]:
    """An array of an archive, in memory; what `read_layout` raises."""
    entry = _check_member(archive, key, usual)
    with archive.open(entry) as packed:
        layout = _read_checked_header(packed, key, entry)
        if entry.file_size <= LARGE:
            content = bytearray(packed.read())  # to its end, where the checksum is compared
            if len(content) + layout.begin != entry.file_size:
                raise ValueError(f"the array {key} is cut short")
            order: Literal["F", "C"] = "F" if layout.fortran else "C"
            return np.ndarray(layout.shape, layout.dtype, content, order=order)
    with archive.open(entry) as packed:
        array: np.ndarray[Any, Any] = np.lib.format.read_array(packed, allow_pickle=False)
    return array


def locate_stored(file: IO[bytes], entry: zipfile.ZipInfo) -> int | None:
    """Where the bytes of a member begin in its file; None if they are compressed there.

    Nor if the archive says of them that there are more than it holds: those would be others'.
    """
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
        return None
    file.seek(entry.header_offset)
    *_, name, extra = LOCAL.unpack(file.read(LOCAL.size))
    return entry.header_offset + LOCAL.size + int(name) + int(extra)


def read_plain(content: bytes, usual: int) -> dict[str, np.ndarray[Any, Any]] | None:
    """All arrays of an archive that is in memory, in a tenth of the time that `zipfile` takes.

    Only what is packed as `numpy.savez` does it, and small, is read so; None of all else, which the
    functions above read, or refuse with what is wrong. Damaged bytes raise what they make of
    `zlib` and NumPy.
    """
    end = content.rfind(b"PK\x05\x06")
    if end < 0 or end + END.size > len(content):
        return None
    _, disk, first, here, count, size, place, comment = END.unpack_from(content, end)
    if (disk, first, here) != (0, 0, count) or end + END.size + comment != len(content):
        return None
    if place + size != end or size > DIRECTORY:
        return None
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    left = usual
    for _ in range(count):
        if place + MEMBER.size > end:
            return None
        mark, _, _, flags, kind, _, _, crc, packed, full, length, extra, said, _, _, _, at = (
            MEMBER.unpack_from(content, place)
        )
        place += MEMBER.size + length
        name = content[place - length : place]
        left -= full
        usually = (mark, flags, kind, extra, said) == (b"PK\x01\x02", 0, zipfile.ZIP_DEFLATED, 0, 0)
        raw = _inflate(content, at, name, packed, full) if usually and left >= 0 else None
        if raw is None or zlib.crc32(raw) != crc:
            return None
        key, suffix = name[: -len(SUFFIX)].decode("ascii"), name[-len(SUFFIX) :]
        if raw[:8] != np.lib.format.MAGIC_PREFIX + b"\x01\x00":
            return None
        layout = _read_start(raw[: 10 + int.from_bytes(raw[8:10], "little")])
        size = math.prod(layout.shape) * layout.dtype.itemsize
        if layout.begin + size != full or suffix != SUFFIX.encode():
            return None
        order: Literal["F", "C"] = "F" if layout.fortran else "C"
        values = bytearray(memoryview(raw)[layout.begin :])
        arrays[key] = np.ndarray(layout.shape, layout.dtype, values, order=order)
    return arrays if place == end and len(arrays) == count else None


@lru_cache(1000)
def _read_start(start: bytes) -> Layout:
    """What an array is by the bytes before its values; see `read_layout`."""
    return _read_header(io.BytesIO(start), "in the archive")


def _inflate(content: bytes, at: int, name: bytes, packed: int, full: int) -> bytes | None:
    """The bytes of the member that begins there; None if it is not small and as its list says."""
    if full > SMALL or at + LOCAL.size > len(content):
        return None
    mark, *_, length, extra = LOCAL.unpack_from(content, at)
    begin = at + LOCAL.size + length + extra
    if mark != b"PK\x03\x04" or begin + packed > len(content):
        return None
    if content[at + LOCAL.size : at + LOCAL.size + length] != name:
        return None
    inflating = zlib.decompressobj(-zlib.MAX_WBITS)
    raw = inflating.decompress(content[begin : begin + packed], full + 1)
    return raw if inflating.eof and len(raw) == full else None
