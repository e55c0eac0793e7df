"""What papers have published, as their files declare it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from robusteval.analysis.papers.declaration import (
    SIZES,
    Reading,
    build_paper,
    expand_attacks,
    list_papers,
    list_readings,
    read_paper,
)
from robusteval.analysis.papers.detected import find_detected
from robusteval.analysis.papers.explained import find_explained
from robusteval.analysis.papers.masked import find_masked
from robusteval.analysis.papers.measures import find_measure
from robusteval.analysis.papers.on_maps import find_on_maps
from robusteval.analysis.papers.over_seeds import find_over_seeds
from robusteval.art.field_names import check_attack
from robusteval.errors import UsageError
from robusteval.evaluation.plan import prepare_attack
from robusteval.models.classifier import Classifier
from robusteval.models.steps import count_passes
from robusteval.registry import INTERPRETERS, parse

SMALLEST: Mapping[str, Any] = {
    "title": "On nothing",
    "source": "nowhere",
    "setting": "none",
    "small": {"samples": 4},
    "paper": {"samples": 100},
    "attacks": {"one": "pgd"},
    "tables": [
        {
            "name": "Table I",
            "title": "Fooled",
            "measure": "fooled",
            "columns": ["one"],
            "rows": [{"name": "all", "published": [0.5]}],
        }
    ],
}


@pytest.mark.parametrize("name", list(list_papers()))
def test_what_a_paper_asks_for_exists(name: str) -> None:
    """Its attacks, interpreters and measures, at both sizes; all figures are of something."""
    paper = read_paper(name)

    for size in SIZES:
        attacks = paper.list_attacks(size)
        for text in [text for each in attacks.values() for text in each]:
            check_attack(parse(text))
        for text in paper.list_interpreters(size):
            INTERPRETERS.check_spec(parse(text))
        for reading in list_readings(paper):
            detected = find_detected(reading.measure)
            finders = find_explained, find_on_maps, find_masked, find_over_seeds, find_measure
            assert detected or any(find(reading.measure) for find in finders)
            behind = reading.measure.startswith("behind_")
            known = {
                *attacks,
                *paper.on_maps,
                *paper.masked,
                *(paper.list_evasions() if behind else ()),
            }
            assert reading.attack in (paper.detectors if detected else known)
        assert all(len(attacks[explained]) == 1 for explained in paper.explained)
    for table in paper.tables:
        for row in table.rows:
            has_figures = any(value is not None for value in row.published)
            assert has_figures or row.needs or table.needs or table.unpublished or table.measure


class Certain(nn.Module):
    """Always the first class, and hardly less so where the image changes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        away: torch.Tensor = 1e-3 * self.linear(x.flatten(1))
        return away + x.new_tensor([1e3, 0, 0])


def test_attacks_at_equal_passes_cost_no_more_than_the_paper_says() -> None:
    """On images that never fall, where each attack spends all that it may."""
    paper = read_paper("isi")
    (table,) = [each for each in paper.tables if each.name == "At equal passes"]
    model = Classifier(Certain().eval(), num_classes=3)
    x = torch.full((2, 1, 8, 8), 0.4)

    spent = {}
    for name in table.columns:
        attack = prepare_attack(paper.attacks[name][0], model, (1, 8, 8))
        with count_passes(model, 2, x.device) as passes:
            attack.perturb(model, x, torch.zeros(2, dtype=torch.int64), seeds=torch.arange(2))
        spent[name] = float((passes.forwards + passes.backwards).max())

    assert table.title == "What 61 passes are worth"
    assert all(58 <= most <= 61 for most in spent.values()), spent


def test_features_of_maps_are_those_of_the_weights_that_are_given() -> None:
    """At both sizes, and of a paper with detectors alone."""
    paper = read_paper("detector").with_extractor("vgg16")
    found = [paper.choose_size(size).detectors for size in SIZES]
    assert [each.extractor for each in found if each is not None] == ["vgg16", "vgg16"]
    assert read_paper("isi").with_extractor("vgg16") == read_paper("isi")


@pytest.mark.parametrize(
    ("paper", "samples", "explained"),
    [("pse", None, 12), ("pse", 4, 4), ("pse", 200, 200), ("wifgsm", 200, 10), ("wifgsm", 4, 4)],
)
def test_where_all_images_are_explained_all_that_are_asked_for_are(
    paper: str, samples: int | None, explained: int
) -> None:
    assert read_paper(paper).choose_size("small").count_explained(samples) == explained


@pytest.mark.parametrize("size", SIZES)
def test_edges_are_compared_with_what_differs_in_edges_alone(size: str) -> None:
    attacks = read_paper("advedge").list_attacks(size)

    def read(name: str) -> dict[str, Any]:
        (text,) = attacks[name]
        given = dict(check_attack(parse(text)).parameters)
        defaults = {"search": "pgd", "interpreter": "grad", "variant": "advedge"}
        return {**defaults, **given}

    for variant, controls in {
        "advedge": ("random_edges", "inverse_edges"),
        "advedge_plus": ("random_plus", "inverse_plus"),
    }.items():
        for control in controls:
            theirs = read(control)
            assert theirs.pop("edges") in control
            assert theirs == read(f"pgd_grad_{variant}")


