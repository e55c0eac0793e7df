"""Searches one after the other, each on what those before have left: an ensemble as one attack."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, autograd, nn

from robusteval.models.seeds import per_image
from robusteval.models.steps import book_rows, credit_stage, rebook_stage, stage
from robusteval.registry import ATTACKS
from robusteval.search.abreast import search_abreast
from robusteval.search.apgd import STRIDE, choose, search_apgd
from robusteval.search.balls import Ball
from robusteval.search.descent import (
    Found,
    Stop,
    build_aimed_objective,
    build_class_objective,
    choose_stop,
    count_changes,
    keep_best,
)
from robusteval.search.losses import Loss, margin
from robusteval.search.nearest import Distance
from robusteval.search.square import search_square
from robusteval.search.starts import Order, diversify_start, order_targets

SPREAD = 1000  # between the seeds of two stages: more than any stage has runs
SHARE = 0.05  # of the images that are spared, which are searched like the others
LOT = 999  # between an image's seed and that of its lot


class Stage:
    """The images that a stage is given: a batch of its own, whose rows are counted anew.

    Attributes
    ----------
    model : nn.Module
        Maps images in [0, 1] to logits ``(m, k)``.
    ball : Ball
        Around the images ``(m, c, h, w)``.
    y : Tensor
        Classes ``(m,)`` to leave or, `targeted`, to reach.
    seeds : Tensor
        One per image ``(m,)``, of this stage.
    start : Tensor
        The best images so far ``(m, c, h, w)``.
    reached : Tensor
        Their margins ``(m,)``, lower nearer to success.
    targeted : bool
        Reach class `y` instead of leaving it.
    ends : list of Tensor
        Where the runs of each `descend` ended, as the lowest loss of each image ``(m, runs)``; not
        a number where another run had finished the image.
    """

    def __init__(
        self,
        model: nn.Module,
        ball: Ball,
        y: Tensor,
        seeds: Tensor,
        start: Tensor,
        reached: Tensor,
        *,
        targeted: bool,
    ) -> None:
        self.model = model
        self.ball = ball
        self.y = y
        self.seeds = seeds
        self.start = start
        self.reached = reached
        self.targeted = targeted
        self.ends: list[Tensor] = []

    def count_pixels(self) -> int:
        """Pixels of an image: a random search of few of them needs few queries."""
        return self.ball.x.shape[2:].numel()

    def descend(
        self,
        loss: Loss,
        steps: int,
        runs: int = 1,
        *,
        odi: bool = False,
        onward: float = 0.0,
        targets: int = 0,
        by: Order = "distance",
        stop: Stop = "8bit",
    ) -> Found:
        """Auto-PGD of so many steps, `runs` side by side until one of them finishes an image.

        Each from a random point of the ball; from one where the network answers otherwise, `odi`;
        or from the best image so far, in first steps of `onward` radii: those across the ball that
        others begin with leave it at once. With `targets` a run for each of the classes that
        are easiest to reach, `by` the distance in the linearised network or by logits; a targeted
        attack has its own. When to `stop` is as in `search_apgd`.
        """
        aims: Tensor | None = None
        if targets and not self.targeted:
            aims = order_targets(self.model, self.ball, self.y, count=targets, by=by)
        times = runs if aims is None else runs * aims.shape[1]
        ends = torch.full((len(self.y), times), torch.nan, device=self.y.device)

        def search(rows: Tensor, run: Tensor, abreast: int) -> Found:
            here, some, y = self.ball.pick(rows), self.seeds[rows.cpu()] + run.cpu(), self.y[rows]
            if aims is None:
                objective = build_class_objective(self.model, y, targeted=self.targeted, loss=loss)
            else:
                aim = aims[rows, run % aims.shape[1]]
                objective = build_aimed_objective(self.model, y, aim, loss)
            with book_rows(rows):
                if onward:
                    start = self.start[rows]
                else:
                    start = diversify_start(self.model, here, some) if odi else here.sample(some)
                found = search_apgd(
                    objective,
                    here,
                    start,
                    steps=steps,
                    stop=stop,
                    stride=onward or STRIDE,
                    abreast=abreast,
                )
            ended = found.loss < torch.inf  # by itself, not by another run of its image
            ends[rows, run] = torch.where(ended, found.loss, torch.nan)
            return found

        self.ends.append(ends)
        return search_abreast(search, self.ball.x, times, first=times)

    def approach(self, attack: str, norm: Distance, eps: float, **given: object) -> Found:
        """The nearest success that an attack without a radius finds, if it is within `eps`.

        `norm` and what is `given` besides are parameters of the attack.
        """
        ball, free = self.ball, (self.ball.upper > self.ball.lower).float()
        x_adv = ATTACKS.load(attack)(
            self.model,
            ball.x,
            self.y,
            targeted=self.targeted,
            seeds=self.seeds,
            mask=free if ball.eps > 0 else None,
            norm=norm,
            **given,
        )
        if norm == "l0" or norm == "l0_pixels":
            x_adv = choose(count_changes(x_adv, ball.x, norm) <= eps, x_adv, ball.x)
        else:
            x_adv = ball.project(x_adv)
        objective = build_class_objective(self.model, self.y, targeted=self.targeted, loss="margin")
        with torch.no_grad():
            score = objective(x_adv, torch.arange(len(x_adv), device=x_adv.device))
        return Found(x_adv, score.loss, score.is_adv, score.is_adv)

    def query(self, queries: int, *, rescale: bool = False, patience: int = 0) -> Found:
        """Random search with square windows.

        With `patience` it may end earlier where it is farther from success than the best image so
        far, see `search_square`.
        """
        return search_square(
            build_class_objective(self.model, self.y, targeted=self.targeted, loss="margin"),
            self.ball,
            self.seeds,
            queries=queries,
            share=0.8,
            rescale=rescale,
            stop=choose_stop("8bit", self.ball),
            patience=patience,
            reached=self.reached,
        )


Work = Callable[[Stage], Found]


class Ensemble:
    """Stages on the survivors of those before.

    What becomes of an image depends on the image and its seed alone, never on which others are
    attacked beside it.

    Parameters
    ----------
    model : nn.Module
        Maps images in [0, 1] to logits ``(n, k)``.
    ball : Ball
        Around the images ``(n, c, h, w)``.
    y : Tensor
        Classes ``(n,)`` to leave or, `targeted`, to reach.
    seeds : Tensor, optional
        One per image ``(n,)``; zeros if not given.
    targeted : bool
        Reach class `y` instead of leaving it.
    stages : int
        How many there will be, for those who wait; 0 if that is not known.
    """

    def __init__(
        self,
        model: nn.Module,
        ball: Ball,
        y: Tensor,
        seeds: Tensor | None,
        *,
        targeted: bool,
        stages: int = 0,
    ) -> None:
        self.model = model
        self.ball = ball
        self.y = y
        self.seeds = torch.zeros(len(y), dtype=torch.int64) if seeds is None else seeds.cpu()
        self.targeted = targeted
        self.best = Found.nothing(ball.x)  # its loss is the margin
        self.ends: dict[str, Tensor] = {}  # of each stage's runs (n, runs), see `Stage.ends`
        self.begun, self.stages = 0, stages

    def list_survivors(self) -> Tensor:
        """Rows ``(m,)`` of the images without a success."""
        return (~self.best.is_adv).nonzero().flatten()

    def run(
        self, name: str, work: Work, rows: Tensor | None = None, drawn: Tensor | None = None
    ) -> None:
        """One stage on the images without a success that survives 8 bits.

        With `rows` ``(m,)`` on those of them that have no success at all; what it was for those
        of them that are `drawn` ``(m,)`` is told of a stage "drawn" of this name.
        """
        if rows is None:
            rows = (~self.best.finished).nonzero().flatten()
        else:
            left = ~self.best.is_adv[rows]
            rows, drawn = rows[left], None if drawn is None else drawn[left]
        self.begun += 1
        seeds = self.seeds[rows.cpu()] + SPREAD * (self.begun - 1)
        with stage(name, rows, self.begun, self.stages):
            if len(rows):
                here = Stage(
                    self.model,
                    self.ball.pick(rows),
                    self.y[rows],
                    seeds,
                    self.best.x_adv[rows],
                    self.best.loss[rows],
                    targeted=self.targeted,
                )
                found = self._compare(rows, work(here))
                if here.ends:
                    ends = torch.cat(here.ends, 1)
                    self.ends[name] = ends.new_full((len(self.y), ends.shape[1]), torch.nan)
                    self.ends[name][rows] = ends
                taken = keep_best(self.best, rows, found)
                credit_stage((taken & found.is_adv).nonzero().flatten())
            if drawn is not None:
                rebook_stage(drawn.nonzero().flatten(), f"drawn {name}")

    def _compare(self, rows: Tensor, found: Found) -> Found:
        """The same with the margin for a loss, which all stages have in common."""
        left = (~found.is_adv).nonzero().flatten()
        loss = torch.full_like(found.loss, -torch.inf)
        if len(left):
            with torch.no_grad(), book_rows(left):
                logits = self.model(found.x_adv[left]).float()
            loss[left] = self._measure_margin(logits, self.y[rows[left]])
        return found._replace(loss=loss)

    def _measure_margin(self, logits: Tensor, y: Tensor) -> Tensor:
        """How far an image is from the goal ``(n,)``, in units of the logits."""
        value = margin(logits, y)
        return -value if self.targeted else value

    def measure_distances(self, rows: Tensor) -> Tensor:
        """How far the best images are from success if the network were linear, in radii ``(m,)``.

        Zero where the gradient says nothing.
        """
        if len(rows) == 0:
            return self.best.loss[rows]
        z = self.best.x_adv[rows].requires_grad_()
        with book_rows(rows):
            gap = self._measure_margin(self.model(z).float(), self.y[rows])
        grad = autograd.grad(gap.sum(), z, allow_unused=True)[0] if gap.requires_grad else None
        if grad is None:
            return torch.zeros_like(self.best.loss[rows])
        ball = self.ball.pick(rows)
        slope = (grad.nan_to_num(0.0, 0.0, 0.0) * (ball.upper > ball.lower)).flatten(1)
        order = {"linf": 1.0, "l2": 2.0, "l1": torch.inf}[ball.norm]
        steepness = torch.linalg.vector_norm(slope, order, dim=1)
        ratio = gap.detach() / (steepness * self.ball.eps)
        return torch.where(steepness > 0, ratio, 0.0).nan_to_num(0.0, torch.inf, 0.0)

    def choose_near(self, cut: float) -> tuple[Tensor, Tensor]:
        """The images without a success up to `cut` radii from one, and a share of the others.

        Rows ``(m,)`` of all, and which of them are of that share ``(m,)``. Each image's lot is
        drawn from its own seed.
        """
        rows = self.list_survivors()
        is_far = self.measure_distances(rows) > cut
        chosen = ~is_far | self._draw(rows, LOT)
        return rows[chosen], is_far[chosen]

    def choose_open(
        self, rows: Tensor, drawn: Tensor, stage: str, most: float
    ) -> tuple[Tensor, Tensor]:
        """Those of `rows` that another search might break, and a share of the others.

        Where searches from different starts end with about the same margin, one more will: an image
        is left alone if what its best margin is short of success is over `most` times the distance
        from there to the median of the margins at which the runs of a `stage` ended. What is
        returned, and who of `rows` was `drawn` already, is as in `choose_near`.
        """
        left = ~self.best.is_adv[rows]
        rows, drawn = rows[left], drawn[left]
        ends = self.ends.get(stage)
        if ends is None or len(rows) == 0:
            return rows, drawn
        least = self.best.loss[rows]
        spread = ends[rows].nanmedian(1).values - least
        is_alike = least > most * spread
        chosen = ~is_alike | self._draw(rows, LOT - 1)
        return rows[chosen], (drawn | is_alike)[chosen]

    def _draw(self, rows: Tensor, lot: int) -> Tensor:
        """Which of `rows` are of the share that is drawn ``(m,)``, each by its own seed."""
        lots = per_image(self.seeds[rows.cpu()] + lot, torch.Size((1,)))[:, 0]
        return (lots < SHARE).to(rows.device)
