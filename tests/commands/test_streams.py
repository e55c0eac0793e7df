"""Text from outside never makes a line of its own: every command's stdout and stderr, as a process
leaves them, against a table of hostile texts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner

from robusteval.cli import cli
from robusteval.commands import listing, shell
from robusteval.errors import UsageError
from robusteval.reports.mask import MaskFigures, MaskRecord, render_mask
from robusteval.reports.training import TrainingRecord, render_training
from robusteval.runs.statistics import Rate
from robusteval.runs.types import Defended, Finding, Outcome, Run, Spec, spell_line

HOSTILE = {
    "command": "::error::x",
    "old command": "x ##[error]y",
    "line": "a\n::error file=b::c",
    "return": "a\r::warning::b",
    "other lines": "a\u2028::error::b\x85::error::c\x0b::error::d\x0c::error::e",
    "indented": "a\n    ::add-mask::b",
    "escape": "\x1b[2J\x1b]0;title\x07\x9b31m",
    "bidi": "\u202egnp\u2066\u200f",
    "zero": "\x00\x08\x7f",
}
ANNOTATION = re.compile(r"::(?:error|warning) file=[^:,]*,line=\d+,title=[^:,]*::.*")
TEXTS = pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())


def check_stream(said: str, annotated: bool = False) -> None:
    """Fail if anything in it steers a terminal, or is a command to a runner that is not ours."""
    for line in said.split("\n"):
        assert line.isprintable(), repr(line)
        if line.lstrip().startswith("::"):
            assert annotated, line
            assert ANNOTATION.fullmatch(line), line
        else:
            assert "##[" not in line, line


@pytest.fixture
def put(
    make_outcome: Callable[..., Outcome],
    make_run: Callable[..., Run],
    keep_run: Callable[[Run, Path], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Path]:
    """Puts a run into a working folder, with a text wherever one can come from outside."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    Path("robusteval.toml").write_text("[[gate]]\nfloor = 0.5\n")

    def make(name: str, text: str, **changed: Any) -> Path:
        attack = Spec("pgd", {"value": text})
        outcome = make_outcome(np.arange(60) < 30, spec=attack, notes=(text,))
        defense = Spec("jpeg", {"file": text})
        behind = replace(outcome, defense=defense)
        run = make_run(outcome, behind)
        facts: dict[str, Any] = {
            "config": {**run.config, "attacks": [str(attack)], "command": text},
            "model": {**run.model, "arch": text, "file": text},
            "data": {**run.data, "name": text, "class_names": [f"{text}{i}" for i in range(10)]},
            "environment": {**run.environment, "device": text, text: text},
            "findings": (Finding(text, True, text, text),),
            "defenses": (Defended(defense, "model", run.clean, {text: text}),),
        }
        return keep_run(replace(run, **{**facts, **changed}), Path(name))

    return make


Put = Callable[..., Path]
COMMANDS = {
    "report": ["report", "run", "same"],
    "report --format markdown": ["report", "run", "--format", "markdown"],
    "report --format html": ["report", "run", "--format", "html"],
    "report --format csv": ["report", "run", "--format", "csv"],
    "report --format junit": ["report", "run", "--format", "junit"],
    "check": ["check", "run"],
    "compare": ["compare", "run", "other"],
    "compare --format markdown": ["compare", "run", "other", "--format", "markdown"],
    "compare with other classes": ["compare", "run", "plain"],
    "baseline update": ["baseline", "update", "run"],
    "baseline update twice": ["baseline", "update", "other"],
    "check what is unfinished": ["check", "failed"],
    "baseline update of what is unfinished": ["baseline", "update", "failed"],
    "compare with what is unfinished": ["compare", "run", "failed"],
    "report on what is unfinished": ["report", "failed"],
}


