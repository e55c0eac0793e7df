"""`assert_robust`: what it lets pass, and what it says when it does not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from toys import Linear

from robusteval.datasets.dataset import Data
from robusteval.datasets.sources import open_data
from robusteval.errors import NothingEvaluated, UsageError
from robusteval.models.classifier import Classifier
from robusteval.testing import assert_robust, prepare_images

Pair = tuple[torch.Tensor, torch.Tensor]
SHAPE = (1, 6, 5)
PGD = "pgd:eps=0.02,steps=10"


@pytest.fixture(scope="module")
def network() -> Linear:
    """One hyperplane: how far each image is from it is known."""
    return Linear(SHAPE)


@pytest.fixture(scope="module")
def pair(network: Linear) -> Pair:
    """100 images with the labels the network gives."""
    generator = torch.Generator().manual_seed(3)
    x = 0.3 + 0.4 * torch.rand(100, *SHAPE, generator=generator)
    with torch.no_grad():
        y = network(x).argmax(1)
    return x, y


@pytest.fixture(scope="module")
def share(network: Linear, pair: Pair) -> float:
    """The share of images that no linf perturbation of 0.02 moves across, in closed form."""
    x = pair[0].clone().requires_grad_()
    logits = network(x)
    gap = (logits[:, 0] - logits[:, 1]).abs()
    normal = torch.autograd.grad((logits[:, 0] - logits[:, 1]).sum(), x)[0]
    far = gap / normal.flatten(1).abs().sum(1)
    return float((far > 0.02).float().mean())


NETWORK = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(30, 2))
"""


