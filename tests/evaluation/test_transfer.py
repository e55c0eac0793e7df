"""Adversarial images made on one network and judged on others."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from planted_defects import BatchStatistics, Planted
from toys import Bands, trained

from robusteval.cli import cli
from robusteval.commands.networks import name_networks, parse_network
from robusteval.datasets.dataset import Data
from robusteval.datasets.sources import open_data
from robusteval.errors import UsageError
from robusteval.evaluation.evaluate import evaluate
from robusteval.models.classifier import Classifier
from robusteval.reports.build import build_record
from robusteval.reports.html import to_html
from robusteval.reports.markdown import render_markdown, to_markdown
from robusteval.reports.terminal import render_table
from robusteval.reports.transfer_matrix import build_matrix
from robusteval.runs.folder import find_images, load_run
from robusteval.runs.statistics import wilson
from robusteval.runs.types import Run

PGD = "pgd:eps=12/255,steps=5"
NOISE = "noise:eps=12/255"


@pytest.fixture(scope="module")
def other() -> Bands:
    """Another network for the same images, which leans to the first class."""
    network = trained()
    with torch.no_grad():
        network.conv1.weight[0] = 0
        network.linear.bias[0] += 10
    return network


def make_receiver(network: torch.nn.Module, std: float = 0.5, **more: Any) -> Classifier:
    """The other network as a classifier with a normalisation of its own."""
    return Classifier(network, mean=(0.4,), std=(std,), num_classes=3, **more).eval()


@pytest.fixture
def data(npz: Path) -> Data:
    """The synthetic images."""
    return open_data(str(npz))


@pytest.fixture(scope="module")
def run(
    other: Bands, trained_bands: Bands, npz: Path, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    """Two attacks on one network, judged on two others, with all images kept."""
    source = Classifier(
        trained_bands, mean=(0.5,), std=(0.25,), num_classes=3, identity={"sha256": "bands"}
    ).eval()
    out = tmp_path_factory.mktemp("transfer") / "run"
    evaluate(
        source,
        open_data(str(npz)),
        [PGD, NOISE],
        targets={
            "other.pth": make_receiver(other, identity={"sha256": "other"}),
            "third.pth": make_receiver(other, 0.3, identity={"sha256": "third"}),
        },
        probes=False,
        keep_images=True,
        out=out,
    )
    return load_run(out)


def test_transfer_is_what_a_check_of_the_kept_images_by_hand_gives(
    run: Run, other: Bands, data: Data
) -> None:
    """The other network, called with its own normalisation, is fooled by as many of them."""
    arrays = np.load(find_images(run)[0])
    clean = data.batch(run.clean["index"])

    def predict(x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return np.asarray(other((torch.from_numpy(x) - 0.4) / 0.5).argmax(1))

    right = predict(clean.x.numpy()) == clean.y.numpy()
    assert 0 < right.sum() < len(right)
    third = run.receivers[1].clean
    shared = (
        right
        & (run.clean["pred_clean"] == run.clean["label"])
        & (third["pred_clean"] == third["label"])
    )
    among = np.isin(arrays["index"], run.clean["index"][shared])
    fooled = predict(arrays["x"]) != arrays["y"]

    record = build_record(run).received

    assert record is not None
    assert record.shared == shared.sum() == among.sum()
    rate = record.attacks[0].receivers[0]
    assert rate is not None
    assert (rate.k, rate.n) == (int((fooled & among).sum()), int(among.sum()))
    assert (rate.low, rate.high) == wilson(rate.k, rate.n)
    carried = record.attacks[0].carried[0]
    assert carried is not None
    both = fooled & arrays["fooled"] & among
    assert (carried.k, carried.n) == (int(both.sum()), int((arrays["fooled"] & among).sum()))
    source = record.attacks[0].source
    assert (source.k, source.n) == (int((arrays["fooled"] & among).sum()), int(among.sum()))


def test_transfer_leaves_everything_else_as_it_is(
    run: Run, trained_bands: Bands, npz: Path
) -> None:
    """Cells, defenses and findings of the network itself are those of a run without targets."""
    source = Classifier(
        trained_bands, mean=(0.5,), std=(0.25,), num_classes=3, identity={"sha256": "bands"}
    ).eval()
    alone = evaluate(source, open_data(str(npz)), [PGD, NOISE], probes=False)

    assert not run.defenses
    assert len(run.attacks) == len(alone.attacks) == 2
    assert [o.role for o in run.outcomes].count("transfer") == 4
    for one, both in zip(alone.attacks, run.attacks, strict=True):
        np.testing.assert_array_equal(one.columns["pred_adv"], both.columns["pred_adv"])


def test_no_report_calls_it_a_defense(run: Run) -> None:
    """The words of defenses are false here; the table stands in every form."""
    record = build_record(run)
    forms = [render_table([record]), to_markdown(record), to_html([record])]

    for text in forms:
        assert "Transfer of images made on" in text
        assert "other.pth" in text
        for word in ("efeated", "clean cost", "oblivious", "behind other.pth", "Behind other.pth"):
            assert word not in text
    assert not record.defenses
    assert not record.probes


@pytest.mark.parametrize(
    ("text", "checkpoint", "options"),
    [
        ("demo", "demo", {}),
        (
            "demo,arch=net.py:Net,mean=.5,.4,.3,std=.25",
            "demo",
            {"arch": "net.py:Net", "mean": [0.5, 0.4, 0.3], "std": [0.25]},
        ),
        (
            "demo, num_classes=10, weights=model_ema",
            "demo",
            {"num_classes": 10, "weights": "model_ema"},
        ),
    ],
)
def test_a_target_is_named_with_its_own_options(
    text: str, checkpoint: str, options: dict[str, Any]
) -> None:
    """Numbers go on after a comma; every option is that of `evaluate`."""
    assert parse_network(text) == (checkpoint, options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nowhere.pth", "there is no file nowhere.pth"),
        ("demo,mean=bright", "mean must be numbers"),
        ("demo,men=.5", "unknown option 'men'"),
        ("demo,mean=.5,mean=.4", "each option once"),
        ("demo,arch=", "each option once"),
        ("arch=net.py:Net", "begin with the checkpoint"),
        ("", "begin with the checkpoint"),
    ],
)
def test_a_wrong_target_is_refused_before_anything_runs(text: str, message: str) -> None:
    """In one sentence that says how it is written."""
    with pytest.raises(UsageError, match=message):
        parse_network(text)


def test_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    """By their folders; the same one twice is refused."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "net.pth").write_bytes(b"")
    specs = [parse_network(str(tmp_path / folder / "net.pth")) for folder in ("a", "b")]

    assert name_networks(specs) == [str(tmp_path / "a/net.pth"), str(tmp_path / "b/net.pth")]
    with pytest.raises(UsageError, match="given twice"):
        name_networks([specs[0], specs[0]])


