"""Attack a batch of images, and bring what comes back inside what the threat allows."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from robusteval.datasets.dataset import Positions
from robusteval.errors import RunError
from robusteval.evaluation.judge import repair
from robusteval.evaluation.plan import Attack
from robusteval.evaluation.shortcut_checks import LOST, compare_verdicts, taking_shortcuts
from robusteval.models.classifier import Classifier
from robusteval.models.failures import explain_no_gradient, raise_as_run_error
from robusteval.models.seeds import draw_targets
from robusteval.models.shortcuts import Shortcuts
from robusteval.models.steps import Passes, book_rows, count_passes


class Perturbed(NamedTuple):
    """A batch of n images after an attack."""

    returned: Tensor  # what the attack returned, as it is
    x_adv: Tensor  # (n, c, h, w) the same inside pixel box and ball
    fault: Tensor  # (n,) uint8, what had to be brought back, see `judge`
    goal: Tensor  # (n,) classes to reach; of an untargeted attack the labels, which are to be left
    passes: Passes  # forward and backward passes of each image, and in which stages
    seconds: float  # the whole batch took
    by_shortcuts: Tensor | None = None  # (n,) where verdicts differ by them, if any were taken


def perturb(
    attack: Attack,
    model: Classifier,
    x: Tensor,
    y: Tensor,
    *,
    seeds: Tensor,
    goal: Tensor | None = None,
    shortcuts: Shortcuts | None = None,
) -> Perturbed:
    """Attack a batch, but for images whose label is the class to reach: these stay as they are.

    Parameters
    ----------
    attack : Attack
        From `robusteval.evaluation.plan.prepare_attack`.
    model : Classifier
        What is attacked, in eval mode.
    x : Tensor
        Images ``(n, c, h, w)`` in [0, 1], on the device of the model; they stay as they are.
    y : Tensor
        Labels ``(n,)``.
    seeds : Tensor
        One per image ``(n,)``, see `robusteval.models.seeds.sample_seeds`: all that is random.
    goal : Tensor, optional
        Classes ``(n,)`` to reach, or to leave by an untargeted attack; those of `choose_goals` if
        not given.
    shortcuts : Shortcuts, optional
        That the attack takes. Images that fool the model through them alone are attacked again
        without.

    Returns
    -------
    Perturbed
        Images, goals and what they cost.

    Raises
    ------
    RunError
        If the attack broke, or returned something of another shape.
    """
    goal = choose_goals(attack, y, seeds, model.num_classes) if goal is None else goal
    started = time.perf_counter()
    targeted, by_shortcuts = attack.threat.targeted, None

    def run(rows: Tensor) -> Tensor:
        """What the attack returns for some rows ``(m,)``."""
        if len(rows) == len(x):
            return attack.perturb(model, x.clone(), goal.clone(), targeted=targeted, seeds=seeds)
        some = seeds[rows.to(seeds.device)]
        with book_rows(rows):
            return attack.perturb(model, x[rows], goal[rows], targeted=targeted, seeds=some)

    with (
        count_passes(model, len(x), model.device) as passes,
        explain_failure(attack, model, x),
        raise_as_run_error("the attack broke"),
    ):
        rows = (goal != y).nonzero().flatten() if targeted else torch.arange(len(x))
        with taking_shortcuts(model, shortcuts):
            if len(rows) == len(x):
                returned = run(rows)
            else:
                returned = x.clone()
                if len(rows):
                    returned[rows] = run(rows)
        if shortcuts is not None:
            made, _ = repair(returned, x, attack.threat)
            by_shortcuts = torch.zeros_like(goal)
            with book_rows(rows) if len(rows) < len(x) else nullcontext():
                by_shortcuts[rows] = compare_verdicts(
                    model, shortcuts, made[rows], goal[rows], targeted=targeted
                )
            again = (by_shortcuts == LOST).nonzero().flatten()
            if len(again):
                returned = returned.detach().clone()
                returned[again] = run(again)
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    seconds = time.perf_counter() - started
    x_adv, fault = repair(returned, x, attack.threat)
    return Perturbed(returned, x_adv, fault, goal, passes, seconds, by_shortcuts)


@contextmanager
def explain_failure(attack: Attack, model: Classifier, x: Tensor) -> Iterator[None]:
    """Where an attack that follows the gradient broke, say so if the model gives none."""
    try:
        yield
    except RunError as error:
        if attack.knowledge != "white-box" or not len(x):
            raise
        reason = explain_no_gradient(model, x[:1])
        if reason is None:
            raise
        raise RunError(reason) from error


def choose_goals(
    attack: Attack, y: Tensor, seeds: Tensor, classes: int, index: Positions | None = None
) -> Tensor:
    """Choose the classes ``(n,)`` that a targeted attack is to reach; else the labels `y` ``(n,)``.

    Those that were asked for, of the images at positions `index` ``(n,)`` of the data set. Where
    none were, each image's from its own seed ``(n,)``, among `classes` and never its label.
    """
    if not attack.threat.targeted:
        return y
    if attack.goals is None:
        return draw_targets(y, seeds, classes)
    return attack.goals.pick(index, len(y)).to(y.device)
