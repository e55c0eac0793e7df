"""Whether a file of PyTorch is what it says, before torch opens it.

Python's `zipfile` looks for the directory of an archive directly before the end record, torch at
the place that the end record states. Only files in which both are the same place are let through:
what is checked here is then what torch reads. Torch takes the sizes of tensors and of their
storages from the pickle without comparing them with the file, hence `check_pickle`.
"""

from __future__ import annotations

import copy
import io
import math
import pickletools
import struct
import zipfile
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch.serialization import StorageType

from robusteval.errors import Refused, UsageError

END = struct.Struct("<4s4H2LH")  # the record at the end of every zip file
END_64 = struct.Struct("<4sQ2H2L4Q")  # the same for large files; torch writes both
LOCATOR = struct.Struct("<4sLQL")  # says where the second one stands
LOCAL = struct.Struct("<4s22x2H")  # before each entry: signature, lengths of name and extra
DESCRIPTOR = 24  # bytes that may follow an entry: its sizes once more
MOST_ENTRIES = 50_000  # the largest networks have some thousand tensors
MOST_INSTRUCTIONS = 5_000_000  # in a pickle; seconds to walk
ALLOCATING = ("Tensor", "Storage")  # classes of torch that take a size and fill the memory

# opcode: values taken from the stack, whether one is put there
_STACK = {
    "NONE": (0, True),
    "EMPTY_LIST": (0, True),
    "EMPTY_DICT": (0, True),
    "EMPTY_SET": (0, True),
    "NEWTRUE": (0, True),
    "NEWFALSE": (0, True),
    "APPEND": (1, False),
    "SETITEM": (2, False),
    "PROTO": (0, False),
    "STOP": (0, False),
}
_VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Name(NamedTuple):
    """What a pickle asks to import: module and name, with a dot between."""

    text: str


class Storage(NamedTuple):
    """Numbers that a pickle asks for: their key in the file, how many, bytes of each."""

    key: str
    numbers: int
    width: int


def check_archive(raw: bytes, file: str) -> zipfile.ZipFile:
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
        archive = zipfile.ZipFile(io.BytesIO(raw))
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OverflowError):
        raise build_damage(file) from None
    entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    if len({entry.filename.casefold() for entry in entries}) < len(entries):
        raise _build_refusal(file, "two of its entries have one name")
    place = 0
    for entry in entries:
        begin = entry.header_offset
        # there is no room for anything else, such as a second directory, nor for shared bytes
        if not 0 <= begin - place <= (DESCRIPTOR if place else 0):
            raise _build_refusal(file, "its entries overlap, or something stands between them")
        if begin + LOCAL.size > start:
            raise build_damage(file)
        _, name, extra = LOCAL.unpack_from(raw, begin)
        place = begin + LOCAL.size + name + extra + entry.compress_size
    if not 0 <= start - place <= DESCRIPTOR:
        raise _build_refusal(file, "something stands between its entries and their directory")
    if sum(entry.file_size for entry in entries) > 4 * len(raw) + 2**20:
        raise Refused(f"{file} was not opened: unpacked it is many times its size (a zip bomb)")
    return archive


def _find_directory(raw: bytes, file: str) -> int:
    """Where the directory of a zip file begins, by the records at its very end."""
    end = len(raw) - END.size
    found = raw.rfind(b"PK\x05\x06")
    if not 0 <= found <= end:
        raise build_damage(file)
    if found < end:
        raise _build_refusal(file, "bytes stand behind its end")
    _, disk, first, here, count, size, offset, comment = END.unpack_from(raw, end)
    if comment or disk or first or here != count:
        raise _build_refusal(file, "its end record is not as torch writes it")
    large = end - LOCATOR.size
    if large >= 0 and raw[large : large + 4] == b"PK\x06\x07":
        _, disk, stated, disks = LOCATOR.unpack_from(raw, large)
        end = large - END_64.size
        if stated != end or disk or disks != 1 or raw[end : end + 4] != b"PK\x06\x06":
            raise _build_refusal(file, "its end records contradict each other")
        short = (count, size, offset)
        _, rest, _, _, disk, first, here, count, size, offset = END_64.unpack_from(raw, end)
        filled = (0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)
        pairs = zip(short, (count, size, offset), filled, strict=True)
        agree = all(a in (b, full) for a, b, full in pairs)
        if rest != END_64.size - 12 or disk or first or here != count or not agree:
            raise _build_refusal(file, "its end records contradict each other")
    if offset + size != end:
        raise _build_refusal(file, "its directory is not where its end record says")
    if count > MOST_ENTRIES:
        raise Refused(f"{file} was not opened: no network needs {count} entries in its file")
    return int(offset)


def check_storages(archive: zipfile.ZipFile, pickled: str, file: str) -> None:
    """Refuse an archive whose pickle, the entry `pickled`, asks for more than its entries hold."""
    folder = pickled.removesuffix("data.pkl")
    sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
    entry = copy.copy(archive.getinfo(pickled))
    setattr(entry, "CRC", None)  # noqa: B010  (already looked at, where there is one)
    for storage in check_pickle(archive.read(entry), 0, file):
        if sizes.get(f"{folder}data/{storage.key}") != storage.numbers * storage.width:
            raise _build_refusal(file, "a storage is not as large as its tensor says")


