"""A run folder that somebody changed, hashes included, is refused in one sentence."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import clean_columns

from robusteval.cli import cli
from robusteval.errors import RobustevalError, RunError, UsageError
from robusteval.runs.folder import Store, load_pictures, load_run, read_record
from robusteval.runs.storage import pack, unpack
from robusteval.runs.types import Columns, Outcome, Run, Spec, Threat
from robusteval.runs.validation import check_outcome

Change = Callable[[Columns], Any]


@pytest.fixture
def folder(
    make_outcome: Callable[..., Outcome],
    make_run: Callable[..., Run],
    keep_run: Callable[[Run, Path], Path],
    tmp_path: Path,
) -> Path:
    """A run of two attacks on forty images."""
    right, broken = np.arange(40) < 30, np.arange(40) < 20
    outcomes = (
        make_outcome(broken, right=right),
        make_outcome(broken, right=right, spec=Spec("square", {"eps": 8 / 255})),
    )
    return keep_run(make_run(*outcomes), tmp_path / "run")


def change_columns(folder: Path, name: str, change: Change) -> None:
    """Change the columns of a cell, ``clean`` or ``cell0``, and its hash in the record."""
    record = json.loads((folder / "run.json").read_text())
    cell = record["cells"][0 if name == "clean" else 1]
    path = folder / "samples" / f"{cell['key']}.npz"
    columns = unpack(path.read_bytes())
    change(columns)
    path.write_bytes(pack(columns, cell["key"]))
    cell["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "run.json").write_text(json.dumps(record))


def find_cell(folder: Path) -> Path:
    """The file of the first attack."""
    record = json.loads((folder / "run.json").read_text())
    return folder / "samples" / f"{record['cells'][1]['key']}.npz"


def put(name: str, value: Any, rows: Any = slice(None)) -> Change:
    """Other values in some rows of a column."""

    def change(columns: Columns) -> None:
        columns[name][rows] = value

    return change


def cast(name: str, kind: Any) -> Change:
    """A column of another type."""
    return lambda columns: columns.update({name: columns[name].astype(kind)})


def each(make: Callable[[Any], Any]) -> Change:
    """All columns changed alike."""
    return lambda columns: columns.update({name: make(v) for name, v in columns.items()})


def test_a_run_as_it_was_written_is_read(folder: Path) -> None:
    assert len(load_run(folder).attacks) == 2


@pytest.mark.parametrize(
    ("key", "change", "words"),
    [
        ("cell0", each(lambda v: v[:20]), "not about the images of the run"),
        ("cell0", each(lambda v: v[::-1]), "not about the images of the run"),
        ("cell0", put("id", 7), "not about the images of the run: id differs"),
        ("cell0", put("label", 3), "not about the images of the run: label differs"),
        ("cell0", lambda c: c.update(l2=c["l2"][:3]), "columns of several lengths"),
        ("cell0", each(lambda v: v[:, None]), "columns of several lengths"),
        ("cell0", lambda c: c.pop("pred_png"), "lack the column pred_png"),
        ("cell0", lambda c: c.pop("attacked"), "lack the column attacked"),
        ("cell0", lambda c: c.update({"passes:apgd": c["forwards"]}), "lack the column made:apgd"),
        ("cell0", cast("pred_adv", str), "column pred_adv of type <U"),
        ("cell0", cast("pred_adv", float), "column pred_adv of type float64"),
        ("cell0", cast("attacked", int), "column attacked of type int64"),
        ("cell0", cast("linf", complex), "column linf of type complex128"),
        ("cell0", put("pred_adv", -3), "column pred_adv with values below -2"),
        ("cell0", put("forwards", -1), "column forwards with values below 0"),
        ("cell0", put("confidence_adv", 1.5), "column confidence_adv with values above 1"),
        ("cell0", put("linf", 0.5, slice(1)), "outside the ball of its threat"),
        ("cell0", put("linf", np.nan, slice(1)), "column linf with values that are no numbers"),
        ("cell0", put("l0", -1, slice(1)), "column l0 with values below 0"),
        ("cell0", put("ssim", 1.5, slice(1)), "column ssim with values above 1"),
        ("cell0", put("attacked", False, slice(3)), "of another model: attacked differs"),
        ("cell0", put("pred_clean", 3, slice(3)), "of another model: pred_clean differs"),
        ("clean", lambda c: c.pop("margin_clean"), "lack the column margin_clean"),
        ("clean", cast("id", int), "column id of type int64"),
        ("clean", put("index", 0), "position twice"),
        ("clean", put("index", -1), "column index with values below 0"),
        ("clean", lambda c: c.pop("label"), "lack the column label"),
        ("clean", each(lambda v: v[::-1]), "not about the images of the run"),
    ],
)
def test_columns_that_cannot_be_are_refused(
    folder: Path, key: str, change: Change, words: str
) -> None:
    change_columns(folder, key, change)

    with pytest.raises(UsageError, match=words):
        load_run(folder)


RECORDS = {
    "key of another folder": lambda r: r["cells"][1].update(key="../../other"),
    "key with a break": lambda r: r["cells"][1].update(key="cell0\n"),
    "key that is none": lambda r: r["cells"][1].update(key=3),
    "no key": lambda r: r["cells"][1].pop("key"),
    "hash that is none": lambda r: r["cells"][1].update(sha256="abc"),
    "hash of pictures": lambda r: r["cells"][1].update(pictures=True),
    "no hash": lambda r: r["cells"][1].pop("sha256"),
    "no role": lambda r: r["cells"][1].pop("role"),
    "threat": lambda r: r["cells"][1].update(threat={"norm": 3, "eps": 1, "targeted": False}),
    "radius": lambda r: r["cells"][1]["threat"].update(eps="8/255"),
    "negative radius": lambda r: r["cells"][1]["threat"].update(eps=-1),
    "goal": lambda r: r["cells"][1]["threat"].update(targeted="no"),
    "name": lambda r: r["cells"][1]["attack"].update(name=3),
    "parameters": lambda r: r["cells"][1]["attack"].update(parameters=[1]),
    "notes": lambda r: r["cells"][1].update(notes=[3]),
    "resolved": lambda r: r["cells"][1].update(resolved=[3]),
    "adaptive": lambda r: r["cells"][1].update(adaptive="yes"),
    "defense that is not there": lambda r: r["cells"][1].update(
        defense={"name": "jpeg", "parameters": {}}
    ),
    "defense": lambda r: r["cells"][1].update(defense={"name": 3, "parameters": {}}),
    "defense that is a text": lambda r: r["cells"][1].update(defense="jpeg"),
    "knowledge": lambda r: r["cells"][1].update(knowledge=3),
    "attacks": lambda r: r["config"].update(attacks=3),
    "cells": lambda r: r["config"].update(cells={"a": 1}),
    "defenses": lambda r: r["config"].update(defenses=[3]),
    "failures": lambda r: r.update(failures={"a": 3}),
    "seconds": lambda r: r.update(seconds=-1),
    "seconds without end": lambda r: r.update(seconds=float("inf")),
    "finding": lambda r: r.update(
        findings=[{"code": 3, "grave": True, "message": "", "cell": None}]
    ),
    "finding's weight": lambda r: r.update(
        findings=[{"code": "a", "grave": "no", "message": "", "cell": None}]
    ),
}


@pytest.mark.parametrize("change", RECORDS.values(), ids=RECORDS.keys())
def test_records_that_cannot_be_are_refused(folder: Path, change: Callable[[Any], Any]) -> None:
    record = json.loads((folder / "run.json").read_text())
    change(record)
    (folder / "run.json").write_text(json.dumps(record))

    with pytest.raises(RobustevalError, match="damaged"):
        load_run(folder)
    result = CliRunner().invoke(cli, ["report", str(folder)])
    assert result.exit_code == 2
    assert "internal error" not in result.stderr
    assert len(result.stderr.splitlines()) == 1


def read_cells(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    record = json.loads((folder / "run.json").read_text())
    return record, record["cells"]


@pytest.fixture
def other(folder: Path, keep_run: Callable[[Run, Path], Path]) -> Path:
    """The same run with another seed, and another attack broken by nothing."""
    run = load_run(folder)
    return keep_run(replace(run, config={**run.config, "seed": 5}), folder.parent / "other")


def test_a_cell_of_another_run_is_refused_and_left_out(folder: Path, other: Path) -> None:
    """Entry and file, as they are: only the name tells."""
    (record, cells), (_, theirs) = read_cells(folder), read_cells(other)
    cells[1] = theirs[1]
    (folder / "run.json").write_text(json.dumps(record))
    name = f"{theirs[1]['key']}.npz"
    (folder / "samples" / name).write_bytes((other / "samples" / name).read_bytes())
    said: list[str] = []

    with pytest.raises(UsageError, match="is of another run"):
        load_run(folder)
    with Store.open(folder, record["config"], say=said.append) as store:
        assert store.find_cell(theirs[1]["key"]) is None
        assert store.find_cell(cells[2]["key"]) is not None
    assert ["is of another run" in text for text in said] == [True]


def test_a_cell_of_another_run_under_a_name_of_this_is_refused_and_computed_again(
    folder: Path, other: Path
) -> None:
    """With the hash of the file in the record: only the seal tells."""
    (record, cells), (_, theirs) = read_cells(folder), read_cells(other)
    content = (other / "samples" / f"{theirs[1]['key']}.npz").read_bytes()
    find_cell(folder).write_bytes(content)
    cells[1]["sha256"] = hashlib.sha256(content).hexdigest()
    (folder / "run.json").write_text(json.dumps(record))
    said: list[str] = []

    with pytest.raises(RunError, match="is of another cell"):
        load_run(folder)
    with Store.open(folder, record["config"], say=said.append) as store:
        assert store.find_cell(cells[1]["key"]) is None
        assert store.find_cell(cells[2]["key"]) is not None
    assert ["computed again" in text for text in said] == [True]


def test_a_cell_that_cannot_be_is_computed_again(folder: Path) -> None:
    change_columns(folder, "cell0", put("linf", 0.5))
    record, cells = read_cells(folder)

    with Store.open(folder, record["config"]) as store:
        clean = store.find_clean(cells[0]["key"], np.arange(40))
        assert clean is not None
        assert store.find_clean(cells[0]["key"], np.arange(1, 41)) is None
        assert store.find_outcome(cells[1]["key"], clean) is None
        assert store.find_outcome(cells[2]["key"], clean) is not None


@pytest.mark.parametrize("pictures", [b"torn", None])
def test_a_cell_whose_pictures_are_lost_is_computed_again(
    folder: Path, pictures: bytes | None
) -> None:
    record, cells = read_cells(folder)
    cells[1]["pictures"] = hashlib.sha256(b"whole").hexdigest()
    (folder / "run.json").write_text(json.dumps(record))
    if pictures:
        (folder / "pictures").mkdir()
        (folder / "pictures" / find_cell(folder).name).write_bytes(pictures)

    with Store.open(folder, record["config"]) as store:
        assert store.find_cell(cells[1]["key"]) is None


def test_a_cell_of_before_there_were_seals_is_read(folder: Path) -> None:
    record, cells = read_cells(folder)
    content = pack(unpack(find_cell(folder).read_bytes()))
    find_cell(folder).write_bytes(content)
    cells[1]["sha256"] = hashlib.sha256(content).hexdigest()
    (folder / "run.json").write_text(json.dumps(record))

    assert len(load_run(folder).attacks) == 2


THREATS = [("l0", 3, 4), ("l0_pixels", 2, 3), ("l1", 0.5, 0.6), ("l2", 1.5, 1.6)]


@pytest.mark.parametrize(("norm", "eps", "far"), [*THREATS, ("ssim", 0.25, 0.7)])
def test_a_distance_above_the_radius_is_refused_in_every_norm(
    make_outcome: Callable[..., Outcome], norm: str, eps: float, far: float
) -> None:
    """Of ssim the likeness lost counts, 1 - SSIM; exactly the radius is inside."""
    inside = np.full(4, 1 - eps if norm == "ssim" else eps)
    outcome = make_outcome([True] * 4, threat=Threat(norm, eps, False), **{norm: inside})
    clean = clean_columns(outcome.columns["label"], outcome.attacked)

    check_outcome(outcome, clean)
    outcome.columns[norm][2] = far
    with pytest.raises(ValueError, match="outside the ball"):
        check_outcome(outcome, clean)


def test_a_link_out_of_the_folder_is_not_followed(folder: Path) -> None:
    path = find_cell(folder)
    path.rename(folder.parent / "elsewhere.npz")
    path.symlink_to(folder.parent / "elsewhere.npz")

    with pytest.raises(RunError, match="is a link"):
        load_run(folder)


@pytest.mark.parametrize("name", ["samples", "pictures", "run.json"])
def test_what_belongs_to_a_run_and_is_a_link_is_neither_read_nor_written(
    folder: Path, name: str
) -> None:
    if not (folder / name).exists():
        (folder / name).mkdir()
    (folder / name).rename(folder.parent / "elsewhere")
    (folder / name).symlink_to(folder.parent / "elsewhere")

    with pytest.raises(UsageError, match="is a link"), Store.open(folder, {}):
        pass

    with pytest.raises(UsageError, match="is a link"):
        load_run(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"no archive",
        pack({"place": np.array(["easiest"])}),
        pack(
            {
                "place": np.array(["easiest"]),
                "row": np.array([0]),
                "clean": np.zeros((1, 4, 4)),
                "delta": np.zeros((1, 4, 4)),
            }
        ),
    ],
)
def test_pictures_that_are_none_are_refused(folder: Path, content: bytes) -> None:
    record = json.loads((folder / "run.json").read_text())
    record["cells"][1]["pictures"] = hashlib.sha256(content).hexdigest()
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "pictures").mkdir()
    name = find_cell(folder).name
    (folder / "pictures" / name).write_bytes(content)

    with pytest.raises(RunError, match=name):
        load_pictures(load_run(folder))


def test_a_record_nested_without_end_is_refused(folder: Path) -> None:
    (folder / "run.json").write_text("[" * 200_000)

    with pytest.raises(UsageError, match="damaged"):
        read_record(folder / "run.json")
