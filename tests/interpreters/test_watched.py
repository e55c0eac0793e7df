"""Maps and their derivatives cost as many images as there are, once sizes of calls are known."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer
from toys import Seen

from robusteval.interpreters.attention import attention_relevance, rollout
from robusteval.interpreters.cam import cam, gradcam, hirescam
from robusteval.interpreters.gradient import grad
from robusteval.interpreters.observing import watched
from robusteval.interpreters.rts import MaskNetwork, collect_features, measure_scale
from robusteval.models.classifier import Classifier

OFTEN = 30  # calls, after which a size was tried
BLOCK = 32  # of images as small as these
Maps = Callable[[nn.Module, Tensor, Tensor], Tensor]


def build_convolutions() -> nn.Module:
    """Convolutions, bent and with a derivative of their derivative."""
    layers = nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 3), nn.GELU(), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(200, 4))


def build_transformer() -> nn.Module:
    """Two layers of attention between nine patches and a class token."""
    made: nn.Module = VisionTransformer(9, 3, 2, 2, 8, 16, num_classes=4)
    for parameter in made.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)  # what is zero says nothing
    return made


def build(make: Callable[[], nn.Module]) -> nn.Module:
    """A network from seed 0, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = make()
    return network.eval()


def draw_images(n: int) -> Tensor:
    """Images ``(n, 3, 9, 9)``."""
    return torch.rand(n, 3, 9, 9, generator=torch.Generator().manual_seed(n))


def differentiate(maps: Maps, model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Maps of classes 0, and a derivative of them with respect to the images."""
    z = x.clone().requires_grad_()
    found = maps(model, z, torch.zeros(len(x), dtype=torch.int64))
    return found.detach(), torch.autograd.grad(found.square().sum(), z)[0]


CASES = [
    (build_convolutions, grad),
    (build_convolutions, gradcam),
    (build_transformer, grad),
    (build_transformer, gradcam),
    (build_transformer, rollout),
    (build_transformer, attention_relevance),
]


@pytest.mark.parametrize(("make", "maps"), CASES)
@pytest.mark.parametrize("n", [2, 7])
def test_few_images_are_not_padded_to_a_block(
    make: Callable[[], nn.Module], maps: Maps, n: int
) -> None:
    """Once it would have paid; what comes out is what blocks give, bit by bit."""
    network = build(make)
    x = draw_images(n)
    expected = differentiate(maps, Classifier(network, num_classes=4, block=BLOCK).eval(), x)
    seen = Seen(network).eval()
    model = Classifier(seen, num_classes=4).eval()

    for _ in range(OFTEN):
        found = differentiate(maps, model, x)
        assert all(map(torch.equal, found, expected))

    assert seen.sizes[-1] == n


def build_pooled() -> nn.Module:
    """Nine places and twelve channels before the head, which fill no multiple of 64 bytes."""
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 5), nn.SiLU()
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5))


@pytest.mark.parametrize(
    ("make", "maps"),
    [
        (build_pooled, cam),
        (build_transformer, gradcam),
        (build_transformer, hirescam),
        (build_transformer, rollout),
        (build_transformer, attention_relevance),
    ],
)
def test_a_map_does_not_depend_on_the_place_of_its_image(
    make: Callable[[], nn.Module], maps: Maps
) -> None:
    """In any order, in a block or alone; nor does its derivative."""
    network = build(make)
    model = Classifier(network, num_classes=4).eval()
    x = draw_images(7)
    expected = differentiate(maps, Classifier(network, num_classes=4, block=BLOCK).eval(), x)

    for shift in (1, 3):
        order = torch.arange(7).roll(shift)
        found = differentiate(maps, model, x[order])
        assert all(torch.equal(a, b[order]) for a, b in zip(found, expected, strict=True))
    for _ in range(OFTEN):
        found = differentiate(maps, model, x[2:3])
        assert all(torch.equal(a, b[2:3]) for a, b in zip(found, expected, strict=True))


def test_masks_stay_the_same_however_often_they_are_drawn() -> None:
    """What draws them sums over a call's images, whose number must not change on the way."""
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 12, 3)
    network = build(lambda: nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(2352, 5)))
    model = Classifier(network, num_classes=5).eval()
    x, y = torch.rand(7, 3, 32, 32), torch.arange(7) % 5
    scales = [measure_scale(features) for features in collect_features(model, x)[1][0]]
    drawing = MaskNetwork((3, 32, 32), scales, 5).eval()
    first, _ = drawing.draw_masks(model, x, y)

    for _ in range(OFTEN):
        model(x)
        again, _ = drawing.draw_masks(model, x, y)
        assert torch.equal(again, first)


class Settled(NamedTuple):
    """A model of convolutions whose sizes of calls for seven images were found."""

    network: nn.Module
    seen: Seen
    model: Classifier
    x: Tensor


def settle(use: Callable[[nn.Module, Tensor], object]) -> Settled:
    """Use a model so often that a size was tried."""
    network, x = build(build_convolutions), draw_images(7)
    seen = Seen(network).eval()
    model = Classifier(seen, num_classes=4).eval()
    for _ in range(OFTEN):
        use(model, x)
    assert seen.sizes[-1] == 7
    return Settled(network, seen, model, x)


def test_sizes_tried_for_one_derivative_say_nothing_of_the_next() -> None:
    """The derivative of a derivative is summed by other kernels."""
    _, seen, model, x = settle(lambda model, x: model(x))

    differentiate(grad, model, x)

    assert seen.sizes[-1] == BLOCK


def test_beside_somebody_elses_hooks_calls_are_blocks() -> None:
    """What they do with a batch is not known."""

    def use(model: nn.Module, x: Tensor) -> None:
        differentiate(gradcam, model, x)
        model(x)

    network, seen, model, x = settle(use)
    assert seen.sizes[-2:] == [7, 7]

    handle = network.register_forward_hook(lambda *_: None)
    use(model, x)
    handle.remove()

    assert seen.sizes[-2:] == [BLOCK, BLOCK]


def test_a_watch_ends() -> None:
    """Hooks that are set after it are somebody else's."""
    network, seen, model, x = settle(lambda model, x: model(x))

    for within in (True, False):
        with watched(model, x) if within else nullcontext():
            handle = network.register_forward_hook(lambda *_: None)
            model(x)
            handle.remove()
        assert seen.sizes[-1] == (7 if within else BLOCK)
