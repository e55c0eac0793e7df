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
from robusteval.evaluation.perturbing import perturb as perturbing

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


def test_several_attacks_are_set_side_by_side_and_go_on_after_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first attack is not made again; each has a folder, and all have one page."""
    monkeypatch.chdir(tmp_path)
    made: list[str] = []

    def perturb(attack: Any, *given: Any, **more: Any) -> Any:
        made.append(attack.spec.name)
        if len(made) == 2 and made[-1] == "fgsm":
            raise KeyboardInterrupt
        return perturbing(attack, *given, **more)

    monkeypatch.setattr(case, "perturb", perturb)
    words = ("--attack", "fgsm:eps=0.1", "--out", "both")
    assert ran(*words).exit_code == 130
    resumed = ran(*words)

    assert resumed.exit_code == 0, resumed.stderr
    assert made == ["pgd", "fgsm", "fgsm"]
    found = json.loads(Path("both/explanations.json").read_text())
    assert [each["attack"] for each in found["attacks"]] == ["pgd:eps=0.1,steps=3", "fgsm:eps=0.1"]
    assert {box["map"] for box in found["boxes"]} == {"cam", "gradcam", "gradcam_plus_plus"}
    assert "cam and gradcam are the same map" in found["remarks"][0]
    assert json.loads(Path("both/1-pgd/explanation.json").read_text()) == found["attacks"][0]
    assert len(list(Path("both/2-fgsm").glob("image-*.png"))) == 4
    page = Path("both/report.html").read_text()
    assert "2-fgsm/explanation.json" in page
    assert page.count("<img src=") == 2
    assert "Interpretability scores" in resumed.stdout
    assert max(map(len, resumed.stdout.splitlines())) <= 80
    assert ran(*words).exit_code == 2


def test_the_same_attack_twice_is_refused() -> None:
    refused = ran("--attack", "pgd:eps=0.1,steps=3")

    assert refused.exit_code == 2
    assert "the same attack is asked for twice" in refused.stderr
