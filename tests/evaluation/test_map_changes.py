"""What an attack does to maps: measured honestly, and shown in every format."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from reportable import as_dict, explained, html_of, markdown_of, print_run, record_of
from rich.console import Console
from torch import Tensor, nn

import robusteval.evaluation.cells as cells_module
from robusteval.cli import cli
from robusteval.commands.preset import read_preset
from robusteval.commands.session import needs_rts
from robusteval.datasets.dataset import Data
from robusteval.datasets.sources import open_data
from robusteval.errors import RunError, UsageError
from robusteval.evaluation.change_places import ORDERS, PLACES
from robusteval.evaluation.evaluate import evaluate, execute
from robusteval.evaluation.left_out import describe_left_out
from robusteval.evaluation.map_changes import (
    Measurement,
    measure_distances,
    measure_edges,
    measure_overlaps,
)
from robusteval.evaluation.plan import prepare_plan
from robusteval.interpreters import rts, rts_training
from robusteval.interpreters.cam import cam
from robusteval.interpreters.explainer import Interpreter
from robusteval.interpreters.gradient import smoothgrad
from robusteval.interpreters.quality import (
    correlate_ranks,
    measure_deletion,
    measure_insertion,
    shuffle_parameters,
)
from robusteval.interpreters.scaling import min_max
from robusteval.models.classifier import Classifier
from robusteval.models.seeds import sample_seeds
from robusteval.registry import INTERPRETERS
from robusteval.reports.map_record import MapsRecord
from robusteval.reports.maps import build_tables, write_sentences
from robusteval.reports.spreadsheet import to_csv
from robusteval.runs.folder import load_pictures, load_run
from robusteval.runs.types import Outcome, Run, Spec
from robusteval.search.edges import Variant

MakeOutcome = Callable[..., Outcome]
MakeRun = Callable[..., Run]

ASKED = ["cam", "grad", "smoothgrad:samples=2"]
ATTACK = "pgd:targeted=true,eps=24/255,steps=6"


def pooled() -> nn.Module:
    """Two convolutions, average pooling and a linear layer."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 3),
        )


@pytest.fixture
def model() -> Classifier:
    """A network that has class activation maps, of 3x12x12 images."""
    return Classifier(
        pooled(), mean=(0.5,), std=(0.25,), num_classes=3, identity={"sha256": "pooled"}
    ).eval()


