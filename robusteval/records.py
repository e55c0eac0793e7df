"""The plain types that flow and are stored, and a run on disk. NumPy and JSON only.

A run is a folder::

    run.json                what was asked, of which model and data, where; one entry per cell
    samples/<key>.npz       the columns of one cell
    samples/<key>.parts/    what is finished of a cell that is not
    pictures/<key>.npz      a few of its images, for people to look at

Every file is written under another name, synced and renamed, so that at any moment the folder
holds whole files only. A cell's key hashes everything its numbers depend on.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock, Timeout

from robusteval.errors import RunError, UsageError

FORMAT = 1

# the entries of a record that everything else leans on
SHAPE: dict[str, type | tuple[type, ...]] = {
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

Values = np.ndarray[Any, Any]
Columns = dict[str, Values]
Flags = np.ndarray[Any, np.dtype[np.bool_]]


class Threat(NamedTuple):
    """What the attacker may do: a norm, a radius (None: as near as possible), a goal."""

    norm: str
    eps: float | None
    targeted: bool

    def __str__(self) -> str:
        budget = "minimum" if self.eps is None else f"eps {show_number(self.eps)}"
        return f"{self.norm} {budget}" + (" targeted" if self.targeted else "")


class Spec(NamedTuple):
    """A name and the parameters a user gave; reads and prints as ``pgd:eps=8/255,steps=20``."""

    name: str
    parameters: dict[str, Any]

    def __str__(self) -> str:
        parameters = ",".join(f"{key}={show(value)}" for key, value in self.parameters.items())
        return f"{self.name}:{parameters}" if parameters else self.name


def show(value: Any) -> str:
    """A parameter as a user would write it."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return show_number(value) if isinstance(value, float) else str(value)


def show_number(value: float) -> str:
    """A number as a user would write it: grey levels as ``8/255``, others as decimals."""
    levels = round(value * 255) if 0 < value < 1 else 0
    if 1 <= levels <= 64 and levels / 255 == value:
        return f"{levels}/255"
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)


def cell_name(attack: Spec, defense: Spec | None, adaptive: bool) -> str:
    """What a cell is called where it has no result."""
    if defense is None:
        return str(attack)
    return f"{attack} behind {defense}" + ("" if adaptive else " (oblivious)")


# findings that say that model and data do not belong together as they are
MISFED = ("convention", "labels-permuted", "guessing", "black-images")


class Finding(NamedTuple):
    """Something a reader must know before believing a number."""

    code: str  # "zero-gradient", …
    grave: bool  # numbers are upper bounds at best or, if its code is in MISFED, of no use
    message: str  # one sentence
    cell: str | None = None  # the attack it is about

    @property
    def misfed(self) -> bool:
        """Whether it says that the model is fed wrongly."""
        return self.code in MISFED


@dataclass(frozen=True)
class Outcome:
    """One cell: an attack and what it did to each image.

    `columns` are ``(n,)`` arrays; the images of the run in their order, or for a probe the first
    few of those that were classified correctly:

    index, id, label : position in the data set, content id, true class
    pred_clean, attacked : clean prediction; whether it was right, hence attacked
    target : the class to reach, -1 if any other than the label will do
    pred_adv, pred_8bit, pred_png : predictions of the result as it is, rounded to 8 bit, and read
        back from a PNG file; -1 where logits were not finite, -2 where PNG cannot hold the image
    l0, l0_pixels, l1, l2, linf, ssim, psnr : distances, measured in float64
    margin_clean, margin_adv : logit of the label minus the best other
    confidence_adv : softmax probability of `pred_adv`
    forwards, backwards, seconds : the image's share of the cost
    fault : what had to be repaired before judging, bits 1 box, 2 ball, 4 not finite
    score, flagged : behind a detector, what it says of the attacked image, and its alarm
    map_distance:NAME, map_iou:NAME, map_noise:NAME, map_floor:NAME, edge_energy, edge_area : where
        interpreters were asked for, see `robusteval.interpretation.Measurement`
    """

    attack: Spec
    threat: Threat
    knowledge: str
    columns: Columns
    role: str = "attack"  # or the name of a probe
    notes: tuple[str, ...] = ()
    resolved: dict[str, Any] = field(default_factory=dict)
    defense: Spec | None = None  # None: the model as it is
    adaptive: bool = True  # the attack knew the defense

    @property
    def attacked(self) -> Flags:
        """The images ``(n,)`` that were right at first."""
        attacked: Flags = self.columns["attacked"]
        return attacked

    def success(self, pred: str = "pred_adv") -> Flags:
        """The attacked images ``(n,)`` on which the attack reached its goal.

        Judged by the column `pred`; logits that are not finite count for the attacker, and what
        a PNG file cannot hold is judged in float. An image that a detector flags is no success.
        """
        c = self.columns
        made = np.where(c[pred] == -2, c["pred_adv"], c[pred])
        reached = made == c["target"] if self.threat.targeted else made != c["label"]
        success: Flags = self.attacked & (reached | (made == -1))
        return success & ~c["flagged"] if "flagged" in c else success


