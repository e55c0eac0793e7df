"""Attacks by the names that the field knows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

import robusteval
from robusteval.art import field_names
from robusteval.art.field_names import CALLED_HERE, check_attack, list_ways
from robusteval.cli import cli
from robusteval.errors import UsageError
from robusteval.models.classifier import Classifier
from robusteval.registry import ATTACKS, parse
from robusteval.runs.types import Spec


@pytest.mark.parametrize("name", sorted(CALLED_HERE))
def test_a_name_of_the_field_leads_to_something_that_exists(name: str) -> None:
    """At least one way, unless an attack has this name itself."""
    ways = list(list_ways(name))

    assert ways or name in ATTACKS.entries
    for way in ways:
        if not way.startswith("--preset "):
            check_attack(parse(way))


def test_the_classes_of_art_exist() -> None:
    """All that are named can be run."""
    from robusteval.art.from_art import from_art

    named = {way for ways in CALLED_HERE.values() for way in ways if way.startswith("art:")}
    for way in named:
        from_art(way.removeprefix("art:"), {})


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("cw", "art:CarliniL2Method"),
        ("C&W", "art:CarliniL2Method"),
        ("BIM", "pgd:random_start=false"),
        ("MI-FGSM", "art:MomentumIterativeMethod"),
        ("pgd-20", "pgd:steps=20"),
        ("PGD7", "pgd:steps=7"),
        ("hopskipjump", "art:HopSkipJump"),
        ("HopSkipJumpAttack", "art:HopSkipJump"),
        ("carlinil2method", "art:CarliniL2Method"),
        ("AutoAttack", "give autoattack "),
        ("PGD", "give pgd "),
        ("Sigma_Zero", "give sigma_zero "),
        ("pgd,eps=8/255", "such as pgd:eps=8/255"),
        ("pgd eps=8/255; steps=3", "such as pgd:eps=8/255,steps=3"),
    ],
)
def test_a_name_is_understood_however_it_is_written(name: str, way: str) -> None:
    with pytest.raises(UsageError, match=re.escape(way)):
        check_attack(Spec(name, {"confidence": "1"}))


def test_only_what_is_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A preset or attack that does not exist is no way; one that does comes in its place."""
    monkeypatch.setitem(field_names.CALLED_HERE, "new", ("nowhere", "--preset nothing", "pgd"))

    assert list(list_ways("new")) == ["pgd"]


@pytest.mark.parametrize(
    ("name", "way"), [("PGD", "give pgd"), ("carlini", "give art:CarliniL2Method"), ("cw", "give")]
)
def test_a_class_of_art_by_another_name_is_answered_too(name: str, way: str) -> None:
    from robusteval.art.from_art import from_art

    with pytest.raises(UsageError, match=f"no ART attack is called '{name}' here: {way}"):
        from_art(name, {})


def test_what_nobody_knows_is_refused_with_a_suggestion() -> None:
    with pytest.raises(UsageError, match=r"unknown attack 'pgdd' \(did you mean 'pgd'\?\)"):
        check_attack(Spec("pgdd", {}))


def test_the_command_line_and_python_say_the_same(bands: Classifier, npz: Path) -> None:
    said = "no attack is called 'deepfool' here: give"
    result = CliRunner().invoke(cli, ["evaluate", "demo", "--attack", "deepfool"])

    assert result.exit_code == 2
    assert said in result.stderr
    with pytest.raises(UsageError, match=said):
        robusteval.evaluate(bands, robusteval.open_data(npz), ["deepfool"])


def test_a_corruption_is_given_no_goal() -> None:
    """What misses a class to reach would stand there as accuracy."""
    with pytest.raises(UsageError, match="cannot be targeted"):
        check_attack(parse("corruption:kind=fog,targeted=true"))
    assert check_attack(parse("corruption:targeted=false")).name == "corruption"
