"""A process that dies at any file event: the same command ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toys import save_colour_cnn, synthetic

from robusteval.datasets.sources import open_data
from robusteval.evaluation.evaluate import evaluate
from robusteval.models.classifier import Classifier
from robusteval.runs.folder import load_pictures, load_run

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="starts processes by fork")

IMAGES = "--data bands.npz --device cpu"
FGSM = "--attack fgsm:eps=24/255"
QUICK = f"evaluate net.safetensors {IMAGES} --no-probes --out run"


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """A folder with two networks that differ a little, and images."""
    folder = tmp_path / "desk"
    save_colour_cnn(folder / "net.safetensors", steps=60)
    save_colour_cnn(folder / "other.safetensors", steps=51)
    x, y = synthetic(60, 1)
    np.savez(folder / "bands.npz", x=x, y=y)
    return folder


def kill(desk: Path, command: str) -> dict[str, Any]:
    script = Path(__file__).with_name("kills.py")
    words = [sys.executable, str(script), str(desk), *command.split()]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_kill_at_any_file_event_of_an_evaluation_changes_no_bit(desk: Path) -> None:
    found = kill(desk, f"{QUICK} --samples 2 {FGSM}")

    assert found["events"] > 20
    assert found["wrong"] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "least"),
    [
        (
            f"{QUICK} --samples 6 --batch-size 3 {FGSM} --interpreter grad"
            " --defense other.safetensors",
            100,
        ),
        (
            f"train {IMAGES} --arch robusteval:small_cnn_rgb --out t.safetensors --epochs 2"
            " --steps 1 --batch-size 16 --held-out 8",
            30,
        ),
        (
            f"defend detector net.safetensors {IMAGES} --samples 60 --extractor raw {FGSM}"
            " --out d.safetensors",
            60,
        ),
        (
            f"defend mask net.safetensors {IMAGES} --samples 40 --units 2"
            " --attack pgd:eps=8/255,steps=2,stop=never --out m.safetensors",
            60,
        ),
        (f"explain net.safetensors {IMAGES} --samples 2 {FGSM} --out ex", 20),
    ],
)
def test_a_kill_at_any_file_event_changes_no_bit(desk: Path, command: str, least: int) -> None:
    found = kill(desk, command)

    print(f"{found['events']} file events: {command}")
    assert found["events"] >= least
    assert found["wrong"] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "least"),
    [
        ("report run --out report.html", 3),
        ("baseline update run", 3),
        ("check run --out gates.xml", 3),
        ("compare run run --out both.md", 3),
    ],
)
def test_a_kill_at_any_file_event_of_what_reads_a_run_changes_no_bit(
    desk: Path, command: str, least: int
) -> None:
    """The baseline is there already, of another run, so that an update writes over it."""
    (desk / "robusteval.toml").write_text(
        'baseline = "b.json"\nallow = ["weak-attacks"]\n[[gate]]\nfloor = 0.0\n'
    )
    for words in (f"{QUICK} --samples 3", "baseline update run", f"{QUICK} --fresh --samples 4"):
        words += "" if words.startswith("baseline") else f" {FGSM}"
        called = [sys.executable, "-m", "robusteval", *words.split()]
        subprocess.run(called, cwd=desk, check=True)

    found = kill(desk, command)

    print(f"{found['events']} file events: {command}")
    assert found["events"] >= least
    assert found["wrong"] == []


def test_a_deleted_cell_is_restored_with_the_same_pictures_and_columns(
    bands: Classifier, npz: Path, tmp_path: Path
) -> None:
    """Any of them: the clean cell, or that of an attack."""

    def run() -> None:
        data = open_data(str(npz))
        evaluate(bands, data, ["fgsm:eps=24/255"], samples=20, out=tmp_path, probes=False)

    run()
    whole, pictures = load_run(tmp_path), load_pictures(load_run(tmp_path))
    cells = sorted((tmp_path / "samples").iterdir())
    assert len(cells) == 2
    for cell in cells:
        cell.unlink()
        run()
        again = load_run(tmp_path)
        for one, other in zip(whole.outcomes, again.outcomes, strict=True):
            for name in one.columns.keys() - {"seconds"}:
                assert np.array_equal(one.columns[name], other.columns[name], equal_nan=True)
        for mine, theirs in zip(pictures[0], load_pictures(again)[0], strict=True):
            assert (mine.place, mine.row) == (theirs.place, theirs.row)
            assert np.array_equal(mine.clean, theirs.clean)
            assert np.array_equal(mine.delta, theirs.delta)
