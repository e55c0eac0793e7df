"""The gate: every outcome and its exit code, figures against columns, and that it does not flap."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robusteval.errors import NothingEvaluated, RunError, UsageError
from robusteval.registry import ATTACKS
from robusteval.reports.baseline import Baseline, build_baseline
from robusteval.reports.baseline_file import read_baseline, render_baseline
from robusteval.reports.gate import Check, check
from robusteval.reports.gate_config import (
    CLEAN,
    Rule,
    Settings,
    Wanted,
    find_settings,
    read_settings,
    read_threat,
)
from robusteval.reports.measures import to_json_types
from robusteval.reports.record import FlippedImage, GateRow
from robusteval.runs import metrics, statistics
from robusteval.runs.statistics import Pairs
from robusteval.runs.types import Defended, Finding, Outcome, Run, Spec, Threat

Mask = np.ndarray[Any, np.dtype[np.bool_]]
MakeOutcome = Callable[..., Outcome]
MakeRun = Callable[..., Run]

DETECTOR = Spec("detector", {"fpr": 0.05, "interpreter": "cam"})
SHIELD = Spec("training", {"epochs": 3})
L2 = Threat("l2", 0.5, False)
FAB = Spec("fab", {"eps": 0.5})
KEYS = [
    *("name", "kind", "on", "outcome", "limit", "value", "low", "high", "p"),
    *("lost", "gained", "detectable", "reason", "flipped", "line"),
]


def first(k: int, n: int = 1000) -> Mask:
    """A mask ``(n,)`` of the first so many images."""
    mask: Mask = np.arange(n) < k
    return mask


def rules(*given: Rule, **shared: Any) -> Settings:
    """Settings with these gates."""
    return Settings(rules=given, **shared)


def gated(run: Run, rule: Rule, baseline: Baseline | None = None) -> GateRow:
    """The one gate that a rule makes, without that of the findings."""
    gates = [g for g in check(run, rules(rule), baseline).gates if g.kind != "findings"]
    assert len(gates) == 1
    return gates[0]


@pytest.fixture
def make_pair(make_outcome: MakeOutcome, make_run: MakeRun) -> Callable[..., tuple[Run, Baseline]]:
    """A run, and the baseline of another, from the images an attack breaks in each."""

    def make(before: Mask, after: Mask, **changed: Any) -> tuple[Run, Baseline]:
        old, new = make_run(make_outcome(before)), make_run(make_outcome(after), **changed)
        return new, build_baseline(old)

    return make


MakePair = Callable[..., tuple[Run, Baseline]]


@pytest.mark.parametrize(
    ("broken", "floor", "outcome", "code"),
    [
        (500, 0.45, "passed", 0),
        (500, 0.5, "inconclusive", 5),
        (500, 0.48, "inconclusive", 5),
        (500, 0.52, "inconclusive", 5),
        (500, 0.55, "failed", 1),
        (1000, 0.01, "failed", 1),
        (1000, 0.0, "passed", 0),
        (0, 1.0, "inconclusive", 5),
        (1, 1.0, "failed", 1),
    ],
)
def test_a_floor_is_tested_on_the_lower_end_of_the_interval(
    make_outcome: MakeOutcome,
    make_run: MakeRun,
    broken: int,
    floor: float,
    outcome: str,
    code: int,
) -> None:
    run = make_run(make_outcome(first(broken)))

    made = check(run, rules(Rule(floor=floor)))
    gate = made.gates[0]

    robust = metrics.worst_case(run.attacks)
    assert (made.outcome, made.exit_code) == (outcome, code)
    assert (gate.value, gate.low, gate.high) == (robust.value, *robust.interval)
    assert gate.p == statistics.at_most(robust.k, 1000, floor)
    assert (gate.limit, gate.lost, gate.detectable) == (floor, None, None)


def test_an_undecided_floor_says_how_many_images_would_decide(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    run = make_run(make_outcome(first(500)))

    above = gated(run, Rule(floor=0.48)).reason
    below = gated(run, Rule(floor=0.52)).reason
    at = gated(run, Rule(floor=0.5)).reason

    assert above.startswith("Robust accuracy, in float, 50.0 % (46.9–53.1) of 1,000: ")
    # 1.96^2 * .48 * .52 / .02^2 = 2,397 and 1.645^2 * .52 * .48 / .02^2 = 1,689
    assert "about 2,400 images would decide" in above
    assert "about 1,700 images would decide" in below
    assert "no sample decides" in at


def test_a_decided_sample_of_that_size_does_decide(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    run = make_run(make_outcome(first(1200, 2400)))

    assert gated(run, Rule(floor=0.48)).outcome == "passed"


def test_a_run_that_lacks_an_attack_never_passes(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    """Whatever its status says: the strongest attack may be the one that was taken out."""
    weak, strong = (make_outcome(first(k), spec=Spec(n, {})) for k, n in ((10, "fgsm"), (990, "x")))
    whole = make_run(weak, strong)

    with pytest.raises(RunError, match=r"not complete.*; x: not finished"):
        check(replace(whole, outcomes=(weak,)), rules(Rule(floor=0.5)))
    assert check(replace(whole, outcomes=(weak, strong)), rules(Rule(floor=0.5))).exit_code == 1


def test_a_run_that_lacks_something_of_a_defense_never_passes(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    """Be it the attack that knew it, the one that did not, or the clean images."""
    plain = make_outcome(first(10))
    behind = [replace(plain, defense=SHIELD, adaptive=knows) for knows in (False, True)]
    shield = Defended(SHIELD, "model", make_run(plain).clean, {})
    names = [str(plain.attack) + end for end in ("", f" behind {SHIELD} (oblivious)")]
    names.append(f"{plain.attack} behind {SHIELD}")
    whole = make_run(plain, *behind, defenses=(shield,))
    asked = {**whole.config, "cells": names, "defenses": [str(SHIELD)]}
    whole = replace(whole, config=asked)
    settings = rules(Rule(floor=0.5))

    assert check(whole, settings).outcome == "passed"
    for i, name in enumerate(names):
        kept = whole.outcomes[:i] + whole.outcomes[i + 1 :]
        with pytest.raises(RunError) as caught:
            check(replace(whole, outcomes=kept), settings)
        assert str(caught.value).endswith(f"; {name}: not finished")
    with pytest.raises(RunError, match=f"clean images behind {SHIELD}: not finished"):
        check(replace(whole, defenses=()), settings)


def test_an_unchanged_run_passes(make_pair: MakePair) -> None:
    run, baseline = make_pair(first(500), first(500))

    made = check(run, rules(Rule(max_drop=0.01)), baseline)

    gate = made.gates[0]
    assert made.exit_code == 0
    assert (gate.value, gate.lost, gate.gained, gate.flipped) == (0.0, 0, 0, ())
    assert gate.reason.startswith("0 images lost and 0 gained of 1,000, no drop, 1 point allowed;")


def test_every_number_of_a_drop_follows_from_the_columns(make_pair: MakePair) -> None:
    run, baseline = make_pair(first(500), (first(540) & ~first(8)))
    before = first(1000) & ~first(500)
    outcome = run.outcomes[0]
    after = outcome.attacked & ~outcome.success()
    lost, gained = int((before & ~after).sum()), int((after & ~before).sum())

    gate = gated(run, Rule(max_drop=0.01), baseline)

    assert (lost, gained) == (40, 8)
    assert (gate.lost, gate.gained, gate.value) == (40, 8, 0.032)
    assert (gate.low, gate.high) == Pairs(40, 8, 1000).interval
    assert gate.p == statistics.drop_test(Pairs(40, 8, 1000), 0.01)
    assert gate.detectable == statistics.detectable_drop(1000, 0.016, alpha=0.05, margin=0.01)
    assert gate.outcome == "failed"
    clean = run.clean
    assert gate.flipped == tuple(
        FlippedImage(
            id=f"{clean['id'][row]:016x}",
            index=int(clean["index"][row]),
            label=int(clean["label"][row]),
        )
        for row in np.flatnonzero(before & ~after)[:20]
    )


def test_a_drop_that_chance_explains_is_inconclusive(make_pair: MakePair) -> None:
    run, baseline = make_pair(first(500), first(515))  # 15 lost where 10 are allowed

    made = check(run, rules(Rule(max_drop=0.01)), baseline)

    assert (made.outcome, made.exit_code) == ("inconclusive", 5)
    assert "more than the 1 point allowed, but perhaps by chance" in made.gates[0].reason


def test_a_drop_of_exactly_the_margin_is_allowed(make_pair: MakePair) -> None:
    run, baseline = make_pair(first(500), first(510))

    assert gated(run, Rule(max_drop=0.01), baseline).outcome == "passed"


def test_a_sample_too_small_to_show_a_drop_is_inconclusive(make_pair: MakePair) -> None:
    run, baseline = make_pair(first(50, 100), first(50, 100))

    narrow = gated(run, Rule(max_drop=0.01), baseline)
    wide = gated(run, Rule(max_drop=0.01, detectable=0.1), baseline)

    assert narrow.outcome == "inconclusive"
    assert narrow.detectable == statistics.detectable_drop(100, 0.0, margin=0.01)
    assert "drops from 5 points up must be visible" in narrow.reason
    assert wide.outcome == "passed"


def test_a_handful_of_images_shows_nothing_at_all(make_pair: MakePair) -> None:
    run, baseline = make_pair(first(1, 4), first(4, 4))

    made = check(run, rules(Rule(max_drop=0.0)), baseline)

    assert made.exit_code == 5
    assert made.gates[0].detectable is None
    assert "cannot show any drop" in made.gates[0].reason


@pytest.mark.parametrize(
    ("held", "outcome", "said"),
    [
        (0, "inconclusive", "No image held before, so that none could be lost: the gate guards"),
        (8, "inconclusive", "8 images held before, and the loss of all would not fail"),
        (40, "passed", "no drop, 1 point allowed"),
    ],
)
def test_where_hardly_an_image_held_no_gate_is_green(
    held: int, outcome: str, said: str, make_pair: MakePair
) -> None:
    """A gate that could not fail, whatever became of the images, guards nothing."""
    run, baseline = make_pair(first(1000 - held), first(1000 - held))

    gate = gated(run, Rule(max_drop=0.01), baseline)

    assert gate.outcome == outcome
    assert said in gate.reason


def test_attacks_without_a_radius_are_held_to_drops_where_asked_for_or_alone(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    """They leave nothing that could be lost, so that their gates would always be open."""
    nearest = make_outcome(first(1000), spec=FAB, threat=Threat("l2", None, False))
    both, alone = make_run(make_outcome(first(100)), nearest), make_run(nearest)
    named = Rule(max_drop=0.01, threat=read_threat("l2 minimum"))

    (drop, *others) = check(both, rules(Rule(max_drop=0.01)), build_baseline(both)).gates

    assert (drop.on, drop.outcome) == ("worst case at linf eps 8/255", "passed")
    assert [gate.kind for gate in others] == ["findings"]
    assert gated(alone, Rule(max_drop=0.01), build_baseline(alone)).outcome == "inconclusive"
    assert gated(both, named, build_baseline(both)).outcome == "inconclusive"


def test_an_improvement_passes(make_pair: MakePair) -> None:
    run, baseline = make_pair(first(500), first(300))

    gate = gated(run, Rule(max_drop=0.01), baseline)

    assert (gate.outcome, gate.value) == ("passed", -0.2)


def test_pairs_are_joined_by_id_whatever_the_order(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    old, new = make_run(make_outcome(first(500))), make_run(make_outcome(first(540)))
    clean, cell = (
        {name: column[::-1] for name, column in columns.items()}
        for columns in (new.clean, new.outcomes[0].columns)
    )
    turned = replace(new, clean=clean, outcomes=(replace(new.outcomes[0], columns=cell),))

    gate = gated(turned, Rule(max_drop=0.01), build_baseline(old))

    assert (gate.lost, gate.gained) == (40, 0)
    assert [image.index for image in gate.flipped] == list(range(500, 520))


def test_the_worst_case_is_taken_image_by_image(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    apgd = Spec("apgd", {})
    old = make_run(make_outcome(first(300)), make_outcome(~first(700), spec=apgd))
    new = make_run(make_outcome(first(340)), make_outcome(~first(660), spec=apgd))

    floor = gated(new, Rule(floor=0.3))
    drop = gated(new, Rule(max_drop=0.01), build_baseline(old))

    assert floor.value == metrics.worst_case(new.attacks).value == 0.32
    assert floor.on == drop.on == "worst case at linf eps 8/255"
    assert (drop.lost, drop.gained) == (80, 0)


def test_every_threat_has_a_gate_of_its_own(make_outcome: MakeOutcome, make_run: MakeRun) -> None:
    l2 = make_outcome(first(200), spec=FAB, threat=L2)
    run = make_run(make_outcome(first(500)), l2)

    made = check(run, rules(Rule(floor=0.6)))
    chosen = gated(run, Rule(floor=0.6, threat=Wanted("l2")))
    other = gated(run, Rule(floor=0.6, threat=Wanted("l1")))

    on = {gate.on: gate.outcome for gate in made.gates if gate.kind == "floor"}
    assert on == {
        "worst case at linf eps 8/255": "failed",
        "worst case at l2 eps 0.5": "passed",
    }
    assert (chosen.on, chosen.outcome) == ("worst case at l2 eps 0.5", "passed")
    assert other.outcome == "failed"
    assert "it has linf eps 8/255, l2 eps 0.5" in other.reason


def test_attacks_without_a_radius_have_no_floor_unless_asked_for(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    nearest = make_outcome(first(1000), spec=FAB, threat=Threat("l2", None, False))
    both, alone = make_run(make_outcome(first(100)), nearest), make_run(nearest)

    assert check(both, rules(Rule(floor=0.5))).exit_code == 0
    assert gated(alone, Rule(floor=0.5)).outcome == "failed"
    assert gated(both, Rule(floor=0.5, threat=read_threat("l2 minimum"))).value == 0.0


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        ("pgd:eps=8/255,steps=20", "passed"),
        ("pgd:steps=20,eps=0.03137254901960784", "passed"),
        ("pgd: eps=8/255 , steps=20", "passed"),
        ("pgd:eps=8/255,steps=20,norm=linf", "passed"),  # which is the default
        ("pgd:eps=8/255,steps=21", "failed"),
        ("pgd:eps=0.0314,steps=20", "failed"),
        ("pgd:eps=8/255,steps=20,norm=l2", "failed"),
    ],
)
def test_an_attack_is_found_however_it_is_written(
    make_outcome: MakeOutcome, make_run: MakeRun, tmp_path: Path, text: str, outcome: str
) -> None:
    spec = Spec("pgd", {"eps": 8 / 255, "steps": 20})
    resolved = ATTACKS.entry("pgd").resolve(spec)
    cell = replace(make_outcome(first(100), spec=spec), resolved=resolved)
    (tmp_path / "robusteval.toml").write_text(f'[[gate]]\nfloor = 0.5\non = "{text}"\n')

    made = check(make_run(cell), find_settings(tmp_path))

    assert made.gates[0].outcome == outcome


def test_an_attack_that_was_not_run_fails_its_gate(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    run = make_run(make_outcome(first(0)))
    asked = Spec("pgd", {"eps": 4 / 255})

    floor = gated(run, Rule(floor=0.1, on=asked))
    drop = gated(run, Rule(max_drop=0.1, on=asked, detectable=0.2), build_baseline(run))

    for gate in (floor, drop):
        assert gate.outcome == "failed"
        assert gate.reason == (
            "The run has no attack pgd:eps=4/255; it has pgd:eps=8/255,steps=20."
        )
        assert (gate.p, gate.value) == (None, None)


def test_attacks_of_art_are_compared_as_text_and_number(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    cell = make_outcome(first(100), spec=Spec("art:DeepFool", {"eps": "8/255", "nb": "3"}))
    asked = Spec("art:DeepFool", {"nb": "3", "eps": "0.03137254901960784"})

    assert gated(make_run(cell), Rule(floor=0.5, on=asked)).outcome == "passed"


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"config": {"seed": 1}}, "seed 0 in the baseline, 1 in the run"),
        ({"data": {"sha256": "00"}}, "the same images, but other labels, another order or"),
    ],
)
def test_another_seed_or_other_data_are_never_green(
    make_pair: MakePair, changed: dict[str, Any], words: str
) -> None:
    run, baseline = make_pair(first(500), first(500), **changed)

    for rule in (Rule(max_drop=0.01), Rule(max_drop=0.01, on=CLEAN), Rule(max_clean_cost=0.01)):
        gate = gated(run, rule, baseline)

        assert gate.outcome == "failed"
        assert words in gate.reason


def test_another_subset_is_never_green(make_outcome: MakeOutcome, make_run: MakeRun) -> None:
    old, new = make_run(make_outcome(first(500))), make_run(make_outcome(first(100, 400)))

    made = check(new, rules(Rule(max_drop=0.01)), build_baseline(old))

    assert made.exit_code == 1
    assert (
        "other images (400 are in both, of 1,000 in the baseline and 400 in the run)"
        in made.gates[0].reason
    )


def test_another_budget_is_never_green(make_outcome: MakeOutcome, make_run: MakeRun) -> None:
    weak = Spec("pgd", {"eps": 4 / 255, "steps": 20})
    old = make_run(make_outcome(first(500)))
    new = make_run(make_outcome(first(100), spec=weak, threat=Threat("linf", 4 / 255, False)))

    made = check(new, rules(Rule(max_drop=0.01)), build_baseline(old))

    reasons = {gate.on: gate.reason for gate in made.gates[:2]}
    assert made.exit_code == 1
    assert {gate.outcome for gate in made.gates[:2]} == {"failed"}
    assert "it has linf eps 4/255" in reasons["worst case at linf eps 8/255"]
    assert "nothing to compare" in reasons["worst case at linf eps 4/255"]


def test_other_settings_of_an_attack_are_never_green(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    cells = [
        replace(make_outcome(first(k)), resolved={"eps": 8 / 255, "steps": steps, "loss": "ce"})
        for k, steps in ((500, 20), (100, 1))
    ]
    old, new = (make_run(cell) for cell in cells)

    gate = gated(new, Rule(max_drop=0.01), build_baseline(old))

    assert gate.outcome == "failed"
    assert gate.reason.endswith(
        "was run with other settings: steps 20 in the baseline, 1 in the run."
    )


def test_a_cell_of_the_baseline_that_is_gone_fails_the_gate(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    plain, apgd = make_outcome(first(500)), make_outcome(first(600), spec=Spec("apgd", {}))
    l2 = make_outcome(first(100), spec=FAB, threat=L2)
    baseline = build_baseline(make_run(plain, apgd, l2))

    fewer = check(make_run(plain, l2), rules(Rule(max_drop=0.01)), baseline)
    threat = check(make_run(plain, apgd), rules(Rule(max_drop=0.01)), baseline)

    assert (fewer.exit_code, threat.exit_code) == (1, 1)
    assert fewer.gates[0].reason == "The run lacks apgd, which is in the baseline."
    assert "no attack for the worst case" in threat.gates[1].reason


def test_an_attack_the_baseline_does_not_know_is_left_out_aloud(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    plain, new = make_outcome(first(500)), make_outcome(first(900), spec=Spec("apgd", {}))

    gate = gated(make_run(plain, new), Rule(max_drop=0.01), build_baseline(make_run(plain)))

    assert (gate.outcome, gate.value) == ("passed", 0.0)
    assert gate.reason.endswith("Not in the baseline, and left out: apgd.")


def test_other_library_versions_are_a_remark(make_pair: MakePair) -> None:
    run, baseline = make_pair(first(500), first(500))
    run = replace(run, environment={**run.environment, "torch": "2.11"})

    gate = gated(run, Rule(max_drop=0.01), baseline)

    assert gate.outcome == "passed"
    assert gate.reason.endswith("Not made alike: torch 2.10 there and 2.11 here.")


def test_other_weights_are_what_the_gate_is_for(make_pair: MakePair) -> None:
    run, baseline = make_pair(first(500), first(500), model={"sha256": "ff"})

    assert gated(run, Rule(max_drop=0.01), baseline).outcome == "passed"


def with_detector(
    make_outcome: MakeOutcome,
    make_run: MakeRun,
    *,
    flagged: int,
    broken: int = 800,
    facts: dict[str, Any] | None = None,
    alarms: int = 0,
) -> Run:
    """An attack that breaks so many images behind a detector that flags the first of them."""
    undefended = make_outcome(first(broken))
    behind = replace(
        make_outcome(first(broken), flagged=first(flagged), score=np.zeros(1000)),
        defense=DETECTOR,
    )
    clean = {**make_run(undefended).clean, "flagged": ~first(1000 - alarms)}
    defended = Defended(DETECTOR, "detector", clean, {"fpr": 0.05} if facts is None else facts)
    return make_run(undefended, behind, defenses=(defended,))


@pytest.mark.parametrize(
    ("flagged", "outcome"), [(700, "passed"), (640, "inconclusive"), (560, "failed")]
)
def test_a_detector_is_tested_on_the_lower_end_of_its_interval(
    make_outcome: MakeOutcome, make_run: MakeRun, flagged: int, outcome: str
) -> None:
    run = with_detector(make_outcome, make_run, flagged=flagged)

    gate = gated(run, Rule(min_tpr=0.8, fpr=0.05))
    named = gated(run, Rule(min_tpr=0.8, fpr=0.05, defense=DETECTOR))

    caught = metrics.detection_rate(run.outcomes[1])
    assert caught == statistics.Rate(flagged, 800)
    assert (gate.outcome, gate.value, gate.low) == (outcome, caught.value, caught.interval.low)
    assert (named.outcome, named.on) == (gate.outcome, gate.on)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"fpr": 0.1}, "set to a rate of 10 % of false alarms, and the gate asks for 5 %"),
        ({}, "no stated rate"),
    ],
)
def test_a_threshold_for_another_rate_of_false_alarms_fails(
    make_outcome: MakeOutcome, make_run: MakeRun, facts: dict[str, Any], words: str
) -> None:
    run = with_detector(make_outcome, make_run, flagged=800, facts=facts)

    gate = gated(run, Rule(min_tpr=0.5, fpr=0.05))

    assert gate.outcome == "failed"
    assert words in gate.reason


def test_a_detector_that_is_missing_fails_its_gate(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    run = make_run(make_outcome(first(500)))

    assert gated(run, Rule(min_tpr=0.5, fpr=0.05)).reason == "The run has no detector."
    named = gated(run, Rule(min_tpr=0.5, fpr=0.05, defense=DETECTOR))
    assert named.reason.startswith("The run has no defense detector:")


def test_one_of_several_detectors_must_be_named(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    run = with_detector(make_outcome, make_run, flagged=700)
    second = run.defenses[0]._replace(spec=Spec("other", {}))
    both = replace(run, defenses=(*run.defenses, second))

    unnamed = gated(both, Rule(min_tpr=0.8, fpr=0.05))
    idle = gated(both, Rule(min_tpr=0.8, fpr=0.05, defense=Spec("other", {})))

    assert unnamed.outcome == idle.outcome == "failed"
    assert "several detectors; choose one with `defense`: detector:" in unnamed.reason
    assert idle.reason == "The run has no such attack behind other."


def test_a_detector_may_be_gated_for_one_attack_or_threat(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    run = with_detector(make_outcome, make_run, flagged=700)
    attack = Spec("pgd", {"eps": 8 / 255, "steps": 20})

    for rule in (Rule(on=attack), Rule(threat=Wanted("linf"))):
        assert gated(run, replace(rule, min_tpr=0.8, fpr=0.05)).value == 0.875
    for rule in (Rule(on=FAB), Rule(threat=Wanted("l2"))):
        assert gated(run, replace(rule, min_tpr=0.8, fpr=0.05)).outcome == "failed"


def test_a_defense_that_is_gone_fails_its_gates(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    old = with_detector(make_outcome, make_run, flagged=700)
    new = make_run(make_outcome(first(800)))

    made = check(new, Settings(), build_baseline(old))
    cost = gated(new, Rule(max_clean_cost=0.1, defense=DETECTOR, detectable=0.2))
    robust = gated(new, Rule(floor=0.1, defense=DETECTOR))

    outcomes = [(gate.outcome, "behind" in gate.on) for gate in made.gates[:4]]
    assert outcomes == [("passed", False), ("passed", False), ("failed", True), ("failed", True)]
    for gate in (made.gates[2], made.gates[3], cost, robust):
        assert gate.reason.startswith("The run has no defense detector:")


def test_a_detector_that_saw_no_success_is_not_judged(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    run = with_detector(make_outcome, make_run, flagged=0, broken=0)

    made = check(run, rules(Rule(min_tpr=0.5, fpr=0.05)))

    assert made.exit_code == 5
    assert "no successful attack" in made.gates[0].reason
    json.dumps(to_json_types(made.to_gates()), allow_nan=False)


def test_a_gate_behind_a_defense_looks_there_only(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    run = with_detector(make_outcome, make_run, flagged=700)
    written_otherwise = Spec("detector", {"interpreter": "cam", "fpr": "0.05"})

    plain = gated(run, Rule(floor=0.5))
    behind = gated(run, Rule(floor=0.5, defense=written_otherwise))
    other = gated(run, Rule(floor=0.5, on=CLEAN, defense=SHIELD))

    assert (plain.value, plain.outcome) == (0.2, "failed")
    assert (behind.value, behind.outcome) == (0.9, "passed")
    assert other.outcome == "failed"
    assert "no defense training:epochs=3; it has detector:fpr=0.05,interpreter=cam" in other.reason


@pytest.mark.parametrize(
    ("alarms", "outcome"), [(10, "passed"), (26, "inconclusive"), (60, "failed")]
)
def test_the_clean_cost_of_a_defense_is_measured_in_the_same_run(
    make_outcome: MakeOutcome, make_run: MakeRun, alarms: int, outcome: str
) -> None:
    run = with_detector(make_outcome, make_run, flagged=700, alarms=alarms)

    gate = gated(run, Rule(max_clean_cost=0.02, defense=DETECTOR))

    assert (gate.lost, gate.gained, gate.outcome) == (alarms, 0, outcome)
    assert gate.p == statistics.drop_test(Pairs(alarms, 0, 1000), 0.02)


def test_clean_accuracy_is_compared_with_the_baseline(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    old = make_run(make_outcome(first(100), right=first(950)))
    new = make_run(make_outcome(first(100), right=first(900)))

    cost = gated(new, Rule(max_clean_cost=0.01), build_baseline(old))
    drop = gated(new, Rule(max_drop=0.01, on=CLEAN), build_baseline(old))
    floor = gated(new, Rule(floor=0.85, on=CLEAN))

    assert (cost.lost, cost.outcome) == (drop.lost, drop.outcome) == (50, "failed")
    assert (floor.value, floor.outcome) == (0.9, "passed")


def test_a_detector_set_otherwise_in_the_baseline_is_not_compared(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    old = with_detector(make_outcome, make_run, flagged=700, facts={"fpr": 0.1})
    new = with_detector(make_outcome, make_run, flagged=700)

    gate = gated(new, Rule(max_drop=0.01, defense=DETECTOR), build_baseline(old))

    assert gate.outcome == "failed"
    assert "another rate of false alarms, 0.1 in the baseline, 0.05 in the run" in gate.reason


def test_a_defense_new_to_the_baseline_is_not_compared_with_the_bare_model(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    new = with_detector(make_outcome, make_run, flagged=700)
    old = make_run(make_outcome(first(800)))

    clean = gated(new, Rule(max_drop=0.01, on=CLEAN, defense=DETECTOR), build_baseline(old))
    worst = gated(new, Rule(max_drop=0.01, defense=DETECTOR), build_baseline(old))

    assert clean.outcome == worst.outcome == "failed"
    assert "baseline update" in clean.reason
    assert "baseline update" in worst.reason


def test_without_gates_a_baseline_is_gated_by_default(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    run = with_detector(make_outcome, make_run, flagged=700)

    made = check(run, Settings(), build_baseline(run))

    assert made.exit_code == 0
    assert [(gate.kind, gate.on, gate.limit) for gate in made.gates] == [
        ("max_drop", "clean images", 0.01),
        ("max_drop", "worst case at linf eps 8/255", 0.01),
        (
            "max_drop",
            "worst case at linf eps 8/255 behind detector:fpr=0.05,interpreter=cam",
            0.01,
        ),
        ("max_drop", "clean images behind detector:fpr=0.05,interpreter=cam", 0.01),
        ("findings", "trust checks", None),
    ]


def test_nothing_to_check_shows_how_to_begin(make_outcome: MakeOutcome, make_run: MakeRun) -> None:
    with pytest.raises(UsageError, match="nothing to check") as caught:
        check(make_run(make_outcome(first(1))), Settings())

    assert "[[gate]]\nfloor = 0.4" in str(caught.value)


def test_a_drop_without_a_baseline_is_a_mistake(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    run = make_run(make_outcome(first(1)))

    for rule, key in ((Rule(max_drop=0.1), "max_drop"), (Rule(max_clean_cost=0.1), "max_clean")):
        settings = rules(replace(rule, name="x", line=7), file="robusteval.toml")
        with pytest.raises(UsageError, match=rf"gate x \(robusteval.toml, line 7\) needs.*{key}"):
            check(run, settings)


@pytest.mark.parametrize(
    "changed", [{"status": "incomplete"}, {"failures": {"fab": "out of memory"}}]
)
def test_an_unfinished_run_is_no_verdict(
    make_outcome: MakeOutcome, make_run: MakeRun, changed: dict[str, Any]
) -> None:
    run = make_run(make_outcome(first(1)), **changed)

    with pytest.raises(RunError, match="not complete") as caught:
        check(run, rules(Rule(floor=0.1)))

    assert caught.value.exit_code == 3


def test_nothing_evaluated_is_never_green(make_outcome: MakeOutcome, make_run: MakeRun) -> None:
    for run in (
        make_run(n=0),
        make_run(make_outcome(first(0), right=first(0))),
    ):
        with pytest.raises(NothingEvaluated, match="nothing was evaluated") as caught:
            check(run, rules(Rule(floor=0.0)))
        assert caught.value.exit_code == 5


def test_a_run_without_attacks_fails_gates_about_them(make_run: MakeRun) -> None:
    made = check(make_run(), rules(Rule(floor=0.0)))

    assert made.exit_code == 1
    assert "it has none" in made.gates[0].reason


GRAVE = Finding("zero-gradient", True, "The gradient is zero.", "pgd")
MISFED = Finding("guessing", True, "It guesses.")
SMALL = Finding("saturated", False, "Flat.")


@pytest.mark.parametrize(
    ("findings", "allow", "code"),
    [
        ((SMALL,), (), 0),
        ((GRAVE,), (), 1),
        ((GRAVE, GRAVE), ("zero-gradient",), 0),
        ((GRAVE, MISFED), ("zero-gradient",), 1),
        ((MISFED,), (), 1),
    ],
)
def test_grave_findings_fail_unless_allowed(
    make_outcome: MakeOutcome,
    make_run: MakeRun,
    findings: tuple[Finding, ...],
    allow: tuple[str, ...],
    code: int,
) -> None:
    run = make_run(make_outcome(first(1)), findings=findings)

    assert check(run, rules(Rule(floor=0.5), allow=allow)).exit_code == code


def test_each_kind_of_finding_is_a_gate(make_outcome: MakeOutcome, make_run: MakeRun) -> None:
    run = make_run(make_outcome(first(1)), findings=(GRAVE, MISFED, GRAVE))

    gates = check(run, rules(Rule(floor=0.5))).gates[1:]

    assert [(g.name, g.on, g.reason) for g in gates] == [
        ("findings: zero-gradient", "trust checks of pgd", "The gradient is zero."),
        ("findings: guessing", "trust checks", "It guesses."),
    ]


def test_several_gates_are_corrected_together(make_outcome: MakeOutcome, make_run: MakeRun) -> None:
    cells = [(500, 531, Threat("linf", 0.1, False)), (500, 500, Threat("linf", 0.2, False))]
    old, new = (
        make_run(
            *(
                make_outcome(first(counts[side]), spec=Spec("pgd", {"eps": t.eps}), threat=t)
                for *counts, t in cells
            )
        )
        for side in (0, 1)
    )
    raw = [statistics.drop_test(Pairs(lost, 0, 1000), 0.01) for lost in (31, 0)]

    made = check(new, rules(Rule(max_drop=0.01)), build_baseline(old))

    assert [gate.p for gate in made.gates[:2]] == statistics.holm(raw)
    assert made.gates[1].detectable == statistics.detectable_drop(
        1000, 0.0, alpha=0.025, margin=0.01
    )


def test_failed_outweighs_inconclusive_outweighs_passed() -> None:
    def outcome(*outcomes: Any) -> tuple[str, int]:
        gates = [GateRow("n", "floor", "on", said, "r") for said in outcomes]
        made = Check(tuple(gates), 0.05)
        return made.outcome, made.exit_code

    assert outcome("passed", "inconclusive", "failed") == ("failed", 1)
    assert outcome("passed", "inconclusive") == ("inconclusive", 5)
    assert outcome("passed", "passed") == ("passed", 0)


def test_the_record_has_the_agreed_keys(make_pair: MakePair, tmp_path: Path) -> None:
    run, baseline = make_pair(first(500), first(560))
    settings = rules(
        Rule(name="robust", max_drop=0.01, floor=0.3, line=3),
        file="robusteval.toml",
        baseline=tmp_path / "baseline.json",
    )

    record = to_json_types(check(run, settings, baseline).to_gates())

    assert list(record) == ["outcome", "config", "baseline", "alpha", "gates"]
    assert (record["outcome"], record["config"]) == ("failed", "robusteval.toml")
    assert (record["baseline"], record["alpha"]) == ("baseline.json", 0.05)
    for gate in record["gates"]:
        assert sorted(gate) == sorted(KEYS)
    assert [gate["line"] for gate in record["gates"]] == [3, 3, None]
    assert [gate["name"] for gate in record["gates"]] == ["robust", "robust", "findings"]
    assert len(record["gates"][1]["flipped"]) == 20
    assert json.loads(json.dumps(record, allow_nan=False)) == record


def simulated(
    make_outcome: MakeOutcome,
    make_run: MakeRun,
    *,
    seed: int,
    flips: float,
    drop: float = 0.0,
    times: int = 1000,
) -> dict[str, int]:
    """What the default gate says of runs against a baseline with half of 1,000 images robust.

    Each verdict flips with probability `flips`, either way; `drop` of all images, drawn from the
    robust ones, are lost for good.
    """
    rng = np.random.default_rng(seed)
    held = first(500)
    old = make_run(make_outcome(~held))
    cell, baseline = old.outcomes[0], build_baseline(old)
    found = {"passed": 0, "inconclusive": 0, "failed": 0}
    for _ in range(times):
        still = held & (rng.random(1000) >= 2 * drop)
        robust = still ^ (rng.random(1000) < flips)
        pred = cell.columns["label"] + ~robust
        new = replace(cell, columns={**cell.columns, "pred_adv": pred})
        found[check(replace(old, outcomes=(new,)), Settings(), baseline).outcome] += 1
    return found


def test_nothing_changed_seldom_fails_and_seldom_stays_undecided(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    """1,000 comparisons, two percent of the verdicts flipping: at most 5 % may fail."""
    found = simulated(make_outcome, make_run, seed=1, flips=0.02)

    print(f"nothing changed, 2 % flip: {found}")
    assert found["failed"] <= 50
    assert found["inconclusive"] <= 20


def test_more_noise_does_not_make_it_fail_either(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    found = simulated(make_outcome, make_run, seed=2, flips=0.06, times=200)

    print(f"nothing changed, 6 % flip: {found}")
    assert found["failed"] <= 10


def test_a_drop_of_four_points_is_caught(make_outcome: MakeOutcome, make_run: MakeRun) -> None:
    """1,000 comparisons on top of the same noise: at least 95 % must fail."""
    found = simulated(make_outcome, make_run, seed=3, flips=0.02, drop=0.04)

    print(f"four points lost, 2 % flip: {found}")
    assert found["failed"] >= 950
    assert found["passed"] == 0


def test_a_drop_of_exactly_the_margin_fails_seldom(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    found = simulated(make_outcome, make_run, seed=4, flips=0.02, drop=0.01, times=200)

    print(f"one point lost, 2 % flip: {found}")
    assert found["failed"] <= 10


def test_large_runs_are_checked_without_going_through_images(
    make_outcome: MakeOutcome, make_run: MakeRun
) -> None:
    """10,000 images and 12 cells; the time stands in the benchmarks, here that it is all there."""
    n = 10_000
    cells = [
        make_outcome(
            first(300 * k, n), spec=Spec("pgd", {"steps": k}), threat=Threat("linf", k / 255, False)
        )
        for k in range(1, 13)
    ]
    run = make_run(*cells)

    made = check(run, Settings(), build_baseline(run))

    assert len(made.gates) == 14
    assert made.exit_code == 0


WHOLE = """
alpha = 0.01
baseline = "base/line.json"
allow = ["saturated"]

