"""Calls of other sizes than a block are used where they give the same bits, and only there."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toys import Seen

from robusteval.models import call_sizes
from robusteval.models.call_sizes import PATIENCE, Kind
from robusteval.models.classifier import Classifier

OFTEN = 9  # calls, after which a size is tried
BLOCK = 32  # of images as small as these


class Company(nn.Module):
    """Gives logits that depend on how many images there are."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :3] * (1 + 1e-3 * len(x))


class Drawing(nn.Module):
    """Adds noise from the global generator."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :3] + torch.rand(len(x), 3)


class Rounding(nn.Module):
    """Has no derivative."""

    def forward(self, x: Tensor) -> Tensor:
        return (x.detach() * 255).round().flatten(1)[:, :3]


class Hidden(nn.Module):
    """Differs by one last digit in calls of another size, which rounding mostly hides."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = Inside()

    def forward(self, x: Tensor) -> Tensor:
        values: Tensor = self.inside(x)
        return (values + ((values * 16).round() / 16 - values).detach()).flatten(1)[:, :243] @ MIX


class Inside(nn.Module):
    """The values of `Hidden` before they are rounded."""

    def forward(self, x: Tensor) -> Tensor:
        share = 2e-7 if len(x) != BLOCK else 0.0
        return x + x.detach() * share


class Quiet(nn.Module):
    """Depends on how many images there are only where none of them is noisy."""

    def forward(self, x: Tensor) -> Tensor:
        quiet = bool(((x[..., 1:] - x[..., :-1]).flatten(1).std(1) < 0.5).all())
        return x.flatten(1) @ MIX * (1 + 1e-3 * len(x) * quiet)


MIX = torch.linspace(-1, 1, 243 * 3).view(243, 3)


class Shaken(nn.Module):
    """Adds noise from NumPy's global state."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :3] + torch.from_numpy(np.random.rand(len(x), 3)).float()  # noqa: NPY002


class Counting(nn.Module):
    """Keeps count of its calls, by which its answers change."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x.flatten(1) @ MIX * self.calls


@pytest.fixture
def smooth() -> nn.Module:
    """A convolution and an activation whose images fill no vector registers."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 5, 3), nn.SiLU(), nn.Conv2d(5, 8, 3), nn.GELU(), nn.Flatten()
        return nn.Sequential(*layers, nn.Linear(200, 4)).eval()


def draw_images(n: int, seed: int = 0) -> Tensor:
    """Images ``(n, 3, 9, 9)``."""
    return torch.rand(n, 3, 9, 9, generator=torch.Generator().manual_seed(seed))


def differentiate(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and a derivative with respect to the images."""
    z = images.clone().requires_grad_()
    logits = model(z)
    return logits.detach(), torch.autograd.grad(logits.logsumexp(1).sum(), z)[0]


@pytest.mark.parametrize("threads", [1, 2])
def test_calls_of_any_size_give_the_bits_of_a_block(smooth: nn.Module, threads: int) -> None:
    """Before a size is known and after, whoever else is in the batch."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        seen = Seen(smooth).eval()
        free = Classifier(seen, num_classes=4).eval()
        x = draw_images(70)
        logits, grads = differentiate(Classifier(smooth, num_classes=4, block=BLOCK).eval(), x)

        for n in (1, 3, *[10] * OFTEN, *[17] * OFTEN, 33, 33, 70, 10):
            found = differentiate(free, x[-n:])
            assert torch.equal(found[0], logits[-n:])
            assert torch.equal(found[1], grads[-n:])
    finally:
        torch.set_num_threads(before)
    assert seen.sizes[-1] < BLOCK  # some were padded less, or this would show nothing


NETWORKS = [Company(), Drawing(), Shaken(), Rounding(), Hidden(), Quiet()]


@pytest.mark.parametrize("network", NETWORKS, ids=type)
def test_a_network_without_equal_bits_or_derivatives_stays_with_blocks(network: nn.Module) -> None:
    """What cannot be compared is not trusted; nobody's random numbers are used up."""
    seen = Seen(network).eval()
    model = Classifier(seen, num_classes=3).eval()
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    for _ in range(OFTEN):
        model(draw_images(10))
    state, after = torch.random.get_rng_state(), np.random.random()  # noqa: NPY002

    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    plain = Classifier(network, num_classes=3, block=BLOCK).eval()
    for _ in range(OFTEN):
        plain(draw_images(10))

    (kind,) = model.call_sizes.kinds.values()
    assert kind.same == {BLOCK}
    assert kind.others  # some were tried
    assert seen.sizes[-1] == BLOCK
    assert torch.equal(state, torch.random.get_rng_state())
    assert after == np.random.random()  # noqa: NPY002


