"""`robusteval train`: options in, a checkpoint and two sentences out."""

from __future__ import annotations

import json
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result
from toys import synthetic

from robusteval.commands.shell import Commands
from robusteval.commands.train import train
from robusteval.defenses.training_settings import TrainingSettings
from robusteval.models import checkpoint
from robusteval.models.weights import CHECKSUM

QUICK = ("--epochs", "1", "--steps", "2", "--batch-size", "16", "--held-out", "8")


def ran(*words: str) -> Result:
    group = Commands("robusteval")
    group.add_command(train)
    result = CliRunner().invoke(group, ["train", *words])
    assert "Traceback" not in result.stderr
    assert "internal error" not in result.stderr
    return result


@pytest.fixture(autouse=True)
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with grey images in two parts, and with colour images in one."""
    monkeypatch.chdir(tmp_path)
    x, y = synthetic(60, 0)
    z, w = synthetic(30, 1)
    grey, other = (images.mean(3).astype(np.uint8) for images in (x, z))
    np.savez("parts.npz", x_train=grey, y_train=y, x_test=other, y_test=w)
    np.savez("one.npz", x=x, y=y)
    return tmp_path


def notes(path: str) -> dict[str, object]:
    raw = Path(path).read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    found = header["__metadata__"]
    del found[CHECKSUM]
    return {key: json.loads(text) for key, text in found.items()}


def test_command_ends_with_the_command_that_measures() -> None:
    asked = ("--data", "parts.npz", "--arch", "robusteval:digits_cnn", "--out", "net.safetensors")
    result = ran(*asked, *QUICK, "--eps", "4/255", "--objective", "int_adv", "--seed", "3")

    assert result.exit_code == 0, result.stderr
    assert "net.safetensors holds epoch 1 of 1; net.history.json and net.curve.png" in result.stdout
    assert "Of 8 images held out of parts.npz" in result.stdout
    assert " under PGD with 4 steps at eps 4/255." in result.stdout
    assert result.stdout.endswith(
        "  robusteval evaluate net.safetensors --data parts.npz"
        " --attack pgd:eps=4/255,steps=100,restarts=5\n"
    )
    assert "Epoch 1 of 1: loss " in result.stderr
    assert " images/s, about 0 s left" in result.stderr
    assert checkpoint.load("net.safetensors").num_classes == 3
    training = notes("net.safetensors")["training"]
    assert isinstance(training, dict)
    assert training["objective"] == "int_adv"
    assert training["seed"] == 3


def test_data_without_another_part_is_not_suggested_for_measuring() -> None:
    asked = ("--data", "one.npz", "--arch", "robusteval:small_cnn_rgb", "--out", "net.safetensors")
    result = ran(*asked, *QUICK, "--size", "12")

    assert result.exit_code == 0, result.stderr
    assert "on images it has not seen (one.npz has no other part)" in result.stdout
    assert "--data IMAGES --size 12 --attack pgd" in result.stdout


def test_ones_own_architecture_is_part_of_the_command() -> None:
    Path("mine.py").write_text(
        "from torch import nn\n"
        "def net(num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(144, num_classes))\n"
    )
    asked = ("--data", "parts.npz", "--out", "net.safetensors", *QUICK)
    result = ran(*asked, "--arch", "mine.py:net", "--objective", "standard")
    again = ran(*asked, "--arch", "mine.py:net", "--fresh", "--objective", "int")

    assert result.exit_code == 0, result.stderr
    assert "--arch mine.py:net" in result.stdout
    assert again.exit_code == 2
    assert "--objective int needs a network that ends in global average pooling" in again.stderr


def test_training_starts_from_a_checkpoint() -> None:
    asked = ("--data", "parts.npz", *QUICK)
    first = ran(*asked, "--arch", "robusteval:digits_cnn", "--out", "first.safetensors")
    second = ran(*asked, "--from", "first.safetensors", "--out", "second.safetensors")

    assert (first.exit_code, second.exit_code) == (0, 0)
    came_from = notes("second.safetensors")["training"]
    assert isinstance(came_from, dict)
    assert came_from["from"] == checkpoint.load("first.safetensors").identity["sha256"]
    assert notes("first.safetensors")["mean"] == notes("second.safetensors")["mean"]


ARCH = ("--arch", "robusteval:digits_cnn")
OUT = ("--out", "net.safetensors")
DATA = ("--data", "parts.npz")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((*DATA, *OUT), "say what to train: --arch"),
        ((*ARCH, *OUT), "Missing option '--data'"),
        ((*DATA, *ARCH), "Missing option '--out'"),
        ((*DATA, *ARCH, "--out", "net.pt"), "must end in .safetensors"),
        ((*DATA, *ARCH, *OUT, "--objective", "best"), "'best' is not one of 'standard', 'adv'"),
        ((*DATA, *ARCH, *OUT, "--eps", "8"), "--eps must be from 0 to 1"),
        ((*DATA, *ARCH, *OUT, "--warmup", "3"), "--warmup takes two numbers"),
        ((*DATA, *ARCH, *OUT, "--warmup", "3,1"), "--warmup must be two numbers of epochs"),
        ((*DATA, *ARCH, *OUT, "--rate", "fast"), "'fast' is not"),
        ((*DATA, *ARCH, *OUT, "--held-out", "50"), "--held-out must be from 1 to 30"),
        ((*DATA, *OUT, "--arch", "robusteval:resnet20"), "the model takes 3 channels"),
        ((*DATA, *OUT, "--from", "none.safetensors"), "there is no file none.safetensors"),
        ((*DATA, *OUT, "--from", "./net.safetensors", "--fresh"), "--out would replace"),
        (("--data", "none.npz", *ARCH, *OUT), "none.npz"),
    ],
)
def test_mistake_is_one_sentence(words: tuple[str, ...], sentence: str) -> None:
    result = ran(*words)

    assert result.exit_code == 2
    assert sentence in result.stderr
    assert not Path("net.safetensors").exists()


def test_options_and_settings_say_the_same() -> None:
    """Names of the objectives, and the defaults of what both have."""
    options = {p.name: p for p in train.params if isinstance(p, click.Option)}
    defaults = train.make_context("train", [*DATA, *ARCH, *OUT]).params
    settings = TrainingSettings()

    assert set(vars(settings)) <= set(options)
    for name, value in vars(settings).items():
        assert defaults[name] == value, name
    assert all(option.help for option in options.values())


def test_help_has_headings_and_examples() -> None:
    text = ran("--help").stdout

    for heading in ("Data:", "Model:", "Objective:", "Training:", "Run:"):
        assert heading in text
    assert "robusteval train --data digits --arch robusteval:digits_cnn" in text


def test_a_network_is_fine_tuned_to_other_classes_with_more_images() -> None:
    """The demo network of ten classes, for bands of three; what cannot be is one sentence."""
    x, y = (np.load("parts.npz")[name] for name in ("x_train", "y_train"))
    small = np.stack([image[2:10, 2:10] for image in x])
    np.savez("small.npz", x=small, y=y)
    np.savez("more.npz", x=small[:, ::-1], y=y)  # none of those that are held out
    words = ("--data", "small.npz", "--extra-data", "more.npz", "--from", "demo", "--new-head")
    quick = ("--average", ".9", "--awp", ".005", "--search", "nfgsm", "--objective", "mart")

    result = ran(*words, "--out", "tuned.safetensors", *QUICK, *quick)

    assert result.exit_code == 0, result.stderr
    found = checkpoint.load("tuned.safetensors")
    assert found.num_classes == 3
    start = notes("tuned.safetensors")["training"]
    assert isinstance(start, dict)
    assert len(start["from"]) == 64
    assert (start["search"], start["awp"], start["average"]) == ("nfgsm", 0.005, 0.9)
    refused = ran(
        *("--data", "small.npz", "--arch", "robusteval:digits_cnn", "--new-head"),
        *("--out", "other.safetensors", *QUICK),
    )
    assert refused.exit_code == 2
    assert "--new-head is for the network of a checkpoint" in refused.stderr
