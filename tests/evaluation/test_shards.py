"""Parts of a run, computed apart and joined, are the run of one process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from same_runs import assert_same
from toys import Bands, trained

from robusteval.cli import cli
from robusteval.datasets.dataset import Data
from robusteval.datasets.sources import open_data
from robusteval.errors import Interrupted, RunError, UsageError
from robusteval.evaluation.columns import AttackedColumns
from robusteval.evaluation.defense import ReadyDefense
from robusteval.evaluation.evaluate import execute
from robusteval.evaluation.merging import merge, spell_completion
from robusteval.evaluation.plan import prepare_plan
from robusteval.evaluation.shares import Share, find_owners
from robusteval.models.classifier import Classifier
from robusteval.reports.baseline import build_baseline
from robusteval.reports.build import build_record
from robusteval.reports.compare import compare
from robusteval.runs.folder import load_run
from robusteval.runs.types import Run, Spec

ATTACKS = ["pgd:eps=12/255,steps=20", "fgsm:target=1", "art:SquareAttack:eps=12/255,max_iter=3"]
PGD = "pgd:eps=12/255,steps=3"
SAMPLES = 24


@pytest.fixture(scope="module")
def classifier(trained_bands: Bands) -> Classifier:
    """A network with a name, as a checkpoint has one."""
    return Classifier(
        trained_bands, mean=(0.5,), std=(0.25,), num_classes=3, identity={"sha256": "bands"}
    ).eval()


@pytest.fixture
def data(npz: Path) -> Data:
    return open_data(str(npz))


def compute(
    classifier: Classifier, data: Data, out: Path, share: str | None = None, **options: Any
) -> Run:
    """A run, or one part of it."""
    attacks = options.pop("attacks", ATTACKS)
    names = ("probes", "interpreters", "defenses", "receivers")
    asked = {name: options.pop(name) for name in names if name in options}
    part = None if share is None else Share.parse(share)
    plan = prepare_plan(classifier, data, attacks, samples=SAMPLES, share=part, **asked)
    return execute(plan, out, **options)


def divide(classifier: Classifier, data: Data, out: Path, n: int, **options: Any) -> list[Path]:
    """The folders of all parts of a run."""
    folders = [out / str(part) for part in range(1, n + 1)]
    for part, folder in enumerate(folders, 1):
        compute(classifier, data, folder, f"{part}/{n}", **options)
    return folders


def refuse_work(*_: object) -> NoReturn:
    """In the place of what attacks a batch."""
    raise AssertionError("something was attacked")


@pytest.fixture(scope="module")
def whole(classifier: Classifier, npz: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run of one process."""
    return compute(
        classifier,
        open_data(str(npz)),
        tmp_path_factory.mktemp("whole") / "run",
    )


