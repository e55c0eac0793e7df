"""Auto-PGD: descent in a ball that finds its step size by itself, image by image."""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor

from robusteval.models.steps import part, tell_step
from robusteval.search.balls import Ball, Norm
from robusteval.search.descent import (
    Found,
    Objective,
    Score,
    Stop,
    choose_stop,
    count_changes,
    differentiate,
    find_unfinished,
    keep_best,
    restrict_objective,
    round_successes,
)

STRIDE = 2.0  # radii of the first steps, arXiv:2003.01690: across the ball
MOMENTUM = 0.25  # share of the last move in the next one: 1 - alpha of arXiv:2003.01690
RHO = 0.75  # share of the steps since a checkpoint that must have lowered the loss
FIRST, SHORTER, LEAST = 0.22, 0.03, 0.06  # steps between checkpoints, as shares of all
# under l1, arXiv:2103.01208, section 3
SPARSE_CHECK = 0.04  # steps between checkpoints, as a share of all
SPARSE_START = 0.2  # share of the values that the first steps move
SPARSER = 0.95  # times as many changed values as before count as progress
NARROWER = 1.5  # by which the number of changed values is divided for that of the next steps
SHORTEST = 0.1  # step, in units of eps
WIDER = ((3, 0.3), (2, 0.3))  # balls to come from: times eps, and their share of the steps


def search_apgd(
    objective: Objective,
    ball: Ball,
    start: Tensor,
    *,
    steps: int,
    stop: Stop,
    stride: float = STRIDE,
    abreast: int = 1,
) -> Found:
    """Auto-PGD from one start, without a step size to choose.

    Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
    attacks, arXiv:2003.01690, algorithm 1. Under l1 that of arXiv:2103.01208: sparse steps, in
    balls of three and two times the radius first. Departs from the authors' code in counting all
    steps at the first checkpoint (there the first loss is compared with zero), and where the search
    for an image ends.

    Parameters
    ----------
    objective : callable
        Scores images; called once per step on those that are left. One call gives the verdict on
        an iterate and the gradient of the next step.
    ball : Ball
        Where a success must lie.
    start : Tensor
        First iterates ``(n, c, h, w)``, inside the ball.
    steps : int
        Gradient steps; one forward pass more judges the last iterate.
    stop : {"8bit", "float", "never"}
        When an image is finished and leaves the batch, as in `robusteval.search.descent.descend`.
        Looked at after the steps of `plan_looks` alone, the same for all images: of the successes
        since the last look the one of lowest loss is tried.
    stride : float
        Length of the first steps, in radii: across the ball, or short ones to go on from a place
        that is good already. Under l1 it is a radius.
    abreast : int
        So many rows in a row are of one image: the first of them that finishes ends the others.

    Returns
    -------
    Found
        The best image of each search: any success before none, then the lowest loss.
    """
    stop = choose_stop(stop, ball)
    search = partial(search_wider, stop=stop, stride=stride, abreast=abreast)
    if ball.norm != "l1":
        return search(objective, ball, ball, start, steps=steps)
    best, rest = Found.nothing(start), steps
    left = torch.arange(len(start), device=start.device)  # rows still searched
    for times, share in (*WIDER, (1, 1.0)):
        few = rest if times == 1 else int(share * steps)
        rest -= few
        if few == 0 or len(left) == 0:
            continue
        here, some = ball.pick(left), restrict_objective(objective, left)
        wide = here._replace(eps=times * ball.eps)
        with part(steps - rest - few, steps - rest, steps):
            found = search(some, wide, here, wide.project(start), steps=few)
        # what has not succeeded may lie outside the ball: no result, but a place to go on from
        done = found.is_adv | (times == 1)
        keep_best(best, left[done], Found(*(column[done] for column in found)))
        going = find_unfinished(best, left, abreast)
        left, start = left[going], found.x_adv[going]
    return best


def search_wider(
    objective: Objective,
    ball: Ball,
    goal: Ball,
    start: Tensor,
    *,
    steps: int,
    stop: Stop,
    stride: float = STRIDE,
    abreast: int = 1,
) -> Found:
    """`search_apgd` in one ball, of which only a ball inside it counts, the `goal`.

    Images without a success are those of lowest loss in `ball`.
    """
    best, aside = Found.nothing(start), ball.eps > goal.eps
    left = torch.arange(len(start), device=start.device)  # rows still searched
    looks = frozenset() if stop == "never" else plan_looks(steps)
    checkpoints = plan_checkpoints(steps, ball.norm)
    track, pace = Track.begin(start), begin_pace(ball, start, stride)

    for i in range(steps + 1):
        tell_step(i, steps + 1)
        last = i == steps
        score, grad = differentiate(objective, track.x, left, last=last)
        pace = pace.count_fall(score.loss < track.loss)
        track = track.take(score, grad)

        # finish what can be finished; nowhere else does the host wait for the device
        if last or i in looks:
            hit = track.is_hit.nonzero().flatten()
            if len(hit):
                some = left[hit]
                won = track.select(hit).settle(objective, goal.pick(some), some, stop, aside=aside)
                keep_best(best, some, won)
                going = find_unfinished(best, left, abreast)
                left, ball = left[going], ball.pick(going)
                track, pace = track.select(going).forget(), pace.select(going)
        if last or len(left) == 0:
            break

        # at a checkpoint some go back to their best image and change the length of their steps
        if i in checkpoints:
            pace, back = pace.check(ball, track, checkpoints[i])
            track = track.go_back(back)
        track = track._replace(x=pace.move(ball, track, momentum=i > 0), before=track.x)

    never = torch.zeros_like(track.best_is_adv)
    is_adv = never if aside else track.best_is_adv
    keep_best(best, left, Found(track.best_x, track.best_loss, is_adv, never))
    return best if stop != "never" else best._replace(finished=best.is_adv)


