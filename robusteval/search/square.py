"""Random search by square windows: it asks the network for logits and for nothing else."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from robusteval.models.seeds import per_image
from robusteval.models.steps import tell_step
from robusteval.search.balls import Ball
from robusteval.search.descent import Found, Objective, Stop, keep_best, round_successes

# queries of 10,000 from which on the share of the pixels in a window is halved once more
HALVED_AT = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
DRAWN = 100  # queries whose random numbers are drawn together
TILES = 5  # bumps along an edge of an l2 start


def search_square(
    objective: Objective,
    ball: Ball,
    seeds: Tensor | None,
    *,
    queries: int,
    share: float,
    rescale: bool,
    stop: Stop,
    patience: int = 0,
    reached: Tensor | None = None,
) -> Found:
    """Square Attack: windows at random places, kept where they lower the objective.

    Square Attack: a query-efficient black-box adversarial attack via random search,
    arXiv:1912.00049, Algorithms 1 to 3. Departs from its released code, which draws one window
    and one pattern of signs for a whole batch and never covers the last row and column by a window
    that is not full size: here each image draws its own, anywhere in it, and a linf pattern that
    would change nothing is turned round.

    Parameters
    ----------
    objective : callable
        Scores images, without a gradient.
    ball : Ball
        Where to search, in linf or l2.
    seeds : Tensor, optional
        One per image ``(n,)`` for everything random; zeros if not given.
    queries : int
        Forward passes per image, the one that judges the start included; rounding a success takes
        one more.
    share : float
        Of the pixels that the first windows cover; halved again and again, see `choose_width`.
    rescale : bool
        Shrink windows as fast as `queries` asks for, so that the smallest are reached.
    stop : {"8bit", "float", "never"}
        When an image is finished, see `robusteval.search.descent.descend`.
    patience : int
        Queries between looks at who has no hope left: whose loss is above `reached` and, falling on
        at its mean pace so far, would not come to zero in the queries that remain. The search of
        such an image ends; 0 if none is to end early. Searches slow down on the whole, so that this
        foretells too much rather than too little; the pace of the last queries would not do, as
        some stand still until windows shrink.
    reached : Tensor, optional
        Losses ``(n,)`` at which other searches have ended, with which there is `patience` alone: a
        network whose gradients lead astray is one that random search comes nearer to fooling.

    Returns
    -------
    Found
        The best image of each search: any success before none, then the lowest loss.
    """
    n, device = len(ball.x), ball.x.device
    if seeds is None:
        seeds = torch.zeros(n, dtype=torch.int64)
    _, c, h, w = ball.x.shape
    linf = ball.norm == "linf"
    numbers = torch.Size((DRAWN, c + 2 if linf else c + 5))
    none = torch.zeros(n, dtype=torch.bool, device=device)
    best = Found(ball.x.clone(), torch.full((n,), torch.inf, device=device), none, none.clone())
    left = torch.arange(n, device=device)  # rows still searched
    here = ball
    x_best = start_with_stripes(ball, seeds) if linf else start_with_bumps(ball, seeds)
    loss = torch.full((n,), torch.inf, device=device)
    is_adv = none.clone()
    draw = ball.x.new_zeros(n, *numbers)
    first = loss

    for i in range(queries):
        if len(left) == 0:
            break
        tell_step(i, queries)
        if i == 0:
            z = x_best
        else:
            if (i - 1) % DRAWN == 0:
                draw = per_image(seeds[left.cpu()] + 1 + (i - 1) // DRAWN, numbers).to(ball.x)
            side = choose_width(i, queries if rescale else 10_000, share, h, w)
            u = draw[:, (i - 1) % DRAWN]  # (m, numbers of one query)
            z = fill_window(here, x_best, u, side) if linf else move_mass(here, x_best, u, side)
        with torch.no_grad():
            score = objective(z, left)

        # keep what is better, of a success only a success
        is_better = (score.is_adv & ~is_adv) | (
            (score.is_adv == is_adv) & ((score.loss < loss) | (i == 0))
        )
        x_best = torch.where(is_better.view(-1, 1, 1, 1), z, x_best)
        loss = torch.where(is_better, score.loss, loss)
        is_adv = is_adv | score.is_adv
        hit = is_better & score.is_adv
        done = hit if stop == "float" else torch.zeros_like(hit)
        if stop == "8bit" and bool(hit.any()):
            rounded = round_successes(objective, here.pick(hit), left[hit], x_best[hit])
            keep_best(best, left[hit], rounded)
            done[hit] = rounded.finished

        # drop what is finished, and what has no hope
        over = torch.ones_like(done) if i == queries - 1 else done
        if i == 0:
            first = loss
        elif patience and reached is not None and i % patience == 0:
            pace = (first - loss) / i  # per query
            over = over | ((loss > reached[left]) & (loss > pace * (queries - 1 - i)))
        if bool(over.any()):
            found = Found(x_best[over], loss[over], is_adv[over], done[over] & (stop == "float"))
            keep_best(best, left[over], found)
            left, x_best, loss, first, is_adv, draw = (
                column[~over] for column in (left, x_best, loss, first, is_adv, draw)
            )
            here = here.pick(~over)
    return best if stop != "never" else best._replace(finished=best.is_adv)


def choose_width(query: int, queries: int, share: float, h: int, w: int) -> int:
    """Edge of the window at a query, in pixels, of images ``(c, h, w)``.

    arXiv:1912.00049, section 3.1 and appendix: the share of the pixels in it is halved at fixed
    queries of 10,000, which are scaled to `queries`.
    """
    reached = int(query * 10_000 / queries)
    part = share * 0.5 ** sum(reached > at for at in HALVED_AT)
    return min(max(round(math.sqrt(part * h * w)), 1), h, w)


def find_places(u: Tensor, room: int) -> Tensor:
    """Whole numbers from 0 to `room`, each as likely, of numbers from [0, 1)."""
    places: Tensor = (u * (room + 1)).long().clamp_max(room)
    return places


def start_with_stripes(ball: Ball, seeds: Tensor) -> Tensor:
    """Images at the border of linf balls, a sign for each column and channel: ``(n, c, h, w)``."""
    _, c, _, w = ball.x.shape
    up = per_image(seeds, torch.Size((c, 1, w))).to(ball.x) < 0.5
    return torch.where(up, ball.upper, ball.lower)


def fill_window(ball: Ball, x_best: Tensor, u: Tensor, side: int) -> Tensor:
    """Images with one window at the border of the linf ball, a sign for each channel.

    arXiv:1912.00049, Algorithm 2; `u` ``(n, 2 + c)`` are numbers from [0, 1). A window that is
    like this already gets the other signs.
    """
    h, w = x_best.shape[2:]
    top, start = find_places(u[:, :1], h - side), find_places(u[:, 1:2], w - side)  # (n, 1)
    rows, columns = torch.arange(h, device=u.device), torch.arange(w, device=u.device)
    rows_in = (rows >= top) & (rows < top + side)  # (n, h)
    columns_in = (columns >= start) & (columns < start + side)
    window = rows_in[:, None, :, None] & columns_in[:, None, None, :]  # (n, 1, h, w)
    up = u[:, 2:, None, None] < 0.5  # (n, c, 1, 1)
    z = torch.where(window, torch.where(up, ball.upper, ball.lower), x_best)
    same = (z == x_best).flatten(1).all(1).view(-1, 1, 1, 1)
    return torch.where(same & window, torch.where(up, ball.lower, ball.upper), z)


def build_bumps(side: int, like: Tensor) -> Tensor:
    """Two hills of opposite sign side by side, of l2 length 1: upright and lying ``(2, s, s)``.

    arXiv:1912.00049, Eq. 2 and the text below it.
    """

    def build_hill(height: int) -> Tensor:
        rows = (torch.arange(height) - height // 2).abs()
        columns = (torch.arange(side) - side // 2).abs()
        ring = torch.maximum(rows[:, None], columns)  # distance from the top, in rings
        falls = torch.arange(1, max(height, side) // 2 + 2).double().square().reciprocal()
        heights: Tensor = falls.flip(0).cumsum(0).flip(0)
        hill = heights[ring]
        length: Tensor = hill.norm().clamp_min(1e-12)
        return hill / length

    upper = side // 2
    bump = torch.cat([build_hill(upper), -build_hill(side - upper)]) if upper else torch.ones(1, 1)
    bump = (bump / bump.norm()).to(like)
    return torch.stack([bump, bump.T])


def start_with_bumps(ball: Ball, seeds: Tensor) -> Tensor:
    """Images at the border of l2 balls, a grid of bumps with a sign for each and each channel."""
    n, c, h, w = ball.x.shape
    s = max(min(h, w) // TILES, 1)
    down, across = h // s, w // s
    u = per_image(seeds, torch.Size((down, across, c + 1))).to(ball.x)
    bumps = build_bumps(s, ball.x)[(u[..., -1] < 0.5).long()]  # (n, down, across, s, s)
    signs = torch.where(u[..., :-1] < 0.5, 1.0, -1.0)  # (n, down, across, c)
    tiles = signs[..., None, None] * bumps[:, :, :, None]  # (n, down, across, c, s, s)
    tiles = tiles.permute(0, 3, 1, 4, 2, 5).reshape(n, c, down * s, across * s)
    top, start = (h - down * s) // 2, (w - across * s) // 2
    delta = torch.zeros_like(ball.x)
    delta[:, :, top : top + down * s, start : start + across * s] = tiles
    delta = delta * (ball.upper > ball.lower)
    size = delta.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
    return ball.project(ball.x + ball.eps / size * delta)


def move_mass(ball: Ball, x_best: Tensor, u: Tensor, side: int) -> Tensor:
    """Images with the changes in one window given up for a bump in another; the length is kept.

    arXiv:1912.00049, Algorithm 3; `u` ``(n, c + 5)`` are numbers from [0, 1).
    """
    n, c, h, w = x_best.shape
    s = min(side + 1 - side % 2, h, w)
    steps = torch.arange(s, device=u.device)

    def find_window(u: Tensor) -> Tensor:
        rows, columns = find_places(u[:, :1], h - s), find_places(u[:, 1:], w - s)
        pixels = ((rows + steps)[:, :, None] * w + (columns + steps)[:, None]).view(n, 1, s * s)
        return pixels.expand(n, c, s * s)

    into, out_of = find_window(u[:, :2]), find_window(u[:, 2:4])
    delta = (x_best - ball.x).flatten(2)  # (n, c, h * w)
    mass = delta.square().sum(2, keepdim=True)  # (n, c, 1)
    rest = delta.scatter(2, out_of, 0.0).scatter(2, into, 0.0)
    unused = (ball.eps**2 - mass.sum(1, keepdim=True)).clamp_min(0)
    free = (mass - rest.square().sum(2, keepdim=True)).clamp_min(0) + unused / c
    old = delta.gather(2, into)
    old = old / old.norm(dim=2, keepdim=True).clamp_min(1e-12)
    bump = build_bumps(s, u).flatten(1)[(u[:, 4] < 0.5).long()][:, None]  # (n, 1, s * s)
    new = old + torch.where(u[:, 5:] < 0.5, 1.0, -1.0)[:, :, None] * bump
    new = new * (free.sqrt() / new.norm(dim=2, keepdim=True).clamp_min(1e-12))
    return ball.project(ball.x + rest.scatter(2, into, new).view_as(x_best))
