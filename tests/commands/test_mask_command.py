"""`robusteval defend mask`: options in, a checkpoint, its figures and a verdict out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from robusteval.commands.mask import mask
from robusteval.commands.shell import Commands
from robusteval.defenses import mask_judgement, unit_ranking
from robusteval.evaluation.defense import prepare_defense
from robusteval.evaluation.evaluate import evaluate
from robusteval.models.checkpoint import load, save
from robusteval.models.masked import Masked
from robusteval.models.networks import digits_cnn
from robusteval.models.weights import CHECKSUM

ATTACK = ("--attack", "pgd:eps=51/255,steps=2")
QUICK = ("--samples", "40", *ATTACK)
DATA = ("--data", "parts.npz")
OUT = ("--out", "masked.safetensors")


def ran(*words: str) -> Result:
    group, defend = Commands("robusteval"), click.Group("defend")
    defend.add_command(mask)
    group.add_command(defend)
    result = CliRunner().invoke(group, ["defend", "mask", *words])
    assert "Traceback" not in result.stderr
    assert "internal error" not in result.stderr
    return result


@pytest.fixture(autouse=True)
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a network of three classes, and images that it classifies so."""
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = digits_cnn(3).eval()
    draws = np.random.default_rng(0)
    x = draws.integers(0, 256, (400, 16, 16), dtype=np.uint8)
    with torch.no_grad():
        images = torch.from_numpy(x).float().div(255).unsqueeze(1)
        logits = network(images)
        network.get_submodule("13").bias -= logits.mean(0)
        y = network(images).argmax(1).numpy()
    each = np.sort(np.concatenate([np.flatnonzero(y == c)[:60] for c in range(3)]))
    some, rest = each[::2], each[1::2]
    np.savez("parts.npz", x_train=x[some], y_train=y[some], x_test=x[rest], y_test=y[rest])
    np.savez("one.npz", x=x[some], y=y[some])
    save(
        Path("net.safetensors"),
        network.state_dict(),
        arch="robusteval:digits_cnn",
        num_classes=3,
        input_shape=(1, 16, 16),
        mean=None,
        std=None,
    )
    return tmp_path


def test_figures_always_come_together() -> None:
    result = ran("net.safetensors", *DATA, *QUICK, "--units", "0.5", *OUT)

    assert result.exit_code == 0, result.stderr
    shown = " ".join(result.stdout.split())
    assert shown.startswith(
        "masked.safetensors has 32 of 64 units of layer 10 masked, those that the attack moves"
        " most, by 20 other images. Right of 20 images of parts.npz (x_train), in %"
    )
    assert "clean attack made for attack made for the unmasked this network" in shown
    lines = {
        name: line.split(name)[1]
        for line in result.stdout.splitlines()
        for name in ("unmasked  ", "masked  ", "random mask")
        if line.startswith(f"  {name}")
    }
    assert len(lines) == 3
    assert all(line.count("(") == 3 for line in lines.values())
    assert "100.0 (83.9-100.0)" in lines["unmasked  "]
    verdict = shown.split("random mask")[1]
    assert "mask" in verdict
    assert "lean accuracy" in verdict
    assert "with stop=never the figures in the middle are lower." in verdict
    page, command = result.stdout.split("\nMeasure more with\n")
    assert max(map(len, page.splitlines())) <= 80
    assert command == (
        "  robusteval evaluate net.safetensors --defense masked.safetensors --data parts.npz"
        " --attack pgd:eps=51/255,steps=2\n"
    )
    assert "to rank units: done" in result.stderr