def check_legacy_storages(raw: bytes, file: str) -> None:
    """Refuse a file from before torch 1.6 that asks for more numbers than it has bytes."""
    storages = {storage.key: storage for storage in check_pickle(raw, 3, file)}
    if sum(each.numbers * each.width for each in storages.values()) > len(raw):
        raise _build_refusal(file, "a storage is not as large as its tensor says")


def check_pickle(raw: bytes, skip: int, file: str) -> list[Storage]:
    """The storages that the pickle behind `skip` others asks for; nothing is imported or called.

    Raises
    ------
    UsageError
        The pickle is damaged.
    Refused
        It holds tensors that reach out of their storages, calls that do nothing but take memory,
        or more instructions than a state dict needs.
    """
    stream = io.BytesIO(raw)
    try:
        for _ in range(skip):
            for _instruction in pickletools.genops(stream):
                pass
        return _Walk(file).list_storages(pickletools.genops(stream))
    except Refused:
        raise
    except Exception:  # pickletools raises whatever the bytes lead it into, and so do stacks
        raise build_damage(file) from None


class _UnknownError(ValueError):
    """An instruction that torch does not follow when only weights are asked for."""


class _Walk:
    """Follows a pickle's stack without building what it describes."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.storages: list[Storage] = []

    def list_storages(self, instructions: Iterable[tuple[Any, Any, Any]]) -> list[Storage]:
        for number, (opcode, argument, _) in enumerate(instructions):
            if number > MOST_INSTRUCTIONS:
                raise Refused(f"{self.file} was not opened: no state dict is that long")
            try:
                self._follow(opcode.name, argument)
            except _UnknownError:  # torch stops here too, and says why
                break
        return self.storages

    def _follow(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _STACK:
            pops, pushes = _STACK[name]
            self._take(pops)
            if pushes:
                stack.append(None)
        elif name in _VALUES:
            stack.append(argument)
        elif name in _TUPLES:
            stack.append(self._take(_TUPLES[name]))
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name in ("TUPLE", "APPENDS", "SETITEMS"):
            taken = self._take(len(stack) - self.marks.pop())
            if name == "TUPLE":
                stack.append(taken)
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name == "GLOBAL":
            stack.append(Name(argument.replace(" ", ".")))
        elif name in ("REDUCE", "NEWOBJ"):
            called, given = self._take(2)
            self._check_call(called, given)
            stack.append(None)
        elif name == "BUILD":
            (given,) = self._take(1)
            self._check_call(stack[-1], given)
        elif name == "BINPERSID":
            (asked,) = self._take(1)
            if not isinstance(asked, tuple) or asked[:1] != ("storage",):
                raise _UnknownError
            stack.append(self._read_storage(*asked[1:]))
        else:
            raise _UnknownError

    def _take(self, count: int) -> tuple[Any, ...]:
        """The uppermost values, which leave the stack; of a mark's own only."""
        bottom = len(self.stack) - count
        if bottom < (self.marks[-1] if self.marks else 0):
            raise IndexError("the stack is empty")
        taken = tuple(self.stack[bottom:])
        del self.stack[bottom:]
        return taken

    def _read_storage(self, kind: Name, key: str, _where: str, count: int, *_: Any) -> Storage:
        short = kind.text.rpartition(".")[2]
        typed = None if short == "UntypedStorage" else StorageType(short).dtype  # type: ignore[no-untyped-call]
        width = typed.itemsize if typed else 1
        if not isinstance(key, str) or type(count) is not int or count < 0:
            raise ValueError(key)
        self.storages.append(Storage(key, count, width))
        return self.storages[-1]

    def _check_call(self, called: Any, given: Any) -> None:
        text = called.text if isinstance(called, Name) else ""
        if text.startswith("torch.") and text.endswith(ALLOCATING):
            raise _build_refusal(self.file, f"it calls {text} with a size")
        if text.endswith(".bytearray") and any(type(each) is int for each in given):
            raise _build_refusal(self.file, "it asks for a bytearray of a size")
        if isinstance(given, tuple) and given and isinstance(given[0], Storage):
            self._check_bounds(*given)

    def _check_bounds(
        self, storage: Storage, offset: int, shape: Any, strides: Any, *rest: Any
    ) -> None:
        """Refuse a tensor that reaches out of its storage: torch would enlarge the storage."""
        named = [each.text.removeprefix("torch.") for each in rest if isinstance(each, Name)]
        kinds = [kind for name in named if isinstance(kind := getattr(torch, name, 0), torch.dtype)]
        width = kinds[0].itemsize if kinds else storage.width
        reach = 0
        if math.prod(shape):
            reach = offset + 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        if min(offset, *shape, *strides, 0) < 0 or (
            reach * width > storage.numbers * storage.width
        ):
            raise _build_refusal(self.file, "a tensor is larger than its storage")


def build_damage(file: str) -> UsageError:
    """What is raised on a file that is not whole."""
    return UsageError(f"{file} is truncated or damaged; download or copy it again")


def _build_refusal(file: str, why: str) -> Refused:
    return Refused(
        f"{file} was not opened: {why}, which torch.save never writes and which can hide what is "
        "inside. If you trust it, load it yourself and save its tensors alone: "
        "safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')"
    )
