"""An evaluation that goes on in a folder that somebody changed ends as one in an empty folder."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hostile_runs import (
    change,
    cut,
    keep_rows,
    pickle_array,
    put,
    raw,
    read_json,
    set_column,
    swap_cells,
    write_json,
)

from robusteval.datasets.sources import open_data
from robusteval.errors import RunError, UsageError
from robusteval.evaluation.evaluate import evaluate
from robusteval.models.classifier import Classifier
from robusteval.progress import Silent
from robusteval.runs.folder import load_pictures, load_run
from robusteval.runs.seals import seal
from robusteval.runs.storage import pack, unpack
from robusteval.runs.types import Columns, Run

Spoil = Callable[[Path], object]


class Told(Silent):
    """Progress that remembers what it was told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def run(bands: Classifier, npz: Path, out: Path, told: Told | None = None) -> Run:
    """Two cells: eight clean images, and one attack on them."""
    data = open_data(str(npz))
    attacks = ["fgsm:eps=24/255"]
    return evaluate(bands, data, attacks, samples=8, out=out, probes=False, progress=told)


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, trained_bands: object, npz: Path
) -> dict[str, Path]:
    """Where the folder of a finished run will be kept, once there is a classifier."""
    return {"folder": tmp_path_factory.mktemp("whole") / "run"}


def locate_parts(folder: Path) -> tuple[str, Path]:
    """Key and parts of the attack, whose cell goes from the record."""
    record = read_json(folder)
    cell = record["cells"].pop(1)
    write_json(folder, {**record, "status": "incomplete"})
    (folder / "samples" / f"{cell['key']}.npz").unlink()
    parts = folder / "samples" / f"{cell['key']}.parts"
    parts.mkdir()
    return cell["key"], parts


def leave_part(make: Callable[[Columns], Columns]) -> Spoil:
    """Instead of the attack's cell a part, made of its columns."""

    def spoil(folder: Path) -> None:
        key = read_json(folder)["cells"][1]["key"]
        columns = unpack((folder / "samples" / f"{key}.npz").read_bytes())
        key, parts = locate_parts(folder)
        made = make({**columns, "row": np.arange(len(columns["id"]))})
        (parts / "0123456789abcdef.npz").write_bytes(pack(made, key))
        clean = np.zeros((1, 12, 12, 3), np.uint8)
        known: Columns = {
            "row": np.zeros(1, int),
            "id": np.zeros(1, np.uint64),
            "hard": np.zeros(1),
            "clean": clean,
            "delta": clean.astype(np.float16),
        }
        (parts / "candidates").write_bytes(pack(known, key))

    return spoil


def leave_candidates(make: Callable[[Path], Columns | bytes]) -> Spoil:
    """A part that is right and candidates that are not."""

    def spoil(folder: Path) -> None:
        leave_part(lambda columns: columns)(folder)
        (path,) = (folder / "samples").glob("*.parts/candidates")
        made = make(folder)
        key = path.parent.stem
        path.write_bytes(made if isinstance(made, bytes) else pack(made, key))

    return spoil


