"""Networks that torch.jit has compiled: attacked as they are, and no map of the wrong tensor."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from robusteval.attacks.pgd import fgsm
from robusteval.errors import UsageError
from robusteval.interpreters.cam import gradcam
from robusteval.interpreters.explainer import Interpreter
from robusteval.models.classifier import Classifier
from robusteval.models.masked import mask_units

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit")
SHAPE = (3, 8, 8)


class Net(nn.Module):
    """Convolutions, of which a part or everything is compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.body = nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(self.first(x)).mean((2, 3)))
        return logits


def script() -> nn.Module:
    scripted: nn.Module = torch.jit.script(Net())
    return scripted


def trace() -> nn.Module:
    traced: nn.Module = torch.jit.trace(Net(), torch.zeros(1, *SHAPE))  # type: ignore[no-untyped-call]
    return traced


def script_part() -> nn.Module:
    net = Net()
    net.add_module("body", torch.jit.script(net.body))
    return net


@pytest.mark.parametrize("make", [script, trace, script_part])
@pytest.mark.parametrize("spec", ["cam", "gradcam", "gradcam:layer=body", "library:method=gradcam"])
def test_what_is_compiled_has_no_maps(make: Callable[[], nn.Module], spec: str) -> None:
    """A part as little: the last feature maps that can be seen may not be the last there are."""
    model = Classifier(make(), num_classes=3).eval()

    with pytest.raises(UsageError, match=r"^(the network|layer 'body') is compiled by torch\.jit"):
        Interpreter.build(spec, model, SHAPE)


def test_a_layer_outside_of_what_is_compiled_has_maps() -> None:
    x, y = torch.rand(2, *SHAPE), torch.tensor([0, 1])

    assert gradcam(script_part().eval(), x, y, layer="first").shape == (2, 1, 8, 8)


def test_units_of_what_is_compiled_cannot_be_masked() -> None:
    model = Classifier(script(), num_classes=3).eval()

    with pytest.raises(UsageError, match="compiled"):
        mask_units(model, "body", torch.ones(4))(torch.rand(1, *SHAPE))


def test_what_is_compiled_is_attacked() -> None:
    x, y = torch.rand(4, *SHAPE), torch.tensor([0, 1, 2, 0])
    model = Classifier(script(), num_classes=3).eval()

    assert (fgsm(model, x, y, eps=8 / 255) != x).any()
