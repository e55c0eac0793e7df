"""The classifier: normalisation inside, results that do not depend on company, models restored."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robusteval.errors import UsageError
from robusteval.models.classifier import (
    Classifier,
    book_rows,
    choose_block_size,
    count_passes,
    frozen,
    predict_classes,
)


class Mixed(nn.Module):
    """Convolution, batch normalisation, dropout and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.norm = nn.BatchNorm2d(5)
        self.drop = nn.Dropout(0.5)
        self.linear = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        maps = F.relu(self.norm(self.conv(x)))  # (n, 5, h - 2, w - 2)
        logits: Tensor = self.linear(self.drop(maps.mean((2, 3))))
        return logits


@pytest.fixture
def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Mixed().eval()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(70, 3, 9, 9, generator=torch.Generator().manual_seed(0))


def test_normalisation_happens_inside(network: nn.Module, images: Tensor) -> None:
    """The network sees (x - mean) / std."""
    classifier = Classifier(network, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), num_classes=4)
    mean = torch.tensor((0.1, 0.2, 0.3)).view(3, 1, 1)
    std = torch.tensor((0.5, 0.6, 0.7)).view(3, 1, 1)

    torch.testing.assert_close(classifier(images), network((images - mean) / std))


class Gated(nn.Module):
    """A smooth activation of pooled features and of whole maps, odd in number."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.squeeze = nn.Conv2d(5, 21, 1)
        self.linear = nn.Linear(21, 4)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        maps = self.activation(self.conv(x) + 0)  # (n, 5, h - 2, w - 2)
        pooled = self.activation(self.squeeze(8 * maps.mean((2, 3), keepdim=True)))
        logits: Tensor = self.linear(pooled.flatten(1))
        return logits


SMOOTH = [
    nn.SiLU(),
    nn.SiLU(inplace=True),
    nn.GELU(),
    nn.GELU("tanh"),
    nn.Sigmoid(),
    nn.Tanh(),
    nn.Softplus(),
    nn.Mish(),
    nn.ELU(),
    nn.ELU(inplace=True),
    nn.SELU(),
    nn.CELU(),
    nn.LogSigmoid(),
    nn.Hardswish(),
]


def passes(classifier: Classifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and a derivative with respect to the images."""
    z = images.clone().requires_grad_()
    logits = classifier(z)
    return logits.detach(), torch.autograd.grad(logits.logsumexp(1).sum(), z)[0]


@pytest.mark.parametrize("block", [None, 2, 7])
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_logits_and_gradients_are_the_same_bits_in_any_batch(
    network: nn.Module, images: Tensor, batch: int, block: int | None
) -> None:
    """Whatever the batch size and the order."""
    classifier = Classifier(network, num_classes=4, block=block)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(1))

    logits, grads = passes(classifier, images)
    parts = [passes(classifier, part) for part in images[order].split(batch)]  # type: ignore[no-untyped-call]

    assert torch.equal(torch.cat([part[0] for part in parts]), logits[order])
    assert torch.equal(torch.cat([part[1] for part in parts]), grads[order])


@pytest.mark.parametrize("activation", SMOOTH, ids=str)
@pytest.mark.parametrize("block", [2, 7])
def test_a_smooth_activation_rounds_alike_anywhere_in_a_block(
    images: Tensor, activation: nn.Module, block: int
) -> None:
    """The last values of a tensor pass through another implementation, which rounds otherwise."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Gated(activation).eval()
    classifier = Classifier(network, num_classes=4, block=block)

    logits, grads = passes(classifier, images)
    again = passes(classifier, images.flip(0))

    assert torch.equal(again[0].flip(0), logits)
    assert torch.equal(again[1].flip(0), grads)


def test_images_in_another_memory_format_get_the_same_bits(
    network: nn.Module, images: Tensor
) -> None:
    """Channels-last images pick other kernels: they are brought to one format."""
    classifier = Classifier(network, num_classes=4)

    assert torch.equal(
        classifier(images), classifier(images.contiguous(memory_format=torch.channels_last))
    )


def test_an_empty_batch_has_no_logits(network: nn.Module) -> None:
    """Zero images give zero rows."""
    assert Classifier(network, num_classes=4)(torch.empty(0, 3, 9, 9)).shape == (0, 4)


def test_in_train_mode_no_padding_reaches_batch_statistics(
    network: nn.Module, images: Tensor
) -> None:
    """Padding would be averaged into them."""
    classifier = Classifier(network, num_classes=4).train()
    sizes: list[int] = []
    network.register_forward_pre_hook(lambda _module, args: sizes.append(len(args[0])))

    classifier(images[:5])

    assert sizes == [5]


def test_blocks_shrink_with_the_image() -> None:
    """Powers of two, more on an accelerator."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")

    assert choose_block_size(3 * 32 * 32, cpu) == 32
    assert choose_block_size(3 * 224 * 224, cpu) == 2
    assert choose_block_size(3 * 224 * 224, cuda) == 64


