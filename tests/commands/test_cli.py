"""The command line: what it prints where, how it ends, and what it says to a mistake."""

from __future__ import annotations

import inspect
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from errno import ENOSPC
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from filelock import FileLock
from pasted import PAGES
from PIL import Image
from torch import Tensor, nn
from toys import Bands, synthetic

from robusteval import __version__
from robusteval.cli import cli
from robusteval.commands.listing import lay_out
from robusteval.commands.running import spell_command
from robusteval.commands.shell import writing_stdout
from robusteval.errors import RunError
from robusteval.registry import ATTACKS

ROOT = Path(__file__).parents[2]
CODES = {0, 1, 2, 3, 4, 5, 6, 130}
BANDS = ["--arch", "arch.py:Bands", "--mean", ".5", "--std", ".25"]
QUICK = ["--attack", "noise", "--samples", "9", "--no-probes"]

ARCHITECTURES = f"""
import sys
import torch
from torch import Tensor, nn

{inspect.getsource(Bands)}

def wider():
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3))

def loud():
    print("printed by the network")
    return Bands()

def breaks():
    raise ZeroDivisionError("no luck")
"""


class Marker:
    """Leaves a file where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("executed"),)


@pytest.fixture(scope="session")
def materials(tmp_path_factory: pytest.TempPathFactory, trained_bands: Bands, npz: Path) -> Path:
    """A folder with a network, its architecture, its data, and everything that is wrong."""
    folder = tmp_path_factory.mktemp("materials")
    state = trained_bands.state_dict()
    torch.save(state, folder / "net.pt")
    torch.save({"layer": Marker()}, folder / "evil.pt")
    (folder / "evil.pkl").write_bytes(pickle.dumps(Marker()))
    (folder / "empty.pt").touch()
    (folder / "torn.pt").write_bytes((folder / "net.pt").read_bytes()[:2000])
    (folder / "page.pt").write_text("<!DOCTYPE html><html><body>404</body></html>")
    (folder / "pointer.pt").write_text("version https://git-lfs.github.com/spec/v1\nsize 9\n")
    (folder / "words.pt").write_text("not weights at all")
    (folder / "arch.py").write_text(ARCHITECTURES)
    shutil.copy(npz, folder / "bands.npz")
    x, y = synthetic(60, seed=1)
    arrays: dict[str, tuple[Any, Any]] = {
        "none": (x[:0], y[:0]),
        "classes": (x, y + 5),
        "shifted": (x, (y + 1) % 3),
        "normalised": (((x / 255 - 0.5) / 0.25).astype(np.float32), y),
        "bytes": (x.astype(np.float32), y),
    }
    for name, (images, labels) in arrays.items():
        np.savez(folder / f"{name}.npz", x=images, y=labels)
    for image, label in zip(x[:9], y[:9], strict=True):
        sub = folder / "photos" / f"class{label}"
        sub.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(sub / f"{len(list(sub.iterdir()))}.png")
    shutil.copytree(folder / "photos", folder / "damaged")
    damaged = folder / "damaged" / "class1" / "0.png"
    damaged.write_bytes(damaged.read_bytes()[:100])
    (folder / "bare").mkdir()
    for name in ("pgd-2.npz", "pgd-1.npz"):
        (folder / "kept" / name).parent.mkdir(exist_ok=True)
        (folder / "kept" / name).touch()
    (folder / "list.csv").write_text("file,label\nphotos/class1/99.png,1\n")
    return folder


@pytest.fixture
def desk(materials: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder of its own with all the materials in it."""
    shutil.copytree(materials, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ROBUSTEVAL_CACHE", str(tmp_path / "cache"))
    return tmp_path


def ran(*words: str) -> Result:
    """The command in this process; whatever happens, it ends as documented."""
    result = CliRunner().invoke(cli, list(words))
    assert result.exit_code in CODES
    assert "Traceback" not in result.stderr
    return result


def evaluated(*words: str, checkpoint: str = "net.pt") -> Result:
    """An evaluation of the small network; later words override the earlier."""
    return ran("evaluate", checkpoint, *BANDS, "--data", "bands.npz", *words)


def test_an_evaluation_prints_the_report_and_keeps_the_run(desk: Path) -> None:
    """The report on stdout, progress on stderr, a folder below runs/."""
    result = evaluated("--attack", "pgd:eps=12/255,steps=5", "--samples", "9")

    assert result.exit_code == 0
    assert result.stdout.startswith("Robust accuracy ")
    assert result.stderr.startswith("Reading data: done\nClean accuracy: done\npgd:eps=12/255")
    (folder,) = (desk / "runs").iterdir()
    assert folder.name.startswith("net-")
    assert ran("report", str(folder)).stdout.startswith(result.stdout.partition("\n")[0])


def test_the_same_command_continues(desk: Path) -> None:
    """Finished parts are not computed again, and the report is the same to the second."""
    first, second = evaluated(*QUICK), evaluated(*QUICK)

    assert second.stdout == first.stdout
    assert second.stderr == "Reading data: done\n"


@pytest.mark.filterwarnings("always")
def test_json_on_stdout_is_nothing_but_json(desk: Path) -> None:
    """Also where the network's own code prints and warns; of a warning without its place."""
    with (desk / "arch.py").open("a") as code:
        code.write("import warnings\nwarnings.warn('careful\\nplease', stacklevel=1)\n")

    result = evaluated(*QUICK, "--arch", "arch.py:loud", "--format", "json")

    assert json.loads(result.stdout)["complete"]
    assert result.stderr.startswith("UserWarning: careful please\nprinted by the network\n")


@pytest.mark.parametrize("form", ["table", "json", "markdown"])
def test_report_prints_a_run_again(desk: Path, form: str) -> None:
    """Everything that the evaluation printed, in each format."""
    first = evaluated(*QUICK, "--out", "run", "--format", form)

    again = ran("report", "run", "--format", form)

    assert (again.exit_code, again.stdout, again.stderr) == (0, first.stdout, "")


def test_the_demo_needs_nothing(desk: Path) -> None:
    """It is trained, and the bar says so; then it is like any other checkpoint."""
    result = ran("evaluate", "demo", "--samples", "5", "--attack", "fgsm", "--no-probes")

    assert result.exit_code == 0
    assert "Training the demo network: done\n" in result.stderr
    assert "robusteval:digits_cnn" in result.stdout


def test_more_samples_than_there_are_is_said(desk: Path) -> None:
    """The number in the report is what was evaluated."""
    result = evaluated("--attack", "noise", "--no-probes", "--samples", "61")

    assert result.stderr.startswith(
        "bands.npz (x) has no more than 60 images: all are taken.\nReading data: done\n"
    )
    assert "n = 60" in result.stdout


def test_eps_is_for_the_preset(desk: Path) -> None:
    """All its attacks get the radius."""
    result = evaluated("--eps", "3/255", "--samples", "3", "--no-probes", "--format", "json")

    assert [attack["spec"] for attack in json.loads(result.stdout)["attacks"]] == [
        "quick:norm=linf,eps=3/255",
    ]


def test_a_preset_file_sets_samples_and_seed(desk: Path) -> None:
    """Unless the command line does."""
    (desk / "mine.toml").write_text('attack = ["noise"]\nsamples = 4\nseed = 5\n')

    result = evaluated("--preset", "mine.toml", "--samples", "3", "--no-probes", "--format", "json")

    config = json.loads(result.stdout)["provenance"]["config"]
    assert (config["samples"], config["seed"]) == (3, 5)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("nope.pt", "there is no file nope.pt"),
        ("photos", "photos is a folder without a config.json: give the file with the weights"),
        ("empty.pt", "empty.pt is empty; download or copy it again"),
        ("torn.pt", "torn.pt is truncated or damaged; download or copy it again"),
        ("page.pt", "page.pt is a web page (HTML), not weights: download the file itself"),
        ("pointer.pt", "pointer.pt is a Git LFS pointer, not the weights: run `git lfs pull`"),
        (
            "words.pt",
            "words.pt has no format known here: safetensors files and PyTorch state dicts (.pt,"
            " .pth) are read, ONNX, TensorFlow and Keras files are not",
        ),
    ],
)
def test_a_file_that_holds_no_weights_is_refused(desk: Path, name: str, sentence: str) -> None:
    """Nothing is written."""
    result = evaluated(*QUICK, checkpoint=name)

    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"Error: {sentence}\n"
    assert not (desk / "runs").exists()


