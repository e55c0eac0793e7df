"""All adversarial images of a run, kept and exported."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from robusteval.cli import cli
from robusteval.datasets.arrays import from_arrays
from robusteval.datasets.dataset import Data
from robusteval.datasets.exported import export_images, is_export, name_class
from robusteval.datasets.sources import open_data
from robusteval.errors import Interrupted, NothingEvaluated, RunError, UsageError
from robusteval.evaluation.evaluate import evaluate, execute
from robusteval.evaluation.judge import judge
from robusteval.evaluation.plan import prepare_plan
from robusteval.models.classifier import Classifier, predict_classes
from robusteval.runs.folder import find_images, load_run
from robusteval.runs.types import Columns, Run

PGD = "pgd:eps=12/255,steps=5"
NOISE = "noise:eps=12/255"


@pytest.fixture
def data(npz: Path) -> Data:
    """The synthetic images."""
    return open_data(str(npz))


def keep(bands: Classifier, data: Data, out: Path, **more: Any) -> Run:
    """A run of two attacks that keeps its images."""
    given: dict[str, Any] = {"probes": False, "samples": 24, "keep_images": True, **more}
    return evaluate(bands, data, [PGD, NOISE], out=out, **given)


def read_arrays(path: Path) -> Columns:
    """All arrays of an archive."""
    with np.load(path) as archive:
        return dict(archive)


def run_command(*words: str) -> Result:
    return CliRunner().invoke(cli, list(words), env={"COLUMNS": "80"})


def test_archives_hold_what_was_judged(bands: Classifier, data: Data, tmp_path: Path) -> None:
    """Predicted and measured by hand, the images give the columns of the run."""
    run = keep(bands, data, tmp_path / "run")

    kept = find_images(load_run(tmp_path / "run"))
    assert list(kept) == [0, 1]
    for place, path in kept.items():
        arrays, columns = read_arrays(path), run.outcomes[place].columns
        rows = np.flatnonzero(columns["attacked"])
        assert arrays["x"].shape == (len(rows), 3, 12, 12)
        assert arrays["x"].dtype == np.float32
        for name, column in {"y": "label", "index": "index", "id": "id"}.items():
            np.testing.assert_array_equal(arrays[name], columns[column][rows])
        clean = data.batch(arrays["index"]).x
        x = torch.from_numpy(arrays["x"])
        linf = (x.double() - clean.double()).abs().flatten(1).amax(1)
        np.testing.assert_array_equal(linf, columns["linf"][rows])
        with torch.no_grad():
            pred = predict_classes(bands(x))
        np.testing.assert_array_equal(pred, columns["pred_adv"][rows])
        np.testing.assert_array_equal(arrays["fooled"], pred.numpy() != arrays["y"])


def test_an_archive_opens_as_data(bands: Classifier, data: Data, tmp_path: Path) -> None:
    """The accuracy on it is the share of attacked images that hold."""
    run = keep(bands, data, tmp_path / "run")
    path = find_images(load_run(tmp_path / "run"))[0]

    again = open_data(path)

    pgd = run.outcomes[0]
    batch = again.batch(range(len(again)))
    with torch.no_grad():
        right = predict_classes(bands(batch.x)) == batch.y
    assert int(right.sum()) == int((pgd.attacked & ~pgd.success()).sum())


@pytest.mark.parametrize("batches", [3, 7])
def test_a_stopped_run_keeps_the_same_images(
    bands: Classifier, data: Data, tmp_path: Path, batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Continued with another batch size; nothing of the parts is left."""
    monkeypatch.setattr("robusteval.evaluation.batches.SAVE_EVERY", 0.0)
    whole = keep(bands, data, tmp_path / "whole")
    plan = prepare_plan(bands, data, [PGD, NOISE], samples=24, probes=False)
    asked = iter(range(batches))
    options: dict[str, Any] = {"keep_images": True}
    with pytest.raises(Interrupted):
        execute(
            plan,
            tmp_path / "run",
            batch_size=5,
            stopping=lambda: next(asked, None) is None,
            **options,
        )

    execute(plan, tmp_path / "run", batch_size=7, **options)

    names = [path.name for path in sorted((tmp_path / "run" / "adversarial").iterdir())]
    assert names == sorted(path.name for path in find_images(whole).values())
    for name in names:
        one, other = (
            read_arrays(tmp_path / run / "adversarial" / name) for run in ("whole", "run")
        )
        assert one.keys() == other.keys()
        for array in one:
            np.testing.assert_array_equal(one[array], other[array])


