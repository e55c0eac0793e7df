"""Calls of other sizes than a block are used where they give the same bits, and only there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robusteval.models import call_sizes
from robusteval.models.call_sizes import Kind
from robusteval.models.classifier import Classifier

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


class Seen(nn.Module):
    """Keeps the sizes of its calls; no hook, which would be noticed."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        logits: Tensor = self.network(x)
        return logits


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

        for n in (1, 3, 10, 10, 10, 10, 17, 17, 17, 33, 33, 70, 10):
            found = differentiate(free, x[-n:])
            assert torch.equal(found[0], logits[-n:])
            assert torch.equal(found[1], grads[-n:])
    finally:
        torch.set_num_threads(before)
    assert seen.sizes[-1] < BLOCK  # some were padded less, or this would show nothing


@pytest.mark.parametrize("network", [Company(), Drawing(), Rounding()], ids=type)
def test_a_network_without_equal_bits_or_derivatives_stays_with_blocks(network: nn.Module) -> None:
    """What cannot be compared is not trusted; nobody's random numbers are used up."""
    seen = Seen(network).eval()
    model = Classifier(seen, num_classes=3).eval()
    torch.manual_seed(0)
    for _ in range(5):
        model(draw_images(10))
    state = torch.random.get_rng_state()

    torch.manual_seed(0)
    plain = Classifier(network, num_classes=3, block=BLOCK).eval()
    for _ in range(5):
        plain(draw_images(10))

    (kind,) = model.call_sizes.kinds.values()
    assert kind.same == {BLOCK}
    assert kind.others  # some were tried
    assert seen.sizes[-1] == BLOCK
    assert torch.equal(state, torch.random.get_rng_state())


def test_who_looks_on_sees_blocks_alone(smooth: nn.Module) -> None:
    """Known sizes are of calls that nobody watched or changed."""
    sizes: list[int] = []
    model = Classifier(smooth, num_classes=4).eval()
    for _ in range(5):
        model(draw_images(10))

    handle = smooth.register_forward_pre_hook(lambda _module, args: sizes.append(len(args[0])))
    for _ in range(5):
        model(draw_images(10))
    handle.remove()

    assert sizes == [BLOCK] * 5


def test_other_weights_are_asked_again(smooth: nn.Module) -> None:
    """With weights of zero every size gives the same bits, which shows nothing."""
    seen = Seen(smooth).eval()
    model = Classifier(seen, num_classes=4).eval()
    for _ in range(5):
        model(draw_images(10))
    assert seen.sizes[-1] == 10

    with torch.no_grad():
        list(smooth.parameters())[-2].zero_()  # of the linear layer
    for _ in range(5):
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


@pytest.mark.parametrize(("ratio", "size"), [(0.5, 16), (1.0, 8)])
def test_larger_calls_are_made_where_they_are_faster(
    monkeypatch: pytest.MonkeyPatch, ratio: float, size: int
) -> None:
    """With the same bits, once enough images have passed."""
    monkeypatch.setattr(call_sizes, "compare_calls", lambda *_: (True, ratio))
    kind, x = Kind(8), torch.rand(16, 1)

    tried = [kind.choose_trial(16) for _ in range(101)]
    call_sizes.try_size(kind, 16, x, lambda x: x)

    assert tried == [None] * 99 + [16, None]
    assert kind.cut(16) == [size] * (16 // size)