class Defended(NamedTuple):
    """A defense, and what it does to the images as they are.

    `clean` has the columns of `Run.clean`, as the defended model classifies; behind a detector
    also `score` and `flagged` ``(n,)``.
    """

    spec: Spec
    kind: str  # "model": another network; "detector": alarms beside the same one
    clean: Columns
    facts: dict[str, Any]  # threshold, fpr it was set at, forwards per prediction


class Picture(NamedTuple):
    """One image of a cell as people look at it."""

    place: str  # "easiest", "median" or "hardest" of those attacked
    row: int  # in the columns of its cell
    clean: np.ndarray[Any, Any]  # (h, w, c) uint8
    delta: np.ndarray[Any, Any]  # (h, w, c) float32, in units of the [0, 1] pixel range
    # by interpreter the maps before and after, (h', w') float16 in [0, 1]
    maps: Mapping[str, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = MappingProxyType({})


@dataclass(frozen=True)
class Run:
    """Everything a report needs; read with `load_run`, made by `robusteval.evaluate`."""

    config: dict[str, Any]  # as resolved: attacks, samples, seed, …
    model: dict[str, Any]
    data: dict[str, Any]
    environment: dict[str, Any]
    # index, id, label, pred_clean, margin_clean, confidence_clean; where interpreters were asked
    # for also what their maps are worth, see `robusteval.interpretation.Measurement.quality`
    clean: Columns
    outcomes: tuple[Outcome, ...]
    findings: tuple[Finding, ...]
    status: str  # "complete", "incomplete"
    failures: dict[str, str] = field(default_factory=dict)  # attack -> why it has no result
    seconds: float = 0.0
    created: str = ""
    folder: str | None = None
    defenses: tuple[Defended, ...] = ()

    @property
    def attacks(self) -> tuple[Outcome, ...]:
        """The cells that were asked for, without the probes."""
        return tuple(o for o in self.outcomes if o.role == "attack")


def digest(value: Any) -> str:
    """SHA-256 of a JSON-able value, the same for equal values."""
    text = json.dumps(value, sort_keys=True, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def visible(text: str) -> str:
    """The text with everything that would not show, or would steer a terminal, spelled out."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def write_atomically(path: Path, content: bytes) -> None:
    """The file as a whole or not at all, also when the power fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        hint = "; make room or choose another folder: the same command continues" if full else ""
        raise RunError(f"cannot write {path}: {error.strerror or error}{hint}") from None


def pack(columns: Mapping[str, np.ndarray[Any, Any]]) -> bytes:
    """Columns as the bytes of an ``.npz`` file."""
    buffer = io.BytesIO()
    named: dict[str, Any] = {name: columns[name] for name in sorted(columns)}
    np.savez_compressed(buffer, **named)
    return buffer.getvalue()


def unpack(content: bytes) -> Columns:
    """Columns of an ``.npz`` file; ValueError if it is none."""
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (OSError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(str(error)) from None


class Store:
    """The folder of one run, open for writing by this process alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.samples = folder / "samples"
        self.pictures = folder / "pictures"
        self.created = ""  # when the run was begun
        self.seconds = 0.0  # what earlier calls spent on it
        self._entries: dict[str, dict[str, Any]] = {}

    @classmethod
    @contextmanager
    def opened(
        cls, folder: Path, config: dict[str, Any], *, fresh: bool = False
    ) -> Iterator[Store]:
        """Lock the folder and continue the run in it, or begin one.

        UsageError if it holds another run (the message tells the difference), something that is
        no run, or cannot be written; RunError if another process is at it.
        """
        store = cls(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / "run.json").exists() and any(
                p.name[0] != "." for p in folder.iterdir()
            ):
                raise UsageError(f"{folder} holds other files: choose an empty folder for --out")
            lock = FileLock(folder / ".lock")
            lock.acquire(timeout=0)
        except Timeout:
            raise RunError(
                f"another process is writing to {folder}: wait for it, or choose another --out"
            ) from None
        except OSError as error:
            raise UsageError(
                f"cannot write to {folder} ({error.strerror or error}): choose another --out"
            ) from None
        try:
            store._take_over(config, fresh)
            yield store
        finally:
            lock.release()

    def _take_over(self, config: dict[str, Any], fresh: bool) -> None:
        path = self.folder / "run.json"
        if not path.exists():
            return
        record = read_record(path)
        if fresh:
            # in this order: samples without a record would not be known as ours
            shutil.rmtree(self.samples, ignore_errors=True)
            shutil.rmtree(self.pictures, ignore_errors=True)
            path.unlink()
            return
        here = dict(config)
        if record["config"].get("attacks") != config.get("attacks"):
            here["resolved"] = record["config"].get("resolved")  # would say it once more, at length
        lines = list(differences(record["config"], here))
        if lines:
            raise UsageError(
                f"{self.folder} holds a run with other settings; choose another --out, or --fresh"
                " to throw it away:\n" + "\n".join(f"  {line}" for line in lines[:8])
            )
        self._entries = {entry["key"]: entry for entry in record["cells"]}
        self.created, self.seconds = record["created"], record["seconds"]

    def cell(self, key: str) -> Columns | None:
        """The columns of a finished cell; None if there are none that can be trusted."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        try:
            return read_cell(self.folder, entry)
        except RunError:
            return None  # damaged: computed again

    def outcome(self, key: str) -> Outcome | None:
        """A finished attack; None if there is none that can be trusted."""
        columns = self.cell(key)
        return None if columns is None else outcome_of(self._entries[key], columns)

    def parts(self, key: str) -> Iterator[Columns]:
        """What is finished of a cell that is not, as saved by `save_part`."""
        for path in sorted(self._parts(key).glob("*.npz")):
            try:
                content = path.read_bytes()
                if not path.stem == hashlib.sha256(content).hexdigest()[:16]:
                    raise ValueError(f"{path} is damaged")
                yield unpack(content)
            except ValueError:
                path.unlink()

    def save_part(self, key: str, columns: Columns) -> None:
        """Keep some rows of a cell; they need a column that says which."""
        content = pack(columns)
        name = hashlib.sha256(content).hexdigest()[:16]
        write_atomically(self._parts(key) / f"{name}.npz", content)

    def candidates(self, key: str) -> Columns:
        """What `save_candidates` kept of a cell that is not finished; empty if nothing."""
        try:
            return unpack((self.pictures / f"{key}.npz").read_bytes())
        except (OSError, ValueError):
            return {}

    def save_candidates(self, key: str, candidates: Columns) -> None:
        """Keep the images that may become the pictures of a cell."""
        write_atomically(self.pictures / f"{key}.npz", pack(candidates))

    def save_cell(
        self,
        key: str,
        columns: Columns,
        entry: dict[str, Any],
        pictures: Sequence[Picture] = (),
    ) -> None:
        """Keep a whole cell; its parts go once the record names it."""
        content = pack(columns)
        write_atomically(self.samples / f"{key}.npz", content)
        sha256 = hashlib.sha256(content).hexdigest()
        self._entries[key] = {"key": key, "sha256": sha256, **entry}
        if pictures:
            content = pack(as_columns(pictures))
            write_atomically(self.pictures / f"{key}.npz", content)
            self._entries[key]["pictures"] = hashlib.sha256(content).hexdigest()

    def _parts(self, key: str) -> Path:
        return self.samples / f"{key}.parts"

    def save_record(self, record: dict[str, Any], keys: list[str]) -> None:
        """Write ``run.json``: the finished cells of these keys, and behind them what an earlier
        call finished and this one has not come to yet."""
        order = [*(key for key in keys if key in self._entries), *self._entries]
        cells = [self._entries[key] for key in dict.fromkeys(order)]
        whole = {"format": FORMAT, **record, "cells": cells}
        text = json.dumps(whole, indent=1, allow_nan=False)
        write_atomically(self.folder / "run.json", text.encode())
        for key in keys:
            if key in self._entries:
                shutil.rmtree(self._parts(key), ignore_errors=True)


def differences(old: Any, new: Any, at: str = "") -> Iterator[str]:
    """Where two JSON values differ, a line each."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from differences(old.get(key), new.get(key), f"{at}.{key}" if at else str(key))
    elif old != new:
        yield f"{at}: {json.dumps(old)} there, {json.dumps(new)} here"


def read_record(path: Path) -> dict[str, Any]:
    """The content of a ``run.json``; UsageError if it is none, or of a newer format."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        version = record["format"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(f"{path} is not the record of a run, or it is damaged") from None
    if version != FORMAT:
        raise UsageError(
            f"{path} has format {version}, this version of robusteval reads {FORMAT}:"
            " read it with the version that wrote it"
        )
    for name, kind in SHAPE.items():
        if not isinstance(record.get(name), kind):
            raise UsageError(f"{path} is not the record of a run, or it is damaged")
    return dict(record)


def read_cell(folder: Path, entry: dict[str, Any]) -> Columns:
    """The columns of a cell; RunError if the file is gone or not the one that was written."""
    return read_columns(folder / "samples" / f"{entry['key']}.npz", entry["sha256"])


def read_columns(path: Path, sha256: str) -> Columns:
    """The columns in a file of this hash; RunError if it is gone or was changed."""
    try:
        content = path.read_bytes()
    except OSError:
        raise RunError(f"{path} is missing: run the evaluation again to restore it") from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise RunError(f"{path} was changed after the run: run the evaluation again to restore it")
    return unpack(content)


def as_columns(pictures: Sequence[Picture]) -> Columns:
    """Pictures of one size as arrays; the reverse is in `load_pictures`."""
    return {
        "place": np.array([picture.place for picture in pictures]),
        "row": np.array([picture.row for picture in pictures]),
        "clean": np.stack([picture.clean for picture in pictures]),
        # half precision is relative: it keeps three digits of any change
        "delta": np.stack([picture.delta for picture in pictures]).astype(np.float16),
        **{
            f"{when}:{name}": np.stack([picture.maps[name][i] for picture in pictures])
            for name in pictures[0].maps
            for i, when in enumerate(("benign", "changed"))
        },
    }


def stored_maps(columns: Columns) -> Iterator[tuple[str, Values, Values]]:
    """The maps ``(m, h', w')`` among the arrays of pictures: interpreter, before, after."""
    for name, values in columns.items():
        when, _, interpreter = name.partition(":")
        if when == "benign":
            yield interpreter, values, columns[f"changed:{interpreter}"]


def load_pictures(run: Run) -> dict[int, list[Picture]]:
    """The pictures of each cell that has some, by its position in `run.outcomes`.

    RunError if one is missing or was changed.
    """
    if run.folder is None:
        return {}
    folder = Path(run.folder)
    cells = [cell for cell in read_record(folder / "run.json")["cells"] if "attack" in cell]
    found = {}
    for position, cell in enumerate(cells):
        if cell.get("pictures"):
            c = read_columns(folder / "pictures" / f"{cell['key']}.npz", cell["pictures"])
            rows = zip(c["place"], c["row"], c["clean"], c["delta"], strict=True)
            maps = list(stored_maps(c))
            found[position] = [
                Picture(
                    str(place),
                    int(row),
                    clean,
                    delta.astype(np.float32),
                    {name: (before[i], after[i]) for name, before, after in maps},
                )
                for i, (place, row, clean, delta) in enumerate(rows)
            ]
    return found


def load_run(folder: Path | str) -> Run:
    """Read a run from its folder (or from its ``run.json``).

    UsageError if there is none; RunError if a cell is missing or was changed.
    """
    folder = Path(folder)
    if folder.name == "run.json":
        folder = folder.parent
    path = folder / "run.json"
    if not path.exists():
        raise UsageError(f"{folder} is not the folder of a run: there is no run.json in it")
    record = read_record(path)
    try:
        cells = {entry["key"]: (entry, read_cell(folder, entry)) for entry in record["cells"]}
        clean: Columns = {}
        defenses, outcomes = [], []
        for entry, columns in cells.values():
            if entry["role"] in ("clean", "quality"):
                clean |= columns
            elif entry["role"] == "defense":
                spec = Spec(**entry["defense"])
                defenses.append(Defended(spec, entry["kind"], columns, entry["facts"]))
            else:
                outcomes.append(outcome_of(entry, columns))
        return Run(
            config={**record["config"], "command": record["command"]},
            model=record["model"],
            data=record["data"],
            environment=record["environment"],
            clean=clean,
            outcomes=tuple(outcomes),
            findings=tuple(Finding(**finding) for finding in record["findings"]),
            status=record["status"],
            failures=record["failures"],
            seconds=record["seconds"],
            created=record["created"],
            folder=str(folder),
            defenses=tuple(defenses),
        )
    except (KeyError, TypeError, ValueError):
        raise UsageError(f"{path} is not the record of a run, or it is damaged") from None


def entry_of(outcome: Outcome) -> dict[str, Any]:
    """What ``run.json`` says of a cell besides its columns."""
    return {
        "role": outcome.role,
        "attack": outcome.attack._asdict(),
        "threat": outcome.threat._asdict(),
        "knowledge": outcome.knowledge,
        "resolved": outcome.resolved,
        "notes": list(outcome.notes),
        "defense": outcome.defense and outcome.defense._asdict(),
        "adaptive": outcome.adaptive,
    }


def outcome_of(entry: dict[str, Any], columns: Columns) -> Outcome:
    """The reverse of `entry_of`."""
    return Outcome(
        attack=Spec(**entry["attack"]),
        threat=Threat(**entry["threat"]),
        knowledge=entry["knowledge"],
        columns=columns,
        role=entry["role"],
        notes=tuple(entry["notes"]),
        resolved=entry["resolved"],
        defense=Spec(**entry["defense"]) if entry.get("defense") else None,
        adaptive=entry.get("adaptive", True),
    )
