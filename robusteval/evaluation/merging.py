"""Joining the parts of a run that several processes computed, without the network.

Each part has looked at all images as they are, and attacked its own. The columns of all parts are
put into one folder, in which the evaluation then goes its usual way and finds every row computed:
what is decided or said of the whole run is so made by the same code from the same columns. Where a
row is missing after all, as when only the whole run shows that one more attack is needed, the run
stays incomplete, and the command without `--shard` computes that alone.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from robusteval.errors import RunError, UsageError
from robusteval.evaluation.absent import Absent, prepare_absent
from robusteval.evaluation.answers import Answers
from robusteval.evaluation.batches import sort_rows
from robusteval.evaluation.evaluate import Evaluation
from robusteval.evaluation.gallery import Gallery
from robusteval.evaluation.plan import Plan
from robusteval.evaluation.shares import Share, find_owners
from robusteval.progress import Progress, Silent
from robusteval.runs.folder import SHARE, Store, is_of_run, read_cell, read_record, refuse_links
from robusteval.runs.pictures import check_candidates
from robusteval.runs.reading import ARRAYS, RECORD, read_bytes, read_text
from robusteval.runs.seals import check_seal
from robusteval.runs.storage import PartFolder, differences, unpack, unpack_part
from robusteval.runs.types import Columns, Run

IMAGES = ("clean", "defense", "receiver")  # roles of cells that are images as they are
FILE = ("key", "sha256", "pictures")  # of an entry: what names the file of its cell
# of the command of a part: what is its own, and what would throw away the joined columns
LEFT_OUT = re.compile(r""" (?:--(?:shard|out)[ =](?:'[^']*'|"[^"]*"|[^\s'"])+|--fresh(?= |$))""")
PARTS = re.compile(r"([0-9a-f]{64})\.parts")