@pytest.mark.parametrize("name", ["evil.pt", "evil.pkl"])
def test_a_file_that_could_run_code_ends_with_four(desk: Path, name: str) -> None:
    """And nothing in it is executed."""
    result = evaluated(*QUICK, checkpoint=name)

    assert result.exit_code == 4
    assert result.stderr.startswith(f"Error: {name} was not opened, because that could run code")
    assert not (desk / "executed").exists()


def test_weights_of_another_network_are_shown_as_a_difference(desk: Path) -> None:
    """A likely reason and counts; with -v what is missing, unexpected, or of another shape."""
    result = evaluated(*QUICK, "--arch", "arch.py:wider")

    assert result.exit_code == 2
    first, *lines = result.stderr.splitlines()
    assert first.startswith("Error: the weights in net.pt do not fit arch.py:wider: no name is in")
    assert [line.split(",")[0] for line in lines] == ["  tensors: 4 missing"]
    lines = evaluated(*QUICK, "--arch", "arch.py:wider", "-v").stderr.splitlines()
    assert "  missing: 0.weight (6, 3, 3, 3)" in lines
    assert "  unexpected: linear.bias (3,)" in lines


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--arch", "arch.py:Band"], "arch.py:Band: there is no function Band; there is Bands"),
        (["--arch", "nope.py:Bands"], "there is no file nope.py to take the architecture from"),
        (
            ["--arch", "arch.py:breaks"],
            "arch.py:breaks raised ZeroDivisionError: no luck, in arch.py, line 29",
        ),
        (
            ["--arch", "torchvision:resnet81"],
            "torchvision has no classifier resnet81; there is resnet18, resnet152, resnet101",
        ),
        (["--std", "0"], "the std given must be positive in every channel"),
        (["--num-classes", "4"], "arch.py:Bands has 3 outputs, not 4 (--num-classes)"),
        (
            ["--device", "nonsense"],
            "'nonsense' is not a device: use auto, cpu, cuda, cuda:1 or mps",
        ),
    ],
)
def test_a_mistake_about_the_model_is_one_sentence(
    desk: Path, words: list[str], sentence: str
) -> None:
    """Without a traceback, and with code 2."""
    result = evaluated(*QUICK, *words)

    assert (result.exit_code, result.stdout, result.stderr) == (2, "", f"Error: {sentence}\n")


