"""`robusteval reproduce` by several processes: its tables are those of one."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
from click.testing import CliRunner, Result
from recipes import Here
from tiny_paper import tiny

from robusteval.analysis import case, regions
from robusteval.analysis.papers import shards
from robusteval.analysis.papers.declaration import Paper
from robusteval.cli import cli
from robusteval.commands import reproduce
from robusteval.evaluation import workers
from robusteval.evaluation.bench import Bench
from robusteval.evaluation.columns import AttackedColumns
from robusteval.evaluation.plan import Plan

WORDS = ("pgap", "--hardened", "demo")
CLOCK = ("seconds", "command")


def declare(name: str) -> Paper:
    """The paper without masks of units, which no shard makes."""
    return replace(tiny(name), masked={})


def ran(*words: str) -> Result:
    """The command, as far as it comes."""
    return CliRunner().invoke(cli, ["reproduce", *words])


def succeed(*words: str) -> str:
    """What the command prints, which must come to its end."""
    ended = ran(*WORDS, *words)
    assert ended.exit_code == 0, ended.stderr
    return ended.stdout


def read_report(out: str) -> dict[str, Any]:
    """The report of the paper, but for times and the command."""
    found = json.loads(Path(out, "pgap-small", "report.json").read_text())
    return {name: value for name, value in found.items() if name not in CLOCK}


def refuse_work(*given: object, **more: object) -> NoReturn:
    """In the place of what a shard has done already."""
    raise AssertionError("something was computed again")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which the paper was measured by one process, and by two shards."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("papers")
        patch.chdir(folder)
        patch.setattr(reproduce, "read_paper", declare)
        succeed("--out", "whole")
        yield folder


@pytest.fixture(scope="module")
def told(place: Path) -> list[str]:
    """What both shards print; the second is killed once on its way."""
    first = succeed("--out", "parts", "--shard", "1/2")
    missing = ran(*WORDS, "--out", "parts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "explain_share", stop)
        killed = ran(*WORDS, "--out", "parts", "--shard", "2/2")
    unfinished = ran(*WORDS, "--out", "parts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AttackedColumns, "measure", refuse_work)
        second = succeed("--out", "parts", "--shard", "2/2")
    assert (missing.exit_code, killed.exit_code, unfinished.exit_code) == (2, 130, 2)
    return [first, missing.stderr, unfinished.stderr, second]


def find_arrays(folder: Path) -> dict[Path, int]:
    """The files of arrays in a folder, and when each was written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.npz")}


def stop(*given: object, **more: object) -> NoReturn:
    """A kill on the way."""
    raise KeyboardInterrupt


def test_a_shard_says_what_it_did_and_what_is_left(told: list[str]) -> None:
    first, missing, unfinished, second = (" ".join(text.split()) for text in told)

    assert first.startswith("Shard 1/2 of pgap is done, in parts/pgap-small/shards/1-of-2:")
    assert "2 of 4 images under 5 attacks, and explained 1." in first
    assert "Not divided: attacks on maps alone." in first
    assert "Not done yet: 2/2. Once all are, the same command without --shard" in first
    assert "shard 2/2 is missing; give the same command with --shard 2/2" in missing
    assert "shard 2/2 is not finished; give the same command with --shard 2/2" in unfinished
    assert "All are done: the same command without --shard makes the tables." in second
    assert all(len(line) <= 80 for text in told[::3] for line in text.splitlines())


def test_joined_shards_are_the_paper_of_one_process(
    place: Path, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of both networks, both seeds, the explanations and their maps; nothing is attacked again."""
    monkeypatch.setattr(AttackedColumns, "measure", refuse_work)
    monkeypatch.setattr(case, "perturb", refuse_work)
    monkeypatch.setattr(regions, "score_by_ablation", refuse_work)
    succeed("--out", "parts")
    whole = read_report("whole")

    assert whole["tables"][0]["rows"][2]["measured"] is not None
    assert read_report("parts") == whole
    succeed("--out", "parts")  # again: what is joined is left as it is
    succeed("--out", "parts", "--fresh")  # and once more from the shards
    assert read_report("parts") == whole


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seed", "1"], "seed: 0 there, 1 here"),
        (["--samples", "3"], "samples: 4 there, 3 here"),
        (["--shard", "1/3"], "shards/1-of-2 is shard 1/2, of another division than 1/3"),
    ],
)
def test_shards_of_another_command_are_refused(
    place: Path, told: list[str], words: list[str], message: str
) -> None:
    """Each in a sentence that names the shard; nothing is joined with it."""
    refused = ran(*WORDS, "--out", "parts", "--fresh", *words)

    assert refused.exit_code == 2
    assert message in refused.stderr
    assert "shard 1/2" in refused.stderr
    assert read_report("parts") == read_report("whole")


def test_a_shard_begins_anew_alone(place: Path, told: list[str]) -> None:
    """`--fresh` leaves what the other has done as it is."""
    here, there = (place / "parts" / "pgap-small" / "shards" / f"{k}-of-2" for k in (1, 2))
    mine, others = find_arrays(here), find_arrays(there)

    succeed("--out", "parts", "--shard", "1/2", "--fresh")

    assert find_arrays(there) == others
    assert find_arrays(here)
    assert not find_arrays(here).items() & mine.items()


def test_workers_make_the_runs_of_a_paper(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each plans its run from what it is sent; explanations and maps stay in this process."""
    kinds: list[str] = []

    @contextmanager
    def open_processes(
        plan: Plan, recipe: Callable[[], Plan], count: int, stopping: Callable[[], bool]
    ) -> Iterator[Here]:
        sent = pickle.loads(pickle.dumps(recipe))
        pool = Here(Bench(sent(), plan.key))
        yield pool
        kinds.extend(task.kind for task in pool.tasks)

    monkeypatch.setattr(workers, "open_processes", open_processes)

    succeed("--out", "helped", "--workers", "2")

    assert kinds.count("clean") == 3
    assert kinds.count("attack") == 5
    assert read_report("helped") == read_report("whole")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("pgap", "--shard", "0/4"), "a shard is written K/N with K from 1 to N"),
        (("pgap", "--shard", "5/4"), "a shard is written K/N with K from 1 to N"),
        (("pgap", "--shard", "x"), "a shard is written K/N with K from 1 to N"),
        (("list", "--shard", "1/2"), "--shard divides the images of a paper: name one"),
        (("pgap", "--workers", "0"), "--workers"),
    ],
)
def test_mistakes_are_named_before_there_is_a_network(words: tuple[str, ...], message: str) -> None:
    refused = ran(*words)

    assert refused.exit_code == 2
    assert message in refused.stderr


def test_more_shards_than_images_are_refused_and_leave_nothing(place: Path) -> None:
    refused = ran(*WORDS, "--shard", "1/5", "--out", "few")

    assert refused.exit_code == 2
    assert "--shard 1/5: there are 4 different images" in refused.stderr
    assert not Path("few").exists()


def test_all_papers_are_divided_alike(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each into shards of its own; one that lacks some keeps no other from its tables."""
    monkeypatch.setattr(reproduce, "list_papers", lambda: iter(["one", "two"]))

    both = ran("all", "--out", "all", "--shard", "1/1")
    Path("all/two-small/shards/1-of-1/done.json").unlink()
    joined = ran("all", "--out", "all")

    assert both.exit_code == 0, both.stderr
    assert [line.split()[3] for line in both.stdout.splitlines() if line[0] != " "] == [
        "one",
        "two",
    ]
    assert joined.exit_code == 3
    assert "1 of 2 papers have no result: two" in joined.stderr
    assert Path("all/one-small/report.json").exists()
