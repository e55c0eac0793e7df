"""Reports, comparisons, gates and baselines from the command line: what is written where, and
how each command ends."""

from __future__ import annotations

import csv
import io
import json
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result

from robusteval import registry
from robusteval.cli import cli
from robusteval.commands.report import SHIPPED, list_formats, report
from robusteval.runs.types import Outcome, Run, Spec

N = 400
Desk = Callable[..., Path]


def ran(*words: str) -> Result:
    result = CliRunner().invoke(cli, list(words))
    assert "Traceback" not in result.stderr
    assert "internal error" not in result.stderr
    return result


@pytest.fixture
def desk(
    make_outcome: Callable[..., Outcome],
    make_run: Callable[..., Run],
    keep_run: Callable[[Run, Path], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Desk:
    """A working folder, and a way to put a run there: so many of 400 images broken."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)

    def put(name: str, broken: int, right: int = N, **changed: Any) -> Path:
        mask, first = np.arange(N) < broken, np.arange(N) < right
        outcome = make_outcome(mask, right=first, spec=Spec("pgd", {"eps": 8 / 255}))
        return keep_run(make_run(outcome, **changed), Path(name))

    return put


def parsed(form: str, text: str) -> object:
    """The text as its readers read it."""
    if form in ("json", "sarif", "badge", "cyclonedx", "spdx"):
        return json.loads(text)
    if form == "junit":
        return ET.fromstring(text)
    if form == "csv":
        return list(csv.DictReader(io.StringIO(text)))
    return text


@pytest.mark.parametrize("form", list_formats())
def test_every_format_is_printed_and_written(desk: Desk, form: str) -> None:
    """A file holds what is printed, but for the width and colours of the terminal."""
    desk("run", 100)

    printed = ran("report", "run", "--format", form)
    written = ran("report", "run", "--format", form, "--out", "file")

    assert (printed.exit_code, written.exit_code) == (0, 0)
    assert written.stdout == ""
    text = Path("file").read_text(encoding="utf-8")
    assert parsed(form, text)
    if form != "table":
        assert text == printed.stdout
    if form != "sarif":  # which holds complaints only
        assert "75" in text


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("a.md", "**"),
        ("a.json", "{"),
        ("a.html", "<!doctype html>"),
        ("a.xml", "<?xml"),
        ("a.sarif", "{"),
        ("a.csv", '"run",'),
        ("a.txt", "Robust accuracy"),
    ],
)
def test_the_suffix_says_the_format(desk: Desk, name: str, start: str) -> None:
    desk("run", 100)

    assert ran("report", "run", "--out", name).exit_code == 0

    assert Path(name).read_text(encoding="utf-8").lower().startswith(start.lower())


@pytest.mark.parametrize(
    "words", [["check", "run"], ["baseline", "update", "run"], ["compare", "run", "run"]]
)
def test_a_cell_that_was_taken_out_of_the_record_is_missed(desk: Desk, words: list[str]) -> None:
    desk("run", 100)
    Path("robusteval.toml").write_text("[[gate]]\nfloor = 0.1\n")
    path = Path("run/run.json")
    record = json.loads(path.read_text())
    record["cells"] = [cell for cell in record["cells"] if cell["role"] == "clean"]
    path.write_text(json.dumps(record))

    result = ran(*words)

    assert result.exit_code == 3
    assert "pgd:eps=8/255: not finished" in result.stderr
    assert not Path("robustness-baseline.json").exists()
    told = ran("report", "run").stdout
    assert told.startswith("Incomplete: 0 of 1 attacks finished.")


def test_nothing_is_written_over_without_force(desk: Desk) -> None:
    """And not before it is asked."""
    desk("run", 100)
    Path("a.md").write_text("mine")

    refused = ran("report", "run", "--out", "a.md")

    assert refused.exit_code == 2
    assert "is there already" in refused.stderr
    assert Path("a.md").read_text() == "mine"
    assert ran("report", "run", "--out", "a.md", "--force").exit_code == 0
    assert Path("a.md").read_text(encoding="utf-8").startswith("**Robust")


def test_a_suffix_that_says_nothing_is_asked_about(desk: Desk) -> None:
    desk("run", 100)

    result = ran("report", "run", "--out", "a.pdf")

    assert result.exit_code == 2
    assert "add --format" in result.stderr
    assert not Path("a.pdf").exists()
    assert ran("compare", "run", "run", "--out", "a.html").exit_code == 2


@pytest.mark.parametrize("form", SHIPPED)
def test_a_history_is_told_or_refused(desk: Desk, form: str) -> None:
    """In no form it is dropped without a word."""
    desk("before", 50, created="2026-01-01T00:00:00+00:00")
    desk("run", 100)

    plain = ran("report", "run", "--format", form)
    told = ran("report", "run", "--format", form, "--history", "before")

    if told.exit_code == 2:
        assert "has no place for --history: choose table, markdown, json or html" in told.stderr
    else:
        assert plain.stdout != told.stdout
        assert "before" in told.stdout


def test_a_run_given_twice_is_refused(desk: Desk) -> None:
    """However it is spelled: a table would count its numbers twice."""
    desk("run", 10)

    refused = ran("report", "run", "./run/../run")

    assert refused.exit_code == 2
    assert "given twice" in refused.stderr


@pytest.mark.parametrize("form", list_formats())
def test_several_runs_are_one_report(desk: Desk, form: str) -> None:
    """But a badge, which has room for one number."""
    desk("one", 100)
    desk("two", 200)

    result = ran("report", "one", "two", "--format", form)

    if form == "badge":
        assert result.exit_code == 2
        return
    assert result.exit_code == 0
    assert parsed(form, result.stdout)
    if form not in ("sarif", "cyclonedx", "spdx"):  # nothing to complain of; models, not folders
        assert "one" in result.stdout
        assert "two" in result.stdout


def test_a_folder_that_is_no_run_a_changed_and_a_newer_one_are_told_apart(desk: Desk) -> None:
    """Two, three, two."""
    Path("empty").mkdir()
    changed, newer = desk("changed", 10), desk("newer", 10)
    cell = max((changed / "samples").iterdir())
    cell.write_bytes(cell.read_bytes()[:-1])
    record = newer / "run.json"
    record.write_text(record.read_text().replace('"format": 1', '"format": 99'))

    for command in (["report"], ["check", "--baseline", "none.json"]):
        for name, code in (("empty", 2), ("absent", 2), ("newer", 2)):
            assert ran(*command, name).exit_code == code
    for name, code, word in (
        ("empty", 2, "no run.json"),
        ("newer", 2, "has format 99"),
        ("changed", 3, "was changed"),
    ):
        result = ran("report", name)
        assert (result.exit_code, result.stdout) == (code, "")
        assert word in result.stderr


def test_compare_says_what_changed(desk: Desk) -> None:
    desk("before", 100)
    desk("after", 140)

    table, page, record = (
        ran("compare", "before", "after", "--format", form)
        for form in ("table", "markdown", "json")
    )

    assert {table.exit_code, page.exit_code, record.exit_code} == {0}
    assert "-10.0" in table.stdout
    assert json.loads(record.stdout)
    assert ran("compare", "before", "after", "--out", "c.md").exit_code == 0
    assert Path("c.md").read_text(encoding="utf-8") == page.stdout
    assert ran("compare", "before", "after", "--out", "c.txt").exit_code == 0


def test_runs_on_other_images_are_not_compared(desk: Desk) -> None:
    desk("one", 10)
    other = {"name": "other", "sha256": "1" * 64, "samples": N, "total": N, "shape": [1, 2, 2]}
    desk("two", 10, data=other, config={"attacks": [], "samples": N, "seed": 7, "command": ""})

    result = ran("compare", "one", "two")

    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ")


def test_a_baseline_is_written_only_when_asked(desk: Desk) -> None:
    """What changes is printed; a dry run writes nothing; twice the same run, the same bytes."""
    desk("run", 100)
    file = Path("robustness-baseline.json")

    dry = ran("baseline", "update", "run", "--dry-run")
    assert (dry.exit_code, file.exists()) == (0, False)
    assert "75.0 %" in dry.stdout

    wet = ran("baseline", "update", "run")
    assert (wet.exit_code, wet.stdout) == (0, dry.stdout)
    first, written = file.read_bytes(), file.stat().st_mtime_ns
    again = ran("baseline", "update", "run")
    assert (again.exit_code, again.stdout) == (0, "nothing changes\n")
    assert "was left as it is" in again.stderr
    assert (file.read_bytes(), file.stat().st_mtime_ns) == (first, written)


def test_the_same_run_at_another_time_leaves_the_baseline_as_it_is(desk: Desk) -> None:
    desk("run", 100)
    desk("later", 100, created="2027-01-01T00:00:00+00:00")
    ran("baseline", "update", "run")
    file = Path("robustness-baseline.json")
    first = file.read_bytes()

    assert ran("baseline", "update", "later").stdout == "nothing changes\n"
    assert file.read_bytes() == first


def test_a_file_that_is_no_baseline_is_not_written_over(desk: Desk) -> None:
    desk("run", 100)
    Path("mine.json").write_text("{}")
    Path("folder").mkdir()

    for name in ("mine.json", "folder"):
        assert ran("baseline", "update", "run", "--baseline", name).exit_code == 2
    assert Path("mine.json").read_text() == "{}"


def test_a_run_against_itself_passes(desk: Desk) -> None:
    """With the default gate, or the baseline and gates that the configuration names."""
    desk("run", 100)
    ran("baseline", "update", "run")

    assert ran("check", "run", "--baseline", "robustness-baseline.json").exit_code == 0

    Path("robusteval.toml").write_text(
        'baseline = "robustness-baseline.json"\n[[gate]]\nfloor = 0.7\nmax_drop = 0.01\n'
    )
    result = ran("check", "run")
    assert result.exit_code == 0
    assert "passed" in result.stdout
    assert ran("baseline", "update", "run").exit_code == 0


def test_a_run_that_lost_much_fails(desk: Desk) -> None:
    """Exit code 1, the report on stdout, and the same with a file."""
    desk("before", 100)
    desk("after", 160)
    ran("baseline", "update", "before", "--baseline", "b.json")

    result = ran("check", "after", "--baseline", "b.json")
    filed = ran("check", "after", "--baseline", "b.json", "--out", "gates.xml")

    assert (result.exit_code, filed.exit_code) == (1, 1)
    assert "FAILED" in result.stdout
    assert "FAILED" in filed.stderr
    failures = ET.parse("gates.xml").getroot().findall(".//failure")
    assert len(failures) == 1


def test_a_floor_that_the_interval_straddles_is_inconclusive(desk: Desk) -> None:
    desk("run", 100)
    Path("gates.toml").write_text("[[gate]]\nfloor = 0.74\n")

    result = ran("check", "run", "--config", "gates.toml")

    assert result.exit_code == 5
    assert "inconclusive" in result.stdout


def test_failed_comes_before_inconclusive_when_there_are_several_runs(desk: Desk) -> None:
    desk("good", 100)
    desk("bad", 300)
    Path("gates.toml").write_text("[[gate]]\nfloor = 0.74\n")

    assert ran("check", "good", "bad", "--config", "gates.toml").exit_code == 1


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({"status": "incomplete"}, 3),
        ({"failures": {"fgsm": "broke"}}, 3),
        ({"right": 0}, 5),
    ],
)
def test_nothing_is_green_that_was_not_evaluated(
    desk: Desk, changed: dict[str, Any], code: int
) -> None:
    desk("run", 0, **changed)
    Path("gates.toml").write_text("[[gate]]\nfloor = 0\n")

    result = ran("check", "run", "--config", "gates.toml")

    assert result.exit_code == code
    assert result.stderr.startswith("Error: ")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[gate]]\nflor = 0.4\n", "did you mean 'floor'"),
        ("[[gate]]\nfloor = 4\n", "floor"),
        ("[[gate\n", "TOML"),
    ],
)
def test_mistakes_in_the_gates_are_named(desk: Desk, text: str, words: str) -> None:
    desk("run", 100)
    Path("robusteval.toml").write_text(text)

    result = ran("check", "run")

    assert result.exit_code == 2
    assert words in result.stderr
    assert "robusteval.toml" in result.stderr


def test_without_gates_and_baseline_an_example_is_shown(desk: Desk) -> None:
    desk("run", 100)

    result = ran("check", "run")

    assert result.exit_code == 2
    assert "[[gate]]" in result.stderr


def test_inside_github_there_are_a_summary_and_annotations(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Annotations on stderr: stdout is the report and nothing else."""
    desk("run", 300)
    Path("robusteval.toml").write_text("[[gate]]\nfloor = 0.4\n")
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))

    result = ran("check", "run", "--format", "json")

    assert result.exit_code == 1
    assert json.loads(result.stdout)["gates"]["outcome"] == "failed"
    assert result.stderr.startswith("::error file=robusteval.toml,line=1")
    assert "Robust accuracy" in (tmp_path / "summary.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("floor", "code"), [(0.0, 0), (1.0, 1)])
def test_an_evaluation_is_checked_in_one_go(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, floor: float, code: int
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("robusteval.toml").write_text(f"[[gate]]\nfloor = {floor}\n")
    words = ["evaluate", "demo", "--samples", "20", "--no-probes", "--attack", "pgd:eps=.2,steps=5"]

    result = ran(*words, "--check")

    assert result.exit_code == code
    assert result.stdout.startswith("Robust accuracy")
    assert ("FAILED" in result.stdout) == bool(code)
    assert ran(*words, "--baseline", "b.json").exit_code == 2


def test_a_format_of_another_package_is_offered_and_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    latex = registry.Entry("latex", "another.package", "LaTeX.", suffix=".tex")
    known = {**registry.REPORT_FORMATS.entries, "latex": latex}
    monkeypatch.setitem(vars(registry.REPORT_FORMATS), "entries", known)
    options = {parameter.name: parameter for parameter in report.params}

    form = options["form"]

    assert isinstance(form, click.Option)
    assert form.help == (
        "table, markdown, json, html, junit, sarif, csv, images, badge, cyclonedx, spdx,"
        " model-card or latex. [default: table]"
    )
    assert form.type.convert("latex", form, None) == "latex"
    with pytest.raises(click.BadParameter, match="'model-card', 'latex'"):
        form.type.convert("tex", form, None)
