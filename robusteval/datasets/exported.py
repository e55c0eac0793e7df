"""Adversarial images of a run as PNG files with a list of them, and such a folder as data.

A folder of them looks like this, and any tool that reads classes from folders reads one attack's::

    manifest.csv                      file, label and what is known of each image
    classes.json                      the names of all classes, if they have any
    <attack>-<key>/                   both again, of one attack
    <attack>-<key>/<label>-<class>/<index>.png

PNG holds 8 bits: what is written is the nearest such image to what the attack made.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from robusteval.datasets.arrays import check_names
from robusteval.datasets.checks import Span, raise_as_unreadable
from robusteval.datasets.class_names import read_class_names
from robusteval.datasets.image_files import FileSource, open_manifest
from robusteval.datasets.images import to_hwc
from robusteval.datasets.npz import open_npz
from robusteval.errors import NothingEvaluated, RunError, UsageError
from robusteval.registry import DATA_SOURCES
from robusteval.runs.folder import find_images
from robusteval.runs.formulas import defuse_formula
from robusteval.runs.reading import MANIFEST as LARGEST
from robusteval.runs.reading import open_regular, read_bytes
from robusteval.runs.types import Outcome, Run, visible
from robusteval.runs.writing import write_atomically

MANIFEST = "manifest.csv"
NAMES = "classes.json"
COLUMNS = (
    *("file", "label", "class", "attack", "defense", "prediction", "predicted_class"),
    *("target", "fooled", "index", "id", "linf", "l2"),
)
WRITTEN = re.compile(r"[A-Za-z0-9-]+/[\w-]+/[0-9]{6,}\.png")  # how files of an export are called


def is_export(path: Path) -> bool:
    """Whether a path is a folder that `export_images` wrote."""
    try:
        with open_regular(path / MANIFEST, LARGEST) as file:
            return file.readline(200).strip() == ",".join(COLUMNS).encode()
    except (OSError, UsageError):
        return False


@DATA_SOURCES.add("exported", written="EXPORTED_RUN", recognises="is_export")
def open_export(
    path: Path, channels: int, span: Span | None = None, slices: tuple[str, ...] = ()
) -> FileSource:
    """a folder that `robusteval export` wrote: the images of all its attacks, or of one."""
    source = open_manifest(path / MANIFEST, channels, span=span, slices=slices)
    # labels are numbers, so that a class without an image shifts none
    names = source.class_names or read_names(path / NAMES)
    if names is not None and len(source):
        check_names(str(path), source.labels, names)
    return replace(source, name=path.resolve().name, class_names=names)


def read_names(path: Path) -> tuple[str, ...] | None:
    """The names of all classes, as the run knew them; None where it had none."""
    return tuple(read_class_names(path)) if os.path.lexists(path) else None


def export_images(
    run: Run, out: Path, begin: Callable[[str, int], object], advance: Callable[[int], object]
) -> dict[str, int]:
    """Write the images that a run kept as PNG files, and their list last.

    What an older export wrote there is taken away first.

    Parameters
    ----------
    run : Run
        As it was read from its folder.
    out : Path
        The folder to write to.
    begin, advance : callable
        Told what is written and how many images that is; called with 1 after each.

    Returns
    -------
    dict
        Folders below `out`, and how many images each holds.

    Raises
    ------
    NothingEvaluated
        If the run kept no images.
    UsageError
        If PNG cannot hold them.
    RunError
        If one of the archives was changed, or a file cannot be written.
    """
    kept = find_images(run)
    if not kept:
        raise NothingEvaluated(
            f"{run.folder} holds no adversarial images: give the same `robusteval evaluate` command"
            " with --keep-images, which runs the attacks again and keeps them"
        )
    names, channels = run.data.get("class_names"), run.data["shape"][0]
    if channels not in (1, 3):
        raise UsageError(
            f"PNG files hold 1 or 3 channels, these images have {channels}: use"
            f" {next(iter(kept.values()))} instead, which --data reads"
        )
    remove_export(out)
    # as JSON, since a name may hold anything, and of all classes, also of those without an image
    known = None if names is None else json.dumps(names).encode()
    written = {}
    every: list[dict[str, Any]] = []
    for place, path in kept.items():
        outcome = run.outcomes[place]
        source = open_npz(path, "test", channels)
        begin(f"Writing {outcome.attack}", len(source))
        folder = out / path.stem
        rows: list[dict[str, Any]] = []
        for row, facts in enumerate(list_facts(outcome, names)):
            file = Path(name_class(facts["label"], names, run.model), f"{facts['index']:06d}.png")
            write_file(folder / file, encode_png(source.image(row)))
            rows.append({"file": file.as_posix(), **facts})
            advance(1)
        written[path.stem] = len(rows)
        if known is not None:
            write_file(folder / NAMES, known)
        write_atomically(folder / MANIFEST, write_table(rows).encode())
        every += [{**row, "file": f"{path.stem}/{row['file']}"} for row in rows]
    if known is not None:
        write_file(out / NAMES, known)
    write_atomically(out / MANIFEST, write_table(every).encode())
    return written


def remove_export(folder: Path) -> None:
    """Take away what an older export wrote to a folder, and nothing else; RunError.

    Its list goes last, so that the next call finds what a stop has left.
    """
    if not is_export(folder):
        return
    here = folder.resolve()
    names = {row["file"] or "" for row in read_table(folder / MANIFEST)}
    # the list may be somebody else's: what is no file of an export stays, as do links
    files = [here / name for name in sorted(names) if WRITTEN.fullmatch(name)]
    files = [file for file in files if file.parent.resolve() == file.parent]
    attacks = sorted({file.parent.parent for file in files})
    try:
        for file in files:
            file.unlink(missing_ok=True)
        for attack in attacks:
            if is_export(attack):
                (attack / NAMES).unlink(missing_ok=True)
                (attack / MANIFEST).unlink()
        for below in (*sorted({file.parent for file in files}), *attacks):
            with suppress(OSError):  # it is gone, or holds other files
                below.rmdir()
        (here / NAMES).unlink(missing_ok=True)
        (here / MANIFEST).unlink()
    except OSError as error:
        raise RunError(f"cannot replace {folder}: {error.strerror or error}") from None


def list_facts(outcome: Outcome, names: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    """What the list says of each image that was attacked, in their order.

    Of the file: predictions and success are those after rounding to 8 bits.
    """
    c = outcome.columns
    fooled = outcome.success("pred_8bit")
    for i in np.flatnonzero(outcome.attacked):
        label, prediction = int(c["label"][i]), int(c["pred_8bit"][i])
        yield {
            "label": label,
            "class": name_label(label, names),
            "attack": str(outcome.attack),
            "defense": "" if outcome.defense is None else str(outcome.defense),
            "prediction": prediction,
            "predicted_class": name_label(prediction, names),
            "target": int(c["target"][i]) if outcome.threat.targeted else "",
            "fooled": int(fooled[i]),
            "index": int(c["index"][i]),
            "id": f"{int(c['id'][i]):016x}",
            "linf": float(c["linf"][i]),
            "l2": float(c["l2"][i]),
        }


def name_label(label: int, names: Sequence[str] | None) -> str:
    """The name of a class; its number where it has none."""
    return names[label] if names is not None and 0 <= label < len(names) else str(label)


def name_class(label: int, names: Sequence[str] | None, model: dict[str, Any]) -> str:
    """The folder of a class: its number, so that they sort, and its name as far as paths may."""
    width = len(str(max(int(model.get("num_classes") or 1) - 1, label)))
    name = re.sub(r"[^\w-]+", "_", name_label(label, names))[:60].strip("_")
    number = f"{label:0{width}d}"
    return number if name in ("", str(label)) else f"{number}-{name}"


def encode_png(image: np.ndarray) -> bytes:
    """The PNG file of an image ``(c, h, w)`` in [0, 1], rounded to 8 bits."""
    levels = np.rint(image.astype(np.float32) * np.float32(255)).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(to_hwc(levels)).save(file, "PNG")
    return file.getvalue()


def write_file(path: Path, content: bytes) -> None:
    """Write one of many files, of which the list that is written last makes a whole; RunError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from None


def read_table(path: Path) -> list[dict[str, str | None]]:
    """Rows of a list that `is_export` knows; UsageError if it is no text in UTF-8."""
    with raise_as_unreadable(path, "export the run again"):
        text = read_bytes(path, LARGEST).decode()
        return list(csv.DictReader(io.StringIO(text, newline="")))


def write_table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as CSV (RFC 4180), of which a spreadsheet calculates nothing."""
    page = io.StringIO(newline="")
    writer = csv.DictWriter(page, COLUMNS)
    writer.writeheader()
    for row in rows:
        writer.writerow(
            {
                key: defuse_formula(visible(value)) if isinstance(value, str) else value
                for key, value in row.items()
            }
        )
    return page.getvalue()
