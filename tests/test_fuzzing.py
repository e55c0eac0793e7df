"""Files with a few things changed at random: each is read, or refused in a sentence.

Some hundred examples of each kind, the same every time. More are tried by

    FUZZ_EXAMPLES=1500 pytest tests/test_fuzzing.py
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fuzz
import numpy as np
import pytest
import safetensors.torch
import torch
from hostile_runs import keep_sound_run, replace_file, sign_again, write_json
from hostile_settings import GATES, ODD
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from robusteval.commands.preset import read_preset
from robusteval.datasets.class_names import read_class_names
from robusteval.datasets.sources import open_data
from robusteval.errors import RobustevalError
from robusteval.models import checkpoint
from robusteval.models.networks import small_cnn
from robusteval.reports.baseline import build_baseline
from robusteval.reports.baseline_file import read_baseline, render_baseline
from robusteval.reports.gate_config import read_settings
from robusteval.reports.rendering import render_runs
from robusteval.runs.folder import load_pictures, load_run

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "60"))
Test = Callable[..., None]


def fuzz_often(share: float = 1.0) -> Callable[[Test], Test]:
    """As many examples as were asked for, the same every time."""
    return settings(max_examples=max(1, int(share * EXAMPLES)))


@contextmanager
def sentences() -> Iterator[None]:
    """What is wrong is said in one sentence."""
    said: list[str] = []
    try:
        yield
    except RobustevalError as error:
        said.append(error.message)
    assert all(said)


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for files."""
    return tmp_path_factory.mktemp("fuzz")


