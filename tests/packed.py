"""Files of PyTorch built byte by byte: sound ones, and ones that depart from them in one way."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence

Entry = tuple[str, bytes]


def pack_state(
    *,
    count: int = 4,
    shape: Sequence[int] = (2, 2),
    strides: Sequence[int] = (2, 1),
    offset: int = 0,
) -> bytes:
    """A pickle of one tensor "w", written instruction by instruction."""

    def number(value: int) -> bytes:
        if value < 0:
            return b"J" + struct.pack("<i", value)
        raw = value.to_bytes(9, "little")
        return b"\x8a" + bytes([len(raw)]) + raw

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    def row(values: Sequence[int]) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu")
    storage += number(count) + b"tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(offset) + row(shape)
    tensor += row(strides) + b"\x89ccollections\nOrderedDict\n)RtR"
    return b"\x80\x02}" + text("w") + tensor + b"s."


HONEST = [("net/data.pkl", pack_state()), ("net/version", b"3\n"), ("net/data/0", bytes(16))]


def pack(
    entries: Sequence[Entry] = HONEST,
    *,
    front: bytes = b"",
    gap: bytes = b"",
    before_directory: bytes = b"",
    before_end: bytes = b"",
    behind: bytes = b"",
    comment: bytes = b"",
    offset: int = 0,
    size: int = 0,
    shared: bool = False,
    large: Callable[[int, int, int], bytes] | None = None,
) -> bytes:
    """A zip file, stored; each option departs from what torch writes in one way."""
    body, directory = front, b""
    first = len(body)
    for position, (name, content) in enumerate(entries):
        start = first if shared and position else len(body)
        sums = (zlib.crc32(content), len(content), len(content))
        spelled = name.encode()
        head = struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 0, 0, 0, *sums, len(spelled), 0)
        if start == len(body):
            body += head + spelled + content + gap
        directory += struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 0, 0, 0, *sums,
                                 len(spelled), 0, 0, 0, 0, 0, start) + spelled  # fmt: skip
    body += before_directory
    stated = (len(body) + offset, len(directory) + size)
    raw = body + directory + before_end
    raw += large(len(raw), *stated) if large else b""
    n = len(entries)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, n, n, stated[1], stated[0], len(comment))
    return raw + end + comment + behind


def pack_large(place: int, offset: int, size: int, *, lie: int = 0, where: int = 0) -> bytes:
    """The records for large files, which torch always writes."""
    n = len(HONEST)
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, n, n, size, offset + lie)
    return record + struct.pack("<4sLQL", b"PK\6\7", 0, place + where, 1)


def directory_of(entries: Sequence[Entry]) -> bytes:
    raw = pack(entries)
    return raw[zipfile.ZipFile(io.BytesIO(raw)).start_dir : -22]


OTHER = directory_of([("net/data.pkl", b""), ("net/version", b"3\n")])
BYPASSES = {
    "two directories, the stated one first": pack(before_end=OTHER),
    "two directories, the stated one last": pack(before_directory=OTHER),
    "a directory elsewhere than stated": pack(offset=-46),
    "a directory shorter than stated": pack(size=1),
    "bytes before the first entry": pack(front=b"PK\3\4" + bytes(26)),
    "an archive in front of the archive": pack() + pack(),
    "an archive in front, with places moved": pack(front=pack()),
    "bytes between two entries": pack(gap=bytes(30)),
    "entries that share bytes": pack([HONEST[0], ("net/data/0", HONEST[0][1])], shared=True),
    "bytes behind the end": pack(behind=b"\x00"),
    "a comment": pack(comment=b"hello"),
    "an end record in the comment": pack(comment=pack()[-22:]),
    "two entries of one name": pack([*HONEST, HONEST[2]]),
    "two entries of one name but for the case": pack([*HONEST, ("NET/data/0", bytes(16))]),
    "end records that contradict": pack(large=lambda *at: pack_large(*at, lie=-46)),
    "a large end record elsewhere": pack(large=lambda *at: pack_large(*at, where=-1)),
    "a storage smaller than stated": pack([HONEST[0], ("net/data/0", bytes(4))]),
    "a storage larger than stated": pack([HONEST[0], ("net/data/0", bytes(64))]),
    "a storage that is not there": pack(HONEST[:2]),
}


def word(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def whole(value: int) -> bytes:
    return b"\x8a\x0c" + value.to_bytes(12, "little")


CLASH = 2**61 - 1  # whole numbers that differ by it have one hash
TENSOR = pack_state()[pack_state().index(b"ctorch._utils") : -2]
ASKS = {
    "a call by another call": b"ctorch._tensor\n_rebuild_from_type_v2\n(c__builtin__\nbytearray\n"
    b"ctorch\nTensor\n" + whole(2**34) + b"\x85}tR",
    "a bytearray of a tensor as its size": b"cbuiltins\nbytearray\n" + TENSOR + b"\x85R",
    "a storage asked for in bytes": b"(c_codecs\nencode\n"
    + word("storage")
    + word("latin1")
    + b"\x86Rctorch\nFloatStorage\n"
    + word("0")
    + word("cpu")
    + b"K\x04tQ"
    + b"0cbuiltins\nbytearray\n"
    + whole(2**34)
    + b"\x85R",
    "something other than a storage": b"(" + word("module") + b"tQ",
    "a tensor without numbers": b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n("
    + whole(9)
    + b"tR",
    "a nested tensor": b"ctorch._utils\n_rebuild_nested_tensor\n(" + TENSOR * 4 + b"tR",
    "quantised numbers": b"ctorch._utils\n_rebuild_qtensor\n(" + TENSOR + b"tR",
    "an array": b"ctorch._utils\n_rebuild_device_tensor_from_numpy\n(" + TENSOR + b"tR",
    "a tensor set to another place": TENSOR + b"(" + TENSOR + b"K\x00K\x09K\x01tb",
    "a parameter of a number": b"ctorch._utils\n_rebuild_parameter\n(K\x01\x89}tR",
    "a text in a slow encoding": b"c_codecs\nencode\n" + word("x") + word("punycode") + b"\x86R",
    "the same result called": b"ccollections\nOrderedDict\n)R)R",
    "attributes of a set": b"cbuiltins\nset\n]\x85R}b",
    "a dict of one hash": b"}("
    + b"".join(whole(2**62 + i * CLASH) + b"N" for i in range(2000))
    + b"u",
    "a set of one hash": b"cbuiltins\nset\n]("
    + b"".join(whole(2**62 + i * CLASH) for i in range(2000))
    + b"e\x85R",
    "pairs of one hash": b"ccollections\nOrderedDict\n]("
    + b"".join(b"](" + whole(2**62 + i * CLASH) + b"Ne" for i in range(2000))
    + b"e\x85R",
    "keys nested without end": b"})" + b"\x85" * 90_000 + b"Ns",
    "keys that are tensors": b"}" + TENSOR + b"Ns",
}
