"""Square Attack: where gradients are of no use, and against a loop over single images."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import pytest
import torch
from torch import Tensor, nn
from toys import Affine, Weighed, late

from robusteval.models.classifier import Classifier, predict_classes
from robusteval.models.seeds import per_image
from robusteval.models.steps import count_passes
from robusteval.search.balls import Ball, measure_distances, quantise
from robusteval.search.descent import Found, Objective, Score
from robusteval.search.square import build_bumps, choose_width, search_square

if TYPE_CHECKING:
    from robusteval.attacks.square import square
else:
    square = late("robusteval.attacks.square", "square")


def grey(n: int, *shape: int) -> Tensor:
    """Images of the same grey, the 128th of 256."""
    return quantise(torch.full((n, *shape), 0.5))


def labels_of(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return predict_classes(model(x))


def count(model: nn.Module, x: Tensor, y: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
    """Results, and forward passes of each image."""
    with count_passes(model, len(x), x.device) as passes:
        x_adv = square(model, x, y, **settings)
    assert not passes.backwards.any()
    return x_adv, passes.forwards.long()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_network_without_gradients_falls(norm: Literal["linf", "l2"]) -> None:
    """Its input is rounded, so that every gradient is zero."""
    weight = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(0)).sign()
    model = Weighed(weight, bias=float(weight.sum()) * 0.5 - 1.0, levels=20)
    x, y = grey(4, 1, 8, 8), torch.ones(4, dtype=torch.int64)
    assert labels_of(model, x).equal(y)
    z = x.clone().requires_grad_()
    assert not torch.autograd.grad(model(z).sum(), z)[0].any()

    eps = 0.1 if norm == "linf" else 0.8
    x_adv = square(
        model, x, y, norm=norm, eps=eps, queries=600, rescale=True, seeds=torch.arange(4)
    )

    assert labels_of(model, x_adv).ne(y).all()
    assert bool((measure_distances(x_adv, x)[norm] <= eps).all())


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(("h", "w"), [(8, 8), (6, 11), (11, 6)])
@pytest.mark.parametrize("edge", ["row", "column"])
def test_the_last_row_and_column_are_searched(
    norm: Literal["linf", "l2"], h: int, w: int, edge: str
) -> None:
    """A network that looks at nothing else, with alternating signs, falls to small windows."""
    weight = torch.zeros(1, h, w)
    line = weight[0, -1] if edge == "row" else weight[0, :, -1]
    line[:] = torch.tensor([1.0, -1.0]).repeat(6)[: len(line)]
    eps = 0.1 if norm == "linf" else 0.3
    reach = eps * (line.abs().sum() if norm == "linf" else line.norm())
    x, y = grey(3, 1, h, w), torch.ones(3, dtype=torch.int64)
    side = float((x[0] * weight).sum())
    # the nearer to the best image the harder; bumps of three pixels fit these signs badly
    model = Weighed(weight, bias=side - (0.8 if norm == "linf" else 0.4) * float(reach))
    assert labels_of(model, x).equal(y)

    x_adv = square(
        model, x, y, norm=norm, eps=eps, queries=1500, stop="float", seeds=torch.arange(3)
    )

    assert labels_of(model, x_adv).ne(y).all()


def test_each_image_costs_the_queries_it_takes() -> None:
    """One that holds all of them, one that is wrong at the start the first and no more."""
    model = Weighed(torch.ones(1, 6, 6), bias=17.0)
    x = torch.cat([grey(2, 1, 6, 6), quantise(torch.full((1, 1, 6, 6), 0.1))])
    y = torch.tensor([1, 1, 1])

    _, forwards = count(model, x, y, eps=1e-4, queries=37, stop="float")

    assert forwards.tolist() == [37, 37, 1]


def test_the_best_so_far_is_kept(bands: Classifier) -> None:
    """More queries never leave a higher margin."""
    x = quantise(torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(0)))
    y = labels_of(bands, x)
    margins = []
    for queries in (1, 5, 30, 80):
        x_adv = square(bands, x, y, eps=0.01, queries=queries, seeds=torch.arange(4), stop="never")
        logits = bands(x_adv).detach()
        own = logits.gather(1, y[:, None]).squeeze(1)
        margins.append(own - logits.scatter(1, y[:, None], -torch.inf).amax(1))

    assert all(bool((b <= a).all()) for a, b in pairwise(margins))


@pytest.mark.parametrize(("query", "share"), [(0, 1), (10, 1), (11, 2), (51, 4), (4001, 128)])
def test_windows_shrink_at_the_published_queries(query: int, share: int) -> None:
    """The share of the pixels is halved after queries 10, 50, 200, 500, … of 10,000."""
    side = choose_width(query, 10_000, 0.8, 100, 64)

    assert side == min(64, round(math.sqrt(0.8 / share * 6400)))
    assert choose_width(query // 10, 1_000, 0.8, 100, 64) in (
        side,
        round(math.sqrt(1.6 / share * 6400)),
        64,
    )


def test_bumps_are_two_hills_of_opposite_sign() -> None:
    """Of length 1; higher in the middle of each half, by 1, 1/4, 1/9, … from ring to ring."""
    upright, lying = build_bumps(7, torch.zeros(1))

    assert float(upright.norm()) == pytest.approx(1)
    assert torch.equal(lying, upright.T)
    assert bool((upright[:3] > 0).all())
    assert bool((upright[3:] < 0).all())
    hill = upright[3:] / upright[5, 3]
    full = 1 + 1 / 4 + 1 / 9 + 1 / 16
    assert float(hill[2, 4]) == pytest.approx((1 / 4 + 1 / 9 + 1 / 16) / full)
    assert float(hill[0, 0]) == pytest.approx(1 / 16 / full)


def search_one(model: nn.Module, x: Tensor, y: int, seed: int, eps: float, queries: int) -> Tensor:
    """The linf search of one image ``(c, h, w)``, pixel by pixel."""
    c, h, w = x.shape
    low, high = (x - eps).clamp(0, 1), (x + eps).clamp(0, 1)

    def margin(z: Tensor) -> float:
        logits = model(z[None])[0].tolist()
        return float(logits[y] - max(value for k, value in enumerate(logits) if k != y))

    start = per_image(torch.tensor([seed]), torch.Size((c, 1, w)))[0]
    best = torch.where(start < 0.5, high, low)
    loss = margin(best)
    for i in range(1, queries):
        if loss < 0:
            break
        block = per_image(torch.tensor([seed + 1 + (i - 1) // 100]), torch.Size((100, c + 2)))[0]
        u = block[(i - 1) % 100].tolist()
        halvings = sum(i > at for at in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000))
        s = min(max(round(math.sqrt(0.8 / 2**halvings * h * w)), 1), h, w)
        top, left = int(u[0] * (h - s + 1)), int(u[1] * (w - s + 1))
        for turned in (False, True):
            z = best.clone()
            for channel in range(c):
                edge = high if (u[2 + channel] < 0.5) != turned else low
                for row in range(top, top + s):
                    for column in range(left, left + s):
                        z[channel, row, column] = edge[channel, row, column]
            if not torch.equal(z, best):
                break
        value = margin(z)
        if value < loss:
            best, loss = z, value
    return best


def test_a_loop_over_single_images_finds_the_same() -> None:
    """Written out from the paper, one image and one pixel at a time; images of 7x5 pixels."""
    generator = torch.Generator().manual_seed(1)
    model = Affine(torch.randn(4, 2, 7, 5, generator=generator)).requires_grad_(False)
    x = 0.2 + 0.6 * torch.rand(5, 2, 7, 5, generator=generator)
    y, seeds = labels_of(model, x), torch.tensor([3, 70, 1000, 5, 11])

    together = square(model, x, y, eps=0.05, queries=130, stop="float", seeds=seeds)

    for i in range(5):
        alone = search_one(model, x[i], int(y[i]), int(seeds[i]), 0.05, 130)
        torch.testing.assert_close(together[i], alone, atol=1e-7, rtol=0)
    assert labels_of(model, together).ne(y).any()


def search_patiently(objective: Objective, patience: int, reached: Tensor) -> Found:
    """A search of 100 queries beside others that reached these losses ``(n,)``."""
    return search_square(
        objective,
        Ball.around(grey(len(reached), 1, 6, 6), "linf", 0.1),
        None,
        queries=100,
        share=0.8,
        rescale=False,
        stop="8bit",
        patience=patience,
        reached=reached,
    )


def test_a_search_ends_that_has_no_hope_and_is_behind_others() -> None:
    """Losses that fall by so much a query: none, too little, enough, none but ahead of others."""
    slope = torch.tensor([0.0, 0.9, 1.1, 0.0]) / 99  # 1 at the first of 100 queries
    queries = torch.zeros(4)

    def objective(x_adv: Tensor, index: Tensor) -> Score:
        loss = 1 - slope[index] * queries[index]
        queries[index] += 1
        return Score(loss, torch.zeros(len(x_adv), dtype=torch.bool))

    found = search_patiently(objective, 20, torch.tensor([0.01, 0.01, 0.01, 2.0]))

    assert queries.tolist() == [21, 21, 100, 100]
    torch.testing.assert_close(found.loss, 1 - slope * (queries - 1))


def test_a_search_that_slows_down_ends_once_its_mean_pace_is_too_slow() -> None:
    """Down to 3/8 after 50 of 100 queries, then flat: at 75 it would still fall by 5/24."""
    asked: list[int] = []

    def objective(x_adv: Tensor, index: Tensor) -> Score:
        asked.append(len(index))
        loss = torch.full((len(x_adv),), 1 - min(len(asked), 51) / 80)
        return Score(loss, torch.zeros(len(x_adv), dtype=torch.bool))

    search_patiently(objective, 25, torch.zeros(1))

    assert len(asked) == 76  # at 50 it would fall by 5/8


@pytest.mark.parametrize("settings", [{"queries": 0}, {"share": 0.0}, {"share": 1.5}])
def test_parameters_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    """In a sentence that names them, before anything is computed."""
    nothing = torch.empty(0, 1, 6, 6)

    with pytest.raises(ValueError, match=next(iter(settings))):
        square(nn.Identity(), nothing, torch.empty(0, dtype=torch.int64), **settings)
