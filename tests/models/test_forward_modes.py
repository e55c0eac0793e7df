"""Networks that torch runs are run: other float types, in-place layers, recomputed activations."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from robusteval.models import forward_modes, products
from robusteval.models.classifier import Classifier
from robusteval.models.forward_modes import find_float_type, twice_differentiable


@pytest.fixture
def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 7 * 7, 3)
        ).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(11, 3, 9, 9, generator=torch.Generator().manual_seed(0))


def answer(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of a classifier that calls the network with four images at a time, and a gradient."""
    z = images.clone().requires_grad_()
    logits = Classifier(network, num_classes=3, block=4, mean=(0.4,), std=(0.5,)).eval()(z)
    return logits.detach(), torch.autograd.grad(logits[:, 0].sum(), z)[0]


class Wrapped(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network


class InPlace(Wrapped):
    """Scales what it is given where it lies."""

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x.mul_(2.0).clamp_(min=-5).div_(2.0))
        return logits


class Recomputed(Wrapped):
    """Keeps no activation of two parts, one inside of the other's function."""

    def __init__(self, network: nn.Module, reentrant: bool) -> None:
        super().__init__(network)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        def head(maps: Tensor) -> Tensor:
            logits: Tensor = self.network[2:](maps)  # type: ignore[index]
            return logits

        maps = checkpoint(self.network[:2], x, use_reentrant=self.reentrant)  # type: ignore[index]
        logits: Tensor = checkpoint(head, maps, use_reentrant=self.reentrant)
        return logits


