"""A run on disk.

A run is a folder::

    run.json                what was asked, of which model and data, where; one entry per cell
    samples/<key>.npz       the columns of one cell, sealed under its key
    samples/<key>.parts/    what is finished of a cell that is not, and images it may show
    pictures/<key>.npz      a few of its images, for people to look at
    adversarial/            all of its images, where that was asked for, see `kept_images`

Every file is written under another name, synced and renamed, so that at any moment the folder
holds whole files only. A cell's key hashes everything its numbers depend on.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import Timeout

from robusteval.errors import RunError, UsageError, check_path
from robusteval.runs.facts import check_depth
from robusteval.runs.kept_images import ENTRY, FOLDER, KeptImages, check_images
from robusteval.runs.keys import list_keys
from robusteval.runs.pictures import (
    check_candidates,
    check_pictures,
    pack_pictures,
    unpack_pictures,
)
from robusteval.runs.reading import ARRAYS, RECORD, read_bytes, read_text
from robusteval.runs.seals import check_seal
from robusteval.runs.storage import PartFolder, differences, pack, read_columns, unpack
from robusteval.runs.types import Columns, Outcome, Picture, Run, Values
from robusteval.runs.validation import check_clean, check_entries, check_outcome, check_run
from robusteval.runs.writing import hold_lock, remove_leftovers, write_atomically

FORMAT = 1
NO_ATTACK = ("clean", "quality", "defense", "receiver")  # roles of cells
SHARE = "share.json"  # below samples, of a folder that holds one part of a run
# the entries of a record that everything else leans on
FIELDS: dict[str, type | tuple[type, ...]] = {
    "status": str,
    "config": dict,
    "model": dict,
    "data": dict,
    "environment": dict,
    "failures": dict,
    "findings": list,
    "cells": list,
    "created": str,
    "seconds": (int, float),
}


class Store:
    """The folder of one run, open for writing by this process alone.

    Parameters
    ----------
    folder : Path
        The folder.
    say : callable, optional
        Told in a sentence what is damaged and will be computed again.
    """

    def __init__(self, folder: Path, say: Callable[[str], object] = lambda text: None) -> None:
        self.folder = folder
        self.say = say
        self.samples = folder / "samples"
        self.pictures = folder / "pictures"
        self.parts = PartFolder(self.samples, say)  # what is finished of cells that are not
        self.images: KeptImages | None = None  # where all of them are to be kept
        self.created = ""  # when the run was begun
        self.seconds = 0.0  # what earlier calls spent on it
        self._entries: dict[str, dict[str, Any]] = {}

    @classmethod
    @contextmanager
    def open(
        cls,
        folder: Path,
        config: dict[str, Any],
        *,
        fresh: bool = False,
        say: Callable[[str], object] = lambda text: None,
    ) -> Iterator[Store]:
        """Lock the folder and continue the run in it, or begin one.

        UsageError if it holds another run (the message tells the difference), something that is
        no run, or cannot be written; RunError if another process is at it.
        """
        store = cls(folder, say)
        with ExitStack() as stack:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                if not (folder / "run.json").exists() and any(
                    p.name[0] != "." for p in folder.iterdir()
                ):
                    raise UsageError(
                        f"{folder} holds other files: choose an empty folder for --out"
                    )
                stack.enter_context(hold_lock(folder / ".lock"))
            except Timeout:
                raise RunError(
                    f"another process is writing to {folder}: wait for it, or choose another --out"
                ) from None
            except OSError as error:
                raise UsageError(
                    f"cannot write to {folder} ({error.strerror or error}): choose another --out"
                ) from None
            refuse_links(folder)
            store._take_over(config, fresh)
            yield store

    def _take_over(self, config: dict[str, Any], fresh: bool) -> None:
        path = self.folder / "run.json"
        remove_leftovers(self.folder, re.escape(path.name))
        if not path.exists():
            return
        record = read_record(path)
        if fresh:
            # in this order: samples without a record would not be known as ours
            shutil.rmtree(self.samples, ignore_errors=True)
            shutil.rmtree(self.pictures, ignore_errors=True)
            shutil.rmtree(self.folder / FOLDER, ignore_errors=True)
            path.unlink()
            return
        here = dict(config)
        if record["config"].get("attacks") != config.get("attacks"):
            here["resolved"] = record["config"].get("resolved")  # would say it once more, at length
        lines = list(differences(record["config"], here))
        if lines:
            raise UsageError(
                f"{self.folder} holds a run with other settings; choose another --out, or --fresh"
                " to throw it away:",
                (f"  {line}" for line in lines[:8]),
            )
        for below in (self.samples, self.pictures, self.folder / FOLDER):
            remove_leftovers(below, r".+\.npz")
        self._entries = {
            entry["key"]: entry for entry in record["cells"] if is_of_run(record["config"], entry)
        }
        for entry in record["cells"]:
            if entry["key"] not in self._entries:
                self.say(f"The cell {entry['key']} in {path} is of another run: it is left out.")
        self.created, self.seconds = record["created"], record["seconds"]

    def find_clean(self, key: str, index: Values, kind: str | None = None) -> Columns | None:
        """Find the columns of the clean images at these positions; None if none can be trusted.

        Behind a defense of this kind if one is named.
        """
        return self._find(key, lambda columns: check_clean(columns, kind, index))

    def find_cell(self, key: str) -> Columns | None:
        """Find the columns of a finished cell; None if there are none that can be trusted."""
        return self._find(key, lambda columns: None)

    def find_outcome(self, key: str, clean: Columns) -> Outcome | None:
        """Find a finished attack on these clean images; None if none can be trusted."""
        outcomes: list[Outcome] = []

        def check(columns: Columns) -> None:
            outcomes.append(Outcome.from_record(self._entries[key], columns))
            check_outcome(outcomes[0], clean)

        return None if self._find(key, check) is None else outcomes[0]

    def _find(self, key: str, check: Callable[[Columns], object]) -> Columns | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        try:
            columns = read_cell(self.folder, entry)
            check(columns)
            read_pictures(self.folder, entry, columns)
        except (RunError, ValueError, KeyError, TypeError, AttributeError):
            path = self.samples / f"{key}.npz"
            if path.exists():
                self.say(f"{path} is damaged, or of another cell: it is computed again.")
            del self._entries[key]
            return None
        return columns

    def read_candidates(self, key: str) -> Columns:
        """Read what `save_candidates` kept of a cell that is not finished; empty if nothing.

        Rows that are finished are offered to the gallery no more. Where the candidates among them
        are lost, these rows are thrown away, too.
        """
        # version 0.1.0 kept candidates where the pictures of a finished cell are
        for path in (self._place_candidates(key), self.pictures / f"{key}.npz"):
            with suppress(OSError, KeyError, ValueError, UsageError):
                content = read_bytes(path, ARRAYS)
                check_seal(content, key, needed=False)
                candidates = unpack(content, ARRAYS)
                check_candidates(candidates)
                return candidates
        if self._place_candidates(key).exists():
            folder = self.parts.locate(key)
            self.say(f"{folder} is damaged: what it held is computed again.")
        self.parts.remove_parts(key)
        return {}

    def save_candidates(self, key: str, candidates: Columns) -> None:
        """Keep the images that may become the pictures of a cell; they go with its parts."""
        write_atomically(self._place_candidates(key), pack(candidates, key))

    def _place_candidates(self, key: str) -> Path:
        return self.parts.locate(key) / "candidates"

    def save_cell(
        self,
        key: str,
        columns: Columns,
        entry: dict[str, Any],
        pictures: Sequence[Picture] = (),
        images: str | None = None,
    ) -> None:
        """Keep a whole cell; its parts go once the record names it.

        `images` is the hash of the archive of all its images, where there is one.
        """
        content = pack(columns, key)
        write_atomically(self.samples / f"{key}.npz", content)
        sha256 = hashlib.sha256(content).hexdigest()
        self._entries[key] = {"key": key, "sha256": sha256, **entry}
        if pictures:
            content = pack(pack_pictures(pictures), key)
            write_atomically(self.pictures / f"{key}.npz", content)
            self._entries[key]["pictures"] = hashlib.sha256(content).hexdigest()
        if images is not None:
            self._entries[key][ENTRY] = images

    def has_images(self, key: str) -> bool:
        """Whether all images of a finished cell are kept, as they were written."""
        return self.images is not None and self.images.has_archive(self._entries.get(key, {}))

    def save_record(self, record: dict[str, Any], keys: list[str]) -> None:
        """Write ``run.json``: the finished cells of these keys, and behind them what an earlier
        call finished and this one has not come to yet."""
        order = [*(key for key in keys if key in self._entries), *self._entries]
        cells = [self._entries[key] for key in dict.fromkeys(order)]
        whole = {"format": FORMAT, **record, "cells": cells}
        text = json.dumps(whole, indent=1, allow_nan=False)
        write_atomically(self.folder / "run.json", text.encode())
        kept = [self.parts, KeptImages(self.folder, self.say).parts]
        for parts in kept:
            if record["status"] == "complete":
                parts.remove_all_parts()
                continue
            for key in keys:
                if key in self._entries:
                    parts.remove_parts(key)


def save_share(folder: Path, answers: dict[str, Any]) -> None:
    """Note that all images of a share are done, and what the networks answered besides."""
    write_atomically(folder / "samples" / SHARE, json.dumps(answers, allow_nan=False).encode())


def refuse_links(folder: Path) -> None:
    """UsageError if a part of the folder of a run leads out of it."""
    for name in ("run.json", "samples", "pictures", FOLDER):
        if os.path.islink(folder / name):
            raise UsageError(
                f"{folder / name} is a link: a run is kept in its own folder alone, so put there"
                " what it leads to"
            )


def is_of_run(config: dict[str, Any], entry: dict[str, Any]) -> bool:
    """Whether a cell's key is the hash of what the record says of the cell and of the run."""
    try:
        return entry["key"] in list_keys(config, entry)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return False


