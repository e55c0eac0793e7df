"""Searches for an image that lowers an objective inside a ball. Finished images cost nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol, Self, get_args

import torch
from torch import Tensor, autograd, nn

from robusteval.models.classifier import choose_graph_size, predict_classes
from robusteval.models.steps import book_rows, part, tell_step
from robusteval.search.balls import Ball, quantise
from robusteval.search.losses import Loss, aimed_loss, attacker_loss

Stop = Literal["8bit", "float", "never"]
Count = Literal["l0", "l0_pixels"]


class Score(NamedTuple):
    """What an objective says of each image."""

    loss: Tensor  # (n,), lower is better for the attacker
    is_adv: Tensor  # (n,) bool, the attacker's goal is reached


# (images (m, c, h, w), their rows in the batch (m,)) -> their scores
Objective = Callable[[Tensor, Tensor], Score]


class Found(NamedTuple):
    """Where a search ended, image by image."""

    x_adv: Tensor  # (n, c, h, w), a success if there was one, else the image of lowest loss
    loss: Tensor  # (n,), its loss
    is_adv: Tensor  # (n,) bool
    finished: Tensor  # (n,) bool, there is nothing to gain from searching on

    @classmethod
    def nothing(cls, start: Tensor) -> Found:
        """Before a search: the start, behind whatever will be found."""
        none = torch.zeros(len(start), dtype=torch.bool, device=start.device)
        worst = torch.full((len(start),), torch.inf, device=start.device)
        return cls(start.clone(), worst, none, none.clone())


def build_class_objective(model: nn.Module, y: Tensor, *, targeted: bool, loss: Loss) -> Objective:
    """The objective of a prediction other than `y` ``(n,)`` or, `targeted`, of just that."""

    def objective(x_adv: Tensor, index: Tensor) -> Score:
        with book_rows(index):
            logits = model(x_adv)  # (m, k)
        value = attacker_loss(logits, y[index], targeted=targeted, loss=loss)
        hit = predict_classes(logits.detach()) == y[index]
        return Score(value, hit if targeted else ~hit)

    return objective


def build_aimed_objective(model: nn.Module, y: Tensor, target: Tensor, loss: Loss) -> Objective:
    """The objective of leaving `y` ``(n,)`` by way of class `target` ``(n,)``.

    Any class other than `y` is a success.
    """

    def objective(x_adv: Tensor, index: Tensor) -> Score:
        with book_rows(index):
            logits = model(x_adv)  # (m, k)
        value = aimed_loss(logits, y[index], target[index], loss)
        return Score(value, predict_classes(logits.detach()) != y[index])

    return objective


def differentiate(
    objective: Objective, x: Tensor, index: Tensor, *, last: bool
) -> tuple[Score, Tensor | None]:
    """Scores of images ``(m, c, h, w)`` for rows `index`, and the gradient of the loss's sum.

    A few blocks of images at a time, so that memory does not grow with the batch. No gradient after
    the `last` step.
    """
    size = choose_graph_size(x.shape[1:].numel(), x.device)
    scores, grads = [], []
    for start in range(0, max(len(x), 1), size):
        z = x[start : start + size].detach().requires_grad_(not last)
        with torch.set_grad_enabled(not last):
            loss, is_adv = objective(z, index[start : start + size])
        if not last:
            grads.append(autograd.grad(loss.sum(), z)[0])
        scores.append(Score(loss.detach(), is_adv))
    score = Score(*map(torch.cat, zip(*scores, strict=True)))
    return score, None if last else torch.cat(grads)


def restrict_objective(objective: Objective, some: Tensor) -> Objective:
    """An objective of the rows `some` ``(m,)`` alone, which counts rows among them."""
    return lambda x_adv, index: objective(x_adv, some[index])


class Moves(Protocol):
    """How a descent moves images, and what it makes of those that succeed."""

    def select(self, index: Tensor) -> Self:
        """Moves for some of the images: rows ``(m,)``, or a mask ``(n,)`` of the images here."""
        ...

    def move(self, x_adv: Tensor, grad: Tensor) -> Tensor:
        """The next iterates ``(n, c, h, w)``, further down a gradient of the loss's sum."""
        ...

    def settle(self, objective: Objective, index: Tensor, x_adv: Tensor, loss: Tensor) -> Found:
        """Successes of rows `index` ``(n,)`` with their loss; finished if 8 bits undo none."""
        ...


class BallMoves(NamedTuple):
    """Steps of one length in a ball, projected back into it."""

    ball: Ball
    length: float  # in the ball's norm, in units of the [0, 1] pixel range

    def select(self, index: Tensor) -> BallMoves:
        """Steps in the balls around some of the images."""
        return self._replace(ball=self.ball.pick(index))

    def move(self, x_adv: Tensor, grad: Tensor) -> Tensor:
        """The way of steepest descent, then the nearest point of the ball."""
        return self.ball.project(x_adv - self.length * self.ball.find_direction(grad))

    def settle(self, objective: Objective, index: Tensor, x_adv: Tensor, loss: Tensor) -> Found:
        """8-bit images inside the ball, with a loss of their own."""
        del loss
        return round_successes(objective, self.ball, index, x_adv)