@functools.cache
def make_weights() -> dict[str, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return small_cnn(3, channels=3).state_dict()


def write_safetensors() -> bytes:
    """A checkpoint that says all about itself."""
    notes = {
        "arch": "robusteval:small_cnn_rgb",
        "num_classes": 3,
        "input": [3, 12, 12],
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "class_names": ["a", "b", "c"],
    }
    texts = {name: json.dumps(note) for name, note in notes.items()}
    return fuzz.Sound(safetensors.torch.save(make_weights(), texts))


def write_torch(path: Path, *, new: bool) -> bytes:
    """A state dict as torch saves it, now or before version 1.6."""
    torch.save({"state_dict": make_weights()}, path, _use_new_zipfile_serialization=new)
    return fuzz.Sound(path.read_bytes())


def load_checkpoint(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with sentences():
        checkpoint.load(path, arch="robusteval:small_cnn_rgb", device=torch.device("cpu"))


def test_checkpoints_in_safetensors(room: Path) -> None:
    @fuzz_often()
    @given(fuzz.change_safetensors(write_safetensors()))
    def check(content: bytes) -> None:
        load_checkpoint(room / "net.safetensors", content)

    check()


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_checkpoints_of_torch(room: Path, new: bool) -> None:
    base = write_torch(room / "net.pt", new=new)

    @fuzz_often(1.0 if new else 0.5)
    @given(fuzz.change_archive(base) if new else fuzz.change_bytes(base))
    def check(content: bytes) -> None:
        load_checkpoint(room / "net.pt", content)

    check()


def read_all(spec: str) -> None:
    """Open images and read every one."""
    with sentences():
        data = open_data(spec)
        data.batch(range(len(data)))


def test_arrays_of_images(room: Path) -> None:
    path = room / "images.npz"
    rng = np.random.default_rng(0)
    np.savez(path, x=rng.integers(0, 255, (6, 4, 4, 3)).astype(np.uint8), y=np.arange(6) % 3)
    base = fuzz.Sound(path.read_bytes())

    @fuzz_often()
    @given(fuzz.change_archive(base))
    def check(content: bytes) -> None:
        path.write_bytes(content)
        read_all(str(path))

    check()


def write_images(folder: Path) -> bytes:
    """Three small pictures and the text of a list of them."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for name in "abc":
        Image.fromarray(rng.integers(0, 255, (4, 4, 3)).astype(np.uint8)).save(
            folder / f"{name}.png"
        )
    return b"image,label\na.png,0\nb.png,1\nc.png,2\n"


def test_lists_of_images(room: Path) -> None:
    folder = room / "listed"
    base = write_images(folder)

    @fuzz_often()
    @given(fuzz.change_bytes(base))
    def check(content: bytes) -> None:
        (folder / "list.csv").write_bytes(content)
        read_all(str(folder / "list.csv"))

    check()


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_pictures(room: Path, suffix: str) -> None:
    folder = room / f"pictures_{suffix}"
    write_images(folder)
    (folder / "list.csv").write_text(f"image,label\nx.{suffix},0\n")
    Image.open(folder / "a.png").save(folder / f"x.{suffix}")
    base = fuzz.Sound((folder / f"x.{suffix}").read_bytes())

    @fuzz_often(0.5)
    @given(fuzz.change_bytes(base))
    def check(content: bytes) -> None:
        (folder / f"x.{suffix}").write_bytes(content)
        read_all(str(folder / "list.csv"))

    check()


@pytest.mark.parametrize("name", ["names.txt", "names.json"])
def test_names_of_classes(room: Path, name: str) -> None:
    base = b"ant\nbee\ncat\n" if name.endswith("txt") else b'["ant", "bee", "cat"]'

    @fuzz_often(0.5)
    @given(fuzz.change_bytes(base))
    def check(content: bytes) -> None:
        (room / name).write_bytes(content)
        with sentences():
            read_class_names(room / name)

    check()


@pytest.fixture(scope="module")
def sound(room: Path) -> Path:
    """The folder of a sound run."""
    return keep_sound_run(room / "sound")


@contextmanager
def copied(sound: Path) -> Iterator[Path]:
    """A copy of the run, for one example."""
    with tempfile.TemporaryDirectory() as place:
        yield Path(shutil.copytree(sound, Path(place) / "run"))


def lay_out(folder: Path, *forms: str) -> None:
    """Read a run with its pictures and lay it out, also as a baseline."""
    with sentences():
        run = load_run(folder)
        load_pictures(run)
        for form in forms:
            render_runs([run], form, [None], page=False)
        render_baseline(build_baseline(run))


def test_records_of_runs_as_text(sound: Path) -> None:
    base = fuzz.Sound((sound / "run.json").read_bytes())

    @fuzz_often(0.5)
    @given(fuzz.change_bytes(base))
    def check(content: bytes) -> None:
        with copied(sound) as folder:
            (folder / "run.json").write_bytes(content)
            lay_out(folder)

    check()


def test_records_of_runs_by_value(sound: Path) -> None:
    base = json.loads((sound / "run.json").read_text())

    @fuzz_often()
    @given(fuzz.change_json(base))
    def check(record: Any) -> None:
        with copied(sound) as folder:
            write_json(folder, record)
            if isinstance(record.get("cells"), list) and isinstance(record.get("config"), dict):
                sign_again(folder)
            lay_out(folder, "json", "markdown")

    check()


@pytest.mark.parametrize("below", ["samples", "pictures"])
def test_cells_of_runs(sound: Path, below: str) -> None:
    cells = json.loads((sound / "run.json").read_text())["cells"]
    numbers = range(len(cells)) if below == "samples" else [2]
    bases = [(sound / below / f"{cells[number]['key']}.npz").read_bytes() for number in numbers]
    bases = [pack_plainly(content) for content in bases]
    changed = st.one_of(
        *(
            st.tuples(st.just(number), fuzz.change_archive(base))
            for number, base in zip(numbers, bases, strict=True)
        )
    )

    @fuzz_often(0.5)
    @given(changed)
    def check(made: tuple[int, bytes]) -> None:
        with copied(sound) as folder:
            replace_file(folder, *made, below)
            lay_out(folder, *(["json"] if below == "samples" else []))

    check()


def pack_plainly(content: bytes) -> bytes:
    """The archive without its seal."""
    return fuzz.Sound(fuzz.write_members(fuzz.read_members(content)))


def test_baselines(room: Path, sound: Path) -> None:
    path = room / "baseline.json"
    base = json.loads(render_baseline(build_baseline(load_run(sound))))

    @fuzz_often()
    @given(fuzz.change_json(base), st.booleans())
    def check(record: Any, signed: bool) -> None:
        from robusteval.runs.storage import digest

        if signed and isinstance(record, dict):
            record.pop("digest", None)
            record["digest"] = digest(record)
        path.write_text(json.dumps(record))
        with sentences():
            render_baseline(read_baseline(path))

    check()


@pytest.mark.parametrize("name", ["robusteval.toml", "pyproject.toml"])
def test_gates(room: Path, name: str) -> None:
    texts = [*GATES.values(), *ODD.values()]
    short = [text for text in texts if len(text) < 300]

    @fuzz_often()
    @given(st.sampled_from(short).flatmap(lambda text: fuzz.change_bytes(text.encode())))
    def check(content: bytes) -> None:
        front = b"[tool.robusteval]\n" if name == "pyproject.toml" else b""
        content = content.replace(b"[[gate", b"[[tool.robusteval.gate") if front else content
        (room / name).write_bytes(front + content)
        with sentences():
            read_settings(room / name)

    check()


def test_presets(room: Path) -> None:
    base = b'attack = ["pgd:eps=8/255,steps=20", "fgsm"]\nsamples = 10\nseed = 1\nadapt = true\n'

    @fuzz_often()
    @given(fuzz.change_bytes(base))
    def check(content: bytes) -> None:
        (room / "mine.toml").write_bytes(content)
        with sentences():
            read_preset(str(room / "mine.toml"))

    check()


def test_specs_of_commands() -> None:
    """As after ``--attack``; a name and values of any kind."""
    from robusteval.art.field_names import check_attack
    from robusteval.registry import parse

    base = b"pgd:eps=8/255,steps=20,loss=ce,stop=never"

    @fuzz_often()
    @given(fuzz.change_bytes(base, most=2))
    def check(content: bytes) -> None:
        with sentences():
            check_attack(parse(content.decode("utf-8", "replace")))

    check()
