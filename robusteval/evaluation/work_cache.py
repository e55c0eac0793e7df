"""Arrays that are kept while a command is at work, so that a stop loses none of them."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from robusteval.interpreters.rts import locate_mask_network
from robusteval.models.classifier import Classifier
from robusteval.models.environment import describe_environment
from robusteval.models.identity import hash_model
from robusteval.runs.storage import PartFolder, digest, pack, unpack, write_atomically

RUN = "run-"  # before the name of an evaluation's folder

Arrays = tuple[np.ndarray[Any, Any], ...]


class WorkCache:
    """Results by what they were made from: the same work on the same data is done once.

    Parameters
    ----------
    folder : Path, optional
        Where they are kept; nothing is if not given.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.parts = PartFolder(folder)  # of a `robusteval.evaluation.batches.ResumableMap`

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
        path = self.folder / f"{hash_inputs(facts, arrays)}.npz"
        with suppress(OSError, ValueError, KeyError):  # what is not whole is made again
            columns = unpack(path.read_bytes())
            return tuple(columns[str(i)] for i in range(len(columns)))
        found = work()
        write_atomically(path, pack({str(i): array for i, array in enumerate(found)}))
        return found

    def name_run_folder(self, facts: Any) -> Path | None:
        """Name the folder of an evaluation of these facts, which continues by itself."""
        return None if self.folder is None else self.folder / f"{RUN}{digest(facts)[:16]}"

    def clear(self) -> None:
        """Remove them, and the folder if nothing else is in it."""
        if self.folder is None:
            return
        for path in [*self._files(), *self.folder.glob(".*.npz.*.tmp")]:  # some of a kill
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
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
    rts = hashlib.sha256(masks.read_bytes()).hexdigest() if masks.exists() else None
    return [describe_environment(classifier.device), hash_model(classifier), rts, seed]