def test_networks_of_other_classes_and_the_source_are_refused(
    bands: Classifier, data: Data, other: Bands
) -> None:
    """A label must mean the same to both."""
    wide = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(432, 5))
    with pytest.raises(UsageError, match="tells 5 classes apart"):
        evaluate(bands, data, [NOISE], targets={"wide": Classifier(wide, num_classes=5).eval()})
    with pytest.raises(UsageError, match="is the network that is attacked"):
        evaluate(bands, data, [NOISE], targets={"itself": bands})


def test_a_target_that_looks_at_the_batch_judges_in_one_company(
    bands: Classifier, data: Data, other: Bands
) -> None:
    """Whatever the batches, its verdicts are the same; that it does so is said."""
    x = data.batch(np.arange(8)).x
    mixed = Planted(other, front=BatchStatistics(float(x.mean()), float(x.std())))
    few, many = (
        evaluate(
            bands,
            data,
            [NOISE],
            samples=12,
            probes=False,
            targets={"mixed": make_receiver(mixed)},
            batch_size=size,
        )
        for size in (5, 12)
    )

    assert "target-company" in [finding.code for finding in few.findings]
    for a, b in (
        (few.transfers[0].columns, many.transfers[0].columns),
        (few.receivers[0].clean, many.receivers[0].clean),
    ):
        for name in a.keys() - {"seconds"}:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_the_command_judges_on_targets(tmp_path: Path) -> None:
    """The demo network against another digits network, from a file."""
    from safetensors.torch import save_file

    from robusteval.models.networks import digits_cnn

    torch.manual_seed(0)
    save_file(digits_cnn().state_dict(), tmp_path / "other.safetensors")
    target = f"{tmp_path / 'other.safetensors'},arch=robusteval:digits_cnn,mean=.5,std=.25"
    words = ["demo", "--samples", "8", "--attack", "noise", "--no-probes", "--format", "json"]

    result = run_command("evaluate", *words, "--target", target, "--out", str(tmp_path / "run"))

    assert result.exit_code == 0, result.stderr
    received = json.loads(result.stdout)["received"]
    assert [each["name"] for each in received["receivers"]] == ["other.safetensors"]
    assert received["receivers"][0]["arch"] == "robusteval:digits_cnn"


