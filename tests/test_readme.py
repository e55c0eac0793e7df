"""What the READMEs tell people to copy does what it says, and what they show is what is printed."""

from __future__ import annotations

import re
import shutil
import tomllib
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from pasted import PAGES, ROOT, Pasted, find_pasted, print_output
from torch import nn

from robusteval.cli import cli
from robusteval.datasets.sources import open_data
from robusteval.models.demo import demo

README = (ROOT / "README.md").read_text(encoding="utf-8")
REPORTS = (ROOT / "reports" / "README.md").read_text(encoding="utf-8")


def section(title: str, page: str = README) -> str:
    """The text below a heading, up to the next."""
    return page.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


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


WORKFLOWS = {
    "github": section("A gate for CI"),
    "gitlab": section("Where CI runs", REPORTS),
}


@pytest.mark.parametrize("which", WORKFLOWS)
def test_the_workflows_of_the_readme_run(
    project: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    """Each of their commands, with a floor that the network reaches."""
    Path("pyproject.toml").write_text("[[tool.robusteval.gate]]\nfloor = 0.0\n")
    if which == "github":
        monkeypatch.setenv("GITHUB_ACTIONS", "true")
        monkeypatch.setenv("GITHUB_STEP_SUMMARY", "summary.md")
    workflow = blocks(WORKFLOWS[which], "yaml")[-1]
    found = list(commands(workflow))
    assert len(found) >= 2

    for words in found:
        assert CliRunner().invoke(cli, words).exit_code == 0, words

    assert ET.parse("gates.xml").getroot().tag == "testsuites"
    assert Path("summary.md").exists() == (which == "github")


def test_the_test_of_the_readme_is_one(project: Path) -> None:
    """It fails as it should, with the interval and the floor in its message."""
    (code,) = (text for text in blocks(README, "python") if "assert_robust" in text)
    names: dict[str, object] = {}
    exec(code, names)
    test = names["test_the_model_is_robust"]
    assert callable(test)

    with pytest.raises(AssertionError, match=r"at least 40 %.*is not shown"):
        test()


NETWORK = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(1, 8, 5, 2), nn.ReLU(), nn.Flatten(), nn.Linear(1568, 10))
"""


@pytest.fixture
def own_model(project: Path) -> Path:
    """A network of one's own as a file of code and a file of weights."""
    (project / "net.py").write_text(NETWORK)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 8, 5, 2), nn.ReLU(), nn.Flatten(), nn.Linear(1568, 10))
    batch = open_data("digits", split="train").batch(range(300))
    optimiser = torch.optim.Adam(network.parameters(), 0.003)
    for _ in range(60):
        loss = nn.functional.cross_entropy(network((batch.x - 0.5) / 0.25), batch.y)
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
    torch.save(network.state_dict(), project / "net.pth")
    return project


def test_the_lines_for_ones_own_model_make_a_report(own_model: Path) -> None:
    (text,) = blocks(section("Your own model"), "sh")
    for words in commands(text.replace("\\\n", " ")):
        result = CliRunner().invoke(cli, words)
        assert result.exit_code == 0, result.output

    assert "<html" in (own_model / "report.html").read_text(encoding="utf-8")


def test_the_lines_of_python_make_a_report(own_model: Path) -> None:
    (code,) = blocks(section("From Python"), "python")
    exec(code, {})

    assert "<html" in (own_model / "report.html").read_text(encoding="utf-8")


NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
OUTPUT = [block for page in PAGES for block in find_pasted(page)]


@pytest.mark.parametrize("block", OUTPUT, ids=lambda block: block.command)
def test_pasted_output_is_what_the_command_prints(block: Pasted) -> None:
    """Words exactly; figures differ in their last digits from machine to machine, times more."""
    demo()  # trained here or before, not by the command
    printed = print_output(block.command, block.until)

    def words(text: str) -> list[str]:
        text = re.sub("─+", "─", re.sub(r"Cost: [\d.]+ \w+", "Cost: 0", text))
        return NUMBER.sub("0", text).split()

    assert words(printed) == words(block.text), "run python tests/pasted.py"
    assert block.text.count("%") > 0
    shares = [re.findall(r"([\d.]+) %", text) for text in (printed, block.text)]
    for now, then in zip(*shares, strict=True):
        assert float(now) == pytest.approx(float(then), abs=3), "run python tests/pasted.py"


def anchors(page: Path) -> set[str]:
    """The headings of a page as links name them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """Between the pages of the project, headings included."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        if anchor:
            assert anchor in anchors(there), target


def test_the_readme_is_short_enough_to_be_read() -> None:
    assert len(README.splitlines()) <= 200
