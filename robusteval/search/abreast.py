"""Several searches for each image at once, of which the first success ends the others."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from robusteval.models.classifier import choose_graph_size
from robusteval.models.steps import part
from robusteval.search.apgd import choose
from robusteval.search.balls import Ball
from robusteval.search.descent import (
    BallMoves,
    Found,
    Objective,
    Stop,
    choose_stop,
    descend,
    keep_best,
    restrict_objective,
)

# (rows (m,) of the images, which search of its image each is (m,), how many of an image there are)
# -> what each found
Search = Callable[[Tensor, Tensor, int], Found]


def search_abreast(search: Search, x: Tensor, times: int, *, first: int = 1) -> Found:
    """Searches for each image side by side, until one of them finishes it; the best of each image.

    The fewer images a call of the network has, the more each costs: of a ResNet-20 on one core one
    by itself three times what it costs among 32. Searches one after the other would end in such
    calls. What becomes of an image depends on it alone.

    Parameters
    ----------
    search : callable
        Given rows ``(m,)`` of `x`, those of an image one after the other; which of its searches
        each is ``(m,)``, from 0; and how many an image has here. What it found for each row.
    x : Tensor
        The images ``(n, c, h, w)``.
    times : int
        Searches of an image.
    first : int
        So many go before, then twice as many on what these have left, and so on: an image that
        falls to the first one costs no others.

    Returns
    -------
    Found
        As `keep_best` chooses.
    """
    best = Found.nothing(x)
    at_once = max(len(x), choose_graph_size(x.shape[1:].numel(), x.device))  # rows
    left, done, width = torch.arange(len(x), device=x.device), 0, first
    while done < times and len(left):
        width = min(width, times - done)
        parts = left.split(max(at_once // width, 1))  # type: ignore[no-untyped-call]
        for k, rows in enumerate(parts):
            run = torch.arange(done, done + width, device=x.device).repeat(len(rows))
            with part(done, done + width, times), part(k, k + 1, len(parts)):
                found = search(rows.repeat_interleave(width), run, width)
            for i in range(width):
                keep_best(best, rows, Found(*(column[i::width] for column in found)))
        left = (~best.finished).nonzero().flatten()
        done, width = done + width, 2 * width
    return best


def descend_from_starts(
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
    """`descend` from several starts, on the images that are not finished.

    Each image draws its starts from its own seed ``(n,)``, zero if none are given; without
    `random_start` the first search starts at the centre of the ball.
    """
    if seeds is None:
        seeds = torch.zeros(len(ball.x), dtype=torch.int64)

    def search(rows: Tensor, run: Tensor, abreast: int) -> Found:
        here = ball.pick(rows)
        start = here.x
        if random_start or bool(run.any()):
            start = here.sample(seeds[rows.cpu()] + run.cpu())
        if not random_start:
            start = choose(run == 0, here.x, start)
        return descend(
            restrict_objective(objective, rows),
            BallMoves(here, step),
            start,
            steps=steps,
            stop=choose_stop(stop, ball),
            abreast=abreast,
        )

    return search_abreast(search, ball.x, restarts)