def descend(
    objective: Objective,
    moves: Moves,
    start: Tensor,
    *,
    steps: int,
    stop: Stop,
    abreast: int = 1,
) -> Found:
    """Descent on the objective, image by image; the moves decide along which way.

    Parameters
    ----------
    objective : callable
        Scores images; called once per step on those that are left.
    moves : Moves
        What a step does, such as `BallMoves`.
    start : Tensor
        First iterates ``(n, c, h, w)``.
    steps : int
        Steps; one forward pass more judges the last iterate.
    stop : {"8bit", "float", "never"}
        When an image is finished and leaves the batch. `float`: at its first success. `8bit`: at
        its first success that is still one as an 8-bit image, as `moves.settle` finds, whose
        image is then the result; a success that rounding undoes is kept while the search goes on.
        `never`: after the last step.
    abreast : int
        So many rows in a row are of one image: the first of them that finishes ends the others.

    Returns
    -------
    Found
        The best image of each search: any success before none, then the lowest loss.
    """
    best = Found.nothing(start)
    left = torch.arange(len(start), device=start.device)  # rows still searched
    x_adv = start.detach()

    for i in range(steps + 1):
        if len(left) == 0:
            break
        tell_step(i, steps + 1)
        last = i == steps
        # rows that turn out finished waste this one backward pass; to drop them first would
        # take a second forward pass of all others
        (loss, is_adv), grad = differentiate(objective, x_adv, left, last=last)

        # keep the best, finish what can be finished
        finished = is_adv if stop == "float" else torch.zeros_like(is_adv)
        keep_best(best, left, Found(x_adv, loss, is_adv, finished))
        if stop == "8bit" and bool(is_adv.any()):
            hit = left[is_adv]
            some = moves.select(is_adv)
            keep_best(best, hit, some.settle(objective, hit, x_adv[is_adv], loss[is_adv]))
        if grad is None:
            break

        # drop what is finished, step the rest
        going = find_unfinished(best, left, abreast)
        if len(going) < len(left):
            left, x_adv, grad, moves = left[going], x_adv[going], grad[going], moves.select(going)
        x_adv = moves.move(x_adv, grad)

    return best if stop != "never" else best._replace(finished=best.is_adv)


