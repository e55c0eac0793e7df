"""Run folders that somebody changed, in all the ways that we could think of.

Each is a copy of a sound folder (`keep_sound_run`) with one thing changed. Hashes, seals and names
are made anew where that is possible (`sign_again`), as whoever changes a folder on purpose would:
what is wrong must be noticed by what it says.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from conftest import attacked_columns, clean_columns, save_cells

from robusteval.runs.folder import Store
from robusteval.runs.keys import list_keys
from robusteval.runs.seals import seal
from robusteval.runs.storage import digest, pack, unpack
from robusteval.runs.types import Columns, Defended, Finding, Outcome, Picture, Run, Spec, Threat

Json = dict[str, Any]
Spoil = Callable[[Path], object]

N = 12  # images
GONE = object()  # stands for a key that is taken out
MAPS = {
    "top": 0.2,
    "edge": 0.1,
    "interpreters": [
        {
            "spec": "cam",
            "name": "cam",
            "parameters": {},
            "stretched": True,
            "seeded": False,
            "alike": ["gradcam"],
            "layer": "features",
        }
    ],
}


class Marker:
    """An object whose unpickling makes a folder: it must never be there."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def build_sound_run() -> Run:
    """A run with a bit of everything that a record can hold."""
    rng = np.random.default_rng(0)
    right = np.arange(N) < 10
    clean = clean_columns(np.arange(N) % 10, right)
    for name in ("insertion", "chance_insertion", "deletion", "chance_deletion", "forgotten"):
        clean[f"{name}:cam"] = np.where(right, rng.uniform(0.2, 0.8, N), np.nan)
    seen = {**clean, "score": rng.uniform(0, 1, N), "flagged": np.arange(N) == 3}
    quiet = right & ~seen["flagged"]
    detector = Spec("detector", {"interpreters": "cam", "fpr": 0.05})

    def attack(broken: int, first: Any, before: Columns, **columns: Any) -> Columns:
        made = attacked_columns(before, np.arange(N) < broken)
        return {**made, "attacked": first, **columns}

    maps = {
        name: np.where(right, rng.uniform(0.1, 0.4, N), np.nan)
        for name in ("map_distance:cam", "map_iou:cam", "map_noise:cam", "edge_energy", "edge_area")
    }
    watched = {"score": seen["score"], "flagged": np.arange(N) % 3 == 0}
    linf, near = Threat("linf", 8 / 255, False), Threat("l0", None, False)
    pgd, sparse = Spec("pgd", {"eps": 8 / 255}), Spec("sigma_zero", {"steps": 30})
    resolved = {"eps": 8 / 255, "steps": 10, "stop": "8bit"}
    outcomes = (
        Outcome(pgd, linf, "white-box", attack(6, right, clean, **maps), resolved=resolved),
        Outcome(sparse, near, "white-box", attack(8, right, clean), notes=("small batches",)),
        Outcome(
            pgd,
            linf,
            "white-box",
            attack(5, quiet, seen, **watched),
            resolved=resolved,
            defense=detector,
            adaptive=False,
        ),
        Outcome(
            Spec("noise", {"tries": 3}),
            linf,
            "none",
            {name: values[:4] for name, values in attack(1, right, clean).items()},
            role="probe:noise",
        ),
    )
    return Run(
        config={
            "attacks": [str(pgd), str(sparse)],
            "resolved": [resolved, {"steps": 30}],
            "samples": N,
            "seed": 0,
            "probes": True,
            "defenses": [str(detector)],
            "shields": [{"sha256": "ab" * 32}],
            "interpreters": ["cam"],
            "maps": MAPS,
            "model": {"sha256": "0123456789abcdef" * 4},
            "data": {"name": "digits", "sha256": "fedcba9876543210" * 4},
            "versions": {"robusteval": "0.1.0", "torch": "2.13"},
            "device": "cpu",
            "command": "robusteval evaluate net.pt --data digits",
        },
        model={
            "file": "folder/net.pt",
            "sha256": "0123456789abcdef" * 4,
            "arch": "torchvision:resnet18",
            "normalisation": "given",
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
            "num_classes": 11,
        },
        data={
            "name": "digits",
            "total": 1797,
            "samples": N,
            "sha256": "fedcba9876543210" * 4,
            "shape": [3, 4, 4],
            "transform": "none",
            "range": [0.0, 1.0],
            "class_names": [f"class {i}" for i in range(11)],
        },
        environment={"robusteval": "0.1.0", "torch": "2.13", "device": "cpu", "platform": "Linux"},
        clean=clean,
        outcomes=outcomes,
        findings=(Finding("note", False, "Small.", str(pgd)),),
        status="complete",
        seconds=75.0,
        created="2026-01-02T03:04:05+00:00",
        defenses=(Defended(detector, "detector", seen, {"threshold": 0.9, "fpr": 0.05}),),
    )


