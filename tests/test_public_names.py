"""What `import robusteval` offers: names, when they are imported, and runs that show themselves."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reportable import as_dict, defended, json_of

import robusteval
from robusteval.errors import RunError, UsageError
from robusteval.runs.types import Outcome, Run

NET = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(48, 2))
"""


def run_python(code: str, folder: Path) -> str:
    """What a fresh Python prints."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=folder
    ).stdout


def test_each_name_is_that_of_its_module() -> None:
    for name, module in robusteval._MODULES.items():
        there = getattr(import_module(f"robusteval.{module}"), name)

        assert getattr(robusteval, name) is there


def test_type_checkers_see_what_is_there_at_run_time() -> None:
    tree = ast.parse(Path(robusteval.__file__).read_text(encoding="utf-8"))
    checked = next(node for node in tree.body if isinstance(node, ast.If))
    imported = {
        alias.name: str(node.module).removeprefix("robusteval.")
        for node in checked.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }

    assert imported == robusteval._MODULES
    assert sorted(imported) == robusteval.__all__


def test_nothing_is_imported_before_it_is_asked_for(tmp_path: Path) -> None:
    code = (
        "import sys, robusteval\n"
        "dir(robusteval)\n"
        "print(sorted(name for name in sys.modules if name.startswith('robusteval')),"
        " sorted({'numpy', 'torch', 'art', 'scipy'} & sys.modules.keys()))\n"
        "robusteval.load_run, robusteval.robust_accuracy, robusteval.Run\n"
        "print(sorted({'torch', 'art', 'scipy'} & sys.modules.keys()))"
    )

    assert run_python(code, tmp_path).split("\n")[:2] == ["['robusteval'] []", "[]"]


def test_public_names_are_listed() -> None:
    assert set(robusteval.__all__) <= set(dir(robusteval))
    assert "__version__" in dir(robusteval)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'robusteval' has no attribute 'evalute'"):
        _ = robusteval.evalute
    with pytest.raises(ImportError):
        from robusteval import nothing  # noqa: F401


def test_a_model_of_ones_own_is_evaluated_in_three_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    weight = torch.from_numpy(rng.normal(size=(2, 48)).astype(np.float32))
    torch.save({"1.weight": weight, "1.bias": torch.zeros(2)}, "net.pth")
    Path("net.py").write_text(NET)
    x = rng.random((30, 3, 4, 4), dtype=np.float32)
    logits = ((x - 0.5) / 0.25).reshape(30, 48) @ weight.numpy().T
    np.savez("val.npz", x=x, y=logits.argmax(1))

    model = robusteval.load("net.pth", arch="net.py:Net", mean=(0.5,), std=(0.25,))
    data = robusteval.open_data("val.npz")
    run = robusteval.evaluate(model, data, ["pgd:eps=8/255"])
    print(run)
    run.report("report.html")

    (outcome,) = run.attacks
    accuracy = robusteval.robust_accuracy(outcome)
    assert capsys.readouterr().out == (
        f"<Run of net.py:Net on val.npz (x), 30 images, 100.0% right, {accuracy.value:.1%} after"
        " 1 attack; complete>\n"
    )
    assert "30 images" in Path("report.html").read_text()
    assert 0 < accuracy.k < 30
    assert robusteval.as_estimator(model, input_shape=(3, 4, 4)).nb_classes == 2


SUFFIXES = {
    ".txt": "Robust accuracy",
    ".md": "| attack",
    ".json": '"worst_cases"',
    ".html": "<!DOCTYPE html>",
    ".HTM": "<!DOCTYPE html>",
    ".xml": "<testsuite",
    ".sarif": '"runs"',
    ".csv": "attack",
}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_suffix_says_the_format_of_a_report(suffix: str, shown: Run, tmp_path: Path) -> None:
    shown.report(tmp_path / f"report{suffix}")

    assert SUFFIXES[suffix] in (tmp_path / f"report{suffix}").read_text(encoding="utf-8")


def test_a_report_is_that_of_the_command_line(shown: Run, tmp_path: Path) -> None:
    shown.report(tmp_path / "report.json")

    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json_of(shown))


def test_a_report_replaces_that_of_before(shown: Run, tmp_path: Path) -> None:
    (tmp_path / "report.md").write_text("old")

    shown.report(str(tmp_path / "report.md"))

    assert "old" not in (tmp_path / "report.md").read_text().split()


@pytest.mark.parametrize("name", ["report.docx", "report"])
def test_a_suffix_that_says_nothing_is_refused(name: str, shown: Run, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"does not say a format: end it in .*\.html"):
        shown.report(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_one_sentence(shown: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(RunError, match="cannot write"):
        shown.report(tmp_path / "file" / "report.md")


class Markup(HTMLParser):
    """The elements and the text of a fragment."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Elements nest."""
        assert {name for name, _ in attrs} <= {"class", "style"}
        self.elements.append(tag)
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """And each is closed."""
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        """What is to be read."""
        self.text += data


def test_a_notebook_shows_the_verdict_and_the_table(shown: Run) -> None:
    page = Markup(shown._repr_html_())

    assert not page.open
    assert {"script", "link", "img"}.isdisjoint(page.elements)
    assert as_dict(shown)["verdict"] in page.text
    assert "robust accuracy" in page.text
    assert all(str(outcome.attack) in page.text for outcome in shown.attacks)


def test_a_notebook_shows_what_defenses_do(
    make_outcome: Callable[..., Outcome], make_run: Callable[..., Run]
) -> None:
    run = defended(make_outcome, make_run)

    page = Markup(run._repr_html_())

    assert not page.open
    assert all(str(defense.spec) in page.text for defense in run.defenses)


def test_names_from_outside_are_no_markup(shown: Run) -> None:
    name = "<script>alert(1)<x>\x1b[31m"
    data: dict[str, Any] = {**shown.data, "name": name}

    page = Markup(replace(shown, data=data)._repr_html_())

    assert "script" not in page.elements
    assert name.replace("\x1b", "\\x1b") in page.text


def test_a_run_without_a_result_still_shows_itself(make_run: Callable[..., Run]) -> None:
    run = make_run(failures={"pgd": "it broke"})

    assert not Markup(run._repr_html_()).open
    assert repr(run).startswith("<Run of ")


@pytest.fixture
def shown(make_outcome: Callable[..., Outcome], make_run: Callable[..., Run]) -> Run:
    """A run of two attacks of one threat."""
    one = np.arange(500) < 300
    return make_run(make_outcome(one), make_outcome(one[::-1].copy()))
