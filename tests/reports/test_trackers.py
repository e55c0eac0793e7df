"""What MLflow and Weights & Biases are given of a run; stand-ins that write down what they get."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from robusteval.cli import cli
from robusteval.reports.build import build_record
from robusteval.reports.trackers import build_tracked
from robusteval.runs.types import Finding, Outcome, Run, Spec, Threat

MakeOutcome = Callable[..., Outcome]
MakeRun = Callable[..., Run]
N = 40


@pytest.fixture
def run(make_outcome: MakeOutcome, make_run: MakeRun) -> Run:
    """A run of an attack and of a corruption."""
    fog = make_outcome(
        np.arange(N) < 4,
        spec=Spec("corruption", {"kind": "fog", "severity": 1}),
        threat=Threat("corruption", 1, False),
        knowledge="none",
    )
    fog = replace(fog, resolved={"kind": "fog", "severity": 1})
    return make_run(make_outcome(np.arange(N) < 30), fog, n=N)


class FakeMlflow(ModuleType):
    """As much of MLflow as is used."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.got: dict[str, Any] = {"files": {}}

    @contextmanager
    def start_run(self, *, run_name: str) -> Iterator[None]:
        """A run that is closed again."""
        print("View run at http://localhost")
        self.got["name"] = run_name
        yield
        self.got["closed"] = True

    def log_params(self, given: Mapping[str, Any]) -> None:
        """Parameters of at most 500 characters."""
        assert all(len(value) <= 500 for value in given.values())
        self.got["params"] = given

    def log_metrics(self, given: Mapping[str, float]) -> None:
        """Numbers by names that MLflow's files can have."""
        assert all(set(name).isdisjoint(":/()%") for name in given)
        self.got["numbers"] = given

    def set_tags(self, given: Mapping[str, str]) -> None:
        """Words."""
        self.got["tags"] = given

    def log_text(self, text: str, name: str) -> None:
        """A file."""
        self.got["files"][name] = text


class FakeWandb(ModuleType):
    """As much of Weights & Biases as is used: the module, its run and its artifact in one."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.got: dict[str, Any] = {"files": {}}
        self.summary: dict[str, float] = {}

    @contextmanager
    def init(self, **given: Any) -> Iterator[FakeWandb]:
        """A run that is closed again."""
        self.got |= given
        yield self
        self.got |= {"numbers": self.summary, "closed": True}

    def Artifact(self, name: str, type: str) -> FakeWandb:
        """Files that belong together."""
        return self

    @contextmanager
    def new_file(self, name: str, encoding: str) -> Iterator[io.StringIO]:
        """One of them."""
        file = io.StringIO()
        yield file
        self.got["files"][name] = file.getvalue()

    def log_artifact(self, artifact: FakeWandb) -> None:
        """The files are kept."""
        assert artifact.got["files"]


@pytest.mark.parametrize("fake", [FakeMlflow, FakeWandb])
def test_numbers_with_intervals_settings_and_reports_are_handed_on(
    fake: type[FakeMlflow | FakeWandb],
    run: Run,
    keep_run: Callable[[Run, Path], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To each tracker the same; stdout has the report alone."""
    tracker = fake()
    monkeypatch.setitem(sys.modules, tracker.__name__, tracker)
    folder = keep_run(run, tmp_path / "run")

    ended = CliRunner().invoke(
        cli, ["report", str(folder), "--format", "json", "--log", tracker.__name__]
    )

    assert ended.exit_code == 0, ended.output
    whole, got = json.loads(ended.stdout), tracker.got
    numbers, robust = got["numbers"], whole["worst_cases"][0]["robust_accuracy"]["float"]
    name = "robust_accuracy_linf_eps_8_255"
    assert {end: numbers[f"{name}_{end}"] for end in ("k", "n", "low", "high")} == {
        end: robust[end] for end in ("k", "n", "low", "high")
    }
    mean = whole["corruptions"][0]["accuracy"]
    assert numbers["mean_accuracy_under_corruptions_1_corruption"] == mean["value"]
    assert numbers["attack_corruption_kind_fog_severity_1"] == mean["value"]
    assert got["closed"]
    assert "<html" in got["files"]["report.html"]
    assert json.loads(got["files"]["report.json"]) == whole
    settings = got.get("params") or got["config"]
    assert settings["seed"] == str(whole["provenance"]["seed"])


def test_no_number_of_a_run_that_is_not_to_be_used(run: Run) -> None:
    """But why there is none."""
    record = build_record(replace(run, findings=(Finding("guessing", True, "It guesses."),)))

    tracked = build_tracked(record)

    assert tracked.numbers == {}
    assert tracked.notes["robusteval.verdict"].startswith("Not to be used")


@pytest.mark.parametrize("command", ["report run", "evaluate demo --out new"])
def test_a_tracker_that_is_missing_is_a_sentence_before_any_work(
    command: str,
    run: Run,
    keep_run: Callable[[Run, Path], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("robusteval.reports.trackers.find_spec", lambda name: None)
    keep_run(run, tmp_path / "run")

    ended = CliRunner().invoke(cli, [*command.split(), "--log", "wandb"])

    assert ended.exit_code == 2
    assert "--log wandb needs the package wandb: pip install wandb" in ended.stderr
    assert not (tmp_path / "new").exists()
    assert ended.stdout == ""


def test_a_tracker_that_breaks_costs_no_report(
    run: Run,
    keep_run: Callable[[Run, Path], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The report is printed, and how to try again is said."""
    broken = ModuleType("mlflow")
    monkeypatch.setitem(sys.modules, "mlflow", broken)
    folder = keep_run(run, tmp_path / "run")

    ended = CliRunner().invoke(cli, ["report", str(folder), "--log", "mlflow"])

    assert ended.exit_code == 3
    assert "Robust accuracy" in ended.stdout
    assert "mlflow did not take the run (AttributeError" in ended.stderr
    assert "MLFLOW_TRACKING_URI" in ended.stderr