@pytest.mark.parametrize("images_at_a_time", [1, 4, 11])
def test_a_network_may_write_to_its_input(
    network: nn.Module, images: Tensor, images_at_a_time: int
) -> None:
    """In blocks of one tensor, too; the caller's images stay what they are."""
    some = images[:images_at_a_time]
    before = some.clone()

    logits, grad = answer(InPlace(network), some)
    plain, slope = answer(network, some)

    torch.testing.assert_close(logits, plain)
    torch.testing.assert_close(grad, slope)
    assert torch.equal(some, before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activations_that_are_recomputed_change_nothing(
    network: nn.Module, images: Tensor, reentrant: bool
) -> None:
    """Where torch itself knows the way and where it does not (reentrant), bit for bit."""
    logits, grad = answer(Recomputed(network, reentrant), images)
    plain, slope = answer(network, images)

    assert torch.equal(logits, plain)
    assert torch.equal(grad, slope)


def test_checkpointing_outside_of_a_classifier_is_untouched(
    network: nn.Module, images: Tensor
) -> None:
    answer(Recomputed(network, reentrant=False), images)
    calls: list[int] = []

    def count(x: Tensor) -> Tensor:
        calls.append(1)
        return x.sin()

    z = images.clone().requires_grad_()
    torch.autograd.grad(checkpoint(count, z, use_reentrant=False).sum(), z)

    assert len(calls) == 2


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_logits_come_as_float32(network: nn.Module, images: Tensor, kind: torch.dtype) -> None:
    """Whether the head alone or the whole network is of another type."""

    class Head(Wrapped):
        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.network(x).to(kind)
            return logits

    head, _ = answer(Head(network), images)
    plain, _ = answer(network, images)
    whole, grad = answer(network.to(kind), images)

    assert head.dtype == whole.dtype == grad.dtype == torch.float32
    torch.testing.assert_close(head, plain, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(whole, plain, rtol=3e-2, atol=3e-2)


def test_a_network_of_mixed_types_is_given_float32() -> None:
    """It converts what it has to."""
    mixed = nn.Sequential(nn.Linear(2, 2).half(), nn.Linear(2, 2))

    assert find_float_type(mixed) is torch.float32
    assert find_float_type(nn.Linear(2, 2).double()) is torch.float64
    assert find_float_type(nn.Flatten()) is torch.float32


@pytest.mark.parametrize("classes", [3, 5, 10])
def test_a_convolution_that_gives_few_classes_does_not_depend_on_the_place(classes: int) -> None:
    """A product of odd size over three places a side: its last rows are summed otherwise."""
    generator = torch.Generator().manual_seed(0)
    head = nn.Conv2d(64, classes, 1)
    model = Classifier(
        nn.Sequential(head, nn.AdaptiveAvgPool2d(1), nn.Flatten()), num_classes=classes, block=4
    ).eval()
    x = torch.randn(4, 64, 3, 3, generator=generator)

    assert torch.equal(model(x.roll(1, 0)), model(x).roll(1, 0))


class Tokens(nn.Module):
    """Tokens of some width, two layers with a bend in between."""

    def __init__(self, tokens: int, width: int, outputs: int) -> None:
        super().__init__()
        self.shape = (tokens, width)
        self.layers = nn.Sequential(nn.Linear(width, outputs), nn.Tanh(), nn.Linear(outputs, width))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layers(x.reshape(-1, *self.shape)).flatten(1)
        return logits


class Odd(nn.Module):
    """Attention between tokens whose width and number are both odd, spelt out or fused."""

    def __init__(self, tokens: int, width: int, fused: bool) -> None:
        super().__init__()
        self.shape, self.fused = (tokens, width), fused
        self.three = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.three(x.reshape(-1, *self.shape)).unsqueeze(1).chunk(3, 3)
        if self.fused:
            mixed: Tensor = F.scaled_dot_product_attention(query, key, value)
        else:
            mixed = (query @ key.transpose(2, 3)).softmax(3) @ value
        return mixed.flatten(1)


PLACED: list[Tokens | Odd] = [
    *[Tokens(1, 45, 10), Tokens(1, 441, 2), Tokens(2, 33, 64), Tokens(2, 20, 7)],
    *[Tokens(7, 13, 10), Tokens(50, 9, 2), Tokens(65, 26, 10)],
    *[Odd(9, 5, False), Odd(9, 7, True), Odd(17, 6, False), Odd(17, 5, True)],
]


@pytest.mark.parametrize("network", PLACED, ids=lambda each: f"{type(each).__name__}{each.shape}")
def test_products_of_odd_size_do_not_depend_on_the_place(network: Tokens | Odd) -> None:
    """Of rows that would begin at odd places in memory; nor do both derivatives."""
    generator = torch.Generator().manual_seed(0)
    tokens, width = network.shape
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / width**0.5
    model = Classifier(network, num_classes=tokens * width, block=8).eval()
    x = torch.randn(8, tokens * width, 1, 1, generator=generator)
    weights = torch.randn(8, tokens * width, generator=generator)

    def answer(order: Tensor) -> list[Tensor]:
        z = x[order].requires_grad_()
        with twice_differentiable(z):
            logits = model(z)
        score = (logits.sin() * weights[order]).sum()
        (slope,) = torch.autograd.grad(score, z, create_graph=True)
        (curve,) = torch.autograd.grad(slope.square().sum(), z)
        return [logits.detach(), slope.detach(), curve]

    expected = answer(torch.arange(8))
    plain = model(x)
    for shift in (1, 3):
        order = torch.arange(8).roll(shift)
        found = answer(order)
        assert all(torch.equal(a, b[order]) for a, b in zip(found, expected, strict=True))
        assert torch.equal(model(x[order]), plain[order])


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's own, of a transform
@pytest.mark.parametrize("fused", [False, True])
def test_products_of_odd_size_can_be_transformed(fused: bool) -> None:
    """By `torch.func`, which knows nothing of copies image by image."""
    model = Classifier(Odd(9, 5, fused), num_classes=45, block=4).eval()
    x = torch.randn(4, 45, 1, 1, generator=torch.Generator().manual_seed(0))

    jacobian = torch.func.jacrev(lambda z: model(z).sum(0))(x)

    z = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(model(z)[:, 3].sum(), z)
    torch.testing.assert_close(jacobian[3], expected)


class Attentive(nn.Module):
    """Pixels as tokens, attention of torch's own, a layer on each token and their mean."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.rise = nn.Linear(3, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.rise(x.flatten(2).transpose(1, 2))  # (n, t, 8)
        if not self.batch_first:
            tokens = tokens.transpose(0, 1)
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        logits: Tensor = self.head(tokens).mean(1 if self.batch_first else 0)
        return logits


@pytest.mark.parametrize("batch_first", [True, False])
def test_large_products_are_called_image_by_image_and_say_the_same(
    images: Tensor, batch_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one call of the network does, with the same bits for an image alone and in a batch."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Attentive(batch_first).eval()
    z = images.clone().requires_grad_()
    plain = network((z - 0.4) / 0.5)
    expected = plain.detach(), torch.autograd.grad(plain[:, 0].sum(), z)[0]
    apply_layer, seen = products.apply_layer, []

    def note(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        seen.append((len(x), len(weight)))
        return apply_layer(x, weight, bias)

    monkeypatch.setattr(products, "LARGE_PRODUCT", 1)
    monkeypatch.setattr(forward_modes, "apply_layer", note)
    found, alone = answer(network, images), answer(network, images[6:7])

    # attention once in every call of four images, and layers
    assert seen.count((4, 24)) == 4
    assert (4, 8) in seen
    for one, whole, single in zip(expected, found, alone, strict=True):
        torch.testing.assert_close(whole, one)
        assert torch.equal(whole[6:7], single)


class Conditioned(nn.Module):
    """A layer on a vector that the network has learned, beside one on the image."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.learned = nn.Parameter(torch.ones(width))
        self.shift = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = x.mean((2, 3)) + self.shift(self.learned)
        return logits


def test_a_vector_as_long_as_a_block_is_no_batch() -> None:
    """In a block of as many images as it has values, too."""
    x = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for width in range(1, 66):
        network = Conditioned(width).eval()
        model = Classifier(network, num_classes=3, block=width).eval()
        torch.testing.assert_close(model(x), network(x))