def find_unfinished(best: Found, left: Tensor, abreast: int) -> Tensor:
    """Which of the rows `left` ``(m,)`` are searched on: those of images none of which finished."""
    finished = best.finished.view(-1, abreast).any(1)
    return (~finished[left // abreast]).nonzero().flatten()


def repeat_search(search: Callable[[Tensor, int], Found], x: Tensor, times: int) -> Found:
    """One search after the other on the images that are not finished, the best of each image.

    Parameters
    ----------
    search : callable
        Given rows ``(m,)`` of `x` and how many searches went before; what it found for them.
    x : Tensor
        The images ``(n, c, h, w)``.
    times : int
        Searches of an image, at most.

    Returns
    -------
    Found
        As `keep_best` chooses.
    """
    best = Found.nothing(x)
    left = torch.arange(len(x), device=x.device)
    for run in range(times):
        if len(left) == 0:
            break
        with part(run, run + 1, times):
            keep_best(best, left, search(left, run))
        left = (~best.finished).nonzero().flatten()
    return best


def choose_stop(stop: Stop, ball: Ball) -> Stop:
    """`stop`, but `float` for `8bit` in a ball too small for any 8-bit image besides its centre."""
    return "float" if stop == "8bit" and not ball.holds_a_level() else stop


def keep_best(best: Found, index: Tensor, found: Found) -> Tensor:
    """Take over images ``(m, …)`` for rows `index` ``(m,)`` where they beat the best so far.

    Which they were ``(m,)``.

    Finished before successful before neither; then the lower loss, of equal ones the later: where
    cross-entropy has run into zero the search still moves.
    """
    rank, had = (
        found.is_adv.int() + found.finished,
        best.is_adv[index].int() + best.finished[index],
    )
    is_better = (rank > had) | ((rank == had) & (found.loss <= best.loss[index]))
    whole = len(index) == len(best.loss) and index.device.type == "cpu"
    whole = whole and torch.equal(index, torch.arange(len(index)))  # in place, a third of the work
    for column, values in zip(best, found, strict=True):
        choice = is_better.view(-1, *(1,) * (values.ndim - 1))
        if whole:
            torch.where(choice, values, column, out=column)
        else:  # by rows and not by a mask, for whose length the host would wait
            column[index] = torch.where(choice, values, column[index])
    return is_better


def round_successes(objective: Objective, ball: Ball, index: Tensor, x_adv: Tensor) -> Found:
    """The images ``(m, …)`` for rows `index` as 8-bit images, and whether they still succeed."""
    rounded = ball.quantise(x_adv)
    with torch.no_grad():
        score = objective(rounded, index)
    holds = score.is_adv & ball.holds(rounded)
    # those that do not are ranked below the success they were made of
    return Found(rounded, score.loss, holds, holds)


def count_changes(x_adv: Tensor, x: Tensor, count: Count) -> Tensor:
    """How many values of each image differ, or at how many places any channel does: ``(n,)``."""
    changed = x_adv != x
    if count == "l0_pixels":
        changed = changed.any(1)
    return changed.flatten(1).sum(1)


def round_changes(z: Tensor, x: Tensor) -> Tensor:
    """`z` with the values that differ from `x` rounded to 8 bits, the others as they are."""
    return torch.where(z != x, quantise(z), x)


def prune(
    model: nn.Module,
    x: Tensor,
    x_adv: Tensor,
    y: Tensor,
    *,
    targeted: bool = False,
    rounds: int = 30,
    count: Count = "l0",
) -> Tensor:
    """Adversarial images with as many values as possible put back to the original.

    Each round puts back the values that by the gradient of the logit margin cost the attacker
    least: half of them at first, half of that share whenever too much was asked for. A single
    value that cannot be spared is not tried again. What is kept was seen to succeed, so a success
    is never lost and no image ever gets more changes; an 8-bit image stays one.

    Parameters
    ----------
    model : nn.Module
        Maps images in [0, 1] to logits ``(n, k)``.
    x : Tensor
        Originals ``(n, c, h, w)`` in [0, 1].
    x_adv : Tensor
        Any attack's results for them, of the same shape.
    y : Tensor
        Labels ``(n,)`` int64, or the classes to reach when `targeted`.
    targeted : bool
        Success is class `y` instead of any other.
    rounds : int
        Passes per image at most, the one that judges `x_adv` included.
    count : {"l0", "l0_pixels"}
        Put back single values, or all channels of a place together.

    Returns
    -------
    Tensor
        Images ``(n, c, h, w)``; those of `x_adv` that are no success come back as they are.

    Raises
    ------
    ValueError
        If `rounds` is negative or `count` unknown.
    """
    if rounds < 0:
        raise ValueError(f"rounds must be 0 or more, not {rounds}")
    if count not in get_args(Count):
        raise ValueError(f"count must be l0 or l0_pixels, not {count!r}")
    objective = build_class_objective(model, y, targeted=targeted, loss="margin")
    best_adv, z, origin = x_adv.clone(), x_adv, x
    left = torch.arange(len(x), device=x.device)  # rows that may still lose values
    places = torch.zeros_like(x if count == "l0" else x[:, :1])
    cost = torch.full_like(places, torch.inf)  # of putting back; infinite where it cannot be
    needed = torch.zeros_like(places, dtype=torch.bool)
    tried = needed.clone()
    share = torch.full((len(x),), 0.5, device=x.device)

    for i in range(rounds):
        if len(left) == 0:
            break
        tell_step(i, rounds)
        last = i == rounds - 1
        z = z.detach().requires_grad_(not last)
        with torch.set_grad_enabled(not last):
            loss, is_adv = objective(z, left)
        best_adv[left[is_adv]] = z.detach()[is_adv]
        if last:
            break
        delta = z.detach() - origin
        fresh = -autograd.grad(loss.sum(), z)[0].nan_to_num(0.0, 0.0, 0.0) * delta
        changed = delta != 0
        if count == "l0_pixels":
            fresh, changed = fresh.sum(1, keepdim=True), changed.any(1, keepdim=True)

        # what a failure teaches
        won = is_adv.view(-1, 1, 1, 1)
        number = tried.flatten(1).sum(1)
        needed = needed | (tried & ~won & (number == 1).view(-1, 1, 1, 1))
        share = torch.where(is_adv | (number <= 1), share, share / 2)
        cost = torch.where(won, fresh.masked_fill(~changed, torch.inf), cost)
        cost = cost.masked_fill(needed, torch.inf)

        # an image that failed as it was given has no finite cost; one change is the least
        spare = cost.isfinite().flatten(1).sum(1)
        going = (spare > 0) & ((spare > 1) | needed.flatten(1).any(1))
        left, origin, cost, needed, share, spare = (
            column[going] for column in (left, origin, cost, needed, share, spare)
        )
        tried = find_cheapest(cost, (share * spare).long().clamp_min(1))
        z = torch.where(tried, origin, best_adv[left])
    return best_adv


def find_cheapest(cost: Tensor, number: Tensor) -> Tensor:
    """Where the `number` ``(n,)`` lowest costs of each image are, of the shape of `cost`."""
    order = cost.flatten(1).argsort(dim=1, stable=True)
    chosen = torch.arange(order.shape[1], device=cost.device) < number.unsqueeze(1)
    return torch.zeros_like(chosen).scatter(1, order, chosen).view_as(cost)
