"""Attacks against defenses: which cells there are, and what they say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planted_defects import Noise
from reportable import as_dict
from torch import nn
from toys import Bands, Watcher, trained

from robusteval.datasets.dataset import Data
from robusteval.datasets.sources import open_data
from robusteval.errors import Interrupted, RunError, UsageError
from robusteval.evaluation.defense import Defense, ReadyDefense, WithDetector
from robusteval.evaluation.evaluate import evaluate, execute
from robusteval.evaluation.judge import judge
from robusteval.evaluation.plan import EVASIONS, prepare_plan
from robusteval.evaluation.votes import SURVIVAL
from robusteval.models.classifier import Classifier
from robusteval.models.masked import mask_units
from robusteval.runs.folder import load_run
from robusteval.runs.types import Columns, Outcome, Run, Spec

PGD = "pgd:eps=12/255,steps=10"
NOISE = "noise:eps=12/255"


@pytest.fixture(scope="module")
def other_bands() -> Bands:
    """Another network for the same images: one channel of the first layer is gone."""
    network = trained()
    with torch.no_grad():
        network.conv1.weight[0] = 0
    return network


@pytest.fixture
def hardened(other_bands: Bands) -> Defense:
    """That network as a defense."""
    return shield(other_bands, "other")


def shield(network: Bands, name: str) -> ReadyDefense:
    """A network as a defense of this name."""
    model = Classifier(network, mean=(0.5,), std=(0.25,), num_classes=3).eval()
    return ReadyDefense(Spec(name, {}), model, {"is": name})


@pytest.fixture
def watched(bands: Classifier) -> Defense:
    """The classifier itself behind a detector."""
    return ReadyDefense(
        Spec("watcher", {}), WithDetector(bands, Watcher()).eval(), {"is": "watcher"}
    )


@pytest.fixture
def data(npz: Path) -> Data:
    """The synthetic images."""
    return open_data(str(npz))


def cells(run: Run) -> dict[tuple[str, str | None, bool], Outcome]:
    """The cells of a run by attack, defense, and whether the attack knew it."""
    return {
        (o.attack.name, None if o.defense is None else o.defense.name, o.adaptive): o
        for o in run.attacks
    }


def same_columns(one: Columns, other: Columns) -> None:
    """Equal but for time."""
    assert one.keys() == other.keys()
    for name in one.keys() - {"seconds"}:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def same(one: Run, other: Run) -> None:
    """Equal but for time."""
    same_columns(one.clean, other.clean)
    for left, right in zip(one.defenses, other.defenses, strict=True):
        assert left._replace(clean={}) == right._replace(clean={})
        same_columns(left.clean, right.clean)
    for mine, theirs in zip(one.outcomes, other.outcomes, strict=True):
        assert replace(mine, columns={}) == replace(theirs, columns={})
        same_columns(mine.columns, theirs.columns)
    assert one.findings == other.findings


def test_a_hardened_model_is_attacked_itself(
    bands: Classifier, data: Data, hardened: Defense
) -> None:
    """The cell that knows it is what an evaluation of that model alone gives."""
    run = evaluate(bands, data, [PGD, NOISE], defenses=[hardened])
    alone = evaluate(hardened.model, data, [PGD, NOISE])

    (defended,) = run.defenses
    assert defended.kind == "model"
    same_columns(defended.clean, alone.clean)
    for name in ("pgd", "noise"):
        same_columns(
            cells(run)[name, "other", True].columns, cells(alone)[name, None, True].columns
        )


def test_what_was_made_for_the_model_is_judged_behind_the_defense(
    bands: Classifier, data: Data, hardened: Defense
) -> None:
    """Images that were right only behind the defense are not changed, and stay right."""
    run = evaluate(bands, data, [PGD], defenses=[hardened], probes=False)

    plain, static = cells(run)["pgd", None, True], cells(run)["pgd", "other", False]
    tried = plain.attacked & static.attacked
    assert 0 < tried.sum() < static.attacked.sum() or (plain.attacked == static.attacked).all()
    for name in ("linf", "forwards"):
        np.testing.assert_array_equal(static.columns[name][tried], plain.columns[name][tried])
    assert not static.success()[~plain.attacked].any()
    assert static.success().sum() < cells(run)["pgd", "other", True].success().sum()


def test_behind_itself_nothing_changes(bands: Classifier, data: Data, trained_bands: Bands) -> None:
    run = evaluate(bands, data, [PGD], defenses=[shield(trained_bands, "twin")], probes=False)

    plain = cells(run)["pgd", None, True]
    for adaptive in (False, True):
        same_columns(cells(run)["pgd", "twin", adaptive].columns, plain.columns)
    (twin,) = as_dict(run)["defenses"]
    assert twin["defeated"]
    assert twin["clean_cost"]["value"] == 0


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attacks on detectors in a few steps, where none is asked for."""
    kinds = [{**kind, "warmup": 5, "steps": 10, "restarts": 1} for kind in EVASIONS]
    monkeypatch.setattr("robusteval.evaluation.plan.EVASIONS", kinds)