def plan_looks(steps: int) -> frozenset[int]:
    """After which of the steps successes are tried: each at first, then seldom, and the last.

    Between looks the host hands out work without waiting for the device. An image that succeeds
    just after a look costs a quarter of the steps so far.
    """
    looks = [0]
    while looks[-1] < steps:
        looks.append(max(looks[-1] + 1, math.ceil(1.25 * looks[-1])))
    return frozenset(look for look in looks if look < steps) | {steps}


def plan_checkpoints(steps: int, norm: Norm) -> dict[int, int]:
    """After which of the steps the length is judged, and how many steps it has had until then.

    arXiv:2003.01690, section 4.1; under l1 evenly.
    """
    shares = (SPARSE_CHECK, 0.0, SPARSE_CHECK) if norm == "l1" else (FIRST, SHORTER, LEAST)
    since, shorter, least = (max(int(share * steps), 1) for share in shares)
    plan, at = {}, since
    while at < steps:
        plan[at] = since
        if norm != "l1":
            since = max(since - shorter, least)
        at += since
    return plan


class Track(NamedTuple):
    """Where the search for each image has come to, a row for each that is left."""

    x: Tensor  # (m, c, h, w), the iterate
    before: Tensor  # (m, c, h, w), the one before
    grad: Tensor  # (m, c, h, w), of the loss in the iterate
    loss: Tensor  # (m,)
    best_x: Tensor  # (m, c, h, w), the iterate of lowest loss
    best_grad: Tensor
    best_loss: Tensor
    best_is_adv: Tensor
    hit_x: Tensor  # (m, c, h, w), of the successes that were not tried yet that of lowest loss
    hit_loss: Tensor
    is_hit: Tensor  # (m,) bool, there is one

    @classmethod
    def begin(cls, start: Tensor) -> Track:
        """Before the first iterate is judged."""
        zero, far = torch.zeros_like(start), torch.full_like(start[:, 0, 0, 0], torch.inf)
        none = torch.zeros_like(far, dtype=torch.bool)
        return cls(start, start, zero, -far, start, zero, far, none, start, far, none)

    def select(self, rows: Tensor) -> Track:
        """Some of the images."""
        return Track(*(column[rows] for column in self))

    def take(self, score: Score, grad: Tensor | None) -> Track:
        """The iterate has been judged; without a gradient it is the last one."""
        grad, loss, is_adv = self.grad if grad is None else grad, score.loss, score.is_adv
        is_better = loss < self.best_loss
        is_hit = is_adv & ~(self.is_hit & (loss >= self.hit_loss))
        return self._replace(
            grad=grad,
            loss=loss,
            best_x=choose(is_better, self.x, self.best_x),
            best_grad=choose(is_better, grad, self.best_grad),
            best_loss=torch.where(is_better, loss, self.best_loss),
            best_is_adv=torch.where(is_better, is_adv, self.best_is_adv),
            hit_x=choose(is_hit, self.x, self.hit_x),
            hit_loss=torch.where(is_hit, loss, self.hit_loss),
            is_hit=self.is_hit | is_hit,
        )

    def settle(
        self, objective: Objective, goal: Ball, index: Tensor, stop: Stop, *, aside: bool
    ) -> Found:
        """The successes of these images in balls they must lie in, finished as `stop` says.

        Those that come from wider balls, `aside`, are brought into them and judged again.
        """
        x_adv, loss, is_adv = self.hit_x, self.hit_loss, self.is_hit
        if aside:
            x_adv = goal.project(x_adv)
            with torch.no_grad():
                loss, is_adv = objective(x_adv, index)
        found = Found(x_adv, loss, is_adv, is_adv & (stop == "float"))
        if stop == "8bit":
            rounded = round_successes(objective, goal, index, x_adv)
            keep_best(found, torch.arange(len(index), device=index.device), rounded)
        return found

    def forget(self) -> Track:
        """The successes were tried."""
        return self._replace(is_hit=torch.zeros_like(self.is_hit))

    def go_back(self, back: Tensor) -> Track:
        """To the best iterate, for some of the images ``(m,)``."""
        return self._replace(
            x=choose(back, self.best_x, self.x),
            grad=choose(back, self.best_grad, self.grad),
            loss=torch.where(back, self.best_loss, self.loss),
        )


