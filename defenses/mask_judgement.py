"""What masks are worth: under attacks made without them and with them, beside random ones."""

from __future__ import annotations

from typing import NamedTuple

from robusteval.datasets.arrays import from_arrays
from robusteval.datasets.dataset import Data
from robusteval.errors import RunError
from robusteval.evaluation.defense import ReadyDefense
from robusteval.evaluation.evaluate import evaluate
from robusteval.evaluation.work_cache import WorkCache, describe_circumstances
from robusteval.models.classifier import Classifier
from robusteval.models.masked import mask_units
from robusteval.progress import Progress
from robusteval.runs.metrics import accuracy, find_right, robust_accuracy
from robusteval.runs.statistics import Rate, count_pairs, sign_test
from robusteval.runs.types import Finding, Flags, Outcome, Spec

from .masking import ChosenMasks

LEVEL = 0.05  # of the tests behind the verdict


class MaskFigures(NamedTuple):
    """What a network is worth: images right as they are, and after two attacks."""

    clean: Rate
    static: Rate  # made for the unmasked network
    adaptive: Rate  # made for this one


class MaskJudgement(NamedTuple):
    """Figures of the same images, and what they amount to."""

    plain: MaskFigures
    masked: MaskFigures
    control: MaskFigures
    verdict: str
    findings: tuple[Finding, ...]  # what a reader must know of the attacks


def judge_masks(
    classifier: Classifier,
    data: Data,
    chosen: ChosenMasks,
    *,
    attack: str | Spec = "pgd:eps=1/255,steps=20,stop=never",
    seed: int = 0,
    done: WorkCache | None = None,
    progress: Progress | None = None,
) -> MaskJudgement:
    """Judge what masks are worth on images that they were not chosen by; see `choose_masks`.

    Raises
    ------
    RunError
        An attack broke.
    """
    images = from_arrays(chosen.judging.x.numpy(), chosen.judging.y.numpy(), name=data.name)
    shields = [
        ReadyDefense(
            Spec(name, {}),
            mask_units(classifier, chosen.layer, masks),
            {"name": name, "mask": masks.tolist()},  # chance may choose the same units
        )
        for name, masks in (("mask", chosen.masks), ("control", chosen.control))
    ]
    facts = [
        *describe_circumstances(classifier, seed),
        *(each.tolist() for each in (chosen.judging.ids, chosen.masks, chosen.control)),
        *(chosen.layer, str(attack)),
    ]
    run = evaluate(
        classifier,
        images,
        [attack],
        seed=seed,
        out=(done or WorkCache()).name_run_folder(facts),
        probes=False,
        defenses=shields,
        progress=progress,
    )
    if run.failures:
        raise RunError("; ".join(run.failures.values()))
    cells = {(o.defense and o.defense.name, o.adaptive): o for o in run.attacks}
    clean = {defended.spec.name: defended.clean for defended in run.defenses}

    def both(name: str) -> BothAttacks:
        return BothAttacks(cells[name, False], cells[name, True])

    def figures(name: str) -> MaskFigures:
        return MaskFigures(accuracy(clean[name]), *map(robust_accuracy, both(name)))

    plain = cells[None, True]
    found = explain_mask_verdict(plain, both("mask"), both("control"))
    price = explain_clean_cost(find_right(run.clean), find_right(clean["mask"]))
    return MaskJudgement(
        MaskFigures(accuracy(run.clean), robust_accuracy(plain), robust_accuracy(plain)),
        figures("mask"),
        figures("control"),
        f"{found} {price}",
        tuple(finding for finding in run.findings if finding.grave),
    )


class BothAttacks(NamedTuple):
    """One network under both attacks."""

    static: Outcome
    adaptive: Outcome


def explain_mask_verdict(plain: Outcome, mask: BothAttacks, control: BothAttacks) -> str:
    """Explain what the figures amount to: of the network as it is, masked, and masked at random.

    Who knows the mask can still use the attack that was made without it, so what remains is what
    holds under both.
    """
    undefended, unaware, own = map(find_robust, (plain, *mask))
    hindered = (
        " The attack made for the masked network does less than the other one: something hinders"
        " it, and stronger attacks may do more."
        if is_gain(unaware, own)
        else ""
    )
    aware, chance = unaware & own, find_robust(control.static) & find_robust(control.adaptive)
    return explain_remaining_gain(undefended, unaware, aware, chance) + hindered


def explain_remaining_gain(undefended: Flags, unaware: Flags, aware: Flags, chance: Flags) -> str:
    """Explain what is left of a gain under attacks that know the mask; each ``(n,)``."""
    if not is_gain(undefended, aware):
        if is_gain(undefended, unaware):
            return "The gain disappears under an attack that knows the mask: this is no robustness."
        return (
            "The mask gains nothing that could be told from chance, whether or not the attack"
            " knows it."
        )
    left = -100 * count_pairs(undefended, aware).drop
    promised = -100 * count_pairs(undefended, unaware).drop
    gain = f"Of a gain of {promised:.1f} points {left:.1f} remain"
    if not is_gain(aware, unaware):
        gain = f"A gain of {left:.1f} points remains"
    if is_gain(chance, aware):
        return (
            f"{gain} under an attack that knows the mask, more than with random units: see whether"
            " stronger attacks leave any of it."
        )
    return (
        f"{gain} under an attack that knows the mask, which is no more than what a random mask"
        " gives: it does not come from the choice of units."
    )


def find_robust(outcome: Outcome) -> Flags:
    """Find the images ``(n,)`` that are right at first and after the attack."""
    kept: Flags = outcome.attacked & ~outcome.success()
    return kept


def is_gain(before: Flags, after: Flags) -> bool:
    """Whether more images hold after a change, by an exact sign test at `LEVEL`."""
    pairs = count_pairs(before, after)
    return sign_test(pairs.gained, pairs.lost) < LEVEL


def explain_clean_cost(before: Flags, after: Flags) -> str:
    """Explain what a mask does to images that nobody attacks."""
    drop = 100 * count_pairs(before, after).drop
    if is_gain(after, before):
        return f"It costs {drop:.1f} points of clean accuracy."
    if drop == 0:
        return "Clean accuracy stays as it is."
    return f"Clean accuracy changes by {-drop:+.1f} points, which can be chance."