def test_a_gpu_that_is_not_there_is_refused(desk: Path) -> None:
    """Before any work."""
    result = evaluated(*QUICK, "--device", "cuda:99")

    assert result.exit_code == 2
    assert result.stderr.startswith("Error: there is no device cuda:99 here: ")


def test_without_an_architecture_the_forms_are_shown(desk: Path) -> None:
    """Weights do not say what network they are of."""
    result = ran("evaluate", "net.pt", "--data", "bands.npz")

    assert result.exit_code == 2
    assert "give --arch as torchvision:NAME, robusteval:NAME, timm:NAME" in result.stderr


def test_without_data_the_way_to_the_forms_is_shown(desk: Path) -> None:
    """Only the demo has data of its own."""
    result = ran("evaluate", "net.pt", *BANDS)

    assert (result.exit_code, result.stderr) == (
        2,
        "Error: say what to attack with --data; `robusteval list data` shows the forms\n",
    )


@pytest.mark.parametrize(
    ("data", "code", "sentence"),
    [
        ("none.npz", 5, "none.npz (x) holds no images: there is nothing to evaluate"),
        (
            "classes.npz",
            2,
            "the labels of classes.npz (x) run from 5 to 7, the network answers with classes"
            " 0 to 2: check that data and checkpoint belong together",
        ),
        ("nope.npz", 2, "there is no file or folder nope.npz: check the path"),
        ("bare", 2, "bare needs one sub-folder of images per class and has none"),
        (
            "kept",
            2,
            "kept needs one sub-folder of images per class and has none; or name its arrays,"
            " kept/pgd-1.npz",
        ),
        (
            "list.csv",
            2,
            "list.csv, line 2: there is no file photos/class1/99.png; paths are relative to the"
            " CSV",
        ),
    ],
)
def test_a_mistake_about_the_data_is_one_sentence(
    desk: Path, data: str, code: int, sentence: str
) -> None:
    """Nothing is written."""
    result = evaluated("--attack", "noise", "--data", data)

    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr == f"Error: {sentence}\n"
    assert not (desk / "runs").exists()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("normalised.npz", "normalised.npz (x) looks normalised (min "),
        ("bytes.npz", "bytes.npz (x) looks like 0..255 stored as float (max "),
        ("cifar11:photos", "'cifar11:photos' is neither a data set nor a path (did you mean"),
        ("digits", "the model takes 3 channels, the images of digits (held out) have 1: "),
        ("damaged", "damaged/class1/0.png cannot be read ("),
    ],
)
def test_data_that_does_not_fit_is_refused(desk: Path, data: str, words: str) -> None:
    """Never guessed."""
    result = evaluated("--attack", "noise", "--data", data)

    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.removeprefix("Reading data: done\n").startswith(f"Error: {words}")