@dataclass(frozen=True)
class Shard:
    """One part of a run, in its folder."""

    folder: Path
    share: Share
    record: dict[str, Any]
    answers: dict[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        """What the whole run was asked for."""
        return {name: value for name, value in self.record["config"].items() if name != "shard"}

    @property
    def parts(self) -> PartFolder:
        """Its finished rows."""
        return PartFolder(self.folder / "samples")

    @classmethod
    def read(cls, folder: Path) -> Shard:
        """Read what a folder says of itself; UsageError if it is no part, or not finished."""
        folder = folder.parent if folder.name == "run.json" else folder
        refuse_links(folder)
        if not (folder / "run.json").exists():
            raise UsageError(f"{folder} is not the folder of a run: there is no run.json in it")
        record = read_record(folder / "run.json")
        if not isinstance(text := record["config"].get("shard"), str):
            raise UsageError(f"{folder} is a run of its own: merge joins what --shard has divided")
        share = Share.parse(text)
        try:
            answers = json.loads(read_text(folder / "samples" / SHARE, RECORD))
            if not isinstance(answers, dict):
                raise ValueError
        except (OSError, ValueError, RecursionError):
            told = next(iter(record["failures"].values()), "")
            raise UsageError(
                f"shard {share} in {folder} is not finished{f' ({told})' if told else ''}: give its"
                " command again, which continues it"
            ) from None
        return cls(folder, share, record, answers)

    def read_rows(self, key: str) -> Columns:
        """The rows it has finished of a cell, and their numbers as the column ``row``."""
        found: list[Columns] = []
        for path in sorted(self.parts.locate(key).glob("*.npz")):
            try:
                found.append(unpack_part(read_bytes(path, ARRAYS), key))
            except (OSError, ValueError, UsageError):
                raise RunError(
                    f"{path} is damaged: give the command of shard {self.share} again, which"
                    " computes it anew"
                ) from None
        rows = np.unique(np.concatenate([part["row"] for part in found] or [np.zeros(0, int)]))
        return sort_rows([(part["row"], part) for part in found], rows)

    def read_candidates(self, key: str) -> Columns:
        """The images of a cell that may become its pictures; empty if there are none."""
        path = self.parts.locate(key) / "candidates"
        if not path.exists():
            return {}
        try:
            content = read_bytes(path, ARRAYS)
            check_seal(content, key)
            candidates = unpack(content, ARRAYS)
            check_candidates(candidates)
        except (OSError, ValueError, KeyError, UsageError):
            raise RunError(
                f"{path} is damaged: give the command of shard {self.share} again with --fresh"
            ) from None
        return candidates


def merge(
    folders: Sequence[Path],
    out: Path,
    *,
    fresh: bool = False,
    progress: Progress | None = None,
    command: str = "",
) -> Run:
    """Join the parts of a run.

    Parameters
    ----------
    folders : sequence of Path
        The run folders of all parts, in any order.
    out : Path
        Folder of the whole run.
    fresh : bool
        Throw away what is in `out`.
    progress : Progress, optional
        Where to say how far it is.
    command : str
        As the user gave it, told where that of the parts is not known; empty from Python.

    Returns
    -------
    Run
        That of one process. Incomplete where something of it was not computed by any part.

    Raises
    ------
    UsageError
        The folders are not the parts of one run, or some are missing.
    RunError
        A file of a part is damaged, or two parts have the same rows.
    """
    progress = progress or Silent()
    shards = sorted((Shard.read(folder) for folder in folders), key=lambda shard: shard.share)
    check_parts(shards)
    config = shards[0].config
    if any(shard.folder.resolve() == out.resolve() for shard in shards):
        raise UsageError(f"--out {out} is one of the shards: choose another folder")
    with Store.open(out, config, fresh=fresh, say=progress.say) as store:
        clean, record = join_columns(shards, store, progress), shards[0].record
        if any(config.get(name) for name in ("defenses", "interpreters", "receivers")):
            # what these measure is described by themselves alone
            raise RunError(f"the columns are joined; {spell_completion(record, out)}")
        plan, absent = prepare_absent(record, config, clean, shards[0].answers)
        told = spell_whole(record) or command  # what made the columns, not who joined them
        joined = JoinedEvaluation(plan, store, progress, told, shards[0])
        run = joined.run(complete=lambda: not absent.asked)
    if run.status != "complete":
        raise RunError(f"the columns are joined; {spell_completion(record, out)}")
    return run


def join_columns(shards: Sequence[Shard], store: Store, progress: Progress) -> Columns:
    """Put all that the parts of a run have computed into its store, as a run to be continued.

    Parameters
    ----------
    shards : sequence of Shard
        All of them, see `check_parts`.
    store : Store
        Of the whole run, open.
    progress : Progress
        Told how far it is.

    Returns
    -------
    Columns
        The images as they are, without a defense.

    Raises
    ------
    UsageError
        The parts have read other images, or lack some.
    RunError
        A file of a part is damaged, or two parts have the same rows.
    """
    first = shards[0]
    store.created = store.created or min(shard.record["created"] for shard in shards)
    store.seconds = max(store.seconds, sum(shard.record["seconds"] for shard in shards))
    facts = {"config": first.config, "status": "incomplete", "seconds": store.seconds}
    record = {**first.record, **facts, "created": store.created}
    store.save_record(record, [])  # first: files without it would not be known as ours
    clean = join_clean(shards, store)
    join_rows(shards, store, progress)
    store.save_record(record, [])
    return clean


def check_parts(shards: Sequence[Shard]) -> None:
    """Refuse what are not the parts of one run, each once; UsageError."""
    if not shards:
        raise UsageError("name the folders of all shards")
    first = shards[0]
    for other in shards[1:]:
        lines = list(differences(first.config, other.config))
        if lines:
            raise UsageError(
                f"{other.folder} is of another run than {first.folder}:",
                (f"  {line}" for line in lines[:8]),
            )
        if other.share.of != first.share.of:
            raise UsageError(
                f"{first.folder} is shard {first.share} and {other.folder} is shard {other.share}:"
                " join shards of one division"
            )
    for one, other in pairwise(shards):
        if one.share == other.share:
            raise UsageError(
                f"{one.folder} and {other.folder} are both shard {one.share}: name each once"
            )
    there = {shard.share.part for shard in shards}
    missing = [str(Share(i, first.share.of)) for i in range(1, first.share.of + 1)]
    missing = [text for i, text in enumerate(missing, 1) if i not in there]
    if missing:
        some = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if missing[8:] else "")
        raise UsageError(
            f"shards {some} are missing: name the folders of all"
            if missing[1:]
            else f"shard {some} is missing: name the folders of all"
        )


