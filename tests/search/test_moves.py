"""Flows and changes of variable against closed forms, each search on a function it must lower."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, autograd

from robusteval.search.balls import Ball, quantise
from robusteval.search.moves import Flow, Search, Signed, Tanh, measure_roughness, warp

SEEDS = torch.arange(3) * 5


def images(n: int = 3) -> Tensor:
    return quantise(torch.rand(n, 2, 6, 7, generator=torch.Generator().manual_seed(0)))


def flow_of(down: float, right: float) -> Tensor:
    flow = torch.zeros(3, 2, 6, 7)
    flow[:, 0], flow[:, 1] = down, right
    return flow


def draw(like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(2)).to(like)


def made(name: str, x: Tensor, free: Tensor | None = None) -> Search:
    free = torch.ones_like(x, dtype=torch.bool) if free is None else free
    if name == "pgd":
        return Signed(Ball.around(x, "linf", 0.1, free), 0.01)
    if name == "cw":
        return Tanh(x, free, 0.01)
    return Flow(x, free, 0.05, SEEDS[: len(x)], tau=1e-3, neighbours="direct")


def test_a_flow_of_zero_changes_no_bit() -> None:
    x = images()

    assert torch.equal(warp(x, flow_of(0, 0)), x)


def test_a_constant_flow_of_whole_pixels_is_a_shift() -> None:
    """And at the border the border is repeated."""
    x = images()

    moved = warp(x, flow_of(1, -2))

    assert torch.equal(moved[:, :, :-1, 2:], x[:, :, 1:, :-2])
    assert torch.equal(moved[:, :, -1, 2:], x[:, :, -1, :-2])
    assert torch.equal(moved[:, :, :-1, 0], x[:, :, 1:, 0])


def test_half_a_pixel_is_the_mean_of_two() -> None:
    x = images()

    moved = warp(x, flow_of(0.5, 0))

    torch.testing.assert_close(moved[:, :, :-1], (x[:, :, :-1] + x[:, :, 1:]) / 2)


def test_a_flow_is_that_of_grid_sample() -> None:
    """A second implementation."""
    x = images()
    flow = torch.randn(3, 2, 6, 7, generator=torch.Generator().manual_seed(1))
    rows, columns = torch.meshgrid(torch.arange(6.0), torch.arange(7.0), indexing="ij")
    grid = torch.stack(
        [(columns + flow[:, 1]) / 3 - 1, (rows + flow[:, 0]) / 2.5 - 1], -1
    )  # (n, h, w, 2), corners at -1 and 1

    expected = torch.nn.functional.grid_sample(
        x, grid, mode="bilinear", padding_mode="border", align_corners=True
    )

    torch.testing.assert_close(warp(x, flow), expected, atol=1e-5, rtol=0)


def test_the_derivative_of_a_flow_is_right() -> None:
    x = images().double()
    flow = torch.randn(3, 2, 6, 7, generator=torch.Generator().manual_seed(1)).double()

    assert autograd.gradcheck(lambda f: warp(x, f), flow.requires_grad_())


@pytest.mark.parametrize("neighbours", ["direct", "diagonal"])
def test_a_constant_flow_costs_nothing(neighbours: str) -> None:
    assert measure_roughness(flow_of(0.3, -1), neighbours).abs().max() < 1e-6  # type: ignore[arg-type]


def test_the_price_of_one_pixel_that_moves_alone() -> None:
    """It differs from four neighbours, and each of them from it."""
    flow = torch.zeros(1, 2, 6, 7)
    flow[0, :, 2, 3] = torch.tensor([0.6, 0.8])

    assert measure_roughness(flow).item() == pytest.approx(8, abs=2e-3)
    assert measure_roughness(flow, "diagonal").item() == pytest.approx(8, abs=2e-3)


def test_diagonal_neighbours_do_not_see_a_chessboard() -> None:
    """Which is why the default compares those next to each other."""
    board = (torch.arange(6).view(-1, 1) + torch.arange(7)) % 2
    flow = board.float().expand(1, 2, 6, 7)[:, :, 1:-1, 1:-1]
    inner = measure_roughness(flow, "diagonal") - measure_roughness(flow)

    assert inner.item() < 0


def test_a_change_of_variable_starts_at_the_image() -> None:
    """Black and white included, which stay able to move."""
    x = images()
    x[0, 0, 0] = torch.tensor([0.0, 1, 0, 1, 0, 1, 0])

    search = made("cw", x)

    assert search.point.isfinite().all()
    assert (search.make_images(search.point, None) - x).abs().max() < 2e-6
    cost = search.price_change(search.point, x + 0.5)
    assert cost is not None
    torch.testing.assert_close(cost, torch.full((3,), 0.25 * 84))


@pytest.mark.parametrize("name", ["pgd", "cw", "stadv"])
def test_every_search_lowers_what_it_is_given(name: str) -> None:
    """The squared distance from the mirror image, within box and ball."""
    x = images()
    search, wanted = made(name, x), x.flip(3)

    def far(z: Tensor) -> Tensor:
        return (z - wanted).square().flatten(1).sum(1)

    before = far(x)
    for _ in range(30):
        point = search.point.detach().requires_grad_()
        search.step(autograd.grad(far(search.make_images(point, None)).sum(), point)[0], None)

    found = search.make_images(search.point, None)
    assert bool((far(found) < before).all())
    assert bool(((found >= 0) & (found <= 1)).all())
    if name == "pgd":
        assert (found - x).abs().max() <= 0.1


@pytest.mark.parametrize("name", ["pgd", "cw", "stadv"])
def test_no_search_changes_what_it_may_not(name: str) -> None:
    """To the bit, also when rounded; weights of zero do the same."""
    x = images() * 0.9 + 0.001  # no 8-bit images
    free = torch.zeros_like(x, dtype=torch.bool)
    free[..., :3] = True
    for search, weight in (
        (made(name, x, free), None),
        (made(name, x), free[:, :1].float()),
    ):
        for _ in range(5):
            search.step(draw(search.point), weight)
        found = search.make_images(search.point, weight)

        assert torch.equal(found[~free], x[~free])
        assert not torch.equal(found[free], x[free])
    rounded, _ = made(name, x, free).round_images(x, torch.arange(3))
    assert torch.equal(rounded[~free], x[~free])


@pytest.mark.parametrize("name", ["pgd", "cw", "stadv"])
def test_weights_of_one_change_nothing_that_matters(name: str) -> None:
    """Half a weight is half the way."""
    x = images()
    search = made(name, x)
    search.step(draw(search.point), None)

    whole = search.make_images(search.point, None)
    torch.testing.assert_close(search.make_images(search.point, torch.ones(3, 1, 6, 7)), whole)
    if name != "pgd":
        half = search.make_images(search.point, torch.full((3, 1, 6, 7), 0.5))
        torch.testing.assert_close(half, (x + whole) / 2)


def test_a_signed_step_is_scaled_by_its_weight() -> None:
    x = torch.full((1, 1, 2, 2), 0.5)
    search = Signed(Ball.around(x, "linf", 0.1), 0.01)

    search.step(torch.tensor([[[[1.0, -3], [0, 2]]]]), torch.tensor([[[[1.0, 0.5], [1, 0]]]]))

    torch.testing.assert_close(search.point - x, torch.tensor([[[[-0.01, 0.005], [0, 0]]]]))


@pytest.mark.parametrize("name", ["cw", "stadv"])
def test_a_restart_forgets_the_momentum(name: str) -> None:
    """A step without a gradient then leads nowhere."""
    search = made(name, images())
    search.step(draw(search.point), None)
    kept = search.point.clone()

    search.restart()
    search.step(torch.zeros_like(kept), None)

    assert torch.equal(search.point, kept)


def test_rounded_images_know_whether_they_left_the_ball() -> None:
    """An original that is no 8-bit image may have no 8-bit image near it."""
    x = torch.full((2, 1, 3, 3), 100.5 / 255)
    x[1] = 100 / 255
    search = Signed(Ball.around(x, "linf", 0.3 / 255), 0.1 / 255)

    _, inside = search.round_images(x, torch.arange(2))

    assert inside.tolist() == [False, True]