def test_images_of_a_size_that_the_network_cannot_take_are_refused(desk: Path) -> None:
    """It is found before there is a run folder."""
    result = evaluated(*QUICK, "--size", "24")

    assert result.exit_code == 2
    assert result.stderr.startswith("Error: the network cannot take images (3, 24, 24)")
    assert not (desk / "runs").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["pgdd"],
            f"unknown attack 'pgdd' (did you mean 'pgd'?): known are {', '.join(ATTACKS.entries)}",
        ),
        (["noise:eps=x"], "noise: eps must be a number or a fraction such as 8/255, not 'x'"),
        (
            ["noise:trys=3"],
            "unknown parameter of noise 'trys' (did you mean 'tries'?): known are targeted, norm,"
            " eps, tries",
        ),
        (["noise:eps"], "'noise:eps': write NAME:key=value,key=value, each key once"),
        ([""], "'': write NAME:key=value,key=value"),
        (
            ["noise:eps=-1"],
            "noise: eps must be from 0 to 1 for linf, in units of the [0, 1] pixel range"
            " (8/255 is eight grey levels), not -1",
        ),
        (
            ["noise:eps=8"],
            "noise: eps must be from 0 to 1 for linf, in units of the [0, 1] pixel range"
            " (8/255 is eight grey levels), not 8",
        ),
        (
            ["noise:norm=l2,eps=1e30"],
            "noise: eps must be from 0 to 20.7846 for l2 on images of 3x12x12, in units of the"
            " [0, 1] pixel range (8/255 is eight grey levels), not 1e+30",
        ),
        (
            ["noise", "noise:eps=8/255"],
            "the same attack is asked for twice: noise, noise:eps=8/255",
        ),
    ],
)
def test_a_mistake_about_an_attack_is_one_sentence(
    desk: Path, words: list[str], sentence: str
) -> None:
    """With the known names listed."""
    result = evaluated(*(part for word in words for part in ("--attack", word)))

    assert (result.exit_code, result.stdout, result.stderr) == (2, "", f"Error: {sentence}\n")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("art:squareattack", "unknown ART attack 'squareattack' (did you mean 'SquareAttack'?): "),
        ("art:SquareAttack:foo=1", "unknown parameter of art:SquareAttack 'foo': known are norm,"),
        ("art:SquareAttack:max_iter=x", "art:SquareAttack: max_iter must be a whole number, not"),
        ("art:SquareAttack:eps=-1", "art:SquareAttack: "),
        ("art:SquareAttack:eps=8", "art:SquareAttack: eps must be from 0 to 1 for linf, in units"),
        (
            "art:SquareAttack:norm=2,eps=33",
            "art:SquareAttack: eps must be from 0 to 20.7846 for l2 on images of 3x12x12, in units",
        ),
    ],
)
def test_a_mistake_about_an_attack_of_art_is_one_sentence(
    desk: Path, spec: str, words: str
) -> None:
    """Whether we find it or ART does."""
    result = evaluated("--attack", spec)

    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"Error: {words}")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--preset", "nope.toml"], "cannot read the preset nope.toml: No such file or directory"),
        (
            ["--attack", "pgd", "--eps", "4/255"],
            "--eps is for the attacks of a preset: write --attack NAME:eps=...",
        ),
        (
            ["--preset", "near.toml", "--eps", "4/255"],
            "no attack of the preset near.toml has a radius that --eps could set",
        ),
    ],
)
def test_a_mistake_about_a_preset_is_one_sentence(
    desk: Path, words: list[str], sentence: str
) -> None:
    """What a file may hold is tested with the presets."""
    (desk / "near.toml").write_text('attack = ["art:DeepFool"]')

    result = evaluated(*words)

    assert (result.exit_code, result.stdout, result.stderr) == (2, "", f"Error: {sentence}\n")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["evalute"], "No such command 'evalute'. Did you mean 'evaluate'?"),
        (["evaluate"], "name a checkpoint"),
        (["report"], "Missing argument 'RUN...'."),
        (
            ["list", "nope"],
            "Invalid value for '[WHAT]': 'nope' is not one of 'attacks', 'def",
        ),
        (["evaluate", "demo", "--sampels", "3"], "No such option '--sampels'. (Did you mean"),
        (
            ["evaluate", "demo", "--samples", "0"],
            "Invalid value for '--samples': 0 is not in the range x>=1.",
        ),
        (
            ["evaluate", "demo", "--samples", "x"],
            "Invalid value for '--samples': 'x' is not a valid whole number.",
        ),
        (["evaluate", "demo", "--seed", "-1"], "Invalid value for '--seed': -1 is not in the"),
        (
            ["evaluate", "demo", "--batch-size", "x"],
            "Invalid value for '--batch-size': 'x' is neither a whole number above 0 nor 'auto'",
        ),
        (["evaluate", "demo", "--batch-size", "0"], "Invalid value for '--batch-size': '0' is nei"),
        (
            ["evaluate", "demo", "--split", "val"],
            "Invalid value for '--split': 'val' is not one of",
        ),
        (
            ["evaluate", "demo", "--mean", ".5,x"],
            "Invalid value for '--mean': 'x' is not a number or a fraction such as 8/255",
        ),
        (
            ["evaluate", "demo", "--eps", "1,2"],
            "Invalid value for '--eps': '1,2' is not a number or a fraction such as 8/255",
        ),
        (
            ["evaluate", "demo", "--eps", "-1/255"],
            "Invalid value for '--eps': '-1/255' is negative",
        ),
        (["evaluate", "demo", "--format", "xml"], "Invalid value for '--format': 'xml' is not one"),
    ],
)
def test_a_command_that_makes_no_sense_ends_with_two(words: list[str], sentence: str) -> None:
    """The nearest name is suggested."""
    result = ran(*words)

    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.splitlines()[-1].startswith(f"Error: {sentence}")


