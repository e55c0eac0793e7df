"""`evaluate` without a checkpoint does as robusteval.toml says; so do pytest and the action."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result

from robusteval.cli import cli
from robusteval.models.demo import demo

ROOT = Path(__file__).parents[2]
SETTINGS = """
[evaluate]
checkpoint = "net.safetensors"
data = "val.npz"
samples = 4
attack = ["pgd:eps=8/255,steps=2"]
no-probes = true
out = "run"

[[gate]]
floor = {floor}
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a network, images and settings whose gate holds."""
    from robusteval.datasets.sources import open_data

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    Path("net.safetensors").write_bytes(demo().read_bytes())
    batch = open_data("digits").batch(range(6))
    np.savez("val.npz", x=batch.x.numpy(), y=batch.y.numpy())
    write_settings(0.0)
    return tmp_path


def write_settings(floor: float, **more: str) -> None:
    """The settings, with this floor and more lines of options."""
    text = SETTINGS.format(floor=floor)
    extra = "".join(f"{key} = {value}\n" for key, value in more.items())
    Path("robusteval.toml").write_text(text.replace("[evaluate]\n", f"[evaluate]\n{extra}"))


def ran(*words: str) -> Result:
    """What a command says and does."""
    return CliRunner().invoke(cli, list(words))


def run_step(step: Mapping[str, Any], inputs: Mapping[str, str]) -> int:
    """Run a step of the action as GitHub does, but for the installation."""
    variables = {
        name: inputs[text.removeprefix("${{ inputs.").removesuffix(" }}")]
        for name, text in step.get("env", {}).items()
    }
    shell = {"python": [sys.executable], "bash": ["bash", "-e"]}[step["shell"]]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    Path("step").write_text(step["run"])
    return subprocess.run(
        [*shell, "step"], env={**os.environ, **variables, "PATH": path}, check=False
    ).returncode


def run_pytest(*words: str) -> tuple[int, str]:
    """Exit code and output of pytest with our plugin, in the working directory."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *words]
    if not is_installed():
        command += ["-p", "robusteval.testing.plugin"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def is_installed() -> bool:
    """Whether pytest finds the plugin by itself, as it does once the package is installed anew."""
    from importlib.metadata import entry_points

    return any(each.name == "robusteval" for each in entry_points(group="pytest11"))


def test_evaluate_alone_does_what_the_file_says(project: Path) -> None:
    """Options that are given win; the command in the record says all."""
    done = ran("evaluate", "--check", "--samples", "3")

    assert done.exit_code == 0, done.stderr
    assert "Settings of robusteval.toml" in done.stderr
    record = json.loads(Path("run/run.json").read_text())
    config = record["config"]
    assert config["samples"] == 3
    assert config["attacks"] == ["pgd:eps=8/255,steps=2"]
    assert record["command"].endswith(
        "net.safetensors --data val.npz --attack pgd:eps=8/255,steps=2 --no-probes --out run"
    )


def test_a_named_checkpoint_leaves_the_file_aside(project: Path) -> None:
    """A file in a folder names no code for another network; with --config it is asked for."""
    write_settings(0.0, arch='"evil.py:Net"')
    Path("evil.py").write_text("raise SystemExit(99)")

    alone = ran("evaluate", "net.safetensors", "--data", "nothing.npz")
    asked = ran("evaluate", "net.safetensors", "--config", "robusteval.toml")

    assert "nothing.npz" in alone.stderr
    assert "Settings" not in alone.stderr
    assert asked.exit_code != 0
    assert "evil" in asked.stderr


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("sample = 3", "unknown option 'sample'"),
        ("fresh = true", "unknown option 'fresh'"),
        ("check = 1", "check must be true or false"),
        ("samples = true", "samples must be a text, a number, or a list"),
        ("data = []", "data must be a text, a number, or a list"),
        ("samples = 0", "0 is not in the range"),
    ],
)
def test_wrong_settings_are_refused_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pyproject.toml").write_text(f"[tool.robusteval.evaluate]\ncheckpoint='demo'\n{line}\n")

    done = ran("evaluate")

    assert done.exit_code == 2
    assert said in done.stderr


def test_options_outside_of_their_table_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    table = "samples = 3\n[evaluate]\ndata = 'digits'\n"
    Path("robusteval.toml").write_text(f"checkpoint = 'demo'\n{table}")
    several = ran("evaluate")
    Path("robusteval.toml").unlink()
    Path("pyproject.toml").write_text("[tool.robusteval]\ncheckpoint = 'demo'\n")
    one = ran("evaluate")

    assert (several.exit_code, one.exit_code) == (2, 2)
    assert "checkpoint, samples stand outside" in several.stderr
    assert "put them below a line [evaluate]" in several.stderr
    assert "checkpoint stands outside" in one.stderr
    assert "put it below a line [tool.robusteval.evaluate]" in one.stderr


def test_without_a_checkpoint_and_a_file_it_says_what_to_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    assert "name a checkpoint" in ran("evaluate").stderr
    Path("robusteval.toml").write_text("evaluate = 3\n")
    assert "must be a table" in ran("evaluate").stderr
    assert ran("evaluate", "--help").exit_code == 0


def test_pytest_runs_the_gates_where_it_is_asked_to(project: Path) -> None:
    """A kept gate passes, a broken one fails with the report; without the option nothing runs."""
    Path("test_net.py").write_text(
        "def test_net(robust):\n"
        "    robust('net.safetensors', 'val.npz', attack='pgd:eps=8/255,steps=2', floor=0.0,\n"
        "           samples=4, allow=['weak-attacks'])\n"
    )

    code, said = run_pytest("-q", "test_net.py")
    assert code == 0, said
    assert "1 skipped" in said

    write_settings(0.9)
    code, said = run_pytest("-q", "--robusteval", "test_net.py")
    assert code == 1, said
    assert "1 failed, 1 passed" in said
    assert "FAILED" in said
    assert "at least 90" in said


def test_the_action_does_what_its_inputs_say(project: Path) -> None:
    """Its steps, with its defaults; text of an input is an argument and never a command."""
    action = yaml.safe_load((ROOT / "action.yml").read_text())
    inputs = {name: each["default"] for name, each in action["inputs"].items()}
    _, evaluate, report = action["runs"]["steps"]
    hostile = {**inputs, "arguments": "--samples 3 --data '$(touch hacked).npz'"}

    assert run_step(evaluate, inputs) == 0
    assert run_step(report, inputs) == 0
    assert Path("robustness.html").is_file()
    assert run_step(evaluate, hostile) == 2
    assert not Path("hacked").exists()
    assert run_step(report, {**inputs, "out": "nowhere"}) == 0


def test_no_input_of_the_action_stands_in_a_script() -> None:
    """There it could end the script and begin another."""
    action = yaml.safe_load((ROOT / "action.yml").read_text())
    assert not [step for step in action["runs"]["steps"] if "${{" in step["run"]]
