"""What the README tells people to copy does what it says."""

from __future__ import annotations

import re
import shutil
import tomllib
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from robusteval.cli import cli
from robusteval.datasets.sources import open_data
from robusteval.models.demo import demo

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    """The text below a heading, up to the next."""
    return README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def blocks(text: str, language: str) -> list[str]:
    """The code blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands(text: str) -> Iterator[list[str]]:
    """The robusteval commands in a block, without what only a workflow understands."""
    for line in text.splitlines():
        found = re.match(r"\s*(?:- run: |- )?robusteval (.*?)(?:\s+#.*)?$", line)
        if found:
            yield found[1].split()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a checkpoint, a few images, and the gates of the README."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    shutil.copy(demo(), "net.safetensors")
    batch = open_data("digits").batch(range(60))
    np.savez("val.npz", x=batch.x.numpy(), y=batch.y.numpy())
    (gates,) = blocks(section("A gate for CI"), "toml")
    assert tomllib.loads(gates)
    Path("pyproject.toml").write_text(gates)
    return tmp_path


def test_the_gate_of_the_readme_runs_from_evaluation_to_verdict(project: Path) -> None:
    """Only that a network without defense does not reach the floor."""
    ended = {}
    text = section("A gate for CI")
    for words in commands(text.partition("A gate has passed")[0]):
        ended[words[0]] = CliRunner().invoke(cli, words)

    assert {name: result.exit_code for name, result in ended.items()} == {
        "evaluate": 0,
        "baseline": 0,
        "check": 1,
    }
    assert "FAILED" in ended["check"].stdout
    assert (project / "robustness-baseline.json").exists()


@pytest.mark.parametrize("which", [0, 1], ids=["github", "gitlab"])
def test_the_workflows_of_the_readme_run(
    project: Path, monkeypatch: pytest.MonkeyPatch, which: int
) -> None:
    """Each of their commands, with a floor that the network reaches."""
    Path("pyproject.toml").write_text("[[tool.robusteval.gate]]\nfloor = 0.0\n")
    if which == 0:
        monkeypatch.setenv("GITHUB_ACTIONS", "true")
        monkeypatch.setenv("GITHUB_STEP_SUMMARY", "summary.md")
    found = list(commands(blocks(section("A gate for CI"), "yaml")[which]))
    assert len(found) >= 2

    for words in found:
        assert CliRunner().invoke(cli, words).exit_code == 0, words

    assert ET.parse("gates.xml").getroot().tag == "testsuites"
    assert Path("summary.md").exists() == (which == 0)


def test_the_test_of_the_readme_is_one(project: Path) -> None:
    """It fails as it should, with the interval and the floor in its message."""
    (code,) = (text for text in blocks(README, "python") if "assert_robust" in text)
    names: dict[str, object] = {}
    exec(code, names)
    test = names["test_the_model_is_robust"]
    assert callable(test)

    with pytest.raises(AssertionError, match=r"at least 40 %.*is not shown"):
        test()