@TEXTS
def test_no_command_on_runs_prints_a_line_from_outside(put: Put, text: str) -> None:
    names = {"class_names": [f"c{i}" for i in range(10)]}
    put("run", text)
    put("same", text)
    put("other", text, model={"arch": text + "2", "file": text + "3"})
    put("plain", text, data=names)
    put("failed", text, failures={text: text}, status="incomplete")

    for words in COMMANDS.values():
        result = CliRunner().invoke(cli, words)
        assert "internal error" not in result.stderr
        check_stream(result.stderr)
        if "--format" in words and text == HOSTILE["old command"]:
            continue  # other formats show it as it is, inside a line: they are read by programs
        check_stream(result.stdout)


@TEXTS
def test_annotations_are_the_only_commands_to_a_runner(
    put: Put, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    put("run", text)

    result = CliRunner().invoke(cli, ["check", "run"])

    assert result.stderr.startswith("::error file=robusteval.toml,line=1,")
    check_stream(result.stderr, annotated=True)
    check_stream(result.stdout)


@TEXTS
@pytest.mark.parametrize(
    "words",
    [
        ["report", "{}"],
        ["check", "{}"],
        ["compare", "{}", "{}"],
        ["baseline", "update", "{}"],
        ["report", "run", "--format", "{}"],
        ["report", "run", "--out", "{}"],
        ["{}"],
        ["--{}"],
        ["check", "run", "--baseline", "{}"],
        ["check", "run", "--config", "{}"],
        ["list", "{}"],
        ["evaluate", "{}", "--data", "{}"],
        ["evaluate", "demo", "--attack", "{}"],
        ["evaluate", "demo", "--preset", "{}"],
        ["evaluate", "demo", "--batch-size", "{}"],
        ["evaluate", "demo", "--samples", "{}"],
        ["explain", "{}", "--data", "{}"],
        ["train", "{}", "--data", "{}"],
        ["defend", "detector", "{}"],
        ["defend", "mask", "{}"],
    ],
    ids=" ".join,
)
def test_what_is_asked_wrongly_is_said_in_one_line(put: Put, text: str, words: list[str]) -> None:
    put("run", "plain")

    text = text.replace("\0", "")  # cannot be in an argument
    result = CliRunner().invoke(cli, [word.format(text) for word in words])

    assert result.exit_code != 0
    assert "internal error" not in result.stderr
    check_stream(result.stderr)
    check_stream(result.stdout)


@TEXTS
@pytest.mark.parametrize("kind", [UsageError, OSError, RuntimeError, click.UsageError])
def test_whatever_a_command_raises_is_told_in_lines_of_our_own(
    text: str, kind: type[Exception], capsys: pytest.CaptureFixture[str]
) -> None:
    group = shell.Commands("x")

    @group.command()
    def broken() -> None:
        raise UsageError(text, [text, text]) if kind is UsageError else kind(text)

    with pytest.raises(SystemExit):
        group.main(["broken"])

    said = capsys.readouterr().err
    check_stream(said)
    lines = [line for line in said.splitlines() if line and not line.startswith(("Usage", "Try"))]
    assert len(lines) == (3 if kind is UsageError else 1)
    assert spell_line(text) in lines[0]


@TEXTS
def test_what_trainings_and_masks_print_is_in_lines_of_our_own(text: str) -> None:
    half = Rate(5, 10)
    figures = MaskFigures(half, half, half)
    mask = MaskRecord(
        text,
        text,
        8,
        2,
        False,
        "random",
        9,
        text,
        text,
        True,
        figures,
        figures,
        figures,
        text,
        (text,),
    )
    training = TrainingRecord(text, text, 1, 2, text, half, half, 7, 0.1, None, None)

    check_stream(render_mask(mask))
    check_stream(render_training(training))
    assert len(render_training(training).splitlines()) == 2


@TEXTS
def test_a_name_in_a_list_stays_in_its_line(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    everything = {"presets": [{"name": text, "summary": text, "attack": [text]}]}

    shell.emit_lines(listing.lay_out(everything))

    check_stream(capsys.readouterr().out)


def test_a_baseline_that_says_the_hostile_is_told_of_in_lines_of_our_own(put: Put) -> None:
    for name, text in HOSTILE.items():
        put(name, text)
        before = json.loads(Path(name, "run.json").read_text())["model"]["arch"]
        assert before == text
        check_stream(CliRunner().invoke(cli, ["baseline", "update", name]).stdout)