def keep_sound_run(folder: Path) -> Path:
    """Write that run to a folder, with pictures of the first attack."""
    run = build_sound_run()
    rng = np.random.default_rng(1)
    picture = Picture(
        "easiest",
        0,
        rng.integers(0, 255, (4, 4, 3)).astype(np.uint8),
        rng.uniform(-0.03, 0.03, (4, 4, 3)).astype(np.float32),
        {"cam": (np.zeros((2, 2), np.float16), np.ones((2, 2), np.float16))},
    )
    with Store.open(folder, run.to_record()["config"]) as store:
        store.save_record(run.to_record(), save_cells(store, run, {0: [picture]}))
    return folder


# Changing a folder


def read_json(folder: Path) -> Json:
    """The record."""
    record: Json = json.loads((folder / "run.json").read_text())
    return record


def write_json(folder: Path, record: Json) -> None:
    """Write the record as it is."""
    (folder / "run.json").write_text(json.dumps(record))


def sign_again(folder: Path) -> None:
    """Give the cells the names that the record now stands for, seals and hashes, where it can."""
    record = read_json(folder)
    for cell in record["cells"]:
        try:
            old, new = cell["key"], min(list_keys(record["config"], cell))
            content = (folder / "samples" / f"{old}.npz").read_bytes()
            content = pack(unpack(content), new)
        except Exception:  # what is changed beyond that stays as it is
            continue
        (folder / "samples" / f"{old}.npz").unlink()
        (folder / "samples" / f"{new}.npz").write_bytes(content)
        cell["key"], cell["sha256"] = new, hashlib.sha256(content).hexdigest()
        shown = folder / "pictures" / f"{old}.npz"
        if shown.is_file() and cell.get("pictures"):
            content = pack(unpack(shown.read_bytes()), new)
            shown.unlink()
            shown.with_name(f"{new}.npz").write_bytes(content)
            cell["pictures"] = hashlib.sha256(content).hexdigest()
    write_json(folder, record)


def put(*path: Any, to: Any, signed: bool = True) -> Spoil:
    """Another value somewhere in the record, whose cells are signed again."""

    def spoil(folder: Path) -> None:
        record: Any = read_json(folder)
        at = record
        for key in path[:-1]:
            at = at[key]
        if to is GONE:
            del at[path[-1]]
        else:
            at[path[-1]] = to(at[path[-1]]) if callable(to) else to
        write_json(folder, record)
        if signed:
            sign_again(folder)

    return spoil


def replace_file(folder: Path, number: int, content: bytes, below: str = "samples") -> None:
    """Another file of a cell, with its seal and hash, unless it is no archive."""
    record = read_json(folder)
    cell = record["cells"][number]
    if content[-22:-18] == b"PK\5\6":
        archive = io.BytesIO(content)
        seal(archive, cell["key"])
        content = archive.getvalue()
    (folder / below / f"{cell['key']}.npz").write_bytes(content)
    name = "sha256" if below == "samples" else "pictures"
    cell[name] = hashlib.sha256(content).hexdigest()
    write_json(folder, record)


def read_cell_file(folder: Path, number: int, below: str = "samples") -> bytes:
    """The file of a cell."""
    key = read_json(folder)["cells"][number]["key"]
    return (folder / below / f"{key}.npz").read_bytes()


