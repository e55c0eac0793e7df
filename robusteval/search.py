"""Searches for an image that lowers an objective inside a ball. Finished images cost nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, autograd, nn

from robusteval.losses import Loss, attacker_loss
from robusteval.model import predictions, rows
from robusteval.norms import Ball

Stop = Literal["8bit", "float", "never"]


class Score(NamedTuple):
    """What an objective says of each image."""

    loss: Tensor  # (n,), lower is better for the attacker
    success: Tensor  # (n,) bool, the attacker's goal is reached


# (images (m, c, h, w), their rows in the batch (m,)) -> their scores
Objective = Callable[[Tensor, Tensor], Score]


class Found(NamedTuple):
    """Where a search ended, image by image."""

    x_adv: Tensor  # (n, c, h, w), a success if there was one, else the image of lowest loss
    loss: Tensor  # (n,), its loss
    success: Tensor  # (n,) bool
    finished: Tensor  # (n,) bool, there is nothing to gain from searching on


def class_objective(model: nn.Module, y: Tensor, *, targeted: bool, loss: Loss) -> Objective:
    """The objective of a prediction other than `y` ``(n,)`` or, `targeted`, of just that."""

    def objective(x_adv: Tensor, index: Tensor) -> Score:
        with rows(index):
            logits = model(x_adv)  # (m, k)
        value = attacker_loss(logits, y[index], targeted=targeted, loss=loss)
        hit = predictions(logits.detach()) == y[index]
        return Score(value, hit if targeted else ~hit)

    return objective


def of_rows(objective: Objective, some: Tensor) -> Objective:
    """The same objective for a part of the batch, rows `some` ``(m,)``."""
    return lambda x_adv, index: objective(x_adv, some[index])


def descend(
    objective: Objective, ball: Ball, start: Tensor, *, step: float, steps: int, stop: Stop
) -> Found:
    """Projected steepest descent on the objective.

    Parameters
    ----------
    objective : callable
        Scores images; called once per step on those that are left.
    ball : Ball
        Where to search.
    start : Tensor
        First iterates ``(n, c, h, w)`` inside the ball.
    step : float
        Length of a step in the ball's norm, in units of the [0, 1] pixel range.
    steps : int
        Steps; one forward pass more judges the last iterate.
    stop : {"8bit", "float", "never"}
        When an image is finished and leaves the batch. `float`: at its first success. `8bit`: at
        its first success that is still one as an 8-bit image inside the ball, which is then the
        result; a success that rounding undoes is kept while the search goes on. `never`: after
        the last step.

    Returns
    -------
    Found
        The best image of each search: any success before none, then the lowest loss.
    """
    n, device = len(start), start.device
    none = torch.zeros(n, dtype=torch.bool, device=device)
    best = Found(start.clone(), torch.full((n,), torch.inf, device=device), none, none.clone())
    left = torch.arange(n, device=device)  # rows still searched
    here, x_adv = ball, start

    for i in range(steps + 1):
        if len(left) == 0:
            break
        last = i == steps
        x_adv = x_adv.detach().requires_grad_(not last)
        with torch.set_grad_enabled(not last):
            score = objective(x_adv, left)
        # rows that turn out finished waste this one backward pass; to drop them first would
        # take a second forward pass of all others
        grad = None if last else autograd.grad(score.loss.sum(), x_adv)[0]

        # keep the best, finish what can be finished
        x_adv, loss, success = x_adv.detach(), score.loss.detach(), score.success
        finished = success if stop == "float" else torch.zeros_like(success)
        keep_best(best, left, Found(x_adv, loss, success, finished))
        if stop == "8bit" and bool(success.any()):
            hit = left[success]
            keep_best(best, hit, as_8bit(objective, here.of(success), hit, x_adv[success]))
        if grad is None:
            break

        # drop what is finished, step the rest
        going = ~best.finished[left]
        if not bool(going.all()):
            left, x_adv, grad, here = left[going], x_adv[going], grad[going], here.of(going)
        x_adv = here.project(x_adv - step * here.step(grad))

    return best if stop != "never" else best._replace(finished=best.success)


def restarted(
    objective: Objective,
    ball: Ball,
    seeds: Tensor | None,
    *,
    restarts: int,
    random_start: bool,
    step: float,
    steps: int,
    stop: Stop,
) -> Found:
    """`descend` from one start after the other, on the images that are not finished.

    Each image draws its starts from its own seed ``(n,)``, zero if none are given; without
    `random_start` the first search starts at the centre of the ball.
    """
    if seeds is None:
        seeds = torch.zeros(len(ball.x), dtype=torch.int64)
    best: Found | None = None
    left = torch.arange(len(seeds), device=ball.x.device)  # survivors
    for restart in range(restarts):
        here = ball.of(left)
        random = random_start or restart > 0
        start = here.sample(seeds[left.cpu()] + restart) if random else here.x
        found = descend(of_rows(objective, left), here, start, step=step, steps=steps, stop=stop)
        if best is None:
            best = found
        else:
            keep_best(best, left, found)
        left = (~best.finished).nonzero().flatten()
        if len(left) == 0:
            break
    assert best is not None, "restarts must be at least 1"
    return best


def keep_best(best: Found, index: Tensor, found: Found) -> None:
    """Take over images ``(m, …)`` for rows `index` ``(m,)`` where they beat the best so far.

    Finished before successful before neither; then the lower loss, of equal ones the later: where
    cross-entropy has run into zero the search still moves.
    """
    rank, had = (
        found.success.int() + found.finished,
        best.success[index].int() + best.finished[index],
    )
    better = (rank > had) | ((rank == had) & (found.loss <= best.loss[index]))
    for column, values in zip(best, found, strict=True):
        column[index[better]] = values[better]


def as_8bit(objective: Objective, ball: Ball, index: Tensor, x_adv: Tensor) -> Found:
    """The images ``(m, …)`` for rows `index` as 8-bit images, and whether they still succeed."""
    rounded = ball.quantise(x_adv)
    with torch.no_grad():
        score = objective(rounded, index)
    holds = score.success & ball.holds(rounded)
    # those that do not are ranked below the success they were made of
    return Found(rounded, score.loss, holds, holds)
