"""Hostile images and labels through the command line: each is one sentence."""

from __future__ import annotations

from pathlib import Path

import hostile_data
import pytest
import torch
from click.testing import CliRunner

from robusteval.cli import cli
from robusteval.models.checkpoint import save
from robusteval.models.networks import ARCHITECTURES

FILES = list(hostile_data.list_all())
PARTS = [FILES[i::6] for i in range(6)]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("net") / "net.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = ARCHITECTURES["digits_cnn"]().state_dict()
    save(path, state, arch="robusteval:digits_cnn", num_classes=10, input_shape=(1, 32, 32),
         mean=None, std=None)  # fmt: skip
    return path


def list_wrong(
    files: list[tuple[str, hostile_data.Writer]], network: Path, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[str, int, str]]:
    """Names, exit codes and output of those that do not end in one sentence."""
    wrong = []
    for number, (name, write) in enumerate(files):
        folder = network.parent / f"{number}"
        while folder.exists():
            folder = folder.with_name(f"{folder.name}x")
        folder.mkdir()
        monkeypatch.chdir(folder)
        words = ["evaluate", str(network), "--attack", "noise", "--data", write(folder)]
        result = CliRunner().invoke(cli, [*words, "--out", "run", "--no-probes"])
        said = result.stderr.strip().split("\n")
        sentence = said[-1].startswith("Error: ") and all(line.isprintable() for line in said)
        broken = any(mark in result.output for mark in ("Traceback", "internal error", "bug in"))
        if result.exit_code not in (2, 5) or not sentence or broken:
            wrong.append((name, result.exit_code, result.output))
    return wrong


def test_there_are_many() -> None:
    names = [name for name, _ in FILES]

    assert len(names) == len(set(names)) >= 60


@pytest.mark.parametrize("part", range(len(PARTS)))
def test_hostile_data_are_refused_in_one_sentence(
    network: Path, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    assert not list_wrong(PARTS[part], network, monkeypatch)