def test_batches_without_images_are_attacked_again(
    bands: Classifier, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was begun without keeping images, and stopped, keeps all of them afterwards."""
    monkeypatch.setattr("robusteval.evaluation.batches.SAVE_EVERY", 0.0)
    plan = prepare_plan(bands, data, [PGD], samples=24, probes=False)
    asked = iter(range(6))
    with pytest.raises(Interrupted):
        execute(plan, tmp_path / "run", batch_size=5, stopping=lambda: next(asked, None) is None)

    run = execute(plan, tmp_path / "run", keep_images=True)

    arrays = read_arrays(find_images(run)[0])
    assert len(arrays["x"]) == run.outcomes[0].attacked.sum()


def test_images_are_added_to_a_finished_run(
    bands: Classifier, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By attacking again, once; a call that does not ask for them leaves them."""
    keep(bands, data, tmp_path / "run", keep_images=False)
    assert not find_images(load_run(tmp_path / "run"))

    keep(bands, data, tmp_path / "run")
    judged: list[int] = []

    def counted(*args: Any) -> Columns:
        judged.append(1)
        return judge(*args)

    monkeypatch.setattr("robusteval.evaluation.columns.judge", counted)
    keep(bands, data, tmp_path / "run")
    keep(bands, data, tmp_path / "run", keep_images=False)

    assert not judged
    assert len(find_images(load_run(tmp_path / "run"))) == 2


def test_a_changed_archive_is_refused_and_made_again(
    bands: Classifier, data: Data, tmp_path: Path
) -> None:
    """Its hash stands in the record."""
    path = find_images(keep(bands, data, tmp_path / "run"))[0]
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"x")

    with pytest.raises(RunError, match="was changed"):
        find_images(load_run(tmp_path / "run"))
    keep(bands, data, tmp_path / "run")

    assert path.read_bytes() == content


def test_images_need_a_folder(bands: Classifier, data: Data) -> None:
    """Without one there is nowhere to keep them."""
    with pytest.raises(UsageError, match="keep_images needs a folder"):
        evaluate(bands, data, [PGD], keep_images=True)


def test_exported_files_are_the_images_in_8_bits(
    bands: Classifier, data: Data, tmp_path: Path
) -> None:
    """The list says of each file what the network says of it; the folder opens as data."""
    run = keep(bands, data, tmp_path / "run")
    result = run_command("export", str(tmp_path / "run"), "--out", str(tmp_path / "out"))

    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{2 * int(run.outcomes[0].attacked.sum())} images in ")
    with (tmp_path / "out" / "manifest.csv").open() as file:
        rows = list(csv.DictReader(file))
    again = open_data(tmp_path / "out")
    assert len(again) == len(rows) == 2 * int(run.outcomes[0].attacked.sum())
    batch = again.batch(range(len(again)))
    floats = np.concatenate([read_arrays(path)["x"] for path in find_images(run).values()])
    np.testing.assert_array_equal(batch.x * 255, np.rint(floats * np.float32(255)))
    with torch.no_grad():
        pred = predict_classes(bands(batch.x)).tolist()
    assert [int(row["prediction"]) for row in rows] == pred
    assert [int(row["label"]) for row in rows] == batch.y.tolist()
    assert [row["fooled"] == "1" for row in rows] == (np.array(pred) != batch.y.numpy()).tolist()
    first = Path(rows[0]["file"]).parts[0]
    one = open_data(tmp_path / "out" / first)
    assert one.name == first
    assert len(one) == len(rows) // 2
    np.testing.assert_array_equal(one.labels, batch.y[: len(one)])


