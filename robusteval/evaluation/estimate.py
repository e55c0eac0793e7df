"""About how long attacks will take, from a few images, before anybody waits for them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from robusteval.evaluation.columns import PROBED
from robusteval.evaluation.plan import Attack, Plan
from robusteval.evaluation.sanity_checks import ProbeAttack
from robusteval.evaluation.target import Target
from robusteval.models.classifier import Classifier, choose_block_size
from robusteval.models.failures import raise_as_run_error
from robusteval.progress import Progress, foresee, write_estimate
from robusteval.runs.metrics import find_right

ROUNDS = 3  # of which the shortest counts: another program may hold the processor
WORTH_SAYING = 60.0  # seconds below which nobody asks
# passes for an image that holds, where no parameter tells them
STAGED = {
    "standard": 600,
    "thorough": 5800,
    "quick": 170,
    "unmask": 310,
    "autoattack": 8700,
    "sigma_zero": 630,
    "sparse": 430,
}
JUDGING = 4  # passes for an image: as returned, as 8 bit, as a PNG file, and what is measured
UNLIMITED = 101  # passes of a probe without limits
COUNTING = {"standard": STAGED["sigma_zero"] + STAGED["sparse"]}  # under l0


def foresee_stages(
    progress: Progress, plan: Plan, targets: Sequence[Target], receivers: Sequence[Target]
) -> None:
    """Say which parts of a run come, and what they cost as far as that is known.

    Parameters
    ----------
    progress : Progress
        Is told.
    plan : Plan
        What is run.
    targets : sequence of Target
        The classifier as it is, then behind each defense.
    receivers : sequence of Target
        Other networks that judge what is made on the first.
    """
    looks = {f"Clean accuracy{t.suffix}": 0.0 for t in (*targets, *receivers) if not t.clean}
    stages: dict[str, float | None] = {**looks}
    checks: dict[str, float | None] = {}
    others = len(targets) - 1 + len(receivers)
    for target in targets:
        images = count_attacked(plan, target)
        attacks = plan.list_attacks_on(target.defense)
        judging = JUDGING * (1 if target.defense else 1 + others)
        for attack in attacks:
            passes = count_expected(attack)
            stages[f"{attack.spec}{target.suffix}"] = (
                None if passes is None else images * (passes + judging)
            )
        if plan.probes and attacks:
            checks[name_checks(target)] = count_checking(plan, target)
    foresee(progress, stages | checks)


def say_forecast(
    progress: Progress,
    plan: Plan,
    targets: Sequence[Target],
    receivers: Sequence[Target],
    most: int,
) -> None:
    """Say how long the attacks will take, where that is worth saying; see `write_forecast`."""
    foresee_stages(progress, plan, targets, receivers)
    if forecast := write_forecast(plan, targets[0], most):
        progress.say(forecast)


def foresee_checks(
    progress: Progress, plan: Plan, target: Target, probes: Sequence[ProbeAttack]
) -> Sequence[ProbeAttack]:
    """Say which the trust checks of a target are; the same checks."""
    cost = count_checking(plan, target) / max(len(probes), 1)
    each = {f"Trust check {probe.spec}{target.suffix}": cost for probe in probes}
    foresee(progress, {name_checks(target): 0.0, **each})
    return probes


def name_checks(target: Target) -> str:
    """What the trust checks of a target are called until it is known which these are."""
    return f"Trust checks{target.suffix}"


def count_checking(plan: Plan, target: Target) -> float:
    """Passes of images that trust checks take, roughly: each attack again, and one without limits,
    on a few images; see `sanity_checks.list_probes`."""
    attacks = plan.list_attacks_on(target.defense)
    known = sum(count_expected(attack) or 0 for attack in attacks)
    return min(count_attacked(plan, target), PROBED) * float(known + UNLIMITED * len(attacks))


def count_attacked(plan: Plan, target: Target) -> int:
    """Images that are attacked here: those that are right, all of them before that is known."""
    known = "pred_clean" in target.clean
    images = int(find_right(target.clean).sum()) if known else len(plan.index)
    return images if plan.share is None else -(-images // plan.share.of)


def write_forecast(plan: Plan, target: Target, most: int) -> str:
    """How long the attacks on the model as it is will take; empty where that is not worth saying.

    Measured on no more than `most` of the images that are right.
    """
    rows = np.flatnonzero(find_right(target.clean))
    some = rows[: min(choose_count(target.model, plan.data.shape), most)]
    if not len(some):
        return ""
    x = plan.data.batch(plan.index[some]).x.to(target.model.device)
    images = count_attacked(plan, target)
    seconds = estimate_seconds(target.model, x, plan.attacks, images)
    if seconds is None or seconds <= WORTH_SAYING:
        return ""
    return (
        f"The attacks take {write_estimate(seconds)} if all of {images} images hold, less for"
        " each that falls."
    )


def count_expected(attack: Attack) -> int | None:
    """Passes that an attack needs for an image that holds; None where nobody knows."""
    given: dict[str, Any] = attack.resolved
    if attack.threat.norm.startswith("l0") and attack.spec.name in COUNTING:
        return COUNTING[attack.spec.name]
    if attack.spec.name == "unmask":  # along each of its gradients
        guides = 1 + bool(given["layers"]) + bool(given["other"])
        return STAGED["unmask"] * guides * int(given["draws"]) * (1 + int(given["company"]))
    if attack.spec.name in STAGED:
        return STAGED[attack.spec.name]
    if "queries" in given:
        return int(given["queries"])
    if attack.foreign or given.get("steps") is None or given.keys() & {"interpreter", "guide"}:
        return None
    runs = given.get("restarts", 1) * max(given.get("targets", 0), 1)
    runs *= given["rounds"] if attack.spec.name == "strattack" else 1
    return int((2 * given["steps"] + 1) * runs)


def estimate_seconds(
    model: Classifier, x: torch.Tensor, attacks: Sequence[Attack], images: int
) -> float | None:
    """Seconds that attacks on so many images take, if all hold; None where nobody knows.

    Measured by passes forward and backward of the images `x` ``(n, c, h, w)``; once, if the first
    ones already say that nobody will ask.
    """
    passes = [count_expected(attack) for attack in attacks]
    if not len(x) or any(known is None for known in passes):
        return None
    with raise_as_run_error("the network cannot take these images"):
        z = x.clone().requires_grad_()
        expected = sum(known or 0 for known in passes) * images / (2 * len(x))
        least = torch.inf
        for _ in range(ROUNDS):
            least = min(least, time_passes(model, z))
            if least * expected <= WORTH_SAYING:
                break
    return least * expected


def time_passes(model: Classifier, z: torch.Tensor) -> float:
    """Seconds that a pass forward and one backward of images ``(n, c, h, w)`` take."""
    started = time.perf_counter()
    logits = model(z)
    if logits.requires_grad:
        torch.autograd.grad(logits.sum(), z)
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter() - started


def choose_count(model: Classifier, shape: Sequence[int]) -> int:
    """How many images are measured: a block of the network."""
    return choose_block_size(int(torch.Size(shape).numel()), model.device)
