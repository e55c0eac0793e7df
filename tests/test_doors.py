"""Every place where a user names a file: pipes, devices, folders and 30 GB are a sentence each."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from robusteval.cli import cli
from robusteval.datasets.concepts import open_concepts
from robusteval.datasets.sources import open_data
from robusteval.errors import UsageError
from robusteval.models.checkpoint import load, save
from robusteval.models.networks import ARCHITECTURES
from robusteval.runs import reading
from robusteval.runs.folder import load_run
from robusteval.runs.types import Outcome, Run

if not hasattr(os, "mkfifo"):
    pytest.skip("no such files on this system", allow_module_level=True)


def make_large(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(30 * 10**9)


KINDS: dict[str, Callable[[Path], None]] = {
    "pipe": lambda path: os.mkfifo(path),
    "device": lambda path: path.symlink_to(os.devnull),
    "30 GB": make_large,
}
EVALUATE = "evaluate net.safetensors --data"
# the file that is another, then what is called
DOORS = {
    "checkpoint": ("x.pt", "evaluate x.pt --data digits"),
    "code": ("x.py", "evaluate net.safetensors --arch x.py:Net --data digits"),
    "data": ("x.npz", f"{EVALUATE} x.npz"),
    "list": ("x.csv", f"{EVALUATE} x.csv"),
    "names": ("names", f"{EVALUATE} photos --classes names"),
    "picture": ("photos/b/0.png", f"{EVALUATE} list.csv"),
    "svhn": ("test_32x32.mat", f"{EVALUATE} svhn:."),
    "preset": ("x.toml", f"{EVALUATE} digits --preset x.toml"),
    "classes to reach": ("x.txt", f"{EVALUATE} digits --attack pgd:target=x.txt"),
    "defense": ("x.safetensors", f"{EVALUATE} digits --defense x.safetensors"),
    "detector": ("x.safetensors", f"{EVALUATE} digits --defense detector:file=x.safetensors"),
    "mask": ("x.safetensors", f"{EVALUATE} digits --defense checkpoint:file=x.safetensors"),
    "start of a training": ("x.pt", "train --from x.pt --data digits --out o.safetensors"),
    "run": ("run/run.json", "report run"),
    "columns": ("run/samples/*.npz", "report run"),
    "gates": ("robusteval.toml", "check run"),
    "project": ("pyproject.toml", "check run"),
    "baseline": ("x.json", "check run --config gates.toml --baseline x.json"),
}


@pytest.fixture(autouse=True)
def hang_guard() -> Iterator[None]:
    """A test that waits for a pipe would wait for ever."""
    previous = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits"))
    signal.alarm(300)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


@pytest.fixture
def place(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_outcome: Callable[..., Outcome],
    make_run: Callable[..., Run],
    keep_run: Callable[[Run, Path], Path],
) -> Path:
    """A working folder with a network, images, a run and gates."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    network = ARCHITECTURES["digits_cnn"]()
    save("net.safetensors", network.state_dict(), arch="robusteval:digits_cnn", num_classes=10,
         input_shape=(1, 32, 32), mean=None, std=None)  # fmt: skip
    for name in "abc":
        Path("photos", name).mkdir(parents=True)
        Image.fromarray(np.full((32, 32), 99, np.uint8)).save(f"photos/{name}/0.png")
    Path("list.csv").write_text("file,label\nphotos/a/0.png,0\nphotos/b/0.png,1\n")
    Path("gates.toml").write_text("[[gate]]\nmax_drop = 0.01\n")
    keep_run(make_run(make_outcome(np.arange(60) < 30)), Path("run"))
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("door", DOORS)
def test_file_that_is_none_or_too_large_is_one_sentence(place: Path, door: str, kind: str) -> None:
    name, command = DOORS[door]
    path = next(place.glob(name), place / name)
    path.unlink(missing_ok=True)
    KINDS[kind](path)

    result = CliRunner().invoke(cli, command.split())

    said = result.stderr.strip().splitlines()[-1]
    listed_only = door in ("picture", "svhn") and kind != "30 GB"
    linked = door in ("columns", "run") and kind == "device" and "is a link" in said
    assert kind in said or linked or (listed_only and path.name in said), result.output
    assert result.exit_code == (3 if door == "columns" else 2), result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    "command",
    [
        "evaluate NAME.pt --data digits",
        "evaluate net.safetensors --data digits --defense NAME.safetensors",
        "evaluate net.safetensors --data digits --defense detector:file=NAME",
        "evaluate net.safetensors --data digits --arch NAME.py:Net",
        "evaluate net.safetensors --data NAME",
        "evaluate net.safetensors --data photos --classes NAME",
        "evaluate net.safetensors --data digits --preset NAME.toml",
        "report NAME",
        "check run --config NAME.toml",
    ],
)
def test_name_that_no_file_can_have_is_a_mistake_of_the_user(place: Path, command: str) -> None:
    result = CliRunner().invoke(cli, command.replace("NAME", "a" * 9000).split())

    assert result.exit_code == 2
    assert "the system says" not in result.output