def test_logits_that_are_not_finite_are_no_class() -> None:
    """NaN and infinity give -1, never a label."""
    nan, inf = torch.nan, torch.inf
    logits = torch.tensor([[0.0, 1.0], [nan, 1.0], [inf, 0.0], [-inf, 0.0]])

    assert predict_classes(logits).tolist() == [1, -1, -1, -1]


@pytest.mark.parametrize("block", [0, -1])
def test_a_block_needs_an_image(network: nn.Module, block: int) -> None:
    """Zero images per call make no progress."""
    with pytest.raises(ValueError, match="block"):
        Classifier(network, num_classes=4, block=block)


def test_a_deviation_of_zero_is_refused(network: nn.Module) -> None:
    """It would make every logit infinite."""
    with pytest.raises(ValueError, match="std"):
        Classifier(network, mean=(0.5,), std=(0.0,), num_classes=4)


def test_frozen_restores_everything_even_after_an_error(network: nn.Module) -> None:
    """Mode of each module, gradients wanted, gradients there."""
    network.train()
    network.get_submodule("norm").eval()
    weight = network.get_submodule("conv").weight
    weight.requires_grad_(False)
    bias = network.get_submodule("linear").bias
    assert isinstance(bias, nn.Parameter)
    bias.grad = torch.ones(4)
    before = [(p.requires_grad, p.grad) for p in network.parameters()]
    modes = [module.training for module in network.modules()]

    def measure_and_fail() -> None:
        with frozen(network):
            assert not any(module.training for module in network.modules())
            assert not any(p.requires_grad for p in network.parameters())
            bias.grad = None
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        measure_and_fail()

    assert modes == [module.training for module in network.modules()]
    for (wanted, grad), parameter in zip(before, network.parameters(), strict=True):
        assert parameter.requires_grad == wanted
        assert parameter.grad is grad


def test_passes_are_booked_on_the_images_they_were_for(network: nn.Module, images: Tensor) -> None:
    """Known rows exactly, unknown ones shared, a backward pass where one was made."""
    classifier = Classifier(network, num_classes=4).requires_grad_(False)
    x = images[:4]

    with count_passes(classifier, 4, torch.device("cpu")) as passes:
        classifier(x)
        with book_rows(torch.tensor([2, 3])):
            z = x[2:].requires_grad_()
            torch.autograd.grad(classifier(z).sum(), z)
        classifier(x[:2])  # whose they were is not known

    assert passes.forwards.tolist() == [1.5, 1.5, 2.5, 2.5]
    assert passes.backwards.tolist() == [0, 0, 1, 1]
    assert not classifier._forward_hooks


def test_rows_that_are_lost_on_the_way_are_no_answers() -> None:
    """Of which images they are cannot be known; padding would hide that they are fewer."""
    loses = nn.Sequential(nn.Flatten(), nn.Linear(12, 3), Later())
    classifier = Classifier(loses, num_classes=3, block=8).eval()

    for n in (3, 8, 11):
        with pytest.raises(UsageError, match="7 rows of logits for 8 images"):
            classifier(torch.rand(n, 3, 2, 2))


class Later(nn.Module):
    """Leaves out the first image."""

    def forward(self, x: Tensor) -> Tensor:
        return x[1:]
