"""The demo network: accurate, trained once, the same each time."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from robusteval.datasets.sources import open_data
from robusteval.errors import UsageError
from robusteval.models import checkpoint, networks
from robusteval.models import demo as demo_network
from robusteval.models.classifier import predict_classes
from robusteval.runs.cache_folder import cache_folder


@pytest.fixture(scope="session")
def trained() -> Path:
    return demo_network.demo()


@pytest.fixture
def untrainable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training is an error from here on."""

    def fail(*_: object) -> nn.Module:
        raise AssertionError("trained again")

    monkeypatch.setattr(demo_network, "_trained", fail)


@pytest.fixture
def instant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training takes no time and teaches nothing."""
    monkeypatch.setattr(demo_network, "_trained", lambda *_: networks.digits_cnn())


def test_demo_is_right_on_digits_it_has_not_seen(trained: Path) -> None:
    classifier = checkpoint.load(trained)
    data = open_data("digits")
    images = data.batch(range(len(data)))
    right = predict_classes(classifier(images.x)) == images.y

    assert right.float().mean() >= 0.97
    assert classifier.num_classes == 10
    assert classifier.input_shape == (1, 32, 32)
    assert classifier.identity["normalisation"] == "from the file"
    assert 20_000 < classifier.identity["parameters"] < 60_000


def test_demo_is_the_same_wherever_it_is_trained(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really: Any = demo_network._trained
    monkeypatch.setattr(demo_network, "_trained", really.__wrapped__)
    told: list[tuple[int, int]] = []
    before = torch.random.get_rng_state()
    torch.set_num_threads(2)
    again = demo_network.demo(tmp_path, lambda done, total: told.append((done, total)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    assert again.name == trained.name
    assert (
        hashlib.sha256(again.read_bytes()).digest() == hashlib.sha256(trained.read_bytes()).digest()
    )
    assert torch.equal(before, torch.random.get_rng_state())
    assert threads == 2
    assert [done for done, _ in told] == list(range(told[0][1] + 1))


@pytest.mark.usefixtures("untrainable")
def test_demo_is_trained_once(trained: Path) -> None:
    assert trained == demo_network.demo(trained.parent)


@pytest.mark.usefixtures("instant")
@pytest.mark.parametrize("damage", ["torn", "empty", "flipped"])
def test_damaged_demo_is_trained_again(tmp_path: Path, damage: str) -> None:
    path = demo_network.demo(tmp_path)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes({"torn": bytes(raw[:-9]), "empty": b"", "flipped": bytes(raw)}[damage])
    said: list[str] = []

    assert path == demo_network.demo(tmp_path, say=said.append)
    assert ["is damaged" in text for text in said] == [True]
    assert checkpoint.load(path).num_classes == 10
    assert [path] == list(tmp_path.iterdir())


@pytest.mark.usefixtures("instant")
def test_demo_is_kept_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.delenv("ROBUSTEVAL_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert demo_network.demo().parent == tmp_path / "xdg" / "robusteval"
    monkeypatch.setenv("ROBUSTEVAL_CACHE", str(tmp_path / "own"))
    assert demo_network.demo().parent == tmp_path / "own"
    monkeypatch.delenv("ROBUSTEVAL_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "robusteval"
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert cache_folder() == tmp_path / "local" / "robusteval"


@pytest.mark.usefixtures("instant")
def test_cache_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(UsageError, match="ROBUSTEVAL_CACHE"):
        demo_network.demo(tmp_path / "file" / "cache")


@pytest.mark.parametrize("name", networks.ARCHITECTURES)
def test_architecture_has_as_many_logits_as_asked_for(name: str) -> None:
    with torch.random.fork_rng():
        network = networks.ARCHITECTURES[name](num_classes=4).eval()

    first = next(part for part in network.modules() if isinstance(part, nn.Conv2d))
    assert network(torch.zeros(2, first.in_channels, 32, 32)).shape == (2, 4)