def choose(which: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Images ``(m, c, h, w)`` from `one` where chosen ``(m,)``, else from the other."""
    return torch.where(which.view(-1, 1, 1, 1), one, other)


class Pace(Protocol):
    """How long the steps of each image are, and when that changes."""

    def select(self, rows: Tensor) -> Self:
        """Of some of the images."""
        ...

    def count_fall(self, fell: Tensor) -> Self:
        """A step was made that did, or did not, lower the loss ``(m,)``."""
        ...

    def move(self, ball: Ball, track: Track, *, momentum: bool) -> Tensor:
        """The next iterates ``(m, c, h, w)``."""
        ...

    def check(self, ball: Ball, track: Track, since: int) -> tuple[Self, Tensor]:
        """So many steps after the last checkpoint: the new pace, and who goes back ``(m,)``."""
        ...


def begin_pace(ball: Ball, start: Tensor, stride: float) -> Pace:
    """The pace of a search in such a ball, whose first steps are `stride` radii long."""
    return SparsePace.begin(ball, start) if ball.norm == "l1" else HalvingPace.begin(ball, stride)


class HalvingPace(NamedTuple):
    """Half as long whenever the loss falls too seldom or no further, arXiv:2003.01690."""

    length: Tensor  # (m,), in the ball's norm, in units of the [0, 1] pixel range
    falls: Tensor  # (m,), steps since the last checkpoint that lowered the loss
    lowest: Tensor  # (m,), loss at the last checkpoint
    halved: Tensor  # (m,) bool, at the last checkpoint

    @classmethod
    def begin(cls, ball: Ball, stride: float = STRIDE) -> HalvingPace:
        """Steps of `stride` radii."""
        far = torch.full_like(ball.x[:, 0, 0, 0], stride * ball.eps)
        # nothing is known at the first checkpoint of an earlier one, so nothing stalls there
        return cls(far, torch.zeros_like(far), far, torch.ones_like(far, dtype=torch.bool))

    def select(self, rows: Tensor) -> HalvingPace:
        """See `Pace`."""
        return HalvingPace(*(column[rows] for column in self))

    def count_fall(self, fell: Tensor) -> HalvingPace:
        """See `Pace`."""
        return self._replace(falls=self.falls + fell)

    def move(self, ball: Ball, track: Track, *, momentum: bool) -> Tensor:
        """A step down, mixed with the last one; Eq. 3 and 4."""
        x, length = track.x, self.length.view(-1, 1, 1, 1)
        z = ball.project(x - length * ball.find_direction(track.grad))
        if not momentum:
            return z
        return ball.project(x + (1 - MOMENTUM) * (z - x) + MOMENTUM * (x - track.before))

    def check(self, ball: Ball, track: Track, since: int) -> tuple[HalvingPace, Tensor]:
        """Conditions 1 and 2 of section 4.1."""
        back = self.falls <= RHO * since
        back = back | (~self.halved & (track.best_loss >= self.lowest))
        length = torch.where(back, self.length / 2, self.length)
        return HalvingPace(length, torch.zeros_like(self.falls), track.best_loss, back), back


class SparsePace(NamedTuple):
    """Steps in few values, fewer as the best image has fewer changed, arXiv:2103.01208."""

    length: Tensor  # (m,), in l1, in units of the [0, 1] pixel range
    width: Tensor  # (m,), values that a step moves
    support: Tensor  # (m,), values in which the best image differed at the last checkpoint

    @classmethod
    def begin(cls, ball: Ball, start: Tensor) -> SparsePace:
        """As many values as the start has, within limits."""
        most = SPARSE_START * ball.x[0].numel()
        support = count_changes(start, ball.x, "l0").to(start)
        width = torch.where(support > 0, (support / NARROWER).clamp_max(most), most)
        return cls(torch.full_like(support, ball.eps), width, support)

    def select(self, rows: Tensor) -> SparsePace:
        """See `Pace`."""
        return SparsePace(*(column[rows] for column in self))

    def count_fall(self, fell: Tensor) -> SparsePace:
        """See `Pace`; nothing to count."""
        del fell
        return self

    def move(self, ball: Ball, track: Track, *, momentum: bool) -> Tensor:
        """A step in the values of largest gradient, without momentum."""
        del momentum
        x, grad = track.x, track.grad
        stuck = torch.where(grad > 0, x <= ball.lower, x >= ball.upper)
        direction = ball.find_sparse_direction(grad, self.width, stuck)
        return ball.project(x - self.length.view(-1, 1, 1, 1) * direction)

    def check(self, ball: Ball, track: Track, since: int) -> tuple[SparsePace, Tensor]:
        """Sparser than before: from the best image in long steps again. Else shorter ones."""
        del since
        support = count_changes(track.best_x, ball.x, "l0").to(self.support)
        sparser = support < SPARSER * self.support
        shorter = (self.length / NARROWER).clamp_min(SHORTEST * ball.eps)
        length = torch.where(sparser, ball.eps, shorter)
        return SparsePace(length, support / NARROWER, support), sparser
