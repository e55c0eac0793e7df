"""`robusteval explain`: what is finished survives a stop."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from robusteval.analysis import case, explain
from robusteval.cli import cli

WORDS = ("explain", "demo", "--samples", "4", "--attack", "pgd:eps=0.1,steps=3")


def ran(*words: str) -> Result:
    """The command, as far as it comes."""
    return CliRunner().invoke(cli, [*WORDS, *words])


def read(folder: str) -> Any:
    """The record of an explanation without what changes from call to call."""
    changes = {"created", "seconds", "command"}
    return json.loads(
        Path(folder, "explanation.json").read_text(),
        object_hook=lambda found: {name: found[name] for name in found if name not in changes},
    )


def stop(*given: Any, **more: Any) -> None:
    """Somebody presses Ctrl-C."""
    raise KeyboardInterrupt


def test_a_stopped_explanation_goes_on_without_attacking_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert ran("--out", "whole").exit_code == 0
    assert not Path("whole.part").exists()

    with monkeypatch.context() as patch:
        patch.setattr(explain, "draw_maps", stop)
        stopped = ran("--out", "again")
    assert stopped.exit_code == 130
    assert "the same command continues where this one ended" in stopped.stderr
    assert any(Path("again.part").iterdir())

    with monkeypatch.context() as patch:
        patch.setattr(case, "perturb", stop)
        resumed = ran("--out", "again")
    assert resumed.exit_code == 0, resumed.stderr
    assert "Continuing with what again.part holds." in resumed.stderr
    assert read("again") == read("whole")
    assert not Path("again.part").exists()


def test_a_pipe_as_the_folder_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("taken")

    result = ran("--out", "taken")

    assert (result.exit_code, result.stderr) == (
        2,
        "Error: --out taken is no folder: choose another\n",
    )


def test_a_second_attack_is_refused_instead_of_the_first_dropped() -> None:
    """Whoever names two believes that both are explained."""
    refused = ran("--attack", "fgsm")

    assert refused.exit_code == 2
    assert "explain takes one attack, not 2" in refused.stderr
