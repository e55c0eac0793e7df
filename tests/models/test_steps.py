"""Attacks tell their steps: what listeners hear, where a stop ends them, what no listener costs."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toys import asked, attackable, late

from robusteval.art.from_art import from_art
from robusteval.datasets.dataset import Positions
from robusteval.errors import Interrupted
from robusteval.evaluation.batches import ResumableMap, split_rows
from robusteval.evaluation.work_cache import WorkCache
from robusteval.models.classifier import Classifier
from robusteval.models.steps import (
    FINEST,
    book_rows,
    count_passes,
    credit_stage,
    listen,
    part,
    stage,
    stop_if_asked,
    tell_step,
)
from robusteval.progress import Silent
from robusteval.registry import ATTACKS
from robusteval.runs.types import Columns

if TYPE_CHECKING:
    from robusteval.attacks.pgd import pgd
else:
    pgd = late("robusteval.attacks.pgd", "pgd")

KEY = 64 * "a"


class Heard(Silent):
    """What progress was told."""

    def __init__(self) -> None:
        self.estimates: list[tuple[float, str]] = []
        self.whole = 0

    def advance(self, n: int) -> None:
        self.whole += n

    def estimate(self, done: float, where: str) -> None:
        self.estimates.append((done, where))


class Slow(nn.Module):
    """A linear network that counts its passes, and may ask for a stop at one of them."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, 432, generator=generator), requires_grad=False)
        self.passes, self.last = 0, 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return (x.flatten(1).unsqueeze(1) * self.weight).sum(2)

    def is_over(self) -> bool:
        return 0 < self.last <= self.passes