def test_a_network_that_keeps_count_is_shown_no_made_up_images() -> None:
    """They would change what it says of others."""
    network = Counting().eval()
    model = Classifier(network, num_classes=3).eval()
    for _ in range(9):
        model(draw_images(10))
    assert network.calls == 9


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_where_rounding_hides_digits_calls_are_blocks(smooth: nn.Module, kind: torch.dtype) -> None:
    """Logits are float32: other sums of doubles look the same in it but for one in millions."""
    seen = Seen(smooth.to(kind)).eval()
    model = Classifier(seen, num_classes=4).eval()
    for _ in range(OFTEN):
        model(draw_images(10))
    assert set(seen.sizes) == {BLOCK}


def test_a_copy_begins_with_blocks(smooth: nn.Module) -> None:
    """On another machine, or changed, it may have other sizes that give equal bits."""
    model = Classifier(smooth, num_classes=4).eval()
    for _ in range(OFTEN):
        model(draw_images(10))
    assert model.call_sizes.kinds
    assert not copy.deepcopy(model).call_sizes.kinds


def test_who_looks_on_sees_blocks_alone(smooth: nn.Module) -> None:
    """Known sizes are of calls that nobody watched or changed."""
    sizes: list[int] = []
    model = Classifier(smooth, num_classes=4).eval()
    for _ in range(OFTEN):
        model(draw_images(10))

    handle = smooth.register_forward_pre_hook(lambda _module, args: sizes.append(len(args[0])))
    for _ in range(OFTEN):
        model(draw_images(10))
    handle.remove()

    assert sizes == [BLOCK] * OFTEN


def test_other_weights_are_asked_again(smooth: nn.Module) -> None:
    """With weights of zero every size gives the same bits, which shows nothing."""
    seen = Seen(smooth).eval()
    model = Classifier(seen, num_classes=4).eval()
    for _ in range(OFTEN):
        model(draw_images(10))
    assert seen.sizes[-1] == 10

    with torch.no_grad():
        list(smooth.parameters())[-2].zero_()  # of the linear layer
    for _ in range(OFTEN):
        model(draw_images(10))

    assert seen.sizes[-1] == BLOCK  # where no derivative is left nothing can be compared


def test_a_block_that_was_asked_for_is_the_only_size(smooth: nn.Module) -> None:
    """As networks need that take just one, and whoever knows better."""
    seen = Seen(smooth).eval()
    model = Classifier(seen, num_classes=4, block=4).eval()
    for _ in range(9):
        model(draw_images(9))

    assert set(seen.sizes) == {4}


@pytest.mark.parametrize(
    ("same", "best", "n", "sizes"),
    [
        ((), 8, 8, [8]),
        ((), 8, 9, [8, 8]),
        ((3,), 8, 3, [3]),
        ((3,), 8, 2, [3]),
        ((3,), 8, 11, [8, 3]),
        ((16, 32), 8, 40, [8, 8, 8, 8, 8]),
        ((16, 32), 32, 57, [32, 16, 8, 8]),
    ],
)
def test_images_are_cut_into_sizes_that_are_known(
    same: tuple[int, ...], best: int, n: int, sizes: list[int]
) -> None:
    """The largest that pays, then the least padding."""
    kind = Kind(8, same={*same}, best=best)
    kind.best = best

    assert kind.cut(n) == sizes


