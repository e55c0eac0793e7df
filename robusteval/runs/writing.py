"""Files that are whole or not there, and one writer at a time.

A file is written under another name beside its own, synced, and renamed. That name cannot be
guessed, so that nobody can put a link there and no two writers share one; and it is locked while it
is written, so that what a kill left can be told from what another process is writing.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from robusteval.errors import RunError

if sys.platform != "win32":
    import fcntl

# `.NAME.TOKEN.tmp`; the token of version 0.1.0 was the number of the process
TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?:[0-9a-f]{16}|[0-9]{1,10})\.tmp")
WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)  # some file systems


def write_atomically(path: Path, content: bytes | Callable[[IO[bytes]], Any]) -> None:
    """Write the file as a whole or not at all, also when the power fails.

    The content, or what writes it into an open file: it may be called again. What a killed process
    left of this file is removed. RunError if it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent, re.escape(path.name))
        while not _write_and_rename(path, content):
            pass
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        hint = "; make room or choose another folder: the same command continues" if full else ""
        raise RunError(f"cannot write {path}: {error.strerror or error}{hint}") from None


def _write_and_rename(path: Path, content: bytes | Callable[[IO[bytes]], Any]) -> bool:
    """One attempt; False if another process took the file for the leftover of a killed one."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    file = temporary.open("xb")  # never what is there, nor where a link leads
    try:
        if not _lock(file.fileno(), wait=True):
            return False
        content(file) if callable(content) else file.write(content)
        file.flush()
        os.fsync(file.fileno())
        if sys.platform == "win32":
            file.close()  # no open file is renamed there, nor removed by others
        temporary.replace(path)
    except BaseException:
        file.close()
        with suppress(OSError):
            temporary.unlink()
        raise
    finally:
        file.close()
    return True


def remove_leftovers(folder: Path, names: str) -> None:
    """Remove what killed processes left in a folder of files whose names match this expression.

    What another process is writing is left alone, and so is all that is not named as our temporary
    files are.
    """
    try:
        found = [entry for entry in os.scandir(folder) if _is_temporary(entry, names)]
    except OSError:
        return
    for entry in found:
        with suppress(OSError):
            _remove_abandoned(Path(entry.path))


def _is_temporary(entry: os.DirEntry[str], names: str) -> bool:
    match = TEMPORARY.fullmatch(entry.name)
    if match is None or not re.fullmatch(names, match["name"]):
        return False
    return entry.is_file(follow_symlinks=False)


def _remove_abandoned(path: Path) -> None:
    if sys.platform == "win32":
        path.unlink()  # refused while it is open
        return
    held = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if _lock(held, wait=False):
            path.unlink()
    finally:
        os.close(held)


def _lock(held: int, *, wait: bool) -> bool:
    """Lock an open file until it is closed; False if another holds it, or it has no name."""
    if sys.platform == "win32":
        return True
    try:
        fcntl.flock(held, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in WITHOUT_LOCKS:
            return wait  # it is written, but never removed from under another process
        raise
    return os.fstat(held).st_nlink > 0


@contextmanager
def hold_lock(path: Path) -> Iterator[None]:
    """Hold a lock file, which goes with the lock; one that a killed process left is no obstacle.

    Timeout if another process holds it, OSError if it cannot be written.
    """
    if sys.platform == "win32":  # removes the file by itself
        with FileLock(path).acquire(timeout=0):
            yield
        return
    while True:
        held = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(held)
            raise Timeout(str(path)) from None
        except OSError as error:
            os.close(held)
            if error.errno not in WITHOUT_LOCKS:
                raise
            with FileLock(path).acquire(timeout=0):
                yield
            return
        if os.fstat(held).st_nlink:
            break
        os.close(held)  # its holder removed it between our opening and locking it
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # while it is held: nobody else can have locked it
        os.close(held)