def test_empty_name_of_data_is_not_taken_for_none(place: Path) -> None:
    result = CliRunner().invoke(cli, ["evaluate", "net.safetensors", "--data", ""])

    assert result.exit_code == 2
    assert "neither a data set nor a path" in result.stderr


def test_sparse_checkpoint_is_refused_by_its_first_bytes(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gigabyte of zeros that a file system stores is no network either."""
    with Path("x.pt").open("wb") as file:
        file.truncate(10**9)
    monkeypatch.setattr(reading, "SPARSE", 2**60)
    monkeypatch.setattr("robusteval.models.weights.read_bytes", lambda *_: pytest.fail("read"))

    with pytest.raises(UsageError, match="limit is 64 MB"):
        load("x.pt", arch="robusteval:digits_cnn")


@pytest.mark.parametrize("shape", [[1, 4096, 4096], [10**6, 1, 2], [2**19, 2**19, 2**19]])
def test_metadata_that_asks_for_huge_images_is_refused_before_the_network_runs(
    place: Path, shape: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    state = ARCHITECTURES["digits_cnn"]().state_dict()
    size: Any = tuple(shape)
    save("x.safetensors", state, arch="robusteval:digits_cnn", num_classes=10, input_shape=size,
         mean=None, std=None)  # fmt: skip
    monkeypatch.setattr(torch.nn.Conv2d, "forward", lambda *_: pytest.fail("it ran"))

    with pytest.raises(UsageError, match="ROBUSTEVAL_LIMITS"):
        load("x.safetensors")


def test_image_of_too_many_pixels_is_refused_before_it_is_decoded(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("1", (9000, 8000)).save("photos/b/0.png")
    opened = open_data("photos", size=32)
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("it was decoded"))

    with pytest.raises(UsageError, match=r"72000000 pixels.*ROBUSTEVAL_LIMITS=2"):
        opened.source.image(1)


def test_limit_on_pixels_can_be_raised_above_that_of_pillow(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("robusteval.datasets.images.PIXELS", 500)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)
    with pytest.raises(UsageError, match="bomb"):
        open_data("photos", channels=1)
    monkeypatch.setenv("ROBUSTEVAL_LIMITS", "3")

    assert open_data("photos", channels=1).source.image(0).shape == (1, 32, 32)
    assert Image.MAX_IMAGE_PIXELS == 600


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["label.csv", "images/a.png", "images/mask.png"])
def test_files_of_concepts_go_through_the_same_door(place: Path, name: str, kind: str) -> None:
    root = place / "broden"
    (root / "images").mkdir(parents=True)
    for each in ("a.png", "mask.png"):
        Image.fromarray(np.full((8, 8, 3), 1, np.uint8)).save(root / "images" / each)
    (root / "label.csv").write_text("number,name,category\n257,one,color\n")
    (root / "index.csv").write_text("image,color\na.png,mask.png\n")
    (root / name).unlink()
    KINDS[kind](root / name)

    with pytest.raises(UsageError, match=kind):
        open_concepts(root, (3, 8, 8), allow_outside=True).probe(0)


@pytest.mark.parametrize("form", ["EPS", "PCX", "SGI"])
def test_concepts_are_shown_by_the_forms_of_data_alone(place: Path, form: str) -> None:
    """Under the name of a PNG file; Pillow would start another program for the first."""
    root = place / "mine"
    for folder in ("images", "masks/one"):
        (root / folder).mkdir(parents=True)
        Image.fromarray(np.full((8, 8, 3), 1, np.uint8)).save(root / folder / "a.png", form)

    with pytest.raises(UsageError, match=r"a\.png cannot be read .*cannot identify"):
        open_concepts(root, (3, 8, 8)).probe(0)


def test_thousand_gates_are_read_and_more_refused(place: Path) -> None:
    one = "[[gate]]\nfloor = 0.0\n"
    Path("robusteval.toml").write_text(one * 10_000)
    result = CliRunner().invoke(cli, ["check", "run"])

    assert result.exit_code == 2
    assert "10000 gates, the limit is 1000" in result.stderr


def test_deep_records_are_damaged_ones(place: Path) -> None:
    for text in ("[" * 10**6, '{"format":' * 10**5, json.dumps([[]] * 10**5)):
        Path("run/run.json").write_text(text)
        with pytest.raises(UsageError, match="damaged"):
            load_run("run")


ROOT = Path(__file__).parents[1]
READS = re.compile(
    r"\.read_bytes\(|\.read_text\(|\.open\(|np\.load\(|safe_open\(|\bopen\(|fromfile\("
)
# of the package itself, of what was made in this process, or with `check_regular` before it
OWN = {
    "archive.open(",  # members
    "Image.open(file,",  # an open file
    "Image.open(file)",
    "Image.open(io.BytesIO(",
    "Store.open(",  # a folder
    "def open(",
}
KNOWN = {
    "robusteval/commands/preset.py": 1,  # the package's own
    "robusteval/commands/shell.py": 1,  # the null device
    "robusteval/datasets/wordnet.py": 1,  # a table of ours
    "robusteval/evaluation/workers.py": 1,  # written by the process that has started this one
    "robusteval/interpreters/rts.py": 1,
    "robusteval/models/demo.py": 1,
    "robusteval/analysis/papers/declaration.py": 1,  # the package's own
    "robusteval/registry/__init__.py": 2,  # source of packages
    "robusteval/runs/reading.py": 3,
    "robusteval/runs/writing.py": 3,
    "robusteval/registry/signatures.py": 1,  # source of packages
    "defenses/training_files.py": 1,
    "reports/explained_attacks.py": 1,
    "reports/github.py": 1,  # appended to
    "reports/html.py": 1,
    "reports/neighbours.py": 1,  # a table of ours
    "reports/paper.py": 1,
}


@pytest.mark.parametrize("folder", ["robusteval", "attacks", "defenses", "reports"])
def test_every_file_of_a_user_is_opened_in_one_place(folder: str) -> None:
    """Another place would wait for a pipe; `robusteval.runs.reading` is what to use there."""
    for path in sorted((ROOT / folder).glob("**/*.py")):
        name = path.relative_to(ROOT).as_posix()
        if any(
            name.startswith(f"robusteval/{leaf}/") for leaf in ("attacks", "defenses", "reports")
        ):
            continue
        lines = [
            line for line in path.read_text(encoding="utf-8").splitlines() if READS.search(line)
        ]
        other = [line for line in lines if not any(own in line for own in OWN)]
        assert len(other) <= KNOWN.get(name, 0), f"{name}: {other}"