def test_command_goes_on_where_it_was_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the attack that ranks units nor the evaluation of masks is run again."""
    words = ("net.safetensors", *DATA, *QUICK, "--units", "0.5")
    whole = ran(*words, "--out", "whole.safetensors")

    def stopped(*given: Any, **more: Any) -> None:
        evaluate(*given, **more)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(mask_judgement, "evaluate", stopped)
        result = ran(*words, *OUT)
    assert result.exit_code == 130
    assert "the same command continues where this one ended" in result.stderr
    assert len(list(Path("masked.part").glob("*.parts/*.npz"))) == 1
    (run,) = Path("masked.part").glob("run-*")
    cells = {path: path.stat().st_mtime_ns for path in run.glob("samples/*")}

    def seen(*given: Any, **more: Any) -> Any:
        found = evaluate(*given, **more)
        assert {path: path.stat().st_mtime_ns for path in run.glob("samples/*")} == cells
        return found

    monkeypatch.setattr(unit_ranking, "perturb", None)  # nothing is attacked
    monkeypatch.setattr(mask_judgement, "evaluate", seen)
    again = ran(*words, *OUT)

    assert again.exit_code == 0, again.stderr
    assert "Continuing with what masked.part holds." in again.stderr
    assert again.stdout == whole.stdout.replace("whole.safetensors", "masked.safetensors")
    assert Path("masked.safetensors").read_bytes() == Path("whole.safetensors").read_bytes()
    assert not Path("masked.part").exists()


@pytest.mark.parametrize("per_class", [False, True])
def test_result_is_a_checkpoint_like_any_other(per_class: bool) -> None:
    more = ("--per-class",) if per_class else ()
    result = ran(
        "net.safetensors", *DATA, *QUICK, "--rank", "importance", "--units", "16", *OUT, *more
    )

    assert result.exit_code == 0, result.stderr
    assert ("masked for each class, those" in " ".join(result.stdout.split())) == per_class
    found, plain = load("masked.safetensors"), load("net.safetensors")
    assert isinstance(found.network, Masked)
    assert found.network.masks.shape == ((3, 64) if per_class else (64,))
    assert len(found.network.seen) == 20
    assert found.identity["mask"]["masked"] == 16
    assert found.identity["mean"] is None
    state = plain.network.state_dict()
    kept = found.network.network.state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in state.items())
    defense = prepare_defense("masked.safetensors", plain)
    x = torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(defense.model(x), found(x))
    assert not torch.equal(plain(x), found(x))


def test_file_says_how_it_was_made() -> None:
    ran("net.safetensors", *DATA, *QUICK, "--units", "3", *OUT, "--seed", "5", "--rank", "random")
    raw = Path("masked.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    note = json.loads(header["mask"])

    assert CHECKSUM in header
    assert len(note.pop("seen")) == 20
    assert note == {
        "layer": "10",
        "rank": "random",
        "attack": "pgd:eps=51/255,steps=2",
        "data": "parts.npz (x_train)",
        "seed": 5,
    }


def test_the_same_command_gives_the_same_file() -> None:
    words = ("net.safetensors", *DATA, *QUICK, "--units", "8")
    one = ran(*words, "--out", "one.safetensors")
    ran(*words, "--out", "two.safetensors")
    three = ran(*words, *OUT, "--seed", "1")

    first, second, third = (
        Path(f"{name}.safetensors").read_bytes() for name in ("one", "two", "masked")
    )
    assert first == second != third
    assert one.stdout != three.stdout


def test_options_are_part_of_the_command_that_measures() -> None:
    Path("mine.py").write_text(
        "from torch import nn\n"
        "def net():\n"
        "    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),\n"
        "                         nn.Flatten(), nn.Linear(6, 3))\n"
    )
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 6, 3), *[torch.nn.Identity()] * 3)
    network.append(torch.nn.Linear(6, 3))
    torch.save(network.state_dict(), "net.pt")
    asked = ("--arch", "mine.py:net", "--mean", ".5", "--std", "1/4", "--size", "12")
    result = ran("net.pt", "--data", "one.npz", *asked, *QUICK, "--units", "2", *OUT)

    assert result.exit_code == 0, result.stderr
    assert "on images it has not seen (one.npz has no other part) with" in result.stdout
    assert result.stdout.endswith(
        "--data IMAGES --size 12 --arch mine.py:net --mean 0.5 --std 0.25"
        " --attack pgd:eps=51/255,steps=2\n"
    )
    found = prepare_defense("masked.safetensors", load("net.pt", arch="mine.py:net"))
    assert found.model.identity["mean"] == [0.5]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((*DATA, *OUT), "Missing option '--units'"),
        ((*DATA, "--units", "3"), "Missing option '--out'"),
        ((*OUT, "--units", "3"), "say which images with --data"),
        ((*DATA, *OUT, "--units", "x"), "neither a number of units, such as 16, nor a share"),
        ((*DATA, *OUT, "--units", "1/0"), "neither a number of units"),
        ((*DATA, *OUT, "--units", "64"), "64 for the number of masked units means all of the 64"),
        ((*DATA, *OUT, "--units", "1.5"), "1.5 is no number of units: give a whole one"),
        ((*DATA, *OUT, "--units", "-2"), "means none of the 64"),
        ((*DATA, *OUT, "--units", "3", "--layer", "14"), "the network has no layer '14'"),
        ((*DATA, *OUT, "--units", "3", "--attack", "pdg"), "did you mean"),
        ((*DATA, *OUT, "--units", "3", "--rank", "best"), "Invalid value for '--rank'"),
        (
            (*DATA, *OUT, "--units", "3", "--rank", "random", "--per-class"),
            "random units know of no class",
        ),
        ((*DATA, *OUT, "--units", "3", "--samples", "12"), "12 images of parts.npz (x_train) are"),
        ((*DATA, "--units", "3", "--out", "net.safetensors"), "would replace net.safetensors"),
        ((*DATA, "--units", "3", "--out", "net.pt"), "--out must end in .safetensors"),
        ((*DATA, "--units", "3", "--out", "one.safetensors"), "one.safetensors is there already"),
    ],
)
def test_mistakes_are_sentences(words: tuple[str, ...], sentence: str) -> None:
    Path("one.safetensors").touch()
    result = ran("net.safetensors", *words)

    assert result.exit_code == 2
    assert sentence in " ".join(result.stderr.split())
    assert not Path("masked.safetensors").exists()


def test_masks_are_not_put_on_masks() -> None:
    ran("net.safetensors", *DATA, *QUICK, "--units", "3", *OUT)
    result = ran("masked.safetensors", *DATA, *QUICK, "--units", "3", "--out", "two.safetensors")

    assert result.exit_code == 2
    assert "has masks already: start from the one" in result.stderr


def test_file_that_is_there_is_replaced_if_asked() -> None:
    Path("masked.safetensors").touch()
    result = ran("net.safetensors", *DATA, *QUICK, "--units", "3", *OUT, "--force")

    assert result.exit_code == 0, result.stderr
    assert load("masked.safetensors").num_classes == 3
