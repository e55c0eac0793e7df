"""Arrays that are kept while a command is at work, so that a stop loses none of them."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from robusteval.errors import UsageError
from robusteval.interpreters.rts import locate_mask_network
from robusteval.models.classifier import Classifier
from robusteval.models.environment import describe_environment
from robusteval.models.identity import hash_model
from robusteval.runs.reading import ARRAYS, NAMES, read_bytes
from robusteval.runs.seals import check_seal
from robusteval.runs.storage import PartFolder, digest, hash_file, pack, remove_entry, unpack
from robusteval.runs.writing import remove_leftovers, write_atomically

RUN = "run-"  # before the name of an evaluation's folder
RESULT = "result"  # what everything goes into, until it is moved to its place
DONE = "done"  # holds the hash of the result

Arrays = tuple[np.ndarray[Any, Any], ...]


class WorkCache:
    """Results by what they were made from: the same work on the same data is done once.

    Parameters
    ----------
    folder : Path, optional
        Where they are kept; nothing is if not given.
    say : callable, optional
        Told in a sentence what is damaged and will be computed again.
    """

    def __init__(
        self, folder: Path | None = None, say: Callable[[str], object] = lambda text: None
    ) -> None:
        self.folder = folder
        self.say = say
        self.parts = PartFolder(folder, say)  # of a `robusteval.evaluation.batches.ResumableMap`

    @property
    def has_results(self) -> bool:
        """Whether an earlier call has left any."""
        return next(self._files(), None) is not None

    def compute(self, facts: Any, arrays: Arrays, work: Callable[[], Arrays]) -> Arrays:
        """Compute what `work` gives, or read what it gave before.

        Parameters
        ----------
        facts : JSON-able
            All that the result depends on, such as `describe_circumstances`, besides
        arrays : tuple of ndarray
            these.
        work : callable
            ``() -> arrays``.
        """
        if self.folder is None:
            return work()
        key = hash_inputs(facts, arrays)
        path = self.folder / f"{key}.npz"
        try:
            content = read_bytes(path, ARRAYS)
            check_seal(content, key)
            columns = unpack(content, ARRAYS)
            return tuple(columns[str(i)] for i in range(len(columns)))
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, UsageError):
            self.say(f"{path} is damaged: what it held is computed again.")
            remove_entry(path)
        found = work()
        columns = {str(i): array for i, array in enumerate(found)}
        write_atomically(path, pack(columns, key))
        return found

    def name_run_folder(self, facts: Any) -> Path | None:
        """Name the folder of an evaluation of these facts, which continues by itself."""
        return None if self.folder is None else self.folder / f"{RUN}{digest(facts)[:16]}"

    def finish(self, out: Path, save: Callable[[Path], object]) -> None:
        """Write the file that all this was for, and remove the rest.

        A kill leaves either what is needed to write it, or the file and what `clear_if_done` knows
        to be left over.

        Parameters
        ----------
        out : Path
            The file, beside the folder or in a folder beside it.
        save : callable
            Given a path, writes the file there.
        """
        if self.folder is None:
            save(out)
            return
        result = self.folder / f"{RESULT}{out.suffix}"
        save(result)
        write_atomically(self.folder / DONE, hash_file(result).encode())
        try:
            result.replace(out)
        except OSError:  # the folder is a link to another disk, or `out` cannot be written
            save(out)
        self.clear()

    def clear_if_done(self, out: Path) -> None:
        """Remove what a kill has left beside a file that was finished, and nothing else."""
        if self.folder is None or not out.is_file():
            return
        with suppress(OSError, UsageError):
            empty = not any(self.folder.iterdir())
            if empty or read_bytes(self.folder / DONE, NAMES) == hash_file(out).encode():
                self.clear()

    def clear(self) -> None:
        """Remove them, and the folder if nothing else is in it."""
        if self.folder is None or not self.folder.is_dir():
            return
        for path in self._files():
            if path.is_dir():
                # its record last, without which it would not be known as a run
                shutil.rmtree(path / "samples", ignore_errors=True)
                shutil.rmtree(path / "pictures", ignore_errors=True)
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        remove_leftovers(self.folder, rf"[0-9a-f]{{64}}\.npz|{RESULT}\.\w+|{DONE}")
        for path in self.folder.glob(f"{RESULT}.*"):
            path.unlink(missing_ok=True)
        (self.folder / DONE).unlink(missing_ok=True)  # last: it says what all this is
        with suppress(OSError):
            self.folder.rmdir()

    def _files(self) -> Iterator[Path]:
        if self.folder is not None and self.folder.is_dir():
            yield from (path for path in self.folder.glob("*.npz") if len(path.stem) == 64)
            yield from self.folder.glob(f"{RUN}*/")
            yield from (
                path for path in self.folder.glob(f"*{PartFolder.SUFFIX}/") if len(path.stem) == 64
            )


def hash_inputs(facts: Any, arrays: Arrays = ()) -> str:
    """Hash all that a result depends on: JSON-able facts, and arrays by type, shape and content."""
    content = hashlib.sha256(digest(facts).encode())
    for array in arrays:
        content.update(f"{array.dtype} {array.shape}".encode())
        content.update(np.ascontiguousarray(array).tobytes())
    return content.hexdigest()


def describe_circumstances(classifier: Classifier, seed: int) -> list[Any]:
    """JSON-able: all that results depend on besides images, attack and interpreter.

    Versions, device, classifier, the mask network of RTS if there is one, and the seed.
    """
    masks = locate_mask_network(classifier)
    rts = hash_file(masks) if masks.exists() else None
    return [describe_environment(classifier.device), hash_model(classifier), rts, seed]
