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
from PIL import Image
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


def test_what_is_offered_for_completion_is_public(tmp_path: Path) -> None:
    code = "import robusteval; print([name for name in dir(robusteval) if name[0] != '_'])"
    offered = ast.literal_eval(run_python(code, tmp_path))
    assert [name for name in offered if name not in robusteval.__all__ and name[0].isupper()] == []
    assert "import_module" not in offered


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


IMAGES = np.linspace(0, 1, 96, dtype=np.float32).reshape(2, 3, 4, 4)
LABELS = np.array([0, 1])


@pytest.fixture
def ones_own() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 2))


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (IMAGES.tolist(), LABELS.tolist()),
        (list(IMAGES), list(LABELS)),
        (torch.tensor(IMAGES, requires_grad=True), torch.tensor(LABELS)),
    ],
)
def test_images_in_memory_may_be_lists_and_tensors(images: Any, labels: Any) -> None:
    batch = robusteval.from_arrays(images, labels).batch([0, 1])
    assert torch.equal(batch.x, torch.from_numpy(IMAGES))
    assert batch.y.tolist() == [0, 1]


def test_pillow_images_in_memory_are_images() -> None:
    grey = [Image.new("L", (4, 5), value) for value in (3, 255)]
    assert robusteval.from_arrays(grey, LABELS).shape == (1, 5, 4)


def test_data_is_opened_by_a_path_as_well(tmp_path: Path) -> None:
    np.savez(tmp_path / "val.npz", x=IMAGES, y=LABELS)
    assert len(robusteval.open_data(tmp_path / "val.npz")) == 2


def test_a_module_of_ones_own_is_explained(ones_own: torch.nn.Module) -> None:
    data = robusteval.from_arrays(IMAGES, ones_own(torch.from_numpy(IMAGES)).argmax(1))
    found = robusteval.explain(ones_own, data, "noise", samples=1)
    assert found.record.samples.attacked == 1


MISTAKES: dict[str, tuple[Callable[[torch.nn.Module, Any], Any], str]] = {
    "no images": (lambda _, __: robusteval.from_arrays(None, LABELS), "has the shape"),
    "no labels": (lambda _, __: robusteval.from_arrays(IMAGES, None), "give one each"),
    "uneven images": (
        lambda _, __: robusteval.from_arrays([IMAGES[0], IMAGES[0, :, 1:]], LABELS),
        "give images of one shape",
    ),
    "open an array": (lambda _, __: robusteval.open_data(IMAGES), "robusteval.from_arrays"),  # type: ignore[arg-type]
    "a list of images": (
        lambda _, __: robusteval.from_dataset(list(IMAGES)),
        "give each image with its label",
    ),
    "images without labels": (
        lambda _, __: robusteval.from_dataset([(IMAGES[0],)]),
        "tuple of length 1, not a pair",
    ),
    "a size in words": (
        lambda _, __: robusteval.from_dataset([(IMAGES[0], 0)], size="8"),  # type: ignore[arg-type]
        "--size must be a whole number, not '8'",
    ),
    "load nothing": (lambda _, __: robusteval.load(None), "give its path"),  # type: ignore[arg-type]
    "load into a network": (
        lambda net, _: robusteval.load("net.pth", arch=net),  # type: ignore[arg-type]
        "arch cannot be Sequential: name it",
    ),
    "load into a class": (
        lambda _, __: robusteval.load("net.pth", arch=torch.nn.Linear),  # type: ignore[arg-type]
        "arch cannot be the class Linear: name it",
    ),
    "evaluate a path": (
        lambda _, data: robusteval.evaluate("net.pth", data, ["noise"]),  # type: ignore[arg-type]
        "give an nn.Module, or what robusteval.load makes of a file",
    ),
    "evaluate on a path": (
        lambda net, _: robusteval.evaluate(net, "val.npz", ["noise"]),  # type: ignore[arg-type]
        "open a name or path with robusteval.open_data",
    ),
    "one attack": (
        lambda net, data: robusteval.evaluate(net, data, "noise"),
        "attacks cannot be str: give a list",
    ),
    "no attack": (
        lambda net, data: robusteval.evaluate(net, data, None),  # type: ignore[arg-type]
        "attacks cannot be NoneType: give a list",
    ),
    "an attack in numbers": (
        lambda net, data: robusteval.evaluate(net, data, [3]),  # type: ignore[list-item]
        "one of the attacks cannot be int",
    ),
    "one interpreter": (
        lambda net, data: robusteval.evaluate(net, data, ["noise"], interpreters="cam"),
        "interpreters cannot be str: give a list",
    ),
    "a module as a defense": (
        lambda net, data: robusteval.evaluate(net, data, ["noise"], defenses=[net]),  # type: ignore[list-item]
        "one of the defenses cannot be Sequential",
    ),
    "samples in words": (
        lambda net, data: robusteval.evaluate(net, data, ["noise"], samples="3"),  # type: ignore[arg-type]
        "samples must be a whole number, not '3'",
    ),
    "a negative seed": (
        lambda net, data: robusteval.evaluate(net, data, ["noise"], seed=-3),
        "seed must be at least 0, not -3",
    ),
    "out in numbers": (
        lambda net, data: robusteval.evaluate(net, data, ["noise"], out=3),  # type: ignore[arg-type]
        "out cannot be int: give its path",
    ),
    "explain several attacks": (
        lambda net, data: robusteval.explain(net, data, ["noise"]),  # type: ignore[arg-type]
        "attack cannot be list: name one",
    ),
    "explain nothing": (
        lambda net, _: robusteval.explain(net, None, "noise"),  # type: ignore[arg-type]
        "data cannot be NoneType: open",
    ),
    "no run": (lambda _, __: robusteval.load_run(None), "give its path"),  # type: ignore[arg-type]
    "the accuracy of a run": (
        lambda _, __: robusteval.robust_accuracy(None),  # type: ignore[arg-type]
        "give one of run.attacks",
    ),
    "a module for ART": (
        lambda net, _: robusteval.as_estimator(net, input_shape=(3, 4, 4)),  # type: ignore[arg-type]
        "robusteval.Classifier\\(module, num_classes=10\\)",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_that_says_what_to_do(
    mistake: str, ones_own: torch.nn.Module
) -> None:
    make, sentence = MISTAKES[mistake]
    with pytest.raises(UsageError, match=sentence):
        make(ones_own, robusteval.from_arrays(IMAGES, LABELS))


def test_a_report_without_a_place_is_one_sentence(shown: Run) -> None:
    with pytest.raises(UsageError, match="give its path"):
        shown.report(None)  # type: ignore[arg-type]