def pack_object(folder: Path, key: str | None = None) -> bytes:
    """An archive with an object that marks when it is unpickled, sealed under a key if any."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("row.npy", pickle_array(folder))
    if key is not None:
        seal(buffer, key)
    return buffer.getvalue()


def leave_object(folder: Path) -> None:
    """A part with an object, and no candidates."""
    key, parts = locate_parts(folder)
    (parts / "0123456789abcdef.npz").write_bytes(pack_object(folder, key))


SPOILED: dict[str, Spoil] = {
    "nothing": lambda folder: None,
    "a part of other columns": leave_part(lambda c: {"row": c["row"], "x": c["l2"]}),
    "a part of no columns": leave_part(lambda c: {"row": c["row"]}),
    "a part of rows that are not there": leave_part(lambda c: {**c, "row": c["row"] + 10**6}),
    "a part of rows below zero": leave_part(lambda c: {**c, "row": c["row"] - 100}),
    "a part of texts": leave_part(lambda c: {**c, "pred_adv": np.full(len(c["id"]), "x")}),
    "a part of distances that are none": leave_part(lambda c: {**c, "linf": c["linf"] * np.nan}),
    "a part far outside the ball": leave_part(lambda c: {**c, "linf": c["linf"] + 1}),
    "a part in half": leave_part(lambda c: {n: v[:3] for n, v in c.items() if n != "l2"}),
    "a part with an object": leave_object,
    "candidates with an object": leave_candidates(pack_object),
    "candidates that are torn": leave_candidates(lambda folder: b"PK"),
    "candidates of no images": leave_candidates(
        lambda folder: {n: np.zeros(3) for n in ("row", "id", "hard", "clean", "delta")}
    ),
    "clean images cut": keep_rows(slice(4)),
    "clean images turned round": keep_rows(slice(None, None, -1)),
    "clean images of other positions": change(0, set_column("index", lambda v: v + 1)),
    "an attack that is torn": raw(1, cut(0.5)),
    "an attack that is another cell": swap_cells(0, 1),
    "an attack outside its ball": change(1, set_column("linf", lambda v: v + 1)),
    "an attack on another model": change(1, set_column("pred_clean", lambda v: v + 1)),
    "pictures of rows that are not there": change(
        1, set_column("row", lambda v: v + 99), "pictures"
    ),
    "pictures that are gone": lambda folder: shutil.rmtree(folder / "pictures"),
    "samples that are gone": lambda folder: shutil.rmtree(folder / "samples"),
    "a cell of another seed": put("cells", 1, "key", to="0" * 64, signed=False),
    "a cell of another role": put("cells", 1, "role", to="probe:noise", signed=False),
    "a cell with a hash of another file": put("cells", 1, "sha256", to="0" * 64, signed=False),
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED.keys())
def test_a_run_in_a_changed_folder_ends_as_in_an_empty_one(
    whole: dict[str, Path], bands: Classifier, npz: Path, tmp_path: Path, spoil: Spoil
) -> None:
    if not whole["folder"].exists():
        run(bands, npz, whole["folder"])
    folder, told = tmp_path / "run", Told()
    shutil.copytree(whole["folder"], folder)
    spoil(folder)

    run(bands, npz, folder, told)

    before, after = load_run(whole["folder"]), load_run(folder)
    assert after.status == "complete"
    for mine, theirs in zip(
        (before.clean, *(o.columns for o in before.outcomes)),
        (after.clean, *(o.columns for o in after.outcomes)),
        strict=True,
    ):
        for name in mine.keys() - {"seconds"}:
            np.testing.assert_array_equal(mine[name], theirs[name])
    for one, other in zip(load_pictures(before)[0], load_pictures(after)[0], strict=True):
        assert (one.place, one.row) == (other.place, other.row)
        np.testing.assert_array_equal(one.clean, other.clean)
    assert not list((folder / "samples").glob("*.parts"))
    assert not (tmp_path / "executed").exists()
    lost = ("nothing", "samples that are gone", "a part with an object")  # nobody can tell why
    assert told.said or spoil in [SPOILED[name] for name in lost]


@pytest.mark.parametrize(
    "spoil",
    [
        put("config", to={}, signed=False),
        put("config", "seed", to=5, signed=False),
        put("cells", to={}, signed=False),
        put("format", to=7, signed=False),
        lambda folder: (folder / "run.json").write_text("{"),
        lambda folder: (folder / "run.json").write_text(json.dumps([1])),
        lambda folder: (folder / "run.json").unlink(),
    ],
)
def test_what_is_no_run_of_these_settings_is_refused_and_left(
    whole: dict[str, Path], bands: Classifier, npz: Path, tmp_path: Path, spoil: Spoil
) -> None:
    if not whole["folder"].exists():
        run(bands, npz, whole["folder"])
    folder = tmp_path / "run"
    shutil.copytree(whole["folder"], folder)
    spoil(folder)
    before = sorted(path.name for path in folder.rglob("*"))

    with pytest.raises((UsageError, RunError)):
        run(bands, npz, folder)

    assert sorted(path.name for path in folder.rglob("*") if path.name != ".lock") == before
