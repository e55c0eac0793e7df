"""Products of many images have the bits of a product for each, whether they are joined or not."""

import pytest
import torch
from torch import Tensor, autograd, nn
from torch.nn import functional as F

from robusteval.models import products
from robusteval.models.classifier import Classifier, frozen
from robusteval.models.products import (
    ALIGNMENT,
    PATIENCE,
    JoinedShapes,
    LargeProduct,
    apply_layer,
    multiply,
    multiply_rows,
    try_to_join,
)

SHAPES = [(1, 7, 5), (9, 16, 8), (13, 33, 17), (50, 64, 96), (49, 127, 255)]


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> JoinedShapes:
    """Nothing is known of any shape."""
    shapes = JoinedShapes()
    monkeypatch.setattr(products, "known", shapes)
    return shapes


def draw(*shape: int, kind: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=kind)


def test_a_product_is_that_of_matrices_and_so_are_its_derivatives() -> None:
    """The first and the second, by differences; the weights are given and have none."""
    x, weight = draw(3, 4, 5, kind=torch.float64).requires_grad_(), draw(2, 5, kind=torch.float64)
    bias = draw(2, kind=torch.float64)

    def square(rows: Tensor) -> Tensor:
        done: Tensor = LargeProduct.apply(rows, weight, bias)
        return done * done

    torch.testing.assert_close(LargeProduct.apply(x, weight, bias), F.linear(x, weight, bias))
    assert autograd.gradcheck(square, (x,))
    assert autograd.gradgradcheck(square, (x,))


@pytest.mark.parametrize(("rows", "width", "outputs"), SHAPES)
@pytest.mark.parametrize("images", [2, 3, 8])
def test_an_image_has_the_same_bits_alone_and_in_company_before_and_after_the_trial(
    images: int, rows: int, width: int, outputs: int, known: JoinedShapes
) -> None:
    x, weight, bias = draw(images, rows, width), draw(outputs, width), draw(outputs)
    upper = draw(images, rows, outputs)
    alone = torch.cat([F.linear(one.clone(), weight, bias) for one in x[:, None]])
    slopes = torch.stack([one.clone().mm(weight) for one in upper])

    for _ in range(PATIENCE + 1):
        z = x.clone().requires_grad_()
        done = apply_layer(z, weight, bias)
        (slope,) = autograd.grad(done, z, upper)
        assert torch.equal(done, alone)
        assert torch.equal(slope, slopes)
    assert len(known.joined) == 2  # there and back


def test_rows_anywhere_in_memory_have_the_same_bits(known: JoinedShapes) -> None:
    """Columns first, or beginning where no tensor begins."""
    weight = draw(16, 8)
    x = draw(4, 9, 8)
    room = torch.zeros(x.numel() + 1)
    room[1:] = x.flatten()
    for _ in range(PATIENCE + 1):
        expected = multiply(x, weight, None)
        assert torch.equal(multiply(room[1:].view_as(x), weight, None), expected)
        turned = x.transpose(1, 2).contiguous().transpose(1, 2)
        assert torch.equal(multiply(turned, weight, None), expected)


def test_products_that_sum_otherwise_together_stay_apart(
    known: JoinedShapes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a kernel that takes the last rows of many in another order."""

    def sum_otherwise(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        done = multiply_rows(rows, weight, bias)
        if len(rows) > 9:
            done[-1] *= 1 + 2**-23
        return done

    x, weight = draw(4, 9, 8), draw(16, 8)
    expected = torch.stack([one.clone().mm(weight.t()) for one in x])
    monkeypatch.setattr(products, "multiply_rows", sum_otherwise)

    for _ in range(PATIENCE + 1):
        assert torch.equal(multiply(x, weight, None), expected)
    assert [*known.joined.values()] == [False]


def test_a_shape_is_tried_once_when_it_has_been_met_before(
    known: JoinedShapes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that begin elsewhere or have another order are another shape."""
    tried: list[tuple[int, ...]] = []

    def note(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
        tried.append((*x.shape, *weight.shape))
        return try_to_join(x, weight, bias)

    monkeypatch.setattr(products, "try_to_join", note)
    x, weight = draw(4, 9, 8), draw(16, 8)
    for _ in range(PATIENCE - 1):
        multiply(x, weight, None)
    assert tried == []
    for _ in range(3):
        multiply(x, weight, None)
    assert tried == [(4, 9, 8, 16, 8)]

    shifted = torch.zeros(16 * 8 + 1)[1:].view(16, 8)
    assert shifted.data_ptr() % ALIGNMENT
    for other in (shifted, weight.t().contiguous().t()):
        for _ in range(PATIENCE):
            multiply(x, other, None)
    assert len(tried) == 3


def test_layers_that_learn_and_rounded_ones_are_called_image_by_image(known: JoinedShapes) -> None:
    layer = nn.Linear(8, 16)
    x = draw(4, 9, 8)
    for _ in range(PATIENCE + 1):
        done = apply_layer(x, layer.weight, layer.bias)
        autograd.grad(done.sum(), layer.weight)
        apply_layer(x.bfloat16(), layer.weight.bfloat16(), None)

    assert not known.met
    with frozen(layer):
        done = apply_layer(x, layer.weight, layer.bias)
    assert torch.equal(done, apply_layer(x, layer.weight, layer.bias))
    assert known.met


def test_maps_of_large_layers_can_be_attacked(
    known: JoinedShapes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The derivative of a derivative passes through them as through torch's own."""
    monkeypatch.setattr(products, "LARGE_PRODUCT", 1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Flatten(2), nn.Linear(16, 12), nn.Sigmoid(), nn.Flatten(), nn.Linear(36, 3)
        ).eval()
    x = draw(5, 3, 4, 4).sigmoid()

    def curve(model: nn.Module) -> Tensor:
        z = x.clone().requires_grad_()
        (slope,) = autograd.grad(model(z).sin().sum(), z, create_graph=True)
        return autograd.grad(slope.square().sum(), z)[0]

    with frozen(network):
        model = Classifier(network, num_classes=3, block=2).eval()
        for _ in range(PATIENCE):
            torch.testing.assert_close(curve(model), curve(network))
    assert known.joined


def test_transforms_of_functions_pass_through_large_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """And so do the derivatives of several logits in one batch."""
    monkeypatch.setattr(products, "LARGE_PRODUCT", 1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Flatten(2), nn.Linear(16, 12), nn.Sigmoid(), nn.Flatten(), nn.Linear(36, 3)
        ).eval()
    x = draw(2, 3, 4, 4).sigmoid()
    with frozen(network):
        model = Classifier(network, num_classes=3, block=2).eval()
        for _ in range(PATIENCE):
            model(x)
        expected = torch.func.jacrev(network)(x)
        z = x.clone().requires_grad_()
        rows = torch.eye(6).view(6, 2, 3)
        (batched,) = autograd.grad(model(z), z, rows, is_grads_batched=True)

        torch.testing.assert_close(torch.func.jacrev(model)(x), expected)
        torch.testing.assert_close(batched.view_as(expected), expected)
