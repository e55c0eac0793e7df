"""Tests for robusteval.art.art_classes: classes that are made when they are asked for."""

from __future__ import annotations

import inspect
import pickle

import pytest
from art.attacks.attack import EvasionAttack

from robusteval.art.metrics import list_attack_classes
from robusteval.art.to_art import ArtAttack
from robusteval.attacks import pgd
from robusteval.attacks.pgd import FGSM, PGD


def test_a_class_is_made_once_and_found_where_its_function_is() -> None:
    assert PGD is pgd.PGD
    assert PGD.perturb is pgd.pgd
    assert (PGD.__module__, PGD.__qualname__) == ("robusteval.attacks.pgd", "PGD")
    assert PGD is not FGSM
    assert pickle.loads(pickle.dumps(PGD)) is PGD
    assert issubclass(PGD, EvasionAttack)


def test_a_class_says_what_it_is_and_what_it_takes() -> None:
    assert PGD.__doc__ == "`pgd` as an ART evasion attack."
    assert "steps" in inspect.signature(PGD).parameters


def test_what_is_no_class_of_a_module_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"'robusteval.attacks.pgd' has no attribute 'PDG'"):
        _ = pgd.PDG
    with pytest.raises(ImportError, match="PDG"):
        from robusteval.attacks.pgd import PDG  # noqa: F401


def test_metrics_know_classes_that_are_made_and_those_that_are_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As somebody's own attack file may have one."""

    class Written(ArtAttack):
        perturb = staticmethod(pgd.fgsm)

    monkeypatch.setattr(pgd, "Written", Written, raising=False)

    found = list(list_attack_classes())

    assert {("pgd", PGD), ("fgsm", FGSM), ("fgsm", Written)} <= set(found)