def test_one_attack_is_data_where_a_class_has_no_image(
    bands: Classifier, data: Data, tmp_path: Path
) -> None:
    """Labels stay those of the network, and names those of the run, however they are spelled."""
    names = ("=1+1", "\U0001f431 <b>", "b\nc")
    named = from_arrays(data.batch(range(24)).x.numpy(), [0, 1] * 12, class_names=names)
    run = evaluate(
        bands, named, [NOISE], out=tmp_path / "run", probes=False, samples=24, keep_images=True
    )
    export_images(run, tmp_path / "out", lambda what, total: None, lambda n: None)
    (attack,) = (path for path in (tmp_path / "out").iterdir() if path.is_dir())

    found = open_data(attack)

    assert set(found.labels.tolist()) <= {0, 1}
    assert found.class_names == names
    assert open_data(tmp_path / "out").class_names == names
    again = evaluate(bands, found, [NOISE], probes=False)
    assert again.outcomes[0].attacked.sum() == len(found)
    (attack / "classes.json").write_text('["a"]')
    if found.labels.max():
        with pytest.raises(UsageError, match="name every class"):
            open_data(attack)


def test_a_second_export_needs_force(bands: Classifier, data: Data, tmp_path: Path) -> None:
    """What is whole is not written over by accident; what is not is finished."""
    keep(bands, data, tmp_path / "run")
    assert run_command("export", str(tmp_path / "run")).exit_code == 0
    assert is_export(tmp_path / "run" / "export")

    again = run_command("export", str(tmp_path / "run"))
    assert again.exit_code == 2
    assert "is there already" in again.stderr
    assert run_command("export", str(tmp_path / "run"), "--force").exit_code == 0
    (tmp_path / "run" / "export" / "manifest.csv").unlink()
    assert run_command("export", str(tmp_path / "run")).exit_code == 0


def test_a_forced_export_takes_the_older_one_away(
    bands: Classifier, data: Data, tmp_path: Path
) -> None:
    """And nothing else: not what somebody put there, nor what a forged list names."""
    keep(bands, data, tmp_path / "one")
    keep(bands, data, tmp_path / "other", seed=1, samples=12)
    out, mine = tmp_path / "out", tmp_path / "mine" / "0"
    mine.mkdir(parents=True)
    for path in (mine / "000001.png", tmp_path / "000002.png"):
        path.write_bytes(b"mine")
    assert run_command("export", str(tmp_path / "one"), "--out", str(out)).exit_code == 0
    old = sorted(path.name for path in out.iterdir() if path.is_dir())
    (out / old[0] / "notes.txt").write_text("mine")
    (out / "link").symlink_to(tmp_path / "mine")
    with (out / "manifest.csv").open("a") as file:
        for name in ("link/0/000001.png", "../mine/0/000001.png", "../000002.png"):
            file.write(name + ",0" * 12 + "\r\n")

    result = run_command("export", str(tmp_path / "other"), "--out", str(out), "--force")

    assert result.exit_code == 0, result.output
    assert (mine / "000001.png").exists()
    assert (tmp_path / "000002.png").exists()
    assert [path.name for path in (out / old[0]).iterdir()] == ["notes.txt"]
    assert not (out / old[1]).exists()
    written = {path.relative_to(out).as_posix() for path in out.glob("*-*/*/*.png")}
    with (out / "manifest.csv").open() as file:
        assert {row["file"] for row in csv.DictReader(file)} == written


def test_the_command_to_use_an_export_can_be_pasted(
    bands: Classifier, data: Data, tmp_path: Path
) -> None:
    keep(bands, data, tmp_path / "run")

    result = run_command("export", str(tmp_path / "run"), "--out", str(tmp_path / "my images"))

    assert result.stdout.endswith(f"--data '{tmp_path}/my images'\n")


def test_a_run_without_images_says_how_to_get_them(
    bands: Classifier, data: Data, tmp_path: Path
) -> None:
    """They are not made up."""
    run = keep(bands, data, tmp_path / "run", keep_images=False)

    with pytest.raises(NothingEvaluated, match="--keep-images"):
        export_images(run, tmp_path / "out", lambda what, total: None, lambda n: None)


@pytest.mark.parametrize(
    ("label", "names", "classes", "folder"),
    [
        (3, None, 10, "3"),
        (3, None, 1000, "003"),
        (1, ["a", "../b c"], 2, "1-b_c"),
        (0, ["0", "1"], 2, "0"),
        (0, ["..", "x"], 2, "0"),
    ],
)
def test_folders_of_classes_sort_and_stay_inside(
    label: int, names: list[str] | None, classes: int, folder: str
) -> None:
    """Numbers of one width, and of a name what a path may hold."""
    assert name_class(label, names, {"num_classes": classes}) == folder