@pytest.mark.usefixtures("quick")
def test_a_detector_meets_attacks_that_do_not_know_it_and_three_that_do(
    bands: Classifier, data: Data, watched: Defense
) -> None:
    run = evaluate(bands, data, [PGD], defenses=[watched], probes=False)

    (defended,) = run.defenses
    assert defended.kind == "detector"
    score, flagged = defended.clean["score"], defended.clean["flagged"]
    np.testing.assert_array_equal(flagged, score > 0.5)
    quiet = (run.clean["pred_clean"] == run.clean["label"]) & ~flagged
    behind = [o for o in run.attacks if o.defense is not None]
    assert [(o.attack.name, o.adaptive) for o in behind] == [
        ("pgd", False),
        *[("evade", True)] * 3,
    ]
    for outcome in behind:
        np.testing.assert_array_equal(outcome.attacked, quiet)
        c = outcome.columns
        np.testing.assert_array_equal(c["flagged"], c["score"] > 0.5)
        assert not (outcome.success() & c["flagged"]).any()
    plain, unaware = cells(run)["pgd", None, True], cells(run)["pgd", "watcher", False]
    np.testing.assert_array_equal(
        unaware.columns["pred_adv"][quiet], plain.columns["pred_adv"][quiet]
    )
    for name in ("score", "flagged"):
        np.testing.assert_array_equal(unaware.columns[name][~quiet], defended.clean[name][~quiet])


def test_random_answers_behind_a_detector_are_voted_on_too(
    trained_bands: Bands, data: Data
) -> None:
    """The network is the same; an attack that knows the detector is judged by most answers."""
    network = nn.Sequential(Noise(0.5), trained_bands)
    noisy = Classifier(network, mean=(0.5,), std=(0.25,), num_classes=3).eval()
    behind = ReadyDefense(Spec("watcher", {}), WithDetector(noisy, Watcher(9.0)).eval(), {"is": 0})
    attack = "evade:eps=12/255,steps=3,warmup=2"

    run = evaluate(
        noisy, data, ["fgsm:eps=12/255", attack], samples=4, defenses=[behind], probes=False
    )

    (outcome,) = (o for o in run.attacks if o.adaptive and o.defense is not None)
    shares = outcome.columns[SURVIVAL]
    np.testing.assert_allclose((20 * shares).round() / 20, shares, atol=1e-3)
    np.testing.assert_array_equal(shares > 0.5, outcome.columns["margin_adv"] > 0)
    assert outcome.columns["confidence_adv"].min() > 1 / 3
    np.testing.assert_allclose(
        outcome.columns["confidence_adv"][~outcome.success()], shares[~outcome.success()]
    )


def test_attacks_on_detectors_can_be_chosen(
    bands: Classifier, data: Data, watched: Defense
) -> None:
    chosen = "evade:eps=12/255,along=features,warmup=2,steps=4"

    run = evaluate(bands, data, [PGD, chosen], defenses=[watched], probes=False)

    assert [o.attack.name for o in run.attacks] == ["pgd", "pgd", "evade"]
    assert run.config["cells"][-1] == f"{run.attacks[-1].attack} behind watcher"


