"""An interpreter with its parameters, ready on a classifier."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, autograd, nn
from torch.autograd.function import once_differentiable

from robusteval.errors import RunError, UsageError
from robusteval.evaluation.plan import prepare_attack
from robusteval.interpreters.explainer import Interpreter, scale_maps
from robusteval.interpreters.gradient import grad
from robusteval.models.classifier import Classifier
from robusteval.runs.types import Spec

SHAPE = (3, 12, 12)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Images, classes and seeds."""
    x = torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(0))
    return x, torch.arange(4) % 3, torch.arange(4)


def test_both_ways_to_its_maps_agree(
    bands: Classifier, batch: tuple[Tensor, Tensor, Tensor]
) -> None:
    """As arrays for figures, and as tensors for attacks; both are scaled."""
    x, y, seeds = batch
    interpreter = Interpreter.build("grad:pool=2", bands, SHAPE)

    arrays = interpreter.compute_maps(bands, x, y, seeds)
    maps, _ = interpreter.trace_maps(bands, x, y, seeds)

    assert torch.equal(maps, scale_maps("grad", grad(bands, x, y, pool=2)))
    assert torch.equal(torch.from_numpy(arrays), maps.squeeze(1))


def test_logits_with_other_slopes_are_not_given_away(
    bands: Classifier, batch: tuple[Tensor, Tensor, Tensor]
) -> None:
    x, y, seeds = batch
    x.requires_grad_()

    _, smooth = Interpreter.build("grad", bands, SHAPE).trace_maps(bands, x, y, seeds)
    _, own = Interpreter.build("grad:relu=true", bands, SHAPE).trace_maps(bands, x, y, seeds)

    assert smooth is None
    assert own is not None
    assert torch.equal(own, bands(x))


def test_a_reader_learns_all_parameters(bands: Classifier) -> None:
    found = Interpreter.build("grad:pool=2", bands, SHAPE).describe()

    assert found["spec"] == "grad:pool=2"
    assert found["parameters"] == {"score": "logit", "pool": 2, "relu": "smooth"}
    assert (found["stretched"], found["seeded"], found["alike"]) == (True, False, [])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gard", "unknown interpreter 'gard'"),
        ("grad:poll=2", "unknown parameter of grad"),
        ("grad:pool=0", "grad: pool must"),
        ("cam", "cam: needs a network that ends in global average pooling"),
    ],
)
def test_what_the_classifier_cannot_have_is_refused_before_the_first_map(
    spec: str, message: str, bands: Classifier
) -> None:
    with pytest.raises(UsageError, match=message):
        Interpreter.build(spec, bands, SHAPE)


def test_an_interpreter_that_breaks_is_one_sentence(
    bands: Classifier, batch: tuple[Tensor, Tensor, Tensor]
) -> None:
    x, y, seeds = batch
    interpreter = Interpreter.build("grad", bands, SHAPE)

    with pytest.raises(RunError, match="the interpreter grad broke"):
        interpreter.compute_maps(bands, x, y + 9, seeds)
    with pytest.raises(ValueError, match="classes must lie between"):  # attacks say it themselves
        interpreter.trace_maps(bands, x, y + 9, seeds)


def test_only_maps_with_a_derivative_can_be_attacked() -> None:
    """Settings of other interpreters are left out."""
    found = Interpreter.build_differentiable("grad", {"pool": 2, "iterations": 3})

    assert found.spec == Spec("grad", {"pool": 2})
    with pytest.raises(ValueError, match="have no derivative, so none to attack along"):
        Interpreter.build_differentiable("guided_backprop", {})
    with pytest.raises(ValueError, match="unknown interpreter 'gard'"):
        Interpreter.build_differentiable("gard", {})


class OnceOnly(autograd.Function):
    """A function whose derivative has none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upper: Tensor) -> Tensor:  # pyright: ignore
        slope: Tensor = ctx.saved_tensors[0].cos()
        return upper * slope


class Wavy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(432, 3)

    def forward(self, x: Tensor) -> Tensor:
        return OnceOnly.apply(self.linear(x.flatten(1)))  # type: ignore[no-any-return]


def test_a_second_derivative_that_is_impossible_is_found_before_the_run(bands: Classifier) -> None:
    """By trying one image."""
    once = Classifier(Wavy(), num_classes=3).eval()
    Interpreter.build("grad", once, SHAPE)  # that needs only the first

    attacked = Interpreter.build_differentiable("grad", {})
    attacked.check_derivative(bands, SHAPE)
    with pytest.raises(ValueError, match="maps of grad have no derivative on this network"):
        attacked.check_derivative(once, SHAPE)
    with pytest.raises(UsageError, match=r"advedge: .* no derivative on this network.*take cam"):
        prepare_attack("advedge:interpreter=grad", once, SHAPE)