def test_without_a_command_the_help_is_shown() -> None:
    """As an error, on stderr: nothing was done."""
    result = ran()

    assert (result.exit_code, result.stdout) == (2, "")
    assert "Start with `robusteval evaluate demo`." in result.stderr


@pytest.mark.parametrize("words", [["-h"], ["--help"], ["evaluate", "-h"], ["list", "--help"]])
def test_help_is_asked_for_with_a_long_or_a_short_option(words: list[str]) -> None:
    """On stdout."""
    result = ran(*words)

    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith("Usage: ")


def test_the_version_is_shown() -> None:
    """On stdout."""
    assert ran("--version").stdout == f"robusteval, version {__version__}\n"


@pytest.mark.parametrize("out", ["/dev/null/run", "arch.py", "arch.py/run"])
def test_a_folder_that_cannot_be_written_is_refused(desk: Path, out: str) -> None:
    """Root is not asked for permission, but a file is no folder for anybody."""
    result = evaluated(*QUICK, "--out", out)

    assert result.exit_code == 2
    assert f"Error: cannot write to {out} (" in result.stderr
    assert result.stderr.endswith("): choose another --out\n")


@pytest.mark.parametrize("fresh", [[], ["--fresh"]])
def test_a_folder_with_other_files_is_left_alone(desk: Path, fresh: list[str]) -> None:
    """Above all when it is to be emptied."""
    before = sorted(desk.rglob("*"))

    result = evaluated(*QUICK, "--out", ".", *fresh)

    assert result.exit_code == 2
    assert "Error: . holds other files: choose an empty folder for --out\n" in result.stderr
    assert sorted(desk.rglob("*")) == before


def test_a_folder_with_another_run_is_refused_until_it_may_be_thrown_away(desk: Path) -> None:
    """The difference is shown."""
    evaluated(*QUICK, "--out", "run")

    refused = evaluated(*QUICK, "--out", "run", "--seed", "1")
    allowed = evaluated(*QUICK, "--out", "run", "--seed", "1", "--fresh")

    assert refused.exit_code == 2
    assert "run holds a run with other settings; choose another --out, or --fresh" in refused.stderr
    assert "  seed: 0 there, 1 here\n" in refused.stderr
    assert allowed.exit_code == 0


def test_a_second_process_in_one_folder_ends_with_three(desk: Path) -> None:
    """Two writers would spoil each other's run."""
    (desk / "run").mkdir()
    with FileLock(desk / "run" / ".lock"):
        result = evaluated(*QUICK, "--out", "run")

    assert result.exit_code == 3
    assert result.stderr.endswith(
        "Error: another process is writing to run: wait for it, or choose another --out\n"
    )


def test_nothing_classified_correctly_ends_with_five(desk: Path) -> None:
    """The report says why there is no number."""
    result = evaluated("--attack", "noise", "--no-probes", "--data", "shifted.npz")

    assert result.exit_code == 5
    assert "Nothing was" in result.stdout
    assert result.stderr.endswith(
        "Error: no image is classified correctly, so there is nothing to attack\n"
    )


@pytest.mark.parametrize("shift", [1, 2])
def test_numbers_not_to_be_used_end_with_six(desk: Path, shift: int) -> None:
    """The report is printed all the same; `report` only shows it."""
    with np.load("bands.npz") as arrays:  # a few labels are right, so that there is a number
        labels = (arrays["y"] + shift) % 3
        labels[:9] = arrays["y"][:9]
        np.savez("misfed.npz", x=arrays["x"], y=labels)

    result = evaluated("--attack", "noise", "--no-probes", "--data", "misfed.npz", "--out", "run")

    assert result.exit_code == 6
    assert result.stdout.startswith("Not to be used: ")
    assert "Error: the numbers are not to be used (" in result.stderr
    assert ran("report", "run").exit_code == 0


def test_with_gates_they_decide_over_numbers_not_to_be_used(desk: Path) -> None:
    """One for a gate that fails; what is allowed is no mistake."""
    with np.load("bands.npz") as arrays:
        labels = np.where(np.arange(60) < 9, arrays["y"], (arrays["y"] + 1) % 3)
        np.savez("misfed.npz", x=arrays["x"], y=labels)
    asked = ("--attack", "noise", "--no-probes", "--data", "misfed.npz", "--check")
    Path("robusteval.toml").write_text("[[gate]]\nfloor = 0.01\n")

    assert evaluated(*asked).exit_code == 1
    allowed = 'allow = ["convention", "labels-permuted", "guessing", "weak-attacks"]\n'
    Path("robusteval.toml").write_text(f"{allowed}[[gate]]\nfloor = 0.01\n")
    assert evaluated(*asked).exit_code == 0