def change(number: int, make: Callable[[Columns], object], below: str = "samples") -> Spoil:
    """Other columns of a cell: changed in place, or those that `make` returns."""

    def spoil(folder: Path) -> None:
        columns = unpack(read_cell_file(folder, number, below))
        made = make(columns)
        columns = made if isinstance(made, dict) else columns
        replace_file(folder, number, pack(columns), below)

    return spoil


def set_column(name: str, values: Any) -> Callable[[Columns], object]:
    """A column with other values, or made of the old ones."""

    def change(columns: Columns) -> None:
        made: Any = values(columns[name]) if callable(values) else values
        columns[name] = made

    return change


def raw(number: int, make: Callable[[bytes], bytes], below: str = "samples") -> Spoil:
    """Other bytes of a cell's file."""
    return lambda folder: replace_file(
        folder, number, make(read_cell_file(folder, number, below)), below
    )


def write_record(make: Callable[[bytes], bytes]) -> Spoil:
    """Other bytes of the record."""

    def spoil(folder: Path) -> None:
        path = folder / "run.json"
        path.write_bytes(make(path.read_bytes()))

    return spoil


def with_member(name: str, content: bytes | Callable[[Path], bytes]) -> Spoil:
    """One more member in the file of the first attack."""

    def spoil(folder: Path) -> None:
        buffer = io.BytesIO(pack(unpack(read_cell_file(folder, 2))))
        with zipfile.ZipFile(buffer, "a") as archive:
            archive.writestr(name, content(folder) if callable(content) else content)
        replace_file(folder, 2, buffer.getvalue())

    return spoil


def pickle_array(folder: Path) -> bytes:
    """An array of objects, one of which marks when it is unpickled."""
    buffer = io.BytesIO()
    header = {"descr": "|O", "fortran_order": False, "shape": (1,)}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue() + pickle.dumps([Marker(folder.parent / "executed")])


def move_away(name: str) -> Spoil:
    """A link to what was there."""

    def spoil(folder: Path) -> None:
        elsewhere = folder.parent / "elsewhere"
        (folder / name).rename(elsewhere)
        (folder / name).symlink_to(elsewhere)

    return spoil


def make_folder_of(path: Callable[[Path], Path]) -> Spoil:
    """A folder where there was a file."""

    def spoil(folder: Path) -> None:
        path(folder).unlink()
        path(folder).mkdir()

    return spoil


def swap_cells(one: int, other: int) -> Spoil:
    """The columns of two cells exchanged, all hashes right."""

    def spoil(folder: Path) -> None:
        first, second = (unpack(read_cell_file(folder, number)) for number in (one, other))
        replace_file(folder, one, pack(second))
        replace_file(folder, other, pack(first))

    return spoil


def copy_cell(number: int, times: int) -> Spoil:
    """An entry several times."""

    def spoil(folder: Path) -> None:
        record = read_json(folder)
        record["cells"] += [record["cells"][number]] * times
        write_json(folder, record)

    return spoil


def keep_rows(rows: Any) -> Spoil:
    """Of all cells only some rows."""

    def spoil(folder: Path) -> None:
        for number in range(len(read_json(folder)["cells"])):
            columns = unpack(read_cell_file(folder, number))
            replace_file(folder, number, pack({name: v[rows] for name, v in columns.items()}))
        record = read_json(folder)
        for cell in record["cells"]:
            cell.pop("pictures", None)
        write_json(folder, record)

    return spoil


def write_sparse(path: Path, size: int) -> None:
    """A file of that many bytes, of which none is on the disk."""
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        file.truncate(size)


def put_special(name: str, make: Callable[[Path], object]) -> Spoil:
    """Something else where there was a file; ``sample`` is that of the first attack."""

    def spoil(folder: Path) -> None:
        path = first_sample(folder) if name == "sample" else folder / name
        path.unlink()
        make(path)

    return spoil