def test_networks_that_judge_each_other_are_a_table_of_sources_and_targets(
    run: Run, trained_bands: Bands, other: Bands, npz: Path, tmp_path: Path
) -> None:
    """Each cell is a count by hand over the images that all have right, whatever their order."""
    source = Classifier(
        trained_bands, mean=(0.5,), std=(0.25,), num_classes=3, identity={"sha256": "bands"}
    ).eval()
    back = evaluate(
        make_receiver(other, identity={"sha256": "other"}),
        open_data(str(npz)),
        [PGD],
        targets={"first.pth": source},
        probes=False,
        seed=1,
    )
    matrix = build_matrix([run, back])

    assert matrix is not None
    assert len(matrix.networks) == 3
    assert "third.pth" in matrix.networks
    order, again = (np.argsort(each.clean["id"]) for each in (run, back))
    seen = [run.clean, *(each.clean for each in run.receivers)]
    shared = np.logical_and.reduce([(c["pred_clean"] == c["label"])[order] for c in seen])
    cells = [cell for row in matrix.attacks[0].rows for cell in row.targets]
    expected = [
        run.attacks[0].success()[order],
        run.transfers[0].success()[order],
        run.transfers[1].success()[order],
        back.transfers[0].success()[again],
        back.attacks[0].success()[again],
    ]
    assert [cell.k for cell in cells if cell] == [(each & shared).sum() for each in expected]
    assert {cell.n for cell in cells if cell} == {matrix.shared} == {shared.sum()}
    assert cells[5] is None
    records = [build_record(each) for each in (run, back)]
    for text in (render_table(records), render_markdown(records), to_html(records)):
        assert "made on (rows), shown to (columns)" in text
    assert build_matrix([run]) is None
    # a run for each target says the same, in one row
    each_alone = [
        replace(
            run,
            defenses=(target,),
            outcomes=tuple(o for o in run.outcomes if o.defense in (None, target.spec)),
        )
        for target in run.receivers
    ]
    assert build_matrix([*each_alone, back]) == matrix
    assert build_matrix(each_alone) is None
    few = replace(back, clean={name: column[1:] for name, column in back.clean.items()})
    assert build_matrix([run, few]) is None


def test_several_networks_are_evaluated_in_one_command(tmp_path: Path) -> None:
    """Each into its own folder and on all others; options of the first hold unless said."""
    from safetensors.torch import save_file

    from robusteval.models.networks import digits_cnn

    for seed in (0, 1):
        torch.manual_seed(seed)
        save_file(digits_cnn().state_dict(), tmp_path / f"n{seed}.safetensors")
    words = ["--arch", "robusteval:digits_cnn", "--mean", ".5", "--std", ".25", "--data", "digits"]
    words += ["--samples", "40", "--attack", "noise", "--no-probes", "--format", "json"]
    first, second = str(tmp_path / "n0.safetensors"), str(tmp_path / "n1.safetensors")

    result = run_command(
        *("evaluate", first, f"{second},std=.5", *words, "--transfer", "--out", str(tmp_path / "r"))
    )

    assert result.exit_code == 6, result.stderr  # they know nothing
    found = json.loads(result.stdout)
    assert found["models"]["models"] == ["n0.safetensors", "n1.safetensors"]
    runs = [load_run(tmp_path / "r" / name) for name in ("n0", "n1")]
    assert [run.model["std"] for run in runs] == [[0.25], [0.5]]
    assert found["transfer"]["networks"] == ["n0.safetensors", "n1.safetensors"]
    assert all(run.receivers for run in runs)
    for given, message in (
        ((first, "--transfer"), "--transfer needs several networks"),
        ((first, first), "the same network is given twice"),
        ((first, second, "--shard", "1/2"), "--shard divides the run of one network"),
        ((first, "gone.pt"), "CHECKPOINT: there is no file gone.pt"),
    ):
        refused = run_command("evaluate", *given, "--data", "digits", "--attack", "noise")
        assert (refused.exit_code, message in refused.stderr) == (2, True), refused.stderr


def run_command(*words: str) -> Result:
    return CliRunner().invoke(cli, list(words), env={"COLUMNS": "80"})