def refuse_constant(text: str) -> None:
    """ValueError: NaN and Infinity are no JSON, and nothing that we write."""
    raise ValueError(f"{text} is no number")


def read_record(path: Path) -> dict[str, Any]:
    """Read a ``run.json``; UsageError if it is none, or of a newer format."""
    try:
        record = json.loads(read_text(path, RECORD), parse_constant=refuse_constant)
        check_depth(record)
        version = record["format"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UsageError(f"{path} is not the record of a run, or it is damaged") from None
    if version != FORMAT:
        raise UsageError(
            f"{path} has format {version}, this version of robusteval reads {FORMAT}:"
            " read it with the version that wrote it"
        )
    for name, kind in FIELDS.items():
        if not isinstance(record.get(name), kind):
            raise UsageError(f"{path} is not the record of a run, or it is damaged")
    try:
        check_entries(record["cells"])
    except ValueError as error:
        raise UsageError(f"{path} is not the record of a run, or it is damaged: {error}") from None
    return dict(record)


def read_cell(folder: Path, entry: dict[str, Any]) -> Columns:
    """Read the columns of a cell; RunError if the file is gone or not the one that was written."""
    key = entry["key"]
    return read_columns(folder / "samples" / f"{key}.npz", entry["sha256"], key)


def load_pictures(run: Run) -> dict[int, list[Picture]]:
    """Read the pictures of each cell that has some, by its position in `run.outcomes`.

    RunError if one is missing or was changed.
    """
    found = {}
    for position, (cell, outcome) in enumerate(zip(list_entries(run), run.outcomes, strict=False)):
        if pictures := read_pictures(Path(str(run.folder)), cell, outcome.columns):
            found[position] = pictures
    return found


def find_images(run: Run) -> dict[int, Path]:
    """Find the archives of all images, by the position of their cell in `run.outcomes`.

    RunError if one is missing or was changed.
    """
    cells = enumerate(list_entries(run))
    return {i: check_images(Path(str(run.folder)), cell) for i, cell in cells if ENTRY in cell}


def list_entries(run: Run) -> list[dict[str, Any]]:
    """List what the record says of each of `run.outcomes`; nothing of a run without a folder."""
    if run.folder is None:
        return []
    record = read_record(Path(run.folder) / "run.json")
    cells = {cell["key"]: cell for cell in record["cells"]}.values()
    return [cell for cell in cells if cell["role"] not in NO_ATTACK]


def read_pictures(folder: Path, entry: dict[str, Any], columns: Columns) -> list[Picture]:
    """Read the pictures of a cell with these columns, none if it has none.

    RunError if they are gone or damaged, or of another cell.
    """
    if not entry.get("pictures"):
        return []
    path = folder / "pictures" / f"{entry['key']}.npz"
    content = read_columns(path, entry["pictures"], entry["key"])
    try:
        pictures = unpack_pictures(content)
        check_pictures(pictures, columns)
    except (KeyError, TypeError, ValueError, IndexError):
        raise RunError(
            f"{path} holds no pictures of this cell: run the evaluation again to restore it"
        ) from None
    return pictures


def load_run(folder: Path | str) -> Run:
    """Read a run from its folder (or from its ``run.json``).

    UsageError if there is none; RunError if a cell is missing or was changed.
    """
    check_path("the folder of a run", folder)
    folder = Path(folder)
    if folder.name == "run.json":
        folder = folder.parent
    path = folder / "run.json"
    refuse_links(folder)
    if not os.path.exists(path):
        raise UsageError(f"{folder} is not the folder of a run: there is no run.json in it")
    record = read_record(path)
    try:
        for entry in record["cells"]:
            if not is_of_run(record["config"], entry):
                raise ValueError(
                    f"the cell {entry['key']} is of another run, or was changed: its name is not"
                    " the hash of what it says"
                )
        # a key that is there twice is one cell
        entries = {entry["key"]: entry for entry in record["cells"]}.values()
        cells = ((entry, read_cell(folder, entry)) for entry in entries)
        run = Run.from_record(record, cells, str(folder))
        check_run(run)
    except ValueError as error:
        raise UsageError(f"{path} is not the record of a run, or it is damaged: {error}") from None
    except (KeyError, TypeError, AttributeError):
        raise UsageError(f"{path} is not the record of a run, or it is damaged") from None
    return run
