"""`robusteval defend detector`: options in, a detector, its report and tables out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner, Result
from toys import save_colour_cnn, synthetic

from robusteval.commands.detector import detector, split_interpreters
from robusteval.commands.shell import Commands
from robusteval.defenses import boosting, splits
from robusteval.defenses.map_rows import RowMaker
from robusteval.defenses.study import Study
from robusteval.evaluation.defense import prepare_defense
from robusteval.evaluation.defense_files import is_detector
from robusteval.models import checkpoint

ATTACK = "pgd:eps=24/255,steps=8"
ASKED = ("--data", "bands.npz", "--interpreters", "grad,cam", "--extractor", "raw")
MORE = ("--attack", ATTACK, "--samples", "100", "--out", "made/detector.safetensors")


def ran(*words: str) -> Result:
    group = Commands("robusteval")
    group.add_command(detector)
    result = CliRunner().invoke(group, ["detector", *words], env={"COLUMNS": "80"})
    assert "Traceback" not in result.stderr
    assert "internal error" not in result.stderr
    return result


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network with class activation maps, trained on the synthetic images for a second."""
    path = tmp_path_factory.mktemp("net") / "net.safetensors"
    save_colour_cnn(path, steps=60)
    return path


@pytest.fixture(autouse=True)
def desk(tmp_path: Path, network: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with images and the network; less of what takes long."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(splits, "FOLDS", 3)
    monkeypatch.setattr(boosting, "ROUNDS", 20)
    x, y = synthetic(150, 1)
    np.savez("bands.npz", x=x, y=y)
    np.savez("one.npz", x=x[y == 1], y=y[y == 1])
    (tmp_path / "net.safetensors").write_bytes(network.read_bytes())
    (tmp_path / "there.safetensors").touch()
    return tmp_path


def test_command_leaves_a_detector_and_its_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["robusteval", "defend", "detector", "net.safetensors"])
    result = ran("net.safetensors", *ASKED, *MORE, "--attack", "pgd:eps=2,norm=l2,steps=8")

    assert result.exit_code == 0, result.stderr
    path = Path("made/detector.safetensors")
    assert is_detector(path)
    report = json.loads(Path("made/detector.report.json").read_text())
    assert report["attacks"][0]["attack"] == ATTACK
    assert report["command"] == "robusteval defend detector net.safetensors"
    assert max(map(len, result.stdout.split("  robusteval evaluate")[0].splitlines())) <= 80
    for title in (
        "Attacked images",
        "Images without any attack",
        "Against simpler ones",
        "Fitted on one attack, judged on another",
        "Is there a leak?",
        "Remarks",
    ):
        assert f"\n{title}" in result.stdout
    assert result.stdout.endswith(
        "  robusteval evaluate net.safetensors --data IMAGES"
        " --defense made/detector.safetensors --attack pgd:eps=24/255,steps=8"
        " --attack pgd:eps=2,norm=l2,steps=8\n"
    )
    made = prepare_defense(str(path), checkpoint.load("net.safetensors"))
    assert made.detector is not None
    assert made.facts["images"] == {"train": 60, "validation": 20}


def test_command_goes_on_where_it_was_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is finished lies beside the detector, until that is written."""
    seen = RowMaker.look_at_rows
    left = [3]

    def stopping(*given: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return seen(*given)

    monkeypatch.setattr(Study, "batch", 32)
    monkeypatch.setattr(RowMaker, "look_at_rows", stopping)
    stopped = ran("net.safetensors", *ASKED, *MORE)
    assert stopped.exit_code == 130
    assert "the same command continues where this one ended" in stopped.stderr
    assert list(Path("made/detector.part").iterdir())

    monkeypatch.setattr(RowMaker, "look_at_rows", seen)
    result = ran("net.safetensors", *ASKED, *MORE)

    assert result.exit_code == 0, result.stderr
    assert "Continuing with what made/detector.part holds." in result.stderr
    assert sorted(path.name for path in Path("made").iterdir()) == [
        "detector.report.json",
        "detector.safetensors",
    ]


def test_interpreters_keep_their_parameters() -> None:
    found = split_interpreters(None, None, "grad:score=logit,pool=2,cam,mask:iterations=3,blur=5")  # type: ignore[arg-type]

    assert [str(spec) for spec in found] == [
        "grad:score=logit,pool=2",
        "cam",
        "mask:iterations=3,blur=5",
    ]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--samples", "10"), "10 images cannot be parted"),
        (("--data", "one.npz"), "of one class"),
        (("--data", "nothing.npz"), "nothing.npz"),
        (("--interpreters", "grad"), "two or three interpreters"),
        (("--interpreters", "grad,guided_backprop"), "no derivative"),
        (("--interpreters", "grad,cams"), "did you mean 'cam'"),
        (("--channels", "triple"), "made of 3 maps"),
        (("--attack", "noise:eps=1/255"), "succeeds on"),
        (("--attack", "pdg"), "did you mean 'pgd'"),
        (("--attack", ATTACK), "asked for twice"),
        (("--out", "detector.bin"), "must end in .safetensors"),
        (("--out", "bands.npz/x.safetensors"), "cannot write"),
        (("--out", "there.safetensors"), "is there already"),
        (("--out", "net.safetensors"), "would replace"),
        (("--out", "net.safetensors", "--force"), "would replace"),
        (("--vgg-weights", "vgg.pth"), "is for --extractor vgg16"),
        (("--extractor", "vgg16"), "--vgg-weights"),
        (("--extractor", "vgg16", "--vgg-weights", "vgg.pth"), "there is no file vgg.pth"),
    ],
)
def test_mistakes_end_in_one_sentence(
    words: tuple[str, ...], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", "nowhere")
    result = ran("net.safetensors", *ASKED, *MORE, *words)

    assert result.exit_code == 2, result.stdout
    assert sentence in result.stderr
    assert result.stdout == ""
    assert not Path("made/detector.safetensors").exists()


def test_network_that_cannot_have_such_maps_is_named() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(432, 3)).state_dict()
    safetensors.torch.save_file(weights, "flat.safetensors")
    Path("flat.py").write_text(
        "from torch import nn\n"
        "def flat(num_classes=3):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(432, num_classes))\n"
    )

    arch = ("--arch", "flat.py:flat", "--mean", "0", "--std", "1")
    result = ran("flat.safetensors", *ASKED, *MORE, *arch)

    assert result.exit_code == 2
    assert "cam" in result.stderr


def test_what_is_there_is_replaced_only_if_asked_for() -> None:
    path = Path("made/detector.safetensors")
    path.parent.mkdir()
    path.write_text("precious")

    refused = ran("net.safetensors", *ASKED, *MORE)

    assert refused.exit_code == 2
    assert "--force to replace it" in refused.stderr
    assert path.read_text() == "precious"
