"""Chosen classes to reach: by name, number or file, the same in any batch, order and process."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from robusteval.art.field_names import check_attack, split_target
from robusteval.datasets.dataset import Data
from robusteval.datasets.sources import open_data
from robusteval.errors import UsageError
from robusteval.evaluation.evaluate import evaluate
from robusteval.evaluation.goals import Goals, read_goals, spell_goal
from robusteval.evaluation.plan import prepare_attack
from robusteval.models.classifier import Classifier
from robusteval.registry import ATTACKS, parse
from robusteval.reports.gate_scope import is_same_attack
from robusteval.runs.metrics import success_rate
from robusteval.runs.types import Run, Spec, Threat

NAMES = ("cat", "dog", "Arctic fox, white fox")
AIMED = [
    name for name, entry in ATTACKS.entries.items() if "targeted" in entry.parameters
    and entry.norms != ("corruption",) and not entry.detector
]  # fmt: skip


@pytest.fixture
def data(npz: Path) -> Data:
    return open_data(npz)


@pytest.mark.parametrize(
    ("text", "place"), [("cat", 0), ("Arctic fox", 2), (NAMES[2], 2), ("1", 1), ("02", 2)]
)
def test_a_class_has_a_name_and_a_number(text: str, place: int) -> None:
    assert read_goals(text, 3, NAMES, 60) == Goals(np.array([place]), place)


def test_a_name_goes_before_a_number() -> None:
    assert read_goals("2", 3, ("2", "0", "1"), None).identity == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cta", "did you mean 'cat'?"),
        ("Dog", "did you mean 'dog'?"),
        ("3", "numbered from 0 to 2"),
        ("nowhere.txt", "nowhere.txt cannot be read"),
        ("-1", "is no class"),
    ],
)
def test_what_is_no_class_is_one_sentence(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        read_goals(text, 3, NAMES, 60)


def test_a_file_has_a_class_for_every_image_of_the_data(tmp_path: Path) -> None:
    path = tmp_path / "targets.txt"
    path.write_text("cat\r\n1\r\ndog\r\n")

    goals = read_goals(str(path), 3, NAMES, 3)

    assert goals.classes.tolist() == [0, 1, 1]
    assert goals.pick(np.array([2, 0]), 2).tolist() == [1, 0]
    path.write_text("0\n1\n1\n\n")
    assert read_goals(str(path), 3, None, 3).identity == goals.identity  # of classes, not of text
    for total, said in ((4, "3 lines, the data 4 images"), (None, "one class for all")):
        with pytest.raises(UsageError, match=said):
            read_goals(str(path), 3, NAMES, total)
    path.write_text("cat\n\ndog\n")
    with pytest.raises(UsageError, match="line 2 of"):
        read_goals(str(path), 3, NAMES, 3)
    with pytest.raises(UsageError, match="one class for all"):
        goals.pick(None, 2)


@pytest.mark.parametrize("name", AIMED)
def test_every_targeted_attack_is_given_a_class(bands: Classifier, data: Data, name: str) -> None:
    attack = prepare_attack(f"{name}:target=2", bands, data.shape, data=data)

    assert attack.threat.targeted
    assert attack.resolved["target"] == 2
    assert str(attack.spec) == f"{name}:target=2"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("corruption:target=1", "has no goal"),
        ("pgd:target=1,targeted=false", "leave targeted out"),
        ("advedge:target=1,targeted=false", "leave targeted out"),
        ("art:DeepFool:target=1", "untargeted runs only"),
        ("pgd:target=nobody", "is no class"),
    ],
)
def test_a_goal_where_there_can_be_none_is_refused(
    bands: Classifier, data: Data, text: str, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        prepare_attack(text, bands, data.shape, data=data)


def test_words_of_an_attack_are_no_classes() -> None:
    spec = check_attack(parse("advedge:target=random"))

    assert split_target(spec) == (spec, None)
    assert split_target(parse("art:SaliencyMapMethod:target=1")) == (
        Spec("art:SaliencyMapMethod", {}),
        "1",
    )


def test_other_attacks_get_the_same_goal() -> None:
    one, other = Spec("pgd", {"target": "2"}), Spec("pgd", {"targeted": True})
    aimed, free = Threat("linf", 0.1, True), Threat("linf", 0.1, False)

    assert spell_goal(free, [one]) == {}
    assert spell_goal(aimed, [one, one]) == {"target": "2"}
    assert spell_goal(aimed, [one, other]) == {"targeted": True}


def run(model: Classifier, data: Data, text: str, **more: object) -> Run:
    return evaluate(model, data, [text], samples=30, probes=False, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text", ["pgd:target=2,eps=0.2,steps=4", "art:FastGradientMethod:target=2"]
)
def test_images_of_the_class_are_left_alone_and_said(
    bands: Classifier, data: Data, text: str
) -> None:
    made = run(bands, data, text)

    (outcome,) = made.attacks
    c, same = outcome.columns, outcome.attacked & (outcome.columns["label"] == 2)
    assert same.any()
    assert not outcome.success()[same].any()
    assert (c["linf"][same] == 0).all()
    assert (c["forwards"][same] == 0).all()
    assert (c["target"][outcome.attacked] == 2).all()
    assert success_rate(outcome).n == outcome.attacked.sum()
    said = f"{same.sum()} of {outcome.attacked.sum()} images are of the class to reach"
    assert any(said in finding.message for finding in made.findings)


def test_a_file_is_as_its_classes_one_by_one(bands: Classifier, data: Data, tmp_path: Path) -> None:
    """In any batch; and a run that knows another file is another run."""
    path = tmp_path / "targets.txt"
    path.write_text("\n".join("012"[i % 3] for i in range(60)))
    settings = "eps=0.2,steps=4"

    from_file = run(bands, data, f"pgd:target={path},{settings}", batch_size=7).attacks[0]
    each = [run(bands, data, f"pgd:target={k},{settings}").attacks[0] for k in range(3)]

    kind = from_file.columns["index"] % 3
    for name in ("pred_adv", "l2", "linf", "target", "margin_adv"):
        expected = np.stack([outcome.columns[name] for outcome in each])
        expected = np.take_along_axis(expected, kind[None], 0)[0]
        assert np.array_equal(expected, from_file.columns[name])
    resolved = [from_file.resolved["target"], *(outcome.resolved["target"] for outcome in each)]
    assert resolved[0].startswith("sha256:")
    assert resolved[1:] == [0, 1, 2]


def test_a_gate_knows_the_attack_by_its_class() -> None:
    spec, resolved = check_attack(parse("pgd:steps=40,target=2")), {}
    resolved = ATTACKS.entry("pgd").resolve(Spec("pgd", {"targeted": True})) | {"target": 2}

    assert is_same_attack(spec, "pgd:target=2", resolved)
    assert not is_same_attack(spec, "pgd:target=1", resolved | {"target": 1})