def test_a_checkpoint_is_read_as_the_options_say(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Architecture, normalisation, and which of two state dicts; names of folders of data."""
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NETWORK)
    flat = {"1.weight": torch.zeros(2, 30), "1.bias": torch.tensor([3.0, 0.0])}
    steep = {"1.weight": torch.zeros(2, 30), "1.bias": torch.tensor([0.0, 3.0])}
    torch.save({"model": flat, "model_ema": steep}, "net.pth")
    np.savez("d.npz", x=pair[0].numpy(), y=np.ones(len(pair[0]), np.int64))
    read: dict[str, Any] = {"arch": "net.py:Net", "mean": (0.5,), "std": (0.25,)}

    assert_robust(
        "net.pth", Path("d.npz"), attack=PGD, floor=0.9, weights="model_ema", **read, allow=CODES
    )
    with pytest.raises(NothingEvaluated):
        assert_robust("net.pth", "d.npz", attack=PGD, floor=0.9, weights="model", **read)
    with pytest.raises(UsageError, match="arch: only a checkpoint is read so"):
        assert_robust(nn.Flatten(), "d.npz", attack=PGD, floor=0.9, arch="net.py:Net")
    with pytest.raises(UsageError, match="classes are for data that are named"):
        assert_robust(nn.Flatten(), pair, attack=PGD, floor=0.9, classes=["a", "b"])


CODES = ("zero-gradient", "unlimited", "loss-not-rising", "guessing")


def test_a_robust_model_passes(network: Linear, pair: Pair, share: float) -> None:
    assert 0.3 < share < 0.95
    assert_robust(network, pair, attack=PGD, floor=share - 0.15)


def test_a_floor_above_its_accuracy_fails_with_everything_needed(
    network: Linear, pair: Pair, share: float
) -> None:
    floor = round(share + 0.2, 2)

    with pytest.raises(AssertionError) as caught:
        assert_robust(network, pair, attack=[PGD], floor=floor)

    lines = str(caught.value).splitlines()
    assert lines[0] == f"robust accuracy of at least {100 * floor:.6g} % is not shown"
    assert lines[1].startswith(f"verdict: Robust accuracy {100 * share:.0f} % (")
    assert lines[2].startswith("failed: worst case at linf eps 0.02: ")
    assert f"{100 * share:.0f} % (" in lines[2]
    assert "and not by chance" in lines[2]
    assert lines[3].startswith("to do: harden the model")
    assert len(lines) == 4


def test_an_undecided_sample_fails_unless_allowed(
    network: Linear, pair: Pair, share: float
) -> None:
    floor = share - 0.01

    with pytest.raises(AssertionError, match=r"images would decide[^$]*allow_inconclusive=True"):
        assert_robust(network, pair, attack=PGD, floor=floor)

    assert_robust(network, pair, attack=PGD, floor=floor, allow_inconclusive=True)


def test_what_has_failed_fails_even_if_the_undecided_is_allowed(
    network: Linear, pair: Pair
) -> None:
    with pytest.raises(AssertionError, match="failed: worst case"):
        assert_robust(network, pair, attack=PGD, floor=1.0, allow_inconclusive=True)


def test_a_grave_finding_fails_unless_its_code_is_allowed(network: Linear, pair: Pair) -> None:
    weak = "pgd:eps=0.0001,steps=1"
    x, y = pair[0], 1 - pair[1]
    y[:45] = 1 - y[:45]  # right on 45 of 100 images: guessing

    with pytest.raises(AssertionError, match=r"trust checks: [^$]*allow=\["):
        assert_robust(network, (x, y), attack=weak, floor=0.1)

    codes = ("guessing", "weak-attacks", "labels-permuted", "unlimited", "loss-not-rising")
    assert_robust(network, (x, y), attack=weak, floor=0.1, allow=codes)


def test_an_attack_without_a_radius_has_no_robust_accuracy(network: Linear, pair: Pair) -> None:
    minimal = "art:DeepFool:max_iter=5"

    with pytest.raises(AssertionError, match="no attack for the worst case"):
        assert_robust(network, pair, attack=minimal, floor=0.1, samples=20)


def test_fewer_samples_are_drawn_as_the_seed_says(network: Linear, pair: Pair) -> None:
    with pytest.raises(AssertionError, match="n = 30,"):
        assert_robust(network, pair, attack=PGD, floor=1.0, samples=30, seed=4)


def test_a_classifier_and_data_of_a_file_are_taken_as_they_are(
    bands: Classifier, npz: Path
) -> None:
    data = open_data(str(npz))

    assert prepare_images(bands, data) is data
    assert isinstance(prepare_images(bands, str(npz)), Data)
    assert_robust(bands, str(npz), attack="pgd:eps=0.001,steps=10", floor=0.5)


def test_a_checkpoint_is_opened(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.pt"):
        assert_robust(tmp_path / "none.pt", "digits", attack=PGD, floor=0.5)


@pytest.mark.parametrize("form", ["nchw", "nhwc", "uint8", "float64"])
def test_arrays_are_read_as_those_of_files(form: str) -> None:
    x = np.random.default_rng(0).random((4, 3, 8, 8)).astype(np.float32)
    forms: dict[str, np.ndarray[Any, Any]] = {
        "nchw": x,
        "nhwc": x.transpose(0, 2, 3, 1),
        "uint8": np.rint(x * 255).astype(np.uint8),
        "float64": x.astype(np.float64),
    }

    data = prepare_images(Linear((3, 8, 8)), (forms[form], np.array([0, 1, 0, 1])))

    batch = data.batch([0, 1, 2, 3])
    assert batch.y.tolist() == [0, 1, 0, 1]
    assert np.abs(batch.x.numpy() - x).max() <= (0.5 / 255 + 1e-6 if form == "uint8" else 1e-7)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ((torch.full((2, 1, 6, 5), 3.0), torch.tensor([0, 1])), "0..255|scale|normalised"),
        ((torch.rand(2, 1, 6, 5), torch.tensor([0])), "give one each"),
        ([1, 2], "not list"),
        ((1, 2, 3), "not tuple"),
    ],
)
def test_data_that_is_none_is_refused(network: Linear, data: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        assert_robust(network, data, attack=PGD, floor=0.5)


@pytest.mark.parametrize("floor", [40, -0.1, True, "0.4", float("nan")])
def test_a_floor_is_a_share(network: Linear, pair: Pair, floor: Any) -> None:
    with pytest.raises(UsageError, match=r"floor must be a number from 0 to 1 \(0.4 is 40 %\)"):
        assert_robust(network, pair, attack=PGD, floor=floor)


def test_nothing_right_is_no_verdict(network: Linear, pair: Pair) -> None:
    with pytest.raises(NothingEvaluated):
        assert_robust(network, (pair[0], 1 - pair[1]), attack=PGD, floor=0.0)


def test_importing_it_loads_no_torch() -> None:
    code = "import sys, robusteval.testing; print('torch' in sys.modules)"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "False"


def test_pytest_shows_the_line_that_called_it(network: Linear, pair: Pair) -> None:
    with pytest.raises(AssertionError) as caught:
        assert_robust(network, pair, attack=PGD, floor=1.0)

    shown = caught.traceback.filter(caught)

    assert Path(shown[-1].path) == Path(__file__)
