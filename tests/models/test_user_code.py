"""What breaks in a user's own code is shown as that, with file and line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import robusteval
from robusteval.cli import cli
from robusteval.errors import UsageError, speak_of_options
from robusteval.models.admission import check_images
from robusteval.models.classifier import Classifier
from robusteval.models.user_code import describe_exception, suggest_image_shape

NETWORKS = """
import json
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(192, 3)

    def forward(self, x):
        return self.fc(x.flatten(1))

class Forgetful(Net):
    def forward(self, x):
        return self.fc2(x)

class Picky(Net):
    def forward(self, x):
        raise KeyError("layer7")

class Deep(Net):
    def forward(self, x):
        json.loads("no json")
"""


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with networks in a file, weights for them, and images of 8x8 and of 9x9."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NETWORKS)
    linear = nn.Linear(192, 3)
    torch.save({"fc.weight": linear.weight, "fc.bias": linear.bias}, "net.pth")
    for side in (8, 9):
        x = np.random.default_rng(0).integers(0, 256, (9, side, side, 3), np.uint8)
        np.savez(f"{side}.npz", x=x, y=np.arange(9) % 3)
    return tmp_path


def refuse(arch: str, data: str = "8.npz", file: str = "net.pth") -> str:
    """What `evaluate` says of an architecture, on one line."""
    words = ["evaluate", file, "--arch", arch, "--data", data, "--attack", "noise", "--no-probes"]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 2, result.output
    return result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("Forgetful", "AttributeError: 'Forgetful' object has no attribute 'fc2', in net.py, line"),
        ("Picky", "KeyError: 'layer7', in net.py, line"),
        ("Deep", "JSONDecodeError: Expecting value: line 1 column 1 (char 0), in net.py, line"),
    ],
)
def test_an_exception_in_forward_is_shown_as_that(desk: Path, name: str, error: str) -> None:
    """Type, message, file and line; no advice about the size of images."""
    said = refuse(f"net.py:{name}")

    assert error in said
    assert "--size" not in said


def test_images_of_a_wrong_size_are_told_so_with_the_line(desk: Path) -> None:
    """What torch says of shapes is about the images."""
    said = refuse("net.py:Net", "9.npz")

    assert "RuntimeError: " in said
    assert "in net.py, line 12)" in said
    assert said.endswith(": bring them to another size with --size")


def test_code_that_is_installed_has_no_line() -> None:
    """A user cannot mend a line of torch."""
    with pytest.raises(RuntimeError) as caught:
        exec(compile("import torch\ntorch.zeros(2) @ torch.zeros(3)", "<inside>", "exec"))
    caught.value.__traceback__ = None

    assert " in " not in describe_exception(caught.value).partition(":")[0]
    assert describe_exception(StopIteration()) == "StopIteration"


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "--size"),
        (AssertionError("Wrong image height!"), "--size"),
        (RuntimeError("expected input[1, 1, 8, 8] to have 3 channels, but got 1"), "channels"),
        (RuntimeError("no luck"), ""),
        (TypeError("size is no number"), ""),
        (None, ""),
    ],
)
def test_advice_fits_the_error(error: Exception | None, advice: str) -> None:
    said = suggest_image_shape(error)

    assert advice in said
    assert bool(said) == bool(advice)


@pytest.mark.parametrize(
    ("arch", "said"),
    [
        ("net.py", "--arch net.py names no function: write net.py:Net or net.py:Forgetful"),
        ("net.Net", "--arch net.Net is not an architecture: write net.py:Net"),
        ("resnet18", "--arch resnet18 is not an architecture: give torchvision:resnet18, of"),
        ("net:Net", "there is no module net: write net.py:Net"),
        ("sub/beside:Net", "there is no module sub/beside: write sub/beside.py:Net"),
        ("beside:Net", "there is no module beside: write sub/beside.py:Net"),
        ("beside.py:Net", "there is no file beside.py to take the architecture from; write sub/"),
        ("nowhere.py:Net", "there is no file nowhere.py to take the architecture from"),
        ("net.py:Nett", "net.py:Nett: there is no function Nett; there is Net"),
    ],
)
def test_the_right_form_is_named(
    desk: Path, monkeypatch: pytest.MonkeyPatch, arch: str, said: str
) -> None:
    """For files here and beside the checkpoint; nothing of theirs is run."""
    monkeypatch.setattr("sys.path", [entry for entry in __import__("sys").path if entry])
    (desk / "sub").mkdir()
    (desk / "sub" / "beside.py").write_text("raise SystemExit('executed')\n")
    (desk / "net.pth").rename(desk / "sub" / "net.pth")

    assert said in refuse(arch, file="sub/net.pth")


def test_a_caller_in_python_is_told_what_options_are_called_there(
    bands: Classifier, npz: Path
) -> None:
    """The option stays in the sentence, for the same text may be read on the command line."""
    with pytest.raises(UsageError, match=r"--size must be at least 1.* \(in Python: size\)"):
        robusteval.open_data(npz, size=0)
    with pytest.raises(UsageError, match=r"with --defense \(in Python: defenses\)"):
        robusteval.evaluate(bands, robusteval.open_data(npz), ["evade"])
    assert str(UsageError("pip install --force-reinstall torch")).endswith("torch")
    with speak_of_options():
        assert str(UsageError("give --mean and --std")) == "give --mean and --std"
    assert str(UsageError("give --mean, --mean, --std")).endswith("(in Python: mean, std)")


def test_every_name_in_python_is_one() -> None:
    """Of `load`, `open_data` or `evaluate`."""
    import inspect

    from robusteval.errors import PYTHON_NAMES

    known = {
        name
        for call in (robusteval.load, robusteval.open_data, robusteval.evaluate)
        for name in inspect.signature(call).parameters
    }
    assert set(PYTHON_NAMES.values()) <= known


def test_a_network_that_breaks_in_python_is_told_the_line(npz: Path) -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise LookupError(json.dumps({"a": 1}))

    network = Classifier(Broken(), num_classes=3).eval()
    with pytest.raises(UsageError, match=re.escape('LookupError: {"a": 1}, in test_user_code.py')):
        check_images(robusteval.open_data(npz), np.arange(3), network)


def test_the_demo_network_is_named_to_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a word of the command line, unless a file is called so."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"load\(demo\(\)\) with `from robusteval.models.demo"):
        robusteval.load("demo")


def test_fewer_class_names_than_labels_are_refused() -> None:
    x = np.full((4, 8, 8), 99, np.uint8)
    with pytest.raises(UsageError, match="labels up to 3 and 2 class names"):
        robusteval.from_arrays(x, [0, 1, 2, 3], class_names=["a", "b"])
    assert robusteval.from_arrays(x, [0, 1, 1, 0], class_names="ab").class_names == ("a", "b")


def test_what_is_no_size_of_a_batch_or_progress_is_refused(bands: Classifier, npz: Path) -> None:
    data = robusteval.open_data(npz)
    with pytest.raises(UsageError, match="batch-size must be a whole number, not 'auto'"):
        robusteval.evaluate(bands, data, ["noise"], batch_size="auto")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="progress cannot be int"):
        robusteval.explain(bands, data, "noise", progress=1)  # type: ignore[arg-type]


def test_progress_is_shown_where_true_is_given(
    bands: Classifier, npz: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    robusteval.evaluate(
        bands, robusteval.open_data(npz), ["noise"], samples=2, probes=False, progress=True
    )

    assert "Reading data" in capsys.readouterr().err


@pytest.mark.parametrize(("mean", "fits"), [((127.0,), False), ((-3.0,), False), ((1.0,), True)])
def test_a_mean_in_grey_levels_is_refused(desk: Path, mean: tuple[float, ...], fits: bool) -> None:
    if fits:
        robusteval.load("net.pth", arch="net.py:Net", mean=mean, std=(58.0,))
        return
    with pytest.raises(UsageError, match=r"looks like grey levels: .* divided by 255"):
        robusteval.load("net.pth", arch="net.py:Net", mean=mean, std=(58.0,))
