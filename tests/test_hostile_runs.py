"""Folders of runs, settings and baselines that somebody made on purpose: a sentence, or a report.

Nothing in them is executed, nothing ends in a traceback or as a bug of ours, and the exit codes are
the documented ones. Each goes through the command line in this process.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hostile_runs import BASELINES, ENCODED, READ, REFUSED, Spoil, keep_sound_run, write_sparse
from hostile_settings import BROKEN, GATES, ODD, PRESETS

from robusteval.cli import cli

DOCUMENTED = {0, 1, 2, 3, 4, 5, 6}
FORMATS = (
    *("json", "markdown", "junit", "sarif", "csv", "images", "badge"),
    *("cyclonedx", "spdx", "model-card"),
)
NAMES = ["--data", "none.npz"]  # of images, for commands that do not come so far


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound run, and a baseline made of it."""
    room = tmp_path_factory.mktemp("sound")
    keep_sound_run(room / "run")
    words = ["baseline", "update", str(room / "run"), "--baseline", str(room / "b.json")]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 0, result.output
    return room


@pytest.fixture
def room(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with copies of both, and the run once more as `sound`."""
    shutil.copytree(sound / "run", tmp_path / "run")
    (tmp_path / "sound").symlink_to(sound / "run")
    shutil.copy(sound / "b.json", tmp_path / "b.json")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    return tmp_path


def call(*words: str) -> Result:
    """Run a command; whatever it is given, it ends as documented and executes nothing."""
    result = CliRunner().invoke(cli, list(words))
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert result.exit_code in DOCUMENTED
    assert "internal error" not in result.stderr
    assert "Traceback" not in result.output
    for line in result.output.splitlines():
        assert line.isprintable()
    assert not Path("executed").exists()
    return result


def check_refused(result: Result) -> None:
    """A sentence, and nothing on stdout."""
    assert result.exit_code in (2, 3)
    assert result.stdout == ""
    assert "Error: " in result.stderr


def test_the_sound_run_passes(room: Path) -> None:
    """So that what is refused below is refused for what was changed."""
    for words in (
        ["report", "run"],
        ["report", "run", "--out", "run.html"],
        ["compare", "run", "sound"],
        ["baseline", "update", "run", "--baseline", "b.json"],
    ):
        assert call(*words).exit_code == 0
    assert call("check", "run", "--baseline", "b.json").exit_code == 5  # of so few images
    assert len({*REFUSED, *READ}) == len(REFUSED) + len(READ) >= 150


@pytest.mark.parametrize("spoil", REFUSED.values(), ids=REFUSED.keys())
def test_a_folder_that_is_no_run_is_refused_in_a_sentence(room: Path, spoil: Spoil) -> None:
    spoil(room / "run")

    check_refused(call("report", "run", "--format", "html"))


def choose_form(name: str, others: Iterator[str]) -> str:
    """A format for a case: the page where there is something to be seen, else each in turn."""
    seen = ("picture", "maps", "class names", "hostile", "image")
    return "html" if any(word in name for word in seen) else next(others)


OTHERS = itertools.cycle(FORMATS)
LAID_OUT = [(spoil, choose_form(name, OTHERS)) for name, spoil in READ.items()]


@pytest.mark.parametrize(("spoil", "form"), LAID_OUT, ids=READ.keys())
def test_an_odd_run_is_laid_out(room: Path, spoil: Spoil, form: str) -> None:
    spoil(room / "run")

    assert call("report", "run").exit_code == 0
    assert call("report", "run", "--format", form).exit_code == 0
    call("check", "run", "--baseline", "b.json")
    call("compare", "sound", "run")
    call("baseline", "update", "run", "--baseline", "new.json")
    if Path("new.json").exists():
        assert call("check", "run", "--baseline", "new.json").exit_code in (0, 1, 5)


@pytest.mark.parametrize("make", BASELINES.values(), ids=BASELINES.keys())
def test_a_baseline_that_is_none_is_refused(room: Path, make: Callable[[str], str]) -> None:
    file = room / "b.json"
    file.write_text(make(file.read_text()))
    before = file.read_bytes()

    check_refused(call("check", "run", "--baseline", "b.json"))
    check_refused(call("baseline", "update", "run", "--baseline", "b.json"))
    assert file.read_bytes() == before


@pytest.mark.parametrize("content", ENCODED)
def test_a_baseline_that_is_no_text_is_refused(room: Path, content: bytes) -> None:
    (room / "b.json").write_bytes(content)

    check_refused(call("check", "run", "--baseline", "b.json"))
    check_refused(call("baseline", "update", "run", "--baseline", "b.json"))


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN.keys())
@pytest.mark.parametrize("name", ["robusteval.toml", "gates.toml"])
def test_settings_that_are_none_are_refused(room: Path, name: str, text: bytes) -> None:
    (room / name).write_bytes(text)

    words = [] if name == "robusteval.toml" else ["--config", name]
    check_refused(call("check", "run", *words))


@pytest.mark.parametrize("text", GATES.values(), ids=GATES.keys())
@pytest.mark.parametrize("name", ["robusteval.toml", "pyproject.toml"])
def test_gates_that_are_none_are_refused(room: Path, name: str, text: str) -> None:
    """In both spellings of one content."""
    (room / name).write_text(in_project(text) if name == "pyproject.toml" else text)

    check_refused(call("check", "run"))


def in_project(text: str) -> str:
    """The gates as ``pyproject.toml`` holds them."""
    text = text.replace("[[gate]]", "[[tool.robusteval.gate]]").replace(
        "[gate", "[tool.robusteval.gate"
    )
    return "[tool.robusteval]\n" + text


@pytest.mark.parametrize("text", ODD.values(), ids=ODD.keys())
def test_odd_gates_come_to_a_verdict(room: Path, text: str) -> None:
    (room / "robusteval.toml").write_text(text)

    assert call("check", "run").exit_code in (0, 1, 5)


@pytest.mark.parametrize("text", PRESETS.values(), ids=PRESETS.keys())
def test_presets_that_are_none_are_refused(room: Path, text: str | bytes) -> None:
    content = text.encode() if isinstance(text, str) else text
    (room / "mine.toml").write_bytes(content)

    result = call("evaluate", "none.safetensors", *NAMES, "--preset", "mine.toml")
    check_refused(result)
    assert "none.safetensors" not in result.stderr  # what is wrong is the preset


SPECIAL: dict[str, Callable[[Path], object]] = {
    "a folder": Path.mkdir,
    "a pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "holes": lambda path: write_sparse(path, 10**11),
}


@pytest.mark.parametrize("make", SPECIAL.values(), ids=SPECIAL.keys())
@pytest.mark.parametrize("below", ["run/run.json", "b.json", "robusteval.toml", "mine.toml"])
def test_what_is_no_ordinary_file_is_refused(
    room: Path, below: str, make: Callable[[Path], object]
) -> None:
    path = room / below
    path.unlink(missing_ok=True)
    make(path)
    words = ["check", "run", "--baseline", "b.json"]
    if below == "mine.toml":
        words = ["evaluate", "none.safetensors", *NAMES, "--preset", below]

    check_refused(call(*words))