@pytest.mark.parametrize("size", SIZES)
def test_controls_of_other_searches_differ_in_edges_alone(size: str) -> None:
    attacks = read_paper("advedge").list_attacks(size)
    for pair in ("pgd_cam", "cw_grad", "cw_cam", "stadv_grad", "stadv_cam"):
        for variant, plus in (("advedge", ""), ("advedge_plus", "_plus")):
            for edges in ("random", "inverse"):
                (text,), (theirs,) = attacks[f"{pair}_{edges}{plus}"], attacks[f"{pair}_{variant}"]
                given, others = (dict(check_attack(parse(t)).parameters) for t in (text, theirs))
                assert given.pop("edges") == edges
                defaults = {"search": "pgd", "variant": "advedge"}
                assert {**defaults, **given} == {**defaults, **others}


def test_a_claim_stands_for_every_combination_of_its_words() -> None:
    """Words in readings, what they are called in the sentence."""
    claim = {
        "text": "{a} beats {b}.",
        "where": "Table {a}",
        "over": {"a": ["one"], "b": ["one", "two"]},
        "more": {"attack": "{a}", "measure": "map_l2:{b}", "at": {"ssim": 0.9}},
        "than": {"attack": "{b}", "measure": "l2"},
    }
    plain = {"text": "As it {is}.", "where": "there", "above": {"attack": "one", "measure": "l2"}}
    given = {"attacks": {"one": "pgd", "two": "fgsm"}, "labels": {"two": "FGSM"}}

    paper = build_paper("mine", {**SMALLEST, **given, "claims": [claim, plain]})

    assert [each.text for each in paper.claims] == [
        "one beats one.",
        "one beats FGSM.",
        "As it {is}.",
    ]
    second = paper.claims[1]
    assert second.more == Reading("one", "map_l2:two", {"ssim": 0.9})
    assert second.than == Reading("two", "l2")
    assert second.where == "Table {a}"


def test_an_attack_may_be_of_one_size_alone() -> None:
    paper = {**SMALLEST, "small": {"samples": 4, "attacks": {"small_one": "fgsm"}}}
    table = {**SMALLEST["tables"][0], "columns": ["small_one"]}

    assert "small_one" not in build_paper("mine", {**paper, "tables": [table]}).attacks


def test_radii_in_l2_grow_with_the_size_of_an_image() -> None:
    """Those of Table I, published for 224 pixels, are of the same size per value."""
    paper = read_paper("pgap")

    def read(name: str, values: int) -> float:
        (text,) = paper.list_attacks("small", values)[name]
        return float(parse(text).parameters["eps"])

    assert (read("one_fgm_l2", 150528), read("one_pgd_l2", 150528)) == (100, 5)
    assert (read("one_fgm_l2", 3072), read("one_pgd_l2", 3072)) == (14.3, 0.714)
    assert read("one_fgsm", 3072) == 0.5


def test_every_paper_is_there() -> None:
    assert list(list_papers()) == ["advedge", "detector", "int", "isi", "pgap", "pse", "wifgsm"]


def test_a_paper_that_is_not_is_named_with_what_is_near() -> None:
    with pytest.raises(UsageError, match=r"unknown paper 'pgpa' \(did you mean 'pgap'"):
        read_paper("pgpa")


def test_attacks_are_one_or_a_sweep_or_all_combinations() -> None:
    """By short name, each a list."""
    found = expand_attacks(
        {
            "one": "pgd",
            "sweep": ["pgd:eps=1/255", "pgd:eps=2/255"],
            "{a}_{b}": {
                "spec": "advedge:search={a},variant={b}",
                "a": ["pgd", "cw"],
                "b": ["adv2"],
            },
        }
    )

    assert found == {
        "one": ("pgd",),
        "sweep": ("pgd:eps=1/255", "pgd:eps=2/255"),
        "pgd_adv2": ("advedge:search=pgd,variant=adv2",),
        "cw_adv2": ("advedge:search=cw,variant=adv2",),
    }


def test_sweeps_are_one_under_another_name() -> None:
    """Each setting once, as the size has them; a sweep that is none is named."""
    declared = {
        **SMALLEST,
        "attacks": {"one": ["pgd:eps=0.1", "pgd:eps=0.2"], "two": ["fgsm", "pgd:eps=0.2"]},
        "together": {"both": ["one", "two"]},
        "paper": {"samples": 100, "attacks": {"two": "fgsm:eps=0.3"}},
    }
    paper = build_paper("mine", declared)

    assert paper.list_attacks("small")["both"] == ("pgd:eps=0.1", "pgd:eps=0.2", "fgsm")
    assert paper.list_attacks("paper")["both"] == ("pgd:eps=0.1", "pgd:eps=0.2", "fgsm:eps=0.3")
    with pytest.raises(ValueError, match="no attack is called three"):
        build_paper("mine", {**declared, "together": {"both": ["one", "three"]}})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tabels": []}, "unknown key 'tabels' .did you mean 'tables'"),
        ({"attacks": {"two": "pgd"}}, "no attack is called one"),
        ({"tables": [{**SMALLEST["tables"][0], "columns": ["one", "one"]}]}, "one figure for each"),
        ({"small": {}}, "samples"),
    ],
)
def test_a_slip_in_a_file_is_named(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_paper("mine", {**SMALLEST, **changed})