def build() -> tuple[Classifier, Slow, Tensor]:
    network = Slow()
    x = torch.rand(8, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    return Classifier(network, num_classes=3, block=8).eval(), network, x


def never() -> bool:
    return False


def test_a_stop_in_the_third_step_of_a_thousand_ends_after_it() -> None:
    """No further pass of the network."""
    model, network, x = build()
    y = model(x).argmax(1)
    network.passes, network.last = 0, 3

    with pytest.raises(Interrupted), listen(Silent(), 8, network.is_over):
        pgd(model, x, y, eps=1e-4, steps=1000)

    assert network.passes == 3


@pytest.mark.parametrize("name", [n for n in ATTACKS.entries if n not in ("fgsm",)])
def test_every_attack_tells_its_steps(bands: Classifier, name: str) -> None:
    """From none to nearly all, never backwards, and a stop ends it at the next of them."""
    model = attackable(name, bands)
    x = torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    settings = {"steps": 12, "warmup": 4, "queries": 20, "restarts": 2, "tries": 20, "polish": 3}
    norm = {"norm": "linf"} if "linf" in ATTACKS.entries[name].norms else {}
    given: dict[str, Any] = asked(name, eps=1e-3, eps2=1e-3, **norm, **settings)
    if ATTACKS.entries[name].norms[:1] == ("l0_pixels",):
        given["eps"] = 1  # as little as it can be
    with torch.no_grad():
        y = model(x).argmax(1)
    attack = ATTACKS.load(name)
    heard = Heard()

    with listen(heard, 4, never):
        attack(model, x, y, **given)

    shares = [done for done, _ in heard.estimates]
    assert len(shares) > 3
    assert shares == sorted(shares)
    assert shares[0] < 2
    assert 2 < shares[-1] <= 4
    left = iter(range(2))
    with pytest.raises(Interrupted), listen(heard, 4, lambda: next(left, None) is None):
        attack(model, x, y, **given)


def test_stages_of_standard_are_numbered(bands: Classifier) -> None:
    """Each has its own room of the bar."""
    x = torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = bands(x).argmax(1)
    heard = Heard()

    with listen(heard, 4, never), count_passes(bands, 4, x.device) as passes:
        ATTACKS.load("quick")(bands, x, y, eps=1e-4)

    named = list(dict.fromkeys(where for _, where in heard.estimates))
    assert named == [f"stage {i + 1} of 3: {name}" for i, name in enumerate(passes.stages)]
    firsts = [next(done for done, where in heard.estimates if where == each) for each in named]
    assert firsts == pytest.approx([0, 4 / 3, 8 / 3], abs=0.05)


@pytest.mark.parametrize("name", ["ProjectedGradientDescentPyTorch", "HopSkipJump", "SquareAttack"])
def test_attacks_of_art_are_followed_by_their_passes(name: str) -> None:
    """The first batch by what its parameters say, the next by what that one took."""
    model, network, x = build()
    few = {"max_iter": 1, "max_eval": 110, "init_size": 5} if "Hop" in name else {"max_iter": 4}
    attack = from_art(name, few)
    y = model(x).argmax(1)
    heard = Heard()
    for _ in range(2):
        heard = Heard()
        with listen(heard, 8, never):
            attack(model, x, y)
    shares = [done for done, _ in heard.estimates]

    assert len(shares) > 5
    assert shares == sorted(shares)
    assert 7 < shares[-1] < 8
    network.passes, network.last = 0, 3
    with pytest.raises(Interrupted), listen(Silent(), 8, network.is_over):
        attack(model, x, y)
    assert network.passes == 3


class Attack:
    """Columns of attacked rows, and which batches were begun."""

    def __init__(self) -> None:
        self.model, self.network, x = build()
        self.x = x.repeat(4, 1, 1, 1) * torch.linspace(0.5, 1, 32).view(-1, 1, 1, 1)
        self.begun: list[int] = []

    def __call__(self, rows: Positions) -> Columns:
        self.begun.append(int(rows[0]))
        x = self.x[rows]
        x_adv = pgd(self.model, x, self.model(x).argmax(1), seeds=torch.from_numpy(rows), steps=30)
        return {"x": x_adv.flatten(1).numpy()}


def test_a_run_stopped_within_a_batch_ends_with_the_same_bits(tmp_path: Path) -> None:
    """That batch is done again, those before it are kept; progress sums to the total exactly."""
    batches = split_rows(np.arange(32), 8)
    reference = Attack()
    expected = ResumableMap(WorkCache(tmp_path / "a").parts).map("x", KEY, batches, reference)
    parts, attack, heard = WorkCache(tmp_path / "b").parts, Attack(), Heard()
    attack.network.last = 2 * reference.network.passes // 5  # in the second batch

    with pytest.raises(Interrupted):
        ResumableMap(parts, heard, attack.network.is_over).map("x", KEY, batches, attack)

    assert attack.begun == [0, 8]
    assert attack.network.passes <= attack.network.last + 1  # a step may judge its 8-bit image
    assert heard.whole == 8
    attack.network.last = 0
    found = ResumableMap(parts, heard).map("x", KEY, batches, attack)
    assert attack.begun == [0, 8, 8, 16, 24]
    assert heard.whole == 8 + 32
    np.testing.assert_array_equal(found["x"], expected["x"])


def test_what_swallows_a_stop_does_not_pass_for_done(tmp_path: Path) -> None:
    """Other people's code may take it for an error; so may ours on the way out."""

    def swallow(rows: Positions) -> Columns:
        try:
            tell_step(1, 2)
        except Exception:
            return {"x": np.zeros(len(rows))}
        raise AssertionError("nobody was listening")

    def rename(rows: Positions) -> Columns:
        try:
            tell_step(1, 2)
        except Exception as error:
            raise ValueError("broken") from error
        raise AssertionError("nobody was listening")

    for work in (swallow, rename):
        parts = WorkCache(tmp_path).parts
        with pytest.raises(Interrupted, match="the same command continues"):
            ResumableMap(parts, stopping=lambda: True).map("x", KEY, [np.arange(3)], work)
        assert list(parts.read_parts(KEY)) == []


def test_parts_of_a_loop_share_its_room() -> None:
    """Loops inside fill the part they are in; none goes back."""
    heard = Heard()
    with listen(heard, 100, never):
        for i in range(2):
            with part(i, i + 1, 2):
                for j in range(4):
                    tell_step(j, 4)
        tell_step(1, 10)

    assert [done for done, _ in heard.estimates] == [12.5, 25.0, 37.5, 50.0, 62.5, 75.0, 87.5]


def test_few_of_many_steps_are_shown() -> None:
    """No more than the eye can see."""
    heard = Heard()
    with listen(heard, 1, never):
        for i in range(10_000):
            tell_step(i, 10_000)

    assert len(heard.estimates) == FINEST - 1


def test_an_outer_listener_can_stop_what_an_inner_one_follows() -> None:
    with pytest.raises(Interrupted), listen(Silent(), 1, lambda: True):
        with listen(Silent(), 1, never):
            stop_if_asked()


def test_stages_know_their_images_and_what_they_cost() -> None:
    """Each image pays for its own passes, in the stage that made them; rows count from outside."""
    model, _, x = build()
    heard = Heard()

    def run(rows: Tensor) -> None:
        z = x[rows].requires_grad_()
        torch.autograd.grad(model(z).sum(), z)

    with listen(heard, 8, never), count_passes(model, 8, x.device) as passes:
        with stage("first", torch.arange(8), 1, 2):
            tell_step(1, 2)
            run(torch.arange(8))
            credit_stage(torch.tensor([0, 4, 7]))
        some = torch.tensor([1, 4, 6])
        with stage("near", some, 2, 2):
            tell_step(1, 2)
            credit_stage(torch.tensor([1, 2]))  # of a success of the first stage it made a better
            with book_rows(torch.tensor([2])):
                run(some[2:])
            with stage("square", torch.tensor([0, 1])), torch.no_grad():
                tell_step(0, 2)
                model(x[some[:2]])
        with stage("last", torch.arange(0)):
            pass

    assert list(passes.stages) == ["first", "near", "near/square", "last"]
    first, near, square, last = passes.stages.values()
    assert first.seen.tolist() == [True] * 8
    assert first.forwards.tolist() == first.backwards.tolist() == [1.0] * 8
    assert near.seen.nonzero().flatten().tolist() == [1, 4, 6]
    assert near.forwards.tolist() == near.backwards.tolist() == [0, 0, 0, 0, 0, 0, 1, 0]
    assert square.seen.nonzero().flatten().tolist() == [1, 4]
    assert square.forwards.tolist() == [0, 1, 0, 0, 1, 0, 0, 0]
    assert square.backwards.tolist() == [0.0] * 8
    assert not last.seen.any()
    assert first.made.nonzero().flatten().tolist() == [0, 7]
    assert near.made.nonzero().flatten().tolist() == [4, 6]
    total = sum(each.forwards for each in passes.stages.values())
    torch.testing.assert_close(total, passes.forwards)
    assert heard.estimates == [
        (0.0, "stage 1 of 2: first"),
        (2.0, "stage 1 of 2: first"),
        (4.0, "stage 2 of 2: near"),
        (6.0, "stage 2 of 2: near"),
        (6.0, "square"),
        (6.0, "last"),
    ]


def test_nobody_listening_costs_one_look() -> None:
    """One call of ours and one of a variable, whatever the step."""
    calls: list[str] = []

    def count(_frame: FrameType, event: str, _argument: object) -> None:
        if event in ("call", "c_call"):
            calls.append(event)

    sys.setprofile(count)
    try:
        tell_step(1, 2)
    finally:
        sys.setprofile(None)

    assert calls == ["call", "c_call", "c_call"]  # the last one ends the counting