def test_a_file_that_is_not_there_is_said_before_anything_else(desk: Path) -> None:
    result = ran("evaluate", "nix.pth")

    assert result.exit_code == 2
    assert result.stderr == "Error: there is no file nix.pth\n"


@pytest.mark.parametrize("name", ["q.tex", "report.html", "out/run.json", "net.PTH"])
def test_a_file_is_no_run_folder(desk: Path, name: str) -> None:
    """A name that is a file's would become a folder of this name."""
    result = evaluated(*QUICK, "--out", name)

    assert result.exit_code == 2
    assert f"--out {Path(name).with_suffix('')}, and write a report" in result.stderr
    assert not Path(name).exists()


def test_a_run_folder_may_have_a_dot(desk: Path) -> None:
    assert evaluated(*QUICK, "--out", "run.v2").exit_code == 0
    assert (desk / "run.v2" / "run.json").exists()


def replaced(monkeypatch: pytest.MonkeyPatch, act: Any) -> None:
    """Let `fgsm` do something else to each batch that it is given."""
    ATTACKS.load("fgsm")

    def perturb(model: nn.Module, x: Tensor, y: Tensor, **_: object) -> Tensor:
        if len(x):
            act()
        return x

    monkeypatch.setitem(ATTACKS._functions, "fgsm", perturb)


@pytest.fixture
def broken_fgsm(monkeypatch: pytest.MonkeyPatch) -> None:
    """`fgsm` raises."""

    def act() -> None:
        raise ZeroDivisionError("no luck")

    replaced(monkeypatch, act)


@pytest.mark.usefixtures("broken_fgsm")
def test_one_attack_that_breaks_ends_with_three(desk: Path) -> None:
    """The others are reported, and again from the folder."""
    result = evaluated("--attack", "fgsm", "--attack", "noise", "--out", "run", "--format", "json")

    assert result.exit_code == 3
    assert result.stderr.endswith("Error: 1 of 2 attacks have no result\n")
    for record in (
        json.loads(result.stdout),
        json.loads(ran("report", "run", "--format", "json").stdout),
    ):
        assert [attack["spec"] for attack in record["attacks"]] == ["noise"]
        assert list(record["failures"]) == ["fgsm"]
        assert re.fullmatch(
            r"the attack broke \(ZeroDivisionError: no luck, in test_cli\.py, line \d+\)",
            record["failures"]["fgsm"],
        )
        assert not record["complete"]


