"""Images are divided by a column of their table: refused, stored, noticed where changed by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from toys import Bands

from robusteval.datasets.sources import open_data
from robusteval.errors import UsageError
from robusteval.evaluation.evaluate import execute
from robusteval.evaluation.merging import merge
from robusteval.evaluation.plan import prepare_plan
from robusteval.evaluation.shares import Share
from robusteval.models.classifier import Classifier
from robusteval.reports.groups import list_slices
from robusteval.runs.folder import load_run
from robusteval.runs.slices import SLICE

N = 8


@pytest.fixture
def table(tmp_path: Path, npz: Path) -> Path:
    """Images with a camera, a light that all share but one, and a stamp of their own."""
    batch = open_data(str(npz)).batch(range(N))
    lines = ["file,label, camera,light,stamp"]
    for i in range(N):
        level = (batch.x[i].numpy().transpose(1, 2, 0) * 255).round().astype(np.uint8)
        Image.fromarray(level).save(tmp_path / f"{i}.png")
        light = "" if i == 5 else "day"
        lines.append(f"{i}.png,{int(batch.y[i])},{('front', 'rear')[i % 2]},{light},{i}")
    path = tmp_path / "table.csv"
    path.write_text("\n".join(lines))
    return path


def prepare(bands: Bands, table: Path, **options: Any) -> Any:
    """A plan of one cheap attack on all images."""
    classifier = Classifier(bands, mean=(0.5,), std=(0.25,), num_classes=3).eval()
    data = open_data(str(table), slices=["camera", "light"])
    return prepare_plan(
        classifier, data, ["pgd:eps=12/255,steps=2"], samples=N - 1, probes=False, **options
    )


def test_slices_are_in_the_run_and_are_read_again(
    trained_bands: Bands, table: Path, tmp_path: Path
) -> None:
    run = execute(prepare(trained_bands, table), tmp_path / "run")
    again = load_run(tmp_path / "run")

    assert list_slices(run) == {"camera": ["front", "rear"], "light": ["(empty)", "day"]}
    for made in (run, again):
        assert made.clean[f"{SLICE}camera"].tolist() == (run.clean["index"] % 2).tolist()
        assert made.clean[f"{SLICE}light"].tolist() == (run.clean["index"] != 5).tolist()


def test_shards_join_to_the_same_slices(trained_bands: Bands, table: Path, tmp_path: Path) -> None:
    for part in ("1/2", "2/2"):
        plan = prepare(trained_bands, table, share=Share.parse(part))
        execute(plan, tmp_path / part[0])

    merged = merge([tmp_path / "1", tmp_path / "2"], tmp_path / "run")

    assert merged.clean[f"{SLICE}camera"].tolist() == (merged.clean["index"] % 2).tolist()


def test_a_slice_that_is_changed_by_hand_is_noticed(
    trained_bands: Bands, table: Path, tmp_path: Path
) -> None:
    execute(prepare(trained_bands, table), tmp_path / "run")
    path = tmp_path / "run" / "run.json"
    record = json.loads(path.read_text())
    record["config"]["slices"]["camera"]["values"] = ["rear", "front"]
    path.write_text(json.dumps(record))

    with pytest.raises(UsageError, match="of another run, or was changed"):
        load_run(tmp_path / "run")


@pytest.mark.parametrize(
    ("slices", "said"),
    [
        (["camra"], "did you mean 'camera'?): known are file, label, camera, light, stamp"),
        (["stamp"], "has 8 values in 8 rows, which are no slices"),
        (["light", "light"], "names a column twice"),
        ("light", "a list of columns"),
        ([""], "a list of columns"),
    ],
)
def test_what_is_no_slice_is_refused(table: Path, slices: Any, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_data(str(table), slices=slices)

    assert said in str(caught.value)


def test_too_many_values_are_refused(table: Path) -> None:
    rows = "\n".join(f"0.png,0,{i // 2}" for i in range(102))
    table.write_text(f"file,label,hour\n{rows}")

    with pytest.raises(UsageError, match="51 values in 102 rows"):
        open_data(str(table), slices=["hour"])


def test_other_data_have_no_columns(npz: Path) -> None:
    with pytest.raises(UsageError, match=r"names columns of a table FILE\.csv"):
        open_data(str(npz), slices=["camera"])