def test_of_a_batch_that_stays_its_own_size_is_tried() -> None:
    """Once it would have saved twice the images of its trial, and the known size's."""
    kind = Kind(32)

    tried = [kind.choose_trial(19) for _ in range(8)]

    assert 13 * 7 < 2 * (19 + 32) < 13 * 8
    assert tried == [None] * 7 + [19]


def test_of_a_batch_that_becomes_smaller_a_size_in_the_middle_is_tried_first() -> None:
    """It serves all sizes below it; then the halves are halved."""
    kind, tried, made_up = Kind(32), [], 0
    for n in 10 * [*range(31, 0, -1)]:
        size = kind.choose_trial(n)
        if size is not None:
            tried.append(size)
            kind.same.add(size)
        made_up += sum(kind.cut(n)) - n

    assert 12 <= tried[0] <= 20
    assert len(tried) < 12
    assert made_up < 10 * sum(32 - n for n in range(1, 32)) / 4


def test_sizes_that_give_other_bits_are_tried_no_more_often_than_they_have_cost() -> None:
    """Each trial is earned anew by calls that were padded since."""
    kind, cost, made_up = Kind(32), 0, 0
    for n in 40 * [*range(31, 0, -1)]:
        size = kind.choose_trial(n)
        if size is not None:
            kind.others.add(size)
            cost += size + 32
        made_up += 32 - n

    assert 0 < 2 * cost <= made_up


@pytest.mark.parametrize(("ratio", "size"), [(0.5, 16), (1.0, 8)])
def test_larger_calls_are_made_where_they_are_faster(
    monkeypatch: pytest.MonkeyPatch, ratio: float, size: int
) -> None:
    """With the same bits, once enough images have passed."""
    monkeypatch.setattr(call_sizes, "is_slower", lambda *_: False)
    monkeypatch.setattr(call_sizes, "compare_calls", lambda *_: (True, ratio))
    kind, x = Kind(8), torch.rand(16, 1)

    tried = [kind.choose_trial(16) for _ in range(PATIENCE + 1)]
    call_sizes.try_size(kind, 16, x, lambda x: x)

    assert tried == [None] * (PATIENCE - 1) + [16, None]
    assert kind.cut(16) == [size] * (16 // size)


def test_a_size_that_looks_slower_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor are larger ones: comparing takes four times as long as the look."""
    monkeypatch.setattr(call_sizes, "PATIENCE", 0)
    monkeypatch.setattr(call_sizes, "is_slower", lambda *_: True)
    kind, called = Kind(8), [0]

    def call(x: Tensor) -> Tensor:
        called[0] += len(x)
        return x

    assert kind.choose_trial(32) == 16
    call_sizes.try_size(kind, 16, torch.rand(32, 1), call)

    assert called == [0]
    assert kind.choose_trial(32) is None
    assert kind.cut(32) == [8] * 4


@pytest.mark.parametrize(("ratio", "sizes"), [(0.99, [16, 32]), (1.1, [16])])
def test_a_size_that_neither_gains_nor_loses_leads_on_to_larger_ones(
    monkeypatch: pytest.MonkeyPatch, ratio: float, sizes: list[int]
) -> None:
    """Each gains little over the one before, and the last much over the block."""
    kind, x = Kind(8), torch.rand(32, 1)
    monkeypatch.setattr(call_sizes, "PATIENCE", 0)
    monkeypatch.setattr(call_sizes, "is_slower", lambda *_: False)
    monkeypatch.setattr(
        call_sizes, "compare_calls", lambda x, *_: (True, 0.9 if len(x) == 32 else ratio)
    )
    tried = []
    for _ in range(4):
        size = kind.choose_trial(32)
        if size is not None:
            tried.append(size)
            call_sizes.try_size(kind, size, x, lambda x: x)

    assert tried == sizes
    assert kind.best == (32 if 32 in sizes else 8)