def labelled(model: Classifier, npz: Path, folder: Path, *, right: int) -> Data:
    """Images of which the network gets the first few right, and 24 in all."""
    batch = open_data(str(npz)).batch(range(24))
    with torch.no_grad():
        labels = model(batch.x).argmax(1).numpy()
    labels[right:] = (labels[right:] + 1) % 3
    pixels = (batch.x.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()
    np.savez(folder / "images.npz", x=pixels, y=labels)
    return open_data(str(folder / "images.npz"))


@pytest.fixture
def data(model: Classifier, npz: Path, tmp_path: Path) -> Data:
    """Images of which the network gets all but four right."""
    return labelled(model, npz, tmp_path, right=20)


def measurement(model: Classifier, *names: str) -> Measurement:
    return Measurement(model, [Interpreter.build(name, model, (3, 12, 12)) for name in names], 0)


def measured(measure: Measurement, x: Tensor, x_adv: Tensor, **changed: Any) -> dict[str, Any]:
    """The columns of images with ids of their own."""
    with torch.no_grad():
        pred, pred_adv = (measure.model(z).argmax(1).numpy() for z in (x, x_adv))
    ids = np.arange(len(x), dtype=np.uint64)
    given = {"ids": ids, "pred": pred, "pred_adv": pred_adv, **changed}
    return dict(measure.measure_columns(x, x_adv, **given))


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether columns agree to the bit, the time they took aside."""
    return one.keys() == other.keys() and all(
        np.array_equal(one[name], other[name], equal_nan=one[name].dtype.kind == "f")
        for name in one
        if name not in ("seconds", "ssim")
    )


def test_intersection_over_union_has_its_closed_form() -> None:
    rising = np.arange(10.0).reshape(1, 2, 5)
    shifted = np.roll(rising, -1)
    even = np.zeros((1, 2, 5))

    assert measure_overlaps(rising, rising).tolist() == [1.0]
    assert measure_overlaps(rising, shifted).tolist() == [1 / 3]
    assert measure_overlaps(even, even).tolist() == [1.0]
    assert measure_overlaps(even, rising).tolist() == [0.0]
    assert np.isnan(measure_overlaps(rising * np.nan, rising)).all()


def test_distance_is_the_mean_over_cells() -> None:
    maps = np.zeros((2, 2, 2), np.float32)
    other = maps.copy()
    other[1, 0, 0] = 1

    assert measure_distances(maps, other).tolist() == [0.0, 0.25]


def test_change_is_booked_where_edges_are() -> None:
    """A step from 0 to 1 is an edge two pixels wide."""
    x = torch.zeros(3, 1, 6, 6)
    x[:, :, :, 3:] = 1
    x_adv = x.clone()
    x_adv[0, 0, :, 2] += 0.1  # on the edge
    x_adv[1, 0, 0, 2] += 0.2
    x_adv[1, 0, 0, 0] += 0.1  # off it

    found = measure_edges(x, x_adv)

    assert found["edge_area"] == pytest.approx([1 / 3] * 3)
    assert found["edge_energy"][:2] == pytest.approx([1.0, 0.8])
    assert np.isnan(found["edge_energy"][2])


def test_maps_are_those_of_the_classes_predicted(model: Classifier, data: Data) -> None:
    """Before and after, each stretched; the distance is the mean over the cells."""
    x = data.batch(range(5)).x
    x_adv = (x + 0.3 * torch.linspace(0, 1, 12)).clamp(0, 1)
    with torch.no_grad():
        pred, pred_adv = model(x).argmax(1), model(x_adv).argmax(1)

    found = measured(measurement(model, "cam"), x, x_adv)

    benign, changed = (min_max(cam(model, z, y)) for z, y in ((x, pred), (x_adv, pred_adv)))
    expected = (benign - changed).abs().mean((1, 2, 3))
    assert found["map_distance:cam"] == pytest.approx(expected.tolist(), rel=1e-5)
    assert np.array_equal(found["benign:cam"], benign.squeeze(1).numpy())
    assert "map_floor:cam" not in found


def test_without_a_change_only_the_seed_is_left(model: Classifier, data: Data) -> None:
    """A map without randomness does not move; one with it moves as far as its floor says."""
    x = data.batch(range(4)).x
    measure = measurement(model, "grad", "smoothgrad:samples=2")

    found = measured(measure, x, x)

    assert found["map_distance:grad"].tolist() == found["map_noise:grad"].tolist() == [0.0] * 4
    assert found["map_iou:grad"].tolist() == [1.0] * 4
    floor = found["map_floor:smoothgrad:samples=2"]
    assert (floor > 0).all()
    assert np.array_equal(found["map_distance:smoothgrad:samples=2"], floor)


def test_masks_are_not_stretched(model: Classifier, data: Data) -> None:
    """An empty one would become noise."""
    x = data.batch(range(2)).x
    made = Interpreter.build("mask:iterations=2", model, (3, 12, 12))

    maps = made.compute_maps(model, x, torch.zeros(2, dtype=torch.int64), torch.zeros(2).long())

    assert not made.describe()["stretched"]
    assert 0 < maps.max() < 1


def test_where_nothing_is_predicted_there_is_no_map(model: Classifier, data: Data) -> None:
    x = data.batch(range(3)).x

    found = measured(measurement(model, "cam"), x, x, pred_adv=np.array([0, -1, 0]))

    assert np.isnan(found["map_distance:cam"]).tolist() == [False, True, False]
    assert np.isnan(found["map_iou:cam"]).tolist() == [False, True, False]


def test_quality_is_that_of_the_maps_compared(model: Classifier, data: Data) -> None:
    """Against random cells as coarse as they are, the same for every interpreter of a size."""
    batch = data.batch(range(5))
    x, y = batch.x, batch.y
    pred = y.numpy()
    measure = measurement(model, "cam", "gradcam", "grad:pool=3")

    found = measure.measure_worth(x, batch.ids, pred)

    assert list(found) == measure.name_worth()
    maps = min_max(cam(model, x, y))
    assert found["insertion:cam"] == pytest.approx(measure_insertion(model, x, y, maps).tolist())
    assert found["deletion:cam"] == pytest.approx(measure_deletion(model, x, y, maps).tolist())
    chance = [found[f"chance_insertion:{name}"] for name in ("cam", "gradcam", "grad:pool=3")]
    assert np.array_equal(chance[0], chance[1])
    assert not np.array_equal(chance[0], chance[2])
    forgetful = shuffle_parameters(model, 0)
    expected = correlate_ranks(maps, cam(forgetful, x, y))
    assert found["forgotten:cam"] == pytest.approx(expected.tolist())


def test_quality_does_not_depend_on_the_batch(model: Classifier, data: Data) -> None:
    batch = data.batch(range(7))
    pred = batch.y.numpy()

    def found(rows: list[int]) -> dict[str, Any]:
        measure = measurement(model, *ASKED, "mask:iterations=2")
        return dict(measure.measure_worth(batch.x[rows], batch.ids[rows], pred[rows]))

    whole = found([*range(7)])
    parts = [found(rows) for rows in ([0, 1, 2], [3], [4, 5, 6])]

    cut = {name: np.concatenate([part[name] for part in parts]) for name in whole}
    assert same(whole, cut)


def test_maps_made_for_one_network_alone_are_not_held_against_another(
    model: Classifier, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of a mask network, which is found by the weights it was trained for."""

    def only(network: nn.Module, x: Tensor, y: Tensor, *, seeds: Tensor) -> Tensor:
        if network is not model:
            raise UsageError("no mask network has been trained for this model")
        return cam(model, x, y)

    monkeypatch.setitem(INTERPRETERS._functions, "cam", only)
    batch = data.batch(range(3))

    found = measurement(model, "cam").measure_worth(batch.x, batch.ids, batch.y.numpy())

    assert np.isfinite(found["insertion:cam"]).all()
    assert np.isnan(found["forgotten:cam"]).all()


def test_a_map_that_is_not_finite_is_like_no_other(
    model: Classifier, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(network: nn.Module, x: Tensor, y: Tensor, *, seeds: Tensor) -> Tensor:
        maps = cam(network, x, y)
        maps[:1] = torch.nan
        return maps

    monkeypatch.setitem(INTERPRETERS._functions, "cam", broken)
    batch = data.batch(range(3))

    found = measurement(model, "cam").measure_worth(batch.x, batch.ids, batch.y.numpy())

    assert np.isnan(found["forgotten:cam"]).tolist() == [True, False, False]


def test_benign_maps_are_made_once(
    model: Classifier, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as there is room for, to the same numbers."""
    x = data.batch(range(4)).x
    x_adv = (x + 0.1).clamp(0, 1)
    calls: list[int] = []
    plain = Interpreter.compute_maps

    def counted(self: Interpreter, model: Classifier, x: Tensor, *rest: Tensor) -> Any:
        calls.append(len(x))
        return plain(self, model, x, *rest)

    monkeypatch.setattr(Interpreter, "compute_maps", counted)
    measure, cramped = measurement(model, "cam"), measurement(model, "cam")
    cramped.benign.room = 0

    first, second, third = (measured(m, x, x_adv) for m in (measure, measure, cramped))

    assert same(first, second)
    assert same(first, third)
    assert calls == [4, 4, 4, 4, 4, 4, 4, 4]
    calls.clear()
    measured(measure, x, x_adv)
    measured(cramped, x, x_adv)
    assert calls == [4, 4, 4, 4, 4]


def test_results_do_not_depend_on_the_batch(model: Classifier, data: Data) -> None:
    whole, cut = (
        evaluate(model, data, [ATTACK], interpreters=ASKED, probes=False, batch_size=size)
        for size in (None, 3)
    )

    assert same(dict(whole.outcomes[0].columns), dict(cut.outcomes[0].columns))


def test_measuring_changes_nothing_else(model: Classifier, data: Data) -> None:
    """Neither verdicts nor the cost of the attack; and of a run without it not even the key."""
    plain = prepare_plan(model, data, [ATTACK])
    assert not {"interpreters", "maps"} & plain.config.keys()
    with_maps = prepare_plan(model, data, [ATTACK], interpreters=ASKED)
    assert with_maps.key != plain.key
    assert with_maps.config["interpreters"] == ASKED

    run, other = (
        evaluate(model, data, [ATTACK], interpreters=asked, probes=False) for asked in ((), ASKED)
    )

    new = set(other.outcomes[0].columns) - set(run.outcomes[0].columns)
    names = {"map_distance", "map_iou", "map_noise", "map_floor", "edge_energy", "edge_area"}
    names |= {*ORDERS, *PLACES}
    assert {name.partition(":")[0] for name in new} == names
    old = {name: other.outcomes[0].columns[name] for name in run.outcomes[0].columns}
    assert same(dict(run.outcomes[0].columns), old)


def test_images_that_were_wrong_have_no_maps(model: Classifier, data: Data) -> None:
    run = evaluate(model, data, [ATTACK], interpreters=["cam"], probes=False)

    outcome = run.outcomes[0]
    assert outcome.attacked.sum() == 20
    assert np.array_equal(np.isfinite(outcome.columns["map_distance:cam"]), outcome.attacked)


def test_a_model_that_is_always_wrong_is_measured_nowhere(
    model: Classifier, npz: Path, tmp_path: Path
) -> None:
    wrong = labelled(model, npz, tmp_path, right=0)

    run = evaluate(model, wrong, [ATTACK], interpreters=["cam"], probes=False)

    assert np.isnan(run.outcomes[0].columns["map_distance:cam"]).all()
    assert as_dict(run)["interpreters"]["attacks"][0]["maps"][0]["distance"]["n"] == 0


def test_memory_that_runs_out_cuts_the_work_not_the_result(
    model: Classifier, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attack itself is not run again."""
    whole = evaluate(model, data, [ATTACK], interpreters=["cam"], probes=False)
    plain = Interpreter.compute_maps

    def greedy(self: Interpreter, model: Classifier, x: Tensor, *rest: Tensor) -> Any:
        if len(x) > 6:
            raise MemoryError
        return plain(self, model, x, *rest)

    monkeypatch.setattr(Interpreter, "compute_maps", greedy)
    cut = evaluate(model, data, [ATTACK], interpreters=["cam"], probes=False)

    one, other = whole.outcomes[0].columns, cut.outcomes[0].columns
    assert np.allclose(
        one["map_distance:cam"], other["map_distance:cam"], rtol=1e-4, equal_nan=True
    )
    assert np.array_equal(one["forwards"], other["forwards"])


def test_an_interpreter_that_breaks_is_named(
    model: Classifier, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, seeds: Tensor) -> Tensor:
        if len(seeds):
            raise ArithmeticError("no luck")
        return torch.zeros(0)

    monkeypatch.setitem(INTERPRETERS._functions, "cam", broken)

    run = evaluate(model, data, [ATTACK], interpreters=["cam"], probes=False)

    assert run.status == "incomplete"
    said = "the interpreter cam broke (ArithmeticError: no luck, in test_map_changes.py, line"
    assert said in run.failures[ATTACK]


def test_pictures_carry_their_maps(model: Classifier, data: Data, tmp_path: Path) -> None:
    """Before and after, and a run without interpreters has none."""
    out = tmp_path / "run"
    evaluate(model, data, [ATTACK], interpreters=["cam", "grad:pool=2"], probes=False, out=out)

    run = load_run(out)
    pictures = load_pictures(run)[0]

    assert list(pictures[0].maps) == ["cam", "grad:pool=2"]
    benign, changed = pictures[0].maps["cam"]
    assert benign.shape == changed.shape == (6, 6)
    distance = run.outcomes[0].columns["map_distance:cam"][pictures[0].row]
    assert np.abs(benign.astype(float) - changed).mean() == pytest.approx(distance, abs=2e-3)
    page = html_of([run])
    assert "cam, attacked" in page
    assert "Explanations" in page

    evaluate(model, data, [ATTACK], probes=False, out=tmp_path / "plain")
    plain = load_run(tmp_path / "plain")
    assert not load_pictures(plain)[0][0].maps
    assert "Explanations" not in html_of([plain])


def test_a_stopped_run_goes_on_to_the_same_numbers(
    model: Classifier, data: Data, tmp_path: Path
) -> None:
    plan = prepare_plan(model, data, [ATTACK], interpreters=ASKED, probes=False)
    whole = execute(plan, tmp_path / "whole")
    asked = iter([False] * 5 + [True] + [False] * 100)

    with pytest.raises(BaseException, match="stopped"):
        execute(plan, tmp_path / "cut", batch_size=4, stopping=lambda: next(asked))
    rest = execute(plan, tmp_path / "cut", batch_size=4)

    assert same(dict(whole.outcomes[0].columns), dict(rest.outcomes[0].columns))


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("cam", "cam: needs a network that ends in global average pooling .* use gradcam"),
        ("gradcam:layer=nope", "gradcam: the network has no layer 'nope'"),
        ("grad:pool=13", "grad: pool must be between 1"),
        ("grat", "unknown interpreter 'grat' .did you mean 'grad'"),
        ("grad:pool=x", "grad: pool must be a whole number"),
    ],
)
def test_what_a_network_cannot_have_is_said_at_once(
    bands: Classifier, npz: Path, name: str, sentence: str
) -> None:
    with pytest.raises(UsageError, match=sentence):
        prepare_plan(bands, open_data(str(npz)), [ATTACK], interpreters=[name])


def test_the_same_interpreter_is_not_asked_for_twice(model: Classifier, data: Data) -> None:
    with pytest.raises(UsageError, match="asked for twice: grad, grad:pool=1"):
        prepare_plan(model, data, [ATTACK], interpreters=["grad", "grad:pool=1"])


def test_what_is_optional_is_left_out_with_a_remark(bands: Classifier, npz: Path) -> None:
    """For presets that are to run on any network."""
    asked = [Spec("cam", {}), Spec("grad", {})]

    plan = prepare_plan(
        bands, open_data(str(npz)), [ATTACK], interpreters=asked, optional=asked, samples=20
    )

    assert plan.config["interpreters"] == ["grad"]
    (finding,) = plan.findings
    assert (finding.code, finding.grave, finding.cell) == ("left-out", False, "cam")
    assert "use gradcam" in finding.message


def test_a_reason_to_leave_several_out_is_said_once() -> None:
    known = {"cam": "use gradcam", "pgd": "no gradient", "advedge": "use gradcam"}

    findings = list(describe_left_out(known))

    assert [(finding.message, finding.cell) for finding in findings] == [
        ("cam, advedge were left out: use gradcam.", None),
        ("pgd was left out: no gradient.", "pgd"),
    ]


def test_if_everything_is_left_out_nothing_runs(bands: Classifier, npz: Path) -> None:
    spec = Spec("pgd", {"eps": 9.0})

    with pytest.raises(UsageError, match="eps must be"):
        prepare_plan(bands, open_data(str(npz)), [spec], optional=[spec])


def test_every_interpreter_of_the_list_can_be_checked_on_nothing(model: Classifier) -> None:
    """Which is how a plan finds mistakes before the first attack."""
    for name in INTERPRETERS.entries:
        if name not in ("library", "rts", "rollout", "attention_relevance"):
            # dear; to be trained; for networks with attention
            Interpreter.build(name, model, (3, 12, 12))


def test_those_with_a_floor_are_those_that_draw(model: Classifier, data: Data) -> None:
    """Another seed gives another map exactly where the registry says so."""
    x, y = data.batch(range(1)).x, torch.zeros(1, dtype=torch.int64)
    for name, entry in INTERPRETERS.entries.items():
        if name in ("library", "rts", "rollout", "attention_relevance"):
            continue
        interpreter = INTERPRETERS.load(name)
        more = {"iterations": 3} if name == "mask" else {}
        one, other = (interpreter(model, x, y, seeds=torch.tensor([s]), **more) for s in (1, 10**9))
        assert entry.seeded == (not torch.equal(one, other)), name
    ids = np.arange(1, dtype=np.uint64)
    assert smoothgrad(model, x, y, seeds=sample_seeds(0, ids)).shape == (1, 1, 12, 12)


@pytest.fixture
def run(make_outcome: MakeOutcome, make_run: MakeRun) -> Run:
    """Attacks on maps, their baselines, three interpreters."""
    return explained(make_outcome, make_run)


def maps_of(run: Run) -> MapsRecord:
    """What the record of a run says of maps."""
    part = record_of(run).interpreters
    assert part is not None
    return part


def part_of(run: Run) -> dict[str, Any]:
    part: dict[str, Any] = as_dict(run)["interpreters"]
    return part


def test_a_run_without_interpreters_says_nothing_of_them(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    run = make_run(make_outcome([True]))

    assert as_dict(run)["interpreters"] is None
    assert "map" not in markdown_of(run)


def test_attacks_know_which_maps_they_were_made_for(run: Run) -> None:
    """One whose map term is switched off was made for none."""
    rows = part_of(run)["attacks"]

    assert [row["interpreters"] for row in rows] == [[], ["cam"], ["cam", "mask"], []]
    assert [one["attacked"] for one in rows[2]["maps"]] == [True, False, True]


def test_pairs_are_plain_pgd_and_the_attack_without_its_maps(run: Run) -> None:
    """Over the images on which both succeed."""
    part = part_of(run)
    found = [(p["attack"], p["against"]) for p in part["pairs"] if p["interpreter"] == "cam"]

    assert found == [
        ("advedge:interpreter=cam", "pgd:eps=8/255,targeted=true"),
        ("advedge:interpreter=cam", "advedge:interpreter=cam,weight=0"),
        ("advedge:interpreter=cam+mask", "pgd:eps=8/255,targeted=true"),
    ]
    gap = part["pairs"][0]["difference"]
    assert gap["n"] == 90
    assert gap["value"] == pytest.approx(0.08 - 0.3, abs=0.01)
    assert (gap["less"], gap["more"]) == (90, 0)
    assert gap["p"] == pytest.approx(2 * 0.5**90)
    assert gap["low"] < gap["value"] < gap["high"] < 0


def test_means_are_over_successes(run: Run) -> None:
    row = part_of(run)["attacks"][2]
    outcome = run.outcomes[2]
    made = outcome.success()

    assert row["success_rate"]["k"] == made.sum() == 80
    assert row["confidence"]["n"] == 80
    expected = outcome.columns["map_distance:cam"][made].mean()
    assert row["maps"][0]["distance"]["value"] == pytest.approx(expected)


def test_maps_are_held_against_chance_and_a_network_that_forgot(run: Run) -> None:
    """Image by image, of those that were looked at."""
    cam, gradcam, mask = part_of(run)["quality"]

    assert [one["interpreter"] for one in (cam, gradcam, mask)] == ["cam", "gradcam", "mask"]
    assert cam["insertion"]["value"]["n"] == 32
    gap = cam["insertion"]["beyond_chance"]
    assert gap["value"] == pytest.approx(0.2, abs=0.01)
    assert gap["p"] == pytest.approx(2 * 0.5**32)
    assert cam["deletion"]["beyond_chance"]["value"] == pytest.approx(-0.2, abs=0.01)
    assert gradcam["insertion"]["beyond_chance"]["low"] < 0.005
    assert cam["forgotten"]["value"] == pytest.approx(0.1)
    assert mask["forgotten"]["value"] == pytest.approx(0.9)


def test_maps_that_say_nothing_are_named(run: Run) -> None:
    said = [line for line in write_sentences(maps_of(run)) if line.startswith("Warning")]

    assert any(line.startswith("Warning: gradcam maps point out what matters no") for line in said)
    assert any("mask maps are much the same" in line and "0.90" in line for line in said)
    assert not any("Warning: cam" in line for line in said)


def test_a_run_that_did_not_look_says_nothing_of_quality(run: Run) -> None:
    """One of an earlier version, or stopped before."""
    earlier = replace(run, clean={k: v for k, v in run.clean.items() if ":" not in k})
    record = as_dict(earlier)

    assert record["interpreters"]["quality"] == []
    assert "worth" not in markdown_of(earlier)
    assert not any("random cells" in line for line in write_sentences(maps_of(earlier)))


def test_quality_stands_where_nothing_was_attacked(run: Run) -> None:
    (table,) = build_tables(maps_of(replace(run, outcomes=())))

    assert table.kind == "interpreter"
    assert [name for name, _ in table.rows] == ["cam", "gradcam", "mask"]


def test_transfer_is_attacked_against_measured(run: Run) -> None:
    part = part_of(run)
    (found,) = part["transfer"]

    assert found["attack"] == "advedge"
    assert [row["attacked"] for row in found["rows"]] == ["cam", "cam+mask"]
    assert found["measured"] == ["cam", "gradcam", "mask"]
    assert found["rows"][0]["distances"][0] == part["attacks"][1]["maps"][0]["distance"]


def test_transfer_names_the_steps_where_they_differ(run: Run) -> None:
    """One step on a mask costs many on a map."""
    parameters = {"variant": "adv2", "warmup": 5}
    specs = [
        Spec("advedge", {"interpreter": "cam", **parameters}),
        Spec("advedge", {"interpreter": "mask", **parameters, "steps": 45}),
    ]
    cells = [
        replace(outcome, attack=spec, resolved=spec.parameters)
        for outcome, spec in zip(run.outcomes[1:], specs, strict=False)
    ]

    (found,) = part_of(replace(run, outcomes=tuple(cells)))["transfer"]

    assert found["attack"] == "advedge:variant=adv2,warmup=5"
    assert [row["effort"] for row in found["rows"]] == [{}, {"steps": 45}]
    names = [
        name for name, _ in build_tables(maps_of(replace(run, outcomes=tuple(cells))))[-1].rows
    ]
    assert names == ["on cam", "on mask:steps=45"]


def test_sentences_say_what_follows_and_what_does_not(run: Run) -> None:
    said = list(write_sentences(maps_of(run)))

    assert any(
        line.startswith("cam: advedge:interpreter=cam reaches its class on")
        and "nearer than pgd" in line
        and "does not give it away" in line
        for line in said
    )
    (warning,) = [line for line in said if "noise floor" in line]
    assert warning.startswith("Warning: mask maps after every attack")
    assert said[-1].startswith("cam and gradcam carry the same information")


def test_attacks_that_fail_have_no_distance(make_outcome: MakeOutcome, make_run: MakeRun) -> None:
    """And nothing is said of them."""
    run = explained(make_outcome, make_run)
    failed = tuple(
        replace(o, columns={**o.columns, "pred_adv": o.columns["label"]}) for o in run.outcomes
    )

    part = maps_of(replace(run, outcomes=failed))

    said = [line for line in write_sentences(part) if "advedge" in line or "attack is" in line]
    assert said == []
    assert {line for _, cells in build_tables(part)[2].rows for cell in cells for line in cell} == {
        "–"
    }


@pytest.mark.parametrize("name", ["", "\x1b[31m|<b>"])
def test_the_report_reads_at_eighty_columns(
    name: str, make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    console = Console(width=80, record=True, file=io.StringIO())

    print_run(explained(make_outcome, make_run, name=name), console)

    text = console.export_text()
    assert max(len(line) for line in text.splitlines() if "reproduce" not in line) <= 80
    assert "\x1b[31m" not in text
    for heading in (
        "What maps are worth",
        "Attacks on model and explanation",
        "Distance of maps",
        "Explanations",
    ):
        assert heading in text
    assert "± 0.00" in text
    assert "advedge:interpreter=cam+mask" in text.replace("\n", "").replace(" ", "")


def test_markdown_holds_every_table(run: Run) -> None:
    text = markdown_of(run)

    for table in build_tables(maps_of(run)):
        assert f"### {table.title.replace('_', chr(92) + '_')}" in text
        assert f"| {table.kind} | `{table.columns[0]}`" in text


def test_csv_has_a_row_for_each_map(run: Run) -> None:
    record = as_dict(run)
    rows = list(csv.DictReader(io.StringIO(to_csv([record_of(run)]))))
    found = [row for row in rows if row["kind"] == "map"]

    assert len(found) == 4 * 3
    one = record["interpreters"]["attacks"][1]["maps"][0]
    assert float(found[3]["map_distance"]) == one["distance"]["value"]
    assert (found[3]["interpreter"], found[3]["map_attacked"]) == ("cam", "true")
    assert found[3]["map_floor"] == ""


def test_the_interpreters_are_listed_with_their_cost() -> None:
    """And with those that say the same."""
    runner = CliRunner()
    content = json.loads(runner.invoke(cli, ["list", "interpreters", "--json"]).stdout)
    by_name = {item["name"]: item for item in content["interpreters"]}

    assert all(item["summary"] and item["cost"] for item in content["interpreters"])
    assert by_name["cam"]["differentiable"]
    assert by_name["cam"]["alike"][0] == "gradcam"
    assert not by_name["library"]["differentiable"]
    shown = runner.invoke(cli, ["list", "interpreters"]).stdout
    assert "on the graph: can be attacked; per map 1 forward, 1 backward" in shown
    assert "same information as gradcam, hirescam, library:method=gradcam" in shown


def test_the_command_line_measures_maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a mistake in a name is found before anything is loaded."""
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    words = ["evaluate", "demo", "--samples", "8", "--attack", "pgd:targeted=true,steps=2"]

    done = runner.invoke(cli, [*words, "--no-probes", "--interpreter", "cam", "--format", "json"])
    wrong = runner.invoke(cli, [*words, "--interpreter", "kam"])

    assert done.exit_code == 0, done.stderr
    part = json.loads(done.stdout)["interpreters"]
    assert [facts["spec"] for facts in part["measured"]] == ["cam"]
    assert wrong.exit_code == 2
    assert "unknown interpreter 'kam' (did you mean 'cam'?)" in wrong.stderr


def test_the_preset_holds_attacks_their_baseline_and_controls() -> None:
    preset = read_preset("interpretation")
    parameters = [spec.parameters for spec in preset.attack]

    assert preset.adapt
    assert [spec.name for spec in preset.interpreter] == ["grad", "cam", "mask", "rts"]
    assert {spec.name for spec in preset.attack} == {"pgd", "advedge"}
    assert all(given["targeted"] and given["eps"] == 8 / 255 for given in parameters)
    assert {given.get("edges") for given in parameters} == {None, "random", "inverse"}
    dual = [(given["interpreter"], given["variant"]) for given in parameters[1:]]
    assert set(dual) == {*product(("grad", "cam", "mask", "rts"), get_args(Variant))}


def test_rts_is_trained_where_something_needs_it() -> None:
    assert needs_rts([Spec("rts", {})])
    assert needs_rts([Spec("advedge", {"interpreter": "cam+rts"})])
    assert not needs_rts([Spec("advedge", {"interpreter": "cam"}), Spec("grad", {})])


def test_masks_that_miss_their_test_are_left_out_of_a_preset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the reason on the screen and a remark in the report; asked for by name they stop."""
    monkeypatch.chdir(tmp_path)
    trained: list[str] = []

    def useless(model: Classifier, data: Data, **_: Any) -> None:
        trained.append(data.name)
        raise RunError("the masks are useless: 3 points apart")

    monkeypatch.setattr(rts_training, "prepare_rts", useless)
    monkeypatch.setattr(rts, "locate_mask_network", lambda model: tmp_path / "none")
    text = 'attack = ["pgd:targeted=true,steps=2"]\ninterpreter = ["grad", "rts"]\nadapt = true\n'
    (tmp_path / "mine.toml").write_text(text)
    words = ["evaluate", "demo", "--samples", "6", "--no-probes", "--format", "json"]
    runner = CliRunner()

    adapted = runner.invoke(cli, [*words, "--preset", "mine.toml"])
    asked = runner.invoke(cli, [*words, "--attack", "fgsm", "--interpreter", "rts"])

    assert adapted.exit_code == 0, adapted.stderr
    assert "the masks are useless: 3 points apart" in adapted.stderr
    record = json.loads(adapted.stdout)
    assert [facts["spec"] for facts in record["interpreters"]["measured"]] == ["grad"]
    (finding,) = [each for each in record["findings"] if each["cell"] == "rts"]
    assert "rts was left out: the masks are useless: 3 points apart." in finding["message"]
    assert asked.exit_code == 3
    assert asked.stderr.endswith("Error: the masks are useless: 3 points apart\n")
    assert len(trained) == 2
    assert all("held out" not in name for name in trained)


def test_memory_that_does_not_suffice_for_one_map_is_the_end_of_the_cell(
    model: Classifier, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:

    def greedy(*_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(Interpreter, "compute_maps", greedy)

    run = evaluate(model, data, [ATTACK], interpreters=["cam"], probes=False)

    assert "memory runs out even for one image" in run.failures[ATTACK]


def test_a_run_says_what_its_maps_are_worth(model: Classifier, data: Data, tmp_path: Path) -> None:
    """Of the images that were right, in memory and on disk; nothing without interpreters."""
    run = evaluate(model, data, [ATTACK], interpreters=["cam"], probes=False, out=tmp_path / "run")

    known = np.isfinite(run.clean["insertion:cam"])
    assert np.array_equal(known, run.outcomes[0].attacked)
    assert same(dict(run.clean), dict(load_run(tmp_path / "run").clean))
    (one,) = as_dict(run)["interpreters"]["quality"]
    assert one["deletion"]["value"]["n"] == 20
    plain = evaluate(model, data, [ATTACK], probes=False)
    assert not any(":" in name for name in plain.clean)


def test_the_worth_of_maps_does_not_depend_on_the_batch(model: Classifier, data: Data) -> None:
    whole, cut = (
        evaluate(model, data, [ATTACK], interpreters=ASKED, probes=False, batch_size=size).clean
        for size in (None, 3)
    )

    assert same(dict(whole), dict(cut))


def test_the_worth_of_maps_is_looked_at_on_a_few_images(
    model: Classifier, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cells_module, "QUALITY", 3)

    run = evaluate(model, data, [ATTACK], interpreters=["cam"], probes=False)

    rows = np.flatnonzero(run.outcomes[0].attacked)[:3]
    assert np.flatnonzero(np.isfinite(run.clean["insertion:cam"])).tolist() == rows.tolist()