@functools.cache
def pack_bomb() -> bytes:
    """A column of 100 MB in a hundredth of that."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("l2.npy", "w") as member:
            header = {"descr": "<f8", "fortran_order": False, "shape": (12_500_000,)}
            np.lib.format.write_array_header_1_0(member, header)
            for _ in range(100):
                member.write(bytes(10**6))
    return buffer.getvalue()


def pack_many(count: int) -> bytes:
    """An archive of very many members."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for number in range(count):
            archive.writestr(f"{number}.npy", b"")
    return buffer.getvalue()


def first_sample(folder: Path) -> Path:
    """The file of the first attack."""
    return folder / "samples" / f"{read_json(folder)['cells'][2]['key']}.npz"


def cut(part: float) -> Callable[[bytes], bytes]:
    """The beginning of a file."""
    return lambda content: content[: int(part * len(content))]


def nest(depth: int) -> Any:
    """Tables within tables."""
    value: Any = 1
    for _ in range(depth):
        value = {"a": value}
    return value


EVIL = "\x1b[31m[bold]<script>x</script>\n::error::y\u202e| `a` $\\frac{1}$ =1+1 \ud800"
# cells: 0 clean, 1 the defense, 2 and 3 attacks, 4 oblivious, 5 a probe
REFUSED: Mapping[str, Spoil] = {
    # the record as a file
    "empty record": write_record(lambda content: b""),
    "half a record": write_record(cut(0.5)),
    "record in UTF-16": write_record(lambda content: content.decode().encode("utf-16")),
    "record of zeros": write_record(lambda content: bytes(100)),
    "record that is a list": write_record(lambda content: b"[" + content + b"]"),
    "record that is a text": write_record(lambda content: b'"run"'),
    "record without end": write_record(lambda content: b'{"format":' + b"[" * 100_000),
    "record with a number without end": write_record(
        lambda content: content.replace(b'"seconds": 75.0', b'"seconds": 1' + b"0" * 5000)
    ),
    "record with NaN": write_record(lambda content: content.replace(b"75.0", b"NaN")),
    "record that is a pickle": write_record(lambda content: pickle.dumps({"format": 1})),
    "record that is a folder": make_folder_of(lambda folder: folder / "run.json"),
    "record that is a link": move_away("run.json"),
    "record of a later format": put("format", to=2),
    "record of a format that is a text": put("format", to="1"),
    "record of a format that is a list": put("format", to=[1]),
    "record without a status": put("status", to=GONE),
    # types of what it says
    "status that is a number": put("status", to=1),
    "cells that are a table": put("cells", to={}),
    "a cell that is a text": put("cells", 2, to="pgd"),
    "findings that are texts": put("findings", to=["x"]),
    "finding with more": put("findings", 0, "more", to=1),
    "finding about a list": put("findings", 0, "cell", to=[1]),
    "failures that are a list": put("failures", to=["x"]),
    "failure with a number": put("failures", to={"x": 3}),
    "seconds that are negative": put("seconds", to=-1),
    "seconds that are a text": put("seconds", to="75"),
    "seconds beyond time": put("seconds", to=1e300),
    "created that is a number": put("created", to=2026),
    "model that is a text": put("model", to="net"),
    "arch that is a list": put("model", "arch", to=["a"]),
    "file that is a number": put("model", "file", to=7),
    "hash that is a table": put("model", "sha256", to={}),
    "mean that is a number": put("model", "mean", to=0.5),
    "deviations that are texts": put("model", "std", to=["a"]),
    "shape of texts": put("data", "shape", to=["3", "4"]),
    "shape that is a number": put("data", "shape", to=3),
    "class names that are numbers": put("data", "class_names", to=[1, 2]),
    "class names that are a table": put("data", "class_names", to={"0": "a"}),
    "total that is a text": put("data", "total", to="many"),
    "range of one number": put("data", "range", to=[0.5]),
    "data name that is a list": put("data", "name", to=["digits"]),
    "environment of numbers": put("environment", "torch", to=2.1),
    "attacks that are a text": put("config", "attacks", to="pgd"),
    "attacks that are numbers": put("config", "attacks", to=[1]),
    "seed that is a text": put("config", "seed", to="0"),
    "seed that is negative": put("config", "seed", to=-1),
    "command that is a list": put("command", to=["a"]),
    "maps that are a list": put("config", "maps", to=[1]),
    "maps without interpreters": put("config", "maps", "interpreters", to=GONE),
    "maps of no interpreter": put("config", "maps", "interpreters", to=[]),
    "interpreter without a name": put("config", "maps", "interpreters", 0, "name", to=GONE),
    "interpreter twice": put("config", "maps", "interpreters", to=lambda known: known * 2),
    "settings nested deeply": put("config", "resolved", to=[nest(200)]),
    # cells
    "key of another folder": put("cells", 2, "key", to="../" * 20 + "etc/passwd"),
    "key with a zero byte": put("cells", 2, "key", to="\0" * 64),
    "key that is short": put("cells", 2, "key", to="ab"),
    "key in capitals": put("cells", 2, "key", to=lambda key: "A" * 64),
    "key of other digits": put("cells", 2, "key", to="٣" * 64),
    "cell of another seed": put("cells", 2, "key", to="0" * 64, signed=False),
    "hash that is none": put("cells", 2, "sha256", to="0", signed=False),
    "hash of another file": put("cells", 2, "pictures", to="0" * 64, signed=False),
    "hash of pictures that are not there": put("cells", 3, "pictures", to="0" * 64, signed=False),
    "role that is a list": put("cells", 2, "role", to=["attack"]),
    "role that is gone": put("cells", 2, "role", to=GONE),
    "attack that is a text": put("cells", 2, "attack", to="pgd"),
    "attack with a parameter that is a list": put(
        "cells", 2, "attack", "parameters", to={"eps": [1]}
    ),
    "attack whose name is a number": put("cells", 2, "attack", "name", to=1),
    "threat that lacks the goal": put("cells", 2, "threat", "targeted", to=GONE),
    "threat without a norm": put("cells", 2, "threat", "norm", to=None),
    "threat of a list": put("cells", 2, "threat", "norm", to=["linf"]),
    "radius that is true": put("cells", 2, "threat", "eps", to=True),
    "radius that is negative": put("cells", 2, "threat", "eps", to=-0.1),
    "radius that is smaller": put("cells", 2, "threat", "eps", to=1 / 255),
    "notes that are numbers": put("cells", 3, "notes", to=[1]),
    "notes that are a number": put("cells", 3, "notes", to=1),
    "defense that is not there": put("cells", 4, "defense", "name", to="jpeg"),
    "defense of no kind": put("cells", 1, "kind", to="wall"),
    "defense with a threshold that is a text": put("cells", 1, "facts", "threshold", to="high"),
    "defense with a rate above one": put("cells", 1, "facts", "fpr", to=5),
    "defense that is gone": put("cells", to=lambda cells: [*cells[:1], *cells[2:]]),
    "clean cell that is gone": put("cells", to=lambda cells: cells[1:]),
    "cells exchanged": swap_cells(2, 4),
    "the defense's columns for the model's": swap_cells(0, 1),
    "attack under the role of clean images": put("cells", 2, "role", to="clean"),
    # columns
    "columns cut": change(2, lambda c: {name: values[:5] for name, values in c.items()}),
    "columns turned round": change(2, lambda c: {name: v[::-1] for name, v in c.items()}),
    "columns of two dimensions": change(2, lambda c: {n: v[:, None] for n, v in c.items()}),
    "columns without a dimension": change(2, lambda c: {n: v[0] for n, v in c.items()}),
    "no columns": change(2, lambda c: {"x": np.zeros(0)}),
    "one column longer": change(2, set_column("l2", np.zeros(99))),
    "a column gone": change(2, lambda c: c.pop("seconds")),
    "predictions that are texts": change(2, set_column("pred_adv", lambda v: v.astype("U9"))),
    "predictions that are complex": change(2, set_column("pred_adv", lambda v: v + 0j)),
    "predictions below any": change(2, set_column("pred_8bit", lambda v: v - 99)),
    "flags that are numbers": change(2, set_column("attacked", lambda v: v.astype(int))),
    "dates for distances": change(2, set_column("l2", np.zeros(N, "datetime64[s]"))),
    "records for distances": change(2, set_column("l2", np.zeros(N, [("a", "f4")]))),
    "distances without end": change(2, set_column("linf", np.full(N, np.inf))),
    "distances that are none": change(2, set_column("l2", np.full(N, np.nan))),
    "distances below zero": change(2, set_column("l1", np.full(N, -1.0))),
    "distances above the radius": change(2, set_column("linf", np.full(N, 0.9))),
    "passes below zero": change(2, set_column("forwards", np.full(N, -5.0))),
    "confidence of two": change(2, set_column("confidence_adv", np.full(N, 2.0))),
    "images all attacked": change(2, set_column("attacked", np.ones(N, bool))),
    "images of other classes": change(2, set_column("label", lambda v: v + 1)),
    "images of other ids": change(3, set_column("id", lambda v: v + np.uint64(1))),
    "ids that are signed": change(0, set_column("id", lambda v: v.astype(np.int64))),
    "positions twice": change(0, set_column("index", np.zeros(N, np.int64))),
    "no alarms": change(4, lambda c: c.pop("flagged")),
    "scores that are texts": change(4, set_column("score", np.full(N, "high"))),
    "maps in half": change(2, lambda c: c.pop("map_iou:cam")),
    "worth of maps in half": change(0, lambda c: c.pop("chance_deletion:cam")),
    "a probe of other images": change(5, set_column("id", lambda v: v + np.uint64(5))),
    # files of cells
    "sample cut": raw(2, cut(0.7)),
    "sample that is empty": raw(2, lambda content: b""),
    "sample that is text": raw(2, lambda content: b"key,value\n1,2\n"),
    "sample that is a pickle": raw(2, lambda content: pickle.dumps([1])),
    "sample that is one array": raw(2, lambda content: b"\x93NUMPY\x01\x00"),
    "sample with an object": with_member("extra.npy", pickle_array),
    "sample with a member that is no array": with_member("extra.npy", b"no array"),
    "sample with a member of another name": with_member("../../up.npy", b"x"),
    "sample that is a folder": make_folder_of(first_sample),
    "sample that is gone": lambda folder: first_sample(folder).unlink(),
    "sample that is a pipe": put_special("sample", os.mkfifo),
    "sample without end": put_special("sample", lambda path: path.symlink_to("/dev/zero")),
    "sample of holes": put_special("sample", lambda path: write_sparse(path, 10**11)),
    "sample that fills the memory": lambda folder: replace_file(folder, 2, pack_bomb()),
    "sample of many columns": lambda folder: replace_file(folder, 2, pack_many(30_000)),
    "pictures that fill the memory": lambda folder: replace_file(
        folder, 2, pack_bomb(), "pictures"
    ),
    "record that is a pipe": put_special("run.json", os.mkfifo),
    "record of holes": put_special("run.json", lambda path: write_sparse(path, 10**11)),
    "record of blanks": write_record(lambda content: b" " * (40 * 10**6)),
    "samples that are gone": lambda folder: shutil.rmtree(folder / "samples"),
    "samples that are elsewhere": move_away("samples"),
    "pictures that are elsewhere": move_away("pictures"),
    "pictures that are gone": lambda folder: shutil.rmtree(folder / "pictures"),
    "pictures with an object": raw(2, lambda content: pack({"place": np.array(["x"])}), "pictures"),
    "pictures of floats": change(
        2, set_column("clean", lambda v: v.astype(np.float32)), "pictures"
    ),
    "pictures of five channels": change(
        2,
        lambda c: {**c, **{n: np.repeat(c[n][..., :1], 5, 3) for n in ("clean", "delta")}},
        "pictures",
    ),
    "pictures of rows that are not there": change(2, set_column("row", np.array([99])), "pictures"),
    "pictures of rows below zero": change(2, set_column("row", np.array([-1])), "pictures"),
    "pictures of maps of one side": change(2, lambda c: c.pop("changed:cam"), "pictures"),
    "pictures of maps of nobody": change(
        2, lambda c: {n.replace("cam", "evil"): v for n, v in c.items()}, "pictures"
    ),
    "pictures of changes that are none": change(
        2, set_column("delta", lambda v: v * np.float16(np.nan)), "pictures"
    ),
}
# what is odd and still a run: everything is laid out, and nothing breaks
READ: Mapping[str, Spoil] = {
    "more than we know of": put("more", to={"a": [1]}),
    "entry of a cell with more": put("cells", 2, "more", to=[1]),
    "a cell twice": copy_cell(2, 1),
    "a cell a thousand times": copy_cell(3, 1000),
    "status of another word": put("status", to=EVIL),
    "status that is empty": put("status", to=""),
    "created at no time": put("created", to=EVIL),
    "no class names": put("data", "class_names", to=None),
    "few class names": put("data", "class_names", to=["a"]),
    "class names that are hostile": put("data", "class_names", to=[EVIL] * 11),
    "model that says nothing": put("model", to={}),
    "data that say nothing": put("data", to={}),
    "environment that says nothing": put("environment", to={}),
    "names that are hostile": put("model", "file", to=EVIL),
    "arch that is long": put("model", "arch", to="a" * 20_000),
    "finding that is hostile": put("findings", 0, "message", to=EVIL),
    "finding about nothing": put("findings", 0, "cell", to="no attack"),
    "hundreds of findings": put("findings", to=lambda found: found * 300),
    "failure that is hostile": put("failures", to={EVIL: EVIL}),
    "attack that is hostile": put("cells", 3, "attack", "name", to=EVIL),
    "attack that nobody knows": put("cells", 3, "attack", "name", to="nobody"),
    "attack without a name": put("cells", 3, "attack", "name", to=""),
    "defense that is hostile": put("config", "attacks", to=[EVIL]),
    "parameters that are large": put("cells", 2, "attack", "parameters", to={"eps": 10**400}),
    "resolved of lists": put("cells", 2, "resolved", to={"a": [[1], {"b": [2]}]}),
    "knowledge of nothing": put("cells", 2, "knowledge", to=""),
    "norm that nobody knows": put("cells", 3, "threat", "norm", to="l7"),
    "radius of nothing": put("cells", 3, "threat", "eps", to=10**6),
    "goal that is another": put("cells", 2, "threat", "targeted", to=True),
    "seed that is large": put("config", "seed", to=2**62),
    "attacks that were not asked for": put("config", "attacks", to=[]),
    "attacks that are missing": put("config", "attacks", to=["fgsm", "pgd:eps=8/255"]),
    "no settings": put("config", to=lambda config: {"attacks": config["attacks"]}),
    "no attacks": put("cells", to=lambda cells: cells[:2]),
    "no cells": put("cells", to=[]),
    "one image": keep_rows(slice(1)),
    "no image": keep_rows(slice(0)),
    "columns in another order of bytes": change(2, set_column("l2", lambda v: v.astype(">f8"))),
    "columns of small numbers": change(2, set_column("pred_adv", lambda v: v.astype(np.int8))),
    "columns of half precision": change(2, set_column("margin_adv", lambda v: v.astype("f2"))),
    "predictions beyond all classes": change(2, set_column("pred_adv", lambda v: v + 10**6)),
    "margins that are none": change(2, set_column("margin_adv", np.full(N, np.nan))),
    "margins without end": change(2, set_column("margin_adv", np.full(N, -np.inf))),
    "scores that are none": change(4, set_column("score", np.full(N, np.nan))),
    "likeness that is none": change(2, set_column("ssim", np.full(N, np.nan))),
    "columns that nobody knows": change(2, lambda c: c.update({EVIL[:5] + "x": c["l2"]})),
    "worth of maps that nobody measured": change(
        0, lambda c: c.update({n.replace("cam", "other"): v for n, v in dict(c).items()})
    ),
    "pictures of one pixel": change(
        2, lambda c: {**c, **{n: c[n][:, :1, :1] for n in ("clean", "delta")}}, "pictures"
    ),
    "pictures in grey": change(
        2, lambda c: {**c, **{n: c[n][..., :1] for n in ("clean", "delta")}}, "pictures"
    ),
    "pictures in a place of another word": change(
        2, set_column("place", np.array([EVIL[:40]])), "pictures"
    ),
    "pictures of changes that are large": change(
        2, set_column("delta", lambda v: v * np.float16(1000)), "pictures"
    ),
    "record with a mark in front": write_record(lambda content: content + b"\n" * 1000),
}


