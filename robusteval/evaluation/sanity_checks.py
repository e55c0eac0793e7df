"""The checks that say whether a number can be believed. They travel with the result."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from robusteval.evaluation.strength import check_strength, is_strong
from robusteval.evaluation.votes import SURVIVAL, VOTES
from robusteval.runs.statistics import Rate
from robusteval.runs.types import Columns, Finding, Flags, Outcome, Spec, keep_different

UNSTEADY = 0.1  # of a margin
LUCK = 3 * (2 * 0.25 / VOTES) ** 0.5  # three standard errors of a difference of two such shares


def check_clean(clean: Columns, num_classes: int) -> list[Finding]:
    """What the clean predictions say of model and data."""
    found = list(find_repeats(clean))
    clean = keep_different(clean)
    label, pred = clean["label"], clean["pred_clean"]
    n, right = len(label), pred == label

    asked = clean["steady"] >= 0
    unsteady = int((clean["steady"] == 0).sum())
    if unsteady:
        found.append(
            Finding(
                "non-deterministic",
                True,
                f"{unsteady} of {asked.sum()} images got other logits when predicted a second time:"
                " dropout or a random defense is active, so a single attack run proves little.",
            )
        )
    if clean["probabilities"].mean() > 0.99:
        found.append(
            Finding(
                "probabilities",
                True,
                "The outputs look like probabilities: a softmax at the end flattens the gradients"
                " that attacks follow; return logits.",
            )
        )
    broken = int((pred == -1).sum())
    if broken:
        found.append(
            Finding(
                "non-finite",
                True,
                f"{broken} of {n} images get logits that are NaN or infinite; they count as wrong."
                " To switch a class off give it a large negative logit, such as -1e4.",
            )
        )
    if clean["brightest"].max() <= 2 / 255:
        found.append(
            Finding(
                "black-images",
                True,
                f"No pixel is brighter than {clean['brightest'].max():.4f} of 1: the images were"
                " probably divided by 255 twice.",
            )
        )
    if Rate(int(right.sum()), n).interval.high < 0.5 and n >= 10 * num_classes:
        relabelled = measure_best_relabelling(label, pred, num_classes)
        if relabelled - right.mean() > 0.3:
            found.append(
                Finding(
                    "labels-permuted",
                    True,
                    f"Accuracy is {right.mean():.1%}, but {relabelled:.1%} if classes were numbered"
                    " otherwise: the class order of the data is probably not the checkpoint's.",
                )
            )
    chance = 1 / num_classes
    answers = n - broken  # of others nothing is known
    if answers and right.mean() < 1 and Rate(int(right.sum()), answers).interval.low <= chance:
        found.append(
            Finding(
                "guessing",
                True,
                f"Clean accuracy {right.mean():.1%} is no better than guessing among"
                f" {num_classes} classes: check architecture, normalisation, size and labels.",
            )
        )
    if not unsteady:
        found += check_unsteadiness(clean["unsteadiness"])
    return found + check_slopes(clean["slope_ce"], clean["slope_margin"])


def check_unsteadiness(unsteadiness: np.ndarray[Any, Any]) -> list[Finding]:
    """Whether noise that a file does not keep moves what the model says; nan was not asked for.

    "Unstable predictions" of Indicators of Attack Failure, arXiv:2106.09947, at the same share.
    """
    known = unsteadiness[np.isfinite(unsteadiness)]
    if not len(known) or float(np.median(known)) <= UNSTEADY:
        return []
    return [
        Finding(
            "unstable",
            True,
            f"Noise of half a grey level moves the margin of {(known > UNSTEADY).sum()} of"
            f" {len(known)} images by more than {UNSTEADY:.0%}: a gradient says little of where it"
            " leads (gradient masking); add unmask and square.",
        )
    ]


def find_repeats(clean: Columns) -> Iterator[Finding]:
    """Whether images are in the data several times, by content."""
    different = len(keep_different(clean)["id"])
    if different == len(clean["id"]):
        return
    names = np.unique(np.stack([clean["id"], clean["label"].astype(np.uint64)]), axis=1)[0]
    torn = int((np.unique(names, return_counts=True)[1] > 1).sum())
    doubt = f" {torn} of them have several labels, of which one at most is right." if torn else ""
    yield Finding(
        "repeated-images",
        False,
        f"{len(clean['id'])} images, {different} different ones: each counts once, in rates as in"
        f" intervals.{doubt}",
    )


def check_seen(clean: Columns, seen: np.ndarray[Any, Any] | None, behind: str) -> list[Finding]:
    """Whether a defense is judged on images that it was made with, by their ids `seen`."""
    known = 0 if seen is None else int(np.isin(clean["id"], seen).sum())
    if not known:
        return []
    return [
        Finding(
            "seen-before",
            True,
            f"{known} of {len(clean['id'])} images were used to make the defense: all numbers"
            f"{behind} flatter it; take others.",
        )
    ]


def check_slopes(ce: np.ndarray[Any, Any], margin: np.ndarray[Any, Any]) -> list[Finding]:
    """What the gradients at the clean images say; entries not asked for are NaN in both."""
    asked = ~(np.isnan(ce) & np.isnan(margin))
    n = int(asked.sum())
    flat = ~(np.nan_to_num(margin[asked], posinf=0.0) > 0)
    saturated = ~flat & ~(np.nan_to_num(ce[asked], posinf=0.0) > 0)
    found = []
    if flat.sum() > 0.05 * n:
        found.append(
            Finding(
                "zero-gradient",
                True,
                f"The gradient is zero or not finite at {flat.sum()} of {n} images: attacks that"
                " follow it cannot work there (gradient masking); use black-box attacks as well.",
            )
        )
    if saturated.sum() > 0.05 * n:
        found.append(
            Finding(
                "saturated",
                False,
                f"The model is so sure of {saturated.sum()} of {n} images that cross-entropy is"
                " flat there in float32, though the logits are not: the attacks here keep its"
                " direction, those from elsewhere that differentiate it as it stands fail without"
                " the model being robust.",
            )
        )
    return found


def measure_best_relabelling(
    label: np.ndarray[Any, Any], pred: np.ndarray[Any, Any], num_classes: int
) -> float:
    """Accuracy under the one-to-one renumbering of classes that suits the predictions best."""
    from scipy.optimize import linear_sum_assignment

    counts = np.zeros((num_classes, num_classes))
    valid = pred >= 0
    np.add.at(counts, (label[valid], pred[valid]), 1)
    return float(counts[linear_sum_assignment(counts, maximize=True)].sum() / len(label))


class ProbeAttack(NamedTuple):
    """An extra attack on a few images, and what it is to show."""

    spec: Spec
    role: str


def list_probes(outcomes: Sequence[Outcome], *, moving: bool = False) -> list[ProbeAttack]:
    """The extra attacks that the checks of these outcomes need.

    On a network whose answers to an image are `moving` none ends with the first success.
    """
    wanted: list[ProbeAttack] = []
    for outcome in outcomes:
        norm, eps, targeted = outcome.threat
        if not is_strong(outcome) or eps is None or norm not in ("linf", "l2", "l1"):
            continue
        if "interpreter" in outcome.resolved:
            continue  # it also has a map to keep: dear, and no measure of the class alone
        if not targeted:
            noise = Spec("noise", {"norm": norm, "eps": eps})
            wanted.append(ProbeAttack(noise, "probe:noise"))
            unlimited = build_unlimited(outcome, moving=moving)
            wanted.append(ProbeAttack(unlimited, "probe:unlimited"))
        if "eps" in outcome.resolved and eps > 0:
            wanted.append(ProbeAttack(double_radius(outcome, moving=moving), "probe:double"))
    unique = {(str(probe.spec), probe.role): probe for probe in wanted}
    return list(unique.values())


def build_unlimited(outcome: Outcome, *, moving: bool = False) -> Spec:
    """A gradient attack that may change every pixel to anything."""
    norm = outcome.threat.norm
    facts = {"norm": norm, "eps": {"linf": 1.0, "l2": 100.0, "l1": 1e6}[norm], "steps": 50}
    search = {"loss": "margin", "stop": "never" if moving else "float"}
    if norm == "l1":
        return Spec("apgd", {**facts, "start": "image", **search})
    return Spec("pgd", {**facts, "random_start": False, **search})


def double_radius(outcome: Outcome, *, moving: bool = False) -> Spec:
    """The spec of a probe: the attack of a cell with twice its radius.

    It may leave an image at the first success that counts, which it is all about.
    """
    assert outcome.threat.eps is not None
    eps = 2 * outcome.threat.eps
    if outcome.threat.norm == "linf":
        eps = min(eps, 1.0)
    changed: dict[str, object] = {"eps": eps}
    if outcome.resolved.get("stop") == "never" and not moving:
        changed["stop"] = "8bit"
    return Spec(outcome.attack.name, {**outcome.attack.parameters, **changed})


def is_double(probe: Outcome, outcome: Outcome) -> bool:
    """Whether a probe is the attack of a cell with twice its radius."""
    wanted = (double_radius(outcome, moving=moving) for moving in (False, True))
    return any(probe.attack == spec for spec in wanted)


def check_outcomes(outcomes: Sequence[Outcome]) -> list[Finding]:
    """What attacks and probes say of each other."""
    attacks = [o for o in outcomes if o.role == "attack"]
    found: list[Finding] = []
    for outcome in attacks:
        found += check_attack(outcome)
        found += compare_with_probes(outcome, [o for o in outcomes if o.role != "attack"])
    found += find_black_box_wins(attacks)
    found += check_strength(attacks)
    return list(dict.fromkeys(found))


def check_attack(outcome: Outcome) -> list[Finding]:
    """What the columns of one attack say of it."""
    c, name = outcome.columns, str(outcome.attack)
    found = []
    if outcome.threat.eps == 0:
        found.append(
            Finding(
                "zero-radius",
                False,
                f"{name} may change nothing: with eps=0 robust accuracy is clean accuracy.",
                name,
            )
        )
    for bit, what in ((1, "left [0, 1]"), (2, "left the ball"), (4, "held NaN or infinity")):
        count = int(((c["fault"] & bit) > 0).sum())
        if count:
            found.append(
                Finding(
                    "repaired",
                    False,
                    f"{count} results of {name} {what}; they were brought back and judged again.",
                    name,
                )
            )
    broken = int((outcome.attacked & (c["pred_adv"] == -1)).sum())
    if broken:
        found.append(
            Finding(
                "non-finite-attacked",
                False,
                f"{broken} images get logits that are NaN or infinite under {name}; they count as"
                " broken.",
                name,
            )
        )
    failed = outcome.attacked & ~outcome.success()
    stuck = failed & (c["margin_adv"] >= c["margin_clean"])
    # ours return the best image they found, but of few changes a success or nothing; some of
    # ART's return any where they fail
    ours = not outcome.attack.name.startswith("art:") and "l0" not in outcome.threat.norm
    # shares of votes stand still where every answer is right
    follows = ours and SURVIVAL not in c and is_strong(outcome) and (outcome.threat.eps or 0) > 0
    if follows and not outcome.threat.targeted and stuck.sum() > 0.1 * outcome.attacked.sum():
        found.append(
            Finding(
                "loss-not-rising",
                True,
                f"{name} leaves {stuck.sum()} of {outcome.attacked.sum()} images no nearer to an"
                " error than they were: the gradient misleads it.",
                name,
            )
        )
    found += [Finding("note", False, f"{name}: {note}.", name) for note in outcome.notes]
    return found


def could_be_luck(outcome: Outcome, probe: Outcome) -> Flags:
    """Images of a probe ``(n,)`` whose verdict may differ from the attack's by the draws alone.

    None, but of networks that answer at random: there both are shares of `VOTES` answers.
    """
    n = len(probe.columns["id"])
    if SURVIVAL not in outcome.columns or SURVIVAL not in probe.columns:
        return np.zeros(n, bool)
    mine = outcome.columns[SURVIVAL][np.flatnonzero(outcome.attacked)[:n]]
    close: Flags = np.abs(probe.columns[SURVIVAL] - mine) < LUCK
    return close


def compare_with_probes(outcome: Outcome, probes: Sequence[Outcome]) -> list[Finding]:
    """What the extra attacks on the first images say of an attack on all of them."""
    if not is_strong(outcome):
        return []
    name, found = str(outcome.attack), []
    for probe in probes:
        n = len(probe.columns["id"])
        mine = outcome.success()[np.flatnonzero(outcome.attacked)[:n]]
        theirs = probe.success()
        told = ~could_be_luck(outcome, probe)
        only = int((theirs & ~mine & told).sum())
        same_norm = probe.threat.norm == outcome.threat.norm
        if probe.role == "probe:noise" and probe.threat == outcome.threat and only > 0:
            found.append(
                Finding(
                    "noise-wins",
                    True,
                    f"Random noise of the same size breaks {only} of {n} images that {name} does"
                    " not: the attack is broken or the gradient masked.",
                    name,
                )
            )
        if probe.role == "probe:unlimited" and same_norm and not theirs.all():
            found.append(
                Finding(
                    "unlimited",
                    True,
                    f"Even an unlimited {probe.threat.norm} attack leaves {int((~theirs).sum())} of"
                    f" {n} images right: gradients of this model mislead, robust accuracy is"
                    " overestimated.",
                )
            )
        bounded = outcome.threat.eps is not None
        if probe.role == "probe:double" and bounded and is_double(probe, outcome):
            lost = int((mine & ~theirs & told).sum())
            if lost - only > max(1, 0.02 * n):
                found.append(
                    Finding(
                        "larger-budget",
                        True,
                        f"{name} breaks {int(mine.sum())} of {n} images, with twice the budget only"
                        f" {int(theirs.sum())}: it does not use its budget.",
                        name,
                    )
                )
    return found


def find_black_box_wins(attacks: Sequence[Outcome]) -> list[Finding]:
    """Images that fall to an attack that sees less, but to none that sees the model."""
    found = []
    for outcome in attacks:
        seeing = [
            o
            for o in attacks
            if o.threat == outcome.threat and o.knowledge == "white-box" and o is not outcome
        ]
        if outcome.knowledge == "white-box" or not seeing:
            continue
        any_seeing = np.logical_or.reduce([o.success() for o in seeing])
        only = int((outcome.success() & ~any_seeing).sum())
        n = int(outcome.attacked.sum())
        if only > max(1, 0.01 * n):
            found.append(
                Finding(
                    "black-box-wins",
                    True,
                    f"{outcome.attack}, which does not see the model, breaks {only} of {n} images"
                    " that no attack with its gradient breaks: a sign of gradient masking.",
                    str(outcome.attack),
                )
            )
    return found
