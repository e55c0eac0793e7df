"""The sentences for who decides: what an attacker may do, and what to do next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from robusteval.reports import sentences
from robusteval.reports.build import build_record
from robusteval.reports.meaning import describe_reach, write_advice, write_claim
from robusteval.reports.measures import build_threat
from robusteval.runs.types import Finding, Outcome, Run, Spec, Threat

MakeOutcome = Callable[..., Outcome]
MakeRun = Callable[..., Run]
HALF = np.arange(10) < 5
QUICK, STANDARD = Spec("quick", {"eps": 8 / 255}), Spec("standard", {"eps": 8 / 255})


@pytest.mark.parametrize(
    ("norm", "eps", "said"),
    [
        ("linf", 8 / 255, "every pixel by up to 8 of 255 grey levels"),
        ("l0", 24.0, "up to 24 of an image's values at will"),
        ("l0_pixels", 20.0, "up to 20 pixels at will"),
        ("l2", 0.5, "an image by up to 0.5 in l2 (1 is a value from none to full)"),
        ("ssim", 0.01, "an image by up to 0.01 in ssim"),
        ("l2", None, "as much as it takes"),
    ],
)
def test_what_may_be_changed_is_said_without_the_words_of_the_field(
    norm: str, eps: float | None, said: str
) -> None:
    assert describe_reach(build_threat(Threat(norm, eps, False))) == said


@pytest.mark.parametrize(
    ("knowledge", "said"),
    [
        ("white-box", "An attacker who knows the network and may"),
        ("black-box", "An attacker who sees its answers alone and may"),
        ("none", "An attacker who sees nothing of it and may"),
    ],
)
def test_what_the_attacker_knows_is_said(
    make_outcome: MakeOutcome, make_run: MakeRun, knowledge: str, said: str
) -> None:
    run = make_run(make_outcome(HALF, spec=QUICK, knowledge=knowledge))

    assert any(line.startswith(said) for line in sentences.write_meaning(build_record(run)))


@pytest.mark.parametrize(
    ("spec", "broken", "changed", "said"),
    [
        (QUICK, HALF, {}, "--preset standard"),
        (STANDARD, HALF, {}, "floor = 0.23"),
        (STANDARD, np.ones(10, bool), {}, "robusteval train"),
        (STANDARD, HALF, {"status": "incomplete"}, "same command again"),
        (QUICK, HALF, {"findings": (Finding("zero-gradient", True, "Gone."),)}, "upper bound"),
        (QUICK, HALF, {"findings": (Finding("guessing", True, "Guesses."),)}, "as it was trained"),
    ],
)
def test_the_first_thing_in_the_way_is_what_to_do_next(
    make_outcome: MakeOutcome,
    make_run: MakeRun,
    spec: Spec,
    broken: Any,
    changed: dict[str, Any],
    said: str,
) -> None:
    record = build_record(replace(make_run(make_outcome(broken, spec=spec)), **changed))

    advice = " ".join(write_advice(record))

    assert said in advice


def test_an_ensemble_that_does_not_know_a_threat_is_no_advice(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    """Neither of the presets makes a patch, and training is not against turns."""
    patch = make_outcome(HALF, spec=Spec("patch", {}), threat=Threat("patch", 0.05, False))
    turn = make_outcome(
        np.ones(10, bool), spec=Spec("spatial", {}), threat=Threat("spatial", 30.0, False)
    )

    assert not list(write_advice(build_record(make_run(patch, turn))))


@pytest.mark.parametrize(
    ("broken", "findings", "said"),
    [
        (HALF, (), "at least 23 % fall to such an attacker. Not shown: that a stronger one"),
        (HALF, (Finding("zero-gradient", True, "Gone."),), "at least 23 %"),
        (np.zeros(10, bool), (), "found nothing. Not shown"),
        (HALF, (Finding("guessing", True, "Guesses."),), ""),
        (HALF, (Finding("non-deterministic", True, "Two answers."),), ""),
    ],
)
def test_only_what_is_shown_is_safe_to_claim(
    make_outcome: MakeOutcome,
    make_run: MakeRun,
    broken: Any,
    findings: tuple[Finding, ...],
    said: str,
) -> None:
    """Successes are proofs, what is left is none; and nothing where answers are luck."""
    record = build_record(replace(make_run(make_outcome(broken, spec=QUICK)), findings=findings))

    claim = " ".join(write_claim(record, record.worst_cases))

    assert said in claim
    assert bool(claim) == bool(said)


def test_a_share_of_nothing_is_no_claim(make_outcome: MakeOutcome, make_run: MakeRun) -> None:
    """Beside a threat to which some fall, one to which none fell is left out."""
    small = make_outcome(np.zeros(10, bool), threat=Threat("linf", 1 / 255, False))
    large = make_outcome(HALF, threat=Threat("linf", 8 / 255, False))
    record = build_record(make_run(small, large))

    claim = " ".join(write_claim(record, record.worst_cases))

    assert "at least 23 % at linf eps 8/255" in claim
    assert "0 %" not in claim


def test_one_success_of_many_images_is_no_claim(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    """Its interval begins below what is written of a share: no sentence without a number."""
    record = build_record(make_run(make_outcome(np.arange(500) == 0, spec=QUICK)))

    assert not list(write_claim(record, record.worst_cases))
