"""Auto-PGD against the paper written out as a plain loop, and what it does at its checkpoints."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from toys import draw_uniform

from robusteval.models.classifier import Classifier, predict_classes
from robusteval.search.apgd import HalvingPace, plan_checkpoints, plan_looks, search_apgd
from robusteval.search.balls import Ball, Norm, measure_distances, quantise
from robusteval.search.descent import Objective, Score, build_class_objective
from robusteval.search.losses import attacker_loss

SEEDS = torch.arange(8) * 1000


def follow_paper(
    lose: Callable[[Tensor], Tensor], x: Tensor, start: Tensor, eps: float, norm: str, steps: int
) -> tuple[Tensor, list[float]]:
    """Algorithm 1 of arXiv:2003.01690 for one image ``(1, c, h, w)``: x_max and all step sizes.

    With the lengths of the paper's section 4.1 as its code rounds them.
    """

    def judge(z: Tensor) -> tuple[float, Tensor]:
        z = z.detach().requires_grad_()
        value = -lose(z)
        return float(value.detach()), torch.autograd.grad(value.sum(), z)[0]

    def project(z: Tensor) -> Tensor:
        if norm == "linf":
            return torch.maximum(torch.minimum(z, x + eps), x - eps).clamp(0, 1)
        length = (z - x).norm()
        return (x + (z - x) * min(1.0, eps / float(length.clamp_min(1e-12)))).clamp(0, 1)

    def climb(z: Tensor, grad: Tensor, eta: float) -> Tensor:
        return project(z + eta * (grad.sign() if norm == "linf" else grad / grad.norm()))

    points, etas = [start], [2 * eps]
    value, grad = judge(start)
    best, best_x, best_grad, values = value, start, grad, [value]
    k, since, halved, before_best = max(int(0.22 * steps), 1), 0, True, best
    rises = 0
    for i in range(steps):
        x_k, eta = points[-1], etas[-1]
        z = climb(x_k, grad, eta)
        if i > 0:
            z = project(x_k + 0.75 * (z - x_k) + 0.25 * (x_k - points[-2]))
        points.append(z)
        value, grad = judge(z)
        rises += value > values[-1]
        values.append(value)
        since += 1
        if value > best:
            best, best_x, best_grad = value, z, grad
        if since == k:
            stuck = rises <= 0.75 * k or (not halved and best <= before_best)
            if stuck:
                etas.append(eta / 2)
                # what the next step starts from and is compared with
                points[-1], grad, values[-1] = best_x, best_grad, best
            halved, before_best, since, rises = stuck, best, 0, 0
            k = max(k - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
        if len(etas) == i + 1:
            etas.append(eta)
    return best_x, etas


@pytest.mark.parametrize("steps", [1, 2, 5, 60])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_search_is_that_of_the_paper(bands: Classifier, norm: Norm, steps: int) -> None:
    """Step by step, each image by itself, in a plain loop."""
    x = draw_uniform(4, 3, 12, 12, seed=0)
    eps = {"linf": 0.02, "l2": 0.3}[norm]
    y = predict_classes(bands(x))
    ball = Ball.around(x, norm, eps)
    start = ball.sample(SEEDS[:4])

    objective = build_class_objective(bands, y, targeted=False, loss="margin")
    found = search_apgd(objective, ball, start, steps=steps, stop="never")

    for i in range(4):
        row = slice(i, i + 1)

        def lose(z: Tensor, label: Tensor = y[row]) -> Tensor:
            return attacker_loss(bands(z), label, targeted=False, loss="margin")

        expected, _ = follow_paper(lose, x[row], start[row], eps, norm, steps)
        assert float(found.loss[i]) == pytest.approx(float(lose(expected).detach()), abs=1e-4)
        torch.testing.assert_close(found.x_adv[row], expected, atol=1e-4, rtol=0)


@pytest.fixture
def lengths(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The length of each step of each image, as a search takes them."""
    seen: list[Tensor] = []
    move = HalvingPace.move

    def watch(self: HalvingPace, ball: Ball, *rest: object, **named: object) -> Tensor:
        seen.append(self.length / ball.eps)
        return move(self, ball, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(HalvingPace, "move", watch)
    return seen


def plant(losses: list[Callable[[int], float]]) -> Objective:
    """An objective whose losses are told by the number of steps made, one row per image."""
    calls = iter(range(1000))

    def objective(x_adv: Tensor, index: Tensor) -> Score:
        i = next(calls)
        told = torch.tensor([losses[row](i) for row in index.tolist()])
        slope = x_adv.flatten(1).sum(1)
        return Score(told + slope - slope.detach(), torch.zeros(len(index), dtype=torch.bool))

    return objective


def test_steps_get_shorter_at_the_checkpoints_that_the_paper_says(lengths: list[Tensor]) -> None:
    """Four courses of the loss, each with what Conditions 1 and 2 make of it by hand."""
    courses: list[Callable[[int], float]] = [
        lambda i: -i,  # falls all the time
        lambda i: -min(i, 22),  # no further after the first checkpoint
        lambda i: -float(i % 2),  # falls in half of the steps, from the first one on
        # falls in nearly all steps, but from the first checkpoint on from higher up
        lambda i: -float(i) if i <= 22 else 100 - i / 10,
    ]
    x = torch.full((4, 1, 2, 2), 0.5)

    search_apgd(plant(courses), Ball.around(x, "l2", 0.1), x, steps=100, stop="never")

    at = {22: 0, 41: 1, 57: 2, 70: 3, 80: 4, 87: 5, 93: 6, 99: 7}
    steps = torch.stack(lengths)  # (100, 4), in units of the radius
    expected = torch.full((100, 4), 2.0)
    for step, nth in at.items():
        expected[step:, 1] = 2 * 0.5**nth
        expected[step:, 2] = 2 * 0.5 ** (nth + 1)
        # Condition 2 never twice in a row
        expected[step:, 3] = 2 * 0.5 ** ((nth + 1) // 2)
    torch.testing.assert_close(steps, expected)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_no_search_is_too_short_to_have_checkpoints(norm: Norm) -> None:
    """They come at least a step apart and never after the last one."""
    for steps in range(1, 40):
        plan = plan_checkpoints(steps, norm)
        assert list(plan) == list(torch.tensor(list(plan.values())).cumsum(0))
        assert all(since >= 1 for since in plan.values())
        assert all(at < steps for at in plan)
        assert max(plan_looks(steps)) == steps
    assert list(plan_checkpoints(100, "linf")) == [22, 41, 57, 70, 80, 87, 93, 99]


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_search_ends_no_higher_than_it_began(bands: Classifier, norm: Norm) -> None:
    """After one, two or five steps, and in a ball so large that steps overshoot."""
    x = draw_uniform(8, 3, 12, 12, seed=1)
    y = predict_classes(bands(x))
    objective = build_class_objective(bands, y, targeted=False, loss="ce")
    for eps in (1e-3, 0.9):
        ball = Ball.around(x, norm, eps)
        start = ball.sample(SEEDS)
        with torch.no_grad():
            before = objective(start, torch.arange(8)).loss
        for steps in (1, 2, 5):
            found = search_apgd(objective, ball, start, steps=steps, stop="never")
            assert bool((found.loss <= before).all())
            assert bool((measure_distances(found.x_adv, x)[norm] <= eps).all())


class Waits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what makes the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.__name__.split(".")[0]
        self.count += name in ("nonzero", "_local_scalar_dense", "masked_select", "is_nonzero")
        return func(*args, **(kwargs or {}))


def test_the_host_waits_at_looks_alone(bands: Classifier) -> None:
    """Once in each of them where nothing succeeds."""
    x = quantise(draw_uniform(2, 3, 12, 12, seed=2))[1:]
    ball = Ball.around(x, "linf", 1.5 / 255)
    objective = build_class_objective(
        bands, predict_classes(bands(x)), targeted=False, loss="margin"
    )
    with Waits() as waits:
        found = search_apgd(objective, ball, x, steps=100, stop="8bit")

    assert not found.is_adv.any()
    assert waits.count == len(plan_looks(100)) == 19