def test_other_threats_than_linf_leave_a_remark(
    bands: Classifier, data: Data, watched: Defense
) -> None:
    run = evaluate(bands, data, ["pgd:norm=l2,eps=.5"], defenses=[watched], probes=False)

    (finding,) = (f for f in run.findings if f.code == "no-adaptive-attack")
    assert "l2 eps 0.5" in finding.message
    assert "oblivious" in as_dict(run)["verdict"]


@pytest.mark.parametrize("batch_size", [1, 7])
def test_batches_change_nothing(
    bands: Classifier, data: Data, hardened: Defense, watched: Defense, batch_size: int
) -> None:
    asked: dict[str, Any] = {
        "attacks": [PGD, "evade:eps=12/255,warmup=2,steps=6,every=2"],
        "defenses": [hardened, watched],
        "samples": 24,
        "probes": False,
    }

    same(
        evaluate(bands, data, **asked),
        evaluate(bands, data, **asked, batch_size=batch_size),
    )


def test_a_stored_run_is_the_run(
    bands: Classifier, data: Data, hardened: Defense, watched: Defense, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {
        "attacks": [PGD, "evade:eps=12/255,warmup=2,steps=6,every=2"],
        "defenses": [hardened, watched],
        "out": tmp_path / "run",
    }
    run = evaluate(bands, data, **asked)

    same(run, load_run(tmp_path / "run"))
    same(run, evaluate(bands, data, **asked))
    assert as_dict(run)["not_run"] == []
    assert as_dict(run)["attacks_asked"] == len(run.attacks)


def test_a_run_that_was_stopped_goes_on(
    bands: Classifier,
    data: Data,
    hardened: Defense,
    tmp_path: Path,
) -> None:
    """Stopped again and again, each time some steps later."""
    whole = evaluate(bands, data, [PGD], defenses=[hardened])
    plan = prepare_plan(bands, data, [PGD], defenses=[hardened])
    stops, run = 0, None
    for limit in range(1, 10_000, 80):
        asked = count()
        try:
            run = execute(
                plan,
                tmp_path / "run",
                batch_size=20,
                stopping=partial(lambda asked, limit: next(asked) >= limit, asked, limit),
            )
        except Interrupted:
            stops += 1
            assert load_run(tmp_path / "run").status == "incomplete"
            continue
        break

    assert stops > 3
    assert run is not None
    same(whole, run)


def test_a_second_call_computes_nothing(
    bands: Classifier,
    data: Data,
    hardened: Defense,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    evaluate(bands, data, [PGD], defenses=[hardened], out=tmp_path / "run")

    def never(*args: Any) -> Columns:
        raise AssertionError(judge(*args))

    monkeypatch.setattr("robusteval.evaluation.columns.judge", never)
    evaluate(bands, data, [PGD], defenses=[hardened], out=tmp_path / "run")


def test_what_is_found_of_a_defense_names_it(bands: Classifier, data: Data) -> None:
    """A model that guesses."""
    network = trained()
    torch.nn.init.zeros_(network.linear.weight)

    run = evaluate(bands, data, [PGD], defenses=[shield(network, "other")])

    named = [f for f in run.findings if f.message.startswith("Behind other: ")]
    assert {"guessing", "zero-gradient"} <= {f.code for f in named}
    assert not any(f.code == "guessing" for f in run.findings if f not in named)


@pytest.mark.usefixtures("quick")
def test_images_that_a_detector_knows_are_told(
    bands: Classifier, data: Data, make_watched: Callable[[np.ndarray[Any, Any]], Defense]
) -> None:
    ids = data.batch(range(5)).ids

    run = evaluate(bands, data, [NOISE], defenses=[make_watched(ids)], probes=False)

    (finding,) = (f for f in run.findings if f.code == "seen-before")
    assert finding.grave
    assert finding.message.startswith("5 of 60 images were used to make the defense")


@pytest.fixture
def make_watched(bands: Classifier) -> Callable[[np.ndarray[Any, Any]], Defense]:
    """A detector that was fitted on images of these ids."""

    def make(ids: np.ndarray[Any, Any]) -> Defense:
        watcher = Watcher()
        watcher.seen = ids
        return ReadyDefense(
            Spec("watcher", {}), WithDetector(bands, watcher).eval(), {"is": "trained"}
        )

    return make


def test_a_defense_that_breaks_is_told_and_the_others_go_on(
    bands: Classifier, data: Data, hardened: Defense, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> Columns:
        if args[0] is hardened.model:
            raise RunError("it is worn")
        return judge(*args)

    monkeypatch.setattr("robusteval.evaluation.columns.judge", broken)
    run = evaluate(bands, data, [PGD], defenses=[hardened], probes=False)

    name = f"{run.config['attacks'][0]} behind other"
    assert run.status == "incomplete"
    assert run.failures.keys() == {name, f"{name} (oblivious)"}
    assert "it is worn" in run.failures[name]
    assert [str(o.attack) for o in run.attacks] == run.config["attacks"]


def test_an_attack_on_detectors_needs_one(bands: Classifier, data: Data, hardened: Defense) -> None:
    with pytest.raises(UsageError, match="evade attacks a detector: name one with --defense"):
        evaluate(bands, data, [PGD, "evade"], defenses=[hardened])


def test_an_attack_on_detectors_needs_company(
    bands: Classifier, data: Data, watched: Defense
) -> None:
    with pytest.raises(UsageError, match="nothing to compare with"):
        evaluate(bands, data, ["evade"], defenses=[watched])


def test_two_defenses_of_one_name_are_refused(
    bands: Classifier, data: Data, hardened: Defense
) -> None:
    with pytest.raises(UsageError, match="two defenses go by the same name"):
        evaluate(bands, data, [PGD], defenses=[hardened, hardened])


def test_masks_are_not_judged_on_the_images_that_chose_them(bands: Classifier, data: Data) -> None:
    ids = data.batch(range(7)).ids
    model = mask_units(bands, "conv2", torch.tensor([0, 1, 1, 1, 1, 1.0]), ids)
    defense = ReadyDefense(Spec("masks", {}), model.eval(), {"is": "masks"})

    run = evaluate(bands, data, [NOISE], defenses=[defense], probes=False)

    (finding,) = (f for f in run.findings if f.code == "seen-before")
    assert finding.message.startswith("7 of 60 images")
    assert run.defenses[0].facts["mask"]["masked"] == 1


def test_a_network_says_what_it_costs_and_has_seen(other_bands: Bands) -> None:
    """Without a word of it a prediction takes one pass, and nothing is known of images."""
    silent = shield(other_bands, "silent")
    assert (silent.forwards, silent.seen) == (1.0, None)

    class Twice(Bands):
        forwards = 2.0
        seen = np.arange(3, dtype=np.uint64)

    telling = shield(Twice(), "telling")

    assert telling.facts["forwards"] == telling.forwards == 2.0
    assert telling.seen is Twice.seen


def test_anything_of_the_form_is_a_defense(bands: Classifier, data: Data, npz: Path) -> None:
    """No class of ours is needed."""

    class Mine:
        spec = Spec("mine", {})
        model = bands
        detector = None
        forwards = 3.0
        seen = data.batch(range(2)).ids

        def __init__(self) -> None:
            self.identity: dict[str, Any] = {"is": "mine"}
            self.facts: dict[str, Any] = {"forwards": 3.0}

    run = evaluate(bands, data, [NOISE], defenses=[Mine()], probes=False)

    assert run.defenses[0].facts == {"forwards": 3.0}
    assert [finding.code for finding in run.findings if "Behind" not in finding.message] == [
        "seen-before",
        "weak-attacks",
    ]
    same = {str(outcome.defense): outcome.columns["pred_adv"] for outcome in run.outcomes}
    np.testing.assert_array_equal(same["None"], same["mine"])


def test_the_same_defense_under_two_names_is_refused(
    bands: Classifier, data: Data, other_bands: Bands
) -> None:
    """As where one spells out a default: its cells could not be told apart."""
    one, other = (replace(shield(other_bands, name), identity={"is": "it"}) for name in "ab")

    with pytest.raises(UsageError, match="the same defense is asked for twice: a, b"):
        evaluate(bands, data, [NOISE], defenses=[one, other])