@pytest.fixture(scope="module")
def parts(
    classifier: Classifier, npz: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    """The same run in three parts."""
    data = open_data(str(npz))
    return divide(classifier, data, tmp_path_factory.mktemp("parts"), 3)


@pytest.fixture
def copies(parts: list[Path], tmp_path: Path) -> list[Path]:
    """The parts, to be spoiled."""
    return [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in parts]


def test_joined_parts_are_the_run_of_one_process(
    whole: Run, parts: list[Path], tmp_path: Path
) -> None:
    """Columns, findings and pictures, an attack of ART in batches among them; in any order."""
    run = merge(parts[::-1], tmp_path / "run")

    assert {"attack", "probe:noise", "probe:planted"} <= {outcome.role for outcome in run.outcomes}
    assert run.status == "complete"
    assert_same(whole, run)
    assert_same(whole, load_run(tmp_path / "run"))
    assert not list((tmp_path / "run").glob("samples/*.parts"))
    assert_same(whole, merge(parts, tmp_path / "run"))  # again, into the same folder


def test_eight_parts_are_the_run_of_one_process(
    classifier: Classifier, data: Data, tmp_path: Path
) -> None:
    """Also where most have three images and what is foreign has one batch for all of them."""
    given: dict[str, Any] = {"attacks": [PGD, ATTACKS[2]], "probes": False}
    folders = divide(classifier, data, tmp_path / "parts", 8, **given)

    run = merge(folders, tmp_path / "run")

    assert run.status == "complete"
    assert_same(compute(classifier, data, tmp_path / "whole", **given), run)


def test_defenses_maps_and_targets_are_joined_and_what_is_left_attacks_nothing(
    classifier: Classifier, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Joining says by which command the run is completed; that has nothing left to attack."""
    other = trained()
    with torch.no_grad():
        other.conv1.weight[0] = 0
    model = Classifier(
        other, mean=(0.5,), std=(0.25,), num_classes=3, identity={"sha256": "other"}
    ).eval()
    given: dict[str, Any] = {
        "attacks": [PGD],
        "probes": False,
        "interpreters": ["grad"],
        "defenses": [ReadyDefense(Spec("shield", {}), model, {"is": "shield"})],
        "receivers": {"target": model},
    }
    whole = compute(classifier, data, tmp_path / "whole", **given)
    folders = divide(classifier, data, tmp_path / "parts", 2, **given)

    with pytest.raises(RunError, match=r"the columns are joined; .* without --shard"):
        merge(folders, tmp_path / "run")

    monkeypatch.setattr(AttackedColumns, "measure", refuse_work)
    run = compute(classifier, data, tmp_path / "run", **given)
    assert run.status == "complete"
    assert (len(run.defenses), len(run.receivers), len(run.transfers)) == (1, 1, 1)
    assert_same(whole, run)
    for one, same in zip(
        whole.defenses + whole.receivers, run.defenses + run.receivers, strict=True
    ):
        for name in one.clean:
            np.testing.assert_array_equal(one.clean[name], same.clean[name], err_msg=name)


def test_a_part_shows_that_it_is_one(parts: list[Path]) -> None:
    """It has no result that could be taken for that of the run."""
    part = load_run(parts[0])

    assert not part.finished
    assert not part.outcomes
    assert part.config["shard"] == "1/3"
    told = r"shard 1/3 of a run: join all shards with `robusteval merge` first$"
    with pytest.raises(RunError, match=f"the run is {told}"):
        build_baseline(part)
    with pytest.raises(RunError, match=f"is {told}"):
        compare(part, part)
    verdict = build_record(part).verdict
    assert verdict.startswith("Shard 1/3 of a run: `robusteval merge` joins all shards. Until")


def test_each_image_is_in_one_part_whatever_the_order() -> None:
    """Parts are of nearly one size; the same content is in the same part."""
    ids = np.random.default_rng(0).integers(0, 2**63, 100).astype(np.uint64)
    ids[50] = ids[3]
    order = np.random.default_rng(1).permutation(100)
    rows = np.arange(100)

    own = [Share(part, 8).own(rows, ids) for part in range(1, 9)]

    np.testing.assert_array_equal(np.sort(np.concatenate(own)), rows)
    assert {len(some) for some in own} <= {12, 13, 14}
    assert find_owners(ids, 8)[50] == find_owners(ids, 8)[3]
    np.testing.assert_array_equal(find_owners(ids[order], 8), find_owners(ids, 8)[order])


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "a/b", "-1/2", "1/0", "1/2/3"])
def test_what_is_no_part_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="K/N"):
        Share.parse(text)


def test_more_parts_than_images_are_refused(
    classifier: Classifier, data: Data, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="24 different images"):
        compute(classifier, data, tmp_path / "run", "1/25")

    assert not (tmp_path / "run").exists()  # which would be in the way of a better division


def test_what_does_not_belong_together_is_refused(
    copies: list[Path], whole: Run, tmp_path: Path
) -> None:
    """In a sentence that names the folder or the part; nothing is written."""
    first, second, third = copies
    assert whole.folder is not None
    record = json.loads((third / "run.json").read_text())

    def change(**settings: Any) -> None:
        changed = {**record, "config": {**record["config"], **settings}}
        (third / "run.json").write_text(json.dumps(changed))

    refused: list[tuple[list[Path], Callable[[], object], str]] = [
        ([first, third], lambda: None, "shard 2/3 is missing"),
        ([first], lambda: None, "shards 2/3, 3/3 are missing"),
        ([first, second, third, second], lambda: None, "are both shard 2/3"),
        ([first, second, Path(whole.folder)], lambda: None, "a run of its own"),
        ([first, second, tmp_path], lambda: None, "there is no run.json"),
        (copies, lambda: change(seed=7), "of another run"),
        (copies, lambda: change(shard="4/4"), "shards of one division"),
        (copies, lambda: change(shard="x"), "K/N"),
    ]
    for folders, spoil, message in refused:
        spoil()
        with pytest.raises(UsageError, match=message):
            merge(folders, tmp_path / "run")

    change()
    with pytest.raises(UsageError, match="one of the shards"):
        merge(copies, first)
    assert not (tmp_path / "run").exists()


def test_a_part_that_is_not_finished_is_refused(
    classifier: Classifier, data: Data, copies: list[Path], whole: Run, tmp_path: Path
) -> None:
    """Until its command was given again, which continues it."""
    shutil.rmtree(copies[1])
    with pytest.raises(Interrupted):
        compute(classifier, data, copies[1], "2/3", stopping=lambda: True)
    with pytest.raises(UsageError, match=r"shard 2/3 in .* is not finished"):
        merge(copies, tmp_path / "run")

    compute(classifier, data, copies[1], "2/3", batch_size=3)

    assert_same(whole, merge(copies, tmp_path / "run"))


def test_a_damaged_part_is_named(
    classifier: Classifier, data: Data, copies: list[Path], whole: Run, tmp_path: Path
) -> None:
    """And the command that mends it, after which they are joined in the same folder."""
    path = next(copies[2].glob("samples/*.parts/*.npz"))
    path.write_bytes(path.read_bytes()[:-9])

    with pytest.raises(RunError, match="give the command of shard 3/3 again"):
        merge(copies, tmp_path / "run")

    compute(classifier, data, copies[2], "3/3")
    assert_same(whole, merge(copies, tmp_path / "run"))


def test_images_that_two_parts_attacked_are_refused(copies: list[Path], tmp_path: Path) -> None:
    """Whatever the reason: nobody knows which of them is right."""
    for folder in copies[1].glob("samples/*.parts"):
        there = copies[2] / "samples" / folder.name
        shutil.rmtree(there)
        shutil.copytree(folder, there)

    with pytest.raises(RunError, match="two shards have attacked the same image"):
        merge(copies, tmp_path / "run")


def test_what_no_part_has_computed_is_left_to_the_evaluation(
    classifier: Classifier, data: Data, copies: list[Path], whole: Run, tmp_path: Path
) -> None:
    """The run is incomplete, and the same command without a part does the rest alone."""
    probes = sorted(copies[0].glob("samples/*.parts"))
    for folder in probes[1:]:
        shutil.rmtree(folder)

    with pytest.raises(RunError, match=r"the columns are joined; .* without --shard"):
        merge(copies, tmp_path / "run")

    assert load_run(tmp_path / "run").status == "incomplete"
    assert_same(whole, compute(classifier, data, tmp_path / "run"))


def test_the_commands_divide_and_join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the help shows them."""
    monkeypatch.chdir(tmp_path)
    words = ["evaluate", "demo", "--samples=6", "--attack=noise:eps=4/255", "--no-probes"]
    for part in ("1/2", "2/2"):
        given = [*words, "--shard", part, "--out", f"shards/{part[0]}"]
        monkeypatch.setattr("sys.argv", ["robusteval", *given])
        ended = CliRunner().invoke(cli, given)
        assert ended.exit_code == 0, ended.output
        assert f"Shard {part} is done, in shards/{part[0]}" in ended.stdout
        assert ended.stdout.endswith("joins all shards.\n")
    with_maps = [*words, "--interpreter=grad", "--shard=1/2", "--out=maps"]
    assert "also says what computes the rest" in CliRunner().invoke(cli, with_maps).stdout

    joined = CliRunner().invoke(cli, ["merge", "shards/1", "shards/2", "--out", "run"])

    assert joined.exit_code == 0, joined.output
    assert "noise:eps=4/255" in joined.stdout
    assert load_run("run").finished
    assert load_run("run").config["command"] == " ".join(["robusteval", *words])
    refused = {
        "K from 1 to N": ["evaluate", "missing.pth", *words[2:], "--shard", "3/2"],
        "judges a whole run": [*words, "--shard", "1/2", "--check"],
        "shard 2/2 is missing": ["merge", "shards/1", "--out", "other"],
        "other settings": [*words, "--shard", "1/2", "--out", "run"],
    }
    for message, wrong in refused.items():
        ended = CliRunner().invoke(cli, wrong)
        assert ended.exit_code == 2
        assert message in ended.stderr


def test_the_command_that_completes_a_joined_run_throws_nothing_away() -> None:
    """It names no shard and no other folder, and does not begin afresh."""
    command = "robusteval evaluate demo --fresh --shard 1/3 --out 'a 1' --samples 9"

    told = spell_completion({"command": command}, Path("the run"))

    assert told.startswith("`robusteval evaluate demo --samples 9 --out 'the run'` ")