def join_clean(shards: Sequence[Shard], store: Store) -> Columns:
    """Put the images as they are into the store: of each image what the part says that attacked it.

    All parts say the same on machines that compute alike. Returns those without a defense.
    """
    undefended: Columns = {}
    owners = np.zeros(0, np.int64)
    entries = [cell for cell in shards[0].record["cells"] if cell["role"] in IMAGES]
    for entry in sorted(entries, key=lambda cell: str(cell["role"])):
        key = entry["key"]
        columns = read_clean(shards[0], key)
        if not undefended:
            owners = find_owners(columns["id"], shards[0].share.of)
        for shard in shards[1:]:
            other = read_clean(shard, key)
            if not np.array_equal(columns["id"], other["id"]):
                raise UsageError(
                    f"{shard.folder} has read other images than {shards[0].folder}: run all shards"
                    " on the same data with the same versions"
                )
            mine = owners == shard.share.part
            for name, values in columns.items():
                values[mine] = other[name][mine]
        store.save_cell(key, columns, {k: v for k, v in entry.items() if k not in FILE})
        undefended = undefended or columns
    if not undefended:
        raise UsageError(f"{shards[0].folder} holds no images: give its command again")
    return undefended


def read_clean(shard: Shard, key: str) -> Columns:
    """Read the images as they are to one part; UsageError if it has none under this key."""
    for entry in shard.record["cells"]:
        if entry["key"] == key and is_of_run(shard.record["config"], entry):
            return read_cell(shard.folder, entry)
    raise UsageError(f"{shard.folder} lacks the images as they are: give its command again")


def join_rows(shards: Sequence[Shard], store: Store, progress: Progress) -> None:
    """Put the finished rows of all cells into the store, and the images that may be shown.

    RunError if two parts have the same row.
    """
    keys = sorted(
        {
            found[1]
            for shard in shards
            for path in (shard.folder / "samples").iterdir()
            if (found := PARTS.fullmatch(path.name)) and not path.is_symlink()
        }
    )
    progress.begin("Joining shards", len(keys))
    for key in keys:
        gallery = Gallery({})
        rows = []
        for shard in shards:
            columns = shard.read_rows(key)
            gallery.join(shard.read_candidates(key))
            if columns:
                rows.append(columns)
        seen = np.concatenate([columns["row"] for columns in rows] or [np.zeros(0, np.int64)])
        if len(np.unique(seen)) < len(seen):
            raise RunError(
                "two shards have attacked the same image, as their machines do not agree on which"
                " images are right: run all shards on machines of one kind"
            )
        if gallery.candidates:
            store.save_candidates(key, gallery.candidates)
        if rows:
            order = np.sort(seen)
            store.parts.save_part(key, sort_rows([(part["row"], part) for part in rows], order))
        progress.advance(1)
    progress.end()


class JoinedEvaluation(Evaluation):
    """An evaluation all of whose rows are computed, and whose network is not there.

    Parameters
    ----------
    plan : Plan
        Of `prepare_absent`.
    store : Store
        With the rows of all parts.
    progress : Progress
        Told how far it is.
    command : str
        That makes the run.
    shard : Shard
        Any part: what networks answered, and in which environment.
    """

    def __init__(
        self, plan: Plan, store: Store, progress: Progress, command: str, shard: Shard
    ) -> None:
        super().__init__(
            plan,
            store,
            batch_size=None,
            progress=progress,
            stopping=lambda: False,
            command=command,
            answers=Answers(shard.answers),
        )
        self.recording.environment = dict(shard.record["environment"])
        self.is_complete: Callable[[], bool] = lambda: True

    def run(self, complete: Callable[[], bool] = lambda: True) -> Run:
        """Go the way of an evaluation; the run is complete if `complete` says so in the end."""
        self.is_complete = complete
        with torch.no_grad(), suppress(Absent):
            return super().run()
        return self.write_record("incomplete")

    def write_record(self, status: str | None = None) -> Run:
        """Write the record as far as it is."""
        return super().write_record((status if self.is_complete() else None) or "incomplete")

    def say_forecast(self) -> None:
        """Say nothing: nothing takes long."""


def spell_completion(record: Mapping[str, Any], out: Path) -> str:
    """What to do about a run that nobody has computed all of."""
    command = spell_whole(record)
    told = f"`{command} --out {shlex.quote(str(out))}`" if command else "`evaluate` without --shard"
    return f"{told} finds them computed and does what only the whole run could ask for"


def spell_whole(record: Mapping[str, Any]) -> str:
    """The command of the whole run, from that of a part; empty where it was none of `evaluate`."""
    command = LEFT_OUT.sub("", str(record["command"]))
    return command if " evaluate " in command else ""