[[gate]]
name = "robust"
on = "pgd:eps=8/255,steps=20"
floor = 0.4
max_drop = 0.01
detectable = 0.1

[[gate]]
threat = "linf eps 8/255 targeted"
defense = "detector:fpr=0.05"
max_clean_cost = 0
min_tpr = 0.8
fpr = 0.05
"""


def test_a_configuration_is_read_with_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "robusteval.toml"
    path.write_text(WHOLE)

    made = read_settings(path)

    assert made == Settings(
        alpha=0.01,
        baseline=tmp_path / "base" / "line.json",
        allow=("saturated",),
        rules=(
            Rule(
                name="robust",
                on=Spec("pgd", {"eps": 8 / 255, "steps": 20}),
                floor=0.4,
                max_drop=0.01,
                detectable=0.1,
                line=6,
            ),
            Rule(
                threat=Wanted("linf", True, 8 / 255, True),
                defense=Spec("detector", {"fpr": "0.05"}),
                max_clean_cost=0,
                min_tpr=0.8,
                fpr=0.05,
                line=13,
            ),
        ),
        file="robusteval.toml",
    )


def test_a_project_file_says_the_same_in_its_table(tmp_path: Path) -> None:
    path = tmp_path / "pyproject.toml"
    head = '[project]\nname = "x"\ndescription = """\n[[tool.robusteval.gate]]\n"""\n'
    text = WHOLE.replace("[[gate]]", "[[tool.robusteval.gate]]")
    path.write_text(f"{head}\n[tool.robusteval]{text}")

    made = find_settings(tmp_path)

    assert [rule.line for rule in made.rules] == [12, 19]
    assert made.rules[0].name == "robust"
    assert (made.alpha, made.file) == (0.01, "pyproject.toml")


def test_gates_in_one_line_have_that_line(tmp_path: Path) -> None:
    path = tmp_path / "robusteval.toml"
    path.write_text("\ngate = [{floor = 0.1}, {floor = 0.2}]\n")

    assert [rule.line for rule in read_settings(path).rules] == [2, 2]


def test_settings_are_looked_for_in_one_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_settings(tmp_path) == Settings()
    (tmp_path / "pyproject.toml").write_text("[tool.other]\n")
    assert find_settings(tmp_path) == Settings()
    (tmp_path / "pyproject.toml").write_text("[[tool.robusteval.gate]]\nfloor = 0.1\n")
    assert find_settings(tmp_path).rules[0].floor == 0.1
    (tmp_path / "robusteval.toml").write_text("[[gate]]\nfloor = 0.2\n")
    assert find_settings(tmp_path).rules[0].floor == 0.2
    monkeypatch.chdir(tmp_path.parent)
    assert find_settings(tmp_path).file == f"{tmp_path.name}/robusteval.toml"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("alfa = 1", r"unknown key 'alfa' \(did you mean 'alpha'\?\): known are alpha, baseline"),
        ("alpha = 0", "alpha must be a number above 0 to 0.5, not 0"),
        ("alpha = true", "alpha must be a number"),
        ("alpha = nan", "alpha must be a number"),
        ('alpha = "0.05"', "alpha must be a number"),
        ("baseline = 3", "baseline must be the path of a file, not 3"),
        ('baseline = ""', "baseline must be the path of a file"),
        ('allow = "x"', "allow must be a list of codes of findings, not 'x'"),
        ("allow = [1]", "allow must be a list"),
        ("gate = 3", r"gate must be tables, each below \[\[gate\]\]"),
        ("[gate]\nfloor = 0.1", "gate must be tables"),
        ("[[gate]]", "gate 1: it demands nothing; give one or more of floor, max_drop"),
        ("[[gate]]\nflor = 0.1", r"gate 1: unknown key 'flor' \(did you mean 'floor'\?\)"),
        ("[[gate]]\nfloor = 40", r"floor must be a number from 0 to 1 \(0.4 is 40 %\), not 40"),
        ("[[gate]]\nfloor = -0.1", "floor must be"),
        ("[[gate]]\nmax_drop = 1.0", "max_drop must be a number from 0 to below 1"),
        ("[[gate]]\nfloor = true", "floor must be"),
        ('[[gate]]\nfloor = "8/255"', "floor must be"),
        ("[[gate]]\nname = 3\nfloor = 0.1", "name must be a text, not 3"),
        ('[[gate]]\non = ""\nfloor = 0.1', "on must be a text"),
        ('[[gate]]\non = "worst"\nfloor = 0.1', "unknown attack 'worst'.*mean 'worst-case'"),
        ('[[gate]]\non = "pdg"\nfloor = 0.1', "unknown attack 'pdg'.*mean 'pgd'"),
        ('[[gate]]\non = "pgd:stepz=1"\nfloor = 0.1', "unknown parameter of pgd 'stepz'"),
        ('[[gate]]\non = "pgd:steps=x"\nfloor = 0.1', "steps must be a whole number"),
        ('[[gate]]\nthreat = "linf 8/255"\nfloor = 0.1', "threat must be a norm such as"),
        ('[[gate]]\nthreat = "linf eps x"\nfloor = 0.1', "eps must be a number or a fraction"),
        ('[[gate]]\non = "clean"\nthreat = "l2"\nfloor = 0.1', "threat chooses among worst"),
        ('[[gate]]\ndefense = "a:b"\nfloor = 0.1', "write NAME:key=value"),
        ("[[gate]]\nmin_tpr = 0.1", "min_tpr and fpr belong together"),
        ("[[gate]]\nfpr = 0.1\nfloor = 0.1", "min_tpr and fpr belong together"),
        ('[[gate]]\non = "clean"\nmin_tpr = 0.1\nfpr = 0.1', "not about clean images"),
        ("[[gate]]\nfloor = 0.1\ndetectable = 0.1", "detectable belongs to max_drop"),
        ("[[gate]]\nmax_drop = 0.1\ndetectable = 0.1", "must be above max_drop"),
        ("[[gate]]\nmax_drop = 0.1", "must be above max_drop"),
        ("[[gate", "is not TOML"),
        ("a = " + "[" * 5000, "is not TOML"),
    ],
)
def test_mistakes_in_a_configuration_are_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "robusteval.toml"
    path.write_text(text)

    with pytest.raises(UsageError, match=words) as caught:
        read_settings(path)

    assert str(path) in str(caught.value)


def test_the_gate_of_a_mistake_is_named(tmp_path: Path) -> None:
    path = tmp_path / "robusteval.toml"
    path.write_text('[[gate]]\nfloor = 0.1\n[[gate]]\nname = "second"\nfloor = 2\n')

    with pytest.raises(UsageError, match=r"robusteval.toml, gate 2 \(second\): floor must be"):
        read_settings(path)


def test_a_configuration_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        read_settings(tmp_path / "none.toml")
    path = tmp_path / "pyproject.toml"
    for text in ("", "tool = 1", "[tool]\nrobusteval = 1"):
        path.write_text(text)
        with pytest.raises(UsageError, match=r"no table \[tool.robusteval\]"):
            read_settings(path)


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    path = tmp_path / "robusteval.toml"
    path.write_bytes(b"\xef\xbb\xbf[[gate]]\nfloor = 0.1\n")

    assert read_settings(path).rules[0] == Rule(floor=0.1, line=1)


def test_attacks_of_art_are_not_known_before_art_is_imported(tmp_path: Path) -> None:
    path = tmp_path / "robusteval.toml"
    path.write_text('[[gate]]\nfloor = 0.1\non = "art:DeepFool:max_iter=5"\n')

    assert read_settings(path).rules[0].on == Spec("art:DeepFool", {"max_iter": "5"})


@pytest.mark.parametrize(
    ("text", "threat", "included"),
    [
        ("linf", Threat("linf", 0.1, True), True),
        ("linf", Threat("l2", 0.1, False), False),
        ("linf eps 8/255", Threat("linf", 8 / 255, False), True),
        ("linf eps 8/255", Threat("linf", 8 / 255, True), False),
        ("linf eps 0.0314", Threat("linf", 8 / 255, False), False),
        ("l2 minimum", Threat("l2", None, False), True),
        ("l2 minimum targeted", Threat("l2", None, True), True),
        ("l2 minimum", Threat("l2", 0.5, False), False),
    ],
)
def test_threats_are_read_as_reports_write_them(text: str, threat: Threat, included: bool) -> None:
    assert read_threat(text).includes(threat) is included
    assert read_threat(str(threat)).includes(threat)


def test_a_baseline_on_disk_checks_like_one_in_memory(make_pair: MakePair, tmp_path: Path) -> None:
    run, baseline = make_pair(first(500), first(530))
    path = tmp_path / "baseline.json"
    path.write_text(render_baseline(baseline))
    settings = Settings(baseline=path)

    assert check(run, settings, read_baseline(path)) == check(run, settings, baseline)