# Baselines, by what is changed in the record of a sound one; signed again unless said otherwise


def set_entry(*path: Any, to: Any, signed: bool = True) -> Callable[[str], str]:
    """The text of a baseline with another value somewhere."""

    def make(text: str) -> str:
        record: Any = json.loads(text)
        at = record
        for key in path[:-1]:
            at = at[key]
        if to is GONE:
            del at[path[-1]]
        else:
            at[path[-1]] = to(at[path[-1]]) if callable(to) else to
        if signed and isinstance(record, dict):
            record.pop("digest", None)
            record["digest"] = digest(record)
        return json.dumps(record)

    return make


def repeat(text: str, times: int) -> Callable[[str], str]:
    """A text many times, whatever the baseline is."""
    return lambda baseline: text * times


BASELINES: Mapping[str, Callable[[str], str]] = {
    "empty": repeat("", 1),
    "half": lambda text: text[: len(text) // 2],
    "a list": lambda text: f"[{text}]",
    "nested without end": repeat("[", 100_000),
    "another kind": set_entry("kind", to="other"),
    "a kind that is a list": set_entry("kind", to=[]),
    "a later version": set_entry("version", to=99),
    "a version that is a text": set_entry("version", to="1"),
    "a version that is true": set_entry("version", to=True),
    "edited by hand": set_entry("seed", to=9, signed=False),
    "a digest that is a list": set_entry("digest", to=[], signed=False),
    "no digest": set_entry("digest", to=GONE, signed=False),
    "ids that are short": set_entry("ids", to="AAAA"),
    "ids that are no base 64": set_entry("ids", to="!" * 32),
    "no images": set_entry("ids", to=""),
    "images that are a text": set_entry("images", to="12"),
    "images that are many": set_entry("images", to=10**12),
    "bits of other images": set_entry("clean", to="AAAAAAAAAAAA"),
    "bits that are a number": set_entry("clean", to=3),
    "cells that are a table": set_entry("cells", to={}),
    "a cell that is a list": set_entry("cells", 0, to=[]),
    "a cell twice": set_entry("cells", to=lambda cells: cells * 2),
    "an attack without a name": set_entry("cells", 0, "attack", to=""),
    "an attack that is a number": set_entry("cells", 0, "attack", to=5),
    "a radius that is a text": set_entry("cells", 0, "threat", "eps", to="8/255"),
    "a radius that is negative": set_entry("cells", 0, "threat", "eps", to=-1),
    "a norm that is a list": set_entry("cells", 0, "threat", "norm", to=[]),
    "a defense that is not there": set_entry("cells", 0, "defense", to="jpeg"),
    "a rate that is above one": set_entry("defenses", 0, "fpr", to=2),
    "more than there is": set_entry("more", to=1),
    "versions of numbers": set_entry("versions", "torch", to=2),
    "a seed that is a list": set_entry("seed", to=[1]),
    "a number that is none": lambda text: text.replace('"seed": 0', '"seed": NaN'),
    "settings nested deeply": lambda text: text.replace(
        '"resolved": {', '"resolved": {"a": ' + "[" * 5000 + "]" * 5000 + ","
    ),
}
ENCODED: Sequence[bytes] = (
    b"\xff\xfe\x00",
    b"\x00" * 64,
    pickle.dumps({"kind": 1}),
    b"\xef\xbb\xbf{}",
)
