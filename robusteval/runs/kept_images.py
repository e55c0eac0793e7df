"""All adversarial images of a run, as numbers: an archive for each attack.

Below ``adversarial/`` in the folder of the run, where they were asked for::

    <attack>-<key>.npz      x, the images (m, c, h, w) float32 in [0, 1], y, their labels, and more
    <key>.parts/            batches of an attack that is not finished

Batches are written before what says that their images are done, and joined on disk: what is in
memory does not grow with the number of images.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from robusteval.errors import RunError
from robusteval.runs.storage import PartFolder, hash_file
from robusteval.runs.types import Columns, Outcome, Values
from robusteval.runs.writing import write_atomically

FOLDER = "adversarial"  # in that of the run
ENTRY = "images"  # of a cell in the record: the hash of its archive


class KeptImages:
    """The images of the cells of one run.

    Parameters
    ----------
    folder : Path
        That of the run.
    say : callable
        Told in a sentence what is damaged and will be computed again.
    """

    def __init__(self, folder: Path, say: Callable[[str], object]) -> None:
        self.run = folder
        self.parts = PartFolder(folder / FOLDER, say)

    def keep_batch(self, key: str, rows: Values, x_adv: Values) -> None:
        """Keep images ``(m, c, h, w)`` of these rows ``(m,)`` of a cell."""
        self.parts.save_part(key, {"row": rows, "x": x_adv})

    def holds(self, key: str, rows: Values) -> bool:
        """Whether images of all these rows of a cell that is not finished are kept."""
        found: set[int] = set()
        for part in self.parts.read_parts(key):
            found.update(part["row"].tolist())
        return found.issuperset(rows.tolist())

    def has_archive(self, entry: Mapping[str, Any]) -> bool:
        """Whether all images of a finished cell are there, as they were written."""
        if ENTRY not in entry:
            return False
        try:
            check_images(self.run, entry)
        except RunError as error:
            self.parts.say(str(error))
            return False
        return True

    def join(self, key: str, outcome: Outcome, shape: tuple[int, int, int]) -> str:
        """Write the archive of a cell from its batches; the SHA-256 of it.

        Rows are those that were attacked, in the order of the run. ValueError if one is missing.
        """
        rows = np.flatnonzero(outcome.attacked)
        self.parts.locate(key).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self.parts.locate(key)) as file:
            x = np.memmap(file, np.float32, "w+", shape=(len(rows), *shape))
            missing = np.ones(len(rows), np.bool_)
            for part in self.parts.read_parts(key):
                known = np.isin(part["row"], rows)
                places = np.searchsorted(rows, part["row"][known])
                x[places] = part["x"][known]
                missing[places] = False
            if missing.any():
                raise ValueError("images are missing")
            facts = describe_images(outcome, rows)
            path = locate_images(self.run, str(outcome.attack.name), key)
            arrays: dict[str, Any] = {"x": x, **facts}
            write_atomically(path, lambda archive: np.savez_compressed(archive, **arrays))
        return hash_file(path)


def describe_images(outcome: Outcome, rows: Values) -> Columns:
    """What an archive says of its images ``(m,)``, the rows of a cell that were attacked.

    The label `y`, position `index` and content `id` of the image that each was made of; what the
    network said of it as 32-bit floats (`prediction`), whether the attack reached its goal
    (`fooled`) and, of a targeted one, the class to reach (`target`).
    """
    c = {name: column[rows] for name, column in outcome.columns.items()}
    target = {"target": c["target"]} if outcome.threat.targeted else {}
    facts = {"y": c["label"], "index": c["index"], "id": c["id"], "prediction": c["pred_adv"]}
    return {**facts, "fooled": outcome.success()[rows], **target}


def name_images(attack: str, key: str) -> str:
    """What the images of a cell are called, for people and as part of a path."""
    return f"{re.sub('[^A-Za-z0-9]+', '-', attack).strip('-')}-{key[:8]}"


def locate_images(folder: Path, attack: str, key: str) -> Path:
    """Where the archive of a cell is, in the folder of its run."""
    return folder / FOLDER / f"{name_images(attack, key)}.npz"


def check_images(folder: Path, entry: Mapping[str, Any]) -> Path:
    """The archive of a cell, byte for byte the one that was written.

    RunError if it is gone or was changed.
    """
    path = locate_images(folder, entry["attack"]["name"], entry["key"])
    again = "run the evaluation again with --keep-images to restore it"
    if path.is_symlink() or not path.is_file():
        raise RunError(f"{path} is missing: {again}")
    if hash_file(path) != entry[ENTRY]:
        raise RunError(f"{path} was changed after the run: {again}")
    return path
