"""Hostile checkpoints through the command line: nothing runs, and each is one sentence."""

from __future__ import annotations

import itertools
from pathlib import Path

import hostile_checkpoints as hostile
import pytest
import torch
from click.testing import CliRunner

from robusteval.cli import cli
from robusteval.models.networks import ARCHITECTURES


def build_state() -> dict[str, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ARCHITECTURES["digits_cnn"]().state_dict()


FILES = list(hostile.list_all(build_state()))
NOTES = list(hostile.list_notes(build_state()))
PARTS = [FILES[i::8] for i in range(8)]


def evaluate(raw: bytes, *options: str) -> tuple[int, str]:
    """Exit code and output for a file of these bytes."""
    Path("x.pt").write_bytes(raw)
    result = CliRunner().invoke(cli, ["evaluate", "x.pt", "--data", "digits", *options])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.output


def is_sentence(code: int, said: str, expected: int) -> bool:
    """Whether a file was refused as it should be, and nothing of it ran."""
    right = code == expected if expected else code in (hostile.USAGE, hostile.REFUSED)
    plain = all(line.isprintable() for line in said.split("\n"))
    broken = "Traceback" in said or "internal error" in said or Path(hostile.MARK).exists()
    return right and plain and said.startswith("Error: ") and not broken


def list_wrong(files: list[tuple[str, bytes, int]], *options: str) -> list[tuple[str, int, str]]:
    """Names, exit codes and output of those that are not refused as they should be."""
    wrong = []
    for name, raw, expected in files:
        code, said = evaluate(raw, *options)
        if not is_sentence(code, said, expected):
            wrong.append((name, code, said))
    return wrong


def test_there_are_many() -> None:
    names = [name for name, _, _ in FILES + NOTES]

    assert len(names) == len(set(names)) >= 150


@pytest.mark.parametrize("part", range(len(PARTS)))
def test_hostile_checkpoint_is_refused_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    monkeypatch.chdir(tmp_path)

    assert not list_wrong(PARTS[part], "--arch", "robusteval:digits_cnn")


def test_metadata_that_lie_are_refused_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("hostile.py").write_text(f"def run(): open({hostile.MARK!r}, 'w')")

    assert not list_wrong(NOTES)


def test_payloads_would_run_where_nothing_guards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise nothing is shown by their not running."""
    import pickle

    monkeypatch.chdir(tmp_path)
    ran = 0
    for name, raw, _ in itertools.islice(hostile.list_code(), 3 * len(hostile.CALLS)):
        if name.startswith(("os.system in a p", "shutil.copyfile in a p", "os.mkdir in a p")):
            pickle.loads(raw)
            path = Path(hostile.MARK)
            assert path.exists(), name
            path.rmdir() if path.is_dir() else path.unlink()
            ran += 1
    assert ran == 3