def test_code_that_ends_the_program_cannot_make_it_look_well(
    desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 0 is for evaluations."""
    replaced(monkeypatch, lambda: sys.exit(0))

    result = evaluated("--attack", "fgsm")

    assert result.exit_code == 3
    assert result.stderr.endswith("Error: the network or an attack tried to end the program\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_finishes_the_batch(
    desk: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """What is finished is saved, and the same command continues."""
    words = ["--attack", "fgsm", "--no-probes", "--batch-size", "20", "--out", "run"]
    with monkeypatch.context() as patch:
        replaced(patch, lambda: signal.raise_signal(number))
        stopped = evaluated(*words)
    parts = list((desk / "run").rglob("*.parts/*.npz"))

    continued = evaluated(*words)

    assert stopped.exit_code == 130
    assert stopped.stdout == ""
    assert "Stopping after this step; press Ctrl-C again to stop at once.\n" in stopped.stderr
    assert stopped.stderr.endswith("Stopped; the same command continues where this one ended.\n")
    assert len(parts) == 1
    assert continued.exit_code == 0


def test_the_second_signal_stops_at_once(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a batch; the same command would throw the rest away."""

    def act() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("it went on")

    replaced(monkeypatch, act)

    result = evaluated("--attack", "fgsm", "--fresh")

    assert result.exit_code == 130
    assert result.stderr.endswith(
        "Stopped; the same command without --fresh continues where this one ended.\n"
    )


def test_signals_are_left_as_they_were(desk: Path) -> None:
    """After an evaluation Ctrl-C means what it meant."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    evaluated(*QUICK)

    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


PROCESS = [sys.executable, "-m", "robusteval"]


def test_a_signal_while_loading_ends_the_process(desk: Path) -> None:
    """Nothing is there to be saved; torch would abort if an exception came while it is imported."""
    with (desk / "arch.py").open("a") as code:
        code.write("import signal\nsignal.raise_signal(signal.SIGINT)\n")

    done = subprocess.run(
        [*PROCESS, "evaluate", "net.pt", *BANDS, "--data", "bands.npz"],
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.returncode, done.stdout, done.stderr) == (130, "", "Stopped.\n")


def test_ctrl_c_stops_a_real_process_and_keeps_what_it_has(desk: Path) -> None:
    """From outside, once, in the first batch of an attack that takes minutes."""
    slow = "pgd:eps=1/255,steps=1000,restarts=9,stop=never"
    words = ["evaluate", "net.pt", *BANDS, "--data", "bands.npz", "--attack", slow]
    process = subprocess.Popen(
        [*PROCESS, *words, "--out", "run"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("Clean accuracy"):
            break
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate()

    assert (process.returncode, output) == (130, "")
    said = [line for line in errors.splitlines() if not line.startswith("The attacks take about")]
    assert sorted(said) == [
        "Stopped; the same command continues where this one ended.",
        "Stopping after this step; press Ctrl-C again to stop at once.",
    ]
    assert ran("report", "run").stdout.startswith("Incomplete: 0 of 1 attacks finished.")


@pytest.mark.parametrize("words", [["list"], ["report", "run"], ["evaluate", "--help"]])
def test_a_reader_that_leaves_early_is_no_failure(desk: Path, words: list[str]) -> None:
    """`robusteval list | head -1`."""
    evaluated(*QUICK, "--out", "run")
    reading, writing = os.pipe()
    os.close(reading)

    done = subprocess.run(
        [*PROCESS, *words], stdout=writing, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writing)

    assert (done.returncode, done.stderr) == (0, "")


def test_a_disk_that_is_full_is_a_sentence() -> None:
    """`robusteval list > /full/disk/file`."""
    with pytest.raises(RunError) as caught, writing_stdout():
        raise OSError(ENOSPC, "No space left on device")

    assert str(caught.value) == "cannot write to stdout: No space left on device"


LIGHT = [
    "--help",
    "evaluate --help",
    "evaluate demo --attack pgdd",
    "list",
    "list --json",
    "report run",
    "report run --format json",
    "report run --format markdown",
]


def test_what_should_be_quick_imports_nothing_heavy(desk: Path) -> None:
    """Neither torch nor ART, nor what takes its time besides."""
    evaluated(*QUICK, "--out", "run")
    code = (
        "import sys\nfrom robusteval.cli import cli\n"
        "for words in sys.argv[1:]:\n"
        "    try: cli.main(words.split())\n    except SystemExit as end: code = end.code or 0\n"
        "    heavy = {'torch', 'torchvision', 'art', 'scipy', 'sklearn'} & set(sys.modules)\n"
        "    print('heavy:', words, code, sorted(heavy), file=sys.stderr)"
    )

    done = subprocess.run(
        [sys.executable, "-c", code, *LIGHT], capture_output=True, text=True, check=True
    )

    told = [line for line in done.stderr.splitlines() if line.startswith("heavy:")]
    codes = [2 if "pgdd" in words else 0 for words in LIGHT]
    assert told == [f"heavy: {words} {code} []" for words, code in zip(LIGHT, codes, strict=True)]


def test_a_folder_that_holds_no_run_cannot_be_reported(desk: Path) -> None:
    """Nor one that is not there."""
    for name in ("bare", "nope"):
        result = ran("report", name)

        assert (result.exit_code, result.stderr) == (
            2,
            f"Error: {name} is not the folder of a run: there is no run.json in it\n",
        )


def test_a_damaged_run_is_not_reported(desk: Path) -> None:
    """The record, or the samples behind it."""
    evaluated(*QUICK, "--out", "run")
    cell = next((desk / "run" / "samples").glob("*.npz"))
    cell.write_bytes(cell.read_bytes()[:-1])
    changed = ran("report", "run")
    (desk / "run" / "run.json").write_text("{")
    torn = ran("report", "run")

    assert (changed.exit_code, torn.exit_code) == (3, 2)
    assert changed.stderr.endswith("run the evaluation again to restore it\n")
    assert torn.stderr == "Error: run/run.json is not the record of a run, or it is damaged\n"


def test_names_from_outside_cannot_steer_the_terminal(desk: Path) -> None:
    """Codes in a file name are spelled out in messages."""
    folder = desk / "photos" / "\x1b[31mred"
    folder.mkdir()
    (folder / "a\x1b]0;title\x07.png").write_bytes(b"no image")

    result = evaluated("--attack", "noise", "--data", "photos")

    assert result.exit_code == 2
    assert "\x1b" not in result.stderr
    assert r"photos/\x1b[31mred/a\x1b]0;title\x07.png cannot be read" in result.stderr


def test_an_error_of_our_own_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """The traceback is for those who ask for it."""

    def act(_: Path) -> None:
        raise ZeroDivisionError("no luck")

    monkeypatch.setattr("robusteval.commands.report.load_run", act)
    monkeypatch.delenv("ROBUSTEVAL_TRACEBACK", raising=False)
    quiet = ran("report", "run")
    monkeypatch.setenv("ROBUSTEVAL_TRACEBACK", "1")
    loud = CliRunner().invoke(cli, ["report", "run"])

    assert (quiet.exit_code, loud.exit_code) == (3, 3)
    assert quiet.stderr == (
        "Error: internal error (ZeroDivisionError: no luck). This is a bug in robusteval:"
        " please report it, with what ROBUSTEVAL_TRACEBACK=1 prints.\n"
    )
    assert loud.stderr.startswith("Traceback")


def test_the_command_is_kept_without_the_folders_of_its_user(
    desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It still works when it is pasted into a shell."""
    home = desk.parent / "home"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(
        "sys.argv",
        ["/x", "evaluate", f"{desk}/net.pt", f"--data={home}/my data", "--out", f"{home}/run", ""],
    )

    assert spell_command() == (
        """robusteval evaluate net.pt --data="$HOME"/'my data' --out "$HOME"/run ''"""
    )


def test_list_shows_everything_there_is() -> None:
    """A heading for each kind; specs are not cut."""
    result = ran("list")

    assert (result.exit_code, result.stderr) == (0, "")
    headings = [line for line in result.stdout.splitlines() if line and line[0] != " "]
    kinds = ["attacks", "defenses", "interpreters", "data", "formats", "presets", "terms"]
    assert headings == kinds
    assert "…" not in result.stdout
    assert "interpreter=cam,settings=fast,edges=inverse,eps=8/255\n" in result.stdout
    assert "where does nothing unless guide is not change\n" in result.stdout


@pytest.mark.parametrize(
    "what", ["attacks", "defenses", "interpreters", "data", "formats", "presets"]
)
def test_list_shows_one_kind_as_json(what: str) -> None:
    """Nothing but JSON; a line on each."""
    content = json.loads(ran("list", what, "--json").stdout)

    assert list(content) == [what]
    assert all(item["name"] and item["summary"] for item in content[what])


class Screen(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self) -> bool:
        return True


def test_lists_are_wrapped_for_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """At blanks; what one would copy stays whole."""
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr("sys.stdout", Screen())
    item = {"name": "mine", "summary": "word " * 20, "attack": ["art:" + "x" * 60]}

    lines = "\n".join(lay_out({"presets": [item]})).split("\n")

    assert max(len(line) for line in lines if "x" not in line) <= 40
    assert " " * 8 + "art:" + "x" * 60 in lines


def walked(group: click.Group, *words: str) -> Iterator[tuple[str, click.Command]]:
    """Every command below a group, by the words it is called with."""
    for name, command in group.commands.items():
        yield " ".join([*words, name]), command
        if isinstance(command, click.Group):
            yield from walked(command, *words, name)


COMMANDS: dict[str, click.Command] = {"robusteval": cli, **dict(walked(cli))}


def options() -> Iterator[str]:
    """Every long option."""
    yield "--help"
    for command in COMMANDS.values():
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                yield from (name for name in parameter.opts if name.startswith("--"))


@pytest.mark.parametrize(("name", "command"), COMMANDS.items(), ids=COMMANDS.keys())
def test_every_command_option_and_argument_has_help(name: str, command: click.Command) -> None:
    """Arguments are explained in the text of their command."""
    assert command.help
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{name} {parameter.opts[0]}"
        else:
            assert parameter.human_readable_name.strip("[.]") in command.help


@pytest.mark.parametrize(("name", "command"), COMMANDS.items(), ids=COMMANDS.keys())
def test_help_fits_eighty_columns(name: str, command: click.Command) -> None:
    """And any terminal can show it."""
    words = [] if command is cli else name.split()

    shown = CliRunner().invoke(cli, [*words, "--help"], terminal_width=80).stdout

    assert shown.isascii()
    assert max(map(len, shown.splitlines())) <= 80


def test_the_help_of_evaluate_has_headings_and_examples() -> None:
    """There are too many options for one list."""
    shown = ran("evaluate", "--help").stdout

    for heading in ("Examples", "Model", "Data", "Attacks", "Run"):
        assert f"\n{heading}:\n" in shown or f"\n  {heading}:\n" in shown
    assert shown.count("    robusteval evaluate ") == 3


@pytest.mark.parametrize("word", sorted({*COMMANDS, *options()}))
def test_every_command_and_option_is_in_a_readme(word: str) -> None:
    """What is not written down is not there; in the README or in that of a folder."""
    assert any(word in page.read_text(encoding="utf-8") for page in PAGES)
