"""Files that a user names: what a path is and how large is known before anything is read.

A path can lead to a device that never ends, to a pipe that never begins, or to more than the memory
holds. Every file from outside is opened here. All limits are far above what the suite needs; the
environment variable ``ROBUSTEVAL_LIMITS`` multiplies them.
"""

from __future__ import annotations

import errno
import math
import os
import re
import stat
import tomllib
from io import BufferedReader
from pathlib import Path
from typing import Any

from robusteval.errors import RobustevalError, UsageError

VARIABLE = "ROBUSTEVAL_LIMITS"

# bytes that are read of a file, by what it is
WEIGHTS = 8 * 10**9
ARRAYS = 16 * 10**9
COLUMNS = 10**9  # of a million images under an attack in stages about a third
PICTURE = 256 * 10**6
MANIFEST = 64 * 10**6
RECORD = 16 * 10**6
NAMES = 16 * 10**6
SETTINGS = 10**6

SPARSE = 64 * 10**6  # from here on most of a file must have been written
EXTENTS = 10_000  # of a file with holes that are looked at
CHUNK = 2**20
KEY_PARTS = 64  # of a dotted key in TOML: reading it takes the square of them

SPECIAL = {
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}
DOTTED = re.compile(
    rf"""(?<![\w"'-])(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')"""
    rf"""(?:[ \t]*+\.[ \t]*+(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')){{{KEY_PARTS}}}"""
)


def raise_limit(usual: int) -> int:
    """A limit as the user has set it: the usual one times ``ROBUSTEVAL_LIMITS``; UsageError."""
    text = os.environ.get(VARIABLE, "") or "1"
    try:
        factor = float(text)
    except ValueError:
        factor = math.nan
    if not 0 < factor < math.inf:
        raise UsageError(f"{VARIABLE} must be a number above 0, such as 4, not {text!r}")
    return math.ceil(usual * factor)


def check_amount(
    subject: str,
    found: int,
    usual: int,
    unit: str,
    kind: type[RobustevalError] = UsageError,
) -> None:
    """Refuse more of something than is read, with the way to read it all the same.

    Parameters
    ----------
    subject : str
        What has it, put at the beginning of the sentence.
    found, usual : int
        How much it has, and the limit where ``ROBUSTEVAL_LIMITS`` is not set.
    unit : str
        Of both, as in "tensors"; bytes are spelled as MB or GB.
    kind : type
        The error to raise.
    """
    most = raise_limit(usual)
    if found > most:
        factor = math.ceil(found / usual)
        limit = spell_amount(most, unit) if unit == "bytes" else most
        raise kind(
            f"{subject} has {spell_amount(found, unit)}, the limit is {limit}: if that is meant,"
            f" set {VARIABLE}={factor} in the environment"
        )


def spell_amount(count: int, unit: str) -> str:
    """A count with its unit, of bytes with a larger one."""
    if unit != "bytes":
        return f"{count} {unit}"
    for size, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= size:
            return f"{count / size:.4g} {name}"
    return f"{count} bytes"


def check_regular(path: Path, usual: int) -> None:
    """Refuse what is there but no ordinary file, or one that is too large; nothing is opened.

    UsageError; nothing is raised where there is nothing.
    """
    try:
        found = os.stat(path)
    except OSError:
        return
    _check_status(path, found, usual)


def open_regular(path: Path, usual: int) -> BufferedReader:
    """An ordinary file, open to be read, of at most so many bytes.

    Parameters
    ----------
    path : Path
        Where it is, or a link to it.
    usual : int
        The limit in bytes, which `raise_limit` may raise.

    Raises
    ------
    UsageError
        It is a folder, a device, a pipe or a socket, it is larger, or most of a large file was
        never written.
    OSError
        There is none, or it cannot be opened.
    """
    try:
        _check_status(path, os.stat(path), usual)
    except ValueError:  # a zero byte in its name
        raise UsageError(f"{path} is no path of a file") from None
    file = open(path, "rb", opener=_open_at_once)
    try:
        found = os.fstat(file.fileno())
        _check_status(path, found, usual)  # it may be another one by now
        if found.st_size > raise_limit(SPARSE) and _measure_data(file.fileno()) < found.st_size / 2:
            raise UsageError(
                f"{path} is {spell_amount(found.st_size, 'bytes')} long, of which most was never"
                " written (a sparse file, as an interrupted download leaves): download or copy it"
                " again"
            )
    except BaseException:
        file.close()
        raise
    return file


def _open_at_once(path: str, flags: int) -> int:
    """Opens without waiting for a writer, and without a terminal becoming ours."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))


def _check_status(path: Path, found: os.stat_result, usual: int) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise UsageError(f"{path} is a folder: give a file")
    if not stat.S_ISREG(found.st_mode):
        kind = SPECIAL.get(stat.S_IFMT(found.st_mode), "no file")
        raise UsageError(f"{path} is {kind}: copy what it gives to an ordinary file first")
    check_amount(str(path), found.st_size, usual, "bytes")


def _measure_data(file: int) -> int:
    """Bytes of an open file that are not holes; all where the system does not say."""
    end = os.fstat(file).st_size
    if not hasattr(os, "SEEK_DATA"):
        return end
    data = place = 0
    try:
        for _ in range(EXTENTS):
            start = os.lseek(file, place, os.SEEK_DATA)
            place = os.lseek(file, start, os.SEEK_HOLE)
            data += place - start
            if place >= end:
                return data
        return end
    except OSError as error:
        return data if error.errno == errno.ENXIO else end  # nothing but a hole is left
    finally:
        os.lseek(file, 0, os.SEEK_SET)


def read_bytes(path: Path, usual: int) -> bytes:
    """All of a file; what `open_regular` raises, and UsageError if it grows beyond the limit."""
    with open_regular(path, usual) as file:
        content = file.read(os.fstat(file.fileno()).st_size + 1) or b""
        parts = [content]
        # the system's own files say that they are empty, and another process may still write
        while content:
            check_amount(str(path), sum(map(len, parts)), usual, "bytes")
            content = file.read(CHUNK) or b""
            parts.append(content)
    return parts[0] if len(parts) <= 2 else b"".join(parts)


def read_buffer(file: BufferedReader) -> bytearray:
    """All of an open file as `open_regular` gives it, in memory that can be written to."""
    content = bytearray(os.fstat(file.fileno()).st_size)
    file.seek(0)
    length = file.readinto(content)
    del content[length:]  # it has become shorter
    return content


def read_text(path: Path, usual: int, encoding: str = "utf-8") -> str:
    """All of a text file, its line ends as in Python; ValueError if it is no text."""
    return read_bytes(path, usual).decode(encoding).replace("\r\n", "\n").replace("\r", "\n")


def read_toml(path: Path) -> tuple[str, dict[str, Any]]:
    """Text and content of a TOML file.

    Raises
    ------
    UsageError
        As `open_regular`, or a key has very many parts.
    OSError
        There is none, or it cannot be opened.
    ValueError, RecursionError
        It is no TOML, or nested too deeply.
    """
    text = read_text(path, SETTINGS, "utf-8-sig")
    if DOTTED.search(text):
        raise UsageError(f"{path} has a key of more than {KEY_PARTS} parts: mend it")
    return text, tomllib.loads(text)
